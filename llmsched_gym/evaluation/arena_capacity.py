"""Capacities of an arena's schedulers, one file each, so that a search that was interrupted goes on with the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmsched_gym.config import ConfigError
from llmsched_gym.evaluation.arena import UNTUNED, Arena
from llmsched_gym.evaluation.capacity import LOW_QPS, capacity
from llmsched_gym.evaluation.criteria import criterion
from llmsched_gym.evaluation.grid import Progress
from llmsched_gym.evaluation.spread import Places, opened
from llmsched_gym.evaluation.store import grid_config
from llmsched_gym.files import digest_of, dumps, make_folder, write_text
from llmsched_gym.fluid import fluid_capacity

MOST = 1.5
"""Rates are searched up to so many fluid capacities: who refuses or starves some can serve more of the others."""


def capacities_of(
    arena: Arena, judged: str, out: Path, *, places: Places = 1, progress: Progress = lambda done, total: None
) -> list[dict[str, Any]]:
    """The capacity of each scheduler, as it is, on each suite and profile by the criterion `judged`, as rows.

    Files of capacities that were found are below ``capacity`` in `out`; progress counts capacities.
    """
    criterion(judged)
    worlds = [world for world in arena.worlds() if world.kind == UNTUNED]
    total, rows = sum(len(world.policies) for world in worlds), []
    with opened(places) as pool:
        for world in worlds:
            given = arena.world(world.suite, world.profile)
            bounds = (LOW_QPS * 0.1, MOST * fluid_capacity(given).qps)
            folder = out / "capacity" / world.folder
            make_folder(folder)
            for policy in world.policies:
                settings = {"criterion": judged, "qps": list(bounds), "seeds": arena.seeds}
                config = grid_config(given, [policy], **settings, first_seed=arena.first_seed)
                path = folder / f"{digest_of([policy, judged])}.json"
                found = _read(path, json.loads(dumps(config)))
                if found is None:
                    (item,) = capacity(
                        given,
                        [policy],
                        judged,
                        qps=bounds,
                        seeds=arena.seeds,
                        first_seed=arena.first_seed,
                        workers=pool,
                    )
                    found = item.to_row()
                    write_text(path, dumps({"config": config, "result": found}))
                rows.append({"arena_suite": world.suite, "arena_profile": world.profile} | found)
                progress(len(rows), total)
    return rows


def _read(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The capacity that a file holds; None without one. ConfigError where it is of another configuration."""
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["config"] == config:
            result: dict[str, Any] = held["result"]
            return result
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"out: {path} holds a capacity of another configuration; choose another folder or remove it")
