"""Record data sets for offline learning: ``llmsched record --policy slai,on-time,mixed --out datasets``.

Each policy becomes a data set of Minari, ``llmsched/SUITE-ACTION/POLICY-v0``: observations, actions, rewards, and in
infos the ``duration_s`` and ``discount`` of each step, without which returns of steps of different lengths mean little.
What is stored is what was stepped: a policy's decision is turned into the nearest action of the environment, and that
acts. ``mixed`` is a different policy in each episode, one that draws its actions among them, and a share of random
decisions in all: data from which something better than its makers can be learned.
``minari.load_dataset("llmsched/default-knobs/mixed-v0")`` reads one, ``examples/offline.py`` learns from it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import llmsched_gym
from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.agents.seeds import TRAINING_SEEDS
from llmsched_gym.config import SUITES, ConfigError, env_config, split_names
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.evaluation.spread import choose, opened, spread
from llmsched_gym.files import check_place, claim_folder, json_with
from llmsched_gym.interrupts import leave
from llmsched_gym.policies.bridge import SchedulerPolicy
from llmsched_gym.report import console
from llmsched_gym.text import counted

RANDOM, MIXED = "random", "mixed"
MIXTURE = ("sarathi", "sarathi-spf", "slai", "slai[hold=true]", "tuned-constant", "on-time", RANDOM)
"""Policies of `mixed`, one an episode; those that the environment's actions cannot express are left out."""
STORED = ("duration_s", "discount")  # of infos


@dataclass(frozen=True)
class Config:
    policy: str = option("slai,on-time,mixed", "policies, separated by commas; mixed and random are ours")
    out: str = option("", "folder of the data sets; Minari's own unless given")
    suite: str = option("default", "suite to record on")
    set: dict[str, Any] = option({}, "any other field of EnvConfig, as --set qps=1.8; may be repeated")  # noqa: RUF009
    action: str = option("knobs", "what is decided", choices=("knobs", "preset"))
    observation: str = option("features", "what is seen", choices=("features", "slots"))
    action_repeat: int = option(8, "batches that one action decides")
    episodes: int = option(100, "of each data set")
    first_seed: int = option(TRAINING_SEEDS.start, "seed of the first episode; each has the next")
    random_share: float = option(0.1, "share of mixed's decisions that are drawn, 0 to 1")
    workers: int = option(1, "processes")

    def world(self) -> dict[str, Any]:
        """Fields of the environment."""
        actions = {"action": self.action, "observation": self.observation, "action_repeat": self.action_repeat}
        return {**self.set, **actions}


SETS = tuple(f"{'*/' * depth}data/metadata.json" for depth in (1, 2, 3))
"""By which a folder of data sets is known; a set's name has up to three parts."""

Episode = dict[str, Any]
"""Arrays over steps: observations and infos (one more than steps), actions, rewards, terminations, truncations."""


def play(suite: str, world: dict[str, Any], policy: str, seed: int, random_share: float) -> Episode:
    """One episode in which `policy` decides, and `random_share` of its decisions are drawn from the action space."""
    env = LLMSchedEnv(suite, **world)
    rng = np.random.default_rng(seed)
    env.action_space.seed(seed)
    observation, info = env.reset(seed=seed)
    asked = None if policy == RANDOM else SchedulerPolicy(env, policy)
    observations, infos, actions, rewards, over = [observation], [info], [], [], False
    terminated = truncated = False
    while not over:
        drawn = asked is None or rng.random() < random_share
        action = np.array(env.action_space.sample() if drawn or asked is None else asked.action())
        observation, reward, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        observations.append(observation)
        infos.append(info)
        actions.append(action)
        rewards.append(reward)
    ends = np.zeros((2, len(rewards)), bool)
    ends[:, -1] = terminated, truncated
    return {
        "seed": seed,
        "observations": _stacked(observations),
        "actions": np.stack(actions),
        "rewards": np.array(rewards, np.float32),
        "terminations": ends[0],
        "truncations": ends[1],
        "infos": {name: np.array([step[name] for step in infos], np.float64) for name in STORED},
    }


