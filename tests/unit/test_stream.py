"""A stream: every row once per epoch, the same steps wherever one begins and whoever deals, and a flat disk."""

import gc
import json
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.config.check import compose_config
from ftlab.data.base import TrainingData
from ftlab.data.batch import Pack
from ftlab.data.cache import clear_leased
from ftlab.data.dataset import Dataset
from ftlab.data.formats import Instruct, OasstTrees
from ftlab.data.mixture import Mixture
from ftlab.data.problems import Refusal
from ftlab.data.sources import open_source
from ftlab.data.templates import AlpacaTemplate
from ftlab.data.tokenizers import ByteTokenizer
from ftlab.data.windows import WindowReader
from ftlab.errors import ConfigError, ConfigErrors, DataError

N = 103


@pytest.fixture(scope="module")
def lines():
    """Rows of very different length; every tenth is the row before it once more."""
    rng = random.Random(0)
    made = []
    for i in range(N):
        same = i % 10 == 9
        row = {"instruction": f"question {i}", "input": "", "output": f"{i} " * rng.randint(1, 20)}
        made.append(made[-1] if same else row)
    return made


@pytest.fixture
def stream(tmp_path, lines):
    """A set over ``lines`` in windows of 16 rows."""

    def stream_(rows=lines, **changes) -> TrainingData:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
        values = {
            **{"source": "jsonl", "data_files": str(file), "split": "train", "subset": None, "revision": None},
            **{"val_split": None, "val_data_files": None, "filter": None, "format": Instruct(), "val_fraction": 0.0},
            "column_map": {"instruction": "instruction", "input": "input", "output": "output"},
            **{"template": AlpacaTemplate(), "train_on_input": False, "shuffle": True, "group_by_length": False},
            **{"packing": "none", "max_samples": None, "too_long": "truncate", "allow": []},
            **{"tokenizer": ByteTokenizer(), "seq_len": 512, "seed": 0, "progress": None},
            **{"streaming": True, "window_rows": 16, "cache_dir": tmp_path / "cache"},
        }
        return Dataset(**values | changes)

    return stream_


def loader(data, global_batch_size=6, dp_rank=0, dp_size=1, batch_size=1):
    accumulation = global_batch_size // (batch_size * dp_size)
    return data.loader(
        batch_size=batch_size, gradient_accumulation_steps=accumulation, dp_rank=dp_rank, dp_size=dp_size
    )


def ids(steps):
    return [[i for batch in step for i in batch.sample_ids] for step in steps]


def dealt(data, epoch=0, start=0, **how):
    return ids(loader(data, **how).steps(epoch, start))


# ------------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize("packing", ["none", "greedy", "best_fit"])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_row_comes_once_an_epoch_and_the_last_step_knows_that_it_is(stream, packing, grouped):
    data = stream(packing=packing, group_by_length=grouped)
    made = loader(data)
    assert made.steps_per_epoch is None
    for epoch in range(2):
        seen, n = [], 0
        for step in made.steps(epoch):
            seen, n = seen + ids([step])[0], n + 1
            assert (made.steps_per_epoch is None) == (epoch == 0 and len(seen) < N)
        assert Counter(seen) == Counter(range(N))
        assert made.steps_per_epoch == n
    assert dealt(data) != dealt(data, epoch=1)
    assert dealt(data) == dealt(stream(packing=packing, group_by_length=grouped))
    assert dealt(data) != dealt(stream(packing=packing, group_by_length=grouped, seed=1))


def test_rows_are_shuffled_within_their_window_and_steps_go_over_its_end(stream):
    data = stream()
    flat = [i for step in dealt(data) for i in step]
    assert [sorted(flat[k : k + 16]) for k in range(0, N, 16)] == [
        list(range(k, min(k + 16, N))) for k in range(0, N, 16)
    ]
    assert flat != sorted(flat)
    assert all(len(step) == 6 for step in dealt(data)[:-1])
    assert [i for step in dealt(stream(shuffle=False)) for i in step] == list(range(N))


