"""What activation checkpointing keeps and what it computes twice; that results stay the same bits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from ftlab.assembly.model import build_model, random_weights
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.distributed.activation import _selective_contexts, require_a_gpu
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError
from ftlab.forecast import Setting, forecast
from ftlab.losses import CrossEntropy
from ftlab.training.loop import fit
from tests.loop.conftest import CPU, MODEL, Rows, build_hand_run, precision_of

LOSS = CrossEntropy(label_smoothing=0.0, z_loss=0.0)
TOKENS = torch.arange(40).view(2, 20)


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def model_with(mode: str) -> Any:
    return build_model(MODEL, random_weights(0), precision_of("fp32"), OneRank(CPU, activation_checkpointing=mode))


def ops_of_backward(mode: str) -> Counter[str]:
    loss = model_with(mode)(TOKENS, TOKENS, LOSS)
    with CountOps() as ops:
        loss.backward()
    return ops.counts


# A block has 7 matrix products: q, k, v, o, gate, up, down. The output of the last is needed by nobody in backward.
@pytest.mark.parametrize(("mode", "matmuls", "attentions"), [("full", 6, 1), ("selective", 3, 0)])
def test_what_a_block_computes_again(mode: str, matmuls: int, attentions: int) -> None:
    kept, counts = ops_of_backward("none"), ops_of_backward(mode)
    attention = "ftlab::attend_by_document"
    assert kept[attention] == 0
    assert counts[attention] == attentions * MODEL.n_layers
    assert counts["mm"] - kept["mm"] == matmuls * MODEL.n_layers


def test_what_only_cuda_runs_is_kept_as_well() -> None:
    from torch._higher_order_ops.flex_attention import flex_attention

    kept, _ = _selective_contexts()
    context = SelectiveCheckpointContext(is_recompute=False)
    ops = flex_attention, torch.ops.aten._scaled_mm.default, torch.ops.aten._scaled_mm.default
    save, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    assert [kept.policy_fn(context, op) for op in ops] == [save, again, save]  # type: ignore[attr-defined]


def test_full_checkpointing_keeps_less_until_backward() -> None:
    kept = {}
    for mode in ("none", "full"):
        model = model_with(mode)
        parameters = {p.data_ptr() for p in model.parameters()}
        storages = {}

        def keep(tensor: torch.Tensor, parameters: Any = parameters, storages: Any = storages) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(TOKENS, TOKENS, LOSS)
        kept[mode] = sum(storages.values())
        del loss
    assert kept["full"] < 0.5 * kept["none"], kept


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_are_the_same_bits_and_names_the_same(mode: str) -> None:
    plain, checkpointed = model_with("none"), model_with(mode)
    for model in (plain, checkpointed):
        model(TOKENS, TOKENS, LOSS).backward()
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in checkpointed.named_parameters()]
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_nothing_is_recomputed_where_there_is_no_backward() -> None:
    model = model_with("selective")
    with torch.no_grad():
        assert torch.equal(model(TOKENS), model_with("none")(TOKENS))


def test_offloaded_inputs_come_back_with_the_same_bits() -> None:
    ends = []
    for mode in ("full", "offload"):
        trial = build_hand_run(
            Rows(12), parallel=OneRank(CPU, activation_checkpointing=mode), batch_size=4, max_steps=3
        )
        fit(trial.run)
        ends.append((trial.losses, [p.detach() for p in trial.run.state.model.parameters()]))
    (full, weights), (offloaded, others) = ends
    assert full == offloaded
    assert all(map(torch.equal, weights, others))


def test_an_offload_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="in the host's memory already"):
        require_a_gpu("offload", CPU)


def test_offloaded_inputs_take_nothing_of_the_device() -> None:
    peaks = {}
    for mode in ("full", "offload"):
        sizes = ["model.dim=64", "model.n_layers=16", "trainer.batch_size=32", "optimizer=sgd"]
        config = compose_config([*sizes, f"parallelism.activation_checkpointing={mode}"])
        unknown: dict[str, Any] = dict.fromkeys(("longest_validation", "rows", "validation_rows"))
        setting = Setting(longest=256, n_ranks=1, n_local_ranks=1, on_cuda=True, **unknown)
        found = forecast(config, build(config["model"]).replace(vocab_size=64), setting)
        peaks[mode] = found.phases["first forward and backward"]
    inputs = 15 * 32 * 256 * 64 * 4
    assert peaks["full"] - peaks["offload"] > 0.75 * inputs  # less what is on its way back
