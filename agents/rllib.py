"""Train PPO, APPO or DQN with RLlib: ``python -m llmsched_gym.agents.rllib --out runs/rllib``.

Env runners are Ray's actors, each with a native vector environment; Ray is started here, on 127.0.0.1 alone, unless
``--ray-address`` names a cluster. A run folder holds config.json, checkpoints, progress.jsonl (one line an iteration),
`best` (the policy folder with the highest mean utility on selection seeds so far) and at the end `policy`, the same
with its decision time measured. ``--resume`` goes on from the last checkpoint: with its weights and optimiser, on
other episodes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.agents.decision_time import finish
from llmsched_gym.agents.options import MOST_ENVS, MOST_WORKERS, fail_in_one_line, option, parse
from llmsched_gym.agents.rllib_env import ENV_ID, is_masked, typical
from llmsched_gym.agents.run_folder import checkpoints, cut_progress, open_run, settings_of, start_run
from llmsched_gym.agents.seeds import SELECTION_SEEDS, check_evaluations, evaluation_of
from llmsched_gym.agents.settings import LEARNER, RUN, Decisions, Looks, Network, Run, World
from llmsched_gym.config import ACTIONS, ConfigError, EnvConfig, env_config
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.ray_pool import RayPool
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.files import write_text
from llmsched_gym.interrupts import leave
from llmsched_gym.policies import LoadedPolicy, read_folder, write_folder

KEPT = 2  # checkpoints
SAMPLED = ("env_runners", "num_env_steps_sampled_lifetime")  # where an algorithm counts its decisions


@dataclass(frozen=True)
class Config(Looks, Network, Decisions, World, Run):
    out: str = option("runs/rllib", "folder of the run")
    ray_address: str = option("", "run on the Ray cluster at this address", group=RUN)
    action: str = option("preset", "what the agent decides", choices=tuple(ACTIONS))
    algorithm: str = option("ppo", "of RLlib", choices=("ppo", "appo", "dqn"), group=LEARNER)
    steps: int = option(1_000_000, "decisions to train on, over all environments", group=LEARNER)
    env_runners: int = option(2, "processes that sample", group=LEARNER, most=MOST_WORKERS)
    num_envs: int = option(32, "environments of each", group=LEARNER, most=MOST_ENVS)
    batch_size: int = option(
        8192, "decisions of an iteration of PPO, and of a batch of APPO or DQN where smaller", group=LEARNER
    )
    minibatch_size: int = option(1024, "of PPO", group=LEARNER)
    epochs: int = option(4, "passes of PPO over an iteration's data", group=LEARNER)
    learning_rate: float = option(5e-4, "of the optimiser", group=LEARNER)
    gamma: float = option(0.998, "discount of a decision", group=LEARNER, most=1.0)
    gae_lambda: float = option(0.97, "lambda of PPO's advantage", group=LEARNER, most=1.0)
    clip: float = option(0.2, "PPO's and APPO's clip range", group=LEARNER)
    entropy: float = option(0.002, "weight of the entropy bonus of PPO and APPO", group=LEARNER)
    max_s: float = option(0.0, "seconds of training after which to stop before --steps; 0: never", group=LEARNER)
    eval_every: int = option(100_000, "decisions between evaluations on selection seeds")
    checkpoint_every: int = option(100_000, "decisions between checkpoints")

    def world(self) -> dict[str, Any]:
        """Fields of the environment."""
        repeat = int(min(self.action_repeat, ACTIONS[self.action]))
        return {"action": self.action, "action_repeat": repeat, "reward_scale": self.reward_scale, **self.set}


def algorithm_config(config: Config, mean: np.ndarray, scale: np.ndarray, start: int = 0, **env: Any) -> Any:
    """RLlib's configuration; `start` tells the episodes of a run that goes on apart, `env` goes to the environment."""
    from ray.rllib.algorithms.appo import APPOConfig
    from ray.rllib.algorithms.dqn import DQNConfig
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    from llmsched_gym.agents.rllib_modules import MASKED

    made = {"ppo": PPOConfig, "appo": APPOConfig, "dqn": DQNConfig}[config.algorithm]()
    given = {"suite": config.suite, "mean": mean.tolist(), "scale": scale.tolist(), "start": start, **config.world()}
    network = DefaultModelConfig(
        fcnet_hiddens=list(config.hidden), fcnet_activation=config.activation, vf_share_layers=False
    )
    module = MASKED[config.algorithm] if is_masked(env_config(config.suite, **config.world())) else None
    made = (
        made.environment(
            f"llmsched_gym.agents.rllib_env:{ENV_ID}", env_config={**given, **env}, disable_env_checking=True
        )
        .env_runners(
            num_env_runners=config.env_runners,
            num_envs_per_env_runner=config.num_envs,
            gym_env_vectorize_mode="vector_entry_point",
            rollout_fragment_length="auto",
        )
        .learners(num_learners=0)
        .rl_module(model_config=network, rl_module_spec=RLModuleSpec(module_class=module) if module else None)
        .debugging(seed=config.seed, log_level="ERROR")
    )
    each = max(1, config.env_runners) * config.num_envs
    if config.algorithm == "ppo":
        return made.training(
            train_batch_size_per_learner=config.batch_size,
            minibatch_size=min(config.minibatch_size, config.batch_size),
            num_epochs=config.epochs,
            lr=config.learning_rate,
            gamma=config.gamma,
            lambda_=config.gae_lambda,
            clip_param=config.clip,
            entropy_coeff=config.entropy,
            vf_clip_param=float("inf"),
            use_kl_loss=False,
            grad_clip=0.5,
        )
    if config.algorithm == "appo":
        made = made.env_runners(rollout_fragment_length=32)
        return made.training(
            train_batch_size_per_learner=min(config.batch_size, 32 * each),
            lr=config.learning_rate,
            gamma=config.gamma,
            clip_param=config.clip,
            entropy_coeff=config.entropy,
            grad_clip=0.5,
        )
    return made.env_runners(rollout_fragment_length=4).training(
        train_batch_size_per_learner=min(config.batch_size, 512),
        lr=config.learning_rate,
        gamma=config.gamma,
        training_intensity=1.0,
        target_network_update_freq=4000,
        num_steps_sampled_before_learning_starts=10_000,
        epsilon=[(0, 1.0), (100_000, 0.05)],
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 200_000},
    )


