"""Elements of tiles in arrays of the smallest dtype that holds them: the same truth, much faster.

A rule computes in int64, of which most bits are zeros. An `Array` stands for an int64 or bool
tensor. It knows bounds of its values (Moore, Interval Analysis, 1966), so it computes in int32
wherever no value can leave it, and divides by constants with numpy, which multiplies instead.
Where int64 would wrap around, so does an Array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks.functions import OPERATORS, is_pointwise
from sparse_flash.masks.kleene import NotUnderstoodError, Symbol, is_in_place
from sparse_flash.masks.ternary import operand
from torch import Tensor

_MIN32, _MAX32 = -(2**31), 2**31 - 1
_MIN64, _MAX64 = -(2**63), 2**63 - 1
_CONVERSIONS = {"to", "float", "double", "half", "bfloat16", "int", "short", "byte", "type"}


def _or_tensors(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operator of arrays and numbers; beside a tensor or a float, that of tensors."""

    @functools.wraps(method)
    def apply(self: Array, other: Any) -> Any:
        if type(other) is Array or type(other) is int:
            return method(self, other)
        if isinstance(other, float) or (_is_tensor(other) and other.ndim):
            return getattr(self.tensor(), method.__name__)(other)
        return method(self, other)

    return apply


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Array)


class Array(Symbol):
    """Integers or bools of many elements, which act as a tensor of int64 or bool.

    Args:
        values: bool, int32 or int64; or a function that computes int64.
        lo: A lower bound of the values, in int64; 0 of bools.
        hi: An upper bound; 1 of bools.
        low: Computes the lower 32 bits of values that are a function.

    >>> q, kv = Array.of(np.arange(3)[:, None]), Array.of(np.arange(1000, 1002))
    >>> (q * kv).values.dtype, (q * kv << 40).values.dtype
    (dtype('int32'), dtype('int64'))
    >>> ((q - kv) % 7 > 1).tensor()
    tensor([[False, False],
            [ True, False],
            [ True,  True]])
    """

    def __init__(
        self,
        values: NDArray[Any] | Callable[[], NDArray[np.int64]],
        lo: int = 0,
        hi: int = 1,
        low: Callable[[], NDArray[np.int32]] | None = None,
    ) -> None:
        self._values, self.lo, self.hi, self._low = values, lo, hi, low
        self.is_bool = not callable(values) and values.dtype == np.bool_

    @property
    def values(self) -> NDArray[Any]:
        """The values; computed at first use where the lower halves may do."""
        if callable(self._values):
            self._values = self._values()
        return self._values

    @classmethod
    def of(cls, index: NDArray[np.int64]) -> Array:
        """Some integers, of which there must be one at least."""
        return cls(index, int(index.min()), int(index.max()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that this stands for."""
        return torch.bool if self.is_bool else torch.int64

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that this stands for."""
        return torch.Size(self.values.shape)

    @property
    def ndim(self) -> int:
        """Of the tensor that this stands for."""
        return self.values.ndim

    @property
    def device(self) -> torch.device:
        """Of the tensor that this stands for."""
        return torch.device("cpu")

    def tensor(self) -> Tensor:
        """What this stands for."""
        return torch.from_numpy(np.ascontiguousarray(self.values)).to(self.dtype)

    def within(self, dtype: type[np.int32 | np.int64]) -> NDArray[Any]:
        """The values in int32, in which they must fit, or in int64."""
        if self.values.dtype != dtype:
            values = self.values.astype(dtype)
            if dtype is np.int64:
                return values
            self._values = values
        return self.values

    def low(self) -> NDArray[np.int32]:
        """The lower 32 bits of the values."""
        if callable(self._values) and self._low is not None:
            return self._low()
        return self.within(np.int32) if self.is_small else self.values.astype(np.int32)

    @property
    def is_small(self) -> bool:
        """Whether int32 holds all values."""
        return self.lo >= _MIN32 and self.hi <= _MAX32

    @_or_tensors
    def __add__(self, other: Any) -> Any:
        me, other = self, _array(other)
        if me.is_bool and other.is_bool:
            return me | other
        return _computed(np.add, me, other, me.lo + other.lo, me.hi + other.hi)

    @_or_tensors
    def __mul__(self, other: Any) -> Any:
        me, other = self, _array(other)
        if me.is_bool and other.is_bool:
            return me & other
        ends = [x * y for x in (me.lo, me.hi) for y in (other.lo, other.hi)]
        return _computed(np.multiply, me, other, min(ends), max(ends))

    @_or_tensors
    def __sub__(self, other: Any) -> Any:
        me, other = self, _array(other)
        return _computed(np.subtract, me, other, me.lo - other.hi, me.hi - other.lo)

    @_or_tensors
    def __rsub__(self, other: Any) -> Any:
        return _array(other) - self

    def __neg__(self) -> Any:
        return 0 - self

    def __pos__(self) -> Array:
        return self

    def __abs__(self) -> Any:
        if self.lo >= 0 and not self.is_bool:
            return self
        if self.lo == _MIN64:
            raise NotUnderstoodError("abs of the smallest int64")
        return _computed(np.maximum, self, -self, 0, max(-self.lo, self.hi))

    @_or_tensors
    def __floordiv__(self, other: Any) -> Any:
        me, n = self, _divisor(other)
        if me.lo == _MIN64 and n.lo <= -1 <= n.hi:
            raise NotUnderstoodError("the smallest int64 // -1")
        if n.lo == n.hi and n.lo > 0 and n.lo & (n.lo - 1) == 0:
            return me >> (n.lo.bit_length() - 1)
        ends = [x // y for x in (me.lo, me.hi) for y in (n.lo, n.hi)]
        return _computed(np.floor_divide, me, n, min(ends), max(ends))

    @_or_tensors
    def __mod__(self, other: Any) -> Any:
        me, n = self, _divisor(other)
        if n.lo != n.hi:
            lo, hi = min(0, n.lo + 1), max(0, n.hi - 1)
            return _computed(np.remainder, me, n, lo, hi)
        if n.lo < 0:
            raise NotUnderstoodError("a negative modulus")
        if me.lo >= 0 and me.hi < n.lo and not me.is_bool:
            return me
        if n.lo & (n.lo - 1) == 0:
            return me & (n.lo - 1)
        dtype = _common(me, n)
        values = me.within(dtype)
        multiple = np.floor_divide(values, dtype(n.lo))
        np.multiply(multiple, dtype(n.lo), out=multiple)  # wraps around where the difference does
        return Array(np.subtract(values, multiple, out=multiple), 0, n.lo - 1)

    @_or_tensors
    def __rfloordiv__(self, other: Any) -> Any:
        return _array(other) // self

    @_or_tensors
    def __rmod__(self, other: Any) -> Any:
        return _array(other) % self

    @_or_tensors
    def __rshift__(self, other: Any) -> Any:
        me, k = self, _shift(other)
        ends = [x >> y for x in (me.lo, me.hi) for y in (k.lo, k.hi)]
        if k.hi > 31:
            me = Array(me.within(np.int64), _MIN64, _MAX64)
        return _computed(np.right_shift, me, k, min(ends), max(ends))

    @_or_tensors
    def __lshift__(self, other: Any) -> Any:
        me, k = self, _shift(other)
        ends = [x << y for x in (me.lo, me.hi) for y in (k.lo, k.hi)]
        return _computed(np.left_shift, me, k, min(ends), max(ends))

    @_or_tensors
    def __rrshift__(self, other: Any) -> Any:
        return _array(other) >> self

    @_or_tensors
    def __rlshift__(self, other: Any) -> Any:
        return _array(other) << self

    @_or_tensors
    def __and__(self, other: Any) -> Any:
        me, other = self, _array(other)
        lo, hi = _range_of_bits(me, other)
        nonnegative = [x.hi for x in (me, other) if x.lo >= 0]
        if nonnegative:
            lo, hi = 0, min(nonnegative)
        return _computed(np.bitwise_and, me, other, lo, hi)

    @_or_tensors
    def __or__(self, other: Any) -> Any:
        other = _array(other)
        return _computed(np.bitwise_or, self, other, *_range_of_bits(self, other))

    @_or_tensors
    def __xor__(self, other: Any) -> Any:
        other = _array(other)
        return _computed(np.bitwise_xor, self, other, *_range_of_bits(self, other))

    def __invert__(self) -> Any:
        if self.is_bool:
            return Array(~self.values)
        return -1 - self

    def __pow__(self, n: Any) -> Any:
        n = operand(n)
        if not isinstance(n, int) or not 1 <= n <= 64:
            raise NotUnderstoodError("a power other than of a positive int")
        power = self
        for _ in range(n - 1):
            power = power * self
        return power

    @_or_tensors
    def __lt__(self, other: Any) -> Any:
        return _compared(np.less, self, other)

    @_or_tensors
    def __le__(self, other: Any) -> Any:
        return _compared(np.less_equal, self, other)

    @_or_tensors
    def __gt__(self, other: Any) -> Any:
        return _compared(np.greater, self, other)

    @_or_tensors
    def __ge__(self, other: Any) -> Any:
        return _compared(np.greater_equal, self, other)

    @_or_tensors
    def __eq__(self, other: object) -> Any:
        return _compared(np.equal, self, other)

    @_or_tensors
    def __ne__(self, other: object) -> Any:
        return _compared(np.not_equal, self, other)

    __hash__ = None
    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    def __truediv__(self, other: Any) -> Any:
        return self.tensor() / _plain(other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.tensor()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Torch's functions: known ones on arrays, other pointwise ones on tensors."""
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if func is Tensor.where or is_in_place(name) or "out" in kwargs:
            raise NotUnderstoodError(f"Tensor.{name}")
        known = _FUNCTIONS.get(name.strip("_"))
        if known is not None and not any(_is_tensor(x) and x.ndim for x in args):
            return known(*args, **kwargs)
        if not is_pointwise(name.strip("_")):
            raise NotUnderstoodError(f"torch's {name}")
        return func(*map(_plain, args), **{key: _plain(x) for key, x in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        """Methods of tensors that are functions of torch, and conversions."""
        if name.startswith("__"):
            raise AttributeError(name)
        known = _FUNCTIONS.get(name)
        if known is not None and name != "where":
            return lambda *args, **kwargs: known(self, *args, **kwargs)
        if is_in_place(name) or not (name in _CONVERSIONS or is_pointwise(name)):
            raise NotUnderstoodError(f".{name}")
        method = getattr(self.tensor(), name)
        return lambda *args, **kwargs: method(
            *map(_plain, args), **{key: _plain(x) for key, x in kwargs.items()}
        )


# The lower bits of a result depend on the same bits of the operands alone.
_BY_BITS = {np.add, np.subtract, np.multiply, np.bitwise_and, np.bitwise_or, np.bitwise_xor}
Dtype = type[np.int32 | np.int64]


def look_up(table: Tensor, index: tuple[Any, ...]) -> Any:
    """`table[index]`: int64 and bools as an Array, other tables as a tensor."""
    if not all(isinstance(i, Array) and not i.is_bool for i in index) or len(index) != table.ndim:
        raise NotUnderstoodError("an index beside arrays")
    if any(i.lo < 0 or i.hi >= n for i, n in zip(index, table.shape, strict=True)):
        raise NotUnderstoodError("an index from the end, or beyond it")
    if table.device.type != "cpu":
        raise NotUnderstoodError("a table on another device")
    values = table.detach().numpy()
    found = _entries(values, [i.values for i in index])
    if table.dtype == torch.bool:
        return Array(found)
    if table.dtype != torch.int64:
        return torch.from_numpy(found)
    lo, hi = int(found.min()), int(found.max())
    return Array(found, lo, hi)


def _entries(table: NDArray[Any], index: list[NDArray[Any]]) -> NDArray[Any]:
    """Entries of a table, `(n, h, w)` of a matrix whose rows are `(n, h, 1)`, columns `(n, 1, w)`.

    Rows and columns of such rectangles are copied as they lie in memory: no index is computed.
    """
    if len(index) != 2:
        return np.take(table, index[0], mode="clip") if len(index) == 1 else table[tuple(index)]
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


def _array(x: Any) -> Array:
    """An array, or a number as one."""
    if type(x) is Array:
        return x
    if type(x) is int:
        return _constant(x)
    if isinstance(x, bool) or (isinstance(x, Tensor) and x.ndim == 0 and x.dtype == torch.bool):
        return Array(np.asarray(bool(x)))
    number = operand(x)
    if not isinstance(number, int):
        raise NotUnderstoodError(f"an array combined with {x!r}")
    return _constant(number)


@functools.lru_cache(1024)
def _constant(number: int) -> Array:
    if not _MIN64 <= number <= _MAX64:
        raise NotUnderstoodError(f"{number}, beyond int64")
    return Array(np.asarray(number, np.int64), number, number)


def _divisor(x: Any) -> Array:
    n = _array(x)
    if n.is_bool or n.lo <= 0 <= n.hi:
        raise NotUnderstoodError("a divisor that may be 0")
    return n


def _shift(x: Any) -> Array:
    k = _array(x)
    if k.is_bool or k.lo < 0 or k.hi > 62:
        raise NotUnderstoodError("a shift by a number of bits that is not in 0..62")
    return k


def _common(*arrays: Array) -> Dtype:
    """The smallest dtype that holds all values."""
    return np.int32 if all(x.is_small for x in arrays) else np.int64


def _computed(ufunc: np.ufunc, a: Array, b: Array, lo: int, hi: int) -> Array:
    """An operation, in the smallest dtype that holds operands and result, or wrapped to int64."""
    if a.is_bool and b.is_bool and ufunc in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
        return Array(ufunc(a.values, b.values))
    if a.is_bool or b.is_bool:
        if ufunc not in (np.add, np.multiply) or a.is_bool == b.is_bool:
            raise NotUnderstoodError("arithmetic of bools")
        a, b = _integer(a), _integer(b)
    if lo < _MIN64 or hi > _MAX64:
        lo, hi = _MIN64, _MAX64
    small, by_bits = lo >= _MIN32 and hi <= _MAX32, ufunc in _BY_BITS
    if small and ((a.is_small and b.is_small) or by_bits):
        return Array(ufunc(a.low(), b.low()), lo, hi)
    if not by_bits:
        return Array(ufunc(a.within(np.int64), b.within(np.int64)), lo, hi)
    return Array(
        lambda: ufunc(a.within(np.int64), b.within(np.int64)),
        lo,
        hi,
        lambda: ufunc(a.low(), b.low()),
    )


def _compared(ufunc: np.ufunc, a: Array, other: Any) -> Array:
    b = _array(other)
    if a.is_bool or b.is_bool:
        if not (a.is_bool and b.is_bool and ufunc in (np.equal, np.not_equal)):
            raise NotUnderstoodError("bools compared")
        return Array(ufunc(a.values, b.values))
    dtype = np.int32 if _common(a, b) is a.values.dtype.type is np.int32 else np.int64
    return Array(ufunc(a.within(dtype), b.within(dtype)))


def _range_of_bits(a: Array, b: Array) -> tuple[int, int]:
    """Bounds of what bits of two numbers can be."""
    bits = max((x if x >= 0 else ~x).bit_length() for x in (a.lo, a.hi, b.lo, b.hi))
    return (0 if a.lo >= 0 <= b.lo else -(1 << bits)), (1 << bits) - 1


def _plain(x: Any) -> Any:
    """A tensor in place of an array."""
    return x.tensor() if isinstance(x, Array) else x


def _integer(x: Any) -> Array:
    """As int64."""
    x = _array(x)
    return Array(x.values.astype(np.int32), 0, 1) if x.is_bool else x


def _truth(x: Any) -> Array:
    """As bools."""
    x = _array(x)
    return x if x.is_bool else x != 0


def _least(a: Any, b: Any) -> Array:
    a, b = _array(a), _array(b)
    return _computed(np.minimum, a, b, min(a.lo, b.lo), min(a.hi, b.hi))


def _most(a: Any, b: Any) -> Array:
    a, b = _array(a), _array(b)
    return _computed(np.maximum, a, b, max(a.lo, b.lo), max(a.hi, b.hi))


def _clamp(x: Any, min: Any = None, max: Any = None) -> Array:  # noqa: A002 - torch's names
    x = x if min is None else _most(x, min)
    return x if max is None else _least(x, max)


def _where(condition: Any, a: Any, b: Any) -> Array:
    condition, a, b = _truth(condition), _array(a), _array(b)
    if a.is_bool != b.is_bool:
        raise NotUnderstoodError("bools beside integers")
    if a.is_bool:
        return Array(np.where(condition.values, a.values, b.values))
    dtype = _common(a, b)
    values = np.where(condition.values, a.within(dtype), b.within(dtype))
    return Array(values, min(a.lo, b.lo), max(a.hi, b.hi))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **OPERATORS,
    "where": _where, "minimum": _least, "maximum": _most, "clamp": _clamp, "clip": _clamp,
    "clamp_min": _most, "clamp_max": _least, "long": _integer, "bool": _truth,
    "logical_and": lambda a, b: _truth(a) & _truth(b),
    "logical_or": lambda a, b: _truth(a) | _truth(b),
    "logical_xor": lambda a, b: _truth(a) ^ _truth(b),
    "logical_not": lambda a: ~_truth(a),
}  # fmt: skip
