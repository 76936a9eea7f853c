"""What goes wrong with a real model, said in one line."""

from __future__ import annotations


class BackendError(RuntimeError):
    """The model cannot be loaded or cannot go on; the message is one line that says what and what to do."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """The message of somebody else's exception as part of a line of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