def _stacked(observations: Sequence[Any]) -> Any:
    if isinstance(observations[0], dict):
        return {name: np.stack([o[name] for o in observations]) for name in observations[0]}
    return np.stack(observations)


def makers(config: Config, policy: str) -> list[str]:
    """Which policy decides in each episode of a data set; ConfigError where one cannot."""
    env = LLMSchedEnv(config.suite, **config.world())
    env.reset(seed=0)

    def express(name: str) -> None:
        if name != RANDOM:
            SchedulerPolicy(env, name).action()

    if policy != MIXED:
        express(policy)
        return [policy] * config.episodes
    able = []
    for name in MIXTURE:
        try:
            express(name)
        except ConfigError:
            continue
        able.append(name)
    return [able[i % len(able)] for i in range(config.episodes)]


def dataset_id(config: Config, policy: str) -> str:
    """The name that Minari knows a policy's data set by."""
    suite, own = (re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-") for name in (Path(config.suite).stem, policy))
    return f"llmsched/{suite}-{config.action}/{own}-v0"


def import_minari(out: str) -> Any:
    """Minari, with `out` as its folder, made if need be; ConfigError with one line where it is not installed."""
    if out:
        os.environ["MINARI_DATASETS_PATH"] = str(Path(out).absolute())
    try:
        import h5py  # noqa: F401
        import minari
    except ImportError as error:
        raise ConfigError(f"llmsched record needs {error.name}: pip install '.[record]'") from None
    return minari


def record(config: Config, policy: str, minari: Any, progress: Any) -> str:
    """Make a policy's data set; its name."""
    from minari.data_collector import EpisodeBuffer

    name = dataset_id(config, policy)
    share = config.random_share if policy == MIXED else 0.0
    cells = [
        (config.suite, config.world(), maker, config.first_seed + i, share)
        for i, maker in enumerate(makers(config, policy))
    ]
    found: list[Episode] = [{}] * len(cells)
    with choose(config.workers) as places, opened(places) as pool:
        for done, (i, episode) in enumerate(spread(pool, play, cells), 1):
            found[i] = episode
            progress(done, len(cells))
    buffers = [EpisodeBuffer(id=i, **episode) for i, episode in enumerate(found)]
    known = config.suite in SUITES
    env = (
        gym.make(SUITES[config.suite].env_id, **config.world())
        if known
        else LLMSchedEnv(config.suite, **config.world())
    )
    spaces = {"action_space": env.action_space, "observation_space": env.observation_space}
    text = f"{counted(len(found), 'episode')} of {policy} on {config.suite}, seeds {config.first_seed} and on"
    minari.create_dataset_from_buffers(
        name,
        buffers,
        env=env if known else None,
        eval_env=env if known else None,
        algorithm_name=policy,
        description=f"{text}; a step's discount and duration_s are in its infos.",
        requirements=[f"llmsched-gym=={llmsched_gym.__version__}"],
        author="llmsched record",
        author_email="-",
        code_permalink="-",
        **({} if known else spaces),
    )
    return name


def run(config: Config) -> list[str]:
    """Record all data sets; their names."""
    env_config(config.suite, **config.world())
    if config.out:
        claim_folder(Path(config.out), "data set of Minari", dict.fromkeys(SETS, json_with("dataset_id")))
        check_place(Path(config.out))
    if not 0.0 <= config.random_share <= 1.0:
        raise ConfigError(f"--random-share: expected a number from 0 to 1, got {config.random_share:g}")
    policies = split_names([config.policy])
    for policy in policies:
        makers(config, policy)
    minari = import_minari(config.out)
    there = set(minari.list_local_datasets())  # makes the folder
    for policy in policies:
        if dataset_id(config, policy) in there:
            raise ConfigError(f"{dataset_id(config, policy)} is there already; name another --out, or delete it")
    names = []
    for policy in policies:
        with console.progress_bar(f"episodes of {policy}") as progress:
            names.append(record(config, policy, minari, progress))
    return names


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Parse the command line, record, and print the names of the data sets."""
    for name in run(parse(Config, argv, __doc__, program)):
        print(name)


if __name__ == "__main__":
    leave(fail_in_one_line(lambda: command(), "interrupted"))
