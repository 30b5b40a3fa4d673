"""Integers of the elements of tiles, in the smallest dtype that holds them.

A rule computes in int64, of which most bits are zeros. An `Array` stands for an int64, int32 or
bool tensor while the rule is traced. It has bounds of its values (Moore, Interval Analysis, 1966).
The program of the rule computes in int16 or int32 if the values fit, or if later operations read
only those bits. It wraps around like int64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from sparse_flash.masks.dense import Dense, by_tensors, is_floating
from sparse_flash.masks.functions import OPERATORS
from sparse_flash.masks.kleene import NotUnderstoodError
from sparse_flash.masks.program import Program, Value
from sparse_flash.masks.remainders import compared, residue
from sparse_flash.masks.ternary import operand
from torch import Tensor

Dtype = type[np.int16 | np.int32 | np.int64]

_RANGES: tuple[tuple[Dtype, int, int], ...] = tuple(
    (dtype, int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    for dtype in (np.int16, np.int32, np.int64)
)
_BITS: dict[Dtype, int] = {np.int16: 16, np.int32: 32, np.int64: 64}
_UNSIGNED = {np.int16: np.uint16, np.int32: np.uint32, np.int64: np.uint64}
_DEEPEST = 64  # nested operations without a value before one is computed


def _widened(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operator of integers, with fallbacks for floats and other tensors."""

    @functools.wraps(method)
    def apply(self: Array, other: Any) -> Any:
        if type(other) is not Array and type(other) is not int:
            if isinstance(other, float) or is_floating(other):
                floats = self.floating(other if is_floating(other) else None)
                return getattr(floats, method.__name__)(other)
            if isinstance(other, Dense) or (
                isinstance(other, Tensor) and (other.ndim or other.is_floating_point())
            ):
                return by_tensors(getattr(Tensor, method.__name__), self, other)
        return method(self, other)

    return apply


