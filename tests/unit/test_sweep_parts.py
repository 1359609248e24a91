"""The parts of a sweep: kinds of failures, its record, shares of the machine, ranges of a search."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from ftlab.config.sweeps import extremes, with_resumed_sweep, wrong_sweep
from ftlab.errors import (
    ConfigError,
    ConfigErrors,
    DataError,
    FtlabError,
    Interrupted,
    KilledError,
    NonFiniteError,
    NotEnoughMemoryError,
    OutOfMemoryError,
    kind_of,
)
from ftlab.outputs import killed
from ftlab.outputs.folder import FolderInUseError
from ftlab.outputs.sweep import SweepFolder, fail, set_aside
from ftlab.typed import argument
from hydra_plugins.ftlab_sweeps.launcher import share_of


def cpu_allocation_error() -> BaseException:
    try:
        torch.empty(2**62, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NonFiniteError("step 3"), "diverged"),
        (MemoryError(), "out_of_memory"),
        (cpu_allocation_error(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
        (OSError(errno.ENOMEM, "no memory"), "out_of_memory"),
        (OutOfMemoryError("killed"), "out_of_memory"),
        (NotEnoughMemoryError("memory", "too large"), "out_of_memory"),
        (OSError(errno.ENOSPC, "full"), "disk"),
        (KilledError("SIGKILL"), "killed"),
        (ConfigErrors([ConfigError("a", "b")]), "bad_input"),
        (DataError("row 1"), "bad_input"),
        (Interrupted(signal.SIGTERM), "interrupted"),
        (ValueError("our own"), "error"),
    ],
)
def test_a_failure_has_a_kind(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def test_the_kernels_own_count_tells_a_killer_for_memory_from_another(tmp_path: Path, monkeypatch: Any) -> None:
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom 2\noom_kill 2\n")
    monkeypatch.setattr(killed, "_COUNTERS", (counter, tmp_path / "is_not_there"))
    watch = killed.Watch()
    assert kind_of(watch.explain(signal.SIGKILL)) == "killed"
    assert "SIGSEGV" in str(watch.explain(signal.SIGSEGV))
    counter.write_text("low 0\noom 3\noom_kill 3\n")
    assert kind_of(watch.explain(signal.SIGKILL)) == "out_of_memory"
    assert kind_of(watch.explain(signal.SIGSEGV)) == "killed"


# ------------------------------------------------------------------------------------------- sweep.json


def job_folder(sweep: Path, name: str, **record: Any) -> Path:
    (sweep / name).mkdir()
    (sweep / name / "run.json").write_text(json.dumps(record))
    return sweep / name


def test_the_record_follows_the_jobs_folders_and_survives_its_writer(tmp_path: Path) -> None:
    sweep = SweepFolder.begin(tmp_path / "sweep", ["-m", "seed=1,2,3,4"], "val/loss")
    for seed in range(1, 5):
        sweep.add([f"seed={seed}", "model.dim=8"], f"{seed - 1}_seed={seed}")
    sweep.refresh()
    done = job_folder(sweep.path, "0_seed=1", status="completed", progress={"step": 9})
    (done / "metrics.jsonl").write_text('{"step": 4, "val/loss": 2.5}\n{"step": 9, "val/loss": 1.5}\n{"step": 10, "val')
    job_folder(sweep.path, "1_seed=2", status="failed", error={"kind": "diverged", "message": "step 3"})
    pruned = job_folder(sweep.path, "2_seed=3", status="preempted", stopped_by="SIGUSR1")
    (pruned / "pruned.json").write_text("{}")
    del sweep  # as a kill would: nobody has written down what became of the jobs
    found = SweepFolder.read(tmp_path / "sweep")
    assert [(job.status, job.kind, job.value) for job in found.jobs] == [
        ("completed", None, 1.5),
        ("failed", "diverged", None),
        ("pruned", None, None),
        ("pending", None, None),
    ]
    assert [job.number for job in found.jobs if not job.is_done] == [1, 3]
    assert found.varying(found.jobs[0]) == ["seed=1"]
    assert found.job_of(["seed=4", "model.dim=8"]) is found.jobs[3]
    assert found.job_of(["seed=5", "model.dim=8"]) is None


def test_one_process_runs_a_sweep_at_a_time(tmp_path: Path) -> None:
    sweep = SweepFolder.begin(tmp_path, [], "val/loss")
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"):
        SweepFolder.begin(tmp_path, [], "val/loss")
    sweep.end()
    assert SweepFolder.begin(tmp_path, [], "val/loss").about["id"] == sweep.about["id"]


def test_a_job_that_is_still_held_is_not_run_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ftlab.outputs.sweep._CLOSING_S", 0.5)
    sweep = SweepFolder.begin(tmp_path, [], "val/loss")
    jobs = [sweep.add([f"seed={i}"], f"{i}_seed={i}") for i in range(2)]
    (tmp_path / jobs[0].folder).mkdir()
    code = f"import sys; from pathlib import Path; from ftlab.outputs.folder import hold; f = hold(Path({str(tmp_path / jobs[0].folder)!r})); print(1, flush=True); sys.stdin.read()"  # noqa: E501
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert list(sweep.wait_for_leftovers(jobs)) == [jobs[1]]
        other.communicate()
    assert list(sweep.wait_for_leftovers(jobs)) == jobs


def test_an_attempt_is_set_aside_whole_and_a_silent_end_is_written_down(tmp_path: Path) -> None:
    folder = job_folder(tmp_path, "0_seed=1", status="running")
    for name in (".hydra", "checkpoints"):
        (folder / name).mkdir()
    (folder / "metrics.jsonl").write_text("{}\n")
    for number in (1, 2):
        set_aside(folder)
        assert [path.name for path in folder.iterdir()] == [".hydra"]
        aside = Path(f"{folder}.attempt_{number}")
        assert {path.name for path in aside.iterdir()} >= {"run.json"}
        (folder / "run.json").write_text("{}")
    fail(folder, OutOfMemoryError("the kernel"))
    record = json.loads((folder / "run.json").read_text())
    assert (record["status"], record["error"]["kind"]) == ("failed", "out_of_memory")
    fail(folder, FtlabError("later"))
    assert json.loads((folder / "run.json").read_text()) == record, "the first word stays"


def test_a_sweep_is_gone_on_with_as_it_was_started_or_as_one_says_now(tmp_path: Path) -> None:
    SweepFolder.begin(tmp_path / "s", ["seed=1,2", "sweep.jobs_at_once=4"], "val/loss").end()
    resume, folder = f"sweep.resume={tmp_path / 's'}", f"paths.output_dir={tmp_path / 's'}"
    assert with_resumed_sweep([resume]) == ["-m", "seed=1,2", resume, folder]
    assert with_resumed_sweep(["-m", "seed=1,2,3", resume]) == ["-m", "seed=1,2,3", resume, folder]
    once = "sweep.jobs_at_once=2"
    assert with_resumed_sweep([resume, once]) == ["-m", "seed=1,2", resume, once, folder]
    assert with_resumed_sweep(["seed=1"]) == ["seed=1"]
    with pytest.raises(ConfigError, match="there is no sweep in"):
        with_resumed_sweep([f"sweep.resume={tmp_path}"])


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        {"jobs": []},
        {"jobs": [], "command": 3},
        {"jobs": [], "command": [3]},
        {"jobs": [], "command": [], "metric": None},
        {"jobs": [{"number": 0, "overrides": "seed=1", "folder": "0"}], "command": []},
        {"jobs": [{"number": 1, "overrides": [], "folder": "1"}], "command": []},
        {"jobs": [{"number": 0, "overrides": [], "folder": None}], "command": []},
    ],
)
def test_a_sweep_whose_record_is_not_one_is_refused(content: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"sweep\.resume: "):
        with_resumed_sweep([f"sweep.resume={tmp_path}"])


@pytest.mark.parametrize("name", ["s w", "it's", "0_seed=1", "1e3", "50% of $HOME"])
def test_a_sweep_is_gone_on_with_in_whatever_folder_it_is(name: str, tmp_path: Path) -> None:
    SweepFolder.begin(tmp_path / name, ["seed=1,2"], "val/loss").end()
    [*_, folder] = with_resumed_sweep([argument("sweep.resume", str(tmp_path / name))])
    assert OverridesParser.create().parse_override(folder).value() == str(tmp_path / name)


# ------------------------------------------------------------------------------------- shares, ranges


@given(n_things=st.integers(0, 40), n_shares=st.integers(1, 12))
def test_shares_are_equal_and_nothing_is_left_over(n_things: int, n_shares: int) -> None:
    things = list(range(n_things))
    shares = [share_of(things, share, n_shares) for share in range(n_shares)]
    if n_things >= n_shares:
        assert sorted(thing for share in shares for thing in share) == things
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    else:
        assert all(len(share) == min(1, n_things) for share in shares)


@pytest.mark.parametrize(
    ("text", "ends", "expected"),
    [
        (
            "tag(log,interval(1e-5,1e-1))",
            ["1e-05", "0.1"],
            "FloatDistribution(high=0.1, log=True, low=1e-05, step=None)",
        ),
        ("interval(0,2)", ["0", "2"], "FloatDistribution(high=2.0, log=False, low=0.0, step=None)"),
        ("tag(int,interval(1,9))", ["1", "9"], "IntDistribution(high=9, log=False, low=1, step=1)"),
        ("range(4,17,4)", ["4", "16"], "IntDistribution(high=16, log=False, low=4, step=4)"),
        ("range(9,0,-4)", ["9", "1"], "IntDistribution(high=9, log=False, low=1, step=4)"),
        ("adamw,sgd", ["adamw", "sgd"], "CategoricalDistribution(choices=('adamw', 'sgd'))"),
    ],
)
def test_a_range_in_hydras_grammar_is_optunas_and_is_checked_at_its_ends(text: str, ends: list[str], expected: str):
    pytest.importorskip("optuna")
    from hydra_plugins.ftlab_sweeps.search import distribution

    [swept] = OverridesParser.create().parse_overrides([f"key={text}"])
    assert str(distribution(swept)) == expected
    assert extremes(swept) == [f"key={end}" for end in ends]


@pytest.mark.parametrize(
    ("text", "told", "fix"),
    [
        ("interval(2,1)", "lower end last", "interval(1.0,2.0)"),
        ("tag(log,interval(2,1))", "lower end last", "tag(log,interval(1.0,2.0))"),
        ("tag(log,interval(0,1))", "above 0", "interval(0.0,1.0)"),
        ("tag(int,log,interval(0.5,8))", "above 0", "interval(0.5,8.0)"),
        ("interval(0,inf)", "has no ends", "interval(0,1)"),
        ("tag(log,interval(1e-5,1e-2))", None, None),
        ("range(9,0,-4)", None, None),
    ],
)
def test_an_interval_that_cannot_be_searched_is_refused(text: str, told: str | None, fix: str | None) -> None:
    problem = wrong_sweep(OverridesParser.create().parse_override(f"key={text}"), searched=True)
    assert (problem is None) == (told is None)
    if problem is not None:
        assert str(told) in problem.problem
        assert problem.fix == f"key='{fix}'"


_OURS = "hydra_plugins.ftlab_sweeps."


@pytest.mark.parametrize(
    ("kind", "target", "settings", "words"),
    [
        ("sweeper", "sweeper.GridSweeper", {"params": -1}, "hydra.sweeper.params: must hold keys"),
        ("sweeper", "sweeper.GridSweeper", {"seed": "1,2"}, "hydra.sweeper.seed: no setting of this sweeper"),
        ("sweeper", "search.OptunaSweeper", {"n_trials": 0}, "n_trials: must be >= 1"),
        ("sweeper", "search.OptunaSweeper", {"sampler": "tpa"}, "sampler=tpe"),
        ("launcher", "launcher.LocalLauncher", {"jobs_at_once": ":"}, "jobs_at_once: must be a whole number"),
        ("launcher", "launcher.LocalLauncher", {"n_jobs": 2}, "hydra.launcher.n_jobs: no setting of this launcher"),
    ],
)
def test_a_wrong_setting_of_a_sweeper_or_launcher_is_told_with_its_key(kind, target, settings, words):
    from ftlab.config.sweeps import wrong_settings

    [problem] = wrong_settings(kind, {"_target_": _OURS + target} | settings)
    assert words in str(problem)
