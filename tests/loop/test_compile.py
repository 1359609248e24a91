"""Compiled blocks: the same numbers, compiled once for all lengths, whatever is recomputed, packed or generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from ftlab import IGNORE_INDEX
from ftlab.data.batch import Pack
from ftlab.distributed.single import OneRank
from ftlab.losses import ChunkedCrossEntropy
from ftlab.models.compiled import compile_blocks
from ftlab.training.generate import generate
from ftlab.training.loop import fit
from tests.loop.conftest import CPU, HandRun, Rows


class Packs(Rows):
    """Rows of 64 tokens with 1 to 6 documents in them."""

    def sample(self, index: int) -> Any:
        n = 1 + index % 6
        documents = [super(Packs, self).sample((index + i) % len(self)) for i in range(n)]
        lengths = np.minimum([len(d.tokens) for d in documents], 64 // n)
        shortened = [
            type(d)(tokens=d.tokens[:length], trained=d.trained[:length], sample_id=d.sample_id)
            for d, length in zip(documents, lengths, strict=True)
        ]
        return Pack(shortened, 64)


@pytest.fixture
def compiled(hand_run: Callable[..., HandRun]) -> Any:
    torch._dynamo.reset()
    counters.clear()

    def build(rows: Rows, **options: Any) -> HandRun:
        made = hand_run(rows, **options)
        size = 1 if made.run.trainer.share_prefixes else made.run.trainer.batch_size
        compile_blocks(made.run.state.model, varying=True, batch_size=size)
        return made

    yield build
    torch._dynamo.reset()


def n_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_two_hundred_steps_of_varying_length_compile_nothing_after_the_third(hand_run, compiled):
    options: dict[str, Any] = {"max_steps": 200, "lr": 0.3}
    rows = Rows(241)  # the last of an epoch is alone in its batch
    made = compiled(rows, **options)
    graphs: list[int] = []
    made.run.log = lambda line, step: (made.lines.append(dict(line)), graphs.append(n_graphs()))
    fit(made.run)
    assert graphs[2] > 0
    assert graphs[-1] == graphs[2]
    assert not counters["graph_break"], "a block is one piece"
    plain = hand_run(rows, **options)
    fit(plain.run)
    assert made.losses == pytest.approx(plain.losses, rel=1e-3)  # at this rate, roundings grow
    # Answers grow by a token at a time, and compile nothing either.
    model = made.run.state.model
    model.eval()
    settings: dict[str, Any] = {"max_new_tokens": 8, "end_ids": [100], "temperature": 0.0, "top_p": 1.0, "seed": 0}
    answers = generate(model, [[1, 2, 3], [4, 5]], **settings)
    plain.run.state.model.eval()
    assert answers == generate(plain.run.state.model, [[1, 2, 3], [4, 5]], **settings)
    assert n_graphs() == graphs[-1]


@pytest.mark.parametrize(
    ("recomputed", "n_rows"),
    [
        ("none", 23),
        pytest.param("full", 21, marks=pytest.mark.slow),
        pytest.param("selective", 23, marks=pytest.mark.slow),
    ],
)
def test_compiled_packed_rows_train_as_plain_ones_do(hand_run, compiled, recomputed, n_rows):
    options: dict[str, Any] = {"max_steps": 12, "lr": 0.3}  # two epochs, whose last batches have 3 rows or 1 of 4
    made = compiled(Packs(n_rows), parallel=OneRank(CPU, activation_checkpointing=recomputed), **options)
    plain = hand_run(Packs(n_rows), **options)
    fit(made.run)
    fit(plain.run)
    assert made.losses == pytest.approx(plain.losses, rel=1e-5)
    assert n_graphs() == 1
    assert not counters["graph_break"]


class Templated(Packs):
    """The same, whose documents begin alike; every fifth pack has one document, which begins otherwise."""

    def sample(self, index: int) -> Any:
        pack = super().sample(index)
        beginning = np.full(4 + 3 * (index % 5 == 0), 100 - (index % 5 == 0))
        documents = [
            replace(d, tokens=np.append(beginning, d.tokens), trained=np.append(beginning < 0, d.trained))
            for d in pack.samples
        ]
        return Pack(documents[:1] if index % 5 == 0 else documents, 128)


@pytest.mark.parametrize("recomputed", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_compiled_folded_rows_train_as_plain_whole_ones_do(hand_run, compiled, recomputed):
    options: dict[str, Any] = {"max_steps": 40, "lr": 0.3}
    rows = Templated(21)  # the last of an epoch is alone in its batch, and has nothing to share
    made = compiled(rows, parallel=OneRank(CPU, activation_checkpointing=recomputed), share_prefixes=True, **options)
    plain = hand_run(rows, **options)
    fit(made.run)
    fit(plain.run)
    assert made.losses == pytest.approx(plain.losses, rel=3e-4)
    assert n_graphs() == 1
    assert not counters["graph_break"]
    shared = [line["perf/shared_frac"] for line in made.lines]
    assert max(shared) > 0.3
    assert min(shared) < 0.1
    assert "perf/shared_frac" not in plain.lines[0]


def test_the_compiled_loss_is_the_plain_one_and_compiled_once_for_all_numbers_of_targets():
    torch._dynamo.reset()
    counters.clear()
    plain = ChunkedCrossEntropy(label_smoothing=0.1, z_loss=1e-3, chunk_tokens=64)
    compiled = plain.compiled()
    generator = torch.Generator().manual_seed(0)
    for n in (200, 64, 90, 7, 1):
        logits, targets = torch.randn(n, 300, generator=generator), torch.randint(300, (n,), generator=generator)
        targets[::5] = IGNORE_INDEX
        copies, weights = [logits.bfloat16(), logits.bfloat16()], torch.rand(n, generator=generator)
        one, other = (
            loss.to_gradient(copy, targets, weights) for loss, copy in zip((plain, compiled), copies, strict=True)
        )
        torch.testing.assert_close(other, one, rtol=1e-6, atol=0)
        torch.testing.assert_close(copies[1], copies[0], rtol=2**-7, atol=0)  # a unit in the last place
    assert n_graphs() == 1
    torch._dynamo.reset()
