"""Networks in numpy, one observation at a time: what a policy folder's tensors are multiplied by.

Each class names the tensors it needs in ``shapes``; :func:`make_network` checks them before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Tensors = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


class BadTensors(ValueError):
    """A tensor or setting that does not fit; the message names it."""


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, np.float32(0))


ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"tanh": np.tanh, "relu": _relu}


def _setting(settings: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise BadTensors(f"architecture.{name}: expected a whole number from {low} to {high}, got {value!r}")
    return value


def _activation(settings: Mapping[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
    name = settings.get("activation")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise BadTensors(f"architecture.activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _check(tensors: Tensors, shapes: Mapping[str, Shape]) -> dict[str, np.ndarray]:
    """The tensors as float32, weights transposed for ``x @ w``."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise BadTensors(f"{name}: missing")
        if tensors[name].shape != shape:
            raise BadTensors(f"{name}: expected shape {shape}, got {tensors[name].shape}")
    for name in tensors:
        if name not in shapes:
            raise BadTensors(f"{name}: not a tensor of this architecture")
    return {name: np.ascontiguousarray(tensors[name].T, dtype=np.float32) for name in shapes}


class Mlp:
    """Features, normalised by constants, through fully connected layers."""

    def __init__(self, settings: Mapping[str, Any], tensors: Tensors, inputs: int, outputs: int) -> None:
        layers = _setting(settings, "layers", 0, 16)
        self.activation = _activation(settings)
        shapes: dict[str, Shape] = {"normalise.mean": (inputs,), "normalise.scale": (inputs,)}
        width = inputs
        for i in range(layers):
            bias = tensors.get(f"hidden.{i}.bias", np.zeros(0))
            shapes |= {f"hidden.{i}.weight": (bias.size, width), f"hidden.{i}.bias": (bias.size,)}
            width = bias.size
        shapes |= {"out.weight": (outputs, width), "out.bias": (outputs,)}
        t = _check(tensors, shapes)
        self.mean, self.scale = t["normalise.mean"], t["normalise.scale"]
        self.hidden = [(t[f"hidden.{i}.weight"], t[f"hidden.{i}.bias"]) for i in range(layers)]
        self.out = (t["out.weight"], t["out.bias"])

    def __call__(self, features: np.ndarray) -> np.ndarray:
        x = (features - self.mean) * self.scale
        for weight, bias in self.hidden:
            x = self.activation(x @ weight + bias)
        return x @ self.out[0] + self.out[1]


class Rows:
    """Request rows through shared layers: deep sets with 0 attention layers, attention over the rows with more.

    Every row is embedded together with the features; each attention layer adds what a row takes from the others. A
    pooled vector (mean and largest over the rows, and the features) feeds the knobs and the closing of a batch; scores
    of rows come from the row and the pooled vector. Nothing depends on the order of rows.
    """

    def __init__(
        self, settings: Mapping[str, Any], tensors: Tensors, rows: int, features: int, outputs: int, per_row: bool
    ) -> None:
        w = _setting(settings, "width", 1, 1024)
        layers, self.heads = _setting(settings, "layers", 0, 8), _setting(settings, "heads", 1, 64)
        if w % self.heads:
            raise BadTensors(f"architecture.heads: expected a divisor of the width {w}, got {self.heads}")
        self.activation, self.per_row = _activation(settings), per_row
        shapes: dict[str, Shape] = {
            "normalise.mean": (features,),
            "normalise.scale": (features,),
            "row.weight": (w, rows),
            "row.bias": (w,),
            "context.weight": (w, features),
            "mix.weight": (w, w),
            "mix.bias": (w,),
            "pool.weight": (w, 2 * w + features),
            "pool.bias": (w,),
        }
        for i in range(layers):
            shapes |= {f"attention.{i}.qkv.weight": (3 * w, w), f"attention.{i}.qkv.bias": (3 * w,)}
            shapes |= {f"attention.{i}.out.weight": (w, w), f"attention.{i}.out.bias": (w,)}
        if per_row:
            shapes |= {"score.row.weight": (w, w), "score.row.bias": (w,), "score.pool.weight": (w, w)}
            shapes |= {"score.out.weight": (1, w), "score.out.bias": (1,)}
        if outputs:
            shapes |= {"out.weight": (outputs, w), "out.bias": (outputs,)}
        self.t, self.layers, self.width, self.outputs = _check(tensors, shapes), layers, w, outputs

    def __call__(self, rows: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(scores of the rows, pooled outputs) of the rows in use; either may be empty."""
        t, act, n, w = self.t, self.activation, len(rows), self.width
        x = (features - t["normalise.mean"]) * t["normalise.scale"]
        h = act(rows @ t["row.weight"] + t["row.bias"] + x @ t["context.weight"])
        h = act(h @ t["mix.weight"] + t["mix.bias"])
        for i in range(self.layers if n else 0):
            qkv = h @ t[f"attention.{i}.qkv.weight"] + t[f"attention.{i}.qkv.bias"]
            q, k, v = qkv.reshape(n, 3, self.heads, w // self.heads).transpose(1, 2, 0, 3)
            weights = q @ k.transpose(0, 2, 1) * np.float32(1 / np.sqrt(w // self.heads))
            weights = np.exp(weights - weights.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            mixed = (weights @ v).transpose(1, 0, 2).reshape(n, w)
            h = act(h + mixed @ t[f"attention.{i}.out.weight"] + t[f"attention.{i}.out.bias"])
        mean, largest = (h.mean(0), h.max(0)) if n else (np.zeros(w, np.float32), np.zeros(w, np.float32))
        pooled = act(np.concatenate([mean, largest, x]) @ t["pool.weight"] + t["pool.bias"])
        scores = np.zeros(0, np.float32)
        if self.per_row:
            z = act(h @ t["score.row.weight"] + t["score.row.bias"] + pooled @ t["score.pool.weight"])
            scores = (z @ t["score.out.weight"] + t["score.out.bias"])[:, 0]
        out = pooled @ t["out.weight"] + t["out.bias"] if self.outputs else np.zeros(0, np.float32)
        return scores, out
