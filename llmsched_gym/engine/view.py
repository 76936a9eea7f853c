"""What a plain-Python scheduler sees, and the batch it answers with."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmsched_gym.engine.batch import batch_s, uncached_prefill
from llmsched_gym.engine.blocks import BY_PROMPT, USERS, blocks_to_admit, blocks_to_take, listed, users_changed
from llmsched_gym.engine.predict import can_make_ttft_env
from llmsched_gym.engine.records import PENDING, REQUEST, RUNNING, WAITING
from llmsched_gym.engine.state import State, env_of, lane_of
from llmsched_gym.engine.surface import chunk_s, has_surface, recount, surface_s

_HIDDEN_FIELDS = {
    "paid_attained",
    "paid_lateness_s",
    "paid_utility",
    "phase",
    "num_scheduled_tokens",
    "resolved_s",
}
_SEEN = [name for name in REQUEST.names or () if name not in _HIDDEN_FIELDS]
VISIBLE = np.dtype(
    (np.record, [("index", "i4"), ("num_uncached_tokens", "i4")] + [(name, REQUEST[name].str) for name in _SEEN])
)


class IllegalBatch(ValueError):
    """A scheduler asked for what the engine's rules forbid; the message names the rule."""


@dataclass(frozen=True)
class Batch:
    """A scheduler's decision: tokens by request index (1 for a decode), and whom to preempt or refuse first."""

    tokens: Mapping[int, int] = field(default_factory=dict)
    preempt: Iterable[int] = ()
    refuse: Iterable[int] = ()


class View:
    """The engine as a scheduler may see it: arrived requests, measured times, free memory (rule 6).

    Attributes:
        now_s: the clock, seconds.
        running: record array of admitted requests, by admission; fields of :data:`VISIBLE`. ``num_uncached_tokens`` of
            their prompts are left to compute, of waiting ones behind what they would find cached.
        waiting: record array of waiting requests, by arrival, preempted ones first.
        free_blocks, total_blocks, watermark_blocks: KV blocks.
        block_size: tokens in a KV block.
        kv_cache_usage: of the last batch, after scheduling and before its frees; 0 to 1.
        mean_batch_s, last_batch_s: measured batch durations, seconds.
        max_num_seqs, max_num_batched_tokens: limits of a batch.
    """

    def __init__(self, state: State, handle: Any, k: int = 0) -> None:
        """Lane `k` of `state`: with one replica each, environment `k`."""
        self._state, self._handle, self._k, self._env = state, handle, k, env_of(state, k)
        sim = state.sims[k]
        self.now_s = float(sim.clock_s)
        self.running = self._records(state.running[k, : sim.num_running])
        self.waiting = self._records(state.waiting[k, : sim.num_waiting])
        self.free_blocks = int(sim.free_blocks)
        self.total_blocks = int(sim.total_blocks)
        self.watermark_blocks = int(sim.watermark_blocks)
        self.block_size = int(sim.block_size)
        self.kv_cache_usage = float(sim.kv_cache_usage)
        self.mean_batch_s = float(sim.mean_batch_s)
        self.last_batch_s = float(sim.last_batch_s)
        self.max_num_seqs = int(sim.max_num_seqs)
        self.max_num_batched_tokens = int(sim.max_num_batched_tokens)
        self.allow_refusal = bool(sim.allow_refusal)

    def _records(self, indices: np.ndarray) -> np.recarray:
        rows = self._state.requests[self._env]
        seen = np.zeros(len(indices), VISIBLE)
        seen["index"] = indices
        for name in _SEEN:
            seen[name] = rows[name][indices]
        seen["num_uncached_tokens"] = seen["prefill_tokens"] - seen["num_computed_tokens"]
        if self._state.sims[self._k].prefix_caching:
            lane = lane_of(self._state, self._k)
            seen["num_uncached_tokens"] = [uncached_prefill(lane, int(r)) for r in indices]
        return seen.view(np.recarray)

    @property
    def decodes(self) -> np.recarray:
        """Running requests whose prompt is complete."""
        return self.running[self.running.num_computed_tokens >= self.running.prefill_tokens]

    @property
    def prefills(self) -> np.recarray:
        """Running requests with prompt tokens left to compute."""
        return self.running[self.running.num_computed_tokens < self.running.prefill_tokens]

    def predict_s(self, tokens: Mapping[int, int]) -> float:
        """Seconds that the scheduler's own cost profile predicts for a batch."""
        rows = self._state.requests[self._env]
        total, pairs, kv_tokens = 0, 0.0, 0.0
        contexts: list[int] = []
        chunks: list[tuple[int, int]] = []
        for r, n in tokens.items():
            self._check_arrived(r)
            n, given = whole_number(n), n
            if not 0 <= n <= self.max_num_batched_tokens:
                what = f"a whole number of at most {self.max_num_batched_tokens} tokens"
                raise ValueError(f"predict_s: expected {what}, got {given!r} for request {r}")
            computed = int(rows[r].num_computed_tokens)
            total += n
            kv_tokens += computed + n
            if n > 0 and computed < rows[r].prefill_tokens:
                pairs += n * (computed + (n + 1) / 2)
                chunks.append((computed, n))
            elif n > 0:
                contexts.append(computed + n)
        if total > self.max_num_batched_tokens:
            raise ValueError(
                f"predict_s: expected at most {self.max_num_batched_tokens} tokens in a batch, got {total}"
            )
        state, profile = self._state, self._state.sims[self._k].profile
        linear_s, coef_s = state.own_linear_s[profile], state.own_coef_s[profile]
        if has_surface(coef_s):
            chunks_s = sum(chunk_s(coef_s, computed, n) for computed, n in chunks)
            decodes = len(contexts), float(sum(contexts)), float(max(contexts, default=0))
            return float(surface_s(linear_s, coef_s, total, *decodes, len(chunks), chunks_s))
        return float(batch_s(linear_s, coef_s, total, pairs, kv_tokens))

    def can_make_ttft(self, r: int) -> bool:
        """Whether request `r`, served alone from now on, would still have its first token in time."""
        self._check_arrived(r)
        return bool(can_make_ttft_env(self._handle, self._k, int(r)))

    def _check_arrived(self, r: int) -> None:
        if not hasattr(r, "__index__") or not has_arrived(self._state, self._env, r):
            raise IndexError(f"request {r} has not arrived")


