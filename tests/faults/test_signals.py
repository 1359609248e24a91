"""Asked to stop, a run finishes its step, saves, and says so with its exit code."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from ftlab.storage.checkpoints import Found, verify
from ftlab.storage.manifest import Manifest
from tests.distributed.jobs import PYTHON, TORCHRUN, Job
from tests.faults.acts import HoldAt, TellAt
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, Trial, assert_same, reference
from tests.faults.test_kills import DDP, FSDP, LAYOUTS
from tests.faults.troubles import ToldBefore, ToldBeforeTheLoopListens

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@trials(few=6, all_=60)
def test_r6_told_to_stop_at_any_instant(n: int, tmp_path: Path) -> None:
    claim = (
        "SIGTERM, SIGUSR1 or SIGINT at a random instant, to all ranks or one, once or twice: no step lost, all ranks "
        "at one step, exit code 128 + signal, < 30 s; resumed bitwise"
    )
    where: dict[str, int] = {}
    with Figure("R6", claim) as figure:
        for number in range(n):
            n_ranks, overrides = LAYOUTS[number % len(LAYOUTS)]
            folder = Folder(tmp_path / str(number), *overrides, n_ranks=n_ranks)
            with figure.trial(number):
                operation = tell_to_stop(folder, figure.random(number))
                where[operation] = where.get(operation, 0) + 1
                if not folder.begun or folder.record()["status"] == "preempted":
                    assert_same(folder, folder.train(), files=False)  # one more was saved, so another is kept
        figure.remarks.append("while: " + ", ".join(f"{what} {count}" for what, count in sorted(where.items())))


def tell_to_stop(folder: Folder, rng: random.Random) -> str:
    """Stop a run and check how it ended; what it was doing at that moment."""
    other, _ = reference(*folder.overrides, n_ranks=folder.n_ranks)
    sort = rng.choice(["start", "step", "eval", "save"])
    events = [
        event
        for event in other.events(0)
        if (sort == "save" and event.saves)
        or (sort == event.operation != "start")
        or (sort == "start" and 0 < event.number < 9 and event.operation == "rename")
    ]
    event = rng.choice(events[:-1])
    number, ranks = rng.choice(SIGNALS), rng.choice([None, [rng.randrange(folder.n_ranks)]])
    again = rng.choice([None, None, number, rng.choice(SIGNALS)])
    with folder.interrupt(TellAt(0, event.number, after_s=rng.uniform(0.1, 0.2)), foretells=True) as trial:
        assert trial.next_word() is not None, "ended before it could be told"
        time.sleep(rng.uniform(0, 0.02))
        told = time.monotonic()
        trial.send(number, ranks)
        if again is not None:
            time.sleep(rng.uniform(0.001, 0.05))
            trial.send(again, ranks)
        outcomes = trial.end()
        took_s, stderr, codes = time.monotonic() - told, trial.stderr(), set(trial.exit_codes())
    what = f"{number.name} then {again} to {ranks or 'all'} at {event.point}, step {event.step}, {took_s:.1f} s"
    assert took_s < 30, what
    asked = {number, again} if again else {number}
    assert len(codes) == 1, f"{what}: {codes}\n{stderr}"
    assert None not in outcomes, f"{what}: a rank was ended by its watch\n{stderr}"
    assert len({max(outcome.step, 0) for outcome in outcomes if outcome}) == 1, what
    assert "Traceback" not in stderr, stderr
    assert "this is a bug" not in stderr, stderr
    if not (folder.run / "run.json").exists():  # nothing had begun
        assert event.step == 0
        assert codes <= {128 + one for one in asked}, f"{what}: {codes}\n{stderr}"
        return sort
    record = folder.record()
    if event.step >= 12 and codes == {0}:  # too late: all is done
        assert record["status"] == "completed"
    else:
        assert codes <= {128 + one for one in asked}, f"{what}: {codes}\n{stderr}"
        assert record["status"] == "preempted", what
    steps = [line["step"] for line in folder.metrics() if "train/loss" in line] if folder.begun else []
    saved = [found.step for found in folder.checkpoints.complete()]
    assert (saved or [0])[-1] == max(steps, default=0) == max(0, outcomes[0].step), f"{what}: {saved} {steps}"  # type: ignore[union-attr]
    return sort


def test_a_checkpoint_of_a_stop_is_given_the_validation_that_was_due(tmp_path: Path) -> None:
    """So `RUN@best` and `keep_best` know of it: a run that is told to stop has no time to validate."""
    folder, go = Folder(tmp_path / "run", "checkpoint.keep_last=9"), tmp_path / "go"
    with folder.interrupt(HoldAt((3,), go)) as trial:
        assert trial.next_word() is not None
        trial.send(signal.SIGTERM)
        go.touch()
        [outcome] = trial.end()
    assert outcome is not None
    assert outcome.exit_code == 143
    path = folder.checkpoints.complete()[-1].path
    assert path.name == "step_00000004"
    assert Manifest.read(path).metrics == {}
    assert_same(folder, folder.train(), files=False)
    [measured] = [line for line in folder.metrics() if line["step"] == 4 and "val/loss" in line]
    assert Manifest.read(path).metrics["val/loss"] == measured["val/loss"]
    assert verify(Found(4, path), folder.record()["id"])


def job_arguments(how: list[str]) -> list[str]:
    parallelism = ["parallelism=fsdp"] + (["parallelism.nproc_per_node=2"] if how is PYTHON else [])
    return [
        *parallelism,
        "trainer.max_steps=200",
        "trainer.batch_size=2",
        "checkpoint.every_steps=10",
        "hydra.run.dir=run",
    ]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The job when nothing happens to it."""
    job = Job(PYTHON, *job_arguments(PYTHON), cwd=tmp_path_factory.mktemp("straight"))
    assert job.wait(120) == 0, job.stderr
    return job


