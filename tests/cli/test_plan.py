"""``ftlab plan`` against what then runs: counts to the last token, memory as measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ftlab.cli import main as ftlab
from ftlab.lab.plan import Given, plan
from tests.cli.conftest import SMALL
from tests.conftest import ROOT
from tests.unit.test_transformer import PUBLISHED

QUICK = ("checkpoint.export=false", "evaluation.at_start=false", "evaluation.n_samples=0", "evaluation.max_batches=1")
TWO_RANKS = ("parallelism.nproc_per_node=2",)


QUICKLY_PLANNED = ("llama2_7b", "llama3_2_1b", "qwen3_0_6b", "smollm2_135m")


@pytest.mark.parametrize(
    "option",
    [option if option in QUICKLY_PLANNED else pytest.param(option, marks=pytest.mark.slow) for option in PUBLISHED],
)
def test_parameters_are_the_published_ones(option):
    found = plan([f"model={option}", "seq_len=64", "trainer.batch_size=1", "optimizer=sgd"], Given(memory_gib=1e6))
    assert found["model"]["parameters"] == PUBLISHED[option]


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.epochs=1",),
        ("trainer.epochs=3", "trainer.batch_size=7"),
        ("trainer.epochs=2", "trainer.gradient_accumulation_steps=3", "trainer.batch_size=4"),
        ("trainer.max_steps=7", "trainer.batch_size=16"),
        ("trainer.epochs=2", "trainer.max_steps_per_epoch=2", "seed=3"),
        ("trainer.epochs=2", "trainer.global_batch_size=24", "dataset.shuffle=false", "seq_len=60"),
        ("trainer.epochs=2", "trainer.batch_size=3", "parallelism=ddp", *TWO_RANKS),
        ("trainer.epochs=1", "trainer.global_batch_size=12", "trainer.batch_size=2", "parallelism=fsdp", *TWO_RANKS),
    ],
    ids=" ".join,
)
def test_steps_samples_and_tokens_are_those_that_ran(tiny_run, overrides):
    planned = plan([*SMALL, *QUICK, *overrides], Given())["run"]
    progress = tiny_run(*QUICK, *overrides).json("run.json")["progress"]
    assert planned["source"] == "data"
    assert {key: planned[f"{key}s"] for key in ("step",)} == {"step": progress["step"]}
    assert {key: planned[key] for key in ("samples", "tokens", "target_tokens")} == {
        key: progress[key] for key in ("samples", "tokens", "target_tokens")
    }


def test_without_data_the_counts_follow_from_the_numbers_given():
    overrides = ["model=llama2_7b", "model.n_layers=1", "trainer.batch_size=8", "trainer.epochs=3", "seq_len=128"]
    found = plan(overrides, Given(rows=100, row_tokens=50, tokens_per_s=1000, price_per_hour=2, memory_gib=1e6))
    assert found["run"]["source"] == "given"
    assert (found["run"]["steps"], found["run"]["samples"], found["run"]["tokens"]) == (39, 300, 15_000)
    assert found["cost"] == pytest.approx(
        {"tokens_per_s": 1000, "hours": 15 / 3600, "device_hours": 15 / 3600, "price": 30 / 3600}
    )


def test_throughput_can_be_that_of_a_run(tiny_run, capsys):
    run = tiny_run("trainer.max_steps=3", *QUICK)
    measured = run.json("run.json")["metrics"]["perf/tokens_per_s"]
    capsys.readouterr()
    assert ftlab(["plan", *SMALL, "--tokens-per-s", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cost"]["tokens_per_s"] == measured
    assert found["cost"]["hours"] == pytest.approx(found["run"]["tokens"] / measured / 3600)


def test_the_smallest_change_makes_it_fit(capsys):
    overrides = ["model.n_layers=8", "model.dim=256", "model.n_heads=4", "trainer.batch_size=8"]
    roomy = plan(overrides, Given(memory_gib=100))["memory"]
    assert roomy["fits"]
    assert roomy["smallest_change"] is None
    tight = plan(overrides, Given(memory_gib=0.8 * roomy["peak_gib"]))["memory"]
    assert not tight["fits"]
    changed = plan([*overrides, *tight["smallest_change"]], Given(memory_gib=0.8 * roomy["peak_gib"]))["memory"]
    assert changed["fits"]
    assert ftlab(["plan", *overrides, "--memory-gib", str(0.8 * roomy["peak_gib"])]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_the_table_and_the_json_say_the_same(capsys):
    assert ftlab(["plan", *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert ftlab(["plan", *SMALL]) == 0
    table = capsys.readouterr().out
    for value in (found["model"]["parameters"], found["run"]["steps"], found["run"]["tokens"]):
        assert f"{value:,}" in table
    assert "counted on" in table
    assert "the rows themselves" in table


def test_a_run_that_clearly_cannot_fit_is_refused_before_its_weights_are_made(tiny_run, monkeypatch):
    monkeypatch.setattr("ftlab.assembly.memory.available_bytes", lambda *_: 2**20)
    monkeypatch.setattr("ftlab.assembly.run.build_model", lambda *_, **__: pytest.fail("weights were made"))
    run = tiny_run("trainer.max_steps=1")
    assert run.exit_code == 2
    message = run.json("run.json")["error"]["message"]
    assert "GiB (weights" in message
    assert "optimizer state" in message
    assert "available" in message
    assert len(message.splitlines()) <= 3


HSDP = ("parallelism=hsdp", "parallelism.replicate_degree=2", *TWO_RANKS)


@pytest.mark.parametrize("parallelism", [(), HSDP], ids=["single", "hsdp"])
def test_every_run_records_what_was_predicted_and_measured(tiny_run, parallelism):
    memory = tiny_run("trainer.max_steps=1", *parallelism).json("run.json")["memory"]
    assert memory["predicted_peak_gib"] > 0
    assert memory["measured_peak_gib"] >= 0


WIDE = ("model.dim=512", "model.n_layers=8", "model.n_heads=8", "model.ffn_hidden_dim=1344")
NARROW = ("model.dim=256", "model.n_layers=6", "model.n_heads=4", "model.ffn_hidden_dim=688")
CONFIGURATIONS = {
    "adamw, fp32": (*WIDE, "tokenizer=byte", "trainer.batch_size=4"),
    "sgd, bf16_mixed": (*WIDE, "tokenizer=byte", "trainer.batch_size=4", "optimizer=sgd", "precision=bf16_mixed"),
    "adamw, bf16": (*WIDE, "tokenizer=byte", "trainer.batch_size=4", "precision=bf16"),
    "full recomputation": (
        *("model.dim=768", "model.n_layers=8", "model.n_heads=12", "model.ffn_hidden_dim=2048", "tokenizer=byte"),
        *("trainer.batch_size=4", "parallelism.activation_checkpointing=full"),
    ),
    "packed rows": (*WIDE, "tokenizer=byte", "trainer.batch_size=2", "dataset.packing=best_fit"),
    "32,000 tokens, chunked": (
        *NARROW,
        *("tokenizer=sentencepiece", "tokenizer.path={shared}/llama2_tokenizer.model", "seq_len=256"),
        *("trainer.batch_size=4", "loss=chunked_cross_entropy"),
    ),
    "fsdp": (*WIDE, "tokenizer=byte", "trainer.batch_size=2", "parallelism=fsdp", *TWO_RANKS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_predicted_peak_memory_is_within_ten_percent_of_the_measured(name, shared_data, tmp_path):
    overrides = [override.format(shared=shared_data) for override in CONFIGURATIONS[name]]
    command = [
        *(sys.executable, "train.py", "logger=[jsonl]", f"hydra.run.dir={tmp_path / 'run'}", "checkpoint.export=false"),
        *("dataset=alpaca", "dataset.source=json", f"dataset.data_files={shared_data / 'alpaca_en_demo.json'}"),
        *("dataset.max_samples=24", "dataset.val_fraction=0", "trainer.epochs=1", *overrides),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    memory = json.loads((tmp_path / "run" / "run.json").read_text())["memory"]
    assert memory["predicted_peak_gib"] == pytest.approx(memory["measured_peak_gib"], rel=0.1)
