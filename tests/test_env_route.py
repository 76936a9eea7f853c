"""LLMRoute: an agent that sends requests to replicas, as a Gymnasium citizen, and what its steps are worth."""

import math
import os
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_engine_determinism import fresh_process
from test_env_vector import MODES, assert_same, step_and_reset

from llmsched_gym.cluster import Cluster, kernels
from llmsched_gym.cluster.invariants import check
from llmsched_gym.config import CLUSTER_SUITES, route_config
from llmsched_gym.engine.records import ABANDONED, FINISHED, PENDING, REFUSED, RUNNING, WAITING
from llmsched_gym.engine.rows import phases_of
from llmsched_gym.env.actions import InvalidAction
from llmsched_gym.env.route import LLMRouteEnv, LLMRouteVectorEnv
from llmsched_gym.env.route import kernels as steps
from llmsched_gym.registry import make_router

SHORT = {"qps": 3.0, "horizon_s": 30.0, "warmup_s": 5.0}
IDS = {suite: given.env_id for suite, given in CLUSTER_SUITES.items()}
CROWDED = {
    "num_kv_blocks": 1500,
    "patience_s": 0.8,
    "qps": 4.0,
    "num_requests": 25,
    "warmup_s": 0.5,
    "arrivals_continue": False,
    "drain_s": math.inf,
    "max_model_len": 8192,
}


def leaves(observation):
    return list(observation.values()) if isinstance(observation, dict) else [observation]


def episode(env, seed=0, choose=None):
    """(observations, rewards, infos) of an episode under random legal actions."""
    rng = np.random.default_rng(seed)
    observation, info = env.reset(seed=seed)
    seen, paid, infos, done = [observation], [], [info], False
    while not done:
        action = choose(env) if choose else int(rng.choice(np.flatnonzero(env.action_masks())))
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(observation)
        paid.append(reward)
        infos.append(info)
        done = terminated or truncated
    return seen, paid, infos, terminated


@pytest.mark.parametrize("suite", sorted(IDS))
def test_gymnasium_checker_passes(suite):
    for observation in ("features", "replicas"):
        env = gym.make(IDS[suite], observation=observation, **SHORT)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_env(env.unwrapped, skip_render_check=True)


