"""The plug-in on vLLM's scheduler, without a model; skipped where vLLM is not installed (`make vllm`)."""

import collections
import logging

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM: benchmarks/vllm_env.sh")

from benchmarks.vllm_scheduler import VLLM, Settings
from llmsched_gym.engine import Batch
from llmsched_gym.engine.records import RUNNING, WAITING
from llmsched_gym.real_backend.vllm.execute import ExecutesBatches, NamedBatch
from llmsched_gym.real_backend.vllm_plugin import AsyncScheduler, Scheduler, SyncScheduler
from llmsched_gym.scheduler import PolicyError

BUDGET, SEQS = 256, 8


def make(cls=SyncScheduler, kv_blocks=100, caching=False, **options):
    """A scheduler on `kv_blocks` usable blocks of 16 tokens, under the options of the plug-in."""
    settings = Settings(budget=BUDGET, max_num_seqs=SEQS, prefix_caching=caching)
    return VLLM(settings, kv_blocks, 2048, cls, {"llmsched": options} if options else None)


def add(real, r, prompt, output, **slos):
    real.add(r, prompt, np.full(prompt + output, 7 + r % 5), None, slos or None)


def audit(plugin):
    """Lane and vLLM agree on who runs, who waits and what is computed and emitted of everybody."""
    rows, lane = plugin.lane.engine.state.requests[0], plugin.lane
    running = {request.request_id for request in plugin.running}
    for name, r in plugin.rows.items():
        request = plugin.requests[name]
        assert rows[r].phase == (RUNNING if name in running else WAITING), name
        if name in running:
            assert rows[r].num_computed_tokens == request.num_computed_tokens, name
        assert rows[r].num_output_tokens == request.num_output_tokens, name
    assert int(lane.sim.num_running) == len(running & set(plugin.rows))
    assert set(plugin.names) == set(plugin.rows.values())


def class_that_executes():
    from vllm.v1.core.sched.scheduler import Scheduler as Stock

    class Executing(ExecutesBatches, Stock):
        given = NamedBatch()

        def schedule(self, throttle_prefills=False):
            return self.execute(self.given, throttle_prefills)

    return Executing


def test_execute_runs_exactly_the_batch():
    real = make(class_that_executes())
    scheduler = real.scheduler
    for r in range(4):
        add(real, r, 100, 5)

    def run(batch):
        scheduler.given = batch
        return {str(r): n for r, _, n in real.step()}

    assert run(NamedBatch({"2": 30, "0": 100})) == {"2": 30, "0": 100}
    assert [request.request_id for request in scheduler.running] == ["2", "0"]
    assert run(NamedBatch({"2": 70})) == {"2": 70}  # the decode of 0 is left out, and stays
    assert [request.request_id for request in scheduler.running] == ["2", "0"]
    assert run(NamedBatch({"0": 1, "3": 7}, preempt=["2"])) == {"0": 1, "3": 7}
    assert [request.request_id for request in scheduler.waiting] == ["2", "1"]
    assert scheduler.requests["2"].num_computed_tokens == 0 and scheduler.requests["2"].num_output_tokens == 1
    assert run(NamedBatch({})) == {}
    assert run(NamedBatch({"2": 500})) == {"2": 101}  # no more than there is
    run(NamedBatch({"0": 1}, refuse=["1"]))
    assert "1" not in scheduler.requests
    with pytest.raises(ValueError, match="request 2 is refused, but does not wait"):
        run(NamedBatch({}, refuse=["2"]))
    while scheduler.has_unfinished_requests():
        run(NamedBatch({name: 500 for name in scheduler.requests}))


@pytest.mark.parametrize("policy", ["slai", "sarathi", "on-time", "learned", "vllm-v1", "srpt-capped"])
@pytest.mark.parametrize("caching", [False, True])
def test_lane_and_vllm_agree_over_arrivals_aborts_and_scarce_memory(policy, caching):
    from vllm.v1.request import RequestStatus

    real = make(kv_blocks=60, caching=caching, policy=policy)
    plugin, rng, came, over = real.scheduler, np.random.default_rng(3), 0, 0
    for i in range(700):
        if came < 60 and i % 4 == 0:
            add(real, came, int(rng.integers(1, 400)), int(rng.integers(1, 60)), tbt_slo_s=0.001, ttft_slo_s=5.0)
            came += 1
        if i % 29 == 11 and plugin.requests:
            name = list(plugin.requests)[int(rng.integers(len(plugin.requests)))]
            plugin.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            over += 1
        real.step()
        audit(plugin)
        if came == 60 and not plugin.requests:
            break
    assert not plugin.requests and not plugin.rows and plugin.lane.num_live == 0
    counts = plugin.metrics.counts
    assert not [key for key in counts if key[0] == "fallbacks"]
    assert sum(by for key, by in counts.items() if key[0] == "requests") == 60
    assert plugin.kv_cache_manager.block_pool.get_num_free_blocks() == 60


