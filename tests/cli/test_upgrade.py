"""A run folder of the version before still goes on and exports; one of a later version is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ftlab.cli import main as ftlab
from ftlab.config.check import check_command_line
from ftlab.errors import FtlabError
from ftlab.jobs import launch
from ftlab.storage.manifest import FORMAT, Manifest
from tests.cli.conftest import FinishedRun

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
OLD = sorted(FIXTURES.glob("run_format_*"))


@pytest.fixture(params=OLD, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> FinishedRun:
    shutil.copytree(request.param, tmp_path / "run")
    return FinishedRun(tmp_path / "run", 0)


def test_it_goes_on_as_it_would_have(old: FinishedRun) -> None:
    config = check_command_line(
        [f"resume={old.folder}", "trainer.max_steps=8", "parallelism.nproc_per_node=1", "checkpoint.keep_last=2"]
    )
    assert config is not None
    assert launch(config, own_process=False) == 0
    losses = [line["train/loss"] for line in old.lines if "train/loss" in line]
    assert losses == pytest.approx(json.loads((old.folder / "losses_of_eight_steps.json").read_text()), rel=1e-5)
    formats = [Manifest.read(path).format for path in sorted((old.folder / "checkpoints").iterdir())]
    assert formats == [1, FORMAT]


def test_it_exports(old: FinishedRun, tmp_path: Path) -> None:
    assert ftlab(["export", str(old.folder), str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(tensor.numel() for tensor in exported.values()) == old.json("run.json")["n_params"]


def test_a_later_checkpoint_is_refused(old: FinishedRun) -> None:
    [folder] = (old.folder / "checkpoints").iterdir()
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["format"] = FORMAT + 1
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(FtlabError, match=rf"was written by a newer ftlab \(format {FORMAT + 1}; .* up to {FORMAT}\)"):
        check_command_line([f"resume={old.folder}"])


def test_a_later_run_is_refused(old: FinishedRun) -> None:
    (old.folder / "run.json").write_text(json.dumps(old.json("run.json") | {"format": 99}))
    with pytest.raises(FtlabError, match=r"run\.json was written by a newer ftlab \(format 99; .*\n  try: a newer "):
        check_command_line([f"resume={old.folder}"])
