"""The engine against queueing theory and against the cost model's own sums."""

import math

import numpy as np
import pytest
from helpers import Run, profile, request, table

from llmsched_gym.config import scenario
from llmsched_gym.cost import load_profile
from llmsched_gym.engine import Engine
from llmsched_gym.scheduler import install, make_scheduler
from llmsched_gym.workload import RequestTable

SERVICE_S = 0.04


def poisson(rate, count, seed):
    """Requests of one batch each."""
    return RequestTable.of(
        np.cumsum(np.random.default_rng(seed).exponential(1 / rate, count)), 10, 1, tbt_slo_s=0.5, qps=rate, seed=seed
    )


@pytest.mark.parametrize(("rho", "policy"), [(0.3, "sarathi"), (0.6, "vllm-v0"), (0.8, "slai"), (0.8, "rad-512")])
def test_one_at_a_time_with_constant_service_waits_like_an_md1_queue(rho, policy):
    count, seeds = 20_000, range(16)
    world = scenario("paper", max_num_seqs=1)
    engine = Engine(world, count, profile=profile(1e3 * SERVICE_S))
    scheduler = make_scheduler(policy)
    means = []
    for seed in seeds:
        requests = poisson(rho / SERVICE_S, count, seed)
        engine.reset(requests)
        install(scheduler, engine.state)
        assert engine.run(scheduler)
        waits = engine.state.requests["first_token_s"][0] - requests.arrival_s - SERVICE_S
        assert waits.min() > -1e-9
        means.append(waits.mean())
    expected = rho * SERVICE_S / (2 * (1 - rho))
    error = np.std(means, ddof=1) / math.sqrt(len(means))
    assert error < 0.02 * expected, "too few samples to tell"
    assert abs(np.mean(means) - expected) < 3.5 * error


def test_two_at_a_time_are_one_server_of_half_the_time():
    # Both prompts of a pair share a batch: 20 arrivals at once are gone after 10 services.
    run = Run(
        "sarathi", [request(prompt=10, output=1) for _ in range(20)], device=profile(1e3 * SERVICE_S), max_num_seqs=2
    )
    run.drain()
    assert run.requests["first_token_s"][:20] == pytest.approx(SERVICE_S * (1 + np.arange(20) // 2))


@pytest.mark.parametrize("device", ["rtx6000ada-mistral-7b", "a100-mistral-7b", "h100-mistral-7b"])
@pytest.mark.parametrize("policy", ["sarathi", "slai", "rad-512", "edf", "vllm-v1[budget=512]"])
@pytest.mark.parametrize("budget", [512, 8192])
def test_without_load_ttft_is_the_cost_models_sum_over_chunks(device, policy, budget):
    if budget != 512:
        policy = policy.replace("512", str(budget)) if "512]" in policy else f"{policy}[budget={budget}]"
    model = load_profile(device)
    prompts = [1, 127, 512, 513, 2048, 3000, 8000]
    rows = [request(100.0 * k, prompt=n, output=3) for k, n in enumerate(prompts)]
    run = Run(policy, rows, device=model, num_kv_blocks=1000)
    run.drain()
    for r, prompt in enumerate(prompts):
        cuts = [(start, min(budget, prompt - start)) for start in range(0, prompt, budget)]
        if policy.startswith("rad"):
            cuts = tiled(prompt, budget, model)
        expected = sum(model.predict_s([chunk], []) for chunk in cuts)
        measured = run.requests[r].first_token_s - run.requests[r].arrival_s
        assert measured == pytest.approx(expected, abs=1e-9), (prompt, cuts)
        # and a lone decode reads all KV, its own token's included
        decode_s = model.predict_s([], [prompt + 1])
        assert run.gaps(r)[0] == pytest.approx(decode_s, rel=1e-6)


def tiled(prompt, budget, model):
    """RAD's chunks of a lone prompt: the batch size with the best rate, whole tiles, and what is left."""
    tile = model.tile_tokens
    size = max(range(tile, budget + 1, tile), key=lambda n: n / (model.overhead_ms + model.linear.at(n)))
    chunks, start = [], 0
    while start < prompt:
        left = min(size, prompt - start)
        n = left if left <= tile else left - left % tile
        chunks.append((start, n))
        start += n
    return chunks


def test_work_is_conserved_by_every_order_of_prompts():
    # one sequence at a time: the busy period is the sum of services whatever the order, and the mean wait is not
    rng = np.random.default_rng(8)
    rows = [
        request(float(t), prompt=int(p), output=1)
        for t, p in zip(np.cumsum(rng.exponential(0.02, 300)), rng.integers(1, 512, 300), strict=True)
    ]
    device = profile((1.1, 1.2), tokens=(1, 2))
    busy, waits = [], []
    for policy in ("sarathi", "sarathi-spf", "sarathi[order=edf]", "srpt-capped[cap=inf]"):
        run = Run(policy, table(rows), device=device, max_num_seqs=1)
        run.drain()
        busy.append(run.sim.busy_s)
        waits.append(np.mean(run.requests["first_token_s"][:300] - run.table.arrival_s))
    assert busy == pytest.approx([busy[0]] * 4, rel=1e-12)
    assert waits[1] < 0.8 * waits[0]
    assert waits[2] == pytest.approx(waits[0])  # equal TTFT SLOs: by arrival
    assert waits[3] == pytest.approx(waits[1])
