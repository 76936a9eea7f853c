"""Small worlds for engine and scheduler tests: a table from rows, a device with round times, one checked step."""

import math
from dataclasses import replace

import numpy as np

from llmsched_gym.config import scenario
from llmsched_gym.cost import DEVICES, MODELS, Profile, TableLinear
from llmsched_gym.engine import Batch, Engine, Execution, check
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import RequestTable

TICK_S = 1.0 / 32.0
"""Duration of a batch unless a test says otherwise; exact in binary, so that deadlines can be hit exactly."""


def request(arrival_s=0.0, prompt=16, output=2, tbt=0.5, ttft=math.inf, slo_class=None):
    """One row of a table; strict (class 0) where the TBT SLO is at most 0.1 s."""
    return arrival_s, prompt, output, tbt, ttft, (0 if tbt <= 0.1 else 1) if slo_class is None else slo_class


def table(rows, *, cohort=None, cost_scale=1.0, seed=0):
    """A request table from rows of :func:`request`, in order of arrival."""
    arrival, prompt, output, tbt, ttft, slo_class = (np.array(c) for c in zip(*rows, strict=True))
    return RequestTable.of(
        arrival,
        prompt,
        output,
        slo_class=slo_class,
        ttft_slo_s=ttft,
        tbt_slo_s=tbt,
        cohort=cohort,
        cost_scale=cost_scale,
        seed=seed,
    )


def profile(ms=1e3 * TICK_S, *, tile=16, tokens=(1, 2), kv_ms=0.0, pair_ms=0.0, kv_blocks=1000):
    """A device whose batches take `ms` (a number, or one per entry of `tokens`) before attention."""
    ms = (ms,) * len(tokens) if isinstance(ms, int | float) else tuple(ms)
    return Profile(
        name="test",
        model=MODELS["mistral-7b"],
        device=DEVICES["rtx6000ada"],
        tile_tokens=tile,
        linear=TableLinear(tuple(tokens), ms),
        overhead_ms=0.0,
        pair_ms=pair_ms,
        kv_ms=kv_ms,
        num_kv_blocks=kv_blocks,
    )


class Durations:
    """A backend whose batches take the given seconds, the last one for ever; keeps what it was asked to run."""

    def __init__(self, *seconds):
        self.seconds = seconds
        self.batches = []

    def execute(self, batch):
        duration_s = self.seconds[min(len(self.batches), len(self.seconds) - 1)]
        self.batches.append(batch)
        return Execution(duration_s)


class Scripted:
    """A Python scheduler that returns the given batches, one a step, then empty ones."""

    def __init__(self, *batches, admission=None):
        self.batches = [b if isinstance(b, Batch) else Batch(b) for b in batches]
        self.position = 0
        if admission is not None:
            self.admission = admission

    def reset(self, seed):
        self.position = 0

    def schedule(self, view):
        batch = self.batches[self.position] if self.position < len(self.batches) else Batch()
        self.position += 1
        return batch


class Run:
    """An engine with a scheduler installed that steps under the invariant checker.

    Fields that are not the scenario's go to the engine: `backend`, `profile`, `own_profile`.
    """

    def __init__(self, policy, rows, *, backend=None, device=None, own_profile=None, seed=0, **fields):
        self.table = rows if isinstance(rows, RequestTable) else table(rows)
        self.scheduler = make_scheduler(policy) if isinstance(policy, str) else policy
        if getattr(self.scheduler, "clairvoyant", False):
            self.table = replace(self.table, length_hint=self.table.output_tokens.astype(np.float64))
        admission = getattr(self.scheduler, "admission", None)
        asked = {"admission": admission} if admission else {}
        if getattr(self.scheduler, "refuses", False):
            asked["allow_refusal"] = True
        fields = {"watermark": 0.0, **asked, **fields}
        self.scenario = scenario("paper", **fields)
        self.engine = Engine(
            self.scenario,
            len(self.table),
            backend=backend,
            profile=device or profile(),
            own_profile=own_profile,
            num_gaps=int(self.table.output_tokens.sum()) - len(self.table) + 1,
        )
        self.engine.reset(self.table)
        install(self.scheduler, self.engine.state, seed=seed)
        self.clock_s = check(self.engine.state)

    @property
    def sim(self):
        return self.engine.state.sims[0]

    @property
    def episode(self):
        return self.engine.state.episodes[0]

    @property
    def requests(self):
        return self.engine.state.requests[0]

    def decide(self):
        """The scheduler's next batch as {request: tokens}, not yet run."""
        self.engine.decide(self.scheduler)
        items = self.engine.state.items[0, : self.engine.state.batches[0].num_items]
        return dict(zip(items["request"].tolist(), items["tokens"].tolist(), strict=True))

    def step(self):
        """One step, checked; returns the batch as decided."""
        batch = self.decide()
        self.engine.execute()
        self.clock_s = check(self.engine.state, 0, self.clock_s)
        return batch

    def steps(self, count):
        return [self.step() for _ in range(count)]

    def drain(self, most=10_000):
        """Step to the end of the run; returns the batches."""
        batches = []
        while not self.engine.is_over():
            assert len(batches) < most, f"no end after {most} steps"
            batches.append(self.step())
        return batches

    def gaps(self, r):
        """Recorded seconds between the tokens of request r."""
        start = int(self.engine.state.arrivals[0][r].gap_start)
        return self.engine.state.gaps[0, start : start + int(self.requests[r].num_output_tokens) - 1].tolist()