@pytest.mark.parametrize("packing", ["none", "best_fit"])
@pytest.mark.parametrize("grouped", [False, True])
def test_going_on_from_any_step_deals_the_same_without_the_windows_before(stream, packing, grouped):
    data = stream(packing=packing, group_by_length=grouped)
    made = loader(data)
    expected = {epoch: ids(made.steps(epoch)) for epoch in range(2)}
    first_pass = loader(stream(packing=packing, group_by_length=grouped))
    places = [first_pass.place(0)]
    places += [first_pass.place(n) for n, _ in enumerate(first_pass.steps(0), 1)]
    for step, place in list(enumerate(places))[:: 1 if packing == "none" and grouped else 4]:
        again = stream(packing=packing, group_by_length=grouped)
        opened, tokenise = [], again.train._tokenise
        again.train._tokenise = lambda w, o=opened, f=tokenise: o.append(w.number) or f(w)
        resumed = loader(again)
        resumed.go_to(json.loads(json.dumps(place)))
        assert ids(resumed.steps(0, step)) == expected[0][step:]
        assert min(opened) == place["window"]
        assert ids(resumed.steps(1)) == expected[1]
        # Without what the checkpoint told, the way there is longer and the end the same.
        assert dealt(stream(packing=packing, group_by_length=grouped), start=step) == expected[0][step:]


@settings(max_examples=8, deadline=None)
@given(window_rows=st.integers(4, 60), global_batch_size=st.sampled_from([4, 8, 12]), epoch=st.integers(0, 2))
def test_any_number_of_ranks_see_together_what_one_does(tmp_path_factory, window_rows, global_batch_size, epoch):
    folder = tmp_path_factory.mktemp("ranks")
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"q{i}", "output": f"a{i}"}) + "\n" for i in range(50)))
    config = compose_config(
        [
            *("dataset=instruct", "dataset.source=jsonl", f"dataset.data_files={file}"),
            *("dataset.column_map.input=null", "dataset.streaming=true", f"dataset.window_rows={window_rows}"),
            *("dataset.val_fraction=0", "trainer.max_steps=9", "trainer.epochs=null", f"paths.cache_dir={folder}"),
            "seed=3",
        ]
    )
    from ftlab.assembly.data import read_data

    data = read_data(config, ByteTokenizer())
    alone = dealt(data, epoch, global_batch_size=global_batch_size)
    assert sorted(i for step in alone for i in step) == list(range(50))
    for n in (2, 4):
        ranks = [dealt(data, epoch, global_batch_size=global_batch_size, dp_rank=r, dp_size=n) for r in range(n)]
        together = [sorted(i for rank in step for i in rank) for step in zip(*ranks, strict=True)]
        assert together == [sorted(step) for step in alone]


