"""Scenarios with several replicas behind a router, and the environment of an agent that routes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from llmsched_gym.config.env import check_reward
from llmsched_gym.config.fields import ConfigError
from llmsched_gym.config.scenario import Scenario

MOST_REPLICAS = 1024
ROLES = ("both", "prefill", "decode")
"""Of a replica: whether it computes prompts, emits all tokens behind the first, or does both."""


@dataclass(frozen=True)
class ClusterScenario(Scenario):
    """A scenario whose requests are routed to one of several replicas.

    What a :class:`Scenario` says of the engine holds for each replica; `qps` is the rate of the cluster.
    """

    num_replicas: int = 4
    replica_profiles: tuple[str, ...] = ()  # one for each replica; none: all run on `profile`
    router: str = "least-tokens"  # who routes, where no agent does (see `llmsched routers`)
    replica_scheduler: str = "slai"  # who forms each replica's batches, unless a run names another
    router_staleness_s: float = 0.0  # replicas report at multiples of this, each at its own phase; 0: always fresh
    roles: tuple[str, ...] = ()  # of each replica: both, prefill, decode; none: all do both
    decode_router: str = "least-kv"  # who chooses the replica that goes on behind the first token
    kv_link_bytes_per_s: float = 50e9  # of the link over which KV moves from replica to replica (400 Gb/s)
    replica_failures: tuple[tuple[int, float, float], ...] = ()  # (replica, when it fails, when it is back), seconds

    def _validate(self) -> None:
        super()._validate()
        self._check_integer("num_replicas", 1, most=MOST_REPLICAS)
        n = self.num_replicas
        for name in ("replica_profiles", "roles"):
            given = getattr(self, name)
            if not isinstance(given, tuple) or not all(isinstance(entry, str) for entry in given):
                raise ConfigError(f"{name}: expected names, got {given!r}")
            if given and len(given) != n:
                raise ConfigError(f"{name}: expected {n} names, one for each replica, or none, got {len(given)}")
        for name in ("router", "replica_scheduler", "decode_router"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: expected a name, got {getattr(self, name)!r}")
        for role in self.roles:
            if role not in ROLES:
                raise ConfigError(f"roles: expected {', '.join(ROLES)}, got {role!r}")
        if "prefill" in self.roles and set(self.roles) <= {"prefill"}:
            raise ConfigError("roles: expected at least one replica that decodes behind those that prefill, got none")
        if "decode" in self.roles and set(self.roles) <= {"decode"}:
            raise ConfigError("roles: expected at least one replica that computes prompts, got none")
        if "prefill" in self.roles and self.prefix_caching:
            raise ConfigError("prefix_caching: expected False where some replicas prefill and others decode, got True")
        self._check_number("router_staleness_s", 0.0)
        if math.isinf(self.router_staleness_s):
            raise ConfigError("router_staleness_s: expected a finite number, got inf")
        self._check_number("kv_link_bytes_per_s", 0.0, open_low=True)
        if self.async_lag:
            raise ConfigError("async_lag: expected False for replicas, got True")
        if self.backend != "simulated":
            raise ConfigError(f"backend: expected 'simulated' for replicas, got {self.backend!r}")
        self._check_failures()

    def _check_failures(self) -> None:
        until_s = [-math.inf] * self.num_replicas
        for replica, fails_s, back_s in self.failures_by_time():
            if fails_s < until_s[replica]:
                raise ConfigError(
                    f"replica_failures: replica {replica} fails again at {fails_s:g} s, before it is back"
                )
            until_s[replica] = back_s

    def failures_by_time(self) -> list[tuple[int, float, float]]:
        """The failures, first ones first; ConfigError for what is none."""
        if not isinstance(self.replica_failures, tuple):
            raise ConfigError(f"replica_failures: expected (replica, fails_s, back_s), got {self.replica_failures!r}")
        for failure in self.replica_failures:
            if not isinstance(failure, tuple) or len(failure) != 3 or not all(_is_number(x) for x in failure):
                raise ConfigError(f"replica_failures: expected (replica, fails_s, back_s), got {failure!r}")
            replica, fails_s, back_s = failure
            if replica not in range(self.num_replicas):
                raise ConfigError(
                    f"replica_failures: expected a replica from 0 to {self.num_replicas - 1}, got {replica}"
                )
            if not 0.0 <= fails_s < back_s:
                raise ConfigError(f"replica_failures: expected 0 <= fails_s < back_s, got {fails_s!r}, {back_s!r}")
        return sorted(self.replica_failures, key=lambda failure: failure[1])

    @property
    def profiles(self) -> tuple[str, ...]:
        """The cost profile of each replica."""
        return self.replica_profiles or (self.profile,) * self.num_replicas


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


ROUTE_OBSERVATIONS = ("features", "replicas")


@dataclass(frozen=True)
class RouteConfig(ClusterScenario):
    """A cluster and how an agent that routes meets it: the keyword arguments of ``gym.make("LLMRoute-v0", ...)``."""

    observation: Any = "features"  # features, replicas, or an object with `space` and `observe(view)`
    mask_in_observation: str | tuple[str, str] | None = None  # rllib, torchrl, tianshou, or two names: of both parts
    reward: Any = "slo"  # slo, or a callable on a Transition
    reward_scale: float = 1.0  # constant factor on the reward
    credit: str = "early"  # pay utility as it is earned and lost, or at each request's finish
    tau_s: float = 120.0  # time constant of info["discount"]; inf: nothing is discounted
    episode_metrics: bool = False  # whether info holds the episode's figures at its end; records gaps between tokens

    action: ClassVar[str] = "route"
    action_repeat: ClassVar[int] = 1
    token_budget: ClassVar[int] = 512  # no action forms batches

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward(self)
        if not hasattr(self.observation, "observe"):
            self._check_choice("observation", ROUTE_OBSERVATIONS)