@trials(few=1, all_=12)
def test_r6_whole_jobs_told_to_stop(n: int, tmp_path: Path, straight: Job) -> None:
    claim = "the same to `train.py` and `torchrun train.py` from outside: the job's own exit code, nothing left behind"
    with Figure("R6j", claim) as figure:
        for number in range(n):
            rng = figure.random(number)
            how = [PYTHON, TORCHRUN][number % 2]
            stopping = SIGNALS[rng.randrange(3)] if how is PYTHON else signal.SIGTERM
            with figure.trial(f"{'train.py' if how is PYTHON else 'torchrun'} {stopping.name}"):
                cwd = tmp_path / str(number)
                cwd.mkdir()
                job = Job(how, *job_arguments(how), cwd=cwd)
                job.wait_for_step(rng.randrange(2, 60))
                time.sleep(rng.uniform(0, 0.1))
                if stopping == signal.SIGINT:
                    job.interrupt()
                else:
                    job.process.send_signal(stopping)
                told = time.monotonic()
                code = job.wait()
                assert time.monotonic() - told < 30
                if how is PYTHON:  # torchrun's own exit code is its own affair
                    assert code == 128 + stopping, job.stderr
                assert job.left_behind() == []
                record = job.run_json()
                assert record["status"] == "preempted", job.stderr
                last = job.metrics()[-1]["step"]
                assert (cwd / "run" / "checkpoints" / f"step_{last:08d}" / "MANIFEST.json").exists()
                resumed = Job(how, "resume=run", cwd=cwd, tiny=False)
                assert resumed.wait() == 0, resumed.stderr
                assert resumed.losses() == straight.losses()


