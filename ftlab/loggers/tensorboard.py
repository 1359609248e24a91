"""TensorBoard: the metrics of metrics.jsonl, under the same names, in ``<run folder>/tensorboard``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlab.errors import ConfigError
from ftlab.loggers.base import RunInfo
from ftlab.outputs.files import to_yaml
from ftlab.outputs.folder import Status

_FLUSH_S = 5  # how old what a watcher sees may be


class TensorBoardLogger:
    """Scalars by step, answers as text, the configuration, and the plots at the end.

    A run that goes on writes a further file, which has readers drop what the earlier ones hold of steps that it takes
    again.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            problem = "tensorboard is not installed"
            raise ConfigError("logger", problem, "pip install 'ftlab[tensorboard]'") from None
        self._open = SummaryWriter
        self._writer: Any = None

    def start(self, info: RunInfo) -> None:
        # A new run says so, too: readers take a second such mark for a restart, never the first.
        self._writer = self._open(str(info.folder / "tensorboard"), flush_secs=_FLUSH_S, purge_step=info.first_step + 1)
        if not info.first_step:
            self._writer.add_text("config", _as_code(to_yaml(info.config)), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step, new_style=True, double_precision=True)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], step: int) -> None:
        text = "\n\n".join(_as_code(json.dumps(sample, ensure_ascii=False, indent=1)) for sample in samples)
        self._writer.add_text("samples", text, step)

    def finish(self, status: Status, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:  # noqa: ARG002
        import matplotlib.image

        for path in artifacts:
            if path.suffix == ".png":
                self._writer.add_image(f"plots/{path.stem}", matplotlib.image.imread(path), 0, dataformats="HWC")
        self._writer.add_text("status", status, 0)
        self._writer.close()


def _as_code(text: str) -> str:
    """Markdown that shows ``text`` as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())
