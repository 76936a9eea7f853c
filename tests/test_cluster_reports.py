"""What replicas report to routers, and when."""

import math

import numpy as np
import pytest
from clusters import DEVICES, Anywhere, Replicas, random_sessions
from helpers import request

from llmsched_gym.cluster.events import OVER, ROUTE
from llmsched_gym.engine.blocks import NAMED, owner_of, slot_of
from llmsched_gym.engine.records import (
    REJECTED,
)


def state_of(run, j):
    """What replica `j` would report now, from its lists."""
    state, sim = run.cluster.state, run.sims[j]
    waiting = run.requests[state.waiting[j][: sim.num_waiting]]
    running = run.requests[state.running[j][: sim.num_running]]
    left = np.maximum(running["prefill_tokens"] - running["num_computed_tokens"], 0)
    return {
        "num_waiting": len(waiting),
        "num_running": len(running),
        "num_strict": int((waiting["slo_class"] == 0).sum() + (running["slo_class"] == 0).sum()),
        "free_blocks": int(sim.free_blocks),
        "kv_usage": 1.0 - sim.free_blocks / sim.total_blocks,
        "prompt_tokens_left": float(waiting["prefill_tokens"].sum() + left.sum()),
    }


def busy_rows(count=60, seed=5):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(0.01, count))
    return [
        request(float(t), int(rng.integers(9, 200)), int(rng.integers(1, 30)), rng.choice([0.1, 0.5])) for t in times
    ]


def test_fresh_reports_are_the_state():
    run = Replicas(busy_rows(), devices=DEVICES, num_replicas=3, max_num_seqs=4, patience_s=1.0)
    router, decisions = Anywhere(1), 0
    while (view := run.decide()) is not None:
        for j, seen in enumerate(view.replicas):
            for name, value in state_of(run, j).items():
                assert seen[name] == pytest.approx(value), name
            assert seen.age_s == 0.0 and seen.num_dispatched == 0
        run.send(router.route(view))
        decisions += 1
    assert decisions == 60


@pytest.mark.parametrize("staleness_s", [0.03, 0.1, 2.0])
def test_reports_have_an_age(staleness_s):
    """Between two reports of a replica only what was sent there since changes; each has a phase of its own."""
    n = 3
    run = Replicas(busy_rows(), devices=DEVICES, num_replicas=n, max_num_seqs=4, router_staleness_s=staleness_s)
    states, sent, due = [{} for _ in range(n)], [[] for _ in range(n)], np.full(n, -1.0)
    router, ages = Anywhere(1), []
    kept = [state_of(run, j) for j in range(n)]

    def notice(until_s):
        """What was so up to `until_s` is what reports that fell due by then tell."""
        for j in range(n):
            number = math.floor(until_s / staleness_s - j / n)
            if number >= 0 and number > due[j]:
                due[j], states[j], sent[j] = number, kept[j], []

    for _ in range(5000):
        code = run.event()
        notice(run.now_s)
        if code == OVER:
            break
        if code == ROUTE:
            view = run.cluster.view()
            for j, seen in enumerate(view.replicas):
                report_s = (due[j] + j / n) * staleness_s if due[j] >= 0 else 0.0
                assert seen.age_s == pytest.approx(view.now_s - report_s, abs=1e-12)
                assert seen.num_dispatched == len(sent[j])
                told = states[j] or {"num_waiting": 0, "num_running": 0, "num_strict": 0, "prompt_tokens_left": 0}
                assert seen.num_running == told["num_running"]
                assert seen.num_waiting == told["num_waiting"] + len(sent[j])
                tokens = sum(int(run.requests[r]["prompt_tokens"]) for r in sent[j])
                assert seen.prompt_tokens_left == told["prompt_tokens_left"] + tokens
                strict = sum(int(run.requests[r]["slo_class"] == 0) for r in sent[j])
                assert seen.num_strict == told["num_strict"] + strict
                ages.append(seen.age_s)
            j = router.route(view)
            run.send(j)
            if run.phases[view.index] != REJECTED:  # by a replica that cannot hold its output
                sent[j].append(view.index)
        kept = [state_of(run, j) for j in range(n)]
    assert len(ages) == 60 * n and (max(ages) <= staleness_s * 2 or staleness_s == 2.0)


@pytest.mark.parametrize("staleness_s", [0.0, 0.3])
def test_what_is_cached_is_found_as_by_looking_at_every_block(staleness_s):
    found = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        run = Replicas(
            random_sessions(rng, 40),
            devices=[DEVICES[j % 3] for j in range(3)],
            num_replicas=3,
            prefix_caching=True,
            router_staleness_s=staleness_s,
            max_model_len=500,
        )
        router = Anywhere(seed)
        while (view := run.decide()) is not None:
            state, nodes, r = run.cluster.state, run.cluster.nodes, view.index
            for k in range(3):
                blocks = nodes.identities[k] if staleness_s else state.blocks[k]
                sim, count = state.sims[k], 0
                if staleness_s == 0.0 or nodes.nodes[k].report >= 0:
                    for i in range((int(run.requests[r]["prefill_tokens"]) - 1) >> int(sim.block_bits)):
                        owner = owner_of(state.prefixes[0], r, i, sim.block_bits)
                        if blocks[slot_of(blocks, sim.table_mask, owner, i), NAMED] < 0:
                            break
                        count += 1
                assert view.replicas[k].cached_tokens == count << sim.block_bits
                assert view.replicas[k].uncached_tokens == run.requests[r]["prefill_tokens"] - (count << sim.block_bits)
                found += count
            run.send(router.route(view))
    assert found > 50
