"""What an entry of an observation is: its declaration, from which names, space, kernels and documentation follow."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np

from llmsched_gym.engine.jit import kernel


class Feature(NamedTuple):
    """One entry of an observation: space, names, kernels and the documentation go by it."""

    name: str
    low: float
    high: float
    what: str  # what is counted or measured
    scale: float = 0.0  # what is 1: of a logarithm's scale, or of a share; 0: neither
    unit: str = ""  # of the scale
    log: bool = False  # min(1, log1p(x / step) / log1p(scale / step)); else min(1, x / scale)
    step: float = 1.0
    otherwise: str = ""  # what it is where there is nothing to measure

    @property
    def meaning(self) -> str:
        """What it is, with scale and unit, for people."""
        text = self.what
        if self.scale:
            size = f"{self.scale:,.0f} {self.unit}".rstrip()
            text += f", log scale to {size}" if self.log else f", share of {size}"
        if self.step != 1.0:
            text += f" in steps of {self.step:g} {self.unit}"
        return f"{text}; {self.otherwise}" if self.otherwise else text


def places(entries: tuple[Feature, ...]) -> Any:
    """The index of each entry by its name, for kernels: ``AT.num_waiting``; a dot in a name becomes an underscore."""
    names = [entry.name.replace(".", "_") for entry in entries]
    return namedtuple("places", names)(*range(len(names)))


def scales(entries: tuple[Feature, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Factors for kernels, float64 of shape (num_entries,): steps and logarithms (see Feature.log), and shares.

    Computed once, as a logarithm is the dearest operation of an observation.
    """
    per_step = np.array([1.0 / entry.step for entry in entries])
    per_log = np.array([1.0 / math.log1p(entry.scale / entry.step) if entry.log else 0.0 for entry in entries])
    return per_step, per_log, np.array([entry.scale for entry in entries])


@kernel()
def squash(x, per_log):
    """log1p with a fixed scale, within 0 and 1; `per_log` is 1 / log1p(scale), see :func:`scales`."""
    return min(1.0, math.log(1.0 + x) * per_log)
