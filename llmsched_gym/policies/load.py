"""From a policy folder to a scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from llmsched_gym.config import plain
from llmsched_gym.engine import Engine
from llmsched_gym.engine.jit import JIT_ENABLED
from llmsched_gym.engine.run import clear_batch_env
from llmsched_gym.engine.view import Batch, View
from llmsched_gym.env.actions import action_of
from llmsched_gym.env.actions.knobs import Knob, knobs_for, set_knobs
from llmsched_gym.env.features import ALL_FEATURES
from llmsched_gym.env.slots import ALL_SLOT_FEATURES
from llmsched_gym.policies.bridge import PolicyScheduler
from llmsched_gym.policies.folder import SPEC, TENSORS, PolicySpec, read_folder, width_of
from llmsched_gym.policies.knob_rules import KnobScores
from llmsched_gym.policies.network import ACTION as COMPILED_ACTION
from llmsched_gym.policies.network import Network, choose_knobs, make_network, run_network
from llmsched_gym.policies.networks import BadTensors, Mlp, Rows
from llmsched_gym.scheduler import Compiled, PolicyError, default_knobs, settings_of, with_options


class LoadedPolicy(PolicyScheduler):
    """A policy folder as a scheduler.

    Args:
        spec, tensors: of the folder.
        name: for reports.
        decision_s: charged on the clock for every step; None: what was measured at export.
    """

    def __init__(
        self, spec: PolicySpec, tensors: dict[str, np.ndarray], name: str = "", decision_s: float | None = None
    ) -> None:
        self.spec, self.name, self.tensors = spec, name, tensors
        self._make()
        # as many on every profile, so that the layout of the policy's arrays is its own
        seen = width_of(spec.observation)
        super().__init__(self.policy, spec.config, spec.decision_s if decision_s is None else decision_s, seen)
        self.what: str = f"a learned policy ({spec.architecture['kind']}, {spec.action['kind']} action)"

    def _make(self) -> None:
        self.policy = make_policy(self.spec, self.tensors)
        self.network = self.policy.network if isinstance(self.policy, Knobs) and JIT_ENABLED else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in ("policy", "network")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make()

    def run_steps(self, engine: Engine, max_steps: int, max_idle_steps: int) -> int:
        """As the method it replaces; a network from features to knobs stays in compiled code."""
        if self.network is None:
            return super().run_steps(engine, max_steps, max_idle_steps)
        repeat = self.config.action_repeat
        steps, self._left = run_network(
            engine.handle, self._handle, 0, self.network, repeat, self._left, max_steps, max_idle_steps
        )
        self._action = self._actions[0].copy()
        return int(steps)

    def schedule(self, view: View) -> Batch:
        """The decision as a batch, for whoever has a view and no engine; the engine itself calls ``decide``."""
        state, handle, env = view._state, view._handle, view._k
        self.decide(cast(Any, SimpleNamespace(handle=handle, view=lambda env: view)), env)
        formed = state.batches[env]
        items = state.items[env, : formed.num_items]
        batch = Batch(
            dict(zip(items["request"].tolist(), items["tokens"].tolist(), strict=True)),
            tuple(state.preempt[env, : formed.num_preempt].tolist()),
            tuple(state.refuse[env, : formed.num_refuse].tolist()),
        )
        clear_batch_env(handle, env)
        return batch


class Knobs:
    """A network from features to knobs, called with one observation."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        action = np.zeros(len(self.network.counts), np.int64)
        choose_knobs(self.network, complete(observation), action)
        return action


def complete(features: np.ndarray) -> np.ndarray:
    """One observation of features with zeros for those that its environment lacks, as they would be there."""
    return np.append(features, np.zeros(len(ALL_FEATURES) - len(features), features.dtype))


def load_policy(path: str | Path, **options: Any) -> Any:
    """The scheduler in a policy folder. Nothing in the folder is executed; a fault raises a one-line PolicyError.

    Options, as in brackets: ``decision_s`` replaces the measured decision time. A constant policy takes what any
    compiled scheduler takes (``hold``, ``limit``, ...). ``allow_pickle=true`` lets an SB3 zip, and the
    VecNormalize statistics beside it, be read, which can run code; see :func:`~llmsched_gym.policies.sb3_zip.load_zip`.
    """
    path, options = Path(path), {key: str(plain(value)) for key, value in options.items()}
    if path.suffix == ".zip":
        from llmsched_gym.policies.sb3_zip import load_zip

        return load_zip(path, options)
    spec, tensors = read_folder(path)
    name = str(path)
    if spec.architecture["kind"] == "constant":
        return with_options(name, _constant(name, spec, tensors), options)
    decision_s = _decision_s(name, options.pop("decision_s", None))
    if options:
        raise PolicyError(f"policy {name!r}: unknown parameter {next(iter(options))!r}, expected decision_s")
    try:
        return LoadedPolicy(spec, tensors, name, decision_s)
    except BadTensors as error:
        source = SPEC if str(error).startswith("architecture.") else TENSORS
        raise PolicyError(f"policy {name!r}: {source}: {error}") from None


def _decision_s(name: str, text: str | None) -> float | None:
    try:
        if text is None or 0.0 <= float(text) < 10.0:
            return None if text is None else float(text)
    except ValueError:
        pass
    raise PolicyError(f"policy {name!r}: decision_s: expected seconds from 0 to 10, got {text!r}")


