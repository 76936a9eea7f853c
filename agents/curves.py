"""Draw learning curves of runs: ``python -m llmsched_gym.agents.curves --runs runs/a,runs/b --out curves.png``.

Left: mean utility on selection seeds, what the best policy is chosen by. Right: return of the training episodes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from llmsched_gym.agents.options import fail_in_one_line, option, parse
from llmsched_gym.config import ConfigError
from llmsched_gym.interrupts import leave
from llmsched_gym.report import draw

SMOOTH = 10  # iterations of a moving average of returns


@dataclass(frozen=True)
class Config:
    runs: str = option("runs/train", "folders of agents.train, separated by commas")
    level: float = option(0.0, "mean utility of an opponent on the same seeds, drawn as a line; 0: none")
    label: str = option("tuned-constant", "name of that opponent")
    out: str = option("curves.png", "PNG to write")


@draw.styled
def plot(runs: dict[str, list[dict[str, float]]], level: float, label: str) -> Figure:
    """Curves of runs: lines of their progress.jsonl by name."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, lines in runs.items():
        judged = [(line["step"] / 1e6, line["eval/mean_utility"]) for line in lines if "eval/mean_utility" in line]
        left.plot(*zip(*judged, strict=True), marker="o", markersize=3.5, label=name)
        returns = [(line["step"] / 1e6, line["rollout/return"]) for line in lines if "rollout/return" in line]
        step, value = np.array(returns).T
        right.plot(step[SMOOTH - 1 :], np.convolve(value, np.ones(SMOOTH) / SMOOTH, "valid"))
    if level:
        left.axhline(level, color=draw.INK, linestyle=(0, (4, 3)), linewidth=1.1, label=label)
    left.set(title="Selection seeds", xlabel="Decisions (millions)", ylabel="Mean utility per request")
    right.set(title="Training episodes", xlabel="Decisions (millions)", ylabel="Return per episode")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def curves(config: Config) -> str:
    """Read the runs and write the figure; returns its path."""
    runs = {}
    for folder in map(Path, config.runs.split(",")):
        path = folder / "progress.jsonl"
        if not path.is_file():
            raise ConfigError(f"runs: expected folders of agents.train, {path} does not exist")
        runs[folder.name] = [json.loads(line) for line in path.read_text().splitlines()]
    plot(runs, config.level, config.label).savefig(config.out, dpi=140, metadata={"Software": None})
    return config.out


def main() -> int:
    return fail_in_one_line(lambda: print(curves(parse(Config, None, __doc__))), "interrupted")


if __name__ == "__main__":
    from llmsched_gym.agents import curves as module  # under its one name, not this copy of it

    leave(module.main())
