"""An arena: all schedulers on all suites at shares of the fluid capacity, as shipped, tuned and with worse hints.

A *world* is a suite on a profile, with one kind of schedulers: those as they are (``untuned``), those with constants
from a file (``tuned``), or those that are told output lengths with an error in them (a length hint). Each world is a
grid of loads and seeds with a folder of its own, so that an arena which was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsched_gym.config import SUITES, ConfigError, Scenario, find_suite, scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.evaluation.cells import make_policy
from llmsched_gym.evaluation.grid import Progress, evaluate, seed_range
from llmsched_gym.evaluation.spread import Places, opened
from llmsched_gym.files import claim_folder, dumps, json_with, make_folder, write_text
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.registry import make_scheduler, registry
from llmsched_gym.workload.generate import come_in_sessions

OWN = "own"
"""In place of a profile: each suite's own."""
UNTUNED, TUNED = "untuned", "tuned"
LEFT_OUT = ("random",)
"""Registered schedulers that take part only by name: ``random`` is for tests, in Python, a thousand times as slow."""
TUNED_FILE = Path(__file__).with_name("arena_tuned.toml")
CONFIG = "config.json"

Row = dict[str, Any]


@dataclass(frozen=True)
class Constants:
    """A scheduler with constants that were tuned for a profile."""

    profile: str  # as an arena names it
    name: str  # of the scheduler without them
    policy: str  # with them
    how: Mapping[str, Any] = field(default_factory=dict)  # how they were found


