"""Which tokens requests have in common: what prefix caching can find.

A request's tokens are known by two numbers: its prompt begins with the first ``shared_tokens`` tokens, of prompt and
output, of an earlier request ``shares_with`` (-1: nobody), and what follows is its own. So no prompt is ever a list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmsched_gym.config import MOST, ConfigError

Shares = tuple[np.ndarray, np.ndarray]
"""``shares_with`` int32 and ``shared_tokens`` int32, each of shape (num_requests,)."""


def check_lengths(name: str, tokens: np.ndarray, n: int) -> None:
    """Raise :class:`ConfigError` unless these are the lengths of `n` requests: whole numbers >= 1."""
    if tokens.shape != (n,) or tokens.dtype.kind not in "iuf":
        raise ConfigError(f"{name}: expected {n:,} whole numbers, got {tokens.dtype} of shape {tokens.shape}")
    fits = (tokens >= 1) & (tokens <= MOST)
    if tokens.dtype.kind == "f":
        fits &= tokens == np.floor(tokens)
    bad = np.flatnonzero(~fits)
    if len(bad):
        r = int(bad[0])
        raise ConfigError(f"{name}: expected a whole number from 1 to {MOST:,} for request {r}, got {tokens[r]:.15g}")


def check_shares(shares: Shares, prompt_tokens: np.ndarray, output_tokens: np.ndarray) -> None:
    """Raise :class:`ConfigError` unless every request shares at most its prompt, with an earlier one that has it."""
    shares_with, shared_tokens = shares
    n = len(prompt_tokens)
    for name, column in (("shares_with", shares_with), ("shared_tokens", shared_tokens)):
        if column.shape != (n,) or column.dtype.kind not in "iu":
            raise ConfigError(f"{name}: expected {n} whole numbers, got {column.dtype} of shape {column.shape}")
    bad = np.flatnonzero((shares_with < -1) | (shares_with >= np.arange(n)))
    if len(bad):
        r = int(bad[0])
        raise ConfigError(f"shares_with: expected an earlier request or -1 for request {r}, got {shares_with[r]}")
    total = np.append(prompt_tokens.astype(np.int64) + output_tokens, 0)  # the last for -1
    most = np.minimum(total[shares_with], prompt_tokens)
    bad = np.flatnonzero((shared_tokens < 0) | (shared_tokens > most))
    if len(bad):
        r = int(bad[0])
        raise ConfigError(f"shared_tokens: expected 0 to {most[r]} for request {r}, got {shared_tokens[r]}")


def check_parents(parent: np.ndarray, think_s: np.ndarray | None) -> None:
    """Raise :class:`ConfigError` unless every turn has a parent before it, and a time to think."""
    if parent.dtype.kind not in "iu" or parent.ndim != 1:
        raise ConfigError(f"parent: expected whole numbers, got {parent.dtype} of shape {parent.shape}")
    _check_order(parent)
    root = np.maximum.accumulate(np.where(parent < 0, np.arange(len(parent)), 0))
    apart = np.flatnonzero((parent >= 0) & (parent < root))
    if len(apart):
        r = int(apart[0])
        what = f"its parent, request {parent[r]}, and request {root[r]} of another one between them"
        raise ConfigError(f"parent: expected a session's requests side by side, got request {r} with {what}")
    if think_s is None or think_s.shape != parent.shape:
        got = "None" if think_s is None else f"shape {think_s.shape}"
        raise ConfigError(f"think_s: expected {len(parent)} times with parent, got {got}")
    bad = np.flatnonzero(~((think_s >= 0.0) & (think_s < np.inf)))
    if len(bad):
        raise ConfigError(f"think_s: expected finite seconds >= 0 for request {bad[0]}, got {think_s[bad[0]]}")


def check_sessions(parent: np.ndarray, arrival_s: np.ndarray, num_past: int, cohort: tuple[int, int]) -> None:
    """Raise :class:`ConfigError` unless what is past stands first, roots come in order and the cohort is sessions."""
    n, (start, stop) = len(parent), cohort
    if not 0 <= num_past <= n:
        raise ConfigError(f"num_past: expected 0 to {n}, got {num_past}")
    is_root = parent < 0
    if not is_root[:num_past].all():
        raise ConfigError(f"num_past: expected requests without a parent, got request {np.argmin(is_root)} among them")
    roots = np.flatnonzero(is_root)
    # when each may come at the earliest
    before_s = np.where(roots < num_past, -np.inf, np.append(0.0, arrival_s[roots])[:-1])
    before_s[roots == num_past] = 0.0
    times_s = arrival_s[roots]
    bad = np.flatnonzero(~((times_s >= before_s) & (times_s < np.where(roots < num_past, 0.0, np.inf))))
    if len(bad):
        r = int(roots[bad[0]])
        what = "a time before 0, as it is past" if r < num_past else f"seconds from {max(0.0, before_s[bad[0]]):g} on"
        raise ConfigError(f"arrival_s: expected {what} for request {r}, got {arrival_s[r]:g}")
    if not num_past <= start <= stop <= n:
        raise ConfigError(f"cohort: expected requests within {num_past} to {n}, got {start} to {stop}")
    for name, edge in (("cohort_start", start), ("cohort_stop", stop)):
        if edge < n and not is_root[edge]:
            raise ConfigError(f"{name}: expected whole sessions, got {edge}, whose parent is request {parent[edge]}")


def check_known(shares_with: np.ndarray, parent: np.ndarray) -> None:
    """Raise :class:`ConfigError` unless who is shared with has come by then: a root, or an ancestor of the request."""
    asks = np.flatnonzero((shares_with >= 0) & (parent[shares_with] >= 0))
    with_, at = shares_with[asks], parent[asks]
    for _ in range(len(parent)):
        below = at > with_
        if not below.any():
            break
        at = np.where(below, parent[at], at)
    bad = np.flatnonzero(at != with_)
    if len(bad):
        r, other = int(asks[bad[0]]), int(with_[bad[0]])
        what = f"a request without a parent or an ancestor of request {r}"
        raise ConfigError(f"shares_with: expected {what}, got {other}, which may come later")


def shares_of_ids(ids: Sequence[Sequence[int]], prompt_tokens: np.ndarray, block_tokens: int) -> Shares:
    """From the ids of each prompt's blocks of `block_tokens`, the last of which may be shorter, as traces have them.

    Two prompts agree as far as their ids do, from the first on. Outputs have no ids.
    """
    if not isinstance(block_tokens, int | np.integer) or block_tokens < 1:
        raise ConfigError(f"block_tokens: expected a whole number >= 1, got {block_tokens!r}")
    if len(ids) != len(prompt_tokens):
        raise ConfigError(f"ids: expected those of {len(prompt_tokens)} prompts, got {len(ids)}")
    shares_with, shared_tokens = _nobody(len(ids))
    # (node, id) -> the next node, the first request to come by and fill that block, or as much of it as any
    nodes: dict[tuple[int, int], tuple[int, int]] = {}
    for r, own in enumerate(ids):
        tokens = int(prompt_tokens[r])
        need = -(-tokens // block_tokens)
        if len(own) < need:
            what = f"{need} for the {tokens} tokens of request {r} in blocks of {block_tokens}"
            raise ConfigError(f"ids: expected {what}, got {len(own)}")
        node = 0
        for position in range(need):
            key = (node, int(own[position]))
            node, first = nodes.setdefault(key, (len(nodes) + 1, r))
            if first == r:
                continue
            end = min((position + 1) * block_tokens, tokens)
            shares_with[r], shared_tokens[r] = first, min(end, int(prompt_tokens[first]))
            if shared_tokens[r] < end:
                nodes[key] = node, r
    return shares_with, shared_tokens


def shares_of_turns(
    parent: np.ndarray,
    new_tokens: np.ndarray,
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    prefix_id: np.ndarray | None = None,
    prefix_tokens: np.ndarray | None = None,
) -> Shares:
    """From sessions: a turn's prompt is its parent's prompt and output and its own new tokens.

    `parent` is the index of an earlier request, -1 for a session's first. Firsts that have the same `prefix_id` (-1:
    none) begin with the same `prefix_tokens` tokens. All arrays have shape (num_requests,).
    """
    _check_order(parent)
    shares_with, shared_tokens = _nobody(len(parent))
    turns = np.flatnonzero(parent >= 0)
    p = parent[turns]
    shares_with[turns] = p
    shared_tokens[turns] = prompt_tokens[p] + output_tokens[p]
    bad = turns[(shared_tokens[turns] + new_tokens[turns] != prompt_tokens[turns]) | (new_tokens[turns] < 0)]
    if len(bad):
        r = int(bad[0])
        what = f"the {shared_tokens[r]} tokens of its parent and {new_tokens[r]} new ones"
        raise ConfigError(f"prompt_tokens: expected {what} for request {r}, got {prompt_tokens[r]}")
    if prefix_id is None or prefix_tokens is None:
        return shares_with, shared_tokens
    firsts = np.flatnonzero((parent < 0) & (prefix_id >= 0))
    _, place, which = np.unique(prefix_id[firsts], return_index=True, return_inverse=True)
    first = firsts[place][which]
    tokens, expected = prefix_tokens[firsts], prefix_tokens[first]
    bad = firsts[(tokens != expected) | (tokens < 0) | (tokens > prompt_tokens[firsts])]
    if len(bad):
        r = int(bad[0])
        f = int(first[firsts == r][0])
        what = f"{prefix_tokens[f]} as of request {f}, in the prompt of request {r}"
        raise ConfigError(f"prefix_tokens: expected {what}, got {prefix_tokens[r]}")
    again = first != firsts
    shares_with[firsts[again]], shared_tokens[firsts[again]] = first[again], tokens[again]
    return shares_with, shared_tokens


def shares_of_chains(
    parent: np.ndarray, prompt_tokens: np.ndarray, output_tokens: np.ndarray, cached_tokens: np.ndarray | None = None
) -> Shares:
    """From the calls of a session, of whose prompts only the lengths are known.

    A call that is at least as long as its parent's prompt and output continues both; one that is at least as long as
    that prompt continues it. A shorter one begins a new chain, behind as much of it as was cached when it was served.
    """
    _check_order(parent)
    shares_with, shared_tokens = _nobody(len(parent))
    turns = np.flatnonzero(parent >= 0)
    p, prompt = parent[turns], prompt_tokens[turns].astype(np.int64)
    before = prompt_tokens[p].astype(np.int64)
    whole = before + output_tokens[p]
    cached = np.zeros(len(turns)) if cached_tokens is None else cached_tokens[turns]
    shared = np.where(prompt >= whole, whole, np.where(prompt >= before, before, np.minimum(cached, prompt)))
    shares_with[turns] = np.where(shared > 0, p, -1)
    shared_tokens[turns] = shared
    return shares_with, shared_tokens


def found_share(shared_tokens: np.ndarray, prompt_tokens: np.ndarray, block_tokens: int) -> float:
    """Share of all prompt tokens that a cache of any size finds: full blocks, the last token never among them."""
    prompt = prompt_tokens.astype(np.int64)
    found = np.minimum(shared_tokens, prompt - 1) // block_tokens * block_tokens
    return float(found.sum() / prompt.sum())


def _nobody(n: int) -> Shares:
    return np.full(n, -1, np.int32), np.zeros(n, np.int32)


def _check_order(parent: np.ndarray) -> None:
    """Raise :class:`ConfigError` for a request whose parent is none before it."""
    for r in np.flatnonzero((parent < -1) | (parent >= np.arange(len(parent)))).tolist():
        if parent[r] < -1:
            raise ConfigError(f"parent: expected a request or -1 for request {r}, got {parent[r]}")
        _check_parent(parent, r)


def _check_parent(parent: np.ndarray, r: int) -> None:
    p, n = int(parent[r]), len(parent)
    if p >= n:
        raise ConfigError(f"parent: request {r} has parent {p}, which does not exist: there are {n} requests")
    if p < r:
        return
    for _ in range(n):
        if p == r:
            raise ConfigError(f"parent: request {r} is an ancestor of its own")
        if not 0 <= p < n:
            break
        p = int(parent[p])
    raise ConfigError(f"parent: request {r} comes before its parent, request {int(parent[r])}")
