"""The model card of an exported folder: what was trained on what, for whoever finds the folder later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ftlab.loggers.base import RunInfo
from ftlab.training.state import Progress

_SETTINGS = (
    "optimizer.lr", "scheduler.warmup_steps", "scheduler.warmup_ratio", "trainer.max_grad_norm", "seq_len", "seed",
    "dataset.train_on_input",
)  # fmt: skip
_METRICS = {"train/loss": "training loss", "val/loss": "validation loss", "val/perplexity": "validation perplexity"}


def model_card(info: RunInfo, progress: Progress, metrics: Mapping[str, float], *, commit: str | None) -> str:
    """README.md, with the header that the Hugging Face Hub reads.

    Args:
        metrics: the newest value of each.
        commit: of the checkpoint's repository on the Hub, if that is where it came from.
    """
    on_hub = info.weights is not None and commit is not None
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ftlab"]}
    if on_hub and info.weights is not None:
        header["base_model"] = info.weights.partition("@")[0]
    origin = (
        "random weights" if info.weights is None else f"`{info.weights}`" + (f" at commit {commit}" if commit else "")
    )
    table = {
        "parameters": f"{info.n_params:,}",
        "started from": origin,
        "data": f"`{info.dataset}`, "
        + ("a stream" if info.n_train_samples is None else f"{info.n_train_samples:,} training samples"),
        "trained": f"{progress.step:,} steps of {info.global_batch_size:,} sequences, {progress.tokens:,} tokens",
        "precision": info.precision,
        "device": info.device,
        **{f"`{key}`": f"{value}" for key in _SETTINGS if (value := _value(info.config, key)) is not None},
        **{name: f"{metrics[key]:.4f}" for key, name in _METRICS.items() if key in metrics},
    }
    front = [f"{key}: {json.dumps(value)}" for key, value in header.items()]
    rows = [f"| {key} | {value} |" for key, value in table.items()]
    lines = ["---", *front, "---", "", f"# {info.name}", "", "Trained with ftlab.", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