@dataclass(frozen=True)
class Arena:
    """Who competes where. Validated when made; ConfigError or PolicyError with one line otherwise."""

    policies: tuple[str, ...] = ()  # none: all registered ones but LEFT_OUT
    suites: tuple[str, ...] = tuple(SUITES)
    profiles: tuple[str, ...] = (OWN, "rtx6000ada-mistral-7b-vllm")
    loads: tuple[float, ...] = (0.6, 0.8, 0.95, 1.05)  # shares of the fluid capacity
    hints: tuple[str, ...] = ()  # length hints with which those that know lengths run again
    constants: tuple[Constants, ...] = ()
    reference: str = "vllm-v1"  # whom the others are compared with
    seeds: int = 10
    first_seed: int = 0
    num_requests: int = 1000  # of a run
    session_requests: int = 300  # of a run of a suite of sessions, turns

    def __post_init__(self) -> None:
        if not self.policies:
            object.__setattr__(self, "policies", tuple(name for name in sorted(registry()) if name not in LEFT_OUT))
        for name in ("policies", "suites", "profiles", "loads", "hints"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for name in ("suites", "profiles", "loads"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one")
        for load in self.loads:
            if not 0.0 < load <= 10.0:
                raise ConfigError(f"loads: expected shares of the fluid capacity above 0 and up to 10, got {load:g}")
        seed_range(self.seeds, self.first_seed)
        for name in ("num_requests", "session_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a whole number >= 1, got {getattr(self, name)}")
        for name in self.suites:
            find_suite(name, SUITES)
        for name in self.profiles:
            if name != OWN:
                load_profile(name)
        for hint in self.hints:
            scenario("paper", length_hint=hint)
            if not hint.startswith("noisy:"):  # without an error they would run as they are
                raise ConfigError(f"hints: expected noisy:SIGMA, got {hint!r}")
        for policy in (*self.policies, *(found.policy for found in self.constants)):
            make_scheduler(policy)
        if self.reference not in self.policies:
            raise ConfigError(f"reference: expected one of the policies, got {self.reference!r}")
        folders: dict[str, World] = {}
        for world in self.worlds():
            other = folders.setdefault(world.folder, world)
            if other is not world:
                one, two = (f"{w.suite} on {w.profile}" for w in (other, world))
                raise ConfigError(f"suites: {one} and {two} would have the same folder, {world.folder}; rename a file")

    def world(self, suite: str, profile: str, kind: str = UNTUNED) -> Scenario:
        """The scenario of a suite on a profile; refusing is allowed, which few schedulers make use of."""
        world = scenario(suite, allow_refusal=True)
        world = world if profile == OWN else world.replace(profile=profile)
        world = world if kind in (UNTUNED, TUNED) else world.replace(length_hint=kind)
        return world.replace(num_requests=self.session_requests if come_in_sessions(world) else self.num_requests)

    def worlds(self) -> list[World]:
        """All worlds, the untuned ones of all suites and profiles first."""
        knowing = tuple(p for p in self.policies if getattr(make_scheduler(p), "clairvoyant", False))
        pairs = [(suite, profile) for suite in self.suites for profile in self.profiles]
        found = [World(self, *pair, UNTUNED, self.policies) for pair in pairs]
        for suite, profile in pairs:
            own = [c.policy for c in self.constants if c.profile == profile and c.name in self.policies]
            found += [World(self, suite, profile, TUNED, tuple(dict.fromkeys(own)))] if own else []
        if knowing:
            found += [World(self, *pair, hint, knowing) for hint in self.hints for pair in pairs]
        return found

    def label(self, profile: str, kind: str, policy: str) -> str:
        """How a page names a scheduler, the same on every profile."""
        if kind == UNTUNED:
            return policy
        if kind != TUNED:
            return f"{policy}, {kind}"
        names = [c.name for c in self.constants if (c.profile, c.policy) == (profile, policy)]
        return f"{names[0]}, tuned"

    def to_dict(self) -> dict[str, Any]:
        """All that the results depend on, for JSON."""
        names = "policies suites profiles loads hints reference seeds first_seed num_requests session_requests"
        tuned = [{"profile": c.profile, "name": c.name, "policy": c.policy, **c.how} for c in self.constants]
        return {name: getattr(self, name) for name in names.split()} | {"tuned": tuned}


@dataclass(frozen=True)
class World:
    """Some schedulers on a suite and a profile."""

    arena: Arena
    suite: str
    profile: str  # as the arena names it
    kind: str  # UNTUNED, TUNED, or a length hint
    policies: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where its runs lie, below the arena's folder."""
        names = (Path(self.suite).stem, Path(self.profile).name.removesuffix(".json"), self.kind)
        return "/".join(re.sub(r"[^\w.+-]+", "-", name).strip("-") for name in names)

    @property
    def num_runs(self) -> int:
        """Runs of all its schedulers, loads and seeds."""
        return len(self.policies) * len(self.arena.loads) * self.arena.seeds

    def rates(self, world: Scenario) -> dict[float, float]:
        """Shares of the fluid capacity by rate, requests or sessions per second."""
        capacity = fluid_capacity(world).qps
        return {float(f"{share * capacity:.4g}"): share for share in self.arena.loads}

    def run(self, out: Path, places: Places, progress: Progress) -> list[Row]:
        """Rows of all runs, with what the arena calls them; those that the folder has are not run again."""
        world = self.arena.world(self.suite, self.profile, self.kind)
        rates = self.rates(world)
        rows = evaluate(
            world,
            self.policies,
            qps=list(rates),
            seeds=self.arena.seeds,
            first_seed=self.arena.first_seed,
            workers=places,
            out=out / self.folder,
            frames=False,
            progress=progress,
        )
        marks = {"arena_suite": self.suite, "arena_profile": self.profile, "kind": self.kind}
        return [
            marks
            | {
                "label": self.arena.label(self.profile, self.kind, row["policy"]),
                "clairvoyant": bool(getattr(make_policy(world, row["policy"]), "clairvoyant", False)),
                "share": rates[row["requested_qps"]],
            }
            | row
            for row in rows
        ]


def run(arena: Arena, out: Path, *, places: Places = 1, progress: Progress = lambda done, total: None) -> list[Row]:
    """Rows of all worlds (see `metrics.row`, and `World.run`), in the folder `out` world by world.

    Worlds that are done are read; the first that is not goes on where it was interrupted.
    """
    claim_folder(out, "results of llmsched arena", {CONFIG: json_with("arena", "worlds")})
    _check_held(out / CONFIG, json.loads(dumps(arena.to_dict())))
    make_folder(out)
    worlds = arena.worlds()
    listed = [{"folder": w.folder, "suite": w.suite, "profile": w.profile, "kind": w.kind} for w in worlds]
    write_text(out / CONFIG, dumps({"arena": arena.to_dict(), "worlds": listed}))
    total, before, rows = sum(w.num_runs for w in worlds), 0, []
    with opened(places) as pool:
        for world in worlds:

            def note(done: int, _: int, before: int = before) -> None:
                progress(before + done, total)

            rows += world.run(out, pool, note)
            before += world.num_runs
    return rows


def _check_held(config: Path, wanted: dict[str, Any]) -> None:
    """Refuse a folder whose arena has other runs of a world; suites, profiles and hints may be other ones."""
    if not config.exists():
        return
    held = json.loads(config.read_text(encoding="utf-8"))["arena"]
    names = ("policies", "loads", "seeds", "first_seed", "num_requests", "session_requests")
    differing = [name for name in names if held.get(name) != wanted[name]]
    if differing:
        raise ConfigError(
            f"out: {config.parent} holds an arena of other {', '.join(differing)}; choose another folder or remove it"
        )


def read_constants(path: Path) -> tuple[Constants, ...]:
    """Tuned constants of a TOML file: tables ``[[tuned]]`` of profile, name, policy and how they were found."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"tuned: cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"tuned: {path} is no TOML file: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"tuned: {path} is no TOML file: nested too deeply") from None
    entries = data.get("tuned")
    if not isinstance(entries, list):
        raise ConfigError(f"tuned: expected tables [[tuned]] in {path}")
    found: list[Constants] = []
    for number, entry in enumerate(entries, 1):
        for name in ("profile", "name", "policy"):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise ConfigError(f"tuned: expected a text {name!r} in table {number} of {path}")
        if any((one.profile, one.name) == (entry["profile"], entry["name"]) for one in found):
            raise ConfigError(f"tuned: expected constants of {entry['name']} for {entry['profile']} once in {path}")
        how = {key: value for key, value in entry.items() if key not in ("profile", "name", "policy")}
        found.append(Constants(entry["profile"], entry["name"], entry["policy"], how))
    return tuple(found)


def chosen(constants: Sequence[Constants], profiles: Sequence[str]) -> tuple[Constants, ...]:
    """Those for the profiles of an arena."""
    return tuple(found for found in constants if found.profile in profiles)
