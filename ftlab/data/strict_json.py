"""JSON rows, read strictly and as a stream: every fault is told with file, line and column.

The standard decoder takes the last of two equal keys and reads NaN, and other libraries turn columns of mixed types
into JSON text without a word (a list would be taught as '["a"]'). Here none of it passes.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NoReturn

from ftlab.data.problems import Problem

_BLOCK = 1 << 20  # bytes read at a time
_MAX_ROW = 1 << 26  # characters of one row: longer ones are taken for broken JSON
_MAX_TOKEN = 1 << 10  # characters of anything but a text
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+', re.DOTALL)
_BOM = "\ufeff"

OnProblem = Callable[[Problem], None]


class _UnfitError(ValueError):
    """JSON that the standard decoder would read; ``args`` are kind and what it is about."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise _UnfitError("duplicate_key")
    return row


def _refuse(literal: str) -> NoReturn:
    raise _UnfitError("nan_literal", literal)


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
_lenient = json.JSONDecoder(parse_int=str)  # tells where a value ends of which one part is unfit


def json_rows(
    stream: BinaryIO, name: str, on_problem: OnProblem, first_row: int, start: int = 0
) -> Iterator[tuple[int, Any]]:
    """Number and value of every row of an array, or of one row per line, told apart by the first character.

    A row that is unfit is a problem and left out, and so is a line that is no JSON. Behind such a fault in an array
    nobody knows where the next row begins: that is a problem of its own kind, and the last one.

    Args:
        start: the first row that is wanted; the values of those before may be None.
    """
    begin = stream.read(1)
    bom = b""
    if begin == codecs.BOM_UTF8[:1] and (rest := stream.read(2)) == codecs.BOM_UTF8[1:]:
        bom, begin = codecs.BOM_UTF8, stream.read(1)
    elif begin == codecs.BOM_UTF8[:1]:
        begin += rest
    while begin.isspace():
        bom += begin
        begin = stream.read(1)
    if begin == b"[":
        before = bom.removeprefix(codecs.BOM_UTF8).decode() + "["
        return _Array(stream, name, before, len(bom) + 1, first_row).rows(on_problem)
    return _line_rows(stream, name, on_problem, first_row, bom, begin, start)


def invalid_utf8(name: str, byte: int, offset: int, row: int | None) -> Problem:
    """The problem of a byte that is no UTF-8."""
    return Problem(
        "invalid_utf8",
        row,
        f"dataset.data_files: {name} is not UTF-8: byte 0x{byte:02x} at byte offset {offset}\n"
        f"  try: iconv -f latin1 -t utf-8 {name} > fixed",
    )


def _line_rows(
    stream: BinaryIO, name: str, on_problem: OnProblem, row: int, skipped: bytes, begin: bytes, start: int
) -> Iterator[tuple[int, Any]]:
    number, offset = 1 + skipped.count(b"\n"), len(skipped)
    for line in _rejoined(begin, stream):
        stripped = line.strip()
        if stripped and row < start:
            yield row, None
            row += 1
        elif stripped:
            try:
                yield row, _decoder.decode(stripped.decode("utf-8"))
            except UnicodeDecodeError as error:
                at = line.index(stripped) + error.start
                on_problem(invalid_utf8(name, line[at], offset + at, row))
            except ValueError as error:
                text = stripped.decode("utf-8")
                on_problem(_problem(error, text, 0, name, number, 1 + line.index(stripped), row))
            except RecursionError:
                on_problem(Problem("broken_json", row, f"dataset.data_files: {name}:{number}: nested too deeply"))
            row += 1
        number += 1
        offset += len(line)


def _rejoined(begin: bytes, stream: BinaryIO) -> Iterator[bytes]:
    line = begin + stream.readline(_MAX_ROW) if begin not in (b"", b"\n") else begin
    while line:
        if len(line) >= _MAX_ROW and not line.endswith(b"\n"):
            raise OSError(f"a line of more than {_MAX_ROW} bytes")
        yield line
        line = stream.readline(_MAX_ROW)


class _Stop(Exception):  # noqa: N818
    """Nothing more can be read of this file; ``problem`` says why, and what that costs."""

    def __init__(self, problem: Problem):
        what, *fix = problem.message.splitlines()
        message = "\n".join([f"{what}; the rows of the array from there on cannot be read", *fix])
        self.problem = Problem("broken_array", problem.row, message)