def test_sb3_checker_passes():
    checker = pytest.importorskip("stable_baselines3.common.env_checker", reason="stable-baselines3 is not installed")
    for observation in ("features", "replicas"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checker.check_env(LLMRouteEnv("cluster", observation=observation, **SHORT))


@pytest.mark.parametrize("suite", sorted(IDS))
def test_observations_stay_in_their_space_and_have_names(suite):
    failures = ((1, 4.0, 9.0),) if suite != "disagg" else ((2, 4.0, 9.0),)
    fields = {"replica_failures": failures, "router_staleness_s": 0.5, **SHORT}
    env, rows = LLMRouteEnv(suite, **fields), LLMRouteEnv(suite, observation="replicas", **fields)
    names = env.feature_names
    assert len(names) == len(set(names)) == env.observation_space.shape[0]
    flat, _, infos, _ = episode(env, 3)
    tables, *_ = episode(rows, 3)
    assert len(flat) == len(tables) > 30
    for one, two in zip(flat, tables, strict=True):
        assert env.observation_space.contains(one) and rows.observation_space.contains(two)
        assert np.array_equal(one, np.concatenate([two["request"], two["replicas"].ravel()]))
    seen = np.stack(flat[:-1])
    assert (seen[:, names.index("is_asked")] == 1.0).all() and not flat[-1].any()
    down = names.index(f"replica{failures[0][0]}.is_up")
    assert set(seen[:, down].tolist()) == {0.0, 1.0}
    assert names[-1] == f"replica{env.config.num_replicas - 1}.total_blocks"
    first_s = env.core.tables[0].arrival_s[env.core.tables[0].num_past]  # when the first step begins
    lasted_s = sum(info["duration_s"] for info in infos)
    assert first_s + lasted_s == pytest.approx(env.core.cluster.nodes.routes[0].now_s)
    assert all(info["discount"] == pytest.approx(math.exp(-info["duration_s"] / 120.0)) for info in infos)


def test_masks_are_where_requests_may_go_and_other_actions_go_to_the_next():
    env = LLMRouteEnv("cluster", replica_failures=((0, 0.0, 6.0), (2, 3.0, 20.0)), **SHORT)
    rng = np.random.default_rng(0)
    env.reset(seed=4)
    masks, done = set(), False
    while not done:
        mask, now_s = env.action_masks(), float(env.core.cluster.nodes.routes[0].now_s)
        assert mask.tolist() == [now_s >= 6.0, True, not 3.0 <= now_s < 20.0, True]
        masks.add(tuple(mask.tolist()))
        r, action = env.core.cluster.deciding(), int(rng.integers(4))
        *_, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        expected = next((action + i) % 4 for i in range(4) if mask[(action + i) % 4])
        assert env.core.cluster.nodes.replica_of[0, r] in (expected, -1) or env.core.cluster.deciding() == r
    assert len(masks) == 4
    assert env.action_masks().all()  # of the last observation, where nothing is asked


@pytest.mark.parametrize("action", [-1, 4, 1.5, "1", None, [1]])
def test_an_action_that_is_no_replica(action):
    env = LLMRouteEnv("cluster", **SHORT)
    env.reset(seed=0)
    before = env.core.cluster.state.sims.tobytes()
    with pytest.raises(InvalidAction, match="action: expected") as error:
        env.step(action)
    assert "\n" not in str(error.value) and env.core.cluster.state.sims.tobytes() == before
    for kind in (int, np.int8, np.uint32):
        env.step(kind(3))


def utilities(env):
    """The utility of each measured request now, as the rules are worded."""
    cluster, table, config = env.core.cluster, env.core.tables[0], env.config
    rows, now_s = cluster.state.requests[0], float(cluster.nodes.routes[0].now_s)
    phases, found = phases_of(cluster.state, 0, len(table)), []
    for r in range(table.cohort_start, table.cohort_stop):
        row, phase = rows[r], phases[r]
        late_s, attained = float(row.lateness_s), 0.0
        if phase in (WAITING, RUNNING):
            tokens = row.num_output_tokens > 0
            due_s = row.last_token_s + row.tbt_slo_s if tokens else row.arrival_s + row.ttft_slo_s
            late_s += max(0.0, now_s - due_s)
            attained = float(tokens and not row.ttft_missed and row.num_late_gaps == 0 and now_s <= due_s)
        elif phase == FINISHED:
            attained = float(not row.ttft_missed and row.num_late_gaps == 0)
        elif phase != ABANDONED:  # to come, rejected, cancelled; refused
            late_s = config.patience_s if phase == REFUSED else 0.0
        found.append(attained - config.beta * min(1.0, late_s / config.patience_s))
    return np.array(found)


@pytest.mark.parametrize(
    ("suite", "fields"),
    [
        ("cluster", {"replica_failures": ((0, 2.0, 9.0), (1, 2.0, 4.0), (2, 2.5, 4.0), (3, 2.5, 6.0))}),
        ("hetero", {"router_staleness_s": 1.0}),
        ("disagg", {"replica_failures": ((0, 2.0, 4.0), (2, 1.0, 3.0), (3, 1.5, 7.0)), "kv_link_bytes_per_s": 3e8}),
    ],
)
def test_rewards_are_changes_of_utility(suite, fields):
    """Of every step; so that they sum to the final utilities of a resolved cohort, and durations to the time."""
    env = LLMRouteEnv(suite, **{**CROWDED, **fields})
    rng = np.random.default_rng(1)
    env.reset(seed=7)
    before = utilities(env)
    total, lasted_s, clocks_s = before.sum(), float(env.core.cluster.nodes.routes[0].now_s), -math.inf
    assert total == 0.0
    while True:
        mask = env.action_masks()
        _, reward, terminated, truncated, info = env.step(int(rng.choice(np.flatnonzero(mask))))
        clocks_s = check(env.core.cluster, 0, clocks_s)
        now = utilities(env)
        assert reward == pytest.approx(now.sum() - before.sum(), abs=1e-9)
        assert sum(env.reward_terms().values()) == pytest.approx(reward, abs=1e-9)
        total += reward
        lasted_s += info["duration_s"]
        before = now
        if terminated or truncated:
            break
    assert terminated and not truncated
    phases = phases_of(env.core.cluster.state, 0, len(env.core.tables[0]))
    table = env.core.tables[0]
    assert not np.isin(phases[table.cohort_start : table.cohort_stop], (PENDING, WAITING, RUNNING)).any()
    assert total == pytest.approx(utilities(env).sum(), abs=1e-6)
    assert lasted_s == pytest.approx(env.core.cluster.nodes.routes[0].now_s)
    assert (phases != FINISHED).any() or "replica_failures" not in fields, "nobody waited too long"
    late = LLMRouteEnv(suite, credit="finish", reward_scale=0.5, **{**CROWDED, **fields})
    assert sum(episode(late, 7)[1]) == pytest.approx(0.5 * utilities(late).sum(), abs=1e-6)


def test_steps_can_last_no_time_and_the_last_one_runs_to_the_end():
    env = LLMRouteEnv("cluster", num_requests=1, qps=0.5, warmup_s=0.0, arrivals_continue=False, drain_s=math.inf)
    _, _, infos, terminated = episode(env, 2)
    assert terminated and infos[-1]["duration_s"] > 0.0
    env = LLMRouteEnv("cluster", replica_failures=((1, 10.0, 12.0),), qps=4.0, horizon_s=20.0, warmup_s=0.0)
    env.reset(seed=2)
    first_s = float(env.core.cluster.nodes.routes[0].now_s)
    _, _, infos, terminated = episode(env, 2, lambda env: 1)
    durations = [info["duration_s"] for info in infos[1:]]
    assert not terminated and durations.count(0.0) > 2  # what a failed replica had is routed at once
    assert first_s + sum(durations) >= 20.0


def test_an_episode_without_requests_ends_with_its_first_step():
    env = LLMRouteEnv("cluster", qps=1e-6, horizon_s=2.0, warmup_s=0.0)
    observation, _ = env.reset(seed=1)
    assert not observation.any()
    *_, truncated, info = env.step(0)
    assert truncated and info["duration_s"] == 0.0


def test_an_agent_that_acts_as_a_router_is_the_router():
    config = route_config("hetero", num_requests=40, qps=6.0, warmup_s=0.0)
    env = LLMRouteEnv("hetero", num_requests=40, qps=6.0, warmup_s=0.0)

    def fewest(env):
        rows = env.core.cluster.view().replicas
        return int(np.argmin(np.where(rows.is_legal, rows.num_waiting + rows.num_running, 1 << 30)))

    episode(env, 5, fewest)
    table = env.core.tables[0]
    cluster = Cluster(config, len(table))
    cluster.reset(table)
    cluster.run(make_router("jsq"))
    ours, theirs = (c.state.requests[0][: len(table)] for c in (env.core.cluster, cluster))
    cohort = slice(table.cohort_start, table.cohort_stop)
    for name in ("first_token_s", "resolved_s", "phase", "num_late_gaps"):
        np.testing.assert_array_equal(ours[name][cohort], theirs[name][cohort], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("suite", "fields"),
    [
        ("cluster", {"horizon_s": 4.0, "qps": 4.0, "router_staleness_s": 0.3, "episode_metrics": True}),
        ("disagg", {"horizon_s": 1.5, "observation": "replicas", "reward": lambda t: -t.duration_s}),
    ],
)
def test_it_equals_gymnasiums_vector_of_single_environments(suite, fields, mode):
    fields = {"warmup_s": 0.0, **fields}
    ours = LLMRouteVectorEnv(3, suite, autoreset_mode=mode, **fields)
    theirs = SyncVectorEnv([lambda: LLMRouteEnv(suite, **fields)] * 3, autoreset_mode=AutoresetMode[mode.upper()])
    assert ours.single_action_space == theirs.single_action_space and ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    ours.action_space.seed(3)
    assert_same(ours.reset(seed=40), theirs.reset(seed=40))
    ends = t = 0
    while ends < 5 or t < 40:
        t += 1
        actions = ours.action_space.sample()
        mine = step_and_reset(ours, actions, t)
        assert_same(mine, step_and_reset(theirs, actions, t), f"step {t}")
        ends += int(mine[1].sum())
    assert_same(ours.reset(options={"qps": 2.5}), theirs.reset(options={"qps": 2.5}))


def trajectory(num_envs=5, num_threads=1, count=40, suite="cluster"):
    """All that environments side by side return; a list of numbers."""
    fields = {"replica_failures": ((2, 2.0, 4.0),), "router_staleness_s": 0.2, "horizon_s": 8.0, "warmup_s": 0.0}
    env = LLMRouteVectorEnv(num_envs, suite, num_threads=num_threads, qps=3.0, **fields)
    env.action_space.seed(1)
    observations, _ = env.reset(seed=9)
    found = [float(observations.sum(dtype=np.float64))]
    for _ in range(count):
        observations, rewards, *_, info = env.step(env.action_space.sample())
        found += [float(observations.sum(dtype=np.float64)), *rewards.tolist(), *info["duration_s"].tolist()]
    env.close()
    return found


def test_threads_do_not_change_a_trajectory():
    assert trajectory() == trajectory(num_threads=2)


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled")
def test_compiled_and_interpreted_trajectories_agree():
    code = "import json, test_env_route; print(json.dumps(test_env_route.trajectory(1, 1, 12, 'disagg')))"
    assert fresh_process(code, NUMBA_DISABLE_JIT="1") == trajectory(1, 1, 12, "disagg")


def test_custom_reward_and_observation_objects():
    class Load:
        space = gym.spaces.Box(0.0, np.inf, (4,), np.float32)

        def observe(self, view):
            return view.replicas.num_running.astype(np.float32)

    seen = []

    def reward(transition):
        seen.append(transition)
        return -transition.duration_s

    fields = {"num_requests": 10, "warmup_s": 0.0, "qps": 2.0, "drain_s": math.inf}
    env, plain = LLMRouteEnv(reward=reward, observation=Load(), **fields), LLMRouteEnv(**fields)
    observations, paid, infos, _ = episode(env, 1)
    _, _, twins, _ = episode(plain, 1)
    assert all(env.observation_space.contains(observation) for observation in observations)
    assert paid == [-info["duration_s"] for info in infos[1:]] == [-info["duration_s"] for info in twins[1:]]
    assert sum(len(t.resolved) for t in seen) == env.core.tables[0].cohort_stop - env.core.tables[0].cohort_start
    view = pickle.loads(pickle.dumps(seen[0].view))
    assert view.index == seen[0].view.index and view.legal.tolist() == [True] * 4
    vector = LLMRouteVectorEnv(2, reward=reward, observation=Load(), **fields)
    assert vector.reset(seed=0)[0].shape == vector.step(np.zeros(2, np.int64))[0].shape == (2, 4)


def look(env):
    """The observation and all that a router could see, made anew."""
    cluster = env.core.cluster
    kernels.look_again(cluster.handle, cluster.nodes_handle, 0)
    steps.settle(cluster.handle, cluster.nodes_handle, env.core.handle, 0)
    view = cluster.view()
    return [env.core.observation(0), env.action_masks(), view.replicas, view.now_s, view.last_replica, view.request]


@pytest.mark.parametrize(("suite", "staleness_s"), [("cluster", 0.0), ("cluster", 0.5), ("disagg", 0.0)])
def test_what_is_hidden_does_not_show_until_it_acts(suite, staleness_s):
    env, twin = (LLMRouteEnv(suite, router_staleness_s=staleness_s, qps=6.0) for _ in range(2))
    rng = np.random.default_rng(0)
    for e in (env, twin):
        e.reset(seed=21)
    for _ in range(80):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        env.step(action)
        twin.step(action)
    state = twin.core.cluster.state
    world, rows = state.worlds[0], state.requests[0]
    live = np.isin(rows["phase"], (PENDING, WAITING, RUNNING))
    state.output_tokens[0][live] = rows["num_output_tokens"][live] + rng.integers(2, 400, live.sum())
    later = rows["phase"] == PENDING
    arrivals = state.arrivals[0]
    arrivals["arrival_s"][later] += 3.0
    arrivals["think_s"] *= 2.0
    for name, value in (("prompt_tokens", 77), ("slo_class", 0), ("ttft_slo_s", 9.0), ("length_hint", 5.0)):
        arrivals[name][later] = value
    world.next_arrival_s += 3.0
    world.cost_scale *= 3.0
    world.stop_s += 1000.0
    state.noise[:] *= 0.5
    state.linear_s[:] *= 2.0
    twin.core.qps[0] = 99.0
    for before, after in zip(look(env), look(twin), strict=True):
        for name in getattr(getattr(before, "dtype", None), "names", None) or [...]:
            a, b = (before, after) if name is ... else (before[name], after[name])
            np.testing.assert_array_equal(a, b, err_msg=str(name))
    differs = False  # ... and then it acts
    for _ in range(40):
        action = int(rng.choice(np.flatnonzero(env.action_masks())))
        differs |= not np.array_equal(env.step(action)[0], twin.step(action)[0])
    assert differs


def test_replicas_go_by_their_schedulers_admission_rule():
    env = LLMRouteEnv("cluster", replica_scheduler="vllm-v1", **SHORT)
    env.reset(seed=0)
    assert (env.core.cluster.state.sims["admission"] != 0).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"suite": "default"}, "suite: expected one of cluster, hetero, disagg"),
        ({"num_replicas": 0}, "num_replicas: expected"),
        ({"replica": 3}, "replica"),
        ({"roles": ("prefill",) * 4}, "roles: expected at least one replica that decodes"),
        ({"replica_profiles": ("tpu",) * 4}, "tpu"),
        ({"router_staleness_s": "old"}, "router_staleness_s: expected"),
        ({"replica_failures": ((4, 1.0, 2.0),)}, "replica_failures: expected a replica from 0 to 3"),
        ({"replica_scheduler": "salai"}, "policy 'salai' is unknown"),
        ({"decode_router": "salai"}, "router 'salai' is unknown"),
        ({"observation": "slots"}, "observation: expected"),
        ({"render_mode": "3d"}, "render_mode: expected"),
        ({"qps": -1.0}, "qps: expected"),
    ],
)
def test_bad_arguments_give_one_line_that_names_the_field(fields, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        gym.make("LLMRoute-v0", **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"replica_failures": ((0, 1.0, 2.0),), "router_staleness_s": 0.5, "patience_s": math.inf},
        {"num_replicas": 2, "roles": ("prefill", "decode"), "prefix_caching": False, "render_mode": "ansi"},
        {"num_replicas": np.int64(2), "replica_profiles": ("h100-mistral-7b", "a100-mistral-7b")},
    ],
)
def test_a_spec_read_back_from_json_is_equal(fields):
    env = gym.make("LLMRoute-v0", **fields)
    again = EnvSpec.from_json(env.spec.to_json())
    assert again == env.spec and gym.make(again).unwrapped.config == env.unwrapped.config
    assert pickle.loads(pickle.dumps(env.unwrapped.config)) == env.unwrapped.config
    env.reset(seed=0)
    assert env.step(0)[0].shape == env.observation_space.shape


