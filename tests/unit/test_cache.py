"""The cache: made once, found by content, whole or not there, whoever starts or dies when."""

import json
import os
import time

import numpy as np
import pytest

from ftlab.data.cache import cache_folder, cached, key_of
from ftlab.data.dataset import Dataset
from ftlab.data.formats import Instruct
from ftlab.data.jinja_template import JinjaTemplate
from ftlab.data.sources import Chunk, file_digest
from ftlab.data.store import Store, StoreWriter
from ftlab.data.templates import AlpacaTemplate, PlainTemplate
from ftlab.data.tokenise import Recipe, tokenise
from ftlab.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from ftlab.errors import ConfigError


def options(folder, **changes):
    values = {
        **{"source": "jsonl", "data_files": str(folder / "rows.jsonl"), "split": "train", "subset": None},
        **{
            "revision": None,
            "val_split": None,
            "streaming": False,
            "window_rows": 100,
            "val_data_files": None,
            "filter": None,
            "format": Instruct(),
        },
        "column_map": {"instruction": "instruction", "input": "input", "output": "output"},
        **{"template": AlpacaTemplate(), "train_on_input": False, "shuffle": True, "group_by_length": False},
        **{"packing": "best_fit", "val_fraction": 0.1, "max_samples": None, "too_long": "truncate", "allow": []},
        **{"tokenizer": ByteTokenizer(), "seq_len": 512, "seed": 0, "progress": None},
        "cache_dir": folder / "cache",
    }
    return values | changes


@pytest.fixture
def rows(tmp_path):
    """1,000 rows in a file of the folder that is returned."""
    lines = [json.dumps({"instruction": f"q{i}", "input": "", "output": f"a{i} " * (1 + i % 9)}) for i in range(1000)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


def entries(folder, kind):
    shelf = folder / "cache" / kind
    return sorted(path.name for path in shelf.iterdir() if path.is_dir()) if shelf.is_dir() else []


def test_a_second_start_reads_nothing_and_makes_the_same(rows, monkeypatch):
    first = Dataset(**options(rows))
    monkeypatch.setattr("ftlab.data.arrays.tokenise", None)  # whoever calls it now fails
    started = time.perf_counter()
    second = Dataset(**options(rows))
    assert time.perf_counter() - started < 1
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report


@pytest.mark.parametrize(
    "change",
    [
        {"template": PlainTemplate()},
        {"train_on_input": True},
        {"seq_len": 300},
        {"too_long": "drop"},
        {"max_samples": 10},
        {"filter": "len(output) > 5"},
        {"tokenizer": SentencePieceTokenizer(path="tiny")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_decides_the_samples_makes_an_entry_of_its_own(rows, change):
    Dataset(**options(rows))
    Dataset(**options(rows, **change))
    assert len(entries(rows, "rows")) == 2


def test_what_does_not_decide_the_samples_makes_none(rows):
    Dataset(**options(rows))
    Dataset(**options(rows, seed=1, val_fraction=0.3, shuffle=False, packing="none"))
    assert len(entries(rows, "rows")) == 1


def test_an_edited_file_is_tokenised_anew_and_a_moved_one_is_not(rows):
    Dataset(**options(rows))
    moved = (rows / "rows.jsonl").rename(rows / "moved.jsonl")
    Dataset(**options(rows, data_files=str(moved)))
    assert len(entries(rows, "rows")) == 1
    moved.write_text(moved.read_text().replace("q7", "Q7", 1))
    Dataset(**options(rows, data_files=str(moved)))
    assert len(entries(rows, "rows")) == 2


def test_a_large_files_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "large.jsonl"
    file.write_bytes(b"x" * (1 << 25))
    os.utime(file, (time.time() - 60,) * 2)
    digest = file_digest(file, tmp_path / "cache")
    monkeypatch.setattr("hashlib.file_digest", None)
    assert file_digest(file, tmp_path / "cache") == digest
    monkeypatch.undo()
    file.write_bytes(b"y" * (1 << 25))
    assert file_digest(file, tmp_path / "cache") != digest


@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_a_damaged_entry_is_made_anew(rows, damage):
    wanted = Dataset(**options(rows)).fingerprint
    [entry] = (rows / "cache" / "rows" / name for name in entries(rows, "rows"))
    file = entry / "tokens.bin"
    if damage == "delete":
        file.unlink()
    else:
        os.truncate(file, 100)
    assert Dataset(**options(rows)).fingerprint == wanted


def test_a_failed_build_leaves_no_entry(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(tmp_path, "rows", key_of("x"), fail)
    assert [path for path in (tmp_path / "rows").iterdir() if path.is_dir()] == []


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLAB_CACHE_DIR", str(tmp_path / "env"))
    assert cache_folder(None) == tmp_path / "env"
    assert cache_folder(str(tmp_path / "asked")) == tmp_path / "asked"
    monkeypatch.delenv("FTLAB_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(None) == tmp_path / "xdg" / "ftlab"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder(None).is_dir()  # a home that cannot be written costs no run
    with pytest.raises(ConfigError, match=r"paths\.cache_dir: cannot write to"):
        cache_folder(str(tmp_path / "file" / "below"))


def test_what_cannot_be_tokenised_is_told_the_same_where_several_processes_would_do_it():
    recipe = Recipe(
        format=Instruct(),
        column_map={"instruction": "instruction", "input": "input", "output": "output"},
        template=JinjaTemplate(path=None),
        tokenizer=ByteTokenizer(),
        train_on_input=False,
        seq_len=64,
        too_long="split",
    )
    for n_workers in (0, 2):
        with pytest.raises(ConfigError, match="came without a chat template"):
            list(
                tokenise(
                    [Chunk("", [(0, {"instruction": "q", "input": "", "output": "a"})], 1)],
                    recipe,
                    None,
                    None,
                    n_workers,
                )
            )


def test_several_processes_tokenise_what_one_does(rows, tmp_path):
    from ftlab.data.problems import Refusal
    from ftlab.data.sources import FileSource

    recipe = Recipe(
        format=Instruct(),
        column_map={"instruction": "instruction", "input": "input", "output": "output"},
        template=AlpacaTemplate(),
        tokenizer=SentencePieceTokenizer(path="tiny"),
        train_on_input=False,
        seq_len=64,
        too_long="split",
    )
    stores = []
    for n_workers in (0, 2):
        folder = tmp_path / str(n_workers)
        folder.mkdir()
        source = FileSource("jsonl", [rows / "rows.jsonl"] * 3, None)
        with StoreWriter(folder, 640) as writer:
            list(tokenise(source.chunks(None, Refusal()), recipe, writer, Refusal(), n_workers))
            writer.finish()
        stores.append(Store(folder))
    assert stores[0].digest == stores[1].digest
    assert np.array_equal(stores[0].row_numbers, np.arange(3000))
    assert np.array_equal(stores[0].row_digests, stores[1].row_digests)


def test_every_family_of_many_is_kept(tmp_path):
    n = 2**15 + 1  # one more than 16 bits tell apart
    per_token = ("tokens", "trained", "ends", "prompt_lens", "n_trained", "sample_rows")
    per_row = ("row_numbers", "row_tokens", "row_marks", "row_end_ids", "row_digests")
    with StoreWriter(tmp_path, 640) as writer:
        arrays = dict.fromkeys(per_token, np.zeros(0, dtype=bool)) | dict.fromkeys(per_row, np.zeros(n))
        writer.add(families=[str(i) for i in range(n)], **arrays)
        writer.finish()
    store = Store(tmp_path)
    assert store.families[store.row_families[-1]] == str(n - 1)
