"""Commands about traces: what one is, and a workload fitted to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmsched_gym.cli import options as opt
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.help_text import GroupedCommand, epilog
from llmsched_gym.report import console, terminal


def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace, or a folder of ServeGen's clients.")],
    max_model_len: Annotated[int, typer.Option(min=1, help="Longest request that an engine takes, tokens.")] = 8192,
    trace_invalid: opt.TraceInvalid = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw rates, gaps and lengths into this file.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Say what a trace file is: format, rates, gaps, lengths, and what of it does not fit."""
    from llmsched_gym.report.trace_facts import facts, plot_trace
    from llmsched_gym.workload.traces import load_trace

    checked = scenario(**({} if trace_invalid is None else {"trace_invalid": trace_invalid}))
    loaded = load_trace(file, checked.trace_invalid)
    found = facts(loaded, max_model_len)
    if plot is not None:
        try:
            plot_trace(loaded).savefig(plot, format="png", dpi=120, metadata={"Software": None})
        except OSError as error:
            raise ConfigError(f"plot: cannot write to {plot}: {error.strerror}") from None
    if as_json:
        console.print_rows([found])
        return
    console.print_table(terminal.trace_table(found))


workload_app = typer.Typer(help="Workloads of one's own: `llmsched workload fit TRACE`.", rich_markup_mode=None)


@workload_app.callback()
def _workload() -> None:
    pass


@workload_app.command(
    "fit",
    cls=GroupedCommand,
    epilog=epilog("llmsched workload fit trace.csv --out mine.json --suite my.toml"),
)
def workload_fit(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, or a folder of ServeGen's clients.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="The workload file to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the workload; default: the file's.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the trace comes from, licence included.")] = None,
    suite_out: Annotated[
        Path | None, typer.Option("--suite", metavar="FILE.toml", help="Write a suite, too: with the trace's rate.")
    ] = None,
    max_total_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest prompt + output; default: the trace's.")
    ] = None,
    trace_invalid: opt.TraceInvalid = None,
    as_json: opt.AsJson = False,
) -> None:
    """Fit a workload to a trace: lengths, or sessions where it has them; and say how far it is off."""
    from llmsched_gym.workload import fit_trace
    from llmsched_gym.workload.traces import load_trace

    checked = scenario(**({} if trace_invalid is None else {"trace_invalid": trace_invalid}))
    fit_trace.check_places(out, suite_out)
    loaded = load_trace(trace, checked.trace_invalid)
    data, rows = fit_trace.fit_workload(loaded, name or out.stem, source or trace.name, max_total_tokens)
    fit_trace.write_workload(data, out)
    if suite_out is not None:
        fit_trace.write_suite(data, out, suite_out)
    if as_json:
        console.emit(json.dumps({"workload": str(out), "arrivals": data["arrivals"], "fit": rows}) + "\n")
        return
    console.print_table(terminal.fit_table(data, rows))
