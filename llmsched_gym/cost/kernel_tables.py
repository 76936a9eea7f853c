"""Tables of measured kernel times, as profilers of serving engines write them: CSV files, plain or gzip.

    dense         layer, tokens, time_us: linear layers and norms
    attention     prefill_chunk, kv_prefill, n_decode, kv_decode, time_us: one layer, one chunk and n equal decodes
    per-sequence  layer, sequences, time_us: output head and sampler
    skew          n, pc, kp, kv_big, kv_mean, t_mean_us, t_skew_us, ...: decodes of unequal contexts against equal ones

Readers return frames of numbers; what cannot be used is a :class:`ProfileError` that names file, line and column.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmsched_gym.cost.surface import ProfileError
from llmsched_gym.text import shown

if TYPE_CHECKING:
    import pandas as pd

ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")
DENSE = ("layer", "tokens", "time_us")
PER_SEQUENCE = ("layer", "sequences", "time_us")
MOST = 1 << 24
"""Tokens or sequences that a row may speak of: more is a fault of the file."""
LEAST_US, MOST_US = 1e-3, 1e9
"""Microseconds that one kernel may take: a nanosecond or a quarter of an hour is a fault of the file, too."""
TIME = f"a time from {LEAST_US:g} to {MOST_US:,.0f} us"
SKEW = ("n", "pc", "kp", "kv_big", "kv_mean", "t_mean_us", "t_skew_us")


def read_attention(path: str | Path) -> pd.DataFrame:
    """Columns c, p, n, k (tokens of the chunk, before it; decodes, KV tokens of each), us; medians of equal cells."""
    table = _read(path, ATTENTION)
    chunk, decodes, context = table.prefill_chunk, table.n_decode, table.kv_decode
    _check(path, table, "prefill_chunk", (chunk > 0) | (decodes > 0), "a chunk or decodes")
    _check(path, table, "kv_decode", (decodes == 0) | (context > 0), "a context > 0 of the decodes")
    cells = table.set_axis(["c", "p", "n", "k", "us"], axis=1)
    cells.loc[cells.c == 0, "p"] = 0
    cells.loc[cells.n == 0, "k"] = 0
    return cells.groupby(["c", "p", "n", "k"], as_index=False)["us"].median()


def read_dense(path: str | Path, num_layers: int) -> pd.Series:
    """Microseconds of all linear layers by tokens: layernorm twice a layer, embedding and final_layernorm once."""
    table = _wide(path, DENSE, "tokens")
    times = {name: num_layers * (2 if name == "layernorm" else 1) for name in table.columns}
    times |= dict.fromkeys(("embedding", "final_layernorm"), 1)
    return sum(times[name] * table[name] for name in table.columns)


def layers(path: str | Path) -> list[str]:
    """The linear layers that :func:`read_dense` adds up; one that is not there costs nothing."""
    return sorted(_read(path, DENSE).layer.unique())


def read_per_sequence(path: str | Path) -> pd.Series:
    """Microseconds of output head and sampler by sequences."""
    return _wide(path, PER_SEQUENCE, "sequences").sum(axis=1)


def read_skew(path: str | Path) -> pd.DataFrame:
    """Columns c, p, n, longest and mean (KV tokens of the decodes), ratio (to equal contexts of the mean)."""
    table = _read(path, SKEW, whole=("n", "pc", "kp"))
    _check(path, table, "n", table.n > 0, "decodes")
    _check(path, table, "kv_mean", table.kv_mean > 0, "a number > 0")
    for name in ("t_mean_us", "t_skew_us"):
        _check(path, table, name, table[name].between(LEAST_US, MOST_US), TIME)
    _check(path, table, "kv_big", table.kv_big >= table.kv_mean, "at least kv_mean")
    out = table[["pc", "kp", "n", "kv_big", "kv_mean"]].set_axis(["c", "p", "n", "longest", "mean"], axis=1)
    return out.assign(ratio=table.t_skew_us / table.t_mean_us)


def _wide(path: str | Path, columns: Sequence[str], index: str) -> pd.DataFrame:
    """Layers side by side against `index`, which all of them share."""
    table = _read(path, columns)
    _check(path, table, index, table[index] >= 1, "a whole number >= 1")
    wide = table.pivot_table(index=index, columns="layer", values="time_us", aggfunc="median")
    if wide.isna().to_numpy().any():
        layer = wide.columns[wide.isna().any()][0]
        missing = wide.index[wide[layer].isna()][0]
        raise ProfileError(f"{path}: column 'layer': {layer} has no time at {index} {missing}; other layers have")
    if len(wide) < 2:
        raise ProfileError(f"{path}: column {index!r}: expected at least two different values")
    return wide


def _read(path: str | Path, columns: Sequence[str], whole: Sequence[str] | None = None) -> pd.DataFrame:
    """The named columns: `layer` as text, times > 0, all others whole numbers >= 0 (or only those of `whole`)."""
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    except (OSError, EOFError, zlib.error, ValueError) as error:  # pandas' parser errors are ValueErrors
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ProfileError(f"{path}: cannot read: {text}") from None
    for column in columns:
        if column not in table.columns:
            raise ProfileError(f"{path}: line 1: no column {column!r}; expected {', '.join(columns)}")
        if f"{column}.1" in table.columns:  # which is what pandas calls a second one
            raise ProfileError(f"{path}: line 1: column {column!r} is there twice")
    if table.empty:
        raise ProfileError(f"{path}: no rows")
    parsed = {}
    for column in columns:
        if column == "layer":
            _check(path, table, column, table.layer.str.strip() != "", "a layer's name")
            parsed[column] = table.layer.str.strip()
            continue
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64)
        if column == "time_us":
            _check(path, table, column, (values >= LEAST_US) & (values <= MOST_US), TIME)
        else:
            ok = (values >= 0) & (values <= (MOST_US if column.endswith("_us") else MOST))
            if whole is None or column in whole:
                ok &= np.equal(np.mod(values, 1.0), 0.0, where=ok, out=np.zeros(len(values), bool))
                _check(path, table, column, ok, f"a whole number from 0 to {MOST:,}")
                values = values.astype(np.int64)
            else:
                _check(path, table, column, ok, TIME if column.endswith("_us") else f"a number from 0 to {MOST:,}")
        parsed[column] = values
    return pd.DataFrame(parsed)


def _check(path: str | Path, table: pd.DataFrame, column: str, ok: pd.Series | np.ndarray, expected: str) -> None:
    bad = np.flatnonzero(~np.asarray(ok, bool))
    if len(bad):
        i = int(bad[0])
        got = str(table[column].iloc[i])
        raise ProfileError(f"{path}: line {i + 2}, column {column!r}: expected {expected}, got {shown(got)}")
