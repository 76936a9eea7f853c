"""The request action: add the request of one slot to the batch being formed, or close the batch."""

from __future__ import annotations

import math

import numpy as np
from gymnasium import spaces

from llmsched_gym.config import EnvConfig
from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.state import lane_of
from llmsched_gym.env.actions.action import Action
from llmsched_gym.env.actions.by_slot import add_hidden_decodes, add_slot, can_add
from llmsched_gym.env.kernels import CLOSED, decide_one, reopen_env, step_all, use_budget
from llmsched_gym.env.slots import NUM_SLOTS, num_visible

SLOT = CLOSED + 1  # place of the action in the lane's memory
CLOSE = NUM_SLOTS


def space(config: EnvConfig) -> spaces.Discrete:
    """The slots, and a last number that closes the batch."""
    return spaces.Discrete(NUM_SLOTS + 1)


def expected(config: EnvConfig, place: tuple[int, ...]) -> str:
    """What an action should be, for errors."""
    return f"expected a slot, 0 to {NUM_SLOTS - 1}, or {CLOSE} to close the batch"


def of_scores(scores: np.ndarray, mask: np.ndarray) -> int:
    """The action of a network's scores, (NUM_SLOTS + 1,): the best of the legal ones."""
    return int(np.where(mask, scores, -math.inf).argmax())


def docs() -> str:
    """The section on these actions of the environment's page, Markdown."""
    return """A batch holds at most `token_budget` tokens; running decodes beyond the visible slots are added last. A
prompt gets what is left of the budget, rounded down to a tile of the cost profile unless that finishes it. Adding takes
no time and pays nothing; closing runs the batch. A slot that cannot be added closes the batch too: `action_masks()`
says beforehand which can."""


@kernel()
def legal(a, env):
    """Whether the action is a slot or closes the batch; it need not fit."""
    return 0 <= a.choices[env, 0] <= CLOSE


@kernel()
def put(lane, a, env):
    """Write the action of environment `env`, closing if it is none, into the lane's memory; set the token budget."""
    use_budget(lane, a.rules[0])
    lane.memory[SLOT] = a.choices[env, 0] if legal(a, env) else CLOSE


@kernel()
def by_request(lane):
    """Add the request of a slot to the batch being formed, or close it.

    A slot that cannot be added closes the batch: the mask of legal actions says so beforehand.
    """
    slot, tile = int(lane.memory[SLOT]), max(1, int(lane.coef_s[2]))
    if 0 <= slot < num_visible(lane) and add_slot(lane, slot, tile):
        lane.memory[CLOSED] = 0.0
        return
    add_hidden_decodes(lane)
    lane.memory[CLOSED] = 1.0


@kernel()
def _step(s, a, first, stop):
    return step_all(s, a, first, stop, legal, put, by_request, True)


@entry(nogil=True)
def step(s, a, first, stop):
    """One decision of environments first, ..., stop - 1, see :func:`~llmsched_gym.env.kernels.step_all`."""
    return _step(unpack(s), unpack(a), first, stop)


@entry()
def decide(s, a, env):
    """Add the request of environment `env`'s slot, or close its batch; returns whether it is closed."""
    return decide_one(unpack(s), unpack(a), env, put, by_request, True)


@entry()
def mask(s, masks):
    """Legal request actions; `masks` (num_envs, NUM_SLOTS + 1) bool. Closing is always legal."""
    state = unpack(s)
    for env in range(masks.shape[0]):
        lane = lane_of(state, env)
        tile = max(1, int(lane.coef_s[2]))
        visible = num_visible(lane)
        for slot in range(NUM_SLOTS):
            masks[env, slot] = slot < visible and can_add(lane, slot, tile)
        masks[env, CLOSE] = True


ACTION = Action(
    name="request",
    what=f"add the request of slot 0 to {NUM_SLOTS - 1} to the batch, or {CLOSE}: close it",
    docs=docs,
    space=space,
    expected=expected,
    touches=("knobs", "memory"),
    legal=legal,
    put=put,
    step=step,
    decide=decide,
    reopen=reopen_env,
    mask=mask,
    scores=(NUM_SLOTS, 1),
    of_scores=of_scores,
)
