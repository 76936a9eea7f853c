"""What the environment does: references among the knobs, exact rewards, nothing hidden observed, no rule broken."""

import math

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_gym import SUITES, env_config
from llmsched_gym.engine import Batch, check
from llmsched_gym.engine.utility import gaps_in_time, gaps_in_time_kernel, late_share
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env.actions.knobs import KNOBS, knobs_action, knobs_for
from llmsched_gym.env.arrays import TERMINATED, TRUNCATED
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies.bridge import PolicyScheduler, SchedulerPolicy
from llmsched_gym.scheduler import make_scheduler
from llmsched_gym.workload import NOISE_BLOCK

PACKED = ("sarathi", "sarathi-spf", "slai", "slai-spf-fixed", "slai-fcfs-fixed", "slai-priority")
TEN = (*PACKED, "vllm-v0", "orca", "edf", "srpt-capped")
COLUMNS = ("first_token_s", "last_token_s", "resolved_s", "max_gap_s", "lateness_s", "num_preemptions", "phase")


def final(episode_requests):
    return {name: np.asarray(episode_requests[name]) for name in COLUMNS}


def assert_same_run(a, b):
    for name in COLUMNS:
        assert np.array_equal(a[name], b[name], equal_nan=True), name


def expected_utility(requests, cohort, beta, patience_s):
    """Utility of resolved requests from their records, written down independently of the reward kernel."""
    total = 0.0
    for r in requests[cohort]:
        finished, refused = r["phase"] == 3, r["phase"] == 5
        on_time = finished and r["first_token_s"] - r["arrival_s"] <= r["ttft_slo_s"] and r["num_late_gaps"] == 0
        if refused:
            total -= beta
            continue
        late = 0.0 if math.isinf(patience_s) or r["phase"] == 4 else min(1.0, r["lateness_s"] / patience_s)
        total += float(on_time) - beta * late
    return total


@pytest.mark.parametrize("qps", [1.0, 1.6, 2.2])
@pytest.mark.parametrize("name", PACKED)
def test_knobs_reproduce_the_references_batch_for_batch(name, qps):
    scheduler = make_scheduler(name)
    episode = simulate(SUITES["paper"].scenario.replace(qps=qps, num_requests=2000), name, 5, num_steps=200_000)
    env = LLMSchedEnv("paper", qps=qps, num_requests=2000)
    env.reset(seed=5)
    core, sim, batches, items = env.core, env.core.engine.state.sims[0], env.core.engine.state.batches[0], []
    done = False
    while not done:
        core.actions[0] = knobs_action(scheduler.knobs, float(sim.kv_cache_usage), env.config)
        before = int(sim.num_batches)
        core.step()
        if sim.num_batches > before:
            items.append((int(batches.num_decodes), int(batches.num_tokens - batches.num_decodes)))
        done = bool(core.arrays.outcomes[0, [TERMINATED, TRUNCATED]].any())
    steps = episode.steps
    assert len(items) == len(steps) == episode.sim.num_batches
    assert np.array_equal(items, np.stack([steps["decode_tokens"], steps["prefill_tokens"]], axis=1))
    assert_same_run(final(episode.requests), final(core.engine.state.requests[0][:2000]))


@pytest.mark.parametrize("name", ["slai", "rad-512", "vllm-v0", "faster-transformer", "random"])
def test_a_scheduler_steps_the_env_as_it_runs_in_evaluate(name):
    fields = {"qps": 1.9, "num_requests": 60, "warmup_s": 10.0, "patience_s": 20.0}
    episode = simulate(SUITES["default"].scenario.replace(**fields), name, 3)
    env = LLMSchedEnv("default", **fields)
    env.reset(seed=3)
    policy = SchedulerPolicy(env, name)
    done = False
    while not done:
        *_, terminated, truncated, _ = policy.step()
        done = terminated or truncated
    assert_same_run(final(episode.requests), final(env.core.engine.state.requests[0][: len(episode.requests)]))


