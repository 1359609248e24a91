// Colours of runs, and the curves over steps.

// ---- colour: by run while they can be told apart, else by a setting or the result

const COLOURINGS = [
  { key: "run", label: "run" },
  ...SETTINGS.filter((column) => new Set(column.cells).size > 1).map((column) => ({ key: column.key, label: column.label, column })),
  { key: "result", label: DATA.metric, column: { cells: DATA.results, numeric: true, setting: false, key: DATA.metric } },
];

function coloured() {
  const fallback = RUNS.length <= 8 ? "run" : (decisive()?.key ?? "result");
  return COLOURINGS.find((one) => one.key === (state.colour ?? fallback)) ?? COLOURINGS[0];
}

/** For every run its colour and dash, and what its colour means. */
function runColours() {
  const { column } = coloured();
  const grey = { colour: cssColour("muted"), dash: "solid" };
  const palette = categories();
  if (!column) {
    return RUNS.map((_, i) => ({ colour: palette[i % palette.length], dash: DASHES[Math.floor(i / palette.length) % DASHES.length] }));
  }
  const distinct = distinctCells(column);
  if (distinct.length > palette.length || (column.numeric && distinct.length > 5)) {
    const place = column.numeric ? scale(distinct) : (value) => distinct.indexOf(value) / (distinct.length - 1);
    return column.cells.map((cell) => (cell === null ? grey : { colour: at(place(cell)), dash: "solid" }));
  }
  const ordered = column.numeric; // few and ordered: steps of the ramp; few and not: colours that stand apart
  return column.cells.map((cell) => {
    const k = distinct.indexOf(cell);
    if (k < 0) return grey;
    return { colour: ordered && distinct.length > 2 ? at(k / (distinct.length - 1)) : palette[k], dash: "solid" };
  });
}

function distinctCells(column) {
  const known = [...new Set(column.cells.filter((cell) => cell !== null))];
  return column.numeric ? known.sort((a, b) => a - b) : known.sort((a, b) => String(a).localeCompare(String(b), "en", { numeric: true }));
}

/** Whether values are better seen by their logarithm: positive, and over more than a decade or so. */
const spansDecades = (values) => Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) >= 15;

/** Values to [0, 1]. */
function scale(values) {
  const turn = spansDecades(values) ? Math.log : (value) => value;
  const [low, high] = [turn(Math.min(...values)), turn(Math.max(...values))];
  return (value) => (high > low ? (turn(value) - low) / (high - low) : 0.5);
}

function drawLegend() {
  const { column, label } = coloured();
  const colours = runColours();
  const shown = plotted();
  const line = (colour, dash) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ width: 22, height: 10 })) svg.setAttribute(name, value);
    const dashes = { solid: "", dash: "6 3", dot: "2 2", dashdot: "6 2 2 2", longdash: "9 3" }[dash];
    for (const [name, value] of Object.entries({ x1: 0, x2: 22, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dashes })) path.setAttribute(name, value);
    svg.append(path);
    return svg;
  };
  let items;
  if (!column) {
    items = shown.slice(0, 16).map((i) => el("span", {}, line(colours[i].colour, colours[i].dash), told(i)));
    if (shown.length > 16) items.push(el("span", {}, `and ${shown.length - 16} more`));
  } else {
    const distinct = distinctCells(column);
    if (distinct.length > categories().length || (column.numeric && distinct.length > 5)) {
      const ends = [distinct[0], distinct.at(-1)].map(short);
      items = [el("span", {}, label, ends[0], el("i", { class: "ramp", style: `background:linear-gradient(90deg,${ramp().join(",")})` }), ends[1])];
    } else {
      items = distinct.map((cell) => el("span", {}, line(colours[column.cells.indexOf(cell)].colour, "solid"), `${label} ${short(cell)}`));
    }
  }
  $("legend").replaceChildren(...items);
}

// ---- curves, unpacked when they are first drawn

const unpacked = new Map();

/** Steps, values, and the means to smooth, of one run's curve of a metric; null where it has none. */
function curve(metric, i) {
  const key = `${i} ${metric}`;
  if (!unpacked.has(key)) {
    const packed = DATA.curves[metric]?.[i];
    if (packed) {
      const y = new Float32Array(bytes(packed.y));
      unpacked.set(key, { x: stepsOf(packed), y, mean: packed.mean ? new Float32Array(bytes(packed.mean)) : y });
    } else unpacked.set(key, null);
  }
  return unpacked.get(key);
}

