"""Masks from text, as on a command line: a parser over a whitelist; nothing is ever evaluated."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

from sparse_flash.masks.mask import PATTERNS, Mask

_MAX_LENGTH = 4 << 20  # characters; a repr of data is text of up to about 1.5 MB
_MAX_DEPTH = 100


def parse(text: str) -> Mask:
    """The mask that an expression describes: patterns by name, `|`, `&`, `~`, parentheses.

    Arguments are numbers, None, strings, tuples, lists, masks and token orders, by position or
    name. The repr of a mask parses to an equal mask (`custom` apart: functions are no text).

    Raises:
        TypeError: `text` is no string, or an argument has the wrong type.
        ValueError: Syntax that is not allowed, an unknown name (the nearest known one is
            suggested), or an argument that its pattern refuses.

    >>> parse("local(256) | global_tokens(64) | butterfly(block=128)")
    local((256, 256)) | global_tokens(64) | butterfly()
    >>> parse("loca(3)")
    Traceback (most recent call last):
    ...
    ValueError: unknown pattern 'loca' in 'loca(3)'; did you mean 'local'?
    """
    if not isinstance(text, str):
        raise TypeError(f"a mask's text must be a str, got {type(text).__name__}")
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"the mask's text has {len(text)} characters, more than {_MAX_LENGTH}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deeply"
        raise ValueError(f"cannot read the mask {_short(text)}: {reason}") from None
    result = _Reader(text).read(tree, 0)
    if not isinstance(result, Mask):
        raise ValueError(f"{_short(text)} is no mask but {result!r}; write for example local(256)")
    return result


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text

    def read(self, node: ast.expr, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            self.refuse(f"more than {_MAX_DEPTH} levels of nesting")
        match node:
            case ast.BinOp(left, ast.BitOr() | ast.BitAnd() as op, right):
                return self.combine(
                    node, op, self.read(left, depth + 1), self.read(right, depth + 1)
                )
            case ast.UnaryOp(ast.Invert(), operand):
                return ~self.mask(node, self.read(operand, depth + 1))
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
                return -value
            case ast.Constant(bool()):
                return self.refuse("True and False are no arguments of masks")
            case ast.Constant(int() | float() | str() | None as value):
                return value
            case ast.Tuple(items) | ast.List(items):
                values = [self.read(item, depth + 1) for item in items]
                return tuple(values) if isinstance(node, ast.Tuple) else values
            case ast.Call(ast.Name(name), args, keywords):
                return self.call(node, name, args, keywords, depth + 1)
            case ast.Name(name):
                self.maker(name)
                return self.refuse(f"{name!r} must be called, as in {name}(...)")
            case ast.BoolOp() | ast.UnaryOp(ast.Not()):
                return self.refuse("combine masks with |, & and ~, not with or, and, not")
        part = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
        return self.refuse(
            f"{_short(part)} is not allowed; known are names, calls, |, &, ~ and numbers"
        )

    def combine(self, node: ast.expr, op: ast.operator, left: Any, right: Any) -> Mask:
        left, right = self.mask(node, left), self.mask(node, right)
        return left | right if isinstance(op, ast.BitOr) else left & right

    def mask(self, node: ast.expr, value: Any) -> Mask:
        if not isinstance(value, Mask):
            self.refuse(f"|, & and ~ take masks, got {value!r}")
        return value

    def call(
        self,
        node: ast.Call,
        name: str,
        args: list[ast.expr],
        keywords: list[ast.keyword],
        depth: int,
    ) -> Any:
        maker = self.maker(name)
        if any(k.arg is None for k in keywords) or any(isinstance(a, ast.Starred) for a in args):
            self.refuse("* and ** are not allowed")
        values = [self.read(a, depth) for a in args]
        named = {str(k.arg): self.read(k.value, depth) for k in keywords}
        signature = inspect.signature(maker).replace(return_annotation=inspect.Signature.empty)
        try:
            signature.bind(*values, **named)
        except TypeError as error:
            self.refuse(f"{name}{signature}: {error}")
        return maker(*values, **named)

    def maker(self, name: str) -> Callable[..., Any]:
        if name == "custom":
            self.refuse("custom takes a Python function and cannot be written as text")
        if name in PATTERNS:
            return PATTERNS[name]
        close = difflib.get_close_matches(name, [p for p in PATTERNS if p != "custom"], 1, 0.5)
        hint = (
            f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(PATTERNS))}"
        )
        raise ValueError(f"unknown pattern {name!r} in {_short(self.text)}; {hint}")

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"cannot read the mask {_short(self.text)}: {reason}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