@pytest.mark.parametrize("observation", ["features", "slots"])
@pytest.mark.parametrize(("action", "repeat"), [("knobs", 1), ("knobs", 3), ("priority", 1), ("request", 1)])
def test_a_policy_runs_in_evaluate_as_it_steps_the_env(action, repeat, observation):
    fields = {"qps": 2.0, "num_requests": 40, "warmup_s": 5.0, "patience_s": 15.0, "max_num_seqs": 80}
    config = env_config("tenants", action=action, observation=observation, action_repeat=repeat, **fields)

    def policy(seen, mask=None):
        features = seen["features"] if isinstance(seen, dict) else seen
        rng = np.random.default_rng(abs(hash(features.tobytes())) % 2**32)
        if action == "knobs":
            return rng.integers([len(k.values) for k in knobs_for(config)])
        if action == "priority":
            return rng.uniform(-0.2, 1.0, 64).astype(np.float32)
        return int(rng.choice(np.flatnonzero(mask)))

    env = LLMSchedEnv("tenants", action=action, observation=observation, action_repeat=repeat, **fields)
    seen, _ = env.reset(seed=8)
    done = False
    while not done:
        arguments = (seen, env.action_masks()) if action == "request" else (seen,)
        seen, _, terminated, truncated, _ = env.step(policy(*arguments))
        done = terminated or truncated
    episode = simulate(SUITES["tenants"].scenario.replace(**fields), PolicyScheduler(policy, config), 8)
    assert_same_run(final(episode.requests), final(env.core.engine.state.requests[0][: len(episode.requests)]))


def run_to_the_end(env, choose, seed):
    env.reset(seed=seed)
    total, terms, done, truncated = 0.0, np.zeros(4), False, False
    while not done:
        _, reward, terminated, truncated, _ = env.step(choose())
        total += reward
        terms += list(env.reward_terms().values())
        done = terminated or truncated
    return total, terms, truncated


@settings(max_examples=25)
@given(
    suite=st.sampled_from(sorted(SUITES)),
    action=st.sampled_from(["knobs", "priority", "request"]),
    credit=st.sampled_from(["early", "finish"]),
    refusal=st.booleans(),
    beta=st.sampled_from([0.0, 0.5, 2.0]),
    scale=st.sampled_from([1.0, 0.125, 10.0]),
    seed=st.integers(3000, 4000),
)
def test_return_is_the_sum_of_utilities(suite, action, credit, refusal, beta, scale, seed):
    fields = {"qps": 2.2, "num_requests": 12, "patience_s": 8.0, "warmup_s": 6.0, "drain_s": math.inf}
    fields |= {"allow_refusal": refusal, "beta": beta, "credit": credit, "reward_scale": scale}
    env = LLMSchedEnv(suite, action=action, num_kv_blocks=1200, **fields)
    env.action_space.seed(seed)
    total, terms, truncated = run_to_the_end(env, env.action_space.sample, seed)
    assert not truncated
    state, table = env.core.engine.state, env.core.tables[0]
    cohort = slice(table.cohort_start, table.cohort_stop)
    expected = expected_utility(state.requests[0], cohort, beta, 8.0)
    assert total == pytest.approx(scale * expected, abs=1e-9)
    assert scale * terms.sum() == pytest.approx(total, abs=1e-9)
    check(state)


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_ten_schedulers_are_ordered_alike_by_return_and_utility(suite):
    qps, n = (0.5, 30) if suite == "agents" else (2.1, 120)  # agents, with prompts as long, are overloaded by that, too
    fields = {"qps": qps, "num_requests": n, "drain_s": math.inf, "warmup_s": 20.0}
    returns, utilities = [], []
    for name in TEN:
        env = LLMSchedEnv(suite, **fields)
        env.reset(seed=11)
        policy = SchedulerPolicy(env, name)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = policy.step()
            total += reward
            done = terminated or truncated
        assert terminated
        table, state = env.core.tables[0], env.core.engine.state
        cohort = slice(table.cohort_start, table.cohort_stop)
        expected = expected_utility(state.requests[0], cohort, 0.5, env.config.patience_s)
        assert total == pytest.approx(expected, abs=1e-9)
        returns.append(round(total, 9))
        utilities.append(round(expected / n, 11))
    assert len(set(returns)) > 5
    assert list(np.argsort(returns, kind="stable")) == list(np.argsort(utilities, kind="stable"))


