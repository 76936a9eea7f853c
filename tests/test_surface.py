"""Attention as a surface: the tables, the kernels beside the readable reference, and whole runs on it."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_gym.config import scenario
from llmsched_gym.cost import Profile, ProfileError, load_profile
from llmsched_gym.cost.surface import Sums, Surface
from llmsched_gym.engine.batch import predicted_s
from llmsched_gym.engine.predict import prompt_s
from llmsched_gym.engine.run import apply_env, commit_env, execute_env
from llmsched_gym.engine.state import lane_of
from llmsched_gym.engine.surface import chunk_s, surface_s
from llmsched_gym.evaluation.run import simulate
from tests.helpers import Run, profile, request

BASE = profile((4.0, 4.25), kv_ms=0.002, pair_ms=1e-4, kv_blocks=200)


def rough_surface(rng, **fields):
    """Random tables on small knots, so that cells on both sides of every edge are met."""
    n, k, c, p = (1, 2, 4, 8, 16), (16, 32, 64, 128), (16, 32, 64), (0, 32, 64, 128)

    def table(*shape):
        return tuple(table(*shape[1:]) for _ in range(shape[0])) if shape else float(rng.uniform(0.1, 9.0))

    def level(*shape):
        """One whose two last rows and columns are alike: a trend that falls goes below 0 past the last knots."""
        rows = [(*row[:-1], row[-2]) for row in table(*shape)]
        return (*rows[:-1], rows[-2])

    settings = {
        "sequences": n,
        "context": k,
        "chunk": c,
        "prefix": p,
        "decode_ms": level(len(n), len(k)),
        "chunk_ms": table(len(c), len(p)),
        "hybrid_ms": tuple(level(len(n), len(k)) for _ in c),
        "floor_ms": (*(floor := table(len(k)))[:-1], floor[-2]),
        "launch_ms": 0.3,
        "tail_alone": 1.5,
        "tail_hybrid": 2.5,
        "chunk_batch_ms": 0.7,
        "sequence_ms": tuple(sorted(table(6))),  # a trend that falls goes below 0
    }
    return Surface(**{**settings, **fields})


# --- the tables


def test_it_meets_its_knots_and_is_linear_between_them():
    surface = rough_surface(np.random.default_rng(0))
    for i, n in enumerate(surface.sequences):
        for j, k in enumerate(surface.context):
            assert surface.decode_at(n, k) == pytest.approx(surface.decode_ms[i][j], rel=1e-12)
    assert surface.decode_at(3, 16) == pytest.approx(0.5 * (surface.decode_ms[1][0] + surface.decode_ms[2][0]))
    assert surface.decode_at(2, 24) == pytest.approx(0.5 * (surface.decode_ms[1][0] + surface.decode_ms[1][1]))
    assert surface.decode_at(2, 3) == surface.decode_ms[1][0]  # below the first knot
    last = np.array(surface.decode_ms)[:, -1]
    assert surface.decode_at(32, 128) == pytest.approx(last[-1] + 2 * (last[-1] - last[-2]))  # past the last one


def test_a_batch_by_hand():
    flat = {"decode_ms": ((8.0,) * 2,) * 2, "chunk_ms": ((1.0, 1.0, 1.0),) * 2, "hybrid_ms": (((3.0,) * 2,) * 2,) * 2}
    surface = Surface(
        (1, 2), (1, 2), (1, 2), (0, 1, 2), **flat, floor_ms=(5.0, 5.0), launch_ms=0.5, sequence_ms=(0.25, 0.5)
    )
    assert surface.ms(Sums(2, 20, 10, 2, []), 0.0) == 8.0 + 0.5
    assert surface.ms(Sums(0, 0, 0, 1, [(0, 3)]), 0.0) == 1.0 + 0.25
    # two chunks launch once: 0.5 + 2 * (1 - 0.5); each has 3 * 4 / 2 = 6 pairs
    assert surface.ms(Sums(0, 0, 0, 2, [(0, 3), (0, 3)]), 0.1) == pytest.approx(1.5 + 2 * 0.6 + 0.5)
    assert surface.ms(Sums(2, 20, 10, 3, [(0, 3)]), 0.0) == 5.0 + 3.0 + 0.75  # the floor hides the chunk
    assert surface.ms(Sums(2, 20, 10, 3, [(0, 3)]), 10.0) == pytest.approx(61.0 + 3.0 + 0.75)  # and is hidden by it


def test_what_the_longest_context_adds_does_not_depend_on_how_many_there_are():
    k = np.array([1 << i for i in range(12)])
    line = Surface.additive(0.002)
    with_tail = dataclasses.replace(line, tail_alone=3.0)
    assert len(line.context) >= len(k)
    for n in (2, 7, 40):
        contexts = [100] * (n - 1) + [900]
        sums = Sums(n, sum(contexts), 900, n, [])
        lead = 900 - sum(contexts) / n
        assert with_tail.ms(sums, 0.0) - line.ms(sums, 0.0) == pytest.approx(0.002 * 3.0 * lead)


@given(
    chunks=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 900)), max_size=3),
    decodes=st.lists(st.integers(1, 8000), max_size=40),
)
def test_without_a_price_of_mixing_it_is_the_sum(chunks, decodes):
    base = load_profile("rtx6000ada-mistral-7b")
    assert base.with_mixing(1.0).predict_s(chunks, decodes) == pytest.approx(base.predict_s(chunks, decodes), rel=1e-9)
    dearer = base.with_mixing(3.0).predict_s(chunks, decodes)
    extra_s = 2.0 * base.kv_s * sum(decodes) if chunks else 0.0
    assert dearer == pytest.approx(base.predict_s(chunks, decodes) + extra_s, rel=1e-9)


def test_a_slower_device():
    rng = np.random.default_rng(3)
    slow = dataclasses.replace(BASE, surface=rough_surface(rng)).scaled(1.5)
    fast = dataclasses.replace(BASE, surface=rough_surface(np.random.default_rng(3)))
    for batch in ([(0, 20)], []), ([], [30, 40]), ([(5, 20)], [30, 40, 500]):
        assert slow.predict_s(*batch) == pytest.approx(1.5 * fast.predict_s(*batch), rel=1e-12)


# --- kernels


@settings(max_examples=200)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_kernels_are_the_reference(data, seed):
    device = dataclasses.replace(BASE, surface=rough_surface(np.random.default_rng(seed)))
    chunks = data.draw(st.lists(st.tuples(st.integers(0, 700), st.integers(1, 200)), max_size=3))
    decodes = data.draw(st.lists(st.integers(1, 900), max_size=20))
    tokens = sum(n for _, n in chunks) + len(decodes)
    linear_s, coef_s = device.linear_table_s(2048), device.coefficients(64)
    found = surface_s(
        linear_s,
        coef_s,
        tokens,
        len(decodes),
        float(sum(decodes)),
        float(max(decodes, default=0)),
        len(chunks),
        sum(chunk_s(coef_s, computed, n) for computed, n in chunks),
    )
    assert found == pytest.approx(device.predict_s(chunks, decodes), rel=1e-12)


@given(seed=st.integers(0, 99), computed=st.integers(0, 300), n=st.integers(1, 900), size=st.integers(1, 400))
def test_a_prompt_alone_takes_the_sum_of_its_batches(seed, computed, n, size):
    device = dataclasses.replace(BASE, surface=rough_surface(np.random.default_rng(seed)))
    expected = sum(device.predict_s([(computed + at, min(size, n - at))], []) for at in range(0, n, size))
    found = prompt_s(device.linear_table_s(2048), device.coefficients(64), computed, n, size)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("policy", ["sarathi", "slai", "vllm-v1", "srpt-capped", "on-time[age=5]", "rad", "edf"])
@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_runs_take_what_the_surface_says(policy, seed):
    rng = np.random.default_rng(seed)
    device = dataclasses.replace(BASE, surface=rough_surface(rng))
    rows = [
        request(float(t), int(rng.integers(1, 900)), int(rng.integers(1, 30)), float(rng.choice([0.1, 0.5])), 1.0)
        for t in np.cumsum(rng.exponential(0.05, 30))
    ]
    own = [device, BASE, dataclasses.replace(BASE, surface=rough_surface(rng))][seed % 3]
    run = Run(policy, rows, device=device, own_profile=own, num_kv_blocks=120)
    state = run.engine.state
    while not run.engine.is_over():
        view = run.engine.view()
        batch = run.decide()
        assert predicted_s(lane_of(state, 0)) == pytest.approx(view.predict_s(batch), rel=1e-9)
        run.engine.execute()
    assert run.sim.num_finished == 30


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_applied_batch_takes_what_is_left_of_it_after_evictions(seed):
    rng = np.random.default_rng(seed)
    device = dataclasses.replace(BASE, surface=rough_surface(rng))
    rows = [request(0.0, int(rng.integers(1, 200)), int(rng.integers(20, 60))) for _ in range(12)]
    for own in (device, BASE):
        run = Run("vllm-v1", rows, device=device, own_profile=own, num_kv_blocks=60)
        handle = run.engine.handle
        while not run.engine.is_over():
            run.decide()
            if not apply_env(handle, 0):
                commit_env(handle, 0, 0.0)
                continue
            done = run.engine.scheduled()
            is_chunk = done.num_computed < run.requests["prefill_tokens"][done.request]
            chunks = [
                (int(c), int(n)) for c, n in zip(done.num_computed[is_chunk], done.num_tokens[is_chunk], strict=True)
            ]
            contexts = [int(c) + 1 for c in done.num_computed[~is_chunk]]
            seconds = float(execute_env(handle, 0))
            assert seconds == pytest.approx(device.predict_s(chunks, contexts), rel=1e-9)
            commit_env(handle, 0, seconds)
        assert run.sim.num_preemptions > 0


def test_the_cap_knows_the_price_of_mixing():
    """With a chunk in the batch decodes cost three times as much, so a capped chunk is smaller."""
    base = load_profile("rtx6000ada-mistral-7b")
    sizes = []
    for device in (base.with_mixing(1.0), base.with_mixing(4.0)):
        rows = [request(0.0, 2000, 400, tbt=0.5) for _ in range(20)] + [request(0.5, 4000, 2)]
        run = Run("sarathi[cap=0.12,budget=2048]", rows, device=device, num_kv_blocks=14733)
        for _ in range(3000):
            if run.engine.is_over():
                break
            batch = run.decide()
            if 20 in batch and len(batch) == 21:
                sizes.append(batch[20])
                assert run.engine.view().predict_s(batch) <= 0.12 * 0.5
                break
            run.engine.execute()
    assert len(sizes) == 2 and sizes[1] < 0.9 * sizes[0]


def test_trajectories_on_an_additive_surface_are_those_of_the_sum():
    """Not bit for bit, for sums are taken in another order; but nobody is scheduled differently."""
    world = scenario("paper", num_requests=150, qps=1.6)
    base = load_profile(world.profile)
    for policy in ("sarathi", "slai", "vllm-v1", "edf"):
        plain = simulate(world, policy, 1)
        mixed = simulate(world, policy, 1, profile=base.with_mixing(1.0))
        for name in ("first_token_s", "resolved_s"):
            np.testing.assert_allclose(mixed.requests[name], plain.requests[name], rtol=1e-6)


# --- files


def as_json(device):
    return json.loads(json.dumps(device.to_dict()))


def test_round_trip_and_formats(tmp_path):
    device = dataclasses.replace(BASE, surface=rough_surface(np.random.default_rng(1)), engine="an engine")
    device.to_json(tmp_path / "p.json")
    assert Profile.from_json(tmp_path / "p.json") == device
    assert device.to_dict()["format"] == 2 and BASE.to_dict()["format"] == 1
    old = as_json(BASE)
    del old["format"], old["engine"]
    assert Profile.from_dict(old) == BASE


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": 3}, "format: expected one of 1, 2, got 3"),
        ({"format": 1}, "surface: expected none in format 1"),
        ({"surface": None}, "surface: expected an object in format 2"),
        ({"engine": 7}, "engine: expected a sentence, got 7"),
    ],
)
def test_bad_formats(change, message):
    data = as_json(dataclasses.replace(BASE, surface=rough_surface(np.random.default_rng(1))))
    with pytest.raises(ProfileError, match=rf"^{message}$"):
        Profile.from_dict({**data, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sequences": [2, 4]}, "surface.sequences: expected 1 as the first knot, got 2"),
        ({"context": [16, 48]}, "surface.context: expected powers of two, each twice the one before"),
        ({"context": "16"}, "surface.context: expected at least 2 whole numbers"),
        ({"prefix": [0, 16]}, "surface.prefix: expected at least 3 whole numbers"),
        ({"floor_ms": [1.0]}, "surface.floor_ms: expected 4 numbers from 0 to 1e"),
        ({"floor_ms": [1.0, 2.0, 3.0, -1.0]}, "surface.floor_ms: expected 4 numbers from 0 to 1e"),
        ({"decode_ms": [[1.0], 2.0]}, "surface.decode_ms: expected 5 x 4 numbers from 0 to 1e"),
        ({"launch_ms": "fast"}, "surface.launch_ms: expected 1 numbers from 0 to 1e"),
        ({"sequence_ms": []}, "surface.sequence_ms: expected 1 numbers from 0 to 1e"),
        ({"knots": 3}, "surface.knots: unknown field"),
    ],
)
def test_bad_surfaces(change, message):
    data = as_json(dataclasses.replace(BASE, surface=rough_surface(np.random.default_rng(1))))
    with pytest.raises(ProfileError, match=rf"^{message}"):
        Profile.from_dict({**data, "surface": {**data["surface"], **change}})
    missing = {name: value for name, value in data["surface"].items() if name not in change}
    if len(missing) < len(data["surface"]) and not set(change) & {"launch_ms", "sequence_ms"}:
        with pytest.raises(ProfileError, match=r"^surface\.\w+: missing$"):
            Profile.from_dict({**data, "surface": missing})
