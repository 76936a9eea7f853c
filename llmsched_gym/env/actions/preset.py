"""The preset action: one of 32 named settings of the packing kernel, each a scheduler that a person would recognise.

For learners that take one discrete action, and for a fast start: the knobs have hundreds of thousands of combinations,
most of which serve nobody.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.pack import CLASS, EDF, FEASIBLE, HOLD_ALWAYS, LPM, SPF, SRPT, pack
from llmsched_gym.engine.run import run_lane
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.step import LATEST_LST
from llmsched_gym.env.actions.action import Action, Choice
from llmsched_gym.env.kernels import decide_one, step_all
from llmsched_gym.scheduler import default_knobs, settings_of
from llmsched_gym.text import table

_SPF: dict[str, float] = {"order": SPF}
_SLAI: dict[str, float] = {**_SPF, "offset": 5.0, "offset_full": 10.0, "usage_switch": 0.96, "victim": LATEST_LST}
_FIXED: dict[str, float] = {"offset": 10.0, "offset_full": 10.0, "victim": LATEST_LST}
_CAPPED: dict[str, float] = {"token_budget": 8192, "cap": 0.95, "margin": 2.0, "victim": LATEST_LST}
_TUNED: dict[str, float] = {"order": FEASIBLE, "hold": HOLD_ALWAYS, "cap": 0.7, "offset": 15.0, "offset_full": 15.0}

PRESETS: dict[str, dict[str, float]] = {
    "sarathi": {},
    "sarathi[budget=256]": {"token_budget": 256},
    "sarathi[budget=1024]": {"token_budget": 1024},
    "sarathi[budget=2048]": {"token_budget": 2048},
    "sarathi[order=edf]": {"order": EDF},
    "sarathi[order=class]": {"order": CLASS},
    "sarathi[order=lpm]": {"order": LPM},
    "sarathi-spf": _SPF,
    "sarathi-spf[budget=256]": {**_SPF, "token_budget": 256},
    "sarathi-spf[budget=1024]": {**_SPF, "token_budget": 1024},
    "sarathi-spf[budget=2048]": {**_SPF, "token_budget": 2048},
    "sarathi-spf[hold=true]": {**_SPF, "hold": 1},
    "sarathi-spf[budget=1024,hold=true]": {**_SPF, "token_budget": 1024, "hold": 1},
    "sarathi-spf[budget=8192,cap=0.7]": {**_SPF, "token_budget": 8192, "cap": 0.7},
    "slai": _SLAI,
    "slai-spf-fixed": {**_SPF, **_FIXED},
    "slai-fcfs-fixed": _FIXED,
    "slai-priority": {**_SLAI, "order": CLASS},
    "slai[budget=256]": {**_SLAI, "token_budget": 256},
    "slai[budget=1024]": {**_SLAI, "token_budget": 1024},
    "slai[order=edf]": {**_SLAI, "order": EDF},
    "slai[order=feasible]": {**_SLAI, "order": FEASIBLE},
    "slai[hold=true]": {**_SLAI, "hold": 1},
    "slai[hold=always]": {**_SLAI, "hold": HOLD_ALWAYS},
    "slai[order=feasible,hold=always]": {**_SLAI, "order": FEASIBLE, "hold": HOLD_ALWAYS},
    "slai[budget=1024,hold=always]": {**_SLAI, "token_budget": 1024, "hold": HOLD_ALWAYS},
    "srpt-capped": {**_CAPPED, "order": SRPT},
    "srpt-capped[cap=0.6]": {**_CAPPED, "order": SRPT, "cap": 0.6},
    "feasible-first": {**_CAPPED, "order": FEASIBLE},
    "feasible-first[margin=3]": {**_CAPPED, "order": FEASIBLE, "margin": 3.0},
    "feasible-first[hold=always]": {**_CAPPED, "order": FEASIBLE, "hold": HOLD_ALWAYS},
    "tuned-constant": {**_TUNED, "victim": LATEST_LST},
}
"""What each sets, beside Sarathi-Serve's 512 tokens, by its name as ``llmsched evaluate --policy`` takes it.

