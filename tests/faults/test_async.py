"""Writing while training goes on gives the files that waiting for it gives, and survives the same kills."""

from __future__ import annotations

from pathlib import Path

from tests.faults.acts import KillAt, Slowly
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, assert_same, content_of, reference
from tests.faults.test_kills import DDP, FSDP, LAYOUTS, SINGLE, check_what_is_left

ASYNC = "checkpoint.async=true"


@trials(few=2, all_=8)
def test_r15_the_same_files_as_when_waiting(n: int, tmp_path: Path) -> None:
    claim = "checkpoint.async writes, slowly, while weights change (SGD, AdamW; single, ddp, fsdp): a sync save's files"
    layouts = [(DDP, "adamw"), (FSDP, "sgd"), (FSDP, "adamw"), (DDP, "sgd"), (SINGLE, "adamw"), (SINGLE, "sgd")]
    with Figure("R15f", claim) as figure:
        for number in range(n):
            (n_ranks, overrides), optimizer = layouts[number % len(layouts)]
            overrides = (*overrides, f"optimizer={optimizer}", "optimizer.lr=0.01")
            with figure.trial(f"{overrides}"):
                folder = Folder(tmp_path / str(number), *overrides, ASYNC, n_ranks=n_ranks)
                folder.train(act=Slowly(0.002))
                overlaps(folder)
                other, _ = reference(*overrides, n_ranks=n_ranks)
                assert folder.metrics() == other.metrics()
                compare(folder, other)


def overlaps(folder: Folder) -> None:
    """Steps were taken between the first and the last change of a checkpoint."""
    events = folder.events()
    first = next(i for i, event in enumerate(events) if event.point == "mkdir step_N.tmp")
    last = next(i for i, event in enumerate(events) if event.point == "rename step_N")
    assert any(event.operation == "step" for event in events[first:last])


def compare(folder: Folder, other: Folder) -> None:
    mine, theirs = folder.checkpoints.complete(), other.checkpoints.complete()
    assert [found.step for found in mine] == [found.step for found in theirs]
    for one, another in zip(mine, theirs, strict=True):
        content, expected = content_of(one.path), content_of(another.path)
        for told in (content["state.json"], expected["state.json"]):
            told["config"].pop("checkpoint")
        for told in (content["MANIFEST.json"], expected["MANIFEST.json"]):
            told.pop("config_hash")
        assert content.keys() == expected.keys()
        differing = [name for name in content if content[name] != expected[name]]
        assert not differing, differing


@trials(few=2, all_=50)
def test_r15_killed_while_writing_aside(n: int, tmp_path: Path) -> None:
    claim = "SIGKILL during an asynchronous save, resumed: bitwise the uninterrupted run's end"
    with Figure("R15", claim) as figure:
        for number in range(n):
            n_ranks, overrides = LAYOUTS[number % 3]
            rng = figure.random(number)
            folder = Folder(tmp_path / str(number), *overrides, ASYNC, n_ranks=n_ranks)
            with figure.trial(number):
                act = KillAt(rng.randrange(n_ranks), None, rng.randrange(150), saving_only=True)
                with folder.interrupt(Slowly(0.001, act)) as trial:
                    assert trial.end()[act.rank] is None, "ended before it could be killed"
                check_what_is_left(folder)
                assert_same(folder, folder.train())
