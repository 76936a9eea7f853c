"""No scheduler, parameter, knob or memory stops the engine: while work is pending somebody comes to a token.

How long that may take at most, with nobody coming or leaving meanwhile, R requests waiting or running, and W tokens of
prompts and outputs among them:

- No batch is empty while there is work (`pack.keep_going`), except where the engine evicted all that was in it. One
  that gives nobody a token computes a prompt token at least, and what is computed is lost by preemption alone. So from
  one preemption to the next there are at most W batches without a token.
- After R + 1 preemptions in vain nobody enters while anybody runs (`batch.is_thrashing`), so each further one leaves
  one running request fewer: at most R more, since one that runs alone has all blocks, which rule 7 says are enough.

That makes (2 R + 2) (W + 1) steps. WAIT idles on purpose besides, for `flush_s` since the last arrival. `vllm-v1` is
exempt from the second rule, as vLLM is: there the first of running has a chunk in every batch and is never preempted,
which makes W.
"""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import profile, request, table
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import RULES as JOINED

import llmsched_gym  # noqa: F401 - registers the environments
from llmsched_gym.baselines.on_time import MIXES
from llmsched_gym.config import ADMISSIONS, EnvConfig, scenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine.eviction import EVICTIONS
from llmsched_gym.engine.pack import HOLDS, ORDERS
from llmsched_gym.engine.step import VICTIMS
from llmsched_gym.env.actions.knobs import KNOBS
from llmsched_gym.env.slots import NUM_SLOTS
from llmsched_gym.policies.bridge import PolicyScheduler
from llmsched_gym.scheduler import (
    COMMON_OPTIONS,
    PACK_OPTIONS,
    Compiled,
    install,
    make_scheduler,
    pack_with_knobs,
    registry,
)

DEVICE = profile((5.0, 5.4), kv_ms=0.001, pair_ms=1e-4)
DEVICES = (DEVICE, profile((0.5, 0.9), kv_ms=0.02, pair_ms=1e-4).with_mixing(4.0))  # on the second mixing costs
COMPILED = sorted(name for name, entry in registry().items() if isinstance(entry, Compiled))
FOLDERS = sorted(name for name in registry() if name not in COMPILED and name != "random")
VALUES = {
    "budget": ["1", "16", "40", "512"],
    "hold": HOLDS,
    "limit": ["16", "100"],
    "cap": ["0.001", "0.05", "0.3"],  # a batch takes 5 ms, and 0.05 of a strict user's SLO is less
    "victim": VICTIMS,
    "evict": EVICTIONS,
    "admission": ADMISSIONS,
    "refuse": ["true"],
    "offset": ["0", "2", "10"],
    "offset_full": ["0", "10"],
    "usage_switch": ["0.5"],
    "margin": ["0", "1", "3"],
    "quiet": ["1", "5"],
    "usage": ["0", "0.5"],
    "short": ["0", "inf"],
    "stretch": ["0.5", "3"],
    "age": ["0", "0.05", "1"],
    "threshold": ["7", "40"],
    "chunk": ["1", "16", "40", "512"],
    "consecutive": ["1", "3"],
    "starvation": ["1", "20"],
    "mix": MIXES,
    "reserve": ["true", "false"],
    "n": ["1", "3"],
    "k": ["1", "3"],
    "m": ["1", "4"],
    "kept": ["0", "0.5", "1"],
    "half": ["0.01", "1"],
    "large": ["16", "200"],
    "small": ["1", "40"],
    "long": ["20"],
    "flush_s": ["0", "0.02"],
    "bins": ["1", "3"],
    "segments": ["1", "3"],
    "first": ["1", "8"],
    "low": ["0.1", "1"],
    "alpha": ["0", "5"],
    "slack": ["0", "0.5"],
}
WORLDS = st.fixed_dictionaries(
    {
        "num_kv_blocks": st.integers(4, 40),
        "watermark": st.sampled_from([0.0, 0.05, 0.2]),
        "max_num_seqs": st.sampled_from([1, 2, 3, 9, 16]),
        "max_num_batched_tokens": st.sampled_from([16, 60, 400]),
    }
)
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 0.005, 0.03, 0.3, 2.0]),  # gap to the one before
        st.integers(1, 260),
        st.integers(1, 40),
        st.sampled_from([0.02, 0.1, 0.5]),
        st.sampled_from([0.01, 0.05, 0.3, 2.0]),
    ),
    min_size=1,
    max_size=12,
)


