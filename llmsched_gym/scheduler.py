"""What a scheduler is: the protocol, compiled schedulers with their settings, and parameters in brackets.

A scheduler is compiled (:class:`Compiled`: a kernel and its settings) or any object with ``schedule(view) -> Batch``.
:mod:`llmsched_gym.registry` finds them by name.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llmsched_gym.config import ADMISSIONS
from llmsched_gym.engine.eviction import EVICTIONS
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import HOLDS, ORDERS, pack
from llmsched_gym.engine.records import KNOBS
from llmsched_gym.engine.state import OWN_MEMORY, SCHEDULE_SIGNATURE, State, env_of
from llmsched_gym.engine.step import VICTIMS
from llmsched_gym.engine.view import Batch, View

VLLM_TOKEN_BUDGET = 0
"""As a token budget: vLLM's for the device of the scheduler's cost profile."""
SGLANG_CHUNK = -1
"""Likewise SGLang's."""
BY_DEVICE = {VLLM_TOKEN_BUDGET: 3, SGLANG_CHUNK: 4}
"""Token budgets that the device decides, and their place among the profile's coefficients."""


class PolicyError(ValueError):
    """A policy that cannot be made; the message is one line that names it and what was expected."""


@runtime_checkable
class Scheduler(Protocol):
    """Anything that turns a view into a batch.

    Optional attributes: ``admission`` (one of ADMISSIONS), ``clairvoyant`` (needs ``length_hint``), ``decision_s``
    (seconds one decision costs, added to every step), ``reset(seed)`` (called before each run).
    """

    def schedule(self, view: View) -> Batch:
        """The next batch, from what `view` shows of the engine."""
        ...


def default_knobs() -> np.ndarray:
    """Settings that pack like Sarathi-Serve with a token budget of 512; shape ()."""
    knobs = np.zeros((), KNOBS)
    knobs["token_budget"] = 512
    knobs["limit"] = np.iinfo(np.int32).max
    knobs["cap"] = knobs["offset"] = knobs["offset_full"] = math.inf
    knobs["usage_switch"] = math.inf
    knobs["margin"] = math.nan
    return knobs


def settings_of(knobs: Any) -> dict[str, Any]:
    """A KNOBS record as numbers by name, without what one scheduler alone knows."""
    return {name: knobs[name].item() for name in KNOBS.names or () if name != "own"}


def pack_with_knobs(lane: Any) -> None:
    """Form a batch as the packing kernel does under the settings of the lane."""
    pack(lane)


@cache
def _compile(function: Callable) -> Any:
    return kernel(SCHEDULE_SIGNATURE)(function)


@dataclass(frozen=True)
class Own:
    """A parameter of one scheduler alone, whose kernel reads it as ``lane.knobs.own[its place among them]``."""

    name: str  # in brackets
    default: float
    read: Callable[[str], float]  # its text; ValueError for what it cannot be
    expected: str  # what it can be, for the error