@pytest.mark.parametrize("rule", ["every-gap", "fraction:0.9", "deadline", "mean"])
def test_with_beta_zero_the_return_is_attainment(rule):
    fields = {"qps": 1.9, "num_requests": 60, "drain_s": math.inf, "tbt_rule": rule}
    env = LLMSchedEnv("default", beta=0.0, **fields)
    total, _, _ = run_to_the_end(env, lambda: np.zeros(7, np.int64), 17)
    episode = simulate(SUITES["default"].scenario.replace(**fields), "sarathi", 17)
    assert total == pytest.approx(60 * row(episode)["slo_attainment"], abs=1e-9)


@settings(max_examples=30)
@given(
    rule=st.sampled_from(["every-gap", "fraction:0.9", "fraction:0.7", "fraction:0.99", "deadline"]),
    beta=st.sampled_from([0.0, 0.25, 0.5, 2.0]),
    refusal=st.booleans(),
    seed=st.integers(3000, 4000),
)
def test_the_reward_and_the_metrics_have_one_utility(rule, beta, refusal, seed):
    fields = {"qps": 2.4, "num_requests": 25, "drain_s": math.inf, "tbt_rule": rule, "beta": beta, "patience_s": 6.0}
    fields |= {"relaxed_tbt_slo_s": 0.15, "allow_refusal": refusal}
    policy = "sarathi[refuse=true]" if refusal else "sarathi"
    env = LLMSchedEnv("default", **fields)
    choice = np.array([0] * 7 + [1] * refusal, np.int64)
    total, _, truncated = run_to_the_end(env, lambda: choice, seed)
    figures = row(simulate(SUITES["default"].scenario.replace(**fields), policy, seed))
    assert not truncated
    assert total == pytest.approx(25 * figures["mean_utility"], abs=1e-9)


def test_a_share_of_gaps_that_rounding_makes_less_is_in_time():
    """7 late gaps of 70 are a tenth, though 1 - 0.9 is a bit less than one."""
    assert gaps_in_time(7, 70, late_share("fraction:0.9")) and gaps_in_time_kernel(7, 70, late_share("fraction:0.9"))
    assert not gaps_in_time(8, 70, late_share("fraction:0.9"))
    assert list(gaps_in_time(np.array([0, 1]), np.array([9, 9]), late_share("every-gap"))) == [True, False]


def test_withholding_a_token_cannot_hide_a_miss():
    env = LLMSchedEnv("paper", qps=1.0, num_requests=1, patience_s=4.0)
    env.reset(seed=1)
    paid = []
    request = env.core.engine.state.requests[0][0]
    idle = Batch({})
    serve = make_scheduler("sarathi")

    class Idle:
        def schedule(self, view):
            return idle

    while request.num_output_tokens == 0:
        paid.append(env.step_scheduler(serve)[1])
    assert sum(paid) == 1.0
    for _ in range(2000):
        _, reward, done, _, _ = env.step_scheduler(Idle())
        paid.append(reward)
        if done:
            break
    # the expiry takes the first token's point back, and lateness costs beta in all until the client leaves
    assert sum(paid) == pytest.approx(-0.5, abs=1e-9)
    assert request.phase == 6


