"""Run folders as training leaves them, without the training."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "model": {"_target_": "ftlab.models.config.ModelConfig", "dim": 128},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 2e-3, "betas": [0.9, 0.95]},
    "scheduler": {"_target_": "ftlab.optim.schedules.Cosine", "_partial_": True, "warmup_ratio": 0.03},
    "evaluation": {"metric": "val/loss"},
    "paths": {"output_dir": "there"},
    "run_name": "tiny",
    "seed": 0,
}


def make_run(
    folder: Path,
    *,
    changes: Mapping[str, Any] | None = None,
    metrics: Iterable[Mapping[str, Any]] = (),
    samples: Iterable[Mapping[str, Any]] = (),
    final: Mapping[str, Any] | None = None,
    **record: Any,
) -> Path:
    """Write a run's folder.

    Args:
        changes: dotted keys of the configuration and their values.
        metrics: the lines of ``metrics.jsonl``.
        final: ``metrics`` of ``run.json``.
        record: fields of ``run.json`` beside the usual ones.
    """
    folder.mkdir(parents=True)
    config = copy.deepcopy(CONFIG)
    for key, value in (changes or {}).items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    config["paths"]["output_dir"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    written: dict[str, Any] = {"id": folder.name, "status": "completed", "error": None}
    written |= {"started": "2026-11-25T01:00:00+00:00"}
    written |= {"name": config["run_name"], "seed": config["seed"], "metrics": final, **record}
    (folder / "run.json").write_text(json.dumps(written))
    for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
