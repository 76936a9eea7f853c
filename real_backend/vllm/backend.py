"""vLLM as a backend of the engine: the gym's batches, each executed by a real vLLM engine in this process.

The gym decides on everything: vLLM's scheduler is handed each batch (:mod:`.execute`), with as many KV blocks of the
gym's size as the gym has, admission that reserves nothing, and no prefix cache. What comes back is the measured time of
its whole step (scheduling, forward pass, sampling, update) and the tokens.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.request import Request, RequestStatus

from llmsched_gym.config import Scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Execution, ScheduledBatch
from llmsched_gym.real_backend.errors import BackendError, one_line
from llmsched_gym.real_backend.tokens import prompt_ids
from llmsched_gym.real_backend.vllm.execute import ExecutesBatches, NamedBatch
from llmsched_gym.real_backend.vllm.tiny_model import write_tiny_model
from llmsched_gym.real_backend.vllm.versions import check_version, let_vllm_look_at_llvmlite
from llmsched_gym.real_backend.weights import model_spec
from llmsched_gym.workload import RequestTable

RANDOM_MODEL = "random:tiny"
CACHE_GIB = "4"  # of the CPU's cache before the number of blocks is said; only an upper bound


class GivenBatches(ExecutesBatches, Scheduler):
    """vLLM's scheduler, which runs `given`."""

    given = NamedBatch()

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """The batch that was given."""
        return self.execute(self.given, throttle_prefills)


def has_weights(model: str) -> bool:
    """Whether a model comes with weights; a folder with no more than a configuration gets random ones."""
    folder = Path(model)
    return not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def make_backend(
    scenario: Scenario, model: str = RANDOM_MODEL, *, count_host_time: bool | None = None, clock: str = "wall"
) -> VLLMBackend:
    """A backend for engines of `scenario`, or of one with other rates, SLOs and lengths but equal limits.

    Args:
        scenario: its `max_num_seqs`, `max_model_len`, `max_num_batched_tokens`, `block_size` and `num_kv_blocks` count;
            without `num_kv_blocks` the profile's.
        model: a folder (with a configuration alone the weights are random), a hub id, or ``random:tiny``.
        count_host_time: whether the time between two batches counts as well; None is as `scenario` says.
        clock: "wall", or on a CPU "cpu": time on its cores, all threads together.
    """
    check_version(str(vllm.__version__))
    if scenario.prefix_caching:
        raise BackendError("prefix_caching: expected False with backend='vllm', which has a cache of its own")
    if clock not in ("wall", "cpu"):
        raise BackendError(f"clock: expected wall or cpu, got {clock!r}")
    counts = scenario.count_host_time if count_host_time is None else count_host_time
    return VLLMBackend(scenario, model, counts, clock)