@pytest.mark.parametrize("before", ["rad", "sglang[order=hrrn]", "gate"])
def test_a_scheduler_finds_nothing_that_another_one_has_noted(before):
    """What `wait` remembers of whom it has seen would be clock times of requests to `gate`, and so on."""
    env = LLMSchedEnv(qps=2.0, jitter=0.0, max_backlog=40, length_hint="oracle")
    env.reset(seed=3)
    for _ in range(100):
        env.step_scheduler(make_scheduler(before))
    after = make_scheduler("gate" if before == "rad" else "wait")
    state = env.core.engine.state
    env._install(after)
    assert not state.memory[0].any()
    sim, notes = state.sims[0], state.requests[0]["lst_s"]
    live = [*state.waiting[0, : sim.num_waiting], *state.running[0, : sim.num_running]]
    assert live and np.isnan(notes[live]).all()
    finished = int(sim.num_finished)
    for _ in range(400):
        if any(env.step_scheduler(after)[2:4]):
            break
    assert sim.num_finished > finished


def test_custom_reward_and_observation_objects():
    class Queue:
        space = gym.spaces.Box(0.0, np.inf, (2,), np.float32)

        def observe(self, view):
            return np.array([len(view.waiting), len(view.running)], np.float32)

    seen = []

    def reward(transition):
        seen.append(transition)
        return -transition.duration_s

    env = LLMSchedEnv(reward=reward, observation=Queue(), qps=2.0, num_requests=10, warmup_s=0.0)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    plain = LLMSchedEnv(qps=2.0, num_requests=10, warmup_s=0.0)
    plain.reset(seed=0)
    done = False
    while not done:
        observation, paid, terminated, truncated, info = env.step(np.zeros(7, np.int64))
        *_, twin = plain.step(np.zeros(7, np.int64))
        assert paid == -info["duration_s"] == -twin["duration_s"]
        assert env.reward_terms() == plain.reward_terms()
        done = terminated or truncated
    assert sum(len(t.resolved) for t in seen) == 10
    vector = LLMSchedVectorEnv(2, reward=reward, observation=Queue(), qps=2.0)
    vector.reset(seed=0)
    assert vector.step(np.zeros((2, 7), np.int64))[0].shape == (2, 2)


@pytest.mark.parametrize("observation", ["features", "slots"])
def test_what_is_hidden_does_not_show_until_it_acts(observation):
    env, twin = (LLMSchedEnv("drift", observation=observation, action="request", qps=2.0) for _ in range(2))
    rng = np.random.default_rng(0)
    for e in (env, twin):
        e.reset(seed=21)
    for _ in range(400):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        env.step(action)
        twin.step(action)
    state = twin.core.engine.state
    sim, world = state.sims[0], state.worlds[0]
    emitted = state.requests[0]["num_output_tokens"]
    live = np.isin(state.requests[0]["phase"], (0, 1, 2))
    state.output_tokens[0][live] = emitted[live] + rng.integers(1, 900, live.sum())
    later = slice(int(state.episodes[0].num_arrived), int(world.num_requests))
    state.arrivals[0]["arrival_s"][later] += 5.0
    state.arrivals[0]["prompt_tokens"][later] = 77
    world.next_arrival_s += 5.0
    world.cost_scale *= 3.0
    world.stop_s += 1000.0
    state.noise[:] *= 0.5
    for e in (env, twin):
        e.core.observe(0)
    before, after = env.core.observation(0), twin.core.observation(0)
    for a, b in zip(
        before.values() if isinstance(before, dict) else [before],
        after.values() if isinstance(after, dict) else [after],
        strict=True,
    ):
        assert np.array_equal(a, b)
    # ... and then it acts
    for _ in range(200):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        env.step(action)
        twin.step(action)
    assert env.core.engine.state.sims[0].clock_s != sim.clock_s


def test_constant_actions_change_the_queue():
    outcomes = set()
    for budget in range(len(KNOBS[0].values)):
        for order in range(len(KNOBS[4].values)):
            env = LLMSchedEnv("default", qps=2.0, num_requests=80, warmup_s=0.0)
            action = np.array([budget, 0, 0, 0, order, 0, 0])
            total, _, _ = run_to_the_end(env, lambda a=action: a, 4)
            outcomes.add((round(total, 6), round(float(env.core.engine.state.sims[0].clock_s), 6)))
    assert len(outcomes) > 20


