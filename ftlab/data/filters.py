"""``dataset.filter``: which rows to keep, as one expression over a row's columns.

Python's syntax, read with ``ast`` and evaluated by this file alone: names, numbers, texts, lists, comparisons,
``and or not in``, arithmetic and a few functions. There are no attributes, no subscripts and no other calls, so
that an expression can look at a row and do nothing else.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ftlab.data.problems import BadRow, require_object
from ftlab.errors import ConfigError

Row = Mapping[str, Any]
_Evaluate = Callable[[Row], Any]

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Div: operator.truediv, ast.Mod: operator.mod},
    ast.Mult: lambda a, b: _number(a) * _number(b),  # no "a" * 10**9
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{"len": len, "abs": abs, "min": min, "max": max},
    "words": lambda text: len(text.split()),
    "lower": lambda text: text.lower(),
    "strip": lambda text: text.strip(),
    "startswith": lambda text, start: text.startswith(start),
    "endswith": lambda text, end: text.endswith(end),
}


class Filter:
    """One expression, compiled; ``names`` are the columns it reads.

    Raises:
        ConfigError: for what is no expression of this kind.
    """

    def __init__(self, expression: str):
        self.expression = expression
        self.names: set[str] = set()
        try:
            tree = ast.parse(expression.strip(), mode="eval")
            self._evaluate = self._compile(tree.body)
            if not self.names:
                raise ValueError("it looks at no column")
        except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
            reason = getattr(error, "msg", None) or str(error) or type(error).__name__
            raise ConfigError(
                "dataset.filter",
                f"{expression!r} is no expression over a row: {reason}",
                "dataset.filter=\"'len(output) > 10'\"",
            ) from error

    def keeps(self, row: Any) -> bool:
        """Whether ``row`` is kept.

        Raises:
            BadRow: when the expression does not apply to the row: a column that is not there, another type.
        """
        require_object(row)
        try:
            return bool(self._evaluate(row))
        except KeyError as missing:
            found = ", ".join(map(str, row))
            problem = f"has no column {missing.args[0]!r}, which dataset.filter looks at; columns found: {found}"
            raise BadRow("missing_field", problem) from None
        except (TypeError, AttributeError, ArithmeticError, ValueError) as error:
            problem = f"{{row}}: dataset.filter={self.expression!r} does not apply to it: {error}"
            raise BadRow("wrong_type", problem) from None

    def _compile(self, node: ast.expr) -> _Evaluate:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                value = node.value
                return lambda _: value
            case ast.Name(id=name):
                self.names.add(name)
                return lambda row: row[name]
            case ast.List(elts=elements) | ast.Tuple(elts=elements) | ast.Set(elts=elements):
                parts = [self._compile(element) for element in elements]
                return lambda row: [part(row) for part in parts]
            case ast.BoolOp(op=op, values=values):
                parts = [self._compile(value) for value in values]
                if isinstance(op, ast.And):
                    return lambda row: all(part(row) for part in parts)
                return lambda row: any(part(row) for part in parts)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                apply, inner = _UNARY[type(op)], self._compile(operand)
                return lambda row: apply(inner(row))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                combine, a, b = _ARITHMETIC[type(op)], self._compile(left), self._compile(right)
                return lambda row: combine(a(row), b(row))
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARE for op in ops):
                parts = [self._compile(side) for side in (left, *others)]
                tests = [_COMPARE[type(op)] for op in ops]
                return lambda row: _chain([part(row) for part in parts], tests)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
                function, parts = _FUNCTIONS[name], [self._compile(arg) for arg in args]
                return lambda row: function(*(part(row) for part in parts))
        known = f"columns, constants, comparisons, and/or/not/in, + - * / %, and {', '.join(sorted(_FUNCTIONS))}(...)"
        raise ValueError(f"{ast.unparse(node)!r} is not allowed; allowed are {known}")


def _chain(values: list[Any], tests: list[Callable[[Any, Any], Any]]) -> bool:
    """``a < b < c`` as Python means it."""
    return all(test(a, b) for a, test, b in zip(values, tests, values[1:], strict=False))


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return value
