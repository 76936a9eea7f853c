"""Why the worst requests missed their SLOs: their lives, batch by batch, as ``lives.json`` keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsched_gym.report.chart import Chart, axis, values
from llmsched_gym.report.tables import HEAD, Cell, Table
from llmsched_gym.report.text import number

MOST = 24
"""Lives that a report shows."""
KINDS = {
    "queue": ("in the queue", "waiting"),
    "prefill": ("prefill", "prefill"),
    "decode": ("decode", "decode"),
    "held": ("held back", "held"),
    "preempted": ("preempted", "lost"),
}
"""Kinds of segments: in words, and their colour."""


def shown(lives: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many lives as a report shows: the first of every policy, then the second ones."""
    place: dict[str, int] = {}
    ranked = []
    for life in lives:
        place[life["policy"]] = place.get(life["policy"], 0) + 1
        ranked.append((place[life["policy"]], life))
    most = sorted(rank for rank, _ in ranked)[:MOST][-1] if ranked else 0
    return [life for rank, life in ranked if rank <= most][:MOST]


def label(life: dict[str, Any]) -> str:
    """What the menu calls a life."""
    return f"{life['policy']}: request {life['index']} ({life['slo_class']})"


def spent(life: dict[str, Any], before: float = float("inf")) -> dict[str, float]:
    """Seconds of a life by kind, of its first `before` seconds."""
    found = dict.fromkeys(KINDS, 0.0)
    for start_s, stop_s, kind, *_ in life["segments"]:
        found[kind] += max(0.0, min(stop_s, before) - min(start_s, before))
    return found


def why(life: dict[str, Any]) -> str:
    """Why a request missed its SLOs, in a sentence or two; where it did not, that."""
    parts = []
    ttft_s, slo_s = life["ttft_s"], life["ttft_slo_s"]
    if ttft_s is None:
        left = "left" if life["phase"] == "abandoned" else life["phase"]
        parts.append(f"No first token within its SLO of {number(slo_s)} s, nor ever ({left}): {_most(spent(life))}.")
    elif ttft_s > slo_s:
        late = f"First token after {number(ttft_s)} s, SLO {number(slo_s)} s"
        parts.append(f"{late}: {_most(spent(life, ttft_s))}.")
    longest, tbt_s = life["longest"], life["tbt_slo_s"]
    if life["num_late_gaps"] and longest:
        parts.append(f"{life['num_late_gaps']:,} gaps beyond {number(tbt_s)} s, the longest {_gap(longest)}.")
    if ttft_s is not None and life["phase"] != "finished":
        parts.append(f"Ended {life['phase']} after {life['num_output_tokens']:,} of {life['output_tokens']:,} tokens.")
    if not parts:
        parts.append("In time." if life["attained"] else "Missed by its mean gap.")
    return " ".join(parts)


def _most(seconds: dict[str, float]) -> str:
    """What took that time, the longest first."""
    total = sum(seconds.values())
    told = sorted(((s, kind) for kind, s in seconds.items() if s > 0.05 * total), reverse=True)
    return ", ".join(f"{number(s)} s {KINDS[kind][0]} ({100 * s / total:.0f} %)" for s, kind in told) or "at once"


def _gap(longest: dict[str, Any]) -> str:
    """The longest gap and what lay in it."""
    text = f"{number(longest['gap_s'])} s before token {longest['token']:,}: "
    if longest["preempted"]:
        return text + f"preempted, and computed again after {longest['held']:,} batches of others"
    if longest["held"]:
        return text + f"held back for {longest['held']:,} batches"
    return text + f"one batch with {longest['prefill_tokens']:,} prompt tokens of others"


