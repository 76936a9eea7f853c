"""Rollouts in compiled code: forward passes, sampling, steps of the environment and advantages, without Python between.

An environment's part of a rollout depends on its own state, its own random numbers and the networks alone: rows are
multiplied one by one, never as a batch. So it is the same bit for bit, whoever computes the others.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import JIT_ENABLED, entry, kernel
from llmsched_gym.engine.state import HANDLE_TYPE, lane_of
from llmsched_gym.env.actions.by_slot import can_add
from llmsched_gym.env.actions.request import CLOSE
from llmsched_gym.env.arrays import ARRAYS_HANDLE_TYPE, DISCOUNT, DURATION_S, PAUSED, REWARD, TERMINATED, TRUNCATED
from llmsched_gym.env.slots import NUM_SLOTS, num_visible
from llmsched_gym.policies.network import TANH, Network
from llmsched_gym.workload import NOISE_BLOCK

KINDS = ("knobs", "preset", "request")  # of actions: those of choices, not of scores
_TANH_END = np.array([-7.90531110763549805, 7.90531110763549805], np.float32)
_TANH_TOP = np.array(
    [
        *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
        *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
    ],
    np.float32,
)
_TANH_BOTTOM = np.array(
    [1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03], np.float32
)
BLOCK = 16  # environments that step together: their records stay in the processor's own cache


class Rollout(NamedTuple):
    """Decisions of all environments side by side, each with what is needed to learn from it."""

    features: Any  # (num_envs, n_steps, number of features) float32, what was seen
    masks: Any  # (num_envs, n_steps, number of scores) bool, what was legal; no scores where all always is
    actions: Any  # (num_envs, n_steps, entries of an action) int64
    log_probs: Any  # (num_envs, n_steps) float32, of the actions
    values: Any  # (num_envs, n_steps + 1) float32; the last of the observation after the rollout
    rewards: Any  # (num_envs, n_steps) float32; at a truncation with the discounted value of what was seen last
    discounts: Any  # (num_envs, n_steps) float32, exp(-duration / tau)
    ended: Any  # (num_envs, n_steps) bool, whether the step was its episode's last
    paid: Any  # (num_envs, n_steps) float32, the rewards as the environment paid them
    last_values: Any  # (num_envs, n_steps) float32, at a truncation the value of what was seen last, else 0
    clocks: Any  # (num_envs, n_steps) float64, seconds of the episode before the step
    durations: Any  # (num_envs, n_steps) float64, seconds that it took
    advantages: Any  # (num_envs, n_steps) float32
    baselines: Any  # (num_envs, n_steps) float32, what the actor's advantages are less, see agents.advantages
    uniforms: Any  # (num_envs, n_steps, entries of an action) float32, the random numbers that actions are drawn with
    widths: Any  # (entries of an action,) int64, scores of each entry
    at: Any  # (num_envs,) int64, steps that are done
    waits: Any  # (num_envs,) bool, for Python: for an episode or for noise
    returns: Any  # (num_envs,) float64, sum of the rewards of the episode under way


def _arrays(dtypes: dict[str, tuple[Any, int]], of: Any) -> Any:
    """Numba's type of a named tuple of arrays, from the dtype and the number of axes of each."""
    return types.NamedTuple([types.Array(*dtypes[name], "C") for name in of._fields], of)


_WHOLE, _SINGLE = types.int64, types.float32
ROLLOUT_TYPE = _arrays(
    {
        **{name: (_SINGLE, 2) for name in ("log_probs", "values", "rewards", "discounts", "advantages")},
        **{name: (_SINGLE, 2) for name in ("paid", "last_values", "baselines")},
        **{name: (types.float64, 2) for name in ("clocks", "durations")},
        **{name: (_SINGLE, 3) for name in ("features", "uniforms")},
        **{name: (_WHOLE, 1) for name in ("widths", "at")},
        "masks": (types.boolean, 3),
        "actions": (_WHOLE, 3),
        "ended": (types.boolean, 2),
        "waits": (types.boolean, 1),
        "returns": (types.float64, 1),
    },
    Rollout,
)
NETWORK_TYPE = _arrays(
    {
        **{name: (_WHOLE, 1) for name in ("columns", "sizes", "activation", "widths", "counts")},
        "values": (_WHOLE, 2),
        "parameters": (_SINGLE, 1),
        "layers": (_SINGLE, 2),
    },
    Network,
)


