"""Files: written as a whole or not at all, JSON that other programs read, and when a file is still the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmsched_gym.config import ConfigError


def version_of(path: Path) -> tuple[Path, tuple[int, ...]]:
    """The file's place, which outlives a change of folder, and what tells another content there; OSError if none is.

    Modification times can be copied (``cp -p``), the time of the inode's last change cannot.
    """
    stat = path.stat()
    return path.absolute(), (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a hidden file beside `path`, then put it in place: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file; a reader never sees half of it."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def make_folder(out: Path) -> None:
    """Make `out` and try to write there; one line of error otherwise."""
    trial = out / f"trial.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"out: cannot write to {out}: {error.strerror or error}") from None


def check_place(out: Path, field: str = "out") -> None:
    """Refuse a folder that :func:`make_folder` could not make or write to: ConfigError of one line; leaves nothing."""
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:
        raise ConfigError(f"{field}: cannot write to {out}: {error.strerror}") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "may not be written to" if there.is_dir() else "is no folder"
        raise ConfigError(f"{field}: cannot write to {out}: {there} {what}")
    try:  # asked of the system, too: the superuser may write everywhere, and /proc takes nothing
        os.rmdir(tempfile.mkdtemp(prefix=".trial-", dir=there))
    except OSError as error:
        raise ConfigError(f"{field}: cannot write to {out}: {there} takes no folder: {error.strerror}") from None


def claim_folder(out: Path, kind: str, marks: Mapping[str, Callable[[Path], bool]], field: str = "out") -> None:
    """Refuse a folder that holds something and no run of `kind`; an empty one, or none yet, is anybody's.

    `marks` are patterns of the files by which such a run is known, each with what tells it from a file that is merely
    called so. Hidden files are nobody's. ConfigError of one line; makes nothing.
    """
    if not _is_folder(out, field):
        return  # make_folder says what is wrong with a file there
    held = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if held and not any(_holds(is_own, path) for mark, is_own in marks.items() for path in out.glob(mark)):
        what = f"{held[0]}{f' and {len(held) - 1:,} more' if len(held) > 1 else ''}"
        raise ConfigError(
            f"{field}: {out} holds files of something else ({what}), and no {kind}; choose another folder"
        )


def claim_file(out: Path, kind: str, is_own: Callable[[Path], bool], field: str = "out") -> None:
    """Refuse a folder, a file that is no `kind`, a place for none: ConfigError of one line; leaves nothing."""
    if _is_folder(out, field):
        raise ConfigError(f"{field}: expected a file to write, got the folder {out}")
    if out.exists() and not _holds(is_own, out):
        raise ConfigError(f"{field}: {out} is a file of something else, and no {kind}; choose another place")
    check_place(out.parent, field)


def _is_folder(out: Path, field: str) -> bool:
    try:
        return out.is_dir()
    except OSError as error:  # a name that is too long, say
        raise ConfigError(f"{field}: cannot write to {out}: {error.strerror}") from None


def _holds(is_own: Callable[[Path], bool], path: Path) -> bool:
    try:
        return is_own(path)
    except (OSError, ValueError):
        return False


def json_with(*names: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object with these fields."""

    def has_them(path: Path) -> bool:
        found = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(found, dict) and found.keys() >= set(names)

    return has_them


def parse(text: str | bytes, **options: Any) -> Any:
    """``json.loads``, but a whole number beyond float64 is infinite, as one with a point is, and refused as that."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 300 else float(digits), **options)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def encode(value: Any) -> Any:
    """`value` as JSON can hold it: an infinite number becomes the text inf."""
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, dict):
        return {k: encode(v) for k, v in value.items()}
    return [encode(v) for v in value] if isinstance(value, list | tuple) else value


def digest_of(value: Any, digits: int = 12) -> str:
    """So many hexadecimal digits that change with `value`, anything that :func:`encode` turns into JSON."""
    return hashlib.sha256(json.dumps(encode(value), sort_keys=True).encode()).hexdigest()[:digits]


def dumps(value: Any) -> str:
    """`value` as JSON of one field a line, with a last line break; ValueError for what JSON cannot hold."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
