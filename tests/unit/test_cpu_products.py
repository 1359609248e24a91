"""However this CPU multiplies matrices, the products are those of their dtype."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from ftlab.models import cpu_products
from ftlab.models.live_bytes import LiveBytes, live_peaks


@pytest.fixture
def as_before(monkeypatch):
    """Nothing chosen yet, and afterwards what was."""
    chosen = cpu_products._float32_by_onednn
    monkeypatch.setattr(cpu_products, "_float32_by_onednn", False)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("medium" if chosen else "highest")


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def widened(request, monkeypatch):
    """(dtype, how often each operator widened it), whatever this CPU can do."""
    done = Counter()

    def counting(name):
        wide = getattr(torch, name)

        def multiply(*tensors, **scales):
            done[name] += 1
            return wide(*tensors, **scales)

        return multiply

    with torch.library._scoped_library("aten", "IMPL") as library:
        with monkeypatch.context() as patched:
            for name in ("mm", "bmm", "addmm", "baddbmm"):
                patched.setattr(torch, name, counting(name))
            cpu_products.widen_products(library, request.param)
        yield request.param, done


@pytest.mark.parametrize("shape", [(1, 7, 3), (5, 64, 33), (128, 64, 512), (300, 1000, 200)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_are_as_exact_as_float32_is(shape, transposed, batch):
    cpu_products.speed_up_products(torch.float32)
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
    monkeypatch.setattr(cpu_products, "_is_amd", lambda: True)
    monkeypatch.setattr(cpu_products, "_is_float32", lambda: not rounds)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    cpu_products.speed_up_products(torch.float32)
    assert cpu_products.multiplied_by_onednn(torch.float32) is not rounds
    assert torch.get_float32_matmul_precision() == ("highest" if rounds else "medium")
    with cpu_products.multiplied_by_mkl():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == ("highest" if rounds else "medium")


def tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_rounding_to_bfloat16_or_tf32_is_seen():
    assert cpu_products._is_float32()
    assert not cpu_products._is_float32(lambda a, b: a.bfloat16().float() @ b.bfloat16().float())
    assert not cpu_products._is_float32(lambda a, b: tf32(a) @ tf32(b))
    assert not cpu_products._is_float32(lambda a, b: (a @ b).bfloat16().float())


@pytest.mark.parametrize("supported", [True, False])
def test_16_bits_are_widened_where_the_cpu_cannot_multiply_them(supported, monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_products, "_widened", {})
    monkeypatch.setattr(cpu_products, "multiplied_by_onednn", lambda dtype: supported)
    monkeypatch.setattr(cpu_products, "widen_products", lambda library, dtype: asked.append(dtype))
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        cpu_products.speed_up_products(dtype)
    assert asked == ([] if supported else [torch.bfloat16]), "once, and 16 bits only"


@pytest.mark.parametrize("transposed", [False, True])
def test_widened_products_are_those_of_float32_rounded_once(widened, transposed):
    dtype, done = widened
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=generator).to(dtype) for s in ((3, 40, 65), (3, 65, 24), (3, 40, 24)))
    b = b.mT.contiguous().mT if transposed else b
    products = {
        "mm": lambda c, a, b, **out: torch.mm(a[0], b[0], **out),
        "bmm": lambda c, a, b, **out: torch.bmm(a, b, **out),
        "addmm": lambda c, a, b, **out: torch.addmm(c[0], a[0], b[0], beta=0.5, alpha=2, **out),
        "baddbmm": lambda c, a, b, **out: torch.baddbmm(c, a, b, beta=0.5, alpha=2, **out),
    }
    for name, multiply in products.items():
        expected = multiply(c.float(), a.float(), b.float()).to(dtype)
        assert torch.equal(multiply(c, a, b), expected)
        assert torch.equal(multiply(c, a, b, out=torch.empty(0, dtype=dtype)), expected)
        assert done[name] == 2


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_a_widened_layer_are_those_of_float64(widened, compiled):
    dtype, done = widened
    layer = torch.nn.Linear(64, 48).to(dtype)
    x = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    exact = torch.nn.Linear(64, 48).double()
    exact.load_state_dict(layer.state_dict())
    exact_x = x.detach().double().requires_grad_()
    torch.compiler.reset()
    F.silu(exact(exact_x)).square().sum().backward()
    run = torch.compile(lambda x: F.silu(layer(x))) if compiled else lambda x: F.silu(layer(x))
    run(x).float().square().sum().backward()
    pairs = zip((x, layer.weight, layer.bias), (exact_x, exact.weight, exact.bias), strict=True)
    for one, other in pairs:
        assert one.grad.dtype == dtype
        assert (one.grad - other.grad).norm() < 0.02 * other.grad.norm()
    assert sum(done.values()) == 3, "the answer and two gradients"


def test_what_need_not_be_widened_is_not(widened):
    dtype, done = widened
    assert (torch.ones(64, 64) @ torch.ones(64, 64)).dtype == torch.float32
    token = torch.ones(1, 64, dtype=dtype) @ torch.ones(64, 64, dtype=dtype)
    assert torch.equal(token, torch.full((1, 64), 64.0, dtype=dtype))
    assert not done


def test_mixed_dtypes_are_refused_as_before(widened):
    dtype, _ = widened
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(64, 64), torch.ones(64, 64, dtype=dtype))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(*2 * [torch.ones(64, 64, dtype=dtype)], out=torch.empty(64, 64))


def test_without_data_they_take_the_memory_that_they_take(widened):
    dtype, _ = widened
    a, b, c, few = (torch.ones(s, dtype=dtype) for s in ((64, 128), (128, 32), (64, 1), (8, 128)))
    live = LiveBytes()
    with live, cpu_products.WidenedProducts(dtype):
        live.enter("few")
        few @ b
        live.enter("many")
        product = torch.addmm(c, a, b)
    assert product.dtype == dtype
    assert torch.equal(product, torch.full((64, 32), 129.0, dtype=dtype))
    few_bytes, many_bytes = live_peaks(live.phases)
    assert few_bytes == 2 * 8 * 32
    assert many_bytes == 4 * (64 + 64 * 128 + 128 * 32 + 64 * 32), "all that is multiplied, added and found, in float32"
