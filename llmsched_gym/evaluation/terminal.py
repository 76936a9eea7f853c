"""What the command line prints: tables of figures over seeds, with intervals where there are enough, or JSON."""

from __future__ import annotations

import codecs
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from llmsched_gym.evaluation.intervals import Interval, interval, mean, median, median_interval

if TYPE_CHECKING:
    from rich.table import Table

    from llmsched_gym.evaluation.capacity import Capacity
    from llmsched_gym.evaluation.replay import Replay

NONE, INFINITE, OUTSIDE = "-", "inf", "not in the range"
BROKEN_PIPE = 141
PIPE_WIDTH = 180  # columns of a table that no terminal bounds


def number(value: float | None, digits: int = 3, none: str = NONE) -> str:
    return none if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, bounds: Interval | None, digits: int = 3) -> str:
    """A figure over seeds with its 95 % interval; None is infinite."""
    text = number(value, digits, INFINITE)
    return text if bounds is None else f"{text} [{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def new_table(*columns: str, title: str | None = None, text: int = 1) -> Table:
    """A table whose first `text` columns are text and whose others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < text else "right", overflow="fold")
    return table


def loads(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, float | None], list[dict[str, Any]]]:
    """Rows by policy and requested rate, in their order; None where each seed draws its own rate."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["policy"], row["requested_qps"]), []).append(row)
    return groups