def rows_of(drawn):
    times = np.cumsum([gap for gap, *_ in drawn])
    return table([request(float(t), *rest) for t, (_, *rest) in zip(times, drawn, strict=True)])


def options_of(name):
    entry = registry()[name]
    known = (
        PACK_OPTIONS
        if entry.function is pack_with_knobs
        else (*COMMON_OPTIONS, *entry.options, *(own.name for own in entry.own))
    )
    values = VALUES | {"order": entry.orders}
    return st.fixed_dictionaries({}, optional={option: st.sampled_from(values[option]) for option in known})


def most_steps(engine, scheduler):
    """The bound of this file for what is pending now."""
    rows = engine.state.requests[0]
    pending = [*engine.state.waiting[0][: engine.state.sims[0].num_waiting]]
    pending += [*engine.state.running[0][: engine.state.sims[0].num_running]]
    work = int((rows["prompt_tokens"][pending] + engine.state.output_tokens[0][pending]).sum())
    own = [parameter.name for parameter in getattr(scheduler, "own", ())]
    flush_s = scheduler.knobs["own"][own.index("flush_s")] if "flush_s" in own else 0.0
    return (2 * len(pending) + 2) * (work + 1) + math.ceil(flush_s / engine.scenario.idle_step_s)


def events(engine):
    sim, episode = engine.state.sims[0], engine.state.episodes[0]
    return int(sim.tokens_emitted), int(episode.num_arrived), int(episode.num_resolved)


def drain(scheduler, rows, device=DEVICE, **world):
    """Run to the end, and fail where nothing happens for longer than it may take; the engine."""
    if getattr(scheduler, "clairvoyant", False):
        rows = replace(rows, length_hint=rows.output_tokens.astype(float))
    asked = {"admission": scheduler.admission} if hasattr(scheduler, "admission") else {}
    if getattr(scheduler, "refuses", False):
        asked["allow_refusal"] = True
    engine = Engine(scenario("paper", **{**world, **asked}), len(rows), profile=device)
    engine.reset(rows)
    install(scheduler, engine.state)
    before, left = events(engine), most_steps(engine, scheduler)
    while not engine.is_over():
        engine.run(scheduler, max_steps=1)
        if events(engine) != before or not engine.has_work():
            before, left = events(engine), most_steps(engine, scheduler)
        else:
            left -= 1
        assert left >= 0, (
            f"no token in {most_steps(engine, scheduler)} steps, {engine.state.sims[0].num_idle_steps} of them idle"
        )
    assert engine.state.sims[0].num_running == engine.state.sims[0].num_waiting == 0
    return engine


@pytest.mark.parametrize("name", COMPILED)
def test_every_scheduler_with_any_parameters(name):
    @settings(max_examples=12 if name in JOINED else 60)
    @given(options=options_of(name), device=st.sampled_from(DEVICES), world=WORLDS, drawn=REQUESTS)
    def holds(options, device, world, drawn):
        text = ",".join(f"{key}={value}" for key, value in options.items())
        drain(make_scheduler(f"{name}[{text}]" if text else name), rows_of(drawn), device, **world)

    holds()


@pytest.mark.parametrize("name", FOLDERS)
def test_every_policy_that_ships(name):
    scheduler = make_scheduler(name)

    @settings(max_examples=15)
    @given(device=st.sampled_from(DEVICES), world=WORLDS, drawn=REQUESTS)
    def holds(device, world, drawn):
        drain(scheduler, rows_of(drawn), device, **world)

    holds()


def test_the_random_one():
    # its chance to let somebody run is at least 1/2 a step, and a chunk is half of what is left on average
    @settings(max_examples=30)
    @given(world=WORLDS, drawn=REQUESTS)
    def holds(world, drawn):
        drain(make_scheduler("random"), rows_of(drawn), **world)

    holds()


ACTIONS = st.tuples(*(st.integers(0, len(knob.values) - 1) for knob in KNOBS))


@settings(max_examples=200)
@given(action=ACTIONS, admission=st.sampled_from(ADMISSIONS), world=WORLDS, drawn=REQUESTS)
def test_constant_knobs(action, admission, world, drawn):
    config = EnvConfig(admission=admission, allow_refusal=True)
    policy = PolicyScheduler(lambda observation: np.array(action), config)
    drain(policy, rows_of(drawn), allow_refusal=True, **world)


