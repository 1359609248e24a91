"""Whichever library multiplies float32 on this CPU, the products are those of float32."""

from __future__ import annotations

import pytest
import torch

from ftlab.models import float32


@pytest.fixture
def as_before(monkeypatch):
    """Nothing chosen yet, and afterwards what was."""
    chosen = float32._by_onednn
    monkeypatch.setattr(float32, "_by_onednn", False)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("medium" if chosen else "highest")


@pytest.mark.parametrize("shape", [(1, 7, 3), (5, 64, 33), (128, 64, 512), (300, 1000, 200)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_are_as_exact_as_float32_is(shape, transposed, batch):
    float32.choose_float32_library()
    n, k, m = shape
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(*batch, n, k, generator=generator)
    b = torch.randn(*batch, *((m, k) if transposed else (k, m)), generator=generator)
    b = b.mT if transposed else b
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() < 2e-6 * exact.norm()  # bfloat16: 2e-3, TF32: 3e-4


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("rounds", [False, True])
def test_a_library_that_rounds_is_not_chosen(rounds, monkeypatch):
    monkeypatch.setattr(float32, "_is_amd", lambda: True)
    monkeypatch.setattr(float32, "_is_float32", lambda: not rounds)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    float32.choose_float32_library()
    assert float32.multiplied_by_onednn() is not rounds
    assert torch.get_float32_matmul_precision() == ("highest" if rounds else "medium")
    with float32.multiplied_by_mkl():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == ("highest" if rounds else "medium")
