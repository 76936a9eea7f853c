"""What RLlib trains and reports, beside the truth: episodes, presets against Sarathi-Serve, a kill, the policy folder.

    python -m benchmarks.rllib_check [--section episodes,masks,resume,train,folder] [--algorithm ppo] [--seconds 300]
                                     [--out out/rllib]

episodes: returns, lengths and last observations of RLlib's env runners, and those of single environments under the
same actions. train: a policy of presets after so many seconds, against `sarathi` on seeds that it has not seen.
resume: the training killed after a checkpoint, and gone on with. folder: returns of RLlib's module, acting greedily,
and of the policy folder in runs of `llmsched evaluate`. masks: no illegal request action in a short training.

Prints a line a check and exits with 1 if one fails. Needs ``pip install 'llmsched-gym[rllib]'`` and Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import new_folder
from llmsched_gym.agents import rllib
from llmsched_gym.agents.rllib_env import RLlibVectorEnv
from llmsched_gym.config import ConfigError, env_config
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.ray_pool import NO_CLUSTER, RayPool
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.files import json_with, write_text
from llmsched_gym.help_text import OneLineParser, place
from llmsched_gym.report import intervals

MARK = "checks.json"  # by which a folder is known as one of this module
FIRST_SEED, SEEDS = 3000, 10  # neither trained nor selected on
MASKED = 12_000  # request actions of a short training
SHORT = {"horizon_s": 20.0}


Normaliser = tuple[np.ndarray, np.ndarray]  # mean and scale of the features


def as_it_is(config: rllib.Config) -> Normaliser:
    """Leaves features alone."""
    size = RLlibVectorEnv(1, config.suite, **config.world()).mean.size
    return np.zeros(size, np.float32), np.ones(size, np.float32)


def runner(config: rllib.Config, normaliser: Normaliser, **env: Any) -> Any:
    """RLlib's env runner in this process."""
    from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

    made = rllib.algorithm_config(config, *normaliser, **env).env_runners(batch_mode="complete_episodes")
    return SingleAgentEnvRunner(config=made, worker_index=0)


def episodes(args: argparse.Namespace) -> bool:
    """What env runners report is what single environments do with the same actions."""
    config = rllib.Config(algorithm=args.algorithm, env_runners=0, num_envs=3, set=SHORT)
    seeds = list(range(FIRST_SEED, FIRST_SEED + 12))
    sampled = runner(config, as_it_is(config), seeds=seeds).sample(num_episodes=9, explore=True)
    env, wrong = LLMSchedEnv(config.suite, **config.world()), 0
    for episode in sampled:
        seed = int(episode.get_infos(0)["seed"])
        observation, _ = env.reset(seed=seed)
        total, over = 0.0, False
        for action in episode.get_actions():
            assert not over
            observation, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        same = np.array_equal(observation, episode.get_observations(-1)) and over == episode.is_done
        wrong += not (same and np.isclose(total, episode.get_return(), rtol=1e-6) and seed in seeds)
    steps = sum(map(len, sampled))
    print(
        f"{len(sampled)} episodes of {steps} decisions by RLlib's env runner: {wrong} differ from single environments"
    )
    return len(sampled) >= 9 and wrong == 0


def command(args: argparse.Namespace, *more: str) -> list[str]:
    """The command line of a training."""
    start = [sys.executable, "-m", "llmsched_gym.agents.rllib", "--algorithm", args.algorithm]
    return [*start, "--steps", "100000000", *more]


def train(args: argparse.Namespace) -> bool:
    """Presets are above Sarathi-Serve after so many seconds."""
    out = args.out / "train"
    subprocess.run(
        command(args, "--out", str(out), "--max-s", str(args.seconds)), check=True, stdout=subprocess.DEVNULL
    )
    steps = [json.loads(line)["step"] for line in (out / "progress.jsonl").read_text().splitlines()][-1]
    return above(out / "policy", f"{args.algorithm}, {steps:,} decisions in {args.seconds:g} s")


def above(folder: Path, what: str) -> bool:
    """Whether the policy's mean utility is above that of `sarathi`, with an interval clear of zero."""
    policies = [str(folder), "sarathi"]
    rows = evaluate(env_config("default", num_requests=1000), policies, seeds=SEEDS, first_seed=FIRST_SEED)
    mine, base = ([r["mean_utility"] for r in rows if r["policy"] == name] for name in policies)
    bounds = intervals.difference(mine, base) or (-np.inf, np.inf)
    print(f"{what}: mean utility {np.mean(mine):.4f}, sarathi {np.mean(base):.4f}, difference "
          f"{np.mean(mine) - np.mean(base):+.4f} [{bounds[0]:+.4f}, {bounds[1]:+.4f}]")  # fmt: skip
    return bounds[0] > 0


