"""Prompt templates: how the messages of a conversation become the text that a model reads and writes.

A template turns messages into *parts*, and says of each which message it is: from that alone follow the tokens
that are trained, and where a prompt ends. Control tokens are parts of their own, so that no text of a row can
become one. A template of your own is one class with ``parts``, or a Jinja file (``jinja_template.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ftlab.data.formats import Conversation, Message
from ftlab.data.problems import BadRow

# As ``Part.control``: whatever these tokens are called in the tokenizer at hand.
BOS, EOS = "bos", "eos"
START = "start"  # BOS too, where tokenizers put it of themselves: the text after it begins as one does


class Part(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        text: plain text; next to other plain text it is tokenised as one with it.
        message: which message this is (its content, or the token that ends it); None for what surrounds it, in
            which alone a control token may also be written as text.
        control: the control token that this part is instead of text: ``START``, ``BOS``, ``EOS``, or its own name.
    """

    text: str
    message: int | None = None
    control: str | None = None


def control(token: str, message: int | None = None) -> Part:
    """A control token; ``message`` where the model has to write it, as at the end of an answer."""
    return Part("", message, token)


class Template(Protocol):
    """Anything that renders conversations; chosen by dotted path in ``dataset.template._target_``."""

    def parts(self, conversation: Conversation) -> list[Part]: ...


class AlpacaTemplate:
    """The prompt of Stanford Alpaca, ending in the newline that torchtune adds after "### Response:".

    The newline matters: it is a token of its own in Llama's vocabulary, so that the prompt's tokens are an
    exact prefix of the sample's. Without it about 6 % of Alpaca's answers merge into the prompt's last token.
    """

    _END = "\n"
    _WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    )
    _WITHOUT_INPUT = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:"
    )

    def render(self, instruction: str, input: str) -> str:
        """The prompt; an empty ``input`` leaves its section out."""
        template = self._WITH_INPUT if input else self._WITHOUT_INPUT
        return template.format(instruction=instruction, input=input) + self._END

    def parts(self, conversation: Conversation) -> list[Part]:
        """One question and its answer."""
        question, answer = _single_turn(spoken(conversation))
        prompt = self.render(question.content, question.context)
        return [control(START), Part(prompt, 0), Part(answer.content, 1), control(EOS, 1)]


class StanfordAlpacaTemplate(AlpacaTemplate):
    """Alpaca's prompt as Stanford's own training script has it: it ends with "### Response:"."""

    _END = ""


class PlainTemplate:
    """Question and answer one after the other, with nothing around them; a text alone is one as well."""

    def parts(self, conversation: Conversation) -> list[Part]:
        """BOS, whatever the messages say, EOS."""
        messages = spoken(conversation)
        said = [Part(message.text, i) for i, message in enumerate(messages)]
        return [control(START), *said, control(EOS, len(messages) - 1)]


class ChatMLTemplate:
    """OpenAI's ChatML, as Qwen and SmolLM have it: any roles in any order, no BOS."""

    def parts(self, conversation: Conversation) -> list[Part]:
        """``<|im_start|>role``, content ``<|im_end|>``, line by line."""
        parts = []
        for i, message in enumerate(spoken(conversation)):
            parts += [control("<|im_start|>"), Part(f"{message.role}\n"), Part(message.text, i)]
            parts += [control("<|im_end|>", i), Part("\n")]
        return parts


class Llama3Template:
    """Llama 3's: any roles in any order, contents stripped. (3.1's own also tells the date.)"""

    def parts(self, conversation: Conversation) -> list[Part]:
        """A header with the role, a blank line, the content, ``<|eot_id|>``."""
        parts = [control(BOS)]
        for i, message in enumerate(spoken(conversation)):
            parts += [control("<|start_header_id|>"), Part(message.role), control("<|end_header_id|>"), Part("\n\n")]
            parts += [Part(message.text.strip(), i), control("<|eot_id|>", i)]
        return parts


