"""Training of routers: the network in torch and in numpy, folders, run folders, resuming, and that PPO learns."""

import json

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import torch

from llmsched_gym.agents import route_headroom
from llmsched_gym.agents import train as train_command
from llmsched_gym.agents.route_networks import NEVER, export_router, scores_of
from llmsched_gym.agents.routing import RouteTrainingEnv, typical_observations
from llmsched_gym.agents.train_route import Config, make_model, start_from, train
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.env.route.features import REPLICA_FEATURES, REQUEST_FEATURES
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies.routers import LoadedRouter, read_router, write_router
from llmsched_gym.registry import make_router, routers
from llmsched_gym.scheduler import PolicyError

SMALL = {
    "workload": "sharegpt",
    "num_replicas": 3,
    "qps": 12.0,
    "warmup_s": 2.0,
    "horizon_s": 10.0,
    "prefix_caching": False,
}
TINY = Config(
    set=SMALL,
    steps=256,
    num_envs=2,
    n_steps=64,
    batch_size=64,
    epochs=2,
    hidden=(8,),
    eval_every=128,
    eval_seeds=1,
    eval_requests=20,
    checkpoint_every=128,
    memory=500,
    learning_starts=64,
    target_every=128,
)


def tiny(tmp_path, **fields):
    return Config(**{**vars(TINY), "out": str(tmp_path), **fields})


@pytest.fixture(scope="module")
def env():
    return RouteTrainingEnv(2, "cluster", 0, **SMALL)


@pytest.fixture
def flat(env):
    seen = typical_observations(env, 0, 20)
    rows = seen[:, len(REQUEST_FEATURES) :].reshape(len(seen), -1, len(REPLICA_FEATURES))
    rows[:10, 1, 0] = 0.0  # some may not take the request
    return np.concatenate([seen[:, : len(REQUEST_FEATURES)], rows.reshape(len(seen), -1)], axis=1)


@pytest.mark.parametrize("algorithm", ["ppo", "maskable", "dqn"])
def test_the_exported_router_scores_as_the_network_does(env, flat, algorithm, tmp_path):
    model = make_model(tiny(tmp_path, algorithm=algorithm, hidden=(8, 5)), env)
    net = scores_of(model.policy)
    torch.nn.init.normal_(net.out.weight)
    net.fit(flat)
    folder = write_router(tmp_path / "r", *export_router(model.policy))
    router = make_router(str(folder))
    assert isinstance(router, LoadedRouter)
    wanted = net(torch.from_numpy(flat)).detach().numpy()
    assert (wanted[:10, 1] == np.float32(NEVER)).all() and (wanted[10:] > -1e3).all()
    chosen, _ = model.predict(flat, deterministic=True)
    for one, scores, choice in zip(flat, wanted, chosen, strict=True):
        request, rows = one[: len(REQUEST_FEATURES)], one[len(REQUEST_FEATURES) :].reshape(3, -1)
        mask = rows[:, 0] > 0
        found = router.policy.scores({"request": request, "replicas": rows}, mask)
        assert np.allclose(found[mask], scores[mask], atol=1e-4)
        assert router.policy({"request": request, "replicas": rows}, mask) == choice
        order = np.array([2, 0, 1])  # the same for every replica
        moved = router.policy.scores({"request": request, "replicas": rows[order]}, mask[order])
        assert np.allclose(moved, found[order], atol=1e-5)


def test_scores_where_nothing_is_to_be_routed_are_finite(env, tmp_path):
    net = scores_of(make_model(tiny(tmp_path), env).policy)
    scores = net(torch.zeros(2, env.observation_space.shape[0]))
    assert scores.isfinite().all() and (scores > -1e3).all()


@pytest.mark.parametrize("algorithm", ["ppo", "maskable", "dqn"])
def test_a_run_leaves_a_router_that_evaluate_runs(tmp_path, algorithm):
    out = tmp_path / "run"
    folder = train(tiny(out, algorithm=algorithm))
    lines = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] >= 256 and "eval/mean_utility" in lines[-1]
    spec, _ = read_router(folder)
    assert spec.training["algorithm"] == algorithm and spec.training["suite"] == "cluster"
    for replicas in (3, 5):
        world = scenario("cluster", **{**SMALL, "num_requests": 30, "num_replicas": replicas})
        figures = row(simulate(world, f"{folder}+slai", 3))
        assert 0.0 < figures["mean_utility"] <= 1.0
    with pytest.raises(ConfigError, match="holds a run already"):
        train(tiny(out))
    going_on = tiny(out, resume=True)
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**settings, "steps": 512}))
    with pytest.raises(ConfigError, match=r"--steps: the run in .* has 512, got 256; a run goes on as it began"):
        train(going_on)
    train(tiny(out, resume=True, steps=512))
    after = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    assert after[: len(lines)] == lines and after[-1]["step"] >= 512


