"""Measurements and conformance checks; run as `python -m benchmarks.NAME`."""

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from llmsched_gym.files import check_place, claim_folder, make_folder


def whole(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def new_folder(out: Path, marks: Mapping[str, Callable[[Path], bool]]) -> None:
    """Make a folder for checks, empty; ConfigError of one line where it holds what no run with these marks has left.

    `marks` are those of :func:`llmsched_gym.files.claim_folder`, names without wildcards.
    """
    claim_folder(out, "checks of this module", marks)
    check_place(out)
    if any((out / name).exists() for name in marks):
        shutil.rmtree(out)
    make_folder(out)
