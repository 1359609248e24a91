"""A run that is killed, wherever, goes on to the very end it would have had."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from ftlab.storage.checkpoints import Checkpoints, verify
from tests.faults.acts import KillAt, TellAt
from tests.faults.figures import Figure, trials
from tests.faults.harness import WAIT_S, Folder, assert_same, reference

SINGLE: tuple[int, tuple[str, ...]] = (1, ())
FSDP = (2, ("parallelism=fsdp", "parallelism.nproc_per_node=2"))
DDP = (2, ("parallelism=ddp", "parallelism.nproc_per_node=2"))
LAYOUTS = [FSDP, SINGLE, DDP]


def check_what_is_left(folder: Folder) -> None:
    """All checkpoints that count are whole, and there are as many as there should be."""
    found = folder.checkpoints.complete()
    for one in found:
        verify(one, folder.record()["id"])
    committed = committed_in(folder)
    keep_last = int(next((o.split("=")[1] for o in folder.overrides if o.startswith("checkpoint.keep_last=")), "2"))
    # Of the newest that are known to be complete, none may be gone.
    expected = sorted(committed)[-keep_last:]
    assert set(expected) <= {one.step for one in found}, f"{expected} expected, {found} there"


def committed_in(folder: Folder) -> set[int]:
    """Steps of which a checkpoint was completed."""
    return {int(event.path[-8:]) for event in folder.events() if event.point == "rename step_N"}


@trials(few=6, all_=200)
def test_r1_killed_at_any_instant(n: int, tmp_path: Path) -> None:
    claim = "SIGKILL of the whole job at a random instant, resumed: bitwise the uninterrupted run's end"
    n_inside = 0
    with Figure("R1", claim) as figure:
        for number in range(n):
            rng = figure.random(number)
            n_ranks, overrides = LAYOUTS[number % len(LAYOUTS)]
            folder = Folder(tmp_path / str(number), *overrides, n_ranks=n_ranks)
            with figure.trial(number):
                n_inside += kill_at_any_instant(folder, rng)
                check_what_is_left(folder)
                go_on(folder)
        figure.remarks.append(f"{n_inside / n:.0%} of the kills inside the writing of a checkpoint")
    assert n_inside >= 0.4 * n


def kill_at_any_instant(folder: Folder, rng: random.Random) -> bool:
    """Whether it was while a checkpoint was written."""
    other, _ = reference(*folder.overrides, n_ranks=folder.n_ranks)
    rank = rng.randrange(folder.n_ranks)
    events = other.events(rank)
    # Writing is a small part of the events' time and most of their number: half of the kills are aimed at it.
    aimed = [event for event in events if event.saves] if rng.random() < 0.5 else events
    number = rng.choice(aimed).number
    wait_s = rng.uniform(0, 0.03)
    with folder.interrupt(TellAt(rank, number, after_s=rng.choice([0.0, 0.03]))) as trial:
        assert trial.next_word(WAIT_S) is not None, "ended before it could be killed"
        time.sleep(wait_s)
        trial.kill()
    return bool(folder.checkpoints.incomplete())


def go_on(folder: Folder) -> None:
    """Resume to the end and compare; a run that was killed after it had ended is compared as it is."""
    if (folder.run / "run.json").exists() and folder.record()["status"] == "completed":
        other, _ = reference(*folder.overrides, n_ranks=folder.n_ranks)
        assert folder.contents() == other.contents()
        assert folder.metrics() == other.metrics()
    else:
        assert_same(folder, folder.train())


def points_of(events: list, rank: int) -> dict[str, int]:
    """Every kind of change that a rank makes, and how many of it there are."""
    points: dict[str, int] = {}
    for event in events:
        if event.path:
            points[event.point] = points.get(event.point, 0) + 1
    return points


@pytest.mark.soak
@pytest.mark.parametrize("n", [3])
def test_r2_killed_after_every_kind_of_change_on_every_rank(n: int, tmp_path: Path) -> None:
    claim = f"SIGKILL after each kind of change on disk × rank × {n} (first run, saves, removals, resume): bitwise"
    n_ranks, overrides = FSDP
    other, _ = reference(*overrides, n_ranks=n_ranks)
    resumed = Folder(tmp_path / "resumed", *overrides, n_ranks=n_ranks)  # what a resume changes on disk
    half_way(resumed)
    seen = len(resumed.events(0)), len(resumed.events(1))
    resumed.train()
    with Figure("R2", claim) as figure:
        for rank in range(n_ranks):
            for begun, points in (
                (False, points_of(other.events(rank), rank)),
                (True, points_of([e for e in resumed.events(rank)[seen[rank] :] if e.step <= 6], rank)),
            ):
                for point, count in points.items():
                    for repeat in range(n):
                        what = f"{'resume' if begun else 'run'}, rank {rank}, {point}, {repeat}"
                        rng = figure.random(what)
                        folder = Folder(tmp_path / f"{figure.n}", *overrides, n_ranks=n_ranks)
                        with figure.trial(what):
                            if begun:
                                half_way(folder)
                            kill_at(folder, KillAt(rank, point, rng.randrange(count)), point)
                            check_what_is_left(folder)
                            go_on(folder)


def test_an_epoch_whose_proof_a_kill_prevented_is_proven_when_the_run_goes_on(tmp_path: Path) -> None:
    """The last checkpoint is complete, old ones are being removed: nothing is left to train, but something to prove."""
    folder = Folder(tmp_path / "run")
    other, _ = reference()
    [*_, last] = [event for event in other.events() if event.point == "remove MANIFEST.json"]
    with folder.interrupt(KillAt(0, None, last.number)) as trial:
        trial.end()
    assert folder.checkpoints.complete()[-1].step == 12
    assert '"epoch": 1' not in folder.ledger().get("epochs.jsonl", "")
    assert_same(folder, folder.train())


def half_way(folder: Folder) -> None:
    """Kill a run while it writes its second checkpoint, so that the next one has something to tidy up."""
    with folder.interrupt(KillAt(0, "write state.json", 1)) as trial:
        trial.end()
    assert folder.checkpoints.incomplete()


def kill_at(folder: Folder, act: KillAt, point: str) -> None:
    with folder.interrupt(act) as trial:
        outcomes = trial.end()
    assert outcomes[act.rank] is None, "ended before it could be killed"
    assert folder.events(act.rank)[-1].point == point


def test_r2_killed_after_every_kind_of_change_in_a_row(tmp_path: Path) -> None:
    """The short form of R2: one run that is killed after each kind of change in turn."""
    claim = "SIGKILL after each kind of change on disk, one after the other in one run: bitwise"
    overrides = ("trainer.max_steps=75",)
    other, _ = reference()
    with Figure("R2s", claim) as figure:
        folder = Folder(tmp_path / "run", *overrides)
        points = points_of([event for event in other.events() if event.saves], 0)
        for point in points:
            with figure.trial(point):
                kill_at(folder, KillAt(0, point, 0), point)
                check_what_is_left(folder)
        with figure.trial("its end"):
            assert_same(folder, folder.train())


@trials(few=1, all_=5)
def test_r3_killed_again_and_again(n: int, tmp_path: Path) -> None:
    n_kills = 20 if n > 1 else 6
    claim = f"{n_kills} kills of one run in a row: progress is never lost, and the end is bitwise the same"
    with Figure("R3", claim) as figure:
        for number in range(n):
            rng = figure.random(number)
            n_ranks, overrides = (LAYOUTS[number % 3]) if n > 1 else SINGLE
            folder = Folder(tmp_path / str(number), *overrides, "trainer.max_steps=90", n_ranks=n_ranks)
            with figure.trial(number):
                steps = [0]
                for _ in range(n_kills):
                    act = KillAt(rng.randrange(n_ranks), None, rng.randrange(12, 120))
                    with folder.interrupt(act) as trial:
                        assert trial.end()[act.rank] is None, "ended before it could be killed"
                    check_what_is_left(folder)
                    steps.append(max((found.step for found in folder.checkpoints.complete()), default=0))
                assert steps == sorted(steps)
                assert_same(folder, folder.train())


FOREIGN = ("step_5", "step_00000001_copy", "step_00000002.backup", "best", "step_000000003", "step_00000004.abandoned")


@trials(few=3, all_=50)
def test_r14_killed_while_old_ones_are_removed(n: int, tmp_path: Path) -> None:
    claim = "SIGKILL while old checkpoints are removed: as many sound ones as asked for, foreign folders untouched"
    kinds = ("rename step_N.tmp", "fsync_folder checkpoints", "remove MANIFEST.json", "remove state.json")
    folder, settings = None, [(k, b) for k in (1, 2) for b in (0, 1)]
    with Figure("R14", claim) as figure:
        for number in range(n):
            rng = figure.random(number)
            keep_last, keep_best = settings[number // 5 % 4]
            if number % 5 == 0:
                folder = Folder(
                    tmp_path / str(number),
                    *("trainer.max_steps=60", "checkpoint.every_steps=1", "evaluation.every_steps=2"),
                    *(f"checkpoint.keep_last={keep_last}", f"checkpoint.keep_best={keep_best}"),
                )
            assert folder is not None
            act = KillAt(0, rng.choice(kinds), rng.randrange(1, 5))
            with figure.trial(f"{number}: {act}"):
                with folder.interrupt(act) as trial:
                    assert trial.end() == [None], "ended before it could be killed"
                check_what_is_left(folder)
                check_best(folder, keep_best)
                for name in FOREIGN if number % 5 else ():
                    assert (folder.checkpoints.folder / name / "own").read_text() == "not ftlab's", name
                for name in FOREIGN:  # some look like what a user makes of a checkpoint
                    theirs = folder.checkpoints.folder / name
                    theirs.mkdir(exist_ok=True)
                    shutil.copy(folder.checkpoints.complete()[-1].path / "MANIFEST.json", theirs)
                    (theirs / "own").write_text("not ftlab's")
                if number % 5 == 4:
                    assert_same(folder, folder.train())
                    for name in FOREIGN:
                        assert (folder.checkpoints.folder / name / "own").read_text() == "not ftlab's", name


def check_best(folder: Folder, keep_best: int) -> None:
    """The best that was committed so far is still there, if it is to be kept."""
    if not keep_best:
        return
    losses = {line["step"]: line["val/loss"] for line in folder.metrics() if "val/loss" in line and line["step"]}
    committed = committed_in(folder) & losses.keys()
    if committed:
        best = min(committed, key=lambda step: (losses[step], -step))
        assert best in {found.step for found in folder.checkpoints.complete()}


def test_an_unfinished_checkpoint_never_counts(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    half_way(folder)
    assert [found.step for found in folder.checkpoints.complete()] == [3]
    assert folder.checkpoints.incomplete() == ["step_00000006.tmp"]
    found = Checkpoints(folder.run / "checkpoints").newest_sound(folder.record()["id"])
    assert found is not None
    assert found.step == 3
    assert os.listdir(folder.run / "checkpoints" / "step_00000006.tmp")
