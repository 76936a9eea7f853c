"""ServeGen's clients (Alibaba, arXiv 2505.09999): a folder of rates and lengths by time, from which requests are drawn.

``chunk-N-trace.csv`` has no header: start of a window (s), rate (1/s), coefficient of variation, Gamma, Weibull or
nothing, shape, scale. ``chunk-N-dataset.json`` has, by start of a longer window, the text of {tokens: probability} for
input and output. The shape is kept and gaps are scaled to the window's rate: a Weibull's own scale misses it by up to
a factor of two. The first hour is drawn, with a fixed seed.
"""

from __future__ import annotations

import ast
import json
import math
import zlib
from pathlib import Path

import numpy as np

SPAN_S = 3600.0
LAST_WINDOW_S = 600.0  # a client's last window has no end


def is_servegen(path: Path) -> bool:
    """Whether the folder holds ServeGen's chunks."""
    return path.is_dir() and any(path.glob("chunk-*-trace.csv"))


def draw_requests(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """Arrival (s), prompt and output tokens and client of each request, in no order, and the seconds the folder covers.

    Raises :class:`ValueError` with file and fault.
    """
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    end_s = 0.0
    files = sorted(path.glob("chunk-*-trace.csv"), key=lambda file: (len(file.name), file.name))
    clients = [(file, *_windows(file)) for file in files]
    start_s = min((windows[0][0] for _, windows, _ in clients if windows), default=0.0)
    for number, (file, windows, last_s) in enumerate(clients):
        end_s = max(end_s, last_s)
        rng = np.random.default_rng(zlib.crc32(file.name.encode()))
        lengths = None
        for begin_s, stop_s, rate, kind, shape in windows:
            if rate <= 0.0 or begin_s >= start_s + SPAN_S:
                continue
            lengths = lengths or _lengths(file.with_name(file.name.replace("-trace.csv", "-dataset.json")))
            arrival_s = _arrivals(rng, begin_s, min(stop_s, start_s + SPAN_S), rate, kind, shape)
            prompt, output = (_drawn(rng, table, begin_s, len(arrival_s)) for table in lengths)
            parts.append((arrival_s, prompt, output, np.full(len(arrival_s), number)))
    if not parts:
        raise ValueError(f"{path}: no client sends anything in its first hour")
    arrival_s, prompt, output, client = (np.concatenate(part) for part in zip(*parts, strict=True))
    return arrival_s, prompt, output, client, end_s - start_s


Window = tuple[float, float, float, str, float]
"""Begin and end (s), rate (1/s), kind of gaps and their shape."""


def _windows(file: Path) -> tuple[list[Window], float]:
    rows = []
    for line, words in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not words.strip():
            continue
        fields = [field.strip() for field in words.split(",")]
        try:
            begin_s, rate = float(fields[0]), float(fields[1])
            kind = fields[3] if len(fields) > 3 else ""
            shape = float(fields[4]) if kind else 1.0
        except (ValueError, IndexError):
            shown = words[:40]
            raise ValueError(
                f"{file}: line {line}: expected start, rate, CV, kind, shape, scale, got {shown!r}"
            ) from None
        ok = math.isfinite(begin_s) and 0.0 <= rate < math.inf and kind in ("", "Gamma", "Weibull")
        if not ok or not 0.0 < shape < math.inf:
            what = "expected a rate >= 0 and Gamma, Weibull or nothing with a shape > 0"
            raise ValueError(f"{file}: line {line}: {what}, got {words[:40]!r}")
        rows.append((begin_s, rate, kind, shape))
    rows.sort()
    ends = [row[0] for row in rows[1:]]
    ends += [rows[-1][0] + (rows[-1][0] - rows[-2][0] if len(rows) > 1 else LAST_WINDOW_S)] if rows else []
    found = [
        (begin_s, stop_s, rate, kind, shape) for (begin_s, rate, kind, shape), stop_s in zip(rows, ends, strict=True)
    ]
    return found, ends[-1] if ends else 0.0


def _arrivals(
    rng: np.random.Generator, begin_s: float, end_s: float, rate: float, kind: str, shape: float
) -> np.ndarray:
    """Arrivals of one window: gaps of the given shape whose mean is 1 / rate, from a random point of the first on."""
    expected = rate * (end_s - begin_s)
    n = int(expected + 6.0 * math.sqrt(expected) + 20)
    arrival_s = np.empty(0)
    at_s = begin_s
    while at_s <= end_s:
        if kind == "Gamma":
            gaps = rng.standard_gamma(shape, n) / shape
        elif kind == "Weibull":
            gaps = rng.weibull(shape, n) / math.gamma(1.0 + 1.0 / shape)
        else:
            gaps = rng.standard_exponential(n)
        if len(arrival_s) == 0:
            gaps[0] *= rng.random()
        arrival_s = np.concatenate([arrival_s, at_s + np.cumsum(gaps) / rate])
        at_s = float(arrival_s[-1])
    return arrival_s[arrival_s < end_s]


Tables = list[tuple[float, np.ndarray, np.ndarray]]
"""By start of a window (s): tokens and their probabilities; windows without any are left out."""


def _lengths(file: Path) -> tuple[Tables, Tables]:
    try:
        windows = json.loads(file.read_text(encoding="utf-8"))
        found: tuple[Tables, Tables] = ([], [])
        for begin, fields in windows.items():
            for table, name in zip(found, ("input_tokens", "output_tokens"), strict=True):
                shares = ast.literal_eval(fields[name])  # the text of a dict; never evaluated as code
                if shares:
                    tokens, probs = (np.array([*part], float) for part in (shares.keys(), shares.values()))
                    table.append((float(begin), tokens, probs / probs.sum()))
        if not all(found):
            raise ValueError("no lengths in it")
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, OSError) as error:
        raise ValueError(f"{file}: expected {{start: {{input_tokens, output_tokens}}}}: {error}") from None
    return found


def _drawn(rng: np.random.Generator, tables: Tables, begin_s: float, n: int) -> np.ndarray:
    """Lengths from the window that holds `begin_s`, or the nearest that has some; at least one token."""
    _, tokens, probs = min(tables, key=lambda t: (t[0] > begin_s, abs(t[0] - begin_s)))
    return np.maximum(rng.choice(tokens, size=n, p=probs), 1.0)
