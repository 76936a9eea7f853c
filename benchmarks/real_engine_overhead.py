"""The real engine's own time per step: everything but the model's forward pass, at 64 running requests.

    python -m benchmarks.real_engine_overhead [--model random:tiny] [--policy sarathi] [--running 64] [--json]

A step is scheduling, the engine's books, laying the batch out, the forward pass, and taking its tokens. All requests
are there from the start; steps count from when all run. The policies are compiled ones; a Python one costs what it
costs. Besides the wall clock, the time on a core is told, which what others do on the machine hardly moves: that one
is held to 1 ms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Engine
from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import RequestTable

PROMPT_TOKENS = 96
BUDGET_MS = 1.0


def requests(num_requests: int, output_tokens: int) -> RequestTable:
    """Equal requests, all there at time 0."""
    return RequestTable.of(
        np.zeros(num_requests), PROMPT_TOKENS, output_tokens, ttft_slo_s=10.0, tbt_slo_s=0.5, qps=np.inf
    )


def measure(model: str, policy: str, running: int, steps: int, device: str | None = None) -> dict[str, Any]:
    """Milliseconds per step, own and the model's, over the steps in which `running` requests run."""
    length = PROMPT_TOKENS + 2 * steps + 64
    world = scenario("paper", max_num_seqs=running, max_model_len=length, max_num_batched_tokens=2048)
    backend = make_backend(world, model, device, graphs=False)  # a replay would not pass through `forward`
    forward, spent = backend.runner.forward, [0.0, 0.0]

    def timed(inputs):
        start = _clocks()
        logits = forward(inputs)
        backend.runner.wait()
        spent[:] = _since(start)
        return logits

    backend.runner.forward = timed  # type: ignore[method-assign]
    table = requests(running, length - PROMPT_TOKENS)
    engine = Engine(world, running, backend=backend)
    engine.reset(table)
    scheduler = make_scheduler(policy)
    install(scheduler, engine.state)
    rows = []  # own wall, own core, forward wall; seconds
    for _ in range(100 * steps):
        start = _clocks()
        engine.step(scheduler)
        wall_s, core_s = _since(start)
        if engine.state.batches[0].num_decodes == running:  # every one of them, with its prompt complete
            rows.append((wall_s - spent[0], core_s - spent[1], spent[0]))
        if len(rows) == steps or engine.is_over():
            break
    own, core, model_s = (1e3 * np.array(rows)).T
    return {
        "model": backend.loaded.name,
        "device": str(backend.device),
        "policy": policy,
        "running": running,
        "steps": len(rows),
        "own_p50_ms": round(float(np.median(own)), 3),
        "own_p99_ms": round(float(np.percentile(own, 99)), 3),
        "own_core_p50_ms": round(float(np.median(core)), 3),
        "forward_p50_ms": round(float(np.median(model_s)), 3),
    }


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall_s, core_s = _clocks()
    return wall_s - start[0], core_s - start[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_engine_overhead", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="random:tiny", help="local folder, hub id or random:NAME")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    parser.add_argument("--policy", default="sarathi", help="a name of `llmsched policies`; one that skips no decode")
    parser.add_argument("--running", type=int, default=64, help="requests that run (default 64)")
    parser.add_argument("--steps", type=int, default=400, help="steps to time (default 400)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (its own choice unless given)")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    args = parser.parse_args(argv)
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    try:
        row = measure(args.model, args.policy, args.running, args.steps, args.device)
    except (BackendError, ConfigError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(row))
    else:
        print(
            f"{row['policy']}, {row['running']} running, {row['model']} on {row['device']}, {row['steps']} steps: the "
            f"engine's own time is {row['own_p50_ms']} ms (p99 {row['own_p99_ms']} ms), {row['own_core_p50_ms']} ms on "
            f"a core; the forward pass {row['forward_p50_ms']} ms"
        )
    return 0 if row["own_core_p50_ms"] < BUDGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())
