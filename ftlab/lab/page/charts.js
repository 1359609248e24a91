// Everything drawn by plotly that is not a curve over steps, and how a plot looks.

const touch = matchMedia("(pointer: coarse)").matches; // there a finger scrolls the page; it must not draw zoom boxes

function draw(id, data, { x, y, log = false, range = null, xaxis = {}, yaxis = {}, margin = {}, more = {}, doubleClick = "reset" }) {
  const [text, muted, line, card] = ["text", "muted", "line", "card"].map(cssColour);
  const axis = {
    gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: touch,
    tickfont: { size: 12, color: muted }, nticks: 6, separatethousands: true,
  };
  const title = (words) => ({ text: plain(words), font: { size: 12.5, color: muted }, standoff: 8 });
  const yrange = range && log ? range.map((value) => Math.log10(Math.max(value, 1e-12))) : range;
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: text },
    margin: { l: 50, r: 14, t: 12, b: 44, ...margin },
    hovermode: "closest", dragmode: touch ? false : "zoom", showlegend: false,
    hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text, size: 12.5 }, align: "left" },
    xaxis: { ...axis, showgrid: false, zeroline: false, showline: true, title: title(x ?? ""), ...xaxis },
    yaxis: { ...axis, zeroline: false, title: title(y ?? ""), type: log ? "log" : "linear", ...(yrange && !(log && range[0] <= 0) ? { range: yrange } : {}), ...yaxis },
    ...more,
  };
  if (!data.length) {
    layout.annotations = [{ text: "nothing to show for the chosen runs", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5, font: { color: muted, size: 13 } }];
    layout.xaxis.visible = layout.yaxis.visible = false;
  }
  return Plotly.react($(id), data, layout, {
    displaylogo: false, responsive: true, displayModeBar: false, doubleClick,
  });
}

/** How an axis of a setting or result is drawn: its values themselves as ticks where they are few. */
function axisOf(column, cells) {
  if (!column.numeric) return { type: "category", categoryorder: "array", categoryarray: distinctCells(column).map(String) };
  const distinct = [...new Set(cells)].sort((a, b) => a - b);
  const log = column.setting && distinct.length > 1 && spansDecades(distinct);
  const type = log ? "log" : "linear";
  if (column.setting && distinct.length <= 7) return { type, tickmode: "array", tickvals: distinct, ticktext: distinct.map(short) };
  return log ? { type, dtick: 1, exponentformat: "power" } : { type };
}

const labelled = (i) => {
  return `<b>${plain(RUNS[i].label)}</b><br>${plain(told(i)).replaceAll(", ", "<br>")}`;
};

function points(xs, ys, shown, colours, extra = {}) {
  return {
    type: "scatter", mode: "markers", x: xs, y: ys, text: shown.map(labelled), hovertemplate: "%{text}<br>%{x:.5g} → %{y:.5g}<extra></extra>",
    marker: { size: 10, color: shown.map((i) => colours[i].colour), opacity: 0.9, line: { width: 1, color: cssColour("card") } }, ...extra,
  };
}

function drawScatter() {
  const [a, b] = [byKey(state.hx), byKey(state.hy)];
  if (!a || !b) return;
  const judged = b.setting ? () => true : (i) => DATA.results[i] !== null; // not what a failed run had at its start
  const shown = plotted().filter((i) => a.cells[i] !== null && b.cells[i] !== null && judged(i));
  const xs = shown.map((i) => (a.numeric ? a.cells[i] : String(a.cells[i])));
  const ys = shown.map((i) => (b.numeric ? b.cells[i] : String(b.cells[i])));
  const text = { hovertemplate: `%{text}<br>${plain(b.label)} %{y}<extra></extra>` };
  const data = shown.length ? [points(xs, ys, shown, runColours(), text)] : [];
  draw("scatter", data, { x: a.label, y: b.label, xaxis: axisOf(a, xs), yaxis: axisOf(b, ys) });
}

