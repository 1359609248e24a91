"""The books of memory: exact on real tensors, and heaps whose blocks never overlap."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.models.layers import RMSNorm
from ftlab.models.live_bytes import LiveBytes, Phase, _Heap, cuda_peaks, heap_peak, live_peaks
from ftlab.training.stand_ins import fused_norms

KB = 1024


def test_storages_are_counted_once_and_until_they_die():
    live = LiveBytes()
    with live:
        live.enter("a")
        x = torch.zeros(256)  # 1 KiB
        view = x[:10].view(2, 5)
        y = x + 1
        del x
        live.enter("b")
        del view, y
    assert live_peaks(live.phases) == [2 * KB, 2 * KB]
    assert live.live == 0


def test_the_backward_is_seen_too():
    live = LiveBytes()
    with live:
        live.enter("forward")
        w = torch.ones(1024, requires_grad=True)
        loss = (w * w).exp().sum()
        live.enter("backward")
        loss.backward()
    assert w.grad is not None
    assert live_peaks(live.phases)[0] == 3 * 4 * KB  # w, w² and its exponential
    assert live_peaks(live.phases)[1] >= 3 * 4 * KB


def test_norms_on_cuda_keep_a_number_for_each_row():
    norm, x = RMSNorm(64, eps=1e-5).bfloat16(), torch.ones(4, 8, 64, dtype=torch.bfloat16, requires_grad=True)
    held = {}
    for name, kernels in (("CPU", nullcontext()), ("CUDA", fused_norms())):
        live = LiveBytes()
        with kernels, live:
            live.enter("forward")
            normed = norm(x)
            held[name] = live.live
            normed.sum().backward()
        assert x.grad is not None
        assert norm.weight.grad is not None
    assert held["CUDA"] == 4 * 8 * (64 * 2 + 4), "what comes out, and a scale in float32"
    assert held["CPU"] > held["CUDA"] + 2 * 4 * 8 * 64 * 2


def test_a_storage_given_back_by_resizing_is_free():
    live = LiveBytes()
    with live:
        live.enter("a")
        x = torch.zeros(1024)
        x.untyped_storage().resize_(0)
        assert live.live == 0
        x.untyped_storage().resize_(4 * KB)
        assert live.live == 4 * KB
    resize = torch.UntypedStorage.resize_
    assert "LiveBytes" not in getattr(resize, "__qualname__", ""), "torch is as it was"


def test_cuda_blocks_are_multiples_of_512_bytes():
    assert cuda_peaks([Phase("a", [(1, 1), (2, 513), (1, -1), (3, 512)])]) == [1536]


sizes = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 30)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(sizes=sizes)
def test_blocks_of_the_heap_never_overlap_and_all_of_it_is_accounted_for(sizes):
    heap, held, slivers = _Heap(), [], []
    for number, (n_bytes, frees) in enumerate(sizes):
        if held and frees % 3 == 0:
            heap.free(held.pop(frees % len(held)))
        if (sliver := heap.allocate(number, n_bytes)) is not None:
            slivers.append(sliver)
        held.append(number)
        assert (heap._used[number][0] + 16) % 64 == 0
        pieces = sorted([*heap._used.values(), *heap._size_at.items(), *slivers])
        assert sum(size for _, size in pieces) == heap.top
        assert all(a + n == b for (a, n), (b, _) in pairwise(pieces))


def test_without_gaps_the_heap_is_what_is_live():
    events = [(i, 2**20) for i in range(50)]
    assert heap_peak([Phase("load", events)]) == pytest.approx(50 * 2**20, rel=1e-3)
