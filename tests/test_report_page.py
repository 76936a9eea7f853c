"""The page as a browser shows it: skipped where there is no Chromium (Debian: `apt install chromium`)."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from llmsched_gym.report.write import write_report
from tests.report_folders import charts_of, itl_of, make_folder, row, steps_of

pytest.importorskip("plotly")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

USE = """
<script>
(async () => {
  const drawn = async () => {
    while (document.documentElement.dataset.drawn !== "true") await new Promise((done) => setTimeout(done, 20));
  };
  const canvases = [...document.querySelectorAll(".canvas")];
  const shown = () => canvases.flatMap((canvas) => canvas.data.map((trace) => trace.meta));
  const policies = () => [...new Set(shown().map((meta) => meta.policy).filter(Boolean))].sort();
  const click = (selector) => document.querySelector(selector).click();
  const found = {};
  await drawn();
  found.canvases = canvases.length;
  found.empty = canvases.filter((canvas) => !canvas.querySelector(".main-svg")).map((canvas) => canvas.dataset.chart);
  found.all = policies();
  click('#legend [data-policy="slai"]');
  await drawn();
  found.without = policies();
  found.rows = [...document.querySelectorAll('tr[data-policy="slai"]')].filter((row) => row.offsetHeight > 0).length;
  click("#all-policies");
  click('#classes [data-slo="strict"]');
  await drawn();
  const attainment = document.querySelector('[data-chart="slo-attainment"]');
  found.classes = [...new Set(attainment.data.map((trace) => trace.meta.slo))];
  found.parts = [...new Set(shown().map((meta) => meta.part).filter(Boolean))];
  const before = getComputedStyle(document.body).backgroundColor;
  const colour = attainment.data[0].line.color;
  click("#theme");
  await drawn();
  found.themes = [before !== getComputedStyle(document.body).backgroundColor, colour !== attainment.data[0].line.color];
  const table = document.querySelector("#load figure.table table");
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].textContent);
  table.querySelectorAll("tr.sorts th")[1].click();
  found.up = column();
  table.querySelectorAll("tr.sorts th")[1].click();
  found.down = column();
  const select = document.querySelector('select[data-picks="batches"]');
  select.value = "slai";
  select.dispatchEvent(new Event("change"));
  await drawn();
  found.picks = [...new Set(shown().map((meta) => meta.pick).filter(Boolean))];
  const scatter = document.querySelector('[data-chart="requests"]');
  const [points] = scatter.data;
  scatter.emit("plotly_click", { points: [{ data: points, x: points.x[0], customdata: points.customdata[0] }] });
  found.detail = [points.meta.policy, document.querySelector(".detail").textContent];
  found.wide = document.documentElement.scrollWidth > innerWidth;
  const sizes = () => canvases.map((canvas) => [canvas._fullLayout.width, canvas._fullLayout.height]);
  const resized = async (width) => {
    document.body.style.width = width;
    dispatchEvent(new Event("resize"));
    await new Promise((done) => setTimeout(done, 500));
    await drawn();
    return sizes();
  };
  found.sizes = [sizes(), await resized("420px"), await resized("")];
  dispatchEvent(new Event("beforeprint"));
  found.printed = [attainment.data[0].line.color, getComputedStyle(document.body).backgroundColor];
  document.body.insertAdjacentHTML("beforeend", "<pre id=found></pre>");
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>
"""


BEFORE_STREAMS = "<head><script>delete window.DecompressionStream;</script>"
SAID = """
<script>
setTimeout(() => {
  const seen = document.createElement("pre");
  seen.id = "found";
  const shown = (selector) => [...document.querySelectorAll(selector)].filter((item) => item.offsetHeight > 0).length;
  document.querySelector('#legend [data-policy="slai"]').click();
  dispatchEvent(new Event("beforeprint"));
  dispatchEvent(new Event("afterprint"));
  const found = { said: shown("#not-unpacked"), tables: shown("table"), charts: shown(".main-svg") };
  seen.textContent = JSON.stringify(found);
  document.body.append(seen);
}, 500);
</script>
"""


def opened(page, text):
    """What a page with a script that leaves it as JSON in #found has found, and the lines of the console."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    page.write_text(text)
    flags = "--headless=new --no-sandbox --disable-gpu --window-size=1280,900 --virtual-time-budget=60000"
    flags += f" --enable-logging=stderr --dump-dom --user-data-dir={page.parent / 'profile'}"
    done = subprocess.run([CHROMIUM, *flags.split(), f"file://{page}"], capture_output=True, text=True, timeout=120)
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.S)
    assert told, done.stderr[-3000:]
    return json.loads(html.unescape(told[1])) | {"console": re.findall(r".*CONSOLE.*", done.stderr)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report of three policies."""
    policies = ("sarathi", "slai", "my:Sched<b>[a=1]")
    rows = [
        row(p, q, s, ttft_s=0.4 * q / (1 + i), attained=0.95 - 0.1 * q + 0.01 * i, strict=0.8)
        for i, p in enumerate(policies)
        for q in (1.0, 1.6)
        for s in range(2)
    ]
    settings = {"steps": steps_of(policies, 1.0), "itl": itl_of(policies, 1.0)}
    folder = make_folder(tmp_path_factory.mktemp("page") / "out", rows, **settings)
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What the page does, and what the browser had to say of it."""
    text = (folder / "report.html").read_text()
    return opened(folder / "used.html", text.replace("</body>", USE + "</body>")) | {"folder": folder}


def test_all_charts_are_drawn_without_a_word_on_the_console(found):
    assert found["console"] == [] and found["empty"] == []
    assert found["canvases"] == len(charts_of(found["folder"])) > 15


def test_one_legend_hides_a_policy_everywhere(found):
    assert found["all"] == ["my:Sched<b>[a=1]", "sarathi", "slai"]
    assert found["without"] == ["my:Sched<b>[a=1]", "sarathi"] and found["rows"] == 0


def test_a_class_of_users_can_be_picked(found):
    assert found["classes"] == found["parts"] == ["strict"]


def test_light_dark_and_paper(found):
    assert found["themes"] == [True, True]
    assert found["printed"][0] == "#0072b2"  # of a light page


def test_a_window_of_another_width_changes_the_width_of_charts_and_not_their_height(found):
    before, narrow, again = found["sizes"]
    assert again == before and max(width for width, _ in narrow) < 420
    assert [height for _, height in narrow] == [height for _, height in before]


def test_a_click_on_a_request_shows_what_is_known_of_it(found):
    policy, text = found["detail"]
    assert text.startswith(f"{policy}, strict user, prompt of ") and "seed 0" in text


def test_tables_are_sorted_and_menus_pick(found):
    assert found["up"] == sorted(found["up"], key=float) != found["down"] == found["up"][::-1]
    assert found["picks"] == ["slai"] and not found["wide"]


def test_a_browser_that_cannot_unpack_the_charts_says_so_and_shows_the_tables(folder):
    text = (folder / "report.html").read_text().replace("<head>", BEFORE_STREAMS).replace("</body>", SAID + "</body>")
    seen = opened(folder / "old.html", text)
    assert (seen["said"], seen["charts"], seen["console"]) == (1, 0, []) and seen["tables"] > 0