@kernel()
def draw(scores, mask, widths, uniforms, action):
    """Draw each entry of `action` from the softmax of its legal scores; returns the log-probability of all together.

    `scores` are used up. An empty `mask` is one in which all is legal.
    """
    log_prob, first = 0.0, 0
    for k in range(widths.shape[0]):
        stop, top, total = first + widths[k], -math.inf, 0.0
        for i in range(first, stop):
            if mask.shape[0] == 0 or mask[i]:
                top = max(top, scores[i])
        for i in range(first, stop):
            weight = math.exp(scores[i] - top) if mask.shape[0] == 0 or mask[i] else 0.0
            scores[i] = weight
            total += weight
        left, chosen = uniforms[k] * total, first
        for i in range(first, stop):
            if scores[i] > 0.0:
                chosen = i
                left -= scores[i]
                if left < 0.0:
                    break
        action[k] = chosen - first
        log_prob += math.log(scores[chosen] / total)
        first = stop
    return log_prob


@kernel()
def tanh(x):
    """The hyperbolic tangent within 4e-7, of which the processor makes several at once; float32.

    A quotient of polynomials, as in Eigen (Core/MathFunctionsImpl.h): beyond 7.9 it is 1 as far as float32 can tell.
    """
    x = min(max(x, _TANH_END[0]), _TANH_END[1])
    square, top, bottom = x * x, _TANH_TOP[0], _TANH_BOTTOM[0]
    for i in range(1, 7):
        top = top * square + _TANH_TOP[i]
    for i in range(1, 4):
        bottom = bottom * square + _TANH_BOTTOM[i]
    return x * top / bottom


@entry(nogil=True)
def tanh_of(numbers, found):
    """The hyperbolic tangents of `numbers`, both (n,) float32 and not the same array."""
    for i in range(numbers.shape[0]):
        found[i] = tanh(numbers[i])


@kernel()
def layer(parameters, at, inputs, n, m, outputs):
    """Multiply `n` inputs by the weights (n, m) at `at` and add the biases behind them; adds in the inputs' order."""
    bias, quads = at + n * m, n - n % 4
    for j in range(m):
        outputs[j] = parameters[bias + j]
    for i in range(0, quads, 4):  # four at a time, so that outputs are loaded and stored a quarter as often
        a, b, c, d, row = inputs[i], inputs[i + 1], inputs[i + 2], inputs[i + 3], at + i * m
        for j in range(m):
            outputs[j] = (
                outputs[j]
                + a * parameters[row + j]
                + b * parameters[row + m + j]
                + c * parameters[row + 2 * m + j]
                + d * parameters[row + 3 * m + j]
            )
    for i in range(quads, n):
        for j in range(m):
            outputs[j] += inputs[i] * parameters[at + i * m + j]


@kernel()
def compute(net, features):
    """A network's outputs for one observation, in a row of ``net.layers`` whose index is returned.

    What ``policies/network.py`` computes, within rounding, in half the time.
    """
    parameters, sizes = net.parameters, net.sizes
    n, of = sizes[0], 0
    inputs = net.layers[0]
    for i in range(n):
        inputs[i] = (features[i] - parameters[i]) * parameters[n + i]
    at = 2 * n
    for k in range(1, sizes.shape[0]):
        m, outputs = sizes[k], net.layers[1 - of]
        layer(parameters, at, net.layers[of], n, m, outputs)
        if k < sizes.shape[0] - 1:
            if net.activation[0] == TANH:
                for j in range(m):
                    outputs[j] = tanh(outputs[j])
            else:
                for j in range(m):
                    outputs[j] = max(outputs[j], np.float32(0.0))
        at, n, of = at + (n + 1) * m, m, 1 - of
    return of


@kernel()
def value_of(critic, features):
    """The critic's estimate for one observation."""
    return critic.layers[compute(critic, features), 0]


