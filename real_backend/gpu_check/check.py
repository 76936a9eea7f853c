"""Everything worth measuring on a GPU, in one command that ends in time.

    python -m llmsched_gym.real_backend.gpu_check --model random:mistral-7b --out out/gpu --minutes 8

Sections run by importance, each within a share of the time that is left; one that fails, or runs out of time, is noted
and the next one runs. What is measured is on the disk at once: CSVs, `summary.json` and `summary.md` in the folder. On
a CPU everything is smaller, so that the command itself can be tried.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from llmsched_gym.config import ConfigError
from llmsched_gym.files import claim_folder
from llmsched_gym.real_backend import command
from llmsched_gym.real_backend.calibration.calibrate import limits_for
from llmsched_gym.real_backend.errors import BackendError, one_line
from llmsched_gym.real_backend.gpu_check.report import write
from llmsched_gym.real_backend.gpu_check.sections import SECTIONS
from llmsched_gym.real_backend.gpu_check.state import Check, TimeUp

MAX_SEQS = 256
"""Sequences of the largest batch on a GPU."""


def run_sections(check: Check, names: Sequence[str], seconds: float, say: Callable[[str], None]) -> None:
    """Run the named sections within `seconds`; each one's fate is in `results["sections"]`."""
    end_s = time.monotonic() + seconds
    fates = check.results.setdefault("sections", {})
    shares = {name: share for name, (_, share) in SECTIONS.items() if name in names}
    for name, share in dict(shares).items():
        section, _ = SECTIONS[name]
        start_s = time.monotonic()
        left_s = end_s - start_s
        check.until_s = start_s + left_s * share / sum(shares.values())
        del shares[name]
        fate = "done"
        try:
            check.in_time()
            section(check)
        except TimeUp:
            fate = "time ran out"
        except Exception as error:  # whatever one section runs into, the others are worth having
            fate = f"failed: {type(error).__name__}: {one_line(error, 400)}"
            with (check.out / "errors.txt").open("a", encoding="utf-8") as file:
                file.write(f"{name}\n{traceback.format_exc()}\n")
        fates[name] = {"fate": fate, "seconds": round(time.monotonic() - start_s, 1)}
        write(check.results, check.out)
        say(f"{name}: {fate}, {fates[name]['seconds']} s")


def check_command(
    model: Annotated[str, typer.Option(help="Local folder, hub id, random:mistral-7b or random:tiny.")],
    out: Annotated[Path, typer.Option(help="Folder for all results; a new one.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for everything behind the imports.")] = 8.0,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; the GPU if there is one.")] = None,
    attention: Annotated[str, typer.Option(help="auto, sdpa or triton.")] = "auto",
    graphs: Annotated[bool, typer.Option(help="CUDA graphs where they can be used.")] = True,
    fused: Annotated[bool, typer.Option(help="Fused kernels for models that they know.")] = True,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the largest batch (2048; 512 on a CPU).")] = None,
    max_context: Annotated[int | None, typer.Option(help="Longest sequence, tokens (8192; 512 on a CPU).")] = None,
    max_seqs: Annotated[int | None, typer.Option(help="Sequences of the largest batch (256; 32 on a CPU).")] = None,
    mixtures: Annotated[int | None, typer.Option(help="Random mixed batches of the sweep (160).")] = None,
    sections: Annotated[str, typer.Option(help="Which ones, separated by commas.")] = ",".join(SECTIONS),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of torch.")] = None,
) -> None:
    """Measure everything on this device, within so many minutes."""
    start_s = time.monotonic()
    limits = limits_for(device, max_tokens=max_tokens, max_context=max_context, max_seqs=max_seqs, mixtures=mixtures)
    names = sections.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise ConfigError(f"sections: expected some of {', '.join(SECTIONS)}, got {unknown[0]!r}")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if (out / "summary.json").exists():
        raise BackendError(f"{out}: has a summary already; name a new folder")
    claim_folder(out, "check, whose folder is a new one", {})
    out.mkdir(parents=True, exist_ok=True)
    check = Check(model, out, device, limits, attention, None if graphs else False, fused)
    if max_seqs is None and check.torch_device.type == "cuda":
        check.limits = dataclasses.replace(limits, max_seqs=MAX_SEQS)
    left_s = 60.0 * minutes - (time.monotonic() - start_s)
    run_sections(check, names, left_s, lambda line: print(line, file=sys.stderr))
    fates = {name: entry["fate"] for name, entry in check.results["sections"].items()}
    print(json.dumps({"summary": str(out / "summary.md"), **fates}))
    if any(fate.startswith("failed") for fate in fates.values()):
        raise typer.Exit(1)  # what the other sections measured is kept


def main(argv: Sequence[str] | None = None) -> int:
    return command.run(check_command, "python -m llmsched_gym.real_backend.gpu_check", argv)
