"""Checks of pattern arguments, with errors that name the allowed values."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from sparse_flash.masks.modes import plain_torch, unreadable
from torch import Tensor

_LARGEST = 2**63 - 1  # int64
_FAR = 1 << 61  # above the difference of any two indices; a sum of two such values fits int64


def integer(pattern: str, name: str, value: Any, least: int | None = 1) -> int:
    """`value` as an int of at least `least`: from an int, a numpy integer or a 0-dim int tensor.

    Raises:
        TypeError: `value` is not an integer (a bool, a float), or a tensor that cannot be read.
        ValueError: `value` is below `least`, or does not fit int64.
    """
    if type(value) is not int:
        value = _as_int(pattern, name, value)
    if least is not None and value < least:
        raise ValueError(f"{pattern}: {name} must be at least {least}, got {value}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{pattern}: {name} must be within +-(2^63 - 1), got {value}")
    return value


def _as_int(pattern: str, name: str, value: Any) -> int:
    if isinstance(value, Tensor):
        reason = unreadable(value)
        if reason:
            raise TypeError(f"{pattern}: {name} must be an int, and {reason}")
        whole = value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
    elif isinstance(value, np.ndarray):
        whole = value.ndim == 0 and value.dtype.kind in "iu"
    else:
        whole = hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)
    if not whole or (isinstance(value, Tensor) and value.is_complex()):
        raise TypeError(f"{pattern}: {name} must be an int, got {value!r}")
    with plain_torch():
        return operator.index(value)


def integers(mask: Any, **least: int | None) -> None:
    """Set the named arguments of a frozen dataclass to plain ints of at least `least`."""
    for name, low in least.items():
        value = getattr(mask, name)
        if type(value) is int and _LARGEST >= value >= (-_LARGEST if low is None else low):
            continue
        object.__setattr__(mask, name, integer(type(mask).__name__, name, value, low))


def fraction(pattern: str, name: str, value: Any) -> float:
    """`value` as a number in 0..1: from an int, a float, a numpy number or a 0-dim tensor.

    Raises:
        TypeError: `value` is not a real number (a bool, a string), or a tensor without data.
        ValueError: `value` is not in 0..1.
    """
    if isinstance(value, Tensor) and not unreadable(value) and value.ndim == 0:
        with plain_torch():
            value = value.item()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{pattern}: {name} must be a number in 0..1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{pattern}: {name} must be in 0..1, got {value!r}")
    return value


def window_of(pattern: str, window: Any) -> tuple[int | None, int | None]:
    """(left, right) from one int for both sides, or from a pair; None means unlimited."""
    pair = (window, window) if type(window) is int else _items(window)
    if len(pair) == 1 and not isinstance(window, tuple | list):
        pair *= 2
    if len(pair) != 2:
        raise ValueError(f"{pattern}: window must be an int or (left, right), got {window!r}")
    left, right = (None if side is None else integer(pattern, "window", side, 0) for side in pair)
    return left, right


def sizes(pattern: str, name: str, values: Any, least: int = 1) -> tuple[int, ...]:
    """A nonempty tuple of ints of at least `least`.

    From an int, a sequence of ints, or a one-dimensional integer array or tensor.
    """
    items = values if type(values) is tuple else _items(values)
    if not items:
        raise ValueError(f"{pattern}: {name} must not be empty")
    return tuple(integer(pattern, name, v, least) for v in items)


def _items(values: Any) -> tuple[Any, ...]:
    if type(values) is tuple:
        return values
    if isinstance(values, Tensor) and not unreadable(values) and values.ndim:
        with plain_torch():
            return tuple(values.tolist())
    if isinstance(values, np.ndarray) and values.ndim:
        return tuple(values.tolist())
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def saturate(value: int) -> int:
    """An offset or distance clamped to +-2^61, beyond every index, for arithmetic in int64.

    >>> saturate(2**70) == 2**61, saturate(-5)
    (True, -5)
    """
    return max(-_FAR, min(value, _FAR))


def normalize(mask: Any, **values: Any) -> None:
    """Set the canonical form of arguments on a frozen dataclass, so that equal masks are equal."""
    for name, value in values.items():
        object.__setattr__(mask, name, value)
