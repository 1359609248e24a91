"""Who wins: option file < train.yaml < experiment < sweep < local < debug < command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlab.config.compose import compose

KEY = "trainer.log_every_steps"
LEVELS = ["option file", "train.yaml", "experiment", "sweep", "local", "debug", "command line"]


@pytest.mark.parametrize("winner", range(len(LEVELS)), ids=LEVELS)
def test_the_last_level_that_speaks_wins(winner: int, conf: Path) -> None:
    """Level i gives the key the value 10 + i; levels above the winner are silent."""
    overrides = []
    for level, name in list(enumerate(LEVELS))[: winner + 1]:
        text = f"# @package _global_\ntrainer:\n  log_every_steps: {10 + level}\n"
        match name:
            case "option file":
                option = conf / "trainer" / "default.yaml"
                option.write_text(option.read_text().replace("log_every_steps: 1 ", f"log_every_steps: {10 + level} "))
            case "train.yaml":
                with (conf / "train.yaml").open("a") as file:
                    file.write(text.partition("\n")[2])
            case "local":
                (conf / "local").mkdir()
                (conf / "local" / "default.yaml").write_text(text)
            case "experiment" | "sweep" | "debug":
                (conf / name / "mine.yaml").write_text(text)
                overrides.append(f"{name}=mine")
            case "command line":
                overrides.append(f"{KEY}={10 + level}")
    composition = compose(overrides)
    assert composition.problems == []
    assert composition.cfg.trainer.log_every_steps == 10 + winner
    assert [setting.value for setting in composition.history(KEY)] == [10 + level for level in range(winner + 1)]


def test_an_option_on_the_command_line_beats_the_experiments_choice(conf: Path) -> None:
    (conf / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults:\n  - override /optimizer: sgd\n")
    assert "SGD" in compose(["experiment=mine"]).cfg.optimizer._target_
    assert "AdamW" in compose(["experiment=mine", "optimizer=adamw"]).cfg.optimizer._target_


def test_a_model_picks_its_tokenizer_and_the_command_line_picks_another() -> None:
    assert "SentencePiece" in compose(["model=llama2_7b"]).cfg.tokenizer._target_
    assert "Byte" in compose(["model=llama2_7b", "tokenizer=byte"]).cfg.tokenizer._target_


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["trainer.max_steps=5"], "epochs", None),
        ([], "epochs", 3),
        (["trainer.global_batch_size=32"], "gradient_accumulation_steps", None),
        ([], "gradient_accumulation_steps", 1),
    ],
)
def test_a_default_steps_aside_for_what_replaces_it(overrides: list[str], key: str, value: object) -> None:
    assert compose(overrides).cfg.trainer[key] == value


def test_the_learning_rate_follows_the_weights() -> None:
    random, pretrained = (compose([f"model.checkpoint={name}"]).cfg.optimizer.lr for name in ("null", "a/b"))
    assert isinstance(pretrained, float)
    assert pretrained == 2e-5 < random
