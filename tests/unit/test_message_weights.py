"""Weights of messages other than 0 and 1: how much each token counts, from the row's text to the loss."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab import IGNORE_INDEX
from ftlab.data.batch import Sample, collate
from ftlab.data.dataset import Dataset
from ftlab.data.formats import Chat, Instruct
from ftlab.data.mixture import Mixture
from ftlab.data.show import sample_html, shown
from ftlab.data.templates import BOS, EOS, Part, PlainTemplate, control
from ftlab.data.tokenizers import ByteTokenizer
from ftlab.data.weights import ONE, rounded, total
from ftlab.distributed.single import OneRank
from ftlab.errors import DataError
from ftlab.losses import ChunkedCrossEntropy, CrossEntropy
from tests.loop.conftest import precision_of
from tests.unit.test_evaluate import evaluator
from tests.unit.test_losses import SETTINGS
from tests.unit.test_transformer import initialised, small

WEIGHTS = [0, 0.05, 1 / 3, 0.7, 1, 1, None, 2.5, 40]


class Turns:
    """Each message in brackets that say who speaks; an answer's closing bracket is the answer's to write."""

    def parts(self, conversation):
        parts = [control(BOS)]
        for i, message in enumerate(conversation.messages):
            parts += [Part(f"<{message.role[0]}:"), Part(message.content, i), Part(">", i)]
        return [*parts, control(EOS, len(conversation.messages) - 1)]


def chats(n, seed=0, weights=WEIGHTS):
    rng = random.Random(seed)
    made = []
    for i in range(n):
        messages = []
        for _ in range(rng.randint(1, 3)):
            answer = {"role": "assistant", "content": "yes" * rng.randint(1, 4), "weight": rng.choice(weights)}
            messages += [{"role": "user", "content": f"q{i}"}, answer]
        messages[-1]["weight"] = rng.choice([weight for weight in weights if weight != 0])
        made.append({"messages": messages})
    return made


def expected_weights(row, train_on_input=False):
    """(T,) of a rendered row, byte by byte, from the row alone."""
    weights = [0.0]
    for message in row["messages"]:
        given = message.get("weight")
        own = 1.0 if given is None else float(given)
        inside = own if message["role"] == "assistant" else float(train_on_input)
        weights += [float(train_on_input)] * 3 + [inside] * (len(message["content"]) + 1)
    return [*weights, inside]


@pytest.fixture
def make(tmp_path):
    def make_(rows, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            **{"source": "jsonl", "data_files": str(file), "split": "train", "subset": None, "revision": None},
            **{"val_split": None, "val_data_files": None, "filter": None, "format": Chat(last_turn_only=False)},
            "column_map": {"messages": "messages", "system": None, "tools": None, "family": None},
            **{"template": Turns(), "train_on_input": False, "shuffle": True, "group_by_length": False},
            **{"packing": "none", "max_samples": None, "too_long": "truncate", "allow": [], "val_fraction": 0.0},
            **{"tokenizer": ByteTokenizer(), "seq_len": 128, "seed": 0, "progress": None},
            **{"streaming": False, "window_rows": 8, "cache_dir": tmp_path / "cache"},
        }
        return Dataset(**values | changes)

    return make_


# ---- from the row to the token ---------------------------------------------------------------------------


@pytest.mark.parametrize("train_on_input", [False, True])
def test_every_token_counts_as_its_message_says(make, train_on_input):
    rows = chats(60)
    data = make(rows, train_on_input=train_on_input)
    for i, row in enumerate(rows):
        np.testing.assert_allclose(data.train.sample(i).trained, expected_weights(row, train_on_input), rtol=2e-7)
    assert data.report["train"]["target_tokens"] == sum(
        np.count_nonzero(expected_weights(row, train_on_input)) for row in rows
    )
    assert data.report["train"]["weights"] == pytest.approx([0.05, 40])


def test_a_set_of_zeros_and_ones_has_masks_and_nothing_more(make, tmp_path):
    data = make(chats(20, weights=[0, 1, 1.0, None]))
    assert all(data.train.sample(i).trained.dtype == bool for i in range(20))
    batch = collate([data.train.sample(i) for i in range(20)], pad_id=0)
    assert (batch.weights, batch.total_weight) == (None, batch.n_targets * ONE)
    assert list(tmp_path.rglob("weights.bin")) == []
    assert data.report["train"]["weights"] is None


def test_weights_that_begin_late_leave_earlier_rows_as_they_are(make):
    """Rows are written a thousand at a time."""
    plain, weighted = chats(1500, weights=[1]), chats(1500, seed=1, weights=[0.5])
    before, data = make(plain), make(plain + weighted + plain[:600])
    for i in (0, 999, 1000, 1499, 1500, 2999, 3000, 3599):
        wanted = expected_weights((plain + weighted + plain)[i])
        np.testing.assert_array_equal(data.train.sample(i).trained, np.asarray(wanted, dtype=np.float32))
    assert before.fingerprint != data.fingerprint
    batch = collate([data.train.sample(i) for i in range(8)], pad_id=0)
    assert batch.weights is None, "of these rows each token counts 1"


def test_another_weight_is_another_dataset(make):
    one, other = ([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"} | more]}]
                  for more in ({"weight": 0.5}, {"weight": 0.25}))  # fmt: skip
    assert make(one).fingerprint != make(other).fingerprint


@pytest.mark.parametrize("too_long", ["truncate", "truncate_keep_eos", "truncate_left", "split"])
def test_a_cut_row_keeps_the_weights_of_what_is_left(make, too_long):
    said = [("user", "q", None), ("assistant", "a" * 20, 0.5), ("user", "r", None), ("assistant", "b" * 20, 0.25)]
    row = {"messages": [{"role": role, "content": text, "weight": weight} for role, text, weight in said]}
    weight_of = {ord("a"): 0.5, ord("b"): 0.25, ByteTokenizer().eos_id: 0.25}
    data = make([row], seq_len=40, too_long=too_long)
    for i in range(len(data.train)):
        sample = data.train.sample(i)
        counted = {token: weight for token, weight in zip(sample.tokens, sample.trained, strict=True) if weight}
        assert {token: weight_of.get(token, weight) for token, weight in counted.items()} == counted


@pytest.mark.parametrize("bad", [-1, -1e-9, 1001, 1e-9, "0.5", [1], {}])
def test_a_weight_that_cannot_be_used_is_refused_with_its_row(make, bad):
    rows = chats(5)
    rows[3]["messages"][1]["weight"] = bad
    with pytest.raises(DataError, match=r"row 3 .* the weight of message 1 must be 0, or a number from 0.000001 to"):
        make(rows)


def test_nan_is_refused_where_a_file_can_hold_it(tmp_path, make):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"messages": [{"role": "assistant", "content": "a", "weight": math.nan}]}]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"row 0 .* but is nan"):
        make([], source="parquet", data_files=str(tmp_path / "rows.parquet"))


def test_a_weight_on_a_question_is_refused_unless_it_says_nothing(make):
    question = {"role": "user", "content": "q", "weight": 0.5}
    answer = {"role": "assistant", "content": "a"}
    with pytest.raises(DataError, match=r"row 0 .* message 0, which is no assistant's, must be 0 or 1, but is 0.5"):
        make([{"messages": [question, answer]}])
    assert make([{"messages": [question | {"weight": 0}, answer]}], train_on_input=True).train.trained(0).all() == 0


@given(st.lists(st.sampled_from([0.0, 1e-6, 0.05, 0.1, 1 / 3, 1.0, 2.5, 1000.0]), max_size=50), st.randoms())
def test_sums_of_weights_are_exact_whatever_their_order(weights, rng):
    array = np.asarray([rounded(weight) for weight in weights], dtype=np.float32)
    assert Fraction(total(array), ONE) == sum(map(Fraction, array.tolist()))
    rng.shuffle(weights)
    assert total(np.asarray([rounded(weight) for weight in weights], dtype=np.float32)) == total(array)


# ---- from the token to the loss --------------------------------------------------------------------------


def fresh_model():
    return initialised(small(vocab_size=ByteTokenizer().vocab_size, max_seq_len=128), 0)


def by_hand(model, rows):
    """The mean loss of ``rows`` and its gradients: row by row in float64, each byte weighed as its row says."""
    model = model.double()
    model.zero_grad()
    nll, weight = 0.0, 0.0
    for row, tokens in rows:
        log_p = model(tokens[None])[0, :-1].log_softmax(-1)
        of_targets = torch.tensor(expected_weights(row)[1:], dtype=torch.float64)
        nll = nll - (log_p.gather(1, tokens[1:, None])[:, 0] * of_targets).sum()
        weight += of_targets.sum()
    (nll / weight).backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters()}
    model.float().zero_grad()
    return (nll / weight).item(), gradients


@pytest.mark.parametrize("packing", ["none", "greedy", "best_fit"])
def test_loss_and_gradients_are_those_of_a_mean_by_weight(make, packing):
    rows = chats(24)
    data, model = (
        make(rows, packing=packing),
        fresh_model(),
    )
    unpacked = data.train if packing == "none" else data.train.samples
    pairs = [(row, torch.from_numpy(unpacked.tokens(i).astype(np.int64))) for i, row in enumerate(rows)]
    expected, gradients = by_hand(model, pairs)
    for loss in (
        CrossEntropy(label_smoothing=0.0, z_loss=0.0),
        ChunkedCrossEntropy(label_smoothing=0.0, z_loss=0.0, chunk_tokens=50),
    ):
        loader = data.loader(batch_size=2, gradient_accumulation_steps=len(data.train), dp_rank=0, dp_size=1)
        (step,) = loader.steps(0)
        assert all(batch.weights is not None for batch in step[:3])
        weight = sum(batch.total_weight for batch in step) / ONE
        model.zero_grad()
        mean = 0.0
        for b in step:
            nll = model(b.tokens, b.targets, loss, doc_ids=b.doc_ids, n_targets=b.n_targets, weights=b.weights)
            (nll / weight).backward()
            mean += nll.item() / weight
        assert mean == pytest.approx(expected, rel=1e-6)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@settings(max_examples=25, deadline=None)
@given(**SETTINGS)
def test_both_losses_weigh_alike_and_as_float64_does(n, chunk_tokens, label_smoothing, z_loss, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(n, 8, generator=g), torch.randn(30, 8, generator=g)
    targets, weights = torch.randint(0, 30, (n,), generator=g), 3 * torch.rand(n, generator=g)
    targets[::3] = IGNORE_INDEX
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}

    def result(loss, dtype):
        h, w = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (hidden, head))
        total = loss(h, w, targets, weights.to(dtype))
        with torch.no_grad():
            again = loss(h, w, targets, weights.to(dtype))
        total.backward()
        return total.detach(), again, h.grad, w.grad

    def exact(h, w, targets, weights):
        logits, counts = h @ w.T, (targets != IGNORE_INDEX).double()
        log_p = logits.log_softmax(-1)
        nll = -log_p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
        smoothed = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(-1)
        return ((smoothed + z_loss * logits.logsumexp(-1).square()) * counts * weights).sum()

    expected = result(exact, torch.float64)
    for loss in (CrossEntropy(**options), ChunkedCrossEntropy(**options, chunk_tokens=chunk_tokens)):
        for ours, theirs in zip(result(loss, torch.float32), expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_validation_weighs_as_training_does(make):
    rows = chats(30)
    data, model = make(rows, val_fraction=0.5), fresh_model()
    held_out = [data.validation.sample_id(i) for i in range(len(data.validation))]
    pairs = [(rows[i], torch.from_numpy(data.validation.tokens(n).astype(np.int64))) for n, i in enumerate(held_out)]
    expected, _ = by_hand(model, pairs)
    given = evaluator()
    config, loss = replace(given.config, batch_size=4), CrossEntropy(label_smoothing=0.0, z_loss=0.0)
    measure = replace(
        given, config=config, loss=loss, validation=data.validation, tokenizer=data.tokenizer, on_samples=print
    )
    measured = measure(model, 0, precision_of("fp32"), OneRank(torch.device("cpu")))
    assert measured["val/loss"] == pytest.approx(expected, rel=1e-6)


# ---- streams, mixtures, what people look at --------------------------------------------------------------


def test_a_stream_and_a_mixture_hold_the_same_weights(make, tmp_path):
    rows = chats(20)
    whole = make(rows)
    expected = {i: whole.train.sample(i).trained.tolist() for i in range(20)}
    streamed = make(rows, streaming=True)
    loader = streamed.loader(batch_size=20, gradient_accumulation_steps=1, dp_rank=0, dp_size=1)
    assert {s.sample_id: s.trained.tolist() for s in loader.samples(0, 0)} == expected

    def plain(**runtime):
        template, columns = PlainTemplate(), {"instruction": "instruction", "output": "output"}
        file = tmp_path / "plain.jsonl"
        file.write_text(json.dumps({"instruction": "q", "output": "a"}) + "\n")
        del runtime["progress"], runtime["cache_dir"], runtime["tokenizer"], runtime["seed"]
        return make(rows, data_files=str(file), format=Instruct(), template=template, column_map=columns, **runtime)

    def weighted(**runtime):
        return make(rows, first_id=runtime["first_id"])

    mixed = Mixture(
        **{
            "source": "mixture",
            "sets": {"plain": plain, "weighted": weighted},
            "weights": {"plain": 1, "weighted": 20},
        },
        **{"epoch_rows": None, "shuffle": True, "group_by_length": False, "tokenizer": ByteTokenizer()},
        **{"seq_len": 128, "seed": 0, "cache_dir": tmp_path / "cache", "progress": None},
    )
    loader = mixed.loader(batch_size=21, gradient_accumulation_steps=1, dp_rank=0, dp_size=1)
    found = {s.sample_id: s for s in loader.samples(0, 0)}
    assert found.pop(0).trained.dtype == bool
    assert {i - 1: s.trained.tolist() for i, s in found.items()} == expected


def test_what_is_shown_tells_the_weights():
    tokenizer = ByteTokenizer()
    tokens = np.asarray(tokenizer.encode("abcd", bos=False, eos=True))
    sample = Sample(tokens, np.asarray([0, 0.25, 0.25, 1, 2.5], dtype=np.float32), 0)
    runs = list(shown(sample, tokenizer))
    told = [(run.text, run.note, run.trained) for run in runs]
    assert told[:3] == [("a", "", False), ("bc", "×0.25", True), ("d", "", True)]
    assert told[3][1:] == ("×2.5", True)
    page = sample_html(sample, tokenizer)
    assert "bc<sub>×0.25</sub>" in page
    assert "4 trained" in page