Written out, for the kernel below is compiled with them.
"""
NUM_PRESETS = len(PRESETS)
_USUAL = settings_of(default_knobs())
_VALUES = np.array([[{**_USUAL, **preset}[name] for name in _USUAL] for preset in PRESETS.values()], np.float64)
_BUDGET, _ORDER, _VICTIM, _LIMIT, _EVICT, _HOLD, _REFUSE, _CAP, _OFFSET, _OFFSET_FULL, _USAGE_SWITCH, _MARGIN = (
    list(_USUAL).index(name)
    for name in (
        *("token_budget", "order", "victim", "limit", "evict", "hold", "refuse"),
        *("cap", "offset", "offset_full", "usage_switch", "margin"),
    )
)


@kernel()
def legal(a, env):
    """Whether the entry is the index of a preset."""
    return 0 <= a.choices[env, 0] < NUM_PRESETS


@kernel()
def put(lane, a, env):
    """Write the preset of environment `env` into the lane's knobs."""
    preset = max(0, min(a.choices[env, 0], NUM_PRESETS - 1))  # policies' entries have been checked by nobody else
    knobs = lane.knobs
    knobs.token_budget = int(_VALUES[preset, _BUDGET])
    knobs.order = int(_VALUES[preset, _ORDER])
    knobs.victim = int(_VALUES[preset, _VICTIM])
    knobs.limit = int(_VALUES[preset, _LIMIT])
    knobs.hold = int(_VALUES[preset, _HOLD])
    knobs.cap = _VALUES[preset, _CAP]
    knobs.offset = _VALUES[preset, _OFFSET]
    knobs.offset_full = _VALUES[preset, _OFFSET_FULL]
    knobs.usage_switch = _VALUES[preset, _USAGE_SWITCH]
    knobs.margin = _VALUES[preset, _MARGIN]
    knobs.refuse = int(_VALUES[preset, _REFUSE])
    knobs.evict = int(_VALUES[preset, _EVICT])


@kernel()
def _step(s, a, first, stop):
    return step_all(s, a, first, stop, legal, put, pack, False)


@entry(nogil=True)
def step(s, a, first, stop):
    """One decision of environments first, ..., stop - 1, see :func:`~llmsched_gym.env.kernels.step_all`."""
    return _step(unpack(s), unpack(a), first, stop)


@entry()
def decide(s, a, env):
    """Form the batch of environment `env` by its preset; True, as one action closes it."""
    return decide_one(unpack(s), unpack(a), env, put, pack, False)


@kernel()
def _run(s, a, env, max_steps, max_idle_steps):
    put(lane_of(s, env), a, env)
    return run_lane(s, env, pack, max_steps, max_idle_steps)


@entry()
def run(s, a, env, max_steps, max_idle_steps):
    """Batches of environment `env` under its one preset; returns how many steps, see :func:`run_lane`."""
    return _run(unpack(s), unpack(a), env, max_steps, max_idle_steps)


def preset_action(settings: Any) -> np.ndarray:
    """The preset that packs as a scheduler's settings (a KNOBS record) do; int64 of shape (). ValueError for none."""
    for index, preset in enumerate(PRESETS.values()):
        wanted = {**_USUAL, **preset}
        if all(np.array_equal(settings[name], value, equal_nan=True) for name, value in wanted.items()):
            return np.array(index, np.int64)
    raise ValueError("no preset has its settings")


def space(config: EnvConfig) -> spaces.Discrete:
    """The index of a preset."""
    return spaces.Discrete(NUM_PRESETS)


def expected(config: EnvConfig, place: tuple[int, ...]) -> str:
    """What the action should be, for errors."""
    return f"expected a preset, 0 to {NUM_PRESETS - 1}"


def choices(config: EnvConfig) -> tuple[Choice, ...]:
    """The presets by their names."""
    return (Choice("preset", tuple(PRESETS)),)


def docs() -> str:
    """The section on presets of the environment's page, Markdown."""
    half = NUM_PRESETS // 2
    names = list(PRESETS)
    rows = [[str(i), f"`{names[i]}`", str(i + half), f"`{names[i + half]}`"] for i in range(half)]
    return f"""Each is a scheduler, by its name as `llmsched evaluate --policy` takes it, which forms the batches.
[agents_scratch.md](agents_scratch.md#presets) has what each is worth when it is held throughout. Without prefix
caching 6 is 0.

{table(["#", "preset", "#", "preset"], rows, 0)}"""


ACTION = Action(
    name="preset",
    what="one of the schedulers below",
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
    adapt=lambda action, theirs, ours: action,
)
