"""Checks of pattern arguments, with errors that say what is allowed."""

from __future__ import annotations

from typing import Any


def integer(pattern: str, name: str, value: Any, least: int | None = 1) -> int:
    """`value` if it is an int of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{pattern}: {name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{pattern}: {name} must be at least {least}, got {value}")
    return value


def window_of(pattern: str, window: Any) -> tuple[int | None, int | None]:
    """(left, right) from one int for both sides or a pair, None meaning unlimited."""
    pair = tuple(window) if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"{pattern}: window must be an int or (left, right), got {window!r}")
    for side in pair:
        if side is not None:
            integer(pattern, "window", side, 0)
    return pair


def sizes(pattern: str, name: str, values: Any, least: int = 1) -> tuple[int, ...]:
    """A nonempty tuple of ints of at least `least`, from a sequence or a single int."""
    items = tuple(values) if isinstance(values, tuple | list) else (values,)
    if not items:
        raise ValueError(f"{pattern}: {name} must not be empty")
    return tuple(integer(pattern, name, v, least) for v in items)


def normalise(mask: Any, **values: Any) -> None:
    """Set the canonical form of arguments on a frozen dataclass, so that equal masks are equal."""
    for name, value in values.items():
        object.__setattr__(mask, name, value)
