"""What a report says of how its rows were made: the settings behind them, and the command that makes them again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from llmsched_gym.config import ClusterScenario, ConfigError, find_suite
from llmsched_gym.cost import Profile, ProfileError, load_profile
from llmsched_gym.files import encode
from llmsched_gym.report import served, statistics
from llmsched_gym.report.bounds import bound_of
from llmsched_gym.report.results import Results

FLAGS = frozenset(
    [
        "profile",
        "workload",
        "trace",
        "trace_arrivals",
        "trace_invalid",
        "strict_share",
        "jitter",
        "cost_scale",
        "length_hint",
        "tbt_rule",
        "backend",
        "model",
    ]
)
"""Fields of a scenario that have an option of their own."""


def command(config: Mapping[str, Any], directory: Path) -> str | None:
    """The `llmsched evaluate`, or `capacity` under a criterion, that makes `directory` again, from its config."""
    if isinstance(config.get("command"), str):
        return str(config["command"])
    scenario = config.get("scenario")
    if not isinstance(scenario, Mapping) or "policies" not in config:
        return None
    try:
        suite = find_suite(scenario.get("suite", "")).scenario
    except ConfigError:  # of another version, or a file that has gone
        return None
    on_replicas = isinstance(suite, ClusterScenario)
    who = _routed(config["policies"]) if on_replicas else ["--policy", ",".join(config["policies"])]
    if who is None:
        return None
    usual = json.loads(json.dumps(encode(suite.to_dict())))
    judged = config.get("criterion")
    words = ["llmsched", "capacity" if judged else "evaluate", "--suite", scenario["suite"]]
    words += [*who, *(["--criterion", judged] if judged else [])]
    if (
        not (judged or on_replicas)
        and bound_of(config["policies"]) is None
        and scenario.get("backend", "simulated") == "simulated"
    ):
        words += ["--no-bound"]
    for name, value in scenario.items():
        if value == usual.get(name) or name in ("suite", "num_requests", "router"):
            continue
        if name in FLAGS and isinstance(value, str | int | float):
            words += [f"--{name.replace('_', '-')}", f"{value}"]
        elif name == "patience_s":
            words += ["--patience", f"{value}"]
        elif name == "allow_refusal":
            words += ["--allow-refusal"]
        elif name == "prefix_caching":
            words += ["--prefix-caching" if value else "--no-prefix-caching"]
        else:
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    if config.get("qps"):
        words += ["--qps", ",".join(f"{q:.12g}" for q in config["qps"])]
    if scenario.get("num_requests") is not None:
        words += ["--num-requests", str(scenario["num_requests"])]
    words += ["--seeds", str(config.get("seeds", 20))]
    if config.get("first_seed"):
        words += ["--first-seed", str(config["first_seed"])]
    return shlex.join([*words, "--out", directory.resolve().name])


def _routed(policies: Sequence[str]) -> list[str] | None:
    """Options that name ``ROUTER+SCHEDULER`` policies; None unless each router comes with each scheduler."""
    pairs = [re.split(r"\+(?![^\[\]]*\])", policy, maxsplit=1) for policy in policies]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return None
    routers, schedulers = (list(dict.fromkeys(names)) for names in zip(*pairs, strict=True))
    if [[router, scheduler] for router in routers for scheduler in schedulers] != pairs:
        return None
    return ["--router", ",".join(routers), "--policy", ",".join(schedulers)]


def settings(results: Results) -> list[tuple[str, str]]:
    """Names and values of what the reader needs to know of the scenario."""
    rows, get = results.rows, results.setting

    def only(column: str) -> str:
        return ", ".join(map(str, rows[column].unique())) if column in rows else "unknown"

    seeds = rows["seed"].unique()
    measured = served.is_served(rows)
    found = [("Suite", results.suite)]
    found += [] if measured else [("Cost profile", _profile(only("profile")))]
    found += [("Workload", only("workload"))]
    found += [("Arrivals", _arrivals(results))]
    found.append(("Seeds", f"{seeds.min()} to {seeds.max()}" if len(seeds) > 1 else str(seeds[0])))
    if statistics.has(rows, "num_sessions"):
        found.append(("Sessions per run", _counts(rows["num_sessions"])))
    found.append(("Requests per run", _counts(rows["num_requests"])))
    found += [("Trace", remark) for remark in results.trace_remarks]
    differences = (results.config.get("compared") or {}).get("differences", [])
    found += [("Differs", text) for text in differences]
    if differences or not results.config.get("scenario"):
        return found
    slo_s, per_token_s = results.ttft_slo()
    scales = "" if results.ttft_scales() == [1.0] else f", times {', '.join(f'{s:g}' for s in results.ttft_scales())}"
    new = "new " if statistics.has(rows, "num_sessions") else ""
    found.append(("TTFT SLO", f"{slo_s:g} s + {1e3 * per_token_s:g} ms per {new}prompt token{scales}"))
    tbt = ", ".join(f"{name} {slo_s:g} s" for name, slo_s in results.tbt_slos_s().items())
    found.append(("TBT SLO", f"{tbt}; rule {get('tbt_rule', 'every-gap')}"))
    found.append(("Strict users", _range(get("strict_share", 0.05), 100) + " %"))
    drain, after = get("drain_s", "inf"), "arrivals go on" if get("arrivals_continue", True) else "no arrivals"
    until = "until all are served" if drain == "inf" else f"for {drain:g} s at most"
    found.append(("Around them", f"{get('warmup_s', 0.0):g} s of warm-up; {after} behind them, {until}"))
    if measured:
        patience = get("patience_s", "inf")
        found.append(("Patience", "infinite" if patience == "inf" else f"{patience:g} s late"))
        return [*found, ("Servers", str(results.config.get("setup", "unknown"))), *served.client(rows)]
    profile = _loaded(only("profile"))
    blocks = get("num_kv_blocks", None) or (profile and profile.num_kv_blocks)
    seqs = get("max_num_seqs", None) or (profile and profile.device.max_num_seqs)
    limits = f"max_num_seqs {seqs:,}, " if seqs else ""
    limits += f"max_num_batched_tokens {get('max_num_batched_tokens', 8192):,}"
    limits += f", max_model_len {get('max_model_len', 8192):,}"
    limits += ", prefix caching" * bool(get("prefix_caching", False))
    limits += ", async scheduling" * bool(get("async_lag", False))
    found.append(("Engine", f"{f'{blocks:,} KV blocks, ' if blocks else ''}{limits}"))
    patience = get("patience_s", "inf")
    found.append(("Patience", "infinite" if patience == "inf" else f"{patience:g} s late"))
    times = f"jitter {get('jitter', 0.0):g}, cost scale {_range(get('cost_scale', 1.0), 1)}"
    if get("backend", "simulated") != "simulated":
        times = f"measured on {results.config.get('setup', get('model', 'a model'))}; the profile is for predictions"
        if get("count_host_time", False):
            times += "; the scheduler's own time counts"
    found.append(("Batch times", times))
    return found


def _arrivals(results: Results) -> str:
    """Where arrivals come from, as runs had them."""
    rows, get = results.rows, results.setting
    unit = statistics.load_unit(rows)
    kinds = rows["arrivals"].unique() if "arrivals" in rows else ["unknown"]
    kind = ", ".join(map(str, kinds))
    if kind == "trace":
        scaled = "scaled to the loads asked for" if rows["requested_qps"].notna().any() else "as they are"
        return f"the trace's own times, {scaled}"
    if kind == "gamma":
        kind += f" of shape {get('burstiness', 1.0):g}"
    if rows["drawn"].any():
        return f"{kind}, one rate per seed from {_range(get('qps_range', [0.0, 0.0]), 1)} {unit}"
    if kind in ("mmpp", "switching"):
        kind += f", rates switching every {_range(get('switch_every_s', [0.0, 0.0]), 1)} s"
    return f"{kind} at {', '.join(f'{load:.4g}' for load in sorted(rows['load'].unique()))} {unit}"


def _profile(name: str) -> str:
    """The profile's name, with a remark if nobody has measured it."""
    found = _loaded(name)
    return name if found is None or found.basis == "measured" else f"{name} ({found.basis})"


def _loaded(name: str) -> Profile | None:
    try:
        return load_profile(name)
    except ProfileError:
        return None  # a file that has gone since


def _counts(column: pd.Series) -> str:
    """The values, or the least and the largest of many."""
    counts = [f"{int(n):,}" for n in sorted(column.dropna().unique())]
    return ", ".join(counts) if len(counts) <= 4 else f"{counts[0]} to {counts[-1]}"


def _range(value: Any, scale: float) -> str:
    return " to ".join(f"{scale * v:g}" for v in (value if isinstance(value, list) else [value]))
