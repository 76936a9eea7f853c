"""Broken and hostile files for whatever reads one: traces, profiles, workloads, suites, options, policy folders.

    python -m benchmarks.fuzz [--seconds 600] [--seed 0] [--atheris]

Each case is a good file in which bytes, lines or values are changed. It is read, as something that a run can go on
with, or refused with one line of the reader's own error; anything else, or more than `HANG_S` seconds, is a finding,
printed as JSON; its file is kept in ``out/fuzz``. Unpickling and running a process count as findings too. With
``--atheris`` (``pip install atheris``; Python 3.11) that library chooses what to change, guided by the lines of our
readers that cases reach (:mod:`benchmarks.fuzz_guided`).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import llmsched_gym
from llmsched_gym.cli.options_file import read_options
from llmsched_gym.config import ConfigError, scenario
from llmsched_gym.cost import ProfileError, load_profile
from llmsched_gym.help_text import place
from llmsched_gym.scheduler import PolicyError, make_scheduler
from llmsched_gym.workload import TraceError, load_trace
from llmsched_gym.workload.mixture import load_sessions

DATA = Path(llmsched_gym.__file__).parent / "data"
HANG_S = 20
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 1e-308, 0.5, 10**400),
    *("", "x", "nan", "inf", "-0", "\x00", "é" * 300, "../../etc/passwd", "$(touch x)", [], {}, [[]], {"": []}),
)
TOKENS = ("nan", "inf", "-1", "1e400", "999999999999999999999", "", '"', ",", "\t", "\r", "\x00", "é", "{", "[" * 2000)
TRACES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.68,374,44\n2023-11-16 18:15:50.95,396,109\n",
    "burstgpt.csv": "Timestamp,Session ID,Request tokens,Response tokens\n5,1,472,18\n45,1,1087,230\n118,2,417,276\n",
    "vidur.csv": "arrived_at,num_prefill_tokens,num_decode_tokens\n0.1,10,5\n0.7,20,6\n",
    "lengths.csv": "num_prefill_tokens,num_decode_tokens\n10,5\n20,6\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 900, "output_length": 5, "hash_ids": [1, 2]}\n'
    '{"timestamp": 27, "input_length": 700, "output_length": 9, "hash_ids": [1, 3]}\n',
}
OPTIONS = {
    "run.toml": 'policy = "slai,sarathi"\nqps = [1.4, 1.8]\nseeds = 3\n[set]\nhorizon_s = 100.0\n',
    "run.json": '{"policy": "slai", "qps": [1.4], "seeds": 2, "set": {"horizon_s": 30}}\n',
}


SUITE_FILES = {
    "suite.toml": 'base = "default"\nwhat = "bursts"\n[scenario]\narrivals = "gamma"\nburstiness = 0.5\n'
    "qps_range = [1.0, 2.0]\npatience_s = 30.0\nmax_num_seqs = 64\n",
    "replicas.toml": 'what = "two"\n[scenario]\nnum_replicas = 2\n'
    'replica_profiles = ["rtx6000ada-mistral-7b", "a100-mistral-7b"]\n'
    "replica_failures = [[0, 1.0, 2.0]]\nrouter_staleness_s = 0.5\nprefix_caching = true\n",
}
VALUES = (
    "nan",
    "inf",
    "-1",
    "0",
    "1e400",
    "true",
    '""',
    '"x"',
    "[]",
    "[[[1]]]",
    "{}",
    "9223372036854775808",
    "[" * 2000,
)


def _expect(is_valid: Any, what: str) -> None:
    """A reader has let something through that no run can go on with."""
    if not is_valid:
        raise AssertionError(what)


def _options(path: Path) -> Any:
    return read_options(path, ["policy", "qps", "seeds", "suite", "set"])


def _trace(path: Path, on_invalid: Any = "raise") -> None:
    trace = load_trace(path, on_invalid)
    for tokens in (trace.prompt_tokens, trace.output_tokens):
        _expect(len(tokens) > 0 and tokens.min() >= 1, "a request without tokens")
    if trace.arrival_s is not None:
        _expect(np.isfinite(trace.arrival_s).all() and (np.diff(trace.arrival_s) >= 0.0).all(), "times out of order")


def _profile(path: Path) -> None:
    profile = load_profile(path)
    for chunks, contexts in (([(0, 512)], [1000] * 8), ([], [1])):
        _expect(0.0 < profile.predict_s(chunks, contexts) < math.inf, "a batch that takes no time, or for ever")


def _suite(path: Path) -> None:
    found = scenario(str(path))
    _expect(
        type(found)(**found.to_dict()).to_dict() == found.to_dict(), "a suite that is another one when it is made again"
    )


def _policy(path: Path) -> None:
    make_scheduler(f"{path.parent}/")


def corpus() -> list[tuple[str, bytes, Callable[[Path], Any], Path | None]]:
    """Kind, good content, its reader, and the folder that it is a file of, where that is what is read."""
    found: list[tuple[str, bytes, Callable[[Path], Any], Path | None]] = []
    for name, text in TRACES.items():
        found.append((name, text.encode(), _trace, None))
        found.append((name, text.encode(), lambda path: _trace(path, "drop"), None))
    found += [(name, text.encode(), _options, None) for name, text in OPTIONS.items()]
    found += [(path.name, path.read_bytes(), _profile, None) for path in sorted((DATA / "profiles").glob("*.json"))]
    found += [(name, text.encode(), _suite, None) for name, text in SUITE_FILES.items()]
    workloads = sorted((DATA / "workloads").glob("*.json"))
    found += [(path.name, path.read_bytes(), lambda path: load_sessions(str(path)), None) for path in workloads]
    for folder in sorted(path for path in (DATA / "policies").iterdir() if path.is_dir()):
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            found.append((path.name, path.read_bytes(), _policy, folder))
    return found


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: a container and a key or an index."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from nodes(inner)


def _json(content: bytes) -> Any:
    """What the content says; None if it is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def changed(content: bytes, name: str, draw: random.Random) -> bytes:
    """Good content with a few changes."""
    value = _json(content) if name.endswith(".json") and draw.random() < 0.7 else None
    if value is not None:
        for _ in range(draw.randint(1, 3)):
            places = list(nodes(value)) if isinstance(value, dict | list) else []
            if not places:
                break
            holder, key = draw.choice(places)
            if draw.random() < 0.15:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(draw.choice(HOSTILE))  # which the next change may change
        return json.dumps(value).encode()
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(7 if name.endswith(".toml") else 6)
        if how == 0:
            data[at : at + draw.choice((1, 8, 1000))] = b""
        elif how == 1:
            data[at:at] = draw.choice(TOKENS).encode()
        elif how == 2:
            data[at:at] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 4, 40))))
        elif how == 3 and data:
            data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif how == 4:
            data = data[:at]
        elif how == 6:
            lines = data.split(b"\n")
            i = draw.randrange(len(lines))
            lines[i] = lines[i].partition(b"=")[0] + b"= " + draw.choice(VALUES).encode()
            data = bytearray(b"\n".join(lines))
        else:
            lines = data.split(b"\n")
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(lines))
            data = bytearray(b"\n".join(lines))
    return bytes(data)


