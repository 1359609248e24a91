"""What a deep model takes of memory is told by few of its blocks, to the byte where no heap is in between."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ftlab import forecast as forecasting
from ftlab.config.build import Config, build
from ftlab.config.check import compose_config
from ftlab.errors import FtlabError
from ftlab.forecast import Setting, forecast, forecast_up_to
from ftlab.models.config import ModelConfig
from ftlab.training import rehearse as rehearsing
from ftlab.training.rehearse import Rehearsal

SHAPE = ("model.dim=64", "model.n_heads=2", "model.ffn_hidden_dim=96")
SETTING = Setting(
    longest=96, longest_validation=80, rows=500, validation_rows=100, n_ranks=1, n_local_ranks=1, on_cuda=True
)
OPTIONS = {
    "model.vocab_size": ["500", "32000"],
    "model.tie_embeddings": ["true", "false"],
    "parallelism.activation_checkpointing": ["none", "selective", "full", "offload"],
    "precision": ["fp32", "bf16_mixed", "bf16", "fp16_mixed"],
    "optimizer": ["adamw", "sgd", "adafactor", "muon", "adamw_8bit", "schedule_free"],
    "loss": ["cross_entropy", "chunked_cross_entropy"],
    "trainer.batch_size": ["1", "3", "16"],
    "trainer.gradient_accumulation_steps": ["1", "4"],
}


def compared(overrides: list[str], setting: Setting) -> tuple[Rehearsal, Rehearsal]:
    """(by few blocks, of all blocks)."""
    sharded = setting.n_ranks > 1 and "parallelism=ddp" not in overrides
    config = compose_config([*SHAPE, f"model.n_layers={19 if sharded else 7}", *overrides])
    model: ModelConfig = build(config["model"])
    of_all = forecasting._rehearsed(config, model, setting)
    seen: list[int] = []

    def counting(config: Config, model: ModelConfig, setting: Setting, do=forecasting._rehearsed) -> Rehearsal:
        seen.append(model.n_layers)
        return do(config, model, setting)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(forecasting, "_rehearsed", counting)
        found = forecast(config, model, setting)
    assert max(seen) < model.n_layers
    return found, of_all


def assert_nearly_the_same(found: Rehearsal, of_all: Rehearsal) -> None:
    """But that within the optimizer's step a block's share may overtake the embedding's: then less is found."""
    kept = "weights", "gradients", "optimizer_state"
    assert [getattr(found, name) for name in kept] == [getattr(of_all, name) for name in kept]
    assert all(few <= many for (_, few), (_, many) in zip(found.stretches, of_all.stretches, strict=True))
    assert 0.99 * of_all.peak <= found.peak <= of_all.peak


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.vocab_size=500", "trainer.batch_size=16", "trainer.gradient_accumulation_steps=2"],
        # The logits are most of a shallow model, gradients of a deep one.
        ["model.vocab_size=32000", "trainer.batch_size=1", "parallelism.activation_checkpointing=full"],
        [
            *("model.vocab_size=500", "trainer.batch_size=3", "precision=bf16_mixed", "optimizer=sgd"),
            *("parallelism.activation_checkpointing=offload", "trainer.optimizer_in_backward=true"),
            "trainer.max_grad_norm=null",
        ],
    ],
)
def test_few_blocks_tell_all_stretches(overrides):
    found, of_all = compared(overrides, SETTING)
    assert found == of_all


@pytest.mark.parametrize("more", [[], pytest.param(["parallelism.cpu_offload=true"], marks=pytest.mark.slow)])
def test_few_sharded_blocks_do_too(more):
    overrides = ["parallelism=fsdp", *more, "model.vocab_size=500", "trainer.batch_size=3", "precision=bf16_mixed"]
    assert_nearly_the_same(*compared(overrides, replace(SETTING, n_ranks=4, n_local_ranks=2)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_options(seed):
    drawn, found = random.Random(seed), None
    while found is None:
        overrides = [f"{key}={drawn.choice(values)}" for key, values in OPTIONS.items()]
        if drawn.random() < 0.3:
            overrides += ["trainer.optimizer_in_backward=true", "trainer.max_grad_norm=null"]
        strategy = drawn.choice(["single", "ddp", "fsdp", "hsdp"])
        overrides.insert(0, f"parallelism={strategy}")
        if strategy in ("fsdp", "hsdp") and drawn.random() < 0.5:
            overrides.append("parallelism.cpu_offload=true")
        try:
            compose_config(overrides)
        except FtlabError:
            continue  # options that exclude each other
        ranks = {} if strategy == "single" else {"n_ranks": 4, "n_local_ranks": 2}
        found, of_all = compared(overrides, replace(SETTING, **ranks))
    assert_nearly_the_same(found, of_all)


def test_on_a_cpu_what_is_live_is_a_lower_bound():
    setting = replace(SETTING, on_cuda=False)
    config = compose_config([*SHAPE, "model.n_layers=7", "model.vocab_size=500", "trainer.batch_size=4"])
    model = build(config["model"])
    of_all, least = forecast(config, model, setting), forecast_up_to(0, config, model, setting)
    assert least.phases == of_all.phases
    assert least.peak == max(of_all.phases.values()) <= of_all.peak
    assert forecast_up_to(least.peak, config, model, setting) == of_all


def test_a_signal_in_a_rehearsal_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised in between, it would end the process where C++ asks a tensor without data for its size."""
    config = compose_config([*SHAPE, "model.n_layers=1", "model.vocab_size=64"])
    steps: list[bool] = []

    def interrupted(*arguments: Any, do: Callable[..., Any] = rehearsing.train_step) -> Any:
        signal.raise_signal(signal.SIGINT)
        steps.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
        return do(*arguments)

    monkeypatch.setattr(rehearsing, "train_step", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background find it ignored
    with pytest.raises(KeyboardInterrupt):
        forecasting._rehearsed(config, build(config["model"]), SETTING)
    assert steps == [False, False], "both steps were rehearsed"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
