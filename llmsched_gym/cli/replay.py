"""`llmsched replay`: a measured run against the simulator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from llmsched_gym.cli import options as opt
from llmsched_gym.cli.endings import FAILURE
from llmsched_gym.cli.values import split_policies
from llmsched_gym.config import ConfigError
from llmsched_gym.report import console


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="CSV of request times, or JSON of vllm bench serve.")],
    profile: Annotated[str, typer.Option(rich_help_panel="The simulator", help="Cost profile: a name or a JSON file.")],
    policy: Annotated[
        str,
        typer.Option(rich_help_panel="The simulator", help="What served the run: a name, module:Class or a folder."),
    ] = "vllm-v1",
    max_num_seqs: Annotated[
        int | None, typer.Option(rich_help_panel="The simulator", help="Requests that may run at once (the profile's).")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="The simulator",
            help="Tokens in a batch, and vllm-v1's budget (vLLM's on the profile's device).",
        ),
    ] = None,
    kv_blocks: Annotated[
        int | None, typer.Option(rich_help_panel="The simulator", help="Usable KV blocks of 16 tokens (the profile's).")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Output",
            help="Exit with 1 if the mean of TTFT, TPOT or E2E is off by more than this fraction.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(rich_help_panel="Output", help="Folder for requests.csv and replay.png.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Compare a measured serving run with the simulator, request by request."""
    if max_error is not None and not max_error >= 0.0:
        raise ConfigError(f"max_error: expected a fraction >= 0, got {max_error!r}")
    names = split_policies([policy])
    if len(names) != 1:
        raise ConfigError(f"policy: expected one name, got {policy!r}")
    from llmsched_gym.evaluation import replay as replays
    from llmsched_gym.workload.served_runs import load_run

    if out is not None:
        replays.claim_replay(out)
    result = replays.replay(
        load_run(run),
        names[0],
        profile,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_kv_blocks=kv_blocks,
    )
    if out is not None:
        replays.write(result, out)
    errors = result.errors()
    if as_json:
        console.emit(json.dumps(errors, allow_nan=False) + "\n")
    else:
        from llmsched_gym.evaluation.replay_table import replay_table

        console.print_table(replay_table(result))
    over = [] if max_error is None else replays.above(errors, max_error)
    for text in over:
        console.remark(text)
    if over:
        raise typer.Exit(FAILURE)
