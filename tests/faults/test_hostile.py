"""A checkpoint from a stranger runs no code, reaches no file outside, and never hangs the reader.

The stranger knows the format: where nothing else is said, the manifest agrees with what was planted.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ftlab.errors import CheckpointError
from ftlab.models.row_files import open_rows
from ftlab.storage.checkpoints import verify
from ftlab.storage.disk import file_sha256
from ftlab.storage.manifest import KEY_VARIABLE, FileEntry, Manifest
from ftlab.training.opened import open_checkpoint
from tests.faults.harness import Folder, Trial, assert_same
from tests.faults.test_damage import copied, newest

ROWS = "rows-00001-of-00002.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    """A run with two checkpoints, to plant something in."""
    return copied(tmp_path / "run")


class Payload:
    """Makes the canary file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that is made when planted code runs, and must not be there in the end."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists(), "the payload does nothing"
    path.unlink()
    yield path
    assert not path.exists(), "planted code was run"


def seal(checkpoint: Path, names: list[str] | None = None) -> None:
    """Write the manifest that fits what is there now."""
    before = json.loads((checkpoint / "MANIFEST.json").read_bytes())
    (checkpoint / "MANIFEST.json").unlink()
    for name in ("digest", "signature", "format"):
        before.pop(name)
    listed = names if names is not None else os.listdir(checkpoint)
    sizes = {name: FileEntry((checkpoint / name).stat().st_size, file_sha256(checkpoint / name)) for name in listed}
    Manifest(**before | {"files": sizes}).write(checkpoint)


def refused(folder: Folder, exit_code: int = 2) -> str:
    """What the run says that may only begin with its newest checkpoint, and does not."""
    plan = folder.plan()
    plan.config["resume"]["at"] = 12
    with Trial(plan, folder.n_ranks) as trial:
        outcomes, stderr = trial.end(30), trial.stderr()
        codes = [
            outcome.exit_code if outcome else process.exitcode
            for outcome, process in zip(outcomes, trial.processes, strict=True)
        ]
    assert codes == [exit_code] * 2, stderr
    assert "Traceback" not in stderr, stderr
    assert "resumed" not in folder.record() or folder.record()["resumed"] == []
    return stderr


# S1, S2, S3: pickles


