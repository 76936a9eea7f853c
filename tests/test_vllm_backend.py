"""The gym on a real vLLM engine in this process; skipped where vLLM is not installed (`make vllm`)."""

import math

import pytest

pytest.importorskip("vllm", reason="needs vLLM: benchmarks/vllm_env.sh")

from llmsched_gym.config import scenario
from llmsched_gym.engine import Engine
from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.registry import make_scheduler
from llmsched_gym.scheduler import install
from llmsched_gym.workload import RequestTable

WORLD = scenario(
    "paper",
    backend="vllm",
    model="random:tiny",
    block_size=32,
    num_kv_blocks=24,
    max_num_seqs=6,
    max_num_batched_tokens=128,
    max_model_len=512,
    watermark=0.0,
    patience_s=math.inf,
)
TABLE = RequestTable.of(
    [0.0, 0.0, 0.0, 0.01, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06],
    [200, 31, 90, 150, 64, 33, 10, 250, 1, 120],
    [40, 70, 60, 30, 50, 20, 80, 20, 60, 40],
    slo_class=[0, 1, 1, 0, 1, 1, 0, 1, 1, 1],
    tbt_slo_s=[0.004, 0.5, 0.5, 0.004, 0.5, 0.5, 0.004, 0.5, 0.5, 0.5],
    ttft_slo_s=0.2,
    seed=3,
)


@pytest.fixture(scope="module")
def backend():
    backend = make_backend(WORLD, "random:tiny")
    yield backend
    backend.close()


class Noting:
    """The backend, and the tokens of every request as they come."""

    def __init__(self, backend):
        self.backend, self.tokens, self.batches = backend, {}, []

    def reset(self, table):
        self.backend.reset(table)

    def execute(self, batch):
        execution = self.backend.execute(batch)
        assert set(execution.tokens) == set(batch.request[batch.emits].tolist())
        for r, token in execution.tokens.items():
            self.tokens.setdefault(r, []).append(token)
        self.batches.append(dict(zip(batch.request.tolist(), batch.num_tokens.tolist(), strict=True)))
        return execution


def run(backend, policy):
    scheduler, noting = make_scheduler(policy), Noting(backend)
    engine = Engine(WORLD.replace(admission=scheduler.admission, num_requests=len(TABLE)), len(TABLE), backend=noting)
    engine.reset(TABLE)
    install(scheduler, engine.state)
    engine.run(scheduler, max_steps=5_000)
    return engine, noting


def test_tokens_are_the_same_whatever_the_batches(backend):
    found = {policy: run(backend, policy) for policy in ("slai", "sarathi[budget=32]", "vllm-v1[budget=128]")}
    tokens = [noting.tokens for _, noting in found.values()]
    batches = [noting.batches for _, noting in found.values()]
    assert tokens[0] == tokens[1] == tokens[2]
    assert batches[0] != batches[1] != batches[2]
    assert {r: len(t) for r, t in tokens[0].items()} == dict(enumerate(TABLE.output_tokens.tolist()))
    assert len({token for t in tokens[0].values() for token in t}) > 20
    for engine, _ in found.values():
        assert engine.state.sims[0].num_finished == len(TABLE)
        assert engine.state.sims[0].mean_batch_s > 0.0
    assert sum(int(engine.state.sims[0].num_preemptions) for engine, _ in found.values()) > 0


def test_the_environment_steps_on_vllm():
    import gymnasium as gym

    import llmsched_gym  # noqa: F401

    fields = {name: getattr(WORLD, name) for name in ("block_size", "num_kv_blocks", "max_num_seqs", "max_model_len")}
    env = gym.make("LLMSched-v0", backend="vllm", model="random:tiny", max_num_batched_tokens=512, **fields)
    _, _ = env.reset(seed=0)
    for _ in range(20):
        _, reward, _, _, info = env.step(env.action_space.sample())
        assert math.isfinite(reward) and info["duration_s"] >= 0.0
    env.close()


@pytest.mark.parametrize(
    "fields, what",
    [
        ({"prefix_caching": True}, "prefix_caching: expected False"),
        ({"block_size": 16, "num_kv_blocks": 48}, "block_size 16: on a CPU"),
    ],
)
def test_what_vllm_cannot_do_is_one_line(fields, what):
    with pytest.raises(BackendError, match=what):
        make_backend(WORLD.replace(**fields), "random:tiny")


def test_made_up_batches_are_measured_and_leave_nothing(backend):
    backend.fill_random(0)
    manager = backend.scheduler.kv_cache_manager
    free = manager.block_pool.get_num_free_blocks()
    assert backend.measure([], [16, 200]) > 0.0 and backend.measure([(64, 60)], [100, 30]) > 0.0
    assert manager.block_pool.get_num_free_blocks() == free and not backend.scheduler.requests
    with pytest.raises(BackendError, match="beyond its limits"):
        backend.measure([(0, 500), (0, 500)], [])
    backend.reset(TABLE)
    assert backend.spec.num_layers > 0 and backend.block_size == 32
    _, noting = run(backend, "slai")  # as if nothing had been
    assert {r: len(t) for r, t in noting.tokens.items()} == dict(enumerate(TABLE.output_tokens.tolist()))