/** Each run as a line across its settings to its result, every axis from its least value to its greatest. */
function drawParallel() {
  const shown = plotted().filter((i) => DATA.results[i] !== null);
  const axes = SETTINGS.filter((column) => !column.key.startsWith("run.") && new Set(shown.map((i) => column.cells[i])).size > 1).slice(-7);
  if (!axes.length || shown.length < 2) return draw("parallel", [], {});
  axes.push({ key: DATA.metric, label: DATA.metric, numeric: true, setting: false, cells: DATA.results });
  const scales = axes.map((column) => axisScale(column, shown));
  const result = scale(shown.map((i) => DATA.results[i]));
  const bestLast = [...shown].sort((a, b) => (DATA.less_is_better ? 1 : -1) * (DATA.results[b] - DATA.results[a]));
  const data = bestLast.map((i) => ({
    type: "scatter", mode: "lines", x: axes.map((_, k) => k), y: axes.map((column, k) => scales[k].place(column.cells[i])),
    line: { color: at(result(DATA.results[i])), width: shown.length > 40 ? 1.2 : 2 },
    text: labelled(i), hovertemplate: `%{text}<br>${plain(DATA.metric)} ${short(DATA.results[i])}<extra></extra>`,
  }));
  const [muted, line, card] = ["muted", "line", "card"].map(cssColour);
  const ticks = scales.flatMap(({ ticks }, k) => ticks.map(([y, text]) => ({ x: k, y, text: plain(text), showarrow: false, xanchor: "left", xshift: 5, bgcolor: card, borderpad: 1, font: { size: 11.5, color: muted } })));
  const names = axes.map(({ label }, k) => ({ x: k, y: 1.05, yanchor: "bottom", text: `<b>${plain(label)}</b>`, showarrow: false, xanchor: k === 0 ? "left" : k === axes.length - 1 ? "right" : "center" }));
  const shapes = axes.map((_, k) => ({ type: "line", x0: k, x1: k, y0: 0, y1: 1, line: { color: line, width: 1.5 }, layer: "below" }));
  const bare = { visible: false, fixedrange: true };
  return draw("parallel", data, {
    margin: { l: 12, r: 52, t: 34, b: 14 }, xaxis: { ...bare, range: [-0.04, axes.length - 0.96] }, yaxis: { ...bare, range: [-0.04, 1.06] },
    more: { annotations: [...ticks, ...names], shapes },
  });
}

/** Where the values of a column stand on an axis from 0 to 1, and which of them are written beside it. */
function axisScale(column, shown) {
  const cells = shown.map((i) => column.cells[i]);
  const distinct = distinctCells({ ...column, cells });
  if (!column.numeric || cells.includes(null) || (column.setting && distinct.length <= 8)) {
    const all = cells.includes(null) ? [...distinct, null] : distinct;
    const place = (cell) => (all.length > 1 ? all.indexOf(cell) / (all.length - 1) : 0.5);
    return { place, ticks: all.map((cell) => [place(cell), clipped(short(cell))]) };
  }
  const place = scale(distinct);
  const [low, high] = [distinct[0], distinct.at(-1)];
  const middle = column.setting && spansDecades(distinct) ? Math.sqrt(low * high) : (low + high) / 2;
  return { place, ticks: [low, middle, high].map((value) => [place(value), short(value)]) };
}