class Hang(BaseException):
    """A reader that takes too long."""


class Executed(BaseException):
    """A reader that ran what a file says."""


def _forbidden(function: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for `function` while a file is read; numba's cache of kernels, which is ours, may go on."""

    def instead(*args: Any, **more: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("numba."):
            return function(*args, **more)
        raise Executed

    return instead


@contextmanager
def guarded() -> Iterator[None]:
    """Nothing may hang, unpickle or run a process in here."""

    def ring(number: int, frame: Any) -> None:
        raise Hang

    kept = pickle.loads, pickle.load, subprocess.Popen, os.system
    pickle.loads, pickle.load, subprocess.Popen, os.system = map(_forbidden, kept)  # type: ignore[misc, assignment]
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        pickle.loads, pickle.load, subprocess.Popen, os.system = kept  # type: ignore[misc]


def read(content: bytes, name: str, reader: Callable[[Path], Any], folder: Path | None, place: Path) -> str:
    """Let a reader have the content as a file in `place`: read, refused, or what went wrong."""
    shutil.rmtree(place, ignore_errors=True)
    if folder is None:
        place.mkdir()
    else:
        shutil.copytree(folder, place)
    (place / name).write_bytes(content)
    try:
        with guarded(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader(place / name)
    except (ConfigError, TraceError, ProfileError, PolicyError) as error:
        return "refused" if "\n" not in str(error) else "an error of several lines"
    except (Hang, Executed, Exception) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def check_good(good: list[tuple[str, bytes, Callable[[Path], Any], Path | None]], place: Path) -> None:
    """Nothing is changed usefully of a file that is refused as it is; `place` is a folder to read in."""
    for name, content, reader, folder in good:
        said = read(content, name, reader, folder, place)
        _expect(said == "read", f"{name}, unchanged: {said}")


def fuzz(seconds: float, seed: int, out: Path) -> int:
    """Try changed files for so long; prints what was found and how much was tried. Returns the number of findings."""
    draw, good = random.Random(seed), corpus()
    tried, read_, seen = 0, 0, set()
    end_s = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        check_good(good, Path(scratch, "case"))
        while time.monotonic() < end_s:
            name, content, reader, folder = draw.choice(good)
            content = changed(content, name, draw)
            said = read(content, name, reader, folder, Path(scratch, "case"))
            tried, read_ = tried + 1, read_ + (said == "read")
            if said in ("read", "refused") or (name, said) in seen:
                continue
            seen.add((name, said))
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{len(seen):03d}-{name}").write_bytes(content)
            print(json.dumps({"file": f"{len(seen):03d}-{name}", "error": said}), flush=True)
    print(json.dumps({"tried": tried, "read": read_, "findings": len(seen), "seed": seed}), flush=True)
    return len(seen)


def main() -> int:
    """Fuzz, and fail where something was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="let that library choose what to change")
    parser.add_argument("--out", type=place, default=Path("out/fuzz"), help="where files of findings are kept")
    args = parser.parse_args()
    if args.atheris:
        from benchmarks.fuzz_guided import fuzz_guided

        fuzz_guided(args.seconds, args.seed, args.out)
        return 0
    return 1 if fuzz(args.seconds, args.seed, args.out) else 0


if __name__ == "__main__":
    sys.exit(main())
