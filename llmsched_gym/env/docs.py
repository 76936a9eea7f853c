"""docs/environment.md, made from the environment itself: `python -m llmsched_gym.env.docs > docs/environment.md`."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import SUITES, EnvConfig, Scenario
from llmsched_gym.env import reward
from llmsched_gym.env.features import FEATURES, Feature
from llmsched_gym.env.knobs import KNOBS
from llmsched_gym.env.single import LLMSchedEnv
from llmsched_gym.env.slots import NUM_SLOTS, SLOT_FEATURES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines)


def specification() -> str:
    """The docstring of the environment, as Markdown."""
    text = inspect.cleandoc(LLMSchedEnv.__doc__ or "")
    text = re.sub(r":class:`~?[\w.]*?(\w+)`", r"`\1`", text.split("\nArgs:")[0])
    return text.replace("``", "`")


def features(entries: tuple[Feature, ...]) -> str:
    rows = [[str(i), f"`{f.name}`", f"{f.low:g} to {f.high:g}", f.what] for i, f in enumerate(entries)]
    return table(["#", "name", "range", "meaning"], rows)


def knobs() -> str:
    rows = []
    for i, knob in enumerate(KNOBS):
        values = ", ".join(f"{k} = {knob.label(k)}" for k in range(len(knob.values)))
        rows.append([str(i), f"`{knob.name}`", knob.what, values.replace("nan", "off")])
    return table(["#", "knob", "meaning", "index = value"], rows)


def fields() -> str:
    """Every field with its default and the comment on its line."""
    rows = []
    for cls in (Scenario, EnvConfig):
        for line in inspect.getsource(cls).splitlines():
            match = re.match(r"    (\w+): ([^=]+) = (.+?)  # (.+)", line)
            if match:
                rows.append([f"`{match[1]}`", f"`{match[3]}`", match[4]])
            elif match := re.match(r"    (\w+): (float|int|bool|str) = ([^#]+)$", line):
                rows.append(
                    [f"`{match[1]}`", f"`{match[3].strip()}`", match[1].replace("_s", " (s)").replace("_", " ")]
                )
    return table(["field", "default", "meaning"], rows)


def suites() -> str:
    rows = [[f"`{suite.env_id}`", f"`{name}`", suite.what] for name, suite in SUITES.items()]
    return table(["environment", "suite", "what"], rows)


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)


def worked_steps() -> str:
    """Three steps of one environment, with what was in each batch and what it paid."""
    env = LLMSchedEnv("paper", qps=2.0, num_requests=40)
    env.reset(seed=0)
    action = np.zeros(len(KNOBS) - 1, np.int64)
    lines: list[str] = []
    told = 0
    for step in range(10_000):
        *_, paid, _, _, info = (None, *env.step(action)[1:])
        batch, sim = env.core.engine.state.batches[0], env.core.engine.state.sims[0]
        terms: dict[str, Any] = info["reward_terms"]
        interesting = (
            (told == 0 and batch.num_tokens == 0)
            or (told == 1 and batch.num_tokens > 0)
            or (told == 2 and terms["on_time"] > 0)
        )
        if not interesting:
            continue
        told += 1
        what = "nothing to run: the clock moves to the first arrival"
        if batch.num_tokens:
            what = f"{batch.num_decodes} decodes and {batch.num_tokens - batch.num_decodes} prompt tokens"
        lines.append(
            f"{told}. Step {step}: {what}. It took {_number(1e3 * info['duration_s'])} ms, the discount is "
            f"{_number(info['discount'])}; the reward is {_number(paid)} (first tokens in time "
            f"{_number(terms['on_time'])}, expired {_number(terms['expired'])}, "
            f"lateness {_number(terms['lateness'])}). "
            f"The clock stands at {_number(float(sim.clock_s))} s with {sim.num_running} running and "
            f"{sim.num_waiting} waiting."
        )
        if told == 3:
            break
    return "\n".join(lines)


def example(name: str) -> str:
    return f"```python\n{(EXAMPLES / name).read_text().rstrip()}\n```"


def page() -> str:
    """The whole page."""
    derivation = inspect.cleandoc(reward.__doc__ or "").split("\n\n", 1)[1]
    return f"""# The environment

*This page is made by `python -m llmsched_gym.env.docs`.*

{specification()}

## Registered environments

{suites()}

`gymnasium.make_vec(id, num_envs=N, vectorization_mode="vector_entry_point")` gives the native vector environment, and
`llmsched_gym.env.sb3.LLMSchedVecEnv(N)` its Stable-Baselines3 face. Environment i of `reset(seed=s)` equals the single
environment with seed s + i. Autoreset is SAME_STEP, with `final_obs` in the infos.

## Knobs

Every combination is legal. All zeros is Sarathi-Serve; `order` = spf with `offset` = 5 (10 while KV use is at least
96 %) is SLAI, whose offset reads `kv_cache_usage_last_batch`. A knob set in step t + 1 keys the tokens emitted in
batch t, once.

{knobs()}

`refuse` is there only with `allow_refusal=True`.

## Observation: features

{features(FEATURES)}

## Observation: slots

`slots` has {NUM_SLOTS} rows: running requests by admission, then waiting ones by arrival, preempted ones first. `mask`
says which rows are in use, and `features` summarises the rest.

{features(SLOT_FEATURES)}

## Reward

{derivation}

Rejected requests, which no decision could have saved, count 0. With `beta=0` the return is the number of requests that
attained.

## Three worked steps

Suite `paper` at 2 requests/s, seed 0, all knobs 0:

{worked_steps()}

## All settings

{fields()}

## Your own reward, observation, scheduler

{example("custom_reward.py")}

{example("custom_observation.py")}

{example("custom_scheduler.py")}

A scheduler runs in `llmsched evaluate --policy examples.custom_scheduler:ShortestFirst`, and steps an environment by
`llmsched_gym.env.policy.SchedulerPolicy(env, ShortestFirst())`.
"""


if __name__ == "__main__":
    print(page(), end="")
