"""The knobs action: seven settings of the packing kernel, one of refusal, one of eviction, each from a short list."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine.eviction import EVICTIONS, LRU
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.pack import FCFS, LPM, ORDERS, pack
from llmsched_gym.engine.run import run_lane
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.step import LATEST_ARRIVAL, LATEST_LST
from llmsched_gym.env.actions.action import Action, Choice
from llmsched_gym.env.kernels import decide_one, step_all
from llmsched_gym.text import table

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
        if self.name == "evict":
            return EVICTIONS[int(value)]
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
    Knob("order", tuple(range(LPM)), "order of prompts"),
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
WITH_CACHING = (
    *(k._replace(values=tuple(range(len(ORDERS)))) if k.name == "order" else k for k in KNOBS),
    Knob("evict", tuple(range(len(EVICTIONS))), "which cached blocks that nobody uses go first"),
)
"""The knobs with prefix caching: prompts can go by what of them is cached, too, and eviction has a rule, the last."""
_COUNTS = np.array([len(k.values) for k in WITH_CACHING])  # refusal, which may be missing, has as many as eviction


def knobs_for(config: EnvConfig) -> tuple[Knob, ...]:
    """The knobs of an environment: refusal only where allowed, order `lpm` and eviction only with prefix caching."""
    knobs = WITH_CACHING if config.prefix_caching else KNOBS
    return tuple(knob for knob in knobs if knob.name != "refuse" or config.allow_refusal)


def knob_values() -> np.ndarray:
    """All values as one table, float64 of shape (num_knobs, most values); rows are padded with their first value."""
    width = max(len(k.values) for k in WITH_CACHING)
    return np.array([[*k.values, *[k.values[0]] * (width - len(k.values))] for k in WITH_CACHING], np.float64)


_VALUES = knob_values()


@kernel()
def legal(a, env):
    """Whether every entry is the index of a value."""
    action = a.choices[env]
    legal = True
    for k in range(action.shape[0]):
        legal &= 0 <= action[k] < _COUNTS[k]
    return legal and (a.rules[0].prefix_caching or action[ORDER] != LPM)


@kernel()
def clip(action):
    """Replace each index outside its range by the nearest inside: for entries that nobody else has checked."""
    for k in range(action.shape[0]):
        action[k] = max(0, min(action[k], _COUNTS[k] - 1))


@kernel()
def set_knobs(knobs, action, prefix_caching):
    """Write a knobs action (index per knob, see :func:`knobs_for`) into the settings of the packing kernel.

    The victim rule follows from the offset: who defers decodes evicts the least urgent, who does not the newest.
    """
    knobs.token_budget = int(_VALUES[TOKEN_BUDGET, action[TOKEN_BUDGET]])
    knobs.cap = _VALUES[CAP, action[CAP]]
    knobs.offset = _VALUES[OFFSET, action[OFFSET]]
    knobs.offset_full = knobs.offset
    knobs.usage_switch = math.inf
    knobs.margin = _VALUES[MARGIN, action[MARGIN]]
    knobs.order = int(_VALUES[ORDER, action[ORDER]])
    knobs.hold = int(_VALUES[HOLD, action[HOLD]])
    knobs.limit = int(_VALUES[LIMIT, action[LIMIT]])
    num_others = action.shape[0] - 1 if prefix_caching else action.shape[0]
    knobs.refuse = int(_VALUES[REFUSE, action[REFUSE]]) if num_others > REFUSE else 0
    knobs.evict = action[num_others] if prefix_caching else LRU
    defers = knobs.offset < math.inf or not math.isnan(knobs.margin)
    knobs.victim = LATEST_LST if defers else LATEST_ARRIVAL


@kernel()
def put(lane, a, env):
    """Write the action of environment `env` into the lane's knobs."""
    set_knobs(lane.knobs, a.choices[env], a.rules[0].prefix_caching)


@kernel()
def put_clipped(lane, a, env):
    """:func:`put` for an action that nobody else has checked."""
    clip(a.choices[env])
    put(lane, a, env)


@kernel()
def _step(s, a, first, stop):
    return step_all(s, a, first, stop, legal, put, pack, False)


@entry(nogil=True)
def step(s, a, first, stop):
    """One decision of environments first, ..., stop - 1, see :func:`~llmsched_gym.env.kernels.step_all`."""
    return _step(unpack(s), unpack(a), first, stop)


@entry()
def decide(s, a, env):
    """Form the batch of environment `env` by its action; True, as one action closes it."""
    return decide_one(unpack(s), unpack(a), env, put_clipped, pack, False)


