"""What a step costs as queues and environments grow: ``python benchmarks/scaling.py [OLD] NEW``, a Markdown table.

Of each checkout, in a process of its own and in microseconds of processor time: an iteration of the engine with so many
requests running and waiting, and a step of one environment of so many side by side, with its slope, microseconds for
each thousand more waiting. Queues stand still: waiting prompts find no memory, and but for the last seconds' arrivals
all have missed their TTFT SLO. Under `overload` prompts come and go, at three requests a second on the paper's suite.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

SCHEDULERS = ("slai", "on-time")
RUNNING = (32, 128, 512)
WAITING = (0, 1000, 5700, 20000)
ENVS = (1, 16, 64, 256, 1024)
PROMPT, BLOCK, ITERATIONS = 100, 16, 800
LONG_PROMPT = 2000  # of those that wait
SETTLED_S = 8.0  # by then the queue has expired: TTFT SLOs are below 5 s


def _standing(running: int, waiting: int) -> tuple[Any, Any]:
    """A scenario and a table of so many requests that run for ever, and so many that wait for ever."""
    import llmsched_gym
    from llmsched_gym.workload import RequestTable

    arriving = 200 if waiting else 0  # 1.4 a second: some in the line are still in time
    n = running + waiting + arriving
    rng = np.random.default_rng(0)
    runs = np.arange(n) < running
    arrival_s = np.concatenate([np.zeros(running), np.linspace(1.0, 2.0, waiting), 3.0 + np.arange(arriving) / 1.4])
    prompt = np.where(runs, PROMPT, rng.integers(LONG_PROMPT, 2 * LONG_PROMPT, n))
    held, most = -(-PROMPT // BLOCK), -(-(PROMPT + 2 * ITERATIONS) // BLOCK)
    total = running * most
    world = llmsched_gym.scenario(
        "paper",
        num_requests=n,
        warmup_s=0.0,
        drain_s=1e6,
        patience_s=math.inf,
        max_num_seqs=running + 8,
        num_kv_blocks=total,
        watermark=(total - running * (held + 2) - LONG_PROMPT / BLOCK / 2) / total,
        jitter=0.0,
    )
    table = RequestTable(
        arrival_s=arrival_s,
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=np.where(runs, 2 * ITERATIONS, 1).astype(np.int32),
        slo_class=rng.integers(0, 2, n).astype(np.int8),
        ttft_slo_s=rng.uniform(1.0, 5.0, n),
        tbt_slo_s=rng.choice([0.1, 0.5], n),
        length_hint=np.full(n, math.nan),
        session_id=np.full(n, -1, np.int64),
        cohort_start=0,
        cohort_stop=n,
        qps=1.0,
        cost_scale=1.0,
        seed=0,
    )
    return world, table


def _overload(waiting: int) -> tuple[Any, Any]:
    """The paper's suite at 3 requests a second, behind so many that have been waiting since the start."""
    import llmsched_gym
    from llmsched_gym.workload import make_table

    n = waiting + 600
    world = llmsched_gym.scenario("paper", num_requests=n, qps=3.0 if waiting else 1.4, warmup_s=0.0)
    world = replace(world, patience_s=math.inf)
    table = make_table(world, 0)
    arrival_s = np.maximum(0.0, table.arrival_s - table.arrival_s[waiting])
    return world, replace(table, arrival_s=arrival_s)


def iteration_us(name: str, world: Any, table: Any, seconds: float) -> dict[str, float]:
    """Microseconds of an iteration, the median over runs of `ITERATIONS`, and how many run and wait."""
    from llmsched_gym.engine import Engine
    from llmsched_gym.scheduler import install, make_scheduler

    scheduler, engine = make_scheduler(name), Engine(world, len(table))
    sim, spent, found = engine.state.sims[0], 0.0, []
    while spent < seconds:
        engine.reset(table)
        install(scheduler, engine.state)
        while sim.clock_s < SETTLED_S and not engine.run(scheduler, max_steps=10):
            pass
        before, start = int(sim.num_batches), time.process_time()
        engine.run(scheduler, max_steps=ITERATIONS)
        elapsed = time.process_time() - start
        spent += elapsed
        found.append(1e6 * elapsed / (int(sim.num_batches) - before))
    return {"us": median(found), "running": int(sim.num_running), "waiting": int(sim.num_waiting)}


