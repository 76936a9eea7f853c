"""The priority action: one score per visible slot; requests are packed greedily from the highest score."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine.batch import open_batch
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.run import run_lane
from llmsched_gym.engine.state import OWN_MEMORY, lane_of
from llmsched_gym.env.actions.action import Action
from llmsched_gym.env.actions.by_slot import add_hidden_decodes, add_slot
from llmsched_gym.env.kernels import decide_one, step_all, use_budget
from llmsched_gym.env.slots import NUM_SLOTS, num_visible


def space(config: EnvConfig) -> spaces.Box:
    """A score from -1 to 1 for each visible slot, float32 (NUM_SLOTS,)."""
    return spaces.Box(-1.0, 1.0, (NUM_SLOTS,), np.float32)


def expected(config: EnvConfig, place: tuple[int, ...]) -> str:
    """What the entry at `place` should be, for errors."""
    return f"slot {place[0]}: expected a score from -1 to 1"


def of_scores(scores: np.ndarray, mask: Any) -> np.ndarray:
    """The action of a network's scores, (NUM_SLOTS,)."""
    return np.clip(scores, -1.0, 1.0)


def docs() -> str:
    """The section on scores of the environment's page, Markdown."""
    return """A batch holds at most `token_budget` tokens; running decodes beyond the visible slots are added last. A
request with a score below 0 is left out, ties go by slot, and a prompt gets what is left of the budget. Every score is
legal: there is no mask."""


@kernel()
def legal(a, env):
    """Whether every score is within -1 and 1; nan is not."""
    legal = True
    for slot in range(NUM_SLOTS):
        legal &= -1.0 <= a.scores[env, slot] <= 1.0
    return legal


@kernel()
def put(lane, a, env):
    """Write the scores of environment `env` into the lane's memory, and set the token budget without a cap."""
    use_budget(lane, a.rules[0])
    for slot in range(NUM_SLOTS):
        lane.memory[OWN_MEMORY + slot] = a.scores[env, slot]


@kernel()
def pack_by_score(lane, scores, order):
    """Pack visible requests greedily by score, the highest first; those with a score below 0 are left out.

    Running decodes beyond the visible slots come last, so that nobody is out of the agent's and the packer's sight.
    """
    open_batch(lane)
    visible = num_visible(lane)
    for slot in range(visible):  # insertion sort of slots by score, ties by slot
        j = slot - 1
        while j >= 0 and scores[order[j]] < scores[slot]:
            order[j + 1] = order[j]
            j -= 1
        order[j + 1] = slot
    for i in range(visible):
        slot = order[i]
        if not scores[slot] >= 0.0:
            break
        add_slot(lane, slot, 1)
    add_hidden_decodes(lane)


@kernel()
def by_score(lane):
    """Form the batch by one score per slot."""
    pack_by_score(lane, lane.memory[OWN_MEMORY:], lane.scratch)


@kernel()
def _step(s, a, first, stop):
    return step_all(s, a, first, stop, legal, put, by_score, False)


@entry(nogil=True)
def step(s, a, first, stop):
    """One decision of environments first, ..., stop - 1, see :func:`~llmsched_gym.env.kernels.step_all`."""
    return _step(unpack(s), unpack(a), first, stop)


@entry()
def decide(s, a, env):
    """Form the batch of environment `env` by its scores; True, as one action closes it."""
    return decide_one(unpack(s), unpack(a), env, put, by_score, False)


@kernel()
def _run(s, a, env, max_steps, max_idle_steps):
    put(lane_of(s, env), a, env)
    return run_lane(s, env, by_score, max_steps, max_idle_steps)


@entry()
def run(s, a, env, max_steps, max_idle_steps):
    """Batches of environment `env` under its one action; returns how many steps, see :func:`run_lane`."""
    return _run(unpack(s), unpack(a), env, max_steps, max_idle_steps)


ACTION = Action(
    name="priority",
    what=f"one score per visible slot, highest first; the {NUM_SLOTS} slots are those of the observation",
    docs=docs,
    space=space,
    expected=expected,
    touches=("knobs", "memory"),
    legal=legal,
    put=put,
    step=step,
    decide=decide,
    run=run,
    has_masks=False,
    scores=(NUM_SLOTS, 0),
    of_scores=of_scores,
)
