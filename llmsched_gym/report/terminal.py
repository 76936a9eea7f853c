"""The tables of the command line: figures over seeds, with intervals where there are enough; capacities; traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmsched_gym.report.console import new_table
from llmsched_gym.report.intervals import Interval, interval, mean, median, median_interval
from llmsched_gym.text import between, counted, number

if TYPE_CHECKING:
    from rich.table import Table


INFINITE, OUTSIDE = "inf", "not in the range"
LONG = 16  # characters of a policy's name that a heading of numbers has room for


def with_interval(value: float | None, bounds: Interval | None, digits: int = 3) -> str:
    """A figure over seeds with its 95 % interval; None is infinite."""
    low, high = bounds or (None, None)
    return number(value, digits, INFINITE) + between(low, high, digits)


def loads(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float | None], list[dict[str, Any]]]:
    """Rows by policy and requested rate, in their order; None where each seed draws its own rate."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["requested_qps"]), []).append(row)
    return groups


def comparison(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Who is served in time, and how fast, and sessions and the prefix cache where there are: a table each.

    There is one line per policy and load.
    """
    seeds, rule = len({row["seed"] for row in rows}), rows[0]["tbt_rule"]
    load = _load_heading(rows)
    served = new_table(
        *("policy", load, "within SLOs\nall (%)", "\nstrict", "utility", "lost\n(%)", "rejected\n(%)"),
        title=f"Means over {seeds} seed{'s' if seeds > 1 else ''}; gaps between tokens judged by the rule {rule}",
    )
    speed = new_table(
        *("policy", load, "TTFT (s)\np50", "\np99", "p99 ITL (s)\nstrict", "\nrelaxed", "output\ntokens/s"),
        title="Latencies: medians over seeds of each run's percentile",
    )
    for (policy, _), group in loads(rows).items():

        def over_seeds(name: str, key: str | None = None, group: Any = group) -> list[float | None]:
            if key is None:
                return [row[name] for row in group]
            return [row[name][key] for row in group if row[name][key] is not None]

        def percent(*outcomes: str, group: Any = group) -> str:
            shares = [100 * sum(row[f"num_{o}"] for o in outcomes) / row["num_requests"] for row in group]
            return number(mean(shares), 1)

        independent = group[0]["arrivals"] != "trace"  # with a trace's own arrivals all seeds have the same requests
        attained = [None if v is None else 100 * v for v in over_seeds("slo_attainment")]
        strict = mean(over_seeds("slo_attainment_by_class", "strict"))
        p50_s, p99_s = over_seeds("ttft_p50_s"), over_seeds("ttft_p99_s")
        where = (policy, load_text(group))
        served.add_row(
            *where,
            with_interval(mean(attained), interval(attained, (0.0, 100.0)) if independent else None, 1),
            number(None if strict is None else 100 * strict, 1),
            number(mean(over_seeds("mean_utility")), 3),
            percent("refused", "abandoned"),
            percent("rejected"),
        )
        infinite = p99_s.count(None)
        few = f"\n{infinite}/{len(group)} {INFINITE}" if 0 < infinite < len(group) else ""
        speed.add_row(
            *where,
            with_interval(median(p50_s), median_interval(p50_s) if independent else None).replace(" [", "\n["),
            number(median(p99_s), 2, INFINITE) + few,
            number(median(over_seeds("itl_p99_s_by_class", "strict")), 3),
            number(median(over_seeds("itl_p99_s_by_class", "relaxed")), 3),
            number(mean(over_seeds("throughput_tok_s")), 0),
        )
    return [served, speed, *_sessions(rows)]


def _load_heading(rows: Sequence[dict[str, Any]]) -> str:
    return "sessions\n(1/s)" if any(row.get("num_sessions") for row in rows) else "load\n(1/s)"


def _sessions(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Sessions, and what the prefix cache saved, a table each, where rows have them."""
    turns = any(row.get("num_sessions") is not None for row in rows)
    cache = any(row.get("prefix_hit_rate") is not None for row in rows)
    load = _load_heading(rows)
    in_time = new_table(
        *("policy", load, "sessions on\ntime (%)", "last answer (s)\np50", "\np99", "cancelled\nturns (%)"),
        title="Sessions: every turn on time, time to the last answer of those finished",
    )
    saved = new_table(
        *("policy", load, "hit rate\n(%)", "saved\n(thousands)", "computed\n(thousands)"),
        title="Prompt tokens of a run, at first admissions",
    )
    for (policy, _), group in loads(rows).items():

        def over_seeds(name: str, group: Any = group) -> list[float]:
            return [float(row[name]) for row in group if row.get(name) is not None]

        def times(name: str, scale: float, digits: int, over_seeds: Any = over_seeds) -> str:
            found = mean(over_seeds(name))
            return number(None if found is None else scale * found, digits)

        where = (policy, load_text(group))
        if turns:
            cancelled = mean([100 * row["num_cancelled"] / row["num_requests"] for row in group])
            last_s = (number(median(over_seeds(f"session_{p}_s")), 0) for p in ("p50", "p99"))
            in_time.add_row(*where, times("session_on_time", 100, 1), *last_s, number(cancelled, 1))
        if cache:
            tokens = (times(f"{what}_tokens", 1e-3, 0) for what in ("num_cached", "computed"))
            saved.add_row(*where, times("prefix_hit_rate", 100, 1), *tokens)
    return [in_time] * turns + [saved] * cache


def load_text(group: Sequence[dict[str, Any]]) -> str:
    """The arrival rate of some runs, and where it comes from if nobody asked for it."""
    asked, arrivals = group[0]["requested_qps"], group[0]["arrivals"]
    if asked is not None:
        return f"{asked:g}"
    rates = [row["qps"] for row in group]
    if arrivals == "trace":
        return f"{rates[0]:.3g} trace"
    return f"{number(mean(rates), 2)} drawn"


def capacities(rows: Sequence[dict[str, Any]], unit: str = "1/s") -> Table:
    """One line per row of a policy's capacity, in `unit`; ratios are to the first."""
    first = rows[0]["policy"]
    ratio = f"ratio to {first if len(first) <= LONG else 'the first'}"
    table = new_table("policy", "limited by", f"capacity ({unit})", ratio, text=2)
    for row in rows:
        figures = []
        for name, ends in (("capacity_qps", "ci"), ("ratio", "ratio_ci")):
            ends_text = between(row[f"{ends}_low"], row[f"{ends}_high"], 3)
            figures.append(number(row[name], 3) + ends_text.replace(" [", "\n["))
        table.add_row(row["policy"], row["limited_by"] or (OUTSIDE if row["note"] else "-"), *figures)
    return table


def served(rows: Sequence[dict[str, Any]], unit: str = "1/s") -> Table:
    """Who is served at capacity, where a row says so: shares of requests, in all and by tenths of prompt length.

    Turns of sessions can be cancelled, too. What came too late for its SLOs is what is left of 100 %.
    """
    tenths = [f"-{10 * i + 10}" for i in range(10)]
    title = "At capacity, by tenth of prompt length (up to that percentile)"
    load = "load\n(1/s)" if unit == "1/s" else "sessions\n(1/s)"
    table = new_table("share (%)", load, "all", *tenths, title=title)
    for row in rows:
        for name in ("attained", "refused", "abandoned", "cancelled"):
            if name in row:
                shares = [row[name], *row[f"{name}_by_decile"]]
                percent = [number(None if share is None else 100 * share, 0) for share in shares]
                table.add_row(f"{row['policy']} {name}", number(row["at_qps"], 2), *percent)
    return table


def trace_table(found: dict[str, Any]) -> Table:
    """The facts of a trace in words."""

    def seconds(name: str) -> str:
        return f"{number(found[f'{name}_s'], 3)} s"

    table = new_table("trace", found["name"], text=2)
    dropped = f", {counted(found['num_dropped'], 'invalid row')} left out" if found["num_dropped"] else ""
    table.add_row("format", found["format"])
    table.add_row("requests", f"{found['num_requests']:,}{dropped}")
    if found["num_sessions"]:
        turns = f"turns: mean {number(found['turns_mean'], 1)}, max {found['turns_max']:,}"
        table.add_row("sessions", f"{found['num_sessions']:,}; {turns}")
    if found["think_p50_s"] is not None:
        table.add_row("answer to next call", f"p50 {seconds('think_p50')}, p99 {seconds('think_p99')}")
    if found["hit_rate"] is not None:
        table.add_row("prompt tokens seen before", f"{100 * found['seen_share']:.1f} %")
        blocks = f"by full blocks of {found['block_tokens']}"
        table.add_row("hits of an infinite cache", f"{found['hit_rate']:.3f} of prompt tokens, {blocks}")
    if found["num_images"]:
        table.add_row("images, not simulated", f"{found['num_images']:,}")
    if found["duration_s"] is None:
        table.add_row("times", "none: arrivals are drawn")
    else:
        peak = "" if found["peak_qps"] is None else f", {number(found['peak_qps'], 2)} in the busiest minute"
        table.add_row("lasts", f"{found['duration_s']:,.0f} s")
        table.add_row("rate", f"{number(found['qps'], 2)} requests/s{peak}")
        table.add_row(
            "gaps", f"p50 {seconds('gap_p50')}, p99 {seconds('gap_p99')}; CV {number(found['gap_cv'], 2)} (Poisson: 1)"
        )
        table.add_row("dispersion, a minute", f"{number(found['dispersion'], 1)} (Poisson: 1)")
        table.add_row("gaps that are 0", f"{100 * found['zero_gaps']:.1f} %")
        table.add_row("steps back in time", f"{found['num_steps_back']:,}")
    for what in ("prompt", "output"):
        own = {name: found[f"{what}_tokens_{name}"] for name in ("mean", "p50", "p90", "p99", "max")}
        table.add_row(f"{what} tokens", ", ".join(f"{name} {value:,.0f}" for name, value in own.items()))
    share = f"{100 * found['over_max_model_len']:.2f} % (rejected on arrival)"
    table.add_row(f"over {found['max_model_len']:,} tokens", share)
    return table


def fit_table(data: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Table:
    """How far a fitted workload is off: figures of the trace, and by how much those of draws differ."""
    figures = [name for name in rows[0] if name not in ("quantity", "ks_distance")]
    table = new_table(f"{data['name']}", *(f"{name}\ntrace, error" for name in figures), "KS\ndistance")
    for row in rows:
        cells = []
        for name in figures:
            error = row[name]["error"]
            cells.append(f"{row[name]['trace']:,.6g}" + ("" if error is None else f"\n{100 * error:+.1f} %"))
        table.add_row(row["quantity"].replace("_", " "), *cells, f"{row['ks_distance']:.3f}")
    found = data["arrivals"]
    if found is None:
        table.caption = "no times: arrivals are drawn at the rate that is asked for"
    else:
        bursts = f"burstiness {found['burstiness']:g}" if "burstiness" in found else "times say nothing about bursts"
        unit = "sessions/s" if data.get("kind") == "sessions" else "requests/s"
        table.caption = f"{found['qps']:g} {unit}, {bursts}: qps and burstiness of a scenario, not of the workload"
    return table
