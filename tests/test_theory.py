"""The fluid bound by hand, the stability test on known answers, RAD at 95 % of the bound, the clairvoyant scheduler."""

import math

import numpy as np
import pytest
from helpers import Run, profile, request

from llmsched_gym.config import scenario
from llmsched_gym.cost import load_profile, roofline
from llmsched_gym.fluid import fluid_capacity, mean_work, work
from llmsched_gym.scheduler import make_scheduler
from llmsched_gym.theory import Drift, experiments, figures, stability

PAPER = scenario("paper")


# --- work


def brute_work(p, d):
    """The same sums, one decode after another."""
    contexts = [p + j for j in range(1, d)]
    blocks = math.ceil(p / 16) + sum(math.ceil(c / 16) for c in contexts)
    return p, d - 1, p * (p + 1) / 2, p + sum(contexts), blocks, d


@pytest.mark.parametrize(("p", "d"), [(1, 1), (16, 1), (16, 2), (17, 3), (100, 40), (31, 33)])
def test_work_of_one_request(p, d):
    work = mean_work(np.array([p]), np.array([d]), PAPER, 1000)
    found = (work.prefill_tokens, work.decode_tokens, work.pairs, work.kv_tokens, work.held_blocks, work.batches)
    assert found == pytest.approx(brute_work(p, d))


def test_rejected_requests_need_nothing():
    alone = mean_work(np.array([100]), np.array([10]), PAPER, 1000)
    with_giant = mean_work(np.array([100, 9000]), np.array([10, 10]), PAPER, 1000)
    assert with_giant.tokens == alone.tokens / 2
    too_few_blocks = mean_work(np.array([100, 2000]), np.array([10, 10]), PAPER, 20)
    assert too_few_blocks.tokens == alone.tokens / 2


# --- the linear program


def test_a_cached_prompt_needs_only_what_is_behind_it():
    # of 100 tokens 64 are cached, 32 of them a system prompt that all hold together
    found = mean_work(np.array([100]), np.array([3]), PAPER, 1000, np.array([64]), np.array([32]))
    whole = mean_work(np.array([100]), np.array([3]), PAPER, 1000)
    assert (found.prefill_tokens, found.decode_tokens) == (36, 2)
    assert found.pairs == sum(range(65, 101)) and found.own_pairs == sum(range(1, 37))
    assert found.kv_tokens == whole.kv_tokens  # whoever computes a token reads all before it
    assert found.held_blocks == whole.held_blocks - 3 * 2


def test_a_session_is_an_arrival_of_several_requests():
    twice = mean_work(np.array([100, 100]), np.array([3, 3]), PAPER, 1000, num_arrivals=1)
    once = mean_work(np.array([100]), np.array([3]), PAPER, 1000)
    assert twice.tokens == 2 * once.tokens and twice.held_blocks == 2 * once.held_blocks


@pytest.mark.parametrize("suite", ["chat", "agents"])
def test_caching_raises_the_capacity_of_sessions(suite):
    world = scenario(suite)
    cached, computed = (fluid_capacity(world.replace(prefix_caching=on)).qps for on in (True, False))
    low, high = world.qps_range
    assert computed < low < cached < high
    assert low / cached == pytest.approx(0.6, abs=0.02) and high / cached == pytest.approx(1.1, abs=0.03)


def one_length(monkeypatch, p, d):
    monkeypatch.setattr(work, "lengths", lambda scenario: (np.array([p]), np.array([d])))


def test_prompts_alone_run_in_the_fastest_batches(monkeypatch):
    one_length(monkeypatch, 100, 1)
    # 8 tokens take 10 ms, 16 take 16 ms, 32 take 34 ms: 1 ms a token at best
    device = profile((10.0, 10.0, 16.0, 16.0, 34.0, 34.0), tokens=(1, 8, 9, 16, 17, 32), tile=8)
    found = fluid_capacity(PAPER.replace(max_num_batched_tokens=32), device)
    assert found.qps == pytest.approx(10.0)
    assert found.batch_tokens == (16,)
    assert found.limited_by == "computing"
    assert found.linear_share == pytest.approx(1.0)


def test_sequence_slots_bound_decodes(monkeypatch):
    one_length(monkeypatch, 1, 101)
    # 101 batches a request, at most four requests in each, 10 ms whatever is in it
    device = profile(10.0, tokens=(1, 8192))
    found = fluid_capacity(PAPER.replace(max_num_seqs=4), device)
    assert found.qps == pytest.approx(100.0 * 4 / 101)
    assert found.limited_by == "max_num_seqs"
    assert found.seqs_price == pytest.approx(1.0)


