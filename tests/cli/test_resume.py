"""Going on, going back, forking, stopping early, exporting: what a user types and what the folder says afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlab.cli import main as ftlab
from ftlab.config.check import check_command_line, check_job
from ftlab.config.compose import compose, hydra_globals
from ftlab.errors import CheckpointError, ConfigError, ConfigErrors
from ftlab.jobs import launch
from ftlab.lab.trained import find_export, open_trained
from ftlab.storage.addresses import candidates, find_run
from ftlab.storage.checkpoints import Checkpoints
from ftlab.training import export as exporting
from ftlab.training.ledger import seen_in
from tests.cli.conftest import FinishedRun

TWELVE = (
    *("trainer.max_steps=12", "trainer.batch_size=8", "checkpoint.every_steps=3", "checkpoint.keep_last=100"),
    *("evaluation.every_steps=4", "evaluation.max_batches=1", "evaluation.n_samples=2", "evaluation.max_new_tokens=2"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Twelve steps, with a checkpoint after every third and at the end of both epochs."""
    from ftlab.config.check import compose_config
    from tests.cli.conftest import QUIET, SMALL

    folder = tmp_path_factory.mktemp("straight") / "run"
    (folder / ".hydra").mkdir(parents=True)  # as Hydra leaves it
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {one}\n" for one in [*SMALL, *QUIET, *TWELVE]))
    assert launch(compose_config([*SMALL, *QUIET, *TWELVE], output_dir=folder), own_process=False) == 0
    return FinishedRun(folder, 0)


