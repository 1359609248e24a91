"""The gate finds every planted fault, is silent on sound rows, and stops a run by name."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ftlab.data.dataset import Dataset
from ftlab.data.formats import Chat, Instruct
from ftlab.data.jinja_template import JinjaTemplate
from ftlab.data.problems import BLOCKING, KINDS
from ftlab.data.samples import Samples
from ftlab.data.show import examples, sample_html, shown
from ftlab.data.templates import BOS, AlpacaTemplate, PlainTemplate, StanfordAlpacaTemplate, control
from ftlab.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from ftlab.errors import DataError

WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "row",
    "and",
    "learns",
    "to",
    "answer",
    "what",
    "was",
    "asked",
    "in",
    "plain",
    "words",
]


@pytest.fixture
def inspect(tmp_path):
    """The data over some lines of a file, with its findings."""

    def inspect_(lines, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_bytes(
            b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
        )
        values = {
            **{"source": "jsonl", "data_files": str(file), "split": "train", "subset": None, "revision": None},
            **{
                "val_split": None,
                "streaming": False,
                "window_rows": 100,
                "val_data_files": None,
                "filter": None,
                "format": Instruct(),
                "allow": [],
            },
            "column_map": {"instruction": "instruction", "input": "input", "output": "output"},
            **{"template": AlpacaTemplate(), "train_on_input": False, "shuffle": True, "group_by_length": False},
            **{"packing": "none", "val_fraction": 0.0, "max_samples": None, "too_long": "truncate"},
            **{"tokenizer": SentencePieceTokenizer(path="tiny"), "seq_len": 512, "seed": 0, "progress": None},
            **{"cache_dir": tmp_path / "cache", "inspecting": True},
        }
        return Dataset(**values | changes)

    return inspect_


def sound_rows(n, seed=0):
    rng = random.Random(seed)
    return [
        {
            "instruction": f"{i}: {' '.join(rng.choices(WORDS, k=8))}",
            "input": "",
            "output": " ".join(rng.choices(WORDS, k=6)),
        }
        for i in range(n)
    ]


def kinds(data):
    return {finding.kind: finding.rows for finding in data.findings}


def test_it_is_silent_on_sound_rows(inspect):
    assert inspect(sound_rows(1000), val_fraction=0.1).findings == []


ROW = {"instruction": "q", "input": "", "output": "a"}
PLANTED = {
    "broken_json": b'{"instruction": "q" "output": "a"}\n',
    "duplicate_key": b'{"instruction": "q", "input": "", "output": "a", "output": "b"}\n',
    "nan_literal": b'{"instruction": "q", "input": "", "output": "a", "score": NaN}\n',
    "invalid_utf8": b'{"instruction": "q\xff", "input": "", "output": "a"}\n',
    "missing_field": {"instruction": "q", "input": ""},
    "wrong_type": ROW | {"output": ["a"]},
    "broken_text": b'{"instruction": "q", "input": "", "output": "\\ud83d"}\n',
    "double_template": ROW | {"instruction": "### Instruction:\nq\n\n### Response:\n"},
    "eos_cut": ROW | {"output": "word " * 600},
    "too_long": ROW | {"output": "word " * 600},
    "empty_output": ROW | {"output": ""},
}


@pytest.mark.parametrize("kind", PLANTED)
def test_one_planted_row_in_a_thousand_is_found_with_its_number(inspect, kind):
    rows = sound_rows(1000)
    rows[417] = PLANTED[kind]
    found = kinds(inspect(rows))
    assert found[kind] == [417]
    assert set(found) <= {kind, "eos_cut", "too_long"}


def test_all_of_them_at_once_are_found(inspect):
    rows = sound_rows(1000)
    planted = {kind: 50 * (i + 1) for i, kind in enumerate(PLANTED)}
    for kind, row in planted.items():
        rows[row] = PLANTED[kind]
    rows[900] = rows[899]
    found = kinds(inspect(rows))
    assert {kind for kind, row in planted.items() if row not in found[kind]} == set()
    assert 900 in found["duplicate"]


def test_a_row_with_nothing_trained_is_found(inspect):
    chats = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in sound_rows(1000)
    ]
    chats[417]["messages"][1]["weight"] = 0
    columns = {"messages": "messages"}
    options = {"format": Chat(last_turn_only=False), "template": PlainTemplate(), "column_map": columns}
    assert kinds(inspect(chats, **options))["all_masked"] == [417]
    with pytest.raises(DataError, match=r"all_masked|not one token is trained \(row 417\)"):
        inspect(chats, **options, inspecting=False)
    data = inspect(chats, **options, inspecting=False, allow=["all_masked"])
    assert len(data.train) == 999  # allowed, it is left out: a batch of nothing else would have no loss
    chats[5]["messages"].append({"role": "pirate", "content": "arr"})
    assert kinds(inspect(chats, **options))["bad_conversation"] == [5]


def test_a_prompt_that_is_no_prefix_of_the_sample_is_found(inspect):
    rows = sound_rows(1000)
    rows[417]["output"] = "."  # the tiny tokenizer joins nothing after ":", so one that does is made of it
    found = kinds(inspect(rows, template=StanfordAlpacaTemplate(), tokenizer=MergingTokenizer()))
    assert found["prompt_not_a_prefix"] == [417]


class MergingTokenizer(ByteTokenizer):
    """Bytes, but ":." is one token: as vocabularies have it for ":" and what follows it."""

    vocab_size = 260
    fingerprint = "merging"
    token_bytes = np.asarray([*ByteTokenizer.token_bytes, 2], dtype=np.int32)

    def encode(self, text, *, bos, eos):
        ids, out = super().encode(text, bos=bos, eos=eos), []
        for i in ids:
            if out and (out[-1], i) == (ord(":") + 3, ord(".") + 3):
                out[-1] = 259
            else:
                out.append(i)
        return out


def test_rows_on_both_sides_are_found_and_stop_a_run(inspect, tmp_path):
    rows = sound_rows(1000)
    other = tmp_path / "validation.jsonl"
    other.write_text("\n".join(json.dumps(row) for row in [*sound_rows(20, seed=1), rows[3]]))
    options = {"val_fraction": None, "val_data_files": str(other)}
    assert kinds(inspect(rows, **options))["in_train_and_validation"] == [20]
    with pytest.raises(DataError, match=r"trained on and validated with \(row 20\)\n.*dataset.allow=\[in_train_and"):
        inspect(rows, **options, inspecting=False)


def test_answers_whose_end_is_never_trained_stop_a_run(inspect):
    class Endless(PlainTemplate):
        def parts(self, conversation):
            return super().parts(conversation)[:-1]

    with pytest.raises(DataError, match="do not teach the model to stop"):
        inspect(sound_rows(20), template=Endless(), inspecting=False)


@pytest.mark.parametrize("kind", ["broken_json", "invalid_utf8", "wrong_type", "missing_field", "duplicate_key"])
def test_a_fault_stops_a_run_unless_it_is_allowed_by_name(inspect, kind):
    rows = sound_rows(50)
    rows[41] = PLANTED[kind]
    with pytest.raises(DataError, match=r"rows\.jsonl"):
        inspect(rows, inspecting=False)
    data = inspect(rows, inspecting=False, allow=[kind])
    assert len(data.train) == 49
    assert data.report["left_out_rows"] == {kind: 1}
    assert data.train.sample_id(41) == 42  # rows keep their numbers
    assert any("row 41" in warning for warning in data.report["warnings"])


@pytest.mark.parametrize(("kind", "row"), [("missing_field", {"instruction": "q"}), ("wrong_type", ["q"])])
def test_a_row_that_a_filter_does_not_apply_to_is_a_fault_like_others(inspect, kind, row):
    rows = [*sound_rows(4), row]
    options = {"filter": "len(output) > 0"}
    assert kinds(inspect(rows, **options))[kind] == [4]
    with pytest.raises(DataError, match=r"row 4 of .*rows\.jsonl"):
        inspect(rows, **options, inspecting=False)
    data = inspect(rows, **options, inspecting=False, allow=[kind])
    assert len(data.train) == 4
    assert (data.report["rows"], data.report["filtered_rows"]) == (5, 0)


@pytest.mark.parametrize("allow", [[], ["broken_json"]])
def test_unreadable_rows_behind_the_limit_do_not_count(inspect, allow):
    rows = [*sound_rows(20), *[PLANTED["broken_json"]] * 5, *sound_rows(75, seed=1)]
    for limit in (3, 10, 20):
        data = inspect(rows, inspecting=False, allow=allow, max_samples=limit)
        assert (len(data.train), data.report["rows"]) == (limit, limit)
    data = inspect(rows, inspecting=False, allow=["broken_json"], max_samples=22)
    assert (len(data.train), data.report["left_out_rows"]) == (20, {"broken_json": 2})


def test_a_template_applied_twice_stops_a_run(inspect):
    template = AlpacaTemplate()
    rows = [r | {"instruction": template.render(r["instruction"], "")} for r in sound_rows(50)]
    with pytest.raises(DataError, match="already contains a prompt template"):
        inspect(rows, inspecting=False)
    assert len(inspect(rows, inspecting=False, allow=["double_template"]).train) == 50


def test_on_the_real_rows_only_the_repeated_ones_are_told(inspect, shared_data):
    llama2 = SentencePieceTokenizer(path=str(shared_data / "llama2_tokenizer.model"))
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    data = inspect(rows, tokenizer=llama2, seq_len=1024)
    seen, repeated = set(), []
    for i, row in enumerate(rows):
        key = (row["instruction"], row["input"], row["output"])
        if key in seen:
            repeated.append(i)
        seen.add(key)
    assert kinds(data) == {"duplicate": repeated}
    assert not any(finding.stops for finding in data.findings)


def test_bos_twice_is_told_by_tokens(inspect):
    class Twice(AlpacaTemplate):
        def parts(self, conversation):
            return [control(BOS), *super().parts(conversation)]

    assert kinds(inspect(sound_rows(3), template=Twice()))["double_bos"] == [0, 1, 2]


def test_html_that_looks_like_bos_stops_no_run_and_a_set_that_begins_with_bos_does(inspect):
    rows = sound_rows(201)
    rows[41] = ROW | {"instruction": "<s>old price</s> means what?"}
    assert len(inspect(rows, inspecting=False).train) == 201
    with pytest.raises(DataError, match="already contains a prompt template"):
        inspect([row | {"instruction": f"<s>{row['instruction']}"} for row in rows], inspecting=False)


def test_calls_of_tools_make_a_row_another_and_an_answer_not_empty(inspect):
    def chat(called, **said):
        call = {"tool_calls": [{"type": "function", "function": {"name": called, "arguments": "{}"}}]} if called else {}
        answer = {"role": "assistant", "content": "", **call, **said}
        return {"messages": [{"role": "user", "content": "do"}, answer]}

    rows = [chat("a", id=1), chat("b", id=2), chat("a", id=3), chat(None, name="bot")]
    options = {"format": Chat(last_turn_only=False), "column_map": {"messages": "messages", "tools": None}}
    template = JinjaTemplate(path=None)
    template.source = "{% for m in messages %}{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    found = kinds(inspect(rows, **options, template=template))
    assert (found["duplicate"], found["empty_output"]) == ([2], [3])
    found = kinds(inspect(rows, **options, template=PlainTemplate()))
    assert (found["bad_conversation"], found["empty_output"]) == ([0, 1, 2], [3])


def test_padding_with_eos_is_explained_and_harmless(inspect):
    class PadIsEos(ByteTokenizer):
        pad_id = 2

    data = inspect(sound_rows(3), tokenizer=PadIsEos())
    assert [str(finding) for finding in data.findings] == [KINDS["pad_is_eos"][1]]
    assert all(data.train.sample(i).trained[-1] for i in range(3))


def test_answers_that_end_with_another_token_than_eos_are_told(inspect):
    class EndsOtherwise(PlainTemplate):
        def parts(self, conversation):
            parts = super().parts(conversation)
            return [*parts[:-1], control("<pad>", len(conversation.messages) - 1)]

    found = kinds(inspect(sound_rows(3), template=EndsOtherwise(), tokenizer=ByteTokenizer()))
    assert found == {"end_is_not_eos": [0, 1, 2]}


def test_every_kind_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in text] == []
    assert set(BLOCKING) <= set(KINDS)


# ---- what people look at ---------------------------------------------------------------------------------


def test_what_is_shown_is_the_whole_text_and_what_is_green_is_trained(inspect):
    row = ROW | {"instruction": "<b>naïve</b>", "output": " two words"}
    data = inspect([*sound_rows(5), row])
    sample, tokenizer = data.train.sample(5), data.tokenizer
    runs = list(shown(sample, tokenizer))
    assert "".join(run.text for run in runs) == "<s>" + tokenizer.decode(sample.tokens.tolist()) + "</s>"
    assert "".join(run.text for run in runs if run.trained) == " two words</s>"
    page = sample_html(sample, tokenizer)
    assert "<b>" not in page
    assert "&lt;b&gt;naïve" in page


def test_examples_go_from_the_shortest_to_the_longest(inspect):
    data = inspect([ROW | {"output": "a " * (i + 1)} for i in range(9)])
    assert isinstance(data.train, Samples)
    assert [sample.sample_id for sample in examples(data.train, 3)] == [0, 4, 8]
    assert data.page().count("<pre>") == 3
