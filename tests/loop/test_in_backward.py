"""The optimizer within the backward: the same bits as after it, and no gradient that waits for another."""

from __future__ import annotations

import math

import pytest
import torch

from ftlab.errors import NonFiniteError
from ftlab.training.loop import fit
from tests.loop.conftest import Rows

PLAIN = {"max_grad_norm": None, "max_steps": 6}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("precision", ["fp32", "bf16_mixed", "bf16"])
def test_weights_losses_and_norms_are_those_of_the_plain_loop_to_the_bit(hand_run, optimizer, fused, precision):
    options = PLAIN | {"optimizer": optimizer, "fused": fused, "precision": precision, "lr": 0.01}
    plain, within = (hand_run(Rows(30), **options, optimizer_in_backward=choice) for choice in (False, True))
    fit(plain.run)
    fit(within.run)
    assert within.losses == plain.losses
    assert [line["train/grad_norm"] for line in within.lines] == [line["train/grad_norm"] for line in plain.lines]
    ours, theirs = (dict(trial.run.state.model.named_parameters()) for trial in (within, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert plain.losses[-1] != plain.losses[0]


def test_no_gradient_waits_for_another(hand_run):
    trial = hand_run(Rows(8), **PLAIN, optimizer_in_backward=True)
    parameters = list(trial.run.state.model.parameters())
    alive = []
    for parameter in parameters:  # hooks run in the order they were registered in: these before the update's
        hooks = parameter._post_accumulate_grad_hooks
        update = dict(hooks)
        hooks.clear()
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in parameters))
        )
        for hook in update.values():
            parameter.register_post_accumulate_grad_hook(hook)
    fit(trial.run)
    assert set(alive) == {1}
    assert len(alive) == 6 * len(parameters)


@pytest.mark.parametrize("fused", [True, False])
def test_after_a_bad_gradient_nothing_more_is_updated_and_the_run_ends(hand_run, fused):
    trial = hand_run(Rows(8), **PLAIN, optimizer_in_backward=True, fused=fused, log_every_steps=6)
    model = trial.run.state.model
    first = model.blocks[0].attention.q_proj.weight  # late in the backward
    before = []
    calls = iter(range(100))

    def poison(gradient):
        before.append(first.detach().clone())
        return gradient * math.nan if next(calls) == 2 else gradient

    model.blocks[1].ffn.up_proj.weight.register_hook(poison)
    with pytest.raises(NonFiniteError, match=r"step 3: .*; a part of the weights is updated already"):
        fit(trial.run)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(before[2], before[3]), "the bad step's rest"
    assert not torch.equal(before[1], before[2])
