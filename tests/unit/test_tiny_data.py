"""The embedded instruction set: right answers, no row on both sides, the same everywhere."""

import hashlib
import re
from collections import Counter

import pytest

from ftlab.data.tiny import tiny_rows
from ftlab.data.tokenizers import SentencePieceTokenizer

TRAIN, VALIDATION = tiny_rows()


def test_no_question_is_in_both_training_and_validation():
    asked = Counter((row.instruction, row.input) for row in TRAIN + VALIDATION)
    assert max(asked.values()) == 1


def test_every_family_is_on_both_sides_and_large_enough_to_measure():
    trained, held_out = (Counter(row.family for row in rows) for rows in (TRAIN, VALIDATION))
    assert set(trained) == set(held_out)
    assert len(trained) == 6
    assert min(held_out.values()) >= 40


def test_the_rows_are_the_same_on_every_machine():
    digest = hashlib.sha256(repr([tuple(row) for row in TRAIN + VALIDATION]).encode()).hexdigest()
    assert digest[:16] == "95a72aa83bbba47a"


@pytest.mark.parametrize(
    ("family", "solve"),
    [
        ("even_or_odd", lambda row: "even" if int(numbers(row)[0]) % 2 == 0 else "odd"),
        ("next_number", lambda row: str(int(numbers(row)[0]) + 1)),
        ("larger_number", lambda row: str(max(map(int, numbers(row))))),
        ("first_word", lambda row: row.input.split(", ")[0]),
    ],
)
def test_the_answers_are_right(family, solve):
    for row in TRAIN + VALIDATION:
        if row.family == family:
            assert row.output == solve(row)


def test_no_word_of_the_opposites_has_two_answers():
    answers = {}
    for row in TRAIN + VALIDATION:
        if row.family == "opposite":
            words = set(re.findall(r"[a-z]+", row.instruction.lower()))
            answers.setdefault(row.output, set()).add(frozenset(words))
    assert len(answers) == 40
    for row in TRAIN + VALIDATION:
        if row.family == "opposite":  # the opposite of the opposite is the word that was asked about
            assert row.output not in re.findall(r"[a-z]+", row.instruction)


def test_days_follow_each_other():
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    for row in TRAIN + VALIDATION:
        if row.family == "day_after":
            (asked,) = [day for day in days if day in row.instruction]
            assert row.output == days[(days.index(asked) + 1) % 7]


def test_the_first_rows_are_a_mixture_of_all_families():
    assert len({row.family for row in TRAIN[:60]}) == 6


def test_the_packaged_tokenizer_reads_numbers_digit_by_digit():
    tokenizer = SentencePieceTokenizer(path="tiny")
    one, two = (tokenizer.encode(f"x{digit}", bos=False, eos=False)[-1] for digit in "12")
    assert tokenizer.encode("x1221", bos=False, eos=False)[-4:] == [one, two, two, one]


def numbers(row):
    return re.findall(r"\d+", row.instruction)
