"""From every step, and on any number of ranks, a run goes on as it would have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, Trial, config_of, reference
from tests.faults.test_kills import DDP, FSDP, SINGLE
from tests.faults.trial import Outcome, Plan

LONG = ("trainer.max_steps=60", "checkpoint.every_steps=1", "checkpoint.keep_last=60", "scheduler.warmup_steps=7")
"""60 steps: accumulation, a short last step in each of five epochs, validation every 4, warm-up and decay."""


@trials(few=5, all_=60)
@pytest.mark.parametrize("layout", [SINGLE, FSDP], ids=["single", "fsdp"])
def test_r7_resumed_from_every_step(n: int, layout: tuple[int, tuple[str, ...]], tmp_path: Path) -> None:
    n_ranks, overrides = layout
    name = "R7" if n_ranks == 1 else "R7f"
    claim = f"resumed from every step of 60 (accumulation, epoch edges, validation), {n_ranks} rank(s): bitwise"
    if n_ranks > 1:
        n = n // 5
    if not n or (n_ranks > 1 and n < 2):
        n = 1
    other, expected = reference(*overrides, *LONG, n_ranks=n_ranks)
    epoch_ends = [step for step in range(1, 60) if other.metrics_at(step)["epoch"] % 1 == 0]
    assert len(epoch_ends) >= 4
    with Figure(name, claim) as figure:
        others = [step for step in range(1, 60) if step != epoch_ends[0]]
        steps = range(1, 61) if n == 60 else [epoch_ends[0], *figure.random("steps").sample(others, n - 1)]
        for step in steps:
            with figure.trial(step):
                folder = Folder(tmp_path / str(step), *overrides, *LONG, n_ranks=n_ranks)
                copy(other, folder, only=step)
                if step == 60:  # complete, so it says: unless it was stopped there
                    record = folder.record() | {"status": "preempted"}
                    (folder.run / "run.json").write_text(json.dumps(record))
                for mine, theirs in zip(folder.train(), expected, strict=True):
                    differing = [part for part, digest in theirs.ended.items() if mine.ended[part] != digest]
                    assert not differing, differing
                assert folder.metrics() == other.metrics()
                assert folder.ledger() == other.ledger()
                assert folder.samples(step) == other.samples(step)


def copy(other: Folder, folder: Folder, only: int) -> None:
    """The run's folder with one of its checkpoints."""
    name = f"step_{only:08d}"
    shutil.copytree(other.run, folder.run, ignore=lambda at, names: set(names) & {"checkpoints", ".lock"})
    shutil.copytree(other.run / "checkpoints" / name, folder.run / "checkpoints" / name)


# ------------------------------------------------------------------------------------------- other numbers of ranks

KINDS = {
    "single": (1, ("trainer.batch_size=2",)),
    "ddp 2": (2, ("parallelism=ddp", "parallelism.nproc_per_node=2", "trainer.batch_size=2")),
    "fsdp 2": (2, ("parallelism=fsdp", "parallelism.nproc_per_node=2", "trainer.batch_size=2")),
    "fsdp 4": (4, ("parallelism=fsdp", "parallelism.nproc_per_node=4", "trainer.batch_size=2")),
    "hsdp 4": (4, ("parallelism=hsdp", "parallelism.nproc_per_node=4", "parallelism.replicate_degree=2")),
}
COMMON = (
    *("trainer.gradient_accumulation_steps=null", "trainer.global_batch_size=8"),
    *("scheduler=constant", "scheduler.warmup_steps=3"),
    *("optimizer.lr=0.001", "evaluation.every_steps=100", "checkpoint.every_steps=20", "checkpoint.keep_best=0"),
)
PAIRS = [(a, b) for a in ("single", "fsdp 2", "fsdp 4") for b in ("single", "fsdp 2", "fsdp 4")]
OTHERS = [("ddp 2", "fsdp 4"), ("hsdp 4", "ddp 2"), ("fsdp 2", "hsdp 4"), ("ddp 2", "single"), ("hsdp 4", "single")]


def elastic(kind: str, n_steps: int) -> tuple[int, tuple[str, ...]]:
    n_ranks, overrides = KINDS[kind]
    return n_ranks, (*COMMON, *overrides, f"trainer.max_steps={n_steps}")


