"""The cases of :mod:`benchmarks.fuzz`, guided by the lines of our readers that they reach, with the library atheris.

Its own instrumentation of all that is loaded takes ten minutes, and kernels cannot be compiled behind it, so only the
plain functions of the modules that read files are instrumented.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import atheris  # type: ignore[import-not-found]

from benchmarks.fuzz import changed, check_good, corpus, read

READERS = (
    *("llmsched_gym.cli.options_file", "llmsched_gym.config", "llmsched_gym.cost", "llmsched_gym.files"),
    *("llmsched_gym.policies", "llmsched_gym.registry", "llmsched_gym.scheduler", "llmsched_gym.workload"),
    *("json", "tomllib"),
)
"""Modules, and packages with all that they hold, whose lines guide."""


def functions(value: Any, module: str) -> Iterator[FunctionType]:
    """Plain functions that a module defines: its own, behind decorators too, and its classes'."""
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    value = getattr(value, "__wrapped__", value)
    if getattr(value, "__module__", None) != module:
        return
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, type):
        for own in list(vars(value).values()):
            yield from functions(own, module)


def instrument(prefixes: Iterable[str]) -> int:
    """Let atheris see the lines and comparisons of loaded modules; returns of how many functions."""
    found = set()
    for name, module in list(sys.modules.items()):
        if any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes):
            for value in list(vars(module).values()):
                found.update(functions(value, name))
    for function in found:
        atheris.instrument_func(function)
    return len(found)


def fuzz_guided(seconds: float, seed: int, out: Path) -> None:
    """Try changed files for so long; findings are printed and kept, each once. The process ends with libFuzzer's."""
    good, seen = corpus(), set()
    scratch = tempfile.mkdtemp()
    check_good(good, Path(scratch, "case"))
    instrumented = instrument(READERS)  # behind the first reads: some readers are imported when they are needed
    seeds = Path(scratch, "corpus")
    seeds.mkdir()
    for i, (_, content, _, _) in enumerate(good):
        (seeds / str(i)).write_bytes(bytes([i]) + content)

    def one(data: bytes) -> None:
        if not data:
            return
        name, _, reader, folder = good[data[0] % len(good)]
        said = read(data[1:], name, reader, folder, Path(scratch, "case"))
        if said in ("read", "refused") or (name, said) in seen:
            return
        seen.add((name, said))
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{len(seen):03d}-{name}").write_bytes(data[1:])
        print(json.dumps({"file": f"{len(seen):03d}-{name}", "error": said}), flush=True)

    def mutate(data: bytes, max_size: int, own_seed: int) -> bytes:
        """Half of the cases are changed as a file of its kind is, half as libFuzzer changes bytes."""
        draw = random.Random(own_seed)
        if len(data) < 2 or draw.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return (data[:1] + changed(data[1:], good[data[0] % len(good)][0], draw))[:max_size]

    print(json.dumps({"instrumented": instrumented, "seeds": len(good)}), flush=True)
    longest = 1 + max(len(content) for _, content, _, _ in good)
    options = [
        f"-max_total_time={seconds:.0f}",
        f"-seed={seed + 1}",
        f"-max_len={2 * longest}",
        "-timeout=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one, custom_mutator=mutate)
    atheris.Fuzz()
