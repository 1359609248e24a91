"""Prompt templates: how instruction and input become the text that the answer follows."""

from __future__ import annotations

from typing import Protocol


class Template(Protocol):
    """Anything that renders a prompt; chosen by dotted path in ``dataset.template._target_``."""

    def render(self, instruction: str, input: str) -> str: ...


class AlpacaTemplate:
    """The prompt of Stanford Alpaca, ending in the newline that torchtune adds after "### Response:".

    The newline matters: it is a token of its own in Llama's vocabulary, so that the prompt's tokens are an
    exact prefix of the sample's. Without it about 6 % of Alpaca's answers merge into the prompt's last token.
    """

    _WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    )
    _WITHOUT_INPUT = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n"
    )

    def render(self, instruction: str, input: str) -> str:
        """The prompt; an empty ``input`` leaves its section out."""
        template = self._WITH_INPUT if input else self._WITHOUT_INPUT
        return template.format(instruction=instruction, input=input)
