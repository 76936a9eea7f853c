"""``execute(batch)`` inside vLLM: its scheduler, made to run exactly one given batch with its own invariants kept.

A mixin on vLLM's ``Scheduler`` or ``AsyncScheduler``. What is asked of vLLM's loop (0.32 and 0.33):

- *Chunks*: ``_reserve_prefill_lookahead`` is asked for every running and every waiting request what it may get, so its
  answer is the batch's number of tokens. 0 passes over a running request, and ends admission at a waiting one.
- *Deferral*: ``next_decode_eligible_step``, by which vLLM itself paces decodes, lies behind this step for running
  requests that the batch leaves out. They stay in ``running``: the number of sequences counts them.
- *Admission*: who is to be admitted stands at the head of ``waiting``, in the batch's order.
- *Preemption* and *refusal* go before, by vLLM's own functions.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus


@dataclass(frozen=True)
class NamedBatch:
    """What one step is to run, by vLLM's request ids.

    `tokens` are at most what a request has left to compute, in all at most ``max_num_scheduled_tokens``; waiting
    requests among them are admitted in this order.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    preempt: Collection[str] = ()
    refuse: Collection[str] = ()
    admit: Collection[str] | None = None  # the waiting ones of `tokens`, in order; None: they are looked for


class ExecutesBatches:
    """Mixin for vLLM's schedulers: :meth:`execute` is ``schedule`` for a batch that somebody else has formed."""

    _planned: Mapping[str, int] | None = None  # tokens of this step by request; None: vLLM's own order
    _refused: list[str] = []  # noqa: RUF012  # replaced, never changed in place
    requests: dict[str, Request]
    running: list[Request]
    waiting: Any
    current_step: int
    num_prefill_lookahead: int

    def execute(self, batch: NamedBatch, throttle_prefills: bool = False) -> SchedulerOutput:
        """Run `batch` in this step.

        What vLLM cannot run of it (no block is free, a prompt is held back for other data-parallel ranks) is not in the
        output, whose ``num_scheduled_tokens`` says what runs. Requests that the batch does not know of and
        :meth:`is_scheduled` does not claim go by vLLM's own order.

        Raises:
            ValueError: a request of `preempt` does not run, or one of `refuse` does not wait.
        """
        for name in batch.preempt:
            self._preempt_now(name)
        if batch.refuse:
            self._refuse(batch.refuse)
        tokens = batch.tokens
        admit = batch.admit
        if admit is None:
            admit = [name for name in tokens if self.requests[name].status != RequestStatus.RUNNING]
        if admit:
            self._put_first(admit)
        if len(tokens) - len(admit) < len(self.running):
            following = self.current_step + 2  # vLLM counts the step that begins first
            for request in self.running:
                name = request.request_id
                if name not in tokens and self.is_scheduled(name):
                    request.next_decode_eligible_step = max(request.next_decode_eligible_step, following)
        self._planned = tokens
        try:
            return super().schedule(throttle_prefills)  # type: ignore[misc]
        finally:
            self._planned = None

    def is_scheduled(self, name: str) -> bool:
        """Whether batches decide on request `name`: one that they leave out gets nothing."""
        return True

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        if self.num_prefill_lookahead > 1:
            given = (request, num_computed_tokens, num_new_tokens)
            num_new_tokens = super()._reserve_prefill_lookahead(*given)  # type: ignore[misc]
        if self._planned is None:
            return num_new_tokens
        planned = self._planned.get(request.request_id)
        if planned is None:
            return 0 if self.is_scheduled(request.request_id) else num_new_tokens
        return planned if planned < num_new_tokens else num_new_tokens

    def _preempt_now(self, name: str) -> None:
        request = self.requests[name]
        if request.status != RequestStatus.RUNNING:
            raise ValueError(f"request {name} is preempted, but does not run")
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())  # type: ignore[attr-defined]

    def _put_first(self, names: Collection[str]) -> None:
        """Let these requests be the head of the waiting line, in their order."""
        waiting, requests = self.waiting, self.requests
        for name, at_head in zip(names, waiting, strict=False):
            if at_head.request_id != name:
                break
        else:
            if len(names) <= len(waiting):
                return
        wanted = [requests[name] for name in names]
        for request in wanted:
            waiting.remove_request(request)
        waiting.prepend_requests(reversed(wanted))

    def _refuse(self, names: Collection[str]) -> None:
        for name in names:
            if self.requests[name].status == RequestStatus.RUNNING:
                raise ValueError(f"request {name} is refused, but does not wait")
        self._refused = [*self._refused, *names]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        """vLLM's own; clients of refused requests are told that they were aborted."""
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        if self._refused:
            names, self._refused = self._refused, []
            finish = self.finish_requests  # type: ignore[attr-defined]
            for request in finish(names, RequestStatus.FINISHED_ABORTED):
                told = EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(told)
        return outputs
