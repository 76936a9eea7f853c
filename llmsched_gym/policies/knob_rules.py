"""Knobs from scores: what constants and linear rules are made of.

Every knob with an order among its values (all but the order of prompts) has one score: 0 is its smallest value, 1 its
largest, in between the nearest of the list. The order of prompts has a score for each of its values; the largest wins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmsched_gym.env.actions.knobs import Knob


class KnobScores:
    """Turns scores of shape (..., num_scores) into knobs actions of shape (..., num_knobs), int64."""

    def __init__(self, knobs: Sequence[Knob]) -> None:
        self.knobs = tuple(knobs)
        self.ranks = [_by_size(knob) for knob in self.knobs]
        self.widths = [len(k.values) if k.name == "order" else 1 for k in self.knobs]
        self.num_scores = sum(self.widths)

    def actions(self, scores: np.ndarray) -> np.ndarray:
        """Knobs actions (..., num_knobs), int64, of `scores` (..., num_scores): a knob by its size, the best order."""
        chosen, first = [], 0
        for ranks, width in zip(self.ranks, self.widths, strict=True):
            part = scores[..., first : first + width]
            if width > 1:
                chosen.append(part.argmax(-1))
            else:
                place = np.rint(np.clip(part[..., 0], 0.0, 1.0) * (len(ranks) - 1))
                chosen.append(ranks[place.astype(np.int64)])
            first += width
        return np.stack(chosen, -1)

    def scores(self, action: np.ndarray) -> np.ndarray:
        """Scores in the middle of what gives `action`."""
        out: list[float] = []
        for index, ranks, width in zip(action, self.ranks, self.widths, strict=True):
            if width > 1:
                out += [1.0 if i == index else 0.0 for i in range(width)]
            else:
                out.append(float(np.flatnonzero(ranks == index)[0]) / (len(ranks) - 1))
        return np.array(out)


def _by_size(knob: Knob) -> np.ndarray:
    """Indices of the knob's values, smallest first; "not in use" (nan) is the smallest."""
    return np.argsort([-1.0 if np.isnan(v) else v for v in knob.values], kind="stable")
