"""Numbers of things in sentences."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """ "1 request", "2,000 requests": `thing` is one of them, with a regular plural."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
