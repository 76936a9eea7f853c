"""`llmsched serve-bench`: the requests that `evaluate` draws, offered to a running server."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

from llmsched_gym.cli import options as opt
from llmsched_gym.cli.reports import print_comparison, report
from llmsched_gym.cli.values import read_numbers, scenario_of
from llmsched_gym.config import ConfigError
from llmsched_gym.report import console

SERVER = "The server"  # a group of help


def serve_bench(
    *,
    label: Annotated[
        str, opt.option(group=SERVER, help="What the server is called in rows and reports, where policies are.")
    ],
    in_world: opt.World,
    clients: opt.Clients,
    url: Annotated[str | None, opt.option(group=SERVER, help="An OpenAI-compatible server, http://HOST:PORT.")] = None,
    saved: Annotated[
        Path | None,
        opt.option(group=SERVER, metavar="JSON", help="Instead of a server: a result of vllm bench serve."),
    ] = None,
    model: Annotated[
        str | None, opt.option(group=SERVER, help="The model's name at the server (the first it lists).")
    ] = None,
    api_key_env: Annotated[
        str | None,
        opt.option(group=SERVER, metavar="NAME", help="Environment variable that holds the server's API key."),
    ] = None,
    send_slos: Annotated[
        bool, opt.option("--send-slos", group=SERVER, help="Tell the server each request's SLOs, as vllm_xargs.")
    ] = False,
    check_metrics: Annotated[
        bool,
        opt.option("--check-metrics", group=SERVER, help="Compare TTFT and ITL with the histograms at /metrics."),
    ] = False,
    logprobs: Annotated[
        bool,
        opt.option("--logprobs", group=SERVER, help="Ask for logprobs, where only they tell tokens of a chunk."),
    ] = False,
    qps: opt.Qps = None,
    num_requests: opt.NumRequests = None,
    seeds: opt.Seeds = 5,
    first_seed: opt.FirstSeed = 0,
    out: Annotated[Path, opt.option(group=opt.OUTPUT, help="Folder for the results of all labels, and the report.")],
    as_json: opt.AsJson = False,
    config: opt.OptionsFile = None,
) -> None:
    """Offer a running server the requests that evaluate draws, and report on it in the same form."""
    world = scenario_of(in_world, clients, config, num_requests=num_requests)
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
        print_comparison(rows, as_json)
