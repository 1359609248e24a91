"""Rows come in from every kind of file, and each kind of broken one names what is broken and where."""

import bz2
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.data.fields import mapped_columns, row_fields
from ftlab.data.filters import Filter
from ftlab.data.formats import Instruct
from ftlab.data.problems import BadRow, Refusal
from ftlab.data.sources import open_source
from ftlab.data.strict_json import json_rows
from ftlab.errors import ConfigError, DataError

COLUMNS = {"instruction": "instruction", "input": "input", "output": "output", "family": None}
ROWS = [
    {"instruction": "Add.", "input": "1, 2", "output": "03"},
    {"instruction": "Two\nlines", "input": "", "output": "NA, naïve 😀"},
]


def opened(source, data_files=None, **changes):
    options = {"split": "train", "subset": None, "revision": None, "cache_dir": None}
    return open_source(source=source, data_files=data_files, **options | changes)


def numbered(source, data_files=None, refusal=None, **column_map):
    """Number and fields of every row; a faulty one raises, or is told to ``refusal``."""
    refusal = refusal or Refusal()
    columns = mapped_columns(Instruct(), COLUMNS | column_map)
    chunks = opened(source, data_files).chunks(list(columns.values()), refusal)
    return [row for chunk in chunks for row in row_fields(chunk, Instruct(), columns, refusal)]


def outputs(*where):
    return [row["output"] for row in read(*where)]


def read(source, data_files=None, **column_map):
    return [row for _, row in numbered(source, data_files, **column_map)]


