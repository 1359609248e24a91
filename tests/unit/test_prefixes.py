"""Documents folded into a tree: every beginning once, and the loss and gradients of the documents."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ftlab.data.batch import Pack, Sample, collate, collate_folded
from ftlab.data.weights import rounded
from ftlab.distributed.activation import checkpoint_activations
from ftlab.losses import ChunkedCrossEntropy, CrossEntropy
from ftlab.prefixes import Take, fold
from tests.unit.test_transformer import initialised, small

PLAIN = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)
LOSSES = [PLAIN, ChunkedCrossEntropy(label_smoothing=0.1, z_loss=1e-2, chunk_tokens=7)]


@st.composite
def documents(draw, n_ids: int = 3) -> list[list[int]]:
    """Few ids, and beginnings that are drawn from a list: much is shared, at any depth, and some are all the same."""
    ids = st.lists(st.integers(0, n_ids - 1), max_size=9)
    beginnings = draw(st.lists(ids, min_size=1, max_size=3))
    made = draw(st.lists(st.tuples(st.sampled_from(beginnings), ids), min_size=1, max_size=9))
    return [[n_ids, *beginning, *rest][: draw(st.integers(1, 19))] for beginning, rest in made]


def samples_of(documents: list[list[int]], seed: int, *, weighted: bool = False) -> list[Sample]:
    """Some tokens of each trained, or each as much as is drawn."""
    random = np.random.default_rng(seed)
    made = []
    for i, document in enumerate(documents):
        trained = random.random(len(document)) < 0.7
        if weighted:
            weights = [rounded(weight) for weight in random.choice([0.05, 1 / 3, 1, 2.5], len(document))]
            trained = np.where(trained, weights, 0).astype(np.float32)
        trained[0] = 0
        made.append(Sample(np.array(document, dtype=np.uint16), trained, i))
    return made


def loss_and_gradients(model, batch, loss) -> tuple[Tensor, dict[str, Tensor]]:
    found = model(
        batch.tokens,
        batch.targets,
        loss,
        doc_ids=batch.doc_ids,
        n_targets=batch.n_targets,
        weights=batch.weights,
        tree=batch.tree,
    )
    found.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found.detach(), gradients


@settings(max_examples=200, deadline=None, derandomize=True)
@given(made=documents(), seed=st.integers(0, 2**31), weighted=st.booleans(), n_over=st.integers(0, 5))
def test_the_nodes_are_the_distinct_beginnings_and_count_what_their_documents_do(made, seed, weighted, n_over):
    samples = samples_of(made, seed, weighted=weighted)
    n_tokens = sum(map(len, made))
    folded = fold([sample.tokens for sample in samples], [sample.trained for sample in samples], n_tokens + n_over)
    assert sorted(folded.order) == list(range(len(made)))

    begin = [tuple(made[i][: n + 1]) for i in folded.order for n in range(len(made[i]))]
    nodes, over = folded.tree.tokens.rows.split([n_tokens, n_over])
    assert not over.any()
    nodes = nodes.tolist()
    beginning = dict(zip(nodes, begin, strict=True))
    n_nodes = folded.tree.n_nodes
    assert n_nodes == len(set(begin)) == len(set(nodes))
    assert [beginning[node] for node in nodes] == begin, "a node is one beginning"
    assert [beginning[node][-1] for node in range(n_nodes)] == folded.tokens[:n_nodes].tolist()
    assert folded.tree.tokens.rows[folded.tree.nodes.rows][:n_nodes].tolist() == list(range(n_nodes))
    assert len(folded.tokens) % 64 == 0 <= len(folded.tokens) - n_nodes < 64, "few shapes"

    weights: dict[tuple[int, ...], float] = {}
    for sample, document in zip(samples, made, strict=True):
        for n in np.flatnonzero(sample.trained).tolist():
            weights[tuple(document[: n + 1])] = weights.get(tuple(document[: n + 1]), 0) + float(sample.trained[n])
    found = {}
    parents = folded.tree.parents.rows.tolist()
    for parent, target, weight in zip(parents, folded.targets.tolist(), folded.weights.tolist(), strict=True):
        found[(*beginning[parent], target)] = weight
    assert found == pytest.approx(weights, rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    made=documents(n_ids=60),
    seed=st.integers(0, 2**31),
    weighted=st.booleans(),
    packed=st.booleans(),
    window=st.sampled_from([None, 1, 3]),
    loss=st.sampled_from(LOSSES),
)
def test_folded_and_whole_documents_give_the_same_loss_and_gradients(made, seed, weighted, packed, window, loss):
    model = initialised(small(family="mistral", sliding_window=window), seed)
    samples = samples_of(made, seed, weighted=weighted)
    half = len(samples) // 2
    rows = [Pack(some, 200) for some in (samples[:half], samples[half:]) if some] if packed else samples
    whole, folded = collate(rows, pad_id=0), collate_folded(rows)
    for told in ("sample_ids", "lengths", "n_targets", "total_weight", "n_tokens"):
        assert getattr(folded, told) == getattr(whole, told), told
    assert folded.n_shared == folded.n_tokens + folded.n_padding - folded.tokens.numel()
    assert folded.n_padding < 64

    wider = replace(model.config, max_seq_len=256).build()  # packs are longer than what a document may be
    wider.load_state_dict(model.state_dict())
    expected, of_whole = loss_and_gradients(wider, whole, loss)
    found, of_folded = loss_and_gradients(model, folded, loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in of_whole.items():
        torch.testing.assert_close(of_folded[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_what_is_the_same_is_computed_once():
    document = list(range(20))
    batch = collate_folded(samples_of([document] * 8, seed=0))
    assert batch.tokens[0, :20].tolist() == document
    assert (batch.n_tokens, batch.n_shared, batch.n_padding) == (160, 140, 64 - 20)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_repeats_folded_documents_to_the_bit(mode):
    batch = collate_folded(samples_of([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 4, 6, 7], [8, 9]], seed=0))
    found = []
    for recompute in ("none", mode):
        model = initialised(small())
        checkpoint_activations(model, recompute)
        found.append(loss_and_gradients(model, batch, PLAIN)[1])
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_gets_the_sum_of_its_gradients_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = np.random.default_rng(0).integers(0, 40, 1000)  # each some 25 times
    rows[rows == 7] = 8  # and one never
    taken = Take.of(rows, 40)
    x = torch.randn(40, 3, 8, generator=generator).to(dtype).requires_grad_()
    d_taken = torch.randn(1000, 3, 8, generator=generator).to(dtype)
    answer = taken(x)
    assert torch.equal(answer, x[torch.from_numpy(rows)])
    answer.backward(d_taken)
    sums = torch.zeros(40, 3, 8, dtype=torch.float64).index_add_(0, torch.from_numpy(rows), d_taken.double())
    assert not x.grad[7].any()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(x.grad.double(), sums, rtol=tolerance, atol=1e-5)


def test_nothing_trained_is_nothing_to_learn():
    samples = [replace(sample, trained=np.zeros(len(sample.tokens), bool)) for sample in samples_of([[1, 2], [1]], 0)]
    for loss in LOSSES:
        found, gradients = loss_and_gradients(initialised(small()), collate_folded(samples), loss)
        assert found == 0
        assert not any(gradient.any() for gradient in gradients.values())