def test_memory_bounds_decodes(monkeypatch):
    one_length(monkeypatch, 16, 17)
    # one block for the prompt's batch, two for each of 16 decodes: 33 block-batches of 10 in a batch
    device = profile(10.0, tokens=(1, 8192), kv_blocks=10)
    found = fluid_capacity(PAPER, device)
    assert found.qps == pytest.approx(100.0 * 10 / 33)
    assert found.limited_by == "memory"
    assert found.memory_price == pytest.approx(1.0)


def test_attention_and_cost_factors_take_their_time(monkeypatch):
    one_length(monkeypatch, 10, 1)
    device = profile(10.0, tokens=(1, 8192), kv_ms=1.0, pair_ms=2.0)
    base = PAPER.replace(max_num_batched_tokens=10)
    assert fluid_capacity(base, device).qps == pytest.approx(1000 / (10 + 10 + 2 * 55))
    assert fluid_capacity(base.replace(cost_scale=2.0), device).qps == pytest.approx(500 / 130)
    noisy = base.replace(jitter=0.2, straggler_share=0.1, straggler_factor=3.0)
    assert fluid_capacity(noisy, device).qps == pytest.approx(1000 / 130 / (math.exp(0.02) * 1.2))


def test_prices_are_elasticities():
    found = fluid_capacity(PAPER)
    more = fluid_capacity(PAPER.replace(num_kv_blocks=round(14_733 * 1.01)))
    assert found.limited_by == "memory"
    assert (more.qps / found.qps - 1) / 0.01 == pytest.approx(found.memory_price, rel=0.05)


def test_the_default_machine():
    found = fluid_capacity(PAPER)
    assert found.qps == pytest.approx(2.009, abs=0.002)
    assert found.mean_batch_tokens == pytest.approx(555, abs=2)


def test_the_best_sizes_on_a_staircase_are_whole_tiles():
    waves = roofline("mistral-7b", "a100-80gb", waves=True, tile_tokens=128)
    assert all(n % 128 == 0 for n in fluid_capacity(PAPER, waves).batch_tokens)


# --- the stability test


def test_slope_is_that_of_the_line_behind_the_warm_up():
    time_s = np.linspace(0, 100, 401)
    backlog = np.where(time_s < 25, 50, 3 + 0.25 * time_s)
    assert stability.slope(time_s, backlog) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(-0.002, 0.003, "bounded"), (0.001, 0.008, "bounded"), (0.002, 0.02, "growing"), (-0.01, 0.02, "undecided")],
)
def test_verdicts(low, high, verdict):
    assert Drift(1.0, (), (low + high) / 2, low, high, 5.0).verdict == verdict


def test_bisection_finds_a_known_capacity(monkeypatch):
    def known(scenario, policy, qps, **settings):
        grows = max(0.0, 1 - 1.37 / qps)
        return Drift(qps, (grows,), grows, grows, grows, 0.0)

    monkeypatch.setattr(stability, "drift", known)
    for low, high in ((1.0, 2.0), (1.5, 2.0), (0.5, 0.6)):
        found = stability.boundary(PAPER, "any", low, high, resolution=0.001)
        assert 1.37 <= found.qps <= 1.37 * 1.008
        assert found.bounded_qps < found.unbounded_qps


def test_one_request_at_a_time_is_a_queue_with_a_known_boundary(monkeypatch):
    """Twenty-token prompts without decodes, one per batch of a second's tenth: ten a second are served."""
    one_length(monkeypatch, 20, 1)
    device = profile(100.0, tokens=(1, 20), tile=20)

    def table(scenario, seed):
        rng = np.random.default_rng(seed)
        times = np.cumsum(rng.exponential(1 / scenario.qps, scenario.num_requests))
        from helpers import table as make

        return make([request(float(t), 20, 1) for t in times])

    monkeypatch.setattr(stability, "make_table", table)
    settings = dict(seeds=(0, 1, 2), num_requests=3000, profile=device)
    limited = PAPER.replace(max_num_seqs=1)
    assert stability.drift(limited, "sarathi", 8.0, **settings).verdict == "bounded"
    over = stability.drift(limited, "sarathi", 12.5, **settings)
    assert over.verdict == "growing"
    assert over.mean == pytest.approx(0.2, abs=0.03)


# --- schedulers against the bound


