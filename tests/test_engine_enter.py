"""Requests that enter at run time, and backends that say when a request has ended."""

import math

import numpy as np
import pytest
from helpers import TICK_S, Durations, Run, request, table

from llmsched_gym.config import ConfigError
from llmsched_gym.engine import Execution, check
from llmsched_gym.workload import Request


def test_a_request_that_enters_goes_the_way_of_one_that_was_foreseen():
    rows = [request(0.0, prompt=100, output=9, ttft=2.0), request(4 * TICK_S, prompt=70, output=5, ttft=1.0, tbt=0.1)]
    foreseen, live = Run("slai", rows), Run("slai", rows[:1])
    foreseen.steps(4)
    live.steps(4)
    r = live.engine.enter(Request(70, 5, ttft_slo_s=1.0, tbt_slo_s=0.1, slo_class=0))
    assert (r, live.requests[r].arrival_s) == (1, 4 * TICK_S)
    check(live.engine.state)
    assert foreseen.drain() == live.drain()
    assert foreseen.requests[:2].tobytes() == live.requests[:2].tobytes()
    assert foreseen.gaps(1) == live.gaps(1) and len(live.gaps(1)) == 4
    assert foreseen.episode.tobytes() == live.episode.tobytes()


def test_the_arrays_grow_with_those_who_come():
    run = Run("sarathi", [request(prompt=20, output=300)])
    for i in range(40):
        run.step()
        assert run.engine.enter(Request(30 + i, 1 + i % 5)) == i + 1
    run.drain()
    assert run.sim.num_finished == run.episode.num_arrived == 41
    assert (np.diff(run.requests["arrival_s"][1:41]) > 0).all()
    assert len(run.gaps(39)) == 3 and min(run.gaps(39)) > 0.0


def test_those_to_come_come_all_the_same():
    run = Run("sarathi", [request(), request(20 * TICK_S)], num_requests=None, horizon_s=9.0)
    run.steps(3)
    assert run.engine.enter(Request(16, 2)) == 2
    run.steps(200)
    assert run.sim.num_finished == 3
    assert run.requests[1].arrival_s == 20 * TICK_S


def test_an_empty_engine_can_be_filled():
    run = Run("sarathi", table([request(1e9)], cohort=(0, 1)), num_requests=None, horizon_s=100.0)
    run.engine.enter(Request(33, 4))
    run.steps(4)
    assert run.sim.num_finished == 1


def test_what_never_fits_is_rejected():
    run = Run("sarathi", [request(output=9)])
    run.step()
    run.engine.enter(Request(9000, 2))
    assert run.episode.num_rejected == 1
    check(run.engine.state)


@pytest.mark.parametrize(
    "fields", [{"prompt_tokens": 0}, {"output_tokens": 1.5}, {"ttft_slo_s": math.nan}, {"slo_class": 7}]
)
def test_a_bad_request_is_one_line(fields):
    with pytest.raises(ConfigError, match=f"^{next(iter(fields))}: expected .*, got "):
        Request(**{"prompt_tokens": 1, "output_tokens": 1, **fields})


def test_nobody_comes_from_the_future():
    run = Run("sarathi", [request(output=9)])
    with pytest.raises(ValueError, match=r"arrival_s: expected 0 to 0, the engine's clock, got 1\.0"):
        run.engine.enter(Request(1, 1, arrival_s=1.0))


class Ends(Durations):
    """Ends request 0 with its third token."""

    def execute(self, batch):
        ended = [0] if len(self.batches) == 2 else []
        return super().execute(batch)._replace(ended=ended)


def test_a_backend_ends_a_request():
    run = Run("sarathi", [request(prompt=16, output=50), request(prompt=16, output=6)], backend=Ends(TICK_S))
    run.drain()
    assert (run.requests[0].num_output_tokens, run.requests[1].num_output_tokens) == (3, 6)
    assert run.requests[0].resolved_s == 3 * TICK_S
    assert len(run.gaps(0)) == 2


def test_a_request_without_a_token_cannot_be_ended():
    class Wrong:
        def execute(self, batch):
            return Execution(TICK_S, ended=[1])

    run = Run("sarathi", [request(), request(5.0)], backend=Wrong())
    with pytest.raises(ValueError, match="ended requests to emit a token in this batch, got 1"):
        run.step()
