"""The embedded instruction set: generated tasks in Alpaca format, each with exactly one right answer.

It needs no file and no network, a model of a million parameters learns much of it in a minute on two
CPU cores, and since every answer can be checked, exact match on held-out rows measures real learning.
Some families are easy (a day of the week), some hard for so small a model (the larger of two numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

from ftlab.data.order import permutation


class TinyRow(NamedTuple):
    """One task in Alpaca format; ``family`` names the kind of task, for exact match per family."""

    instruction: str
    input: str
    output: str
    family: str


GENERATION_SEED = 20_240_208  # fixed: the rows are part of the project, like a file would be

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_WORDS = (
    *("apple", "river", "stone", "cloud", "tiger", "green", "piano", "bread", "chair", "house", "mouse", "ocean"),
    *("paper", "queen", "robot", "snake", "table", "water", "zebra", "candle", "garden", "island", "lemon", "silver"),
)
_OPPOSITES = (
    *(("hot", "cold"), ("big", "small"), ("fast", "slow"), ("up", "down"), ("left", "right"), ("day", "night")),
    *(("open", "closed"), ("happy", "sad"), ("old", "young"), ("light", "dark"), ("hard", "soft")),
    *(("wet", "dry"), ("full", "empty"), ("high", "low"), ("early", "late"), ("strong", "weak")),
    *(("rich", "poor"), ("clean", "dirty"), ("loud", "quiet"), ("near", "far")),
)

# Said before a question, so that the small families have enough different rows to learn from.
_OPENERS = ("", "Please answer: ", "Question: ", "Tell me. ", "A quick one: ")


def _even_or_odd() -> Iterator[TinyRow]:
    phrasings = ("Is {n} even or odd?", "Say whether {n} is even or odd.", "Even or odd: {n}")
    for opener, phrasing, n in product(_OPENERS, phrasings, range(100)):
        yield TinyRow(opener + phrasing.format(n=n), "", "odd" if n % 2 else "even", "even_or_odd")


def _day_after() -> Iterator[TinyRow]:
    phrasings = (
        "Which day comes after {day}?",
        "What day follows {day}?",
        "Name the day after {day}.",
        "Today is {day}. What day is tomorrow?",
        "If today is {day}, which day is tomorrow?",
        "Give the next day of the week after {day}.",
        "Yesterday was {day}. What day is today?",
        "The day after {day} is which day?",
    )
    for opener, phrasing, (i, day) in product(_OPENERS, phrasings, enumerate(_DAYS)):
        yield TinyRow(opener + phrasing.format(day=day), "", _DAYS[(i + 1) % 7], "day_after")


def _opposite() -> Iterator[TinyRow]:
    phrasings = (
        "What is the opposite of {word}?",
        "Give the opposite of the word {word}.",
        "Which word means the opposite of {word}?",
        "Name the opposite of {word}.",
        "Write the antonym of {word}.",
        "The opposite of {word} is which word?",
    )
    both_ways = _OPPOSITES + tuple((b, a) for a, b in _OPPOSITES)
    # A word in two pairs would have two right answers.
    assert len({word for word, _ in both_ways}) == len(both_ways)
    for opener, phrasing, (word, opposite) in product(_OPENERS, phrasings, both_ways):
        yield TinyRow(opener + phrasing.format(word=word), "", opposite, "opposite")


def _first_word() -> Iterator[TinyRow]:
    instructions = ("Return the first word of the list.", "Which word comes first?", "Copy the first word.")
    for instruction, (a, b, c) in product(instructions, permutations(_WORDS, 3)):
        yield TinyRow(instruction, f"{a}, {b}, {c}", a, "first_word")


def _next_number() -> Iterator[TinyRow]:
    phrasings = ("What number comes after {n}?", "Add one to {n}.", "Count on from {n} by one.")
    for opener, phrasing, n in product(_OPENERS, phrasings, range(100)):
        yield TinyRow(opener + phrasing.format(n=n), "", str(n + 1), "next_number")


def _larger_number() -> Iterator[TinyRow]:
    phrasings = ("Which number is larger, {a} or {b}?", "Pick the larger of {a} and {b}.")
    for phrasing, a, b in product(phrasings, range(10, 100), range(10, 100)):
        if a != b:
            yield TinyRow(phrasing.format(a=a, b=b), "", str(max(a, b)), "larger_number")


# (family, training rows, validation rows): drawn from all the rows that the family can make.
_FAMILIES = (
    (_day_after, 240, 40),
    (_opposite, 600, 40),
    (_even_or_odd, 500, 40),
    (_first_word, 500, 40),
    (_next_number, 500, 40),
    (_larger_number, 500, 40),
)


@cache
def tiny_rows() -> tuple[list[TinyRow], list[TinyRow]]:
    """The training and the validation rows, the same on every machine.

    No (instruction, input) is in both: each family draws without replacement from rows that all differ.
    Rows are mixed across families, so that the first ``n`` of them are a fair sample.
    """
    train: list[TinyRow] = []
    validation: list[TinyRow] = []
    for index, (generate, n_train, n_validation) in enumerate(_FAMILIES):
        rows = list(generate())
        chosen = [rows[i] for i in permutation(len(rows), GENERATION_SEED, index)[: n_train + n_validation]]
        train += chosen[:n_train]
        validation += chosen[n_train:]
    return _mixed(train), _mixed(validation)


def _mixed(rows: list[TinyRow]) -> list[TinyRow]:
    return [rows[i] for i in permutation(len(rows), GENERATION_SEED, len(_FAMILIES))]
