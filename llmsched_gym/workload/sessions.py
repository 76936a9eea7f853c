"""Sessions: conversations and agents, whose every turn continues the one before it, drawn from a few parameters.

A session begins with a system prompt, which it may share with others, and the first of its own tokens. Each turn's
prompt is the prompt and the output of the turn before it and new tokens: a message, a tool's result. The session ends
after a drawn number of turns, or where the next would not fit the model. Session k has row k of the uniforms to
itself, so that it is the same however many are drawn.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from llmsched_gym.config import ConfigError

TURNS, SPREAD, SYSTEM, SLO, TTFT, SPARE = range(6)
"""Draws of a session, by position; those of its turns come behind them."""
NEW, OUTPUT, THINK, HINT = range(4)
"""Draws of a turn, by position."""
CHUNK_DRAWS = 1 << 20
"""Uniforms held at a time, as a few numbers remain of each session's many."""


@dataclass(frozen=True, eq=False)
class Quantity:
    """A log-normal distribution cut off at both ends, which hold what lies beyond, or a table of quantiles."""

    median: float = math.nan
    sigma: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    probs: np.ndarray | None = None  # (num_knots,) cumulative probabilities, 0 to 1
    values: np.ndarray | None = None  # (num_knots,) quantiles

    def draw(self, uniforms: np.ndarray, factor: np.ndarray | float = 1.0) -> np.ndarray:
        """Values of any shape from uniforms in [0, 1) of that shape; `factor` scales them before they are cut off."""
        if self.probs is not None and self.values is not None:
            return np.clip(factor * np.interp(uniforms, self.probs, self.values), self.low, self.high)
        return np.clip(factor * self.median * np.exp(self.sigma * normal(uniforms)), self.low, self.high)

    def draw_tokens(self, uniforms: np.ndarray, factor: np.ndarray | float = 1.0) -> np.ndarray:
        """The same as whole numbers >= 1, int64."""
        return np.maximum(np.rint(self.draw(uniforms, factor)), 1.0).astype(np.int64)


def normal(uniforms: np.ndarray) -> np.ndarray:
    """Standard normal values by inversion; finite for every uniform in [0, 1)."""
    from scipy.special import ndtri

    return np.asarray(ndtri(uniforms + 2.0**-54))


@dataclass(frozen=True, eq=False)
class SessionModel:
    """What sessions are like; docs/formats.md has the file, which names a source or an assumption for every field."""

    name: str
    source: str
    turns: Quantity  # model calls of a session
    first_tokens: Quantity  # of the first prompt, behind the system prompt
    new_tokens: Quantity  # of each later prompt, behind the last output
    spread: float  # sigma of a session's log-normal factor, of median 1, on its new tokens
    output_tokens: Quantity
    think_s: Quantity  # from an output's last token to the next prompt
    system_tokens: np.ndarray  # (num_systems,) int64, lengths of the system prompts
    system_bounds: np.ndarray  # (num_systems,) cumulated shares of sessions; the rest has none
    max_output_tokens: int  # the most that a client accepts

    @property
    def parts(self) -> tuple[SessionModel, ...]:
        """What it is a mixture of: itself."""
        return (self,)

    @property
    def max_turns(self) -> int:
        """The most model calls of a session."""
        return int(self.turns.high)

    @property
    def draws(self) -> int:
        """Uniforms of a session."""
        return SPARE + 1 + (HINT + 1) * self.max_turns

    def sessions(self, uniforms: np.ndarray, max_model_len: int) -> Sessions:
        """Sessions from uniforms in [0, 1) of shape (n, `draws`).

        Raises :class:`ConfigError` if a first prompt could find no room behind the longest system prompt.
        """
        least = int(self.system_tokens.max(initial=0)) + int(self.output_tokens.high) + 1
        if max_model_len < least:
            raise ConfigError(f"max_model_len: expected {least} or more with workload {self.name}, got {max_model_len}")
        own, turn = uniforms[:, : SPARE + 1], uniforms[:, SPARE + 1 :].reshape(len(uniforms), self.max_turns, HINT + 1)
        system = np.searchsorted(self.system_bounds, own[:, SYSTEM], "right")
        prefix = np.append(self.system_tokens, 0)[system]

        output = self.output_tokens.draw_tokens(turn[..., OUTPUT])
        new = self.new_tokens.draw_tokens(turn[..., NEW], np.exp(self.spread * normal(own[:, SPREAD]))[:, None])
        first = self.first_tokens.draw_tokens(turn[:, 0, NEW])
        new[:, 0] = np.minimum(first, max_model_len - prefix - output[:, 0])
        total = prefix[:, None] + np.cumsum(new + output, axis=1)  # (n, max_turns), prompt and output
        comes = np.arange(self.max_turns) < self.turns.draw_tokens(own[:, TURNS])[:, None]
        comes &= total <= max_model_len

        prompt = total - output
        think_s = self.think_s.draw(turn[..., THINK])
        think_s[:, 0] = 0.0
        return Sessions(
            num_turns=comes.sum(axis=1),
            prefix_id=np.where(system < len(self.system_tokens), system, -1).astype(np.int32),
            prefix_tokens=prefix.astype(np.int32),
            slo_draw=own[:, SLO].copy(),
            ttft_draw=own[:, TTFT].copy(),
            prompt_tokens=prompt[comes].astype(np.int32),
            new_tokens=new[comes].astype(np.int32),
            output_tokens=output[comes].astype(np.int32),
            max_output_tokens=np.minimum(self.max_output_tokens, max_model_len - prompt[comes]).astype(np.int32),
            think_s=think_s[comes],
            hint_draw=normal(turn[..., HINT][comes]),
        )


