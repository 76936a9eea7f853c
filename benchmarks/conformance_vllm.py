"""Compare `vllm-v1` with vLLM's own V1 scheduler, batch by batch, on one clock: that of the cost model.

    benchmarks/vllm_env.sh DIR
    DIR/bin/python -m benchmarks.conformance_vllm --qps 1.8 --requests 400 --kv-blocks 2500 --seed 0

prints one JSON line: ``{"version": v, "batches": n, "mismatches": m, "first_mismatch": i or null}``; ``--cells`` prints
one for each of 18 cells. vLLM's `Scheduler` runs without a model, synchronously: every request whose known tokens are
all computed gets one token. Batches are compared as sets of (request, computed tokens, tokens).

    DIR/bin/python -m benchmarks.conformance_vllm --prefix-caching --random 500 --requests 400

compares with prefix caching on requests that have tokens in common (`prefix_tables.py`): by hand, at random, and 12
cells of sessions under memory pressure. A line then has also what was found cached: tokens at first admissions and at
resumes, and ``"cached_mismatches"``, the requests of which the two found another number.

Requests that our engine rejects at arrival are not sent to vLLM, where one that can never fit stays at the head for
ever. After a mismatch each side goes on with its own state.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conformance import Recording, next_batch
from benchmarks.prefix_tables import Case, at_random, by_hand, cells, tokens_of
from llmsched_gym.config import BLOCK_SIZE, ConfigError, Scenario, blocks_needed, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Engine, Execution, ScheduledBatch
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import RequestTable, make_table

QPS, KV_BLOCKS, SEEDS = (1.2, 1.8, 2.4), (14_733, 2_500), (0, 1, 2)
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

    @property
    def policy(self) -> str:
        options = {"budget": self.budget, "threshold": self.threshold, "reserve": str(self.reserve).lower()}
        return f"vllm-v1[{','.join(f'{key}={value}' for key, value in options.items())}]"


class VLLM:
    """vLLM's scheduler with `kv_blocks` usable blocks, and a model runner that says every token is 1."""

    def __init__(
        self,
        settings: Settings,
        kv_blocks: int,
        max_model_len: int,
        scheduler_cls: Any = None,
        additional_config: dict[str, Any] | None = None,
        is_async: bool = False,
    ) -> None:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import torch
        import vllm
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
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
                async_scheduling=is_async,
                is_encoder_decoder=False,
            ),
            cache_config=CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=settings.prefix_caching),
            additional_config=additional_config or {},
        )
        num_blocks = kv_blocks + 1  # one of them is the null block
        world.cache_config.num_gpu_blocks = num_blocks
        attention = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32)
        self.scheduler = (scheduler_cls or Scheduler)(
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
    ) -> None:
        """A request whose prompt and output are these tokens."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.tokens[r] = tokens
        params = SamplingParams(max_tokens=len(tokens) - prompt_tokens, ignore_eos=True, extra_args=extra_args)
        prompt = tokens[:prompt_tokens].tolist()
        self.scheduler.add_request(
            Request(
                str(r),
                prompt,
                params,
                None,
                arrival_time=float(r) if arrival_s is None else arrival_s,
                block_hasher=self.hasher,
            )
        )

    def step(self) -> list[tuple[int, int, int]]:
        """Schedule one batch and give every complete context its token; (request, computed, tokens) of each item."""
        output, items, tokens = self.form()
        self.end(output, items, tokens)
        return items

    def form(self) -> tuple[Any, list[tuple[int, int, int]], list[list[int]]]:
        """The next batch: vLLM's output, (request, computed, tokens) of each item, and what each will be given."""
        output = self.scheduler.schedule()
        self.resumed = {int(name) for name in output.scheduled_cached_reqs.resumed_req_ids}
        items, tokens = [], []
        for name, n in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            computed = request.num_computed_tokens  # `schedule` has counted this batch already
            items.append((int(name), computed - n, n))
            tokens.append([int(self.tokens[int(name)][computed])] if computed == request.num_tokens else [])
        return output, items, tokens

    def end(self, output: Any, items: list[tuple[int, int, int]], tokens: list[list[int]]) -> None:
        """Hand over the tokens of a batch that was formed."""
        from vllm.v1.outputs import ModelRunnerOutput

        names = [str(r) for r, _, _ in items]
        ran = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        self.scheduler.update_from_output(output, ran)


