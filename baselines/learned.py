"""Policies that ship with the package as folders: trained and tuned by `agents`, on the `drift` suite and its like."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llmsched_gym

FOLDERS = Path(llmsched_gym.__file__).parent / "data" / "policies"


def shipped(name: str, what: str) -> Callable[..., Any]:
    """What makes the scheduler of a folder that the package brings along."""

    def make(**options: str) -> Any:
        from llmsched_gym.policies import load_policy

        return load_policy(FOLDERS / name, **options)

    make.what = what  # type: ignore[attr-defined]
    return make


SCHEDULERS = {
    "learned": shipped(
        "learned", "a network that sets the knobs at every batch, a student of on-time (docs/agents_results.md)"
    ),
    "tuned-constant": shipped("tuned-constant", "the best constant knobs that CMA-ES found on drift"),
    "tuned-linear": shipped("tuned-linear", "the best linear rule from features to knobs that CMA-ES found on drift"),
}
