"""What ``vllm bench serve --save-detailed`` has measured, as a run of ours: the same rows, by the same rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llmsched_gym.config import Scenario
from llmsched_gym.evaluation.cells import Cell
from llmsched_gym.evaluation.store import Store, claim_results
from llmsched_gym.serving.join import check_same
from llmsched_gym.serving.labels import check_label, config_of, keep, label_folder
from llmsched_gym.serving.load import Run
from llmsched_gym.serving.stream import CHUNK, Answer
from llmsched_gym.text import shown
from llmsched_gym.workload import RequestTable
from llmsched_gym.workload.served_runs import ServedRun, load_run
from llmsched_gym.workload.traces import TraceError


def read_saved(path: str | Path, scenario: Scenario) -> Run:
    """The run of a result file; :class:`TraceError` for a file that does not have the times of all chunks.

    All users are relaxed ones of `scenario`. Requests that failed are misses; what they would have been told is not in
    the file, and taken for one token.
    """
    with_gaps = load_run(path)
    if with_gaps.itl_s is None or with_gaps.failed_arrival_s is None or with_gaps.failed_prompt_tokens is None:
        raise TraceError(
            f"{path}: expected the JSON of `vllm bench serve --save-detailed`, got {shown(with_gaps.name)}"
        )
    answers = [_answer(with_gaps, r) for r in range(len(with_gaps))]
    for time_s in with_gaps.failed_arrival_s.tolist():
        answers.append(Answer(sent_s=time_s, ended_s=time_s, reason="failed"))
    arrival_s = np.concatenate([with_gaps.arrival_s, with_gaps.failed_arrival_s])
    prompt = np.concatenate([with_gaps.prompt_tokens, with_gaps.failed_prompt_tokens])
    output = np.array([max(1, answer.num_tokens) for answer in answers], np.int32)
    order = np.argsort(arrival_s, kind="stable")
    n, span_s = len(order), float(np.ptp(arrival_s))
    table = RequestTable.of(
        arrival_s[order],
        prompt[order],
        output[order],
        ttft_slo_s=scenario.ttft_slo_s + scenario.ttft_slo_per_token_s * prompt[order],
        tbt_slo_s=scenario.relaxed_tbt_slo_s,
        qps=(n - 1) / span_s if span_s > 0.0 else np.nan,
        arrivals="saved",
    )
    unknown: dict[str, Any] = {"round_trip_p50_s": None, "metrics_agree": None, "metrics": ""}
    chosen: list[Answer | None] = [answers[r] for r in order]
    return Run(table, chosen, table.arrival_s, np.zeros(n, np.bool_), with_gaps.end_s, counters=unknown)


def _answer(run: ServedRun, r: int) -> Answer:
    assert run.itl_s is not None
    chunk_s = run.first_token_s[r] + np.concatenate([[0.0], np.cumsum(run.itl_s[r])])
    answer = Answer(
        sent_s=float(run.arrival_s[r]),
        ended_s=float(run.last_token_s[r]),
        chunk_s=chunk_s.tolist(),
        counts=[1] * len(chunk_s),
        num_tokens=len(chunk_s),
        total_tokens=int(run.output_tokens[r]),
        counted_by=CHUNK,
        is_done=True,
        prompt_tokens=int(run.prompt_tokens[r]),
    )
    answer.settle(max(int(run.output_tokens[r]), len(chunk_s)))
    return answer


def add_saved(scenario: Scenario, path: str | Path, label: str, out: str | Path) -> list[dict[str, Any]]:
    """Keep the run of a result file in `out` under a label; its row."""
    check_label(label)
    claim_results(out)
    run = read_saved(path, scenario)
    world = scenario.replace(num_requests=len(run.table), qps=None)
    settings: dict[str, Any] = {
        "qps": None,
        "seeds": 1,
        "first_seed": 0,
        "trace_remarks": [],
        "setup": f"{label}: measured by vllm bench serve, {Path(path).name}",
    }
    config = config_of(world, label, None, settings)
    check_same(out, label, config)
    store = Store(label_folder(out, label), config)
    try:
        done = store.open()
        if 0 not in done:
            done[0] = keep(store, Cell(0, label, None, 0, ("itl", "requests")), run, world, None)
        rows = [done[0]]
        if not store.complete:
            store.finish(rows)
        return rows
    finally:
        store.close()
