"""The loader deals every sample out exactly once, the same way for the same arguments; collate pads and shifts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab import IGNORE_INDEX
from ftlab.data.batch import Batch, Sample, collate
from ftlab.data.loader import BatchLoader, permutation


class Numbers:
    """``n`` samples of differing length; sample ``i`` holds only the token ``i``."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def sample(self, index):
        length = 1 + index % 5
        return Sample(np.full(length, index, dtype=np.int32), np.ones(length, dtype=bool), index)


def loader(n, batch_size=2, accumulation=1, dp_rank=0, dp_size=1, shuffle=True, seed=0):
    return BatchLoader(
        Numbers(n),
        batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        shuffle=shuffle,
        seed=seed,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pad_id=0,
    )


def ids(steps):
    return [[batch.sample_ids for batch in step] for step in steps]


def union_per_step(n, batch_size, accumulation, dp_size, epoch=0):
    """For each optimizer step, the samples that all ranks together see."""
    ranks = [ids(loader(n, batch_size, accumulation, rank, dp_size).steps(epoch)) for rank in range(dp_size)]
    return [sorted(i for step in steps for batch in step for i in batch) for steps in zip(*ranks, strict=True)]


shapes = {
    "n": st.integers(1, 60),
    "batch_size": st.integers(1, 5),
    "accumulation": st.integers(1, 4),
    "dp_size": st.integers(1, 4),
}


@settings(max_examples=150, deadline=None)
@given(**shapes, epoch=st.integers(0, 3))
def test_an_epoch_sees_every_sample_exactly_once_over_all_ranks(n, batch_size, accumulation, dp_size, epoch):
    seen = [i for step in union_per_step(n, batch_size, accumulation, dp_size, epoch) for i in step]
    assert sorted(seen) == list(range(n))


@settings(max_examples=100, deadline=None)
@given(**shapes)
def test_every_rank_gets_equally_many_micro_batches_and_none_is_empty_everywhere(n, batch_size, accumulation, dp_size):
    ranks = [list(loader(n, batch_size, accumulation, rank, dp_size).steps(0)) for rank in range(dp_size)]
    for step in zip(*ranks, strict=True):
        assert len({len(micro_batches) for micro_batches in step}) == 1
        assert 1 <= len(step[0]) <= accumulation
        for micro_batch in zip(*step, strict=True):
            assert any(batch.sample_ids for batch in micro_batch)


@settings(max_examples=100, deadline=None)
@given(n=shapes["n"], start=st.integers(0, 10), epoch=st.integers(0, 3))
def test_starting_later_gives_the_same_steps(n, start, epoch):
    assert ids(loader(n).steps(epoch, start_step=start)) == ids(loader(n).steps(epoch))[start:]


@pytest.mark.parametrize(("batch_size", "accumulation", "dp_size"), [(2, 4, 1), (4, 1, 2), (1, 2, 4), (2, 2, 2)])
def test_the_same_global_batch_size_means_the_same_samples_in_each_step(batch_size, accumulation, dp_size):
    assert union_per_step(45, batch_size, accumulation, dp_size) == union_per_step(45, 8, 1, 1)


def test_the_shares_of_the_last_step_differ_by_one_sample_at_most():
    shares = [sum(len(batch.sample_ids) for batch in list(loader(30, 4, 2, rank, 3).steps(0))[-1]) for rank in range(3)]
    assert shares == [2, 2, 2]  # 30 samples, 24 in the first step


@pytest.mark.parametrize(("n", "steps"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_the_partial_last_step_is_counted(n, steps):
    assert loader(n, 2, 2).steps_per_epoch == steps == len(list(loader(n, 2, 2).steps(0)))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = [loader(50, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_without_shuffle_the_order_is_the_datasets():
    assert ids(loader(5, shuffle=False).steps(epoch=3)) == [[[0, 1]], [[2, 3]], [[4]]]


def test_the_order_never_changes_between_versions():
    """Frozen: a checkpoint of an older ftlab or NumPy must go on with the same samples."""
    assert permutation(10, 0).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
    assert permutation(10, 20_240_208, 3).tolist() == [6, 9, 2, 0, 1, 5, 3, 7, 4, 8]


def test_collate_pads_on_the_right_and_shifts_the_targets():
    samples = [
        Sample(np.array([1, 5, 6, 2], np.int32), np.array([False, False, True, True]), 7),
        Sample(np.array([1, 9], np.int32), np.array([True, True]), 3),
    ]
    batch = collate(samples, pad_id=4)
    x = IGNORE_INDEX
    assert batch.tokens.tolist() == [[1, 5, 6, 2], [1, 9, 4, 4]]
    assert batch.targets.tolist() == [[x, 6, 2, x], [9, x, x, x]]
    assert (batch.sample_ids, batch.n_targets, batch.n_tokens) == ([7, 3], 3, 6)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), data=st.data())
def test_collate_keeps_every_token_and_every_trained_target_and_adds_none(lengths, data):
    samples = []
    for i, length in enumerate(lengths):
        tokens = data.draw(st.lists(st.integers(1, 99), min_size=length, max_size=length))
        trained = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        samples.append(Sample(np.array(tokens, np.int32), np.array(trained), i))
    batch = collate(samples, pad_id=0)
    for sample, tokens, targets in zip(samples, batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        n = len(sample.tokens)
        assert tokens == [*sample.tokens, *[0] * (len(tokens) - n)]
        learned = [t for t, is_trained in zip(sample.tokens[1:], sample.trained[1:], strict=True) if is_trained]
        assert [t for t in targets if t != IGNORE_INDEX] == learned
    assert batch.n_targets == int((batch.targets != IGNORE_INDEX).sum())
    assert batch.n_tokens == sum(lengths)


def test_an_empty_batch_counts_nothing():
    batch = Batch.empty(pad_id=3)
    assert batch.tokens.tolist() == [[3]]
    assert batch.targets.tolist() == [[IGNORE_INDEX]]
    assert (batch.n_targets, batch.n_tokens, batch.sample_ids) == (0, 0, [])


def test_a_batch_moved_to_a_device_keeps_its_counts():
    batch = collate([Numbers(9).sample(4)], pad_id=0)
    moved = batch.to("cpu")
    assert (moved.n_targets, moved.n_tokens, moved.sample_ids) == (4, 5, [4])
    assert torch.equal(moved.tokens, batch.tokens)
