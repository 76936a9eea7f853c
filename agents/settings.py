"""Options that several trainings have, each declared once: dataclasses that a command's `Config` is made of.

A docstring is the heading of help below which the options stand. Help follows the bases from the last to the first, so
`class Config(Looks, Network, World, Run)` lists the run first; a field that `Config` states again keeps its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmsched_gym.agents.options import MOST_ENVS, MOST_N_STEPS, option
from llmsched_gym.config import ACTIONS, ConfigError

MOST_THREADS = 1024  # torch does not survive very many

MOST_LAYERS = 64

RUN, WORLD, LEARNER, NETWORK = "The run", "The world", "The learner", "The network"  # for options of one command alone


@dataclass(frozen=True)
class Run:
    """The run."""

    out: str = option("runs/train", "folder of the run")
    resume: bool = option(False, "go on from the last checkpoint in --out, with the settings of its config.json")
    seed: int = option(0, "of everything that is random: weights, actions, minibatches, choice of episodes")


@dataclass(frozen=True)
class World:
    """The world."""

    suite: str = option("default", "suite to train on")
    set: dict[str, Any] = option({}, "any other field of EnvConfig, as --set qps=1.8; may be repeated")  # noqa: RUF009


@dataclass(frozen=True)
class Decisions:
    """The world."""

    action: str = option("knobs", "what the agent decides", choices=tuple(ACTIONS))
    action_repeat: int = option(8, "batches that one action decides (1 for request actions)")
    reward_scale: float = option(0.02, "factor on the reward")


@dataclass(frozen=True)
class Proximal:
    """The learner."""

    steps: int = option(2_000_000, "decisions to train on, over all environments")
    num_envs: int = option(128, "environments side by side", most=MOST_ENVS)
    n_steps: int = option(64, "decisions per environment and iteration", most=MOST_N_STEPS)
    batch_size: int = option(2048, "of a minibatch")
    epochs: int = option(4, "passes over an iteration's data")
    learning_rate: float = option(5e-4, "at the start")
    anneal: bool = option(True, "let the learning rate fall to 0 linearly")
    tau_s: float = option(120.0, "time constant of the per-second discount")
    gae_lambda: float = option(0.97, "lambda of the advantage", most=1.0)
    clip: float = option(0.2, "PPO's clip range")
    entropy: float = option(0.002, "weight of the entropy bonus")
    warm_start: str = option("", "run to start from, weights.pt of agents.imitate, or policy folder (actor only)")
    threads: int = option(1, "threads of torch; more pay only with large networks on idle cores", most=MOST_THREADS)


@dataclass(frozen=True)
class Network:
    """The network."""

    hidden: tuple[int, ...] = option((64, 64), "widths of the layers")
    activation: str = option("tanh", "between layers", choices=("tanh", "relu"))


@dataclass(frozen=True)
class Evaluations:
    """Looking and saving."""

    eval_every: int = option(250_000, "decisions between evaluations on selection seeds")
    eval_seeds: int = option(4, "selection seeds (2000, 2001, ...)")
    eval_requests: int = option(500, "measured requests of an evaluation run")


@dataclass(frozen=True)
class Looks(Evaluations):
    """Looking and saving."""

    checkpoint_every: int = option(250_000, "decisions between checkpoints")


@dataclass(frozen=True)
class Spread:
    """Where it runs."""

    workers: int = option(2, "processes; no figure depends on it")
    ray: bool = option(False, "run on a Ray started here, of so many processes")
    ray_address: str = option("", "run on the Ray cluster at this address")


def check_sizes(batch_size: int, num_envs: int, n_steps: int) -> None:
    """ConfigError for minibatches or rollouts of a single decision: advantages are normalised."""
    for size, what in ((batch_size, "batch_size"), (num_envs * n_steps, "num_envs * n_steps")):
        if size < 2:
            raise ConfigError(f"{what}: expected 2 or more, as advantages are normalised, got {size}")