def test_pictures():
    for mode, kind in (("ansi", str), ("rgb_array", np.ndarray)):
        env = LLMRouteEnv("hetero", render_mode=mode, replica_failures=((1, 1.0, 9.0),), **SHORT)
        env.reset(seed=0)
        frames = [env.render()]
        for _ in range(25):
            env.step(0)
        before = env.core.cluster.state.requests.tobytes(), env.core.cluster.nodes.candidates.tobytes()
        frames.append(env.render())
        assert before == (env.core.cluster.state.requests.tobytes(), env.core.cluster.nodes.candidates.tobytes())
        assert all(isinstance(frame, kind) for frame in frames) and not np.array_equal(*frames)
        if mode == "rgb_array":
            assert frames[0].dtype == np.uint8 and frames[0].shape == frames[1].shape == (336, 960, 3)
        else:
            assert "down" in frames[1] and max(len(line) for line in frames[1].splitlines()) <= 76
        env.close()


def test_stable_baselines3_learns_on_it():
    sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
    from llmsched_gym.env.sb3 import LLMRouteVecEnv

    face = LLMRouteVecEnv(2, "cluster", qps=3.0, horizon_s=10.0, warmup_s=0.0)
    native = LLMRouteVectorEnv(2, "cluster", autoreset_mode="same_step", qps=3.0, horizon_s=10.0, warmup_s=0.0)
    face.seed(50)
    assert np.array_equal(face.reset(), native.reset(seed=50)[0])
    for _ in range(60):
        observations, rewards, done, infos = face.step(np.zeros(2, np.int64))
        expected, paid, terminated, truncated, info = native.step(np.zeros(2, np.int64))
        assert np.array_equal(observations, expected) and np.array_equal(rewards, paid.astype(np.float32))
        for i in np.flatnonzero(done):
            assert infos[i]["TimeLimit.truncated"] == (truncated[i] and not terminated[i])
            assert np.array_equal(infos[i]["terminal_observation"], info["final_obs"][i])
    model = sb3.PPO("MlpPolicy", face, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(64)
    assert any(
        not np.array_equal(a.detach(), b.detach()) for a, b in zip(before, model.policy.parameters(), strict=True)
    )


def test_maskable_ppo_takes_only_legal_actions():
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    from llmsched_gym.env.sb3 import LLMRouteVecEnv

    env = LLMRouteVecEnv(2, "disagg", qps=4.0, horizon_s=10.0, warmup_s=0.0)
    assert is_masking_supported(env)
    model = sb3_contrib.MaskablePPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0, device="cpu")
    model.learn(32)
    observations = env.reset()
    for _ in range(20):
        masks = get_action_masks(env)
        assert masks.tolist() == [[True, True, False, False]] * 2
        actions, _ = model.predict(observations, action_masks=masks)
        assert (actions < 2).all()
        observations, *_ = env.step(actions)