def env_step_us(num_envs: int, seconds: float) -> float:
    """Microseconds of a step of one environment, of `num_envs` of the default suite under random knobs."""
    import gymnasium as gym

    import llmsched_gym  # noqa: F401

    envs = gym.make_vec("LLMSched-v0", num_envs=num_envs, vectorization_mode="vector_entry_point")
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(16)]
    envs.reset(seed=0)
    for _ in range(max(1, 2000 // num_envs)):
        envs.step(actions[0])
    found, begun = [], time.process_time()
    while time.process_time() - begun < seconds or not found:
        start = time.process_time()
        for action in actions:
            envs.step(action)
        found.append(1e6 * (time.process_time() - start) / (len(actions) * num_envs))
    return median(found)


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """Figures of the checkout that is first on the path, by what was measured."""
    figures = {}
    for name in SCHEDULERS:
        for running in RUNNING:
            for waiting in WAITING:
                figures[f"{name}, {running} running, {waiting:,} waiting"] = iteration_us(
                    name, *_standing(running, waiting), seconds
                )
        for waiting in (0, 5700):
            figures[f"{name}, overload, {waiting:,} waiting"] = iteration_us(name, *_overload(waiting), seconds)
    for num_envs in ENVS:
        figures[f"env step, {num_envs:,} environments"] = {"us": env_step_us(num_envs, 2 * seconds)}
    return figures


def run(checkout: Path, caches: Path, seconds: float) -> dict[str, dict[str, float]]:
    """The figures of one checkout, from a process that compiles into a cache of its own."""
    cache = caches / checkout.as_posix().strip("/").replace("/", "-")
    code = (
        "import importlib.util, json, llmsched_gym\n"
        f"assert llmsched_gym.__file__.startswith({str(checkout)!r}), llmsched_gym.__file__\n"
        f"spec = importlib.util.spec_from_file_location('scaling', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"print(json.dumps(module.measure({seconds})))"
    )
    env = {**os.environ, "PYTHONPATH": str(checkout), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=checkout, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def slopes(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """Microseconds for each thousand more waiting, from none to the most; for schedulers and numbers running."""
    found = {}
    for name in SCHEDULERS:
        for running in RUNNING:
            none, most = (figures[f"{name}, {running} running, {w:,} waiting"] for w in (WAITING[0], WAITING[-1]))
            rise = most["us"] - none["us"]
            found[f"{name}, {running} running, slope"] = rise / WAITING[-1] * 1000
    return found


def table(found: list[dict[str, dict[str, float]]], names: list[str]) -> str:
    """The figures as a Markdown table, a column a checkout."""
    rows = {key: [f[key]["us"] for f in found] for key in found[-1]}
    inclines = [slopes(f) for f in found]
    rows |= {key: [each[key] for each in inclines] for key in inclines[-1]}
    lines = [f"| us | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {key} | {' | '.join(f'{us:.2f}' for us in rows[key])} |" for key in sorted(rows, key=_in_order)]
    return "\n".join(lines)


def _in_order(key: str) -> tuple[int, str, int, int]:
    """Environments last, slopes behind what they are of."""
    numbers = [int(word.replace(",", "")) for word in key.split() if word[0].isdigit()]
    first, *rest = numbers or [0]
    kind = 2 if key.startswith("env") else 0
    return kind, key.split(",")[0], first if "overload" not in key else 1 << 30, rest[0] if rest else 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkouts", type=Path, nargs="+", help="one or more checkouts, a column each")
    parser.add_argument("--seconds", type=float, default=0.3, help="processor time of one figure")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, by turns; their median counts")
    parser.add_argument("--caches", type=Path, default=Path(tempfile.gettempdir(), "scaling"), help="compiled code")
    args = parser.parse_args()
    checkouts = [path.resolve() for path in args.checkouts]
    found: list[list[dict[str, dict[str, float]]]] = [[] for _ in checkouts]
    for k in range(args.rounds):
        for i in range(len(checkouts)) if k % 2 == 0 else reversed(range(len(checkouts))):
            found[i].append(run(checkouts[i], args.caches, args.seconds))
    medians = [{key: {"us": median(f[key]["us"] for f in rounds)} for key in rounds[0]} for rounds in found]
    print(table(medians, [path.name for path in checkouts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