/** The steps of a curve, of which there are the first and the differences. */
function stepsOf({ first, apart, bits }) {
  const steps = Int32Array.from(new { 8: Uint8Array, 16: Uint16Array, 32: Int32Array }[bits](bytes(apart)));
  let now = first;
  for (let k = 0; k < steps.length; k++) steps[k] = now += steps[k];
  return steps;
}

function bytes(base64) {
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) found[k] = text.charCodeAt(k);
  return found.buffer;
}

/** Averages over neighbours on both sides: three passes of a moving mean, which come close to Gaussian weights. */
function smoothed(values, strength) {
  const reach = Math.round((strength / 100) ** 2 * 0.12 * values.length);
  let now = Float64Array.from(values);
  for (let pass = 0; pass < (reach ? 3 : 0); pass++) {
    const sums = new Float64Array(now.length + 1);
    const counts = new Int32Array(now.length + 1);
    now.forEach((value, k) => {
      const known = !Number.isNaN(value);
      sums[k + 1] = sums[k] + (known ? value : 0);
      counts[k + 1] = counts[k] + known;
    });
    now = now.map((_, k) => {
      const [from, to] = [Math.max(0, k - reach), Math.min(now.length, k + reach + 1)];
      return counts[to] > counts[from] ? (sums[to] - sums[from]) / (counts[to] - counts[from]) : NaN;
    });
  }
  return now;
}

/** Those of a curve that lie in view, and one more at either end, where its line goes on. */
function within(view, x, y) {
  if (!view) return [x, y];
  const [low, high] = view;
  const from = x.findIndex((value) => value >= low);
  if (from < 0) return [[], []];
  const [start, end] = [Math.max(0, from - 1), x.findLastIndex((value) => value <= high) + 2];
  return [x.slice(start, end), y.slice(start, end)];
}

/** No more points than the screen shows: the least and the greatest of each stretch, and both ends. */
function thinned([x, y], most) {
  if (x.length <= most) return [Array.from(x), Array.from(y)];
  const kept = new Set([0]);
  const stretch = x.length / (most / 2);
  for (let start = 0; start < x.length; start += stretch) {
    const [from, to] = [Math.floor(start), Math.min(Math.floor(start + stretch), x.length)];
    let [low, high] = [from, from];
    for (let k = from; k < to; k++) {
      if (!(y[k] >= y[low])) low = k;
      if (!(y[k] <= y[high])) high = k;
    }
    kept.add(Math.min(low, high)).add(Math.max(low, high));
  }
  const indices = [...kept.add(x.length - 1)];
  return [indices.map((k) => x[k]), indices.map((k) => y[k])];
}

/** Steps as the x axis has them. */
function along(i, steps) {
  const pace = RUNS[i].pace;
  if (state.x === "step" || !pace.length) return steps;
  const [known, tokens] = [pace.map((pair) => pair[0]), pace.map((pair) => pair[1])];
  let k = 0;
  return Array.from(steps, (step) => {
    while (k < known.length - 2 && step > known[k + 1]) k++;
    const span = known[k + 1] - known[k] || 1;
    return tokens[k] + ((step - known[k]) / span) * (tokens[k + 1] - tokens[k]);
  });
}

const POINTS = { in_all: 40000, fewest: 120, most: 1500 }; // that are drawn of a metric, and of a curve

/** The curves of one metric for the runs that are plotted, between the two x of a view. */
function traces(metric, shown, colours, view, dotted = false) {
  const all = [];
  const most = Math.min(POINTS.most, Math.max(POINTS.fewest, Math.floor(POINTS.in_all / Math.max(1, shown.length))));
  const drawn = (x, y) => thinned(within(view, x, y), most);
  const faint = state.smooth > 0 && shown.length <= 12;
  for (const i of shown) {
    const found = curve(metric, i);
    if (!found) continue;
    const sparse = found.x.length <= 60;
    const marked = sparse && (shown.length <= 40 || found.x.length === 1); // each mark is an element of the page
    const style = { colour: colours[i].colour, dash: dotted ? "dot" : colours[i].dash, marked, single: found.x.length === 1 };
    const steps = along(i, found.x);
    if (faint && !sparse) all.push({ run: i, style: { ...style, faint }, points: drawn(steps, found.y) });
    const values = state.smooth && !sparse ? smoothed(found.mean, state.smooth) : found.y;
    all.push({ run: i, style, points: drawn(steps, values) });
  }
  return joined(all, metric, shown.length > 40);
}