class Best:
    """The policy folder with the highest mean utility on selection seeds so far."""

    def __init__(self, config: Config, folder: Path, mean: np.ndarray, scale: np.ndarray) -> None:
        self.config, self.folder, self.normaliser = config, folder, (mean, scale)
        self.world: EnvConfig = env_config(config.suite, **config.world())
        self.utility = -np.inf

    def look(self, algorithm: Any, step: int) -> dict[str, float]:
        """Evaluate the algorithm's module as `llmsched evaluate` would, and keep it if it is better."""
        from llmsched_gym.agents.rllib_modules import export

        config = self.config
        spec, tensors = export(algorithm.get_module(), self.world, *self.normaliser, config.activation)
        scenario = evaluation_of(config)
        seeds = SELECTION_SEEDS[: config.eval_seeds]
        rows = [row(simulate(scenario, LoadedPolicy(spec, tensors), seed)) for seed in seeds]
        found = {name: float(np.mean([r[name] for r in rows])) for name in ("mean_utility", "slo_attainment")}
        if found["mean_utility"] > self.utility:
            self.utility = found["mean_utility"]
            training = {**settings_of(config), "trained_with": "rllib", "step": step, "selection": found}
            spec = type(spec)(**{**vars(spec), "training": training})
            write_folder(self.folder, spec, tensors)
        return found


