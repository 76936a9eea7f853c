"""Tune opponents by CMA-ES: ``llmsched tune --kind constant --suite drift --out runs/constant``.

`constant` searches one setting of all knobs; `linear` a linear rule from features to knobs (scores of the knobs are
weights times features plus a bias). Both choose among the values that a learner chooses from, see the features that it
sees, and are charged for simulated decisions like it. ``--template "my:Scheduler[alpha=0..1,window=int:1..50]"`` tunes
the bracket parameters of any scheduler instead and writes the best to policy.json.

A candidate's value is its mean utility over finite runs on training seeds, the same for all of a generation. Now and
then the mean of the search distribution is judged on selection seeds, and the best is kept. A search that has converged
starts again with twice the population (IPOP, Auger and Hansen, CEC 2005) while decisions are left. ``--resume`` goes on
after an interruption. ``--workers``, ``--ray`` or ``--ray-address`` spread each population; its figures stay the same.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cma
import numpy as np

from llmsched_gym.agents.checkpoint import load_checkpoint, save_checkpoint
from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.agents.run_folder import cut_progress, open_run, settings_of, start_run
from llmsched_gym.agents.seeds import SELECTION_SEEDS, TRAINING_SEEDS, check_evaluations, check_seeds
from llmsched_gym.agents.settings import WORLD, Evaluations, Run, Spread, World
from llmsched_gym.config import ConfigError, EnvConfig, Scenario, env_config
from llmsched_gym.env.actions.knobs import knobs_for
from llmsched_gym.env.features import FEATURES
from llmsched_gym.env.vector import LLMSchedVectorEnv
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.evaluation.spread import Here, Places, Pool, choose, count_of, opened, run_cells
from llmsched_gym.evaluation.warm import once, warm
from llmsched_gym.interrupts import leave
from llmsched_gym.policies import read_folder, write_folder
from llmsched_gym.policies.folder import spec_for
from llmsched_gym.policies.knob_rules import KnobScores
from llmsched_gym.registry import make_scheduler
from llmsched_gym.report import console

# What a linear rule looks at: load, backlog, urgency, and how the machine does.
LINEAR_FEATURES = (
    "kv_cache_usage",
    "running_share",
    "num_waiting",
    "waiting_tokens",
    "started_tokens",
    "mean_batch",
    "cost_ratio",
    "arrivals_10s",
    "arrivals_60s",
    "smallest_tbt_slo",
    "waiting_missed",
    "waiting_feasible",
    "promised_work",
    "promise_slack",
    "dropped",
)
START_ACTION = {"token_budget": 768, "cap": 0.7, "order": 5, "hold": 2}  # feasible prompts first, every decode, capped

SEARCH = "The search"  # a group of help


@dataclass(frozen=True)
class Config(Spread, Evaluations, World, Run):
    out: str = option("runs/tune", "folder of the run")
    seed: int = option(0, "of the search and of the choice of episodes")
    suite: str = option("default", "suite to tune on")
    action_repeat: int = option(8, "batches that one decision holds", group=WORLD)
    kind: str = option("constant", "what is tuned", choices=("constant", "linear"), group=SEARCH)
    template: str = option("", "a scheduler with ranges for parameters, tuned instead", group=SEARCH)
    steps: int = option(2_000_000, "simulated decisions to spend (one is action_repeat batches)", group=SEARCH)
    population: int = option(0, "candidates of a generation; 0: CMA-ES's own choice", group=SEARCH)
    sigma: float = option(0.3, "first step size; scores of knobs go from 0 to 1", positive=True, group=SEARCH)
    episodes: int = option(6, "runs of a candidate in a generation", group=SEARCH)
    requests: int = option(600, "measured requests of a run", group=SEARCH)
    eval_seeds: int = option(8, "selection seeds (2000, 2001, ...)")
    eval_requests: int = option(1000, "measured requests of an evaluation run")
    workers: int = option(1, "processes that share a population; no figure depends on it")


class KnobRules:
    """Candidates that set knobs, run side by side in one vector environment."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.world: EnvConfig = env_config(
            config.suite,
            **{"num_requests": config.requests, "action_repeat": config.action_repeat, **config.set},
        )
        for name, expected in (("action", "knobs"), ("observation", "features"), ("mask_in_observation", None)):
            if getattr(self.world, name) != expected:
                got = getattr(self.world, name)
                raise ConfigError(f"{name}: expected {expected!r} where knobs are tuned, got {got!r}")
        self.scores = KnobScores(knobs_for(self.world))
        names = [f.name for f in FEATURES]
        used = LINEAR_FEATURES if config.kind == "linear" else ()
        self.columns = np.array([names.index(name) for name in used], np.int64)
        first = [_index(knob, START_ACTION) for knob in knobs_for(self.world)]
        weights = np.zeros((self.scores.num_scores, len(self.columns)))
        self.start = np.concatenate([self.scores.scores(np.array(first))[:, None], weights], 1).ravel()
        self._envs: dict[int, LLMSchedVectorEnv] = {}

    def _split(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = x.reshape(*x.shape[:-1], self.scores.num_scores, 1 + len(self.columns))
        return table[..., 0], table[..., 1:]

    def utilities(self, candidates: list[np.ndarray], seeds: list[int], places: Places = 1) -> tuple[np.ndarray, int]:
        """Mean utility of each candidate over `seeds`, and the decisions it took to find out."""
        if places == 1 or isinstance(places, Here):
            return self.run(candidates, seeds)
        parts = np.array_split(np.arange(len(candidates)), min(count_of(places), len(candidates)))
        cells = [(self.config, [candidates[i] for i in part], seeds) for part in parts]
        found = run_cells(knob_utilities, cells, places)
        return np.concatenate([means for means, _ in found]), sum(decisions for _, decisions in found)

    def run(self, candidates: list[np.ndarray], seeds: list[int]) -> tuple[np.ndarray, int]:
        """The same in this process."""
        n, each = len(candidates), len(seeds)
        if n not in self._envs:
            self._envs[n] = LLMSchedVectorEnv(n * each, self.config.suite, **_fields(self.world))
        env = self._envs[n]
        bias, weight = (np.repeat(part, each, 0) for part in self._split(np.stack(candidates)))
        observation, _ = env.reset(seed=list(seeds) * n)
        totals, running, decisions = np.zeros(n * each), np.ones(n * each, bool), 0
        while running.any():
            scores = bias + np.einsum("eof,ef->eo", weight, observation[:, self.columns].astype(np.float64))
            observation, rewards, terminated, truncated, _ = env.step(self.scores.actions(scores))
            totals[running] += rewards[running]
            decisions += int(running.sum())
            running &= ~(terminated | truncated)
        means = totals.reshape(n, each).mean(1) / (self.world.num_requests or 1) / self.world.reward_scale
        return means, decisions

    def write(self, x: np.ndarray, folder: Path, training: dict[str, Any]) -> str:
        bias, weight = self._split(x)
        if self.config.kind == "constant":
            action = self.scores.actions(bias)
            labels = {k.name: k.label(int(i)) for k, i in zip(knobs_for(self.world), action, strict=True)}
            spec = spec_for(self.world, {"kind": "constant"}, training={**training, "knobs": labels})
            return str(write_folder(folder, spec, {"action": action}))
        spec = spec_for(self.world, {"kind": "linear"}, training=training)
        spec = dataclasses.replace(spec, observation={**spec.observation, "features": list(LINEAR_FEATURES)})
        tensors = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}
        return str(write_folder(folder, spec, tensors))


