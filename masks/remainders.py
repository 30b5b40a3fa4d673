"""Comparisons of a remainder with a number, without a division.

Let M = ceil(2^F / n), e = M n - 2^F and x = k n + r with the remainder r. Then x M is k e + r M in
arithmetic modulo 2^F. If k e stays below M for all k that occur, `x % n < c` is `x M < c M` for
unsigned integers of F bits. Source: Lemire, Kaser and Kurz, Faster remainder by direct computation,
2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sparse_flash.masks.program import Value

if TYPE_CHECKING:
    from sparse_flash.masks.arrays import Array

_WORDS = ((16, np.int16, np.uint16), (32, np.int32, np.uint32), (64, np.int64, np.uint64))
# Remainders r for which a comparison with c is true: from, to, and whether all others are meant.
_RANGES: dict[Any, Any] = {
    np.less: lambda c: (0, c, False),
    np.less_equal: lambda c: (0, c + 1, False),
    np.greater: lambda c: (0, c + 1, True),
    np.greater_equal: lambda c: (0, c, True),
    np.equal: lambda c: (c, c + 1, False),
    np.not_equal: lambda c: (c, c + 1, True),
}


def residue(x: Array, n: int) -> Array:
    """A number with the same remainder modulo n > 0, smaller if `x` is made of rows and columns.

    Sums, differences and products of one value per query and one per key are computed from the
    remainders of both.
    """
    found = None if x.is_line else _residue(x, n)
    return x if found is None or found.hi - found.lo >= x.hi - x.lo else found


def _residue(x: Array, n: int) -> Array | None:
    """Of a value made of rows and columns; None for others."""
    if x.is_line:
        small: Array = x if -n < x.lo and x.hi < n else x % n
        return small
    if x.exact_operation is None:
        return None
    ufunc, *operands = x.exact_operation
    a, b = (_residue(operand, n) for operand in operands)
    if a is None or b is None:
        return None
    result: Array = a * b if ufunc is np.multiply else a + b if ufunc is np.add else a - b
    return None if result.exact_operation is None else result


def compared(ufunc: np.ufunc, x: Array, n: int, c: int) -> Value | None:
    """The comparison of x % n with a number; None if a division takes less time."""
    start, stop, others = _RANGES[ufunc](c)
    if stop == n:  # equivalent: the remainder is not below start
        start, stop, others = 0, start, not others
    if not 0 <= start < stop < n:
        return None
    least, most = x.lo // n, x.hi // n
    widest = max(32, np.iinfo(x.exact).bits)
    for bits, dtype, unsigned in _WORDS:
        if bits > widest:
            break
        factor = -(-(1 << bits) // n)
        error = factor * n - (1 << bits)
        if (most - least + 1) * error < factor:
            offset = -least * error - start * factor
            product = _scaled(x, factor, offset, dtype).view(unsigned)
            limit = Value.number((stop - start) * factor, unsigned)
            return Value(np.greater_equal if others else np.less, product, limit)
    return None


def _scaled(x: Array, factor: int, offset: int, dtype: Any) -> Value:
    """The lower bits of x * factor + offset, with as few operations on all elements as possible."""
    operation = None if x.is_line else x.exact_operation
    if operation is not None and operation[1].is_line and operation[2].is_line:
        ufunc, a, b = operation
        if ufunc is np.multiply:
            product = Value(ufunc, _scaled(a, factor, 0, dtype), b.low(dtype))
            return product if not offset else Value(np.add, product, _number(offset, dtype))
        other = _scaled(b, factor if ufunc is np.add else -factor, 0, dtype)
        return Value(np.add, _scaled(a, factor, offset, dtype), other)
    product = Value(np.multiply, x.low(dtype), _number(factor, dtype))
    return product if not offset else Value(np.add, product, _number(offset, dtype))


def _number(number: int, dtype: Any) -> Value:
    """The lower bits of a number."""
    bits = np.iinfo(dtype).bits
    number &= (1 << bits) - 1
    return Value.number(number - (number >> (bits - 1) << bits), dtype)
