"""``ftlab diff``, ``ls``, ``tree`` and ``reproduce``: two runs and the one thing in which they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ftlab.cli import main as ftlab
from ftlab.config.check import compose_config
from ftlab.errors import ConfigError
from ftlab.jobs import launch
from ftlab.lab import reproduce as reproducing
from ftlab.lab.diff import diff, open_run
from ftlab.lab.listing import select
from ftlab.lab.reproduce import reproduce
from ftlab.lab.runs import RunRecord
from tests.cli.conftest import SMALL
from tests.lab.folders import make_run

QUICK = ("trainer.max_steps=4", "evaluation.at_start=false", "evaluation.n_samples=0", "checkpoint.export=false")


def write_rows(path: Path, answer: str = "b") -> Path:
    rows = [{"instruction": f"question {i}", "input": "", "output": answer} for i in range(20)]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("change", "key", "step"),
    [
        ("optimizer.lr=0.001", "optimizer.lr", 1),  # the rate itself; the loss follows at step 2
        ("seed=1", "seed", 1),
        ("trainer.max_grad_norm=0.1", "trainer.max_grad_norm", 2),
        ("scheduler=constant", "scheduler._target_", 3),  # after a step of warm-up and the peak
        ("model.rope_theta=500.0", "model.rope_theta", 1),
    ],
)
def test_the_value_that_differs_is_named_first_with_the_step_where_it_shows(tiny_run, change, key, step, capsys):
    base = tiny_run(*QUICK, "scheduler.warmup_steps=1").folder
    other = tiny_run(*QUICK, "scheduler.warmup_steps=1", change, name="other").folder
    capsys.readouterr()
    found = diff(open_run(str(base)), open_run(str(other)))
    assert found.settings[0].key == key
    assert found.partings[0].step == step
    assert not found.inputs
    assert found.samples[0]
    assert (found.samples[0] == found.samples[1]) == (key != "seed")
    assert ftlab(["diff", str(base), str(other)]) == 1
    said = capsys.readouterr().out
    assert said.index(key) < said.index(f"part at step {step}")


def test_what_was_typed_comes_before_what_follows_from_it(tiny_run, tmp_path):
    folders = []
    for name, theta in (("a", 100.0), ("b", 200.0)):
        folder = tiny_run(*QUICK, f"model.rope_theta={theta}", f"optimizer.eps={theta}e-10", name=name).folder
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"optimizer.eps={theta}e-10"]))
        folders.append(folder)
    found = diff(*map(RunRecord, folders))
    assert [change.key for change in found.settings if change.decides] == ["optimizer.eps", "model.rope_theta"]


def test_equal_runs_are_equal_to_the_bit_and_what_has_no_effect_is_set_apart(tiny_run, capsys):
    base, same = (tiny_run(*QUICK, name=name).folder for name in ("a", "b"))
    shown = tiny_run(*QUICK, "checkpoint.keep_last=1", name="c").folder
    capsys.readouterr()
    assert ftlab(["diff", str(base), str(same)]) == 0
    assert "equal to the bit at all 4 common steps" in capsys.readouterr().out
    assert ftlab(["diff", str(base), str(shown), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["key"] for one in found["settings"] if one["decides"]] == []
    assert {"checkpoint.keep_last", "paths.output_dir"} <= {one["key"] for one in found["settings"]}


def test_changed_rows_are_told_by_their_fingerprint(tiny_run, tmp_path):
    alpaca = (*QUICK, "dataset=alpaca", "dataset.source=json", f"dataset.data_files={tmp_path / 'rows.json'}")
    write_rows(tmp_path / "rows.json")
    base = tiny_run(*alpaca).folder
    write_rows(tmp_path / "rows.json", answer="c")
    found = diff(RunRecord(base), RunRecord(tiny_run(*alpaca, name="other").folder))
    assert [change.key for change in found.inputs] == ["rows", "dataset"]
    assert [change for change in found.settings if change.decides] == []


# ---- what a folder tells of where and how a run ran

HERE = {
    "data_fingerprint": "abc",
    "code": {"commit": "c1", "dirty": False},
    "versions": {"torch": "2.12"},
    "hardware": {"cpu": "x"},
    "device": "CPU, 1 threads",
    "global_batch_size": 8,
}
SESSION = {"step": 5, "ranks": 1, **{part: HERE[part] for part in ("code", "versions", "hardware")}}


@pytest.mark.parametrize(
    ("before", "after", "part", "keys"),
    [
        ({}, {}, "environment", []),
        (
            {},
            {"device": "CPU, 1 threads × 2", "global_batch_size": 16},
            "environment",
            ["device", "global_batch_size"],
        ),
        ({"device": None}, {}, "environment", []),  # of a version that did not note it
        ({"n_train_samples": 40}, {"n_train_samples": 39}, "inputs", ["n_train_samples"]),
        ({"resumed": [SESSION]}, {"resumed": [SESSION | {"ranks": 2}]}, "environment", ["resumed[0].ranks"]),
        ({}, {"resumed": [SESSION | {"ranks": 2}]}, "environment", []),  # the first session's are not known
        ({}, {"resumed": [SESSION]}, "environment", []),
        (
            {"resumed": [SESSION]},
            {"resumed": [SESSION, SESSION | {"versions": {"torch": "2.13"}}]},
            "environment",
            ["resumed[1].versions.torch"],
        ),
        (
            {"resumed": [SESSION]},
            {"resumed": [SESSION | {"code": {"commit": "c2", "dirty": False}}]},
            "code",
            ["resumed[0].code.commit"],
        ),
        (
            {"versions": {"torch": "2.11"}, "resumed": [SESSION | {"versions": {"torch": "2.11"}}]},
            {"resumed": [SESSION]},
            "environment",
            ["versions.torch"],  # once, not for every session
        ),
    ],
)
def test_where_and_how_each_session_ran_is_compared(before, after, part, keys, tmp_path):
    folders = [make_run(tmp_path / name, **(HERE | record)) for name, record in (("a", before), ("b", after))]
    found = diff(*map(RunRecord, folders))
    assert [change.key for change in getattr(found, part)] == keys
    assert found.same == (not keys)


def test_uncommitted_changes_are_not_known_to_be_equal(tmp_path, capsys):
    for name in "ab":
        make_run(tmp_path / name, **(HERE | {"code": {"commit": "c1", "dirty": True}}))
    assert ftlab(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "uncommitted changes, which are not known to be equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (
            ("a/config.yaml", "b/config.yaml", "a/run.json", "b/run.json"),
            ("config.yaml in A and B", "fingerprints in A and B"),
        ),
        (("b/config.yaml",), ("settings  not known: no config.yaml in B",)),
        (("a/run.json",), ("inputs  not known: no fingerprints in A",)),
    ],
)
def test_what_cannot_be_read_is_not_the_same(gone, words, tmp_path, capsys):
    for name in "ab":
        make_run(tmp_path / name, **HERE)
    for file in gone:
        (tmp_path / file).write_text("")
    assert ftlab(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    said = capsys.readouterr().out
    assert all(part in said for part in words)
    assert "evaluation.metric" not in said


def test_numbers_that_are_not_finite_are_told_in_words(tmp_path, capsys):
    for name, value in (("a", "nan"), ("b", "inf")):
        line = {"step": 1, "train/loss": None, "train/lr": 0.1, "non_finite": {"train/loss": value}}
        make_run(tmp_path / name, metrics=[line], **HERE)
    assert ftlab(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    [row] = [line for line in capsys.readouterr().out.splitlines() if "train/loss" in line]
    assert row.split() == ["train/loss", "1", "nan", "inf"]


def test_diff_says_what_is_no_run(tmp_path, capsys):
    assert ftlab(["diff", str(tmp_path), str(tmp_path)]) == 2
    assert "no run's folder" in capsys.readouterr().err


# ---- reproduce


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Outputs go to ``tmp_path``, and the run happens in this process: a process of its own takes seconds to start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproducing, "launch", lambda config, own_process: launch(config, own_process=False))
    return tmp_path


@pytest.fixture
def on_rows(tiny_run, tmp_path):
    write_rows(tmp_path / "rows.json")
    alpaca = ("dataset=alpaca", "dataset.source=json", f"dataset.data_files={tmp_path / 'rows.json'}")
    return tiny_run(*QUICK, *alpaca).folder


def test_an_unchanged_run_is_bitwise_the_same(on_rows, here, capsys):
    assert ftlab(["reproduce", str(on_rows)]) == 0
    assert "bitwise" in capsys.readouterr().out.splitlines()[-1]
    [again] = here.glob("outputs/*/*_reproduced*/reproduce.json")
    told = json.loads(again.read_text())
    assert [one["what"] for one in told["compared"]] == [
        "weights and optimizer",
        "random states",
        "metrics.jsonl",
        "final metrics",
    ]
    assert all(one["same"] for one in told["compared"])


def test_a_changed_file_is_named_with_both_fingerprints_and_nothing_is_run(on_rows, here, capsys):
    write_rows(here / "rows.json", answer="c")
    assert ftlab(["reproduce", str(on_rows)]) == 1
    said = capsys.readouterr().out
    before = json.loads((on_rows / "data_report.json").read_text())["fingerprints"]["rows"]
    assert f"rows ({here / 'rows.json'}): {before} ->" in said
    assert "inputs changed" in said
    assert not (here / "outputs").exists()


@pytest.mark.parametrize(("factor", "verdict"), [(1 + 1e-6, "within tolerance"), (1.1, "differs")])
def test_a_run_that_does_not_come_out_the_same_is_judged_by_its_losses(on_rows, here, factor, verdict):
    lines = [json.loads(line) for line in (on_rows / "metrics.jsonl").read_text().splitlines()]
    lines[2]["train/loss"] *= factor
    (on_rows / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = reproduce(RunRecord(on_rows))
    assert found.verdict == verdict
    assert [one.what for one in found.compared if not one.same] == ["metrics.jsonl"]


BARE = (*QUICK, "checkpoint.at_end=false", "checkpoint.every_epoch=false", "logger=[console]")


@pytest.mark.parametrize(
    ("change", "verdict", "exit_code"),
    [({}, "same as logged", 0), ({"lr": 0.5}, "differs", 1)],
)
def test_without_weights_it_is_judged_by_what_was_logged(change, verdict, exit_code, here, capsys):
    folder = here / "run"
    assert launch(compose_config([*SMALL, *BARE], output_dir=folder), own_process=False) == 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optimizer"] |= change
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    capsys.readouterr()
    assert ftlab(["reproduce", str(folder)]) == exit_code
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith(verdict)
    assert "metrics.jsonl" not in said


def test_a_run_that_left_nothing_to_compare_is_refused(here, capsys):
    assert ftlab(["reproduce", str(make_run(here / "bare"))]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_another_number_of_ranks_is_named(on_rows, here):
    record = json.loads((on_rows / "run.json").read_text()) | {"device": "CPU × 2", "global_batch_size": 16}
    (on_rows / "run.json").write_text(json.dumps(record))
    named = {one.key: one.before for one in reproduce(RunRecord(on_rows)).inputs}
    assert (named["device"], named["global_batch_size"]) == ("CPU × 2", 16)


def test_other_code_or_versions_are_named(on_rows, here):
    record = json.loads((on_rows / "run.json").read_text())
    record["versions"]["torch"] = "1.13"
    (on_rows / "run.json").write_text(json.dumps(record))
    assert ("versions.torch", "1.13") in [(one.key, one.before) for one in reproduce(RunRecord(on_rows)).inputs]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "failed"}, "is failed"),
        ({"resumed": [{"step": 2, "overrides": ["trainer.epochs=5"]}]}, "changed on its way: trainer.epochs=5"),
    ],
)
def test_a_run_that_no_one_configuration_makes_is_refused(on_rows, here, change, words):
    record = json.loads((on_rows / "run.json").read_text()) | change
    (on_rows / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=words):
        reproduce(RunRecord(on_rows))


# ---- ls, tree


@pytest.fixture
def lab(tmp_path: Path, monkeypatch) -> Path:
    """Three runs as their folders tell of them: one, its fork, and one that failed."""
    monkeypatch.chdir(tmp_path)
    facts = {
        "first": {"status": "completed", "started": "2026-01-02", "metrics": {"val/loss": 2.0}},
        "fork": {
            "status": "completed",
            "started": "2026-01-03",
            "metrics": {"val/loss": 1.0},
            "parent_run": str(tmp_path / "outputs" / "first" / "checkpoints" / "step_00000050"),
            "resumed": [{"at": "2026-01-04", "step": 7, "overrides": ["trainer.epochs=2"]}],
        },
        "bad": {"status": "failed", "started": "2026-01-01", "error": {"type": "NonFiniteError", "message": "step 3"}},
    }
    for name, record in facts.items():
        folder = tmp_path / "outputs" / name
        (folder / ".hydra").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"name": name} | record))
        optimizer = {"_target_": "torch.optim.AdamW", "lr": {"first": 1e-5}.get(name, 0.01)}
        config = {"optimizer": optimizer, "trainer": {"max_steps_per_epoch": None}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["seed=0", f"run_name={name}"]))
        if name != "bad":
            noted = {"hydra": {"runtime": {"choices": {"optimizer": "adamw", "debug": None}}}}
            (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(noted))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["bad", "first", "fork"]),
        (["status=failed"], ["bad"]),
        (["status!=failed"], ["first", "fork"]),
        (["val/loss<1.5"], ["fork"]),
        (["optimizer.lr=1e-5"], ["first"]),
        (["optimizer.lr>=0.01", "status=completed"], ["fork"]),
        (["optimizer.lr<1e-2"], ["first"]),
        (["optimizer=adamw"], ["first", "fork"]),
        (["optimizer=AdamW"], ["bad"]),  # where Hydra's notes are gone
        (["trainer.max_steps_per_epoch=null"], ["bad", "first", "fork"]),
        (["started>=2026-01-02", "started<2026-01-03"], ["first"]),
        (["name=[bf]*[td]"], ["bad", "first"]),
        (["name=f*", "outputs"], ["first", "fork"]),
        (["outputs/fork"], ["fork"]),
    ],
)
def test_ls_takes_folders_and_filters(lab, words, names):
    assert [run.name for run in select(words)] == names


def test_ls_sorts_shows_columns_and_speaks_json(lab, capsys):
    assert [run.name for run in select([], "val/loss")] == ["fork", "first", "bad"]
    assert ftlab(["ls", "--columns", "optimizer.lr"]) == 0
    said = capsys.readouterr().out
    assert "1e-05" in said
    assert "run_name=fork" in said
    assert "seed=0" not in said, "what was typed for every run tells nothing"
    assert ftlab(["ls", "--json", "status=failed"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["error"]["type"] == "NonFiniteError"
    assert ftlab(["ls", "--json", "name=fork"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["optimizer"] == "adamw"
    assert ftlab(["ls", "optimizer.lrr=1"]) == 2
    assert "no run has" in capsys.readouterr().err


def test_nothing_is_cut_where_the_terminal_is_narrow(lab, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = "outputs/" + "a_folder_of_many_words_" * 8
    (lab / "outputs" / "fork").rename(lab / long)
    for verb, facts in (("ls", ["completed", "run_name=fork"]), ("tree", ["completed", "val 1"])):
        assert ftlab([verb]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if long in line]
        assert all(fact in line for fact in facts)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert ftlab(["ls"]) == 0
    assert "…" not in capsys.readouterr().out


def test_tree_draws_forks_and_resumes(lab, capsys):
    assert ftlab(["tree"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [first, fork, resumed] = [
        next(i for i, line in enumerate(lines) if word in line) for word in ("outputs/first", "from step 50", "resumed")
    ]
    assert first < fork < resumed
    assert lines[fork].lstrip("└─ ").startswith("outputs/fork")
    assert "step 7" in lines[resumed]
    assert "trainer.epochs=2" in lines[resumed]
