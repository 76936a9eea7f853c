"""The transformers engine: its greedy tokens are `generate`'s, whatever the batches; no block is lost."""

import copy

import numpy as np
import pytest

# ruff: noqa: E402 - a missing torch is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
transformers = pytest.importorskip("transformers", reason="the real backend needs transformers")

from helpers import request, table

from llmsched_gym.config import blocks_needed, scenario
from llmsched_gym.engine import Batch, Engine, check
from llmsched_gym.engine.records import FINISHED, RUNNING
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.real_backend import make_backend
from llmsched_gym.scheduler import install, make_scheduler

torch.set_num_threads(1)

SHAPES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # so that attention matters to the tokens; the test of the corrupted cache shows it
    "sliding_window": None,
}
MODELS = {
    "mistral": {},
    "mistral, window": {"sliding_window": 24},
    "llama": {},
    "qwen2": {},
    "qwen2, one layer with a window": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1},
}
WORLD = scenario(
    "paper", max_model_len=192, max_num_seqs=8, max_num_batched_tokens=96, num_kv_blocks=26, num_requests=16, qps=1.0
)


def tiny_model(name="mistral", **settings):
    """A random model small enough for hundreds of passes."""
    kind = name.split(",")[0]
    config = transformers.AutoConfig.for_model(kind, **{**SHAPES, **MODELS[name], **settings})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def table_of(prompts, outputs, arrivals=None, seed=3):
    arrivals = [0.0] * len(prompts) if arrivals is None else arrivals
    return table(
        [request(float(a), int(p), int(n)) for a, p, n in zip(arrivals, prompts, outputs, strict=True)], seed=seed
    )


def random_table(n=16, seed=3):
    rng = np.random.default_rng(seed)
    return table_of(rng.integers(1, 100, n), rng.integers(1, 30, n), np.sort(rng.uniform(0.0, 0.1, n)), seed)


class Chaos:
    """Random chunks, skips, admissions, preemptions; decodes may run out of blocks, so that the engine evicts."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def schedule(self, view):
        rng, tokens, preempt = self.rng, {}, []
        room, free = view.max_num_batched_tokens, view.free_blocks
        chunked = self.admission == "chunk"
        for r in view.running:
            computed, prefill = int(r.num_computed_tokens), int(r.prefill_tokens)
            left = prefill - computed
            if rng.random() < 0.04:
                preempt.append(int(r["index"]))
            elif rng.random() < 0.75 and room > 0:
                n = int(rng.integers(1, min(left, room) + 1)) if left > 0 else 1
                held = computed + n if chunked else max(computed + n, prefill)
                need = blocks_needed(held) - int(r.num_blocks)
                if need <= free or left == 0:  # a decode may go beyond: the engine then evicts
                    free -= need
                    tokens[int(r["index"])] = n
                    room -= n
        running = len(view.running) - len(preempt)
        for r in view.waiting:
            prefill, cached = int(r.prefill_tokens), int(r.prefill_tokens - r.num_uncached_tokens)
            n = int(rng.integers(1, min(prefill, max(room, 1)) + 1))
            need = blocks_needed(min(cached + n, prefill) if chunked else prefill)
            if rng.random() < 0.6 and room >= n and running < view.max_num_seqs and free - need >= 0:
                tokens[int(r["index"])] = n
                room, free, running = room - n, free - need, running + 1
        return Batch(tokens, preempt)


def run_chaos(backend, table, seed, admission):
    """Play `table` to the end under a random scheduler, everything checked after every step."""
    scheduler = Chaos(seed)
    scheduler.admission = admission
    world = WORLD.replace(admission=admission, watermark=0.0)
    engine = Engine(world, len(table), backend=backend)
    engine.reset(table)
    install(scheduler, engine.state)
    mixed, clock_s = 0, 0.0
    for _ in range(5000):
        if engine.is_over():
            break
        engine.decide(scheduler)
        batch = engine.state.batches[0]
        mixed += 0 < batch.num_decodes < batch.num_items
        engine.execute()
        clock_s = check(engine.state, previous_clock_s=clock_s)
        backend.check()
        requests = engine.state.requests[0]
        for r in backend.blocks.requests:
            held = backend.blocks.held[backend.blocks.row_of[r]]
            assert requests["phase"][r] != RUNNING or held <= requests["num_blocks"][r]
    assert engine.is_over()
    return engine.state, mixed


def generated(model, prompt, num_tokens):
    """The reference: transformers' own greedy generation of one request alone."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompt[None], dtype=torch.long)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("admission", ["prompt", "chunk"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_generate(name, admission):
    model = tiny_model(name)
    alone = copy.deepcopy(model)
    alone.set_attn_implementation("sdpa")
    backend = make_backend(WORLD, model, "cpu")
    table = random_table()
    state, mixed = run_chaos(backend, table, seed=5, admission=admission)
    requests = state.requests[0]
    assert (requests["phase"][: len(table)] == FINISHED).all()
    assert mixed >= 10 and requests["num_preemptions"].sum() >= 5
    assert backend.blocks.num_free == backend.num_kv_blocks, "a block leaked"
    for r in range(len(table)):
        answer = backend.tokens.answer(r).tolist()
        assert answer == generated(alone, backend.tokens.prompt(r), int(table.output_tokens[r])), f"request {r}"


