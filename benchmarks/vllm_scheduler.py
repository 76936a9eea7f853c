"""vLLM's own V1 scheduler without a model, driven on a clock; needs vLLM (`benchmarks/vllm_env.sh DIR`)."""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import BLOCK_SIZE

Item = tuple[int, int, int]
"""Of a batch: request, computed tokens, tokens."""
STOP = 1 << 40  # a token that ends an output before its limit: no other token of ours is so large
# what the scheduler reads of a model: its context and its vocabulary
MODEL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 128,
    "sliding_window": None,
}


@dataclass(frozen=True)
class Settings:
    """What both schedulers are told."""

    budget: int = 2048  # tokens in a batch
    threshold: int = 0  # vLLM's long_prefill_token_threshold
    reserve: bool = True  # vLLM's scheduler_reserve_full_isl
    max_num_seqs: int = 128
    prefix_caching: bool = False
    asynchronous: bool = False  # vLLM's async_scheduling

    @property
    def policy(self) -> str:
        options = {"budget": self.budget, "threshold": self.threshold, "reserve": str(self.reserve).lower()}
        return f"vllm-v1[{','.join(f'{key}={value}' for key, value in options.items())}]"


class Formed(NamedTuple):
    """A batch that has been scheduled."""

    output: Any  # vLLM's
    items: list[Item]
    tokens: list[list[int]]  # what each item will be given: one token or none


class VLLM:
    """vLLM's scheduler, or `scheduler_cls`, with `kv_blocks` usable blocks, and a model that knows every output."""

    def __init__(
        self,
        settings: Settings,
        kv_blocks: int,
        max_model_len: int,
        scheduler_cls: Any = None,
        additional_config: dict[str, Any] | None = None,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.version = str(vllm.__version__)
        with tempfile.TemporaryDirectory() as folder:
            config = {**MODEL, "max_position_embeddings": max_model_len}
            Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
            model = ModelConfig(
                model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len, seed=0
            )
        world = VllmConfig(
            model_config=model,
            scheduler_config=SchedulerConfig(
                max_num_seqs=settings.max_num_seqs,
                max_num_batched_tokens=settings.budget,
                max_model_len=max_model_len,
                long_prefill_token_threshold=settings.threshold,
                scheduler_reserve_full_isl=settings.reserve,
                enable_chunked_prefill=True,
                async_scheduling=settings.asynchronous,
                is_encoder_decoder=False,
            ),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=settings.prefix_caching),
            additional_config=additional_config or {},
        )
        num_blocks = kv_blocks + 1  # one of them is the null block
        world.cache_config.num_gpu_blocks = num_blocks
        attention = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
        if scheduler_cls is None:
            scheduler_cls = AsyncScheduler if settings.asynchronous else Scheduler
        self.scheduler = scheduler_cls(
            vllm_config=world,
            kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], attention)]),
            structured_output_manager=StructuredOutputManager(world),
            block_size=BLOCK_SIZE,
        )
        self.hasher = _block_hasher() if settings.prefix_caching else None
        self.tokens: dict[int, np.ndarray] = {}
        self.resumed: set[int] = set()  # of the last batch, those that come back from a preemption

    def add(
        self,
        r: int,
        prompt_tokens: int,
        tokens: np.ndarray,
        arrival_s: float | None = None,
        extra_args: dict[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """A request whose prompt and output are these tokens; below `max_tokens`, a stop token ends it."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.tokens[r] = tokens
        most = len(tokens) - prompt_tokens if max_tokens is None else max_tokens
        params = SamplingParams(max_tokens=most, ignore_eos=True, stop_token_ids=[STOP], extra_args=extra_args)
        prompt = tokens[:prompt_tokens].tolist()
        came_s = float(r) if arrival_s is None else arrival_s
        self.scheduler.add_request(Request(str(r), prompt, params, None, arrival_time=came_s, block_hasher=self.hasher))

    def step(self) -> list[Item]:
        """Schedule one batch and give every complete context its token; (request, computed, tokens) of each item."""
        formed = self.form()
        self.end(formed)
        return formed.items

    def form(self) -> Formed:
        """Schedule a batch."""
        output = self.scheduler.schedule()
        self.resumed = {int(name) for name in output.scheduled_cached_reqs.resumed_req_ids}
        items, tokens = [], []
        for name, n in output.num_scheduled_tokens.items():
            request, known = self.scheduler.requests[name], self.tokens[int(name)]
            computed = request.num_computed_tokens  # `schedule` has counted this batch already
            items.append((int(name), computed - n, n))
            token = int(known[computed]) if computed < len(known) else STOP
            tokens.append([] if request.is_prefill_chunk else [token])
        return Formed(output, items, tokens)

    def end(self, formed: Formed) -> None:
        """Hand over the tokens of a batch that was formed."""
        from vllm.v1.outputs import ModelRunnerOutput

        names = [str(r) for r, _, _ in formed.items]
        ran = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, formed.tokens)
        self.scheduler.update_from_output(formed.output, ran)

    def batches(
        self, admit: Callable[[float], float], duration_s: Callable[[list[Item]], float], queue_size: int = 2
    ) -> Iterator[tuple[list[Item], float]]:
        """The batches of the async scheduler and their seconds, as the engine's core drives it with a queue of batches.

        ``admit(now_s)`` adds who has come by then, and says when the next one comes, infinity behind the last. A batch
        is formed as long as the queue has room; else the core waits for the oldest. Empty batches are left out.
        """
        queue: deque[tuple[Formed, float]] = deque()
        now_s = free_s = 0.0  # the core's clock; when the device has done all that is queued
        while True:
            next_s = admit(now_s)
            if not queue and not self.scheduler.has_requests():
                if next_s == np.inf:
                    return
                now_s = next_s
                continue
            if self.scheduler.has_requests():
                formed = self.form()
                took_s = duration_s(formed.items) if formed.items else 0.0
                free_s = max(free_s, now_s) + took_s
                if formed.items:
                    yield formed.items, took_s
                elif not queue and self.scheduler.has_unfinished_requests():
                    raise RuntimeError("vLLM schedules nothing although requests are pending")
                queue.append((formed, free_s))
                if len(queue) < queue_size and (formed.items or self.scheduler.has_requests()):
                    continue
            oldest, end_s = queue.popleft()
            now_s = max(now_s, end_s)
            self.end(oldest)


def _block_hasher() -> Any:
    """What gives vLLM's blocks their identity."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK_SIZE, sha256)
