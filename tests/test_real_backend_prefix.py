"""Prefix caching in the transformers engine: tokens as if everything were computed, and nothing computed twice."""

from dataclasses import replace

import numpy as np
import pytest

# ruff: noqa: E402 - a missing torch is to skip these tests before anything imports it
torch = pytest.importorskip("torch", reason="the real backend needs torch")
transformers = pytest.importorskip("transformers", reason="the real backend needs transformers")

from helpers import Run, request, table
from test_engine_sessions import root, sessions, turn
from test_real_backend import Chaos, generated, tiny_model
from test_real_backend_faults import Injected

from llmsched_gym.config import scenario
from llmsched_gym.engine import Batch, Engine
from llmsched_gym.engine.records import FINISHED
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.real_backend import BackendError, make_backend
from llmsched_gym.real_backend.past import chains
from llmsched_gym.real_backend.tokens import TokenStore, prompt_ids
from llmsched_gym.workload import shares_of_ids

torch.set_num_threads(1)

LIMITS = {"max_model_len": 192, "max_num_seqs": 8, "max_num_batched_tokens": 96}


class Ledger:
    """A backend around another one that knows by itself what every slot of the cache holds.

    A slot holds the KV of a token behind all those before it, so it is named by a hash of these. Every token that a
    request attends to must lie, by name, where its blocks say.
    """

    def __init__(self, backend, move=None, is_checked=True):
        self.backend, self.move, self.is_checked = backend, move, is_checked
        self.num_kv_blocks, self.computed = backend.num_kv_blocks, {}
        self.slots = {}

    def reset(self, table):
        self.backend.reset(table)
        self.slots = {}

    def fill(self, request, position, place):
        self.backend.fill(request, position, place)
        for r, i, at in zip(request.tolist(), position.tolist(), place.tolist(), strict=True):
            self._write(r, 16 * i, 16 * (i + 1), {i: at})

    def execute(self, batch):
        if self.move is not None:
            batch = self.move(batch)
        tokens = self.backend.tokens
        tokens.make_prompts(batch.request)
        items = list(zip(batch.request.tolist(), batch.num_computed.tolist(), batch.num_tokens.tolist(), strict=True))
        for (r, computed, n), places in zip(items, batch.blocks, strict=True):
            assert (places >= 0).sum() == -(-(computed + n) // 16)
            self._write(r, computed, computed + n, places)
            self.computed[r] = self.computed.get(r, 0) + n
        for (r, computed, n), places in zip(items, batch.blocks, strict=True):
            for i, name in enumerate(self._names(r, computed + n) if self.is_checked else ()):
                assert self.slots[int(places[i // 16]), i % 16] == name, f"token {i} of request {r}"
        return self.backend.execute(batch)

    def _names(self, r, num_tokens):
        known = self.backend.tokens.read(np.full(num_tokens, r), np.arange(num_tokens)).tolist()
        names, name = [], 0
        for token in known:
            name = hash((name, token))
            names.append(name)
        return names

    def _write(self, r, start, stop, places):
        for i, name in enumerate(self._names(r, stop)):
            if i >= start:
                self.slots[int(places[i // 16]), i % 16] = name


def prompts_of(*rows, **columns):
    """A table of (arrival, a letter for each block of 16 tokens, prompt, output)."""
    given = table([request(arrival, prompt, output) for arrival, _, prompt, output in rows], seed=3)
    ids = [[ord(letter) for letter in word] for _, word, _, _ in rows]
    shares_with, shared_tokens = shares_of_ids(ids, given.prompt_tokens, 16)
    return replace(given, shares_with=shares_with, shared_tokens=shared_tokens, **columns)


def play(policy, given, prefix_caching, *, move=None, is_checked=True, model=None, options=None, **fields):
    """A run to its end on the tiny model; every answer, the run and what executed it."""
    world = scenario("paper", **{"num_kv_blocks": 40, **LIMITS, **fields}, num_requests=len(given), qps=1.0)
    backend = make_backend(world, model or tiny_model(), "cpu", **(options or {}))
    watched = Ledger(backend, move, is_checked) if prefix_caching else backend
    fields = {"num_kv_blocks": 40, **LIMITS, **fields, "prefix_caching": prefix_caching}
    found = Run(policy, given, backend=watched, **fields)
    found.drain()
    assert (found.requests["phase"][given.num_past : len(given)] == FINISHED).all()
    return [backend.tokens.answer(r).tolist() for r in range(given.num_past, len(given))], found, watched


def assert_generated(backend, given, name="mistral"):
    """Every answer is that of transformers' own `generate` to the whole prompt."""
    alone = tiny_model(name)
    for r in range(given.num_past, len(given)):
        expected = generated(alone, backend.tokens.prompt(r), int(given.output_tokens[r]))
        assert backend.tokens.answer(r).tolist() == expected, f"request {r}"


LATE = 50.0  # seconds: after everybody else has finished
CASES = {
    "forks of a prefix": (
        prompts_of((0, "abcd", 60, 20), (LATE, "abx", 48, 9), (LATE, "aby", 47, 9), (2 * LATE, "abcz", 64, 9)),
        {},
        [0, 32, 32, 48],
    ),
    "two equal prompts in one batch": (prompts_of((0, "abcd", 60, 20), (0, "abcd", 60, 20)), {}, [0, 48]),
    "a prompt of exact blocks": (
        prompts_of((0, "ab", 32, 4), (LATE, "ab", 32, 4), (2 * LATE, "abc", 33, 4)),
        {},
        [0, 16, 32],
    ),
    "turns behind generated tokens": (
        sessions(root(0.0, 40, 12), turn(0, 5.0, 60, 22), turn(1, 5.0, 90, 20), turn(0, 9.0, 55, 20)),
        {},
        [0, 48, 80, 48],
    ),
    "eviction": (
        prompts_of((0, "abcd", 64, 9), (LATE, "xyz", 48, 9), (2 * LATE, "abcd", 64, 9), (3 * LATE, "xyw", 48, 9)),
        {"num_kv_blocks": 6},
        [0, 0, 32, 16],  # the last ones of the others were evicted
    ),
    "preemption": (
        prompts_of((0, "abc", 40, 60), (0, "abd", 40, 60), (0, "abe", 44, 60)),
        {"num_kv_blocks": 12},
        [0, 32, 32],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_recomputing(name):
    given, fields, cached = CASES[name]
    expected, _, _ = play("vllm-v1", given, False, **fields)
    answers, found, ledger = play("vllm-v1", given, True, **fields)
    assert answers == expected
    assert_generated(ledger.backend, given)
    rows = found.requests
    assert rows["num_cached_tokens"].tolist() == cached
    if name == "preemption":
        assert rows["num_preemptions"].sum() > 0
        assert found.engine.state.prefixes[0]["num_recached_tokens"].sum() > 0
    else:
        total = given.prompt_tokens + given.output_tokens - 1
        assert [ledger.computed[r] for r in range(len(given))] == (total - cached).tolist()


def crowd(seed, n=16):
    """Requests that come at once and begin alike, more than memory holds."""
    rng = np.random.default_rng(seed)
    words = ["".join("ab"[i] for i in rng.integers(0, 2, 7)) for _ in range(n)]
    lengths, outputs = rng.integers(20, 112, n).tolist(), rng.integers(1, 40, n).tolist()
    return prompts_of(*zip([0.0] * n, words, lengths, outputs, strict=True))


class Restless(Chaos):
    """Random batches, as by somebody who knows of no cache: a waiting prompt is planned from its first token on."""

    admission = "chunk"


@pytest.mark.parametrize("policy", ["vllm-v1", "sarathi", "slai", "rad", Restless(4), Restless(5)])
def test_tokens_are_those_of_generate_where_memory_is_short(policy):
    given = crowd(2)
    options = {"graphs": True} if policy == "sarathi" else {}
    _, found, ledger = play(policy, given, True, options=options, num_kv_blocks=14)
    assert found.requests["num_cached_tokens"].sum() > 0
    if policy not in ("slai", "rad"):  # which keep room for what is to come
        assert found.requests["num_preemptions"].sum() > 0
    assert_generated(ledger.backend, given)


@pytest.mark.parametrize("name", ["mistral, window", "llama", "qwen2"])
def test_other_models_share_as_well(name):
    given = CASES["turns behind generated tokens"][0]
    _, found, ledger = play("vllm-v1", given, True, model=tiny_model(name))
    assert found.requests["num_cached_tokens"].sum() > 0
    assert_generated(ledger.backend, given, name)


def test_the_paged_kernel_and_static_shapes_share_as_well():
    pytest.importorskip("triton", reason="the paged kernel needs triton")
    given = prompts_of((0, "abc", 40, 4), (0, "abc", 40, 4), (LATE, "abx", 40, 3))
    _, found, ledger = play("vllm-v1", given, True, options={"attention": "triton", "graphs": True})
    assert found.requests["num_cached_tokens"].tolist() == [0, 32, 32]
    assert_generated(ledger.backend, given)


def test_a_plan_from_the_first_token_on_is_shortened():
    given = prompts_of((0, "abcd", 60, 2), (0, "abcx", 60, 2))
    world = scenario("paper", **LIMITS, num_kv_blocks=40, prefix_caching=True, num_requests=2, qps=1.0)
    backend = Ledger(make_backend(world, tiny_model(), "cpu"))
    engine = Engine(world, 2, backend=backend)
    engine.reset(given)
    engine.submit(Batch({0: 60}))
    engine.execute()
    engine.submit(Batch({0: 1, 1: 40}))
    engine.execute()
    assert backend.computed == {0: 61, 1: 12}


def test_out_of_memory_splits_what_one_batch_shares():
    given = prompts_of((0, "abcd", 60, 8), (0, "abcd", 60, 8), (0, "abx", 40, 8))
    world = scenario("paper", **LIMITS, num_kv_blocks=40, prefix_caching=True, num_requests=3, qps=1.0)
    backend = make_backend(world, tiny_model(), "cpu")
    Injected(backend, lambda count, tokens: tokens > 20)
    with pytest.warns(UserWarning, match="two passes"):
        found = Run("vllm-v1", given, backend=Ledger(backend), **LIMITS, num_kv_blocks=40, prefix_caching=True)
        assert found.step() == {0: 60, 1: 12, 2: 8}
        found.drain()
    assert backend.num_splits >= 3
    assert_generated(backend, given)


def repeated_hits(batch):
    """Prompts get the first block that they have found for all of them."""
    blocks = batch.blocks.copy()
    for i, (computed, n) in enumerate(zip(batch.num_computed.tolist(), batch.num_tokens.tolist(), strict=True)):
        if n > 1:
            blocks[i, : computed // 16] = blocks[i, 0]
    return batch._replace(blocks=blocks)


def others_blocks(batch):
    """The blocks of the first two requests, exchanged behind the first tokens."""
    blocks = batch.blocks.copy()
    if len(blocks) > 1 and (batch.num_computed[:2] > 70).all():
        blocks[[0, 1], :3] = blocks[[1, 0], :3]
    return batch._replace(blocks=blocks)


@pytest.mark.parametrize(
    ("move", "given"),
    [
        (repeated_hits, CASES["forks of a prefix"][0]),
        (others_blocks, prompts_of((0, "abcd", 60, 30), (0, "wxyz", 60, 30))),
    ],
)
def test_wrong_blocks_change_the_tokens(move, given):
    """The comparisons above have teeth, and so has the ledger."""
    expected, _, _ = play("vllm-v1", given, True)
    answers, _, _ = play("vllm-v1", given, True, move=move, is_checked=False)
    assert answers != expected
    with pytest.raises(AssertionError, match=r"token \d+ of request"):
        play("vllm-v1", given, True, move=move)


def with_past(past, *later):
    """Contexts of (prompt, output) that are over, and one request behind each: (past, prompt, output)."""
    rows = [root(-9.0 + k, *row) for k, row in enumerate(past)]
    rows += [root(LATE * k, prompt, output) for k, (_, prompt, output) in enumerate(later)]
    shares_with = np.array([-1] * len(past) + [k for k, _, _ in later], np.int32)
    shared = [0] * len(past) + [sum(past[k]) for k, _, _ in later]
    given = sessions(*rows, num_past=len(past))
    return replace(given, shares_with=shares_with, shared_tokens=np.array(shared, np.int32))


@pytest.mark.parametrize(("num_kv_blocks", "cached"), [(40, [144, 48, 64]), (15, [128, 0, 0])])
def test_what_is_past_lies_in_the_cache(num_kv_blocks, cached):
    given = with_past([(130, 20), (40, 10), (64, 1)], (0, 160, 9), (1, 70, 9), (2, 65, 9))
    expected, _, _ = play("vllm-v1", given, False, num_kv_blocks=num_kv_blocks)
    answers, found, ledger = play("vllm-v1", given, True, num_kv_blocks=num_kv_blocks)
    assert answers == expected
    assert_generated(ledger.backend, given)
    assert found.requests["num_cached_tokens"][3:].tolist() == cached


def test_a_past_that_cannot_be_computed_is_one_line():
    one = np.array([1], np.int32)
    with pytest.raises(BackendError, match=r"^block 1 of request 1 is cached, and block 0 before it is not$"):
        list(chains(one, one, one, lambda r, position: r))


def test_every_copy_of_a_past_block_is_computed():
    # request 1 shares 32 tokens with request 0; its third block is there twice
    owner, position, place = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 2, 2]), np.array([7, 3, 9, 4, 5])
    found = list(chains(owner, position, place, lambda r, at: 0 if at < 32 else r))
    assert found == [(0, 0, [7, 3, 9]), (1, 2, [7, 3, 4]), (1, 2, [7, 3, 5])]


def test_prompts_begin_with_what_they_share():
    prompt, output = np.array([20, 30, 40]), np.array([4, 2, 2])
    store = TokenStore(prompt, output, 7, 500, (np.array([-1, 0, 1]), np.array([0, 22, 25])))
    store.make_prompts(np.array([0]))
    store.append(np.array([0]), np.array([11]))
    last = store.prompt(2)  # of which the model has said 21 tokens, and request 1 nothing yet
    assert last[:20].tolist() == prompt_ids(7, 0, 20, 500).tolist() and last[20] == 11
    assert last[21] == prompt_ids(7, 0, 22, 500)[21]
    assert last[22:25].tolist() == prompt_ids(7, 1, 25, 500)[22:].tolist()
    assert last[25:].tolist() == prompt_ids(7, 2, 40, 500)[25:].tolist()
    assert store.prompt(1)[:25].tolist() == last[:25].tolist()
    assert [store.owner(2, i) for i in (0, 21, 22, 24, 25)] == [0, 0, 1, 1, 2]
    # what request 0 has not said before others begin with it, it says then; behind that it is free again
    assert store.append(np.array([0]), np.array([12]))[0].tolist() == [last[21]]
    assert store.append(np.array([0]), np.array([13]))[0].tolist() == [13]
    assert store.answer(0).tolist() == [11, last[21], 13]


def test_a_request_that_others_have_begun_with_says_what_they_have():
    given = table([request(0, 20, 20), request(0, 41, 3)], seed=3)
    given = replace(given, shares_with=np.array([-1, 0], np.int32), shared_tokens=np.array([0, 40], np.int32))
    _, _, ledger = play("vllm-v1", given, True)  # both come at once
    tokens = ledger.backend.tokens
    assert tokens.answer(0).tolist() == tokens.prompt(1)[20:40].tolist()
    assert tokens.answer(0)[1:].tolist() == prompt_ids(3, 0, 40, 96)[21:].tolist()


def test_a_cache_smaller_than_the_engines_is_one_line():
    given = prompts_of((0, "abcdef", 96, 2), (0, "uvwxyz", 96, 2))
    world = scenario("paper", **LIMITS, num_kv_blocks=10, num_requests=2, qps=1.0)
    backend = make_backend(world, tiny_model(), "cpu")
    found = Run("vllm-v1", given, backend=backend, **LIMITS, num_kv_blocks=40, prefix_caching=True)
    with pytest.raises(BackendError, match=r"^the cache has 10 blocks, fewer than the engine counts on$"):
        found.drain()


def test_a_cache_by_memory_is_as_large_as_that():
    """Without prefix caching no more blocks are of use than sequences can hold."""
    blocks = [
        make_backend(scenario("paper", **LIMITS, prefix_caching=on), "random:tiny", "cpu").num_kv_blocks
        for on in (False, True)
    ]
    assert blocks[0] < 8 * 12 / 0.99 + 2 < blocks[1]


def test_a_suite_of_sessions_runs_on_a_model():
    given = CASES["turns behind generated tokens"][0]
    fields = {**LIMITS, "num_kv_blocks": 40, "num_requests": 4, "horizon_s": float("inf"), "warmup_s": 0.0}
    world = scenario("chat", backend="transformers", model="random:tiny", **fields)
    episode = simulate(world, "vllm-v1", 0, backend=make_backend(world, "random:tiny", "cpu"), table=given)
    assert episode.requests["num_cached_tokens"].tolist() == [0, 48, 80, 48]
