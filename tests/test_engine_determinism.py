"""Rule 10: the same run bit for bit in every process, in every environment of a vector, compiled or not.

Also: a second process finds all compiled code in the cache.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import Run, request

from llmsched_gym.config import scenario
from llmsched_gym.engine import Engine, check
from llmsched_gym.engine.cache import cache_dir
from llmsched_gym.scheduler import Compiled, install, make_scheduler, registry
from llmsched_gym.workload import make_table

TESTS = Path(__file__).parent
COMPILED = sorted(name for name, entry in registry().items() if isinstance(entry, Compiled))
PARTS = ("sims", "episodes", "requests", "gaps", "memory")


def digest(engine, env=0):
    """Hash of the state of one environment."""
    state = engine.state
    return hashlib.sha256(b"".join(getattr(state, name)[env].tobytes() for name in PARTS)).hexdigest()


def trajectory(policy, seed=3, *, num_requests=60, steps=None, num_envs=1, env=0):
    """Digest after a run of `policy` on a small crowded machine with noise and impatient clients."""
    scheduler = make_scheduler(policy)
    world = scenario(
        "default",
        num_requests=num_requests,
        warmup_s=0.0,
        drain_s=30.0,
        qps=3.0,
        num_kv_blocks=700,
        max_num_seqs=24,
        patience_s=20.0,
        admission=getattr(scheduler, "admission", "prompt"),
        allow_refusal=getattr(scheduler, "refuses", False),
    )
    table = make_table(world, seed)
    engine = Engine(world, len(table), num_envs=num_envs, num_gaps=int(table.output_tokens.sum()))
    engine.reset(table, env)
    install(scheduler, engine.state, env, seed)
    engine.run(scheduler, env, max_steps=steps)
    check(engine.state, env)
    return digest(engine, env)


def fresh_process(code, **environment):
    """Output of `code` in a new Python process, as JSON."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


TRAJECTORIES = """
import json
from test_engine_determinism import trajectory
print(json.dumps([trajectory(policy, steps={steps}) for policy in {policies}]))
"""


def test_two_processes_agree():
    policies = ["slai", "sarathi", "vllm-v1", "rad", "random"]
    ours = [trajectory(policy, steps=1500) for policy in policies]
    assert len(set(ours)) == len(ours)
    assert fresh_process(TRAJECTORIES.format(steps=1500, policies=policies)) == ours


def test_compiled_and_interpreted_runs_agree():
    # under NUMBA_DISABLE_JIT=1 both are interpreted; the compiled side is checked by the usual run
    ours = [trajectory(policy, steps=120) for policy in COMPILED]
    assert fresh_process(TRAJECTORIES.format(steps=120, policies=COMPILED), NUMBA_DISABLE_JIT="1") == ours


def test_another_seed_is_another_run():
    assert trajectory("slai", 3) != trajectory("slai", 4)


def test_an_environment_of_a_vector_is_a_single_one():
    single = trajectory("slai", 3)
    assert trajectory("slai", 3, num_envs=8, env=5) == single
    assert trajectory("slai", 3, num_envs=8, env=0) == single


def test_environments_do_not_disturb_each_other():
    world = scenario("default", num_requests=40, warmup_s=0.0, qps=3.0, num_kv_blocks=700, max_num_seqs=16)
    tables = [make_table(world, seed) for seed in range(8)]
    capacity = max(len(table) for table in tables)
    policies = ["slai", "sarathi", "rad", "orca", "edf", "srpt-capped", "vllm-v0", "faster-transformer"]
    engine = Engine(world, capacity, num_envs=8, num_gaps=200_000)
    schedulers = [make_scheduler(policy) for policy in policies]
    for env, table in enumerate(tables):
        engine.reset(table, env)
        install(schedulers[env], engine.state, env, env)
    over = np.zeros(8, bool)
    while not over.all():  # in turns of 97 steps
        for env in range(8):
            over[env] = engine.run(schedulers[env], env, max_steps=97)
    for env, (policy, table) in enumerate(zip(policies, tables, strict=True)):
        alone = Engine(world, capacity, num_gaps=200_000)
        alone.reset(table)
        install(make_scheduler(policy), alone.state, 0, env)
        assert alone.run(make_scheduler(policy))
        assert digest(alone) == digest(engine, env), policy


def test_a_used_environment_starts_afresh():
    world = scenario("default", num_requests=50, warmup_s=0.0, qps=3.0, num_kv_blocks=700)
    first, second = make_table(world, 1), make_table(world, 2)
    scheduler = make_scheduler("rad")
    engine = Engine(world, max(len(first), len(second)), num_gaps=100_000)
    digests = []
    for table in (first, second, first):
        engine.reset(table)
        engine.state.gaps[:] = 0
        engine.state.requests[0, len(table) :] = np.zeros((), engine.state.requests.dtype)
        install(scheduler, engine.state)
        engine.run(scheduler, max_steps=700)  # the next reset cuts it off
        engine.decide(scheduler)
        digests.append(digest(engine))
    assert digests[0] == digests[2] != digests[1]


CACHE_USE = """
import json, sys
from numba.core.dispatcher import Dispatcher
from helpers import Run, request
from llmsched_gym.engine.cache import cache_dir
from llmsched_gym.scheduler import make_scheduler
from test_engine_determinism import trajectory
for policy in ("slai", "vllm-v1", "rad"):
    trajectory(policy, num_requests=5)
Run("slai", [request()]).drain()
counts = {policy: make_scheduler(policy).kernel for policy in ("slai", "vllm-v1", "rad")}
for name, module in list(sys.modules.items()):
    if name.startswith("llmsched_gym."):
        counts.update({f"{name}.{k}": v for k, v in vars(module).items() if isinstance(v, Dispatcher)})
counts = {k: (v.stats.cache_hits, v.stats.cache_misses) for k, v in counts.items()}
counts = {k: [sum(hits.values()), sum(misses.values())] for k, (hits, misses) in counts.items()}
print(json.dumps({"folder": cache_dir(), **counts}))
"""


@pytest.mark.skipif(os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="nothing is compiled")
def test_a_second_process_finds_all_compiled_code():
    for policy in ("slai", "vllm-v1", "rad"):  # this process has compiled all, or found it
        trajectory(policy, num_requests=5)
    Run("slai", [request()]).drain()
    second = fresh_process(CACHE_USE)
    assert second.pop("folder") == cache_dir(), "a kernel's source was edited while the test ran"
    step = "llmsched_gym.engine.run"
    for name in (f"{step}.run", f"{step}.schedule_at", f"{step}.commit_env", "slai", "vllm-v1", "rad"):
        # once for all schedulers, not once for each
        assert second[name] == [1, 0], f"{name}: {second[name]} are the times it was found and not found in the cache"
    missed = sorted(name for name, (_, misses) in second.items() if misses)
    assert not missed
