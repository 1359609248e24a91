"""TensorBoard's files against metrics.jsonl, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlab.loggers.base import RunInfo
from ftlab.loggers.jsonl import JsonlLogger

pytest.importorskip("tensorboard")
from ftlab.loggers.tensorboard import TensorBoardLogger


def session(folder: Path, steps: range, scale: float = 1.0) -> None:
    facts: dict[str, Any] = dict.fromkeys(RunInfo.__dataclass_fields__) | {
        "folder": folder,
        "first_step": steps.start - 1,
        "config": {"optimizer": {"lr": 1e-3}},
    }
    loggers = [JsonlLogger(), TensorBoardLogger()]
    for logger in loggers:
        logger.start(RunInfo(**facts))
        for step in steps:
            logger.log({"train/loss": scale / step, "perf/tokens_per_s": 1e4 + step}, step)
            if step % 4 == 0:
                logger.log({"val/loss": scale / step + 1e-9}, step)
        logger.log_samples([{"prompt": "2+2?", "generated": "4"}], steps[-1])
        logger.finish("completed", {}, [])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    names = [tag for tag in reader.Tags()["tensors"] if "/" in tag and not tag.endswith("text_summary")]
    value = tensor_util.make_ndarray
    return {name: [(e.step, value(e.tensor_proto).item()) for e in reader.Tensors(name)] for name in names}


def test_it_holds_the_metrics_of_metrics_jsonl_under_their_names_also_after_a_resume(tmp_path: Path) -> None:
    session(tmp_path, range(1, 13))
    # Killed after step 12, resumed from step 8: what was logged later is taken out of metrics.jsonl by the session.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 8]
    (tmp_path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    session(tmp_path, range(9, 21), scale=2.0)

    expected: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        for key in line.keys() - {"step"}:
            expected.setdefault(key, []).append((line["step"], line[key]))
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 21))
    found = scalars(tmp_path)
    assert found.keys() == expected.keys()
    for key, series in expected.items():
        assert [step for step, _ in found[key]] == [step for step, _ in series], key
        assert [value for _, value in found[key]] == pytest.approx([value for _, value in series], rel=1e-7), key
