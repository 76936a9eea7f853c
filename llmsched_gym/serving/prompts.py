"""What the clients of a run say: made-up tokens, with the beginnings that a request table says they have in common."""

from __future__ import annotations

import numpy as np

from llmsched_gym.serving.dialect import Dialect
from llmsched_gym.workload import RequestTable


class Prompts:
    """The prompts of one table, made when they are asked for.

    `nonce` is of the run: its prompts are found in no prefix cache that an earlier run has left.
    """

    def __init__(self, table: RequestTable, dialect: Dialect, seed: int, nonce: int) -> None:
        self._table, self._dialect, self._key = table, dialect, (nonce, seed)
        self._with, self._shared = table.identity()
        self._goes_on = set(self._with[self._with >= 0].tolist())  # who is shared with: kept
        self._kept: dict[int, np.ndarray] = {}
        self._answers: dict[int, np.ndarray] = {}

    @property
    def are_shared(self) -> bool:
        """Whether any request begins as another one."""
        return bool(self._goes_on)

    def answered(self, r: int, token_ids: list[int]) -> None:
        """Remember what request r was told, for prompts that go on with it."""
        if r in self._goes_on and token_ids and self._dialect.ids is not None:
            self._answers[r] = np.asarray(token_ids, np.int64)

    def of(self, r: int) -> list[int] | str:
        """The prompt of request r, as it is sent."""
        return self._dialect.prompt(self._prompt(r))

    def _prompt(self, r: int) -> np.ndarray:
        chain = []  # whose prompts are to be made, from r back
        while r not in self._kept:
            chain.append(r)
            if self._shared[r] == 0 or self._with[r] < 0:
                break
            r = int(self._with[r])
        prompt = self._kept.get(r)
        for q in reversed(chain):
            shared = np.empty(0, np.int64)
            if self._with[q] >= 0 and self._shared[q]:
                before = int(self._with[q])
                shared = np.concatenate([self._kept[before], self._answer(before)])[: self._shared[q]]
            own = self._draws(q, 0, int(self._table.prompt_tokens[q]) - len(shared))
            prompt = np.concatenate([shared, own])
            if q in self._goes_on:
                self._kept[q] = prompt
        assert prompt is not None
        return prompt

    def _answer(self, r: int) -> np.ndarray:
        """What r was told; made up where the server does not say, so that it is not found in a cache."""
        n = int(self._table.output_tokens[r])
        told = self._answers.get(r, np.empty(0, np.int64))[:n]
        return np.concatenate([told, self._draws(r, 1, n - len(told))])

    def _draws(self, r: int, what: int, count: int) -> np.ndarray:
        return self._dialect.tokens(np.random.default_rng((*self._key, r, what)), count)