def test_the_same_seed_gives_the_same_router(tmp_path):
    first, second, other = (
        read_router(train(tiny(tmp_path / str(i), seed=seed)))[1] for i, seed in enumerate((4, 4, 5))
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_a_warm_start_begins_with_the_scores_of_a_folder(env, flat, tmp_path):
    folder = train(tiny(tmp_path / "a"))
    for algorithm in ("ppo", "dqn"):
        model = make_model(tiny(tmp_path, algorithm=algorithm, seed=9), env)
        start_from(model.policy, str(folder))
        _, tensors = export_router(model.policy)
        assert all(np.array_equal(tensors[name], array) for name, array in read_router(folder)[1].items())
    with pytest.raises(ConfigError, match="expected a router with this training's network"):
        start_from(make_model(tiny(tmp_path, hidden=(9,)), env).policy, str(folder))


def test_the_command_line_reaches_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_command.command(["--env", "route", "--help"])
    assert "dqn" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--steps: expected a whole number >= 1"):
        train_command.command(["--env", "route", "--steps", "0", "--out", str(tmp_path / "x")])
    for flag, value, said in (
        ("--learning-rate", "-1", "--learning-rate: expected a number >= 0, got -1.0"),
        ("--tau-s", "nan", "--tau-s: expected a number >= 0, got nan"),
        ("--hidden", "a", "expected whole numbers separated by commas, got 'a'"),
    ):
        with pytest.raises(ConfigError, match=said):
            train_command.command(["--env", "route", flag, value, "--out", str(tmp_path / "x")])
    with pytest.raises(ConfigError, match="invalid choice: 'walk'"):
        train_command.command(["--env", "walk", "--out", str(tmp_path / "x")])
    with pytest.raises(ConfigError, match="suite: expected one of"):
        train_command.command(["--env", "route", "--suite", "paper", "--out", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()


def test_faults_of_folders_are_one_line(tmp_path):
    folder = train(tiny(tmp_path / "a"))
    text = (folder / "policy.json").read_text()
    for change, words in (
        (lambda s: s.update(format="llmsched-policy/1"), "format: expected 'llmsched-router/1'"),
        (lambda s: s["architecture"].update(kind="mlp"), "architecture.kind"),
        (lambda s: s["architecture"].update(layers=3), "hidden.1.bias|hidden.1.weight"),
        (lambda s: s["observation"].update(replicas=["true_length"]), "observation.replicas: this version has no"),
        (lambda s: s.update(tensors_sha256="0"), "tensors_sha256"),
    ):
        spec = json.loads(text)
        change(spec)
        (folder / "policy.json").write_text(json.dumps(spec))
        with pytest.raises(PolicyError, match=words) as error:
            make_router(str(folder))
        assert "\n" not in str(error.value)
    (folder / "policy.json").write_text(text)
    with pytest.raises(PolicyError, match="unknown parameter 'x', it has none"):
        make_router(f"{folder}[x=1]")
    with pytest.raises(PolicyError, match="no such router folder"):
        make_router(f"{tmp_path}/nothing")


def test_ppo_learns_to_leave_the_slow_replica_what_it_can_do(tmp_path):
    """An H100 and an RTX 6000 Ada: half of the requests each is too much for the slow one."""
    world = {**SMALL, "num_replicas": 2, "qps": 10.0, "horizon_s": 40.0}
    world["replica_profiles"] = ("h100-mistral-7b", "rtx6000ada-mistral-7b")
    fields = {"set": world, "steps": 8192, "n_steps": 256, "num_envs": 4, "batch_size": 256, "epochs": 6}
    fields |= {"learning_rate": 3e-3, "tau_s": 10.0, "eval_every": 8192, "eval_requests": 200, "checkpoint_every": 8192}
    folder = train(tiny(tmp_path / "a", **fields))
    judged_in = scenario("cluster", **{**world, "num_requests": 200})
    learned, chance = (
        np.mean([row(simulate(judged_in, f"{router}+slai", seed))["mean_utility"] for seed in (3, 4)])
        for router in (folder, "random")
    )
    assert learned > chance + 0.03


def test_headroom_names_the_best_and_pairs_the_rest(tmp_path):
    path = tmp_path / "h.json"
    config = route_headroom.Config(
        set={**SMALL, "replica_profiles": ("h100-mistral-7b",) * 2 + ("rtx6000ada-mistral-7b",)},
        **{"seeds": 2, "selection_seeds": 1, "requests": 40, "workers": 1, "out": str(path)},
    )
    found = route_headroom.headroom(config)
    assert json.loads(path.read_text())["best_tuned"] == found["best_tuned"]
    table = found["routers"]
    assert table[found["best_tuned"]]["difference"] == 0.0
    assert table["hindsight"]["mean_utility"] >= max(entry["mean_utility"] for entry in table.values()) - 1e-12
    assert len(table) == len(routers()) + 2
    with pytest.raises(ConfigError, match="suite: expected one of replicas, got 'default'"):
        route_headroom.headroom(route_headroom.Config(suite="default"))