def test_asynchronous_batches_are_formed_before_the_last_one_has_ended():
    real = make(AsyncScheduler, policy="slai")
    plugin = real.scheduler
    for r in range(12):
        add(real, r, 40 + r, 10, tbt_slo_s=0.001, ttft_slo_s=5.0)
    flying = collections.deque()
    emitted = collections.Counter()
    for _ in range(200):
        output = plugin.schedule()
        flying.append(output)
        if len(flying) == 2 or not output.num_scheduled_tokens:
            ended = flying.popleft()
            names = list(ended.num_scheduled_tokens)
            computed = {n: plugin.requests[n].num_computed_tokens if n in plugin.requests else 0 for n in names}
            given = []
            for name in names:
                request = plugin.requests.get(name)
                later = sum(o.num_scheduled_tokens.get(name, 0) for o in flying)
                complete = request is not None and computed[name] - later >= request.num_tokens
                given.append([5] if complete else [])
                emitted[name] += complete
            from vllm.v1.outputs import ModelRunnerOutput

            ran = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, given)
            plugin.update_from_output(ended, ran)
        if not plugin.requests:
            break
    assert set(emitted.values()) == {10} and len(emitted) == 12
    assert not plugin.rows and plugin.lane.num_live == 0
    assert not [key for key in plugin.metrics.counts if key[0] == "fallbacks"]


class Raises:
    """A scheduler that fails at every third batch, and else serves the head."""

    calls = 0

    def schedule(self, view):
        type(self).calls += 1
        if self.calls % 3 == 0:
            raise RuntimeError("out of luck")
        tokens = {int(r.index): 1 for r in view.decodes}
        for r in view.prefills:
            tokens[int(r.index)] = min(20, int(r.num_uncached_tokens))
        if len(view.waiting) and len(view.running) < 4 and view.free_blocks > 40:
            tokens[int(view.waiting[0].index)] = min(20, int(view.waiting[0].prefill_tokens))
        return Batch(tokens)


def test_a_policy_that_raises_leaves_the_step_to_vllm_counted_and_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    real = make(policy=f"{__name__}:Raises")
    for r in range(10):
        add(real, r, 90, 8)
    with caplog.at_level(logging.ERROR):
        while real.scheduler.has_unfinished_requests():
            real.step()
            audit(real.scheduler)
    lines = [record.getMessage() for record in caplog.records if "out of luck" in record.getMessage()]
    assert len(lines) == 1 and "RuntimeError: out of luck; such steps go by vLLM's own order" in lines[0]
    assert real.scheduler.metrics.counts[("fallbacks", "error")] == Raises.calls // 3 > 5


class Sleeps:
    """A scheduler that runs nothing."""

    def schedule(self, view):
        return Batch()


def test_a_policy_that_runs_nothing_is_passed_over_after_a_while():
    real = make(policy=f"{__name__}:Sleeps")
    now = [0.0]
    real.scheduler.clock, real.scheduler.zero_s = lambda: now[0], 0.0
    add(real, 0, 30, 3)
    assert real.step() == []
    for _ in range(40):
        now[0] += 0.4
        real.step()
    assert not real.scheduler.requests and real.scheduler.metrics.counts[("fallbacks", "idle")] == 3


def test_requests_that_the_plugin_does_not_schedule_go_by_vllm_s_own_order_beside_the_others():
    real = make(policy="sarathi")
    plugin = real.scheduler
    for r in range(12):
        add(real, r, 200, 6)
    for r in (3, 7):  # as if each came with an adapter
        plugin.lane.leave(plugin.rows.pop(str(r)), False)
        plugin.names = {row: name for name, row in plugin.rows.items()}
        plugin.foreign[str(r)] = plugin.requests[str(r)]
    steps, first = 0, {}
    while plugin.has_unfinished_requests():
        for r, _, _ in real.step():
            first.setdefault(r, steps)
        audit(plugin)
        steps += 1
        assert steps < 300
    assert not plugin.rows and not plugin.foreign and set(first) == set(range(12))
    assert first[3] == 0 and first[7] <= 2


def test_a_policy_folder_that_is_not_there_is_refused():
    with pytest.raises(PolicyError, match="no such policy folder"):
        make(policy="./no/such/folder")


def test_the_class_is_synchronous_where_vllm_is():
    assert type(make(Scheduler, policy="slai").scheduler) is SyncScheduler


def test_a_running_server_s_memory_does_not_grow_with_the_requests_that_it_has_served():
    real = make(policy="slai")
    for r in range(2_000):
        add(real, r, 10, 2)
        real.step()
    while real.scheduler.has_unfinished_requests():
        real.step()
    lane = real.scheduler.lane
    assert lane.num_born == 2_000 and lane.num_rows <= 1_024 and lane.num_live == 0
