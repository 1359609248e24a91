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
      unpacked.set(key, { x: new Int32Array(bytes(packed.x)), y, mean: packed.mean ? new Float32Array(bytes(packed.mean)) : y });
    } else unpacked.set(key, null);
  }
  return unpacked.get(key);
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

/** No more points than the screen shows: the least and the greatest of each stretch. */
function thinned(x, y, most) {
  if (x.length <= most) return [Array.from(x), Array.from(y)];
  const [xs, ys] = [[], []];
  const stretch = x.length / (most / 2);
  for (let start = 0; start < x.length; start += stretch) {
    const [from, to] = [Math.floor(start), Math.min(Math.floor(start + stretch), x.length)];
    let [low, high] = [from, from];
    for (let k = from; k < to; k++) {
      if (!(y[k] >= y[low])) low = k;
      if (!(y[k] <= y[high])) high = k;
    }
    for (const k of new Set([Math.min(low, high), Math.max(low, high)])) {
      xs.push(x[k]);
      ys.push(y[k]);
    }
  }
  return [xs, ys];
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

/** The curves of one metric for the runs that are plotted. */
function traces(metric, shown, colours, most, dotted = false) {
  const all = [];
  const faint = state.smooth > 0 && shown.length <= 12;
  for (const i of shown) {
    const found = curve(metric, i);
    if (!found) continue;
    const sparse = found.x.length <= 60;
    const style = { colour: colours[i].colour, dash: dotted ? "dot" : colours[i].dash, sparse, single: found.x.length === 1 };
    const steps = along(i, found.x);
    if (faint && !sparse) all.push({ run: i, style: { ...style, faint }, points: thinned(steps, found.y, most) });
    const values = state.smooth && !sparse ? smoothed(found.mean, state.smooth) : found.y;
    all.push({ run: i, style, points: thinned(steps, values, most) });
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
    const { colour, dash, sparse, single, faint } = group[0].style;
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
      type: "scatter", mode: sparse ? "lines+markers" : "lines", x, y, text, meta: group.map(({ run }) => run), connectgaps: false,
      line: { color: colour, dash, width: faint ? 1 : many ? 1.1 : 1.8 }, marker: { size: single ? 8 : 5, color: colour }, opacity: faint ? 0.22 : 1,
      ...(faint ? { hoverinfo: "skip" } : { hovertemplate: `%{text}<br>${plain(metric)} %{y:.5g}<br>${state.x} %{x:,.0f}<extra></extra>` }),
    };
  });
}

function drawCurves() {
  const shown = plotted();
  const colours = runColours();
  const most = Math.min(1500, Math.max(120, Math.floor(40000 / Math.max(1, shown.length))));
  const validation = /^val\/.*loss$/.test(DATA.metric) ? DATA.metric : "val/loss";
  const losses = [...(state.training ? traces("train/loss", shown, colours, most) : []), ...(state.validation ? traces(validation, shown, colours, most, state.training) : [])];
  const x = state.x === "step" ? "optimizer step" : "tokens";
  draw("loss", losses, { x, y: "nats per target token", log: state.log, range: usual(losses), xaxis: { rangemode: "nonnegative" } });
  const others = traces(state.metric, shown, colours, most);
  draw("other", others, { x, y: state.metric, log: state.log, range: usual(others), xaxis: { rangemode: "nonnegative" } });
}

/** The range of y without the few values of a run that diverges, which would flatten all else; null: all of it. */
function usual(drawn) {
  const values = drawn.flatMap((trace) => Array.from(trace.y)).filter(Number.isFinite).sort((a, b) => a - b);
  if (values.length < 40) return null;
  const [low, high, most] = [values[0], values[Math.floor(0.98 * (values.length - 1))], values.at(-1)];
  if (most <= 3 * high || low < 0) return null;
  return [low - 0.04 * (1.15 * high - low), 1.15 * high];
}
