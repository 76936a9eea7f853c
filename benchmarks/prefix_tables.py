"""Requests that have tokens in common, for `conformance_vllm --prefix-caching`: by hand, at random, sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llmsched_gym.config import BLOCK_SIZE, blocks_needed
from llmsched_gym.workload import RequestTable, shares_of_ids, shares_of_turns


class Case(NamedTuple):
    """One comparison: requests, and the limits that they meet."""

    name: str
    table: RequestTable
    kv_blocks: int
    budget: int
    max_num_seqs: int = 16  # at most the budget, which vLLM asks for


def table_of(
    arrival_s: np.ndarray, prompt: np.ndarray, output: np.ndarray, shares: tuple[np.ndarray, np.ndarray]
) -> RequestTable:
    """A table of requests without SLOs."""
    return RequestTable.of(arrival_s, prompt, output, tbt_slo_s=0.5, shares_with=shares[0], shared_tokens=shares[1])


def _of_ids(rows: list[tuple[float, str, int, int]]) -> RequestTable:
    """From (arrival, a letter a block, prompt tokens, output tokens) of each request."""
    arrival_s, letters, prompt, output = (list(column) for column in zip(*rows, strict=True))
    ids = [[ord(letter) for letter in word] for word in letters]
    shares = shares_of_ids(ids, np.array(prompt), BLOCK_SIZE)
    return table_of(np.array(arrival_s), np.array(prompt), np.array(output), shares)


def by_hand() -> list[Case]:
    """The cases in which a prefix cache can go wrong, one each."""
    late = 10.0  # after everybody else has finished
    return [
        Case(
            "forks of a prefix",
            _of_ids([(0, "abcd", 60, 40), (0.5, "abx", 48, 5), (0.5, "aby", 47, 5), (late, "abcz", 64, 2)]),
            40,
            64,
        ),
        Case("two equal prompts in one batch", _of_ids([(0, "abcd", 64, 4)] * 2 + [(late, "abcde", 70, 2)]), 40, 512),
        Case(
            "a prompt of exact blocks",
            _of_ids([(0, "ab", 32, 2), (late, "ab", 32, 2), (2 * late, "ab", 32, 20), (3 * late, "a", 16, 2)]),
            20,
            64,
        ),
        Case(
            "eviction in the middle of a chain",
            _of_ids(
                [
                    (0, "abcdefgh", 128, 2),
                    (late, "uvwx", 64, 2),
                    (2 * late, "abcdefgh", 128, 2),
                    (3 * late, "abcz", 64, 30),
                    (3 * late + 0.1, "abcdefgh", 128, 2),
                ]
            ),
            10,
            64,
        ),
        Case(
            "preemption and resume",
            _of_ids([(0, "abc", 40, 60), (0, "abd", 40, 60), (0.1, "abe", 44, 60), (late, "abcd", 60, 9)]),
            12,
            64,
        ),
        Case(
            "the last of equal places goes first",
            _of_ids(
                [(0, "ab", 32, 50), (0.1, "ab", 32, 3), (0.2, "abc", 40, 9), (0.3, "uvwxy", 80, 9), (1, "abc", 48, 9)]
            ),
            9,
            40,
        ),
    ]


def at_random(seed: int) -> Case:
    """A few requests that fork from each other anywhere, in hardly more memory than the largest needs."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 40))
    prompt, output = rng.integers(1, 200, n), rng.integers(1, 90, n)
    shares_with, shared = np.full(n, -1, np.int32), np.zeros(n, np.int32)
    for r in range(1, n):
        if rng.random() < 0.8:
            shares_with[r] = p = rng.integers(0, r)
            most = int(min(prompt[r], prompt[p] + output[p]))
            shared[r] = rng.choice([most, int(rng.integers(0, most + 1)), most // BLOCK_SIZE * BLOCK_SIZE])
    arrival_s = np.sort(rng.uniform(0.0, rng.choice([0.01, 2.0, 20.0]), n))
    largest = int(blocks_needed(prompt + output).max())
    return Case(
        f"at random, seed {seed}",
        table_of(arrival_s, prompt, output, (shares_with, shared)),
        largest + int(rng.integers(0, 40)),
        int(rng.choice([17, 64, 100, 512])),
        int(rng.choice([2, 5, 17])),
    )


def sessions(seed: int, num_turns: int, per_s: float, most_tokens: int) -> RequestTable:
    """Turns of sessions that start at random, `per_s` a second, behind one of four system prompts.

    A turn comes a while after its parent, whether that has finished or not; a session ends before `most_tokens`.
    """
    rng = np.random.default_rng(seed)
    prefixes = rng.integers(100, 1200, 4)
    rows: list[
        tuple[float, int, int, int, int, int]
    ] = []  # arrival, parent as a place here, prompt, output, new, prefix
    start_s = 0.0
    while len(rows) < num_turns:
        start_s += rng.exponential(1.0 / per_s)
        prefix, at_s, parent, context = int(rng.integers(0, 4)), start_s, -1, 0
        for _ in range(int(rng.geometric(0.2))):
            new, output = int(rng.lognormal(5.0, 1.0)) + 1, int(rng.geometric(1 / 150))
            prompt = context + new if parent >= 0 else int(prefixes[prefix]) + new
            if prompt + output > most_tokens:
                break
            rows.append((at_s, parent, prompt, output, new, prefix))
            parent, context = len(rows) - 1, prompt + output
            at_s += rng.exponential(10.0) + 0.03 * output
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], i))
    place = {i: r for r, i in enumerate(order)}
    arrival_s, parent_of, prompt_of, output_of, new_of, prefix_of = (
        np.array(column) for column in zip(*(rows[i] for i in order), strict=True)
    )
    parent_of = np.array([place.get(int(p), -1) for p in parent_of])
    shares = shares_of_turns(parent_of, new_of, prompt_of, output_of, prefix_of, prefixes[prefix_of])
    return table_of(arrival_s, prompt_of, output_of, shares)


CELLS = [(per_s, blocks, seed) for per_s in (0.3, 0.6) for blocks in (800, 2500) for seed in (0, 1, 2)]
"""Sessions a second, KV blocks, seed."""


def cells(num_turns: int) -> Iterator[Case]:
    """Twelve runs of sessions whose contexts do not all fit into memory."""
    for per_s, blocks, seed in CELLS:
        name = f"{per_s:g} sessions/s, {blocks:,} blocks, seed {seed}"
        yield Case(name, sessions(seed, num_turns, per_s, 8192), blocks, 2048, 128)


def tokens_of(table: RequestTable) -> list[np.ndarray]:
    """Prompt and output tokens of each request as numbers: equal exactly where the table says so; int64."""
    shares_with, shared_tokens = table.identity()
    length = table.prompt_tokens.astype(np.int64) + table.output_tokens
    width = int(length.max())
    tokens: list[np.ndarray] = []
    for r in range(len(table)):
        own = r * width + np.arange(length[r])
        own[: shared_tokens[r]] = tokens[shares_with[r]][: shared_tokens[r]] if shares_with[r] >= 0 else 0
        tokens.append(own)
    return tokens
