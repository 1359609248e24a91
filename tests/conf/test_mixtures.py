"""A mixture's sets, chosen on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftlab.config.check import compose_config
from ftlab.config.explain import explain
from ftlab.errors import ConfigErrors


def sets_of(*overrides: str) -> dict[str, tuple[str, float]]:
    """Source and weight of every set."""
    dataset = compose_config(overrides)["dataset"]
    assert list(dataset["weights"]) == list(dataset["sets"])
    return {name: (node["source"], dataset["weights"][name]) for name, node in dataset["sets"].items()}


GSM8K, ALPACA = "openai/gsm8k", "tatsu-lab/alpaca"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["dataset.sets=[alpaca,gsm8k]"], {"alpaca": (ALPACA, 1.0), "gsm8k": (GSM8K, 1.0)}),
        (["dataset=mixture", "dataset.sets={gsm8k:3,alpaca:0.5}"], {"gsm8k": (GSM8K, 3), "alpaca": (ALPACA, 0.5)}),
        (
            ["dataset.sets=[alpaca,gsm8k]", "dataset.weights.gsm8k=7", "dataset.sets.alpaca.use_clean=true"],
            {"alpaca": ("yahma/alpaca-cleaned", 1.0), "gsm8k": (GSM8K, 7)},
        ),
        (  # as Hydra has it
            ["dataset=mixture", "+dataset@dataset.sets.math=gsm8k", "+dataset.weights.math=2"],
            {"a": ("tiny", 3.0), "b": ("tiny", 1.0), "math": (GSM8K, 2)},
        ),
        (["dataset=mixture", "dataset@dataset.sets.b=alpaca"], {"a": ("tiny", 3.0), "b": (ALPACA, 1.0)}),
        (["dataset=mixture"], {"a": ("tiny", 3.0), "b": ("tiny", 1.0)}),
    ],
)
def test_sets_and_weights_are_those_that_were_named(
    overrides: list[str], expected: dict[str, tuple[str, float]]
) -> None:
    assert sets_of(*overrides) == expected


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["dataset.sets=[alpca,gsm8k]"], r"dataset: has no option 'alpca'.*\n.*try: dataset\.sets=\[alpaca\]"),
        (["dataset=alpaca", "dataset.sets=[gsm8k]"], r"goes with dataset=mixture, not dataset=alpaca"),
        (["dataset.sets=[]"], "names no sets to mix"),
        (["dataset.sets=[mixture,alpaca]"], "names no sets to mix"),
        (["dataset.sets=[alpaca,alpaca]"], "names alpaca twice"),
        (["dataset.sets=[alpaca]", "dataset.sets=[gsm8k]"], "is chosen twice"),
        (["dataset.sets={alpaca:none_such}"], r"dataset\.weights\.alpaca"),
        (["dataset.sets={alpaca:-1}"], r"dataset\.weights\.alpaca"),
        (["dataset.sets=[alpaca,gsm8k]", "dataset.weights.gsm9k=2"], r"unknown key; did you mean dataset\.weights"),
        (["dataset.sets=[alpaca]", "dataset.sets.gsm8k.max_samples=2"], r"dataset\.sets\.gsm8k\.max_samples: unknown"),
        (["dataset=mixture", "+dataset@dataset.sets.math=gsm8k"], r"dataset\.weights.*math"),
    ],
)
def test_what_is_no_choice_is_told(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigErrors, match=told):
        compose_config(overrides)


def test_every_value_says_where_it_is_from() -> None:
    assert "conf/dataset/gsm8k.yaml" in explain("dataset.sets.gsm8k.source", ["dataset.sets=[gsm8k]"])
    assert "command line" in explain("dataset.weights.gsm8k", ["dataset.sets={gsm8k:2}"])


def test_a_run_takes_them(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [
        *(sys.executable, str(root / "train.py"), "dataset.sets={tiny:1}", "dataset.sets.tiny.max_samples=20"),
        *("model.dim=16", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=2", "trainer.max_steps=1"),
        *("trainer.epochs=null", "logger=[jsonl]", "checkpoint.export=false", "evaluation.max_batches=1"),
        *("evaluation.n_samples=0", f"hydra.run.dir={tmp_path / 'run'}", "device=cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert {name: one["weight"] for name, one in report["sets"].items()} == {"tiny": 1}
