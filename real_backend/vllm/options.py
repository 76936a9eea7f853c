"""What a server is told about its scheduling: policy, profile, SLOs of its clients. Needs no vLLM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmsched_gym.config import SLO_CLASSES, ConfigError, Scenario, plain_fields

POLICY_VARIABLE, PROFILE_VARIABLE = "LLMSCHED_POLICY", "LLMSCHED_PROFILE"
CONFIG_KEY = "llmsched"  # of --additional-config
_DEFAULTS = Scenario()
_TIMES = ("ttft_slo_s", "ttft_slo_per_token_s", "strict_tbt_slo_s", "relaxed_tbt_slo_s")


@dataclass(frozen=True)
class Options:
    """Settings of the plug-in; SLOs are those of clients who name none."""

    policy: str = "slai"  # a registered name, with parameters in brackets, module:Class or a policy folder
    profile: str | None = None  # cost profile behind predictions, a name or a file; None: fitted to measured steps
    slo_class: str = "relaxed"  # of clients who name neither a class nor a TBT SLO
    ttft_slo_s: float = _DEFAULTS.ttft_slo_s  # of an empty prompt
    ttft_slo_per_token_s: float = _DEFAULTS.ttft_slo_per_token_s  # added per prompt token
    strict_tbt_slo_s: float = _DEFAULTS.strict_tbt_slo_s  # TBT SLO of strict users
    relaxed_tbt_slo_s: float = _DEFAULTS.relaxed_tbt_slo_s  # of all others
    allow_refusal: bool = False  # whether the policy may refuse requests, which are told that they were aborted
    metrics_port: int | None = None  # where Prometheus finds the metrics; None: only in PROMETHEUS_MULTIPROC_DIR

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("policy", "slo_class"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: expected a name, got {getattr(self, name)!r}")
        if self.slo_class not in SLO_CLASSES:
            raise ConfigError(f"slo_class: expected one of {', '.join(SLO_CLASSES)}, got {self.slo_class!r}")
        if not isinstance(self.profile, str | None):
            raise ConfigError(f"profile: expected a name or a file, got {self.profile!r}")
        for name in _TIMES:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0.0:
                raise ConfigError(f"{name}: expected seconds >= 0, got {value!r}")
        if not isinstance(self.allow_refusal, bool):
            raise ConfigError(f"allow_refusal: expected True or False, got {self.allow_refusal!r}")
        port = self.metrics_port
        if port is not None and (not isinstance(port, int) or not 0 < port < 65536):
            raise ConfigError(f"metrics_port: expected a port from 1 to 65535, got {port!r}")


def read_options(additional_config: Any, environment: Mapping[str, str]) -> Options:
    """From ``--additional-config '{"llmsched": {...}}'`` and, for what that leaves out, from LLMSCHED_POLICY, _PROFILE.

    Raises:
        ConfigError: a setting that does not exist or cannot be used.
    """
    given = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"--additional-config: {CONFIG_KEY}: expected an object, got {given!r}")
    known = [field.name for field in dataclasses.fields(Options)]
    for name in given:
        if name not in known:
            raise ConfigError(f"--additional-config: {CONFIG_KEY}: expected some of {', '.join(known)}, got {name!r}")
    said = {
        name: environment[variable]
        for name, variable in (("policy", POLICY_VARIABLE), ("profile", PROFILE_VARIABLE))
        if environment.get(variable)
    }
    return Options(**{**said, **given})


@dataclass(frozen=True)
class SLO:
    """What a client expects."""

    ttft_slo_s: float
    tbt_slo_s: float
    slo_class: int  # index into config.SLO_CLASSES


def slo_of(extra_args: Mapping[str, Any] | None, prompt_tokens: int, options: Options) -> tuple[SLO, bool]:
    """The SLOs that a request's ``extra_args`` name (``ttft_slo_s``, ``tbt_slo_s``, ``slo_class``), else the defaults.

    A class without a TBT SLO has its class's; a TBT SLO without a class is strict up to the strict users'. What cannot
    be used counts as not said; the second value is whether all could.
    """
    args, usable = extra_args or {}, True
    ttft_s, tbt_s = _seconds(args.get("ttft_slo_s")), _seconds(args.get("tbt_slo_s"))
    slo_class = _class(args.get("slo_class"))
    for name, value in (("ttft_slo_s", ttft_s), ("tbt_slo_s", tbt_s), ("slo_class", slo_class)):
        usable &= value is not None or args.get(name) is None
    if slo_class is None:
        strict = tbt_s <= options.strict_tbt_slo_s if tbt_s is not None else options.slo_class == SLO_CLASSES[0]
        slo_class = 0 if strict else 1
    if tbt_s is None:
        tbt_s = (options.strict_tbt_slo_s, options.relaxed_tbt_slo_s)[slo_class] or math.inf
    if ttft_s is None:
        ttft_s = options.ttft_slo_s + options.ttft_slo_per_token_s * prompt_tokens or math.inf
    return SLO(ttft_s, tbt_s, slo_class), usable


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        return None
    return seconds if seconds > 0.0 else None


def _class(value: Any) -> int | None:
    if isinstance(value, str) and value in SLO_CLASSES:
        return SLO_CLASSES.index(value)
    return int(value) if value in range(len(SLO_CLASSES)) and not isinstance(value, bool) else None
