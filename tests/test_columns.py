"""docs/columns.md has a line for every column of the files of results, with its type, and for nothing else."""

import json
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmsched_gym.config import SLO_CLASSES, scenario
from llmsched_gym.evaluation import arena
from llmsched_gym.evaluation.capacity import capacity
from llmsched_gym.evaluation.criteria import LATENCIES, OF_CLASSES
from llmsched_gym.evaluation.grid import evaluate
from llmsched_gym.evaluation.replay import replay
from llmsched_gym.report.statistics import comparison_table
from llmsched_gym.serving.saved import add_saved
from llmsched_gym.workload.served_runs import CSV_COLUMNS, load_run

PAGE = (Path(__file__).parents[1] / "docs" / "columns.md").read_text(encoding="utf-8")
SERVER, ARENA, REPLICAS = "Servers", "Arena", "Replicas"


def parts(text, marks):
    """What stands below each heading of that depth, by heading."""
    found = re.split(rf"^{marks} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def columns(text):
    """(type, criterion) of each column that the tables of a text have."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    found = {line[0].strip("`"): (line[1], (line[4:] or [""])[0].strip("`")) for line in lines}
    assert len(found) == len(lines), "a column stands twice"
    return found


def page(file, *left_out):
    """Types of the file's columns, without those of some sections."""
    text = next(text for title, text in parts(PAGE, "##").items() if title.startswith(f"`{file}`"))
    inner = parts(text, "###")
    texts = [text for title, text in inner.items() if title not in left_out] if inner else [text]
    return {name: kind for part in texts for name, (kind, _) in columns(part).items()}


def kind_of(kind):
    """A type of Arrow in the page's words; None: no figure was there to tell."""
    if pa.types.is_null(kind):
        return None
    if pa.types.is_list(kind):
        return f"list, {kind_of(kind.value_type)}"
    if pa.types.is_struct(kind):
        assert [kind.field(i).name for i in range(kind.num_fields)] == list(SLO_CLASSES)
        known = {kind_of(kind.field(i).type) for i in range(kind.num_fields)} - {None}
        return f"by class, {known.pop()}" if known else None
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    return "number" if pa.types.is_float64(kind) else f"number ({kind}32)"


def compare(table, listed):
    """A file's columns are those of the page, in any order, and what has a figure has the type that stands there."""
    assert set(table.column_names) == set(listed)
    for name in table.column_names:
        column = table.column(name)
        kind = kind_of(column.type)
        known = kind is not None and column.null_count < len(column)
        assert not known or listed[name] == kind, f"{name}: {listed[name]}, but the file has {kind}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("columns")


@pytest.mark.parametrize(("suite", "policy", "qps"), [("chat", "slai", 0.5), ("cluster", "jsq+slai", 3.0)])
def test_results_of_evaluate(suite, policy, qps, folder):
    out = folder / suite
    evaluate(scenario(suite, num_requests=20), [policy], qps=[qps], seeds=1, out=out)
    alone = () if suite == "cluster" else (REPLICAS,)
    compare(pq.read_table(out / "runs.parquet"), page("runs.parquet", SERVER, ARENA, *alone))
    of_others = {"reason", "sent_late_s", "num_chunks"} | ({"replica"} if alone else set())
    wanted = {name: kind for name, kind in page("requests.parquet").items() if name not in of_others}
    compare(pq.read_table(out / "requests.parquet"), wanted)
    for file in ("steps.parquet", "itl.parquet"):
        compare(pq.read_table(out / file), {name: kind for name, kind in page(file).items() if name not in of_others})
    rows = comparison_table(pq.read_table(out / "runs.parquet").to_pylist())
    compare(pa.Table.from_pandas(rows, preserve_index=False), page("tables/comparison.csv"))


@pytest.mark.filterwarnings("ignore::llmsched_gym.workload.TraceWarning")
def test_results_of_a_server(folder):
    bench = {"input_lens": [10, 20], "output_lens": [4, 3], "start_times": [100.0, 100.5], "ttfts": [0.2, 0.6]}
    file = folder / "bench.json"
    file.write_text(json.dumps(bench | {"itls": [[0.1, 0.2, 0.6], [0.3, 0.1]], "errors": ["", ""]}))
    add_saved(scenario("default"), file, "theirs", folder / "server")
    found = folder / "server" / "servers" / "theirs"
    compare(pq.read_table(found / "runs.parquet"), page("runs.parquet", REPLICAS, ARENA))
    wanted = {name: kind for name, kind in page("requests.parquet").items() if name != "replica"}
    compare(pq.read_table(found / "requests.parquet"), wanted)


def test_rows_of_an_arena(folder):
    world = {"suites": ("paper",), "profiles": ("own",), "loads": (0.5,), "seeds": 1, "num_requests": 10}
    rows = arena.run(arena.Arena(policies=("sarathi",), reference="sarathi", **world), folder / "arena")
    compare(pa.Table.from_pylist(rows), page("runs.parquet", REPLICAS, SERVER))


def test_what_capacities_are(folder):
    world = scenario("chat", num_requests=40)
    capacity(world, ["sarathi"], "attainment:0.5", qps=(0.3, 2.0), seeds=1, out=folder / "capacity")
    results = json.loads(next((folder / "capacity").glob("capacity-*.json")).read_text())["results"]
    assert results[0]["capacity_qps"] is not None
    compare(pa.Table.from_pylist(results), page("capacity-CRITERION.json"))


def test_requests_of_a_replay(folder):
    path = folder / "run.csv"
    lines = ["100,5,0.0,0.1,0.3,0.6", "50,4,1.0,1.1,1.2,1.5"]
    path.write_text("\n".join([",".join(CSV_COLUMNS), *lines]) + "\n")
    frame = replay(load_run(path), "vllm-v1", "rtx6000ada-mistral-7b").frame()
    compare(pa.Table.from_pandas(frame, preserve_index=False), page("requests.csv"))


def test_criteria_are_named_where_they_judge():
    named = {name: criterion for name, (_, criterion) in columns(parts(PAGE, "##")["`runs.parquet`"]).items()}
    wanted = {f"{metric}_{q}_s": f"{metric}.{q}" for metric, figures in LATENCIES.items() for q in figures}
    wanted |= {f"{m}_{q}_s_by_class": f"{m}.CLASS.{q}" for m, figures in OF_CLASSES.items() for q in figures}
    wanted |= {"slo_attainment": "attainment", "slo_attainment_by_class": "attainment.CLASS"}
    assert {name: criterion for name, criterion in named.items() if criterion} == wanted


def test_a_column_without_a_line_and_one_of_another_type_would_be_found():
    listed = page("itl.parquet")
    frame = pd.DataFrame({name: [1.0] for name in listed})
    with pytest.raises(AssertionError, match="but the file has number"):
        compare(pa.Table.from_pandas(frame), listed)
    with pytest.raises(AssertionError):
        compare(pa.Table.from_pandas(frame.assign(new=1.0)), listed)
