"""Every sample once an epoch, by the ranks' own notes, though the job was killed and went on with other ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ftlab.lab.replay import replay
from ftlab.training.ledger import seen_at, seen_in
from tests.faults.acts import KillAt
from tests.faults.harness import Folder

N_ROWS, EPOCHS = 40, 3
COMMON = (
    *("dataset.val_fraction=0", f"dataset.max_samples={N_ROWS}", "trainer.max_steps=null", f"trainer.epochs={EPOCHS}"),
    *("trainer.batch_size=1", "trainer.gradient_accumulation_steps=null", "trainer.global_batch_size=8"),
    "checkpoint.every_steps=3",
)
STREAM = (
    *("dataset.streaming=true", "dataset.window_rows=15", "trainer.epochs=null", "trainer.max_steps=15"),
    "dataset.val_fraction=0",
)
PACKED = ("dataset.packing=best_fit", "seq_len=192", "trainer.global_batch_size=4")


def ranks(n: int) -> tuple[str, ...]:
    return ("parallelism=ddp", f"parallelism.nproc_per_node={n}")


@pytest.mark.parametrize(
    ("before", "after", "data"),
    [
        pytest.param(2, 1, (), id="2-then-1"),
        pytest.param(2, 1, STREAM, id="2-then-1-stream"),
        pytest.param(4, 2, (), id="4-then-2", marks=pytest.mark.slow),
        pytest.param(4, 2, STREAM, id="4-then-2-stream", marks=pytest.mark.slow),
        pytest.param(1, 4, STREAM, id="1-then-4-stream", marks=pytest.mark.slow),
        pytest.param(4, 2, PACKED, id="4-then-2-packs", marks=pytest.mark.slow),
    ],
)
def test_each_sample_is_seen_once_an_epoch_over_a_kill_and_other_ranks(
    tmp_path: Path, before: int, after: int, data: tuple[str, ...]
) -> None:
    cache = f"paths.cache_dir={tmp_path / 'cache'}"
    straight = Folder(tmp_path / "straight", *COMMON, cache, *ranks(before), *data, n_ranks=before)
    straight.train(whole=True, noise=False)
    folder = Folder(tmp_path / "killed", *COMMON, cache, *ranks(before), *data, n_ranks=before)
    total = straight.record()["progress"]["step"]
    with folder.interrupt(
        KillAt(before - 1, "step", 7), whole=True, noise=False
    ) as trial:  # in the second epoch, of five steps
        trial.end()
    assert folder.begun
    folder.n_ranks, folder.overrides = after, (*COMMON, cache, *ranks(after), *data)
    folder.train(whole=True, noise=False)

    assert len({path.name for path in (folder.run / "ledger").glob("rank*.txt")}) == max(before, after)
    for epoch in range(EPOCHS):
        assert Counter(seen_in(folder.run / "ledger", epoch)) == Counter(range(N_ROWS)), f"epoch {epoch}"
    proofs = [json.loads(line) for line in (folder.run / "ledger" / "epochs.jsonl").read_text().splitlines()]
    assert [(p["epoch"], p["samples"], p["each_once"]) for p in proofs] == [(e, N_ROWS, True) for e in range(EPOCHS)]
    for step in range(1, total + 1):
        noted, alone = (seen_at(run / "ledger", step) for run in (folder.run, straight.run))
        assert sorted(i for ids in noted.values() for i in ids) == sorted(i for ids in alone.values() for i in ids)
        replayed = replay(folder.run, step)
        assert replayed.as_noted, f"step {step}: {replayed.noted}"
        assert replayed.same_data
    assert folder.losses() == pytest.approx(straight.losses(), rel=1e-5)
    assert [line["epoch"] for line in folder.metrics()] == [line["epoch"] for line in straight.metrics()]
