"""Compare a scheduler's decisions with a decision log, iteration by iteration, under the log's own batch durations.

    python -m benchmarks.conformance --log FILE.jsonl.gz --requests FILE.csv --policy NAME [--kv-blocks 14733]

prints one JSON line: ``{"iterations": n, "mismatches": m, "first_mismatch": i or null}``. A log line holds the start
`t` and duration `dur` of a non-empty iteration, both in seconds, and its `batch` as [request, "prefill" | "decode",
tokens]. In the logged engine a prefill emits no token, so a request of D decode tokens is replayed with D + 1 output
tokens. After a mismatch the replay goes on with its own state.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.engine import Engine, Execution, ScheduledBatch
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import PolicyError, install
from llmsched_gym.workload import RequestTable

MAX_IDLE_STEPS = 10_000
COLUMNS = ("arrival", "prompt_tokens", "decode_tokens", "tbt_deadline")


class Recording:
    """A backend that takes the duration of each batch from a log."""

    def __init__(self, durations_s: list[float]) -> None:
        self.durations_s = durations_s
        self.position = 0

    def execute(self, batch: ScheduledBatch) -> Execution:
        duration_s = self.durations_s[min(self.position, len(self.durations_s) - 1)]
        self.position += 1
        return Execution(duration_s)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's lines; raises ValueError naming file and line."""
    lines = []
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                lines.append(_parse_line(path, number, text))
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file: {error}") from None
    if not lines:
        raise ValueError(f"{path}: expected at least one iteration")
    return lines


def _parse_line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        batch = {(int(r), k, int(n)) for r, k, n in line["batch"]}
        duration_s = float(line["dur"])
        if not 0.0 <= duration_s < math.inf:
            raise ValueError(f"dur is {duration_s}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: line {number}: expected an iteration with dur and batch: {error}") from None
    return {"dur": duration_s, "batch": batch}


def read_requests(path: Path) -> RequestTable:
    """The requests a log was made with, one more output token each; raises ValueError naming file and line."""
    try:
        frame = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a CSV file: {str(error).strip()}") from None
    missing = [c for c in COLUMNS if c not in frame]
    if missing:
        raise ValueError(f"{path}: line 1: missing column {missing[0]!r}, expected {', '.join(COLUMNS)}")
    if frame.empty:
        raise ValueError(f"{path}: expected at least one request")
    values = frame[list(COLUMNS)].apply(pd.to_numeric, errors="coerce")
    good = np.isfinite(values) & (values >= [0.0, 1.0, 0.0, 0.0])
    for name in COLUMNS:
        if not good[name].all():
            row = int(np.argmin(good[name]))
            raise ValueError(f"{path}: line {row + 2}: {name}: expected a number, got {str(frame[name].iloc[row])!r}")
    if not frame["arrival"].is_monotonic_increasing:
        raise ValueError(f"{path}: arrival: expected requests sorted by arrival")
    strict = frame["strict"] if "strict" in frame else frame["tbt_deadline"] <= 0.1
    return RequestTable.of(
        frame["arrival"],
        frame["prompt_tokens"],
        frame["decode_tokens"] + 1,
        slo_class=np.where(strict, 0, 1),
        tbt_slo_s=frame["tbt_deadline"],
    )


def compare(log: Path, requests: Path, policy: str, kv_blocks: int = 14733) -> dict[str, int | None]:
    """Replay `policy` under the log's durations; the number of iterations whose batch differs, and the first one."""
    lines, table = read_log(log), read_requests(requests)
    scheduler = make_scheduler(policy)
    world = scenario(
        "paper",
        num_requests=len(table),
        num_kv_blocks=kv_blocks,
        max_model_len=8192 + 1,  # the replay's extra token
        admission=getattr(scheduler, "admission", "prompt"),
    )
    engine = Engine(world, len(table), backend=Recording([line["dur"] for line in lines]))
    engine.reset(table)
    install(scheduler, engine.state)
    mismatches, first = 0, None
    for i, line in enumerate(lines):
        batch = next_batch(engine, scheduler)
        if batch != line["batch"]:
            mismatches += 1
            first = i if first is None else first
    return {"iterations": len(lines), "mismatches": mismatches, "first_mismatch": first}


def next_batch(engine: Engine, scheduler: Any) -> set[tuple[int, str, int]]:
    """Step up to and over the next non-empty batch; the set of (request, kind, tokens), empty at the end.

    A scheduler that never runs anything, though work is pending and nobody will come, has come to its end too.
    """
    while not engine.is_over() and engine.state.sims[0].num_idle_steps <= MAX_IDLE_STEPS:
        engine.decide(scheduler)
        requests, items = engine.state.requests[0], engine.state.items[0, : engine.state.batches[0].num_items]
        batch = set()
        for r, n in zip(items["request"].tolist(), items["tokens"].tolist(), strict=True):
            prefill = requests[r].num_computed_tokens < requests[r].prefill_tokens
            batch.add((r, "prefill" if prefill else "decode", n))
        engine.execute()
        if batch:
            return batch
    return set()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--log", type=Path, required=True, help="decision log, JSON lines, may be gzipped")
    parser.add_argument("--requests", type=Path, required=True, help="the requests it was made with, CSV")
    parser.add_argument("--policy", required=True, help="a name of `llmsched policies`")
    parser.add_argument("--kv-blocks", type=int, default=14733, help="KV blocks of 16 tokens (default 14733)")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(compare(args.log, args.requests, args.policy, args.kv_blocks)))
    except (OSError, ValueError, ConfigError, PolicyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