def test_s1_a_planted_metadata_file_is_refused(run: Folder, canary: Path) -> None:
    (newest(run) / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    assert ".metadata does not belong here" in refused(run)
    seal(newest(run))
    assert "names the file '.metadata', which is no plain file name" in refused(run)


@pytest.mark.parametrize("name", ["__0_0.distcp", "state.pt", "optimizer.bin", "rng.pkl", "train_state_00000.pth"])
def test_s2_planted_pickles_that_the_manifest_names_are_left_alone(run: Folder, canary: Path, name: str) -> None:
    torch.save({"step": Payload(canary)}, newest(run) / name)
    seal(newest(run), [entry for entry in os.listdir(newest(run)) if entry not in ("MANIFEST.json", name)])
    with pytest.raises(CheckpointError, match="does not belong here"):
        verify(run.checkpoints.complete()[-1], None)
    seal(newest(run), [entry for entry in os.listdir(newest(run)) if entry != "MANIFEST.json"])
    if name.startswith("__"):  # not a name of ours
        with pytest.raises(CheckpointError, match="no plain file name"):
            verify(run.checkpoints.complete()[-1], None)
        return
    verify(run.checkpoints.complete()[-1], None)
    assert len(open_checkpoint(newest(run)).stored) > 3


@pytest.mark.parametrize("name", ["state.json", "rng-00000.json", ROWS])
@pytest.mark.parametrize("save", [lambda obj, path: path.write_bytes(pickle.dumps(obj)), torch.save])
def test_s3_a_pickle_in_place_of_a_file_is_named(
    run: Folder, canary: Path, name: str, save: Callable[[object, Path], object]
) -> None:
    save(Payload(canary), newest(run) / name)
    seal(newest(run), [entry for entry in os.listdir(newest(run)) if entry != "MANIFEST.json"])
    verify(run.checkpoints.complete()[-1], None)  # it is as the stranger wrote it
    assert name in refused(run)


def test_s3_initial_weights_as_pickles_run_no_code(tmp_path: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        folder = Folder(tmp_path / name)
        weights = tmp_path / f"weights {name}"
        weights.mkdir()
        (weights / "config.json").write_text("{}")
        (weights / "params.json").write_text("{}")
        torch.save({"tok_embeddings.weight": Payload(canary)}, weights / name)
        plan = folder.plan()
        plan.config["model"]["checkpoint"] = str(weights)
        plan.config["model"]["vocab_size"] = None
        with Trial(plan) as trial:
            [outcome] = trial.end()
        assert outcome is not None
        assert outcome.exit_code != 0


# S5: a manifest that agrees with what was planted, from somebody without the key


def test_s5_with_a_key_only_signed_manifests_are_believed(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    found, run_id = run.checkpoints.complete()[-1], run.record()["id"]
    others = [entry for entry in os.listdir(found.path) if entry != "MANIFEST.json"]
    verify(found, run_id)
    monkeypatch.setenv(KEY_VARIABLE, "the owner's")
    with pytest.raises(CheckpointError, match=f"is not signed with the key in {KEY_VARIABLE}"):
        verify(found, run_id)
    seal(found.path, others)
    verify(found, run_id)
    monkeypatch.setenv(KEY_VARIABLE, "a stranger's")
    with pytest.raises(CheckpointError, match="is not signed"):
        verify(found, run_id)
    seal(found.path, others)
    monkeypatch.setenv(KEY_VARIABLE, "the owner's")
    with pytest.raises(CheckpointError, match="is not signed"):
        verify(found, run_id)


@pytest.mark.parametrize("change", [{"step": 12, "run": "0"}, {"parent": None}, {"metrics": {"val/loss": 0.0}}])
def test_s5_no_part_of_a_signed_manifest_can_be_changed(
    run: Folder, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "the owner's")
    found = run.checkpoints.complete()[-1]
    seal(found.path, [entry for entry in os.listdir(found.path) if entry != "MANIFEST.json"])
    path = found.path / "MANIFEST.json"
    content = json.loads(path.read_bytes()) | change
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(found, None)


# S6: names that lead elsewhere


@pytest.mark.parametrize("name", ["../step_00000009/state.json", "/etc/hostname", "..", ".", "", "a/b", "a\\b", "a\0b"])
def test_s6_only_plain_names_are_read(run: Folder, name: str) -> None:
    found = run.checkpoints.complete()[-1]
    before = json.loads((found.path / "MANIFEST.json").read_bytes())
    for key in ("digest", "signature", "format"):
        before.pop(key)
    files = {key: FileEntry(**entry) for key, entry in before["files"].items()}
    (found.path / "MANIFEST.json").unlink()
    Manifest(**before | {"files": files | {name: files["state.json"]}}).write(found.path)
    with pytest.raises(CheckpointError, match="no plain file name"):
        verify(found, None)


@pytest.mark.parametrize("name", ["state.json", ROWS, "MANIFEST.json"])
def test_s6_links_are_not_followed(run: Folder, tmp_path: Path, name: str) -> None:
    found = run.checkpoints.complete()[-1]
    outside = tmp_path / "outside"
    (found.path / name).rename(outside)
    (found.path / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=rf"{name} is not a regular file"):
        verify(found, None)
    assert run.checkpoints.newest_sound(None).step == 9  # type: ignore[union-attr]


def test_s6_a_linked_folder_is_no_checkpoint(run: Folder, tmp_path: Path) -> None:
    path = newest(run)
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside", target_is_directory=True)
    assert [found.step for found in run.checkpoints.complete()] == [9]


# S7: what hangs a reader


@contextmanager
def at_once() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 10


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(path.parent)  # such names may not be long
        listening.bind(path.name)
        os.chdir(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("no right to make devices")


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**42)


@pytest.mark.parametrize("name", ["state.json", ROWS, "MANIFEST.json"])
@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device, make_sparse])
def test_s7_nothing_hangs_the_reader(run: Folder, name: str, make: Callable[[Path], None]) -> None:
    path = newest(run) / name
    path.unlink()
    make(path)
    with at_once():
        assert run.checkpoints.newest_sound(None).step == 9  # type: ignore[union-attr]


def test_s7_a_run_passes_over_a_fifo_to_the_same_end(run: Folder) -> None:
    (newest(run) / ROWS).unlink()
    os.mkfifo(newest(run) / ROWS)
    outcomes = run.train()
    assert_same(run, outcomes)


# S8: headers that lie


def safetensors(header: bytes, n_bytes: int | None = None, data: bytes = b"\0" * 64) -> bytes:
    return struct.pack("<Q", len(header) if n_bytes is None else n_bytes) + header + data


def entry(dtype: str = "F32", shape: object = (4,), offsets: object = (0, 16), rows: object = (0, 4)) -> bytes:
    metadata = {"rows": json.dumps({"model.w": rows})}
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps({"__metadata__": metadata, "model.w": tensor}).encode()


LIES = {
    "2^63 bytes of header": safetensors(b"{}", 2**63),
    "2^64 - 1 bytes of header": safetensors(b"{}", 2**64 - 1),
    "more header than file": safetensors(b"{}", 10_000),
    "no header": b"",
    "seven bytes": b"\0" * 7,
    "no JSON": safetensors(b"\x80\x04pickle"),
    "deep JSON": safetensors(b"[" * 50_000),
    "unknown dtype": safetensors(entry(dtype="F128")),
    "dtype NaN": safetensors(entry().replace(b'"F32"', b"NaN")),
    "end before beginning": safetensors(entry(offsets=(16, 0))),
    "beyond the file": safetensors(entry(offsets=(0, 2**40), shape=(2**38,))),
    "shape that overflows": safetensors(entry(shape=(2**62, 4))),
    "negative shape": safetensors(entry(shape=(-4,))),
    "no rows": safetensors(entry().replace(b"rows", b"wors")),
    "rows of words": safetensors(entry(rows=["a", "b"])),
    "rows of nothing": safetensors(entry(rows=[])),
    "negative rows": safetensors(entry(rows=[-4, 4])),
    "rows beyond": safetensors(entry(rows=[0, 2**60])),
    "overlapping": safetensors(
        json.dumps(
            {
                "__metadata__": {"rows": json.dumps({"a": [0, 4], "b": [0, 4]})},
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
            }
        ).encode(),
        data=b"\0" * 24,
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_s8_a_header_that_lies_is_named(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "rows-00000-of-00001.safetensors"
    path.write_bytes(LIES[lie])
    with at_once(), pytest.raises(CheckpointError) as raised:
        open_rows([path])
    assert raised.value.path == str(path)


def test_s8_an_honest_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    path.write_bytes(safetensors(entry(), data=struct.pack("<4f", 1, 2, 3, 4)))
    assert open_rows([path])["model.w"].read(slice(1, 3)).tolist() == [2, 3]


def test_s8_in_a_whole_run(run: Folder) -> None:
    (newest(run) / ROWS).write_bytes(LIES["2^63 bytes of header"])
    seal(newest(run), [name for name in os.listdir(newest(run)) if name != "MANIFEST.json"])
    assert f"{ROWS} is not a file of a checkpoint's tensors" in refused(run)


@pytest.mark.parametrize("key", ["progress", "optimizer", "cursor", "scheduler"])
def test_a_state_that_does_not_say_all_is_named(run: Folder, key: str) -> None:
    path = newest(run) / "state.json"
    told = json.loads(path.read_bytes())
    told.pop(key)
    path.write_text(json.dumps(told))
    seal(newest(run), [name for name in os.listdir(newest(run)) if name != "MANIFEST.json"])
    with pytest.raises(CheckpointError, match=f"state.json does not say: {key}"):
        open_checkpoint(newest(run))


# S14


def test_s14_a_checkpoint_that_others_can_change_is_warned_of(run: Folder, caplog: pytest.LogCaptureFixture) -> None:
    found = run.checkpoints.complete()[-1]
    verify(found, None)
    assert caplog.text == ""
    found.path.chmod(0o777)
    verify(found, None)
    assert "can be changed by every user of this machine" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_s14_a_checkpoint_of_another_user_is_warned_of(run: Folder, caplog: pytest.LogCaptureFixture) -> None:
    found = run.checkpoints.complete()[-1]
    os.chown(found.path, 12345, -1)
    verify(found, None)
    assert "belongs to another user (uid 12345)" in caplog.text
