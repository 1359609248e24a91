"""Models that are found in a folder, through the whole of a run: trained, exported, gone on from, asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ftlab.cli import main as ftlab
from ftlab.config.check import compose_config
from ftlab.jobs import launch
from ftlab.lab.trained import open_trained
from tests.cli.conftest import QUIET, FinishedRun
from tests.unit.test_hf import saved

SHORT = ("trainer.max_steps=4", "trainer.epochs=null", "dataset.max_samples=40", "tokenizer=byte", "seq_len=512")
Train = Callable[..., FinishedRun]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    def run(name: str, *overrides: str) -> FinishedRun:
        config = compose_config([*QUIET, *SHORT, *overrides], output_dir=tmp_path / name)
        return FinishedRun(tmp_path / name, launch(config, own_process=False))

    return run


@pytest.mark.parametrize(("option", "kind"), [("auto", "qwen3"), ("hf", "qwen3"), ("hf", "gemma2")])
def test_a_folder_of_transformers_is_trained_and_opens_there_again(option, kind, tmp_path, train, capsys):
    saved(kind, tmp_path / "start", vocab_size=259, max_position_embeddings=512)
    ends = {"bos_token_id": 1, "eos_token_id": [70, 2, 71]}  # as instruction-tuned models have several
    (tmp_path / "start/generation_config.json").write_text(json.dumps(ends))
    run = train("first", f"model={option}", f"model.checkpoint={tmp_path / 'start'}", "optimizer.lr=1e-3")
    assert run.exit_code == 0
    assert run.json("run.json")["weights"] == {"checkpoint": str(tmp_path / "start"), "commit": None}
    opened = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    assert sum(parameter.numel() for parameter in opened.parameters()) == run.json("run.json")["n_params"]
    assert f"started from | `{tmp_path / 'start'}`" in (run.folder / "export/README.md").read_text()

    assert opened.generation_config.eos_token_id == [2, 70, 71]
    assert [open_trained(f"{run.folder}{step}").end_ids for step in ("", "@4")] == [[2, 70, 71]] * 2

    again = train("second", f"model={option}", f"model.checkpoint={run.folder / 'export'}")
    assert again.lines[0]["val/loss"] == pytest.approx(run.lines[-1]["val/loss"], rel=1e-6)

    assert ftlab(["generate", str(run.folder), "Is 348 even or odd?", "--max-new-tokens", "3"]) in (0, None)


def test_auto_and_hf_train_the_same_model_alike(tmp_path, train):
    saved("qwen3", tmp_path / "start", vocab_size=259, max_position_embeddings=512)
    losses = [
        train(option, f"model={option}", f"model.checkpoint={tmp_path / 'start'}").losses for option in ("auto", "hf")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_sequence_longer_than_the_folder_s_model_is_refused_with_both_numbers(tmp_path, train, caplog):
    saved("qwen3", tmp_path / "start", vocab_size=259)
    run = train("run", "model=auto", f"model.checkpoint={tmp_path / 'start'}")
    assert run.exit_code == 2
    assert "seq_len: 512 is more than the 64 tokens that the model reads" in caplog.text


def test_an_architecture_of_others_is_refused_by_name(tmp_path, train, caplog):
    saved("gpt_neox", tmp_path / "start", vocab_size=259)
    assert train("run", "model=auto", f"model.checkpoint={tmp_path / 'start'}").exit_code == 2
    assert "GPTNeoXForCausalLM" in caplog.text
    assert "model=hf" in caplog.text
