"use strict";
// Draws the charts of the page and keeps one legend, one class filter and one theme for all of them.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const charts = new Map(data.charts.map((chart) => [chart.name, chart]));
  const canvases = [...document.querySelectorAll(".canvas")];
  const state = { hidden: new Set(), slo: "all", picked: {}, printing: false };
  const dirty = new Set();
  let isLoaded = false;
  const MOST_BANDS = 6; // policies whose intervals can be told apart
  const PAPER_PX = { half: 318, wide: 668 };

  // The charting library lies in the page packed

  async function load() {
    const text = document.getElementById("plotly").textContent;
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(Object.assign(document.createElement("script"), { textContent: await new Response(unpacked).text() }));
    isLoaded = true;
  }

  // Theme

  const isDark = () => {
    if (state.printing) return false;
    return root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const policyColour = (policy) => data.policies[policy]?.colour[isDark() ? 1 : 0];
  const ink = (name) => data.inks[name][isDark() ? 1 : 0];

  function paintChips() {
    for (const chip of document.querySelectorAll(".chip")) chip.style.background = policyColour(chip.dataset.policy);
  }

  // What of a chart is shown, and how

  const hasClass = (chart) => chart.traces.some((trace) => [trace.meta.slo, trace.meta.part].includes(state.slo));

  function isShown(trace, chart) {
    const { policy, slo, part, pick, band } = trace.meta;
    if (band && Object.keys(data.policies).length - state.hidden.size > MOST_BANDS) return false;
    if (policy && state.hidden.has(policy)) return false;
    if (pick && pick !== (state.picked[chart.name] ?? firstPick(chart))) return false;
    if (part) return state.slo === "all" || part === "all" || part === state.slo;
    return !slo || slo === (hasClass(chart) ? state.slo : "all");
  }
  const firstPick = (chart) => chart.traces.find((trace) => trace.meta.pick)?.meta.pick;

  function painted(trace) {
    const { policy, ink: name, band, thin, smooth, area, missed, part, symbols } = trace.meta;
    const style = data.policies[policy];
    const colour = style ? policyColour(policy) : ink(name ?? "ink");
    const found = { ...trace, line: { color: colour, ...trace.line }, showlegend: trace.showlegend ?? false };
    found.hoverlabel = { align: "left" };
    if (band || area) found.fillcolor = band ? colour + "22" : colour + (isDark() ? "cc" : "dd");
    if (trace.type === "bar") {
      found.marker = { color: colour, ...trace.marker };
      found.error_x = trace.error_x && { ...trace.error_x, color: css("--ink") };
      delete found.line;
    } else if (style && !band) {
      const symbol = symbols?.some(Boolean) ? symbols.map((own) => own ?? style.symbol) : style.symbol;
      found.marker = { color: colour, symbol, size: 8, opacity: 1, line: { width: 1, color: colour }, ...trace.marker };
      found.line = { dash: style.dash, width: thin ? 1.2 : 2, ...found.line };
      if (trace.error_x) found.error_x = { ...trace.error_x, color: colour + "66" };
    } else if (trace.marker) found.marker = { color: colour, ...trace.marker };
    if (smooth) found.mode = "lines";
    if (part) {
      const marker = { color: colour, size: missed ? 8 : 5, symbol: missed ? "x-thin-open" : "circle" };
      found.marker = { ...marker, opacity: missed ? 0.95 : 0.4, line: { width: missed ? 1.6 : 0, color: colour } };
    }
    return found;
  }

  function axis(own, narrow) {
    const look = { gridcolor: css("--line"), linecolor: css("--faint"), zerolinecolor: css("--line"), automargin: true };
    const title = { ...own.title, standoff: 8, font: { size: narrow ? 11 : 12, color: css("--ink") } };
    return { tickfont: { color: css("--faint"), size: 11 }, nticks: narrow ? 5 : 8, exponentformat: "none", separatethousands: true, ...look, ...own, title };
  }

  function layoutOf(chart, narrow) {
    const { rows, figures, notes, ...own } = chart.layout;
    const found = {
      height: rows ? 84 + 27 * rows : 310, hovermode: "closest", dragmode: narrow ? false : "zoom",
      margin: { l: 52, r: 14, t: 22, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      legend: { orientation: "h", y: -0.14, traceorder: "normal", itemclick: false, itemdoubleclick: false }, ...own,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--ink") },
      font: { family: css("--font"), size: 12, color: css("--ink") },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--faint"), font: { color: css("--ink"), size: 12 } },
    };
    for (const name of Object.keys(found)) if (/^[xy]axis\d*$/.test(name)) found[name] = axis(found[name], narrow);
    found.shapes = (own.shapes ?? []).map((s) => ({ ...s, line: { color: css("--faint"), ...s.line } }));
    found.annotations = (own.annotations ?? []).map((a) => ({ ...a, font: { color: css("--faint"), ...a.font } }));
    if (rows && own.yaxis) {
      const names = [...new Set(chart.traces.flatMap((t) => (t.meta.policy && !state.hidden.has(t.meta.policy) ? t.y : [])))];
      found.yaxis = { ...found.yaxis, type: "category", categoryorder: "array", categoryarray: names, showgrid: false };
      found.yaxis.ticktext = names.map((name) => (name.length > 26 ? `${name.slice(0, 14)}…${name.slice(-11)}` : name));
      found.yaxis.tickvals = names;
      found.yaxis.range = [names.length - 0.4, -0.6];
      delete found.yaxis.autorange;
    }
    return found;
  }

  function draw(canvas) {
    const chart = charts.get(canvas.dataset.chart);
    const narrow = state.printing || canvas.clientWidth < 430;
    const config = { displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    if (narrow) config.displayModeBar = false;
    config.toImageButtonOptions = { filename: chart.name, scale: 2 };
    const shown = chart.traces.filter((trace) => isShown(trace, chart)).map(painted);
    canvas.closest("figure").querySelector(".badge").hidden = state.slo === "all" || hasClass(chart) || !chart.traces.some((t) => t.meta.slo);
    const notes = chart.layout.notes;
    if (notes) canvas.closest("figure").querySelector(".said").textContent = notes[state.picked[chart.name] ?? firstPick(chart)];
    const first = !canvas.classList.contains("js-plotly-plot");
    const layout = layoutOf(chart, narrow);
    if (state.printing) layout.width = canvas.closest(".wide") ? PAPER_PX.wide : PAPER_PX.half; // what a page has room for
    Plotly.react(canvas, shown, layout, config);
    if (first) canvas.on("plotly_click", (event) => showRequest(event.points[0]));
  }

  // Charts near what is read are drawn first, each on its own so that the page stays alive.

  function next() {
    const middle = scrollY + innerHeight / 2;
    const far = (canvas) => Math.abs(canvas.getBoundingClientRect().top + scrollY - middle);
    const canvas = [...dirty].sort((a, b) => far(a) - far(b))[0];
    if (!canvas) {
      root.dataset.drawn = "true";
      return;
    }
    dirty.delete(canvas);
    draw(canvas);
    setTimeout(next);
  }

  function redraw(which = canvases) {
    if (!isLoaded) return;
    const idle = dirty.size === 0;
    delete root.dataset.drawn;
    for (const canvas of which) dirty.add(canvas);
    if (idle) setTimeout(next);
  }

  // A window of another width: Plotly's own answer to it would forget how high a chart is.

  let settling;
  addEventListener("resize", () => {
    clearTimeout(settling);
    settling = setTimeout(() => {
      const changed = canvases.filter((canvas) => canvas._fullLayout && canvas.clientWidth !== canvas._fullLayout.width);
      if (changed.length && !state.printing) redraw(changed);
    }, 150);
  });

  // Controls

  function press(buttons, isOn) {
    for (const button of buttons) button.setAttribute("aria-pressed", String(isOn(button)));
  }

  const policyButtons = [...document.querySelectorAll("#legend .policy")];
  function showPolicies(hidden) {
    state.hidden = hidden;
    press(policyButtons, (button) => !hidden.has(button.dataset.policy));
    for (const row of document.querySelectorAll("tr[data-policy]")) row.hidden = hidden.has(row.dataset.policy);
    redraw();
  }
  for (const button of policyButtons) {
    const policy = button.dataset.policy;
    button.addEventListener("click", () => {
      const hidden = new Set(state.hidden);
      if (!hidden.delete(policy)) hidden.add(policy);
      showPolicies(hidden);
    });
    button.addEventListener("dblclick", () => {
      showPolicies(new Set(Object.keys(data.policies).filter((name) => name !== policy)));
    });
  }
  document.getElementById("all-policies").addEventListener("click", () => showPolicies(new Set()));

  const hasClasses = data.charts.some((chart) => chart.traces.some(({ meta }) => meta.slo === "strict" || meta.slo === "relaxed"));
  document.getElementById("classes").hidden = !hasClasses;
  const classButtons = [...document.querySelectorAll("#classes button")];
  for (const button of classButtons) {
    button.addEventListener("click", () => {
      state.slo = button.dataset.slo;
      press(classButtons, (other) => other === button);
      redraw();
    });
  }

  function pick(name, value) {
    state.picked[name] = value;
    const select = document.querySelector(`select[data-picks="${name}"]`);
    if (select) select.value = value;
    redraw(canvases.filter((canvas) => canvas.dataset.chart === name));
  }
  for (const select of document.querySelectorAll("select[data-picks]")) {
    select.addEventListener("change", () => pick(select.dataset.picks, select.value));
  }

  for (const row of document.querySelectorAll("#lives tbody tr")) {
    row.addEventListener("click", () => {
      const [policy, index] = [row.dataset.policy, row.cells[1].textContent.trim()];
      const parts = (trace) => trace.meta.life?.match(/^(.*)\/\d+\/(\d+)$/s) ?? [];
      const life = charts.get("lives").traces.find((trace) => parts(trace)[1] === policy && parts(trace)[2] === index);
      if (life) pick("lives", life.meta.pick);
    });
  }

  for (const group of document.querySelectorAll(".loads")) {
    const tabs = [...group.querySelectorAll(".tabs button")];
    const tables = [...group.querySelectorAll("figure.table")];
    const choose = (i) => {
      press(tabs, (tab) => tab === tabs[i]);
      tables.forEach((table, j) => table.classList.toggle("other", i !== j));
    };
    tabs.forEach((tab, i) => tab.addEventListener("click", () => choose(i)));
    if (tabs.length) choose(tabs.length - 1);
  }

  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    paintChips();
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    paintChips();
    redraw();
  });

  // A click on a request shows what is known of it, and its life where that was kept.

  function showRequest(point) {
    const figures = charts.get("requests")?.layout.figures;
    if (!figures || !point.data.meta.part) return;
    const figure = document.querySelector('[data-chart="requests"]').closest("figure");
    let detail = figure.querySelector(".detail");
    if (!detail) {
      detail = Object.assign(document.createElement("p"), { className: "detail" });
      figure.querySelector("figcaption").before(detail);
    }
    const known = new Map(figures.map(({ column }, i) => [column, point.customdata[i]]));
    const said = figures.map(({ column, unit, words }) => {
      const value = known.get(column);
      const text = typeof value === "number" ? Number(value.toPrecision(4)).toLocaleString("en") : value;
      return value === null ? null : [words, text, unit].filter(Boolean).join(" ");
    });
    const { policy, part, missed } = point.data.meta;
    const who = `${policy}${part === "all" ? "" : `, ${part} user`}, prompt of ${point.x.toLocaleString("en")} tokens, ${missed ? "missed" : "in time"}`;
    detail.textContent = [who, ...said.filter(Boolean)].join(" · ");
    const key = [policy, known.get("seed"), known.get("index")].join("/");
    const life = charts.get("lives")?.traces.find((trace) => trace.meta.life === key);
    if (!life) return;
    pick("lives", life.meta.pick);
    detail.append(" · ", Object.assign(document.createElement("a"), { href: "#lives", textContent: "its life, batch by batch" }));
  }

  // Tables: sorted by a click on a heading, saved as CSV

  function sortValue(cell) {
    const text = cell?.querySelector(".v")?.textContent.trim() ?? "";
    const plain = text.replaceAll("−", "-").replaceAll(",", "").replace("∞", "Infinity");
    const number = Number.parseFloat(plain);
    return Number.isNaN(number) ? { text, empty: text === "–" || text === "" } : { number };
  }
  function compare(a, b, up) {
    if (a.empty || b.empty) return Number(a.empty ?? false) - Number(b.empty ?? false);
    const order = "number" in a && "number" in b ? a.number - b.number || 0 : (a.text ?? "").localeCompare(b.text ?? "");
    return up ? order : -order;
  }
  for (const head of document.querySelectorAll("tr.sorts th")) {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = head.closest("table").tBodies[0];
      const place = head.cellIndex;
      const rows = [...body.rows].sort((a, b) => compare(sortValue(a.cells[place]), sortValue(b.cells[place]), up));
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  }
  for (const button of document.querySelectorAll("button.csv")) {
    button.addEventListener("click", () => {
      const rows = [...button.closest("figure").querySelectorAll("tr:not(:has(.group))")];
      const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
      const value = (cell) => quoted((cell.querySelector(".v") ?? cell).textContent.trim());
      const text = rows.map((row) => [...row.cells].map(value).join(",")).join("\n") + "\n";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${button.parentNode.firstChild.textContent.trim().replace(/[^\w.]+/g, "-")}.csv`;
      link.click();
    });
  }

  // On paper all is light, and of every part all is there.

  function print(on) {
    state.printing = on;
    root.classList.toggle("printing", on);
    paintChips();
    dirty.clear();
    if (on && isLoaded) canvases.forEach(draw);
    else redraw();
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));

  paintChips();
  load().then(() => redraw(), () => (document.getElementById("not-unpacked").hidden = false));
})();
