// The table of runs: sorted, filtered, and the place where runs are chosen for the plots.

const COLUMNS = DATA.columns;
const FORMATS = COLUMNS.map(columnFormat);
const SETTINGS = COLUMNS.filter((column) => column.setting);
const RESULTS = COLUMNS.filter((column) => !column.setting);
const byKey = (key) => COLUMNS.find((column) => column.key === key);
const STATUSES = ["running", "pending", "completed", "failed", "lost", "pruned", "preempted", "unknown"].filter((status) =>
  RUNS.some((run) => run.status === status),
);
const TOLD = [];
let telling = null; // settings, the value of most runs, and whether it is always told

/** What sets a run apart, in words; its label alone where nothing does. */
function told(i) {
  telling ??= SETTINGS.filter((column) => !column.key.startsWith("run.")).map((column) => [column, usualCell(column), varies(column)]);
  return (TOLD[i] ??=
    telling
      .filter(([column, usual, always]) => always || column.cells[i] !== usual)
      .slice(0, 6)
      .map(([column]) => `${column.label} ${short(column.cells[i])}`)
      .join(", ") || RUNS[i].label);
}

/** The value that most runs have. */
function usualCell(column) {
  const counts = new Map();
  for (const cell of column.cells) counts.set(cell, (counts.get(cell) ?? 0) + 1);
  return [...counts].reduce((most, one) => (one[1] > most[1] ? one : most))[0];
}

/** Whether a setting is more than an exception among the runs. */
function varies(column) {
  const usual = usualCell(column);
  return column.cells.filter((cell) => cell !== usual).length > 0.15 * RUNS.length;
}

const SIGNS = { running: "◌", pending: "…", completed: "✓", failed: "✕", lost: "✕", pruned: "✂", preempted: "‖", unknown: "?" };
const off = new Set(state.off ?? []);

const BASES = [
  { key: "run", label: "run", value: (i) => RUNS[i].label.toLowerCase() },
  { key: "status", label: "status", value: (i) => STATUSES.indexOf(RUNS[i].status) },
];

/** Whether less is better in a result's column, and its best value gets bold. */
function direction(key) {
  if (key === DATA.metric || key === `best ${DATA.metric}`) return DATA.less_is_better ? 1 : -1;
  if (/loss$|perplexity$|peak_gib$/.test(key)) return 1;
  return /exact_match|tokens_per_s|acc/.test(key) ? -1 : 0;
}

/** The share of the results' variance that a setting's values explain, adjusted for how many values it has. */
function influence(column) {
  const judged = RUNS.map((_, i) => i).filter((i) => DATA.results[i] !== null);
  const groups = new Map();
  for (const i of judged) groups.set(column.cells[i], [...(groups.get(column.cells[i]) ?? []), DATA.results[i]]);
  const spread = (values) => {
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    return values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  };
  const [n, k] = [judged.length, groups.size];
  if (k < 2 || n <= k) return 0;
  const within = [...groups.values()].reduce((sum, values) => sum + spread(values), 0);
  return 1 - within / (n - k) / (spread(judged.map((i) => DATA.results[i])) / (n - 1));
}

/** The setting that matters most, as far as the runs tell. */
function decisive() {
  const candidates = SETTINGS.filter((column) => column.key !== "seed" && !column.key.startsWith("run."));
  return candidates.reduce((best, column) => (best && influence(best) >= influence(column) ? best : column), null) ?? SETTINGS[0] ?? null;
}

// ---- filter: words to be found in a run, and comparisons such as lr>=1e-4

function matcher(text) {
  const terms = text.trim().split(/\s+/).filter(Boolean).map(term);
  return (i) => terms.every((fits) => fits(i));
}

function term(word) {
  const found = /^([\w./:-]+?)(<=|>=|!=|=|<|>)(.+)$/.exec(word);
  const column = found && COLUMNS.find((c) => c.label === found[1] || c.key === found[1]);
  const read = !found ? null : column ? (i) => column.cells[i] : { status: (i) => RUNS[i].status, run: (i) => RUNS[i].label }[found[1]];
  if (!read) {
    const wanted = word.toLowerCase();
    return (i) => haystack(i).includes(wanted);
  }
  const [, , operator, wanted] = found;
  return (i) => compare(read(i), operator, wanted);
}

function compare(value, operator, wanted) {
  const number = Number(wanted);
  const numeric = typeof value === "number" && !Number.isNaN(number);
  if (operator === "=" || operator === "!=") {
    const same = numeric ? value === number : String(value ?? "null").toLowerCase() === wanted.toLowerCase();
    return same === (operator === "=");
  }
  if (!numeric) return false;
  return { "<": value < number, ">": value > number, "<=": value <= number, ">=": value >= number }[operator];
}

