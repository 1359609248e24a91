"""The main job as a user meets it: options, folders, seeds, answers, endings."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab.cli import main as ftlab
from ftlab.config.check import compose_config
from ftlab.models.transformer import ModelConfig
from ftlab.models.weights import load_weights
from tests.conftest import ROOT

FIVE = "trainer.max_steps=5"


LIBRARY = {"schedule_free": "schedulefree", "fp8": "torchao"}  # of options that need one of an extra


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("option", options("optimizer"))
def test_every_optimizer_lowers_the_loss_on_the_toy_task(option, tiny_run):
    if option in LIBRARY:
        pytest.importorskip(LIBRARY[option])
    schedule = ["scheduler=constant"] if option == "schedule_free" else []
    losses = tiny_run(f"optimizer={option}", "trainer.max_steps=20", "evaluation.at_start=false", *schedule).losses
    assert losses[-1] < 0.9 * losses[0], f"optimizer={option}: {losses[0]:.3f} -> {losses[-1]:.3f}"


@pytest.mark.parametrize("option", options("scheduler"))
def test_every_scheduler_warms_up_and_sets_the_learning_rate_that_is_logged(option, tiny_run):
    run = tiny_run(f"scheduler={option}", "scheduler.warmup_steps=2", "optimizer.lr=0.01", FIVE)
    rates = [line["train/lr"] for line in run.lines if "train/lr" in line]
    assert rates[:2] == pytest.approx([0.005, 0.01])


@pytest.mark.parametrize("option", options("precision"))
def test_every_precision_trains(option, tiny_run):
    if option in LIBRARY:
        pytest.importorskip(LIBRARY[option])
    here = ["precision.emulated=true"] if option == "fp8" else []  # else a GPU of its own kind
    run = tiny_run(f"precision={option}", "trainer.max_steps=20", *here)
    assert run.exit_code == 0
    assert run.losses[-1] < 0.9 * run.losses[0]


def test_the_run_folder_holds_what_the_contract_says(tiny_run):
    run = tiny_run(FIVE, "seed=null")
    names = {path.name for path in run.folder.iterdir()}
    assert names >= {"config.yaml", "run.json", "metrics.jsonl", "train.log", "plots", "samples.jsonl", "export"}
    assert names >= {"data_report.json"}
    record = run.json("run.json")
    assert record["status"] == "completed"
    assert record["progress"]["step"] == 5
    assert record["progress"]["samples"] == 40
    assert record["n_params"] == sum(t.numel() for t in load_file(run.folder / "export/model.safetensors").values())
    assert isinstance(record["seed"], int), "a seed that was drawn is recorded"
    assert yaml.safe_load((run.folder / "config.yaml").read_text())["seed"] == record["seed"]
    assert {path.name for path in (run.folder / "plots").iterdir()} == {"loss.png", "lr.png", "throughput.png"}
    training, validation = run.lines[1], run.lines[0]
    assert set(training) >= {
        "step", "epoch", "tokens", "train/loss", "train/lr", "train/grad_norm",
        "perf/tokens_per_s", "perf/mfu", "perf/data_wait_frac", "memory/peak_gib",
    }  # fmt: skip
    assert validation["val/perplexity"] == pytest.approx(math.exp(validation["val/loss"]))


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(tiny_run):
    first, again, other = (tiny_run(FIVE, f"seed={seed}", name=name) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.losses == again.losses
    weights, same = (load_file(run.folder / "export/model.safetensors") for run in (first, again))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert first.losses != other.losses


def test_the_export_opens_in_transformers_with_our_logits_and_token_ids(tiny_run):
    export = tiny_run(FIVE).folder / "export"
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    config = compose_config(["model.dim=32", "model.n_layers=1", "model.ffn_hidden_dim=64"])["model"]
    config.pop("_target_")
    ours = ModelConfig(**config | {"vocab_size": theirs.config.vocab_size}).build()
    load_weights(ours, export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokens = torch.tensor([tokenizer("### Instruction:\nIs 348 even or odd?")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_an_exported_folder_is_a_checkpoint_to_go_on_from(tiny_run):
    first = tiny_run("trainer.max_steps=20")
    export = first.folder / "export"
    second = tiny_run("trainer.max_steps=1", f"model.checkpoint={export}", f"tokenizer.path={export}", name="second")
    assert second.lines[0]["val/loss"] == pytest.approx(first.lines[-1]["val/loss"], rel=1e-6)
    assert yaml.safe_load((second.folder / "config.yaml").read_text())["optimizer"]["lr"] == 2e-5


def test_a_tokenizer_of_another_size_than_the_weights_is_refused_with_both_numbers(tiny_run, capsys):
    export = tiny_run("trainer.max_steps=1").folder / "export"
    run = tiny_run(f"model.checkpoint={export}", "model.vocab_size=640", "tokenizer=byte", name="second")
    assert run.exit_code == 2
    assert re.search(r"259 tokens.* 640", run.json("run.json")["error"]["message"])


def test_ftlab_generate_answers_from_the_folder_alone(tiny_run, capsys):
    folder = tiny_run("trainer.max_steps=1").folder
    capsys.readouterr()
    assert ftlab(["generate", str(folder), "Is 348 even or odd?", "--max-new-tokens", "5"]) == 0
    greedy = capsys.readouterr().out
    assert ftlab(["generate", str(folder), "Is 348 even or odd?", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == greedy
    sampled = ["--max-new-tokens", "5", "--temperature", "5", "--seed", "3"]
    assert ftlab(["generate", str(folder), "Is 348 even or odd?", *sampled]) == 0
    assert capsys.readouterr().out != greedy


def test_ftlab_generate_says_what_is_wrong_with_a_folder(tmp_path, capsys):
    assert ftlab(["generate", str(tmp_path), "hello"]) == 2
    assert "is no run's folder" in capsys.readouterr().err


def test_what_a_verb_says_to_try_is_what_a_verb_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ftlab(["generate", "latest", "hi"]) == 2
    assert capsys.readouterr().err.endswith("\n  try: python train.py, which makes a run\n")
    run = tmp_path / "outputs" / "one"
    (run / "checkpoints" / "step_00000003").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "checkpoints" / "step_00000003" / "MANIFEST.json").touch()
    for words in (["generate", "outputs/one@7", "hi"], ["export", "outputs/one@7", "out"]):
        assert ftlab(words) == 2
        assert capsys.readouterr().err.endswith(f"\n  try: {run}@3\n")


@pytest.mark.parametrize(
    ("keeps", "following"),
    [((), "ftlab generate"), (("export=false",), "ftlab export"), (("export=false", "at_end=false"), None)],
)
def test_a_run_ends_with_a_command_that_works(tiny_run, capsys, keeps, following):
    tiny_run("trainer.max_steps=1", "evaluation.n_samples=0", *(f"checkpoint.{kept}" for kept in keeps))
    said = capsys.readouterr().out
    commands = [command for command in ("ftlab generate", "ftlab export") if command in said]
    assert commands == ([following] if following else [])


def test_a_run_that_goes_bad_says_so_in_its_folder_and_names_step_and_samples(tiny_run):
    run = tiny_run("optimizer=sgd", "optimizer.lr=1e30", "trainer.max_grad_norm=null", "trainer.max_steps=20")
    assert run.exit_code == 3
    record = run.json("run.json")
    assert record["status"] == "failed"
    assert record["error"]["type"] == "NonFiniteError"
    assert re.search(r"step \d+: loss is .*samples of this step", record["error"]["message"], re.DOTALL)
    assert not (run.folder / "export").exists()


def test_bad_rows_are_named_before_any_weights_are_made(tiny_run, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c"}]')
    run = tiny_run("dataset=alpaca", "dataset.source=json", f"dataset.data_files={tmp_path / 'rows.json'}")
    assert run.exit_code == 2
    assert run.json("run.json")["status"] == "failed"
    assert "row 1" in run.json("run.json")["error"]["message"]


def test_real_rows_train_each_exactly_once(shared_data: Path, tiny_run):
    run = tiny_run(
        "tokenizer=sentencepiece",
        f"tokenizer.path={shared_data / 'llama2_tokenizer.model'}",
        "dataset=alpaca",
        "dataset.source=json",
        f"dataset.data_files={shared_data / 'alpaca_en_demo.json'}",
        "dataset.max_samples=24",
        "dataset.val_fraction=0.2",
        "seq_len=128",
        "trainer.epochs=1",
        "evaluation.n_samples=2",
    )
    report = run.json("data_report.json")
    assert report["train"]["rows"] + report["validation"]["rows"] == 24
    assert run.json("run.json")["progress"]["samples"] == report["train"]["rows"]
    assert run.losses[0] == pytest.approx(math.log(32000), abs=0.3)
    assert run.losses[-1] < run.losses[0]
