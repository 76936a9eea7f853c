"""Parts of docs/environment.md that the environment itself says: tables, sections, worked steps."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.spaces import Space

from llmsched_gym.config import MASK_NAMES, SUITES, EnvConfig, Scenario
from llmsched_gym.env.actions import ACTIONS
from llmsched_gym.env.actions.knobs import KNOBS, TOKEN_BUDGET
from llmsched_gym.env.arrays import INFOS
from llmsched_gym.env.episode import METRICS
from llmsched_gym.env.feature import Feature
from llmsched_gym.env.features import ALL_FEATURES
from llmsched_gym.env.masked import FLOAT_MASKS
from llmsched_gym.env.observations import OBSERVATIONS
from llmsched_gym.env.single import LLMSchedEnv
from llmsched_gym.text import table

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORKED: dict[str, Any] = {"qps": 2.0, "jitter": 0.0, "max_backlog": 4}
WORKED_SEED, WORKED_BUDGETS = 4, (512, 2048, 8192)


def specification() -> str:
    """The docstring of the environment, as Markdown."""
    text = inspect.cleandoc(LLMSchedEnv.__doc__ or "").split("\nArgs:")[0].strip()
    return re.sub(r":class:`~?[\w.]*?(\w+)`", r"`\1`", text).replace("``", "`")


def suites() -> str:
    """The registered environments and what sets each apart from the first."""
    usual = SUITES["default"].scenario.to_dict()
    rows = []
    for name, suite in sorted(SUITES.items(), key=lambda item: item[0] != "default"):
        other = [f"`{k}={v!r}`" for k, v in suite.scenario.to_dict().items() if v != usual[k] and k != "suite"]
        threshold = "-" if suite.reward_threshold is None else f"{suite.reward_threshold:,.1f}"
        rows.append([f"`{suite.env_id}`", f"`{name}`", suite.what, threshold, ", ".join(other) or "-"])
    header = ["environment", "suite", "what", "`reward_threshold`", f"unlike `{SUITES['default'].env_id}`"]
    return table(header, rows)


def actions() -> str:
    """The table of action spaces."""
    rows = [[f"`{a.name}`", f"`{a.space(EnvConfig(action=a.name))}`", a.what] for a in ACTIONS.values()]
    return table(["`action=`", "space", "one action"], rows)


def action_sections() -> str:
    """A section for each kind of action."""
    return "\n\n".join(f"### {a.name.capitalize()}\n\n{a.docs()}" for a in ACTIONS.values())


def features(entries: tuple[Feature, ...]) -> str:
    """The table of the entries of an observation, by index."""
    rows = [[str(i), f"`{f.name}`", f"{f.low:g} to {f.high:g}", f.meaning] for i, f in enumerate(entries)]
    return table(["#", "name", "range", "meaning"], rows)


def observation_sections() -> str:
    """A section for each kind of observation, with all entries that the first of its arrays can have."""
    sections = []
    for name, kind in OBSERVATIONS.items():
        config = EnvConfig(observation=name)
        parts = {key: _shape(part.space(config)) for key, part in kind.parts.items()}
        space = (
            f"Dict({', '.join(f'{k}={v}' for k, v in parts.items())})" if len(parts) > 1 else f"{parts.popitem()[1]}"
        )
        entries = next(iter(kind.parts.values())).entries
        listed = "" if entries is None else f"\n\n{features(entries(config, len(ALL_FEATURES)))}"
        sections.append(f"### {name.capitalize()}\n\n`{space}`, float32.\n{kind.what}{listed}")
    return "\n\n".join(sections)


def mask_names() -> str:
    """The table of names under which libraries look for observations and masks."""
    rows = [
        [f'`"{given}"`', *(f"`{name}`" for name in names), "float32, 0 or 1" if given in FLOAT_MASKS else "bool"]
        for given, names in MASK_NAMES.items()
    ]
    header = ["`mask_in_observation=`", "observation", "mask", "dtype of the mask"]
    return table(header, [*rows, ["`(name, other)`", "`name`", "`other`", "bool"]])


def _shape(space: Space) -> str:
    sizes = ", ".join(map(str, space.shape or ()))
    return f"{type(space).__name__}({sizes})"


def infos() -> str:
    """The keys of `info`, in their order."""
    what = {
        "duration_s": "how far the clock moved; 0 at a reset",
        "discount": "exp(-duration / tau_s); 1 at a reset",
        "reward_on_time": "+1 for each on-time first token",
        "reward_expired": "-1 for each of these whose request was late afterwards",
        "reward_lateness": "-beta x late seconds / patience",
        "reward_refused": "-beta for each refusal",
    }
    rows = [[f"`{name}`", "float64", what[name]] for name in INFOS]
    rows += [["`seed`", "int64", "the episode's"], ["`qps`", "float64", "its true mean rate: for logs, not for agents"]]
    rows += [[f"`episode_{name}`", "float64", text] for name, text in METRICS.items()]
    return table(["key", "type", "meaning"], rows)


def fields() -> str:
    """Every field of the configuration with its default and the comment on its line, in the groups of the source."""
    groups: dict[str, list[list[str]]] = {}
    for cls, group in ((Scenario, "scenario"), (EnvConfig, "agent")):
        for line in inspect.getsource(cls).splitlines():
            if match := re.fullmatch(r"    # (.+)", line):
                group = match[1]
            elif match := re.fullmatch(r"    (\w+): (.+?) = (.+?)(?:  # (.+))?", line):
                code = [f"`{match[k]}`".replace("|", "or") for k in (1, 2, 3)]
                groups.setdefault(group, []).append([*code, match[4] or _words(match[1])])
    header = ["field", "type", "default", "meaning"]
    return "\n\n".join(f"### {name.capitalize()}\n\n{table(header, rows)}" for name, rows in groups.items())


def _words(name: str) -> str:
    """A field's name as words: what there is to say of a field that has no comment."""
    stem, unit = (name[:-2], ", seconds") if name.endswith("_s") else (name, "")
    return " ".join(w.upper() if w in ("slo", "tbt", "ttft", "kv") else w for w in stem.split("_")) + unit