def folder_knobs(spec: PolicySpec) -> tuple[Knob, ...]:
    """The knobs with the values that the folder lists, in its order."""
    found = []
    for knob in knobs_for(spec.config):
        values = {knob.label(i): value for i, value in enumerate(knob.values)}
        found.append(knob._replace(values=tuple(values[label] for label in spec.action["knobs"][knob.name])))
    return tuple(found)


def _now(spec: PolicySpec) -> list[np.ndarray]:
    """For each entry of an action, this version's index of each value that the folder lists."""
    kind, config = action_of(spec.config), spec.config
    return [
        np.array([choice.labels.index(label) for label in spec.action[kind.name][choice.name]])
        for choice in kind.choices(config)
    ]


def _constant(name: str, spec: PolicySpec, tensors: dict[str, np.ndarray]) -> Compiled:
    tables = _now(spec)
    action = tensors.get("action")
    if list(tensors) != ["action"] or action is None or action.shape != (len(tables),) or action.dtype.kind != "i":
        raise PolicyError(f"policy {name!r}: {TENSORS}: action: expected {len(tables)} integers and no other tensor")
    if not all(0 <= i < len(table) for i, table in zip(action, tables, strict=True)):
        raise PolicyError(f"policy {name!r}: {TENSORS}: action: expected indices of the listed knob values")
    knobs = default_knobs().reshape(1).view(np.recarray)
    chosen = [table[i] for i, table in zip(action, tables, strict=True)]
    set_knobs(knobs[0], np.array(chosen), spec.config.prefix_caching)
    settings = settings_of(knobs[0])
    labels = ", ".join(f"{k.name} {k.label(int(i))}" for k, i in zip(folder_knobs(spec), action, strict=True))
    return Compiled(f"constant knobs: {labels}", settings=settings, admission=spec.action["admission"], name=name)


def make_policy(spec: PolicySpec, tensors: dict[str, np.ndarray]) -> Callable[..., Any]:
    """The function from one observation (and, for request actions, the mask of legal ones) to one action."""
    kind = spec.architecture["kind"]
    names = [f.name for f in ALL_FEATURES]
    columns = np.array([names.index(name) for name in spec.observation["features"]])
    if kind == "linear":
        return _linear(spec, tensors, columns)
    action, decode = action_of(spec.config), _decoder(spec)
    num_slots, others = action.num_scores(spec.config)
    if kind == "mlp":
        mlp = Mlp(spec.architecture, tensors, len(columns), num_slots + others)
        if action.name == COMPILED_ACTION:
            tables = _now(spec)
            widths = [len(table) for table in tables]
            layers, activation = [*mlp.hidden, mlp.out], spec.architecture["activation"]
            return Knobs(make_network(columns, mlp.mean, mlp.scale, layers, activation, widths, tables))
        return lambda observation, mask=None: decode(mlp(complete(observation)[columns]), mask)

    slot_names = [f.name for f in ALL_SLOT_FEATURES]
    slot_columns = np.array([slot_names.index(name) for name in spec.observation["slots"]])
    rows = Rows(spec.architecture, tensors, len(slot_columns), len(columns), others, per_row=num_slots > 0)

    def policy(observation: dict[str, np.ndarray], mask: np.ndarray | None = None) -> Any:
        used = int(observation["in_use"].sum())  # rows in use come first
        found, own = rows(observation["slots"][:used, slot_columns], complete(observation["features"])[columns])
        scores = np.full(num_slots + others, -1.0, np.float32)
        scores[: len(found)], scores[num_slots:] = found, own
        return decode(scores, mask)

    return policy


def _decoder(spec: PolicySpec) -> Callable[[np.ndarray, Any], Any]:
    """From the scores of a network, and the mask of what is legal where there is one, to an action."""
    action, tables = action_of(spec.config), _now(spec)
    if action.of_scores is not None:
        return action.of_scores
    shape = action.space(spec.config).shape
    ends = np.cumsum([len(table) for table in tables])
    parts = [(slice(end - len(table), end), table) for end, table in zip(ends, tables, strict=True)]

    def best(scores: np.ndarray, mask: Any) -> np.ndarray:
        """The value with the highest score of each entry."""
        return np.array([table[scores[part].argmax()] for part, table in parts]).reshape(shape)

    return best


def _linear(spec: PolicySpec, tensors: dict[str, np.ndarray], columns: np.ndarray) -> Knobs:
    scores, tables = KnobScores(folder_knobs(spec)), _now(spec)
    shapes = {"weight": (scores.num_scores, len(columns)), "bias": (scores.num_scores,)}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            got = tensors[name].shape if name in tensors else None
            raise BadTensors(f"{name}: expected shape {shape}, got {got}")
    weight, bias = tensors["weight"].astype(np.float64), tensors["bias"].astype(np.float64)
    by_rank = [table[ranks] for table, ranks in zip(tables, scores.ranks, strict=True)]
    values = [
        table if width > 1 else ranked for table, width, ranked in zip(tables, scores.widths, by_rank, strict=True)
    ]
    zero, one = np.zeros(len(columns)), np.ones(len(columns))
    return Knobs(make_network(columns, zero, one, [(weight.T, bias)], "tanh", scores.widths, values))
