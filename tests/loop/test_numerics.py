"""The loop against independent arithmetic: a plain transformers loop, and itself in other layouts."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from ftlab.models.weights import export_weights
from ftlab.training.loop import fit
from tests.loop.conftest import Rows, WeightedRows


def transformers_losses(folder, loader, n_steps, lr, max_norm):
    """The textbook loop: one row at a time, no padding, float32, plain SGD."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses, epoch = [], 0
    while len(losses) < n_steps:
        for micro_batches in loader.steps(epoch):
            nll, n_targets = 0.0, 0
            for i in [i for batch in micro_batches for i in batch.sample_ids]:
                sample = loader.dataset.sample(i)
                tokens = torch.from_numpy(sample.tokens).long()
                weights = torch.from_numpy(sample.trained[1:]).float()
                logits = model(tokens[None]).logits[0, :-1]
                nll = nll + (F.cross_entropy(logits, tokens[1:], reduction="none") * weights).sum()
                n_targets += weights.sum().item()
            (nll / n_targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(nll.item() / n_targets)
        epoch += 1
    return losses[:n_steps]


@pytest.mark.parametrize("rows", [Rows(30), WeightedRows(30)])
def test_twenty_steps_of_sgd_equal_a_plain_transformers_loop(hand_run, tmp_path, rows):
    ours = hand_run(rows, lr=0.2, batch_size=3, accumulation=2, max_steps=20)
    export_weights(ours.run.state.model, tmp_path, dtype=torch.float32, bos_id=1, eos_id=2, pad_id=None)
    theirs = transformers_losses(tmp_path, ours.run.loader, 20, lr=0.2, max_norm=1.0)
    fit(ours.run)
    assert ours.losses[0] - ours.losses[-1] > 0.05, "the comparison means nothing while nothing is learned"
    assert ours.losses == pytest.approx(theirs, rel=1e-5)


def test_batch_8_equals_batch_2_times_4_accumulation_steps(hand_run):
    rows = Rows(64)
    whole = hand_run(rows, batch_size=8, accumulation=1, max_steps=20)
    parts = hand_run(rows, batch_size=2, accumulation=4, max_steps=20)
    fit(whole.run)
    fit(parts.run)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    for a, b in zip(whole.run.state.model.parameters(), parts.run.state.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16_mixed", "fp16_mixed"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_mixed_precision_stays_within_two_percent_of_float32_over_100_steps(hand_run, precision, optimizer):
    lr = 0.3 if optimizer is torch.optim.SGD else 2e-3
    # Enough rows that 100 steps cannot learn them by heart: near zero, "relative" would measure noise.
    exact, mixed = (
        hand_run(Rows(200), optimizer=optimizer, lr=lr, max_steps=100, batch_size=4, precision=p)
        for p in ("fp32", precision)
    )
    fit(exact.run)
    fit(mixed.run)
    assert min(exact.losses) < 0.85 * exact.losses[0]
    assert mixed.losses == pytest.approx(exact.losses, rel=0.02)


def test_precision_decides_the_dtype_of_weights_and_of_arithmetic(hand_run):
    seen = {}
    for precision in ("fp32", "bf16_mixed", "bf16", "fp16_mixed"):
        trial = hand_run(Rows(4), precision=precision, max_steps=1)
        model = trial.run.state.model
        model.blocks[0].ffn.gate_proj.register_forward_hook(
            lambda module, inputs, output, precision=precision: seen.__setitem__(precision, output.dtype)
        )
        fit(trial.run)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert seen == {
        "fp32": torch.float32,
        "bf16_mixed": torch.bfloat16,
        "bf16": torch.bfloat16,
        "fp16_mixed": torch.float16,
    }


def test_clipping_scales_the_update_to_the_given_norm(hand_run):
    trial = hand_run(Rows(4), lr=1.0, max_steps=1, max_grad_norm=1e-3)
    before = [p.clone() for p in trial.run.state.model.parameters()]
    fit(trial.run)
    after = trial.run.state.model.parameters()
    moved = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
    assert trial.lines[0]["train/grad_norm"] > 1e-2
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_weight_decay_touches_matrices_only(hand_run):
    trial = hand_run(Rows(4), lr=0.0, max_steps=1)
    model = trial.run.state.model
    *matrices, gains = trial.run.state.optimizer.param_groups
    assert all(p.ndim == 2 for group in matrices for p in group["params"])
    assert all(p.ndim == 1 for p in gains["params"])
    assert gains["weight_decay"] == 0
    assert sum(len(group["params"]) for group in [*matrices, gains]) == len(list(model.parameters()))
