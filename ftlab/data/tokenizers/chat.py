"""Chat templates: the Jinja programs that come with a tokenizer and render messages as the model knows them.

A template is code of whoever published the model, so it runs in Jinja's immutable sandbox: it sees the messages and
a few helpers, changes nothing, and what reaches for Python behind them ends the rendering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from ftlab.data.tokenizers.base import CHAT_TEMPLATE, TOKENIZER_CONFIG
from ftlab.data.tokenizers.files import KEY, read_bytes, read_json_beside
from ftlab.errors import ConfigError, DataError

Messages = Sequence[Mapping[str, Any]]
_MAX_PRODUCT = 10_000_000  # of what a template multiplies: repeated text, or a number


def read_chat_template(folder: Path) -> str | None:
    """The template in ``folder``: ``chat_template.jinja``, else what tokenizer_config.json holds, else None."""
    if (folder / CHAT_TEMPLATE).is_file():
        try:
            return read_bytes(folder / CHAT_TEMPLATE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                KEY, f"{folder / CHAT_TEMPLATE} is no UTF-8: {error}", "the file saved as UTF-8"
            ) from error
    template = read_json_beside(folder, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(template, list) and all(isinstance(one, dict) and "template" in one for one in template):
        # Several with names: for tools, for retrieval.
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str | None):
        problem = "is neither text nor a list of objects with name and template"
        fix = f"a {CHAT_TEMPLATE} beside it, which is read instead"
        raise ConfigError(KEY, f"the chat_template in {folder / TOKENIZER_CONFIG} {problem}", fix)
    return template


def render_chat(
    template: str,
    messages: Messages,
    *,
    add_generation_prompt: bool,
    specials: Mapping[str, str],
    **variables: Any,
) -> str:
    """``messages`` as the text that ``template`` makes of them, which is what transformers makes of them too.

    Args:
        messages: each with ``role`` and ``content``, and whatever else the template knows.
        add_generation_prompt: end with what comes before an answer of the assistant.
        specials: ``bos_token``, ``eos_token``… as text.
        variables: what else the template may ask for, e.g. ``tools`` or ``enable_thinking``.

    Raises:
        ConfigError: for a template that is no valid Jinja, or tries to break out of its sandbox.
        DataError: where the template refuses the messages; its own words.
    """
    given: dict[str, Any] = {"tools": None, "documents": None, **specials, **variables}
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return _compile(template).render(messages=plain, add_generation_prompt=add_generation_prompt, **given)
    except SecurityError as error:
        raise ConfigError(
            KEY,
            f"its chat template does what a template must not, and was stopped: {error}",
            "a tokenizer whose publisher you trust",
        ) from error
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(KEY, f"its chat template is no valid Jinja: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise ConfigError(KEY, "its chat template calls itself without an end") from error
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise DataError(f"the tokenizer's chat template refuses these messages: {error}") from error


@cache
def _compile(template: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment.from_string(template)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """A product, unless it would fill the memory."""
        sizes = [len(side) if isinstance(side, str | list | tuple) else abs(side) for side in (left, right)]
        if (sizes[0] * sizes[1] if operator == "*" else sizes[1]) > _MAX_PRODUCT:
            raise SecurityError(f"a product of {operator!r} beyond {_MAX_PRODUCT}")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's own returns an undefined value, which prints as nothing: the attempt would go unseen.
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")


class _Namespace(Namespace):
    """Jinja's ``namespace()``, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in [*(args[1] if len(args) > 1 else ()), *kwargs]:
            _refuse_private(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace with the attribute {name!r}")


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: templates mark the assistant's words by it, shown as they are."""

    tags = {"generation"}  # noqa: RUF012 -- Jinja's interface

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would misread, which no model has seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
