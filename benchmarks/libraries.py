"""How fast each library learns on the environment: ``python -m benchmarks.libraries --environments .venv-peers``.

Runs the snippets of docs/libraries.md, each in its library's virtual environment and pinned to one core, and before
each one that of Stable-Baselines3 for the ratio. `make libraries` makes the virtual environments first. Prints a table;
exits with 1 if a snippet fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import whole

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = {
    "sb3": "learners",
    "maskable": "learners",
    "cleanrl": "learners",
    "skrl_ppo": "learners",
    "tianshou_dqn": "learners",
    "torchrl_ppo": "torchrl",
    "rllib_ppo": "rllib",
    "cmaes": "learners",
    "evolve": "learners",
    "record": "learners",
    "offline": "d3rlpy",
}
"""Modules of examples.libraries, and the virtual environment that each runs in."""
WARM_UP = 2048  # decisions of a run that is not measured


def run(environments: Path, snippet: str, decisions: int | None) -> list[dict]:
    """The lines that a snippet prints, from a process on one core; RuntimeError with its last words if it fails."""
    python = environments / SNIPPETS[snippet] / "bin" / "python"
    command = [str(python), "-m", f"examples.libraries.{snippet}", *([str(decisions)] if decisions else [])]
    core = min(os.sched_getaffinity(0))
    extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if done.returncode != 0:
        raise RuntimeError(f"{snippet}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> int:
    """Run the snippets asked for and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.libraries", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-peers", help="folder of those folders")
    parser.add_argument("--only", default=",".join(SNIPPETS), help="snippets, comma-separated")
    parser.add_argument("--decisions", type=whole, help="of each, in place of its own number")
    args = parser.parse_args()
    snippets = args.only.split(",")
    if unknown := sorted(set(snippets) - set(SNIPPETS)):
        parser.error(f"--only: expected of {', '.join(SNIPPETS)}, got {unknown[0]!r}")
    missing = {name for name in (SNIPPETS[s] for s in snippets) if not (args.environments / name / "bin").is_dir()}
    if missing:
        parser.error(f"--environments: {args.environments} has no {', '.join(sorted(missing))}: run make libraries")
    print("| library | what | decisions/s | of SB3's PPO | utility |\n|---|---|---:|---:|---:|")
    failed = 0
    for snippet in snippets:
        try:
            for first in ("sb3", snippet):
                run(args.environments, first, WARM_UP)  # compiles
            beside = run(args.environments, "sb3", args.decisions)[0]["decisions_per_s"]
            found = run(args.environments, snippet, args.decisions)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            failed = 1
            continue
        for line in found:
            name, rate = f"{line['library']} {line['version']}", line["decisions_per_s"]
            utility = f"{line['utility']:.3f}" if "utility" in line else ""
            print(f"| {name} | {line['what']} | {rate:,} | {rate / beside:.2f} | {utility} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
