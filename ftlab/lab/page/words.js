// What is read rather than looked at: the headline, failures, samples.

function drawAbout() {
  const counts = STATUSES.map((status) => `${RUNS.filter((run) => run.status === status).length} ${status}`);
  const when = new Date(DATA.written);
  const written = when.toLocaleString("en-GB", { day: "numeric", month: "long", year: "numeric", hour: "2-digit", minute: "2-digit" });
  const again = DATA.refresh_s ? ` · loads itself again every ${short(DATA.refresh_s)} s` : "";
  $("about").textContent = `${RUNS.length} run${RUNS.length === 1 ? "" : "s"} · ${counts.join(" · ")} · ${written}${again}`;
}

function drawTiles() {
  const tile = (what, value, which) => el("div", { class: "tile" }, el("span", { class: "what" }, what), el("b", {}, value), el("span", { class: "which muted" }, which));
  const sum = (key) => (byKey(key)?.cells ?? []).reduce((total, cell) => total + (cell ?? 0), 0);
  const tiles = [];
  if (DATA.best !== null) {
    tiles.push(tile(`best ${DATA.metric}`, thousands(DATA.results[DATA.best], 4), told(DATA.best)));
  }
  const match = byKey("val/exact_match");
  if (match) {
    const most = Math.max(...match.cells.filter((cell) => cell !== null));
    tiles.push(tile("best exact match", `${(100 * most).toFixed(1)} %`, told(match.cells.indexOf(most))));
  }
  const speed = byKey("perf/tokens_per_s");
  if (speed) {
    const most = Math.max(...speed.cells.filter((cell) => cell !== null));
    tiles.push(tile("fastest", `${short(Math.round(most))} tokens/s`, told(speed.cells.indexOf(most))));
  }
  tiles.push(tile("trained", `${short(sum("tokens"))} tokens`, `${thousands(sum("steps"))} steps in ${duration(sum("duration_s"))} of runs`));
  $("tiles").replaceChildren(...tiles);
}

const WENT_WRONG = ["failed", "lost", "unknown"];
const MEANING = {
  diverged: "diverged: a loss or gradient was not finite", out_of_memory: "out of memory", killed: "killed", disk: "the disk",
  bad_input: "bad input", interrupted: "interrupted", error: "error",
};

function drawFailures() {
  const failed = RUNS.filter((run) => WENT_WRONG.includes(run.status) || run.error);
  const shown = failed.slice(0, 60);
  $("failures").hidden = !failed.length;
  const cards = shown.map((run) => {
    const kind = run.error ? (MEANING[run.error.kind] ?? run.error.type) : run.status === "lost" ? "its process is gone" : "no run.json that can be read";
    const message = run.error?.message || (run.status === "lost" ? "The run says that it is running, but its process has ended without a word: killed, or the machine went down. Its checkpoints are as they were." : "");
    const links = Object.entries(run.files).map(([name, link]) => el("a", { href: link }, name));
    return el(
      "div", { class: "card failure" },
      el("div", { class: "cardhead" }, el("h3", {}, el("a", { href: run.link }, run.label)), statusOf(run)),
      el("p", { class: "muted" }, `${told(RUNS.indexOf(run))} · ${kind} · after ${thousands(run.step)} steps`),
      message ? el("pre", {}, message) : null,
      el("div", { class: "links" }, ...links),
    );
  });
  if (failed.length > shown.length) cards.push(el("p", { class: "muted" }, `and ${failed.length - shown.length} more, in the table`));
  $("failed").replaceChildren(...cards);
}

const MOST_ANSWERS = 18;

/** When an answer was given, and for which evaluation if it was not in training. */
const where = (answer) => `step ${thousands(answer.step)}${answer.on ? `, ${answer.on}` : ""}`;

function drawSamples() {
  if (!DATA.samples.length) return;
  state.prompt = Math.min(state.prompt, DATA.samples.length - 1);
  $("prompt").value = state.prompt;
  const sample = DATA.samples[state.prompt];
  const shown = plotted();
  const place = new Map(shown.map((i, k) => [i, k]));
  const answers = sample.answers.filter((answer) => place.has(answer.run)).sort((a, b) => place.get(a.run) - place.get(b.run));
  const colours = runColours();
  const cards = answers.slice(0, MOST_ANSWERS).map((answer) =>
    el(
      "div", { class: "card answer" },
      el(
        "div", { class: "cardhead" },
        el("span", { title: RUNS[answer.run].label }, el("span", { class: "swatch", style: `display:inline-block;margin-right:7px;background:${colours[answer.run].colour}` }), told(answer.run)),
        answer.correct === null || answer.correct === undefined ? el("span", { class: "muted" }, where(answer)) : answer.correct ? el("span", { class: "right", title: where(answer) }, "✓ right") : el("span", { class: "wrong", title: where(answer) }, "✕ wrong"),
      ),
      el("div", { class: "text" }, answer.text || "(nothing)"),
    ),
  );
  const reference = sample.reference ? [el("h3", { style: "margin-top:14px" }, "Reference"), el("div", { class: "text" }, sample.reference)] : [];
  $("answers").replaceChildren(
    el("div", { class: "card" }, el("h3", {}, "Prompt"), el("div", { class: "text" }, sample.prompt), ...reference),
    el("div", { class: "answers" }, ...cards),
    answers.length > MOST_ANSWERS ? el("p", { class: "muted note" }, `The first ${MOST_ANSWERS} of ${answers.length} runs in the table’s order; untick or filter to see others.`) : "",
  );
}

/** A prompt's own words, without the template around them: its last lines that say something. */
function gist(prompt) {
  const lines = prompt.split("\n").map((line) => line.trim()).filter((line) => line && !/^(#|<\|)|:$/.test(line));
  return lines.slice(-2).join(" · ").slice(0, 90) || prompt.slice(0, 90);
}
