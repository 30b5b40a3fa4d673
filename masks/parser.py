"""Masks from text, as on a command line: a parser with a whitelist; no code is evaluated."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any, NoReturn

from sparse_flash.masks import suggestions
from sparse_flash.masks.mask import PATTERNS, Mask
from sparse_flash.masks.operands import as_mask, is_foreign, quote_references, split_reference
from sparse_flash.masks.orders import TokenOrder

_MAX_LENGTH = 4 << 20  # characters; the repr of data has up to about 1.5 MB
_MAX_DEPTH = 100
FORMER_NAMES = {"neighbourhood": "neighborhood"}  # levels of nesting


def parse(text: str, resolve: Callable[[str], Any] | None = None) -> Mask:
    """Parse an expression of patterns by name, `|`, `&`, `~` and parentheses to a mask.

    Arguments are numbers, None, strings, tuples, lists, masks and token orders, by position or
    name. The repr of a mask parses to an equal mask, except for `custom`, which holds a function.
    Installed packages add names by entry points of the group `sparse_flash.masks`.

    Args:
        text: The expression.
        resolve: Function that returns the object of a reference `path/to/file.py:name`. The command
            line and experiments pass one that runs the file. Default: references are refused, and
            no file is run.

    Raises:
        TypeError: `text` is not a string, or an argument has the wrong type.
        ValueError: The syntax is not allowed, a name is unknown (the message suggests the nearest
            one), or a pattern refuses an argument.

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
    text = quote_references(text)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        reason = suggestions.of_syntax(text, error)
        raise ValueError(f"cannot read the mask {_short(text)}: {reason}") from None
    result = _Reader(text, resolve).read(tree, 0)
    if not isinstance(result, Mask):
        way_out = "leave out the quotes" if isinstance(result, str) else suggestions.EXAMPLE
        raise ValueError(f"{_short(text)} is not a mask but {_short(result)}; {way_out}")
    return result


class _Reader:
    def __init__(self, text: str, resolve: Callable[[str], Any] | None) -> None:
        self.text, self.resolve = text, resolve

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
                return self.refuse("True and False are not valid arguments of masks")
            case ast.Constant(int() | float() | str() | None as value):
                if isinstance(value, str) and split_reference(value):
                    return as_mask(self.reference(value), value)
                return value
            case ast.Tuple(items) | ast.List(items):
                values = [self.read(item, depth + 1) for item in items]
                return tuple(values) if isinstance(node, ast.Tuple) else values
            case ast.Call(ast.Name(name), args, keywords):
                return self.call(self.maker(name), name, args, keywords, depth + 1)
            case ast.Call(ast.Constant(str(name)), args, keywords) if split_reference(name):
                return self.call(self.reference(name), name, args, keywords, depth + 1)
            case ast.Name(name):
                return self.name(name)
            case ast.BoolOp() | ast.UnaryOp(ast.Not()):
                return self.refuse("combine masks with |, & and ~, not with or, and, not")
        part = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
        return self.refuse(suggestions.of_node(node, _short(part)))

    def combine(self, node: ast.expr, op: ast.operator, left: Any, right: Any) -> Mask:
        left, right = self.mask(node, left), self.mask(node, right)
        return left | right if isinstance(op, ast.BitOr) else left & right

    def mask(self, node: ast.expr, value: Any) -> Mask:
        if not isinstance(value, Mask):
            self.refuse(f"|, & and ~ take masks, got {value!r}")
        return value

    def name(self, name: str) -> Mask:
        maker = self.maker(name)
        if is_foreign(maker):  # of an installed package
            return as_mask(maker, name)
        return self.refuse(f"{name!r} must be called, as in {name}(...)")

    def reference(self, name: str) -> Any:
        if self.resolve is None:
            self.refuse(
                f"{name} is in a file, and masks.parse runs no files: import it and combine its "
                "masks with |, & and ~. The command line and experiments read such names"
            )
        return self.resolve(name)

    def call(
        self,
        maker: Callable[..., Any],
        name: str,
        args: list[ast.expr],
        keywords: list[ast.keyword],
        depth: int,
    ) -> Any:
        if isinstance(maker, Mask) or not callable(maker):
            self.refuse(f"{name} is not a function: write {name} alone")
        if any(k.arg is None for k in keywords) or any(isinstance(a, ast.Starred) for a in args):
            self.refuse("* and ** are not allowed")
        if name == "through":
            self.check_order_name(*args[1:2], *(k.value for k in keywords if k.arg == "order"))
        values = [self.read(a, depth) for a in args]
        named = {str(k.arg): self.read(k.value, depth) for k in keywords}
        reason = suggestions.of_arguments(name, maker, values, named)
        if reason:
            self.refuse(reason)
        if name == "through":
            self.check_order(*values[1:2], *(v for k, v in named.items() if k == "order"))
        return maker(*values, **named)

    def maker(self, name: str) -> Callable[..., Any]:
        if name == "custom":
            self.refuse("custom takes a Python function and cannot be written as text")
        name = FORMER_NAMES.get(name, name)
        if name in PATTERNS:
            return PATTERNS[name]
        hint = suggestions.of_name(name, PATTERNS.names())
        raise ValueError(f"unknown pattern {name!r} in {_short(self.text)}; {hint}")

    def check_order_name(self, node: ast.expr | None = None, *_: ast.expr) -> None:
        match node:
            case ast.Call(ast.Name(name)) | ast.Name(name) if name not in PATTERNS:
                hint = suggestions.of_known(name, _orders())
                raise ValueError(f"unknown token order {name!r} in {_short(self.text)}; {hint}")

    def check_order(self, order: Any) -> None:
        if not isinstance(order, TokenOrder):
            self.refuse(
                f"through takes a token order, like morton(height, width), got {order!r}; "
                f"known are {', '.join(sorted(_orders()))}"
            )

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"cannot read the mask {_short(self.text)}: {reason}")


def _orders() -> dict[str, Callable[..., Any]]:
    """The registered functions that return token orders."""
    return {
        name: maker
        for name, maker in PATTERNS.items()
        if str(getattr(maker, "__annotations__", {}).get("return")).endswith("Order")
    }


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    shown = text if len(text) <= 80 else text[:77] + "..."
    return repr(shown) if isinstance(value, str) else shown
