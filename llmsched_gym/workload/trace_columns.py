"""Columns of trace files: values from texts, which of them are valid, and what was expected."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsched_gym.workload.trace_formats import CACHED, THINK, TraceFormat

MAX_TOKENS = 2**31 - 1


def parse_ids(fmt: TraceFormat, fields: list[Any], prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray, str]:
    """The ids of each row's blocks (object), and a mask of the valid ones."""
    values, valid = np.empty(len(fields), object), np.zeros(len(fields), bool)
    for row, given in enumerate(fields):
        if not isinstance(given, list) or len(given) != -(-int(prompts[row]) // fmt.block_tokens):
            continue
        if all(type(one) is int and abs(one) < 2**63 for one in given):
            values[row], valid[row] = np.array(given, np.int64), True
    return values, valid, "ids"


def wrong_ids(fmt: TraceFormat, given: Any, prompt: int) -> str:
    """What is wrong with the ids of a prompt's blocks."""
    need = -(-prompt // fmt.block_tokens)
    what = f"expected {need} ids for {prompt} tokens in blocks of {fmt.block_tokens}"
    if not isinstance(given, list):
        return f"{what}, got {given!r:.40}"
    if len(given) > need:
        return f"{what}, got {len(given)}: blocks of another size, which this file does not say"
    return f"{what}, got {len(given)}" if len(given) < need else f"{what}, all of them whole numbers of 64 bits"


def parse_column(fmt: TraceFormat, name: str, fields: list[str]) -> tuple[np.ndarray, np.ndarray, str]:
    """Values, a mask of the valid ones, and what was expected."""
    import pandas as pd  # here, because importing it takes longer than everything else in this package

    text = np.array(fields, dtype=object)
    if name == fmt.session:
        text[np.array([not field.strip() for field in fields], bool)] = None
        return text, np.ones(len(text), bool), "anything"
    if name == THINK:
        seconds = np.asarray(pd.to_numeric(text, errors="coerce"), dtype=np.float64)
        return seconds, (seconds >= 0.0) & (seconds < np.inf) | (text == ""), "seconds >= 0"
    if name == CACHED:
        text = np.array([field or "0" for field in fields], dtype=object)
    if name == fmt.time and fmt.time_kind == "datetime":
        moments = pd.to_datetime(text, utc=True, format="ISO8601", errors="coerce")
        valid = np.asarray((moments.year >= 1700) & (moments.year <= 2200))  # what nanoseconds can count
        return pd.DatetimeIndex(moments.where(valid)).as_unit("ns").asi8, valid, "a date and time (ISO 8601)"
    numbers = np.asarray(pd.to_numeric(text, errors="coerce"), dtype=np.float64)
    if name == fmt.time:
        return numbers, np.isfinite(numbers), f"a finite time in {fmt.time_kind}"
    least = 0.0 if name in (fmt.images, CACHED) else 1.0
    with np.errstate(invalid="ignore"):
        valid = (numbers >= least) & (numbers <= MAX_TOKENS) & (numbers == np.floor(numbers))
    return numbers, valid, f"a whole number >= {least:g}"
