"""Moments of environments as values: what `get_state` returns and `set_state` takes, and what they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import ConfigError
from llmsched_gym.engine.cache import kernels_digest
from llmsched_gym.engine.saved import Rows
from llmsched_gym.workload import RequestTable

ASKED = ("choices", "scores", "rules")
"""Of a core's arrays what is no part of a moment: actions, which each step writes, and constants."""


class Origin(NamedTuple):
    """What a moment belongs to: nothing else can go on from it."""

    kind: str  # of core
    settings: Mapping[str, str]  # of the environment, by field
    costs: str  # digest of the profiles' tables
    code: str  # digest of what steps are made of


class Moment(NamedTuple):
    """What a core holds of one environment."""

    origin: Origin
    saved: Any  # engine.saved.Saved, or cluster.saved.SavedCluster
    arrays: Mapping[str, bytes]  # outcome and observation, by array
    table: RequestTable
    seed: int
    qps: float


@dataclass(frozen=True, eq=False)
class EnvState:
    """One moment of an environment: a value that stays as it is, can be pickled, and be set as often as one likes.

    Requests to come, output lengths and noise are in it, hidden as they are from agents: who tries actions from a
    state and takes the best knows the future.
    """

    moment: Moment
    generator: Mapping[str, Any]  # that seeds the next episodes, as its bit generator tells it
    generator_seed: int
    is_over: bool  # whether the episode has ended
    num_steps: int = 0  # for `max_episode_steps` of a vector environment
    totals: tuple[float, int] = (0.0, 0)  # return and length of the episode, for the face of Stable-Baselines3
    scheduler: Any = None  # whose settings the engine holds; one in Python keeps its own memory

    @property
    def nbytes(self) -> int:
        """Bytes of arrays, without those, and the request table, that all states of an episode share."""
        moment = self.moment
        return int(moment.saved.nbytes) + sum(map(len, moment.arrays.values()))

    def __repr__(self) -> str:
        settings = self.moment.origin.settings
        return f"EnvState(suite {settings['suite']}, seed {self.moment.seed}, {self.nbytes:,} bytes)"


class SavedCore:
    """What cores have in common: moments of their environments, and pickles and copies of themselves."""

    config: Any
    engine: Any
    arrays: Any
    tables: list[RequestTable | None]
    seeds: np.ndarray
    qps: np.ndarray
    num_threads: int
    _threads: ThreadPoolExecutor | None
    num_restored = 0  # how often somebody has gone back
    _derived: tuple[str, ...]  # what :meth:`_connect` makes

    def _connect(self) -> None:
        """Refer to the arrays, and look up what the settings name."""
        self._rows = {name: Rows(array) for name, array in self.arrays._asdict().items() if name not in ASKED}
        self._origin: Origin | None = None

    def _start_threads(self) -> None:
        self._threads = ThreadPoolExecutor(self.num_threads - 1) if self.num_threads > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        left_out = (*self._derived, "_rows", "_origin")
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return state | {"_threads": self._threads is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_threaded = state.pop("_threads")
        vars(self).update(state)
        self._connect()
        self._threads = None
        if is_threaded:
            self._start_threads()

    @property
    def origin(self) -> Origin:
        """What moments of these environments belong to."""
        if self._origin is None:
            state, costs = self.engine.state, hashlib.sha256()
            for table in (state.linear_s, state.coef_s, state.own_linear_s, state.own_coef_s):
                costs.update(table.tobytes())
            settings = {name: _named(value) for name, value in self.config.to_dict().items()}
            self._origin = Origin(type(self).__name__, settings, costs.hexdigest()[:16], kernels_digest())
        return self._origin

    def save(self, env: int) -> Moment:
        """Environment `env`, an episode of which has begun, as it is now."""
        saved, table = self.engine.save(env), self.tables[env]
        assert table is not None
        arrays = {name: rows.take(env) for name, rows in self._rows.items()}
        return Moment(self.origin, saved, arrays, table, int(self.seeds[env]), float(self.qps[env]))

    def restore(self, env: int, moment: Moment, noise_seed: int | None = None) -> None:
        """Make environment `env` what it was; the noise on the batches to come may be drawn from another seed."""
        self.engine.restore(moment.saved, env, noise_seed)
        self.num_restored += 1
        for name, taken in moment.arrays.items():
            self._rows[name].put(env, taken)
        self.tables[env], self.seeds[env], self.qps[env] = moment.table, moment.seed, moment.qps

    def check_state(self, state: Any) -> EnvState:
        """`state` if these environments can go on from it; else a ConfigError says why not."""
        if not isinstance(state, EnvState):
            raise ConfigError(f"state: expected what get_state() returned, got {type(state).__name__}")
        own, other = self.origin, state.moment.origin
        if other is own or other == own:
            return state
        if other.kind != own.kind:
            raise ConfigError(f"state: expected one of {own.kind}, got one of {other.kind}")
        for name, value in own.settings.items():
            if other.settings.get(name) != value:
                raise ConfigError(f"state: expected one with {name}={value}, got {other.settings.get(name, 'none')}")
        what = "cost profile" if other.costs != own.costs else "version of llmsched-gym"
        raise ConfigError(f"state: expected one of the same {what}, got one of another")


def _named(value: Any) -> str:
    """A setting as text: an object of the user's by its class, a function by its name."""
    kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
    is_own = kind is value or kind.__module__ != "builtins"
    return f"{kind.__module__}.{kind.__qualname__}" if is_own else repr(value)
