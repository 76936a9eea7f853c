"""Rule 6: what a scheduler must not know does not move its decisions, and is out of its reach."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import Run, profile

from llmsched_gym.config import env_config, scenario
from llmsched_gym.engine import Batch
from llmsched_gym.engine.pack import pack
from llmsched_gym.engine.records import PENDING, has_come
from llmsched_gym.engine.state import Lane, State, lane_of
from llmsched_gym.engine.view import VISIBLE, View
from llmsched_gym.env.features import ALL_FEATURES, observe_features
from llmsched_gym.env.reward import rules_of
from llmsched_gym.scheduler import Compiled, registry
from llmsched_gym.workload import make_table

ROOT = Path(__file__).parents[1]
HIDDEN_NAMES = {"output_tokens", "worlds", "world", "cost_scale", "gap_start", "stop_s", "noise", "num_unresolved"}


def test_a_lane_lacks_what_is_hidden():
    hidden = {"worlds", "arrivals", "output_tokens", "due", "noise", "gaps", "steps"}
    assert hidden <= set(State._fields)
    assert not {name.rstrip("s") for name in hidden} & {name.rstrip("s") for name in Lane._fields}
    run = Run("slai", make_table(scenario("paper", num_requests=5, qps=1.0), 1), own_profile=profile(7.0))
    # the two costs of a lane are the scheduler's own profile's, not the executing one's
    own = lane_of.py_func(run.engine.state, 0) if hasattr(lane_of, "py_func") else lane_of(run.engine.state, 0)
    state = run.engine.state
    assert np.shares_memory(own.linear_s, state.own_linear_s) and np.shares_memory(own.coef_s, state.own_coef_s)
    assert own.linear_s[1] == 7e-3
    assert not hasattr(own.sim, "cost_scale")


def test_a_view_lacks_what_is_hidden():
    assert not HIDDEN_NAMES & set(VISIBLE.names)
    assert {"index", "arrival_s", "prompt_tokens", "num_output_tokens", "length_hint"} <= set(VISIBLE.names)
    run = Run("slai", make_table(scenario("paper", num_requests=50, qps=1.0), 1))
    run.steps(20)
    view = run.engine.view()
    public = {name for name in dir(view) if not name.startswith("_")}
    assert not HIDDEN_NAMES & public
    assert isinstance(view, View)
    arrived = int(run.episode.num_arrived)
    assert 0 < arrived < 50
    assert max([*view.running.index, *view.waiting.index]) < arrived
    assert np.isnan(view.running.length_hint).all()


@pytest.mark.parametrize("hint", ["oracle", "noisy:0.5"])
def test_length_hints_are_shown_where_the_scenario_gives_them(hint):
    world = scenario("paper", num_requests=50, qps=1.0, length_hint=hint)
    table = make_table(world, 1)
    run = Run("slai", table)
    run.steps(20)
    seen = run.engine.view().running
    outputs = table.output_tokens[seen.index]
    assert (seen.length_hint == outputs).all() == (hint == "oracle")
    assert (seen.length_hint > 0).all()


def test_views_are_copies():
    run = Run("slai", make_table(scenario("paper", num_requests=20, qps=1.0), 1))
    run.steps(5)
    view = run.engine.view()
    view.running.num_output_tokens[:] = 99
    view.running.arrival_s[:] = 0.0
    assert run.requests["num_output_tokens"].max() < 99
    run.step()


def test_the_built_in_schedulers_name_nothing_hidden():
    files = [
        *ROOT.glob("baselines/*.py"),
        *(ROOT / "llmsched_gym/engine" / name for name in ("pack.py", "batch.py", "predict.py")),
    ]
    assert len(files) > 6
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
            assert name not in HIDDEN_NAMES, f"{file.name}:{node.lineno} reads {name}"


def perturb(state, rng):
    """Change all that is hidden: unfinished outputs, who is still to come, the machine's speed, the horizon."""
    arrived, n = int(state.episodes[0].num_arrived), int(state.worlds[0].num_requests)
    requests = state.requests[0]
    unfinished = np.isnan(requests["resolved_s"][:n])
    emitted = requests["num_output_tokens"][:n]
    state.output_tokens[0, :n][unfinished] = emitted[unfinished] + rng.integers(1, 999, unfinished.sum())
    arrivals = state.arrivals[0]
    arrivals["gap_start"][:n] = rng.integers(0, 9, n)
    for name, low, high in (("prompt_tokens", 1, 8000), ("slo_class", 0, 2)):
        arrivals[name][arrived:n] = rng.integers(low, high, n - arrived)
    arrivals["arrival_s"][arrived:n] += rng.exponential(9.0, n - arrived).cumsum()
    arrivals["tbt_slo_s"][arrived:n] = rng.random(n - arrived)
    arrivals["ttft_slo_s"][arrived:n] = rng.random(n - arrived)
    arrivals["length_hint"][arrived:n] = 7.0
    world = state.worlds[0]
    world.next_arrival_s += 9.0
    world.cost_scale, world.stop_s, world.drain_all = 3.0, 1e9, 0
    world.num_requests, world.cohort_start, world.cohort_stop, world.num_unresolved = arrived, 1, 2, 1
    state.noise[:] = 2.0
    state.linear_s[:] *= 5.0
    state.coef_s[:, :2] *= 5.0
    state.gaps[:] = 1.0


