"""Ask the model of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ftlab.config.build import build
from ftlab.data.encode import Encoder
from ftlab.data.formats import Message
from ftlab.data.templates import Template
from ftlab.data.tokenizers import Tokenizer
from ftlab.distributed.env import pick_device
from ftlab.distributed.precision import Precision
from ftlab.distributed.single import OneRank
from ftlab.errors import ConfigError
from ftlab.models.auto import as_exported
from ftlab.run import build_model, weights_in
from ftlab.training.generate import generate


def ask(folder: Path, instruction: str, *, input: str, on_text: Callable[[str], None], **sampling: Any) -> str:
    """Answer one instruction with the exported model of the run in ``folder``.

    Args:
        instruction: goes through the template the model was trained with.
        input: further context; empty for none.
        on_text: called with each further piece of the answer as it comes.
        sampling: ``max_new_tokens, temperature, top_p, seed`` of ``generate``.

    Raises:
        ConfigError: ``folder`` is no run, or has no exported weights.
    """
    config, export = _read(folder)
    tokenizer: Tokenizer = build(_beside(config["tokenizer"], export))
    dataset = config["dataset"]
    dataset = dataset if "template" in dataset else next(iter(dataset["sets"].values()))  # a mixture's first
    template: Template = build(dataset["template"])
    encoder = Encoder(tokenizer=tokenizer, template=template, train_on_input=False)
    precision: Precision = build(config["precision"])
    parallel = OneRank(pick_device(config["device"]))
    model = build_model(as_exported(build(config["model"]), export), weights_in(export), precision, parallel)
    text = TextStream(tokenizer, on_text)
    prompt = encoder.prompt([Message("user", instruction, False, input)])
    with torch.no_grad(), precision.autocast(parallel.device):
        generate(model, [prompt], eos_id=tokenizer.eos_id, on_token=lambda _, token: text.add(token), **sampling)
    return text.close()


def _read(folder: Path) -> tuple[dict[str, Any], Path]:
    if not (folder / "config.yaml").is_file():
        raise ConfigError("RUN", f"{folder} is not a run folder: it has no config.yaml", "outputs/latest")
    export = folder / "export"
    if not (export / "config.json").is_file():
        raise ConfigError(
            "RUN", f"{folder} has no export/: the run did not finish, or ran with checkpoint.export=false"
        )
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")), export


def _beside(tokenizer: dict[str, Any], export: Path) -> dict[str, Any]:
    """The tokenizer's node, reading the copy that was exported with the weights."""
    return tokenizer | {"path": str(export)} if "path" in tokenizer else tokenizer


class TextStream:
    """Turns tokens into text piece by piece; a piece is held back while its last character is incomplete."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]):
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> None:
        """Take one more token; what it completes goes to ``on_text``."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character that is still to come
            self._emit(text)

    def close(self) -> str:
        """Show what was held back and return the whole text."""
        self._emit(self._tokenizer.decode(self._ids))
        return self._shown

    def _emit(self, text: str) -> None:
        self._on_text(text[len(self._shown) :])
        self._shown = text