@pytest.mark.parametrize("name", [experiments.SMOOTH, experiments.STAIRCASE])
def test_rad_is_bounded_at_95_per_cent_of_the_fluid_capacity(name):
    world = PAPER.replace(profile=name)
    qps = 0.95 * fluid_capacity(world).qps
    found = stability.drift(world, "rad", qps, seeds=(0, 1, 2, 3), num_requests=16_384)
    assert found.mean < 0.01
    assert found.backlog < 250
    ruled_out = stability.drift(world, "faster-transformer", qps, seeds=(0, 1), num_requests=4000)
    assert ruled_out.mean > 0.3


def test_nobody_serves_more_than_the_fluid_capacity():
    capacity = fluid_capacity(PAPER).qps
    served = {}
    for policy in ("sarathi", "rad-512", "orca"):
        found = stability.drift(PAPER, policy, 1.1 * capacity, seeds=(0, 1, 2), num_requests=10_000)
        served[policy] = 1.1 * (1 - found.mean)
    assert max(served.values()) < 1.015  # seeds differ in how much work they bring
    assert max(served.values()) > 0.9


def test_ablation_tells_the_principles_apart():
    rows = experiments.ablation(PAPER, devices=(experiments.WAVES,), seeds=(0, 1), num_requests=3000)
    gain = {(row["variant"], row["size"]): row["gain"] for row in rows}
    assert gain["both principles", 8192] == 0.0
    assert gain["tiling off", 8192] < -0.02
    assert gain["8 tokens off the tile", 8192] < -0.02
    assert gain["dynamic allocation off", 512] < -0.03
    figures.plot_ablation([row | {"profile": name} for row in rows for name in (experiments.SMOOTH, experiments.WAVES)])


def test_tiles_show_what_eight_tokens_more_cost():
    found = {row["profile"]: row for row in experiments.tiles()}
    assert found[experiments.SMOOTH]["best"] == 8192
    assert found[experiments.STAIRCASE]["tile"] == load_profile(experiments.STAIRCASE).tile_tokens
    assert found[experiments.WAVES]["extra_8"]["512"] > 0.1
    assert abs(found[experiments.SMOOTH]["extra_8"]["512"]) < 0.01
    figures.plot_tiles(list(found.values()))


def test_a_stability_cell_has_what_the_figures_need():
    rows = experiments.stability(
        PAPER, policies=("sarathi",), devices=(experiments.SMOOTH,), seeds=(0, 1), num_requests=1500
    )
    assert rows[0]["judged"]["share"] == pytest.approx(0.95)
    assert len(rows[0]["time_s"]) == len(rows[0]["requests"]) == stability.POINTS
    figures.plot_backlogs(rows, 0.95)
    figures.plot_boundaries(rows)


def test_cells_keep_their_order_whatever_the_number_of_workers():
    cells = [(float(n),) for n in (9, 4, 1)]
    for workers in (1, 2):
        notes = []
        assert experiments.run_cells(math.sqrt, cells, workers, notes.append) == [3.0, 2.0, 1.0]
        assert notes == ["1/3", "2/3", "3/3"]


# --- the clairvoyant scheduler


def total(rows, **fields):
    return Run("shortest-total[cap=1000]", rows, length_hint="oracle", **fields)


def hinted(rows):
    """A table whose hints are the truth, as `length_hint=oracle` makes it."""
    import dataclasses

    from helpers import table

    made = table(rows)
    return dataclasses.replace(made, length_hint=made.output_tokens.astype(float))


def test_shortest_total_prefers_less_work_to_a_shorter_prompt():
    device = profile((10.0, 100.0), tokens=(1, 512), tile=16)
    rows = [request(prompt=100, output=400), request(prompt=130, output=2), request(prompt=120, output=30)]
    run = total(hinted(rows), device=device, max_num_batched_tokens=64)
    run.drain()
    assert np.argsort(run.requests["first_token_s"][:3]).tolist() == [1, 2, 0]


def test_shortest_total_is_clairvoyant_and_capped():
    scheduler = make_scheduler("shortest-total")
    assert scheduler.clairvoyant
    world = scenario("paper", qps=1.8, num_requests=300)
    from llmsched_gym.evaluation.run import simulate

    episode = simulate(world, "shortest-total", 0, num_steps=5000)
    assert episode.scenario.length_hint == "oracle"
    assert (episode.requests["num_output_tokens"] == episode.table.output_tokens).all()
    durations_s = episode.steps["duration_s"]
    assert np.mean(durations_s <= 0.0801) > 0.5  # others run while nobody strict decodes
    assert durations_s.max() <= 0.401
