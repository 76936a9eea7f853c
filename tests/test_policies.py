"""Policy folders: inference, safety, damage, and compatibility checks."""

import hashlib
import json
import pickle
import timeit

import numpy as np
import pytest
from safetensors.numpy import save

from llmsched_gym.config import EnvConfig, env_config
from llmsched_gym.engine.jit import JIT_ENABLED
from llmsched_gym.env.actions.knobs import KNOBS, knobs_for
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.slots import NUM_SLOTS, SLOT_FEATURES
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import LoadedPolicy, load_policy, read_folder, write_folder
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.policies.knob_rules import KnobScores
from llmsched_gym.policies.load import make_policy
from llmsched_gym.policies.network import forward
from llmsched_gym.policies.networks import Mlp
from llmsched_gym.scheduler import Compiled, PolicyError, make_scheduler

CHOICES = sum(len(k.values) for k in KNOBS[:-1])
SLAI_LIKE = np.array([0, 0, 5, 0, 1, 0, 0])
SHORT = env_config("default", num_requests=60, warmup_s=0.0, qps=1.5)


NUM_INPUTS = len(FEATURES)


def mlp_tensors(rng, width=8, outputs=CHOICES, inputs=NUM_INPUTS):
    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "normalise.mean": draw(inputs),
        "normalise.scale": draw(inputs),
        "hidden.0.weight": draw(width, inputs),
        "hidden.0.bias": draw(width),
        "out.weight": draw(outputs, width),
        "out.bias": draw(outputs),
    }


def mlp_folder(path, seed=0, **config):
    spec = spec_for(EnvConfig(**config), {"kind": "mlp", "layers": 1, "activation": "relu"}, decision_s=1e-4)
    inputs = len(spec.observation["features"])
    return write_folder(path, spec, mlp_tensors(np.random.default_rng(seed), inputs=inputs))


def edit(folder, change):
    """Change policy.json as a person would, keeping it consistent with the tensors."""
    path = folder / "policy.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))


def put_tensors(folder, tensors):
    data = save(tensors)
    (folder / "policy.safetensors").write_bytes(data)
    edit(folder, lambda spec: spec.update(tensors_sha256=hashlib.sha256(data).hexdigest()))


def test_a_folder_becomes_a_scheduler(tmp_path):
    folder = mlp_folder(tmp_path / "p", action_repeat=3)
    scheduler = make_scheduler(f"{folder}")
    assert isinstance(scheduler, LoadedPolicy)
    assert (scheduler.decision_s, scheduler.config.action_repeat) == (1e-4, 3)
    assert load_policy(folder, decision_s="0").decision_s == 0.0
    first, second = (row(simulate(SHORT, str(folder), 3)) for _ in range(2))
    assert {**first, "wall_time_s": 0} == {**second, "wall_time_s": 0}
    assert first["num_finished"] > 0