def peek(lane):
    """Pack like Sarathi-Serve; on the way sum up all that a row has of requests that have not arrived."""
    seen = 0.0
    for r in range(lane.requests.shape[0]):
        request = lane.requests[r]
        if request.phase == PENDING:
            seen += abs(request.arrival_s) + abs(request.ttft_slo_s) + abs(request.tbt_slo_s) + request.slo_class
            seen += abs(request.length_hint) + request.prompt_tokens + request.prefill_tokens + abs(request.session_id)
            lane.memory[1] += 1.0
    lane.memory[0] += seen
    pack(lane)


def test_a_compiled_scheduler_finds_nothing_of_requests_to_come():
    run = Run(Compiled("peeks", peek), make_table(scenario("paper", num_requests=50, qps=1.0, length_hint="oracle"), 1))
    run.steps(40)
    assert run.engine.state.memory[0, 1] > 40 * 10  # there were many to look at
    assert run.engine.state.memory[0, 0] == 0.0
    arrived = run.requests["phase"] != PENDING
    assert (run.requests["prompt_tokens"][arrived] == run.table.prompt_tokens[arrived]).all()


def test_a_row_does_not_say_how_long_an_output_will_be():
    first, second = (make_table(scenario("paper", num_requests=20, qps=9.0), 1) for _ in range(2))
    second = replace(second, output_tokens=second.output_tokens + 50)
    rows = []
    for table in (first, second):
        run = Run("sarathi", table)
        run.steps(30)
        rows.append(run.requests[run.requests["phase"] != PENDING])
    assert len(rows[0]) > 3
    for name in rows[0].dtype.names:  # not the bytes: those between fields are nobody's
        np.testing.assert_array_equal(rows[0][name], rows[1][name], err_msg=name)


def rng_state(scheduler):
    return scheduler.rng.bit_generator.state if hasattr(scheduler, "rng") else None


@pytest.mark.parametrize("policy", sorted(registry()))
def test_hidden_state_does_not_move_a_decision(policy):
    world = scenario("default", num_requests=150, warmup_s=0.0, qps=2.0, strict_share=0.3, jitter=0.1)
    run = Run(policy, make_table(world, 2), num_kv_blocks=1500, watermark=0.01, jitter=0.1)
    state, rng = run.engine.state, np.random.default_rng(1)
    decided = 0
    for _ in range(12):
        run.engine.run(run.scheduler, max_steps=70)
        before = {name: array.copy() for name, array in state._asdict().items()}
        generator = rng_state(run.scheduler)

        def restore(before=before, generator=generator):
            for name, array in state._asdict().items():
                array[...] = before[name]
            if generator is not None:
                run.scheduler.rng.bit_generator.state = generator

        def decision():
            batch = run.decide()
            counts = state.batches[0]
            return (
                batch,
                state.preempt[0, : counts.num_preempt].tolist(),
                state.refuse[0, : counts.num_refuse].tolist(),
                state.memory[0].tolist(),
                state.requests["lst_s"][0, : int(run.episode.num_arrived)].tobytes(),
            )

        expected = decision()
        restore()
        perturb(state, rng)
        assert decision() == expected
        restore()
        decided += len(expected[0])
    assert decided >= 12  # at least one item a decision


class Peeking:
    """Serves the shortest output first, which it must not know."""

    def schedule(self, view):
        prompts = [*view.prefills, *view.waiting]
        if not prompts:
            return Batch({int(r): 1 for r in view.decodes.index})
        first = min(prompts, key=lambda row: self.state.output_tokens[0, row.index])
        return Batch({int(first.index): 1})


def test_the_perturbation_would_be_noticed():
    run = Run(Peeking(), make_table(scenario("paper", num_requests=30, qps=500.0), 2))
    run.scheduler.state = run.engine.state
    run.engine.run(run.scheduler, max_steps=5)
    expected = run.decide()
    perturb(run.engine.state, np.random.default_rng(3))
    assert run.decide() != expected


def test_turns_to_come_do_not_show():
    """All that schedulers and agents may read is the same, whatever the sessions' later turns will be."""
    world = scenario("chat", qps=0.5, num_requests=60, warmup_s=0.0)
    first = make_table(world, 1)
    turns = ~first.is_root
    second = replace(
        first,
        output_tokens=np.where(turns, first.output_tokens + 7, first.output_tokens),
        ttft_slo_s=np.where(turns, 9.0, first.ttft_slo_s),
        think_s=np.where(turns, first.think_s + 1.0, 0.0),
        max_output_tokens=np.where(turns, 9, first.max_output_tokens),
    )
    seen = []
    for given in (first, second):
        run = Run("sarathi", given, prefix_caching=True, patience_s=60.0)
        out = np.zeros((1, len(ALL_FEATURES)), np.float32)
        for _ in range(400):
            run.step()
            if has_come(run.requests["phase"][: len(given)])[turns].any():
                raise AssertionError("a turn came: nothing was compared behind it")
            lane = lane_of(run.engine.state, 0)
            rules, terms = rules_of(env_config("chat"))[0], np.zeros(8)
            observe_features(lane, out[0], False, run.engine.state.worlds[0], rules, terms)
        state = run.engine.state
        rows = state.requests[0][: len(given)].copy()
        seen.append((out.copy(), rows, state.prefixes[0][: len(given)].copy(), state.blocks.copy(), run.sim.clock_s))
    assert (seen[0][1]["phase"] != PENDING).sum() > 3
    for ours, theirs in zip(*seen, strict=True):
        for name in getattr(getattr(ours, "dtype", None), "names", None) or [...]:
            np.testing.assert_array_equal(*((x if name is ... else x[name]) for x in (ours, theirs)), err_msg=str(name))
    unseen = seen[0][1]["phase"] == PENDING
    assert (seen[0][2]["shares_with"][unseen] == -1).all() and (seen[0][2]["turn"][unseen] == 0).all()
