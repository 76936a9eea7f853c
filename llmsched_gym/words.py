"""Numbers of things in sentences, and bad values in errors."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """ "1 request", "2,000 requests": `thing` is one of them, with a regular plural."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def shown(value: object) -> str:
    """A bad value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
