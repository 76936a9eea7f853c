"""The transformers model as a backend of the engine: measured durations, greedy tokens, no request lost."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from llmsched_gym.config import BLOCK_SIZE, ModelSpec, Scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Execution, ScheduledBatch
from llmsched_gym.real_backend.attention import KVCache, choose_attention
from llmsched_gym.real_backend.block_table import FIRST, SCRATCH, BlockTable, PlacedBlocks
from llmsched_gym.real_backend.ceilings import device_name
from llmsched_gym.real_backend.errors import BackendError, one_line
from llmsched_gym.real_backend.graphs import StaticBatches
from llmsched_gym.real_backend.layout import Work
from llmsched_gym.real_backend.memory import Stopwatch, fitting_blocks, is_out_of_memory, release_memory
from llmsched_gym.real_backend.past import chains
from llmsched_gym.real_backend.runner import Runner
from llmsched_gym.real_backend.tokens import TokenStore
from llmsched_gym.real_backend.weights import LoadedModel, load_model
from llmsched_gym.workload import RequestTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARM_UP_PASSES, WARM_UP_TOKENS = 3, (1, 64, 256)


def make_backend(
    scenario: Scenario,
    model: str | PreTrainedModel = "random:tiny",
    device: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    count_host_time: bool | None = None,
    clock: str = "wall",
    attention: str = "auto",
    graphs: bool | None = None,
    fused: bool = True,
) -> TransformersBackend:
    """A warmed-up backend for engines of `scenario` (or one with other rates, SLOs, lengths, but equal limits).

    Args:
        scenario: its `max_num_seqs`, `max_model_len`, `max_num_batched_tokens` and `num_kv_blocks` count; without
            `num_kv_blocks` the cache gets the blocks that memory holds.
        model: local folder, hub id, a name of :data:`llmsched_gym.real_backend.weights.RANDOM_MODELS`, or a model.
        device: "cuda", "cuda:1", "cpu"; None is the GPU if there is one.
        dtype: of weights and KV; None is bfloat16 on a GPU, float32 on the CPU.
        seed: of random weights.
        count_host_time: whether the time between two batches (scheduling, the engine's own books) counts as well;
            None is as `scenario` says.
        clock: "wall", or on a CPU with one torch thread "cpu": a measure for machines that others use too.
        attention: "triton", the paged kernel; "sdpa", the portable path; "auto" is triton where it can run on a GPU.
        graphs: whether batches of few tokens are padded to fixed shapes and replayed as CUDA graphs; None is yes on a
            GPU with the paged kernel. On a CPU they are padded (those with prompts for the paged kernel only), but
            there is nothing to replay.
        fused: whether models that :mod:`llmsched_gym.real_backend.fused` knows run through its kernels instead of
            their own modules, where the paged kernel runs.
    """
    if count_host_time is None:
        count_host_time = scenario.count_host_time
    loaded = load_model(model, find_device(device), dtype, seed)
    backend = TransformersBackend(
        loaded,
        scenario,
        count_host_time=count_host_time,
        clock=clock,
        attention=attention,
        graphs=graphs,
        fused=fused,
    )
    backend.warm_up()
    return backend


def find_device(name: str | None) -> torch.device:
    """The device that is named, or the GPU if there is one; GPUs come with their index."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise BackendError(f"device: expected cpu, cuda or cuda:INDEX, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise BackendError(f"device: expected cpu, cuda or cuda:INDEX, got {name!r}")
    if not torch.cuda.is_available():
        raise BackendError(f"device {name!r}: torch {torch.__version__} sees no GPU here; use cpu, or leave it out")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise BackendError(f"device {name!r}: torch sees {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", index)


class TransformersBackend:
    """Executes the engine's batches on a model, one forward pass each.

    Attributes:
        num_kv_blocks: blocks of the cache; the engine takes this number where the scenario names none.
        num_splits: passes that ran out of memory and were split.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        loaded: LoadedModel,
        scenario: Scenario,
        *,
        count_host_time: bool = False,
        clock: str = "wall",
        attention: str = "auto",
        graphs: bool | None = None,
        fused: bool = True,
    ) -> None:
        # as the engine does
        max_num_seqs = scenario.max_num_seqs or load_profile(scenario.profile).device.max_num_seqs
        scenario = scenario.replace(max_num_seqs=max_num_seqs)
        self._watch = Stopwatch(loaded.device, clock)
        self.clock = clock
        self.loaded, self.device = loaded, loaded.device
        self.count_host_time = count_host_time
        self.num_splits = 0
        config = loaded.model.config
        longest = getattr(config, "max_position_embeddings", None)
        if longest and scenario.max_model_len > longest:
            raise BackendError(
                f"max_model_len {scenario.max_model_len}: {loaded.name} knows {longest} positions; set "
                f"max_model_len={longest}, which rejects longer requests"
            )
        spec = loaded.spec
        self.attention = choose_attention(attention, self.device, spec.head_dim)
        shape = (spec.num_kv_heads, spec.head_dim, loaded.dtype, loaded.device)
        # A cache of the scratch block alone, to see what the largest pass needs beside the KV.
        probe = Runner(loaded, KVCache(spec.num_layers, 0, *shape), self.attention)
        if attention == "auto" and self.attention == "triton":
            probe.try_kernel()
            self.attention = probe.attention
        on_gpu = self.device.type == "cuda"
        if graphs and on_gpu and self.attention != "triton":
            raise BackendError("graphs: the portable attention cannot be recorded; leave graphs out, or use triton")
        self._check_hook(probe)
        if fused and self.attention == "triton":
            # the passes that warm up and that measure memory are not bound to a sequence's length
            probe.try_fused(max(scenario.max_model_len, scenario.max_num_batched_tokens, *WARM_UP_TOKENS))
        largest = probe.scratch_inputs(scenario.max_num_batched_tokens)
        self.num_kv_blocks = scenario.num_kv_blocks or fitting_blocks(scenario, spec, self.device, probe.run, largest)
        try:
            cache = KVCache(spec.num_layers, self.num_kv_blocks, *shape)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BackendError(f"num_kv_blocks {self.num_kv_blocks}: more than the memory of {self.device}") from None
        self.runner = Runner(loaded, cache, self.attention)
        self.runner.fused = probe.fused
        self.blocks = BlockTable(self.num_kv_blocks, max_num_seqs, scenario.max_model_len)
        if graphs or (graphs is None and on_gpu and self.attention == "triton"):
            sizes = max_num_seqs, scenario.max_num_batched_tokens, self.blocks.blocks.shape[1]
            self.runner.static = StaticBatches(self.runner, *sizes)
        self._most_tokens = scenario.max_num_batched_tokens
        self.tokens = TokenStore(np.zeros(0, np.int64), np.zeros(0, np.int64), 0, spec.vocab_size)
        self._ended_s: float | None = None
        self._is_poisoned = False

    @property
    def setup(self) -> str:
        """Model, device and versions in one line: results of another setup must not be mixed in."""
        parts = [
            f"{Path(self.loaded.name).name} ({self.loaded.shapes_digest})",
            str(self.loaded.dtype).removeprefix("torch."),
            device_name(self.device),
            platform.machine(),
            f"torch {torch.__version__}",
            f"transformers {transformers.__version__}",
        ]
        if self.device.type == "cuda":
            parts.insert(3, f"CUDA {torch.version.cuda}")
        if self.attention != "sdpa":
            parts.append(f"{self.attention} attention")
        if self.runner.fused is not None:
            parts.append("fused kernels")
        if self.runner.static is not None:
            parts.append("graphs")
        if self.clock != "wall":
            parts.append(f"{self.clock} time")
        return ", ".join(parts)

    def reset(self, table: RequestTable) -> None:
        """Forget everything and take the requests of a new episode; their prompts come from the table's seed."""
        self.blocks.clear(len(table))
        self._ended_s = None
        vocab = self.loaded.spec.vocab_size
        shares = None if table.shares_with is None else table.identity()
        self.tokens = TokenStore(table.prompt_tokens, table.output_tokens, table.seed, vocab, shares)
        if self._is_poisoned:
            self.runner.cache.clear()
            self._is_poisoned = False

    def execute(self, batch: ScheduledBatch) -> Execution:
        """Run the batch; the measured time, and the emitted token of each request that emits."""
        host_s = 0.0
        if self.count_host_time and self._ended_s is not None:
            host_s = self._watch.now() - self._ended_s
        self._watch.start()
        blocks: BlockTable | PlacedBlocks = self.blocks
        if batch.blocks is None:
            self.blocks.keep_only(batch.running)
            work = self._take_blocks(batch.request, batch.num_tokens, batch.num_computed, batch.emits)
        else:
            blocks = self._placed(batch.blocks)
            rows = np.arange(len(batch.request))
            work = _work(batch.request, rows, batch.num_tokens, batch.num_computed, batch.emits)
        self.tokens.make_prompts(work.request)
        emitting, ids = self._run(work, blocks)
        tokens = dict(zip(emitting.tolist(), self._book(emitting, ids).tolist(), strict=True))
        duration_s = self._watch.stop()
        self._ended_s = self._watch.now()
        return Execution(duration_s + host_s, tokens)

    def fill(self, request: np.ndarray, position: np.ndarray, place: np.ndarray) -> None:
        """Compute what the cache holds when an episode begins; arrays: see :class:`~llmsched_gym.engine.Backend`."""
        for r, start, places in chains(request, position, place, self.tokens.owner):
            blocks, stop = self._placed(np.array([places])), len(places) * BLOCK_SIZE
            self.tokens.give(r, stop)
            for computed in range(start * BLOCK_SIZE, stop, self._most_tokens):
                n = min(self._most_tokens, stop - computed)
                self._run(_work([r], [0], [n], [computed], [False]), blocks)

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes."""
        return self.loaded.spec

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.loaded.dtype

    def fill_random(self, seed: int) -> None:
        """Let the whole KV cache hold numbers as keys and values are."""
        self.runner.cache.fill_random(seed)

    def measure(self, chunks: list[tuple[int, int]], decode_contexts: list[int], seed: int = 0) -> float:
        """Seconds of a made-up batch: chunks as (computed, n) tokens, decodes as context lengths, itself included.

        The running episode is forgotten; what counts as computed is whatever the cache holds.
        """
        request, num_tokens, computed = self._make_up(chunks, decode_contexts, seed)
        self._ended_s = None
        self._watch.start()
        work = self._take_blocks(request, num_tokens, computed, np.ones(len(request), bool))
        self._book(*self._run(work, self.blocks))
        duration_s = self._watch.stop()
        self.blocks.clear(0)
        return duration_s

    def made_up(self, chunks: list[tuple[int, int]], decode_contexts: list[int], seed: int = 0) -> Work:
        """The batch that :meth:`measure` would run, its blocks and prompts in place."""
        request, num_tokens, computed = self._make_up(chunks, decode_contexts, seed)
        return self._take_blocks(request, num_tokens, computed, np.ones(len(request), bool))

    def _make_up(
        self, chunks: list[tuple[int, int]], decode_contexts: list[int], seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Request, tokens to compute and tokens computed of a made-up batch, instead of the running episode."""
        if len(chunks) + len(decode_contexts) > len(self.blocks.owner):
            raise BackendError(
                f"a batch of {len(chunks) + len(decode_contexts)} sequences; at most {len(self.blocks.owner)}"
            )
        items = [*((n, computed) for computed, n in chunks), *((1, context - 1) for context in decode_contexts)]
        # the types of the engine's batches, so that warming up compiles what these need
        num_tokens, computed = (np.array(part, np.int32) for part in zip(*items, strict=True))
        request = np.arange(len(items), dtype=np.int32)
        self.blocks.clear(len(items))
        self.blocks.take(request, computed, np.zeros_like(computed))
        self.tokens = TokenStore(computed + num_tokens, np.full(len(items), 2), seed, self.loaded.spec.vocab_size)
        self.tokens.make_prompts(request)
        return request, num_tokens, computed

    def warm_up(self) -> None:
        """Run a few passes that leave no trace, so that the first measured batch pays for no set-up."""
        if self.attention == "triton":
            self.runner.compile_kernel()
        if self.runner.static is not None:
            self.runner.static.record()
        for num_tokens in WARM_UP_TOKENS:
            for _ in range(WARM_UP_PASSES):
                self.runner.run(self.runner.scratch_inputs(num_tokens))
        few = min(8, self.num_kv_blocks, len(self.blocks.owner))
        for _ in range(WARM_UP_PASSES):
            self.measure([], [1] * few)
        # and all that the books of a batch of the engine need, which is compiled when first called
        request, one, none = self._make_up([], [1] * few, 0)
        self.execute(ScheduledBatch(request, one, none, np.ones(few, bool), request[:0], request))
        self.blocks.release(request.astype(np.int64))
        self.blocks.clear(0)
        self._ended_s = None

    def check(self) -> None:
        """Raise AssertionError unless every block is accounted for and every request holds just what it needs."""
        self.blocks.check()

    def _take_blocks(
        self, request: np.ndarray, num_tokens: np.ndarray, num_computed: np.ndarray, emits: np.ndarray
    ) -> Work:
        """Blocks for the KV that the pass will write; a request that starts over gives its old ones back first."""
        r, row, n, computed = self.blocks.take(request, num_tokens, num_computed)
        return Work(r, row, n, computed, emits)

    def _placed(self, places: np.ndarray) -> PlacedBlocks:
        """The engine's own blocks as the cache's; (items, most blocks of one), below 0 behind an item's last."""
        if places.max(initial=0) >= self.num_kv_blocks:
            raise BackendError(f"the cache has {self.num_kv_blocks} blocks, fewer than the engine counts on")
        return PlacedBlocks(np.maximum(places.astype(np.int64) + FIRST, SCRATCH))

    def _run(self, work: Work, blocks: BlockTable | PlacedBlocks) -> tuple[np.ndarray, np.ndarray]:
        """Emitting requests and their tokens; a pass that runs out of memory is split in two, down to single tokens."""
        try:
            return self.runner.step(work, blocks, self.tokens)
        except BackendError:
            self._is_poisoned = True
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if work.num_tokens.sum() == 1:
                raise BackendError(
                    f"request {work.request[0]}: out of memory with a single token; use fewer num_kv_blocks than "
                    f"{self.num_kv_blocks} ({one_line(error)})"
                ) from None
        # Outside the handler, so that the failed pass's tensors are gone.
        if self.num_splits == 0:
            warnings.warn(
                f"out of memory in a batch of {work.num_tokens.sum()} tokens: it runs in two passes, as will others; "
                f"lower max_num_batched_tokens or num_kv_blocks ({self.num_kv_blocks})",
                stacklevel=2,
            )
        self.num_splits += 1
        release_memory(self.device)
        parts = [self._run(part, blocks) for part in split(work)]
        emitting, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
        return emitting, ids

    def _book(self, emitting: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Remember what was emitted, which shared tokens may decide; requests with all their tokens leave."""
        said, num_complete = self.tokens.append(emitting, ids)
        if num_complete > 0:
            self.blocks.release(emitting[self.tokens.is_complete(emitting)])
        return said

    def _check_hook(self, runner: Runner) -> None:
        """Refuse a model whose layers do not all come to the paged attention."""
        runner.cache.num_writes = 0
        try:
            runner.run(runner.scratch_inputs(1))
        except (TypeError, AttributeError, BackendError) as error:
            raise BackendError(f"model {self.loaded.name!r} takes no hybrid batch: {one_line(error)}") from None
        if runner.cache.num_writes != self.loaded.spec.num_layers:
            raise BackendError(
                f"model {self.loaded.name!r}: {runner.cache.num_writes} of {self.loaded.spec.num_layers} layers use "
                "the attention interface; expected a decoder-only model such as Mistral, Llama or Qwen2"
            )


def _work(request: Any, row: Any, num_tokens: Any, num_computed: Any, emits: Any) -> Work:
    r, row, n, computed = (np.asarray(part, np.int64) for part in (request, row, num_tokens, num_computed))
    return Work(r, row, n, computed, np.asarray(emits, bool))


def split(work: Work) -> tuple[Work, Work]:
    """Two passes of about equal tokens that do the same; a lone chunk is cut, and its second half emits."""
    if len(work.request) > 1:
        ends = np.cumsum(work.num_tokens)
        cut = int(np.clip(np.searchsorted(ends, ends[-1] / 2) + 1, 1, len(ends) - 1))
        return work.take(slice(None, cut)), work.take(slice(cut, None))
    half = work.num_tokens // 2
    return (
        work._replace(num_tokens=half, emits=np.zeros(1, bool)),
        work._replace(num_tokens=work.num_tokens - half, num_computed=work.num_computed + half),
    )
