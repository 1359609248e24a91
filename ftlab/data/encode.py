"""Conversations to tokens, and to the mask that says which of them are trained, exact to the token."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ftlab.data.formats import Conversation, Message
from ftlab.data.spans import token_cuts
from ftlab.data.templates import BOS, EOS, START, Part, Template
from ftlab.data.tokenizers import Tokenizer
from ftlab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokenised rows, one after another.

    Attributes:
        tokens: (total,) int32.
        trained: (total,) bool. The first token of a row never is: nothing comes before it. Where some tokens count
            more or less than one in the loss, float32: how much each does.
        offsets: (n + 1,) int64; row ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.
        prompt_lens: (n,) int64, leading tokens of each row that come before its last answer.
        end_ids: (n,) int32, the control token that ends the last answer; -1 where nothing does.
        merged: (n,) bool, rows in which a token holds the end of a prompt and the start of an answer.
    """

    tokens: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    prompt_lens: np.ndarray
    end_ids: np.ndarray
    merged: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


class Rendered(NamedTuple):
    """A conversation and the parts that a template made of it."""

    conversation: Conversation
    parts: list[Part]


class Encoder:
    """Renders with a template and tokenises, a batch of conversations at a time.

    Text between two control tokens is tokenised as one, which is what the model will have to continue: encoding
    prompt and answer apart would put a word-start space between the two. Where a token then holds the end of the
    one and the start of the other, it is trained: the model has to predict what it says of the answer.

    Args:
        train_on_input: whether everything is trained, not only what the messages say; but for messages of weight 0.

    Raises:
        ConfigError: when the template needs a control token that the tokenizer does not have.
    """

    def __init__(self, *, tokenizer: Tokenizer, template: Template, train_on_input: bool):
        self._tokenizer, self._train_on_input = tokenizer, train_on_input
        # A template that the tokenizer has a part in, as in a Jinja one.
        self._template: Template = template.bound_to(tokenizer) if hasattr(template, "bound_to") else template
        self._literal = getattr(self._template, "literal", False)
        self._specials = dict(tokenizer.specials)
        names = sorted(self._specials, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None
        self._split: dict[str, list[Part]] = {}
        names_that_strip: frozenset[str] = getattr(tokenizer, "strips_after", frozenset())
        self._strip_after = {self._specials[name] for name in names_that_strip}

    def render(self, conversation: Conversation) -> Rendered:
        """The parts of one conversation.

        Raises:
            BadRow: when the template cannot render it.
        """
        return Rendered(conversation, self._template.parts(conversation))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that the assistant's next message follows."""
        conversation = Conversation([*messages, Message("assistant", "", True)])
        encoded = self([self.render(conversation)])
        return encoded.tokens[: encoded.prompt_lens[0]].tolist()

    def __call__(self, rows: Sequence[Rendered]) -> Encoded:
        """Tokens and mask of every rendered conversation."""
        layout = _Layout(self._strip_after)
        for row in rows:
            self._lay_out(row, layout)
        texts = layout.close()
        tokenised = self._tokenise(texts, layout.follow_control)
        flat = array("i")
        for ids in tokenised:
            flat.extend(ids)
        tokens = np.asarray(flat, dtype=np.int32)
        ends = np.cumsum([len(ids) for ids in tokenised], dtype=np.int64)
        return layout.assemble(tokens, ends, *token_cuts(self._tokenizer, texts, tokens, ends, layout.boundaries))

    def _tokenise(self, texts: Sequence[str], follow_control: Sequence[bool]) -> list[list[int]]:
        """The tokens of every text; some tokenizers begin one differently after a control token."""
        if not any(follow_control):
            return self._tokenizer.encode_batch(texts, bos=False, eos=False) if texts else []
        after = iter(self._tokenizer.encode_after_special([t for t, f in zip(texts, follow_control, strict=True) if f]))
        first = [t for t, f in zip(texts, follow_control, strict=True) if not f]
        begin = iter(self._tokenizer.encode_batch(first, bos=False, eos=False) if first else [])
        return [next(after) if follows else next(begin) for follows in follow_control]

    def _lay_out(self, row: Rendered, layout: _Layout) -> None:
        """Add one row's pieces: control tokens, and texts with the runs of trained and untrained in them."""
        messages = row.conversation.messages
        answer = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
        layout.start_row()
        everything = self._train_on_input
        for text, i, name in row.parts:
            level, by_assistant = int(everything), False
            if i is not None:
                message = messages[i]
                by_assistant = message.role == "assistant"
                level = layout.level(message.weight) if message.trained or everything else 0
            is_answer = i == answer
            if name is not None:
                token = self._control_id(name)
                if token is not None:
                    layout.add_control(token, level, is_answer, by_assistant, begins=name == START)
            elif i is None and self._special is not None and not self._literal:
                for piece in self._pieces(text):
                    if piece.control is None:
                        layout.add_text(piece.text, level, False, False)
                    else:
                        layout.add_control(self._specials[piece.control], level, False, False)
            else:
                layout.add_text(text, level, is_answer, by_assistant)

    def _pieces(self, text: str) -> list[Part]:
        """The template's own text, split at the control tokens that stand in it, like ``[INST]`` in newer Mistrals."""
        found = self._split.get(text)
        if found is None:
            assert self._special is not None
            found = [
                Part("", None, piece) if piece in self._specials else Part(piece)
                for piece in self._special.split(text)
                if piece
            ]
            if len(self._split) < 10_000:
                self._split[text] = found
        return found

    def _control_id(self, name: str) -> int | None:
        """The id of a control token; None for a BOS that the tokenizer does not have and the model did not see."""
        if name in (START, BOS):
            return self._tokenizer.bos_id
        if name == EOS:
            return self._tokenizer.eos_id
        if name not in self._specials:
            raise ConfigError(
                "dataset.template",
                f"{type(self._template).__name__} needs the token {name}, which this tokenizer does not have",
                "dataset.template._target_=ftlab.data.templates.AlpacaTemplate, or the tokenizer of a chat model",
            )
        return self._specials[name]


class _Layout:
    """The pieces of a batch of rows, in order, before anything is tokenised.

    A piece is a control token or a text; a text is a sequence of runs, each trained or not. How much a run counts is
    told by its level, a number for each of the weights that occur.
    """

    def __init__(self, strip_after: set[int]) -> None:
        self._strip_after = strip_after  # control tokens that swallow the spaces after them
        self.texts: list[str] = []
        self.follow_control: list[bool] = []  # per text
        self.boundaries: list[tuple[int, int]] = []  # (text, character): where a run ends inside a text
        self._controls = array("i")  # per piece: the token, or -1 for the next of the texts
        self._row_starts = array("q")  # first piece of each row
        self._levels = {0.0: 0, 1.0: 1}  # weight to level
        self._run_kinds = array("i")  # twice the level, plus 1 where it is an assistant's message
        self._run_piece = array("q")  # per run: the piece that it ends with, or in
        self._run_boundary = array("q")  # per run: the boundary at which it ends, or -1 for its piece's end
        self._answer_runs = array("q")  # per row: the run that its last answer begins with, or -1
        self._end_ids = array("i")  # per row
        self._open: list[str] = []  # the pieces of the text being put together
        self._open_len = 0
        self._after_control = self._strips = False

    def start_row(self) -> None:
        self._close()
        self._after_control = self._strips = False
        self._row_starts.append(len(self._controls))
        self._answer_runs.append(-1)
        self._end_ids.append(-1)

    def level(self, weight: float) -> int:
        return 1 if weight == 1 else self._levels.setdefault(weight, len(self._levels))

    def add_control(self, token: int, level: int, is_answer: bool, by_assistant: bool, *, begins: bool = False) -> None:
        self._close()
        self._after_control = not begins
        self._strips = token in self._strip_after
        self._controls.append(token)
        self._add_run(level, is_answer, by_assistant)
        if by_assistant:
            self._end_ids[-1] = token

    def add_text(self, text: str, level: int, is_answer: bool, by_assistant: bool) -> None:
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        if self._open:
            last = len(self._run_kinds) - 1
            # Runs that follow each other alike are one, but an answer must not lose its start.
            if self._run_kinds[last] >> 1 == level and not by_assistant:
                self._open.append(text)
                self._open_len += len(text)
                return
            self._run_boundary[last] = len(self.boundaries)
            self.boundaries.append((len(self.texts), self._open_len))
        else:
            self._controls.append(-1)
            self.follow_control.append(self._after_control)
        self._open.append(text)
        self._open_len += len(text)
        self._add_run(level, is_answer, by_assistant)

    def _add_run(self, level: int, is_answer: bool, by_assistant: bool) -> None:
        if is_answer and self._answer_runs[-1] < 0:
            self._answer_runs[-1] = len(self._run_kinds)
        self._run_kinds.append(2 * level + by_assistant)
        self._run_piece.append(len(self._controls) - 1)
        self._run_boundary.append(-1)

    def _close(self) -> None:
        if self._open:
            self.texts.append("".join(self._open))
            self._open, self._open_len = [], 0

    def close(self) -> list[str]:
        """The texts to tokenise, now that all rows are here."""
        self._close()
        return self.texts

    def assemble(
        self, text_tokens: np.ndarray, text_ends: np.ndarray, cuts: np.ndarray, aligned: np.ndarray
    ) -> Encoded:
        """The rows, given the tokens of all texts.

        Args:
            text_tokens: one text after another; text ``i`` ends before ``text_ends[i]``.
            cuts: per boundary, the tokens of its text that lie wholly before it.
            aligned: per boundary, whether a token ends exactly there.
        """
        controls = np.asarray(self._controls, dtype=np.int32)
        is_text = controls < 0
        lengths = np.ones(len(controls), dtype=np.int64)
        lengths[is_text] = np.diff(text_ends, prepend=0)
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
        from_text = np.repeat(is_text, lengths)
        tokens[from_text] = text_tokens
        tokens[~from_text] = controls[~is_text]

        run_kinds = np.asarray(self._run_kinds)
        run_trained, by_assistant = self._trained(run_kinds >> 1), run_kinds & 1 > 0
        run_piece, run_boundary = np.asarray(self._run_piece), np.asarray(self._run_boundary)
        run_ends = ends[run_piece]
        inner = np.flatnonzero(run_boundary >= 0)
        at = run_boundary[inner]
        straddles = ~aligned[at]
        starts = ends[run_piece[inner]] - lengths[run_piece[inner]]
        # A token that holds the end of something trained and the start of something untrained is trained too.
        run_ends[inner] = starts + cuts[at] + (straddles & (run_trained[inner] > 0))
        run_ends = np.maximum.accumulate(run_ends)
        run_lengths = np.diff(run_ends, prepend=0)
        trained = np.repeat(run_trained, run_lengths)

        row_starts = np.asarray(self._row_starts)
        offsets = np.append(np.concatenate([[0], ends])[row_starts], len(tokens))
        trained[offsets[:-1][offsets[:-1] < offsets[1:]]] = False  # a template may make nothing of a row
        answer_runs = np.asarray(self._answer_runs)
        begins = np.concatenate([[0], run_ends])[np.maximum(answer_runs, 0)] - offsets[:-1]
        merged = np.zeros(len(row_starts), dtype=bool)
        into_answer = inner[straddles & by_assistant[inner + 1]] if len(inner) else inner
        merged[np.searchsorted(row_starts, run_piece[into_answer], side="right") - 1] = True
        return Encoded(
            tokens=tokens,
            trained=trained,
            offsets=offsets,
            prompt_lens=np.where(answer_runs >= 0, begins, np.diff(offsets)),
            end_ids=np.asarray(self._end_ids, dtype=np.int32),
            merged=merged,
        )

    def _trained(self, levels: np.ndarray) -> np.ndarray:
        """(n,) bool of levels; float32 weights where there are other levels than 0 and 1."""
        if len(self._levels) == 2:
            return levels > 0
        return np.asarray(list(self._levels), dtype=np.float32)[levels]
