"""The report: figures checked by hand on tiny frames, and whole reports of made-up folders, degenerate ones too."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.lines import Line2D

from llmsched_gym.config import scenario
from llmsched_gym.files import encode
from llmsched_gym.fluid import fluid_capacity
from llmsched_gym.report import (
    batch_charts,
    bounds,
    chart,
    distance,
    draw,
    findings,
    load_charts,
    load_section,
    page,
    plots,
    request_charts,
    settings,
    statistics,
    tables,
)
from llmsched_gym.report.results import read_results
from llmsched_gym.report.text import estimate, load_label, number
from llmsched_gym.report.write import ReportError, write_report
from tests.report_folders import charts_of, itl_of, make_folder, own_parts, requests_of, row, steps_of

pytest.importorskip("plotly")


def line(table, policy, metric, load=None):
    own = table[(table["policy"] == policy) & (table["metric"] == metric)]
    own = own if load is None else own[own["load"] == load]
    assert len(own) == 1
    return own.iloc[0]


def test_figures_are_over_seeds_and_need_ten_for_an_interval():
    rows = [row("a", 1.0, s, ttft_s=0.1 * (s + 1)) for s in range(4)]
    few = line(statistics.comparison_table(rows), "a", "ttft_p50_s")
    assert few["value"] == pytest.approx(0.25) and few["num_seeds"] == 4
    assert math.isnan(few["low"]) and math.isnan(few["high"])
    rows = [row("a", 1.0, s, ttft_s=0.1 * (s + 1)) for s in range(10)]
    many = line(statistics.comparison_table(rows), "a", "ttft_p50_s")
    assert many["value"] == pytest.approx(0.55) and (many["low"], many["high"]) == pytest.approx((0.2, 0.9))
    rows = [row("a", 1.0, s, attained=0.1 * s) for s in range(10)]
    share = line(statistics.comparison_table(rows), "a", "slo_attainment")
    # t(9) = 2.262 times the standard error 0.3028 / sqrt(10)
    assert (share["value"], share["low"], share["high"]) == pytest.approx((0.45, 0.2334, 0.6666), abs=1e-3)


def test_classes_may_be_structs_or_text_and_are_left_out_where_there_is_nobody():
    rows = [row("a", 1.0, 0, strict=0.5), row("a", 1.0, 1)]
    as_text = [r | {k: json.dumps(v) for k, v in r.items() if k.endswith("_by_class")} for r in rows]
    for given in (rows, as_text):
        strict = line(statistics.comparison_table(given), "a", "slo_attainment_strict")
        assert strict["value"] == 0.5 and strict["num_seeds"] == 1
    table = statistics.comparison_table([row("a", 1.0, 0)])
    assert "slo_attainment_strict" not in set(table["metric"]) and "slo_attainment_relaxed" in set(table["metric"])


def test_a_missing_percentile_of_ttft_is_infinite():
    table = statistics.comparison_table(
        [row("a", 1.0, 0), row("a", 1.0, 1, ttft_s=None), row("b", 1.0, 0), row("b", 1.0, 1)]
    )
    lost = line(table, "a", "ttft_p50_s")
    assert math.isinf(lost["value"]) and not lost["best"]
    assert number(lost["value"]) == "∞"


def test_a_figure_says_on_how_many_seeds_it_is_infinite():
    rows = [row("a", 1.0, s, ttft_s=None if s < 3 else 0.1 * s, num_requests=5000) for s in range(10)]
    labels, cells = _printed(rows, "a")
    cell = dict(zip(labels, cells, strict=True))["p99 (s)"]
    assert cell.text == "7.50" and cell.interval == "4.00–∞; ∞ in 3 of 10 seeds"  # of 3 to 9 s and three infinite ones


@pytest.mark.parametrize(("num_requests", "grey"), [(999, True), (1000, False)])
def test_a_percentile_is_grey_below_100_samples_beyond_it_in_all_runs(num_requests, grey):
    rows = [
        row(p, 1.0, s, strict=0.5, num_requests=num_requests, ttft_s=t)
        for p, t in (("a", 0.4), ("b", 0.5))
        for s in range(10)
    ]
    table = statistics.comparison_table(rows)
    p99 = line(table, "a", "ttft_p99_s")
    assert p99["grey"] == grey and p99["best"] == (not grey)
    assert not line(table, "a", "ttft_p50_s")["grey"]
    assert line(table, "a", "itl_p99_s_strict")["grey"]  # 5,000 gaps: 50 beyond
    assert not line(table, "a", "itl_p99_s_relaxed")["grey"]  # 200,000
    cells = {label: cell for label, cell in zip(*_printed(rows, "a"), strict=True)}
    assert (cells["p99 (s)"].kind == tables.GREY) == grey


def _printed(rows, policy):
    df = statistics.tidy(rows)
    table = tables.comparison_tables(df, statistics.comparison_table(df))[0]
    return table.labels, next(cells for cells in table.rows if cells[0].text == policy)


def test_best_is_emphasised_and_what_cannot_be_told_apart_is_marked():
    noise = np.linspace(-0.05, 0.05, 10)
    rows = [row("best", 1.0, s, attained=0.90 + noise[s]) for s in range(10)]
    rows += [row("same", 1.0, s, attained=0.899 - noise[s]) for s in range(10)]
    rows += [row("worse", 1.0, s, attained=0.88 + noise[s]) for s in range(10)]  # paired: always 0.02 below
    table = statistics.comparison_table(rows)
    found = {p: tuple(line(table, p, "slo_attainment")[["best", "tied"]]) for p in ("best", "same", "worse")}
    assert found == {"best": (True, False), "same": (False, True), "worse": (False, False)}
    assert not line(table, "best", "kv_cache_usage_max")["best"]  # neither more nor less is better
    assert not table[table["metric"] == "itl_p99_s_relaxed"]["best"].any()  # all the same
    text = findings.summary(statistics.tidy(rows), table)[0]
    assert "`best` has the highest SLO attainment, 90.0 %" in text and "`same` cannot be told apart" in text


def test_ttft_reduction_is_the_ratio_of_means_over_common_seeds():
    rows = [row("sarathi", 1.0, s, ttft_s=1.0 + s) for s in range(3)]
    rows += [row("slai", 1.0, s, ttft_s=0.5 * (1.0 + s)) for s in range(4)]
    found = statistics.ttft_reduction(statistics.tidy(rows))
    assert found["policy"].tolist() == ["slai"]
    assert found["value"].iloc[0] == pytest.approx(0.5) and found["num_seeds"].iloc[0] == 3


def test_figures_beside_the_paper():
    rows = [row(p, q, 0, ttft_s=t) for q, t in ((1.6, 0.5), (1.8, 0.3)) for p, t in (("sarathi", 1.0), ("slai", t))]
    beside = statistics.reduction_against_reference(statistics.ttft_reduction(statistics.tidy(rows))).set_index("load")
    assert beside.index.tolist() == [1.6, 1.73, 1.8]  # 1.0 and 1.36 lie outside what was run
    assert beside.loc[1.6, "difference"] == pytest.approx(0.5 - 0.44)
    assert beside.loc[1.73, "ours"] == pytest.approx(0.5 + 0.2 * 0.65) and beside.loc[1.73, "interpolated"]
    capacity = pd.DataFrame(
        [
            {"policy": p, "criterion": "ttft-median", "capacity_qps": q, "ci_low": math.nan, "ci_high": math.nan}
            for p, q in (("sarathi", 1.4), ("slai", 1.68), ("mine", 2.0))
        ]
    )
    table = tables.capacity_reference_table(capacity)
    assert [[cell.text for cell in cells] for cells in table.rows] == [
        ["sarathi", "1.40", "1.36", "–", "+0.04"],
        ["slai", "1.68", "1.68", "–", "+0.00"],
        ["slai / sarathi", "1.20", "1.24", "1.26", "−0.04"],
    ]


def test_rates_drawn_per_seed_are_one_load_in_tables_and_bins_in_figures():
    rates = np.linspace(1.0, 2.2, 12)
    drawn = statistics.tidy([row(p, rates[s], s, requested=None) for p in "ab" for s in range(12)])
    assert drawn["load"].nunique() == 1
    bins = statistics.binned_loads(drawn)
    assert bins.groupby("load")["seed"].nunique().tolist() == [3, 3, 3, 3]
    assert bins["load"].min() == pytest.approx(rates[:3].mean())
    without = [{k: v for k, v in r.items() if k != "requested_qps"} for r in drawn.to_dict("records")]
    assert statistics.tidy(without)["drawn"].all()
    given = statistics.tidy([row("a", q, s) for q in (1.0, 2.0) for s in range(3)])
    assert sorted(given["load"].unique()) == [1.0, 2.0] and statistics.binned_loads(given) is given


@pytest.mark.parametrize(
    ("rows", "what"),
    [([], "policy"), ([{"policy": "a"}], "qps"), ([row("a", 1.0, 0), row("a", 1.0, 0)], "twice")],
)
def test_rows_that_make_no_table(rows, what):
    with pytest.raises(ReportError, match=what):
        statistics.comparison_table(rows)


def test_numbers_as_text():
    assert [number(v) for v in (0.09512, 0.4567, 12.34, 345.6, 12345.0, -0.5, math.nan)] == [
        "0.0951", "0.457", "12.3", "346", "12,345", "−0.500", "–",
    ]  # fmt: skip
    assert estimate(94.94, 93.8, 95.9, " %", 1) == "94.9 % [93.8–95.9]"
    assert estimate(1.0, -0.5, math.nan, "", 1) == "1.0"


def test_every_policy_has_a_style_of_its_own():
    policies = [*draw.STYLES, *(f"mine:Policy{i}" for i in range(20))]
    styles = draw.policy_styles(policies)
    assert len({(s.colour, s.marker) for s in styles.values()}) == len(policies)
    assert styles["slai"] == draw.policy_styles(["slai", "x"])["slai"]


def test_the_command_names_all_that_differs_from_the_suite(tmp_path):
    world = scenario("paper", num_requests=300, strict_share=0.2, patience_s=30.0, watermark=0.02, jitter=0.1)
    config = {"scenario": encode(world.to_dict()), "policies": ["slai[limit=6500,hold=true]", "sarathi"]}
    config |= {"qps": [1.0, 1.65], "seeds": 3, "first_seed": 7}
    command = settings.command(json.loads(json.dumps(config)), tmp_path / "out")
    assert command == (
        "llmsched evaluate --suite paper --policy 'slai[limit=6500,hold=true],sarathi' --no-bound --strict-share 0.2 "
        "--patience 30.0 --jitter 0.1 --set watermark=0.02 --qps 1,1.65 --num-requests 300 --seeds 3 "
        "--first-seed 7 --out out"
    )
    on_model = config | {"scenario": config["scenario"] | {"backend": "transformers", "model": "random:tiny"}}
    assert "--backend transformers --model random:tiny" in settings.command(on_model, tmp_path)
    assert "--no-bound" not in settings.command(on_model, tmp_path)
    cached = config | {"scenario": config["scenario"] | {"prefix_caching": True}}
    assert " --prefix-caching " in settings.command(cached, tmp_path)
    uncached = config | {"scenario": encode(scenario("chat", prefix_caching=False, num_requests=9).to_dict())}
    assert "--suite chat " in settings.command(uncached, tmp_path)
    assert " --no-prefix-caching " in settings.command(uncached, tmp_path)
    config["policies"].append("shortest-total[cap=0.9]")
    assert "--no-bound" not in settings.command(config, tmp_path)


class Page(HTMLParser):
    """Collects what a page would load, its ids and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "action", "poster") or (name == "href" and tag == "link"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href") and tag != "link":
                self.links.append(value)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A report of everything there can be: two policies, one of them with a name that needs escaping, two loads."""
    policies = ("sarathi", "slai", "my:Sched<b>[a=1,b=2]")
    rows = [
        row(p, q, s, ttft_s=0.4 * q / (1 + i), attained=0.95 - 0.1 * q + 0.001 * s * i, strict=0.8)
        for i, p in enumerate(policies)
        for q in (1.0, 1.6)
        for s in range(10)
    ]
    capacity = [
        {"policy": p, "criterion": c, "capacity_qps": q, "ci_low": None, "ci_high": None, "note": n}
        for c in ("ttft-median", "attainment:0.9")
        for p, q, n in (("sarathi", 1.4, None), ("slai", 1.7, None), (policies[2], None, "not met at any rate"))
    ]
    folder = make_folder(
        tmp_path_factory.mktemp("full") / "out",
        rows,
        steps=steps_of(policies, 1.0),
        itl=itl_of(policies, 1.0),
        capacity=capacity,
    )
    assert write_report(folder) == folder / "report.html"
    return folder


def test_the_page_loads_nothing_and_its_links_end_somewhere(full):
    html, data = own_parts(full)
    read = Page(html)
    assert read.loads == [] and "link" not in read.tags and read.tags.count("script") == 3
    assert not re.search(r"https?://|@import|url\(", html)
    assert len(set(read.ids)) == len(read.ids)
    assert all(link.startswith("#") and link[1:] in read.ids for link in read.links)
    assert "my:Sched&lt;b&gt;" in html and "Sched<b>" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert (full / "report.html").stat().st_size < 2_500_000
    assert set(data["policies"]) == {"sarathi", "slai", "my:Sched<b>[a=1,b=2]"}


def test_the_report_shows_every_part(full):
    html, text = ((full / f"report.{kind}").read_text() for kind in ("html", "md"))
    charts = charts_of(full)
    assert re.findall(r'class="canvas" data-chart="([^"]+)"', html) == list(charts)
    for name in (
        "slo-attainment",
        "slo-missed",
        "ttft-reduction",
        "itl-cdf-relaxed",
        "batches",
        "capacity-ttft-median",
    ):
        assert charts[name]["traces"]
    for part in (html, text):
        assert "llmsched evaluate --suite paper" in part
        assert "slai / sarathi" in part and "1.24" in part and "1.26" in part
        assert "not met at any rate" in part
        assert "the paper reports 53 %" in part
        assert "Greyed out" in part
        assert "p99 TTFT (s) by load" in part
    assert "| sarathi | 0.400 [0.400–0.400]" in text
    assert not list(full.rglob("*.partial"))


def test_every_trace_says_whose_it_is_and_has_finite_data_of_one_length(full):
    policies = set(own_parts(full)[1]["policies"])
    for found in charts_of(full).values():
        for trace in found["traces"]:
            meta = trace["meta"]
            assert meta.get("policy") in policies or meta["ink"] in page.INKS, found["name"]
            assert len({len(trace[k]) for k in ("x", "y", "customdata") if k in trace}) == 1, found["name"]
            assert "color" not in trace.get("line", {})  # colours are the page's


def test_data_cannot_end_the_script_that_holds_them():
    value = {"policy": "</script><!--<b>", "y": [1.5, None]}
    text = chart.embedded(value)
    assert json.loads(text) == value and "</" not in text and "<!--" not in text
    with pytest.raises(ValueError):
        chart.embedded([math.nan])


def test_charts_have_the_classes_that_rows_have(full):
    slos = {t["meta"]["slo"] for t in charts_of(full)["slo-attainment"]["traces"]}
    assert slos == {"all", "strict", "relaxed"}
    parts = {t["meta"]["part"] for t in charts_of(full)["requests"]["traces"]}
    assert parts == {"strict", "relaxed"}


def test_tables_have_twins_that_programs_read(full):
    comparison = pd.read_csv(full / "tables" / "comparison.csv")
    own = comparison[(comparison["policy"] == "slai") & (comparison["metric"] == "slo_attainment")]
    assert own["load"].tolist() == [1.0, 1.6] and own["value"].iloc[0] == pytest.approx(0.85 + 0.0045)
    matrix = pd.read_csv(full / "tables" / "p99-ttft-s-by-load-requests-s.csv")
    assert matrix["policy"].tolist()[:2] == ["sarathi", "slai"] and matrix["1.6"].tolist()[0] == 6.4
    assert (full / "tables" / "capacity-under-attainment-0.9.csv").exists()


def test_markdown_tables_are_rectangular(full):
    blocks, block = [], []
    for text in [*(full / "report.md").read_text().splitlines(), ""]:
        if text.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", text)))
        elif block:
            blocks.append(block)
            block = []
    assert len(blocks) >= 5 and all(len(set(b)) == 1 and len(b) > 2 for b in blocks)


def test_a_policy_that_never_serves_alone_at_one_load_is_still_a_report_and_always_the_same(tmp_path):
    lost = {"num_finished": 0, "num_abandoned": 100, "itl_p99_s_by_class": {"strict": None, "relaxed": None}}
    rows = [row("never", 1.5, 0, ttft_s=None, attained=0.0, mean_utility=-0.5, **lost)]
    written = []
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        folder = make_folder(tmp_path / parent / "out", rows, strict_share=0.0)
        write_report(folder, title="Nothing & nobody")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        written.append({path.relative_to(folder): path.read_bytes() for path in files})
    assert written[0] == written[1]
    text = (folder / "report.md").read_text()
    assert text.startswith("# Nothing & nobody") and "| never | ∞† | ∞† |" in text
    assert "Nothing &amp; nobody" in (folder / "report.html").read_text()
    assert not [name for name in charts_of(folder) if name.startswith("ttft")]  # nothing to draw
    assert "100.0 % under `never`" in text


def attainment(rows, **settings):
    columns = load_charts.by_class("slo_attainment", rows)
    return load_charts.against_load("a", rows, columns, "SLO attainment", "%", scale=100, percent=True, **settings)


def ttft(rows, percentile=50):
    columns = {"all": f"ttft_p{percentile}_s"}
    return load_charts.against_load("t", rows, columns, "TTFT", "TTFT (s, log scale)", log=True)


def test_charts_draw_what_there_is_and_nothing_where_there_is_nothing():
    one = statistics.tidy([row("a", 1.0, 0), row("never", 1.0, 0, ttft_s=None)])
    assert [t["y"] for t in ttft(one).traces] == [["a"], ["never"]] and ttft(one).layout["rows"] == 2
    two = statistics.tidy([row(p, q, 0, ttft_s=t) for q in (1.0, 2.0) for p, t in (("a", 0.3), ("never", None))])
    found = ttft(two, 99)
    assert found.layout["yaxis"]["type"] == "log" and found.layout["xaxis"]["title"]["text"] == "Load (requests/s)"
    lost = next(t for t in found.traces if t["meta"]["policy"] == "never")
    assert lost["meta"]["symbols"] == ["triangle-up-open"] * 2 and "∞" in lost["text"][0]
    top = 10 ** found.layout["yaxis"]["range"][1]
    assert all(top / 1.2 < y < top for y in lost["y"])  # infinite values stand inside the upper edge
    never = [row("never", 1.0, 0)]
    for nothing in (
        ttft(statistics.tidy([row("never", 1.0, 0, ttft_s=None)])),
        request_charts.ttft_cdf(requests_of(never, 20)),
        request_charts.ttft_by_prompt(requests_of(never, 20)),
        request_charts.scatter(requests_of(never, 20)),
        request_charts.itl_cdf(itl_of(["a"], 1.0, ["relaxed"]), "strict", 0.1),
        batch_charts.timeline(steps_of(["a"], 1.0), []),
        load_charts.reduction_chart(statistics.ttft_reduction(statistics.tidy([row("sarathi", 1.0, 0)]))),
    ):
        assert nothing is None


def test_misses_are_what_attainment_leaves_and_none_is_a_triangle():
    rows = statistics.tidy([row(p, q, 0, attained=a) for q in (1.0, 2.0) for p, a in (("a", 0.9), ("best", 1.0))])
    columns = {"all": "slo_attainment"}
    chart = load_charts.against_load("m", rows, columns, "missed", "%", scale=100, log=True, missed=True)
    a, best = chart.traces
    assert a["y"] == [10, 10] and a["meta"]["symbols"] == [None, None]
    assert best["y"] == [0.5, 0.5] and best["meta"]["symbols"] == ["triangle-down-open"] * 2  # half of 1 in 100
    assert "0" in best["text"][0] and 10 ** chart.layout["yaxis"]["range"][0] < 0.5


def test_the_summary_says_up_to_which_load_gaps_are_in_time(tmp_path):
    late = {"itl_p99_s_by_class": {"strict": 0.2, "relaxed": 0.3}}
    lost = {"itl_p99_s_by_class": {"strict": None, "relaxed": None}}
    rows = [row(p, q, 0, strict=0.5) for q in (1.0, 2.0) for p in ("good",)]
    rows += [row("half", 1.0, 0, strict=0.5), row("half", 2.0, 0, strict=0.5, **late)]
    rows += [row(p, q, 0, strict=0.5, **(late if p == "bad" else lost)) for q in (1.0, 2.0) for p in ("bad", "never")]
    text = findings.overall(read_results(make_folder(tmp_path / "out", rows)))[1]
    assert text.endswith("at all loads under `good`; up to 1 requests/s under `half`; at none under `bad` and `never`.")


def bounded_rows(better=0.0):
    """Two schedulers and the clairvoyant one, which attains 4 points more than slai, less `better`, at both loads."""
    attained = {"sarathi": 0.7, "slai": 0.9 + better, "shortest-total": 0.94}
    return [
        row(p, q, s, attained=a + 0.001 * s, strict=0.5)
        for p, a in attained.items()
        for q in (1.8, 2.2)
        for s in range(10)
    ]


def test_a_report_says_how_far_from_the_best(tmp_path):
    folder = make_folder(tmp_path / "out", bounded_rows())
    write_report(folder)
    text = (folder / "report.md").read_text()
    html = re.sub(r"</?(strong|code)>", "", (folder / "report.html").read_text())
    for part in (re.sub(r"[`*]", "", text), html):
        assert "sustains more than 2.01 requests/s" in part and "so does KV memory" in part
        assert "The highest load that was run is 110 % of it." in part
        assert "the best of the others attains 4.0 points [4.0–4.0] less at 2.2 requests/s (slai)" in part
        assert "slai has the highest SLO attainment" in part and "is possible" not in part
        assert "shortest-total (oracle) is told every output length" in part
        assert "1.8 (90 %)" in part and "2.2 (110 %)" in part
    assert "| slai | **−4.0** [−4.0 to −4.0] | **−4.0** [−4.0 to −4.0] |" in text
    assert "| shortest-total | 94.4 | 94.4 |" in text  # never emphasised
    assert html.count('"fluid capacity 2.01"') == 6  # charts


def test_a_scheduler_may_attain_more_than_the_clairvoyant_one(tmp_path):
    results = read_results(make_folder(tmp_path / "out", [r for r in bounded_rows(0.05) if r["seed"] < 3]))
    text = findings.overall(results)[1]
    assert "attains 1.0 points more at 2.2 requests/s (`slai`). More than `shortest-total` is possible" in text
    gaps = statistics.attainment_gap(results.rows)
    assert gaps["policy"].tolist() == ["sarathi", "slai"] * 2
    assert gaps["value"].tolist() == pytest.approx([-0.24, 0.01] * 2)


@pytest.mark.parametrize(
    "change",
    [
        {"scenario": None},
        {"scenario": {"trace": "no/such/trace.csv"}},
        {"scenario": {"frob": 1}},
        {"scenario": {"profile": "no-such-profile"}},
        {"scenario": {"backend": "transformers"}},
    ],
)
def test_without_a_fluid_capacity_there_is_still_a_report(tmp_path, change):
    folder = make_folder(tmp_path / "out", [row(p, q, 0) for p in ("slai", "sarathi") for q in (1.8, 2.2)])
    path = folder / "config.json"
    config = json.loads(path.read_text())
    scenario_fields = change["scenario"] and config["scenario"] | change["scenario"]
    path.write_text(json.dumps(config | {"scenario": scenario_fields}))
    assert read_results(folder).fluid is None
    text = write_report(folder).read_text()
    assert "luid capacity" not in text and "How far from the best" not in text


def test_charts_show_the_fluid_capacity_near_their_loads():
    fluid = fluid_capacity(scenario("paper"))
    assert bounds.shown_capacity(fluid, [1.0, 1.8]) == fluid.qps
    assert bounds.shown_capacity(fluid, [1.0, 1.6]) is bounds.shown_capacity(fluid, [3.0]) is None
    assert bounds.shown_capacity(None, [1.8]) is None
    two = statistics.tidy([row(p, q, 0) for q in (1.0, 1.8) for p in ("a", "shortest-total")])
    layout = attainment(two, fluid_qps=2.0).layout
    assert layout["annotations"][0]["text"] == "fluid capacity 2.00" and layout["shapes"][0]["x0"] == 2.0
    assert not attainment(two).layout["shapes"]
    figure = plots.plot_attainment(two, fluid_qps=2.0)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "fluid capacity, 2.00 requests/s" in labels and "shortest-total (oracle)" in labels


def test_shares_by_prompt_length_are_of_tenths():
    lengths = np.arange(1, 101)
    requests = pd.DataFrame({"policy": "a", "prompt_tokens": lengths, "attained": lengths <= 25, "phase": "finished"})
    shares = request_charts.share_by_prompt(requests, "a").traces[0]["y"]
    assert shares == pytest.approx([100, 100, 50, 0, 0, 0, 0, 0, 0, 0])
    same = requests.assign(prompt_tokens=7)
    assert request_charts.share_by_prompt(same, "a").traces[0]["y"] == pytest.approx([25])


def test_the_scatter_marks_misses_and_leaves_few_of_them_out():
    requests = requests_of([row(p, 1.0, s) for p in "ab" for s in range(3)], 1000)
    requests = requests.assign(attained=np.arange(len(requests)) % 20 > 0)
    chart = request_charts.scatter(requests)
    points = {(t["meta"]["policy"], t["meta"]["missed"]): 0 for t in chart.traces}
    for trace in chart.traces:
        points[trace["meta"]["policy"], trace["meta"]["missed"]] += len(trace["x"])
    assert points == {(p, True): 150 for p in "ab"} | {(p, False): 850 for p in "ab"}
    assert "1,000 are shown" in chart.caption and len(chart.traces[0]["customdata"][0]) == len(chart.layout["figures"])


def test_batches_are_averaged_over_busy_time():
    steps = pd.DataFrame({"start_s": [0.0, 1.5], "duration_s": [1.0, 0.5], "decode_tokens": [10, 30]})
    assert batch_charts.averaged(steps, "decode_tokens", np.array([0.0, 1.0, 2.0, 3.0])) == pytest.approx([10, 30, 0])
    assert batch_charts.averaged(steps, "decode_tokens", np.array([0.0, 2.0])) == pytest.approx([(10 + 15) / 1.5])


@pytest.mark.parametrize("missing", ["runs.parquet", "requests.parquet", "config.json"])
def test_a_folder_without_a_file_is_one_line(tmp_path, missing):
    folder = make_folder(tmp_path / "out", [row("a", 1.0, 0)])
    (folder / missing).unlink()
    with pytest.raises(ReportError, match=missing) as error:
        write_report(folder)
    assert "\n" not in str(error.value) and isinstance(error.value, ValueError)


def test_broken_files_and_no_folder_are_one_line(tmp_path):
    with pytest.raises(ReportError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    folder = make_folder(tmp_path / "out", [row("a", 1.0, 0)])
    for name in ("config.json", "requests.parquet", "capacity.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(b"{ no")
        with pytest.raises(ReportError, match=re.escape(name)) as error:
            read_results(folder)
        assert "\n" not in str(error.value)
        if before is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(before)
    assert read_results(folder).focus == 1.0


def settings_of(folder):
    return dict(settings.settings(read_results(folder)))


def test_the_head_says_what_was_run_not_what_the_suite_would_do(tmp_path):
    rows = [row("a", q, s, arrivals="gamma") for q in (1.0, 2.0) for s in range(2)]
    found = settings_of(make_folder(tmp_path / "one", rows, arrivals="gamma", burstiness=0.25, warmup_s=30.0))
    assert found["Suite"] == "paper" and found["Arrivals"] == "gamma of shape 0.25 at 1, 2 requests/s"
    assert found["Around them"] == "30 s of warm-up; no arrivals behind them, until all are served"
    assert found["Engine"].startswith("14,733 KV blocks, max_num_seqs 128, max_num_batched_tokens 8,192, max_model_len")
    kept = [row("a", 5.9, s, requested=None, arrivals="trace", profile="a100-mistral-7b") for s in range(10)]
    folder = make_folder(tmp_path / "two", kept, num_kv_blocks=2000)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"trace_remarks": ["its 20 requests start over"]}))
    found = settings_of(folder)
    assert found["Arrivals"] == "the trace's own times, as they are" and found["Engine"].startswith("2,000 KV blocks")
    assert found["Cost profile"] == "a100-mistral-7b (linear layers measured, attention a roofline)"
    assert found["Trace"] == "its 20 requests start over"
    assert load_label(read_results(folder).rows, 5.9) == "the trace's own 5.9 requests/s"


def test_there_are_no_intervals_where_all_seeds_have_the_same_requests(tmp_path):
    rows = [
        row(p, 5.9, s, requested=None, arrivals="trace", attained=0.8 + 0.01 * s, ttft_s=t)
        for p, t in (("sarathi", 0.5), ("slai", 0.4))
        for s in range(10)
    ]
    assert statistics.comparison_table(rows)[["low", "high"]].isna().all(axis=None)
    assert statistics.ttft_reduction(statistics.tidy(rows))[["low", "high"]].isna().all(axis=None)
    folder = make_folder(tmp_path / "out", rows)
    text = write_report(folder).with_suffix(".md").read_text()
    assert "all seeds have the same requests" in text and "bootstrap" not in text and "Ranges are 95 %" not in text
    drawn = statistics.comparison_table([r | {"arrivals": "poisson"} for r in rows])
    assert drawn["low"].notna().any()


def test_rejections_name_the_setting(tmp_path):
    rows = [row("a", 1.0, s, num_rejected=3, num_too_long=2) for s in range(2)]
    results = read_results(make_folder(tmp_path / "out", rows, max_model_len=4000))
    text = " ".join(findings.remarks(results, statistics.comparison_table(results.rows)))
    assert "3.00 % of requests were rejected on arrival" in text and "p99 TTFT is infinite" in text
    assert "2.00 % are longer than `max_model_len=4000`; 1.00 % need more KV blocks than there are" in text


def test_a_capacity_above_the_fluid_one_is_remarked_on(tmp_path):
    capacity = [
        {"policy": p, "criterion": "ttft-median", "capacity_qps": q, "ci_low": None, "ci_high": None}
        | {"attained_by_decile": [1.0] * 9 + [0.25]}
        for p, q in (("slai", 1.7), ("on-time", 2.31))
    ]
    rows = [row(p, q, 0) for p in ("slai", "on-time") for q in (1.8, 2.2)]
    folder = make_folder(tmp_path / "out", rows, capacity=capacity)
    text = write_report(folder).with_suffix(".md").read_text()
    assert "Above the fluid capacity, 2.01: `on-time` 2.31." in text
    assert "long prompts that starve (of the tenth with the longest prompts 25 % attain)" in text
    figure = plots.plot_capacity(read_results(folder).capacity, fluid_qps=2.01)
    assert "fluid capacity, 2.01 requests/s" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_equal_figures_are_emphasised_alike(tmp_path):
    rows = [row(p, q, 0, attained=a) for q in (1.0, 2.0) for p, a in (("a", 0.90001), ("b", 0.90004), ("c", 0.8))]
    matrix = tables.attainment_matrix(statistics.tidy(rows))
    assert [[cell.kind for cell in cells[1:]] for cells in matrix.rows] == [["best"] * 2, ["best"] * 2, [""] * 2]
    bounded = [*rows, *(row("shortest-total", q, 0, attained=0.95) for q in (1.0, 2.0))]
    gaps = distance.gap_table(read_results(make_folder(tmp_path / "out", bounded)))
    assert [[cell.kind for cell in cells[1:]] for cells in gaps.rows] == [["best"] * 2, ["best"] * 2, [""] * 2]


def test_marks_beyond_the_axes_stand_inside_them_and_captions_speak_of_no_others():
    rows = [row(p, q, 0, ttft_s=t) for q in (1.0, 2.0) for p, t in (("sarathi", 0.3), ("never", None), ("slow", 9.0))]
    two = statistics.tidy(rows)
    for figure in (plots.plot_ttft(two, 99), plots.plot_ttft_reduction(statistics.ttft_reduction(two))):
        figure.draw_without_rendering()
        ax = figure.axes[0]
        low, high = ax.get_window_extent().intervaly
        marks = [line for line in ax.lines if line.get_marker() in "^v" and line.get_linestyle() == "None"]
        assert marks
        for line in marks:
            middle = line.get_transform().transform(line.get_xydata())[:, 1]
            half = line.get_markersize() / 2 / 72 * figure.dpi
            assert (middle + half <= high + 1).all() and (middle - half >= low - 1).all()
    assert "Triangles" in load_section.infinite(two, 99) and "Triangles" in load_section.reduction(two).caption
    lowest = load_section.reduction(two).traces
    assert any("triangle-down-open" in t["meta"]["symbols"] for t in lowest)
    fine = statistics.tidy([r for r in rows if r["policy"] == "sarathi"] + [row("slai", q, 0) for q in (1.0, 2.0)])
    assert load_section.infinite(fine, 99) == "" and "Triangles" not in load_section.reduction(fine).caption


def test_a_figure_of_one_load_shows_whole_marks_and_intervals():
    shares = {"all": 1.0, "none": 0.0}
    one = statistics.tidy(
        [row(p, 1.0, s, attained=a, ttft_s=0.3 + 0.3 * s) for p, a in shares.items() for s in range(10)]
    )
    axes = plots.plot_attainment(one).axes[0]
    assert all(not line.get_clip_on() for line in axes.lines if line.get_marker() in Line2D.filled_markers)
    axes = plots.plot_ttft(one).axes[0]
    low, high = axes.get_xlim()
    ends = [x for line in axes.lines for x in line.get_xdata()]
    assert low < min(ends) and max(ends) < high
    slow = [row("sarathi", 1.0, 0, ttft_s=0.1), row("slow", 1.0, 0, ttft_s=90.0), row("slai", 1.0, 0, ttft_s=0.05)]
    axes = plots.plot_ttft_reduction(statistics.ttft_reduction(statistics.tidy(slow))).axes[0]
    assert axes.get_xlim()[0] >= -66 and "◂ −89,900" in [t.get_text().replace("-", "−") for t in axes.texts]


def test_a_folder_keeps_its_fluid_capacity(tmp_path):
    fluid = fluid_capacity(scenario("paper"))
    folder = make_folder(tmp_path / "out", [row("slai", 1.8, 0)])
    config = json.loads((folder / "config.json").read_text())
    kept = json.loads(json.dumps(dataclasses.asdict(fluid) | {"qps": 9.99}))
    (folder / "config.json").write_text(json.dumps(config | {"fluid": kept}))
    assert read_results(folder).fluid.qps == 9.99


# Sessions and the prefix cache


def of_sessions(policy, qps, seed, **fields):
    """A run of 100 turns of 25 sessions with a prefix cache."""
    found = dict(num_cancelled=4, num_to_come=0, num_sessions=25, session_on_time=0.8)
    found |= dict(session_p50_s=100.0, session_p99_s=400.0, prefix_hit_rate=0.75)
    found |= dict(num_cached_tokens=30_000, num_recached_tokens=1_000, computed_tokens=10_000)
    return row(policy, qps, seed, **(found | fields))


def test_the_table_of_sessions_has_means_of_shares_and_medians_of_times():
    rows = [of_sessions("a", 0.5, s, session_on_time=0.1 * s, session_p50_s=t) for s, t in enumerate((1.0, 2.0, 9.0))]
    table = tables.session_table(statistics.tidy(rows))
    labels = ["policy", "load (sessions/s)", "on time (%)", "p50 (s)", "p99 (s)", "cancelled (%)", "hit rate (%)"]
    assert table.labels == [*labels, "saved (1000)", "saved after preemptions (1000)", "computed (1000)"]
    assert [c.text for c in table.rows[0]] == ["a", "0.5", "10.0", "2.00", "400", "4.0", "75.0", "30", "1", "10"]
    assert [c.kind for c in table.rows[0][2:5]] == ["", "grey", "grey"]  # 37 of 75 sessions lie beyond the median
    assert sum(span for _, span in table.groups) == len(table.labels) and "†" in table.notes[-1]


def test_what_is_not_there_is_left_out_of_the_table_of_sessions():
    no_cache = dict(prefix_hit_rate=None, num_cached_tokens=None, num_recached_tokens=None)
    no_turns = dict(num_sessions=None, session_on_time=None, session_p50_s=None, session_p99_s=None, num_cancelled=0)
    alone = tables.session_table(statistics.tidy([of_sessions("a", 0.5, 0, **no_cache)]))
    assert alone.labels[2:] == ["on time (%)", "p50 (s)", "p99 (s)", "cancelled (%)"]
    cached = tables.session_table(statistics.tidy([of_sessions("a", 0.5, 0, **no_turns)]))
    assert cached.labels[1:3] == ["load (requests/s)", "hit rate (%)"] and not cached.notes
    neither = statistics.tidy([of_sessions("a", 0.5, 0, **no_cache, **no_turns)])
    assert tables.session_table(neither) is None
    assert tables.session_table(statistics.tidy([row("a", 0.5, 0)])) is None  # rows made before there were such columns


def test_loads_at_which_everything_is_infinite_are_within_the_axes():
    rows = statistics.tidy([row("a", 1.0, 0), row("a", 8.0, 0, ttft_s=None), row("b", 1.0, 0), row("b", 8.0, 0)])
    for given in (rows, rows[rows["policy"] == "a"]):
        low, high = plots.plot_ttft(given).axes[0].get_xlim()
        assert low < 1.0 and 8.0 < high < 9.0


def test_loads_of_sessions_are_sessions_per_second():
    rows = statistics.tidy([of_sessions("a", q, s) for q in (0.5, 1.0) for s in range(2)])
    assert load_label(rows, 0.5) == "0.5 sessions/s" and load_label(rows, 1.0) == "1 session/s"
    assert attainment(rows).layout["xaxis"]["title"]["text"] == "Load (sessions/s)"


def test_a_report_of_sessions(tmp_path):
    from llmsched_gym.evaluation.grid import evaluate

    # overloaded: some turns are abandoned, and those behind them cancelled
    world = scenario("chat", num_requests=150, warmup_s=0.0, patience_s=1.0)
    rows = evaluate(world, ["slai", "vllm-v1"], qps=[0.5, 3.0], seeds=1, out=tmp_path)
    assert max(r["num_cancelled"] for r in rows) > 0
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Sessions and prefix cache" in text and "requests/s" not in text.replace("(requests/s)", "")
    assert "0.5, 3 sessions/s" in text and "cancelled" in text and "ms per new prompt token" in text
    assert charts_of(tmp_path).keys() >= {"sessions-on-time", "prefix-hit-rate"}
    assert not [a for a in charts_of(tmp_path)["goodput"]["layout"]["annotations"] if "fluid" in a["text"]]

    for name in ("runs", "requests"):  # a folder made before there were such columns
        path = tmp_path / f"{name}.parquet"
        frame = pd.read_parquet(path)
        new = [c for c in frame if re.match("num_cancelled|num_to_come|num_sess|session|prefix_hit|turn|new_tok", c)]
        frame.drop(columns=[*new, *(c for c in frame if "cached" in c or c == "computed_tokens")]).to_parquet(path)
    write_report(tmp_path)
    assert "Sessions" not in (tmp_path / "report.md").read_text()
