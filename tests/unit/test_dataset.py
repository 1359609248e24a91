"""Rows become samples with exactly the prompt masked; what is cut, dropped or held out is told."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab import IGNORE_INDEX
from ftlab.data.batch import collate
from ftlab.data.dataset import AlpacaDataset, Dataset
from ftlab.data.formats import Chat, Instruct, Message, Text
from ftlab.data.loader import BatchLoader
from ftlab.data.mixture import Mixture
from ftlab.data.split import draw_validation
from ftlab.data.templates import BOS, EOS, START, AlpacaTemplate, Part, StanfordAlpacaTemplate, control
from ftlab.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from ftlab.errors import ConfigError, DataError


class PlainTemplate:
    """A prompt short enough to count its bytes."""

    def parts(self, conversation):
        question, answer = conversation.messages
        prompt = f"{question.content}{question.context}:"
        return [control(BOS), Part(prompt, 0), Part(answer.content, 1), control(EOS, 1)]


class Turns:
    """Messages one after the other, each with an EOS."""

    def parts(self, conversation):
        said = [(Part(message.content, i), control(EOS, i)) for i, message in enumerate(conversation.messages)]
        return [control(START), *(part for parts in said for part in parts)]


class WithoutBos(ByteTokenizer):
    bos_id = None


@pytest.fixture
def make(tmp_path):
    """A dataset over the given rows; bytes as tokens, so that lengths can be counted by hand."""

    def make_(rows, cls=Dataset, **changes):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps([{"input": ""} | row for row in rows]))
        values = {
            "source": "json",
            "data_files": str(file),
            **{
                "split": "train",
                "subset": None,
                "revision": None,
                "val_split": None,
                "streaming": False,
                "window_rows": 100,
                "val_data_files": None,
            },
            **{"filter": None, "format": Instruct(), "group_by_length": False, "packing": "none", "allow": []},
            "cache_dir": tmp_path / "cache",
            "column_map": {"instruction": "instruction", "input": "input", "output": "output", "family": None},
            "template": PlainTemplate(),
            "train_on_input": False,
            "shuffle": True,
            "val_fraction": 0.0,
            "max_samples": None,
            "too_long": "truncate",
            "tokenizer": ByteTokenizer(),
            "seq_len": 64,
            "seed": 0,
            "progress": None,
        }
        return cls(**values | changes)

    return make_


@pytest.fixture(scope="module")
def llama2(shared_data):
    return SentencePieceTokenizer(path=str(shared_data / "llama2_tokenizer.model"))


@pytest.fixture
def alpaca(make, llama2, shared_data):
    """The 999 real rows with the real tokenizer, nothing cut."""

    def alpaca_(**changes):
        values = {
            "data_files": str(shared_data / "alpaca_en_demo.json"),
            "template": AlpacaTemplate(),
            "tokenizer": llama2,
            "seq_len": 1024,
        }
        return make([], **values | changes)

    return alpaca_


@pytest.fixture(scope="module")
def alpaca_rows(shared_data):
    return json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))


def rows(n, first=0):
    return [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(first, first + n)]


def learned_text(dataset, index):
    """What the targets of one sample spell."""
    targets = collate([dataset.train.sample(index)], pad_id=0).targets[0].tolist()
    return ByteTokenizer().decode([t for t in targets if t != IGNORE_INDEX])


# ---- tokens and masks ------------------------------------------------------------------------------------


def test_only_the_answer_and_its_eos_are_trained(make):
    dataset = make([{"instruction": "2+2", "output": "4"}])
    assert dataset.train.tokens(0).tolist() == ByteTokenizer().encode("2+2:4", bos=True, eos=True)
    assert dataset.train.sample(0).trained.tolist() == [False] * 5 + [True, True]
    assert learned_text(dataset, 0) == "4"


def test_train_on_input_trains_every_token_that_has_one_before_it(make):
    dataset = make([{"instruction": "2+2", "output": "4"}], train_on_input=True)
    assert learned_text(dataset, 0) == "2+2:4"
    assert dataset.report["train"]["target_tokens"] == 6  # five bytes and EOS


def test_on_all_real_rows_the_mask_covers_exactly_the_prompt(alpaca, alpaca_rows, llama2):
    dataset = alpaca()
    template = AlpacaTemplate()
    assert len(dataset.train) == len(alpaca_rows) == 999
    for i, row in enumerate(alpaca_rows):
        sample = dataset.train.sample(i)
        prompt = template.render(row["instruction"], row["input"])
        # By characters, not by tokenising the prompt again: decode what is masked, and what is not.
        n_masked = int((~sample.trained).sum())
        assert not sample.trained[:n_masked].any()
        assert llama2.decode(sample.tokens[:n_masked]) == prompt
        assert llama2.decode(sample.tokens) == prompt + row["output"]
    assert dataset.report["train"]["merged_boundary_rows"] == 0


def test_on_all_real_rows_the_tokens_are_those_of_the_whole_text_with_bos_and_eos(alpaca, alpaca_rows, llama2):
    dataset = alpaca()
    template = AlpacaTemplate()
    for i, row in enumerate(alpaca_rows):
        text = template.render(row["instruction"], row["input"]) + row["output"]
        assert dataset.train.tokens(i).tolist() == [1, *llama2.encode(text, bos=False, eos=False), 2]


def test_a_token_that_merges_prompt_and_answer_is_trained_and_counted(alpaca, alpaca_rows, llama2):
    dataset = alpaca(template=StanfordAlpacaTemplate())
    assert dataset.report["train"]["merged_boundary_rows"] == 57
    template = StanfordAlpacaTemplate()
    for i, row in enumerate(alpaca_rows):
        prompt = template.render(row["instruction"], row["input"])
        tokens, prompt_len = dataset.train.tokens(i), dataset.train.prompt_len(i)
        assert prompt.startswith(llama2.decode(tokens[:prompt_len]))  # no character of the answer is masked
        assert len(llama2.decode(tokens[: prompt_len + 1])) > len(prompt) or not row["output"]


def test_an_empty_output_is_kept_and_counted(make):
    dataset = make([{"instruction": "q", "output": ""}, *rows(1)])
    assert len(dataset.train) == 2
    assert dataset.report["train"]["empty_output_rows"] == 1
    assert dataset.train.sample(0).trained.tolist() == [False, False, False, True]  # BOS q : EOS
    assert dataset.report["warnings"] == ["1 of 2 train rows: an empty answer: it teaches to say nothing (row 0)"]


def test_evaluation_gets_prompt_answer_and_family(make):
    row = {"instruction": "q", "input": " in", "output": " an answer", "kind": "easy"}
    columns = {"instruction": "instruction", "input": "input", "output": "output", "family": "kind"}
    dataset = make([row], column_map=columns).train
    assert ByteTokenizer().decode(dataset.prompt_tokens(0)) == "q in:"
    assert (dataset.answer(0), dataset.family(0), dataset.sample_id(0)) == (" an answer", "easy", 0)


def test_an_answer_keeps_its_first_space_with_sentencepiece_too(make):
    tiny = SentencePieceTokenizer(path="tiny")
    dataset = make([{"instruction": "q", "output": " two words"}], tokenizer=tiny, template=AlpacaTemplate())
    assert dataset.train.answer(0) == " two words"


def test_render_prompt_is_what_the_samples_were_made_with(make):
    dataset = make(rows(1), template=AlpacaTemplate(), seq_len=256)
    assert dataset.train.prompt_tokens(0) == dataset.encoder().prompt([Message("user", "q0")])


def test_a_prompt_has_a_token_where_no_bos_begins_the_row(make):
    plain = {"format": Text(), "template": Turns(), "column_map": {"text": "text"}, "tokenizer": WithoutBos()}
    data = make([{"text": "abc"}], **plain, train_on_input=True).train
    assert (ByteTokenizer().decode(data.prompt_tokens(0)), data.answer(0)) == ("a", "bc")
    cut = make([LONG], seq_len=6, too_long="truncate_left", tokenizer=WithoutBos()).train
    assert (ByteTokenizer().decode(cut.prompt_tokens(0)), cut.answer(0)) == ("5", "6789")


def test_a_reference_ends_where_its_answer_does(make):
    said = [("user", "hi"), ("assistant", "yo"), ("user", "thanks")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    columns = {"messages": "messages"}
    data = make([row], format=Chat(last_turn_only=False), template=Turns(), column_map=columns).train
    assert (ByteTokenizer().decode(data.prompt_tokens(0)), data.answer(0)) == ("hi", "yo")


# ---- too long --------------------------------------------------------------------------------------------

LONG = {"instruction": "abc", "output": "0123456789"}  # BOS abc: 0123456789 EOS: 16 tokens


def test_truncate_cuts_the_eos_too(make):
    dataset = make([LONG], seq_len=10)
    assert dataset.train.tokens(0).tolist() == ByteTokenizer().encode("abc:01234", bos=True, eos=False)
    assert dataset.report["train"]["too_long_rows"] == 1
    assert dataset.report["warnings"] == [
        "1 of 1 train rows longer than seq_len=10 tokens (longest 16): cut, their EOS too"
    ]


def test_truncate_keep_eos_puts_it_back(make):
    dataset = make([LONG], seq_len=10, too_long="truncate_keep_eos")
    assert dataset.train.tokens(0).tolist() == ByteTokenizer().encode("abc:0123", bos=True, eos=True)


def test_drop_leaves_the_row_out_and_keeps_row_numbers(make):
    dataset = make([rows(1)[0], LONG, rows(2)[1]], seq_len=10, too_long="drop")
    assert [dataset.train.sample_id(i) for i in range(len(dataset.train))] == [0, 2]
    assert dataset.report["train"]["dropped_too_long_rows"] == 1


def test_error_names_count_longest_row_and_a_sufficient_seq_len(make):
    with pytest.raises(DataError, match=r"1 of 3 train rows .* seq_len=10 tokens, the longest 16 \(row 1\)") as caught:
        make([rows(1)[0], LONG, rows(2)[1]], seq_len=10, too_long="error")
    assert "try: seq_len=16" in str(caught.value)


@pytest.mark.parametrize("too_long", ["truncate", "truncate_keep_eos", "drop", "error"])
def test_a_row_that_just_fits_is_left_alone(make, too_long):
    dataset = make([LONG], seq_len=16, too_long=too_long)
    assert len(dataset.train.tokens(0)) == 16
    assert dataset.report["train"]["too_long_rows"] == 0


@pytest.mark.parametrize(("too_long", "seq_len"), [("truncate", 5), ("truncate_keep_eos", 6)])
def test_a_row_whose_answer_is_cut_away_wholly_is_dropped(make, too_long, seq_len):
    dataset = make([LONG, {"instruction": "", "output": "a"}], seq_len=seq_len, too_long=too_long)
    assert [dataset.train.sample_id(i) for i in range(len(dataset.train))] == [1]
    assert dataset.report["train"]["dropped_without_answer_rows"] == 1
    assert make([LONG], seq_len=seq_len, too_long=too_long, train_on_input=True).train.trained(0)[1:].all()


def test_with_no_row_left_the_counts_per_filter_are_told(make):
    with pytest.raises(DataError, match=r"none of 3 train rows is left: 0 dropped .* seq_len=4, 3 dropped because"):
        make([LONG] * 3, seq_len=4)
    with pytest.raises(DataError, match=r"none of 3 train rows is left: 3 dropped as longer than seq_len=4, 0 "):
        make([LONG] * 3, seq_len=4, too_long="drop")


# ---- split -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    digests=st.lists(st.integers(0, 12), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_equal_rows_are_never_on_both_sides(digests, fraction, seed):
    digests = np.array(digests, dtype=np.uint64)
    try:
        held_out = draw_validation(digests, fraction, seed)
    except ConfigError:  # nothing left to train on
        return
    assert not set(digests[held_out]) & set(digests[~held_out])
    assert held_out.any()
    assert not held_out.all()


def test_the_split_has_the_share_asked_for_and_follows_the_seed(make):
    splits = [make(rows(100), val_fraction=0.1, seed=seed) for seed in (0, 0, 1)]
    held_out = [[d.validation.sample_id(i) for i in range(len(d.validation))] for d in splits]
    assert len(held_out[0]) == 10
    assert held_out[0] == held_out[1] != held_out[2]
    trained = [splits[0].train.sample_id(i) for i in range(90)]
    assert sorted(trained + held_out[0]) == list(range(100))


def test_a_fraction_of_zero_holds_nothing_out(make):
    assert make(rows(3)).validation is None


def test_max_samples_takes_the_first_rows_before_the_split(make):
    dataset = make(rows(100), max_samples=10, val_fraction=0.2)
    ids = [part.sample_id(i) for part in (dataset.train, dataset.validation) for i in range(len(part))]
    assert sorted(ids) == list(range(10))
    assert len(dataset.validation) == 2


def test_a_split_that_leaves_nothing_to_train_on_is_refused(make):
    with pytest.raises(ConfigError, match=r"dataset\.val_fraction: 0\.5 leaves nothing to train on: 2 rows, 1 of them"):
        make([LONG, LONG], val_fraction=0.5)


def test_null_needs_a_source_with_validation_rows(make):
    with pytest.raises(ConfigError, match=r"dataset\.val_fraction: is null, but dataset\.source=json brings no"):
        make(rows(3), val_fraction=None)


def test_a_split_of_the_hubs_is_none_of_files(make):
    with pytest.raises(
        ConfigError, match=r"dataset\.val_fraction: is null.*val_split=test is for a set on the Hub"
    ) as e:
        make(rows(3), val_fraction=None, val_split="test")
    assert e.value.fix == "dataset.val_fraction=0.05, or dataset.val_data_files=/path/to/rows.json"


def test_a_field_that_no_row_has_names_its_key(make, tmp_path):
    file = tmp_path / "no_input.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(3)))
    options = {"source": "jsonl", "data_files": str(file)}
    with pytest.raises(ConfigError, match=r"column_map\.input: none of the 3 rows .* 'input'; .* instruction, output"):
        make([], **options)
    file.write_text(file.read_text() + json.dumps(rows(1)[0] | {"input": "x"}))
    assert [len(make([], **options).train.prompt_tokens(i)) for i in (0, 3)] == [4, 5]  # BOS, q0, (x,) colon


def test_the_tiny_set_brings_its_own_validation_rows(make):
    columns = {"instruction": "instruction", "input": "input", "output": "output", "family": "family"}
    dataset = make([], source="tiny", data_files=None, val_fraction=None, seq_len=512, column_map=columns)
    assert len(dataset.validation) == 240
    assert dataset.validation.family(0) is not None


# ---- report and values -----------------------------------------------------------------------------------


def test_the_fingerprint_follows_tokens_masks_and_split(make):
    base = make(rows(20), val_fraction=0.2).fingerprint
    assert make(rows(20), val_fraction=0.2).fingerprint == base
    changed = [
        make(rows(21), val_fraction=0.2),
        make(rows(20), val_fraction=0.2, train_on_input=True),
        make(rows(20), val_fraction=0.2, seed=1),
        make(rows(20), val_fraction=0.2, template=AlpacaTemplate(), seq_len=512),
        make(rows(20), val_fraction=0.2, seq_len=5),
    ]
    assert base not in {dataset.fingerprint for dataset in changed}


def test_the_report_counts_what_the_data_holds_and_is_plain_json(make):
    report = make([LONG, LONG, *rows(2)], max_samples=3).report
    json.dumps(report)
    assert (report["rows"], report["duplicate_rows"]) == (3, 1)
    train = report["train"]
    assert (train["rows"], train["samples"], train["tokens"], train["max_row_tokens"]) == (3, 3, 16 + 16 + 7, 16)
    assert train["target_tokens"] == 11 + 11 + 3
    assert sum(train["row_tokens_histogram"]["counts"]) == 3


def test_the_progress_bar_reaches_its_total(make):
    seen = []

    @contextmanager
    def progress(name, total):
        seen.append((name, total))
        yield lambda n: seen.append(n)

    dataset = make([], source="tiny", data_files=None, val_fraction=None, seq_len=512, progress=progress)
    assert seen[0] == ("tokenising train, rows", 2840)
    assert sum(n for n in seen if isinstance(n, int)) == len(dataset.train) + len(dataset.validation)


def test_use_clean_is_told_in_the_report(make):
    assert make(rows(2), cls=AlpacaDataset, use_clean=True).report["use_clean"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [("too_long", "cut"), ("val_fraction", 1.0), ("val_fraction", -0.1), ("max_samples", 0), ("packing", "x")],
)
def test_a_value_out_of_range_names_its_key(make, key, value):
    with pytest.raises(ConfigError) as caught:
        make(rows(2), **{key: value})
    assert caught.value.key == f"dataset.{key}"
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(("name", "content"), [("a.json", ""), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "a,b\n")])
def test_files_without_rows_are_refused(make, tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DataError, match=r"a\.\w+ holds no rows"):
        make([], source=file.suffix[1:], data_files=str(file))


def test_a_filter_that_keeps_nothing_tells_how_many_it_left_out(make):
    with pytest.raises(DataError, match=r"none of 3 rows is left: 3 by dataset\.filter left out"):
        make(rows(3), filter="output == 'absent'")


def test_a_filter_keeps_rows_under_their_numbers(make):
    dataset = make(rows(10), filter="output in ['a3', 'a7']")
    assert [dataset.train.sample_id(i) for i in range(len(dataset.train))] == [3, 7]
    assert (dataset.report["rows"], dataset.report["filtered_rows"]) == (10, 8)


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_packs_hold_the_same_samples(make, packing):
    plain, packed = make(rows(50)), make(rows(50), packing=packing)
    documents = [sample for i in range(len(packed.train)) for sample in packed.train.sample(i).samples]
    assert sorted(s.sample_id for s in documents) == list(range(50))
    assert all(s.tokens.tolist() == plain.train.tokens(s.sample_id).tolist() for s in documents)
    assert packed.train.n_targets() == plain.train.n_targets()
    assert packed.report["packing"]["packs"] == len(packed.train) < 50
    assert packed.fingerprint != plain.fingerprint


# ---- mixtures --------------------------------------------------------------------------------------------


@pytest.fixture
def mix(make, tmp_path):
    """A mixture of two sets, of 10 and 30 rows; ``shared`` of them are in both."""

    def mix_(weights, *, shared=0, epoch_rows=None, inspecting=False, **changes):
        def set_of(n, first):
            def make_set(**runtime):
                given = {key: runtime[key] for key in ("tokenizer", "seq_len", "first_id", "inspecting")}
                return make(rows(n, first), **given | changes)

            return make_set

        values = {"source": "mixture", "sets": {"a": set_of(10, 0), "b": set_of(30, 10 - shared)}, "shuffle": True}
        values |= {"group_by_length": False, "tokenizer": ByteTokenizer(), "seq_len": 64, "seed": 0}
        values |= {"epoch_rows": epoch_rows, "inspecting": inspecting}
        return Mixture(**values, weights=weights, cache_dir=tmp_path / "cache", progress=None)

    return mix_


def test_a_mixture_takes_its_shares_and_tells_them(mix):
    data = mix({"a": 3, "b": 1})
    sets = data.report["sets"]
    assert [sets[name]["rows_per_epoch"] for name in "ab"] == [30, 10]
    assert [sets[name]["passes_per_epoch"] for name in "ab"] == [3.0, pytest.approx(1 / 3, abs=1e-6)]
    loader = BatchLoader(
        data.train, batch_size=4, gradient_accumulation_steps=1, shuffle=True, seed=0, dp_rank=0, dp_size=1, pad_id=0
    )
    seen = [[i for step in loader.steps(epoch) for batch in step for i in batch.sample_ids] for epoch in range(3)]
    assert all(sum(i < 10 for i in epoch) == 30 for epoch in seen)
    of_b = [i for epoch in seen for i in epoch if i >= 10]
    assert sorted(of_b) == list(range(10, 40))  # three epochs of ten: each once
    assert len(set(map(tuple, seen))) == 3
    later = [[batch.sample_ids for batch in step] for step in loader.steps(2, start_step=4)]
    assert later == [[batch.sample_ids for batch in step] for step in loader.steps(2)][4:]


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_packs_of_a_mixture_hold_rows_of_one_set_and_come_in_its_shares(mix, packing):
    data = mix({"a": 3, "b": 1}, packing=packing)
    n_packs = [len(rows) for rows in data.train.sets]
    sets = data.report["sets"]
    assert sum(sets[name]["rows_per_epoch"] for name in "ab") == sum(n_packs)
    assert sets["a"]["share"] == pytest.approx(0.75, abs=0.5 / sum(n_packs) + 1e-6)
    loader = data.loader(batch_size=1, gradient_accumulation_steps=1, dp_rank=0, dp_size=1)
    packs = [batch.sample_ids for step in loader.steps(0) for batch in step]
    assert all(max(ids) < 10 or min(ids) >= 10 for ids in packs)
    assert sum(max(ids) < 10 for ids in packs) == sets["a"]["rows_per_epoch"]
    again = mix({"a": 3, "b": 1}, packing=packing)
    assert again.fingerprint == data.fingerprint
    loader = again.loader(batch_size=1, gradient_accumulation_steps=1, dp_rank=0, dp_size=1)
    assert [batch.sample_ids for step in loader.steps(0, start_step=2) for batch in step] == packs[2:]


def test_a_mixtures_validation_rows_are_those_of_all_sets(mix):
    data = mix({"a": 1, "b": 1}, val_fraction=0.1)
    assert len(data.validation) == 1 + 3
    assert data.validation.sample_id(0) < 10 <= data.validation.sample_id(1)
    assert data.validation.answer(1).startswith("a")


def test_a_mixture_that_trains_on_its_own_validation_rows_is_stopped(mix):
    options = {"shared": 10, "val_fraction": 0.3}
    found = [str(finding) for finding in mix({"a": 1, "b": 1}, **options, inspecting=True).findings]
    assert any("of 3 a's validation (and b's train) rows: the same row is trained on and" in line for line in found)
    with pytest.raises(
        DataError, match=r"^dataset\.sets\.a: .*validated with .*\n.*dataset\.sets\.a\.allow=\[in_train"
    ):
        mix({"a": 1, "b": 1}, **options)
    allowed = mix({"a": 1, "b": 1}, **options, allow=["in_train_and_validation"])
    assert any("a's validation (and b's train)" in warning for warning in allowed.report["warnings"])


def test_a_set_that_an_epoch_has_no_row_of_is_refused(mix):
    with pytest.raises(
        ConfigError, match=r"dataset\.weights\.b: 0\.01 of 1\.01 is no row of an epoch's 20: b"
    ) as caught:
        mix({"a": 1, "b": 0.01}, epoch_rows=20)
    assert caught.value.fix.startswith("dataset.epoch_rows=101")
    assert mix({"a": 1, "b": 0.01}, epoch_rows=101).train.counts == [100, 1]


def test_what_is_wrong_with_a_set_is_told_with_its_keys_in_the_mixture(mix):
    with pytest.raises(
        ConfigError, match=r"^dataset\.sets\.a\.val_fraction: .*\n  try: dataset\.sets\.a\.val_fraction=0"
    ):
        mix({"a": 1, "b": 1}, val_fraction=1.5)
    with pytest.raises(DataError, match=r"^dataset\.sets\.a\.too_long: .*\n.*, or dataset\.sets\.a\.too_long=truncate"):
        mix({"a": 1, "b": 1}, too_long="error", seq_len=4)

    class Useless(PlainTemplate):
        def bound_to(self, tokenizer):
            raise ConfigError("dataset.template", "is of no use", "dataset=chat")

    with pytest.raises(ConfigError, match=r"^dataset\.sets\.a\.template: .*\n  try: dataset@dataset\.sets\.a=chat$"):
        mix({"a": 1, "b": 1}, template=Useless())


@pytest.mark.parametrize("weights", [{"a": 1}, {"a": 1, "b": 0}, {"a": 1, "b": -1}, {"a": 1, "b": 1, "c": 1}])
def test_a_mixtures_weights_are_checked(mix, weights):
    with pytest.raises(ConfigError, match=r"dataset\.weights"):
        mix(weights)
