"""The token ids of an episode: prompts made from (seed, request), and what the model has answered."""

from __future__ import annotations

import numpy as np

NUM_SPECIAL_IDS = 3
"""Ids at the start of a vocabulary that made-up prompts leave out (unknown, begin, end)."""
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def prompt_ids(seed: int, request: int, num_tokens: int, vocab_size: int) -> np.ndarray:
    """Token ids of a made-up prompt, int32 of shape (num_tokens,); equal arguments give equal ids everywhere.

    SplitMix64 on (seed, request, position): cheap enough to be made while a batch is prepared.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed) + _STEP) + np.uint64(request) * _STEP)
        bits = _mix(key + np.arange(1, num_tokens + 1, dtype=np.uint64) * _STEP)
    low = min(NUM_SPECIAL_IDS, vocab_size - 1)
    return (low + bits % np.uint64(vocab_size - low)).astype(np.int32)


def _mix(z: np.ndarray | np.uint64) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * _MIX[0]
    z = (z ^ (z >> np.uint64(27))) * _MIX[1]
    return np.asarray(z ^ (z >> np.uint64(31)))


class TokenStore:
    """Prompt and answer of every request, one behind the other in a flat array; prompts are made when first needed."""

    def __init__(self, prompt_tokens: np.ndarray, output_tokens: np.ndarray, seed: int, vocab_size: int) -> None:
        self.prompt_tokens = np.asarray(prompt_tokens, np.int64)
        self.total_tokens = self.prompt_tokens + output_tokens
        self.start = np.concatenate([[0], np.cumsum(self.total_tokens)])
        self.num_known = np.zeros(len(self.prompt_tokens), np.int64)  # prompt and emitted tokens; 0: prompt not made
        self.seed, self.vocab_size = seed, vocab_size
        self._ids = np.empty(int(self.start[-1]), np.int32)

    def read(self, requests: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Ids at positions of requests, arrays of one shape; the tokens must be known."""
        return self._ids[self.start[requests] + positions]

    def make_prompts(self, requests: np.ndarray) -> None:
        """Make the prompts that have not been needed yet."""
        for r in requests[self.num_known[requests] == 0].tolist():
            n, at = int(self.prompt_tokens[r]), int(self.start[r])
            self._ids[at : at + n] = prompt_ids(self.seed, r, n, self.vocab_size)
            self.num_known[r] = n

    def append(self, requests: np.ndarray, ids: np.ndarray) -> None:
        """Add one answered token to each request."""
        self._ids[self.start[requests] + self.num_known[requests]] = ids
        self.num_known[requests] += 1

    def is_complete(self, requests: np.ndarray) -> np.ndarray:
        """Whether the requests have all tokens that they are to have."""
        return self.num_known[requests] >= self.total_tokens[requests]

    def prompt(self, request: int) -> np.ndarray:
        self.make_prompts(np.array([request]))
        at = int(self.start[request])
        return self._ids[at : at + int(self.prompt_tokens[request])].copy()

    def answer(self, request: int) -> np.ndarray:
        """The tokens emitted so far."""
        at = int(self.start[request])
        return self._ids[at + int(self.prompt_tokens[request]) : at + int(max(self.num_known[request], 0))].copy()
