"""What a checkpoint costs: synchronous and asynchronous saves, hashing, and `dd` with the same bytes for comparison.

    python benchmarks/checkpoint.py [--gib 1.0] [--folder /where/checkpoints/go] [--repeat 5]

Medians of interleaved repetitions, as ratios: a shared disk is noisy. The stall is what the loop waits; the rest of an
asynchronous save goes on beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ftlab.distributed.env import keep_freed_memory
from ftlab.distributed.single import OneRank
from ftlab.storage import disk
from ftlab.storage.checkpoints import Checkpoints
from ftlab.training.checkpoint import CheckpointConfig, Checkpointer, Identity
from ftlab.training.guard import StepGuard
from ftlab.training.state import TrainState

IDENTITY = Identity(run="benchmark", config={}, config_hash="", data="", tokenizer="", end_ids=[], global_batch_size=1)


class Weights(nn.Module):
    """So many bytes of weights in matrices of 16 MiB."""

    def __init__(self, n_bytes: int):
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(1024, 4096) for _ in range(max(1, n_bytes // (16 * 2**20))))


def state_of(gib: float) -> TrainState:
    """A training state of ``gib``: a third weights, two thirds Adam's moments."""
    model = Weights(int(gib * 2**30 / 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainState(
        model=model,  # type: ignore[arg-type]
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        scaler=scaler,
        guard=StepGuard(optimizer, scaler, OneRank(torch.device("cpu")), max_skipped=0, spike_sigma=None),
    )


def checkpointer(state: TrainState, folder: Path, *, background: bool) -> Checkpointer:
    config = CheckpointConfig(
        every_steps=1, every_minutes=None, every_epoch=False, at_end=False, async_=background, keep_last=1, keep_best=0,
        export=False,
    )  # fmt: skip
    made = Checkpointer(
        config, Checkpoints(folder / "checkpoints"), state, OneRank(torch.device("cpu")), IDENTITY,
        metric=("val/loss", True), parent=None, place=lambda _: {},
    )  # fmt: skip
    made.prepare()
    return made


class NoHash:
    """In place of sha256, to see what it costs."""

    def __init__(self, _: object = b""):
        pass

    def update(self, _: object) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 64


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def dd(folder: Path, n_bytes: int) -> float:
    """Seconds that ``dd conv=fsync`` takes for as many bytes, from a file that is in memory."""
    source, target = folder / "source", folder / "target"
    if not source.exists():
        source.write_bytes(torch.randint(0, 255, (n_bytes,), dtype=torch.uint8).numpy().tobytes())
    source.read_bytes()
    took = seconds(
        lambda: subprocess.run(
            ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync"], check=True, capture_output=True
        )
    )
    target.unlink()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    folder = Path(tempfile.mkdtemp(prefix="ftlab-", dir=arguments.folder))
    took: defaultdict[str, list[float]] = defaultdict(list)
    try:
        state = state_of(arguments.gib)
        for name in ("sync", "unhashed", "async"):
            (folder / name).mkdir()
        sync = checkpointer(state, folder / "sync", background=False)
        unhashed = checkpointer(state, folder / "unhashed", background=False)
        background = checkpointer(state, folder / "async", background=True)
        sha256 = hashlib.sha256
        for step in range(1, arguments.repeat + 2):
            state.progress.step = step
            took["sync"].append(seconds(lambda: sync.save({})))
            n_bytes = sum(path.stat().st_size for path in (folder / "sync").rglob("*") if path.is_file())
            setattr(disk.hashlib, "sha256", NoHash)  # noqa: B010 -- types know better
            took["without hashing"].append(seconds(lambda: unhashed.save({})))
            setattr(disk.hashlib, "sha256", sha256)  # noqa: B010
            took["async, stall"].append(seconds(lambda: background.save({})))
            took["async, the rest"].append(seconds(background.wait))
            took["dd conv=fsync"].append(dd(folder, n_bytes))
        # The first round allocates what the others use again.
        median = {name: statistics.median(times[1:]) for name, times in took.items()}
        first = {f"{name}, first": times[0] for name, times in took.items()}
        ratios = {
            "sync / dd": median["sync"] / median["dd conv=fsync"],
            "hashing": median["sync"] / median["without hashing"] - 1,
            "async stall / sync": median["async, stall"] / median["sync"],
        }
        print(json.dumps({"bytes": n_bytes, "seconds": median | first, "ratios": ratios}, indent=2))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
