"""Frozen, validated descriptions of a scenario: model, device, engine limits, SLOs, workload.

A :class:`Scenario` is everything that fixes the world a scheduler lives in; with a seed it fixes the requests.
Times are seconds, lengths are tokens, rates are requests per second.
Long, as every field has its line, its meaning and its check, and is looked for here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

BLOCK_SIZE = 16
"""Tokens in one KV block unless a scenario says otherwise (vLLM's default)."""


def blocks_needed(num_tokens: Any, block_size: int = BLOCK_SIZE) -> Any:
    """KV blocks that hold so many tokens; of an array, of each. Kernels have `engine.blocks.blocks_for`."""
    return -(-num_tokens // block_size)


MOST = 2**31 - 1
"""Of whole numbers: records hold them in 32 bits."""
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


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that names the field and what was expected."""


class UnknownField(ConfigError, TypeError):
    """A field that does not exist: to Python an unexpected keyword argument, for which some libraries wait."""

    @property
    def told(self) -> str:
        """The same for an option or a file that names the field."""
        return f"the scenario has no field {str(self).partition('argument ')[2]}"


def plain(value: Any) -> Any:
    """`value` in Python's own types: NumPy's scalars and arrays become numbers and tuples, lists tuples."""
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    if isinstance(value, np.ndarray):
        return plain(value[()]) if value.ndim == 0 else tuple(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, str | os.PathLike):
        return str(os.fspath(value))
    return value


def plain_fields(instance: Any) -> None:
    """Turn the fields of a frozen dataclass that is being made into Python's own types."""
    for f in dataclasses.fields(instance):
        object.__setattr__(instance, f.name, plain(getattr(instance, f.name)))


@dataclass(frozen=True)
class ModelSpec:
    """Shapes of a decoder-only transformer with grouped-query attention."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: int = 2  # bf16

    def __post_init__(self) -> None:
        plain_fields(self)

    @property
    def layer_params(self) -> int:
        """Weights of the linear layers of all transformer blocks."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_params(self) -> int:
        """Parameters of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, input embedding and output head included."""
        return (self.layer_params + 2 * self.head_params) * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that a token takes in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_value


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator, or several that share every layer: what a roofline needs to know. Figures are those of all."""

    name: str
    memory_bytes: float
    bandwidth_bytes_s: float
    flops_s: float  # dense bf16
    bandwidth_efficiency: float = 0.8
    flops_efficiency: float = 0.7
    num_devices: int = 1

    def __post_init__(self) -> None:
        plain_fields(self)

    @property
    def each_bytes(self) -> float:
        """Memory of one of the devices, which is what engines go by."""
        return self.memory_bytes / self.num_devices

    @property
    def is_large(self) -> bool:
        """Whether vLLM serves it with large batches: 70 GiB or more and no A100 (0.32, `vllm/engine/arg_utils.py`)."""
        return self.each_bytes >= 70 * 2**30 and "a100" not in self.name.lower()

    @property
    def max_num_seqs(self) -> int:
        """Running requests that an engine allows on it unless told otherwise: vLLM's 1,024 on large devices."""
        return 1024 if self.is_large else 128

    @property
    def vllm_token_budget(self) -> int:
        """Tokens in a batch of vLLM's server on it unless told otherwise (0.32)."""
        if self.each_bytes >= 160 * 2**30:
            return 16_384
        return 8192 if self.is_large else 2048

    @property
    def sglang_chunk_tokens(self) -> int:
        """Prompt tokens in a batch of SGLang's server on it unless told otherwise (0.5.23, `memory_hook.py`)."""
        for gib, tokens in ((20, 2048), (60, 4096), (160, 8192)):
            if self.each_bytes < gib * 2**30:
                return tokens
        return 16_384


@dataclass(frozen=True)
class Scenario:
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

    def _check_number(
        self, name: str, low: float, high: float = math.inf, *, open_low: bool = False, none: bool = False
    ) -> None:
        value = getattr(self, name)
        if none and value is None:
            return
        ok = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not ok or (open_low and value == low):
            bound = f"a number {'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < math.inf else "")
            raise ConfigError(f"{name}: expected {bound}, got {value!r}")

    def _check_integer(self, name: str, low: int, *, most: int = MOST, none: bool = False) -> None:
        value = getattr(self, name)
        if none and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{name}: expected a whole number >= {low}, got {value!r}")
        if value > most:
            raise ConfigError(f"{name}: expected a whole number <= {most:,}, got {value!r}")

    def _check_interval(self, name: str, low: float, high: float = math.inf, *, scalar: bool = False) -> None:
        value = getattr(self, name)
        if scalar and isinstance(value, int | float) and not isinstance(value, bool):
            value = (value, value)
        ok = isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
        if not ok or not low <= value[0] <= value[1] <= high or math.isinf(value[1]):
            what = "a number or a pair" if scalar else "a pair"
            bounds = f"[{low:g}, {high:g}]"
            raise ConfigError(f"{name}: expected {what} (low, high) within {bounds}, got {getattr(self, name)!r}")

    def _check_choice(self, name: str, options: tuple[str, ...], prefix: str = "", high: float = 0.0) -> None:
        """One of `options`, or ``prefix:NUMBER`` with a number from 0 to `high`."""
        value = getattr(self, name)
        if isinstance(value, str) and value in options:
            return
        try:
            if prefix and value.startswith(prefix + ":") and 0.0 <= float(value.split(":")[1]) <= high:
                return
        except (ValueError, AttributeError):
            pass
        known = ", ".join((*options, f"{prefix}:NUMBER") if prefix else options)
        raise ConfigError(f"{name}: expected one of {known}, got {value!r}")

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


OF_THE_VECTOR = ("num_envs", "num_threads", "autoreset_mode")
"""Arguments of the native vector environment that no configuration has."""


def check_names(cls: type, fields: dict[str, Any]) -> None:
    """Raise one clear error for a field that `cls` does not have."""
    names = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name in OF_THE_VECTOR:
            whose = (
                "only LLMSchedVectorEnv has it (gym.make_vec with vectorization_mode='vector_entry_point', its default)"
            )
            raise UnknownField(f"{cls.__name__} got an unexpected keyword argument {name!r}; {whose}")
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UnknownField(f"{cls.__name__} got an unexpected keyword argument {name!r}{hint}")


ACTIONS = {"knobs": math.inf, "preset": math.inf, "priority": math.inf, "request": 1}
"""Kinds of actions, each with the most batches that one action may decide; `llmsched_gym.env.actions` has the rest."""
OBSERVATIONS = ("features", "slots")
CREDITS = ("early", "finish")
MASK_NAMES = {
    "rllib": ("observations", "action_mask"),  # rllib/examples/rl_modules/classes/action_masking_rlm.py, ray 2.60
    "torchrl": ("observation", "action_mask"),  # torchrl.envs.transforms.ActionMask, 0.14
    "tianshou": ("obs", "mask"),  # tianshou/algorithm/modelfree/dqn.py, 2.0
}
"""Under which names libraries look for an observation and, beside it, the mask of legal actions."""


def check_reward(config: Any) -> None:
    """Check the fields of an environment's configuration that say what is paid and told."""
    config._check_number("reward_scale", 0.0, 1e12, open_low=True)
    config._check_number("tau_s", 0.0, open_low=True)
    if not isinstance(config.episode_metrics, bool):
        raise ConfigError(f"episode_metrics: expected True or False, got {config.episode_metrics!r}")
    config._check_choice("credit", CREDITS)
    if not callable(config.reward):
        config._check_choice("reward", ("slo",))
    names = config.mask_in_observation
    if names is None or (isinstance(names, str) and names in MASK_NAMES):
        return
    is_pair = isinstance(names, tuple) and len(names) == 2 and all(isinstance(name, str) and name for name in names)
    if not is_pair or names[0] == names[1]:
        what = f"{', '.join(MASK_NAMES)}, or two names, of the observation and of the mask"
        raise ConfigError(f"mask_in_observation: expected None, {what}, got {names!r}")


@dataclass(frozen=True)
class EnvConfig(Scenario):
    """A scenario and how an agent meets it: the keyword arguments of ``gym.make("LLMSched-v0", ...)``."""

    action: str = "knobs"  # knobs, preset, priority, request
    action_repeat: int = 1  # batches that one knobs or priority action decides
    observation: Any = "features"  # features, slots, or an object with `space` and `observe(view)`
    mask_in_observation: str | tuple[str, str] | None = None  # rllib, torchrl, tianshou, or two names: of both parts
    reward: Any = "slo"  # slo, or a callable on a Transition
    reward_scale: float = 1.0  # constant factor on the reward
    credit: str = "early"  # pay utility as it is earned and lost, or at each request's finish
    tau_s: float = 120.0  # time constant of info["discount"]; inf: nothing is discounted
    token_budget: int = 512  # of a batch formed by priority or request actions
    episode_metrics: bool = False  # whether info holds the episode's figures at its end; records gaps between tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward(self)
        self._check_integer("action_repeat", 1)
        self._check_integer("token_budget", 1)
        self._check_choice("action", tuple(ACTIONS))
        if self.async_lag and self.action == "request":
            raise ConfigError("async_lag: expected False with action='request', got True")
        if not hasattr(self.observation, "observe"):
            self._check_choice("observation", OBSERVATIONS)
        if self.action_repeat > ACTIONS[self.action]:
            most = f"{ACTIONS[self.action]} with action={self.action!r}"
            raise ConfigError(f"action_repeat: expected {most}, got {self.action_repeat}")
