"""Hostile calls of the public entries: an index outside an array ends the process.

With NUMBA_DISABLE_JIT=1, as in the tests, numpy checks the indices. With NUMBA_BOUNDSCHECK=1, compiled code does;
compiling it anew takes minutes.
"""

import contextlib

import numpy as np

from llmsched_gym.config import scenario
from llmsched_gym.engine import Batch, Engine, IllegalBatch
from llmsched_gym.env import InvalidAction, LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.env import kernels as env_kernels
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.scheduler import Compiled

NUMBERS = (0, 1, -1, 7, 8, 63, 64, 65, 512, 2**31, 2**62, -(2**62), 0.5, float("nan"), float("inf"), -float("inf"))
FIELDS = {
    "default": {"max_backlog": 60, "qps": 2.5, "horizon_s": 8.0},
    "tight": {"max_num_seqs": 4, "max_backlog": 60, "qps": 2.5, "horizon_s": 4.0, "max_num_batched_tokens": 48},
    "poor": {"num_kv_blocks": 700, "max_backlog": 30, "qps": 2.5, "patience_s": 3.0, "allow_refusal": True},
}


def test_numba_checks() -> None:
    """That an index outside an array is noticed at all."""
    env = LLMSchedEnv()
    env.reset(seed=0)
    try:
        env_kernels.observe_env(env.core.engine.handle, env.core.handle, 10**6)
    except IndexError:
        return
    raise AssertionError("compiled code does not check its indices")


def drive(kind: str, fields: dict, rng: np.random.Generator) -> int:
    """Random and hostile actions on a vector environment, and past its checks straight into the kernels."""
    envs = LLMSchedVectorEnv(3, "tenants", action=kind, observation="slots", episode_metrics=True, **fields)
    envs.action_space.seed(0)
    envs.reset(seed=5, options={"qps": 6.0})
    steps = 0
    for t in range(60):
        envs.step(envs.action_space.sample())
        steps += 1
        envs.action_masks() if kind != "priority" else None
        envs.episode_metrics()
        hostile = rng.choice(NUMBERS, envs.action_space.shape)
        with np.errstate(all="ignore"):
            forms = (hostile, hostile.astype(np.float32), hostile.astype(np.int64), rng.choice(NUMBERS[:8]))
        for action in forms:
            with contextlib.suppress(InvalidAction):
                envs.step(action)
                steps += 1
        if t % 10 == 0 and not envs._is_over.any():
            envs.core.actions[:] = forms[2 if kind != "priority" else 1]
            for env in range(3):
                if envs.core.decide(env):
                    envs.core.engine.execute(env)
                    envs.core.reopen(env)
                envs.core.settle(env, 0.0, 0)
    return steps


class Careless:
    """A Python scheduler that asks and answers anything."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)

    def schedule(self, view) -> Batch:
        for r in (*NUMBERS, int(self.rng.integers(100))):
            for call in (
                lambda r=r: view.can_make_ttft(r),
                lambda r=r: view.predict_s({0: r}),
                lambda r=r: view.predict_s({r: 1}),
            ):
                with contextlib.suppress(IndexError, ValueError):
                    call()
        numbers = self.rng.choice(NUMBERS, 6)
        return Batch(dict(zip(numbers[:3], numbers[3:], strict=True)), preempt=numbers[:1], refuse=numbers[2:3])


def careless() -> int:
    """Batches of any numbers on an engine that goes on with legal ones."""
    env = LLMSchedEnv(**FIELDS["poor"])
    env.reset(seed=1)
    engine, scheduler, refused = env.core.engine, Careless(), 0
    for _ in range(300):
        try:
            engine.step(scheduler)
        except IllegalBatch:
            refused += 1
            engine.decide(Compiled("sarathi"))
            engine.execute()
    assert refused > 200
    return 300


def careless_settings() -> int:
    """Settings of the packing kernel that no bracket parameter can name."""
    world = scenario("default", num_requests=6, warmup_s=0.0, drain_s=3.0, qps=5.0)
    batches = 0
    for number in (-(2**31), -1, 0, 1, 99, 2**31 - 1):
        for name in ("token_budget", "order", "hold", "limit", "refuse", "victim"):
            policy = Compiled("hostile", settings={"hold": 1, name: number})
            with contextlib.suppress(OverflowError):  # of a number that its field cannot hold
                batches += int(simulate(world, policy, 0).sim.num_batches)
        for name in ("cap", "offset", "margin", "usage_switch"):
            for value in (float(number), float("nan"), -float("inf")):
                batches += int(simulate(world, Compiled("hostile", settings={name: value}), 0).sim.num_batches)
    return batches


def main() -> None:
    test_numba_checks()
    rng, steps = np.random.default_rng(0), 0
    for kind in ("knobs", "priority", "request"):
        for fields in FIELDS.values():
            steps += drive(kind, fields, rng)
    steps += careless() + careless_settings()
    engine = Engine(scenario("paper", num_requests=1), 1)
    for env in NUMBERS[1:]:
        for call in (engine.view, engine.is_over, engine.execute):
            try:
                call(env)
            except IndexError:
                continue
            raise AssertionError(f"env={env} is no environment")
    print(f"{steps} steps")


main()
