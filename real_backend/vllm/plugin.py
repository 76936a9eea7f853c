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
from llmsched_gym.engine.predict import can_make_ttft_env
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
STOCK_POLICY, THRESHOLD = "vllm-v1", 0  # what forms vLLM's own batches; where it keeps its largest chunk
MOST_IDLE_S = 1.0  # a policy that runs nothing for so long, though work is pending, is passed over
OLDEST_S = 600.0  # an arrival before that is no time of this machine's clock
_ENDED = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_REPETITION)


def as_server(policy: str, reserves: bool) -> str:
    """`vllm-v1` without parameters follows the server's own settings; any other policy is what it says."""
    return f"{STOCK_POLICY}[reserve={str(reserves).lower()}]" if policy == STOCK_POLICY else policy


@dataclass
class Step:
    """A batch between its decision and its end."""

    output: SchedulerOutput
    start_s: float
    work: tuple[int, float, float]  # tokens, query-key pairs and KV tokens of the lane's requests
    booked: Booked | None = None


class PolicyDecides(ExecutesBatches):
    """Mixin for vLLM's schedulers: a policy of this project forms the batches of all requests that it can schedule."""

    kv_cache_manager: Any
    max_num_scheduled_tokens: int
    vllm_config: Any
    rows: dict[str, int] = {}  # noqa: RUF012  # of the lane, by request
    foreign: dict[str, Request] = {}  # noqa: RUF012  # requests that go by vLLM's own order
    lane: Lane | None = None  # None: all goes by vLLM's own order

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options: Options = read_options(self.vllm_config.additional_config, os.environ)
        config = self.vllm_config.scheduler_config
        policy = make_scheduler(as_server(self.options.policy, config.scheduler_reserve_full_isl))
        self.metrics = Metrics(self.options.metrics_port)
        self.clock = time.perf_counter
        self.zero_s, self.wall_zero_s = time.perf_counter(), time.time()
        self.rows = {}
        self.foreign = {}
        self.names: dict[int, str] = {}
        self._promised: set[int] = set()
        self._steps: deque[Step] = deque()
        self._open: Step | None = None  # the last one, while its batch is not booked
        self._last_end_s = self._idle_since_s = -math.inf
        self._is_idle = False
        self._failures = self._threshold = 0
        self._fit = OnlineFit() if self.options.profile is None else None
        reason = stock_reason(self)
        if reason is not None:
            logger.warning("llmsched: %s: all requests go by vLLM's own order", reason)
            return
        self.lane = Lane(self._scenario(policy), load_profile(self.options.profile or DEFAULT_PROFILE), policy)
        if self.options.policy == STOCK_POLICY:
            self._threshold = config.long_prefill_token_threshold
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
        left = self.max_num_scheduled_tokens
        if self.foreign:
            left -= foreign_tokens(self, self.foreign)
        most = self.max_num_active_reqs - self.num_waiting_for_streaming_input  # type: ignore[attr-defined]
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        lane.begin(now_s, free, most, len(self.running), left)
        if self._threshold > 0:
            lane.engine.state.knobs[0]["own"][THRESHOLD] = self._threshold_now()
        formed = self._form(lane, now_s) if self.rows else None
        if formed is not None:
            output = self._execute(lane, formed, throttle_prefills)
        else:
            output = super().schedule(throttle_prefills)  # type: ignore[misc]
            if self.rows:
                self._rebook(output, ())
        work = lane.work()
        step = Step(output, now_s, work)
        self._steps.append(step)
        self._open = step if work[0] > 0 else None
        return output

    def _threshold_now(self) -> int:
        """vLLM's largest chunk of a prompt: as told, or adaptively at least a fair share of the budget."""
        if not self.adaptive_long_prefill_threshold:  # type: ignore[attr-defined]
            return self._threshold
        fair = self.vllm_config.scheduler_config.max_num_batched_tokens // max(1, len(self.requests))
        return max(self._threshold, fair)

    def _form(self, lane: Lane, now_s: float) -> Formed | None:
        """The policy's batch; None where vLLM's own order is to go on, the lane's batch being empty then."""
        if self._pause_state != PauseState.UNPAUSED:  # type: ignore[attr-defined]
            lane.clear()
            self.metrics.count("fallbacks", "paused")
            return None
        try:
            formed = lane.form()
        except Exception as error:  # whatever a policy raises must not end the server
            lane.clear()
            self._fall_back(error)
            return None
        if formed.rows or formed.preempted or formed.refused or self._steps:
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

    def _execute(self, lane: Lane, formed: Formed, throttle_prefills: bool) -> SchedulerOutput:
        names = self.names
        tokens = {names[r]: n for r, n in zip(formed.rows, formed.tokens, strict=True)}
        admit = [names[r] for r in formed.admitted]
        if self.foreign:
            # first, since tokens are left to them and whoever is blocked there is passed over
            admit = [name for name, request in self.foreign.items() if request in self.waiting] + admit
        batch = NamedBatch(tokens, [names[r] for r in formed.preempted], [names[r] for r in formed.refused], admit)
        if formed.num_deferred > 0:
            self.metrics.count("deferrals", by=formed.num_deferred)
        if formed.preempted:
            self.metrics.count("preemptions", by=len(formed.preempted))
        if formed.refused:
            self.metrics.count("refusals", by=len(formed.refused))
        output = self.execute(batch, throttle_prefills)
        if output.num_scheduled_tokens != tokens or (admit and not self._as_formed(lane, formed.admitted)):
            self._rebook(output, formed.admitted)
        return output

    def _as_formed(self, lane: Lane, admitted: list[int]) -> bool:
        """Whether vLLM has found cached of each admitted prompt what the lane knows of."""
        rows = lane.engine.state.requests[0]
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
        step.booked = lane.book(step.start_s, max(now_s, start_s + lane.expected_s()))
        self._open = None
        return step.booked.end_s

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's own; before it the lane books the batch, which has ended now."""
        lane = self.lane
        step = None if lane is None else self._take(scheduler_output)
        if lane is not None and step is not None:
            now_s = self.now_s()
            if step.work[0] > 0:
                start_s = max(step.start_s, self._last_end_s)
                if step is self._open:
                    step.booked, self._open = lane.book(step.start_s, now_s), None
                    lane.observe(step.booked)
                elif step.booked is not None:
                    lane.observe(step.booked, now_s)
                if self._fit is not None and self._fit.add(*step.work, now_s - start_s):
                    self._fit.write(lane.engine.state)
            self._last_end_s = now_s
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if step is not None:
            self.metrics.tell(self._last_end_s, at_once=not self.rows)
        return outputs

    def _take(self, output: SchedulerOutput) -> Step | None:
        """The step of that output; those before it, whose ends nobody told, are forgotten."""
        steps = self._steps
        if steps and steps[0].output is output:
            return steps.popleft()
        while any(step.output is output for step in steps):
            step = steps.popleft()
            if step.output is output:
                return step
        return None


class SyncScheduler(PolicyDecides, VLLMScheduler):
    """For synchronous scheduling."""


class AsyncScheduler(PolicyDecides, VLLMAsyncScheduler):
    """For asynchronous scheduling."""


class Scheduler(AsyncScheduler):
    """The class for ``--scheduler-cls``: made where scheduling is synchronous, it is a :class:`SyncScheduler`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("vllm_config", args[0] if args else None)
        if config is not None and not config.scheduler_config.async_scheduling:
            return SyncScheduler(*args, **kwargs)
        return super().__new__(cls)