class TemplateRules:
    """Candidates that set the parameters of a scheduler; one decision is one batch."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.world = env_config(config.suite, **{"num_requests": config.requests, **config.set})
        pattern = r"(int:)?(-?[\d.]+(?:e-?\d+)?)\.\.(-?[\d.]+(?:e-?\d+)?)"
        self.ranges = [(bool(m[1]), float(m[2]), float(m[3])) for m in re.finditer(pattern, config.template)]
        if not self.ranges:
            raise ConfigError(f"template: expected a range as in slai[budget=int:256..2048], got {config.template!r}")
        for _, low, high in self.ranges:
            if not low < high:
                raise ConfigError(f"template: expected LOW..HIGH, got {low:g}..{high:g} in {config.template!r}")
        self.parts = re.split(pattern, config.template)[::4]
        self.start = np.full(len(self.ranges), 0.5)
        make_scheduler(self.name(self.start))

    def name(self, x: np.ndarray) -> str:
        out = self.parts[0]
        for value, (whole, low, high), after in zip(np.clip(x, 0, 1), self.ranges, self.parts[1:], strict=True):
            number = low + (high - low) * float(value)
            out += (str(round(number)) if whole else f"{number:.6g}") + after
        return out

    def utilities(self, candidates: list[np.ndarray], seeds: list[int], places: Places = 1) -> tuple[np.ndarray, int]:
        """Mean utility of each candidate over `seeds`, and the batches it took to find out."""
        rows = run_cells(run, [(self.world, self.name(x), seed) for x in candidates for seed in seeds], places)
        values = np.array([r["mean_utility"] for r in rows]).reshape(len(candidates), len(seeds))
        return np.array([np.mean(own) for own in values]), sum(r["iterations"] for r in rows)

    def write(self, x: np.ndarray, folder: Path, training: dict[str, Any]) -> str:
        path = folder.with_suffix(".json")
        path.write_text(json.dumps({"policy": self.name(x), "training": training}, indent=2) + "\n")
        return self.name(x)


_rules: dict[str, KnobRules] = {}  # of this process, as making environments takes time


def knob_utilities(config: Config, candidates: list[np.ndarray], seeds: list[int]) -> tuple[np.ndarray, int]:
    """A worker's part of a population."""
    key = repr(config)
    if key not in _rules:
        _rules[key] = KnobRules(config)
    rules = _rules[key]
    once(("vector environment", "knobs"), lambda: rules.run(candidates, seeds))
    return rules.run(candidates, seeds)


def run(world: Scenario, policy: str, seed: int) -> dict[str, Any]:
    """The row of one run."""
    warm(world, policy)
    return row(simulate(world, policy, seed))


