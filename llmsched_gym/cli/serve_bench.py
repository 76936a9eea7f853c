"""`llmsched serve-bench`: the requests that `evaluate` draws, offered to a running server."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

import typer

from llmsched_gym.cli import options as opt
from llmsched_gym.cli.reports import report
from llmsched_gym.cli.values import read_numbers, scenario_of
from llmsched_gym.config import ConfigError
from llmsched_gym.report import console, terminal


def serve_bench(
    label: Annotated[str, typer.Option(help="What the server is called in rows and reports, where policies are.")],
    out: Annotated[Path, typer.Option(help="Folder for the results of all labels, and the report.")],
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, http://HOST:PORT.")] = None,
    saved: Annotated[
        Path | None, typer.Option(metavar="JSON", help="Instead of a server: a result of vllm bench serve.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name at the server (the first it lists).")] = None,
    suite: opt.SuiteName = "default",
    workload: opt.Workload = None,
    trace: opt.TraceFile = None,
    trace_arrivals: opt.TraceArrivals = None,
    trace_invalid: opt.TraceInvalid = None,
    qps: Annotated[
        str | None,
        typer.Option(help="Arrival rates, 1/s, of requests or sessions, separated by commas; else the suite's."),
    ] = None,
    num_requests: opt.NumRequests = None,
    seeds: opt.Seeds = 5,
    first_seed: opt.FirstSeed = 0,
    strict_share: opt.StrictShare = None,
    ttft_slo: opt.TtftSlo = None,
    tbt_slo: opt.TbtSlo = None,
    patience: opt.Patience = None,
    tbt_rule: opt.TbtRule = None,
    set_: opt.Set = None,
    send_slos: Annotated[
        bool, typer.Option("--send-slos", help="Tell the server each request's SLOs, as vllm_xargs.")
    ] = False,
    check_metrics: Annotated[
        bool, typer.Option("--check-metrics", help="Compare TTFT and ITL with the histograms at /metrics.")
    ] = False,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Ask for logprobs, where only they tell tokens of a chunk.")
    ] = False,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the server's API key.")
    ] = None,
    config: opt.OptionsFile = None,
    as_json: opt.AsJson = False,
) -> None:
    """Offer a running server the requests that evaluate draws, and report on it in the same form."""
    world = scenario_of({name: value for name, value in locals().items() if name != "model"})
    rates = None if qps is None else read_numbers("qps", qps)
    if (url is None) == (saved is None):
        raise ConfigError("url: expected one of --url and --saved")
    if api_key_env is not None and api_key_env not in os.environ:
        raise ConfigError(f"api_key_env: no environment variable {api_key_env!r}")
    from llmsched_gym.serving.join import join

    if saved is not None:
        importlib.import_module("llmsched_gym.serving.saved").add_saved(world, saved, label, out)
    else:
        try:
            serving = importlib.import_module("llmsched_gym.serving.bench")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("llmsched_gym"):
                raise
            raise ConfigError(f"llmsched serve-bench needs {error.name}: pip install '.[serve]'") from None
        key = None if api_key_env is None else os.environ[api_key_env]
        server = serving.Server(url, label, model, send_slos, check_metrics, logprobs, key)
        with console.progress_bar("requests") as progress:
            serving.serve_bench(
                world,
                server,
                qps=rates,
                seeds=seeds,
                first_seed=first_seed,
                out=out,
                progress=progress,
                say=console.remark,
            )
    rows = join(out)
    try:
        report([out])
    finally:
        if as_json:
            console.print_rows(rows)
        else:
            for table in terminal.comparison(rows):
                console.print_table(table)
