"""What the plug-in does not schedule: whole servers, and single requests beside its own."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request, RequestStatus

FOREIGN_SHARE = 2  # of the token budget, requests that go by vLLM's own order are left at most one such part
_BLOCKED = (
    RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR,
    RequestStatus.WAITING_FOR_REMOTE_KVS,
    RequestStatus.WAITING_FOR_STREAMING_REQ,
)


def stock_reason(scheduler: Any) -> str | None:
    """Why all of a server's requests go by vLLM's own order; None: they do not."""
    groups = scheduler.kv_cache_config.kv_cache_groups
    block_size = scheduler.block_size
    reasons = (
        (scheduler.connector is not None, "a KV connector"),
        (getattr(scheduler, "ec_connector", None) is not None, "an encoder-cache connector"),
        (scheduler.num_spec_tokens > 0, "speculative decoding"),
        (scheduler.num_sampled_tokens_per_step == 0, "a pooling or diffusion model"),
        (scheduler.is_encoder_decoder, "an encoder-decoder model"),
        (scheduler.policy == SchedulingPolicy.PRIORITY, "--scheduling-policy priority"),
        (scheduler.use_pp, "pipeline parallelism"),
        (scheduler.dcp_world_size > 1 or scheduler.pcp_world_size > 1, "context parallelism"),
        (len(groups) != 1, "several groups of KV caches"),
        (scheduler.has_mamba_layers, "Mamba layers"),
        (block_size & (block_size - 1) != 0, f"KV blocks of {block_size} tokens"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def is_foreign(request: Request) -> bool:
    """Whether a request goes by vLLM's own order beside those that are scheduled."""
    return bool(
        request.status != RequestStatus.WAITING  # for a grammar, for remote KV
        or request.mm_features
        or request.lora_request is not None
        or request.structured_output_request is not None
        or request.pooling_params is not None
        or request.resumable
        or request.abort_immediately
    )


def foreign_tokens(scheduler: Any, foreign: dict[str, Request]) -> int:
    """Tokens of this step to leave to such requests: what they want, at most a share of the budget."""
    most = scheduler.max_num_scheduled_tokens // FOREIGN_SHARE
    wanted = 0
    for request in foreign.values():
        if request.status in _BLOCKED and getattr(request.structured_output_request, "grammar", None) is None:
            continue
        wanted += max(1, request.num_tokens - request.num_computed_tokens)
        if wanted >= most:
            return int(most)
    return wanted
