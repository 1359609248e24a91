"""Our own attention kernel: the numbers of float64, each document's its own to the bit, and a machine without it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftlab.assembly.run import _own_kernel
from ftlab.errors import ConfigError
from ftlab.models import cpu_attention, cpu_kernel
from ftlab.models.attention import Causal, Documents
from ftlab.models.compiled import require_compiler
from ftlab.models.cpu_attention import attend_by_document, attend_with, cpu_kernel_name, way_of
from ftlab.models.cpu_kernel import DocumentKernel, compile_into

MOST = DocumentKernel.MOST_TOKENS[torch.float32]


# With all that this CPU has, and without its tiles; as wide as the registers of AVX-512 (-O1: emulated, optimising
# takes minutes), of any x86-64.
WIDTHS = {
    "native": [],
    "no tiles": ["-mno-amx-bf16"],
    "16 floats": ["-D__AVX512F__", "-O1"],
    "4 floats": ["-march=x86-64"],
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DocumentKernel]:
    @cache
    def compiled(width: str) -> DocumentKernel:
        folder = tmp_path_factory.mktemp("kernel")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_kernel, "_FLAGS", [*cpu_kernel._FLAGS, *WIDTHS[width]])
            compile_into(folder)
        return DocumentKernel(folder)

    return compiled


@pytest.fixture(autouse=True)
def own_kernel(kernels: Callable[[str], DocumentKernel], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test here; documents that oneDNN would take in blocks, too."""
    monkeypatch.setattr(cpu_attention, "multiplied_by_onednn", lambda dtype: False)
    attend_with(kernels("native"))
    yield
    attend_with(None)


def heads_of(generator: torch.Generator, n_rows: int, n_tokens: int, *n_heads: int, head_dim: int) -> list[Tensor]:
    """(B, H, T, D) each, in memory (B, T, H, D)."""
    shapes = ((n_rows, n_tokens, n, head_dim) for n in n_heads)
    return [torch.randn(*shape, generator=generator).transpose(1, 2) for shape in shapes]


def ids_of(rows: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def with_gradients(ids: Tensor, q: Tensor, k: Tensor, v: Tensor, d_answer: Tensor) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    answer = Documents(ids, None)(*inputs)
    return answer.detach(), *torch.autograd.grad(answer, inputs, d_answer)


def exact(ids: Tensor, q: Tensor, k: Tensor, v: Tensor, d_answer: Tensor) -> tuple[Tensor, ...]:
    """The same in float64, by writing out all scores."""
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    wide_k, wide_v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in inputs[1:])
    allowed = (ids[:, :, None] == ids[:, None, :]).tril()[:, None]
    scores = (inputs[0] @ wide_k.transpose(2, 3) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    answer = scores.softmax(-1) @ wide_v
    return answer.detach(), *torch.autograd.grad(answer, inputs, d_answer.double())


@st.composite
def rows_of_documents(draw: st.DrawFn) -> list[list[int]]:
    n_tokens = draw(st.integers(1, 140))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, n_tokens - 1), max_size=6))) if n_tokens > 1 else []
        rows.append([end - start for start, end in zip([0, *cuts], [*cuts, n_tokens], strict=True)])
    return rows


