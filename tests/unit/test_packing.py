"""Packing: every document once, little unused, and the same loss and gradient as documents in rows of their own."""

import itertools
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab import IGNORE_INDEX
from ftlab.data.batch import Pack, Sample, collate
from ftlab.data.loader import BatchLoader
from ftlab.data.order import group_by_length, mixed, permutation, shares
from ftlab.data.packing import plan_packs
from ftlab.data.tokenizers import SentencePieceTokenizer
from ftlab.losses import CrossEntropy
from ftlab.models.transformer import ModelConfig

KINDS = ["greedy", "best_fit"]


def packs_of(plan):
    return np.split(plan.documents, plan.ends[:-1])


@pytest.mark.parametrize("packing", KINDS)
@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 40), data=st.data())
def test_every_document_is_in_one_pack_and_no_pack_is_too_full(packing, capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60)))
    plan = plan_packs(lengths, capacity, packing)
    assert sorted(plan.documents.tolist()) == list(range(len(lengths)))
    packs = packs_of(plan)
    assert all(0 < lengths[pack].sum() <= capacity for pack in packs)
    again = plan_packs(lengths, capacity, packing)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    if packing == "greedy":  # what comes next did not fit
        for pack, following in itertools.pairwise(packs):
            assert lengths[pack].sum() + lengths[following[0]] > capacity


def test_greedy_keeps_the_order_of_the_documents():
    assert plan_packs(np.array([5, 4, 3, 8, 2]), 10, "greedy").documents.tolist() == [0, 1, 2, 3, 4]


def test_best_fit_fills_the_fullest_pack_that_has_room():
    plan = plan_packs(np.array([6, 5, 4, 3, 2]), 10, "best_fit")
    assert [pack.tolist() for pack in packs_of(plan)] == [[0, 2], [1, 3, 4]]


def test_on_the_real_rows_best_fit_leaves_less_than_two_percent_unused(alpaca_lengths):
    plan = plan_packs(alpaca_lengths, 2048, "best_fit")
    assert alpaca_lengths.sum() / (2048 * len(plan.ends)) >= 0.98


def test_on_a_hundred_thousand_log_normal_lengths_it_leaves_less_than_one_percent_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 100_000).astype(np.int64), 1, 2048)
    started = time.perf_counter()
    plan = plan_packs(lengths, 2048, "best_fit")
    assert time.perf_counter() - started < 10
    assert lengths.sum() / (2048 * len(plan.ends)) >= 0.99


@pytest.fixture(scope="module")
def alpaca_lengths(shared_data):
    import json

    from ftlab.data.templates import AlpacaTemplate

    tokenizer = SentencePieceTokenizer(path=str(shared_data / "llama2_tokenizer.model"))
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    texts = [AlpacaTemplate().render(row["instruction"], row["input"]) + row["output"] for row in rows]
    return np.array([len(ids) for ids in tokenizer.encode_batch(texts, bos=True, eos=True)])


# ---- batches ---------------------------------------------------------------------------------------------


def documents(lengths, seed=0):
    random = np.random.default_rng(seed)
    samples = []
    for i, length in enumerate(lengths):
        trained = random.random(length) < 0.6
        trained[0] = False
        samples.append(Sample(random.integers(3, 61, length).astype(np.uint16), trained, i))
    return samples


def test_a_packed_batch_says_which_token_is_of_which_document():
    a, b, c = documents([3, 2, 4])
    a.trained[1:] = b.trained[1:] = True
    batch = collate([Pack([a, b], 7), Pack([c], 7)], pad_id=0)
    assert batch.doc_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1, 1]]
    x = IGNORE_INDEX
    assert batch.tokens[0].tolist() == [*a.tokens, *b.tokens, 0, 0]
    assert batch.targets[0].tolist() == [a.tokens[1], a.tokens[2], x, b.tokens[1], x, x, x]
    assert (batch.sample_ids, batch.lengths, batch.n_tokens) == ([0, 1, 2], [3, 2, 4], 9)
    assert collate([a], pad_id=0).doc_ids is None
    assert torch.equal(batch.to("cpu").doc_ids, batch.doc_ids)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(
        family="llama",
        rope_scaling=None,
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=None, ffn_hidden_dim=48, vocab_size=61,
        norm_eps=1e-5, rope_theta=10000.0, max_seq_len=64, sliding_window=None, tie_embeddings=False, checkpoint=None,
    )  # fmt: skip
    model = config.build()
    model.init_weights(0)
    return model