def save(algorithm: Any, out: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, put in place as a whole; the last `KEPT` stay."""
    partial, path = out / ".checkpoint", out / f"checkpoint-{state['step']:012d}"
    shutil.rmtree(partial, ignore_errors=True)
    algorithm.save_to_path(str(partial.resolve()))
    write_text(partial / "run.json", json.dumps(state))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    for stale in checkpoints(out)[KEPT:]:
        shutil.rmtree(stale)


def train(config: Config) -> Path:
    """Run or go on with a training; returns the folder of the policy."""
    out = Path(config.out)
    config = open_run(config)
    _check(config)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("rllib: ray is not installed: pip install 'llmsched-gym[rllib]'")
    with ExitStack() as stack:
        # RLlib's actors ask for a CPU each, and some algorithms for more: on one machine these are but numbers
        stack.enter_context(RayPool(config.env_runners + 2, config.ray_address or None))
        try:
            importlib.import_module("llmsched_gym.agents.rllib_modules")
        except ModuleNotFoundError as error:
            raise ConfigError(f"rllib: {error.name} is not installed: pip install 'llmsched-gym[rllib]'") from None
        _train(config, out, stack)
    return finish(out / "policy", *read_folder(out / "best"))


def _train(config: Config, out: Path, stack: ExitStack) -> None:
    kept = checkpoints(out) if config.resume else []
    state: dict[str, Any] = {"step": 0, "best": None, "last_eval": 0}
    if kept:
        state = json.loads((kept[0] / "run.json").read_text())
        mean, scale = (np.array(state[name], np.float32) for name in ("mean", "scale"))
    else:
        seen = typical(config.suite, config.seed, config.world())
        mean, scale = seen.mean(0).astype(np.float32), (1.0 / (seen.std(0) + 0.05)).astype(np.float32)
        start_run(config)
        state |= {"mean": mean.tolist(), "scale": scale.tolist()}
    best = Best(config, out / "best", mean, scale)
    best.utility = -np.inf if state["best"] is None else state["best"]
    first = last_checkpoint = state["step"]
    lines = cut_progress(out, first)
    algorithm = algorithm_config(config, mean, scale, start=first).build_algo()
    stack.callback(algorithm.stop)
    if kept:
        algorithm.restore_from_path(str(kept[0].resolve()))
    done, begun_s = _sampled(algorithm), time.monotonic()
    ends = first >= config.steps
    while not ends:
        found = algorithm.train()
        step = first + _sampled(algorithm) - done
        ends = step >= config.steps or 0 < config.max_s <= time.monotonic() - begun_s
        line = {"step": step, "seconds": time.monotonic() - begun_s, "return": _return(found)}
        if ends or step - state["last_eval"] >= config.eval_every:
            state["last_eval"] = step
            line |= {f"eval/{name}": value for name, value in best.look(algorithm, step).items()}
            print(json.dumps(line), file=sys.stderr, flush=True)
        with open(lines, "a") as progress:
            progress.write(json.dumps(line) + "\n")
        if ends or step - last_checkpoint >= config.checkpoint_every:
            last_checkpoint = step
            save(algorithm, out, state | {"step": step, "best": best.utility})


def _sampled(algorithm: Any) -> int:
    """Decisions over the algorithm's life, as it counts them."""
    return int(algorithm.metrics.peek(SAMPLED, default=0))


def _return(found: dict[str, Any]) -> float | None:
    value = found.get("env_runners", {}).get("episode_return_mean")
    return None if value is None or not np.isfinite(value) else float(value)


def _check(config: Config) -> None:
    world = env_config(config.suite, **config.world())
    if world.observation != "features":
        raise ConfigError(f"observation: expected features with RLlib, got {world.observation!r}")
    if config.algorithm == "dqn" and config.action not in ("preset", "request"):
        raise ConfigError(
            f"action: expected preset or request with dqn, which takes one of a list, got {config.action!r}"
        )
    if config.algorithm == "appo" and config.env_runners < 1:
        raise ConfigError("--env-runners: expected a whole number >= 1 with appo")
    check_evaluations(evaluation_of(config), config.eval_seeds)


def command(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Run the command line; raises what is wrong with it."""
    print(train(parse(Config, argv, __doc__, program)))


def main() -> int:
    return fail_in_one_line(command)


if __name__ == "__main__":
    from llmsched_gym.agents import rllib as module  # under its one name, not this copy of it

    leave(module.main())
