"""explain: the value, who set it, what that shadowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlab.config.explain import explain
from ftlab.errors import ConfigError


def test_a_default_is_told_with_its_file_line_and_expression(conf: Path) -> None:
    lines = (conf / "trainer" / "default.yaml").read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("epochs:"))
    first, second = explain("trainer.epochs").splitlines()
    assert first == "trainer.epochs = 3"
    assert second.split() == ["set", "by", f"conf/trainer/default.yaml:{number}", "${ftlab.unless:${.max_steps},3}"]


def test_everyone_who_spoke_is_told_strongest_first(conf: Path) -> None:
    for level in ("experiment", "debug"):
        (conf / level / "mine.yaml").write_text(f"# @package _global_\nrun_name: {level}\n")
    told = explain("run_name", ["experiment=mine", "debug=mine", "run_name=typed"]).splitlines()
    assert told[0] == "run_name = typed"
    assert "set by   command line: run_name=typed" in told[1]
    assert [line.split()[1].partition(":")[0] for line in told[2:]] == [
        "conf/debug/mine.yaml",
        "conf/experiment/mine.yaml",
        "conf/train.yaml",
    ]


def test_a_bases_value_is_told_as_shadowed(conf: Path) -> None:
    (conf / "optimizer" / "mine.yaml").write_text("defaults:\n  - sgd\n  - _self_\nmomentum: 0.9\n")
    told = explain("optimizer.momentum", ["optimizer=mine"]).splitlines()
    assert told[0] == "optimizer.momentum = 0.9"
    assert "conf/optimizer/mine.yaml:4" in told[1]
    assert "shadows  conf/optimizer/sgd.yaml:" in told[2]


def test_an_element_set_by_its_index_is_told(conf: Path) -> None:
    told = explain("optimizer.betas", ["optimizer.betas.0=0.8"]).splitlines()
    assert told[0].startswith("optimizer.betas = [0.8,")
    assert "command line: optimizer.betas.0=0.8" in told[1]


def test_a_group_is_told_key_by_key() -> None:
    told = explain("trainer", ["trainer.batch_size=2"])
    assert "trainer.batch_size = 2" in told
    assert "trainer.max_grad_norm = 1.0" in told


def test_an_unknown_key_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lrr: unknown key; did you mean optimizer\.lr\?"):
        explain("optimizer.lrr")


def test_a_secret_is_not_told() -> None:
    assert "hunter22" not in explain("model.checkpoint", ["model.checkpoint='https://me:hunter22@host/x'"])
