"""The rule that never mixes: what its batches are, whom it lets wait, and that it gains where mixing is dear."""

import numpy as np
import pytest
from helpers import Run, profile, request

from llmsched_gym.config import scenario
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.scheduler import make_scheduler

NAME = "llmsched_gym.baselines.exclusive:EXCLUSIVE"


@pytest.mark.parametrize("name", [NAME, f"{NAME}[order=srpt,margin=2.4]"])
def test_batches_are_of_one_phase(name):
    episode = simulate(scenario("paper", qps=1.4, num_requests=300), name, 0, num_steps=40_000)
    steps = episode.steps
    assert not ((steps["prefill_tokens"] > 0) & (steps["decode_tokens"] > 0)).any()
    assert (steps["prefill_tokens"] > 0).sum() > 300 and (steps["decode_tokens"] > 0).sum() > 300
    assert int(episode.sim.num_finished) == 300


def test_phases_take_turns_at_the_strictest_users_pace():
    """Batches take 9 ms: a strict decode is critical within 80 ms of its deadline, so every fourth runs it."""
    rows = [request(0.0, 10, 50, 0.1), request(0.05, 400, 2, 0.5), request(0.06, 400, 2, 0.5)]
    run = Run(NAME, rows, device=profile(9.0), max_num_batched_tokens=32)
    kinds = []
    while not run.engine.is_over():
        batch = run.decide()
        if run.sim.num_running > 1 and run.sim.clock_s < 0.3:
            kinds.append("decode" if set(batch) == {0} else "prompt")
            assert 0 not in batch or set(batch.values()) == {1}
        run.engine.execute()
    assert kinds[2:14] == ["decode", "prompt", "prompt", "prompt"] * 3
    assert run.sim.num_finished == 3


def test_it_serves_strict_users_where_mixing_is_dear():
    world = scenario("paper", profile="rtx6000ada-mistral-7b[mixing=4]", num_requests=400, num_kv_blocks=15_000)
    rows = evaluate(world, [NAME, "sarathi", "vllm-v0"], qps=[1.5], seeds=3)
    shares = {p: np.mean([r["slo_attainment"] for r in rows if r["policy"] == p]) for p in (NAME, "sarathi", "vllm-v0")}
    assert shares[NAME] > 0.8 > 0.6 > max(shares["sarathi"], shares["vllm-v0"])
    strict = [r["slo_attainment_by_class"]["strict"] for r in rows if r["policy"] == NAME]
    assert np.mean(strict) > 0.6


def test_its_options():
    knobs = make_scheduler(f"{NAME}[cap=0.5,margin=1.5,budget=512]").knobs
    assert (float(knobs["cap"]), float(knobs["margin"]), int(knobs["token_budget"])) == (0.5, 1.5, 512)