def _block_hasher() -> Any:
    """What gives vLLM's blocks their identity."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK_SIZE, sha256)


class Watched(Recording):
    """A recording that keeps the batch that it was last asked to run, as a set of (request, computed, tokens)."""

    batch: set[tuple[int, int, int]]

    def execute(self, batch: ScheduledBatch) -> Execution:
        columns = batch.request.tolist(), batch.num_computed.tolist(), batch.num_tokens.tolist()
        self.batch = set(zip(*columns, strict=True))
        return super().execute(batch)


class Found:
    """Cached tokens of each request: what vLLM counts as computed when it is admitted, at first and when resumed."""

    def __init__(self, num_requests: int) -> None:
        self.first, self.resumed = np.full(num_requests, -1), np.zeros(num_requests, np.int64)

    def see(self, items: Iterable[tuple[int, int, int]], resumed: Container[int]) -> None:
        for r, computed, _ in items:
            if self.first[r] < 0:
                self.first[r] = computed
            elif r in resumed:
                self.resumed[r] += computed


def compare(world: Scenario, table: RequestTable, settings: Settings) -> dict[str, Any]:
    """Run both on `table`; the number of vLLM's batches, of those that differ from ours, and the first of these."""
    kv_blocks = world.num_kv_blocks or load_profile(world.profile).num_kv_blocks
    real = VLLM(settings, kv_blocks, world.max_model_len)
    profile, recording, found = load_profile(world.profile), Watched([]), Found(len(table))
    world = world.replace(prefix_caching=settings.prefix_caching)
    scheduler = make_scheduler(settings.policy)
    engine = Engine(world.replace(admission=scheduler.admission), len(table), backend=recording)
    engine.reset(table)
    install(scheduler, engine.state)

    tokens = tokens_of(table)
    prompt, total = table.prompt_tokens, table.prompt_tokens + table.output_tokens
    fits = (total <= world.max_model_len) & (blocks_needed(total) <= kv_blocks)
    clock_s, arrived, differing, batches = 0.0, 0, [], 0
    while arrived < len(table) or real.scheduler.has_unfinished_requests():
        if not real.scheduler.has_unfinished_requests():
            clock_s = max(clock_s, float(table.arrival_s[arrived]))
        while arrived < len(table) and table.arrival_s[arrived] <= clock_s:
            if fits[arrived]:
                real.add(arrived, int(prompt[arrived]), tokens[arrived])
            arrived += 1
        if not real.scheduler.has_unfinished_requests():
            continue
        items = real.step()
        if not items:
            raise RuntimeError(f"vLLM schedules nothing in batch {batches} although requests are pending")
        chunks = [(computed, n) for r, computed, n in items if computed < prompt[r] or n > 1]
        contexts = [computed + n for r, computed, n in items if not (computed < prompt[r] or n > 1)]
        duration_s = profile.predict_s(chunks, contexts)
        recording.durations_s.append(duration_s)
        found.see(items, real.resumed)
        if not next_batch(engine, scheduler) or set(items) != recording.batch:
            differing.append(batches)
        clock_s += duration_s
        batches += 1
    while next_batch(engine, scheduler):
        differing.append(batches)
        batches += 1
    first = differing[0] if differing else None
    figures = {"version": real.version, "batches": batches, "mismatches": len(differing), "first_mismatch": first}
    if settings.prefix_caching:
        rows = engine.state.requests[0]
        served = found.first >= 0
        resumed = engine.state.prefixes[0]["num_recached_tokens"]
        other = ((rows["num_cached_tokens"] != found.first) | (resumed != found.resumed))[served]
        figures |= {"preemptions": int(rows["num_preemptions"].sum()), "prompt_tokens": int(prompt[served].sum())}
        figures |= {"cached_tokens": int(found.first[served].sum()), "recached_tokens": int(found.resumed.sum())}
        figures["cached_mismatches"] = int(other.sum())
    return figures


