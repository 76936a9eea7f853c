"""What a report says of runs against real servers: how their client measured, and what failed."""

from __future__ import annotations

import json
from collections import Counter

import pandas as pd

from llmsched_gym.text import counted, number

GAPS = {
    "token ids": "between tokens: every chunk says which it carries",
    "usage": "between tokens: every chunk says how many it carries (usage)",
    "logprobs": "between tokens: every chunk says how many it carries (logprobs)",
    "total": "between tokens: the end of the stream says how many there were, those of a chunk came together",
    "chunk": "between streamed chunks, of which nobody knows how many tokens they carry",
}
"""What a gap is, by how tokens were counted."""


def is_served(rows: pd.DataFrame) -> bool:
    """Whether the rows are of real servers."""
    return "sent_late_p99_s" in rows


def client(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Names and values of what a reader needs to know of the client."""
    found = [("Gaps", _by_policy(rows, "counted_by", GAPS))]
    late = [1e3 * rows[f"sent_late_{name}_s"].astype(float).max() for name in ("p50", "p99", "max")]
    if not pd.isna(late[0]):
        figures = " ms, ".join(f"{name} {number(ms, 2)}" for name, ms in zip(("p50", "p99", "most"), late, strict=True))
        found.append(
            ("Sent behind plan", f"{figures} ms in the worst run; latencies count from when a request was sent")
        )
    if rows["round_trip_p50_s"].notna().any():
        slowest = 1e3 * rows["round_trip_p50_s"].astype(float).max()
        found.append(("Round trip", f"{number(slowest, 2)} ms for a question without work, part of every TTFT"))
    ratio = rows["prompt_tokens_ratio"].astype(float).dropna()
    if len(ratio) and (ratio - 1.0).abs().max() > 1e-3:
        found.append(("Prompts", f"{number(ratio.min(), 2)} to {number(ratio.max(), 2)} times as long as planned"))
    if rows["num_failed"].any():
        found.append(("Failed", failures(rows)))
    for policy, own in rows.groupby("policy", sort=False):
        checked = own[own["metrics"].fillna("") != ""]
        for line in checked.itertuples():
            found.append((f"/metrics of {policy}, seed {line.seed}", str(line.metrics).replace("\n", ". ")))
    return found


def failures(rows: pd.DataFrame) -> str:
    """How many requests failed, by label and kind."""
    parts = []
    for policy, own in rows.groupby("policy", sort=False):
        kinds: Counter[str] = Counter()
        for text in own["failures"]:
            kinds.update(json.loads(text))
        if kinds:
            each = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
            parts.append(f"{policy}: {each}")
    return f"{'; '.join(parts)}, of {counted(int(rows['num_requests'].sum()), 'request')} in all"


def _by_policy(rows: pd.DataFrame, column: str, words: dict[str, str]) -> str:
    found: dict[str, list[str]] = {}
    for policy, own in rows.groupby("policy", sort=False):
        for value in own[column].unique():
            found.setdefault(words.get(value, str(value)), []).append(str(policy))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{', '.join(policies)}: {text}" for text, policies in found.items())