@dataclass(frozen=True)
class Compiled:
    """A compiled scheduler: a function on a lane, its settings and what it asks of the engine."""

    what: str  # one line for `llmsched policies`, with the source
    function: Callable = pack_with_knobs
    settings: Mapping[str, Any] = field(default_factory=dict)
    admission: str = "prompt"
    clairvoyant: bool = False
    decision_s: float = 0.0
    name: str = ""
    options: tuple[str, ...] = ()  # bracket parameters beyond those that all compiled schedulers honour
    own: tuple[Own, ...] = ()  # and those that it alone has, at most records.OWN_KNOBS
    orders: tuple[str, ...] = ORDERS  # what its `order` may be
    plan: Callable | None = None  # entry (handle, env) that sets the knobs of the batch to come, if they change
    refuses: bool = False  # whether refusing requests is all that it is about: it needs allow_refusal

    def __reduce__(self) -> tuple[Any, ...]:
        return reduced(self, make_scheduler)

    def __deepcopy__(self, memo: Any) -> Compiled:
        return self

    @cached_property
    def kernel(self) -> Any:
        """The function, compiled for numba's cache to find in the next process."""
        return _compile(self.function)

    @cached_property
    def knobs(self) -> np.ndarray:
        """Settings as one KNOBS record; shape ()."""
        knobs, own = default_knobs(), {parameter.name: parameter.default for parameter in self.own}
        for name, value in self.settings.items():
            if name in own:
                own[name] = value
            else:
                knobs[name] = value
        knobs["own"][: len(own)] = list(own.values())
        if "offset" in self.settings and "offset_full" not in self.settings:
            knobs["offset_full"] = knobs["offset"]
        return knobs

    def install(self, state: State, env: int) -> None:
        """Write the settings into the engine; call it after the engine's reset.

        Raises :class:`PolicyError` where it `refuses` requests and the engine does not allow it.
        """
        if self.refuses and not state.sims[env].allow_refusal:
            raise PolicyError(f"policy {self.name!r}: refuses requests, expected allow_refusal=True, got False")
        knobs = self.knobs.copy()
        place = BY_DEVICE.get(int(knobs["token_budget"]))
        if place is not None:
            knobs["token_budget"] = state.own_coef_s[state.sims[env].profile, place]
        state.knobs[env] = knobs


def install(scheduler: Any, state: State, env: int = 0, seed: int = 0) -> None:
    """Make environment `env` ready for `scheduler`: settings, an empty memory, decision time, its own reset.

    In the middle of an episode what another scheduler has noted of requests that wait or run is forgotten, too.
    """
    if isinstance(scheduler, Compiled):
        scheduler.install(state, env)
    else:
        state.knobs[env] = default_knobs()
    state.memory[env, :OWN_MEMORY] = 0.0
    sim, notes = state.sims[env], state.requests[env_of(state, env)]["lst_s"]
    notes[state.waiting[env, : sim.num_waiting]] = math.nan
    notes[state.running[env, : sim.num_running]] = math.nan
    if hasattr(scheduler, "reset"):
        scheduler.reset(seed)
    state.sims[env].decision_s = getattr(scheduler, "decision_s", 0.0)


def boolean(text: str) -> int:
    """1 for "true", "yes" or "1", 0 for their opposites, in any case of letters; KeyError otherwise."""
    values = {"true": 1, "yes": 1, "1": 1, "false": 0, "no": 0, "0": 0}
    return values[text.lower()]


def _level(text: str, names: tuple[str, ...]) -> int:
    """Index of a name; the first two may be said as booleans are."""
    return names.index(text.lower()) if text.lower() in names else boolean(text)


def positive_int(text: str) -> int:
    """A whole number from 1 to what an int32 holds; ValueError otherwise."""
    value = float(text)  # 512.0 is a whole number too
    if not value.is_integer() or not 1 <= value <= np.iinfo(np.int32).max:
        raise ValueError
    return int(value)


def not_negative_int(text: str) -> int:
    """0 or a :func:`positive_int`; ValueError otherwise."""
    return 0 if text == "0" else positive_int(text)


def positive(text: str) -> float:
    """A number > 0, inf too; ValueError otherwise."""
    value = float(text)
    if math.isnan(value) or value <= 0:
        raise ValueError
    return value


def not_negative(text: str) -> float:
    """A number >= 0, inf too; ValueError otherwise."""
    value = float(text)
    if math.isnan(value) or value < 0:
        raise ValueError
    return value


def share(text: str) -> float:
    """A number from 0 to 1; ValueError otherwise."""
    value = not_negative(text)
    if value > 1.0:
        raise ValueError
    return value


