"""What a step of vLLM's scheduler costs (schedule and update), its own against the plug-in, alternating in one process.

    benchmarks/vllm_env.sh DIR
    DIR/bin/python -m benchmarks.vllm_step_cost --policies slai on-time --waiting 0 50 500 2000

100 requests run, the others find no slot. One JSON line for each policy and length of the line: medians of steps in
microseconds, and their ratio over rounds (median, least, largest). Both run the same 100 decodes a step unless the
policy defers some, which `decodes` tells; `--slo` sets the TBT SLO by which it does.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.vllm_scheduler import VLLM, Settings

RUNNING, PROMPT, OUTPUT, KV_BLOCKS = 100, 64, 4000, 40_000


def prepared(scheduler_cls: Any, config: dict[str, Any], waiting: int, slo_s: float) -> VLLM:
    """A scheduler with RUNNING requests that decode, and `waiting` more in line."""
    settings = Settings(budget=8192, max_num_seqs=RUNNING)
    real = VLLM(settings, KV_BLOCKS, 8192, scheduler_cls, config)
    tokens = np.ones(PROMPT + OUTPUT, np.int64)
    slos = {"tbt_slo_s": slo_s, "ttft_slo_s": 10.0}
    rng = np.random.default_rng(0)
    for r in range(RUNNING + waiting):
        prompt = PROMPT if r < RUNNING else int(rng.integers(16, 2000))
        real.add(r, prompt, np.ones(prompt + OUTPUT, np.int64) if r >= RUNNING else tokens, time.time(), slos)
    for _ in range(40):
        real.step()
        if len(real.scheduler.running) == RUNNING and not any(q.is_prefill_chunk for q in real.scheduler.running):
            break
    return real


def timed(real: VLLM, steps: int) -> tuple[list[float], list[int]]:
    """Seconds of schedule and update of so many steps, and how many decodes each had."""
    from vllm.v1.outputs import ModelRunnerOutput

    scheduler, seconds, decodes = real.scheduler, [], []
    for _ in range(steps):
        start = time.perf_counter()
        output = scheduler.schedule()
        middle = time.perf_counter()
        names = list(output.num_scheduled_tokens)
        ran = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, [[1] for _ in names])
        again = time.perf_counter()
        scheduler.update_from_output(output, ran)
        seconds.append(middle - start + time.perf_counter() - again)
        decodes.append(len(names))
    return seconds, decodes


def measure(policy: str, waiting: int, slo_s: float, rounds: int, steps: int) -> dict[str, Any]:
    """One line of figures."""
    from llmsched_gym.real_backend.vllm_plugin import SyncScheduler

    sides = {
        "stock": prepared(None, {}, waiting, slo_s),
        "plugin": prepared(SyncScheduler, {"llmsched": {"policy": policy}}, waiting, slo_s),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    decodes: list[int] = []
    gc.collect()
    gc.disable()
    for i in range(rounds):
        for name in ("stock", "plugin") if i % 2 else ("plugin", "stock"):
            seconds, counts = timed(sides[name], steps)
            times[name].append(float(np.median(seconds)))
            if name == "plugin":
                decodes += counts
    gc.enable()
    ratios = np.array(times["plugin"]) / np.array(times["stock"])
    return {
        "policy": policy,
        "waiting": waiting,
        "stock_us": round(1e6 * float(np.median(times["stock"])), 1),
        "plugin_us": round(1e6 * float(np.median(times["plugin"])), 1),
        "ratio": round(float(np.median(ratios)), 3),
        "ratio_range": [round(float(ratios.min()), 3), round(float(ratios.max()), 3)],
        "decodes": round(float(np.mean(decodes)), 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vllm_step_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--policies", nargs="+", default=["slai", "on-time"], help="names (slai on-time)")
    parser.add_argument("--waiting", nargs="+", type=int, default=[0, 50, 500, 2000], help="lengths of the line")
    parser.add_argument(
        "--slo", type=float, default=0.001, help="TBT SLO in seconds; 0.001: nobody is deferred (0.001)"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50, help="of each side in a round (50)")
    args = parser.parse_args(argv)
    for policy in args.policies:
        for waiting in args.waiting:
            print(json.dumps(measure(policy, waiting, args.slo, args.rounds, args.steps)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