const HAYSTACKS = [];
function haystack(i) {
  const run = RUNS[i];
  const cells = SETTINGS.map((column) => `${column.label}=${column.cells[i]}`);
  return (HAYSTACKS[i] ??= [run.name, run.path, run.status, ...cells, run.error ? Object.values(run.error).join(" ") : ""].join(" ").toLowerCase());
}

// ---- which runs, in which order

/** Indices of the runs that pass the filter, in the table's order. */
function listed() {
  const fits = matcher(state.filter);
  const hidden = new Set(state.hidden);
  const shown = RUNS.map((_, i) => i).filter((i) => !hidden.has(RUNS[i].status) && fits(i));
  const base = BASES.find((one) => one.key === state.sort);
  const column = byKey(state.sort);
  const read = base ? base.value : column ? (i) => column.cells[i] : null;
  if (!read) return shown;
  const sign = state.descending ? -1 : 1;
  return shown.sort((a, b) => {
    const [x, y] = [read(a), read(b)];
    if (x === null || y === null) return (x === null) - (y === null) || a - b; // what is not known, last either way
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return sign * order || a - b;
  });
}

/** Those of them that are ticked: what the plots show. */
const plotted = () => listed().filter((i) => !off.has(i));

function drawTable(onChange) {
  const order = listed();
  drawHead(onChange);
  const bests = RESULTS.map((column) => {
    const sign = direction(column.key);
    const known = order.map((i) => column.cells[i]).filter((cell) => typeof cell === "number");
    return sign && known.length > 1 ? sign * Math.min(...known.map((cell) => sign * cell)) : null;
  });
  const colours = runColours();
  $("table").tBodies[0].replaceChildren(...order.map((i) => row(i, bests, colours, onChange)));
  $("count").textContent =
    (order.length === RUNS.length ? `${RUNS.length} runs.` : `${order.length} of ${RUNS.length} runs.`) +
    (SETTINGS.length ? " Only settings that differ are columns." : " They do not differ in any setting.");
}

function drawHead(onChange) {
  const head = (key, label, attributes) =>
    el(
      "th",
      { ...attributes, scope: "col", "aria-sort": state.sort === key ? (state.descending ? "descending" : "ascending") : null },
      el("button", { type: "button", onclick: () => sortBy(key, onChange) }, label),
    );
  const columns = COLUMNS.map((column, k) =>
    head(column.key, column.label, {
      title: column.hint,
      class: (column.numeric ? "number" : "") + (k === 0 || column.setting !== COLUMNS[k - 1].setting ? " edge" : ""),
    }),
  );
  $("table").tHead.replaceChildren(el("tr", {}, head("run", "run", { class: "first" }), head("status", "status", {}), ...columns));
}

function sortBy(key, onChange) {
  const again = state.sort === key;
  state.descending = again ? !state.descending : direction(key) === -1; // the best first
  state.sort = key;
  onChange("order");
}

function row(i, bests, colours, onChange) {
  const run = RUNS[i];
  const tick = el("input", {
    type: "checkbox", "aria-label": `show ${run.label} in the plots`, checked: !off.has(i),
    onchange: (event) => {
      if (event.target.checked) off.delete(i);
      else off.add(i);
      onChange("chosen");
    },
  });
  const swatch = el("span", { class: "swatch", style: `background:${colours[i].colour}` });
  const name = el("a", { href: run.link, title: run.path }, run.label);
  const mark = i === DATA.best ? el("span", { class: "mark", title: `the best ${DATA.metric}` }, "★") : null;
  const cells = COLUMNS.map((column, k) => {
    const value = column.cells[i];
    const isBest = !column.setting && typeof value === "number" && value === bests[RESULTS.indexOf(column)];
    const edge = k === 0 || column.setting !== COLUMNS[k - 1].setting ? " edge" : "";
    const text = value === null ? "–" : typeof value === "number" ? FORMATS[k](value) : String(value);
    return el("td", { class: (column.numeric ? "number" : "") + (isBest ? " best" : "") + edge, title: value === null ? null : String(value) }, text);
  });
  return el(
    "tr",
    { class: off.has(i) ? "off" : "", "data-run": i },
    el("td", { class: "first" }, el("div", { class: "name" }, tick, swatch, name, mark)),
    el("td", {}, statusOf(run)),
    ...cells,
  );
}

function statusOf(run) {
  const kind = run.error?.kind && run.error.kind !== "error" ? run.error.kind.replaceAll("_", " ") : "";
  return el("span", { class: `status ${run.status}`, title: run.error ? run.error.message : null }, `${SIGNS[run.status]} ${kind || run.status}`);
}
