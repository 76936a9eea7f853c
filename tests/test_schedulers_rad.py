"""RAD by hand: tiles, shares and reserved memory. Unless a case says otherwise the tile is 8 tokens, a batch 32."""

import pytest
from helpers import Run, Scripted, profile, request

from llmsched_gym.scheduler import install

TILE_8 = profile(tile=8)


def rad(rows, budget=32, device=TILE_8, **fields):
    return Run(f"rad[budget={budget}]", rows, device=device, **fields)


def with_decodes(count, *prompts, budget=32, **fields):
    """A run in which requests 0..count-1 decode and then `prompts` wait."""
    rows = [request(prompt=1, output=99, tbt=9.0) for _ in range(count)]
    rows += [request(0.01, prompt=n, output=9) for n in prompts]
    run = rad(rows, budget, **fields)
    scheduler, run.scheduler = run.scheduler, Scripted({r: 1 for r in range(count)})
    run.step()
    run.scheduler = scheduler
    install(scheduler, run.engine.state)
    return run


# --- the batch size


@pytest.mark.parametrize(
    ("ms", "budget", "size"),
    [
        ((10.0, 16.0, 30.0, 32.0), 32, 16),  # 0.8, 1.0, 0.8, 1.0 tokens a millisecond: the smaller of the best
        ((10.0, 16.0, 30.0, 31.9), 32, 32),
        ((10.0, 16.0, 30.0, 31.9), 39, 32),  # 39 tokens hold four whole tiles
        ((10.0, 16.0, 30.0, 31.9), 31, 16),
        ((10.0, 21.0, 30.0, 31.9), 15, 8),
        ((10.0, 16.0, 30.0, 31.9), 7, 7),  # no tile fits
    ],
)
def test_the_size_is_the_fastest_multiple_of_the_tile(ms, budget, size):
    run = rad([request(prompt=100)], budget, profile(ms, tokens=(8, 16, 24, 32), tile=8))
    assert run.step() == {0: size}


def test_on_a_smooth_profile_rad_takes_all_it_may():
    device = profile((5.0, 14.0), tokens=(1, 101), tile=128)
    assert Run("rad", [request(prompt=8191, output=1)] * 2, device=device, num_kv_blocks=9999).step() == {0: 8191, 1: 1}
    assert Run("rad-512", [request(prompt=8191, output=1)], device=device).step() == {0: 512}


# --- tiles


@pytest.mark.parametrize(
    ("prompt", "batches"),
    [
        (5, [5]),  # less than a tile: what there is
        (8, [8]),
        (9, [8, 1]),
        (16, [16]),
        (31, [24, 7]),
        (32, [32]),
        (33, [32, 1]),
        (100, [32, 32, 32, 4]),
    ],
)
def test_a_prompt_runs_in_whole_tiles(prompt, batches):
    assert rad([request(prompt=prompt, output=1)]).drain() == [{0: n} for n in batches]


def test_prompts_fill_a_tile_together():
    run = rad([request(prompt=20, output=9), request(prompt=7, output=9)])
    assert run.step() == {0: 20, 1: 4}  # 27 tokens of work: three tiles
    assert run.step() == {1: 3, 0: 1}  # less than a tile


@pytest.mark.parametrize(
    ("decodes", "run_now"), [(1, 1), (7, 7), (8, 8), (9, 8), (15, 8), (16, 16), (31, 24), (40, 32)]
)
def test_decodes_alone_fill_whole_tiles(decodes, run_now):
    assert with_decodes(decodes).step() == {r: 1 for r in range(run_now)}


def test_the_decodes_left_out_come_first_next_time():
    run = with_decodes(11)
    # 8 to 10 have waited longest; then 5 to 7, and of those with equally old tokens the first by index
    assert [set(b) for b in run.steps(3)] == [set(range(8)), {8, 9, 10, 0, 1, 2, 3, 4}, {5, 6, 7, 0, 1, 2, 3, 4}]


def test_decodes_are_topped_up_to_the_tile_with_prompt_tokens():
    # 20 decodes and 5 prompt tokens: 25 are cut to 24, at the divisible side
    assert with_decodes(20, 5).step() == {**{r: 1 for r in range(20)}, 20: 4}
    # 6 and 2 make one tile, 6 and 1 less than one
    assert with_decodes(6, 2).step() == {**{r: 1 for r in range(6)}, 6: 2}
    assert with_decodes(6, 1).step() == {**{r: 1 for r in range(6)}, 6: 1}
    # 6 and 3: the ninth token waits
    assert with_decodes(6, 3).step() == {**{r: 1 for r in range(6)}, 6: 2}


# --- shares


@pytest.mark.parametrize(
    ("decodes", "prompt", "batch"),
    [
        (6, 50, (3, 29)),  # 32 * 6 / 56 = 3.4
        (7, 49, (4, 28)),  # 32 * 7 / 56 = 4
        (1, 1000, (1, 31)),  # at least one
        (100, 1, (31, 1)),  # on both sides
        (28, 28, (16, 16)),
        (20, 5, (20, 4)),  # prompts cannot use 6.4 tokens: the rest goes to decodes
        (3, 400, (1, 31)),
    ],
)
def test_each_side_gets_its_share_of_the_work(decodes, prompt, batch):
    run = with_decodes(decodes, prompt, num_kv_blocks=100_000)
    chosen = run.step()
    assert (sum(r < decodes for r in chosen), chosen.get(decodes, 0)) == batch
    assert sum(chosen.values()) % 8 == 0


def test_what_decodes_cannot_use_goes_to_prompts():
    # two decodes have the share of five
    run = with_decodes(2, 12)
    assert run.step() == {0: 1, 1: 1, 2: 6}  # 14 tokens of work: one tile


def test_started_prompts_go_before_waiting_ones():
    run = rad([request(prompt=40, output=1), request(prompt=10, output=1)])
    assert run.steps(2) == [{0: 32}, {0: 8, 1: 8}]


# --- memory


def admitted(num_kv_blocks, count=3, **fields):
    run = rad([request(prompt=16, output=9) for _ in range(count)], 512, num_kv_blocks=num_kv_blocks, **fields)
    return len(run.step())


def test_admission_reserves_the_expected_output():
    # 16 + 512 tokens are 33 blocks for each
    assert [admitted(n) for n in (32, 65, 66, 98, 99)] == [1, 1, 2, 2, 3]
    assert admitted(66, watermark=0.02) == 1


def test_the_expectation_is_the_mean_of_finished_outputs():
    rows = [request(prompt=16, output=4)] + [request(0.01, prompt=16, output=9) for _ in range(4)]
    run = rad(rows, 512, num_kv_blocks=40)
    assert [len(b) for b in run.steps(4)] == [1, 1, 1, 1]
    # one output of 4 tokens has been seen: two blocks each
    assert run.step() == {r: 16 for r in (1, 2, 3, 4)}


def test_running_requests_keep_what_they_are_still_expected_to_need():
    # 2 blocks held, and 512 - 1 tokens to come: 32 blocks; the newcomer's 33 fit 67 blocks and not 66
    for blocks, batch in ((67, {0: 1, 1: 15}), (66, {0: 1})):
        run = rad([request(prompt=17, output=9), request(0.01, prompt=16, output=9)], 512, num_kv_blocks=blocks)
        run.step()
        assert run.step() == batch


def test_an_empty_engine_admits_whatever_the_expectation():
    assert rad([request(prompt=16, output=2)], num_kv_blocks=2).drain() == [{0: 16}, {0: 1}]
