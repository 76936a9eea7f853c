"""From mean utilities to scores, tables and curves of standard results.

A score is 0 for the scheduler `random` and 1 for the best rule on the same requests. Interquartile means and their
stratified bootstrap intervals over training seeds are those of Agarwal et al. (NeurIPS 2021). Their rliable (1.2)
cannot be imported beside pandas 3, so scipy makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import bootstrap, trim_mean

from llmsched_gym.agents.benchmark_presets import LEARNERS, Preset
from llmsched_gym.config import ConfigError
from llmsched_gym.report import draw
from llmsched_gym.text import between
from llmsched_gym.text import table as markdown_table

MIN_SEEDS = 3
"""Training seeds below which there is no interval."""

REPS = 5000
_COLOURS = ("#0072b2", "#56b4e9", "#7a68a6", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#555555")
COLOURS = dict(zip(LEARNERS, _COLOURS, strict=True))


Result = tuple[Preset, Sequence[Mapping[str, Any]]]
"""A preset and the lines of results.jsonl about it, one for each training seed."""


class Reference(NamedTuple):
    """What a score is measured by, of one environment: mean utilities on the test seeds."""

    random: float
    rule: str  # the best on selection seeds
    best: float


def score(utility: float, reference: Reference) -> float:
    """0 for `random`, 1 for the best rule; ConfigError where that is not better."""
    if reference.best <= reference.random:
        earned = f"{reference.rule} earns {reference.best:.3f}, random {reference.random:.3f}"
        raise ConfigError(f"world: expected one where the best rule is above random; {earned}")
    return (utility - reference.random) / (reference.best - reference.random)


def estimate(scores: np.ndarray) -> tuple[float, float | None, float | None]:
    """Interquartile mean of scores (training seeds, environments), and its interval, None below MIN_SEEDS seeds."""
    found = _iqm(*scores.T)
    if len(scores) < MIN_SEEDS:
        return float(found), None, None
    low, high = bootstrap(tuple(scores.T), _iqm, n_resamples=REPS, method="percentile", rng=0).confidence_interval
    return float(found), float(low), float(high)


def _iqm(*strata: np.ndarray, axis: int = -1) -> Any:
    return trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def lines_of(results: Sequence[Result], references: Mapping[str, Reference]) -> list[dict[str, Any]]:
    """A line of the table for each preset: what its trainings earn, and their scores.

    Args:
        results: of each training seed mean utilities by test seed, `greedy` and `sampled`.
        references: by the preset's name.
    """
    lines = []
    for preset, rows in results:
        reference = references[preset.name]
        line: dict[str, Any] = {"preset": preset.name, "learner": preset.learner}
        line |= {"environment": preset.environment, "training_seeds": len(rows)}
        for kind in ("greedy", "sampled"):
            utilities = [float(np.mean(row[kind])) for row in rows]
            scores = [score(utility, reference) for utility in utilities]
            line[kind] = {
                "mean_utility": float(np.mean(utilities)),
                "scores": scores,
                "estimate": estimate(np.array(scores)[:, None]),
                "above": sum(value > 1.0 for value in scores),
            }
        lines.append(line)
    return lines


def over_environments(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Interquartile means of learners that were trained in several environments, strata being environments."""
    found = []
    for learner in LEARNERS:
        own = [line for line in lines if line["learner"] == learner]
        seeds = {line["training_seeds"] for line in own}
        if len(own) > 1 and len(seeds) == 1:
            estimates = {
                kind: estimate(np.array([line[kind]["scores"] for line in own]).T) for kind in ("greedy", "sampled")
            }
            found.append({"learner": learner, "environments": [line["environment"] for line in own], **estimates})
    return found


def markdown(lines: Sequence[dict[str, Any]], references: Mapping[str, Reference], told: str) -> str:
    """The tables as a page shows them; `told` says what was run."""
    header = ("environment", "learner", "training seeds", "greedy, mean utility", "greedy, score")
    more = ("sampled, score", "greedy above 1")
    rows: list[tuple[Any, ...]] = []
    for line in sorted(lines, key=lambda line: (line["environment"], -line["greedy"]["estimate"][0])):
        greedy, sampled, seeds = line["greedy"], line["sampled"], line["training_seeds"]
        start = line["environment"], LEARNERS[line["learner"]].label, seeds, f"{greedy['mean_utility']:.3f}"
        rows.append((*start, _shown(greedy["estimate"]), _shown(sampled["estimate"]), f"{greedy['above']} of {seeds}"))
    text = [told, "", markdown_table((*header, *more), rows, 2)]
    whole = over_environments(lines)
    if whole:
        rows = [
            (LEARNERS[w["learner"]].label, "; ".join(w["environments"]), _shown(w["greedy"]), _shown(w["sampled"]))
            for w in whole
        ]
        text += ["", markdown_table(("learner", "environments", "greedy, score", "sampled, score"), rows, 2)]
    by_environment = {line["environment"]: references[line["preset"]] for line in lines}
    rows = [(name, f"{r.random:.3f}", f"`{r.rule}`", f"{r.best:.3f}") for name, r in sorted(by_environment.items())]
    text += ["", markdown_table(("environment", "`random` (0)", "best rule", "mean utility (1)"), rows, 1)]
    return "\n".join(text) + "\n"


def _shown(found: tuple[float, float | None, float | None]) -> str:
    return f"{found[0]:.3f}{between(found[1], found[2], 3)}"


@draw.styled
def curves(results: Sequence[Result], selection: Mapping[str, Reference]) -> Figure:
    """Mean utility on selection seeds against decisions, a panel an environment: means and extremes of training seeds.

    `selection` has what `random` and the best rule earn on the same seeds, by the preset's name.
    """
    environments = list(dict.fromkeys(preset.environment for preset, _ in results))
    figure = Figure(figsize=(1.2 + 4.2 * len(environments), 4.0), layout="constrained")
    for axes, environment in zip(np.ravel(figure.subplots(1, len(environments))), environments, strict=True):
        for preset, rows in results:
            if preset.environment != environment:
                continue
            learner, reference = LEARNERS[preset.learner], selection[preset.name]
            steps = np.array([step for step, _ in rows[0]["curve"]]) / 1e6
            values = np.array([[value for _, value in row["curve"]] for row in rows])
            colour = COLOURS[preset.learner]
            axes.plot(steps, values.mean(0), marker="o", markersize=3.5, color=colour, label=learner.label.strip("`"))
            axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.axhline(reference.best, color=draw.INK, linestyle=(0, (4, 3)), linewidth=1.1, label=reference.rule)
        axes.set(title=environment, xlabel="Decisions (millions)")
    figure.axes[0].set(ylabel="Mean utility per request, selection seeds")
    labelled = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
    return figure