class Array(Dense):
    """Integers or bools of many elements, which act as a tensor of int64, int32 or bool.

    Args:
        value: Value of dtype bool, int16, int32 or int64; or a function from one of these integer
            dtypes to the value of the lower bits.
        lo: Lower bound of the integers; 0 for bools.
        hi: Upper bound of the integers; 1 for bools.
        width: Bits of a tensor element, 64 or 32; 0 for numbers and bools, which do not take part
            in type promotion.
        inputs: Arrays of which this is a function, if `value` is one.

    >>> q, kv = Array.index([0, 9], 1, 10), Array.index([0, 999], 2, 1000)
    >>> [x.value.sample.dtype.name for x in (q * kv, q * kv << 10, q * kv << 40)]
    ['int16', 'int32', 'int64']
    >>> ((q - kv) % 7 > 1).tensor()
    tensor([[[False,  True],
             [ True,  True]]])
    """

    functions: ClassVar[dict[str, Callable[..., Any]]] = dict(OPERATORS)

    def __init__(
        self,
        value: Value | Callable[[Dtype], Value],
        lo: int = 0,
        hi: int = 1,
        width: int = 64,
        inputs: tuple[Array, ...] = (),
    ) -> None:
        self._depth: int
        self.sample_shape: tuple[int, ...]  # see `Value`
        self.lo, self.hi, self.width = lo, hi, width
        depths: list[int] = [x._depth for x in inputs]
        self._depth = 1 + max(depths) if depths else 0  # operations without a value
        shapes: list[tuple[int, ...]] = [x.sample_shape for x in inputs]
        self._lower: Callable[[Dtype], Value] | None = None
        self.operation: tuple[np.ufunc, Array, Array] | None = None  # whose result this is
        self._remainder: tuple[Array, int] | None = None  # of which this is the remainder
        self._made: dict[Any, Value] = {}
        if isinstance(value, Value):
            dtype, shapes = value.sample.dtype, [value.sample.shape]
            self._made[dtype.type] = value
            self.is_bool = dtype == np.bool_
            self.width = 0 if self.is_bool else width
        else:
            self._lower, self.is_bool = value, False
            if self._depth > _DEEPEST:
                self.low(self.exact)
        self.sample_shape = np.broadcast_shapes(*shapes)

    @classmethod
    def of(cls, value: Value) -> Array:
        """Integers or bools without known bounds."""
        dtype = value.sample.dtype
        if dtype == np.bool_:
            return cls(value)
        limits = np.iinfo(dtype)
        return cls(value, int(limits.min), int(limits.max), limits.bits)

    @classmethod
    def index(cls, sample: Any, axis: int, length: int) -> Array:
        """Indices of `length` queries (axis 1) or keys (axis 2). sample: Two of them."""
        return cls(Program.index(sample, axis), 0, length - 1)

    @property
    def exact(self) -> Any:
        """The smallest dtype that holds all integers."""
        return np.bool_ if self.is_bool else smallest(self.lo, self.hi)

    @property
    def value(self) -> Value:
        """In the smallest dtype that holds all integers."""
        return self.low(self.exact)

    def low(self, dtype: Any) -> Value:
        """The lower bits in a dtype: the integers themselves, if it holds them."""
        made = self._made.get(dtype)
        if made is not None:
            return made
        exact = self.exact
        if np.dtype(dtype).itemsize > np.dtype(exact).itemsize:
            made = self.low(exact).cast(dtype)
        else:
            size = np.dtype(dtype).itemsize
            wider = next((x for x in self._made.values() if x.sample.itemsize > size), None)
            if wider is not None:
                made = wider.cast(dtype)
            else:
                assert self._lower is not None
                made = self._lower(dtype)
            if dtype is exact:  # casts make all others
                self._lower, self._depth = None, 0
        self._made[dtype] = made
        return made

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor that this stands for."""
        return torch.bool if self.is_bool else torch.int32 if self.width == 32 else torch.int64

    @property
    def is_line(self) -> bool:
        """Whether this depends on queries alone, on keys alone, or on neither."""
        return math.prod(self.sample_shape) < 4

    @property
    def exact_operation(self) -> tuple[np.ufunc, Array, Array] | None:
        """The sum, difference or product that this is, if it does not wrap around."""
        end = 1 << (self.width - 1) if self.width else 0
        return self.operation if -end < self.lo and self.hi < end - 1 else None

    def whole(self) -> Value:
        """In the dtype of the tensor."""
        return self.low(np.bool_ if self.is_bool else np.int32 if self.width == 32 else np.int64)

    def floating(self, like: Dense | None = None) -> Dense:
        """As floats: of torch's default dtype, or that of other values."""
        dtype = torch.get_default_dtype() if like is None else like.dtype
        if dtype not in (torch.float32, torch.float64):
            raise NotUnderstoodError(f"arrays of {dtype}")
        return Dense.of_value(self.in_floats(np.float32 if dtype == torch.float32 else np.float64))

    def in_floats(self, dtype: Any) -> Value:
        """Converted to floats.

        A sum or product of one value per query and one per key is computed in floats: as they are
        exact, it is rounded once, like the integer. Products that may be -0.0 are not.
        """
        if self.exact_operation is not None:
            ufunc, a, b = self.exact_operation
            exact = 1 << (np.finfo(dtype).nmant + 1)
            if all(-exact <= x.lo and x.hi <= exact and x.is_line for x in (a, b)) and (
                ufunc is not np.multiply or min(a.lo, b.lo) >= 0
            ):
                return Value(ufunc, *(x.value.cast(dtype) for x in (a, b)))
        return self.value.cast(dtype)

    @_widened
    def __add__(self, other: Any) -> Any:
        me, other = self, as_array(other)
        if me.is_bool and other.is_bool:
            return me | other
        return computed(np.add, me, other, me.lo + other.lo, me.hi + other.hi)

    @_widened
    def __mul__(self, other: Any) -> Any:
        me, other = self, as_array(other)
        if me.is_bool and other.is_bool:
            return me & other
        ends = [x * y for x in (me.lo, me.hi) for y in (other.lo, other.hi)]
        return computed(np.multiply, me, other, min(ends), max(ends))

    @_widened
    def __sub__(self, other: Any) -> Any:
        me, other = self, as_array(other)
        return computed(np.subtract, me, other, me.lo - other.hi, me.hi - other.lo)

    @_widened
    def __rsub__(self, other: Any) -> Any:
        return as_array(other) - self

    def __neg__(self) -> Any:
        return 0 - self

    def __pos__(self) -> Array:
        return self

    def __abs__(self) -> Any:
        if self.is_bool:
            raise NotUnderstoodError("abs of bools")
        if self.lo >= 0:
            return self
        if self.lo == -(1 << (self.width - 1)):
            raise NotUnderstoodError("abs of the smallest integer")
        return computed(np.maximum, self, -self, 0, max(-self.lo, self.hi))

    @_widened
    def __floordiv__(self, other: Any) -> Any:
        me, n = self, _divisor(self, other)
        if n.lo <= -1 <= n.hi and me.lo == -(1 << (max(me.width, n.width) - 1)):
            raise NotUnderstoodError("the smallest integer // -1")
        if n.lo == n.hi and n.lo > 0 and n.lo & (n.lo - 1) == 0 and n.width == 0:
            return me >> (n.lo.bit_length() - 1)
        ends = [x // y for x in (me.lo, me.hi) for y in (n.lo, n.hi)]
        return computed(np.floor_divide, me, n, min(ends), max(ends))

    @_widened
    def __mod__(self, other: Any) -> Any:
        me, n = self, _divisor(self, other)
        if n.lo != n.hi or n.width or me.is_bool:
            lo, hi = min(0, n.lo + 1), max(0, n.hi - 1)
            return computed(np.remainder, me, n, lo, hi)
        if n.lo < 0:
            raise NotUnderstoodError("a negative modulus")
        if me.lo >= 0 and me.hi < n.lo:
            return me
        if n.lo & (n.lo - 1) == 0:
            return me & (n.lo - 1)
        me = residue(me, n.lo)
        found = _later(functools.partial(_lower_remainder, me, n), me, n, 0, n.lo - 1)
        found._remainder = me, n.lo
        return found

    @_widened
    def __rfloordiv__(self, other: Any) -> Any:
        return as_array(other) // self

    @_widened
    def __rmod__(self, other: Any) -> Any:
        return as_array(other) % self

    @_widened
    def __rshift__(self, other: Any) -> Any:
        me, k = self, _shift(self, other)
        ends = [x >> y for x in (me.lo, me.hi) for y in (k.lo, k.hi)]
        if me.is_bool:
            return computed(np.right_shift, me, k, min(ends), max(ends))

        def lower(dtype: Dtype) -> Value:
            enough = next((d for d in _BITS if _BITS[d] >= _BITS[dtype] + k.hi), np.int64)
            wide = min(me.exact, enough, key=_BITS.__getitem__)
            return Value(np.right_shift, me.low(wide), k.low(wide)).cast(dtype)

        return _later(lower, me, k, min(ends), max(ends))

    @_widened
    def __lshift__(self, other: Any) -> Any:
        me, k = self, _shift(self, other)
        ends = [x << y for x in (me.lo, me.hi) for y in (k.lo, k.hi)]
        return computed(np.left_shift, me, k, min(ends), max(ends))

    @_widened
    def __rrshift__(self, other: Any) -> Any:
        return as_array(other) >> self

    @_widened
    def __rlshift__(self, other: Any) -> Any:
        return as_array(other) << self

    @_widened
    def __and__(self, other: Any) -> Any:
        me, other = self, as_array(other)
        lo, hi = _range_of_bits(me, other)
        nonnegative = [x.hi for x in (me, other) if x.lo >= 0]
        if nonnegative:
            lo, hi = 0, min(nonnegative)
        return computed(np.bitwise_and, me, other, lo, hi)

    @_widened
    def __or__(self, other: Any) -> Any:
        other = as_array(other)
        return computed(np.bitwise_or, self, other, *_range_of_bits(self, other))

    @_widened
    def __xor__(self, other: Any) -> Any:
        other = as_array(other)
        return computed(np.bitwise_xor, self, other, *_range_of_bits(self, other))

    def __invert__(self) -> Any:
        if self.is_bool:
            return Array(Value(np.logical_not, self.value))
        return -1 - self

    def __pow__(self, n: Any) -> Any:
        if isinstance(n, float):
            floats: Any = self.floating()
            return floats**n
        n = operand(n)
        if not isinstance(n, int) or not 1 <= n <= 64:
            raise NotUnderstoodError("a power other than of a positive int")
        power = self
        for _ in range(n - 1):
            power = power * self
        return power

    @_widened
    def __lt__(self, other: Any) -> Any:
        return _compared(np.less, self, other)

    @_widened
    def __le__(self, other: Any) -> Any:
        return _compared(np.less_equal, self, other)

    @_widened
    def __gt__(self, other: Any) -> Any:
        return _compared(np.greater, self, other)

    @_widened
    def __ge__(self, other: Any) -> Any:
        return _compared(np.greater_equal, self, other)

    @_widened
    def __eq__(self, other: object) -> Any:
        return _compared(np.equal, self, other)

    @_widened
    def __ne__(self, other: object) -> Any:
        return _compared(np.not_equal, self, other)

    __hash__ = None  # type: ignore[assignment]
    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    @_widened
    def __truediv__(self, other: Any) -> Any:
        return self.floating() / other

    @_widened
    def __rtruediv__(self, other: Any) -> Any:
        return by_tensors(Tensor.__rtruediv__, self, other)


# Operations whose lower result bits depend only on the same bits of the operands.
_BY_BITS = {np.add, np.subtract, np.multiply, np.bitwise_and, np.bitwise_or, np.bitwise_xor}
_BY_BITS |= {np.left_shift}


def smallest(lo: int, hi: int) -> Dtype:
    """The smallest dtype that holds all integers from `lo` to `hi`."""
    return next(dtype for dtype, least, most in _RANGES if lo >= least and hi <= most)


def as_array(x: Any) -> Array:
    """An array, or a number as one."""
    if type(x) is Array:
        return x
    if type(x) is int:
        return _number(x)
    if isinstance(x, bool) or (isinstance(x, Tensor) and x.ndim == 0 and x.dtype == torch.bool):
        return Array(Value.number(bool(x), np.bool_))
    number = operand(x)
    if not isinstance(number, int):
        raise NotUnderstoodError(f"an array combined with {x!r}")
    return _number(number)


@functools.lru_cache(1024)
def _number(number: int) -> Array:
    if not -(1 << 63) <= number < 1 << 63:
        raise NotUnderstoodError(f"{number}, beyond int64")
    return Array(Value.number(number, np.int64), number, number, width=0)


def _divisor(divided: Array, x: Any) -> Array:
    n = as_array(x)
    common_width(divided, n)
    if n.is_bool or n.lo <= 0 <= n.hi:
        raise NotUnderstoodError("a divisor that may be 0")
    return n


def _shift(shifted: Array, x: Any) -> Array:
    k = as_array(x)
    most = 30 if max(shifted.width, k.width) == 32 else 62
    if k.is_bool or k.lo < 0 or k.hi > most:
        raise NotUnderstoodError(f"a shift by a number of bits that is not in 0..{most}")
    return k


def common_width(a: Array, b: Array) -> int:
    """Bits of a result element, by PyTorch's type promotion."""
    width = max(a.width, b.width) or 64
    for number in (a, b):
        if number.width == 0 and not -(1 << (width - 1)) <= number.lo < 1 << (width - 1):
            raise NotUnderstoodError(f"{number.lo} beside int{width}")
    return width


def computed(ufunc: np.ufunc, a: Array, b: Array, lo: int, hi: int) -> Array:
    """An operation in the smallest sufficient dtype; it wraps around at the tensor's width."""
    if a.is_bool and b.is_bool and ufunc in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
        return Array(Value(ufunc, a.value, b.value))
    if a.is_bool or b.is_bool:
        if ufunc not in (np.add, np.multiply) or a.is_bool == b.is_bool:
            raise NotUnderstoodError("arithmetic of bools")
        a, b = _integer(a), _integer(b)
    if ufunc in _BY_BITS:
        found = _later(lambda dtype: Value(ufunc, a.low(dtype), b.low(dtype)), a, b, lo, hi)
        if ufunc in (np.add, np.subtract, np.multiply):
            found.operation = ufunc, a, b
        return found
    dtype = smallest(min(a.lo, b.lo, lo), max(a.hi, b.hi, hi))
    value = Value(ufunc, a.low(dtype), b.low(dtype))
    return Array(value, lo, hi, common_width(a, b))


def _later(lower: Callable[[Dtype], Value], a: Array, b: Array, lo: int, hi: int) -> Array:
    """A result whose bits are computed once later operations read them."""
    width = common_width(a, b)
    end = 1 << (width - 1)
    if lo < -end or hi >= end:
        lo, hi = -end, end - 1
    return Array(lower, lo, hi, width, (a, b))


def _compared(ufunc: np.ufunc, a: Array, other: Any) -> Array:
    b = as_array(other)
    if a.is_bool or b.is_bool:
        if not (a.is_bool and b.is_bool and ufunc in (np.equal, np.not_equal)):
            raise NotUnderstoodError("bools compared")
        return Array(Value(ufunc, a.value, b.value))
    common_width(a, b)
    if a._remainder is not None and b.width == 0 and b.lo == b.hi:
        found = compared(ufunc, *a._remainder, b.lo)
        if found is not None:
            return Array(found)
    dtype = smallest(min(a.lo, b.lo), max(a.hi, b.hi))
    return Array(Value(ufunc, a.low(dtype), b.low(dtype)))


def _lower_remainder(x: Array, n: Array, dtype: Dtype) -> Value:
    """The lower bits of x % n: they need only the lower bits of the multiple of n."""
    wide = smallest(min(x.lo, n.lo), max(x.hi, n.lo))
    divided, divisor = x.low(wide), n.low(wide)
    if x.lo >= 0:  # an unsigned division takes less time
        divided, divisor = (value.view(_UNSIGNED[wide]) for value in (divided, divisor))
    quotient = Value(np.floor_divide, divided, divisor).cast(dtype)
    return Value(np.subtract, x.low(dtype), Value(np.multiply, quotient, n.low(dtype)))


def _range_of_bits(a: Array, b: Array) -> tuple[int, int]:
    """Bounds of what bits of two numbers can be."""
    bits = max((x if x >= 0 else ~x).bit_length() for x in (a.lo, a.hi, b.lo, b.hi))
    return (0 if a.lo >= 0 <= b.lo else -(1 << bits)), (1 << bits) - 1


def _integer(x: Array) -> Array:
    """Bools as integers of width 0."""
    return Array(x.value.cast(np.int16), 0, 1, width=0) if x.is_bool else x


Dense.classes.update(dict.fromkeys((np.bool_, np.int32, np.int64), Array.of))