def write(path, rows):
    """The same rows in the format of the file's suffix."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("source", ["json", "jsonl", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, source):
    assert read(source, write(tmp_path / f"rows.{source}", ROWS)) == ROWS


def test_json_lines_are_read_under_the_name_json_too(tmp_path):
    assert read("json", write(tmp_path / "rows.jsonl", ROWS)) == ROWS


def test_files_come_in_the_order_given_and_globs_sorted(tmp_path):
    for name in "cab":
        write(tmp_path / f"{name}.json", [ROWS[0] | {"output": name}])
    assert outputs("json", str(tmp_path / "*.json")) == ["a", "b", "c"]
    listed = [str(tmp_path / "c.json"), str(tmp_path / "a.json")]
    assert outputs("json", listed) == ["c", "a"]


@pytest.mark.parametrize("source", ["json", "csv"])
def test_columns_are_mapped_by_name(tmp_path, source):
    file = write(tmp_path / f"rows.{source}", [{"question": "Why?", "reply": "So.", "kind": "why", "noise": "x"}])
    rows = read(source, file, instruction="question", input=None, output="reply", family="kind")
    assert rows == [{"instruction": "Why?", "output": "So.", "family": "why"}]


@pytest.mark.parametrize("source", ["json", "parquet"])
def test_a_null_input_is_an_empty_one(tmp_path, source):
    file = write(tmp_path / f"rows.{source}", [ROWS[0] | {"input": None}, ROWS[1]])
    assert [row["input"] for row in read(source, file)] == [None, ""]


@pytest.mark.parametrize("source", ["json", "csv"])
def test_an_edited_file_is_read_anew(tmp_path, source):
    file = tmp_path / f"rows.{source}"
    first = read(source, write(file, ROWS))
    second = read(source, write(file, [ROWS[1], ROWS[0]]))
    assert second == first[::-1]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS), encoding="utf-8-sig")
    assert read("json", str(file)) == ROWS


# ---- what is wrong, and where ----------------------------------------------------------------------------


def test_a_missing_file_names_the_path_tried(tmp_path):
    with pytest.raises(ConfigError, match=rf"dataset\.data_files: no file at {tmp_path}/absent\.json"):
        read("json", str(tmp_path / "absent.json"))


def test_a_glob_without_a_match_names_the_pattern(tmp_path):
    with pytest.raises(ConfigError, match=r"no file at .*/\*\.json"):
        read("json", str(tmp_path / "*.json"))


def test_a_file_format_without_files_asks_for_them():
    with pytest.raises(ConfigError, match=r"dataset\.data_files: is None"):
        read("json")


def test_files_beside_a_hub_id_are_not_silently_ignored():
    with pytest.raises(ConfigError, match=r"'rows\.json' would not be read.*\n.*dataset\.source=json"):
        read("someone/some-set", "rows.json")


def test_broken_json_names_file_line_and_column(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[\n {"instruction": "a",\n  "output" "b"}\n]')
    with pytest.raises(DataError, match=rf"{file}:3:12: broken JSON: Expecting ':' delimiter"):
        read("json", str(file))


def test_broken_json_lines_name_file_line_and_column(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0])
    file.write_text("\n".join([good] * 16 + [good.replace(":", "", 1)]) + "\n")
    with pytest.raises(DataError, match=rf"{file}:17:16: broken JSON"):
        read("jsonl", str(file))


@pytest.mark.parametrize("source", ["json", "jsonl"])
def test_a_missing_field_names_row_and_keys_found(tmp_path, source):
    rows = [dict(ROWS[0]) for _ in range(50)]
    rows[41] = {"instruction": "a", "input": "", "response": "b"}
    with pytest.raises(DataError, match=r"row 41 of .* no field 'output'; fields found: instruction, input, response"):
        read(source, write(tmp_path / f"rows.{source}", rows))


def test_rows_are_counted_through_all_files(tmp_path):
    first = write(tmp_path / "a.json", ROWS)
    second = write(tmp_path / "b.json", [ROWS[0], {"instruction": "a", "input": ""}])
    with pytest.raises(DataError, match=r"row 3 of .*b\.json has no field 'output'"):
        read("json", [first, second])


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_a_missing_column_names_the_columns_found(tmp_path, source):
    file = write(tmp_path / f"rows.{source}", [{"instruction": "a", "input": "", "response": "b"}])
    with pytest.raises(DataError, match="no field 'output'; fields found: instruction, input, response"):
        read(source, file)


def test_a_row_may_lack_what_may_be_null(tmp_path):
    file = write(tmp_path / "rows.json", [ROWS[0], {"instruction": "a", "output": "b"}])
    assert [row["input"] for row in read("json", file)] == ["1, 2", None]


@pytest.mark.parametrize(("value", "kind"), [(["a"], "list"), (4, "int"), (None, "null"), ({}, "dict")])
def test_a_json_value_of_the_wrong_type_names_row_and_type(tmp_path, value, kind):
    file = write(tmp_path / "rows.json", [ROWS[0], ROWS[1] | {"output": value}])
    with pytest.raises(DataError, match=rf"'output' \(output\) of row 1 .* must be text, but is {kind}"):
        read("json", file)


def test_a_parquet_column_of_the_wrong_type_names_the_type(tmp_path):
    file = write(tmp_path / "rows.parquet", [ROWS[0] | {"output": ["a"]}])
    with pytest.raises(DataError, match=r"'output' \(output\) of row 0 .* must be text, but is list: "):
        read("parquet", file)


def test_a_null_output_names_its_row(tmp_path):
    file = write(tmp_path / "rows.parquet", [*ROWS, ROWS[0] | {"output": None}])
    with pytest.raises(DataError, match=r"'output' \(output\) of row 2 .* but is null"):
        read("parquet", file)


def test_a_row_that_is_no_object_names_its_type(tmp_path):
    with pytest.raises(DataError, match=r"row 1 of .* is a str, not an object"):
        read("json", write(tmp_path / "rows.json", [ROWS[0], "text"]))


@pytest.mark.parametrize("source", ["json", "jsonl", "csv"])
def test_invalid_utf8_names_file_and_byte_offset(tmp_path, source):
    file = tmp_path / f"rows.{source}"
    write(file, ROWS)
    content = file.read_bytes()
    offset = content.index(b"Add.")
    file.write_bytes(content[:offset] + b"\xff" + content[offset:])
    with pytest.raises(DataError, match=rf"{file} is not UTF-8: byte 0xff at byte offset {offset}\b"):
        read(source, str(file))


def test_a_ragged_csv_names_the_line(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("instruction,input,output\na,b,c\na,b,c,d\n")
    with pytest.raises(DataError, match=r"rows\.csv cannot be read as csv: .*line 3"):
        read("csv", str(file))


def test_a_damaged_parquet_file_is_named(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as parquet"):
        read("parquet", str(file))


def test_half_a_surrogate_pair_names_its_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + '\n{"instruction": "a", "input": "", "output": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"'output' of row 1 .* half a surrogate pair"):
        read("jsonl", str(file))


def test_an_unreachable_hub_names_the_set_and_a_local_way(monkeypatch):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    with pytest.raises(ConfigError, match=r"tatsu-lab/alpaca.*Name or service not known") as caught:
        read("tatsu-lab/alpaca")
    assert caught.value.fix.startswith("dataset.source=json dataset.data_files=")


def test_reading_leaves_no_progress_bar_of_another_library(tmp_path, capfd):
    read("csv", write(tmp_path / "rows.csv", ROWS))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("field", ["instruction", "output"])
def test_instruction_and_output_have_to_be_mapped(field):
    with pytest.raises(ConfigError, match=rf"dataset\.column_map\.{field}: is null"):
        read("tiny", **{field: None})


def test_an_unknown_field_in_the_column_map_is_refused():
    with pytest.raises(ConfigError, match=r"dataset\.column_map\.answer: is no field"):
        read("tiny", answer="output")


# ---- where files are, and what they are wrapped in -------------------------------------------------------

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("source", ["json", "jsonl", "csv"])
def test_compressed_files_are_read_as_they_are(tmp_path, source, suffix):
    plain = tmp_path / f"rows.{source}"
    write(plain, ROWS)
    packed = tmp_path / f"rows.{source}{suffix}"
    if suffix == ".zst":
        with pa.CompressedOutputStream(pa.OSFile(str(packed), "wb"), "zstd") as out:
            out.write(plain.read_bytes())
    else:
        packed.write_bytes(PACK[suffix](plain.read_bytes()))
    assert read(source, str(packed)) == ROWS


def test_a_damaged_archive_is_named(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 100)[:-20])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read as jsonl"):
        read("jsonl", str(file))


def test_an_archive_with_damaged_content_is_named(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(json.dumps(ROWS[0]).encode() * 100)
    file.write_bytes(packed[:10] + b"\xff" * 20 + packed[30:])  # behind the header: zlib's own error
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz cannot be read as jsonl: Error -3"):
        read("jsonl", str(file))


def test_files_are_missed_under_the_key_that_should_name_them():
    with pytest.raises(ConfigError, match=r"dataset\.val_data_files: is None.*\n  try: dataset\.val_data_files="):
        opened("json", files_key="dataset.val_data_files")


def test_a_folder_gives_its_files_of_the_format_by_name(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl"):
        write(tmp_path / name, [ROWS[0] | {"output": name}])
    (tmp_path / "notes.txt").write_text("no rows")
    assert outputs("jsonl", str(tmp_path)) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    with pytest.raises(ConfigError, match="no parquet file in the folder"):
        read("parquet", str(tmp_path))


def test_text_is_a_row_a_line_and_documents_are_a_row_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\r\n\n  \ntwo naïve\n", encoding="utf-8-sig")
    (tmp_path / "b.txt").write_text("three")

    def texts(source):
        return [row["text"] for chunk in opened(source, str(tmp_path)).chunks(None, Refusal()) for _, row in chunk.rows]

    assert texts("text") == ["one", "two naïve", "three"]
    assert texts("documents") == ["one\r\n\n  \ntwo naïve\n", "three"]


# ---- one faulty row among others -------------------------------------------------------------------------


def test_allowed_faults_cost_their_rows_alone_and_numbers_stay(tmp_path):
    file = tmp_path / "rows.jsonl"
    good = json.dumps(ROWS[0])
    broken = [
        "{",
        '{"instruction": "a", "instruction": "b", "input": "", "output": "c"}',
        '{"instruction": NaN}',
        "[1]",
    ]
    file.write_text("\n".join([good, *broken, "", good]))
    refusal = Refusal(goes_on=True)
    assert [number for number, _ in numbered("jsonl", str(file), refusal)] == [0, 5]
    assert [(p.kind, p.row) for p in refusal.problems] == [
        *(("broken_json", 1), ("duplicate_key", 2), ("nan_literal", 3), ("wrong_type", 4))
    ]


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("duplicate_key", '{"output": {"a": 1, "a": [2]}}'),
        ("nan_literal", '{"output": NaN, "input": "]"}'),
        ("broken_json", '{"output": ' + "1" * 5000 + "}"),
    ],
)
@pytest.mark.parametrize("between", ["\n", ",\n"])
def test_a_row_that_is_unfit_costs_itself_alone(tmp_path, kind, bad, between):
    file, rows = tmp_path / "rows.json", [json.dumps(ROWS[0]), bad, json.dumps(ROWS[1])]
    file.write_text(between.join(rows) if between == "\n" else f"[{between.join(rows)}]")
    refusal = Refusal([kind])
    assert [number for number, _ in numbered("json", str(file), refusal)] == [0, 2]
    [problem] = refusal.problems
    assert (problem.kind, problem.row) == (kind, 1)
    assert f"{file}:2:" in problem.message


@pytest.mark.parametrize("bad", [b'{"output" 1}', b'{"output": "\xff"}'])
def test_what_parts_an_array_from_its_rest_is_allowed_by_its_own_name_alone(tmp_path, bad):
    file, row = tmp_path / "rows.json", json.dumps(ROWS[0]).encode()
    file.write_bytes(b"[" + b",\n".join([row, bad, row]) + b"]")
    with pytest.raises(DataError, match="the rows of the array from there on cannot be read"):
        numbered("json", str(file), Refusal(["broken_json", "invalid_utf8"]))
    refusal = Refusal(["broken_array"])
    assert [number for number, _ in numbered("json", str(file), refusal)] == [0]
    assert [(problem.kind, problem.row) for problem in refusal.problems] == [("broken_array", 1)]


def test_a_row_of_several_lines_goes_with_any_of_them(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b'instruction,input,output\nq,"one\ntw\xff\nthree",a\nq,,b\n')
    refusal = Refusal(["invalid_utf8"])
    assert [(number, row["output"]) for number, row in numbered("csv", str(file), refusal)] == [(1, "b")]
    [problem] = refusal.problems
    assert problem.row == 0
    assert "at byte offset 34" in problem.message
    file.write_bytes(b"instruction,input,output,na\xffme\nq,,b,c\n")
    with pytest.raises(DataError, match="byte 0xff at byte offset 27"):
        numbered("csv", str(file), Refusal(["invalid_utf8"]))


@pytest.mark.parametrize(("source", "left"), [("text", {0: "one", 2: "three"}), ("documents", {1: "four"})])
def test_a_text_that_is_no_utf8_is_left_out_whole(tmp_path, source, left):
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbfone\ntw\xff\nthree" if source == "documents" else b"one\n\xff\nthree"
    )
    (tmp_path / "b.txt").write_text("four" if source == "documents" else "")
    refusal = Refusal(["invalid_utf8"])
    chunks = opened(source, str(tmp_path)).chunks(None, refusal)
    assert {number: row["text"] for chunk in chunks for number, row in chunk.rows} == left
    [problem] = refusal.problems
    assert problem.row == (0 if source == "documents" else 1)
    assert f"at byte offset {9 if source == 'documents' else 4}\n" in problem.message


@pytest.mark.parametrize("source", ["json", "jsonl", "csv"])
def test_no_number_comes_twice_when_a_files_last_rows_are_unreadable(tmp_path, source):
    row = {"instruction": "q", "input": "", "output": "a"}
    for name in "ab":
        write(tmp_path / f"{name}.{source}", [row] * 3)
    broken = {"json": '{"instruction": 1,, ', "jsonl": "{\n{", "csv": "a,b,c,d\na"}[source]
    first = (tmp_path / f"a.{source}").read_text().rstrip().removesuffix("]")
    (tmp_path / f"a.{source}").write_text(first + ("," if source == "json" else "\n") + broken + "\n")
    n_broken = 1 if source == "json" else 2  # what follows a fault in an array is not read
    files, refusal = [str(tmp_path / f"{name}.{source}") for name in "ab"], Refusal(goes_on=True)
    numbers = [number for number, _ in numbered(source, files, refusal)]
    after = 3 + n_broken
    assert numbers == [0, 1, 2, after, after + 1, after + 2]
    assert [problem.row for problem in refusal.problems] == list(range(3, after))
    for start in range(after + 4):
        chunks = opened(source, files).chunks(None, Refusal(goes_on=True), start)
        read_on = [number for chunk in chunks for number, _ in chunk.rows]
        assert read_on == [number for number in numbers if number >= start]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            '{"instruction": "a",\n "input": "",\n "output": "b", "output": "c"}',
            r"rows\.json:4:17: the key 'output' stands",
        ),
        ('{"instruction": "a", "x": {"output": 1,\n "y": [NaN]}}', r"rows\.json:3:8: NaN is not JSON, in the key 'y'"),
        ('{"instruction": "a", "x": -Infinity}', r"rows\.json:2:27: -Infinity is not JSON, in the key 'x'"),
    ],
)
def test_what_json_does_not_have_names_line_column_and_key(tmp_path, row, said):
    file = tmp_path / "rows.json"
    file.write_text(f"[{json.dumps(ROWS[0])},\n{row}]")
    with pytest.raises(DataError, match=said):
        read("json", str(file))


def test_a_key_in_two_objects_of_a_row_is_none_twice(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0] | {"x": [{"a": 1}, {"a": 2}], "a": {"a": 3}}))
    assert read("jsonl", str(file)) == ROWS[:1]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ), max_size=4), max_size=30),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    block=st.integers(1, 64),
)  # fmt: skip
def test_an_array_is_read_as_a_stream_whatever_the_blocks(rows, indent, ascii_only, block):
    content = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftlab.data.strict_json._BLOCK", block)
        refusal = Refusal()
        assert [row for _, row in json_rows(io.BytesIO(content), "x.json", refusal, 0)] == rows


@settings(max_examples=60, deadline=None)
@given(data=st.data(), block=st.integers(1, 64))
def test_a_fault_in_an_array_stands_where_the_standard_decoder_finds_it(data, block):
    rows = [{"k": "é" * data.draw(st.integers(0, 9)), "n": [1, {"x": None}]} for _ in range(20)]
    text = json.dumps(rows, indent=data.draw(st.sampled_from([None, 1])), ensure_ascii=False)
    places = [i for i, char in enumerate(text) if char in ":,"]
    at = data.draw(st.sampled_from(places))
    text = text[:at] + "!" + text[at + 1 :]
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    refusal = Refusal(goes_on=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftlab.data.strict_json._BLOCK", block)
        read_rows = list(json_rows(io.BytesIO(text.encode()), "x.json", refusal, 0))
    assert [row for _, row in read_rows] == rows[: len(read_rows)]
    [problem] = refusal.problems
    assert f"x.json:{expected.value.lineno}:{expected.value.colno}:" in problem.message


# ---- the Hub ---------------------------------------------------------------------------------------------


def test_a_pinned_revision_asks_no_network_and_decides_the_fingerprint(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", None)
    prints = {opened("a/set", revision=c * 40, split=split).fingerprint() for c in "ab" for split in ("train", "test")}
    assert len(prints) == 4


def test_the_hubs_rows_are_read_at_the_commit_that_was_resolved(monkeypatch):
    import datasets

    asked = {}

    def load(repo_id, subset, *, split, revision):
        asked.update(repo_id=repo_id, subset=subset, split=split, revision=revision)
        return datasets.Dataset.from_list(ROWS * 700)

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: type("Info", (), {"sha": "c" * 40}))
    source = opened("a/set", subset="x", revision="main")
    rows = [row for chunk in source.chunks(["output", "input"], Refusal()) for row in chunk.rows]
    assert asked == {"repo_id": "a/set", "subset": "x", "split": "train", "revision": "c" * 40}
    assert [number for number, _ in rows] == list(range(1400))
    assert rows[1][1] == {"input": "", "output": ROWS[1]["output"]}
    assert source.size() == (1400, "rows")


# ---- dataset.filter --------------------------------------------------------------------------------------

ROW = {"output": "a text", "lang": "en", "score": 3, "tags": ["a", "b"], "none": None}


@pytest.mark.parametrize(
    ("expression", "keeps"),
    [
        ("len(output) > 5 and lang == 'en'", True),
        ("score < 3 or 'b' in tags", True),
        ("not lang in ['en', 'de']", False),
        ("1 < score <= 3", True),
        ("words(output) == 2 and startswith(lower(output), 'a ')", True),
        ("none is None and score % 2 == 1", True),
        ("score * 2 - 1 == 5 and -score < 0", True),
    ],
)
def test_an_expression_keeps_what_it_says(expression, keeps):
    assert Filter(expression).keeps(ROW) is keeps


@pytest.mark.parametrize(
    "expression",
    [
        *("__import__('os').system('x')", "output.upper()", "tags[0]", "(lambda: 1)()", "[t for t in tags]", "9 ** 9"),
        *("f'{output}'", "x := 1", "", "open('x')", "len(output, key=1)", "output if 1 else 2", "print", "..."),
    ],
)
def test_an_expression_can_do_nothing_but_look_at_a_row(expression):
    with pytest.raises((ConfigError, BadRow), match=r"dataset\.filter"):
        Filter(expression).keeps(ROW)


@pytest.mark.parametrize(
    ("expression", "row", "kind", "said"),
    [
        ("absent > 1", ROW, "missing_field", "has no column 'absent', .*columns found: output, lang"),
        ("none > 1", ROW, "wrong_type", "'none > 1' does not apply to it: .*NoneType"),
        ("output * 1000000000 == ''", ROW, "wrong_type", "is no number"),
        ("output == ''", ["output"], "wrong_type", "is a list, not an object with fields"),
    ],
)
def test_a_row_that_an_expression_does_not_apply_to_is_a_bad_one(expression, row, kind, said):
    with pytest.raises(BadRow, match=said) as caught:
        Filter(expression).keeps(row)
    assert caught.value.kind == kind
