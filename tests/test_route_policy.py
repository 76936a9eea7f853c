"""Routers as agents of the routing environment, and agents as routers of clusters: the same runs either way."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers

import llmsched_gym  # noqa: F401
from llmsched_gym.cluster import Cluster
from llmsched_gym.config import ConfigError, route_config
from llmsched_gym.env import LLMSchedEnv
from llmsched_gym.env.route import LLMRouteEnv, LLMRouteVectorEnv
from llmsched_gym.env.route.policy import PolicyRouter, RouterPolicy
from llmsched_gym.registry import make_router, routers
from llmsched_gym.scheduler import PolicyError
from llmsched_gym.workload import make_table

WORLD = {"num_replicas": 3, "num_requests": 60, "qps": 1.0, "warmup_s": 5.0}
STALE = {"router_staleness_s": 1.0, "replica_failures": ((1, 20.0, 30.0),)}


class Shuffled:
    """A plain Python router with a state of its own, seeded by each run."""

    def reset(self, seed):
        self.rng = np.random.default_rng(seed)

    def route(self, view):
        return int(self.rng.choice(np.flatnonzero(view.legal)))


class Watched:
    """A router that keeps what it sees as an agent would."""

    def __init__(self, router, config):
        self.router, self.eye, self.seen = router, PolicyRouter(lambda observation, mask: 0, config), []

    def route(self, view):
        self.seen.append((self.eye.observe(view), view.legal))
        return self.router.route(view)


class Fewest:
    def route(self, view):
        return int(np.where(view.legal, view.replicas.num_waiting + view.replicas.num_running, 10**6).argmin())


def whole_run(router, seed=5, **fields):
    """The requests and where they went after a run of a cluster."""
    config = route_config("cluster", **WORLD | fields)
    table = make_table(config, seed)
    cluster = Cluster(config, len(table))
    cluster.reset(table)
    cluster.run(make_router(router) if isinstance(router, str) else router)
    return trace(cluster, len(table))


def trace(cluster, n):
    requests, routes = cluster.state.requests[0, :n], cluster.nodes.routes[0]
    columns = [requests[name].tobytes() for name in ("first_token_s", "last_token_s", "num_preemptions", "phase")]
    return int(routes.num_decisions), cluster.nodes.replica_of[0, :n].tolist(), columns


def played(router, how, seed=5, **fields):
    env = LLMRouteEnv(**WORLD | fields)
    env.reset(seed=seed)
    policy, done = RouterPolicy(env, router), False
    while not done:
        _, _, terminated, truncated, _ = how(env, policy)
        done = terminated or truncated
    return trace(env.core.cluster, len(env.core.tables[0]))


def by_step(env, policy):
    return policy.step()


def by_action(env, policy):
    assert policy.action() == policy.action()  # asked twice, it draws once
    return env.step(policy.action())


def test_a_run_of_steps_is_the_run_of_the_cluster():
    for name in (*routers(), Shuffled()):
        wanted = whole_run(name)
        assert wanted[0] > 60 and len(set(wanted[1])) > 2, name
        assert played(name, by_step) == wanted, name


@pytest.mark.parametrize("name", ["random", "round-robin", "prefix-affinity[weight=3]", Shuffled()])
def test_an_action_does_what_a_step_does_with_old_reports_and_failures_too(name):
    assert played(name, by_action, **STALE) == whole_run(name, **STALE)


def test_parameters_reach_the_kernel():
    assert played("prefix-affinity[weight=0]", by_step) != played("prefix-affinity[weight=9]", by_step)


def test_a_new_episode_starts_the_router_anew():
    env = LLMRouteEnv(**WORLD)
    policy, runs = RouterPolicy(env, "round-robin"), []
    for _ in range(2):
        env.reset(seed=1)
        runs.append([policy.action() for _ in range(4) if policy.step() is not None])
    assert runs[0] == runs[1]


def test_two_routers_on_one_environment_keep_their_own_memory():
    env = LLMRouteEnv(**WORLD)
    env.reset(seed=2)
    first, second = RouterPolicy(env, "round-robin"), RouterPolicy(env, "prefix-affinity[weight=0]")
    turns = []
    for _ in range(6):
        turns.append(first.action())
        second.action()
        env.step(turns[-1])
    assert turns == [0, 1, 2, 0, 1, 2]


def test_members_of_a_vector_environment_can_be_asked():
    vector = LLMRouteVectorEnv(2, **WORLD)
    vector.reset(seed=7)
    asked = [RouterPolicy(env, "least-tokens") for env in vector.envs]
    singles = [LLMRouteEnv(**WORLD) for _ in range(2)]
    for i, env in enumerate(singles):
        env.reset(seed=7 + i)
    policies = [RouterPolicy(env, "least-tokens") for env in singles]
    for _ in range(20):
        actions = [policy.action() for policy in asked]
        assert actions == [policy.action() for policy in policies]
        vector.step(np.array(actions))
        for policy in policies:
            policy.step()


def test_wrappers_are_obeyed():
    env = gym.make("LLMRoute-v0", max_episode_steps=15, **WORLD)
    env = wrappers.RecordEpisodeStatistics(wrappers.TransformReward(env, lambda r: 2.0 * r + 1.0))
    env.reset(seed=5)
    policy, total, done, steps = RouterPolicy(env, "jsq"), 0.0, False, 0
    while not done:
        _, reward, terminated, truncated, info = policy.step()
        total, done, steps = total + reward, terminated or truncated, steps + 1
    assert steps == 15 and info["episode"]["r"] == pytest.approx(total)


@pytest.mark.parametrize("observation", ["features", "replicas"])
@pytest.mark.parametrize("fields", [{}, STALE], ids=["fresh", "stale"])
def test_a_policy_router_sees_what_the_environment_shows(observation, fields):
    env = LLMRouteEnv(observation=observation, **WORLD | fields)
    watched = Watched(Fewest(), env.config)
    wanted = whole_run(watched, **fields)
    seen, _ = env.reset(seed=5)
    policy = RouterPolicy(env, Fewest())
    for shown, mask in watched.seen:
        assert np.array_equal(mask, env.action_masks())
        pairs = [(seen, shown)] if observation == "features" else [(seen[name], shown[name]) for name in seen]
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
        seen, *_ = policy.step()
    assert trace(env.core.cluster, len(env.core.tables[0])) == wanted


def test_a_policy_routes_as_it_steps_the_environment():
    """Illegal choices too: the request goes to the next one that may take it."""

    def policy(observation, mask):
        return int(observation[:40].sum() * 1000) % 3

    env = LLMRouteEnv(**WORLD | STALE)
    observation, _ = env.reset(seed=5)
    done, refused = False, 0
    while not done:
        choice = policy(observation, None)
        refused += not env.action_masks()[choice]
        observation, _, terminated, truncated, _ = env.step(choice)
        done = terminated or truncated
    assert refused > 0
    assert whole_run(PolicyRouter(policy, env.config), **STALE) == trace(env.core.cluster, len(env.core.tables[0]))


def test_a_policy_on_rows_takes_any_number_of_replicas():
    config = route_config("cluster", observation="replicas")
    policy = PolicyRouter(lambda observation, mask: observation["replicas"][:, 4].argmin(), config)
    for n in (2, 5):
        assert set(whole_run(policy, num_replicas=n)[1]) <= {-1, *range(n)}


def test_what_is_wrong_is_one_line():
    for env in (LLMRouteVectorEnv(2, **WORLD), LLMSchedEnv(), gym.make("CartPole-v1")):
        with pytest.raises(ConfigError, match="env: expected a single LLMRoute environment"):
            RouterPolicy(env, "jsq")
    env = LLMRouteEnv(**WORLD)
    with pytest.raises(ConfigError, match="leave the action space"):
        RouterPolicy(wrappers.TransformAction(env, lambda a: a, gym.spaces.Discrete(9)), "jsq")
    with pytest.raises(PolicyError, match=r"router 'jsp' is unknown \(did you mean 'jsq'\?\)"):
        RouterPolicy(env, "jsp")
    for answer, words in {7: "from 0 to 2, got 7", "1": "expected an integer", 0.5: "expected an integer"}.items():
        with pytest.raises(PolicyError, match=words):
            whole_run(PolicyRouter(lambda observation, mask, answer=answer: answer, env.config))
    with pytest.raises(PolicyError, match="expected 3 replicas"):
        whole_run(PolicyRouter(lambda observation, mask: 0, env.config), num_replicas=2)


def test_it_must_name_a_replica_that_is_up():
    class Always:
        def route(self, view):
            return 1

    env = LLMRouteEnv(**WORLD | STALE)
    env.reset(seed=5)
    policy = RouterPolicy(env, Always())
    with pytest.raises(PolicyError, match="replica 1 is down or cannot take the request"):
        while True:
            policy.step()