def run_cell(qps: float, requests: int, kv_blocks: int, seed: int, settings: Settings) -> dict[str, Any]:
    """The comparison on `requests` requests of the paper suite."""
    world = scenario(
        "paper",
        qps=qps,
        num_requests=requests,
        num_kv_blocks=kv_blocks,
        watermark=0.0,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.budget,
    )
    return compare(world, make_table(world, seed), settings)


def run_case(case: Case, settings: Settings) -> dict[str, Any]:
    """The comparison with prefix caching on requests that have tokens in common."""
    world = scenario(
        "paper",
        num_requests=len(case.table),
        num_kv_blocks=case.kv_blocks,
        watermark=0.0,
        max_num_seqs=case.max_num_seqs,
        max_num_batched_tokens=case.budget,
    )
    told = replace(settings, budget=case.budget, max_num_seqs=case.max_num_seqs, prefix_caching=True)
    return {"case": case.name, **compare(world, case.table, told)}


def runs(args: argparse.Namespace, settings: Settings) -> Iterator[dict[str, Any]]:
    """The comparisons that were asked for, one after the other."""
    if args.prefix_caching:
        for case in chain(by_hand(), map(at_random, range(args.random)), cells(args.requests)):
            yield run_case(case, settings)
    elif args.cells:
        for qps, blocks, seed in product(QPS, KV_BLOCKS, SEEDS):
            found = run_cell(qps, args.requests, blocks, seed, settings)
            yield {**found, "qps": qps, "kv_blocks": blocks, "seed": seed}
    else:
        yield run_cell(args.qps, args.requests, args.kv_blocks, args.seed, settings)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance_vllm", description=__doc__.split("\n")[0])
    parser.add_argument("--qps", type=float, default=1.8, help="requests per second of the paper suite (1.8)")
    parser.add_argument("--requests", type=int, default=400, help="how many (400)")
    parser.add_argument("--kv-blocks", type=int, default=2500, help="usable KV blocks of 16 tokens (2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=2048, help="max_num_batched_tokens (2048)")
    parser.add_argument("--max-num-seqs", type=int, default=128, help="running requests (128)")
    parser.add_argument("--threshold", type=int, default=0, help="long_prefill_token_threshold (0: none)")
    parser.add_argument(
        "--reserve", choices=("true", "false"), default="true", help="scheduler_reserve_full_isl (true)"
    )
    parser.add_argument("--cells", action="store_true", help=f"all of {QPS} x {KV_BLOCKS} blocks x seeds {SEEDS}")
    parser.add_argument("--prefix-caching", action="store_true", help="requests that have tokens in common")
    parser.add_argument("--random", type=int, default=100, help="with prefix caching: small random cases (100)")
    args = parser.parse_args(argv)
    settings = Settings(args.budget, args.threshold, args.reserve == "true", args.max_num_seqs)
    mismatches = 0
    try:
        for found in runs(args, settings):
            mismatches += found["mismatches"] + found.get("cached_mismatches", 0)
            print(json.dumps(found), flush=True)
    except ModuleNotFoundError as error:
        print(f"error: {error}; `benchmarks/vllm_env.sh DIR` makes an environment with vLLM", file=sys.stderr)
        return 2
    except (ConfigError, PolicyError, ValueError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 2
    return 1 if (args.cells or args.prefix_caching) and mismatches else 0


if __name__ == "__main__":
    sys.exit(main())
