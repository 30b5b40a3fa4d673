"""References to user objects in the text of a mask: `my_masks.py:banded`."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sparse_flash.masks.mask import Mask
from sparse_flash.masks.patterns.custom import custom

# Strings, or words without spaces and brackets; ~/ is the home folder. Matches in linear time.
_WORDS = re.compile(r"""'[^']*'|"[^"]*"|(?:~/)?[^\s|&~()\[\],='"]+""")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# A text that is one reference as a whole may have spaces in its path.
_WHOLE = re.compile(r"[^'\"|&~()\[\],=]+\.py:[A-Za-z_]\w*")
_REFERENCE = re.compile(r"(?P<path>[^'\"]+\.py):(?P<name>[A-Za-z_]\w*)")


def split_reference(text: str) -> tuple[str, str] | None:
    """Path and name of a reference to an object in a Python file; None for other text.

    >>> split_reference("my masks/banded.py:wide"), split_reference("local(3)")
    (('my masks/banded.py', 'wide'), None)
    """
    found = _REFERENCE.fullmatch(text.strip())
    return (found["path"], found["name"]) if found else None


def quote_references(text: str) -> str:
    """The text with references quoted as strings, valid Python syntax.

    >>> quote_references("local(3) | ~my_masks.py:banded")
    "local(3) | ~'my_masks.py:banded'"
    >>> quote_references("my masks/banded.py:wide")
    "'my masks/banded.py:wide'"
    """
    if _WHOLE.fullmatch(text.strip()):
        return repr(text.strip())
    return _WORDS.sub(lambda m: repr(m[0]) if split_reference(m[0]) else m[0], text)


def references(text: str) -> list[str]:
    """All references in a text, in their order.

    >>> references("local(3) | a.py:banded & 'my masks/b.py:wide'")
    ['a.py:banded', 'my masks/b.py:wide']
    """
    if _WHOLE.fullmatch(text.strip()):
        return [text.strip()]
    words = (word.strip("'\"") for word in _WORDS.findall(text))
    return [word for word in words if split_reference(word)]


def is_foreign(value: Any) -> bool:
    """Whether an object is a mask, or is defined outside this package."""
    module = getattr(value, "__module__", None) or ""
    return isinstance(value, Mask) or not module.startswith("sparse_flash.")


def as_mask(value: Any, name: str) -> Mask:
    """Convert a user's object to a mask: a Mask, or a predicate of exactly two arguments.

    Raises:
        ValueError: The object is neither.

    >>> as_mask(lambda q, kv: q >= kv, "my_masks.py:backward").density(4)
    0.625
    """
    if isinstance(value, Mask):
        return value
    what, way_out = f"{name} is {_shown(value)}", ""
    if callable(value):
        way_out = f". Call it to get a mask, as in {name}(64)"
    if callable(value) and not isinstance(value, type):
        required = _required(value)
        if required in (None, 2, 4):  # custom accepts a FlexAttention mask_mod(b, h, q, kv)
            try:
                return custom(value)
            except TypeError as error:
                raise ValueError(f"{name}: {error}") from error
        what = f"{name} takes {inspect.signature(value)}"
    raise ValueError(
        f"{what}; a mask must be a Mask, or a function of exactly two arguments (q_idx, kv_idx), "
        f"index tensors, that returns a bool tensor{way_out}"
    )


def _shown(value: Any) -> str:
    return f"a class, {value.__qualname__}" if isinstance(value, type) else repr(value)[:80]


def _required(function: Any) -> int | None:
    """Number of arguments without a default; None if unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return -1
    return sum(p.default is p.empty and p.kind in _POSITIONAL for p in parameters)