def _fields(world: EnvConfig) -> dict[str, Any]:
    return {k: v for k, v in world.to_dict().items() if k != "suite"}


def _index(knob: Any, wanted: dict[str, float]) -> int:
    return knob.values.index(wanted[knob.name]) if knob.name in wanted else 0


def evaluation_of(config: Config) -> EnvConfig:
    """What runs on selection seeds have as their world."""
    return env_config(config.suite, **{"num_requests": config.eval_requests, **config.set})


def selection(policy: str, config: Config, pool: Pool | None = None) -> dict[str, float]:
    """Means over selection seeds; in this process, for only this machine has the candidate's folder."""
    scenario = evaluation_of(config)
    runs = [(scenario, policy, seed) for seed in SELECTION_SEEDS[: config.eval_seeds]]
    rows = run_cells(run, runs, pool if pool is not None and pool.is_here else 1)
    return {name: float(np.mean([r[name] for r in rows])) for name in ("mean_utility", "slo_attainment")}


def new_search(rules: Any, config: Config, restarts: int) -> cma.CMAEvolutionStrategy:
    """A search from the start; each restart doubles the population."""
    usual = 4 + int(3 * np.log(len(rules.start)))  # CMA-ES's own choice
    options = {
        "seed": config.seed + 1 + 1000 * restarts,  # 0 would ask for the clock's
        "popsize": (config.population or usual) * 2**restarts,
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(rules.start, config.sigma, options)


def tune(config: Config, say: Callable[[str], None] = lambda line: None) -> str:
    """Run or go on with a search; returns the best policy: its folder, or its name."""
    out = Path(config.out)
    _check(config)
    config = open_run(config)
    rules: Any = TemplateRules(config) if config.template else KnobRules(config)
    check_evaluations(evaluation_of(config), config.eval_seeds)
    files = [config.template, *map(str, config.set.values())]
    chosen = choose(config.workers, config.ray, config.ray_address, files)
    start_run(config)
    rng = np.random.default_rng([config.seed, 3])
    search, restarts = new_search(rules, config, 0), 0
    spent, best, name, last_eval = 0, -np.inf, "", 0
    saved = load_checkpoint(out) if config.resume else None
    if saved is not None:
        search = pickle.loads(saved["search"].tobytes())  # made by this program; policy folders never are
        rng.bit_generator.state = json.loads(saved["rng"])
        spent, best, name, last_eval = saved["spent"], saved["best"], saved["name"], saved["last_eval"]
        restarts = saved["restarts"]
        np.random.set_state(tuple(saved["numpy"]))  # noqa: NPY002

    path = cut_progress(out, spent)
    with chosen as places, opened(places) as pool, console.progress_bar("decisions") as progress:
        progress(spent, config.steps)
        while spent < config.steps:
            seeds = rng.choice(TRAINING_SEEDS, config.episodes, replace=False).tolist()
            candidates = search.ask()
            found, decisions = rules.utilities(candidates, seeds, pool)
            search.tell(candidates, (-found).tolist())
            spent += decisions
            line = {"step": spent, "mean_utility": float(found.mean()), "best_utility": float(found.max())}
            converged = bool(search.stop())
            if converged or spent - last_eval >= config.eval_every or spent >= config.steps:
                last_eval = spent
                summary = {**settings_of(config), "step": spent}
                judged = rules.write(search.mean, out / "candidate", summary)
                figures = selection(judged, config, pool)
                line |= {f"eval/{k}": v for k, v in figures.items()}
                if figures["mean_utility"] > best:
                    best = figures["mean_utility"]
                    name = rules.write(search.mean, out / "policy", {**summary, "selection": figures})
            if converged:
                restarts += 1
                search = new_search(rules, config, restarts)
                line["restarts"] = restarts
            with open(path, "a") as lines:
                lines.write(json.dumps(line) + "\n")
            say(json.dumps(line))
            progress(min(spent, config.steps), config.steps)
            state = {
                "search": np.frombuffer(search.pickle_dumps(), np.uint8),
                "rng": json.dumps(rng.bit_generator.state),
                "numpy": [v if isinstance(v, str) else np.asarray(v) for v in np.random.get_state()],  # noqa: NPY002
                "spent": spent,
                "restarts": restarts,
                "best": best,
                "name": name,
                "last_eval": last_eval,
            }
            save_checkpoint(out, spent, state)
    if config.kind == "linear" and not config.template:
        finish(name, *read_folder(name))  # a rule in numpy takes time, a constant is compiled
    return name


def _check(config: Config) -> None:
    """What CMA-ES and the choice of seeds cannot do with."""
    if config.population == 1:
        raise ConfigError("--population: expected at least 2, or 0, got 1")
    check_seeds("episodes", config.episodes, TRAINING_SEEDS)


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(tune(parse(Config, argv, __doc__, program)))


def main() -> int:
    return fail_in_one_line(command)


if __name__ == "__main__":
    from llmsched_gym.agents import tune as module  # under its one name, not this copy of it

    leave(module.main())