/** Curves of one style as one trace, with gaps in between: plotly takes its time for each trace. */
function joined(all, metric, many) {
  const styles = new Map();
  for (const one of all) {
    const key = JSON.stringify(one.style);
    styles.set(key, [...(styles.get(key) ?? []), one]);
  }
  return [...styles.values()].map((group) => {
    const { colour, dash, marked, single, faint } = group[0].style;
    const [x, y, text] = [[], [], []];
    for (const { run, points } of group) {
      const label = labelled(run);
      for (const [k, value] of points[0].entries()) {
        x.push(value);
        y.push(points[1][k]);
        text.push(label);
      }
      x.push(null);
      y.push(null);
      text.push("");
    }
    return {
      type: "scatter", mode: marked ? "lines+markers" : "lines", x, y, text, meta: group.map(({ run }) => run), connectgaps: false,
      line: { color: colour, dash, width: faint ? 1 : many ? 1.1 : 1.8 }, marker: { size: single ? 8 : 5, color: colour }, opacity: faint ? 0.22 : 1,
      ...(faint ? { hoverinfo: "skip" } : { hovertemplate: `%{text}<br>${plain(metric)} %{y:.5g}<br>${state.x} %{x:,.0f}<extra></extra>` }),
    };
  });
}

function drawCurves() {
  drawLosses();
  drawOther();
}

function drawLosses() {
  const [shown, colours] = [plotted(), runColours()];
  const validation = /^val\/.*loss$/.test(DATA.metric) ? DATA.metric : "val/loss";
  drawSteps("loss", "nats per target token", drawLosses, (view) => [
    ...(state.training ? traces("train/loss", shown, colours, view) : []),
    ...(state.validation ? traces(validation, shown, colours, view, state.training) : []),
  ]);
}

function drawOther() {
  const [shown, colours] = [plotted(), runColours()];
  drawSteps("other", state.metric, drawOther, (view) => traces(state.metric, shown, colours, view));
}

// ---- a plot over steps; where the reader enlarges it, it is drawn again with all points that there are

const enlarged = {}; // by the plot's id: both axes' ranges, and what they are ranges of

function drawSteps(id, y, again, tracesIn) {
  const axes = JSON.stringify([state.x, y, state.log]);
  if (enlarged[id]?.axes !== axes) delete enlarged[id];
  const view = enlarged[id];
  const data = tracesIn(view?.x);
  $(id).axes = axes;
  draw(id, data, {
    x: state.x === "step" ? "optimizer step" : "tokens", y, log: state.log, range: view ? null : usual(data), doubleClick: false,
    xaxis: { rangemode: "nonnegative", ...(view && { range: view.x }) }, yaxis: view ? { range: view.y } : {},
  });
  if ($(id).followed) return;
  $(id).followed = true;
  $(id).on("plotly_relayout", (change) => {
    if (!Object.keys(change).some((key) => /^[xy]axis\.range/.test(key))) return;
    const { xaxis, yaxis } = $(id).layout;
    enlarged[id] = { axes: $(id).axes, x: [...xaxis.range], y: [...yaxis.range] };
    again();
  });
  $(id).on("plotly_doubleclick", () => {
    delete enlarged[id];
    again();
  });
}

/** The range of y without the few values of a run that diverges, which would flatten all else; null: all of it. */
function usual(drawn) {
  const values = drawn.flatMap((trace) => Array.from(trace.y)).filter(Number.isFinite).sort((a, b) => a - b);
  if (values.length < 40) return null;
  const [low, high, most] = [values[0], values[Math.floor(0.98 * (values.length - 1))], values.at(-1)];
  if (most <= 3 * high || low < 0) return null;
  return [low - 0.04 * (1.15 * high - low), 1.15 * high];
}
