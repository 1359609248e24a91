"""The model card: what stands in it, and that the Hub can read its header."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from ftlab.loggers.base import RunInfo
from ftlab.training.card import model_card
from ftlab.training.state import Progress

INFO = RunInfo(
    run_id="0a1b2c3d",
    first_step=0,
    logged_until=0,
    folder=Path("runs/x"), name="my run", config={"optimizer": {"lr": 2e-5}, "seq_len": 512, "seed": 0}, seed=0,
    total_steps=10, global_batch_size=8, model="2 blocks of 32", n_params=6_738_415_616,
    weights="meta-llama/Llama-2-7b-hf@main", dataset="tatsu-lab/alpaca", n_train_samples=52_002, n_val_samples=0,
    device="CPU", precision="float32 weights, bfloat16 arithmetic", next_commands=(),
)  # fmt: skip
PROGRESS = Progress(step=10, tokens=12_345)


def header(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_card_says_what_was_trained_on_what():
    card = model_card(INFO, PROGRESS, {"val/loss": 1.25}, commit="abc")
    for fact in ("6,738,415,616", "meta-llama/Llama-2-7b-hf@main` at commit abc", "tatsu-lab/alpaca", "52,002",
                 "10 steps of 8 sequences, 12,345 tokens", "| `optimizer.lr` | 2e-05 |", "| `seed` | 0 |",
                 "| validation loss | 1.2500 |"):  # fmt: skip
        assert fact in card
    assert header(card)["base_model"] == "meta-llama/Llama-2-7b-hf"


def test_a_base_model_is_named_to_the_hub_only_if_it_is_there():
    assert "base_model" not in header(model_card(INFO, PROGRESS, {}, commit=None))
    card = model_card(replace(INFO, weights=None), PROGRESS, {}, commit=None)
    assert "base_model" not in header(card)
    assert "random weights" in card
