"""How fast one checkout is beside another on this machine: ``python benchmarks/side_by_side.py OLD NEW [--pairs 7]``.

Each measurement is a process of its own on one checkout; the two take turns, so that whatever else the machine does
meets both, and count their own processor time. Prints one JSON line: the medians of both, and the median of the pairs'
ratios, new over old.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median


def rate(work: Callable[[], int], seconds: float) -> float:
    """Units of work per second of processor time, over at least so long, behind a call to warm up."""
    work()
    done, start = 0, time.process_time()
    while (spent := time.process_time() - start) < seconds:
        done += work()
    return done / spent


def measure(seconds: float) -> dict[str, float]:
    """Figures of the checkout that is first on the path: iterations and steps per second of one core."""
    import gymnasium as gym

    import llmsched_gym
    from llmsched_gym.engine import Engine
    from llmsched_gym.scheduler import install, make_scheduler
    from llmsched_gym.workload import make_table

    world = llmsched_gym.scenario("paper", num_requests=2000, qps=1.4)  # about 30 requests run at a time
    table, scheduler = make_table(world, 0), make_scheduler("slai")
    engine = Engine(world, len(table))

    def iterate() -> int:
        engine.reset(table)
        install(scheduler, engine.state)
        engine.run(scheduler)
        return int(engine.state.sims[0].num_batches)

    figures = {"engine": rate(iterate, seconds)}

    env = gym.make("LLMSched-v0")
    env.action_space.seed(0)
    single_actions = [env.action_space.sample() for _ in range(1000)]
    env.reset(seed=0)

    def single() -> int:
        for action in single_actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(single_actions)

    figures["single"] = rate(single, seconds)
    for num_envs in (64, 1024):
        envs = gym.make_vec("LLMSched-v0", num_envs=num_envs, vectorization_mode="vector_entry_point")
        envs.action_space.seed(0)
        actions = [envs.action_space.sample() for _ in range(16)]
        envs.reset(seed=0)

        def vector(envs=envs, actions=actions, num_envs=num_envs) -> int:
            for action in actions:
                envs.step(action)
            return len(actions) * num_envs

        figures[f"vector_{num_envs}"] = rate(vector, 1.5 * seconds)
    return figures


def run(checkout: Path, caches: Path, seconds: float) -> dict[str, float]:
    """The figures of one checkout, from a process that compiles into a cache of its own."""
    cache = caches / checkout.resolve().as_posix().strip("/").replace("/", "-")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "NUMBA_CACHE_DIR": str(cache)}
    code = (
        "import importlib.util, json, llmsched_gym\n"
        f"assert llmsched_gym.__file__.startswith({str(checkout)!r}), llmsched_gym.__file__\n"
        f"spec = importlib.util.spec_from_file_location('side_by_side', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"print(json.dumps(module.measure({seconds})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=checkout, stdout=subprocess.PIPE, check=True
    )
    return json.loads(out.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("old", type=Path, help="checkout to compare with")
    parser.add_argument("new", type=Path, help="checkout to judge")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of one figure's measurement")
    parser.add_argument(
        "--caches", type=Path, default=Path(tempfile.gettempdir(), "side-by-side"), help="compiled code"
    )
    args = parser.parse_args()
    checkouts = {"old": args.old.resolve(), "new": args.new.resolve()}
    for checkout in checkouts.values():
        run(checkout, args.caches, 0.01)  # compiles
    found: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for pair in range(args.pairs):
        for name in sorted(checkouts, reverse=pair % 2 == 1):
            found[name].append(run(checkouts[name], args.caches, args.seconds))
        print(f"pair {pair + 1}: {json.dumps({k: round(v[-1]['single']) for k, v in found.items()})}", file=sys.stderr)
    figures = {}
    for key in found["old"][0]:
        old, new = ([measured[key] for measured in found[name]] for name in ("old", "new"))
        ratios = [b / a for a, b in zip(old, new, strict=True)]
        figures[key] = {"old": round(median(old)), "new": round(median(new)), "ratio": round(median(ratios), 3)}
    print(json.dumps({"pairs": args.pairs, "per_second": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
