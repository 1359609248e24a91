"""The report: what is in the page, and what a browser makes of it."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import subprocess
import sys

import pytest

from ftlab.cli import main
from ftlab.errors import ConfigError
from ftlab.lab import report
from ftlab.lab.report import write_report
from ftlab.outputs.sweep import SweepFolder, fail
from tests.lab.browser import CHROMIUM, chromium
from tests.lab.folders import make_run

pytest.importorskip("plotly", reason="the extra report is not installed")
HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 2'>\u2028${1}%%style%%"


def a_run(folder, lr, seed, *, n_steps=200, **given):
    draw = random.Random(repr((lr, seed)))
    losses = [0.5 + 2 * math.exp(-lr * 4 * step) + 0.02 * seed + draw.gauss(0, 0.05) for step in range(1, n_steps + 1)]
    rows = [
        {"step": step, "tokens": 400 * step, "train/loss": loss, "train/lr": lr, "train/grad_norm": 1 / step}
        for step, loss in enumerate(losses, 1)
    ]
    rows += [{"step": n_steps, "val/loss": losses[-1], "val/exact_match": 0.25}]
    samples = [
        {"step": n_steps, "sample_id": i, "prompt": f"{i} + 1 =", "generated": "42", "reference": "2", "correct": False}
        for i in range(3)
    ]
    final = {"val/loss": losses[-1], "train/loss": losses[-1], "perf/tokens_per_s": 1000 + seed, "memory/peak_gib": lr}
    told = {"metrics": rows, "samples": samples, "final": final, "duration_s": 61.0, **given}
    return make_run(folder, changes={"optimizer.lr": lr, "seed": seed}, **told)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three learning rates by two seeds, and three runs that went wrong, with names that no page should believe."""
    folder = tmp_path_factory.mktemp("sweep")
    for job, (lr, seed) in enumerate((lr, seed) for lr in (1e-3, 1e-2, 3e-2) for seed in (0, 1)):
        a_run(folder / f"{job}_lr={lr}", lr, seed)
    told = {"NonFiniteError": "diverged", "OutOfMemoryError": "out_of_memory", "ConfigError": "bad_input"}
    for job, (name, kind) in enumerate(told.items(), 6):
        error = {"type": name, "kind": kind, "message": f"{name} of job {job} {HOSTILE}"}
        a_run(folder / f"{job}_lr=9", 9.0, 0, n_steps=5, status="failed", error=error, name=f"tiny {HOSTILE}")
    return folder


def payload_of(page):
    """The JSON block of a page, read as a browser does: up to the first end of a script."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_holds_all_it_needs_and_no_text_of_a_user_ends_its_script(sweep, tmp_path):
    page = write_report([sweep], tmp_path, title=f"grid {HOSTILE}")
    told = payload_of(page)
    assert told["title"] == f"grid {HOSTILE}"
    assert [run["label"] for run in told["runs"]] == [f"#{job}" for job in range(9)]
    assert told["runs"][6]["error"]["message"].endswith(HOSTILE)
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"<script\b", text.partition('id="data">')[0])) == 1  # the title's is escaped
    assert not re.search(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)\s*=\s*["']?https?:""", text)
    assert "default-src 'none'" in text


def test_jobs_that_left_no_run_are_listed_with_what_their_sweep_knows(tmp_path):
    sweep = SweepFolder(tmp_path / "sweeps" / "grid", {"metric": "val/loss"})
    for lr in ("0.001", "1e-05", "0.01", "0.02"):
        sweep.add([f"optimizer.lr={lr}", "seed=0"], f"{len(sweep.jobs)}_lr={lr}")
    a_run(sweep.path / sweep.jobs[0].folder, 1e-3, 0)
    early = sweep.path / sweep.jobs[1].folder  # it failed before it had a configuration
    (early / ".hydra").mkdir(parents=True)
    (early / ".hydra" / "overrides.yaml").write_text("- optimizer.lr=1e-05\n- seed=0\n")
    fail(early, ConfigError("optimizer.lr", "is small"))
    sweep.jobs[2].status, sweep.jobs[2].kind, sweep.jobs[2].error = "failed", "killed", "the machine went down"
    sweep.refresh()
    write_report([tmp_path / "sweeps"], tmp_path)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed", "failed", "failed", "pending"]
    assert [float(row["optimizer.lr"]) for row in rows] == [1e-3, 1e-5, 1e-2, 2e-2]
    assert [row["error"] for row in rows[2:]] == ["killed: the machine went down", ""]
    assert "is small" in rows[1]["error"]
    told = payload_of(tmp_path / "report.html")
    assert [run["label"] for run in told["runs"]] == ["#0", "#1", "#2", "#3"]
    assert told["runs"][3]["link"] is None
    write_report([sweep.path / sweep.jobs[0].folder], tmp_path / "one")
    assert len(payload_of(tmp_path / "one" / "report.html")["runs"]) == 1


