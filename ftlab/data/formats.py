"""Formats: how a row of a set becomes a conversation.

A format says which fields it needs; ``dataset.column_map`` says which column of the set each of them is. To add
one of your own, write a class with ``fields`` and ``conversation`` and name it in ``dataset.format._target_``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ftlab.data.problems import BadRow, require_characters
from ftlab.data.weights import ALLOWED, is_weight, rounded
from ftlab.errors import ConfigError

Row = Mapping[str, Any]


class Message(NamedTuple):
    """What one side says.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: its text.
        trained: whether the model is taught to write it; only ever true of an assistant's.
        context: material that the content speaks of, Alpaca's ``input``.
        extra: whatever else the set says of the message (``name``, ``tool_calls``), for a Jinja template.
        weight: how much each of its tokens counts in the loss; only ever other than 1 of an assistant's.
    """

    role: str
    content: str
    trained: bool = False
    context: str = ""
    extra: Mapping[str, Any] | None = None
    weight: float = 1.0

    @property
    def text(self) -> str:
        """Content and context as one text, for templates that have no place for the latter."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content

    @property
    def tool_calls(self) -> Any:
        """What it calls in place of words, or beside them, as the set has it."""
        return self.extra.get("tool_calls") if self.extra else None


class Conversation(NamedTuple):
    """The messages of one row; ``family`` is its kind of task, ``tools`` what the assistant may call."""

    messages: list[Message]
    family: str | None = None
    tools: Sequence[Any] | None = None


class Format(Protocol):
    """Anything that makes conversations; chosen by dotted path in ``dataset.format._target_``.

    Attributes:
        fields: what it reads, and of what kind: ``text``, ``list`` or ``any``; with a ``?`` where a row may have null
            and a set may not have it at all (``dataset.column_map.FIELD=null``).
    """

    fields: Mapping[str, str]

    def conversation(self, row: Row) -> Conversation: ...


def question_and_answer(question: str, answer: str, context: str = "", family: str | None = None) -> Conversation:
    """A conversation of two messages, of which the answer is trained."""
    return Conversation([Message("user", question, False, context), Message("assistant", answer, True)], family)


class Instruct:
    """Alpaca's fields: instruction, input (material; may be empty or not there at all) and output."""

    fields = {"instruction": "text", "input": "text?", "output": "text", "family": "text?"}  # noqa: RUF012 - a constant

    def conversation(self, row: Row) -> Conversation:
        """One question and its answer."""
        return question_and_answer(row["instruction"], row["output"], row.get("input") or "", row.get("family"))


class Task:
    """The same task for every row: its text around the row's input, and the output.

    Args:
        prompt: what the model reads; ``{input}`` stands for the row's.
    """

    fields = {"input": "text", "output": "text"}  # noqa: RUF012

    def __init__(self, *, prompt: str):
        if "{input}" not in prompt:
            raise ConfigError("dataset.format.prompt", f"{prompt!r} has no {{input}}: every row would ask the same")
        self.prompt = prompt

    def conversation(self, row: Row) -> Conversation:
        """The task and its answer."""
        return question_and_answer(self.prompt.replace("{input}", row["input"]), row["output"])


class Text:
    """Plain text to go on learning from: every token is trained."""

    fields = {"text": "text"}  # noqa: RUF012

    def conversation(self, row: Row) -> Conversation:
        """The text as the model's own words."""
        return Conversation([Message("assistant", row["text"], True)])


class Chat:
    """Conversations as lists of messages: OpenAI's (role, content) or ShareGPT's (from, value), told apart by key.

    An assistant message's ``weight`` says how much it counts: 0 leaves it untrained, without one it is 1.

    Args:
        last_turn_only: train the last assistant message alone.
    """

    fields = {"messages": "list", "system": "text?", "tools": "any?", "family": "text?"}  # noqa: RUF012

    def __init__(self, *, last_turn_only: bool):
        self.last_turn_only = last_turn_only

    def conversation(self, row: Row) -> Conversation:
        """The row's messages, with the set's ``system`` column before them where it has one."""
        listed = row["messages"]
        if not listed:
            raise BadRow("bad_conversation", "has no messages")
        messages = [_message(entry, i) for i, entry in enumerate(listed)]
        if row.get("system") and messages[0].role != "system":
            messages.insert(0, Message("system", row["system"]))
        if self.last_turn_only:
            last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
            messages = [m._replace(trained=m.trained and i == last) for i, m in enumerate(messages)]
        return Conversation(messages, row.get("family"), _tools(row.get("tools")))


_ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user", "prompter": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
    **{"function_call": "assistant"},
    **{"tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool"},
}
_OWN_KEYS = ("role", "from", "content", "value", "weight")


def _tools(value: Any) -> Sequence[Any] | None:
    """A row's tools, a list or the JSON text of one; an empty text is none, as in a CSV."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRow("wrong_type", f"the tools of {{row}} are text that is no JSON: {error}") from error
    if value and not isinstance(value, list):
        raise BadRow("wrong_type", f"the tools of {{row}} must be a list, or one as JSON text, but are {_kind(value)}")
    return value or None


def _message(entry: Any, i: int) -> Message:
    """Message number ``i`` of a row, in either spelling."""
    if not isinstance(entry, Mapping):
        raise BadRow("wrong_type", f"message {i} must be an object with role and content, but is {_kind(entry)}")
    said = entry.get("role", entry.get("from"))
    content = entry.get("content", entry.get("value"))
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise BadRow("bad_conversation", f"message {i} has the role {said!r}; known are {', '.join(_ROLES)}")
    extra = {k: v for k, v in entry.items() if k not in _OWN_KEYS and v is not None}
    if content is None and extra.get("tool_calls"):
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str):  # OpenAI's list of parts
        parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else content
    if not isinstance(content, str):
        raise BadRow("wrong_type", f"the content of message {i} must be text, but is {_kind(content)}")
    require_characters(content, f"message {i} of {{row}}")
    weight = _weight(entry.get("weight"), i, role)
    return Message(role, content, role == "assistant" and weight > 0, "", extra or None, weight)


def _weight(value: Any, i: int, role: str) -> float:
    """How much message ``i`` counts. Sets put a weight of 0 on questions too, which are trained only as all is."""
    if value is None or value == 1:
        return 1.0
    if not is_weight(value):
        raise BadRow("wrong_type", f"the weight of message {i} must be {ALLOWED}, but is {value!r}")
    if role == "assistant":
        return rounded(value)
    if value != 0:
        problem = f"the weight of message {i}, which is no assistant's, must be 0 or 1, but is {value}"
        raise BadRow("wrong_type", problem)
    return 1.0


def _kind(value: Any) -> str:
    return f"{type(value).__name__}: {repr(value)[:60]}"


class OasstTrees(Chat):
    """OpenAssistant's message trees, one message a row: of each tree the path of the best-ranked replies.

    The messages of one tree stand together in the published files.
    """

    fields = {  # noqa: RUF012
        **{"message_id": "text", "parent_id": "text?", "message_tree_id": "text"},
        **{"text": "text", "role": "text", "rank": "any?"},
    }

    def regroup(self, rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
        """Rows of messages to rows of conversations, each numbered as its tree's first row."""
        first = 0
        tree: list[Row] = []
        for number, row in rows:
            if tree and row.get("message_tree_id") != tree[0].get("message_tree_id"):
                yield from self._best_path(first, tree)
                tree = []
            if not tree:
                first = number
            tree.append(row)
        if tree:
            yield from self._best_path(first, tree)

    def _best_path(self, first: int, tree: list[Row]) -> Iterator[tuple[int, Row]]:
        replies: dict[str | None, list[Row]] = {}
        for row in tree:
            replies.setdefault(row.get("parent_id"), []).append(row)
        path: list[dict[str, Any]] = []
        parent = None
        while here := replies.pop(parent, None):  # pop: a message that is its own ancestor ends the walk
            # Unranked replies (a prompt, or the only answer) come after ranked ones, in the file's order.
            best = min(here, key=lambda row: (row.get("rank") is None, row.get("rank") or 0))
            path.append({"role": best.get("role"), "content": best.get("text")})
            parent = best.get("message_id")
        while path and path[-1]["role"] != "assistant":  # a question that nobody answered teaches nothing
            path.pop()
        if path:
            yield first, {"messages": path}
