"""The knobs action: seven (with refusal eight) settings of the packing kernel, each from a short list."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine.jit import kernel
from llmsched_gym.engine.pack import ORDERS
from llmsched_gym.engine.step import LATEST_ARRIVAL, LATEST_LST

NO_LIMIT = np.iinfo(np.int32).max


class Knob(NamedTuple):
    """One dimension of the action."""

    name: str
    values: tuple[float, ...]
    what: str  # meaning and unit

    def label(self, index: int) -> str:
        """The value as a person would write it."""
        value = self.values[index]
        if self.name == "order":
            return ORDERS[int(value)]
        if self.name in ("hold", "refuse"):
            return ("no", "yes", "always")[int(value)]
        if math.isinf(value) or value == NO_LIMIT:
            return "none"
        return f"{value:g}"


KNOBS = (
    Knob("token_budget", (512, 128, 256, 384, 768, 1024, 2048, 8192), "tokens in a batch"),
    Knob(
        "cap",
        (math.inf, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5),
        "cap on the predicted batch time, as a share of the smallest TBT SLO among running decodes",
    ),
    Knob(
        "offset",
        (math.inf, 0, 1, 2, 3, 5, 7, 10, 15),
        "decodes wait until so many mean batches before their deadline (SLAI); none: every decode in every batch",
    ),
    Knob(
        "margin",
        (math.nan, 1, 1.5, 2, 3),
        "instead of the offset: decodes wait until so many capped batches before their deadline (with no cap: never)",
    ),
    Knob("order", tuple(range(len(ORDERS))), "order of prompts"),
    Knob(
        "hold",
        (0, 1, 2),
        "hold back prompts that can no longer make their TTFT SLO while feasible ones exist (yes), or decodes (always)",
    ),
    Knob(
        "limit",
        (NO_LIMIT, 6500, 5500, 4500, 3500, 2500, 1500, 1000, 500),
        "largest prompt admitted while other prompts wait, tokens",
    ),
    Knob("refuse", (0, 1), "refuse waiting prompts that can no longer make their TTFT SLO"),
)
TOKEN_BUDGET, CAP, OFFSET, MARGIN, ORDER, HOLD, LIMIT, REFUSE = range(len(KNOBS))
_COUNTS = np.array([len(k.values) for k in KNOBS])


def knobs_for(config: EnvConfig) -> tuple[Knob, ...]:
    """The knobs of an environment: refusal only where it is allowed."""
    return KNOBS if config.allow_refusal else KNOBS[:REFUSE]


def knob_values() -> np.ndarray:
    """All values as one table, float64 of shape (num_knobs, most values); rows are padded with their first value."""
    width = max(len(k.values) for k in KNOBS)
    return np.array([[*k.values, *[k.values[0]] * (width - len(k.values))] for k in KNOBS], np.float64)


@kernel()
def has_these_values(action):
    """Whether every entry of a knobs action is the index of a value."""
    legal = True
    for k in range(action.shape[0]):
        legal &= 0 <= action[k] < _COUNTS[k]
    return legal


@kernel()
def clip(action):
    """Replace each index outside its range by the nearest inside: for entries that nobody else has checked."""
    for k in range(action.shape[0]):
        action[k] = max(0, min(action[k], _COUNTS[k] - 1))


@kernel()
def set_knobs(knobs, action, values):
    """Write a knobs action (index per knob) into the settings of the packing kernel.

    The victim rule follows from the offset: who defers decodes evicts the least urgent, who does not the newest.
    """
    knobs.token_budget = int(values[TOKEN_BUDGET, action[TOKEN_BUDGET]])
    knobs.cap = values[CAP, action[CAP]]
    knobs.offset = values[OFFSET, action[OFFSET]]
    knobs.offset_full = knobs.offset
    knobs.usage_switch = math.inf
    knobs.margin = values[MARGIN, action[MARGIN]]
    knobs.order = int(values[ORDER, action[ORDER]])
    knobs.hold = int(values[HOLD, action[HOLD]])
    knobs.limit = int(values[LIMIT, action[LIMIT]])
    knobs.refuse = int(values[REFUSE, action[REFUSE]]) if action.shape[0] > REFUSE else 0
    defers = knobs.offset < math.inf or not math.isnan(knobs.margin)
    knobs.victim = LATEST_LST if defers else LATEST_ARRIVAL


def knobs_action(settings: Any, kv_cache_usage: float, config: EnvConfig) -> np.ndarray:
    """The knobs action that packs like a scheduler's settings (a KNOBS record) do now; int64 of shape (num_knobs,).

    The dynamic offset is a function of the KV use of the last batch. Raises ValueError where no knob has the value.
    """
    offset = settings["offset"] if kv_cache_usage < settings["usage_switch"] else settings["offset_full"]
    wanted = {name: float(settings[name]) for name in ("token_budget", "cap", "margin", "order", "hold", "limit")}
    wanted |= {"offset": float(offset), "refuse": float(settings["refuse"])}
    action = []
    for knob in knobs_for(config):
        value = wanted[knob.name]
        if knob.name == "limit" and value >= config.max_model_len:
            value = NO_LIMIT
        matches = [i for i, v in enumerate(knob.values) if v == value or (math.isnan(v) and math.isnan(value))]
        if not matches:
            raise ValueError(f"no setting of the knob {knob.name!r} is {value:g}")
        action.append(matches[0])
    return np.array(action, np.int64)
