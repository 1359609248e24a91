"""What users are told to type gives back the value that was meant: through a shell, and through Hydra's parser."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.typed import argument, in_shell, override

WORDS = ("null", "TRUE", "1e3", "-5", "1_000", "inf", "NaN", ".5", "0x1", "007", "${x}", "$HOME", "~/x", "it's", "\\'")
TEXTS = (
    st.text(st.sampled_from("\"'$`!\\ =,:{}[]()~#*?&;|<>@%+-_./\t\naZ09é漢"), max_size=12)
    | st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
)
VALUES = (
    TEXTS
    | st.lists(TEXTS, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b_c"]), TEXTS)
    | (st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False))
)


@settings(deadline=None)
@given(value=VALUES)
def test_what_is_pasted_is_read_as_the_value(value: Any) -> None:
    [typed] = shlex.split(override("some.key", value))
    assert typed == argument("some.key", value)
    read = OverridesParser.create().parse_override(typed).value()
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("value", "pasted"),
    [
        ("outputs/latest@50", "k=outputs/latest@50"),
        ("sweep/0_seed=1", "k=\"'sweep/0_seed=1'\""),
        ("my runs", "k=\"'my runs'\""),
        ("2026", "k=\"'2026'\""),
        ("it's", "k='\"it'\"'\"'s\"'"),
        ("$HOME/x", "k='\"$HOME/x\"'"),
        (2e-5, "k=2e-05"),
        (None, "k=null"),
    ],
)
def test_only_what_needs_quotes_gets_them(value: Any, pasted: str) -> None:
    assert override("k", value) == pasted


def test_an_override_with_a_function_is_pasted_between_quotes() -> None:
    assert shlex.split(f"-m {in_shell('optimizer.lr=interval(1, 2)')}") == ["-m", "optimizer.lr=interval(1, 2)"]