@dataclass(frozen=True, eq=False)
class Sessions:
    """Drawn sessions: arrays of (num_sessions,), and of (num_all_turns,) with the turns of a session side by side."""

    num_turns: np.ndarray  # (num_sessions,) int64, >= 1
    prefix_id: np.ndarray  # (num_sessions,) int32, which system prompt; -1: none
    prefix_tokens: np.ndarray  # (num_sessions,) int32, its length
    slo_draw: np.ndarray  # (num_sessions,) uniform, which SLO class
    ttft_draw: np.ndarray  # (num_sessions,) uniform, which TTFT class
    prompt_tokens: np.ndarray  # int32, whole context
    new_tokens: np.ndarray  # int32; of the first turn all but the system prompt
    output_tokens: np.ndarray  # int32
    max_output_tokens: np.ndarray  # int32
    think_s: np.ndarray  # float64, 0 for first turns
    hint_draw: np.ndarray  # float64, standard normal

    def __len__(self) -> int:
        return len(self.num_turns)

    @property
    def first(self) -> np.ndarray:
        """Where each session's turns begin, int64 (num_sessions,)."""
        return np.cumsum(self.num_turns) - self.num_turns

    @property
    def session(self) -> np.ndarray:
        """The session of each turn, int64."""
        return np.repeat(np.arange(len(self)), self.num_turns)

    def select(self, rows: np.ndarray) -> Self:
        """The sessions of the given indices, in their order."""
        turns = self.num_turns[rows]
        ends = np.cumsum(turns)
        places = np.repeat(self.first[rows] - (ends - turns), turns) + np.arange(turns.sum())
        return self._apply(lambda name, array: array[rows if name in _PER_SESSION else places])

    def behind(self, over: np.ndarray) -> Self:
        """What is to come of each session after its first `over` turns, int (num_sessions,), fewer than it has."""
        number = np.arange(len(self.prompt_tokens)) - np.repeat(self.first, self.num_turns)
        to_come = number >= np.repeat(over, self.num_turns)
        left = self._apply(lambda name, array: array if name in _PER_SESSION else array[to_come])
        return dataclasses.replace(left, num_turns=self.num_turns - over)

    def heads(self) -> Self:
        """The first turn of each session, by itself."""
        first = self.first
        alone = self._apply(lambda name, array: array if name in _PER_SESSION else array[first])
        return dataclasses.replace(alone, num_turns=np.ones_like(first))

    def _apply(self, change: Any) -> Self:
        fields = dataclasses.fields(self)
        return type(self)(**{f.name: change(f.name, getattr(self, f.name)) for f in fields})


_PER_SESSION = ("num_turns", "prefix_id", "prefix_tokens", "slo_draw", "ttft_draw")


def join(parts: list[Sessions]) -> Sessions:
    """Sessions one behind the other."""
    names = [f.name for f in dataclasses.fields(Sessions)]
    return Sessions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


class DrawsSessions(Protocol):
    """What sessions are drawn from: a model, or a mixture of several."""

    @property
    def parts(self) -> tuple[SessionModel, ...]:
        """The models that sessions are of."""
        ...

    @property
    def draws(self) -> int:
        """Uniforms of a session."""
        ...

    def sessions(self, uniforms: np.ndarray, max_model_len: int) -> Sessions:
        """Sessions from uniforms in [0, 1) of shape (n, `draws`)."""
        ...