def comparison(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Who is served in time, and how fast: a table each, with one line per policy and load."""
    seeds, rule = len({row["seed"] for row in rows}), rows[0]["tbt_rule"]
    served = new_table(
        *("policy", "load\n(1/s)", "within SLOs\nall (%)", "\nstrict", "utility", "lost\n(%)", "rejected\n(%)"),
        title=f"Means over {seeds} seed{'s' if seeds > 1 else ''}; gaps between tokens judged by the rule {rule}",
    )
    speed = new_table(
        *("policy", "load\n(1/s)", "TTFT (s)\np50", "\np99", "p99 ITL (s)\nstrict", "\nrelaxed", "output\ntokens/s"),
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
            number(mean(over_seeds("mean_utility"))),
            percent("refused", "abandoned"),
            percent("rejected"),
        )
        infinite = p99_s.count(None)
        few = f"\n{infinite}/{len(group)} {INFINITE}" if 0 < infinite < len(group) else ""
        speed.add_row(
            *where,
            with_interval(median(p50_s), median_interval(p50_s) if independent else None).replace(" [", "\n["),
            number(median(p99_s), 2, INFINITE) + few,
            number(median(over_seeds("itl_p99_s_by_class", "strict"))),
            number(median(over_seeds("itl_p99_s_by_class", "relaxed"))),
            number(mean(over_seeds("throughput_tok_s")), 0),
        )
    return [served, speed]


def load_text(group: Sequence[dict[str, Any]]) -> str:
    """The arrival rate of some runs, and where it comes from if nobody asked for it."""
    asked, arrivals = group[0]["requested_qps"], group[0]["arrivals"]
    if asked is not None:
        return f"{asked:g}"
    rates = [row["qps"] for row in group]
    if arrivals == "trace":
        return f"{rates[0]:.3g} trace"
    return f"{number(mean(rates), 2)} drawn"


def capacities(found: Sequence[Capacity], ratios: Sequence[dict[str, Any]]) -> Table:
    """One line per policy."""
    table = new_table("policy", "limited by", "capacity (1/s)", f"ratio to {found[0].policy}", text=2)
    for item, ratio in zip(found, ratios, strict=True):
        bounds = f" [{item.ci_low:.3f}, {item.ci_high:.3f}]" if item.ci_low is not None else ""
        against = number(ratio["ratio"])
        if ratio["ratio_ci_low"] is not None:
            against += f" [{number(ratio['ratio_ci_low'])}, {number(ratio['ratio_ci_high'])}]"
        table.add_row(
            item.policy, item.limited_by or (OUTSIDE if item.note else NONE), number(item.qps) + bounds, against
        )
    return table


def served(found: Sequence[Capacity]) -> Table:
    """Who is served at capacity: shares of requests, in all and by tenths of prompt length."""
    tenths = [f"-{10 * i + 10}" for i in range(10)]
    title = "At capacity, by tenth of prompt length (up to that percentile)"
    table = new_table("share (%)", "load\n(1/s)", "all", *tenths, title=title)
    for item in found:
        for name in ("attained", "refused", "abandoned"):
            if item.shares:
                shares = [item.shares[name], *item.shares[f"{name}_by_decile"]]
                percent = [NONE if share is None else number(100 * share, 0) for share in shares]
                table.add_row(f"{item.policy} {name}", number(item.shares["at_qps"], 2), *percent)
    return table


def listing(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> Table:
    """Chosen fields of some rows, under the headings of `columns`; those of numbers must come last."""
    text = sum(any(isinstance(row[name], str) for row in rows) for name in columns)
    table = new_table(*columns.values(), text=text)
    for row in rows:
        values = (row[name] for name in columns)
        table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in values))
    return table


def trace_table(found: dict[str, Any]) -> Table:
    """The facts of a trace in words."""

    def seconds_of(name: str) -> str:
        return f"{number(found[name])} s"

    def seconds(name: str) -> str:
        return seconds_of(f"gap_{name}_s")

    table = new_table("trace", found["name"], text=2)
    dropped = f", {found['num_dropped']:,} invalid rows left out" if found["num_dropped"] else ""
    table.add_row("format", found["format"])
    table.add_row("requests", f"{found['num_requests']:,}{dropped}")
    if found["num_sessions"]:
        turns = f"turns: mean {number(found['turns_mean'], 1)}, max {found['turns_max']:,}"
        table.add_row("sessions", f"{found['num_sessions']:,}; {turns}")
    if found["think_p50_s"] is not None:
        table.add_row("answer to next call", f"p50 {seconds_of('think_p50_s')}, p99 {seconds_of('think_p99_s')}")
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
            "gaps", f"p50 {seconds('p50')}, p99 {seconds('p99')}; CV {number(found['gap_cv'], 2)} (Poisson: 1)"
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


def replay_table(result: Replay) -> Table:
    """Measured against simulated latencies and their errors."""
    errors, episode, run = result.errors(), result.episode, result.measured
    failed = f", {run.num_failed:,} failed ones left out" if run.num_failed else ""
    sim = episode.sim
    title = (
        f"{run.name}: {len(run):,} requests{failed}\n"
        f"{result.policy}, {episode.scenario.profile}\n"
        f"{sim.max_num_seqs:,} sequences, {result.token_budget:,} tokens a batch, {sim.total_blocks:,} KV blocks"
    )
    table = new_table("latency", "over requests", "measured", "simulated", "error (%)", title=title, text=2)
    for latency, (name, factor, digits) in {
        "ttft": ("TTFT (s)", 1.0, 3),
        "tpot": ("TPOT (ms)", 1e3, 2),
        "e2e": ("E2E (s)", 1.0, 3),
    }.items():
        pair, own = result.figures(latency), errors[latency]
        for figure, (measured_s, simulated_s) in pair.items():
            values = [number(factor * seconds, digits) for seconds in (measured_s, simulated_s)]
            table.add_row(name, figure, *values, f"{100 * own[f'{figure}_error']:+.1f}")
            name = ""
        if pair:
            table.add_row("", "mean absolute, per request", "", "", number(100 * own["mape"], 1))
    ends = [number(run.end_s, 2) for run in (result.measured, result.simulated)]
    table.add_row("end (s)", "last token", *ends, f"{100 * errors['end_error']:+.1f}")
    table.add_row("preemptions", "in all", NONE, f"{sim.num_preemptions:,}", "")
    return table


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on a terminal's stderr, gone when done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), what, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_listing(rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool = False) -> None:
    if as_json:
        print_rows(rows)
        return
    print_table(listing(rows, columns))


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    emit("[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n")


def print_table(table: Table, file: Any = None) -> None:
    from rich.console import Console

    stream = file or sys.stdout
    terminal = stream is not None and stream.isatty()
    text = io.StringIO()
    width = None if terminal else PIPE_WIDTH
    # names of policies have brackets, which are no markup
    console = Console(file=text, force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False)
    console.print(table)
    emit(text.getvalue(), stream)


def emit(text: str, stream: Any = None) -> None:
    """Write to stdout, and leave quietly if nobody reads it; OSError with one line if it cannot be written to."""
    stream = stream or sys.stdout
    if stream is None:
        raise OSError("stdout is closed: there is nowhere to print to")
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or Python would try again when it ends
        if isinstance(error, BrokenPipeError):
            raise SystemExit(BROKEN_PIPE) from None
        raise OSError(f"stdout: {error.strerror}") from None


LOOK_ALIKES = str.maketrans("─━│┃╭╮╰╯–—×·…≤≥→←µ", "--||++++--x.~<>><u")
"""ASCII for what our tables are made of; as wide, so that columns stay in line."""


def print_anywhere() -> None:
    """Let streams whose encoding lacks a character take an ASCII one for it; do not let files become closed streams."""
    codecs.register_error("look-alike", _look_alike)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="look-alike")
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stderr is None:  # print() would take stdout for it
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives


def _look_alike(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(LOOK_ALIKES)
    return text.encode("ascii", "replace").decode(), error.end