class VLLMBackend:
    """Executes the engine's batches on vLLM, one engine step each.

    Attributes:
        num_kv_blocks: blocks of the cache that requests can have.
    """

    def __init__(self, scenario: Scenario, model: str, count_host_time: bool, clock: str) -> None:
        profile = load_profile(scenario.profile)
        self.num_kv_blocks = scenario.blocks(profile.num_kv_blocks)
        self.name, self.clock, self.count_host_time = model, clock, count_host_time
        self._now = time.perf_counter if clock == "wall" else time.process_time
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with tempfile.TemporaryDirectory() as folder:
            path = str(write_tiny_model(folder, 0, scenario.max_model_len)) if model == RANDOM_MODEL else model
            args = EngineArgs(
                model=path,
                skip_tokenizer_init=True,
                load_format="auto" if has_weights(path) else "dummy",
                dtype="float32" if model == RANDOM_MODEL else "auto",
                max_model_len=scenario.max_model_len,
                max_num_seqs=scenario.max_num_seqs or profile.device.max_num_seqs,
                max_num_batched_tokens=scenario.max_num_batched_tokens,
                block_size=scenario.block_size,  # type: ignore[arg-type]
                num_gpu_blocks_override=self.num_kv_blocks + 1,  # one is the null block
                enable_prefix_caching=False,
                async_scheduling=False,
                scheduler_cls=GivenBatches,
                distributed_executor_backend="uni",
                enforce_eager=model == RANDOM_MODEL,  # compiling it would take longer than all that it is for
            )
            let_vllm_look_at_llvmlite()
            try:
                config = args.create_engine_config()
                config.scheduler_config.scheduler_reserve_full_isl = False
                config.scheduler_config.watermark = 0.0
                config.scheduler_config.long_prefill_token_threshold = 0
                self.core = EngineCore(config, Executor.get_class(config), log_stats=False)
            except (OSError, RuntimeError, ValueError) as error:
                if "block size" in str(error):
                    what = "on a CPU blocks are of 32 tokens or a multiple"
                    raise BackendError(f"block_size {scenario.block_size}: {what}; {one_line(error)}") from None
                raise BackendError(f"model {model!r}: vLLM cannot load it: {one_line(error)}") from None
        self.scheduler: Any = self.core.scheduler
        self.block_size = scenario.block_size
        self.device = torch.device(str(config.device_config.device_type))
        self.dtype: torch.dtype = config.model_config.dtype
        self.spec = model_spec(Path(model).name, config.model_config.hf_text_config, self.dtype)
        self.vocab_size = int(config.model_config.get_vocab_size())
        self._prompts = self._outputs = np.zeros(0, np.int64)
        self._seed = 0
        self._ended_s: float | None = None

    @property
    def setup(self) -> str:
        """Model, device and versions in one line: results of another setup must not be mixed in."""
        parts = [Path(self.name).name, str(self.dtype).removeprefix("torch."), str(self.device), platform.machine()]
        parts += [f"torch {torch.__version__}", f"vllm {vllm.__version__}"]
        return ", ".join(parts if self.clock == "wall" else [*parts, f"{self.clock} time"])

    def reset(self, table: RequestTable) -> None:
        """Forget everything and take the requests of a new episode; their prompts come from the table's seed."""
        self._forget()
        self._prompts, self._outputs, self._seed = table.prompt_tokens, table.output_tokens, table.seed
        self._ended_s = None

    def execute(self, batch: ScheduledBatch) -> Execution:
        """Run the batch; the measured time, and the token of each request that emits."""
        host_s = 0.0
        start_s = self._now()
        if self.count_host_time and self._ended_s is not None:
            host_s = start_s - self._ended_s
        requests = self.scheduler.requests
        holds = {str(r) for r in batch.running.tolist()}
        running = [request.request_id for request in self.scheduler.running]
        preempted = {str(r) for r in batch.preempted.tolist()}
        gone = [name for name in running if name not in holds and name not in preempted]
        if gone:
            self.scheduler.finish_requests(gone, RequestStatus.FINISHED_ABORTED)
        names = [str(r) for r in batch.request.tolist()]
        for name, r in zip(names, batch.request.tolist(), strict=True):
            if name not in requests:
                self._add(name, r)
        given = NamedBatch(
            dict(zip(names, batch.num_tokens.tolist(), strict=True)), [n for n in running if n in preempted]
        )
        ran, tokens = self._step(given)
        if ran != given.tokens:
            differing = next(name for name in {**ran, **given.tokens} if ran.get(name) != given.tokens.get(name))
            what = f"{ran.get(differing, 0)} tokens of request {differing} instead of {given.tokens.get(differing, 0)}"
            raise BackendError(f"vLLM ran {what}: its memory or limits are not the scenario's")
        end_s = self._ended_s = self._now()
        return Execution(end_s - start_s + host_s, {int(name): token for name, token in tokens.items()})

    def fill_random(self, seed: int) -> None:
        """Let the whole KV cache hold numbers as keys and values are."""
        random = torch.Generator(self.device).manual_seed(seed)
        for cache in self._runner().kv_caches:
            cache.normal_(generator=random)

    def _runner(self) -> Any:
        executor: Any = self.core.model_executor
        return executor.driver_worker.worker.model_runner

    def measure(self, chunks: list[tuple[int, int]], decode_contexts: list[int]) -> float:
        """Seconds of a made-up batch: chunks as (computed, n) tokens, decodes as context lengths, itself included.

        The running episode is forgotten. What counts as computed has its blocks and whatever they hold, as vLLM takes
        requests whose KV came from elsewhere. Requests that have computed something run one token before the clock
        starts: to vLLM's worker a request of the last step is cheaper than one that it has never seen.
        """
        self._forget()
        before, tokens, prompts = {}, {}, {}
        for i, (computed, n) in enumerate([*((context - 1, 1) for context in decode_contexts), *chunks]):
            name, decodes = str(i), i < len(decode_contexts)
            tokens[name] = n
            prompts[name] = prompt_ids(
                0, i, computed if decodes and computed else computed + n, self.vocab_size
            ).tolist()
            if computed:
                request = self._add_prompt(name, prompts.pop(name), 3)
                before[name] = 1
                if computed > 1:
                    self.scheduler.kv_cache_manager.allocate_slots(request, computed - 1)
                    request.num_computed_tokens = computed - 1
        ran_before = self._step(NamedBatch(before))[0] if before else {}
        for name, prompt in prompts.items():
            self._add_prompt(name, prompt, 3)
        start_s = self._now()
        ran, _ = self._step(NamedBatch(tokens))
        duration_s = self._now() - start_s
        if ran_before != before or ran != tokens:
            raise BackendError(f"vLLM ran {sum(ran.values())} of {sum(tokens.values())} tokens: beyond its limits")
        self._forget()
        return duration_s

    def _add(self, name: str, r: int) -> None:
        prompt = prompt_ids(self._seed, r, int(self._prompts[r]), self.vocab_size).tolist()
        self._add_prompt(name, prompt, int(self._outputs[r]))

    def _add_prompt(self, name: str, prompt: list[int], num_output_tokens: int) -> Request:
        params = SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True)
        request = Request(name, prompt, params, None)
        self.scheduler.add_request(request)
        return request

    def _forget(self) -> None:
        """End all requests; the workers forget them too."""
        self.scheduler.finish_requests(list(self.scheduler.requests), RequestStatus.FINISHED_ABORTED)
        self._step(NamedBatch())
        self._ended_s = None

    def _step(self, batch: NamedBatch) -> tuple[dict[str, int], dict[str, int]]:
        """What vLLM ran of a batch, and the tokens that came of it, by request."""
        scheduler = self.scheduler
        scheduler.given = batch
        ran: dict[str, int] = {}
        schedule = scheduler.schedule

        def noted(throttle_prefills: bool = False) -> SchedulerOutput:
            output: SchedulerOutput = schedule(throttle_prefills)
            ran.update(output.num_scheduled_tokens)
            return output

        scheduler.schedule = noted
        try:
            outputs, _ = self.core.step()
        finally:
            del scheduler.schedule
        told = outputs.get(0) if outputs else None
        found = told.outputs if told is not None else []
        return ran, {output.request_id: output.new_token_ids[-1] for output in found if output.new_token_ids}

    def close(self) -> None:
        """Let vLLM give back its memory."""
        self.core.shutdown()
