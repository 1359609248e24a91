"""float8 as torchao does it: emulated here, on the hardware where there is some; refused elsewhere with the reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ftlab.assembly.model import build_model, random_weights
from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.distributed.precision import Float8
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError
from ftlab.losses import CrossEntropy
from tests.loop.conftest import MODEL, precision_of

CPU = torch.device("cpu")
LOSS = CrossEntropy(label_smoothing=0.0, z_loss=0.0)


def fp8(*overrides: str) -> Float8:
    found = build(compose_config(["precision=fp8", *overrides])["precision"])
    assert isinstance(found, Float8)
    return found


def loss_and_gradient(precision, device):
    model = build_model(replace(MODEL, dim=64), random_weights(0), precision, OneRank(device))
    # 93 tokens: a gradient's product sums over them, and the hardware takes multiples of 16.
    tokens = torch.randint(0, 101, (3, 32), generator=torch.Generator().manual_seed(0)).to(device)
    with precision.autocast(device):
        loss = model(tokens[:, :-1], tokens[:, 1:], LOSS) / 93
    loss.backward()
    return model, loss.item(), model.blocks[0].ffn.up_proj.weight.grad


def compare(precision, device):
    model, loss, gradient = loss_and_gradient(precision, device)
    plain, exact_loss, exact = loss_and_gradient(precision_of("fp32"), device)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    assert (gradient - exact).norm() < 0.2 * exact.norm()
    assert not torch.equal(gradient, exact)


def test_emulated_float8_computes_nearly_the_same_with_the_same_names() -> None:
    pytest.importorskip("torchao")
    compare(fp8("precision.emulated=true"), CPU)


@pytest.mark.gpu
def test_float8_on_the_hardware_computes_nearly_the_same() -> None:
    precision = fp8()
    precision.require(torch.device("cuda"))
    compare(precision, torch.device("cuda"))


def test_a_cpu_is_refused_with_the_reason() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(ConfigError, match=r"needs a GPU with float8 matrix products .* this is a CPU"):
        fp8().require(CPU)