def has_arrived(state: State, env: int, r: int) -> bool:
    """Whether `r` is the index of a request that has arrived in environment `env`."""
    return 0 <= r < state.worlds[env].num_requests and bool(state.requests[env][r].phase != PENDING)


def whole_number(n: Any) -> int:
    """`n` as an int; -1 for what is not a whole number >= 0."""
    if isinstance(n, numbers.Integral) or (isinstance(n, numbers.Real) and float(n).is_integer()):
        return max(int(n), -1)  # type: ignore[call-overload]
    return -1


def _members(state: State, k: int) -> set[int]:
    """The requests that wait or run at lane `k`."""
    sim = state.sims[k]
    return {*state.waiting[k, : sim.num_waiting].tolist(), *state.running[k, : sim.num_running].tolist()}


@contextmanager
def _without(state: State, k: int, preempted: list[int]) -> Iterator[int]:
    """Free blocks, were these running requests preempted; until it is left none of them counts as a block's user."""
    sim, requests = state.sims[k], state.requests[env_of(state, k)]
    if not sim.prefix_caching:
        yield int(sim.free_blocks) + sum(int(requests[r].num_blocks) for r in preempted)
        return
    blocks, prefixes = state.blocks[k], state.prefixes[env_of(state, k)]
    users = blocks[:, USERS]
    gone = np.zeros_like(users)
    for r in preempted:
        for position in range(requests[r].num_blocks):
            gone[listed(sim, blocks, prefixes[r].row, position)] += 1
    users -= gone
    users_changed(sim)
    try:
        yield int(sim.free_blocks) + int(np.sum((gone > 0) & (users == 0)))
    finally:
        users += gone
        users_changed(sim)


