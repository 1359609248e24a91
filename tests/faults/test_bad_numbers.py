"""NaN, infinities and spikes, wherever they come from, reach neither weights nor moments nor a checkpoint."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ftlab.losses import Loss
from ftlab.training.loop import fit
from tests.faults.acts import KillAt
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, Trial, assert_same
from tests.faults.test_kills import DDP, FSDP, SINGLE
from tests.faults.trial import Outcome
from tests.faults.troubles import Spoil
from tests.loop.conftest import HandRun, Rows, build_hand_run

FP16 = (2, (*FSDP[1], "precision=fp16_mixed"))
LAYOUTS = [FSDP, SINGLE, DDP, FP16]
KINDS = ("loss", "batch", "gradient", "parameter")
VALUES = (math.nan, math.inf, -math.inf)


@trials(few=4, all_=100)
def test_r16_bad_numbers_change_nothing(n: int, tmp_path: Path) -> None:
    claim = (
        "NaN, Inf, -Inf in the loss, one micro-batch, one gradient or one parameter, of one rank or all, one step or "
        "several, `max_skipped_steps` 0 to 2, fp32 and fp16 with loss scaling: all ranks decide the same; weights and "
        "moments bitwise as before; one too many ends the run with exit code 3, and from its checkpoint it goes on; no "
        "NaN in any checkpoint"
    )
    with Figure("R16", claim) as figure:
        for number in range(n):
            n_ranks, overrides = LAYOUTS[number % len(LAYOUTS)]
            rng = figure.random(number)
            with figure.trial(number):
                spoil_and_check(tmp_path / str(number), n_ranks, overrides, KINDS[(number + number // 4) % 4], rng)


def spoil_and_check(root: Path, n_ranks: int, overrides: tuple[str, ...], kind: str, rng: random.Random) -> None:
    allowed, first, length = rng.randrange(3), rng.randrange(1, 11), rng.choice([1, 1, 2, 3])
    folder = Folder(root, *overrides, f"trainer.max_skipped_steps={allowed}", n_ranks=n_ranks)
    steps = frozenset(range(first, min(first + length, 13)))
    spoil = Spoil(kind, rng.choice(VALUES), steps, rng.choice([None, (rng.randrange(n_ranks),)]))
    overflows = kind == "gradient" and "precision=fp16_mixed" in overrides
    lasts = kind == "parameter"  # from then on
    ends = not overflows and (lasts or len(steps) > allowed)
    with Trial(folder.plan(before=spoil), n_ranks) as trial:
        outcomes, stderr = trial.end(), trial.stderr()
    what = f"{spoil}, {allowed} allowed\n{stderr}"
    assert {outcome and outcome.exit_code for outcome in outcomes} == {3 if ends else 0}, what
    assert "Traceback" not in stderr, what
    for rank in range(n_ranks):
        unchanged = unchanged_steps(folder, rank)
        spoilt = steps if not lasts else {step for step, *_ in updates(folder, rank) if step >= first}
        # Of a parameter that no row of the batch uses, losses and gradients know nothing; checkpoints do.
        if not (lasts and "no checkpoint is made of that" in stderr):
            assert spoilt & {step for step, *_ in updates(folder, rank)} <= unchanged, what
        if "precision=fp16_mixed" not in overrides:  # whose first steps overflow
            assert not unchanged - set(spoilt) or ends, what
    if ends and not lasts:
        assert f"step {first + allowed}: loss is" in stderr, what
        assert "try: a lower optimizer.lr" in stderr, what
    elif not ends and not overflows:
        assert all(f"step {step} is left out: " in stderr for step in steps), what
    check_no_nan(folder)
    if ends:  # whatever it was is over: the run goes on to the end that it would have had
        assert folder.record()["status"] == "failed"
        again = folder.train()
        if not skipped_before(folder):
            assert_same(folder, again, files=False)


def skipped_before(folder: Folder) -> bool:
    """Whether steps were left out before the checkpoint that the run went on from: then its end is another."""
    return any("train/skipped_steps" in line for line in folder.metrics())


def updates(folder: Folder, rank: int) -> list[tuple[int, list[str], list[str]]]:
    """(step, state before, state after) of every update."""
    path = folder.notes / f"updates-{rank}"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []  # type: ignore


def unchanged_steps(folder: Folder, rank: int) -> set[int]:
    return {step for step, before, after in updates(folder, rank) if before == after}


def check_no_nan(folder: Folder) -> None:
    for found in folder.checkpoints.complete():
        for path in found.path.glob("*.safetensors"):
            with safe_open(path, framework="pt") as tensors:
                assert all(tensors.get_tensor(name).isfinite().all() for name in tensors.keys()), path  # noqa: SIM118


@trials(few=2, all_=20)
def test_r16_what_was_left_out_is_known_after_a_kill(n: int, tmp_path: Path) -> None:
    claim = "killed after steps were left out (NaN, spikes), resumed: bitwise the uninterrupted run's end"
    with Figure("R16k", claim) as figure:
        for number in range(n):
            spiky = number % 2
            # Twenty times a loss that is scaled for float16 already may overflow there, which is not a spike.
            layouts = [FSDP, SINGLE, DDP] if spiky else LAYOUTS
            n_ranks, overrides = layouts[number // 2 % len(layouts)]
            rng = figure.random(number)
            overrides = (*overrides, "trainer.max_skipped_steps=3")
            if spiky:  # judged from step 64 on
                overrides += ("trainer.spike_sigma=6", "trainer.max_steps=100", "checkpoint.every_steps=7")
            lowest, highest = (70, 96) if spiky else (2, 11)
            steps = frozenset(rng.sample(range(lowest, highest), 3))
            spoil = Spoil("loss", 20.0 if spiky else math.nan, steps)
            with figure.trial(f"{number}: {sorted(steps)}"):
                straight = Folder(tmp_path / f"{number}-straight", *overrides, n_ranks=n_ranks)
                expected = straight.train(before=spoil)
                killed = Folder(tmp_path / f"{number}-killed", *overrides, n_ranks=n_ranks)
                events = [event.number for event in straight.events() if min(steps) < event.step < highest]
                with killed.interrupt(KillAt(0, None, rng.choice(events)), before=spoil) as trial:
                    trial.end()
                check_same_end(killed.train(before=spoil), expected)
                assert killed.metrics() == straight.metrics()
                assert killed.record()["progress"]["skipped_steps"] == 3
                check_no_nan(killed)


def check_same_end(mine: list[Outcome], theirs: list[Outcome]) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert [part for part, digest in other.ended.items() if one.ended[part] != digest] == []


def test_a_weight_that_fails_before_a_save_is_in_no_checkpoint(tmp_path: Path) -> None:
    """A bit flips in memory after the last look at the numbers: the save finds it."""
    folder = Folder(tmp_path / "run", "checkpoint.every_steps=3")
    with Trial(folder.plan(before=Spoil("memory", math.nan, frozenset({6})))) as trial:
        [outcome] = trial.end()
        stderr = trial.stderr()
    assert outcome is not None
    assert outcome.exit_code == 3
    assert "step 6: model.embedding.weight hold a NaN or an infinity (rank 0): no checkpoint is made of that" in stderr
    assert [found.step for found in folder.checkpoints.complete()] == [3]
    assert_same(folder, folder.train(), files=False)


class Garbled:
    """A loss whose targets are noise in some steps."""

    def __init__(self, trial: HandRun, steps: set[int]):
        self.loss: Loss = trial.run.loss
        self.trial, self.steps = trial, steps

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        if self.trial.run.state.progress.step + 1 in self.steps:
            targets = torch.where(targets >= 0, torch.randint_like(targets, 101), targets)
        return self.loss(hidden, head_weight, targets)


def left_out(n: int, garbled: set[int], caplog: pytest.LogCaptureFixture) -> set[int]:
    """The steps of a run of ``n`` that were left out."""
    caplog.clear()
    options = {"max_steps": n, "log_every_steps": 100, "max_skipped_steps": 5, "spike_sigma": 6.0}
    trial = build_hand_run(Rows(400), optimizer=torch.optim.AdamW, lr=2e-3, batch_size=8, **options)
    trial.run.loss = Garbled(trial, garbled)
    fit(trial.run)
    steps = {int(record.args[0]) for record in caplog.records if record.name == "ftlab.training.guard"}  # type: ignore
    assert len(steps) == trial.run.state.progress.skipped_steps
    return steps


@trials(few=500, all_=5000)
def test_r17_spikes_are_left_out_and_clean_steps_are_not(n: int, caplog: pytest.LogCaptureFixture) -> None:
    n_spikes = 20 if n > 1000 else 4
    claim = (
        f"`trainer.spike_sigma=6`: {n_spikes} steps with garbled targets are left out, of {n} clean steps at most one"
    )
    with Figure("R17", claim) as figure:
        rng = figure.random(0)
        gap = (n - 100) // n_spikes
        spikes = {100 + i * gap + rng.randrange(gap // 2) for i in range(n_spikes)}
        found = left_out(n, spikes, caplog)
        for spike in sorted(spikes):
            with figure.trial(f"spike at {spike}"):
                assert spike in found
        with figure.trial("clean"):
            n_false = len(left_out(n, set(), caplog)) + len(found - spikes)
            figure.remarks.append(f"{n_false} clean steps left out")
            assert n_false <= 1