def test_a_corrupted_cache_changes_the_tokens():
    """The comparison above has teeth: these models' tokens depend on the KV of other positions."""
    answers = []
    for corrupt in (False, True):
        backend = make_backend(WORLD, tiny_model(), "cpu")
        engine = Engine(WORLD, 1, backend=backend)
        engine.reset(table_of([40], [20]))
        scheduler = make_scheduler("sarathi")
        install(scheduler, engine.state)
        engine.step(scheduler)
        if corrupt:
            block = int(backend.blocks.blocks[backend.blocks.row_of[0], 0])
            backend.runner.cache.values[1][block] *= -1.0
        engine.run(scheduler)
        answers.append(backend.tokens.answer(0).tolist())
    assert answers[0][0] == answers[1][0] and answers[0] != answers[1]


def test_a_window_changes_the_tokens():
    answers = []
    for window in (None, 8):
        backend = make_backend(WORLD, tiny_model(sliding_window=window), "cpu")
        engine = Engine(WORLD, 1, backend=backend)
        engine.reset(table_of([60], [10]))
        scheduler = make_scheduler("sarathi")
        install(scheduler, engine.state)
        engine.run(scheduler)
        answers.append(backend.tokens.answer(0).tolist())
    assert answers[0] != answers[1]


def test_the_engine_gets_tokens_and_times():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    engine = Engine(WORLD, 2, backend=backend)
    engine.reset(table_of([30, 20], [3, 2]))
    scheduler = make_scheduler("sarathi[budget=32]")
    install(scheduler, engine.state)
    first = engine.step(scheduler)  # 30 tokens of request 0, 2 of request 1
    assert set(first.tokens) == {0} and first.duration_s > 0.0
    assert engine.state.sims[0].clock_s == first.duration_s
    second = engine.step(scheduler)
    assert set(second.tokens) == {0, 1}
    engine.run(scheduler)
    assert len(backend.tokens.answer(0)) == 3 and len(backend.tokens.answer(1)) == 2


def test_a_client_that_leaves_gives_its_blocks_back():
    """The engine drops an abandoned request without a word in any batch; the backend must notice."""
    world = WORLD.replace(patience_s=0.5)
    backend = make_backend(world, tiny_model(), "cpu")
    table = table_of([40, 40], [150, 5], [0.0, 1000.0])
    engine = Engine(world, 2, backend=backend)
    engine.reset(table)
    engine.submit(Batch({0: 40}))
    engine.execute()
    assert backend.blocks.num_free == backend.num_kv_blocks - blocks_needed(40)
    for _ in range(2000):  # nobody serves request 0 until it is gone, and request 1 comes
        if engine.state.episodes[0].num_arrived == 2:
            break
        engine.submit(Batch())
        engine.execute()
    assert engine.state.sims[0].num_abandoned == 1
    engine.submit(Batch({1: 40}))
    engine.execute()
    backend.check()
    assert backend.blocks.requests == [1]