def loss_and_gradients(model, batches):
    """Summed over the batches and divided once by all their targets, as a step does."""
    model.zero_grad()
    loss = CrossEntropy(label_smoothing=0.0, z_loss=0.0)
    n_targets = sum(batch.n_targets for batch in batches)
    total = sum(model(b.tokens, b.targets, loss, doc_ids=b.doc_ids) for b in batches) / n_targets
    total.backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packing", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_packed_and_padded_give_the_same_loss_and_gradients(model, packing, seed):
    seq_len = 64
    lengths = np.concatenate([[1, 2, seq_len, seq_len - 1], np.random.default_rng(seed).integers(1, seq_len + 1, 12)])
    samples = documents(lengths, seed)
    plan = plan_packs(lengths, seq_len, packing)
    packed = [collate([Pack([samples[i] for i in pack], seq_len)], pad_id=0) for pack in packs_of(plan)]
    padded = [collate(samples[i : i + 4], pad_id=0) for i in range(0, len(samples), 4)]
    loss, gradients = loss_and_gradients(model, padded)
    packed_loss, packed_gradients = loss_and_gradients(model, packed)
    assert abs(loss - packed_loss) <= 1e-5
    for name, gradient in gradients.items():
        assert (gradient - packed_gradients[name]).abs().max() <= 1e-5, name
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3  # there is something to compare


def test_a_changed_document_changes_no_other_documents_logits(model):
    samples = documents([20, 13, 25, 6])
    other = [samples[0], documents([13], seed=9)[0], *samples[2:]]
    logits = []
    for row in (samples, other):
        batch = collate([Pack(row, 64)], pad_id=0)
        logits.append(model(batch.tokens, doc_ids=batch.doc_ids)[0])
    changed = slice(20, 33)
    assert not torch.equal(logits[0][changed], logits[1][changed])
    kept = [i for i in range(64) if not 20 <= i < 33]
    assert torch.equal(logits[0][kept], logits[1][kept])


class PackedRows:
    def __init__(self, n, capacity=16):
        self.samples = documents(np.random.default_rng(n).integers(1, capacity + 1, n))
        self.capacity = capacity
        self.packs = packs_of(plan_packs(np.array([len(s.tokens) for s in self.samples]), capacity, "best_fit"))
        self.lengths = np.full(len(self.packs), capacity)

    def __len__(self):
        return len(self.packs)

    def sample(self, index):
        return Pack([self.samples[i] for i in self.packs[index]], self.capacity)


def test_the_loader_deals_packs_like_rows():
    rows = PackedRows(50)
    deal = partial(BatchLoader, rows, batch_size=2, gradient_accumulation_steps=2, shuffle=True, seed=3, pad_id=0)
    ranks = [deal(dp_rank=rank, dp_size=2) for rank in range(2)]
    seen = [i for loader in ranks for step in loader.steps(1) for batch in step for i in batch.sample_ids]
    assert sorted(seen) == list(range(50))
    later = [[b.sample_ids for b in step] for step in ranks[0].steps(1, start_step=2)]
    assert later == [[b.sample_ids for b in step] for step in ranks[0].steps(1)][2:]
    shapes = {tuple(b.tokens.shape) for step in ranks[0].steps(0) for b in step if b.sample_ids}
    assert {width for _, width in shapes} == {16}


# ---- orders ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 300), block=st.integers(1, 20), seed=st.integers(0, 3), epoch=st.integers(0, 2))
def test_grouping_by_length_changes_steps_and_loses_no_row(n, block, seed, epoch):
    lengths = np.random.default_rng(n).integers(1, 100, n)
    order = permutation(n, seed, epoch)
    grouped = group_by_length(order, lengths, block, seed, epoch)
    assert sorted(grouped.tolist()) == list(range(n))
    assert np.array_equal(grouped, group_by_length(order, lengths, block, seed, epoch))
    whole = n // block * block
    assert np.array_equal(grouped[whole:], order[whole:])


def test_grouping_by_length_saves_most_of_the_padding():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 4000).astype(int), 1, 2048)
    order = permutation(len(lengths), 0, 0)

    def padded(rows):
        return sum(lengths[rows[i : i + 8]].max() * 8 for i in range(0, len(rows), 8)) / lengths.sum()

    assert padded(order) > 2
    assert padded(group_by_length(order, lengths, 8, 0, 0)) < 1.15


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), total=st.integers(1, 500))
def test_shares_sum_to_the_whole_and_are_within_one_of_exact(weights, total):
    counts = shares(weights, total)
    assert counts.sum() == total
    exact = np.array(weights) / sum(weights) * total
    assert (abs(counts - exact) < 1 + 1e-9).all()


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_a_mixture_goes_through_each_source_before_it_repeats_any_of_it(sizes, data, seed, shuffle):
    counts = [data.draw(st.integers(0, 20)) for _ in sizes]
    n_epochs = 4
    first = np.concatenate([[0], np.cumsum(sizes)])
    epochs = [mixed(sizes, counts, seed, epoch, shuffle=shuffle) for epoch in range(n_epochs)]
    for k, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        drawn = [[i - first[k] for i in epoch if first[k] <= i < first[k + 1]] for epoch in epochs]
        assert [len(rows) for rows in drawn] == [count] * n_epochs
        times = np.bincount([i for rows in drawn for i in rows], minlength=size)
        assert times.max() - times.min() <= 1  # over all epochs so far