def submit(state: State, batch: Batch, k: int = 0) -> None:
    """Write a Python scheduler's batch into lane `k`, after checking every rule it could break (rule 9)."""
    env = env_of(state, k)
    sim, requests, lane = state.sims[k], state.requests[env], state.batches[k]
    mine = _members(state, k) if len(state.sims) > len(state.episodes) else None

    def phase_of(r: int) -> int:
        if not has_arrived(state, env, r):
            raise IllegalBatch(f"rule 6: request {r} has not arrived")
        phase = int(requests[r].phase)
        if mine is not None and phase in (WAITING, RUNNING) and r not in mine:
            raise IllegalBatch(f"rule 6: request {r} is another replica's")
        return phase

    def index(r: Any) -> int:
        try:
            return operator.index(r)
        except TypeError:
            raise IllegalBatch(f"rule 1: expected the index of a request, got {r!r}") from None

    if not isinstance(batch, Batch):
        raise IllegalBatch(f"rule 1: schedule() must return a Batch, got {type(batch).__name__}")
    if not isinstance(batch.tokens, Mapping):
        raise IllegalBatch(f"rule 1: Batch.tokens must map requests to tokens, got {type(batch.tokens).__name__}")
    for name in ("preempt", "refuse"):
        if not isinstance(getattr(batch, name), Iterable):
            kind = type(getattr(batch, name)).__name__
            raise IllegalBatch(f"rule 1: Batch.{name} must be the indices of requests, got {kind}")
    preempted, refused = [index(r) for r in batch.preempt], [index(r) for r in batch.refuse]
    seqs = int(sim.num_running)
    for r in preempted:
        if phase_of(r) != RUNNING or preempted.count(r) > 1:
            raise IllegalBatch(f"rule 1: request {r} is preempted, but does not run")
        seqs -= 1
    for r in refused:
        if not sim.allow_refusal:
            raise IllegalBatch("rule 12: refusing requests needs allow_refusal=True")
        if phase_of(r) != WAITING or requests[r].num_output_tokens > 0 or refused.count(r) > 1:
            raise IllegalBatch(f"rule 12: request {r} is refused, but does not wait for its first token")
    gone = {*preempted, *refused}
    items: list[tuple[int, int]] = []
    seen: set[int] = set()
    total, pairs, kv_tokens, decodes = 0, 0.0, 0.0, 0
    at = lane_of(state, k)
    spare = int(sim.watermark_blocks) if sim.admission == BY_PROMPT else 0
    with _without(state, k, preempted) as free:
        for r, n in batch.tokens.items():
            r = index(r)
            if r in seen:  # keys that differ may mean one request
                raise IllegalBatch(f"rule 1: request {r} is in the batch twice")
            seen.add(r)
            phase = phase_of(r)
            if whole_number(n) < 1:
                raise IllegalBatch(f"rule 1: request {r} gets {n!r} tokens, expected a whole number >= 1")
            n = int(n)
            if phase not in (WAITING, RUNNING) or r in gone:
                raise IllegalBatch(f"rule 1: request {r} gets tokens, but neither waits nor runs")
            request = requests[r]
            computed, prefill = int(request.num_computed_tokens), int(request.prefill_tokens)
            is_chunk = computed < prefill
            if n > (prefill - computed if is_chunk else 1):
                what = f"{prefill - computed} of its prompt remain" if is_chunk else "a decode is exactly 1"
                raise IllegalBatch(f"rule 1: request {r} gets {n} tokens, but {what}")
            need = int(blocks_to_take(at, r, n))
            if phase == WAITING:
                seqs += 1
                first = int(blocks_to_admit(at, r, n))
                if free - first < spare:
                    raise IllegalBatch(
                        f"rule 4: request {r} needs {first} blocks, {free} are free and {spare} held back"
                    )
            elif is_chunk and need > 0 and free < need:  # decodes, which may evict, can have left less than none free
                raise IllegalBatch(f"rule 4: the next chunk of request {r} needs {need} blocks, {free} are free")
            free -= need
            total += n
            kv_tokens += computed + n
            pairs += n * (computed + (n + 1) / 2) if is_chunk else 0.0
            decodes += not is_chunk
            items.append((r, n))
    if total > sim.max_num_batched_tokens:
        raise IllegalBatch(f"rule 1: {total} tokens, max_num_batched_tokens is {sim.max_num_batched_tokens}")
    if seqs > sim.max_num_seqs:
        raise IllegalBatch(f"rule 1: {seqs} sequences would run, max_num_seqs is {sim.max_num_seqs}")

    for i, (r, n) in enumerate(items):
        state.items[k, i] = (r, n)
        requests[r].num_scheduled_tokens = n
    state.preempt[k, : len(preempted)] = preempted
    state.refuse[k, : len(refused)] = refused
    lane.num_items, lane.num_tokens, lane.num_decodes = len(items), total, decodes
    lane.num_preempt, lane.num_refuse = len(preempted), len(refused)
    lane.is_marked = 1
    lane.pairs, lane.kv_tokens = pairs, kv_tokens
    recount(lane, state.items[k], requests, state.own_coef_s[sim.profile])
