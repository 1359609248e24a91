"""The table of runs, groups that differ in their seed, and summary.csv."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ftlab.lab.runs import find_runs
from ftlab.lab.summary import summarise
from tests.lab.folders import make_run


def result(loss, speed=1000.0, memory=1.0):
    return {"val/loss": loss, "train/loss": loss, "perf/tokens_per_s": speed, "memory/peak_gib": memory}


@pytest.fixture
def sweep(tmp_path):
    """Two learning rates by three seeds, the second better under each; one of them failed at its last seed."""
    for job, (lr, seed) in enumerate((lr, seed) for lr in (1e-3, 2e-3) for seed in (1, 2, 3)):
        loss = 2.0 + 0.3 * seed - (0.1 if lr == 2e-3 else 0.0)
        fields = {"status": "failed", "error": {"type": "NonFiniteError", "message": "step 7"}} if job == 5 else {}
        make_run(
            tmp_path / f"{job}_lr",
            changes={"optimizer.lr": lr, "seed": seed},
            metrics=[{"step": 1, "val/loss": 9.0}, {"step": 2, "val/loss": loss - 0.05}, {"step": 3, "val/loss": loss}],
            final=result(loss, speed=1000 - job, memory=job),
            **fields,
        )
    return summarise(find_runs([tmp_path]))


def test_columns_are_the_settings_that_differ_then_the_results(sweep):
    settings = [(column.key, column.label) for column in sweep.columns if column.is_setting]
    assert settings == [("optimizer.lr", "lr"), ("seed", "seed")]
    results = [column.key for column in sweep.columns if not column.is_setting]
    assert results == [
        "val/loss", "best val/loss", "train/loss", "perf/tokens_per_s", "memory/peak_gib", "steps",
    ]  # fmt: skip
    assert sweep.column("best val/loss").cells[0] == pytest.approx(2.25)


def test_runs_of_other_seeds_are_one_group_and_compared_seed_by_seed(sweep):
    assert sweep.groups == [[0, 1, 2], [3, 4]]
    assert [sweep.named(group) for group in sweep.groups] == ["lr=0.001", "lr=0.002"]
    assert [one.n for one in sweep.over_seeds()] == [3, 2]
    difference = sweep.against(0)[1]
    assert (difference.n, difference.mean) == (2, pytest.approx(-0.1))


def test_a_failed_run_has_no_result_and_is_on_no_front(sweep):
    assert sweep.results[5] is None
    assert sweep.best == 3
    assert sweep.front("perf/tokens_per_s", more_is_better=True) == [True, False, False, True, False, False]
    assert sweep.front("memory/peak_gib", more_is_better=False) == [True, False, False, True, False, False]


def test_where_more_is_better_the_most_is_best(tmp_path):
    for job, share in enumerate((0.2, 0.9, 0.5)):
        changes = {"evaluation.metric": "val/exact_match"}
        make_run(tmp_path / str(job), changes=changes, metrics=[{"step": 1, "val/exact_match": share}])
    assert summarise(find_runs([tmp_path])).best == 1


def test_the_csv_has_every_digit_and_every_error(sweep):
    rows = list(csv.DictReader(io.StringIO(sweep.csv())))
    assert [float(row["optimizer.lr"]) for row in rows] == [1e-3] * 3 + [2e-3] * 3
    assert float(rows[0]["val/loss"]) == sweep.results[0]
    assert (rows[5]["status"], rows[5]["error"]) == ("failed", "NonFiniteError: step 7")


def test_labels_are_as_short_as_they_can_be_and_never_the_same(tmp_path):
    make_run(tmp_path / "0", changes={"optimizer.lr": 1, "scheduler.lr": 1, "optimizer._target_": "torch.optim.SGD"})
    make_run(tmp_path / "1", changes={"optimizer.lr": 2, "scheduler.lr": 2})
    summary = summarise(find_runs([tmp_path]))
    assert {c.key: c.label for c in summary.columns if c.is_setting} == {
        "optimizer": "optimizer",
        "optimizer.lr": "optimizer.lr",
        "scheduler.lr": "scheduler.lr",
    }
    assert summary.column("optimizer").cells == ["SGD", "AdamW"]


def test_other_code_or_data_is_a_column(tmp_path):
    for job, commit in enumerate("ab"):
        make_run(tmp_path / str(job), code={"commit": commit * 40, "dirty": job == 1}, data_fingerprint="same")
    assert summarise(find_runs([tmp_path])).column("run.commit").cells == ["aaaaaaaa", "bbbbbbbb+"]


@pytest.mark.parametrize("steps", [(None, None), (None, 5), (5, 30), (30, 5), (30, 30), ("30", 5)])
def test_what_was_evaluated_later_is_a_column_and_the_latest_step_counts(tmp_path, steps):
    folder = make_run(tmp_path / "0")
    found = [
        {"on": "gsm8k", "step": step, "scores": {"exact_match": score}}
        for step, score in zip(steps, (0.1, 0.25), strict=True)
    ]
    (folder / "evaluation.json").write_text(json.dumps(found))
    make_run(tmp_path / "1")
    expected = 0.1 if steps == (30, 5) else 0.25
    assert summarise(find_runs([tmp_path])).column("gsm8k: exact_match").cells == [expected, None]
