"""vLLM's schedulers with a policy of this project: each step's batch is formed on a lane kept up to date, and executed.

Asynchronous scheduling forms a batch before the last one has ended. Then the last one is booked by an estimate of its
end, the decision is made as of that time, and what was booked is put right when the tokens are there.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler as VLLMAsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as VLLMScheduler
from vllm.v1.request import Request, RequestStatus

from llmsched_gym.config import MOST, Scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine.batch import can_make_ttft_env
from llmsched_gym.real_backend.errors import one_line
from llmsched_gym.real_backend.vllm.execute import ExecutesBatches, NamedBatch
from llmsched_gym.real_backend.vllm.fit import OnlineFit
from llmsched_gym.real_backend.vllm.lane import Booked, Formed, Lane
from llmsched_gym.real_backend.vllm.limits import foreign_tokens, is_foreign, stock_reason
from llmsched_gym.real_backend.vllm.metrics import Metrics
from llmsched_gym.real_backend.vllm.options import Options, read_options, slo_of
from llmsched_gym.real_backend.vllm.versions import check_version
from llmsched_gym.registry import make_scheduler
from llmsched_gym.workload import Request as GymRequest

check_version(str(vllm.__version__))
logger = init_logger(f"vllm.{__name__}")  # below vLLM's, whose handlers print it

DEFAULT_PROFILE = "h100-mistral-7b"  # what a fit begins with, until steps have been measured
MOST_IDLE_S = 1.0  # a policy that runs nothing for so long, though work is pending, is passed over
OLDEST_S = 600.0  # an arrival before that is no time of this machine's clock
_ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION)


@dataclass
class Step:
    """A batch between its decision and its end."""

    output: SchedulerOutput
    start_s: float
    work: tuple[float, float, float] | None  # tokens, query-key pairs, KV tokens; None: nothing of the lane runs
    booked: Booked | None = None


class PolicyDecides(ExecutesBatches):
    """Mixin for vLLM's schedulers: a policy of this project forms the batches of all requests that it can schedule."""

    kv_cache_manager: Any
    max_num_scheduled_tokens: int
    vllm_config: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options: Options = read_options(self.vllm_config.additional_config, os.environ)
        policy = make_scheduler(self.options.policy)
        self.metrics = Metrics(self.options.metrics_port)
        self.clock = time.perf_counter
        self.zero_s, self.wall_zero_s = time.perf_counter(), time.time()
        self.rows: dict[str, int] = {}  # of the lane, by request
        self.foreign: dict[str, Request] = {}
        self.names: dict[int, str] = {}
        self.lane: Lane | None = None
        self._promised: set[int] = set()
        self._steps: deque[Step] = deque()
        self._open: Step | None = None  # the last one, while its batch is not booked
        self._last_end_s = self._idle_since_s = -math.inf
        self._is_idle = False
        self._failures = 0
        self._fit = OnlineFit() if self.options.profile is None else None
        reason = stock_reason(self)
        if reason is not None:
            logger.warning("llmsched: %s: all requests go by vLLM's own order", reason)
            return
        self.lane = Lane(self._scenario(policy), load_profile(self.options.profile or DEFAULT_PROFILE), policy)
        logger.info("llmsched: policy %s, %s", self.options.policy, self.options.profile or "a profile fitted online")

    def _scenario(self, policy: Any) -> Scenario:
        """The server's limits as a scenario's."""
        return Scenario(
            num_kv_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks - 1,  # one is the null block
            block_size=self.block_size,  # type: ignore[attr-defined]
            watermark=float(self.vllm_config.scheduler_config.watermark),
            max_model_len=self.max_model_len,  # type: ignore[attr-defined]
            max_num_seqs=self.max_num_running_reqs,  # type: ignore[attr-defined]
            max_num_batched_tokens=self.max_num_scheduled_tokens,
            admission=getattr(policy, "admission", "prompt"),
            strict_tbt_slo_s=self.options.strict_tbt_slo_s or math.inf,
            relaxed_tbt_slo_s=self.options.relaxed_tbt_slo_s or math.inf,
            allow_refusal=self.options.allow_refusal,
        )

    def now_s(self) -> float:
        """Seconds since the server's start."""
        return self.clock() - self.zero_s

    # --- requests come and go

    def is_scheduled(self, name: str) -> bool:
        """Whether the policy decides on request `name`."""
        return name in self.rows

    def add_request(self, request: Request) -> None:
        """vLLM's own; the lane gets a request that is new."""
        super().add_request(request)  # type: ignore[misc]
        name = request.request_id
        is_new = self.requests.get(name) is request and name not in self.rows
        if self.lane is None or not is_new:
            return
        if is_foreign(request):
            self.foreign[name] = request
            return
        now_s, lane, prompt = self.now_s(), self.lane, request.num_prompt_tokens
        arrival_s = request.arrival_time - self.wall_zero_s
        if not now_s - OLDEST_S <= arrival_s <= now_s:
            arrival_s = now_s
        args = request.sampling_params.extra_args if request.sampling_params is not None else None
        slo, usable = slo_of(args, prompt, self.options)
        if not usable:
            self.metrics.count("bad_slos")
        most = min(request.max_tokens, self.max_model_len - prompt)  # type: ignore[attr-defined]
        wanted = GymRequest(
            prompt_tokens=prompt,
            output_tokens=min(max(1, most), MOST),
            ttft_slo_s=slo.ttft_slo_s,
            tbt_slo_s=slo.tbt_slo_s,
            slo_class=slo.slo_class,
        )
        r = self.rows[name] = lane.add(wanted, max(0.0, arrival_s), self._cached_tokens(request))
        self.names[r] = name
        if can_make_ttft_env(lane.engine.handle, 0, r):
            self._promised.add(r)

    def _cached_tokens(self, request: Request) -> int:
        """Tokens of a new prompt that lie in the prefix cache."""
        if not self.kv_cache_manager.enable_caching:
            return 0
        return int(self.kv_cache_manager.get_computed_blocks(request)[1])

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        name = request.request_id
        self.foreign.pop(name, None)
        r = self.rows.pop(name, None)
        if r is not None and self.lane is not None:
            del self.names[r]
            finished = request.status in _ENDED
            self.metrics.over(self.lane.leave(r, finished), finished, r in self._promised)
            self._promised.discard(r)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        r = self.rows.get(request.request_id)
        if r is not None and self.lane is not None:
            self.lane.preempt(r)

    # --- a step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The next batch: the policy's, or vLLM's own where that fails, is idle for too long or admission is paused."""
        lane = self.lane
        if lane is None:
            return super().schedule(throttle_prefills)  # type: ignore[misc]
        now_s = self.now_s()
        if self._open is not None:
            now_s = max(now_s, self._book_ahead(now_s))
        lane.pass_time(now_s)
        formed = self._form(now_s) if lane.has_work else None
        if formed is None:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
            if lane.has_work:
                self._rebook(output, ())
        else:
            output = self._execute(formed, throttle_prefills)
        batch = lane.batch
        work = (float(batch.num_tokens), float(batch.pairs), float(batch.kv_tokens)) if batch.num_tokens > 0 else None
        step = Step(output, now_s, work)
        self._steps.append(step)
        self._open = step if work is not None else None
        return output

    def _form(self, now_s: float) -> Formed | None:
        lane = self.lane
        assert lane is not None
        if self._pause_state != PauseState.UNPAUSED:  # type: ignore[attr-defined]
            lane.clear()
            self.metrics.count("fallbacks", "paused")
            return None
        left = self.max_num_scheduled_tokens
        if self.foreign:
            left -= foreign_tokens(self, self.foreign)
        most = self.max_num_active_reqs - self.num_waiting_for_streaming_input  # type: ignore[attr-defined]
        others = len(self.running) - int(lane.sim.num_running)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        lane.see_limits(free, max(1, most - others), left)
        try:
            formed = lane.form()
        except Exception as error:  # whatever a policy raises must not end the server
            lane.clear()
            self._fall_back(error)
            return None
        if formed.rows or formed.preempted or formed.refused or len(self._steps) > 0:
            self._is_idle = False
        elif not self._is_idle:
            self._is_idle, self._idle_since_s = True, now_s
        elif now_s - self._idle_since_s > MOST_IDLE_S:
            self.metrics.count("fallbacks", "idle")
            return None
        return formed

    def _fall_back(self, error: Exception) -> None:
        self.metrics.count("fallbacks", "error")
        self._failures += 1
        if self._failures == 1:
            what = f"{type(error).__name__}: {one_line(error)}"
            logger.error("llmsched: policy %s: %s; such steps go by vLLM's own order", self.options.policy, what)

    def _execute(self, formed: Formed, throttle_prefills: bool) -> SchedulerOutput:
        names = self.names
        tokens = {names[r]: n for r, n in zip(formed.rows, formed.tokens, strict=True)}
        admit = [names[r] for r in formed.admitted]
        if self.foreign:
            admit += [name for name, request in self.foreign.items() if self._waits(request)]
        batch = NamedBatch(tokens, [names[r] for r in formed.preempted], [names[r] for r in formed.refused], admit)
        deferred = len(self.rows) - int(self.lane.sim.num_waiting) - len(tokens)  # type: ignore[union-attr]
        if deferred > 0:
            self.metrics.count("deferrals", by=deferred)
        if formed.preempted:
            self.metrics.count("preemptions", by=len(formed.preempted))
        if formed.refused:
            self.metrics.count("refusals", by=len(formed.refused))
        output = self.execute(batch, throttle_prefills)
        if output.num_scheduled_tokens != tokens or not self._as_formed(formed.admitted):
            self._rebook(output, formed.admitted)
        return output

    def _waits(self, request: Request) -> bool:
        """Whether a request stands in vLLM's line."""
        return request.status != RequestStatus.RUNNING and not self._holds_kv_blocks(request)  # type: ignore[attr-defined]

    def _as_formed(self, admitted: list[int]) -> bool:
        """Whether vLLM has found cached of each admitted prompt what the lane knows of."""
        if not admitted:
            return True
        rows = self.lane.engine.state.requests[0]  # type: ignore[union-attr]
        for r in admitted:
            computed = rows[r].num_computed_tokens + rows[r].num_scheduled_tokens
            if self.requests[self.names[r]].num_computed_tokens != computed:
                return False
        return True

    def _rebook(self, output: SchedulerOutput, admitted: Any) -> None:
        """Let the lane have the batch that vLLM runs instead of the one that was formed."""
        lane = self.lane
        assert lane is not None
        scheduled = output.num_scheduled_tokens
        for r in reversed(admitted):
            if self.requests[self.names[r]].status != RequestStatus.RUNNING and not lane.is_waiting(r):
                lane.take_back(r)
        rows, computed, tokens = [], [], []
        for name, n in scheduled.items():
            r = self.rows.get(name)
            if r is not None:
                rows.append(r)
                tokens.append(n)
                computed.append(self.requests[name].num_computed_tokens - n)
        lane.rebook(rows, computed, tokens)

    def _book_ahead(self, now_s: float) -> float:
        """Book the batch in flight as ending when it is expected to; returns that time."""
        lane, step = self.lane, self._open
        assert lane is not None and step is not None
        start_s = max(step.start_s, self._last_end_s)
        step.booked = lane.book(max(now_s, start_s + lane.expected_s()))
        self._open = None
        return step.booked.end_s

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's own; before it the lane books the batch, which has ended now."""
        lane, step = self.lane, self._take(scheduler_output)
        if lane is not None and step is not None:
            now_s = self.now_s()
            if step.work is not None:
                start_s = max(step.start_s, self._last_end_s)
                if step is self._open:
                    step.booked, self._open = lane.book(now_s), None
                    lane.observe(step.booked)
                elif step.booked is not None:
                    lane.observe(step.booked, now_s)
                if self._fit is not None and self._fit.add(*step.work, now_s - start_s):
                    self._fit.write(lane.engine.state)
            self._last_end_s = now_s
            self.metrics.tell(now_s)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _take(self, output: SchedulerOutput) -> Step | None:
        """The step of that output; those before it, whose ends nobody told, are forgotten."""
        if not any(step.output is output for step in self._steps):
            return None
        while True:
            step = self._steps.popleft()
            if step.output is output:
                return step


class SyncScheduler(PolicyDecides, VLLMScheduler):
    """For synchronous scheduling."""


class Scheduler(PolicyDecides, VLLMAsyncScheduler):
    """The class for ``--scheduler-cls``: made where scheduling is synchronous, it is a :class:`SyncScheduler`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("vllm_config", args[0] if args else None)
        if cls is Scheduler and config is not None and not config.scheduler_config.async_scheduling:
            return SyncScheduler(*args, **kwargs)
        return super().__new__(cls)
