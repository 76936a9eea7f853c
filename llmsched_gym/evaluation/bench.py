"""How fast the engine, a whole evaluation and the environments are on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from llmsched_gym.config import blocks_needed, scenario
from llmsched_gym.engine import Batch, View
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.paper.constants import LOADS, NUM_REQUESTS, PAPER_POLICIES

ENGINE_QPS = 1.4  # about 30 requests run at a time
ENGINE_REQUESTS = 4000
REPEATS = 10
NUM_ENVS = (1, 64, 1024)
ENV_STEPS = 60_000
MAX_CALLS = 20_000  # of a vector env

Note = Callable[[str], None]


class PlainSarathi:
    """Sarathi-Serve as a plain-Python scheduler: all decodes, then chunks of prompts first come first served."""

    budget = 512

    def schedule(self, view: View) -> Batch:
        """Decodes first, started prompts next, then waiting ones while blocks and sequences last."""
        tokens = {int(r): 1 for r in view.decodes.index[: self.budget]}
        room = self.budget - len(tokens)
        for r in view.prefills:
            if room > 0:
                tokens[int(r.index)] = n = min(room, int(r.prefill_tokens - r.num_computed_tokens))
                room -= n
        free, seqs = view.free_blocks - view.watermark_blocks - len(tokens), len(view.running)
        for r in view.waiting:
            free -= blocks_needed(int(r.prefill_tokens), view.block_size)
            seqs += 1
            if room <= 0 or free < 0 or seqs > view.max_num_seqs:
                break
            tokens[int(r.index)] = n = min(room, int(r.prefill_tokens))
            room -= n
        return Batch(tokens)


def bench(quick: bool = False, note: Note = lambda text: None) -> dict[str, Any]:
    """All figures as one object; `quick` shrinks the grid and says so in its keys. `note` hears what is going on."""
    note("engine")
    figures: dict[str, Any] = {
        "engine_iterations_per_s": {policy: _engine(policy) for policy in PAPER_POLICIES},
        "engine_setting": {"suite": "paper", "qps": ENGINE_QPS, "mean_running": _mean_running(), "cores": 1},
        "machine": machine(),
        "reference": {"plain_python_scheduler_iterations_per_s": _engine(PlainSarathi(), requests=100, repeats=3)},
    }
    rates, requests = ((1.0, 1.8), 4096) if quick else (LOADS, NUM_REQUESTS)
    note("evaluation grid")
    start = time.perf_counter()
    evaluate(scenario("paper", num_requests=requests), PAPER_POLICIES, qps=rates, seeds=1, workers=None)
    key = "evaluate_quick" if quick else "evaluate"
    figures[f"{key}_wall_s"] = time.perf_counter() - start
    figures[f"{key}_grid"] = {
        "policies": len(PAPER_POLICIES),
        "loads": len(rates),
        "num_requests": requests,
        "seeds": 1,
    }
    note("environments")
    environments, reference = _environments(quick)
    figures |= environments
    figures["reference"] |= reference
    return figures


def _engine(policy: Any, requests: int = ENGINE_REQUESTS, repeats: int = REPEATS) -> float:
    """Iterations per second of one core: the best of the repeats, which others on the machine disturbed least."""
    world = scenario("paper", num_requests=requests, qps=ENGINE_QPS)
    runs = [simulate(world, policy, seed=0) for _ in range(repeats + 1)][1:]
    return max(int(run.sim.num_batches) / run.wall_time_s for run in runs)


def _mean_running() -> float:
    world = scenario("paper", num_requests=ENGINE_REQUESTS, qps=ENGINE_QPS)
    steps = simulate(world, "sarathi", seed=0, num_steps=1_000_000).steps
    return float(np.average(steps["num_running"], weights=steps["duration_s"]))


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        cpu = names[0] if names else cpu
    except OSError:
        pass
    versions = {name: metadata.version(name) for name in ("numpy", "numba", "gymnasium")}
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _environments(quick: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Steps per second of our environments and of CartPole in the same run."""
    import llmsched_gym  # noqa: F401  registers the environments

    steps = ENV_STEPS // 10 if quick else ENV_STEPS
    ours, theirs = "LLMSched-v0", "CartPole-v1"
    figures = {
        "single_env_steps_per_s": _single(ours, steps),
        "vector_env_steps_per_s": {str(n): _vector(ours, n, steps) for n in NUM_ENVS},
        # random knobs serve badly, so more requests run at once and a step costs more
        "vector_env_steps_per_s_with_sarathi_knobs": {str(n): _vector(ours, n, steps, constant=True) for n in NUM_ENVS},
        "vector_env_steps_per_s_with_two_threads": {
            str(n): _vector(ours, n, steps, num_threads=2) for n in NUM_ENVS[1:]
        },
    }
    return figures, {
        "cartpole_single_env_steps_per_s": _single(theirs, steps),
        "cartpole_vector_env_steps_per_s": {str(n): _vector(theirs, n, steps) for n in NUM_ENVS},
    }


def _single(name: str, steps: int) -> float:
    """Steps per second of `gym.make` with random actions drawn beforehand."""
    import gymnasium as gym

    env = gym.make(name)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(1000)]
    env.reset(seed=0)

    def run(calls: int) -> None:
        for i in range(calls):
            _, _, terminated, truncated, _ = env.step(actions[i % 1000])
            if terminated or truncated:
                env.reset()

    seconds = _timed(run, steps)
    env.close()
    return steps / seconds


def _vector(name: str, num_envs: int, steps: int, constant: bool = False, **kwargs: Any) -> float:
    """Environment steps per second of the native vector env with random actions drawn beforehand, or with action 0.

    Further arguments are the environment's.
    """
    import gymnasium as gym

    envs = gym.make_vec(name, num_envs=num_envs, vectorization_mode="vector_entry_point", **kwargs)
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() * (not constant) for _ in range(16)]
    envs.reset(seed=0)

    def run(calls: int) -> None:
        for i in range(calls):
            envs.step(actions[i % 16])

    calls = min(max(100, steps // num_envs), MAX_CALLS)
    seconds = _timed(run, calls)
    envs.close()
    return calls * num_envs / seconds


def _timed(run: Callable[[int], None], calls: int) -> float:
    """Seconds that `calls` take: the best of three, behind a third of them to warm up."""
    run(max(20, calls // 3))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run(calls)
        times.append(time.perf_counter() - start)
    return min(times)
