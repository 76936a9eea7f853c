"""A fully connected network from features to knobs in compiled code: whole runs of a policy without leaving it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.engine.handles import unpack
from llmsched_gym.engine.jit import entry, kernel
from llmsched_gym.engine.pack import pack
from llmsched_gym.engine.run import noise_due, run_lane
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.step import is_over
from llmsched_gym.env.actions.knobs import put
from llmsched_gym.env.features import observe_features

ACTION = "knobs"  # the kind of action that these networks choose
ACTIVATIONS = ("tanh", "relu")
TANH = 0


class Network(NamedTuple):
    """What the kernels read; parameters and buffers are float32 or float64."""

    columns: Any  # (num_inputs,) int64, which features it sees
    sizes: Any  # (num_layers + 1,) int64, widths from the inputs to the outputs
    parameters: Any  # (n,): mean and scale of the inputs, then for each layer its weights (inputs, outputs) and biases
    activation: Any  # (1,) int64, index of ACTIVATIONS
    widths: Any  # (num_knobs,) int64, outputs of each knob: one per value, or a single score
    counts: Any  # (num_knobs,) int64, values of each knob
    values: Any  # (num_knobs, most values) int64, this version's index of each value
    layers: Any  # (2, widest layer), what is computed: a layer from the one before it, in turns


def make_network(
    columns: np.ndarray,
    mean: np.ndarray,
    scale: np.ndarray,
    layers: Sequence[tuple[np.ndarray, np.ndarray]],
    activation: str,
    widths: Sequence[int],
    values: Sequence[np.ndarray],
) -> Network:
    """Lay out a network.

    Args:
        columns: which features it sees, (num_inputs,).
        mean, scale: of the inputs, (num_inputs,); their type is that of the computation.
        layers: weights (inputs, outputs) and biases (outputs,), the last without an activation.
        activation: a name of ACTIVATIONS.
        widths: outputs of each knob; the largest wins, or a single one between 0 and 1 says how far along the list.
        values: this version's index of each value of each knob.
    """
    dtype = mean.dtype
    table = np.zeros((len(values), max(map(len, values))), np.int64)
    for row, each in zip(table, values, strict=True):
        row[: len(each)] = each
    sizes = np.array([len(columns), *(len(bias) for _, bias in layers)], np.int64)
    parts = [mean, scale, *(part.ravel() for layer in layers for part in layer)]
    return Network(
        columns=columns.astype(np.int64),
        sizes=sizes,
        parameters=np.concatenate(parts).astype(dtype),
        activation=np.array([ACTIVATIONS.index(activation)], np.int64),
        widths=np.array(widths, np.int64),
        counts=np.array([len(each) for each in values], np.int64),
        values=table,
        layers=np.zeros((2, int(sizes.max())), dtype),
    )


@kernel()
def forward(net, features):
    """Compute the outputs for one observation; returns the row of ``net.layers`` that holds them."""
    parameters, sizes, layers = net.parameters, net.sizes, net.layers
    n = sizes[0]
    for i in range(n):
        layers[0, i] = (features[net.columns[i]] - parameters[i]) * parameters[n + i]
    at, of, to = 2 * n, 0, 1
    for layer in range(1, sizes.shape[0]):
        m = sizes[layer]
        bias = at + n * m
        for j in range(m):
            layers[to, j] = parameters[bias + j]
        for i in range(n):
            row = at + i * m
            value = layers[of, i]
            for j in range(m):
                layers[to, j] += value * parameters[row + j]
        if layer < sizes.shape[0] - 1:
            for j in range(m):
                value = layers[to, j]
                layers[to, j] = math.tanh(value) if net.activation[0] == TANH else max(value, 0.0)
        at, n, of, to = bias + m, m, to, of
    return of


@kernel()
def choose(net, features, action):
    """Write the knobs for one observation into `action`, int64 of shape (num_knobs,)."""
    outputs = net.layers
    row = forward(net, features)
    first = 0
    for k in range(net.widths.shape[0]):
        width = net.widths[k]
        place = 0
        if width == 1:
            share = min(1.0, max(0.0, outputs[row, first]))
            place = int(np.rint(share * (net.counts[k] - 1)))
        else:
            for i in range(1, width):
                if outputs[row, first + i] > outputs[row, first + place]:
                    place = i
        action[k] = net.values[k, place]
        first += width


@entry()
def choose_knobs(net, features, action):
    """:func:`choose` for Python, in the arithmetic of whole runs."""
    choose(net, features, action)


@kernel()
def _run(s, a, env, net, repeat, left, max_steps, max_idle_steps):
    lane, world, done = lane_of(s, env), s.worlds[env], 0
    for _ in range(max_steps):
        if done >= max_steps or is_over(lane, world) or lane.sim.num_idle_steps > max_idle_steps:
            break
        if left == 0:
            observe_features(lane, a.features[env], False, world, a.rules[0], a.outcomes[env])
            choose(net, a.features[env], a.choices[env])
            left = repeat
        put(lane, a, env)
        most = min(left, max_steps - done)
        steps = run_lane(s, env, pack, most, max_idle_steps)
        done += steps
        left -= steps
        if noise_due(s, env):
            break
    return done, left


@entry()
def run_network(s, a, env, net, repeat, left, max_steps, max_idle_steps):
    """Step under the network's knobs until `max_steps` are done, the run is over or a noise block is used up.

    An action holds for `repeat` batches; `left` are left of the last. Returns (steps done, batches left).
    """
    return _run(unpack(s), unpack(a), env, net, repeat, left, max_steps, max_idle_steps)