def table(lives: Sequence[dict[str, Any]]) -> Table | None:
    """The lives, one a line: how long each took, where the time went, and why it missed."""
    if not lives:
        return None
    labels = ["policy", "request", "users", "prompt (tokens)", "TTFT (s)", "its SLO (s)"]
    labels += [f"{words} (s)" for words, _ in KINDS.values()] + ["why it missed"]
    lines = []
    for life in shown(lives):
        ttft = number(float("inf") if life["ttft_s"] is None else life["ttft_s"])
        cells = [Cell(life["policy"], kind=HEAD), Cell(str(life["index"])), Cell(life["slo_class"])]
        cells += [Cell(f"{life['prompt_tokens']:,}"), Cell(ttft), Cell(number(life["ttft_slo_s"]))]
        cells += [Cell(number(seconds, 2)) for seconds in spent(life).values()]
        cells += [Cell(why(life), kind="said")]
        lines.append(cells)
    groups = [("", 4), ("First token", 2), ("Where its time went", len(KINDS)), ("", 1)]
    return Table("The worst requests of each policy", groups, labels, lines)


def chart(lives: Sequence[dict[str, Any]]) -> Chart | None:
    """A request at a time: what it did when, above how long the batches of that time took."""
    chosen = shown(lives)
    if not chosen:
        return None
    traces: list[dict[str, Any]] = []
    names = [words for words, _ in KINDS.values()]
    for life in chosen:
        pick = {"pick": label(life)}
        key = {"life": f"{life['policy']}/{life['seed']}/{life['index']}"}
        for kind, (words, ink) in KINDS.items():
            own = [segment for segment in life["segments"] if segment[2] == kind]
            trace: dict[str, Any] = {"type": "bar", "orientation": "h", "yaxis": "y", "width": 0.7}
            trace |= {"base": values(s[0] for s in own), "x": values(s[1] - s[0] for s in own), "y": [words] * len(own)}
            trace["customdata"] = [[s[1] - s[0], s[3], s[4]] for s in own]
            trace["hovertemplate"] = (
                f"{words}: %{{customdata[0]:.3~g}} s from %{{base:.3~f}} s on<br>"
                "%{customdata[1]:,} batches, %{customdata[2]:,} tokens<extra></extra>"
            )
            traces.append(trace | {"meta": {"ink": ink} | pick | key})
        due: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines",
            "x": [life["ttft_slo_s"]] * 2,
            "y": [names[0], names[-1]],
        }
        due |= {"line": {"dash": "dash", "width": 1.4}, "hovertemplate": "first token due: %{x:.3~g} s<extra></extra>"}
        traces.append(due | {"meta": {"ink": "ink"} | pick})
        batches = life["batches"]
        line: dict[str, Any] = {"type": "scatter", "mode": "lines", "yaxis": "y2", "line": {"shape": "hv", "width": 1}}
        line |= {"x": values(b[0] for b in batches), "y": values(b[1] for b in batches)}
        line["customdata"] = [[b[2]] for b in batches]
        line["hovertemplate"] = "batch of %{y:.3~g} s, %{customdata[0]:,} prompt tokens<extra></extra>"
        traces.append(line | {"meta": {"ink": "kv"} | pick})
        end_s = max([1e-3, *(s[1] for s in life["segments"])])
        slo: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines",
            "yaxis": "y2",
            "x": [0, end_s],
            "y": [life["tbt_slo_s"]] * 2,
        }
        slo |= {"line": {"dash": "dot", "width": 1.4}, "hovertemplate": "TBT SLO %{y:.3~g} s<extra></extra>"}
        traces.append(slo | {"meta": {"ink": "lost"} | pick})
    layout = {
        "xaxis": axis("Time since its arrival (s)", anchor="y2", rangemode="tozero"),
        "yaxis": {"domain": [0.42, 1.0], "categoryorder": "array", "categoryarray": names[::-1], "type": "category"},
        "yaxis2": axis("Batch time (s)", domain=[0.0, 0.32], rangemode="tozero"),
        "barmode": "overlay",
        "height": 380,
    }
    layout["notes"] = {label(life): why(life) for life in chosen}
    text = (
        "Dashed: when its first token was due; dotted: the longest gap allowed. Below: every batch while it was there."
    )
    return Chart("lives", "The life of a request", text, traces, layout, wide=True, pick=[label(x) for x in chosen])


def section_text(lives: Sequence[dict[str, Any]], where: str) -> str:
    """What the part on lives says of itself."""
    first = shown(lives)[0]
    return (
        f"Of seed {first['seed']} at {where}, each policy's requests that were latest in all, relative to their TTFT "
        "SLO, and by late gaps, run again with every batch recorded. A click on a line shows that life."
    )
