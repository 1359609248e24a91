"""``trainer.share_prefixes=true`` from the command line: the same training, to the bit after a resume."""

from __future__ import annotations

import pytest

from ftlab.errors import ConfigErrors

ROWS = "loss=chunked_cross_entropy", "dataset.val_fraction=0", "scheduler=constant", "trainer.max_steps=6"


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_a_run_trains_as_without_and_goes_on_with_the_same_bits(tiny_run, packing):
    rows = *ROWS, f"dataset.packing={packing}"
    plain = tiny_run(*rows, name="plain")
    shared = tiny_run(*rows, "trainer.share_prefixes=true", name="shared")
    assert plain.exit_code == shared.exit_code == 0
    assert shared.losses == pytest.approx(plain.losses, rel=1e-5)
    meters = [[line for line in run.lines if "train/loss" in line] for run in (shared, plain)]
    for line, other in zip(*meters, strict=True):
        assert line["perf/shared_frac"] > 0.1
        assert "perf/shared_frac" not in other
        assert line["tokens"] == other["tokens"]

    stopped = tiny_run(*rows, "trainer.share_prefixes=true", "trainer.max_steps=3", name="stopped")
    assert stopped.exit_code == 0
    assert stopped.go_on("trainer.max_steps=6") == 0
    assert stopped.losses == shared.losses


def test_a_model_of_transformers_is_refused_before_anything_is_read(tiny_run):
    with pytest.raises(ConfigErrors, match=r"trainer\.share_prefixes: true, but model=hf computes every row whole"):
        tiny_run("model=hf", "model.checkpoint=nowhere", "trainer.share_prefixes=true")
