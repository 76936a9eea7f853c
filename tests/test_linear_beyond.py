"""Linear layers past the last measured size: they go on as the last octave did, not as the top of its last step."""

import pytest

from llmsched_gym.cost import PROFILES, load_profile
from llmsched_gym.cost.fit_tables import going_on


def test_one_more_knot_in_line_with_the_last_octave():
    # a staircase whose last step is flat: 10 ms up to 32 tokens, 20 up to 64
    tokens, ms = going_on([16, 32, 33, 48, 64], [10.0, 10.0, 20.0, 20.0, 20.0])
    assert tokens == (16, 32, 33, 48, 64, 128)
    assert ms[:5] == (10.0, 10.0, 20.0, 20.0, 20.0) and ms[5] == pytest.approx(20 + 10 / 32 * 64)
    assert going_on([1, 2], [5.0, 4.0])[1][-1] == 4.0  # never falls


@pytest.mark.parametrize("name", PROFILES)
def test_large_batches_are_not_for_free(name):
    table = load_profile(name).linear_table_s(8192)
    assert table[8192] / 8192 > 0.88 * table[2048] / 2048


def test_of_variants_too():
    base, twin = (load_profile("rtx4090-llama-3.1-8b-vllm" + end) for end in ("", "[additive=true]"))
    assert twin.linear == base.linear
