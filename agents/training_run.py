"""What a training tells and keeps between two iterations: progress, events, the best policy so far, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from llmsched_gym.agents.checkpoint import cut_events, save_checkpoint
from llmsched_gym.agents.export import export
from llmsched_gym.agents.run_folder import cut_progress, settings_of
from llmsched_gym.agents.seeds import SELECTION_SEEDS, evaluation_of
from llmsched_gym.config import ConfigError, EnvConfig
from llmsched_gym.evaluation.metrics import row
from llmsched_gym.evaluation.run import simulate
from llmsched_gym.policies import LoadedPolicy, write_folder
from llmsched_gym.report import console


def evaluate(policy: Any, config: Any, world: EnvConfig, backend: Any = None) -> dict[str, float]:
    """Means over selection seeds of the runs that `llmsched evaluate` would make of the exported policy."""
    spec, tensors = export(policy, world)
    scenario = evaluation_of(config)
    seeds = SELECTION_SEEDS[: config.eval_seeds]
    rows = [row(simulate(scenario, LoadedPolicy(spec, tensors), seed, backend=backend)) for seed in seeds]
    return {name: float(np.mean([r[name] for r in rows])) for name in ("mean_utility", "slo_attainment")}


class TrainingRun:
    """The folder of a training that is under way, and its bar; to be used in a `with`.

    Args:
        config: settings with `out`, `steps`, `suite`, `eval_...` and `checkpoint_every`.
        world: what the policy is trained in.
        saved: the checkpoint that the training goes on from; None: it begins.
        evaluated: hears, in place of the bar, each evaluation's step and mean utility.
    """

    def __init__(
        self,
        config: Any,
        world: EnvConfig,
        saved: dict[str, Any] | None,
        evaluated: Callable[[int, float], None] | None = None,
    ) -> None:
        self.config, self.world, self.out, self.evaluated = config, world, Path(config.out), evaluated
        self.step = self._last_checkpoint = 0 if saved is None else saved["step"]
        self._last_eval = 0 if saved is None else saved["last_eval"]
        self.best = -np.inf if saved is None else saved["best"]
        self._bar = _bar(evaluated is None)

    def __enter__(self) -> TrainingRun:
        cut_events(self.out / "tensorboard", self.step)
        self._writer = SummaryWriter(str(self.out / "tensorboard"))
        self._progress = open(cut_progress(self.out, self.step), "a")
        self._bar.start()
        self._task = self._bar.add_task("training", total=self.config.steps, completed=self.step, best=self._best())
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        self._progress.close()
        self._writer.close()

    def _best(self) -> str:
        return "-" if self.best == -np.inf else f"{self.best:.4f}"

    def tell(
        self,
        step: int,
        figures: dict[str, float],
        policy: Any,
        state: Callable[[], dict[str, Any]],
        *,
        backend: Any = None,
        looked: Callable[[], None] | None = None,
    ) -> None:
        """Write down an iteration that ended at `step`; evaluate the policy and make a checkpoint where they are due.

        Args:
            step: decisions so far.
            figures: what to log, by name.
            policy: to be exported.
            state: makes what a checkpoint holds beside what this object knows.
            backend: that evaluations run on; None: the simulated one.
            looked: called after an evaluation, before the checkpoint.
        """
        config, ends = self.config, step >= self.config.steps
        if not all(bool(torch.isfinite(weights).all()) for weights in policy.parameters()):
            raise ConfigError(f"learning_rate: the weights are no numbers after {step:,} decisions; choose a lower one")
        self.step = step
        if step - self._last_eval >= config.eval_every or ends:
            self._last_eval = step
            found = evaluate(policy, config, self.world, backend)
            if looked is not None:
                looked()
            figures = figures | {f"eval/{name}": value for name, value in found.items()}
            if found["mean_utility"] > self.best:
                self.best = found["mean_utility"]
                summary = {
                    **settings_of(config),
                    "warm_start": bool(config.warm_start),
                    "step": step,
                    "selection": found,
                }
                if hasattr(config, "model"):
                    summary["model"] = Path(config.model).name
                write_folder(self.out / "best", *export(policy, self.world, training=summary))
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._progress.write(json.dumps({"step": step, **figures}) + "\n")
        self._progress.flush()
        self._bar.update(self._task, completed=step, best=self._best())
        if step - self._last_checkpoint >= config.checkpoint_every or ends:
            self._last_checkpoint = step
            self._writer.flush()
            kept = {"step": step, "best": self.best, "last_eval": self._last_eval}
            save_checkpoint(self.out, step, kept | state())
        if self.evaluated is not None and "eval/mean_utility" in figures:
            self.evaluated(step, figures["eval/mean_utility"])


def _bar(is_shown: bool) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("best {task.fields[best]}"),
    )
    stderr = Console(stderr=True)  # where it is no terminal, the bar would stand before whatever is said in the end
    return Progress(*columns, console=stderr, disable=console.quiet or not is_shown or not stderr.is_terminal)
