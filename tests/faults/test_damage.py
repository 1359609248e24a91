"""A checkpoint that is not as it was written is named and never used; the one before it is."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlab.errors import CheckpointError
from ftlab.storage.checkpoints import Checkpoints, Found, verify
from tests.faults.figures import Figure, trials
from tests.faults.harness import Folder, Trial, assert_same, reference
from tests.faults.test_kills import DDP, FSDP
from tests.faults.trial import Rank


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    """A run of two ranks that is complete, with checkpoints after 9 and 12 steps; a copy to be harmed."""
    return copied(tmp_path / "run")


def copied(to: Path) -> Folder:
    n_ranks, overrides = FSDP
    folder = Folder(to, *overrides, n_ranks=n_ranks)
    other, _ = reference(*overrides, n_ranks=n_ranks)
    shutil.copytree(other.run, folder.run)
    record = folder.record() | {"status": "running"}  # as if it had been killed
    (folder.run / "run.json").write_text(json.dumps(record))
    return folder


@trials(few=200, all_=1000)
def test_r10_every_flipped_bit_is_found(n: int, run: Folder) -> None:
    claim = "one bit flipped in a file of a checkpoint (any file, any bit): found before any tensor is read"
    found, run_id = run.checkpoints.complete()[-1], run.record()["id"]
    verify(found, run_id)
    paths = sorted(found.path.iterdir())
    with Figure("R10", claim) as figure:
        rng = figure.random("flips")
        for number in range(n):
            path = paths[number % len(paths)]
            byte, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
            with figure.trial(f"{path.name} byte {byte} bit {bit}"):
                flip(path, byte, bit)
                try:
                    with pytest.raises(CheckpointError) as raised:
                        verify(found, run_id)
                    assert raised.value.path == str(path)
                finally:
                    flip(path, byte, bit)
    verify(found, run_id)


def flip(path: Path, byte: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))


# ------------------------------------------------------------------------------------------------- R11

Damage = Callable[[Folder, random.Random], str]
"""Harms the newest checkpoint of a run and says what the message must name."""


def newest(folder: Folder) -> Path:
    return folder.checkpoints.complete()[-1].path


def on(name: str, harm: Callable[[Path, random.Random], None]) -> Damage:
    def damage(folder: Folder, rng: random.Random) -> str:
        harm(newest(folder) / name, rng)
        return name

    return damage


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def zero_tail(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    last = max(i for i, byte in enumerate(data) if byte)  # zeros behind it are zeros already
    start = rng.randrange(last + 1)
    path.write_bytes(data[:start] + bytes(len(data) - start))


def grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(1 + rng.randrange(100)))


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def from_other_step(name: str) -> Damage:
    def damage(folder: Folder, rng: random.Random) -> str:
        before = folder.checkpoints.complete()[-2].path
        shutil.copy(before / name, newest(folder) / name)
        return name if name != "MANIFEST.json" else "holds step 9"

    return damage


def swap_ranks(folder: Folder, rng: random.Random) -> str:
    one, other = sorted(newest(folder).glob("rows-*"))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return "rows-0000"


def add_file(folder: Folder, rng: random.Random) -> str:
    (newest(folder) / "rows-00002-of-00002.safetensors").write_bytes(b"more")
    return "rows-00002-of-00002.safetensors"


def add_folder(folder: Folder, rng: random.Random) -> str:
    (newest(folder) / "more").mkdir()
    return "more"


def of_another_run(folder: Folder, rng: random.Random) -> str:
    n_ranks, overrides = DDP
    other, _ = reference(*overrides, n_ranks=n_ranks)
    path = newest(folder)
    shutil.rmtree(path)
    shutil.copytree(other.run / "checkpoints" / path.name, path)
    return "belongs to another run"


def renamed(folder: Folder, rng: random.Random) -> str:
    first, last = folder.checkpoints.complete()
    shutil.rmtree(last.path)
    shutil.copytree(first.path, last.path)
    return "the folder was renamed"


DAMAGES: dict[str, Damage] = {
    **{
        f"{harm.__name__} {name}": on(name, harm)
        for name in ("rows-00001-of-00002.safetensors", "state.json", "rng-00000.json", "MANIFEST.json")
        for harm in (truncate, zero_tail, grow, delete)
    },
    **{
        f"{name} of another step": from_other_step(name)
        for name in ("rows-00000-of-00002.safetensors", "state.json", "rng-00001.json", "MANIFEST.json")
    },
    **{harm.__name__: harm for harm in (swap_ranks, add_file, add_folder, of_another_run, renamed)},
}


@trials(few=50, all_=100)
def test_r11_every_damage_is_named_and_the_checkpoint_before_is_chosen(
    n: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim = "files truncated, zeroed, longer, deleted, swapped between steps or ranks, added, of another run: named"
    with Figure("R11", claim) as figure:
        for number in range(n):
            what = list(DAMAGES)[number % len(DAMAGES)]
            folder = copied(tmp_path / str(number))
            caplog.clear()
            with figure.trial(what):
                named = DAMAGES[what](folder, figure.random(number))
                found = folder.checkpoints.newest_sound(folder.record()["id"])
                assert found is not None
                assert found.step == 9
                if what != "delete MANIFEST.json":  # without it, it was never finished
                    assert named in caplog.text
                    assert "step_00000012 is not used" in caplog.text
            shutil.rmtree(folder.root)


def no_tensor(rank: Rank) -> None:
    """Let any reading of tensors fail."""
    from ftlab.models import row_files

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    row_files.safe_open = refuse  # type: ignore[assignment]


@trials(few=3, all_=len(DAMAGES))
def test_r11_a_run_goes_on_from_the_one_before_to_the_same_end(n: int, tmp_path: Path) -> None:
    claim = "the same, to whole runs of 2 ranks: told, the damaged one set aside, bitwise the uninterrupted end"
    with Figure("R11r", claim) as figure:
        for what in list(DAMAGES) if n > 3 else ["delete MANIFEST.json", "zero_tail state.json", "swap_ranks"]:
            folder = copied(tmp_path / what.replace(" ", "_"))
            with figure.trial(what):
                named = DAMAGES[what](folder, figure.random(what))
                with Trial(folder.plan(), folder.n_ranks) as trial:
                    outcomes = trial.end()
                    stderr = trial.stderr()
                assert [outcome.exit_code if outcome else None for outcome in outcomes] == [0, 0], stderr
                if what != "delete MANIFEST.json":
                    assert named in stderr
                assert "going on from step 9" in stderr
                assert_same(folder, outcomes)  # type: ignore[arg-type]


def test_with_nothing_sound_left_no_tensor_is_read_and_nothing_is_changed(tmp_path: Path) -> None:
    folder = copied(tmp_path / "run")
    for found in folder.checkpoints.complete():
        flip(found.path / "rows-00001-of-00002.safetensors", 5000, 3)
    before = {path: path.read_bytes() for path in folder.run.rglob("*.json*")}
    with Trial(folder.plan(before=no_tensor), folder.n_ranks) as trial:
        outcomes = trial.end()
        stderr = trial.stderr()
    assert [outcome.exit_code if outcome else None for outcome in outcomes] == [2, 2], stderr
    assert "holds nothing sound" in stderr
    assert stderr.count("is damaged") == 2
    assert "a tensor was read" not in stderr
    assert "Traceback" not in stderr, stderr
    assert before == {path: path.read_bytes() for path in folder.run.rglob("*.json*")}


def test_a_file_that_the_disk_cannot_read_is_named_and_the_checkpoint_before_is_chosen(
    run: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ftlab.storage import manifest

    real = manifest.file_sha256

    def broken(path: Path) -> str:
        if path.parent.name == "step_00000012" and path.name == "state.json":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(manifest, "file_sha256", broken)
    found = Checkpoints(run.run / "checkpoints").newest_sound(run.record()["id"])
    assert found == Found(9, run.run / "checkpoints" / "step_00000009")
    assert "state.json cannot be read: Input/output error" in caplog.text


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"metrics": 1e999}', '{"a": NaN}', '{"a": ' * 900 + "1" + "}" * 900, "\ud800", "null", ""]
)
def test_no_manifest_makes_the_reader_stumble(run: Folder, text: str) -> None:
    found = run.checkpoints.complete()[-1]
    (found.path / "MANIFEST.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        verify(found, None)
