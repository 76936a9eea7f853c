"""The page of an arena: rankings of every profile, Pareto fronts, and who is best where."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from llmsched_gym.files import make_folder
from llmsched_gym.report import arena, draw
from llmsched_gym.report.chart import ALL, Chart, axis, log_axis
from llmsched_gym.report.intervals import MIN_SEEDS
from llmsched_gym.report.load_section import Section
from llmsched_gym.report.tables import HEAD, Cell, Table, capacity_table
from llmsched_gym.report.text import names, number
from llmsched_gym.report.write import write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW_TO_READ = (
    "Every suite at every load counts the same. Attainment is averaged over them; TTFT, ITL and throughput are ratios "
    "to the reference on the same requests, averaged as logarithms, and the figures of all loads geometric means. A "
    f"latency that is infinite, or longer than {arena.LATE_S:g} s, counts as {arena.LATE_S:g} s.",
    "In brackets: 95 % intervals of changes over seeds, paired with the reference. **Bold** is the best, ≈ is not told "
    "from it by seeds. ‡ is told output lengths, never the best, and no opponent of the others.",
    "Refusing is allowed, which `queue-tokens` makes use of; a refused request is a miss.",
)


def write_arena(
    directory: Path,
    config: Mapping[str, Any],
    rows: Sequence[dict[str, Any]],
    capacities: Sequence[dict[str, Any]] = (),
    command: str | None = None,
) -> Path:
    """Write the page of an arena's rows into its folder; returns the path of report.html.

    Args:
        directory: the arena's folder.
        config: what it keeps as config.json.
        rows: of all runs, as `evaluation.arena.run` returns them.
        capacities: rows of capacities, with the profile as ``arena_profile``, if they were searched.
        command: what makes the folder again.
    """
    table = arena.figures(rows)
    reference, loads = config["arena"]["reference"], sorted(config["arena"]["loads"])
    labels = list(dict.fromkeys(table["label"]))
    profiles = {str(name): own for name, own in table.groupby("profile", sort=False)}
    shown = [_ranked(objective, profiles, reference, loads) for objective in arena.OBJECTIVES]
    winners = [
        arena.winners_table(own, reference)._replace(title=f"Best in each suite, {_profile(name)}")
        for name, own in profiles.items()
    ]
    shown += [_fronts(profiles, reference), _capacities(capacities)]
    shown.append(Section("suites", "Best in each suite", "", (), winners))
    context = {
        "title": f"Arena: {len(labels)} schedulers on {table['suite'].nunique()} suites",
        "verdict": "",
        "summary": [_overview(table, reference), *(_leaders(name, own, reference) for name, own in profiles.items())],
        "matrices": [],
        "parts": shown,
        "comparisons": [],
        "times": [],
        "remarks": [],
        "settings": _settings(table, config),
        "command": command,
        "config": json.dumps(config, indent=1, sort_keys=True),
        "policies": labels,
    }
    for number_of, own in enumerate(profiles.values()):
        make_folder(directory / "figures")
        plot_front(own, reference).savefig(directory / f"figures/pareto-{number_of}.png", dpi=150)
    return write_page(directory, context, {})


def _profile(name: str) -> str:
    return "each suite's own profile" if name == "own" else f"`{name}`"


def _overview(table: pd.DataFrame, reference: str) -> str:
    seeds, runs = table["seed"].nunique(), len(table)
    few = "" if seeds >= MIN_SEEDS else f" There are no intervals below {MIN_SEEDS} seeds."
    return f"{runs:,} runs, compared with `{reference}` on the same requests of {seeds} seeds.{few}"


def _leaders(name: str, own: pd.DataFrame, reference: str) -> str:
    """The best by each objective on a profile, in a sentence."""
    said = []
    for objective in arena.OBJECTIVES:
        found = arena.ranking(own, objective, reference)
        tied = [s.label for s in found if s.tied]
        if tied:
            title = objective.title.partition(":")[0]
            said.append(f"{title}: {names(tied[:3])}{f' and {len(tied) - 3} more' if len(tied) > 3 else ''}")
    return f"Best on {_profile(name)}, and those not told from them. {'. '.join(said)}."


def _settings(table: pd.DataFrame, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    given = config["arena"]
    return [
        ("suites", ", ".join(given["suites"])),
        ("profiles", ", ".join(given["profiles"])),
        ("loads", ", ".join(f"{load:g}" for load in given["loads"]) + " of each fluid capacity"),
        ("seeds", f"{given['seeds']} from {given['first_seed']} on"),
        ("requests of a run", f"{given['num_requests']:,}; {given['session_requests']:,} turns of suites of sessions"),
        ("reference", given["reference"]),
    ]


def _ranked(
    objective: arena.Objective, profiles: Mapping[str, pd.DataFrame], reference: str, loads: Sequence[float]
) -> Section:
    found = [
        arena.ranking_table(objective, arena.ranking(own, objective, reference), loads, _capital(_profile(name)))
        for name, own in profiles.items()
    ]
    first = objective is arena.OBJECTIVES[0]
    return Section(objective.name.replace("_", "-"), objective.title, " ".join(HOW_TO_READ) if first else "", (), found)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _fronts(profiles: Mapping[str, pd.DataFrame], reference: str) -> Section:
    """Who is beaten by nobody in attainment, TTFT p99 and throughput at once, by profile."""
    charts, tables = [], []
    for number_of, (name, own) in enumerate(profiles.items()):
        charts.append(_front_chart(own, reference, f"pareto-{number_of}", _capital(_profile(name))))
        tables.append(_front_table(own, reference, _capital(_profile(name))))
    text = (
        "Nobody is better than these in attainment, TTFT p99 and throughput at once. It goes by means: a difference "
        "that no interval tells apart can put one on it. Those told output lengths are left out."
    )
    return Section("pareto", "Pareto fronts", text, charts, tables)


def _front_chart(own: pd.DataFrame, reference: str, name: str, title: str) -> Chart:
    """Attainment against TTFT p99, a point a scheduler that knows no lengths, throughput in what a pointer shows."""
    shown = {o.name: {s.label: s for s in arena.ranking(own, o, reference)} for o in arena.OBJECTIVES}
    front, traces, all_x = arena.front(own, reference), [], []
    for label, standing in shown["attainment"].items():
        if standing.clairvoyant:
            continue
        late_s, rate = shown["ttft_p99_s"][label].value, shown["throughput"][label].value
        all_x.append(late_s)
        text = f"<b>{escape(label)}</b><br>attainment {number(standing.value, 1)} %<br>TTFT p99 {number(late_s)} s"
        text += f"<br>throughput {number(rate, 0)} tokens/s"
        marker = {"size": [12 if label in front else 7]}
        place = {"x": [late_s], "y": [standing.value], "mode": "markers", "marker": marker}
        meta = {"policy": label, "slo": ALL, "thin": True}
        traces.append({"type": "scatter", **place, "text": [text], "hoverinfo": "text", "meta": meta})
    layout = {
        "xaxis": log_axis("TTFT p99 (s)", pd.Series(all_x), 1.4),
        "yaxis": axis("SLO attainment (%)", percent=True),
    }
    return Chart(name, title, "Better is up and left; large marks are on the front.", traces, layout)


def _front_table(own: pd.DataFrame, reference: str, title: str) -> Table:
    objectives = [objective for objective in arena.OBJECTIVES if objective.name in arena.FRONT]
    values = [{s.label: s.value for s in arena.ranking(own, objective, reference)} for objective in objectives]
    lines = [
        [
            Cell(label, kind=HEAD),
            *(Cell(number(v[label], o.digits)) for v, o in zip(values, objectives, strict=True)),
        ]
        for label in arena.front(own, reference)
    ]
    labels = ["scheduler", *(f"{o.title} ({o.unit})" for o in objectives)]
    return Table(title, [], labels, lines)


@draw.styled
def plot_front(own: pd.DataFrame, reference: str) -> Figure:
    """Attainment against TTFT p99 and against throughput; the front and the reference in colour, others grey."""
    objectives = {objective.name: objective for objective in arena.OBJECTIVES}
    values = {n: {s.label: s.value for s in arena.ranking(own, objectives[n], reference)} for n in arena.FRONT}
    best = arena.front(own, reference)
    named = list(dict.fromkeys([*best, reference]))
    knowing = set(own.loc[own["clairvoyant"], "label"])
    others = [label for label in values["attainment"] if label not in named and label not in knowing]
    figure = draw.new_figure(8.6, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for ax, name in zip(panels, ("ttft_p99_s", "throughput"), strict=True):
        x = values[name]
        ax.plot(
            [x[label] for label in others],
            [values["attainment"][label] for label in others],
            linestyle="none",
            marker="o",
            markersize=4,
            color=draw.GRID,
            markeredgecolor=draw.FAINT,
            markeredgewidth=0.6,
        )
        for label, style in draw.policy_styles(named).items():
            ax.plot([x[label]], [values["attainment"][label]], color=style.colour, marker=style.marker, markersize=8)
        ax.set_xlabel(f"{objectives[name].title} ({objectives[name].unit})")
    draw.log_scale(panels[0].xaxis, [v for label, v in values["ttft_p99_s"].items() if label not in knowing])
    panels[0].set_ylabel("SLO attainment (%)")
    panels[0].set_ylim(-2, max(102.0, float(np.max(list(values["attainment"].values())))))
    draw.legend(figure, named, [(draw.mark(marker="o", linestyle="none", color=draw.FAINT, markersize=4), "others")])
    return figure


def _capacities(capacities: Sequence[dict[str, Any]]) -> Section:
    """A table of capacities for each profile and suite, if there are any."""
    found: list[Table] = []
    if capacities:
        frame = pd.DataFrame(capacities)
        for column in ("capacity_qps", "ci_low", "ci_high"):
            frame[column] = pd.to_numeric(frame[column]).astype(float)
        for (profile, suite, criterion), own in frame.groupby(
            ["arena_profile", "arena_suite", "criterion"], sort=False
        ):
            ordered = own.sort_values("capacity_qps", ascending=False, na_position="last")
            found.append(
                capacity_table(str(criterion), ordered)._replace(
                    title=f"`{criterion}`, {suite}, {_profile(str(profile))}"
                )
            )
    return Section("capacity", "Capacity", "The largest rate that meets the criterion, with its interval.", (), found)
