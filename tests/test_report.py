"""A whole report of a made-up folder: the page, its charts, tables and the Markdown."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from llmsched_gym.config import scenario
from llmsched_gym.files import encode
from llmsched_gym.report import (
    chart,
    draw,
    page,
    settings,
)
from llmsched_gym.report.write import write_report
from tests.report_folders import charts_of, itl_of, make_folder, own_parts, row, steps_of

pytest.importorskip("plotly")


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


def test_the_command_of_replicas_names_routers_and_schedulers(tmp_path):
    world = scenario("cluster", workload="chat", num_requests=150, num_replicas=2)
    config = {"scenario": encode(world.to_dict()), "seeds": 3, "qps": [3.0]}
    policies = ["jsq+slai[hold=true]", "session[slack=4]+slai[hold=true]"]
    assert settings.command(config | {"policies": policies}, tmp_path / "out") == (
        "llmsched evaluate --suite cluster --router 'jsq,session[slack=4]' --policy 'slai[hold=true]' --workload chat "
        "--set num_replicas=2 --qps 3 --num-requests 150 --seeds 3 --out out"
    )
    for others in (["jsq+slai", "session+sarathi"], ["slai"], []):  # what no options of routers and schedulers name
        assert settings.command(config | {"policies": others}, tmp_path) is None


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
