// Puts the page together, and redraws what a choice changes.

const HAS_SEEDS = DATA.seeds !== null;
const table = () => drawTable(changed);
const REDRAWN = {
  order: [table, drawSamples],
  chosen: [table, drawLegend, drawCurves, drawScatter, drawParallel, drawFronts, drawSamples],
  curves: [drawCurves],
  colours: [table, drawLegend, drawCurves, drawScatter, drawFronts, drawSamples],
  parameters: [drawScatter],
  seeds: [drawDifferences],
  sample: [drawSamples],
  all: [table, drawLegend, drawCurves, drawScatter, drawParallel, ...(HAS_SEEDS ? [drawIntervals, drawDifferences] : []), drawFronts, drawSamples],
};

function changed(what) {
  state.off = [...off];
  remember();
  pressed();
  redraw(REDRAWN[what]);
}

// ---- what is on the screen is drawn at once, the rest as soon as the browser has nothing else to do

// Where the drawings are that take their time; all others are drawn at once.
const PLACES = new Map([[drawCurves, "curves"], [drawScatter, "scatter"], [drawParallel, "parallel"], [drawIntervals, "intervals"], [drawFronts, "tradeoffs"]]);
const due = new Set();
const soonIdle = window.requestIdleCallback ? (work) => requestIdleCallback(work, { timeout: 500 }) : (work) => setTimeout(work, 30);

function redraw(drawings) {
  for (const drawing of drawings) due.add(drawing);
  delete document.documentElement.dataset.complete;
  for (const drawing of due) if (isOnScreen(PLACES.get(drawing))) drawDue(drawing);
  soonIdle(drawOneMore);
}

function drawOneMore() {
  const [next] = due;
  if (next) drawDue(next);
  if (due.size) soonIdle(drawOneMore);
  else document.documentElement.dataset.complete ??= milliseconds();
}

function drawDue(drawing) {
  due.delete(drawing);
  drawing();
}

function isOnScreen(id) {
  if (!id) return true;
  const { top, bottom } = $(id).getBoundingClientRect();
  return top < innerHeight && bottom > 0;
}

/** Since the page began to load. */
const milliseconds = () => String(Math.round(performance.now()));

addEventListener("beforeprint", () => due.forEach(drawDue));

function pressed() {
  document.querySelectorAll("[data-status]").forEach((chip) => chip.setAttribute("aria-pressed", !state.hidden.includes(chip.dataset.status)));
  for (const id of ["training", "validation"]) $(id).setAttribute("aria-pressed", state[id]);
}

// ---- controls

function options(id, entries, value, onChoice) {
  $(id).replaceChildren(...entries.map(([key, label]) => el("option", { value: key }, label)));
  $(id).value = value;
  $(id).addEventListener("change", () => onChoice($(id).value));
}

function soon(work) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, 120);
  };
}