def test_a_sweep_of_which_no_job_has_begun_is_reported_as_pending(tmp_path, capsys):
    sweep = SweepFolder(tmp_path / "grid", {"metric": "val/loss"})
    for lr in ("0.001", "0.01"):
        sweep.add([f"optimizer.lr={lr}"], f"{len(sweep.jobs)}_lr={lr}")
    sweep.path.mkdir()
    sweep.refresh()
    assert main(["report", str(sweep.path)]) == 0
    runs = payload_of(sweep.path / "report.html")["runs"]
    assert [(run["label"], run["status"]) for run in runs] == [("#0", "pending"), ("#1", "pending")]
    assert main(["ls", str(sweep.path)]) == 2
    assert f"no job has begun a run in {sweep.path}: 2 pending" in capsys.readouterr().err


def test_answers_of_a_small_evaluation_stand_beside_those_of_training(tmp_path):
    run = a_run(tmp_path / "run", 1e-3, 0)
    answers = [
        {"prompt": "0 + 1 =", "generated": text, "reference": "1", "correct": text == "1"} for text in ("42", "1")
    ]
    many = [{"prompt": str(i), "generated": "", "reference": "", "correct": None} for i in range(1000)]
    found = [{"on": "sums", "step": 200, "samples": answers}, {"on": "many", "step": 200, "samples": many}]
    (run / "evaluation.json").write_text(json.dumps(found))
    samples = payload_of(write_report([run], tmp_path))["samples"]
    assert [sample["prompt"] for sample in samples] == ["0 + 1 =", "1 + 1 =", "2 + 1 ="]
    assert [(answer["text"], answer["on"]) for answer in samples[0]["answers"]] == [("42", None), ("1", "sums")]


def test_the_table_is_written_too(sweep, tmp_path):
    write_report([sweep], tmp_path)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["completed"] * 6 + ["failed"] * 3
    assert rows[7]["error"] == f"OutOfMemoryError: OutOfMemoryError of job 7 {HOSTILE}"


def test_without_plotly_the_error_names_the_extra(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"plotly.*not installed\n  try: pip install 'ftlab\[report\]'"):
        write_report([sweep], tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_metric_is_refused_with_those_there_are(sweep, capsys):
    assert main(["report", str(sweep), "--metric", "val/accuracy"]) == 2
    assert "no run has 'val/accuracy'; there are memory/peak_gib, perf/tokens_per_s, train/" in capsys.readouterr().err


def test_watching_ends_with_the_last_run_and_the_page_then_stays_as_it_is(tmp_path, monkeypatch, capsys):
    folder = a_run(tmp_path / "run", 1e-3, 0, status="running")
    pages = []

    def sleep(seconds):
        assert seconds == 3
        pages.append(payload_of(tmp_path / "run" / "report.html"))
        record = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(record | {"status": "completed", "ended": "now"}))

    monkeypatch.setattr(report.time, "sleep", sleep)
    assert main(["report", str(folder), "--watch", "3"]) == 0
    [first], last = pages, payload_of(folder / "report.html")
    assert (first["refresh_s"], first["runs"][0]["status"]) == (3, "running")
    assert (last["refresh_s"], last["runs"][0]["status"]) == (None, "completed")
    assert capsys.readouterr().out.splitlines()[0].endswith("report.html: 1 running")


def test_writing_a_report_needs_no_torch(sweep, tmp_path):
    code = f"import sys; from ftlab.cli import main; main(['report', {str(sweep)!r}, '--out', {str(tmp_path)!r}]);"
    subprocess.run([sys.executable, "-c", f"{code} assert not {{'torch', 'plotly'}} & set(sys.modules)"], check=True)


# ---- in a browser


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    written = write_report([sweep], tmp_path_factory.mktemp("report"), title=f"grid {HOSTILE}")
    with chromium() as page:
        page.look(1440, 900)
        page.open(written)
        yield page


ROWS = "[...document.querySelectorAll('#table tbody tr')].map(row => Number(row.dataset.run))"
DRAWN = "(document.getElementById('{}').data ?? []).length"
CURVES = "document.getElementById('loss').data.filter(t => t.opacity === 1).flatMap(t => t.meta).length"


def type_in(page, text):
    page.act(f"$('filter').value = {json.dumps(text)}; $('filter').dispatchEvent(new Event('input'))")


def test_it_opens_from_a_file_without_complaints_or_requests(page, sweep):
    assert page.complaints == []
    assert [address for address in page.requests if not address.startswith(("file:", "data:", "blob:"))] == []
    assert page.run("window.harmed") is None
    assert page.run("document.querySelector('h1').textContent") == f"grid {HOSTILE}"
    for plot in ("loss", "other", "scatter", "parallel", "intervals", "speed", "memory"):
        assert page.run(DRAWN.format(plot)) > 0, plot
    links = page.run("[...document.querySelectorAll('#table a')].map(a => a.href)")
    assert [link.rstrip("/").rpartition("/")[2] for link in links[:2]] == ["0_lr%3D0.001", "1_lr%3D0.001"]


