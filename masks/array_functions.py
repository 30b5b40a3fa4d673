"""Functions of torch and look-ups in tables, for elements in arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks.arrays import Array, as_array, common_width, computed, smallest
from sparse_flash.masks.dense import Dense, by_tensors
from sparse_flash.masks.float_arrays import FloatArray
from sparse_flash.masks.kleene import NotUnderstoodError
from sparse_flash.masks.program import Value
from torch import Tensor

_OF_FLOATS = (  # one argument; torch converts integers to its default dtype first
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "exp2", "expm1",
    "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "sigmoid", "erf", "reciprocal",
)  # fmt: skip


def look_up(table: Tensor, index: tuple[Any, ...]) -> Dense:
    """`table[index]`, of the class for the dtype of the table."""
    if not all(type(i) is Array and not i.is_bool for i in index) or len(index) != table.ndim:
        raise NotUnderstoodError("an index beside arrays")
    if any(i.lo < 0 or i.hi >= n for i, n in zip(index, table.shape, strict=True)):
        raise NotUnderstoodError("an index from the end, or beyond it")
    if table.device.type != "cpu":
        raise NotUnderstoodError("a table on another device")
    values = table.detach().numpy()
    found = Value(lambda *at: _entries(values, at), *(i.low(np.int64) for i in index))
    if table.dtype in (torch.int64, torch.int32):
        some = values[tuple(slice(i.lo, i.hi + 1) for i in index)]
        return Array(found, int(some.min()), int(some.max()), 8 * some.itemsize)
    return Dense.of_value(found)


def _entries(table: NDArray[Any], index: tuple[NDArray[Any], ...]) -> NDArray[Any]:
    """Entries of a table, `(n, h, w)` of a matrix whose rows are `(n, h, 1)`, columns `(n, 1, w)`.

    Rows and columns of such rectangles are copied as they lie in memory: no index is computed.
    """
    if len(index) != 2:
        return np.take(table, index[0], mode="clip") if len(index) == 1 else table[index]
    rows, cols = index
    apart = rows.ndim == cols.ndim == 3 and rows.shape[2] == cols.shape[1] == 1
    if not apart or len(rows) != len(cols):
        return table[rows, cols]
    found = np.empty((len(rows), rows.shape[1], cols.shape[2]), table.dtype)
    for i, (row, col) in enumerate(zip(rows[:, :, 0], cols[:, 0], strict=True)):
        lo, hi = col.min(), col.max() + 1
        if hi - lo == len(col) and (np.diff(col) == 1).all():
            found[i] = table[row, lo:hi]
        elif hi - lo <= 4 * len(col):
            np.take(table[row, lo:hi], col - lo, axis=1, out=found[i], mode="clip")
        else:
            found[i] = table[row[:, None], col]
    return found


def _long(x: Any) -> Array:
    x = as_array(x)
    if x.is_bool:
        return Array(x.value.cast(np.int16), 0, 1)
    return Array(x.low, x.lo, x.hi, inputs=(x,))


def _int(x: Any) -> Array:
    """As int32: the lower 32 bits."""
    x = as_array(x)
    if x.is_bool:
        return Array(x.value.cast(np.int16), 0, 1, 32)
    if x.lo >= -(1 << 31) and x.hi < 1 << 31:
        return Array(x.low, x.lo, x.hi, 32, (x,))
    return Array(x.low, -(1 << 31), (1 << 31) - 1, 32, (x,))


def _float(x: Any) -> FloatArray:
    return FloatArray(as_array(x).in_floats(np.float32))


def _double(x: Any) -> FloatArray:
    return FloatArray(as_array(x).in_floats(np.float64))


def _truth(x: Any) -> Array:
    """As bools."""
    x = as_array(x)
    return x if x.is_bool else x != 0


_DTYPES: dict[torch.dtype, Callable[[Any], Any]] = {
    torch.int64: _long, torch.int32: _int, torch.float32: _float, torch.float64: _double,
    torch.bool: _truth,
}  # fmt: skip


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.to(dtype)`."""
    if len(args) == 1 and not kwargs and args[0] in _DTYPES:
        return _DTYPES[args[0]](x)
    raise NotUnderstoodError(".to with options")


def _least(a: Any, b: Any) -> Array:
    a, b = _integers(a, b)
    return computed(np.minimum, a, b, min(a.lo, b.lo), min(a.hi, b.hi))


def _most(a: Any, b: Any) -> Array:
    a, b = _integers(a, b)
    return computed(np.maximum, a, b, max(a.lo, b.lo), max(a.hi, b.hi))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Array:  # noqa: A002 - torch's names
    x = x if min is None else _most(x, min)
    return x if max is None else _least(x, max)


def _integers(*values: Any) -> list[Array]:
    arrays = [as_array(x) for x in values]
    if any(x.is_bool for x in arrays):
        raise NotUnderstoodError("bools beside integers")
    return arrays


def _where(condition: Any, a: Any, b: Any) -> Array:
    condition, a, b = _truth(condition), as_array(a), as_array(b)
    if a.is_bool and b.is_bool:
        return Array(Value(np.where, condition.value, a.value, b.value))
    a, b = _integers(a, b)
    lo, hi = min(a.lo, b.lo), max(a.hi, b.hi)
    dtype = smallest(lo, hi)
    value = Value(np.where, condition.value, a.low(dtype), b.low(dtype))
    return Array(value, lo, hi, common_width(a, b))


def _like(default: int | None = None) -> Callable[..., Array]:
    """`torch.zeros_like(q, dtype=torch.bool)`: the same value everywhere."""

    def make(x: Any, value: Any = default, *, dtype: Any = None, device: Any = None) -> Array:
        dtype = as_array(x).dtype if dtype is None else dtype
        if type(value) not in (bool, int) or dtype not in (torch.bool, torch.int64):
            raise NotUnderstoodError(f"a constant of {dtype}")
        if dtype == torch.bool:
            return Array(Value.number(bool(value), np.bool_))
        return Array(Value.number(value, np.int64), value, value)

    return make


def _of_floats(name: str) -> Callable[[Any], Any]:
    function = getattr(torch, name)
    return lambda x: by_tensors(function, x.floating())


Array.functions.update(
    {
        "where": _where, "minimum": _least, "maximum": _most, "clamp": _clamp, "clip": _clamp,
        "clamp_min": _most, "clamp_max": _least, "long": _long, "int": _int, "bool": _truth,
        "float": _float, "double": _double, "to": _to, "pow": operator.pow,
        "square": lambda x: x * x, "zeros_like": _like(0), "ones_like": _like(1),
        "full_like": _like(), "detach": lambda x: x, "contiguous": lambda x: x,
        "logical_and": lambda a, b: _truth(a) & _truth(b),
        "logical_or": lambda a, b: _truth(a) | _truth(b),
        "logical_xor": lambda a, b: _truth(a) ^ _truth(b),
        "logical_not": lambda a: ~_truth(a),
    }
)  # fmt: skip
Array.functions.update({name: _of_floats(name) for name in _OF_FLOATS})
