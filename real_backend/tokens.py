"""The token ids of an episode: prompts made from (seed, request), and what the model has answered."""

from __future__ import annotations

import numpy as np

from llmsched_gym.engine.jit import entry
from llmsched_gym.real_backend.errors import BackendError

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
    """Prompt and answer of every request, one behind the other in a flat array; prompts are made when first needed.

    A prompt begins with the first ``shared_tokens`` tokens of another request, as `workload.identity` has it, so of its
    answer too: what is to be said behind the last token known then is made up, and its own pass says that.

    Args:
        shares: ``shares_with`` and ``shared_tokens``, each (num_requests,); None if nobody shares.
    """

    def __init__(
        self,
        prompt_tokens: np.ndarray,
        output_tokens: np.ndarray,
        seed: int,
        vocab_size: int,
        shares: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.prompt_tokens = np.asarray(prompt_tokens, np.int64)
        self.total_tokens = self.prompt_tokens + output_tokens
        self.start = np.concatenate([[0], np.cumsum(self.total_tokens)])
        self.num_known = np.zeros(len(self.prompt_tokens), np.int64)  # prompt and emitted tokens; 0: not scheduled yet
        self.seed, self.vocab_size = seed, vocab_size
        self.shares = shares
        self._num_given = np.zeros(len(self.prompt_tokens), np.int64)  # made up, or known when somebody shared them
        self.ids = np.empty(int(self.start[-1]), np.int32)  # those of request r begin at start[r]

    def read(self, requests: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Ids at positions of requests, arrays of one shape; the tokens must be known."""
        return self.ids[self.start[requests] + positions]

    def make_prompts(self, requests: np.ndarray) -> None:
        """Make the prompts that have not been needed yet."""
        if not _any_new(requests, self.num_known):
            return
        for r in requests[self.num_known[requests] == 0].tolist():
            n = int(self.prompt_tokens[r])
            self.give(r, n)
            self.num_known[r] = n

    def give(self, r: int, num_tokens: int) -> None:
        """Let the prompt and the first `num_tokens` tokens of `r` be there, made up where they have not been said."""
        line = []  # from `r` back to the first that has what the next one needs
        for _ in range(r + 1):
            parent = -1 if self.shares is None else int(self.shares[0][r])
            there = max(int(self._num_given[r]), int(self.num_known[r]))
            num_tokens = max(num_tokens, int(self.prompt_tokens[r]))
            if there >= num_tokens:
                break
            line.append((r, parent, there, num_tokens))
            if there > 0 or parent < 0 or self.shares is None:
                break
            r, num_tokens = parent, int(self.shares[1][r])
        for r, parent, there, num_tokens in reversed(line):
            own, at = there, int(self.start[r])
            if there == 0 and parent >= 0 and self.shares is not None:
                own, first = int(self.shares[1][r]), int(self.start[parent])
                self.ids[at : at + own] = self.ids[first : first + own]
            self.ids[at + own : at + num_tokens] = prompt_ids(self.seed, r, num_tokens, self.vocab_size)[own:]
            self._num_given[r] = num_tokens

    def append(self, requests: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Add one answered token to each request, `ids` int64.

        Returns the ids, in whose place is what somebody's prompt has had there, and how many of the requests have all
        their tokens now.
        """
        num_complete = _append(
            requests, ids, self.start, self.ids, self.num_known, self._num_given, self.shares is not None
        )
        if num_complete < 0:
            r = int(requests[-1 - num_complete])
            raise BackendError(f"request {r}: a token behind the {self.total_tokens[r]} that it is to have")
        return ids, num_complete

    def is_complete(self, requests: np.ndarray) -> np.ndarray:
        """Whether the requests have all tokens that they are to have."""
        return self.num_known[requests] >= self.total_tokens[requests]

    def prompt(self, request: int) -> np.ndarray:
        self.make_prompts(np.array([request]))
        at = int(self.start[request])
        return self.ids[at : at + int(self.prompt_tokens[request])].copy()

    def answer(self, request: int) -> np.ndarray:
        """The tokens emitted so far."""
        at = int(self.start[request])
        return self.ids[at + int(self.prompt_tokens[request]) : at + int(max(self.num_known[request], 0))].copy()

    def owner(self, r: int, position: int) -> int:
        """Whose own token stands at `position` of request `r`."""
        while self.shares is not None and position < self.shares[1][r]:
            r = int(self.shares[0][r])
        return r


@entry()
def _append(requests, said, start, ids, num_known, num_given, is_shared):
    """Returns how many requests have all their tokens, -1 - i if the i-th had them before."""
    num_complete = 0
    for i in range(requests.shape[0]):
        r = requests[i]
        known, total = num_known[r], start[r + 1] - start[r]
        if known >= total:
            return -1 - i
        if is_shared and known < num_given[r]:
            said[i] = ids[start[r] + known]
        else:
            ids[start[r] + known] = said[i]
        num_known[r] = known + 1
        num_complete += known + 1 == total
    return num_complete


@entry()
def _any_new(requests, num_known):
    num_new = 0
    for i in range(requests.shape[0]):
        num_new += num_known[requests[i]] == 0
    return num_new > 0