@settings(max_examples=40)
@given(admission=st.sampled_from(ADMISSIONS), world=WORLDS, drawn=REQUESTS)
def test_the_first_legal_request_of_all(admission, world, drawn):
    """From every state some legal action yields a token: with request actions, adding whoever can be added."""
    config = EnvConfig(action="request", admission=admission)
    policy = PolicyScheduler(lambda observation, legal: int(np.argmax(legal)), config)
    drain(policy, rows_of(drawn), **world)


@settings(max_examples=40)
@given(admission=st.sampled_from(ADMISSIONS), world=WORLDS, drawn=REQUESTS)
def test_equal_scores(admission, world, drawn):
    policy = PolicyScheduler(lambda observation: np.ones(NUM_SLOTS), EnvConfig(action="priority", admission=admission))
    drain(policy, rows_of(drawn), **world)


# --- what stood still once

HELD = table(
    [request(0.0, 1076, 55, ttft=1.038), request(0.04, 827, 51, ttft=0.9135), request(0.44, 822, 47, ttft=0.911)]
)
"""By shortest prompt with hold: 0 is put off half done, and 1, evicted from 106 blocks, needs what 0 holds."""


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("policy", ["sarathi-spf", "sarathi", "slai", "on-time", "edf", "shortest-total", "learned"])
def test_a_prompt_that_is_held_back_gives_up_its_blocks_by_running(policy, hold):
    spec = f"{policy}[hold={hold}]" if policy != "learned" else policy
    engine = Engine(scenario("paper", num_kv_blocks=106), len(HELD))
    scheduler = make_scheduler(spec)
    rows = replace(HELD, length_hint=HELD.output_tokens.astype(float))
    engine.reset(rows)
    install(scheduler, engine.state)
    assert engine.run(scheduler, max_steps=1000)
    assert engine.state.sims[0].num_finished == 3


@pytest.mark.parametrize("hold", range(len(HOLDS)))
def test_through_the_environment(tmp_path, hold):
    trace = tmp_path / "held.csv"
    rows = "0.0,1076,55\n0.04,827,51\n0.44,822,47\n"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows, encoding="utf-8")
    fields = {"trace": str(trace), "trace_arrivals": "keep", "num_requests": 3, "num_kv_blocks": 106}
    env = gym.make("LLMSched-Paper-v0", **fields)
    env.reset(seed=0)
    knobs = {"order": ORDERS.index("spf"), "hold": hold}
    action = np.array([knobs.get(knob.name, 0) for knob in KNOBS[: env.action_space.shape[0]]])
    for _ in range(1000):
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            break
    assert terminated


def test_hold_and_limit_do_not_hold_everybody_back_together():
    # 0 is hopeless and short, 1 can be in time and is above the limit, and nobody runs
    rows = [request(0.0, prompt=90, output=2, ttft=0.001), request(0.0, prompt=200, output=2, ttft=100.0)]
    engine = drain(make_scheduler("sarathi[hold=true,limit=100]"), table(rows), num_kv_blocks=40)
    assert engine.state.requests[0]["resolved_s"][:2].max() < 1.0, "not when the 100 s are over"


@pytest.mark.parametrize("policy", ["sarathi", "slai", "edf", "orca", "rad", "vllm-v1", "on-time", "shortest-total"])
def test_a_cap_below_every_batch_leaves_one_token(policy):
    engine = drain(make_scheduler(f"{policy}[cap=0.0001]"), table([request(prompt=20, output=3)]))
    assert engine.state.sims[0].num_finished == 1
    assert engine.state.sims[0].num_idle_steps == 0


def test_a_prompt_that_is_thrown_out_again_and_again_lets_the_other_finish():
    # blocks by chunk and the earliest deadline first: 1, evicted as the younger of two, would enter again for ever
    rows = [request(0.0, prompt=300, output=1, ttft=100.0), request(0.03, prompt=250, output=1, ttft=1.0)]
    scheduler = make_scheduler("edf[admission=chunk,budget=16]")
    engine = drain(scheduler, table(rows), num_kv_blocks=19, watermark=0.0)
    assert engine.state.requests[0]["num_preemptions"][:2].tolist() == [0, 3]
    first, second = engine.state.requests[0]["first_token_s"][:2]
    assert first < second
