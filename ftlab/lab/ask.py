"""Ask the model of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ftlab.config.build import build
from ftlab.data.encode import Encoder
from ftlab.data.formats import Message
from ftlab.data.templates import Template
from ftlab.data.tokenizers import Tokenizer
from ftlab.lab.trained import open_trained
from ftlab.training.generate import generate


def ask(address: str, instruction: str, *, input: str, on_text: Callable[[str], None], **sampling: Any) -> str:
    """Answer one instruction with the model of a run.

    Args:
        address: RUN, which exported its weights or has a checkpoint, RUN@STEP, RUN@best or RUN/checkpoints/step_N.
        instruction: goes through the template the model was trained with.
        input: further context; empty for none.
        on_text: called with each further piece of the answer as it comes.
        sampling: ``max_new_tokens, temperature, top_p, seed`` of ``generate``.

    Raises:
        ConfigError: there is no such run, or no weights in it.
    """
    trained = open_trained(address)
    tokenizer = trained.tokenizer
    dataset = trained.config["dataset"]
    dataset = dataset if "template" in dataset else next(iter(dataset["sets"].values()))  # a mixture's first
    template: Template = build(dataset["template"])
    encoder = Encoder(tokenizer=tokenizer, template=template, train_on_input=False)
    text = TextStream(tokenizer, on_text)
    prompt = encoder.prompt([Message("user", instruction, False, input)])
    with torch.no_grad(), trained.precision.autocast(trained.parallel.device):
        generate(
            trained.model, [prompt], end_ids=trained.end_ids, on_token=lambda _, token: text.add(token), **sampling
        )
    return text.close()


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