function wire() {
  const metrics = Object.keys(DATA.curves);
  const preferred = ["val/exact_match", "train/grad_norm", "train/lr", ...metrics].find((name) => metrics.includes(name));
  if (!metrics.includes(state.metric)) state.metric = preferred ?? null;
  options("metric", metrics.map((name) => [name, name]), state.metric, (value) => choose({ metric: value }, "curves"));
  options("colour", COLOURINGS.map((one) => [one.key, one.label]), coloured().key, (value) => choose({ colour: value }, "colours"));
  $("x").value = state.x;
  $("x").addEventListener("change", () => choose({ x: $("x").value }, "curves"));
  $("smooth").value = state.smooth;
  const redraw = soon(() => choose({ smooth: Number($("smooth").value) }, "curves"));
  $("smooth").addEventListener("input", redraw);
  $("log").checked = state.log;
  $("log").addEventListener("change", () => choose({ log: $("log").checked }, "curves"));
  for (const id of ["training", "validation"]) $(id).addEventListener("click", () => choose({ [id]: !state[id] }, "curves"));

  const settings = SETTINGS.filter((column) => !column.key.startsWith("run."));
  const results = RESULTS.filter((column) => column.numeric);
  if (!byKey(state.hx)) state.hx = decisive()?.key ?? null;
  if (!byKey(state.hy)) state.hy = results[0]?.key ?? null;
  options("hx", [...settings, ...results].map((column) => [column.key, column.label]), state.hx, (value) => choose({ hx: value }, "parameters"));
  options("hy", [...results, ...settings].map((column) => [column.key, column.label]), state.hy, (value) => choose({ hy: value }, "parameters"));

  $("filter").value = state.filter;
  const narrow = soon(() => choose({ filter: $("filter").value }, "chosen"));
  $("filter").addEventListener("input", narrow);
  $("statuses").replaceChildren(
    ...STATUSES.map((status) => el("button", { type: "button", class: "chip", "data-status": status, onclick: () => toggle(status) }, `${SIGNS[status]} ${status}`)),
  );
  $("statuses").hidden = STATUSES.length < 2;
  $("show-all").addEventListener("click", () => show(RUNS.map((_, i) => i)));
  $("show-none").addEventListener("click", () => show([]));
  $("show-best").addEventListener("click", () => show(best(8)));

  options("prompt", DATA.samples.map((sample, k) => [k, `${k + 1}. ${gist(sample.prompt)}`]), state.prompt, (value) => choose({ prompt: Number(value) }, "sample"));
  const turn = (by) => choose({ prompt: (state.prompt + by + DATA.samples.length) % DATA.samples.length }, "sample");
  $("previous").addEventListener("click", () => turn(-1));
  $("next").addEventListener("click", () => turn(1));

  if (HAS_SEEDS) {
    const groups = DATA.seeds.groups;
    const sign = DATA.less_is_better ? 1 : -1;
    const order = groups.map((_, k) => k).sort((a, b) => sign * (groups[a].mean - groups[b].mean));
    if (!(state.baseline in groups)) state.baseline = order[0];
    options("baseline", order.map((k) => [k, groups[k].name]), state.baseline, (value) => choose({ baseline: Number(value) }, "seeds"));
  }
  $("theme").addEventListener("click", () => {
    state.theme = isDark() ? "light" : "dark";
    retheme();
  });
  systemDark.addEventListener("change", retheme);
}

function choose(choice, what) {
  Object.assign(state, choice);
  changed(what);
}

function toggle(status) {
  const hidden = state.hidden.includes(status) ? state.hidden.filter((other) => other !== status) : [...state.hidden, status];
  choose({ hidden }, "chosen");
}

function show(these) {
  RUNS.forEach((_, i) => (these.includes(i) ? off.delete(i) : off.add(i)));
  changed("chosen");
}

function best(n) {
  const sign = DATA.less_is_better ? 1 : -1;
  const known = listed().filter((i) => DATA.results[i] !== null);
  return known.sort((a, b) => sign * (DATA.results[a] - DATA.results[b])).slice(0, n);
}

function retheme() {
  remember();
  applyTheme();
  redraw(REDRAWN.all);
}

function sections() {
  const present = { parameters: SETTINGS.length > 0, seeds: HAS_SEEDS, tradeoffs: DATA.best !== null && RUNS.length > 1, curves: Object.keys(DATA.curves).length > 0, samples: DATA.samples.length > 0 };
  for (const [id, shown] of Object.entries(present)) $(id).hidden = !shown;
  const shown = [...document.querySelectorAll("main > section:not([hidden])")];
  $("nav").replaceChildren(...shown.map((section) => el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)));
}

function keepFresh() {
  if (!DATA.refresh_s) return;
  const key = `${KEY} scroll`;
  try {
    scrollTo({ top: Number(sessionStorage.getItem(key) ?? 0), behavior: "instant" });
  } catch {
    // no storage: from the top
  }
  setTimeout(() => {
    try {
      sessionStorage.setItem(key, String(scrollY));
    } catch {
      // as above
    }
    location.reload();
  }, 1000 * DATA.refresh_s);
}

applyTheme();
drawAbout();
drawTiles();
drawFailures();
sections();
wire();
pressed();
redraw(REDRAWN.all);
keepFresh();
document.documentElement.dataset.drawn = milliseconds(); // what is on the screen
