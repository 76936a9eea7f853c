"""Tokens of a real model under `execute` against vLLM's own scheduler: the same for every request, or the line says so.

    benchmarks/vllm_env.sh DIR
    DIR/bin/python -m benchmarks.vllm_tokens --requests 60 --seeds 4

A tiny model with large random weights and a repetition penalty, whose greedy tokens depend on every token before.
Batches are random: of the running requests half are left out, chunks are of random sizes, some are preempted, and any
that waits may be admitted; memory is scarce besides. One JSON line for each seed, synchronous and asynchronous:
``{"mode": m, "seed": s, "requests": n, "equal": k, "steps": t, "deferred": d, "preempted": p}``. ``--break`` counts a
token of every deferred prompt as computed that is not, to show that the comparison can fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from typing import Any

import numpy as np

MOST_PROMPT, MOST_OUTPUT, MAX_MODEL_LEN = 400, 60, 512
BLOCK_SIZE, MAX_NUM_SEQS, BUDGET = 32, 24, 256


def random_scheduler(is_async: bool, seed: int, broken: bool = False) -> tuple[type, dict[str, int]]:
    """A scheduler class of random batches, and what its instances count."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import RequestStatus

    from llmsched_gym.real_backend.vllm.execute import ExecutesBatches, NamedBatch

    rng = np.random.default_rng(seed)
    counts = {"steps": 0, "deferred": 0, "preempted": 0}

    class RandomBatches(ExecutesBatches):
        def schedule(self, throttle_prefills: bool = False) -> Any:
            counts["steps"] += 1
            tokens: dict[str, int] = {}
            preempt = []
            left = self.max_num_scheduled_tokens
            for request in self.running:
                unknown = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
                draw = rng.random()
                if draw < 0.02 and len(self.running) > 1:
                    preempt.append(request.request_id)
                elif draw < 0.51 or left == 0:
                    counts["deferred"] += 1
                    if broken and unknown > 2:
                        request.num_computed_tokens += 1
                else:
                    n = unknown if unknown <= 1 or rng.random() < 0.3 else int(rng.integers(1, unknown + 1))
                    tokens[request.request_id] = min(max(n, 1), left)
                    left -= tokens[request.request_id]
            waiting = [r for r in self.waiting if r.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)]
            for i in rng.permutation(len(waiting))[: rng.integers(0, 4)]:
                if left > 0:
                    n = min(left, int(rng.integers(1, waiting[i].num_tokens + 1)))
                    tokens[waiting[i].request_id] = n
                    left -= n
            if not tokens and not preempt:
                return super().schedule(throttle_prefills)  # somebody must go on
            counts["preempted"] += len(preempt)
            return self.execute(NamedBatch(tokens, preempt), throttle_prefills)

    base = AsyncScheduler if is_async else Scheduler
    return type("RandomScheduler", (RandomBatches, base), {}), counts


def make_engine(model: str, scheduler_cls: Any, is_async: bool, num_blocks: int) -> Any:
    """vLLM in this process, on `model` with a KV cache of so many blocks."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    args = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=BUDGET,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=num_blocks,
        enable_prefix_caching=False,
        enforce_eager=True,
        seed=0,
    )
    config = args.create_engine_config()
    config.scheduler_config.async_scheduling = is_async  # on a CPU vLLM itself switches it off
    config.scheduler_config.scheduler_cls = scheduler_cls
    engine = LLMEngine(config, Executor.get_class(config), log_stats=False)
    assert (engine.engine_core.engine_core.batch_queue is not None) == is_async
    return engine


def generate(engine: Any, prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
    """Greedy tokens of all prompts, which come a few at a time."""
    from vllm.sampling_params import SamplingParams

    found: dict[str, list[int]] = {}
    at = 0
    while at < len(prompts) or engine.has_unfinished_requests():
        for _ in range(2):
            if at < len(prompts):
                params = SamplingParams(
                    temperature=0.0, max_tokens=lengths[at], ignore_eos=True, repetition_penalty=1.3
                )
                engine.add_request(str(at), {"prompt_token_ids": prompts[at]}, params)
                at += 1
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
    return [found[str(i)] for i in range(len(prompts))]


def compare(model: str, is_async: bool, seed: int, requests: int, broken: bool) -> dict[str, Any]:
    """One run of random batches against one of vLLM's own."""
    rng = np.random.default_rng(1000 + seed)
    prompts = [rng.integers(2, 512, int(rng.integers(1, MOST_PROMPT))).tolist() for _ in range(requests)]
    lengths = rng.integers(1, MOST_OUTPUT, requests).tolist()
    num_blocks = 60  # four of the longest requests; with the null block
    outputs = []
    scheduler_cls, counts = random_scheduler(is_async, seed, broken)
    for cls in (None, scheduler_cls):
        engine = make_engine(model, cls, is_async, num_blocks)
        outputs.append(generate(engine, prompts, lengths))
        engine.engine_core.shutdown()
    equal = sum(a == b for a, b in zip(*outputs, strict=True))
    mode = "async" if is_async else "sync"
    variety = len({token for tokens in outputs[0] for token in tokens})
    return {"mode": mode, "seed": seed, "requests": requests, "equal": equal, "distinct_tokens": variety, **counts}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_tokens", description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=60, help="how many (60)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each mode (2)")
    parser.add_argument("--mode", choices=("sync", "async"), help="one of the two only")
    parser.add_argument("--break", dest="broken", action="store_true", help="with a fault that must be seen")
    args = parser.parse_args(argv)
    from llmsched_gym.real_backend.vllm.tiny_model import write_tiny_model

    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(folder, max_model_len=MAX_MODEL_LEN))
        for is_async in (False, True):
            if args.mode in (None, "async" if is_async else "sync"):
                for seed in range(args.seeds):
                    found = compare(model, is_async, seed, args.requests, args.broken)
                    differing += found["requests"] - found["equal"]
                    print(json.dumps(found), flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
