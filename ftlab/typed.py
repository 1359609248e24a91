"""Values as one types them: in the grammar of Hydra's overrides, which ``argv`` holds, and for a shell, to paste."""

from __future__ import annotations

import re
import shlex
from typing import Any

# Text that Hydra's grammar reads as itself without quotes, unless it is a word or a number there.
_PLAIN = re.compile(r"[\w./:@+-]+", re.ASCII)
_WORDS = ("null", "true", "false")


def as_typed(value: Any) -> str:
    """``value`` in the grammar of Hydra's overrides; text is quoted where that would read it as something else."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_typed(element)}' for key, element in value.items())}}}"
    return _text(value) if isinstance(value, str) else str(value)


def argument(key: str, value: Any) -> str:
    """``key=value`` for Hydra: one element of ``argv``, or of a list of overrides."""
    return f"{key}={as_typed(value)}"


def override(key: str, value: Any) -> str:
    """``key=value``, to paste."""
    return in_shell(argument(key, value))


def in_shell(text: str) -> str:
    """An override as it is in ``argv``, to paste."""
    key, equal, value = text.partition("=")
    # Between double quotes, a shell reads four characters as its own.
    quoted = f'"{value}"' if "'" in value and not re.search(r'["$`\\!]', value) else shlex.quote(value)
    return shlex.quote(key) + equal + quoted if equal else shlex.quote(text)


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not _is_number(text):
        return text
    # Double quotes where single ones would have to be escaped, or keep a shell's quotes from being plain.
    mark = '"' if re.search(r"['$`\\!]", text) and '"' not in text else "'"
    # Of backslashes, only those before a quote mark escape.
    escaped = re.sub(rf"(\\*)({mark}|\Z)", lambda m: m[1] * 2 + (f"\\{mark}" if m[2] else ""), text)
    return f"{mark}{escaped}{mark}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
