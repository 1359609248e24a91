"""A disk that is full, broken or gone costs the checkpoint that it hits, not the run and not the ones before."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ftlab.storage.checkpoints import verify
from tests.faults.acts import RaiseAt, RemoveAt
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, Trial, reference
from tests.faults.test_kills import FSDP, SINGLE, points_of
from tests.faults.trial import Outcome, Rank

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


@trials(few=8, all_=90)
def test_r13_a_failing_disk_costs_one_checkpoint(n: int, tmp_path: Path) -> None:
    claim = (
        "ENOSPC, EDQUOT, EIO at any change of a save, on any rank: told with path and rank, training goes on to the "
        "same state; at the last save exit 1; earlier checkpoints intact"
    )
    n_told = 0
    with Figure("R13", claim) as figure:
        for number in range(n):
            n_ranks, overrides = FSDP if number % 2 else SINGLE
            folder = Folder(tmp_path / str(number), *overrides, n_ranks=n_ranks)
            rng = figure.random(number)
            rank, code, last = rng.randrange(n_ranks), ERRORS[number % 3], number % 4 == 3
            other, expected = reference(*overrides, n_ranks=n_ranks)
            # Not the folder of checkpoints, which is made before there is anything to save.
            saves = [event for event in other.events(rank) if event.saves and event.step]
            points = points_of([event for event in saves if not last or event.step == 12], rank)
            point = list(points)[rng.randrange(len(points))]
            ours = [event for event in saves if event.point == point]
            nth = next(i for i, e in enumerate(ours) if e.step == 12) if last else rng.randrange(len(ours))
            last = ours[nth].step == 12
            removing = "remove" in point or point == "rename step_N.tmp"
            with figure.trial(f"{number}: {errno.errorcode[code]} at {point}, rank {rank}, {ours[nth].step}"):
                outcomes, stderr = trained(folder, act=RaiseAt(rank, point, nth, code))
                after_the_rename = point == "fsync_folder checkpoints" and ours[nth].number > 0
                told = os.strerror(code) in stderr
                n_told += told
                assert told, stderr
                assert "Traceback" not in stderr, stderr
                if not removing:
                    assert {outcome.exit_code for outcome in outcomes} <= ({0, 1} if after_the_rename else {int(last)})
                else:
                    assert {outcome.exit_code for outcome in outcomes} == {0}
                check_state(outcomes, expected)
                check_sound(folder, at_least=1)
                assert folder.record()["status"] == ("completed" if outcomes[0].exit_code == 0 else "failed")
                if outcomes[0].exit_code:  # the disk is well again: the run can be ended
                    check_state(folder.train(), expected)
                steps = [found.step for found in folder.checkpoints.complete()]
                assert steps[-1] == 12


@pytest.mark.parametrize("layout", [SINGLE, FSDP], ids=["single", "fsdp"])
def test_r13_a_disk_that_is_full_at_the_start(layout: tuple[int, tuple[str, ...]], tmp_path: Path) -> None:
    n_ranks, overrides = layout
    folder = Folder(tmp_path / "run", *overrides, n_ranks=n_ranks)
    with Trial(folder.plan(act=RaiseAt(0, "mkdir checkpoints", 0, errno.ENOSPC)), n_ranks) as trial:
        trial.end()
        assert set(trial.exit_codes()) == {1}  # of the other rank perhaps by its watch
        stderr = trial.stderr()
    assert "No space left on device" in stderr
    assert "Traceback" not in stderr, stderr
    assert folder.record()["status"] == "failed"
    assert not (folder.run / "metrics.jsonl").exists()  # nothing was trained that could not be kept


def trained(folder: Folder, **fields: object) -> tuple[list[Outcome], str]:
    with Trial(folder.plan(**fields), folder.n_ranks) as trial:
        outcomes, stderr = trial.end(), trial.stderr()
    assert all(outcomes), "killed"
    return outcomes, stderr  # type: ignore[return-value]


def check_state(outcomes: list[Outcome], expected: list[Outcome]) -> None:
    for mine, theirs in zip(outcomes, expected, strict=True):
        differing = [part for part, digest in theirs.ended.items() if mine.ended[part] != digest]
        assert not differing, differing


def check_sound(folder: Folder, at_least: int) -> None:
    found = folder.checkpoints.complete()
    assert len(found) >= at_least
    for one in found:
        verify(one, folder.record()["id"])


def limit_files(rank: Rank) -> None:
    """No file may be longer than this; rows are, the rest is not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_r13_a_limit_on_the_length_of_files(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    _, [expected] = reference()
    [outcome], stderr = trained(folder, before=limit_files)
    assert outcome.exit_code == 1
    assert stderr.count("no checkpoint was written: File too large") >= 4
    assert "Traceback" not in stderr, stderr
    check_state([outcome], [expected])
    assert folder.checkpoints.complete() == []
    assert folder.record()["status"] == "failed"
    check_state(folder.train(), [expected])


def test_r13_the_checkpoints_removed_in_the_middle(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    _, [expected] = reference()
    [outcome], stderr = trained(folder, act=RemoveAt(5, "checkpoints"))
    assert outcome.exit_code == 0, stderr
    check_state([outcome], [expected])
    assert [found.step for found in folder.checkpoints.complete()] == [9, 12]
    check_sound(folder, at_least=2)


def test_r13_the_whole_run_removed_in_the_middle(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    [outcome], stderr = trained(folder, act=RemoveAt(5, "."))
    assert outcome.exit_code == 1
    assert "no checkpoint was written: No such file or directory" in stderr
    assert f"{folder.run} cannot be closed" in stderr


@contextmanager
def mounted(at: Path, *arguments: str) -> Iterator[None]:
    at.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(at)], capture_output=True)
    if done.returncode:
        pytest.skip(f"no right to mount: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_r13_a_disk_that_is_really_full(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    _, [expected] = reference()
    with mounted(folder.run / "checkpoints", "-t", "tmpfs", "-o", "size=500k", "none"):
        config = folder.plan()
        with Trial(config) as trial:
            [outcome] = trial.end()
            stderr = trial.stderr()
        assert "No space left on device" in stderr
        assert "Traceback" not in stderr, stderr
        assert outcome is not None
        assert outcome.exit_code == 1
        check_state([outcome], [expected])
        check_sound(folder, at_least=1)
        assert folder.checkpoints.incomplete() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_r13_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    (folder.run / "checkpoints").mkdir(parents=True)
    with mounted(folder.run / "checkpoints", "-t", "tmpfs", "-o", "ro", "none"), Trial(folder.plan()) as trial:
        [outcome] = trial.end()
        stderr = trial.stderr()
    assert outcome is not None
    assert outcome.exit_code == 1
    assert "Read-only file system" in stderr
    assert "Traceback" not in stderr, stderr