def resume(args: argparse.Namespace) -> bool:
    """A training killed after its first checkpoint goes on from it."""
    out = args.out / "resume"
    more = ["--out", str(out), "--checkpoint-every", "20000", "--eval-every", "20000"]
    process = subprocess.Popen(command(args, *more, "--max-s", "600"), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not rllib.checkpoints(out) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    held = json.loads((rllib.checkpoints(out)[0] / "run.json").read_text())
    done = subprocess.run(command(args, *more, "--max-s", "15", "--resume"), stdout=subprocess.DEVNULL)
    steps = [json.loads(line)["step"] for line in (out / "progress.jsonl").read_text().splitlines()]
    best = [json.loads(line).get("eval/mean_utility") for line in (out / "progress.jsonl").read_text().splitlines()]
    found = max(value for value in best if value is not None)
    goes_on = done.returncode == 0 and steps == sorted(set(steps)) and steps[-1] > held["step"] > 0
    kept = json.loads((out / "policy" / "policy.json").read_text())["training"]["selection"]["mean_utility"]
    print(f"killed at {held['step']:,} decisions, gone on to {steps[-1]:,}: {goes_on}; best {kept:.4f} of {found:.4f}")
    return goes_on and kept == found


def folder(args: argparse.Namespace) -> bool:
    """The module's greedy returns are those of its policy folder."""
    from ray.rllib.core.rl_module.rl_module import RLModule

    from llmsched_gym.agents.rllib_modules import export

    config = rllib.Config(algorithm=args.algorithm, env_runners=0, num_envs=4, set={"num_requests": 200})
    kept = [path for name in ("train", "resume") for path in rllib.checkpoints(args.out / name)]
    normaliser, seeds = as_it_is(config), list(range(FIRST_SEED, FIRST_SEED + 8))
    if kept:
        state = json.loads((kept[0] / "run.json").read_text())
        normaliser = np.array(state["mean"], np.float32), np.array(state["scale"], np.float32)
    found = runner(config, normaliser, seeds=seeds)
    if kept:
        trained = RLModule.from_checkpoint(kept[0].resolve() / "learner_group/learner/rl_module/default_policy")
        found.module.set_state(trained.get_state())
    sampled = found.sample(num_episodes=8, explore=False)
    told = {int(e.get_infos(0)["seed"]): float(e.get_return()) for e in sampled}
    actions = len(set(np.concatenate([e.get_actions() for e in sampled]).tolist()))
    world = env_config(config.suite, **config.world())
    spec, tensors = export(found.module, world, *normaliser, config.activation)
    rllib.write_folder(args.out / "folder", spec, tensors)
    scale = config.reward_scale * 200
    worst = 0.0
    for seed, total in told.items():
        run = row(simulate(world, str(args.out / "folder"), seed))
        worst = max(worst, abs(run["mean_utility"] * scale - total))
    what = f"{len(told)} runs of a {'trained' if kept else 'new'} module, {actions} different actions"
    print(f"{what}: its folder's returns differ by at most {worst:.1e} of {np.mean(list(told.values())):.3f}")
    return len(told) >= 8 and worst < 1e-5


def masks(args: argparse.Namespace) -> bool:
    """Request actions, of which most are illegal at any time: an illegal one would raise."""
    config = rllib.Config(algorithm=args.algorithm, action="request", env_runners=1, num_envs=8, set=SHORT)
    config = dataclasses.replace(config, batch_size=1024, minibatch_size=256)
    with RayPool(3):
        made = rllib.algorithm_config(config, *as_it_is(config)).build_algo()
        end = time.monotonic() + 120
        while (done := int(made.metrics.peek(rllib.SAMPLED, default=0))) < MASKED and time.monotonic() < end:
            made.train()
        made.stop()
    print(f"{args.algorithm}: {done:,} request actions, none of them illegal")
    return done >= MASKED


SECTIONS = {"episodes": episodes, "masks": masks, "resume": resume, "train": train, "folder": folder}


def main() -> int:
    parser = OneLineParser(prog="python -m benchmarks.rllib_check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--section", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--algorithm", default="ppo", choices=("ppo", "appo", "dqn"))
    parser.add_argument("--seconds", type=float, default=300.0, help="of the training of presets")
    parser.add_argument(
        "--out", type=place, default=Path("out/rllib"), help="folder, new or of this module, which is emptied"
    )
    args = parser.parse_args()
    os.environ.setdefault(NO_CLUSTER, "0")  # where RLlib starts Ray itself, on loopback alone
    sections = args.section.split(",")
    for name in sections:
        if name not in SECTIONS:
            parser.error(f"--section: expected some of {', '.join(SECTIONS)}, got {name!r}")
    try:
        new_folder(args.out, {MARK: json_with("sections", "algorithm")})
    except ConfigError as error:
        parser.error(str(error))
    write_text(args.out / MARK, json.dumps({"sections": sections, "algorithm": args.algorithm}) + "\n")
    failed = [name for name in sections if not SECTIONS[name](args)]
    print(f"failed: {', '.join(failed)}" if failed else "all as it should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
