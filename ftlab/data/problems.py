"""What can be wrong with data: its kinds, which of them stop a run, and where each was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftlab.errors import ConfigError, DataError

# Kind: the share of rows above which it stops a run (null: never), and what it means.
KINDS: dict[str, tuple[float | None, str]] = {
    "broken_json": (0, "not JSON"),
    "broken_array": (0, "not JSON, or not UTF-8, inside an array: nothing of the file from there on is read"),
    "duplicate_key": (0, "a key twice in one JSON object: only one of the values could be used"),
    "nan_literal": (0, "NaN or Infinity, which JSON does not have"),
    "invalid_utf8": (0, "bytes that are no UTF-8"),
    "ragged_csv": (0, "more or fewer fields than the header"),
    "missing_field": (0, "a field that every row needs is missing"),
    "wrong_type": (0, "a field holds another type than text (or messages)"),
    "broken_text": (0, "half a surrogate pair, which is no character"),
    "bad_conversation": (0, "messages that the template cannot render"),
    "all_masked": (0, "not one token is trained"),
    "eos_never_trained": (0.5, "no token that ends an answer is trained: they do not teach the model to stop"),
    "double_bos": (0, "BOS twice at the start"),
    "double_template": (0.01, "a text already contains a prompt template's markers"),
    "in_train_and_validation": (0, "the same row is trained on and validated with"),
    "eos_cut": (None, "cut off, and its end with it: it does not teach the model to stop"),
    "too_long": (None, "more tokens than seq_len"),
    "prompt_not_a_prefix": (None, "a token holds the end of the prompt and the start of the answer"),
    "empty_output": (None, "an empty answer: it teaches to say nothing"),
    "duplicate": (None, "the same as an earlier row"),
    "end_is_not_eos": (None, "they end with another token than EOS, the only one at which generation stops"),
    "pad_is_eos": (None, "padding uses EOS's id; only padding is masked, every real EOS is trained"),
}
BLOCKING = tuple(kind for kind, (limit, _) in KINDS.items() if limit is not None)


class BadRow(Exception):  # noqa: N818 - caught and located, never shown as it stands
    """A row that cannot be used; whoever knows its place says where it is, in place of ``{row}`` or first."""

    def __init__(self, kind: str, problem: str, fix: str | None = None):
        assert kind in KINDS, kind
        super().__init__(kind, problem, fix)
        self.kind, self.problem, self.fix = kind, problem, fix


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: its kind, the row's number in its source where it has one, and the whole message."""

    kind: str
    row: int | None
    message: str


@dataclass
class Refusal:
    """Takes problems as rows are read: an allowed one is counted and its row left out, any other ends the reading.

    Attributes:
        allowed: kinds that do not stop.
        goes_on: collect every problem instead (``check-data``).
    """

    allowed: Sequence[str] = ()
    goes_on: bool = False
    problems: list[Problem] = field(default_factory=list)

    def __call__(self, problem: Problem) -> None:
        if problem.kind not in self.allowed and not self.goes_on:
            raise DataError(problem.message)
        self.problems.append(problem)


def check_allowed(allow: Sequence[str]) -> None:
    """Raise ConfigError for a name in ``dataset.allow`` that is no kind."""
    for kind in allow:
        if kind not in BLOCKING:
            raise ConfigError("dataset.allow", f"{kind!r} is none of {', '.join(BLOCKING)}", "dataset.allow=[]")


def require_object(row: Any) -> None:
    """Raise BadRow for a row without fields: JSON can hold any value where one is meant to be."""
    if not isinstance(row, Mapping):
        raise BadRow("wrong_type", f"is a {type(row).__name__}, not an object with fields")


def require_characters(text: str, what: str) -> None:
    """Raise BadRow for half a surrogate pair: JSON can spell it, and it is no character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow("broken_text", f"{what} holds half a surrogate pair: {text[error.start]!r}") from error