def test_an_mlp_is_what_it_says():
    tensors = mlp_tensors(np.random.default_rng(1))
    spec = spec_for(EnvConfig(), {"kind": "mlp", "layers": 1, "activation": "relu"})
    x = np.random.default_rng(2).random(len(FEATURES)).astype(np.float32)
    h = np.maximum((x - tensors["normalise.mean"]) * tensors["normalise.scale"] @ tensors["hidden.0.weight"].T, -1e9)
    h = np.maximum(h + tensors["hidden.0.bias"], 0)
    out = h @ tensors["out.weight"].T + tensors["out.bias"]
    expected, first = [], 0
    for knob in KNOBS[:-1]:
        expected.append(out[first : first + len(knob.values)].argmax())
        first += len(knob.values)
    assert make_policy(spec, tensors)(x).tolist() == expected


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_compiled_layers_are_numpys(activation):
    tensors = {k: v / 4 for k, v in mlp_tensors(np.random.default_rng(3), width=32).items()}
    settings = {"layers": 1, "activation": activation}
    mlp = Mlp(settings, tensors, len(FEATURES), CHOICES)
    policy = make_policy(spec_for(EnvConfig(), {"kind": "mlp", **settings}), tensors)
    for x in np.random.default_rng(4).random((50, len(FEATURES))).astype(np.float32):
        outputs = policy.network.layers[forward(policy.network, x), :CHOICES]
        assert np.allclose(outputs, mlp(x), atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_a_run_in_compiled_code_is_one_decision_after_the_other(tmp_path, kind):
    folder = mlp_folder(tmp_path / "p", seed=6, action_repeat=3)
    if kind == "linear":
        rng, scores = np.random.default_rng(7), KnobScores(knobs_for(EnvConfig()))
        tensors = {
            "weight": rng.standard_normal((scores.num_scores, len(FEATURES))),
            "bias": rng.random(scores.num_scores),
        }
        folder = write_folder(tmp_path / "l", spec_for(EnvConfig(action_repeat=3), {"kind": "linear"}), tensors)
    whole = simulate(SHORT, str(folder), 3, num_steps=3000)
    slow = load_policy(folder)
    slow.network = None
    stepped = simulate(SHORT, slow, 3, num_steps=3000)
    assert np.array_equal(whole.steps, stepped.steps)
    assert len(set(whole.steps["decode_tokens"].tolist())) > 1


def test_a_constant_is_the_compiled_scheduler_it_describes(tmp_path):
    spec = spec_for(EnvConfig(), {"kind": "constant"})
    folder = write_folder(tmp_path / "c", spec, {"action": SLAI_LIKE})
    constant = make_scheduler(str(folder))
    assert isinstance(constant, Compiled)
    expected, got = (row(simulate(SHORT, p, 5)) for p in ("slai[usage_switch=inf]", str(folder)))
    for key in ("ttft_mean_s", "iterations", "sim_time_s", "mean_utility"):
        assert got[key] == expected[key]
    assert make_scheduler(f"{folder}[hold=true]").settings["hold"] == 1
    linear = spec_for(EnvConfig(), {"kind": "linear"})
    scores = KnobScores(knobs_for(EnvConfig()))
    tensors = {"weight": np.zeros((scores.num_scores, len(FEATURES))), "bias": scores.scores(SLAI_LIKE)}
    write_folder(tmp_path / "l", linear, tensors)
    assert row(simulate(SHORT, str(tmp_path / "l"), 5))["ttft_mean_s"] == expected["ttft_mean_s"]


def test_scores_reach_every_value_of_every_knob():
    scores = KnobScores(KNOBS)
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = np.array([rng.integers(len(k.values)) for k in KNOBS])
        assert np.array_equal(scores.actions(scores.scores(action)), action)
    low = scores.actions(np.zeros(scores.num_scores))
    assert [k.label(int(i)) for k, i in zip(KNOBS, low, strict=True)][:4] == ["128", "0.5", "0", "nan"]


@pytest.mark.parametrize("action", ["knobs", "priority", "request"])
def test_rows_do_not_depend_on_their_order(action):
    config = EnvConfig(action=action, observation="slots")
    rng, w = np.random.default_rng(3), 8
    tensors, f, s = {}, len(FEATURES), len(SLOT_FEATURES)
    shapes = {
        "row": (w, s),
        "mix": (w, w),
        "pool": (w, 2 * w + f),
        "attention.0.qkv": (3 * w, w),
        "attention.0.out": (w, w),
    }
    if action == "knobs":
        shapes["out"] = (CHOICES, w)
    else:
        shapes |= {"score.row": (w, w), "score.out": (1, w)}
        tensors["score.pool.weight"] = rng.standard_normal((w, w))
        if action == "request":
            shapes["out"] = (1, w)
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": rng.standard_normal(shape), f"{name}.bias": rng.standard_normal(shape[0])}
    tensors |= {
        "context.weight": rng.standard_normal((w, f)),
        "normalise.mean": np.zeros(f),
        "normalise.scale": np.ones(f),
    }
    spec = spec_for(config, {"kind": "rows", "width": w, "layers": 1, "heads": 2, "activation": "tanh"})
    policy = make_policy(spec, {k: v.astype(np.float32) for k, v in tensors.items()})

    used = 20
    slots, mask = np.zeros((NUM_SLOTS, s), np.float32), np.zeros(NUM_SLOTS, np.int8)
    slots[:used], mask[:used] = rng.random((used, s)), 1
    observation = {"slots": slots, "in_use": mask, "features": rng.random(f).astype(np.float32)}
    order = rng.permutation(used)
    moved = {**observation, "slots": np.concatenate([slots[:used][order], slots[used:]])}
    legal = [np.append(mask.astype(bool), False)] if action == "request" else []
    before, after = policy(observation, *legal), policy(moved, *legal)
    if action == "knobs":
        assert np.array_equal(before, after)
    elif action == "priority":
        assert np.allclose(before[:used][order], after[:used], atol=1e-5)
        assert (after[used:] == -1).all()
    else:
        assert order[after] == before
    empty = {**observation, "in_use": np.zeros(NUM_SLOTS, np.int8)}
    if action == "request":
        assert policy(empty, np.append(np.zeros(NUM_SLOTS, bool), True)) == NUM_SLOTS
    else:
        assert np.isfinite(policy(empty)).all()


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/this-must-not-exist", "w"))


def test_loading_executes_nothing(tmp_path, monkeypatch):
    folder = mlp_folder(tmp_path / "p")
    (folder / "policy.safetensors").write_bytes(pickle.dumps(Bomb()))
    (folder / "__init__.py").write_text("raise SystemExit")
    (folder / "data.pkl").write_bytes(pickle.dumps(Bomb()))

    def forbidden(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    with pytest.raises(PolicyError, match=r"policy\.safetensors"):
        load_policy(folder)
    put_tensors(folder, mlp_tensors(np.random.default_rng(0)))
    load_policy(folder)


def test_zips_need_a_flag(tmp_path):
    with pytest.raises(PolicyError, match="allow_pickle=true") as error:
        make_scheduler(f"{tmp_path}/model.zip")
    assert "\n" not in str(error.value)
    with pytest.raises(PolicyError, match="no such file"):
        make_scheduler(f"{tmp_path}/model.zip[allow_pickle=true]")


FAULTS = {
    "format": lambda s: s.update(format="other"),
    "architecture.kind": lambda s: s["architecture"].update(kind="rnn"),
    "architecture.layers": lambda s: s["architecture"].update(layers=99),
    "architecture.activation": lambda s: s["architecture"].update(activation="exec"),
    "action.kind": lambda s: s["action"].update(kind="dance"),
    "action.repeat": lambda s: s["action"].update(repeat=0),
    "action.allow_refusal": lambda s: s["action"].update(allow_refusal="yes"),
    "action.knobs.order": lambda s: s["action"]["knobs"].update(order=["fcfs", "astrology"]),
    "action.knobs": lambda s: s["action"].update(knobs={}),
    "observation.kind": lambda s: s["observation"].update(kind="slots"),
    "observation.features": lambda s: s["observation"].update(features=["true_rate"]),
    "decision_s": lambda s: s.update(decision_s=-1),
    "training": lambda s: s.pop("training"),
    "tensors_sha256": lambda s: s.update(tensors_sha256="0" * 64),
}


@pytest.mark.parametrize("field", FAULTS)
def test_a_bad_field_is_named_in_one_line(tmp_path, field):
    folder = mlp_folder(tmp_path / "p")
    edit(folder, FAULTS[field])
    with pytest.raises(PolicyError) as error:
        load_policy(folder)
    message = str(error.value)
    assert field in message and "policy.json" in message and "\n" not in message


def test_damaged_files_are_named_in_one_line(tmp_path):
    folder = mlp_folder(tmp_path / "p")
    good = {name: (folder / name).read_bytes() for name in ("policy.json", "policy.safetensors")}
    rng = np.random.default_rng(0)
    for name, data in good.items():
        for broken in (b"", data[: len(data) // 2], rng.bytes(200), b"[" * 100_000, b"NaN", None):
            path = folder / name
            path.unlink() if broken is None else path.write_bytes(broken)
            with pytest.raises(PolicyError, match=name) as error:
                load_policy(folder)
            assert "\n" not in str(error.value)
            path.write_bytes(data)
    for name, change in {
        "out.bias": lambda t: t.pop("out.bias"),
        "out.weight": lambda t: t.update({"out.weight": np.zeros((3, 3), np.float32)}),
        "hidden.0.bias": lambda t: t.update({"hidden.0.bias": np.full(8, np.nan, np.float32)}),
        "extra": lambda t: t.update(extra=np.zeros(1, np.float32)),
    }.items():
        tensors = mlp_tensors(rng)
        change(tensors)
        put_tensors(folder, tensors)
        with pytest.raises(PolicyError, match=f"policy.safetensors: {name}"):
            load_policy(folder)


def test_a_folder_that_lists_names_in_another_order_still_means_the_same(tmp_path):
    folder = mlp_folder(tmp_path / "p")
    spec, tensors = read_folder(folder)
    order = np.random.default_rng(0).permutation(len(FEATURES))
    observation = {**spec.observation, "features": [FEATURES[i].name for i in order]}
    moved = {
        k: v[..., order] if k in ("normalise.mean", "normalise.scale", "hidden.0.weight") else v
        for k, v in tensors.items()
    }
    knobs = {name: labels[::-1] for name, labels in spec.action["knobs"].items()}
    ends = np.cumsum([len(labels) for labels in knobs.values()])
    turned = np.concatenate([np.arange(end - len(v), end)[::-1] for end, v in zip(ends, knobs.values(), strict=True)])
    moved |= {"out.weight": tensors["out.weight"][turned], "out.bias": tensors["out.bias"][turned]}
    same = spec.__class__(spec.architecture, {**spec.action, "knobs": knobs}, observation)
    for _ in range(20):
        x = np.random.default_rng(0).random(len(FEATURES)).astype(np.float32)
        assert np.array_equal(make_policy(same, moved)(x), make_policy(spec, tensors)(x))


@pytest.mark.skipif(not JIT_ENABLED, reason="nothing is compiled")
def test_a_decision_from_python_is_compiled():
    """What export measures and charges on the clock is the time of a decision, not of Python."""
    policy = make_policy(
        spec_for(EnvConfig(), {"kind": "mlp", "layers": 1, "activation": "tanh"}),
        mlp_tensors(np.random.default_rng(0), width=64),
    )
    policy(x := np.zeros(len(FEATURES), np.float32))
    assert min(timeit.repeat(lambda: policy(x), number=20, repeat=20)) / 20 < 2e-4