@trials(few=1, all_=20)
def test_r4_a_killed_rank_is_started_again_from_the_newest_checkpoint(n: int, tmp_path: Path, straight: Job) -> None:
    claim = "SIGKILL of one rank of 2: the other gone < 2 s, `max_restarts` goes on from the newest checkpoint, bitwise"
    slowest = 0.0
    arguments = job_arguments(PYTHON)
    with Figure("R4", claim) as figure:
        for number in range(n):
            rng = figure.random(number)
            with figure.trial(number):
                cwd = tmp_path / str(number)
                cwd.mkdir()
                if number % 2 and n > 1:
                    command = [*TORCHRUN[:-1], "--max-restarts", "1", TORCHRUN[-1]]
                    # In the default folder, whose name is the time of the start: the second attempt finds it.
                    job = Job(command, *arguments[:1], *arguments[2:-1], cwd=cwd)
                else:
                    job = Job(PYTHON, *arguments, "parallelism.max_restarts=1", cwd=cwd)
                job.wait_for_step(rng.randrange(11, 80))
                ranks = job.wait_for_ranks(2)
                victim = rng.randrange(2)
                ranks[victim].send_signal(signal.SIGKILL)
                killed = time.monotonic()
                while ranks[1 - victim] in job.look():
                    assert time.monotonic() < killed + 10
                    time.sleep(0.01)
                slowest = max(slowest, time.monotonic() - killed)
                assert job.wait(120) == 0, job.stderr
                assert "going on from step" in job.stderr
                [session] = job.run_json()["resumed"]
                assert session["step"] >= 10
                assert job.run_json()["status"] == "completed"
                assert job.losses() == straight.losses()
                for path in (straight.cwd / "run" / "checkpoints" / "step_00000200").glob("*-*"):  # rows, random states
                    mine = job.folders[0] / "checkpoints" / "step_00000200" / path.name
                    assert mine.read_bytes() == path.read_bytes(), path.name
        figure.remarks.append(f"slowest {slowest:.1f} s on a busy machine")


def test_a_stop_before_the_first_step_claims_nothing(tmp_path: Path) -> None:
    """There is nothing to go on from, and the run says so."""
    folder = Folder(tmp_path / "run")
    other, _ = reference()
    number = next(event.number for event in other.events() if event.point == "eval")  # before the first step
    with folder.interrupt(TellAt(0, number, after_s=0.2)) as trial:
        event = trial.next_word()
        assert event.point == "eval"
        trial.send(signal.SIGTERM)
        [outcome] = trial.end()
        stderr = trial.stderr()
    assert outcome is not None
    assert outcome.exit_code == 143
    assert folder.record()["status"] == "preempted"
    assert "before the first step: none is saved" in stderr
    assert_same(folder, folder.train())


@pytest.mark.parametrize(("late", "phase"), [(0, "build model"), (1, "read data")])
def test_a_rank_that_stops_leaves_no_other_where_no_signal_reaches(tmp_path: Path, late: int, phase: str) -> None:
    """Not in the native code that forms a process group: it would wait there until its watch ends the process."""
    n_ranks, overrides = (FSDP, DDP)[late]
    folder = Folder(tmp_path / "run", *overrides, n_ranks=n_ranks)
    with Trial(folder.plan(before=ToldBefore(late, phase)), n_ranks) as trial:
        outcomes = trial.end()
        assert trial.exit_codes() == [143, 143]
        assert None not in outcomes, "ended by its watch"
    assert folder.record()["status"] == "preempted"


def test_a_signal_is_not_lost_between_two_handlers(tmp_path: Path) -> None:
    """The loop's follow those of the time before; what those hear in the last moment counts, too."""
    n_ranks, overrides = FSDP
    longer = ("trainer.max_steps=200", "evaluation.every_steps=1000", "checkpoint.every_steps=1000")
    folder = Folder(tmp_path / "run", *overrides, *longer, n_ranks=n_ranks)
    with Trial(folder.plan(before=ToldBeforeTheLoopListens(0)), n_ranks) as trial:
        trial.end()
        assert trial.exit_codes() == [143, 143]
    assert folder.checkpoints.complete()[-1].step == folder.record()["progress"]["step"]


@pytest.mark.parametrize("patience", [None, 1])
def test_stopped_at_the_last_step_a_run_can_still_be_completed(tmp_path: Path, patience: int | None) -> None:
    overrides = () if patience is None else ("evaluation.patience=1", "evaluation.metric=val/exact_match")
    folder = Folder(tmp_path / "run", *overrides)
    last = reference(*overrides)[1][0].step
    with folder.interrupt(TellAt(0, number_of_step(folder, last), after_s=0.2)) as trial:
        assert trial.next_word().step == last - 1
        trial.send(signal.SIGTERM)
        [outcome] = trial.end()
    assert outcome is not None
    assert outcome.exit_code == 143
    assert_same(folder, folder.train(), files=False)


def number_of_step(folder: Folder, step: int) -> int:
    other, _ = reference(*folder.overrides, n_ranks=folder.n_ranks)
    # The event before it: the signal has to be there when the ranks sum their wishes.
    return next(event.number for event in other.events() if event.operation == "eval" and event.step == step - 1)