def test_preemption_in_an_empty_batch_starts_the_request_over():
    """A batch that only preempts never reaches the backend; the readmitted request must not use its old KV."""
    backend = make_backend(WORLD, tiny_model(), "cpu")
    engine = Engine(WORLD, 1, backend=backend)
    engine.reset(table_of([40], [6]))
    for batch in (Batch({0: 40}), Batch({0: 1}), Batch(preempt=[0]), Batch({0: 17}), Batch({0: 25}), Batch({0: 1})):
        engine.submit(batch)
        engine.execute()
        check(engine.state)
        backend.check()
    alone = tiny_model()
    assert backend.tokens.answer(0).tolist() == generated(alone, backend.tokens.prompt(0), 4)


def test_an_episode_does_not_see_the_one_before():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    answers = []
    for policy in ("sarathi[budget=64]", "slai[budget=16]", "vllm-v1"):
        world = WORLD.replace(admission="chunk" if policy == "vllm-v1" else "prompt")
        table = random_table(6)
        engine = Engine(world, 6, backend=backend)
        engine.reset(table)
        assert backend.blocks.num_free == backend.num_kv_blocks
        scheduler = make_scheduler(policy)
        install(scheduler, engine.state)
        engine.run(scheduler, max_steps=7)  # leaves requests behind
        engine.reset(table)
        install(scheduler, engine.state)
        engine.run(scheduler)
        answers.append([backend.tokens.answer(r).tolist() for r in range(6)])
    assert answers[0] == answers[1] == answers[2], "greedy tokens depend on the schedule"


@pytest.mark.parametrize("policy", ["sarathi[budget=64]", "slai[budget=64]"])
def test_evaluation_runs_on_the_real_backend(policy):
    world = scenario("paper", max_model_len=8192, max_num_seqs=32, num_requests=3, qps=100.0, num_kv_blocks=1200)
    backend = make_backend(world, "random:tiny", "cpu")
    table = table_of([300, 40, 150], [20, 30, 10])
    engine = Engine(world, 3, backend=backend)
    engine.reset(table)
    scheduler = make_scheduler(policy)
    install(scheduler, engine.state)
    assert engine.run(scheduler) and engine.state.sims[0].num_finished == 3


def test_simulate_takes_the_backend_and_its_blocks():
    world = scenario("paper", num_requests=2, qps=100.0, max_model_len=192, max_num_seqs=4, workload=_short_workload())
    backend = make_backend(world, tiny_model(), "cpu")
    assert backend.num_kv_blocks == 4 * 12 / 0.99 // 1 + 2  # what 4 sequences of 192 tokens can use, and the watermark
    episode = simulate(world, "sarathi", 0, backend=backend)
    assert episode.sim.total_blocks == backend.num_kv_blocks
    assert (episode.requests["phase"] == FINISHED).all() and backend.blocks.num_free == backend.num_kv_blocks


def _short_workload():
    """The shipped lengths, 1/64 as long, in a file."""
    import json
    import tempfile

    from llmsched_gym.workload.lengths import DATA_DIR

    data = json.loads((DATA_DIR / "sharegpt.json").read_text())
    data["max_total_tokens"] //= 64
    for part in ("prompt", "output"):
        tokens = np.maximum(np.asarray(data[part]["tokens"], float) // 64, 1.0)
        data[part]["tokens"] = tokens.tolist()
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(data, file)
    return file.name


def test_measure_reports_the_time_of_a_made_up_batch():
    backend = make_backend(WORLD, tiny_model(), "cpu")
    times = [backend.measure([(32, 40), (0, 8)], [1, 50, 100]) for _ in range(3)]
    assert all(0.0 < s < 5.0 for s in times)
    assert backend.blocks.num_free == backend.num_kv_blocks


def test_host_time_counts_when_asked():
    import time

    durations = []
    for count in (False, True):
        backend = make_backend(WORLD, tiny_model(), "cpu", count_host_time=count)
        engine = Engine(WORLD, 1, backend=backend)
        engine.reset(table_of([8], [3]))
        engine.submit(Batch({0: 8}))
        engine.execute()
        time.sleep(0.2)
        engine.submit(Batch({0: 1}))
        durations.append(engine.execute().duration_s)
    assert durations[0] < 0.2 <= durations[1]
