"""Mixtures: sessions of several models by their shares, each as its own model draws it."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_sessions import hand

from llmsched_gym.config import ConfigError, Scenario, scenario
from llmsched_gym.fluid.work import scenario_work
from llmsched_gym.workload import make_table
from llmsched_gym.workload.lengths import DATA_DIR
from llmsched_gym.workload.mixture import load_sessions, workload_files
from llmsched_gym.workload.session_statistics import workload_statistics

PARTS = [{"workload": "chat", "share": 0.75}, {"workload": "agents", "share": 0.25}]


def mixture(tmp_path, parts=PARTS, **changes):
    path = tmp_path / f"mixture-{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps({"kind": "mixture", "name": "m", "source": "by hand", "parts": parts, **changes}))
    return str(path)


def uniforms_of(mixed, n=4000):
    return np.random.default_rng(5).random((n, mixed.draws))


def test_each_session_is_what_its_own_model_draws(tmp_path):
    mixed = load_sessions(mixture(tmp_path))
    uniforms = uniforms_of(mixed)
    of, drawn = mixed.part_of(uniforms), mixed.sessions(uniforms, 32_768)
    assert of.mean() == pytest.approx(0.25, abs=0.03)
    for i, part in enumerate(mixed.parts):
        alone, mine = part.sessions(uniforms[of == i, : part.draws], 32_768), drawn.select(np.flatnonzero(of == i))
        for name in ("num_turns", "prompt_tokens", "new_tokens", "output_tokens", "think_s", "slo_draw"):
            np.testing.assert_array_equal(getattr(mine, name), getattr(alone, name), err_msg=name)


def test_system_prompts_of_the_parts_are_apart(tmp_path):
    mixed = load_sessions(mixture(tmp_path))
    uniforms = uniforms_of(mixed)
    of, ids = mixed.part_of(uniforms), mixed.sessions(uniforms, 32_768).prefix_id
    num_chat = len(mixed.parts[0].system_tokens)
    assert set(ids[of == 0]) == {-1, *range(num_chat)}
    assert set(ids[of == 1]) == set(range(num_chat, num_chat + len(mixed.parts[1].system_tokens)))
    table = make_table(Scenario(workload=mixture(tmp_path), max_model_len=32_768, qps=0.5, horizon_s=600), 0)
    for which in np.unique(table.prefix_id[table.prefix_id >= 0]):
        assert len(np.unique(table.prefix_tokens[table.prefix_id == which])) == 1


def test_the_shipped_mixture_halves_the_prompt_tokens_to_compute():
    shipped = json.loads((DATA_DIR / "mixed.json").read_text())
    assert workload_statistics("mixed", 32_768) == shipped["statistics"]

    def work(name):
        return scenario_work(Scenario(workload=name, max_model_len=32_768, prefix_caching=True), 100_000)

    chat, agents, mixed = work("chat"), work("agents"), work("mixed")
    by_agents = 0.05 * agents.prefill_tokens
    assert by_agents / (by_agents + 0.95 * chat.prefill_tokens) == pytest.approx(0.48, abs=0.01)
    assert mixed.prefill_tokens == pytest.approx(by_agents + 0.95 * chat.prefill_tokens, rel=0.05)
    assert mixed.batches == pytest.approx(0.05 * agents.batches + 0.95 * chat.batches, rel=0.05)


def test_a_change_of_a_part_is_seen(tmp_path):
    part = hand(tmp_path)
    path = mixture(tmp_path, [{"workload": part.rsplit("/", 1)[1], "share": 1}])
    world = scenario("paper", workload=path, qps=1.0, num_requests=4)
    assert make_table(world, 0).prompt_tokens.tolist() == [50, 62, 50, 62]
    assert [str(file) for file in workload_files(path)] == [path, part]
    assert workload_files("mixed") == () and [str(f) for f in workload_files(part)] == [part]
    changed = json.loads(Path(part).read_text()) | {"first_tokens": {"probs": [0, 1], "values": [20, 20]}}
    (tmp_path / "other.json").write_text(json.dumps(changed))
    (tmp_path / "other.json").replace(part)
    assert make_table(world, 0).prompt_tokens.tolist() == [60, 72, 60, 72]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parts": []}, "parts: expected a list of objects with workload and share"),
        ({"parts": {"chat": 1}}, "parts: expected a list of objects with workload and share"),
        ({"parts": [{"share": 1}]}, "parts: expected the name of a workload, got None"),
        (
            {"parts": [{"workload": "chat", "share": -1}]},
            "parts: expected a share above 0, at most 1, got -1 for 'chat'",
        ),
        ({"parts": [{"workload": "chat", "share": True}]}, "parts: expected a share above 0, at most 1, got True"),
        ({"parts": [{"workload": "chat", "share": 0.4}]}, "parts: expected shares that sum to 1, got 0.4"),
        ({"parts": [{"workload": "chat", "share": 0.5}] * 2}, "parts: expected each workload once, got 'chat' twice"),
        ({"parts": [{"workload": "sharegpt", "share": 1}]}, "parts: expected workloads of sessions, got 'sharegpt'"),
        ({"parts": [{"workload": "mixed", "share": 1}]}, "parts: expected workloads of sessions, got 'mixed'"),
        (
            {"parts": [{"workload": "frob", "share": 1}]},
            "workload: expected one of .*, or a fitted .json file, got 'frob'",
        ),
        ({"parts": [{"workload": "frob.json", "share": 1}]}, "workload: cannot read .*frob.json: No such file"),
        ({"kind": "mixtures"}, "kind: expected sessions or mixture"),
    ],
)
def test_a_damaged_mixture_is_one_line(tmp_path, changes, message):
    path = mixture(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as error:
        make_table(scenario("paper", workload=path, qps=1.0, num_requests=4), 0)
    assert "\n" not in str(error.value)


def test_a_missing_field_is_named(tmp_path):
    path = tmp_path / "less.json"
    path.write_text(json.dumps({"kind": "mixture", "name": "m", "parts": PARTS}))
    with pytest.raises(ConfigError, match=r"less\.json: missing field 'source'"):
        load_sessions(str(path))