def test_packs_of_a_window_are_those_of_its_rows(stream):
    rows = [row for step in loader(stream(packing="best_fit"))._blocks(0, 0) for row in step]
    packs = [source.sample(i) for source, i in rows]
    assert all(isinstance(pack, Pack) and pack.length == 512 for pack in packs)
    assert all(len({sample.sample_id // 16 for sample in pack.samples}) == 1 for pack in packs)
    assert max(len(pack.samples) for pack in packs) > 1


@pytest.mark.parametrize("n", [1, 15, 16, 17, 48])
def test_a_stream_ends_where_the_rows_do(stream, lines, n):
    assert sorted(i for step in dealt(stream(lines[:n])) for i in step) == list(range(n))
    assert sorted(i for step in dealt(stream(max_samples=n)) for i in step) == list(range(n))


def test_a_stream_without_rows_is_refused(stream):
    with pytest.raises(DataError, match="holds no rows"):
        stream([])


def test_windows_of_which_nothing_is_left_are_passed_over(stream, lines):
    far = [row | {"instruction": f"far {i}" if i < 16 or i > 90 else "near"} for i, row in enumerate(lines)]
    data = stream(far, filter="startswith(instruction, 'far')")
    assert sorted(i for step in dealt(data) for i in step) == [*range(16), *range(91, N)]


# ------------------------------------------------------------------------------------------- validation, gate


def test_rows_held_out_of_the_first_window_are_in_none(stream, lines):
    copies = [*lines[:60], *lines[:16], *lines[60:]]  # the whole first window comes again
    data = stream(copies, val_fraction=0.2)
    held_out = {json.dumps(copies[data.validation.sample_id(i)]) for i in range(len(data.validation))}
    assert 3 <= len(data.validation) <= 5
    trained = [i for step in dealt(data) for i in step]
    assert not held_out & {json.dumps(copies[i]) for i in trained}
    assert sorted(trained) == [i for i, row in enumerate(copies) if json.dumps(row) not in held_out]


def test_validation_rows_of_its_own_are_compared_with_every_window(stream, lines, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"instruction": "new", "input": "", "output": "row"}) + "\n")
    options = {"val_fraction": None, "val_data_files": str(own)}
    assert len(stream(**options).validation) == 1
    own.write_text(json.dumps(lines[40]) + "\n")
    with pytest.raises(DataError, match="same row is trained on and validated with"):
        dealt(stream(**options))
    assert len(dealt(stream(**options, allow=["in_train_and_validation"]))) == -(-N // 6)


def test_a_bad_row_far_down_ends_the_run_when_its_window_comes_with_its_place(stream, lines):
    bad = [*lines[:50], '{"instruction": "x", "output": NaN}\n', *lines[51:]]
    data = stream(bad)
    steps = loader(data).steps(0)
    assert len(next(steps)) == 6
    with pytest.raises(DataError, match=r"rows\.jsonl:51:\d+.*NaN"):
        list(steps)
    allowed = stream(bad, allow=["nan_literal"])
    assert sorted(i for step in dealt(allowed) for i in step) == [i for i in range(N) if i != 50]
    told = loader(allowed)
    told.go_to({"window": 5, "rows_before": 79, "rows_per_epoch": None})
    assert ids(told.steps(0, 14)) == dealt(allowed, start=14)


def test_report_and_findings_are_those_of_the_first_window(stream):
    data = stream(packing="best_fit")
    assert data.report["streaming"] == {"window_rows": 16}
    assert data.report["rows"] == 16
    assert [finding.rows for finding in data.findings if finding.kind == "duplicate"] == [[9]]
    assert "trained" in data.page()


def test_what_decides_the_rows_decides_the_fingerprint(stream, lines):
    same = stream().fingerprint
    assert stream().fingerprint == same
    others = [{"window_rows": 17}, {"seq_len": 300}, {"max_samples": 90}, {"rows": [*lines[:-1], lines[0]]}]
    assert len({same, *(stream(**change).fingerprint for change in others)}) == 5


def test_what_cannot_be_streamed_is_told(stream):
    with pytest.raises(ConfigError, match=r"dataset\.streaming: true, but OasstTrees puts rows together"):
        stream(format=OasstTrees(last_turn_only=False))
    with pytest.raises(ConfigErrors, match=r"trainer\.max_steps: is null, but with dataset\.streaming=true"):
        compose_config(["dataset.streaming=true"])
    with pytest.raises(ConfigErrors, match=r"dataset\.sets\.a\.streaming: true, but a mixture"):
        compose_config(["dataset=mixture", "dataset.sets.a.streaming=true"])


def test_a_mixture_of_streams_is_refused_by_itself(stream, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.sets\.a\.streaming"):
        Mixture(
            source="mixture", sets={"a": lambda **_: stream()}, weights={"a": 1.0}, epoch_rows=None, shuffle=True,
            group_by_length=False, tokenizer=ByteTokenizer(), seq_len=64, seed=0, cache_dir=tmp_path, progress=None,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- the disk


def kept(tmp_path):
    shelf = tmp_path / "cache" / "windows"
    return [path for path in shelf.iterdir() if path.is_dir() and not path.name.startswith(".")]


def test_few_windows_are_on_the_disk_and_none_after_the_last_reader(stream, tmp_path):
    data = stream(shuffle=False)
    assert len(kept(tmp_path)) == 1
    two = [loader(data).steps(0), loader(stream(shuffle=False)).steps(0)]  # as two ranks, in step
    most = 0
    for _ in zip(*two, strict=True):
        most = max(most, len(kept(tmp_path)))
    assert 2 <= most <= 4  # the first, that validation rows may be of; the one at hand, and the ones around it
    del data, two, _
    gc.collect()
    assert kept(tmp_path) == []
    assert list((tmp_path / "cache" / "windows").iterdir()) == []


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(stream, tmp_path):
    data = stream()
    [in_use] = kept(tmp_path)
    left = in_use.with_name("0" * 32)
    left.mkdir()
    left.with_name(f"{left.name}.lock").touch()
    left.with_name(f".{left.name}.half").mkdir()
    clear_leased(tmp_path / "cache", "windows")
    assert kept(tmp_path) == [in_use]
    assert sorted(path.name for path in in_use.parent.iterdir()) == [in_use.name, f"{in_use.name}.lock"]
    assert data.train is not None


# --------------------------------------------------------------------------------------- sources from a row on


def test_every_source_begins_at_any_row(tmp_path, lines, monkeypatch):
    import datasets

    table = pa.Table.from_pylist(lines)
    (tmp_path / "a.json").write_text(json.dumps(lines))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in lines))
    (tmp_path / "a.csv").write_text("q,a\n" + "".join(f'{i},"b\n{i}"\n' for i in range(N)))
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n\n" for i in range(N)))
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, streaming=False, **__: (
        datasets.Dataset.from_list(lines).to_iterable_dataset() if streaming else datasets.Dataset.from_list(lines)
    ))  # fmt: skip
    common = {"split": "train", "subset": None, "revision": "c" * 40, "cache_dir": None}
    files = {"json": "a.json", "jsonl": "a.jsonl", "csv": "a.csv", "text": "a.txt", "parquet": "a.parquet"}
    sources = [
        open_source(source=source, data_files=[str(tmp_path / name)] * 2, streaming=True, **common)
        for source, name in (*files.items(), ("documents", "a.txt"))
    ]
    sources += [open_source(source="a/set", data_files=None, streaming=on, **common) for on in (False, True)]
    sources += [open_source(source="tiny", data_files=None, **common)]

    def rows(source, start):
        return [row for chunk in source.chunks(None, Refusal(), start) for row in chunk.rows]

    for source in sources:
        every = rows(source, 0)
        assert [number for number, _ in every] == list(range(len(every)))
        for start in (0, 1, 9, 10, 37, N - 1, N, N + 55, 2 * N, 5000):
            assert rows(source, start) == every[start:], (source, start)
        reader = WindowReader(source, "", 40, None)
        for k in (1, 2, 0, 1):  # in order, and not
            assert [row for chunk in reader.window(k).chunks(None, Refusal()) for row in chunk.rows] == every[
                40 * k : 40 * k + 40
            ]


def test_large_files_are_known_without_being_read(tmp_path):
    from ftlab.data.sources import StreamedFiles

    file = tmp_path / "large.jsonl"
    file.write_bytes(b"x" * (1 << 25))
    known = StreamedFiles("jsonl", [file], None).fingerprint()
    assert StreamedFiles("jsonl", [file.rename(tmp_path / "moved.jsonl")], None).fingerprint() == known
    with (tmp_path / "moved.jsonl").open("ab") as more:
        more.write(b"x")
    assert StreamedFiles("jsonl", [tmp_path / "moved.jsonl"], None).fingerprint() != known
