"""What test_stateful_engine.py has found, one small case each."""

import pytest
from helpers import Run, Scripted, request
from stateful import one_line
from test_engine_async import lagging

from llmsched_gym.config import ConfigError
from llmsched_gym.engine import Batch, IllegalBatch, check
from llmsched_gym.engine.records import ABANDONED, RUNNING, WAITING
from llmsched_gym.workload import Request


def test_a_batch_takes_the_place_of_one_that_was_not_run():
    run = Run(Scripted(), [request(prompt=40, output=3), request(prompt=30, output=2)])
    run.engine.submit(Batch({0: 40, 1: 30}))
    run.engine.submit(Batch({1: 30}))
    run.engine.execute()
    check(run.engine.state)  # request 0 was still marked as scheduled
    assert run.requests["num_computed_tokens"][:2].tolist() == [0, 30]
    run.engine.decide(Scripted({0: 40}))
    run.engine.execute()
    assert run.requests["num_computed_tokens"][0] == 40


def test_without_a_new_batch_the_last_one_is_not_done_again():
    run = Run(Scripted({0: 40}, Batch({1: 30}, preempt=[0])), [request(prompt=40, output=9), request(prompt=30)])
    run.steps(2)
    assert run.requests["phase"][:2].tolist() == [WAITING, RUNNING]
    run.engine.execute()  # it preempted request 0 again, which waited
    check(run.engine.state, 0, run.clock_s)
    assert (run.sim.num_preemptions, run.sim.tokens_emitted, run.sim.num_batches) == (1, 2, 2)


class Broken:
    def schedule(self, view):
        raise RuntimeError("no idea")


@pytest.mark.parametrize("break_it", [
    lambda engine: engine.submit(Batch({9: 1})),
    lambda engine: engine.decide(Scripted({9: 1})),
    lambda engine: engine.decide(Broken()),
])  # fmt: skip
def test_a_batch_in_flight_is_not_foreseen_where_none_was_formed(break_it):
    run = lagging("vllm-v1", [request(prompt=40, output=5)])
    run.steps(3)
    emitted, last_s = int(run.requests[0].num_output_tokens), float(run.requests[0].last_token_s)
    with one_line(IllegalBatch, RuntimeError):
        break_it(run.engine)
    check(run.engine.state, 0, run.clock_s)
    assert (run.requests[0].num_output_tokens, run.requests[0].last_token_s) == (emitted, last_s)
    run.drain()
    assert run.sim.num_finished == 1


@pytest.mark.parametrize("batch", [Batch(preempt=None), Batch(refuse=3), Batch(preempt=0)])
def test_lists_of_a_batch_that_are_none(batch):
    run = Run(Scripted(), [request()])
    with pytest.raises(IllegalBatch, match=r"^rule 1: Batch\.(preempt|refuse) must be the indices of requests, got"):
        run.engine.submit(batch)


def test_who_enters_after_its_deadline_has_expired_and_after_its_patience_has_left():
    run = Run("sarathi", [request(prompt=200, output=40)], patience_s=0.5)
    run.steps(40)
    late = run.engine.enter(Request(20, 2, ttft_slo_s=0.9, arrival_s=0.0))
    check(run.engine.state)  # it stood among those who could still be in time
    gone = run.engine.enter(Request(20, 2, ttft_slo_s=0.1, arrival_s=0.0))
    check(run.engine.state)
    assert run.clock_s > 0.9 and run.requests[late].has_expired
    assert run.requests[gone].phase == ABANDONED
    with pytest.raises(ConfigError, match=r"^arrival_s: expected seconds or None, got 'now'$"):
        Request(20, 2, arrival_s="now")
