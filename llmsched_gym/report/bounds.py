"""What a report measures schedulers against: the fluid capacity, and a scheduler that knows every output length."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmsched_gym.config import ClusterScenario, Scenario
from llmsched_gym.fluid import Fluid, Work, fluid_capacity

BOUND = "shortest-total"
"""The registered scheduler that reports measure the others against."""
CLAIRVOYANT = (BOUND, "wait", "mc-sf", "a-min")
"""The registered schedulers that are told output lengths; a report of rows needs no scheduler itself to know them."""
NEAR = 0.15
"""Share of a load by which the fluid capacity may lie beyond it and still be shown."""


def is_clairvoyant(policy: str) -> bool:
    """Whether a registered scheduler is told output lengths, with or without parameters or the folder it is from."""
    return re.split(r"\[| \(", policy)[0].strip() in CLAIRVOYANT


def bound_of(policies: Iterable[str]) -> str | None:
    """The policy that the others are measured against, with or without parameters, if it is among them."""
    return next((p for p in policies if re.split(r"\[| \(", p)[0].strip() == BOUND), None)


def ordinary(policies: Iterable[str]) -> list[str]:
    """The policies that know no output length; all of them if there is no such policy."""
    policies = list(policies)
    return [p for p in policies if not is_clairvoyant(p)] or policies


def with_bound(policies: Sequence[str]) -> list[str]:
    """The policies, and the one that they are measured against if it is not among them."""
    return [*policies, BOUND] if bound_of(policies) is None else [*policies]


def scenario_from_json(fields: dict[str, Any]) -> Scenario:
    """The scenario that ``config.json`` holds."""
    decoded = {k: math.inf if v == "inf" else tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    kind = ClusterScenario if "num_replicas" in decoded else Scenario
    return kind().replace(**decoded)


def fluid_of(config: Mapping[str, Any]) -> Fluid | None:
    """The fluid capacity that a folder keeps, or of its scenario; None where it cannot be had, as without its trace."""
    if isinstance(kept := config.get("fluid"), dict):
        return Fluid(**{**kept, "work": Work(**kept["work"])})
    fields = config.get("scenario")
    if not isinstance(fields, dict) or not fields or fields.get("backend", "simulated") != "simulated":
        return None
    try:
        return fluid_capacity(scenario_from_json(fields))
    except (ValueError, TypeError, OSError):
        return None


def shown_capacity(fluid: Fluid | None, loads: Iterable[float]) -> float | None:
    """The fluid capacity, requests/s, if it lies within the loads or a little beyond them."""
    loads = list(loads)
    if fluid is None or not min(loads) * (1 - NEAR) <= fluid.qps <= max(loads) * (1 + NEAR):
        return None
    return fluid.qps