def _number(value: float) -> str:
    """Six digits: enough to check the arithmetic, few enough to be the same on every machine."""
    return f"{round(value, 9) + 0.0:.6g}"


def _changes(env: LLMSchedEnv, before: np.ndarray) -> list[str]:
    """What a step changed in the utility of each request, in words and numbers."""
    config, lines = env.config, []
    after = env.core.engine.state.requests[0]
    for r in range(env.core.engine.state.episodes[0].num_arrived):
        was, now = before[r], after[r]
        if was["num_output_tokens"] == 0 and now["num_output_tokens"] == 1:
            ttft_s, slo_s = now["first_token_s"] - now["arrival_s"], now["ttft_slo_s"]
            verdict = "late" if now["ttft_missed"] else "+1"
            lines.append(f"request {r}: first token after {_number(ttft_s)} s, TTFT SLO {_number(slo_s)} s: {verdict}")
        elif now["num_late_gaps"] > was["num_late_gaps"]:
            gap_s, slo_s = now["last_token_s"] - was["last_token_s"], now["tbt_slo_s"]
            late = f"{_number(config.beta)} x {_number(gap_s - slo_s)} / {_number(config.patience_s)}"
            lines.append(
                f"request {r}: next token after {_number(gap_s)} s, TBT SLO {_number(slo_s)} s: -1, and -{late} = "
                f"{_number(-config.beta * (gap_s - slo_s) / config.patience_s)} for being late"
            )
        elif now["num_output_tokens"] > was["num_output_tokens"]:
            gap_s = now["last_token_s"] - was["last_token_s"]
            lines.append(f"request {r}: next token after {_number(gap_s)} s: in time, 0")
    return lines


def worked_steps() -> str:
    """Three steps of one environment: the action, the batch, its time and what it paid, as run just now."""
    env = LLMSchedEnv(**WORKED)
    env.reset(seed=WORKED_SEED)
    state = env.core.engine.state
    first = state.requests[0, : state.episodes[0].num_arrived]
    waiting = [
        [str(i), f"{r['prompt_tokens']:,}", _number(r["ttft_slo_s"]), _number(r["tbt_slo_s"])]
        for i, r in enumerate(first)
    ]
    rows, told = [], []
    for k, budget in enumerate(WORKED_BUDGETS, 1):
        action = np.zeros(env.action_space.shape or (), np.int64)
        action[TOKEN_BUDGET] = KNOBS[TOKEN_BUDGET].values.index(budget)
        before = state.requests[0].copy()
        _, paid, _, _, info = env.step(action)
        batch = state.items[0, : state.batches[0].num_items].tolist()
        decoding = before["num_computed_tokens"] >= before["prefill_tokens"]
        items = [f"{r}: decode" if decoding[r] else f"{r}: {n:,} prompt tokens" for r, n in batch]
        terms = [_number(info[f"reward_{name}"]) for name in ("on_time", "expired", "lateness")]
        time = [_number(info["duration_s"]), _number(info["discount"])]
        rows.append([str(k), f"`{action.tolist()}`", "; ".join(items), *time, *terms, _number(paid)])
        told += [f"- Step {k}, {line}" for line in _changes(env, before)]
    requests = table(["request", "prompt tokens", "TTFT SLO (s)", "TBT SLO (s)"], waiting)
    header = ["step", "action", "batch", "duration (s)", "discount", "on_time", "expired", "lateness", "reward"]
    return f"{requests}\n\n{table(header, rows)}\n\n" + "\n".join(told)


def example(name: str) -> str:
    """A file of examples/ as a code block."""
    return f"```python\n{(EXAMPLES / name).read_text().rstrip()}\n```"
