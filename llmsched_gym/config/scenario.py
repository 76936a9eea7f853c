"""Frozen, validated description of a scenario: device, engine limits, SLOs, workload.

A :class:`Scenario` is everything that fixes the world a scheduler lives in; with a seed it fixes the requests.
Times are seconds, lengths are tokens, rates are requests per second.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self

from llmsched_gym.config.fields import Checked, ConfigError, check_names, plain_fields

BLOCK_SIZE = 16
"""Tokens in one KV block unless a scenario says otherwise (vLLM's default)."""


def blocks_needed(num_tokens: Any, block_size: int = BLOCK_SIZE) -> Any:
    """KV blocks that hold so many tokens; of an array, of each. Kernels have `engine.blocks.blocks_for`."""
    return -(-num_tokens // block_size)


MOST_SEQS = 2**20

SLO_CLASSES = ("strict", "relaxed")
ARRIVALS = ("poisson", "gamma", "mmpp", "switching", "replay")
TRACE_ARRIVALS = ("keep", "poisson", "gamma", "mmpp", "switching")
ADMISSIONS = ("prompt", "chunk", "prompt-check")
"""Blocks taken at admission: the whole prompt's; the first chunk's; likewise, if the whole prompt's are free now."""
BACKENDS = ("simulated", "transformers", "vllm")
MEASURING = BACKENDS[1:]
TBT_RULES = ("every-gap", "deadline", "mean")  # and "fraction:X"
MEASURED = {"jitter": 0.0, "straggler_share": 0.0, "cost_scale": 1.0}
"""What only the simulated device knows, and its values where times are measured."""


@dataclass(frozen=True)
class Scenario(Checked):
    """The world of one episode. Every field explains itself on its line; all are validated when made."""

    suite: str = "default"  # the suite this scenario was derived from
    profile: str = "rtx6000ada-mistral-7b"  # cost profile that executes batches: a name or a JSON file
    scheduler_profile: str | None = None  # profile behind the scheduler's predictions; None: the executing one
    # workload
    workload: str = "sharegpt"  # fitted length distribution (see `llmsched workloads`)
    trace: str | None = None  # trace file; replaces `workload`
    trace_arrivals: str | None = None  # keep a trace's times, or a process; None: keep, without times `arrivals`
    trace_invalid: Literal["raise", "drop"] = "raise"  # rows of a trace that break a rule: an error, or left out
    arrivals: str = "poisson"  # poisson, gamma, mmpp, switching
    burstiness: float = 1.0  # gamma shape of the gaps; below 1 is burstier than Poisson
    qps: float | None = None  # mean arrival rate, 1/s; None: drawn from qps_range
    qps_range: tuple[float, float] = (1.0, 2.2)  # drawn once an episode; mmpp and switching move inside it
    switch_every_s: tuple[float, float] = (60.0, 120.0)  # time between rate changes, mmpp and switching
    # service-level objectives
    strict_share: float | tuple[float, float] = 0.05  # share of strict users; a range is drawn from per episode
    strict_tbt_slo_s: float = 0.1  # TBT SLO of strict users
    relaxed_tbt_slo_s: float = 0.5  # TBT SLO of all others
    ttft_slo_s: float = 0.5  # TTFT SLO of an empty prompt
    ttft_slo_per_token_s: float = 0.0005  # added per prompt token
    ttft_class_scales: tuple[float, ...] = (1.0,)  # each request's TTFT SLO is scaled by one of these, uniformly
    patience_s: float = 60.0  # lateness at which a client leaves
    beta: float = 0.5  # weight of lateness, and of a refusal, in a request's utility
    tbt_rule: str = "every-gap"  # every-gap, fraction:X, deadline, mean
    # machine
    cost_scale: float | tuple[float, float] = 1.0  # hidden factor on every batch time; a range is drawn from
    jitter: float = 0.05  # sigma of the log-normal factor on batch times
    straggler_share: float = 0.0  # share of batches that take straggler_factor times longer
    straggler_factor: float = 3.0  # how much longer they take
    # episode
    num_requests: int | None = None  # finite run over so many measured arrivals; None: continuing
    warmup_s: float = 120.0  # finite runs: arrivals before this are not measured
    drain_s: float = 600.0  # finite runs: cut off so long after the last measured arrival
    arrivals_continue: bool = True  # finite runs: traffic goes on behind the measured requests
    horizon_s: float = 300.0  # continuing runs: truncated here
    max_backlog: int = 64  # continuing runs: up to so many requests wait at time 0
    # engine
    num_kv_blocks: int | None = None  # None: the profile's
    block_size: int = 16  # tokens in a KV block, a power of two
    prefix_caching: bool = False  # whether requests share the KV blocks of what they begin with alike, as vLLM does
    async_lag: bool = False  # whether batches are formed while the one before them executes, as vLLM does
    watermark: float = 0.01  # share of blocks that admission leaves free
    max_model_len: int = 8192  # requests with more prompt and output tokens are rejected
    max_num_seqs: int | None = None  # largest number of running requests; None: 128, on an H100 or H200 1,024
    max_num_batched_tokens: int = 8192  # largest number of tokens in a batch
    admission: str = "prompt"  # blocks taken at admission: prompt, chunk or prompt-check (docs/schedulers.md)
    idle_step_s: float = 0.01  # how far an empty batch moves the clock while work is pending
    allow_refusal: bool = False  # whether a policy may refuse requests
    length_hint: str = "none"  # none, noisy:SIGMA, oracle
    # what executes batches
    backend: str = "simulated"  # simulated, transformers, vllm
    model: str | None = None  # a local folder, a hub id, random:tiny or, with transformers, random:mistral-7b
    count_host_time: bool = False  # with a model: whether the scheduler's own time counts, too

    def __post_init__(self) -> None:
        plain_fields(self)
        self._validate()

    def replace(self, **fields: Any) -> Self:
        """A copy with some fields changed; unknown names raise :class:`UnknownField`."""
        check_names(type(self), fields)
        return dataclasses.replace(self, **fields)

    def blocks(self, of_profile: int) -> int:
        """KV blocks of the machine, on a profile that has `of_profile` of 16 tokens."""
        return self.num_kv_blocks or of_profile * BLOCK_SIZE // self.block_size

    @property
    def hint_sigma(self) -> float | None:
        """Log-normal error of the length hint: None without a hint, 0 for an oracle."""
        if self.length_hint == "none":
            return None
        return 0.0 if self.length_hint == "oracle" else float(self.length_hint.split(":")[1])

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as they are."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def _validate(self) -> None:
        for name in ("suite", "profile", "workload"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: expected a name, got {getattr(self, name)!r}")
        for name in ("scheduler_profile", "trace"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: expected a name or a file, got {getattr(self, name)!r}")
        if self.trace_arrivals is not None:
            self._check_choice("trace_arrivals", TRACE_ARRIVALS)
            if self.trace is None:
                raise ConfigError("trace_arrivals: needs a trace")
        self._check_choice("trace_invalid", ("raise", "drop"))
        self._check_choice("arrivals", ARRIVALS)
        self._check_choice("admission", ADMISSIONS)
        self._check_choice("tbt_rule", TBT_RULES, "fraction", 1.0)
        self._check_choice("length_hint", ("none", "oracle"), "noisy", 10.0)
        self._check_number("burstiness", 1e-3, 1e6)
        self._check_number("qps", 1e-6, 1e6, none=True)
        self._check_interval("qps_range", 1e-6, 1e6)
        self._check_interval("switch_every_s", 1e-3)
        self._check_interval("strict_share", 0.0, 1.0, scalar=True)
        self._check_interval("cost_scale", 1e-3, 1e3, scalar=True)
        for name in ("strict_tbt_slo_s", "relaxed_tbt_slo_s", "patience_s", "idle_step_s", "horizon_s", "drain_s"):
            self._check_number(name, 0.0, open_low=True)
        for name in ("ttft_slo_s", "ttft_slo_per_token_s", "warmup_s"):
            self._check_number(name, 0.0, 1e9)
        scales = self.ttft_class_scales
        if not isinstance(scales, tuple | list) or not scales or not all(isinstance(x, int | float) for x in scales):
            raise ConfigError(f"ttft_class_scales: expected positive numbers, got {scales!r}")
        if not all(0 < x < math.inf for x in scales):
            raise ConfigError(f"ttft_class_scales: expected positive numbers, got {scales!r}")
        self._check_number("beta", 0.0, 1e6)
        self._check_number("jitter", 0.0, 10.0)
        self._check_number("straggler_share", 0.0, 1.0)
        self._check_number("straggler_factor", 0.0, 1e3, open_low=True)
        self._check_number("watermark", 0.0, 1.0)
        self._check_integer("num_requests", 1, none=True)
        self._check_integer("max_backlog", 0)
        self._check_integer("num_kv_blocks", 1, none=True)
        self._check_integer("max_num_seqs", 1, most=MOST_SEQS, none=True)
        for name in ("max_model_len", "max_num_batched_tokens", "block_size"):
            self._check_integer(name, 1)
        if self.block_size.bit_count() != 1:
            raise ConfigError(f"block_size: expected a power of two, got {self.block_size!r}")
        for name in ("arrivals_continue", "allow_refusal", "count_host_time", "prefix_caching", "async_lag"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.num_requests is None and math.isinf(self.horizon_s):
            raise ConfigError("horizon_s: expected a finite time when num_requests is None, got inf")
        self._check_choice("backend", BACKENDS)
        if self.async_lag and (self.prefix_caching or self.backend != "simulated"):
            what = "prefix_caching=True" if self.prefix_caching else f"backend={self.backend!r}"
            raise ConfigError(f"async_lag: expected False with {what}, got True")
        if self.backend in MEASURING:
            self._check_measured()
        elif self.model is not None or self.count_host_time:
            name = "model" if self.model is not None else "count_host_time"
            raise ConfigError(f"{name}: needs backend='transformers' or 'vllm', got backend={self.backend!r}")

    def _check_measured(self) -> None:
        """A model to run, and no noise: what a batch takes is measured."""
        if not isinstance(self.model, str):
            what = f"expected a folder, a hub id or random:tiny with backend={self.backend!r}"
            raise ConfigError(f"model: {what}, got {self.model!r}")
        if self.block_size != BLOCK_SIZE and self.backend == "transformers":
            what = f"expected {BLOCK_SIZE} with backend='transformers', whose kernels have it"
            raise ConfigError(f"block_size: {what}, got {self.block_size!r}")
        for name, neutral in MEASURED.items():
            if getattr(self, name) != neutral:
                what = f"expected {neutral:g} with backend={self.backend!r}, whose times are measured"
                raise ConfigError(f"{name}: {what}, got {getattr(self, name)!r}")