@pytest.mark.parametrize("action", ["knobs", "priority", "request"])
def test_random_actions_break_no_rule(action):
    """Vector environments under KV pressure, impatience, refusal and overload, checked after every step."""
    fields = {"qps": 2.6, "num_kv_blocks": 1500, "patience_s": 6.0, "allow_refusal": True, "horizon_s": 60.0}
    envs = LLMSchedVectorEnv(4, "tenants", autoreset_mode="same_step", action=action, **fields)
    envs.action_space.seed(0)
    envs.reset(seed=70)
    clocks = np.zeros(4)
    abandoned = refused = preempted = 0
    for _ in range(1500):
        *_, terminated, truncated, _ = envs.step(envs.action_space.sample())
        clocks[terminated | truncated] = 0.0
        for i in range(4):
            if action == "request":  # its batch is being formed: marks are legal
                rows = envs.core.engine.state.requests[i]
                marks = rows["num_scheduled_tokens"].copy()
                rows["num_scheduled_tokens"] = 0
                clocks[i] = check(envs.core.engine.state, i, clocks[i])
                rows["num_scheduled_tokens"] = marks
            else:
                clocks[i] = check(envs.core.engine.state, i, clocks[i])
        sims = envs.core.engine.state.sims
        abandoned = max(abandoned, int(sims["num_abandoned"].max()))
        refused = max(refused, int(sims["num_refused"].max()))
        preempted = max(preempted, int(sims["num_preemptions"].max()))
    assert abandoned > 0
    assert action != "knobs" or (refused > 0 and preempted > 0)


def test_worst_patience_counts_what_a_preempted_request_waited_before():
    env = LLMSchedEnv(qps=2.5, num_kv_blocks=1500, watermark=0.0, patience_s=20.0, horizon_s=200.0)
    env.reset(seed=1)
    entry = env.feature_names.index("worst_patience")
    earlier = 0
    for _ in range(4000):
        observation, _, _, truncated, _ = env.step(np.zeros(7, np.int64))
        state = env.core.engine.state
        sim = state.sims[0]
        waiting = [state.requests[0][r] for r in state.waiting[0, : sim.num_waiting]]
        late = [0.0]
        for request in waiting:
            due_s = request.arrival_s + request.ttft_slo_s
            if request.num_output_tokens > 0:
                due_s = request.last_token_s + request.tbt_slo_s
                earlier += request.lateness_s > 0 and sim.clock_s < due_s
            late.append(request.lateness_s + max(0.0, sim.clock_s - due_s))
        assert observation[entry] == pytest.approx(min(1.0, max(late) / 20.0), abs=1e-6)
        if truncated:
            break
    assert earlier > 0


@pytest.mark.parametrize("action", ["knobs", "priority"])
def test_batches_of_one_action_run_in_compiled_code_as_one_by_one(action, monkeypatch):
    config = env_config("drift", action=action, action_repeat=5, num_requests=300, drain_s=100.0)
    space = LLMSchedEnv("drift", action=action).action_space

    def policy(observation):
        """Some function of all that is seen."""
        rng = np.random.default_rng((1e6 * observation).astype(np.int64))
        return rng.integers(space.nvec) if action == "knobs" else rng.random(space.shape)

    together = simulate(config, PolicyScheduler(policy, config), 3)
    assert together.sim.num_batches > NOISE_BLOCK
    monkeypatch.delattr(PolicyScheduler, "run_steps")
    one_by_one = simulate(config, PolicyScheduler(policy, config), 3)
    assert_same_run(final(together.requests), final(one_by_one.requests))
    assert together.sim.clock_s == one_by_one.sim.clock_s
