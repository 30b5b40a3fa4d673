"""Suggestions for errors in the text of a mask."""

from __future__ import annotations

import ast
import difflib
import inspect
import keyword
import re
from collections.abc import Callable, Iterable
from typing import Any

EXAMPLE = "write for example local(256) | global_tokens(64)"
# Names in other libraries and papers, and their expressions here. A suggestion of a bare name shows
# only the text before "(".
_OTHERS = {
    "all": "full()",
    "attention_sinks": "sinks(4)",
    "band": "local(256)",
    "banded": "local(256)",
    "bidirectional": "full()",
    "block_causal": "causal() | block_diagonal(128)",
    "dense": "full()",
    "diagonal": "local(0)",
    "dilated_window": "dilated(256, 2)",
    "document": "documents((100, 300))",
    "global": "global_tokens(64)",
    "identity": "local(0)",
    "lower_triangular": "causal()",
    "packed": "documents((100, 300))",
    "prefix_lm": "causal() | sinks(64)",
    "sink": "sinks(4)",
    "sliding": "local(256)",
    "sliding_window": "local(256)",
    "sliding_window_causal": "local((255, 0))",
    "swa": "local((255, 0))",
    "tril": "causal()",
    "varlen": "documents((100, 300))",
    "window": "local(256)",
}
_KINDS = ("standard", "sdpa", "flex", "linear", "performer", "linformer")  # of attention


def of_name(name: str, names: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or all of them.

    >>> of_name("loca", ["local", "causal"]), of_name("sliding_window", ["local"])
    ("did you mean 'local'?", "did you mean 'local', as in local(256)?")
    >>> of_name("standrd", ["star"])
    "did you mean 'standard'? That is an attention, not a mask; full() is the mask that \
allows everything"
    """
    known = [n for n in names if n != "custom"]
    words = {n.lower(): n for n in (*_OTHERS, *_KINDS, *known)}
    lower = name.lower()
    close = [lower] if lower in words else difflib.get_close_matches(lower, words, 1, 0.6)
    if not close:
        return f"known are {', '.join(sorted(known))}"
    found = words[close[0]]
    if found in known:
        return f"did you mean {found!r}?"
    if found in _OTHERS:
        example = _OTHERS[found]
        return f"did you mean {example.partition('(')[0]!r}, as in {example}?"
    kind = "is an attention, not a mask; full() is the mask that allows everything"
    return f"it {kind}" if found == name else f"did you mean {found!r}? That {kind}"


def of_known(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them.

    >>> of_known("hilbrt", ["hilbert", "morton"]), of_known("snake", ["hilbert", "morton"])
    ("did you mean 'hilbert'?", 'known are hilbert, morton')
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    close = close or difflib.get_close_matches(name.lower(), names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"


def of_syntax(text: str, error: Exception) -> str:
    """Explain a syntax error of Python's parser without Python terms.

    >>> def hint(text):
    ...     try:
    ...         ast.parse(text, mode="eval")
    ...     except SyntaxError as error:
    ...         return of_syntax(text, error)
    >>> hint("local(256) |")
    "it ends with '|': another mask must follow"
    >>> hint("global(4)")
    "'global' is a keyword of Python; did you mean 'global_tokens', as in global_tokens(64)?"
    """
    stripped = text.strip()
    if not stripped:
        return f"it is empty; {EXAMPLE}"
    if not isinstance(error, SyntaxError):
        return str(error) or "nested too deeply"
    for wrong, right in (("||", "|"), ("&&", "&"), ("!", "~")):
        if wrong in stripped:
            return f"combine masks with |, & and ~: write {right} for {wrong}"
    if stripped[-1] in "|&~":
        return f"it ends with {stripped[-1]!r}: another mask must follow"
    if stripped[0] in "|&":
        return f"it begins with {stripped[0]!r}: a mask must come first"
    for word in re.findall(r"[A-Za-z_]+", stripped):
        if keyword.iskeyword(word) and word in _OTHERS:
            return f"{word!r} is a keyword of Python; {of_name(word, ())}"
    reason = error.msg
    if "never closed" in reason:
        return f"{reason}: the text seems to be cut off"
    kind = next((k for k in _KINDS if re.match(rf"{k}\s*:", stripped)), None)
    if kind:
        return f"{kind!r} is an attention, not a mask: leave out '{kind}:'"
    at = stripped[max(0, (error.offset or 1) - 1) :][:20]
    return f"{reason} at {at!r}" if at and "unmatched" not in reason else reason


def of_node(node: ast.expr, part: str) -> str:
    """Explain why a part of the text is not allowed, and what to write instead."""
    match node:
        case ast.Attribute(ast.Name("masks")) | ast.Call(ast.Attribute(ast.Name("masks"))):
            way_out = "leave out 'masks.'"
        case ast.Call(ast.Attribute(attr="shift" | "through" as method)):
            way_out = f"write {method}(MASK, ...)"
        case ast.Lambda():
            way_out = "in Python, masks.custom(function) makes a mask of a function"
        case ast.BinOp(op=ast.Add()):
            way_out = "write | for +"
        case ast.BinOp(op=ast.Mult()):
            way_out = "write & for *"
        case ast.BinOp(op=ast.Sub()):
            way_out = "write & ~ for -"
        case _:
            way_out = "allowed are names, calls, |, &, ~ and numbers"
    return f"{part} is not allowed; {way_out}"


def of_arguments(
    name: str, maker: Callable[..., Any], values: list[Any], named: dict[str, Any]
) -> str | None:
    """Explain why a pattern refuses these arguments, with its signature; None if it does not.

    >>> of_arguments("local", lambda window: None, [], {"w": 3})
    "local(window) has no argument 'w'; did you mean window=3?"
    """
    signature = inspect.signature(maker)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    plain = signature.replace(parameters=parameters, return_annotation=signature.empty)
    known = [p.name for p in parameters]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for wrong in named.keys() - known if not anything else ():
        free = [p for p in known[len(values) :] if p not in named]
        close = difflib.get_close_matches(wrong, free, 1, 0.3) or free[:1]
        hint = f"; did you mean {close[0]}={named[wrong]!r}?" if close else ""
        return f"{name}{plain} has no argument {wrong!r}{hint}"
    try:
        signature.bind(*values, **named)
    except TypeError as error:
        return f"{name}{plain}: {error}"
    return None
