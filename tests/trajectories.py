"""Hashes of whole trajectories: what must stay the same, bit for bit, when the engine is rebuilt.

``python tests/trajectories.py`` rewrites ``tests/data/trajectories.json``, for a change that is meant to change them;
with ``--new`` it adds what is missing, for schedulers that have joined, and leaves the rest.
The hashes are of batches, times, rewards, observations and final figures, read through the few accessors below, so that
they do not depend on how the engine lays out its state. Logarithms and exponentials may differ in the last bit between
processors and libraries: the file says which arithmetic it was written with, see :func:`arithmetic`.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym import config
from llmsched_gym.config import scenario
from llmsched_gym.engine import Engine
from llmsched_gym.engine.records import PENDING
from llmsched_gym.env import LLMSchedEnv, LLMSchedVectorEnv
from llmsched_gym.scheduler import install, make_scheduler, registry
from llmsched_gym.workload import make_table

SUITES = tuple(name for name, suite in config.SUITES.items() if not suite.scenario.prefix_caching)
"""Those of single requests."""

FILE = Path(__file__).parent / "data" / "trajectories.json"
SEEDS = (0, 1)
VARIANTS = ("slai[hold=always,limit=900]", "slai[refuse=true]", "on-time[age=5]", "on-time[refuse=true]")
JOINED = ("sglang", "trtllm")  # since the file was first written: last, so that the small set keeps its halves
RULES = (
    *("max-prefills", "interleave", "preflow", "vllm-slo", "vllm-priority", "queue-tokens", "ppas", "ppas+"),
    *("eb", "eb+", "wait", "nested-wait", "mc-sf", "a-min", "gate", "niyama", "tbt-control"),
)
"""Other people's rules that have joined since: on one seed of two suites, as the whole set takes minutes.

Suites that have joined (JOINED_SUITES) are run on one seed, too.
"""
RULE_SUITES = ("paper", "drift")
JOINED_SUITES = ("tight",)
POLICIES = (*sorted(set(registry()) - set(JOINED) - set(RULES)), *VARIANTS, *JOINED)
IN_PYTHON = "random"
"""The one scheduler that is not compiled takes as long as all others: in the large set on one seed of RULE_SUITES."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COUNTERS = _names(
    "clock_s mean_batch_s last_batch_s last_predicted_s kv_cache_usage kv_cache_usage_max busy_s output_length_sum "
    "next_departure_s cost_ratio arrivals_10s arrivals_60s arrived_tokens_10s arrived_tokens_60s num_batches "
    "num_idle_steps batch_tokens_sum tokens_emitted arrived_tokens waiting_tokens free_blocks num_waiting num_running "
    "num_arrived num_finished num_rejected num_refused num_abandoned num_resolved num_preemptions vain_preemptions"
)
COLUMNS = _names(
    "last_token_s tbt_slo_s lst_s num_computed_tokens prefill_tokens num_output_tokens num_blocks num_late_gaps "
    "slo_class phase ttft_missed arrival_s ttft_slo_s lateness_s paid_attained paid_lateness_s paid_utility max_gap_s "
    "deadline_miss_s first_scheduled_s first_token_s resolved_s prompt_tokens num_preemptions"
)
LOG = _names("start_s duration_s predicted_s kv_cache_usage decode_tokens prefill_tokens num_running num_waiting")

SMALL = {"num_kv_blocks": 700, "max_num_seqs": 24}  # memory is short, requests are evicted
ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "knobs": {"action": "knobs"},
    "knobs-refusal": {"action": "knobs", "allow_refusal": True, "episode_metrics": True, "beta": 0.7},
    "knobs-finish": {"action": "knobs", "action_repeat": 3, "credit": "finish", "tbt_rule": "mean"},
    "priority": {"action": "priority", "observation": "slots", "tbt_rule": "fraction:0.9"},
    "request": {"action": "request", "observation": "slots", "tbt_rule": "deadline", "episode_metrics": True},
}


# How the state is read: the only places that name its arrays.


def counter(engine: Engine, env: int, name: str) -> Any:
    """A number of one environment by its name."""
    state = engine.state
    return (state.sims if name in state.sims.dtype.names else state.episodes)[env][name]


def decided(engine: Engine, env: int) -> list[np.ndarray]:
    """The batch of one environment: items (request, tokens), preempted, refused."""
    state, batch = engine.state, engine.state.batches[env]
    return [
        state.items[env, : batch.num_items]["request"],
        state.items[env, : batch.num_items]["tokens"],
        state.preempt[env, : batch.num_preempt],
        state.refuse[env, : batch.num_refuse],
    ]


