"""How many steps, which rows, what is logged, and what happens when numbers go bad."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.errors import ConfigError, NonFiniteError
from ftlab.training.guard import StepGuard
from ftlab.training.loop import fit
from ftlab.training.trainer_config import TrainerConfig
from tests.loop.conftest import Rows

LENGTHS = {
    "epochs": None,
    "max_steps": None,
    "max_steps_per_epoch": None,
    "max_grad_norm": None,
    "optimizer_in_backward": False,
    "share_prefixes": False,
    "measure_lost_updates": False,
    "profile_steps": None,
    "log_every_steps": 1,
    "max_skipped_steps": 0,
    "spike_sigma": None,
}


def trainer(**given):
    sizes = {"batch_size": 2, "gradient_accumulation_steps": 1, "global_batch_size": None}
    return TrainerConfig(**LENGTHS | sizes | given)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"epochs": 3}, 15),
        ({"epochs": 3, "max_steps_per_epoch": 2}, 6),
        ({"epochs": 3, "max_steps_per_epoch": 9}, 15),
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "max_steps_per_epoch": 3}, 7),
    ],
)
def test_the_number_of_optimizer_steps_is_what_was_asked_for(hand_run, given, steps):
    trial = hand_run(Rows(9), batch_size=1, accumulation=2, **given)
    assert trial.run.total_steps == steps
    fit(trial.run)
    assert [line["step"] for line in trial.lines] == list(range(1, steps + 1))
    assert trial.run.state.progress.step == steps


def samples_by_step(trial):
    seen = []
    update = trial.run.state.guard.update

    def record(step, loss, grad_norm, sample_ids):
        seen.append(sample_ids)
        update(step, loss, grad_norm, sample_ids)

    trial.run.state.guard.update = record
    fit(trial.run)
    return seen


def test_every_row_is_used_once_per_epoch_and_the_last_partial_batch_too(hand_run):
    trial = hand_run(Rows(11), batch_size=2, accumulation=2, epochs=2)
    steps = samples_by_step(trial)
    assert [len(ids) for ids in steps] == [4, 4, 3] * 2
    first, second = [i for ids in steps[:3] for i in ids], [i for ids in steps[3:] for i in ids]
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second, "each epoch has an order of its own"
    assert trial.run.state.progress.samples == 22


def test_an_epoch_cut_short_starts_the_next_one_anew(hand_run):
    steps = samples_by_step(hand_run(Rows(8), batch_size=2, epochs=2, max_steps_per_epoch=2, shuffle=False))
    assert steps == [[0, 1], [2, 3]] * 2


def test_counts_are_real_tokens_without_padding(hand_run):
    rows = Rows(6)
    trial = hand_run(rows, batch_size=3, epochs=1)
    fit(trial.run)
    assert trial.lines[-1]["tokens"] == sum(map(len, rows.rows))
    assert trial.run.state.progress.target_tokens == sum(int(rows.sample(i).trained[1:].sum()) for i in range(6))
    assert trial.lines[-1]["epoch"] == 1.0


def test_steps_that_are_not_logged_count_in_the_next_line(hand_run):
    rows = Rows(12)
    every, third = (hand_run(rows, batch_size=1, epochs=1, log_every_steps=n) for n in (1, 3))
    fit(every.run)
    fit(third.run)
    assert [line["step"] for line in third.lines] == [1, 3, 6, 9, 12]
    assert third.lines[-1]["tokens"] == every.lines[-1]["tokens"]
    assert third.losses == [every.losses[i - 1] for i in (1, 3, 6, 9, 12)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(hand_run):
    def train(seed):
        trial = hand_run(Rows(12), seed=seed, max_steps=5)
        order = samples_by_step(trial)
        return order, trial.losses, [p.detach().clone() for p in trial.run.state.model.parameters()]

    order, losses, weights = train(0)
    again_order, again_losses, again_weights = train(0)
    assert (order, losses) == (again_order, again_losses)
    assert all(torch.equal(a, b) for a, b in zip(weights, again_weights, strict=True))
    assert train(1)[0] != order


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_stops_the_run_names_the_step_and_leaves_the_weights(hand_run, optimizer, fused, bad):
    trial = hand_run(Rows(8), optimizer=optimizer, fused=fused, batch_size=2, max_steps=8, log_every_steps=2, lr=0.01)
    weight = trial.run.state.model.blocks[0].ffn.up_proj.weight
    kept = []

    def poison(gradient):
        kept.append(weight.detach().clone())
        return gradient * bad if len(kept) == 3 else gradient

    weight.register_hook(poison)
    steps = []
    update = trial.run.state.guard.update
    trial.run.state.guard.update = lambda step, loss, norm, ids: (steps.append(ids), update(step, loss, norm, ids))
    with pytest.raises(NonFiniteError, match=r"step 3: loss is .*; the weights are those of the step before") as error:
        fit(trial.run)
    assert ", ".join(map(str, steps[2])) in str(error.value)
    assert all(p.isfinite().all() for p in trial.run.state.model.parameters())
    torch.testing.assert_close(kept[3], kept[2], rtol=0, atol=0)  # step 3 changed nothing
    torch.testing.assert_close(weight.detach(), kept[2], rtol=0, atol=0)  # nor did step 4, before the host knew


def test_float16_overflow_is_skipped_and_lowers_the_loss_scale(hand_run):
    trial = hand_run(Rows(8), precision="fp16_mixed", max_steps=2)
    trial.run.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    trial.run.state.guard = StepGuard(
        trial.run.state.optimizer, trial.run.state.scaler, trial.run.parallel, max_skipped=0, spike_sigma=None
    )
    before = [p.clone() for p in trial.run.state.model.parameters()]
    fit(trial.run)
    assert trial.run.state.scaler.get_scale() == 2.0**118
    assert all(torch.equal(a, b) for a, b in zip(before, trial.run.state.model.parameters(), strict=True))


def test_float16_that_overflows_whatever_the_scale_stops_the_run(hand_run):
    trial = hand_run(Rows(8), precision="fp16_mixed", max_steps=60)
    trial.run.state.model.blocks[0].ffn.up_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteError, match=r"overflow float16 even with the loss scaled by 0\.0005"):
        fit(trial.run)


@settings(max_examples=50)
@given(batch=st.integers(1, 9), accumulation=st.integers(1, 9), ranks=st.integers(1, 9))
def test_accumulation_follows_from_the_global_batch_size(batch, accumulation, ranks):
    derived = trainer(
        batch_size=batch, gradient_accumulation_steps=None, global_batch_size=batch * accumulation * ranks
    )
    assert derived.accumulation_steps(ranks) == accumulation


def test_a_global_batch_size_that_does_not_divide_names_all_numbers_and_the_nearest():
    with pytest.raises(ConfigError) as error:
        trainer(batch_size=4, gradient_accumulation_steps=None, global_batch_size=11).accumulation_steps(2)
    assert "11 is not a multiple of trainer.batch_size × data-parallel ranks = 4 × 2" in str(error.value)
    assert "try: trainer.global_batch_size=8" in str(error.value)
