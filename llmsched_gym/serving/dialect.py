"""How a server is asked: which fields of a completion request it takes, the most telling ones first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

_TEXT = (
    "the of and to in is was he for it with as his on be at by had not are but from or have an they which one you "
    "were her all she there would their we him been has when who will more no if out so said what up its about into "
    "than them can only other new some could time these two may then do first any my now such like our over man me "
    "even most made after also did many before must through back years where much your way well down should because"
)
WORDS = _TEXT.split()
"""A token each, with the space before it, for nearly every tokenizer."""

ID_RANGES = ((1000, 30_000), (3, 250))
"""Ids of made-up prompts: beyond special tokens, within any vocabulary of a real model; and for small ones."""


@dataclass(frozen=True)
class Dialect:
    """What a server takes. The default is all that helps; :func:`dialects` lists what to fall back to."""

    ids: tuple[int, int] | None = ID_RANGES[0]  # prompts are ids from the first to below the second; None: text
    fixed_length: tuple[str, ...] = ("ignore_eos", "min_tokens")  # fields that make answers as long as asked
    usage: str = "continuous"  # continuous: with every chunk; final: at the end; none
    token_ids: bool = False  # whether chunks are asked for their ids, for prompts that go on with them
    logprobs: bool = False

    def tokens(self, draws: np.random.Generator, count: int) -> np.ndarray:
        """Made-up tokens, int64 of shape (count,): ids, or places in WORDS."""
        low, high = self.ids or (0, len(WORDS))
        return draws.integers(low, high, count)

    def prompt(self, tokens: np.ndarray) -> list[int] | str:
        """A prompt as it is sent."""
        if self.ids is not None:
            found: list[int] = tokens.tolist()
            return found
        return "".join(f" {WORDS[i % len(WORDS)]}" for i in tokens.tolist())

    def body(self, model: str, prompt: list[int] | str, output_tokens: int, **more: Any) -> bytes:
        """The request of a completion."""
        fields: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": output_tokens}
        fields |= {"temperature": 0.0, "stream": True}
        if self.usage != "none":
            fields["stream_options"] = {"include_usage": True}
            if self.usage == "continuous":
                fields["stream_options"]["continuous_usage_stats"] = True
        if "ignore_eos" in self.fixed_length:
            fields["ignore_eos"] = True
        if "min_tokens" in self.fixed_length:
            fields["min_tokens"] = output_tokens
        if self.token_ids:
            fields["return_token_ids"] = True
        if self.logprobs:
            fields["logprobs"] = 0
        return json.dumps(fields | more).encode()

    def words(self) -> str:
        """What is sent, for a report."""
        prompt = "text of so many words" if self.ids is None else "token ids"
        fixed = " and ".join(self.fixed_length) or "max_tokens alone"
        return f"prompts are {prompt}, lengths are asked for by {fixed}"


def dialects(*, token_ids: bool, logprobs: bool = False) -> Iterator[Dialect]:
    """From what tells most to what every server takes; `token_ids` are asked for where anybody goes on with answers."""
    full = Dialect(token_ids=token_ids, logprobs=logprobs)
    levels = (
        full,
        replace(full, token_ids=False),
        replace(full, fixed_length=("ignore_eos",), usage="final", token_ids=False),
        replace(full, fixed_length=(), usage="final", token_ids=False),
        replace(full, fixed_length=(), usage="none", token_ids=False),
    )
    for level in dict.fromkeys(levels):
        for ids in (*ID_RANGES, None):
            yield replace(level, ids=ids)