# bracket parameter: (knob, reader, what is expected)
OPTIONS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "budget": ("token_budget", positive_int, "whole number of tokens >= 1"),
    "hold": ("hold", lambda text: _level(text, HOLDS), "true, false or always"),
    "limit": ("limit", positive_int, "whole number of tokens >= 1"),
    "cap": ("cap", positive, "share of the smallest TBT SLO, > 0"),
    "refuse": ("refuse", boolean, "true or false"),
    "order": ("order", lambda text: ORDERS.index(text), f"one of {', '.join(ORDERS)}"),
    "offset": ("offset", not_negative, "mean batches >= 0, inf for no deferral"),
    "offset_full": ("offset_full", not_negative, "mean batches >= 0"),
    "usage_switch": ("usage_switch", not_negative, "KV use from which offset_full applies"),
    "margin": ("margin", not_negative, "capped batches >= 0"),
    "victim": ("victim", lambda text: VICTIMS.index(text), f"one of {', '.join(VICTIMS)}"),
    "evict": ("evict", lambda text: EVICTIONS.index(text), f"one of {', '.join(EVICTIONS)}"),
    "chunk": ("token_budget", positive_int, "whole number of tokens >= 1"),
}
# bracket parameter: (reader of the admission rule, what is expected)
ADMISSION_OPTIONS: dict[str, tuple[Callable[[str], str], str]] = {
    "admission": (lambda text: ADMISSIONS[ADMISSIONS.index(text)], f"one of {', '.join(ADMISSIONS)}"),
    "reserve": (lambda text: "prompt-check" if boolean(text) else "chunk", "true or false"),
}
COMMON_OPTIONS = (
    "budget",
    "hold",
    "limit",
    "cap",
    "victim",
    "evict",
    "admission",
)  # what all compiled schedulers honour
PACK_OPTIONS = tuple(name for name in (*OPTIONS, "admission") if name != "chunk")


def reduced(made: Any, make: Callable[[str], Any]) -> tuple[Any, ...]:
    """How a dataclass pickles itself: by its name if `make` makes it of that, else by its fields.

    What is compiled of it is made anew where it is read.
    """
    try:
        if make(made.name) == made:
            return make, (made.name,)
    except PolicyError:
        pass
    return type(made), tuple(getattr(made, field.name) for field in fields(made))


def with_options(spec: str, entry: Compiled, options: Mapping[str, str]) -> Compiled:
    """The scheduler with its parameters in brackets applied, under the name `spec`."""
    settings, admission, decision_s = dict(entry.settings), entry.admission, entry.decision_s
    own = {parameter.name: parameter for parameter in entry.own}
    known = PACK_OPTIONS if entry.function is pack_with_knobs else (*COMMON_OPTIONS, *entry.options, *own)
    known = tuple(dict.fromkeys(known))  # one of its own may stand for a common one
    for key, text in options.items():
        if key not in known:
            raise PolicyError(f"policy {spec!r}: unknown parameter {key!r}, expected one of {', '.join(known)}")
        if key == "order":
            expected = f"one of {', '.join(entry.orders)}"
        elif key in own:
            expected = own[key].expected
        else:
            expected = ADMISSION_OPTIONS[key][1] if key in ADMISSION_OPTIONS else OPTIONS[key][2]
        try:
            if key == "order":
                settings["order"] = entry.orders.index(text)
            elif key in own:
                settings[key] = own[key].read(text)
            elif key in ADMISSION_OPTIONS:
                admission = ADMISSION_OPTIONS[key][0](text)
            else:
                settings[OPTIONS[key][0]] = OPTIONS[key][1](text)
        except (ValueError, KeyError):
            raise PolicyError(f"policy {spec!r}: {key}: expected {expected}, got {text!r}") from None
    return replace(entry, name=spec, settings=settings, admission=admission, decision_s=decision_s)


def make_scheduler(spec: str) -> Any:
    """:func:`llmsched_gym.registry.make_scheduler`, which is looked up when called."""
    return importlib.import_module("llmsched_gym.registry").make_scheduler(spec)


def registry() -> dict[str, Any]:
    """:func:`llmsched_gym.registry.registry`, which is looked up when called."""
    found: dict[str, Any] = importlib.import_module("llmsched_gym.registry").registry()
    return found
