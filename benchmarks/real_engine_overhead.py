"""The real engine's own time per step: everything but the model's forward pass, at 64 running requests.

    python -m benchmarks.real_engine_overhead [--model random:tiny] [--policy sarathi] [--running 64] [--json]
    python -m benchmarks.real_engine_overhead --threads 1 --against OLD_CHECKOUT --rounds 5

A step is scheduling, the engine's books, laying the batch out, the forward pass, and taking its tokens; the time is
told by these parts too. All requests are there from the start; steps count from when all run. The policies are compiled
ones; a Python one costs what it costs. Besides the wall clock, the time on a core is told, which what others do on the
machine hardly moves: that one is held to 0.5 ms.

With `--against`, another checkout is measured by the same code, each round in a process of its own, by turns: the
medians over rounds of both, and the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Engine
from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import RequestTable

PROMPT_TOKENS = 96
BUDGET_MS = 0.5
PARTS = {
    "decide": "the scheduler forms the batch",
    "apply": "the engine applies it and says what it is",
    "blocks": "KV blocks given and taken, prompts made",
    "layout": "tokens, positions, slots and block tables as tensors",
    "forward": "the model",
    "sample": "greedy tokens, and whether the logits are finite",
    "book": "the tokens kept, requests with all of theirs gone",
    "commit": "the engine's books and clock",
}
"""The parts of a step in their order; all but `forward` are the engine's own time."""


def requests(num_requests: int, output_tokens: int, mixed: bool) -> RequestTable:
    """Requests that are all there at time 0: equal ones, or with prompts of 1/3 to 5/3 the length."""
    prompt = np.full(num_requests, PROMPT_TOKENS)
    if mixed:
        prompt = np.random.default_rng(0).integers(PROMPT_TOKENS // 3, 5 * PROMPT_TOKENS // 3, num_requests)
    return RequestTable.of(np.zeros(num_requests), prompt, output_tokens, ttft_slo_s=10.0, tbt_slo_s=0.5, qps=np.inf)


class Stamps:
    """When a step's parts began, on both clocks."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []  # (wall, core) seconds

    def stamp(self) -> None:
        self.at.append((time.perf_counter(), time.thread_time()))

    def around(self, owner: Any, name: str, finish: Callable[[], None] = lambda: None) -> None:
        """Stamp before and after every call of a method; `finish` is called before the second."""
        method = getattr(owner, name)

        def stamped(*args: Any) -> Any:
            self.stamp()
            result = method(*args)
            finish()
            self.stamp()
            return result

        setattr(owner, name, stamped)


def measure(
    model: str, policy: str, running: int, steps: int, device: str | None = None, mixed: bool = False
) -> dict[str, Any]:
    """Milliseconds per step, own, by part and the model's, over the steps in which `running` requests run."""
    length = 2 * PROMPT_TOKENS + 2 * steps + 64
    world = scenario("paper", max_num_seqs=running, max_model_len=length, max_num_batched_tokens=2048)
    backend = make_backend(world, model, device, graphs=False)  # a replay would not pass through `forward`
    table = requests(running, length - 2 * PROMPT_TOKENS, mixed)
    engine = Engine(world, running, backend=backend)
    engine.reset(table)
    scheduler = make_scheduler(policy)
    install(scheduler, engine.state)
    stamps = Stamps()
    stamps.around(backend, "execute")
    stamps.around(backend.runner, "step")
    stamps.around(backend.runner, "forward", backend.runner.wait)
    rows = []  # (steps, parts, clocks) seconds
    for _ in range(100 * steps):
        stamps.at.clear()
        stamps.stamp()
        engine.decide(scheduler)
        stamps.stamp()
        engine.execute()
        stamps.stamp()
        if engine.state.batches[0].num_decodes == running:  # every one of them, with its prompt complete
            rows.append(np.diff(stamps.at, axis=0))
        if len(rows) == steps or engine.is_over():
            break
    parts = 1e3 * np.array(rows)
    model_at = list(PARTS).index("forward")
    own = np.delete(parts, model_at, axis=1).sum(1)
    return {
        "model": backend.loaded.name,
        "device": str(backend.device),
        "policy": policy,
        "running": running,
        "steps": len(rows),
        "own_p50_ms": round(float(np.median(own[:, 0])), 3),
        "own_p99_ms": round(float(np.percentile(own[:, 0], 99)), 3),
        "own_core_p50_ms": round(float(np.median(own[:, 1])), 3),
        **{
            f"{name}_p50_ms": round(float(p50), 3)
            for name, p50 in zip(PARTS, np.median(parts[:, :, 0], axis=0), strict=True)
        },
    }


def side_by_side(checkouts: list[Path], rounds: int, argv: list[str]) -> dict[str, list[float]]:
    """By figure: the median over rounds of each of two checkouts, and of the rounds' ratios, first over second."""
    found: list[list[dict[str, Any]]] = [[], []]
    for k in range(rounds):
        for i in (0, 1) if k % 2 == 0 else (1, 0):
            command = [sys.executable, "-P", __file__, "--json", *argv]
            env = {**os.environ, "PYTHONPATH": str(checkouts[i])}
            # exits with 1 above the budget, which an old checkout may be
            done = subprocess.run(command, env=env, cwd=checkouts[i], stdout=subprocess.PIPE, text=True)
            found[i].append(json.loads(done.stdout))
    figures = [name for name in found[0][0] if name.endswith("_ms")]
    return {
        name: [
            *(median(row[name] for row in rows) for rows in found),
            median(old[name] / max(new[name], 1e-3) for old, new in zip(*found, strict=True)),
        ]
        for name in figures
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_engine_overhead", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="random:tiny", help="local folder, hub id or random:NAME")
    parser.add_argument("--device", help="cuda or cpu; default: the GPU if there is one")
    parser.add_argument("--policy", default="sarathi", help="a name of `llmsched policies`; one that skips no decode")
    parser.add_argument("--running", type=int, default=64, help="requests that run (default 64)")
    parser.add_argument("--steps", type=int, default=400, help="steps to time (default 400)")
    parser.add_argument("--mixed", action="store_true", help="contexts of different lengths, not of one")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (its own choice unless given)")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    parser.add_argument("--against", type=Path, help="another checkout, measured by turns with this one")
    parser.add_argument("--rounds", type=int, default=5, help="with --against: measurements of each (default 5)")
    args = parser.parse_args(argv)
    if args.against is not None:
        if not (args.against / "llmsched_gym").is_dir():
            print(f"error: --against: {args.against} is no checkout: it has no folder llmsched_gym", file=sys.stderr)
            return 2
        names = ("model", "device", "policy", "running", "steps", "threads")
        options = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
        options += ["--mixed"] if args.mixed else []
        checkouts = [args.against.resolve(), Path(__file__).resolve().parents[1]]
        figures = side_by_side(checkouts, args.rounds, options)
        if args.json:
            print(json.dumps(figures))
            return 0
        print("| ms | old | new | old / new |\n|---|---:|---:|---:|")
        for name, (old, new, ratio) in figures.items():
            print(f"| {name.removesuffix('_ms')} | {old:.3f} | {new:.3f} | {ratio:.2f} |")
        return 0
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    try:
        row = measure(args.model, args.policy, args.running, args.steps, args.device, args.mixed)
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
        for name, what in PARTS.items():
            print(f"  {name:8} {row[f'{name}_p50_ms']:7.3f} ms  {what}")
    return 0 if row["own_core_p50_ms"] < BUDGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())