class _Array:
    """The elements of a JSON array, holding no more of the file than the one at hand and a block.

    Args:
        text: what was read of the file already, up to the opening bracket.
        offset: bytes that were read.
        row: the first element's number.
    """

    def __init__(self, stream: BinaryIO, name: str, text: str, offset: int, row: int):
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position, self._offset = text, len(text), offset
        self._line = self._column = 1  # of text[0]
        self._fault: tuple[int, int] | None = None  # behind the text: a byte that is no UTF-8, and its offset
        self.row = row

    def rows(self, on_problem: OnProblem) -> Iterator[tuple[int, Any]]:
        """Number and value of every element that is fit, up to the end or a fault behind which none can be found."""
        try:
            if self._next() == "]":
                self._position += 1
            else:
                yield from self._element(on_problem)
                while (char := self._next()) == ",":
                    self._position += 1
                    self._next()
                    yield from self._element(on_problem)
                if char != "]":
                    raise self._broken("Expecting ',' delimiter" if char else "the array does not end")
                self._position += 1
            if self._next():
                raise self._broken("Extra data")
        except _Stop as stop:
            on_problem(stop.problem)

    def _next(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in " \t\r\n":
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read(_BLOCK):
                return ""

    def _read(self, n: int) -> bool:
        """Read ``n`` bytes more; false at the end of the file."""
        if self._fault is not None:
            raise _Stop(invalid_utf8(self._name, *self._fault, self.row))
        block = self._stream.read(n)
        pending = len(self._decode.getstate()[0])
        try:
            self._text += self._decode.decode(block, final=not block)
        except UnicodeDecodeError as error:
            self._text += error.object[: error.start].decode()  # elements that end before it can be read
            self._fault = error.object[error.start], self._offset - pending + error.start
            return True
        self._offset += len(block)
        return bool(block)

    def _element(self, on_problem: OnProblem) -> Iterator[tuple[int, Any]]:
        """The value that begins here, unless it is unfit; reads on while it is not whole."""
        self._forget()
        wanted = _BLOCK
        decoder, unfit = _decoder, None
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._position)
                if end == len(self._text) and self._read(_BLOCK):  # a number may go on
                    continue
                break
            except json.JSONDecodeError as error:
                # Only a text that does not end, or the last few characters, may be what the next block would complete.
                fault = not error.msg.startswith("Unterminated string") and error.pos < len(self._text) - _MAX_TOKEN
                if fault or len(self._text) - self._position > _MAX_ROW or not self._read(wanted):
                    raise self._stop(error) from None
                wanted *= 2
            except RecursionError:
                raise self._broken("nested too deeply") from None
            except ValueError as error:
                decoder, unfit = _lenient, error
        if unfit is None:
            yield self.row, value
        else:
            on_problem(self._problem(unfit, end))
        self._position = end
        self.row += 1

    def _forget(self) -> None:
        """Let go of what has been read, now and then."""
        if self._position > _BLOCK:
            passed = self._text[: self._position]
            breaks = passed.count("\n")
            self._column = len(passed) - passed.rindex("\n") if breaks else self._column + len(passed)
            self._line += breaks
            self._text, self._position = self._text[self._position :], 0

    def _broken(self, message: str) -> _Stop:
        return self._stop(json.JSONDecodeError(message, self._text, self._position))

    def _stop(self, error: json.JSONDecodeError) -> _Stop:
        return _Stop(self._problem(error))

    def _problem(self, error: ValueError, end: int | None = None) -> Problem:
        """What ``error`` tells of the value that begins here; ``end`` is where that ends, if it does."""
        return _problem(error, self._text[:end], self._position, self._name, self._line, self._column, self.row)


def _problem(error: ValueError, text: str, start: int, name: str, line: int, column: int, row: int) -> Problem:
    """What ``error`` tells of the value at ``text[start]``; ``text[0]`` stands at ``line`` and ``column``."""
    if isinstance(error, json.JSONDecodeError):
        kind, at = "broken_json", error.pos
        what = f"broken JSON: {error.msg} (expected one array of rows, or one row per line)"
    elif not isinstance(error, _UnfitError):
        kind, at = "broken_json", start
        what = f"a whole number of more than {sys.get_int_max_str_digits()} digits, which Python does not read"
    else:
        kind = error.args[0]
        at, key = _locate(text, start, kind)
        twice = f"the key {key!r} stands twice in one object"
        what = twice if kind == "duplicate_key" else f"{error.args[1]} is not JSON, in the key {key!r}"
    before = text[:at]
    breaks = before.count("\n")
    place = f"{line + breaks}:{at - before.rindex(chr(10)) if breaks else column + at}"
    return Problem(kind, row, f"dataset.data_files: {name}:{place}: {what}")


def _locate(text: str, start: int, kind: str) -> tuple[int, str]:
    """Position and key of the first repeated key, or of the first NaN or Infinity."""
    seen: list[set[str] | None] = []
    key = ""
    tokens = list(_TOKEN.finditer(text, start))
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        word = token.group()
        if word in "{[":
            seen.append(set() if word == "{" else None)
        elif word in "}]" and seen:
            seen.pop()
        elif word.startswith('"') and following is not None and following.group() == ":":
            key = json.loads(word)
            names = seen[-1] if seen else None
            if names is not None and kind == "duplicate_key" and key in names:
                return token.start(), key
            if names is not None:
                names.add(key)
        elif kind == "nan_literal" and word in ("NaN", "Infinity", "-Infinity"):
            return token.start(), key
    return start, key