class SessionStream:
    """An endless stream of sessions; a longer call repeats a shorter one exactly."""

    def __init__(self, model: DrawsSessions, rng: np.random.Generator, max_model_len: int) -> None:
        self._model, self._rng, self._max_model_len = model, rng, max_model_len
        self._parts: list[Sessions] = [model.sessions(rng.random((0, model.draws)), max_model_len)]
        self._drawn = 0

    def first(self, n: int) -> Sessions:
        """The first n sessions."""
        most = max(CHUNK_DRAWS // self._model.draws, 1)
        while self._drawn < n:
            uniforms = self._rng.random((min(most, n - self._drawn), self._model.draws))
            self._parts.append(self._model.sessions(uniforms, self._max_model_len))
            self._drawn += len(uniforms)
        self._parts = [join(self._parts)]
        return self._parts[0] if self._drawn == n else self._parts[0].select(np.arange(n))


def parse_sessions(data: dict[str, Any], where: str) -> SessionModel:
    """A model from its JSON form; raises :class:`ConfigError` naming `where` and the field."""
    try:
        systems = data["system_prompts"]
        tokens, shares = (_numbers(systems, "system_prompts", field) for field in ("tokens", "shares"))
        if tokens.shape != shares.shape or not ((tokens >= 1.0) & (tokens == np.rint(tokens))).all():
            raise ValueError("system_prompts.tokens: expected whole numbers >= 1, one per share")
        if not (shares > 0.0).all() or shares.sum() > 1.0 + 1e-9:
            raise ValueError("system_prompts.shares: expected numbers > 0 that sum to 1 or less")
        model = SessionModel(
            name=str(data["name"]),
            source=str(data["source"]),
            turns=_quantity(data, "turns", 1.0),
            first_tokens=_quantity(data, "first_tokens", 1.0),
            new_tokens=_quantity(data, "new_tokens", 1.0),
            spread=_number(data, "spread"),
            output_tokens=_quantity(data, "output_tokens", 1.0),
            think_s=_quantity(data, "think_s", 0.0),
            system_tokens=tokens.astype(np.int64),
            system_bounds=np.cumsum(shares),
            max_output_tokens=int(_number(data, "max_output_tokens")),
        )
        if not 0.0 <= model.spread < 10.0:
            raise ValueError(f"spread: expected a number from 0 to 10, got {model.spread:g}")
        if model.turns.high > 10_000:
            raise ValueError(f"turns: expected at most 10,000, got {model.turns.high:g}")
        if model.max_output_tokens < model.output_tokens.high:
            raise ValueError(f"max_output_tokens: expected {model.output_tokens.high:g} or more, as outputs have")
        return model
    except KeyError as error:
        raise ConfigError(f"{where}: missing field {error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _number(data: dict[str, Any], field: str) -> float:
    value = data[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field}: expected a number, got {value!r}")
    return float(value)


def _numbers(data: Any, name: str, field: str) -> np.ndarray:
    try:
        values = np.asarray(data[field], float)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected an object with numbers in {field}") from None
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"{name}.{field}: expected a list of numbers")
    return values


def _quantity(data: dict[str, Any], name: str, least: float) -> Quantity:
    given = data[name]
    if isinstance(given, dict) and "probs" in given:
        probs, values = (_numbers(given, name, field) for field in ("probs", "values"))
        ok = len(probs) == len(values) >= 2 and probs[0] == 0.0 and probs[-1] == 1.0
        if not ok or not (np.diff(probs) > 0.0).all() or not (np.diff(values) >= 0.0).all() or values[0] < least:
            what = f"increasing probs from 0 to 1 and as many non-decreasing values >= {least:g}"
            raise ValueError(f"{name}: expected {what}")
        return Quantity(low=float(values[0]), high=float(values[-1]), probs=probs, values=values)
    try:
        median, sigma, low, high = (float(given[field]) for field in ("median", "sigma", "low", "high"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name}: expected numbers in median, sigma, low and high, or in probs and values") from None
    if not least <= low <= median <= high < math.inf or not 0.0 <= sigma < 10.0:
        what = f"{least:g} <= low <= median <= high, and a sigma from 0 to 10"
        raise ValueError(f"{name}: expected {what}, got {given}")
    return Quantity(median, sigma, low, high)