class Llama2ChatTemplate:
    """Llama 2 Chat's: BOS and EOS around each exchange, the system message inside the first question."""

    def parts(self, conversation: Conversation) -> list[Part]:
        """``[INST] question [/INST]``, then a space, the answer, a space."""
        parts = []
        for i, message, system in alternating(spoken(conversation)):
            if message.role == "user":
                told = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system is not None else ""
                parts += [control(BOS), Part("[INST] "), Part(f"{told}{message.text}".strip(), i), Part(" [/INST]")]
            else:
                parts += [Part(f" {message.text.strip()} ", i), control(EOS, i)]
        return parts


class MistralTemplate:
    """Mistral 7B Instruct's first: one BOS, EOS after each answer, the system message before the first question."""

    def parts(self, conversation: Conversation) -> list[Part]:
        """``[INST] question [/INST]``, then the answer."""
        parts = [control(BOS)]
        for i, message, system in alternating(spoken(conversation)):
            if message.role == "user":
                told = f"{system}\n\n" if system is not None else ""
                parts += [Part("[INST] "), Part(f"{told}{message.text}", i), Part(" [/INST]")]
            else:
                parts += [Part(message.text, i), control(EOS, i)]
        return parts


class GemmaTemplate:
    """Gemma's: the assistant is the "model", contents are stripped, the system message opens the first question."""

    def parts(self, conversation: Conversation) -> list[Part]:
        """``<start_of_turn>role``, content ``<end_of_turn>``, line by line."""
        parts = [control(BOS)]
        for i, message, system in alternating(spoken(conversation)):
            told = f"{system}\n\n" if system is not None else ""
            role = "user" if message.role == "user" else "model"
            parts += [control("<start_of_turn>"), Part(f"{role}\n"), Part(f"{told}{message.text.strip()}", i)]
            parts += [control("<end_of_turn>", i), Part("\n")]
        return parts


class PhiTemplate:
    """Phi-3's: a token for each role, ``<|end|>`` after each content, EOS after the last."""

    def parts(self, conversation: Conversation) -> list[Part]:
        """``<|role|>``, a newline, content ``<|end|>``, line by line."""
        parts = []
        for i, message in enumerate(spoken(conversation)):
            if message.role == "tool":
                raise BadRow("bad_conversation", f"message {i} is a tool's, which this template has no place for")
            parts += [control(f"<|{message.role}|>"), Part("\n")]
            parts += [Part(message.text, i), control("<|end|>", i), Part("\n")]
        # Not the model's to write: generation ends with <|end|>, and what follows it was never predicted.
        return [*parts, control(EOS)]


def spoken(conversation: Conversation) -> list[Message]:
    """The messages, for a template that renders their words and nothing else.

    Raises:
        BadRow: where there are tools or calls of them, which would be lost without a word.
    """
    calling = next((i for i, message in enumerate(conversation.messages) if message.tool_calls), None)
    if conversation.tools or calling is not None:
        has = "tools" if calling is None else f"tool calls in message {calling}"
        problem = f"has {has}, which this template has no place for"
        fix = "dataset=chat_own_template" + (", or dataset.column_map.tools=null" if calling is None else "")
        raise BadRow("bad_conversation", problem, fix)
    return conversation.messages


def _single_turn(messages: Sequence[Message]) -> tuple[Message, Message]:
    """Question and answer of a conversation that is one exchange."""
    if [message.role for message in messages] != ["user", "assistant"]:
        roles = ", ".join(message.role for message in messages)
        raise BadRow(
            "bad_conversation",
            f"this template renders one question and one answer, the row has: {roles}",
            "dataset.template._target_=ftlab.data.templates.Llama3Template",
        )
    return messages[0], messages[1]


def alternating(messages: Sequence[Message]) -> Iterator[tuple[int, Message, str | None]]:
    """Number and message of strictly alternating questions and answers; the first also with the system message's text.

    For templates that have no place of its own for a system message, nor for a tool's.
    """
    system = messages[0].text if messages[0].role == "system" else None
    skipped = int(system is not None)
    if len(messages) == skipped:
        raise BadRow("bad_conversation", "has a system message and nothing that follows it")
    for place, message in enumerate(messages[skipped:]):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            problem = f"message {place + skipped} is the {message.role}'s where this template wants the {expected}'s"
            raise BadRow("bad_conversation", problem)
        yield place + skipped, message, system if place == 0 else None