def test_the_table_sorts_both_ways_and_filters_by_words_comparisons_and_status(page):
    click = "[...document.querySelectorAll('#table th button')].find(b => b.textContent === '{}').click()"
    losses = page.run("byKey('val/loss').cells")
    page.act(click.format("val/loss"))
    assert page.run(ROWS) == sorted(range(9), key=lambda i: losses[i])
    page.act(click.format("val/loss"))
    assert page.run(ROWS) == sorted(range(9), key=lambda i: -losses[i])
    page.act(click.format("run"))
    for text, rows in (
        ("lr<=0.01", [0, 1, 2, 3]),
        ("lr>=0.01 seed=1 status=completed", [3, 5]),
        ("outofmemoryerror", [7]),
        ("seed!=0 lr=0.03", [5]),
        ("nothing of the kind", []),
    ):
        type_in(page, text)
        assert page.run(ROWS) == rows, text
    assert page.run("document.querySelector('#loss .annotation-text').textContent").startswith("nothing to show")
    type_in(page, "")
    page.act("document.querySelector('[data-status=failed]').click()")
    assert page.run(ROWS) == [0, 1, 2, 3, 4, 5]
    page.act("document.querySelector('[data-status=failed]').click()")


def test_ticking_choosing_and_smoothing_change_the_curves(page):
    page.act("$('smooth').value = 0; $('smooth').dispatchEvent(new Event('input'))")
    assert page.run(CURVES) == 18  # training and validation of nine runs
    page.act("$('validation').click()")
    assert page.run(CURVES) == 9
    page.act("document.querySelector('#table tr[data-run=\"2\"] input').click()")
    assert page.run(CURVES) == 8
    page.act("$('colour').value = 'run'; $('colour').dispatchEvent(new Event('change'))")
    last = "document.getElementById('loss').data[{}].y.filter(y => y !== null).slice(-20)"
    raw = page.run(last.format(0))
    page.act("$('smooth').value = 60; $('smooth').dispatchEvent(new Event('input'))")
    smooth = page.run(last.format(1))  # after the faint one of the same run
    assert max(smooth) - min(smooth) < (max(raw) - min(raw)) / 3
    page.act("$('metric').value = 'train/lr'; $('metric').dispatchEvent(new Event('change'))")
    assert page.run("document.getElementById('other').data[0].y[0]") == pytest.approx(1e-3)
    page.act("$('x').value = 'tokens'; $('x').dispatchEvent(new Event('change'))")
    assert page.run("document.getElementById('other').data[0].x.at(-2)") == pytest.approx(80_000)
    page.act("$('show-all').click(); $('validation').click()")
    assert page.complaints == []


def test_a_part_that_is_enlarged_is_drawn_with_all_its_points_until_a_double_click(page):
    page.act(
        "Object.assign(POINTS, { in_all: 9 * 20, fewest: 20 }); choose({ smooth: 0, colour: 'run', x: 'step' }, 'all')"
    )
    within = "document.getElementById('loss').data[0].x.filter(x => x >= 50 && x <= 60)"
    assert len(page.run(within)) < 4
    page.act("Plotly.relayout($('loss'), { 'xaxis.range': [50, 60] })")
    assert page.run(within) == list(range(50, 61))
    page.act("choose({ smooth: 40 }, 'curves')")  # another choice leaves it enlarged
    assert page.run("$('loss').layout.xaxis.range") == [50, 60]
    page.act("$('loss').emit('plotly_doubleclick')")
    assert page.run("[Math.min, Math.max].map(f => f(...$('loss').data[0].x.filter(x => x !== null)))") == [1, 200]
    page.act("Object.assign(POINTS, { in_all: 40000, fewest: 120 }); choose({ smooth: 30 }, 'all')")
    assert page.complaints == []


def test_failures_are_told_in_their_own_words(page):
    told = page.run("[...document.querySelectorAll('.failure')].map(card => card.textContent)")
    assert len(told) == 3
    for card, words in zip(told, ("diverged: a loss", "out of memory", "bad input"), strict=True):
        assert words in card
        assert HOSTILE in card
        assert "after 5 steps" in card


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (390, True), (320, False)])
def test_nothing_is_wider_than_the_window_in_either_theme(page, width, dark):
    page.look(width, 900, dark=dark)
    page.run("new Promise(done => setTimeout(done, 300))")
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    ground = page.run("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(16, 19, 23)") == dark
    page.act("$('theme').click()")
    assert page.run("document.documentElement.dataset.theme") == ("light" if dark else "dark")
    page.act("$('theme').click(); state.theme = null; remember()")
    assert page.complaints == []
