"""What the machines of test_stateful_*.py have in common."""

from contextlib import contextmanager

import pytest
from hypothesis import settings

LONGER = 20
"""Times as many examples with HYPOTHESIS_PROFILE=search."""


def sized(max_examples, steps):
    """Settings of a machine: examples, and steps of each."""
    times = LONGER if settings.get_current_profile_name() == "search" else 1
    return settings(max_examples=times * max_examples, stateful_step_count=steps)


@contextmanager
def one_line(*kinds):
    """One of the project's errors, in one line."""
    with pytest.raises(kinds) as error:
        yield
    assert str(error.value) and "\n" not in str(error.value)


def lasting(saved, state):
    """What the engine has saved of environment 0, without what is still to come: turns' arrivals, room for gaps."""
    starts, emitted = state.arrivals["gap_start"][0], state.requests["num_output_tokens"][0]
    gaps = [state.gaps[0, start : start + max(0, n - 1)].tobytes() for start, n in zip(starts, emitted, strict=True)]
    episode = saved.episode | {"gaps": b"".join(gaps[: saved.num_come])}
    return saved._replace(given=saved.given._replace(table={}), episode=episode)