class Hash:
    """A running digest of numbers, arrays, dictionaries."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, value: Any) -> None:
        if isinstance(value, dict):
            for name, entry in value.items():
                self._sha.update(name.encode())
                self.add(entry)
            return
        array = np.ascontiguousarray(value)
        if array.dtype == object:
            for entry in array.ravel():
                self.add(entry) if entry is not None else self._sha.update(b"none")
            return
        kind = {"b": np.int64, "i": np.int64, "u": np.int64}.get(array.dtype.kind, array.dtype)
        array = array.astype(kind)
        self._sha.update(str(array.shape).encode() + (array + 0).tobytes())  # + 0: a zero has no sign

    def hex(self) -> str:
        return self._sha.hexdigest()[:16]


def arithmetic() -> str:
    """Hash of what this machine makes of functions that are not rounded everywhere alike, and of random draws."""
    x = np.linspace(0.001, 20.0, 4099)
    rng = np.random.default_rng(0)
    sha = Hash()
    for values in (np.log(x), np.log1p(x), np.exp(-x), np.power(x, 0.37), np.sin(x), np.cos(x)):
        sha.add(values)
    for function in (math.log, math.exp, math.tanh):
        sha.add([function(v) for v in x.tolist()])
    for values in (rng.lognormal(size=999), rng.gamma(0.25, size=999), rng.exponential(size=999)):
        sha.add(values)
    return sha.hex()


def engine_hash(policy: str, suite: str, seed: int, num_requests: int, steps: int, *, finish: bool) -> str:
    """A run of `policy`: the first `steps` batches one by one, then, to `finish` it, the rest in one go."""
    scheduler = make_scheduler(policy)
    fields: dict[str, Any] = {"num_requests": num_requests, "warmup_s": 0.0, "qps_range": (2.0, 4.0)}
    fields |= {"switch_every_s": (5.0, 15.0), "allow_refusal": True}
    if config.SUITES[suite].scenario.drain_s < math.inf:
        fields |= {"drain_s": 20.0, "patience_s": 15.0}
    if getattr(scheduler, "clairvoyant", False):
        fields["length_hint"] = "oracle"
    if seed != 1:
        fields |= SMALL
    world = scenario(suite, admission=getattr(scheduler, "admission", "prompt"), **fields)
    table = make_table(world, seed)
    engine = Engine(world, len(table), num_gaps=int(table.output_tokens.sum()), num_steps=1 << 12)
    engine.reset(table)
    install(scheduler, engine.state, seed=seed)
    sha = Hash()
    for _ in range(steps):
        if engine.is_over():
            break
        engine.decide(scheduler)
        for part in decided(engine, 0):
            sha.add(part)
        engine.execute()
        sha.add(counter(engine, 0, "clock_s"))
    if finish:
        engine.run(scheduler)
    for name in COUNTERS:
        sha.add(counter(engine, 0, name))
    requests, log = engine.state.requests[0, : len(table)], engine.state.steps[0]
    requests = requests[requests["phase"] != PENDING]
    for name in COLUMNS:
        sha.add(requests[name])
    for name in LOG:
        sha.add(log[name][: counter(engine, 0, "num_batches")])
    sha.add(engine.state.gaps[0])
    return sha.hex()


def _environment(kind: str, suite: str, num_requests: int | None) -> dict[str, Any]:
    fields = {**ENVIRONMENTS[kind], **SMALL, "qps_range": (2.0, 4.0), "horizon_s": 12.0, "patience_s": 8.0}
    fields |= {"suite": suite, "max_backlog": 24}
    if suite == "paper":
        fields |= {"num_requests": num_requests or 60, "patience_s": math.inf}
    elif num_requests is not None:
        fields |= {"num_requests": num_requests, "warmup_s": 2.0, "drain_s": 10.0}
    return fields


def single_hash(kind: str, suite: str, seed: int, steps: int, num_requests: int | None = None) -> str:
    """One environment under random actions over several episodes."""
    env = LLMSchedEnv(**_environment(kind, suite, num_requests))
    env.action_space.seed(seed)
    sha, episode = Hash(), seed
    for value in env.reset(seed=episode):
        sha.add(value)
    for _ in range(steps):
        action = env.action_space.sample()
        if kind == "request":
            action = np.int64(env.action_space.sample(mask=env.action_masks().astype(np.int8)))
        *told, info = env.step(action)
        for value in (*told, info, env.reward_terms()):
            sha.add(value)
        if kind != "request":
            for part in decided(env.core.engine, 0):
                sha.add(part)
        if told[2] or told[3]:
            sha.add(env.episode_metrics())
            episode += 100
            for value in env.reset(seed=episode):
                sha.add(value)
    sha.add(env.episode_metrics())
    return sha.hex()


def vector_hash(kind: str, suite: str, seed: int, steps: int, mode: str = "next_step") -> str:
    """Five environments side by side under random actions over several episodes."""
    env = LLMSchedVectorEnv(5, autoreset_mode=mode, **_environment(kind, suite, None))
    env.action_space.seed(seed)
    sha = Hash()
    for value in env.reset(seed=seed):
        sha.add(value)
    for _ in range(steps):
        if kind == "request":
            sha.add(env.action_masks())
        *told, info = env.step(env.action_space.sample())
        for value in (*told, info):
            sha.add(value)
    sha.add(env.episode_metrics())
    return sha.hex()


def scheduler_hash(policy: str, suite: str, seed: int, steps: int) -> str:
    """An environment stepped by a scheduler's batches."""
    scheduler = make_scheduler(policy)
    fields = {**_environment("knobs", suite, 40), "admission": getattr(scheduler, "admission", "prompt")}
    if getattr(scheduler, "clairvoyant", False):
        fields["length_hint"] = "oracle"
    env = LLMSchedEnv(**fields)
    sha = Hash()
    env.reset(seed=seed)
    for _ in range(steps):
        *told, info = env.step_scheduler(scheduler)
        for value in (*told, info):
            sha.add(value)
        if told[2] or told[3]:
            break
    sha.add(env.episode_metrics())
    return sha.hex()


