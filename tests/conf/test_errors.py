"""Wrong input is named before anything runs: the key, the value, the rule and what to type instead."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from ftlab.config.check import check_command_line, compose_config
from ftlab.config.files import output_problem
from ftlab.config.targets import forbidden
from ftlab.errors import ConfigError, ConfigErrors
from ftlab.storage.addresses import find_run
from ftlab.typed import override

Problems = Callable[..., str]

# What is typed, and what the answer must contain, in this order.
WRONG = {
    "misspelt key": (["optimizer.lrr=1"], ["optimizer.lrr: unknown key; did you mean optimizer.lr?", "try: "]),
    "misspelt key, added": (["+optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
    "misspelt key, forced": (["++optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
    "misspelt key in a mapping": (["optimizer={lr:1,lrr:2}"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
    "misspelt group of a key": (["optimzer.lr=1"], ["optimzer.lr", "did you mean optimizer.lr?"]),
    "key without its group": (["max_steps=5"], ["max_steps", "did you mean trainer.max_steps?", "trainer.max_steps=5"]),
    "key like no other": (["optimizer.zzz=1"], ["optimizer.zzz", "optimizer has lr"]),
    "key of another option": (["scheduler=constant", "scheduler.min_lr_ratio=0"], ["only scheduler=cosine"]),
    "group of keys as a value": (["+logger.wandb=5"], ["logger.wandb", "no value", "project"]),
    "deleted key": (["~optimizer.lr"], ["optimizer.lr", "take it out"]),
    "key that exists, added": (["+optimizer.lr=1"], ["exists already", "try: optimizer.lr=1"]),
    "not an override": (["optimizer"], ["optimizer", "key=value"]),
    "unreadable value": (["run_name=a{b"], ["run_name", "cannot be read"]),
    "unknown option": (["precision=fp17"], ["precision: has no option 'fp17'", "bf16", "fp32", "try: precision=fp"]),
    "no option": (["optimizer=null"], ["optimizer", "choices: ", "adamw"]),
    "no option of a list": (["debug=[null]"], ["debug", "choices: ", "smoke"]),
    "two options": (["optimizer=sgd", "optimizer=adamw"], ["optimizer", "two options"]),
    "second option": (["+optimizer=sgd"], ["optimizer", "second optimizer", "try: optimizer=sgd"]),
    "mandatory value": (["optimizer.lr='???'"], ["optimizer.lr", "must be given"]),
    "learning rate too small": (["optimizer.lr=-1"], ["optimizer.lr: must be > 0, got -1", "try: optimizer.lr=2e-05"]),
    "learning rate no number": (["optimizer.lr=abc"], ["optimizer.lr: must be a number, got 'abc'"]),
    "learning rate NaN": (["optimizer.lr=nan"], ["optimizer.lr: must be finite, got nan"]),
    "learning rate infinite": (["optimizer.lr=inf"], ["optimizer.lr: must be finite, got inf"]),
    "no tokens": (["seq_len=0"], ["seq_len: must be >= 1, got 0", "try: seq_len=1"]),
    "more tokens than the model": (["seq_len=9999"], ["seq_len: 9999", "model.max_seq_len = 2048", "seq_len=2048"]),
    "empty batch": (["trainer.batch_size=0"], ["trainer.batch_size: must be >= 1, got 0"]),
    "no accumulation": (["trainer.gradient_accumulation_steps=0"], ["steps: must be >= 1, got 0"]),
    "global batch size": (
        ["trainer.global_batch_size=10", "trainer.batch_size=4"],
        ["10 is not a multiple of trainer.batch_size × data-parallel ranks = 4 × 1", "trainer.global_batch_size=8"],
    ),
    "accumulation and global batch size": (
        ["trainer.global_batch_size=8", "trainer.gradient_accumulation_steps=1"],
        ["trainer.global_batch_size", "set exactly one of", "gradient_accumulation_steps"],
    ),
    "steps and epochs": (
        ["trainer.max_steps=5", "trainer.epochs=1"],
        ["set exactly one of trainer.epochs and trainer.max_steps"],
    ),
    "neither steps nor epochs": (["trainer.epochs=null"], ["set exactly one of", "neither"]),
    "warmup longer than the run": (
        ["trainer.max_steps=5", "scheduler.warmup_steps=9"],
        ["scheduler.warmup_steps: 9", "trainer.max_steps = 5"],
    ),
    "decay as a percentage": (["scheduler=wsd", "scheduler.decay_ratio=20"], ["decay_ratio: must be", "ratio <= 1"]),
    "more decay than is left": (
        ["scheduler=wsd", "scheduler.decay_ratio=0.8", "scheduler.warmup_ratio=0.3"],
        ["scheduler.decay_ratio: 0.8 of the steps decay, but 0.3 warm up", "try: scheduler.decay_ratio=0.7"],
    ),
    "metric": (["evaluation.metric=val/lss"], ["evaluation.metric: must be one of val/loss", "metric=val/loss"]),
    "metric that nothing measures": (
        ["evaluation.metric=val/exact_match/even", "evaluation.n_samples=0"],
        ["evaluation.metric: val/exact_match/even, but evaluation.n_samples=0", "try: evaluation.n_samples=8"],
    ),
    "nesterov alone": (
        ["optimizer=sgd", "optimizer.nesterov=true"],
        ["optimizer.nesterov: true, but optimizer.momentum=0", "try: optimizer.momentum=0.9"],
    ),
    "arithmetic finer than weights": (
        ["precision=bf16", "precision.compute_dtype=float32"],
        ["precision.compute_dtype: float32, but weights in bfloat16", "try: precision.param_dtype=float32"],
    ),
    "scaled gradients in float16": (
        ["precision=fp16_mixed", "precision.param_dtype=float16"],
        ["precision.param_dtype: float16, but gradients in float16", "try: precision.param_dtype=float32"],
    ),
    "scaled gradients on the host": (
        ["precision=fp16_mixed", "parallelism=fsdp", "parallelism.cpu_offload=true"],
        ["precision.loss_scaling: true, but the scale of the loss is on the GPU", "try: precision=bf16_mixed"],
    ),
    "two warmups": (["scheduler.warmup_steps=9", "scheduler.warmup_ratio=0.1"], ["set at most one of"]),
    "degrees": (
        ["parallelism=hsdp", "parallelism={replicate_degree:2,shard_degree:2,nproc_per_node:2}"],
        ["replicate_degree × shard_degree = 2 × 2 = 4", "2 × 1 = 2 ranks", "try: parallelism.replicate_degree=null"],
    ),
    "recomputation": (["parallelism.activation_checkpointing=ful"], ["none, full, selective", "checkpointing=full"]),
    "beta": (["optimizer.betas=[0.9,1.0]"], ["optimizer.betas.1: must be in 0 <= beta < 1, got 1.0"]),
    "beta by its index": (["optimizer.betas.0=2"], ["0 <= beta < 1", "try: optimizer.betas='[0.9,0.95]'"]),
    "bare beta": (["optimizer.betas=0.9"], ["optimizer.betas: must be a list", "try: optimizer.betas='[0.9,0.95]'"]),
    "step to profile": (["trainer.profile_steps=[0,5]"], ["steps.0: must be >= 1", "trainer.profile_steps='[1,5]'"]),
    "index in brackets": (["optimizer.betas[0]=0.8"], ["try: optimizer.betas.0=0.8"]),
    "one beta": (["optimizer.betas=[0.9]"], ["optimizer.betas: must be a list of 2"]),
    "negative seed": (["seed=-1"], ["0 <= seed < 2**63", "-1"]),
    "seed too large": ([f"seed={2**63}"], ["0 <= seed < 2**63", str(2**63)]),
    "yes as a flag": (["checkpoint.export=y"], ["checkpoint.export: must be true or false, got 'y'", "export=true"]),
    "fraction as a count": (["trainer.batch_size=2.5"], ["trainer.batch_size: must be a whole number, got 2.5"]),
    "number as text": (["run_name=2026"], ["run_name: must be text, got 2026", "run_name=\"'2026'\""]),
    "device": (["device=gpu"], ["device: must be one of auto, cpu, cuda, got 'gpu'", "try: device=cpu"]),
    "bytes that are no text": (["run_name=caf\udce9"], ["run_name: holds bytes that are not UTF-8", r"'caf\udce9'"]),
    "an optimizer to begin with, of nobody": (["init_optimizer=true"], ["init_optimizer", "init_from=RUN"]),
    "number as longer waves": (["model.rope_scaling=1"], ["model.rope_scaling", "_target_", "got 1"]),
    "longer waves without a class": (["model.rope_scaling={factor:8.0}"], ["model.rope_scaling", "'factor': 8.0"]),
    "number as a column": (
        ["dataset=chat", "dataset.source=json", "dataset.column_map={system:3,tools:4,messages:5}"],
        [f"dataset.column_map.{field}: must be text" for field in ("messages", "system", "tools")],
    ),
    "number as a template's file": (
        ["dataset=chat_own_template", "dataset.source=json", "dataset.template.path=5"],
        ["dataset.template.path: must be text, got 5"],
    ),
    "number as a set": (["dataset=instruct", "dataset.source=7"], ["dataset.source: must be text, got 7"]),
    "heads": (["model.dim=130"], ["model.dim: 130", "model.n_heads = 4", "try: model.dim=132"]),
    "key and value heads": (["model.n_kv_heads=3"], ["model.n_heads: 4", "model.n_kv_heads = 3"]),
    "reference to nothing": (["optimizer.lr=${trainer.lr}"], ["does not exist: optimizer.lr -> trainer.lr"]),
    "references in a circle": (
        ["seed=${seq_len}", "seq_len=${trainer.batch_size}", "trainer.batch_size=${seed}"],
        ["seed -> seq_len -> trainer.batch_size -> seed"],
    ),
    "unset environment variable": (["run_name=${oc.env:FTLAB_NOT_SET}"], ["run_name", "FTLAB_NOT_SET"]),
    "an epoch of no rows": (["dataset=mixture", "dataset.epoch_rows=0"], ["dataset.epoch_rows: must be >= 1, got 0"]),
    "a value of one of several sets": (
        ["dataset=mixture", "dataset.sets.b.val_fraction=1.5"],
        ["dataset.sets.b.val_fraction: must be in 0 <= share < 1", "try: dataset.sets.b.val_fraction="],
    ),
    "missing rows": (["dataset.data_files=/nowhere/rows.json"], ["dataset.data_files", "/nowhere/rows.json"]),
    "missing weights": (["model.checkpoint=./no_such_folder"], ["model.checkpoint", "no_such_folder"]),
    "split of files": (
        ["dataset=instruct", "dataset.source=jsonl", "dataset.data_files=x", "dataset.split='train[:10%]'"],
        ["dataset.split: 'train[:10%]' would not be read", "split=train dataset.max_samples=1000"],
    ),
    "commit of the embedded set": (["dataset.revision=abc"], ["dataset.revision: abc would not be read"]),
    "validation rows and a share": (
        ["dataset=chat", "dataset.source=jsonl", "dataset.data_files=x", "dataset.val_data_files=y"],
        ["dataset.val_data_files: y would not be read: dataset.val_fraction=0.02", "try: dataset.val_fraction=null"],
    ),
    "validation split and a share": (
        ["dataset=gsm8k", "dataset.val_split=test", "dataset.val_fraction=0.1"],
        ["dataset.val_split: test would not be read: dataset.val_fraction=0.1"],
    ),
    "validation rows of a set in a mixture": (
        ["dataset.sets=[dolly]", "dataset.sets.dolly.val_data_files=y"],
        ["dataset.sets.dolly.val_data_files: y would", "try: dataset.sets.dolly.val_fraction=null"],
    ),
    "several values without -m": (["seed=1,2"], ["seed", "-m"]),
    "Hydra's own key": (["hydra.rum.dir=x"], ["hydra.rum"]),
    "no folder of a run": (["hydra.run.dir=null"], ["hydra.run.dir: ", "not Optional"]),
    "no folder of a sweep": (["hydra.sweep.dir=null"], ["hydra.sweep.dir: ", "not Optional"]),
    "Hydra's mode": (["hydra.mode=foo"], ["hydra.mode: ", "'foo', expected one of [RUN, MULTIRUN]"]),
    "Hydra's own node": (["hydra=1"], ["hydra: hydra=1: it holds Hydra's own settings", "try: hydra.run.dir="]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_the_answer_names_the_key_the_value_and_the_cure(case: str, problems: Problems) -> None:
    typed, expected = WRONG[case]
    answer = problems(*typed)
    assert re.search(".*".join(map(re.escape, expected)), answer, re.DOTALL), answer


def test_everything_wrong_is_told_at_once(problems: Problems) -> None:
    answer = problems("optimizer.lrr=1", "precision=fp17", "seed=-1", "trainer.batch_size=0", "trainer.epochs=null")
    for key in ("optimizer.lrr", "precision", "seed", "trainer.batch_size", "trainer.epochs"):
        assert f"{key}: " in answer


def test_the_defaults_have_no_problem(problems: Problems) -> None:
    assert problems() == ""
    assert problems("experiment=null", "sweep=null", "debug=null") == ""  # nor when they are typed


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--config-path=/nowhere"], "--config-path: takes the place of conf/"),
        (["--config-dir=/nowhere"], "--config-dir: there is no folder /nowhere"),
        (["--resolve"], "try: --cfg job --resolve"),
        (["--experimental-rerun", "nowhere"], "try: python -m ftlab reproduce RUN"),
        (["--run", "--multirun"], "--run --multirun: cannot be had together"),
    ],
)
def test_a_flag_that_hydra_would_stumble_over_is_told_before_anything_is_made(
    flags: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigErrors, match=re.escape(told)):
        check_command_line([*flags, f"paths.output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["gsm8k", "ultrachat"])
def test_what_a_known_set_says_of_the_hub_is_not_meant_for_files_in_its_place(option: str, problems: Problems) -> None:
    files = ["dataset.source=jsonl", f"dataset.data_files={__file__}"]
    assert problems(f"dataset={option}", *files, "dataset.val_fraction=0.1") == ""
    assert problems(f"dataset={option}", "dataset.val_fraction=0.1") == ""
    assert "dataset.split" in problems(f"dataset={option}", *files, "dataset.split=test")


def test_an_experiment_that_sets_a_groups_value_must_pick_its_option(conf: Path, problems: Problems) -> None:
    text = "# @package _global_\n{}optimizer:\n  lr: 2.0e-4\ntrainer:\n  batch_size: 2\n"
    (conf / "experiment" / "mine.yaml").write_text(text.format(""))
    assert problems("experiment=mine").splitlines() == [
        "optimizer.lr: is set, but which optimizer it is for is not said (conf/experiment/mine.yaml:3)",
        "  try: in its defaults:  - override /optimizer: adamw",
    ]
    (conf / "experiment" / "mine.yaml").write_text(text.format("defaults:\n  - override /optimizer: sgd\n"))
    assert problems("experiment=mine") == ""


@pytest.mark.parametrize("file", ["experiment/mine", "debug/mine", "local/default"])
def test_a_misspelt_key_in_a_file_names_file_and_line(file: str, conf: Path, problems: Problems) -> None:
    path = conf / f"{file}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text("# @package _global_\noptimizer:\n  lrr: 1\n")
    group, option = file.split("/")
    answer = problems(*([] if group == "local" else [f"{group}={option}"]))
    assert f"optimizer.lrr: unknown key (conf/{file}.yaml:3); did you mean optimizer.lr?" in answer


@pytest.mark.parametrize("line", ["hydra:\n  mode: MULTIRUN", "trainer:\n  max_steps: 2"])
def test_a_file_whose_first_line_is_damaged_says_what_it_should_be(line: str, conf: Path, problems: Problems) -> None:
    (conf / "sweep" / "mine.yaml").write_text(f"# @pakage _global_\n{line}\n")
    key = line.replace(":\n  ", ".").partition(":")[0]
    assert problems("sweep=mine").splitlines() == [
        f"sweep/mine: puts all its keys below sweep, and there is no sweep.{key} (conf/sweep/mine.yaml:3)",
        "  try: # @package _global_   (as the file's first line)",
    ]


def test_a_wrong_value_in_a_file_names_file_and_line(conf: Path, problems: Problems) -> None:
    (conf / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  batch_size: 0\n")
    assert "must be >= 1, got 0 (conf/experiment/mine.yaml:3)" in problems("experiment=mine")


@pytest.mark.parametrize(("name", "plain"), [("wandb.", "wandb"), ("a b", "a_b"), ("..", "mine"), ("mine-2", None)])
def test_a_logger_has_a_name_that_can_be_typed(name: str, plain: str | None, conf: Path, problems: Problems) -> None:
    (conf / "logger" / "mine.yaml").write_text(f"{name}:\n  _target_: ftlab.loggers.jsonl.JsonlLogger\n")
    told = f"logger.{name}: no override can name it: letters, digits, _ and - can be\n  try: {plain}:"
    assert problems("logger=[console,mine]") == (told if plain else "")


@pytest.mark.parametrize("line", ["seed: !!python/object/apply:os.getcwd []", "seed: [1", "seed: 1\nseed: 2"])
def test_a_file_that_is_no_plain_yaml_names_file_and_line(line: str, conf: Path, problems: Problems) -> None:
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{line}\n")
    assert re.search(r"conf/experiment/mine\.yaml:\d+:\d+: not valid YAML", problems("experiment=mine"))


def test_an_experiment_that_needs_an_unknown_option_says_which(conf: Path, problems: Problems) -> None:
    text = "# @package _global_\ndefaults:\n  - override /optimizer: adagrad\n"
    (conf / "experiment" / "mine.yaml").write_text(text)
    assert "optimizer/adagrad" in problems("experiment=mine")


def test_an_option_needs_no_line_in_the_table_to_be_typed(conf: Path, problems: Problems) -> None:
    with (conf / "loss" / "cross_entropy.yaml").open("a") as file:
        file.write("temperature: 0.5\nsmooth: true\nsteps: 3\nkind: plain\n")
    answer = problems("loss.temperature=hot", "loss.smooth=1", "loss.steps=0.5", "loss.kind=7")
    assert "loss.temperature: must be a number" in answer
    assert "loss.smooth: must be true or false" in answer
    assert "loss.steps: must be a whole number" in answer
    assert "loss.kind: must be text" in answer


# ------------------------------------------------------------------------------------------ _target_


@pytest.mark.parametrize(
    "target",
    ["torch.load", "os.system", "subprocess.run", "builtins.open", "pandas.read_pickle", "sympy.sympify",
     "ftlab", "torch.utils.collect_env.run", "torch.optim.x.os.system", "torch.optim", "ftlabx.Loss", "ftlab._x.Y", 5],
)  # fmt: skip
@pytest.mark.parametrize("place", ["{{_target_: {}}}", "{{_target_: {}, _partial_: true}}", "[1, [{{_target_: {}}}]]"])
def test_a_target_outside_the_allowlist_is_found_wherever_it_is(target: str, place: str) -> None:
    fine = "ftlab.losses.CrossEntropy"
    tree = yaml.safe_load(f"{{_target_: {fine}, b: {place.format(target)}}}")
    assert [f"{target!r} is not in the allowlist" in problem.problem for problem in forbidden(tree)] == [True]


@pytest.mark.parametrize(
    "override",
    ["loss._target_=os.system", "optimizer._target_=os.system", "logger.wandb.tags=[{_target_:os.system}]",
     "dataset.column_map.input={_target_:os.system}"],
)  # fmt: skip
def test_a_target_outside_the_allowlist_is_named_before_it_is_imported(override: str, problems: Problems) -> None:
    answer = problems("dataset=alpaca", override)
    assert "'os.system' is not in the allowlist: allowed are the classes of ftlab.{data," in answer


def test_a_target_by_interpolation_is_checked_too(problems: Problems) -> None:
    assert "'os.system' is not in the allowlist" in problems("run_name=os.system", "loss._target_=${run_name}")


@pytest.mark.parametrize("node", ["launcher", "sweeper"])
def test_hydras_own_targets_are_checked_too(node: str, problems: Problems) -> None:
    assert "'os.system' is not in the allowlist" in problems(f"hydra.{node}._target_=os.system")


def test_the_second_phase_names_a_class_that_is_not_there() -> None:
    with pytest.raises(ConfigErrors, match=r"ftlab\.losses has no CrossEntropi\n  try: ftlab\.losses\.CrossEntropy"):
        compose_config(["loss._target_=ftlab.losses.CrossEntropi"])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("z_los: 0.0", r"loss\.z_los: ftlab\.losses\.CrossEntropy takes no z_los; did you mean z_loss\?"),
        ("_partial_: false", r"loss\.z_loss: ftlab\.losses\.CrossEntropy needs it, and it is not given"),
    ],
)
def test_the_second_phase_binds_an_option_to_its_targets_signature(line: str, problem: str, conf: Path) -> None:
    given = [f"label_smoothing: 0.0\n{line}\n"] + (["z_loss: 0.0\n"] if "z_los:" in line else [])
    text = "_target_: ftlab.losses.CrossEntropy\n" + "".join(given)
    (conf / "loss" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigErrors, match=problem):
        compose_config(["loss=mine"])


# ------------------------------------------------------------------------------------ folders, sweeps


def test_a_folder_that_holds_a_run_is_refused_with_that_runs_name(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "llama_tiny", "id": "1a2b", "status": "completed"}))
    told = str(output_problem(str(tmp_path)))
    assert "already holds the run 'llama_tiny' (1a2b, completed)" in told
    assert f"try: paths.output_dir={tmp_path}_2, or to go on with that run: resume={tmp_path}" in told


@pytest.mark.parametrize("name", ["run 1", "it's", "0_seed=1"])
def test_what_to_type_about_a_folder_can_be_pasted(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text("{}")

    def fix_of(wrong: str) -> str | None:
        with pytest.raises(ConfigError) as caught:
            find_run(wrong, "resume")
        return caught.value.fix

    assert str(output_problem(str(folder))).endswith(override("resume", str(folder)))
    assert fix_of(f"{folder}0") == override("resume", str(folder))
    assert fix_of(f"{folder}@bset") == override("resume", f"{folder}@best")


def test_a_folder_that_cannot_be_written_is_refused_with_the_systems_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = str(output_problem(str(tmp_path / "file" / "run")))
    assert f"cannot write to {tmp_path}/file/run: Not a directory (ENOTDIR)" in told


def test_a_read_only_disk_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "Permission denied (EACCES)" in str(output_problem(str(tmp_path / "run")))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert "Read-only file system (EROFS)" in str(output_problem(str(tmp_path / "run")))


def test_a_name_that_is_too_long_for_a_folder_is_told_as_that(tmp_path: Path) -> None:
    assert "try: a shorter run_name, or paths.output_dir=" in str(output_problem(str(tmp_path / ("x" * 300))))


def test_a_sweep_is_checked_whole_before_its_first_job(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    with pytest.raises(ConfigErrors) as caught:
        check_command_line(["-m", "optimizer.lr=1e-3,-1,-2", "trainer.batch_size=8,0", f"paths.output_dir={folder}"])
    told = [(problem.key, problem.problem) for problem in caught.value.problems]
    assert [key for key, _ in told] == ["trainer.batch_size", "optimizer.lr", "optimizer.lr"]
    assert "got 0 [job 1: optimizer.lr=0.001 trainer.batch_size=0" in told[0][1]
    assert not folder.exists()


@pytest.mark.parametrize(
    ("swept", "told", "fix"),
    [
        ("seed=range(0,5,0)", "range(0,5,0) names no value", "seed='range(0,5)'"),
        ("seed=range(5,0)", "range(5,0) names no value", "seed='range(0,5)'"),
        ("seed=range(0,inf)", "range(0,inf) has no ends", "seed='range(0,5)'"),
        ("seed=1,2,1", "1,2,1 names 1 twice", "seed=1,2"),
        ("model=glob(zzz*)", "glob(zzz*) matches no option", "model='glob(*)'"),
        ("optimizer.lr=interval(0.1,1)", "is for a search", "hydra/sweeper=optuna optimizer.lr='interval(0.1,1)'"),
    ],
)
def test_a_sweep_over_what_makes_no_jobs_is_refused(swept: str, told: str, fix: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors) as caught:
        check_command_line(["-m", swept, f"paths.output_dir={tmp_path / 'sweep'}"])
    [problem] = caught.value.problems
    assert (problem.key, problem.fix) == (swept.partition("=")[0], fix)
    assert told in problem.problem
    assert not (tmp_path / "sweep").exists()


def test_a_bad_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors):
        check_command_line(["seed=-1", f"paths.output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()
