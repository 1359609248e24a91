"""A run folder of a version before is all that it was; one of a later version is refused in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ftlab.cli import main as ftlab
from ftlab.config.check import check_command_line, compose_config
from ftlab.config.layers import leaves
from ftlab.errors import FtlabError
from ftlab.jobs import launch
from ftlab.lab import reproduce as reproducing
from ftlab.lab.replay import replay
from ftlab.lab.reproduce import reproduce
from ftlab.lab.runs import RunRecord
from ftlab.outputs.files import read_yaml
from ftlab.storage.manifest import FORMAT, Manifest
from tests.cli.conftest import FinishedRun

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
OLD = sorted(FIXTURES.glob("run_format_*"))


@pytest.fixture(params=OLD, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> FinishedRun:
    shutil.copytree(request.param, tmp_path / "run")
    return FinishedRun(tmp_path / "run", 0)


def as_typed(run: Path) -> list[str]:
    return [str(override) for override in read_yaml(run / ".hydra" / "overrides.yaml")]


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


def test_it_is_forked(old: FinishedRun, tmp_path: Path) -> None:
    config = compose_config(
        [f"init_from={old.folder}", *as_typed(old.folder), "parallelism.nproc_per_node=1"],
        output_dir=tmp_path / "fork",
    )
    fork = FinishedRun(tmp_path / "fork", launch(config, own_process=False))
    eight = json.loads((old.folder / "losses_of_eight_steps.json").read_text())
    assert fork.exit_code == 0
    assert fork.losses[0] < eight[0] - 0.2, "weights that have trained"


def test_it_is_reproduced(old: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproducing, "launch", lambda config, own_process: launch(config, own_process=False))
    stored = old.folder / "config.yaml"
    # The same rows a step on one rank, which needs no launcher.
    for two, one in (("nproc_per_node: 2", "nproc_per_node: 1"), ("accumulation_steps: 2", "accumulation_steps: 4")):
        stored.write_text(stored.read_text().replace(two, one))
    found = reproduce(RunRecord(old.folder))
    assert found.verdict == "within tolerance", "on another number of ranks"
    assert found.largest is not None
    assert found.largest < 1e-5


def test_a_step_of_it_is_replayed(old: FinishedRun) -> None:
    assert replay(old.folder, 3).as_noted


def test_what_has_moved_since_is_no_difference(old: FinishedRun) -> None:
    today = dict(leaves(compose_config(as_typed(old.folder))))
    then = RunRecord(old.folder).settings
    assert {key: value for key, value in then.items() if key.endswith("_target_") and today[key] != value} == {}


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