@pytest.fixture
def run(straight: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A copy of it, to do things to."""
    shutil.copytree(straight.folder, tmp_path / "run")
    return FinishedRun(tmp_path / "run", 0)


@pytest.mark.parametrize("name", ["1_seed=2", "it's 50% of $HOME"])
def test_a_job_of_a_sweep_goes_on_in_whatever_folder_it_is(name: str, straight: FinishedRun, tmp_path: Path) -> None:
    folder = shutil.copytree(straight.folder, tmp_path / name)
    cfg = compose([]).cfg
    cfg.hydra.runtime.output_dir = str(folder)
    with hydra_globals(cfg):
        assert check_job(cfg)["resume"]["run"] == str(folder)


def resume(*argv: str) -> int:
    config = check_command_line(list(argv))
    assert config is not None
    return launch(config, own_process=False)


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "memory/"))} for line in lines]


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("train.log", ".lock")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(run: FinishedRun) -> list[int]:
    return [found.step for found in Checkpoints(run.folder / "checkpoints").complete()]


def rows(run: FinishedRun, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "checkpoints" / f"step_{step:08d}" / "rows-00000-of-00001.safetensors")


# ------------------------------------------------------------------------------------------------ going on


def test_going_back_to_a_step_ends_as_the_run_did_and_sets_the_later_checkpoints_aside(
    straight: FinishedRun, run: FinishedRun
) -> None:
    assert resume(f"resume={run.folder}@6") == 0
    assert untimed(run.lines) == untimed(straight.lines)
    ours, theirs = rows(run, 12), rows(straight, 12)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    aside = sorted(path.name for path in (run.folder / "checkpoints").glob("*.abandoned"))
    assert aside == [f"step_{step:08d}.abandoned" for step in (9, 10, 12)]
    record = run.json("run.json")
    assert record["id"] == straight.json("run.json")["id"]
    assert record["status"] == "completed"
    assert [(one["step"], one["logged_until"]) for one in record["resumed"]] == [(6, 12)]
    assert content(run.folder / "ledger") == content(straight.folder / "ledger")


def test_a_finished_run_has_nothing_to_go_on_with_unless_it_is_prolonged(run: FinishedRun) -> None:
    before = content(run.folder)
    assert resume(f"resume={run.folder}") == 2
    assert content(run.folder) == before
    assert resume(f"resume={run.folder}", "trainer.max_steps=14", "optimizer.lr=1e-4") == 0
    assert [line["step"] for line in run.lines if "train/loss" in line] == list(range(1, 15))
    assert run.json("run.json")["resumed"][-1]["overrides"] == ["trainer.max_steps=14", "optimizer.lr=1e-4"]
    assert "max_steps: 14" in (run.folder / "config.yaml").read_text()
    # What was changed lasts: the next session begins with it.
    assert check_command_line([f"resume={run.folder}"])["optimizer"]["lr"] == 1e-4  # type: ignore[index]


def test_a_run_that_was_prolonged_is_asked_at_its_newest_weights(run: FinishedRun) -> None:
    assert open_trained(str(run.folder)).source == run.folder / "export"
    assert resume(f"resume={run.folder}", "trainer.max_steps=14", "checkpoint.export=false") == 0
    trained = open_trained(str(run.folder))
    assert (trained.step, trained.source.name) == (14, "step_00000014")


@pytest.mark.parametrize(
    ("exported", "done", "checkpoints", "counts"),
    [
        (12, 12, [9, 12], True),
        (12, 12, [9], True),  # checkpoint.at_end=false
        (12, 12, [9, 14], False),  # going on beyond it
        (12, 9, [6, 9], False),  # it went back
        (12, None, [], True),
        (None, 12, [], True),
        (None, 12, [9], False),
    ],
)
def test_an_export_counts_for_the_run_while_nothing_is_newer(
    tmp_path: Path, exported: int | None, done: int | None, checkpoints: list[int], counts: bool
) -> None:
    for step in checkpoints:
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").touch()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").touch()
    (tmp_path / "export" / "MANIFEST.json").write_text(json.dumps({} if exported is None else {"step": exported}))
    (tmp_path / "run.json").write_text(json.dumps({} if done is None else {"progress": {"step": done}}))
    found = find_export(str(tmp_path))
    assert (found is not None) == counts
    assert found is None or found.step == exported


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("seq_len=64", "seq_len"),
        ("model.dim=64", "model.dim"),
        ("dataset.max_samples=39", "dataset.max_samples"),
        ("dataset.train_on_input=true", "dataset.train_on_input"),
        ("optimizer=sgd", "optimizer._target_"),
        ("precision=bf16", "precision.param_dtype"),
        ("trainer.gradient_accumulation_steps=2", "trainer.gradient_accumulation_steps"),
        ("tokenizer=byte", "tokenizer._target_"),
        ("model.checkpoint=/", "model.checkpoint"),
    ],
)
def test_what_would_make_it_another_run_is_refused_with_the_way_out(
    override: str, key: str, straight: FinishedRun
) -> None:
    before = content(straight.folder)
    with pytest.raises(ConfigErrors) as caught:
        check_command_line([f"resume={straight.folder}", "trainer.max_steps=20", override])
    problem = next(p for p in caught.value.problems if p.key == key)
    assert problem.fix is not None
    assert f"init_from={straight.folder}" in problem.fix
    assert content(straight.folder) == before


def test_options_and_keys_that_follow_from_one_another_change_together(straight: FinishedRun) -> None:
    config = check_command_line([f"resume={straight.folder}", "scheduler=wsd", "trainer.max_steps=null"])
    assert config is not None
    assert config["scheduler"]["_target_"].endswith("WSD")
    assert config["scheduler"]["decay_ratio"] == 0.2
    assert (config["trainer"]["max_steps"], config["trainer"]["epochs"]) == (None, 3)


def test_what_was_typed_for_an_option_that_is_gone_is_no_mistake_of_now(run: FinishedRun) -> None:
    typed = run.folder / ".hydra" / "overrides.yaml"
    typed.write_text(
        typed.read_text() + "- scheduler.warmup_ratio=0.25\n- scheduler=wsd\n- scheduler.decay_ratio=0.4\n"
    )
    config = check_command_line([f"resume={run.folder}", "scheduler=linear", "trainer.max_steps=20"])
    assert config is not None
    assert config["scheduler"]["_target_"].endswith("Linear")
    assert "decay_ratio" not in config["scheduler"]  # linear knows none
    assert config["scheduler"]["warmup_ratio"] == 0.25  # but this
    with pytest.raises(ConfigErrors, match=r"scheduler\.decay_ratio: unknown key"):
        check_command_line([f"resume={run.folder}", "scheduler=linear", "scheduler.decay_ratio=0.4"])


@pytest.mark.parametrize(
    "override",
    ["init_from=latest", "init_optimizer=true", "paths.output_dir=new", "hydra.run.dir=new", "resume=latest"],
)
def test_what_is_for_a_new_run_is_refused_by_name(override: str, straight: FinishedRun) -> None:
    with pytest.raises(ConfigErrors, match=override.partition("=")[0]):
        check_command_line([f"resume={straight.folder}", "trainer.max_steps=20", override])


def test_the_cache_may_be_elsewhere_by_now(straight: FinishedRun, tmp_path: Path) -> None:
    config = check_command_line([f"resume={straight.folder}", "trainer.max_steps=20", f"paths.cache_dir={tmp_path}"])
    assert config is not None
    assert config["paths"] == {"output_dir": str(straight.folder), "cache_dir": str(tmp_path)}


@pytest.mark.parametrize("record", ['{"status": "comp', "{}", "[]", '{"status": "completed", "resumed": 4}'])
def test_a_damaged_record_is_named(record: str, run: FinishedRun) -> None:
    (run.folder / "run.json").write_text(record)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        check_command_line([f"resume={run.folder}", "trainer.max_steps=20"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{run}@50", "has no checkpoint step_00000050; complete checkpoints: steps 3, 5, 6, 9, 10, 12"),
        ("{run}/checkpoints/step_00000007", "has no checkpoint step_00000007"),
        ("{run}@first", "after @ comes a step or best"),
        (f"{{run}}@{'9' * 5000}", "after @ comes a step or best"),
        (f"{{run}}/checkpoints/step_{'9' * 5000}", "a checkpoint's folder is named step_<number>"),
        ("{run}x", "there is no folder"),
        ("{run}/checkpoints", "is no run's folder"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(
    text: str, told: str, straight: FinishedRun
) -> None:
    with pytest.raises(ConfigError, match=told):
        check_command_line([f"resume={text.format(run=straight.folder)}"])


def test_a_run_with_nothing_complete_names_the_unfinished(run: FinishedRun) -> None:
    for path in (run.folder / "checkpoints").iterdir():
        shutil.rmtree(path)
    (run.folder / "checkpoints" / "step_00000003.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"no complete checkpoint; unfinished: step_00000003\.tmp"):
        check_command_line([f"resume={run.folder}"])


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    straight: FinishedRun, run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run.folder / "checkpoints" / "step_00000012"
    shard = newest / "rows-00000-of-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    assert resume(f"resume={run.folder}") == 0
    assert "step_00000012 is not used" in capsys.readouterr().err
    assert untimed(run.lines) == untimed(straight.lines)


def test_resume_is_for_the_command_line_and_for_one_run(straight: FinishedRun) -> None:
    with pytest.raises(ConfigError, match="goes on with one run"):
        check_command_line(["-m", f"resume={straight.folder}", "optimizer.lr=1e-3,2e-3"])


def test_two_jobs_do_not_write_one_folder(run: FinishedRun) -> None:
    from ftlab.outputs.folder import FolderInUseError, RunFolder

    argv = [f"resume={run.folder}", "trainer.max_steps=14"]
    early = check_command_line(argv)
    holder = RunFolder(run.folder)
    holder.lock()
    before = (run.folder / "train.log").read_text()
    with pytest.raises(FolderInUseError, match="is in use by process"):
        check_command_line(argv)
    with pytest.raises(FolderInUseError, match="is in use by process"):  # one that looked before
        launch(early or {}, own_process=False)
    holder.unlock()
    assert (run.folder / "train.log").read_text() == before


def test_a_run_on_a_disk_that_cannot_be_written_is_told_before_its_log_is(
    run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("ftlab.config.check.hold", refuse)
    with pytest.raises(ConfigError, match=r"nothing can be written in .*: Read-only file system"):
        check_command_line([f"resume={run.folder}", "trainer.max_steps=14"])


# ------------------------------------------------------------------------------------------------ W&B


def test_offline_wandb_folders_of_a_run_that_went_on_twice_are_one_run_with_rising_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftlab.config.check import compose_config
    from tests.cli.conftest import SMALL
    from tests.unit.test_loggers import read_offline_run, rows_of

    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = [*SMALL, "logger=[jsonl,wandb]", *TWELVE, "checkpoint.export=false"]
    first = FinishedRun(tmp_path / "run", 0)
    assert launch(compose_config(logged, output_dir=first.folder), own_process=False) == 0
    for back_to in (6, 9):  # as after kills: later steps had been logged
        assert resume(f"resume={first.folder}@{back_to}", f"trainer.max_steps={12 + back_to}") == 0
    folders = sorted((first.folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime)
    ids = {path.name.rsplit("-", 1)[1] for path in folders}
    assert len(folders) == 3
    assert ids == {first.json("run.json")["id"]}
    logged_steps: list[int] = []
    for number, folder in enumerate(folders):
        alone = tmp_path / f"one{number}"
        shutil.copytree(folder, alone / "wandb" / folder.name)
        logged_steps += [row["step"] for row in rows_of(read_offline_run(alone)) if "train/loss" in row]
    assert logged_steps == list(range(1, 22))


# ------------------------------------------------------------------------------------------------ forks


def test_a_fork_begins_with_the_parents_weights_and_names_it(
    straight: FinishedRun, tiny_run: Callable[..., FinishedRun]
) -> None:
    fork = tiny_run(f"init_from={straight.folder}@6", "trainer.max_steps=1", "optimizer.lr=1e-9", name="fork")
    assert fork.exit_code == 0
    parent, child = rows(straight, 6), rows(fork, 1)
    weights = [name for name in parent if name.startswith("model.")]
    assert all(torch.allclose(parent[name], child[name], atol=1e-7) for name in weights)
    assert not torch.equal(rows(straight, 3)["model.head.weight"], parent["model.head.weight"])
    record = fork.json("run.json")
    assert record["parent_run"].endswith("step_00000006")
    assert record["id"] != straight.json("run.json")["id"]
    assert child["optimizer.head.weight.step"].item() == 1
    kept = tiny_run(
        f"init_from={straight.folder}@6", "init_optimizer=true", "trainer.max_steps=1", name="fork_with_moments"
    )
    assert rows(kept, 1)["optimizer.head.weight.step"].item() == 7


def test_a_fork_cannot_go_on_with_the_moments_of_another_optimizer(
    straight: FinishedRun, tiny_run: Callable[..., FinishedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    fork = tiny_run(f"init_from={straight.folder}", "init_optimizer=true", "optimizer=sgd", "trainer.max_steps=1")
    assert fork.exit_code == 2
    assert "was trained with" in capsys.readouterr().err


@pytest.mark.parametrize("judged", ["evaluation.patience=2", "checkpoint.keep_best=1"])
def test_without_validation_rows_nothing_can_be_judged(
    judged: str, tiny_run: Callable[..., FinishedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_run(judged, "dataset.val_fraction=0").exit_code == 2
    said = capsys.readouterr().err
    assert f"{judged.replace('=', ': ')}, but there are no validation rows" in said


def test_a_fork_of_another_architecture_names_the_tensor_and_both_shapes(
    straight: FinishedRun, tiny_run: Callable[..., FinishedRun], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny_run(f"init_from={straight.folder}", "model.ffn_hidden_dim=48", name="fork").exit_code == 2
    assert "(64, 32), the model's (48, 32)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- best and patience


def test_the_best_are_kept_and_found_again_and_patience_ends_the_run(tiny_run: Callable[..., FinishedRun]) -> None:
    run = tiny_run(
        *(
            "trainer.max_steps=40",
            "optimizer=sgd",
            "optimizer.lr=1e-12",
            "scheduler=constant",
            "trainer.max_grad_norm=null",
        ),
        *("evaluation.every_steps=2", "evaluation.patience=3", "evaluation.n_samples=0", "evaluation.max_batches=1"),
        *(
            "evaluation.max_new_tokens=1",
            "checkpoint.keep_last=1",
            "checkpoint.keep_best=1",
            "checkpoint.every_epoch=false",
        ),
    )
    validated = {int(line["step"]): line["val/loss"] for line in run.lines if "val/loss" in line and line["step"]}
    assert list(validated) == [2, 4, 6, 8], "the first, and three without a better one: nothing is learnt at this rate"
    best, last = 2, 8
    assert run.json("run.json")["status"] == "completed"
    assert steps(run) == [best, last]
    assert [found.step for found in candidates(find_run(f"{run.folder}@best", "RUN"))] == [best]


# ------------------------------------------------------------------------------------------------ export


def test_the_verb_exports_any_checkpoint_in_any_dtype_and_proves_it(
    straight: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    assert ftlab(["export", f"{straight.folder}@6", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    trained = rows(straight, 6)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(theirs["lm_head.weight"], trained["model.head.weight"].bfloat16())
    manifest = json.loads((tmp_path / "out" / "MANIFEST.json").read_text())
    assert 0 < manifest["proof"]["max_abs_diff"] < 0.05
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == entry["sha256"]
    assert ftlab(["export", str(straight.folder), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert ftlab(["export", str(straight.folder), str(tmp_path / "last")]) == 0
    cards = [(folder / "README.md").read_text() for folder in (tmp_path / "last", straight.folder / "export")]
    assert cards[0] == cards[1], "the card is the run's own"
    end = json.loads((straight.folder / "export" / "MANIFEST.json").read_text())
    assert end["proof"]["max_abs_diff"] == 0.0


def test_metas_layout_reads_back_as_what_was_trained(straight: FinishedRun, tmp_path: Path) -> None:
    from ftlab.models.auto import AutoModelConfig
    from ftlab.models.weights import load_weights

    assert ftlab(["export", f"{straight.folder}@6", str(tmp_path / "out"), "--layout", "meta"]) == 0
    model = AutoModelConfig(checkpoint=str(tmp_path / "out")).read(tmp_path / "out").build()
    load_weights(model, tmp_path / "out")
    trained = rows(straight, 6)
    assert all(torch.equal(p, trained[f"model.{name}"]) for name, p in model.named_parameters())


@pytest.mark.parametrize("what", ["one weight", "the configuration"])
def test_an_export_that_reads_back_otherwise_is_no_export(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    straight: FinishedRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = exporting.export_weights

    def spoil(model: Any, folder: Path, **options: Any) -> None:
        write(model, folder, **options)
        if what == "one weight":
            file = folder / "model.safetensors"
            content = bytearray(file.read_bytes())
            content[-1] ^= 0x01
            file.write_bytes(content)
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))

    monkeypatch.setattr(exporting, "export_weights", spoil)
    assert ftlab(["export", str(straight.folder), str(tmp_path / "out")]) != 0
    assert not (tmp_path / "out").exists()
    assert ("is not the trained one" if what == "one weight" else "norm_eps") in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- ledger, verbs


def test_the_ledger_proves_each_epoch_and_replay_builds_a_step_again(
    run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    proofs = [json.loads(line) for line in (run.folder / "ledger" / "epochs.jsonl").read_text().splitlines()]
    assert [(p["epoch"], p["samples"], p["each_once"]) for p in proofs] == [(0, 40, True), (1, 40, True)]
    assert Counter(seen_in(run.folder / "ledger", 1)) == Counter(range(40))
    assert ftlab(["replay", str(run.folder), "--step", "7"]) == 0
    assert "exactly the samples" in capsys.readouterr().out
    noted = run.folder / "ledger" / "rank00000.txt"
    lines = noted.read_text().splitlines(keepends=True)
    lines[6] = "7 1 0,0,0,0,0,0,0,0\n"
    noted.write_text("".join(lines))
    assert ftlab(["replay", str(run.folder), "--step", "7"]) == 1
    assert "NOT what the run noted" in capsys.readouterr().out
    assert ftlab(["replay", str(run.folder), "--step", "99"]) == 2


def test_verify_resume_finds_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.conftest import SMALL

    monkeypatch.chdir(tmp_path)
    short = ("evaluation.max_batches=1", "evaluation.n_samples=1", "evaluation.max_new_tokens=2")
    assert ftlab(["verify-resume", "--steps", "6", *SMALL, *short]) == 0
    assert "NO" not in capsys.readouterr().out.split("same")[-1].replace("NOT", "")
    [verdict] = tmp_path.rglob("verify_resume.json")
    told = json.loads(verdict.read_text())
    assert told["same"]
    assert {one["what"] for one in told["compared"]} >= {"weights and optimizer", "random states", "metrics.jsonl"}


def test_verify_resume_says_when_nothing_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftlab.lab.verify_resume.launch", lambda config, own_process: 0)
    assert ftlab(["verify-resume", "--steps", "2"]) == 1
    assert "was to end by SIGKILL in step 2, but: is unknown" in capsys.readouterr().err


def test_verify_resume_would_find_one(straight: FinishedRun, run: FinishedRun) -> None:
    from ftlab.lab.verify_resume import compare_runs

    lines = (run.folder / "metrics.jsonl").read_text().replace('"train/loss": 6', '"train/loss": 7')
    (run.folder / "metrics.jsonl").write_text(lines)
    differing = [one.what for one in compare_runs(straight.folder, run.folder) if not one.same]
    assert differing == ["metrics.jsonl"]


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_start(
    tiny_run: Callable[..., FinishedRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    assert tiny_run("trainer.max_steps=2").exit_code == 2
    assert "GiB free" in capsys.readouterr().err
