"""Chat templates in Jinja: the tokenizer's own, or a user's file; the trained spans are found in what they render."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftlab.data.formats import Conversation, Message
from ftlab.data.problems import BadRow
from ftlab.data.templates import Part
from ftlab.data.tokenizers import Tokenizer
from ftlab.data.tokenizers.chat import render_chat
from ftlab.errors import ConfigError, DataError
from ftlab.storage.disk import read_small_file

_MAX_BYTES = 2**24  # of a template
# Drawn anew in every process: data that spells what is made of it cannot exist yet.
_NONCE = secrets.token_hex(8)
_BEGIN, _END = f"\ue006{_NONCE}", f"\ue007{_NONCE}"  # around what a template calls the assistant's
_HIDDEN, _HIDDEN_PATTERN = f"\ue000{_NONCE}:{{}}\ue001", re.compile(f"\ue000{_NONCE}:(\\d+)\ue001")
_GENERATION = re.compile(r"(\{%[-+]?\s*generation\s*(-?)\+?%\}\n?)")
_ENDGENERATION = re.compile(r"(?:^[ \t]*)?\{%(-?)\+?\s*endgeneration", re.MULTILINE)


class JinjaTemplate:
    """A Jinja chat template, run in a sandbox as ``transformers`` runs it.

    What the assistant says is told by ``{% generation %}`` where the template has it, else by rendering the
    conversation up to each answer; a template that renders earlier messages differently as the conversation grows
    (Qwen3 drops past thoughts) can then train its last turn only.

    Args:
        path: the template's file; null: the one that came with the tokenizer.
    """

    def __init__(self, *, path: str | None):
        self.path = path
        self.source = self._read(path)

    @staticmethod
    def _read(path: str | None) -> str | None:
        if path is None:
            return None
        try:
            return read_small_file(Path(path).expanduser(), _MAX_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("dataset.template.path", f"{path} cannot be read: {error}") from error

    def bound_to(self, tokenizer: Tokenizer) -> BoundJinja:
        """The template with the tokenizer's control tokens.

        Raises:
            ConfigError: when neither a file was given nor the tokenizer has a template.
        """
        source = self.source if self.source is not None else tokenizer.chat_template
        if source is None:
            raise ConfigError(
                "dataset.template",
                "the tokenizer came without a chat template",
                "dataset.template.path=/path/to/chat_template.jinja",
            )
        return BoundJinja(source, tokenizer)

    def parts(self, conversation: Conversation) -> list[Part]:
        """Not before it is bound to a tokenizer."""
        raise NotImplementedError


class _Span(NamedTuple):
    """``text[start:end]`` is what message ``message`` of the conversation became."""

    start: int
    end: int
    message: int


class BoundJinja:
    """A Jinja chat template and the control tokens that it may spell."""

    literal = True  # its parts are split at control tokens already: in the rest, nothing is one

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._source = source
        self._marked = None
        if _GENERATION.search(source):
            marked = _GENERATION.sub(rf'\1{{{{ "{_BEGIN}" \2}}}}', source)
            self._marked = _ENDGENERATION.sub(rf'{{{{\1 "{_END}" }}}}{{%- endgeneration', marked)
        by_id = {i: text for text, i in tokenizer.specials.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._names = {name: by_id[i] for name, i in ids.items() if i is not None and i in by_id}
        longest_first = sorted(tokenizer.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # What a message spells is hidden while the template renders: only the template's own tokens are control.
        self._texts = longest_first
        self._numbers = {text: i for i, text in enumerate(longest_first)}

    def parts(self, conversation: Conversation) -> list[Part]:
        """What the template renders, cut at control tokens and at the borders of the assistant's messages."""
        messages = [self._hide(_as_dict(message)) for message in conversation.messages]
        variables = {"tools": self._hide(conversation.tools)} if conversation.tools else {}
        if self._marked is not None:
            text, spans = self._by_generation_blocks(conversation.messages, messages, variables)
        else:
            text, spans = self._by_growing(conversation.messages, messages, variables)
        parts: list[Part] = []
        end = 0
        for span in spans:
            parts += self._cut(text[end : span.start], None)
            inside = list(self._cut(text[span.start : span.end], span.message))
            # An answer begins here even where it is empty and nothing of it was rendered.
            parts += inside or [Part("", span.message)]
            end = span.end
        return [*parts, *self._cut(text[end:], None)]

    def _render(
        self, messages: Sequence[Mapping[str, Any]], *, answer: bool, marked: bool = False, **tools: Any
    ) -> str:
        source = self._marked if marked and self._marked is not None else self._source
        try:
            return render_chat(source, messages, add_generation_prompt=answer, specials=self._names, **tools)
        except DataError as error:
            raise BadRow("bad_conversation", f"is refused: {error}") from error

    def _by_generation_blocks(
        self, said: Sequence[Message], messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]
    ) -> tuple[str, list[_Span]]:
        pieces = re.split(f"({_BEGIN}|{_END})", self._render(messages, answer=False, marked=True, **variables))
        answers = [i for i, message in enumerate(said) if message.role == "assistant"]
        text = ""
        spans: list[_Span] = []
        for piece in pieces:
            if piece == _BEGIN:
                start = len(text)
            elif piece == _END:
                if len(spans) == len(answers):
                    raise BadRow("bad_conversation", "has fewer answers than the template marks as generated")
                spans.append(_Span(start, len(text), answers[len(spans)]))
            else:
                text += piece
        return text, spans

    def _by_growing(
        self, said: Sequence[Message], messages: Sequence[Mapping[str, Any]], variables: dict[str, Any]
    ) -> tuple[str, list[_Span]]:
        text = self._render(messages, answer=False, **variables)
        answers = [i for i, message in enumerate(said) if message.role == "assistant"]
        spans: list[_Span] = []
        for i in answers:
            if not said[i].trained and i != answers[-1]:
                continue
            before = self._render(messages[:i], answer=True, **variables)
            if i + 1 < len(messages):
                whole = self._render(messages[: i + 1], answer=False, **variables)
                end = _common_prefix(text, whole)
            else:
                end = len(text)
            if not text.startswith(before) or end < len(before):
                raise BadRow(
                    "bad_conversation",
                    f"cannot be masked: the template renders what comes before message {i} differently with it",
                    "dataset.format.last_turn_only=true, or a template with {% generation %} around answers",
                )
            spans.append(_Span(len(before), self._end_of(messages[i]["content"], text, len(before), end), i))
        return text, spans

    def _end_of(self, content: str, text: str, start: int, end: int) -> int:
        """Where an answer that begins at ``start`` ends: after the first control token behind its content."""
        at = text.find(content.strip(), start, end)
        token = self._special.search(text, at + len(content.strip()), end) if at >= 0 else None
        return token.end() if token else start + len(text[start:end].rstrip())

    def _cut(self, text: str, message: int | None) -> Iterator[Part]:
        """``text`` as parts: control tokens, and what lies between them."""
        end = 0
        for token in self._special.finditer(text):
            if token.start() > end:
                yield Part(self._shown(text[end : token.start()]), message)
            yield Part("", message, token.group())
            end = token.end()
        if end < len(text):
            yield Part(self._shown(text[end:]), message)

    def _hide(self, value: Any) -> Any:
        """A copy of what the data says in which nothing spells a control token."""
        match value:
            case str():
                return self._special.sub(lambda match: _HIDDEN.format(self._numbers[match[0]]), value)
            case Mapping():
                return {key: self._hide(element) for key, element in value.items()}
            case list() | tuple():
                return [self._hide(element) for element in value]
            case _:
                return value

    def _shown(self, text: str) -> str:
        return _HIDDEN_PATTERN.sub(lambda match: self._texts[int(match[1])], text)


def _as_dict(message: Message) -> dict[str, Any]:
    return {**(message.extra or {}), "role": message.role, "content": message.text}


def _common_prefix(a: str, b: str) -> int:
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])