def _full() -> Iterator[tuple[str, Callable[[], str]]]:
    for suite in SUITES:
        for seed in SEEDS[:1] if suite in JOINED_SUITES else SEEDS:
            for policy in POLICIES:
                if policy == IN_PYTHON and (suite not in RULE_SUITES or seed != SEEDS[0]):
                    continue
                yield (
                    f"engine/{suite}/{policy}/{seed}",
                    partial(engine_hash, policy, suite, seed, 120, 120, finish=True),
                )
            for kind in ENVIRONMENTS:
                mode = ("next_step", "same_step")[seed % 2]
                yield f"single/{suite}/{kind}/{seed}", partial(single_hash, kind, suite, seed, 240)
                yield f"vector/{suite}/{kind}/{seed}", partial(vector_hash, kind, suite, seed, 120, mode)
    for policy in POLICIES:
        yield f"scheduler/drift/{policy}/0", partial(scheduler_hash, policy, "drift", 0, 200)
    for suite in RULE_SUITES:
        for policy in RULES:
            yield f"engine/{suite}/{policy}/0", partial(engine_hash, policy, suite, 0, 120, 120, finish=True)


def _small() -> Iterator[tuple[str, Callable[[], str]]]:
    for i, suite in enumerate(SUITES):
        for policy in POLICIES[i % 2 :: 2]:
            yield f"small/engine/{suite}/{policy}", partial(engine_hash, policy, suite, 0, 60, 200, finish=False)
        for kind in ENVIRONMENTS:
            yield f"small/single/{suite}/{kind}", partial(single_hash, kind, suite, 0, 60, 60)
            yield f"small/vector/{suite}/{kind}", partial(vector_hash, kind, suite, 0, 8)
    for i, policy in enumerate(RULES):
        suite = RULE_SUITES[i % 2]
        yield f"small/engine/{suite}/{policy}", partial(engine_hash, policy, suite, 0, 60, 100, finish=False)


def full() -> Iterator[tuple[str, str]]:
    """Name and hash of every trajectory of the large set."""
    return ((name, make()) for name, make in _full())


def small() -> Iterator[tuple[str, str]]:
    """Name and hash of every trajectory of the small set, 60 requests each, which takes a minute uncompiled too."""
    return ((name, make()) for name, make in _small())


def main(new_only: bool = False) -> int:
    """Write the file; with `new_only` what is on it stays as it is, and what is missing is added."""
    known = json.loads(FILE.read_text()) if new_only else {"arithmetic": arithmetic()}
    hashes = known | {name: make() for name, make in (*_full(), *_small()) if name not in known}
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(hashes, indent=0) + "\n")
    print(f"{len(hashes)} trajectories, {len(set(hashes.values()))} different, in {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main("--new" in sys.argv[1:]))