@pytest.mark.parametrize("width", WIDTHS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows_of_documents(),
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([1, 8, 20, 64, 80]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_answers_and_gradients_are_those_of_float64(
    width, kernels, rows, n_kv_heads, group, head_dim, scale, dtype, seed
):
    attend_with(kernels(width))
    generator = torch.Generator().manual_seed(seed)
    n_heads, n_tokens = n_kv_heads * group, sum(rows[0])
    q, k, v, d_answer = heads_of(
        generator, len(rows), n_tokens, n_heads, n_kv_heads, n_kv_heads, n_heads, head_dim=head_dim
    )
    q, k, v, d_answer = ((t * s).to(dtype) for t, s in ((q, scale), (k, 1.0), (v, 1.0), (d_answer, 1.0)))
    assert way_of(dtype, max(map(max, rows)), None) == "own"

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype] * max(1.0, scale)
    found = with_gradients(ids_of(rows), q, k, v, d_answer)
    for one, other in zip(found, exact(ids_of(rows), q, k, v, d_answer), strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= tolerance * max(other.norm(), 0.1 * d_answer.double().norm())  # some are 0


def test_rows_that_are_one_document_each_are_computed_too():
    q, k, v, d_answer = heads_of(torch.Generator().manual_seed(0), 3, 45, 4, 2, 2, 4, head_dim=16)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    answer = Causal(None)(*inputs)
    found = (answer, *torch.autograd.grad(answer, inputs, d_answer))
    for one, other in zip(found, exact(torch.zeros(3, 45), q, k, v, d_answer), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=1e-5)


def test_the_operator_keeps_torchs_rules():
    q, k, v = heads_of(torch.Generator().manual_seed(0), 2, 40, 4, 2, 2, head_dim=16)
    begins = torch.zeros(2, 40, dtype=torch.bool)
    begins[:, [0, 11]] = True
    inputs = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(attend_by_document, (*inputs, begins, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_s_numbers_are_its_own_to_the_bit(dtype):
    """Wherever it stands, whoever its neighbours are, and however many threads there are."""
    generator = torch.Generator().manual_seed(0)
    tensors = [t.to(dtype) for t in heads_of(generator, 1, 100, 6, 2, 2, 6, head_dim=24)]
    alone = with_gradients(ids_of([[100]]), *tensors)
    poison = [torch.full_like(t[:, :, :37], torch.nan) for t in tensors]
    among = [torch.cat([p, t, p[:, :, :9]], dim=2) for p, t in zip(poison, tensors, strict=True)]
    threads = torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            found = with_gradients(ids_of([[37, 100, 9]]), *among)
            for one, other in zip(found, alone, strict=True):
                assert torch.equal(one[:, :, 37:137], other)
                assert one[:, :, :37].isnan().all(), "what is no number must not come out as one"
    finally:
        torch.set_num_threads(threads)


def test_heads_in_any_order_of_memory_give_the_same():
    q, k, v, d_answer = heads_of(torch.Generator().manual_seed(0), 2, 50, 4, 4, 4, 4, head_dim=16)
    ids = ids_of([[20, 30], [50]])
    by_head = [t.contiguous() for t in (q, k, v, d_answer)]
    for one, other in zip(with_gradients(ids, q, k, v, d_answer), with_gradients(ids, *by_head), strict=True):
        assert torch.equal(one, other)


def test_what_it_does_not_take_is_left_to_torch():
    assert [way_of(torch.float32, n, None) for n in (1, MOST, MOST + 1)] == ["own", "own", "flash"]
    assert way_of(torch.float16, 10, None) == way_of(torch.float64, 10, None) == "flash"
    assert [way_of(torch.float32, 10, window) for window in (9, 10)] == ["flash", "own"]
    assert cpu_kernel_name(torch.float32, 100, None) == "own kernel"
    assert cpu_kernel_name(torch.float32, 2 * MOST, None) == "own kernel, flash for long documents"
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_answer = heads_of(generator, 1, MOST + 40, 2, 2, 2, 2, head_dim=8)
    ids = ids_of([[20, MOST + 1, 19]])
    for one, other in zip(with_gradients(ids, q, k, v, d_answer), exact(ids, q, k, v, d_answer), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=1e-4)


def test_long_documents_of_bfloat16_are_taken_too():
    n_tokens = DocumentKernel.MOST_TOKENS[torch.bfloat16]
    assert [way_of(torch.bfloat16, n, None) for n in (n_tokens, n_tokens + 1)] == ["own", "flash"]
    generator = torch.Generator().manual_seed(0)
    tensors = [t.bfloat16() for t in heads_of(generator, 1, n_tokens, 2, 1, 1, 2, head_dim=64)]
    ids = torch.zeros(1, n_tokens, dtype=torch.int64)
    for one, other in zip(with_gradients(ids, *tensors), exact(ids, *tensors), strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_torchs_own_use_of_the_tiles_goes_on():
    """Both configure the same registers of a thread, where the CPU has them."""
    generator = torch.Generator().manual_seed(0)
    tensors = [t.bfloat16() for t in heads_of(generator, 2, 64, 2, 2, 2, 2, head_dim=32)]
    a, b = (torch.randn(n, 192, generator=generator).bfloat16() for n in (130, 70))
    product, found = a @ b.T, with_gradients(ids_of([[64]] * 2), *tensors)
    for _ in range(3):
        assert torch.equal(a @ b.T, product)
        for one, other in zip(with_gradients(ids_of([[64]] * 2), *tensors), found, strict=True):
            assert torch.equal(one, other)


def a_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_a_compiler_that_refuses_costs_only_the_kernel(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(
        "CXX", a_compiler(tmp_path / "c++", 'case "$*" in *-dM*) ;; *) echo "no vectors" >&2; exit 1;; esac')
    )
    assert _own_kernel(str(tmp_path / "cache")) is None
    assert "no vectors" in caplog.text


def test_it_is_compiled_once_for_a_machine(tmp_path, monkeypatch):
    count = tmp_path / "count"
    monkeypatch.setenv("CXX", a_compiler(tmp_path / "c++", f'echo x >> {count}\nexec g++ "$@"'))
    assert _own_kernel(str(tmp_path / "cache")) is not None
    assert _own_kernel(str(tmp_path / "cache")) is not None
    assert len(count.read_text().split()) == 3  # asked twice who it is, and to compile once


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compilation_without_a_compiler_is_refused(device, variable, monkeypatch):
    require_compiler(torch.device(device))
    monkeypatch.setenv(variable, "no-such-compiler -m64")
    with pytest.raises(ConfigError, match=f"no no-such-compiler .from {variable}."):
        require_compiler(torch.device(device))
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(ConfigError, match="compile: true needs a compiler"):
        require_compiler(torch.device(device))