@kernel()
def _run(s, a, env, max_steps, max_idle_steps):
    put_clipped(lane_of(s, env), a, env)
    return run_lane(s, env, pack, max_steps, max_idle_steps)


@entry()
def run(s, a, env, max_steps, max_idle_steps):
    """Batches of environment `env` under its one action; returns how many steps, see :func:`run_lane`."""
    return _run(unpack(s), unpack(a), env, max_steps, max_idle_steps)


def knobs_action(settings: Any, kv_cache_usage: float, config: EnvConfig) -> np.ndarray:
    """The knobs action that packs like a scheduler's settings (a KNOBS record) do now; int64 of shape (num_knobs,).

    The dynamic offset is a function of the KV use of the last batch. Raises ValueError where no knob has the value.
    """
    offset = settings["offset"] if kv_cache_usage < settings["usage_switch"] else settings["offset_full"]
    wanted = {
        name: float(settings[name]) for name in ("token_budget", "cap", "margin", "order", "hold", "limit", "evict")
    }
    wanted |= {"offset": float(offset), "refuse": float(settings["refuse"])}
    action = []
    for knob in knobs_for(config):
        value = wanted[knob.name]
        if knob.name == "order" and value == LPM and not config.prefix_caching:
            value = FCFS  # which it is there
        if knob.name == "limit" and value >= config.max_model_len:
            value = NO_LIMIT
        matches = [i for i, v in enumerate(knob.values) if v == value or (math.isnan(v) and math.isnan(value))]
        if not matches:
            raise ValueError(f"no setting of the knob {knob.name!r} is {value:g}")
        action.append(matches[0])
    return np.array(action, np.int64)


def space(config: EnvConfig) -> spaces.MultiDiscrete:
    """An index of a value for each knob, (num_knobs,)."""
    return spaces.MultiDiscrete([len(knob.values) for knob in knobs_for(config)])


def expected(config: EnvConfig, place: tuple[int, ...]) -> str:
    """What the entry at `place` should be, for errors."""
    knob = knobs_for(config)[place[0]]
    return f"{knob.name}: expected the index of a value, 0 to {len(knob.values) - 1}"


def choices(config: EnvConfig) -> tuple[Choice, ...]:
    """Each knob with its values' labels."""
    return tuple(Choice(k.name, tuple(k.label(i) for i in range(len(k.values)))) for k in knobs_for(config))


def adapt(action: np.ndarray, theirs: EnvConfig, ours: EnvConfig) -> np.ndarray:
    """The action with the knobs that `ours` has, those that `theirs` lacks off; ValueError if it refuses and cannot.

    Order `lpm` becomes what it is without prefix caching, where `ours` has none.
    """
    given = {knob.name: int(index) for knob, index in zip(knobs_for(theirs), action, strict=True)}
    if given["order"] == LPM and not ours.prefix_caching:
        given["order"] = FCFS
    if given.get("refuse", 0) and not ours.allow_refusal:
        raise ValueError("it refuses requests, and the environment has allow_refusal=False")
    return np.array([given.get(knob.name, 0) for knob in knobs_for(ours)], np.int64)


def docs() -> str:
    """The section on knobs of the environment's page, Markdown."""
    rows = []
    for i, knob in enumerate(WITH_CACHING):
        values = ", ".join(f"{k}: {knob.label(k).replace('nan', 'off')}" for k in range(len(knob.values)))
        rows.append([str(i), f"`{knob.name}`", knob.what, values])
    return f"""Every combination is legal, so the mask is all true. All zeros is Sarathi-Serve; `order` = spf with
`offset` = 5 (10 while KV use is at least 96 %) is SLAI, whose offset reads `kv_cache_usage_last_batch`. The offset set
in step t + 1 keys the tokens emitted in batch t, once.

{table(["#", "knob", "meaning", "index: value"], rows)}

`refuse` is there only with `allow_refusal=True`; the order `lpm` (longest cached prefix first) and `evict` only with
`prefix_caching=True`, and without `refuse`, `evict` is the eighth. `evict` = lru gives away the cached blocks that were
left longest ago, `evict` = session those of lost sessions and then those of whose session nothing was seen longest."""


ACTION = Action(
    name="knobs",
    what="one setting of each knob below",
    docs=docs,
    space=space,
    expected=expected,
    touches=("knobs",),
    legal=legal,
    put=put,
    step=step,
    decide=decide,
    run=run,
    has_budget=False,
    choices=choices,
    adapt=adapt,
)