function drawFronts() {
  const colours = runColours();
  const places = [["speed", "perf/tokens_per_s", "tokens per second"], ["memory", "memory/peak_gib", "peak GiB"]];
  for (const [id, key, label] of places) {
    const cells = byKey(key)?.cells ?? [];
    const shown = plotted().filter((i) => DATA.results[i] !== null && typeof cells[i] === "number");
    const front = shown.filter((i) => DATA.fronts[key][i]).sort((a, b) => cells[a] - cells[b]);
    const xs = (these) => these.map((i) => cells[i]);
    const ys = (these) => these.map((i) => DATA.results[i]);
    const text = { hovertemplate: `%{text}<br>${plain(DATA.metric)} %{y:.5g}<br>${label} %{x:,.5g}<extra></extra>` };
    const beaten = shown.filter((i) => !DATA.fronts[key][i]);
    const data = shown.length
      ? [
          { type: "scatter", mode: "lines", x: xs(front), y: ys(front), line: { color: cssColour("muted"), width: 1.5, shape: "linear", dash: "dot" }, hoverinfo: "skip" },
          points(xs(beaten), ys(beaten), beaten, colours, { ...text, marker: { size: 9, symbol: "circle-open", color: beaten.map((i) => colours[i].colour), line: { width: 1.6 } } }),
          points(xs(front), ys(front), front, colours, { ...text, marker: { size: 12, color: front.map((i) => colours[i].colour), line: { width: 1, color: cssColour("card") } } }),
        ]
      : [];
    draw(id, data, { x: label, y: DATA.metric });
  }
}

function drawIntervals() {
  const { groups } = DATA.seeds;
  const sign = DATA.less_is_better ? 1 : -1;
  const order = groups.map((_, k) => k).sort((a, b) => sign * (groups[b].mean - groups[a].mean)); // the best on top
  const names = order.map((k) => clipped(groups[k].name));
  const means = order.map((k) => groups[k].mean);
  const accent = cssColour("accent");
  const single = { x: [], y: [] };
  order.forEach((k, place) => {
    for (const i of groups[k].runs) {
      single.x.push(DATA.results[i]);
      single.y.push(place);
    }
  });
  const data = [
    { type: "scatter", mode: "markers", ...single, marker: { size: 7, color: cssColour("muted"), opacity: 0.55 }, hovertemplate: "%{x:.5g}<extra></extra>" },
    {
      type: "scatter", mode: "markers", x: means, y: order.map((_, place) => place), marker: { size: 11, symbol: "diamond", color: accent },
      error_x: { type: "data", array: order.map((k) => groups[k].half ?? 0), color: accent, thickness: 2, width: 5 },
      text: order.map((k) => plain(groups[k].name)), hovertemplate: "<b>%{text}</b><br>mean %{x:.5g}<extra></extra>",
    },
  ];
  $("intervals").style.height = `${Math.max(220, 90 + 34 * groups.length)}px`;
  const yaxis = { tickmode: "array", tickvals: order.map((_, place) => place), ticktext: names.map(plain), range: [-0.6, groups.length - 0.4], nticks: undefined };
  draw("intervals", data, { x: DATA.metric, yaxis });
}

const clipped = (name) => (name.length > 28 ? `${name.slice(0, 27)}…` : name);

function drawDifferences() {
  const { groups, differences } = DATA.seeds;
  const sign = DATA.less_is_better ? 1 : -1;
  const order = groups.map((_, k) => k).sort((a, b) => sign * (groups[a].mean - groups[b].mean));
  const baseline = state.baseline ?? order[0];
  const rows = order.map((k) => {
    const difference = k === baseline ? null : differences[baseline][k];
    const told = difference && difference.half !== null && Math.abs(difference.mean) > difference.half;
    const verdict = k === baseline ? "baseline" : !difference ? "no seed in common" : !told ? "not told apart" : sign * difference.mean < 0 ? "better" : "worse";
    const tone = verdict === "better" ? "right" : verdict === "worse" ? "wrong" : "muted";
    return el(
      "tr", {},
      el("td", {}, groups[k].name),
      el("td", { class: "number" }, String(groups[k].n)),
      el("td", { class: "number" }, band(groups[k].mean, groups[k].half)),
      el("td", { class: "number" }, difference ? band(difference.mean, difference.half, true) : ""),
      el("td", { class: tone }, verdict),
    );
  });
  const heads = ["setting", "seeds", DATA.metric, "difference", ""].map((label, k) => el("th", { class: k > 0 && k < 4 ? "number" : "" }, label));
  $("differences").tHead.replaceChildren(el("tr", {}, ...heads));
  $("differences").tBodies[0].replaceChildren(...rows);
}