@trials(few=3, all_=14)
def test_r8_resumed_on_other_numbers_of_ranks(n: int, tmp_path: Path) -> None:
    claim = (
        "saved on {1, 2, 4} ranks, resumed on {1, 2, 4} and as ddp, fsdp, hsdp, single: state bitwise after load, "
        "rows of every step exact, losses of 20 steps"
    )
    pairs = [*PAIRS, *OTHERS] if n > 3 else [PAIRS[1], PAIRS[5], OTHERS[1]]
    worst = 0.0
    with Figure("R8", claim) as figure:
        for before, after in pairs:
            with figure.trial(f"{before} -> {after}"):
                saved, outcomes = straight(before, 20, tmp_path)
                whole, _ = straight(before, 40, tmp_path)
                n_ranks, overrides = elastic(after, 40)
                folder = Folder(tmp_path / f"{before} {after}", *overrides, n_ranks=n_ranks)
                shutil.copytree(saved.run, folder.run)
                resumed = run(folder, again=True)
                for outcome in resumed:
                    for part in ("weights", "optimizer", "scaler", "progress", "schedule"):
                        assert outcome.began[part] == outcomes[0].ended[part], part
                rows, expected = rows_of(folder), rows_of(whole)
                assert list(rows) == list(range(21, 41))
                assert rows == {step: ids for step, ids in expected.items() if step > 20}
                losses, straight_losses = folder.losses(), whole.losses()
                assert list(losses) == list(range(1, 41))
                worst = max(worst, *(abs(losses[i] / straight_losses[i] - 1) for i in losses))
                assert worst < 1e-6
                assert counts(folder) == counts(whole)
        figure.remarks.append(f"greatest relative difference of a loss {worst:.1e}")


def counts(folder: Folder) -> list[tuple[int, float]]:
    return [(line["tokens"], line["epoch"]) for line in folder.metrics() if "tokens" in line]


def test_more_ranks_share_the_rows_of_a_step_and_do_not_add_to_them(tmp_path: Path) -> None:
    """The configuration says rows per rank; the run goes on with the rows per step that it began with."""
    other, _ = reference()
    folder = Folder(tmp_path / "run", *DDP[1], n_ranks=2)
    copy(other, folder, only=9)
    folder.train()
    assert rows_of(folder) == {step: ids for step, ids in rows_of(other).items() if step > 9}
    assert counts(folder) == counts(other)


_straight: dict[tuple[str, int, Path], tuple[Folder, list[Outcome]]] = {}


def straight(kind: str, n_steps: int, root: Path) -> tuple[Folder, list[Outcome]]:
    """An uninterrupted run of so many steps."""
    if (key := (kind, n_steps, root)) not in _straight:
        n_ranks, overrides = elastic(kind, n_steps)
        folder = Folder(root / f"{kind} straight {n_steps}", *overrides, n_ranks=n_ranks)
        _straight[key] = folder, run(folder, again=False)
    return _straight[key]


def run(folder: Folder, *, again: bool) -> list[Outcome]:
    config = config_of(folder.run, *folder.overrides, again=again)
    with Trial(Plan(config=config, notes=folder.notes, noise=False, whole=True), folder.n_ranks) as trial:
        outcomes = trial.end()
        assert [outcome.exit_code if outcome else None for outcome in outcomes] == [0] * folder.n_ranks, trial.stderr()
    return outcomes  # type: ignore[return-value]


def rows_of(folder: Folder) -> dict[int, list[int]]:
    """The rows of every step in the order in which they are dealt to the ranks, like cards."""
    dealt: dict[int, list[Any]] = {}
    for rank in range(folder.n_ranks):
        for line in (folder.notes / f"samples-{rank}").read_text().splitlines():
            step, ids = json.loads(line)
            dealt.setdefault(step, []).append(ids)
    longest = {step: max(map(len, hands)) for step, hands in dealt.items()}
    return {
        step: [hand[i] for i in range(longest[step]) for hand in hands if i < len(hand)]
        for step, hands in sorted(dealt.items())
    }