@kernel()
def learn_advantages(b, env, gae_lambda):
    """A = delta + discount lambda A', delta = r + discount V' - V, from the last step of a rollout to the first."""
    advantage = 0.0
    for i in range(b.rewards.shape[1]):
        t = b.rewards.shape[1] - 1 - i
        discount = 0.0 if b.ended[env, t] else b.discounts[env, t]
        delta = b.rewards[env, t] + discount * b.values[env, t + 1] - b.values[env, t]
        advantage = delta + discount * gae_lambda * advantage
        b.advantages[env, t] = advantage


@kernel()
def take(s, a, b, critic, env, gae_lambda, any_noise_due):
    """Write down what the step of environment `env` has brought."""
    outcome, t = a.outcomes[env], b.at[env]
    reward, last_value = outcome[REWARD], 0.0
    b.returns[env] += reward
    b.paid[env, t] = reward
    if outcome[TRUNCATED] > 0.0:
        last_value = value_of(critic, a.features[env])
        reward += outcome[DISCOUNT] * last_value
    b.last_values[env, t] = last_value
    b.durations[env, t] = outcome[DURATION_S]
    b.rewards[env, t] = reward
    b.discounts[env, t] = outcome[DISCOUNT]
    has_ended = outcome[TERMINATED] + outcome[TRUNCATED] > 0.0
    b.ended[env, t] = has_ended
    has_crossed = s.sims[env].num_batches % NOISE_BLOCK < a.rules[0].action_repeat
    b.waits[env] = has_ended or (any_noise_due and has_crossed)
    b.at[env] = t + 1
    if t + 1 == b.rewards.shape[1]:
        b.values[env, t + 1] = value_of(critic, a.features[env])
        learn_advantages(b, env, gae_lambda)


@kernel()
def legal_requests(s, env, mask):
    """Which request actions are legal in environment `env`."""
    lane = lane_of(s, env)
    visible, tile = num_visible(lane), max(1, int(lane.coef_s[2]))
    for slot in range(NUM_SLOTS):
        mask[slot] = slot < visible and can_add(lane, slot, tile)
    mask[CLOSE] = True


@entry(nogil=True)
def collect(state, arrays, step, b, actor, critic, gae_lambda, first, stop):
    """Go on with the rollouts of environments first, ..., stop - 1 until each is complete or waits for Python.

    `step` is that of their kind of action.
    """
    s, a = unpack(state), unpack(arrays)
    n_steps, has_masks = b.rewards.shape[1], b.masks.shape[2] > 0
    for start in range(first, stop, BLOCK):
        end, going = min(start + BLOCK, stop), 1
        while going > 0:
            going = 0
            for env in range(start, end):
                t = b.at[env]
                rests = b.waits[env] or t >= n_steps
                a.outcomes[env, PAUSED] = 1.0 if rests else 0.0
                if rests:
                    continue
                going += 1
                b.features[env, t] = a.features[env]
                b.clocks[env, t] = s.sims[env].clock_s
                mask = b.masks[env, t]
                if has_masks:
                    legal_requests(s, env, mask)
                b.values[env, t] = value_of(critic, a.features[env])
                scores = actor.layers[compute(actor, a.features[env])]
                b.log_probs[env, t] = draw(scores, mask, b.widths, b.uniforms[env, t], a.choices[env])
                b.actions[env, t] = a.choices[env]
            due = step(state, arrays, start, end) if going > 0 else 0
            for env in range(start, end):
                if a.outcomes[env, PAUSED] == 0.0:
                    take(s, a, b, critic, env, gae_lambda, due > 0)
        for env in range(start, end):
            a.outcomes[env, PAUSED] = 0.0


_STEP = types.FunctionType(types.int64(HANDLE_TYPE, ARRAYS_HANDLE_TYPE, types.int64, types.int64))


@cache
def collecting() -> Any:
    """:func:`collect`, compiled once for the steps of all kinds of action, as function pointers."""
    if JIT_ENABLED:
        network, edge = NETWORK_TYPE, types.int64
        collect.compile(
            (HANDLE_TYPE, ARRAYS_HANDLE_TYPE, _STEP, ROLLOUT_TYPE, network, network, types.float64, edge, edge)
        )
        collect.disable_compile()
    return collect
