"""Three-valued logic over blocks of indices: one formula for elements and for blocks.

A pattern defines its rule once, as arithmetic and comparisons on `q` and `kv`. With index tensors
the rule returns booleans. With `Interval`s (all indices of a block at once) the same rule returns
values of Kleene's strong three-valued logic: EMPTY (false everywhere), FULL (true everywhere), or
UNKNOWN. Interval arithmetic (Moore, Interval Analysis, 1966) is conservative: it may answer UNKNOWN
too often, but EMPTY and FULL are always correct.

Besides its bounds, a value has a form inside a block: value(u, v) = base + g(u, v), where u and v
count from the start of the block, and a few parameters determine g. The signature of `q - kv < 5`
is the difference of the bases, so all blocks on a diagonal share one. The signature of `q % 7` is
the base modulo 7. Forms follow from the operators, like the bounds; nothing is sampled.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sparse_flash.masks import blockwise
from sparse_flash.masks.blockwise import Numbers, bit_length, full, maximum, minimum, numbers, where
from sparse_flash.masks.kleene import (
    EMPTY,
    FULL,
    UNKNOWN,
    Columns,
    NotUnderstoodError,
    Symbol,
    Ternary,
    columns_of,
)
from torch import Tensor

__all__ = ["EMPTY", "FULL", "UNKNOWN", "Blocks", "Index", "Interval", "Ternary", "Truth"]

_FAR = 1 << 62  # below every index, also of shifted masks
_NONE = -(1 << 63)  # parameters of a constant value
_LARGEST = 2**31 - 1  # upper bound of every index

# Argument of a rule: an index tensor or an Interval.
Index = Any
# Result of a rule: a bool tensor or a Ternary.
Truth = Any
Form = tuple[Numbers, Columns]  # base and parameters, one entry per block


@dataclass(frozen=True)
class Blocks:
    """A batch of rectangles of (q, kv) indices, bounds inclusive; four int64 tensors or arrays.

    Shapes of queries and keys broadcast: `(n, 1)` and `(m,)` stand for n x m rectangles.
    `largest`: Bound of the absolute values of all indices, for overflow checks.

    >>> tile = Blocks(*map(torch.tensor, ([0, 128], [127, 255], [0, 0], [127, 127])))
    >>> tile.q_hi
    tensor([127, 255])
    """

    q_lo: Numbers
    q_hi: Numbers
    kv_lo: Numbers
    kv_hi: Numbers
    largest: int = _LARGEST

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch."""
        return np.broadcast_shapes(self.q_lo.shape, self.kv_lo.shape)

    @property
    def q(self) -> Interval:
        """The query indices of each rectangle."""
        return Interval(numbers(self.q_lo), numbers(self.q_hi), self.largest)

    @property
    def kv(self) -> Interval:
        """The key indices of each rectangle."""
        return Interval(numbers(self.kv_lo), numbers(self.kv_hi), self.largest)

    def __getitem__(self, index: Tensor | slice) -> Blocks:
        ends = (self.q_lo[index], self.q_hi[index], self.kv_lo[index], self.kv_hi[index])
        return Blocks(*ends, self.largest)


class Unknown(Symbol):
    """A value without bounds, known only by its inputs: a float, or the result of an overflow."""

    def __init__(self, *sources: Symbol) -> None:
        self.like, self._sources = sources[0].like, sources

    def columns(self) -> Columns:
        """The signature of all inputs of the value."""
        return columns_of(self._sources)()

    def _with(self, *others: Any) -> Unknown:
        return Unknown(self, *symbols(*others))

    def _compare(self, other: Any) -> Ternary:
        value = blockwise.states(self.like, UNKNOWN)
        made = self._with(other)
        return Ternary(value, lambda: [value, *made.columns()])

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _with
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __truediv__ = __rtruediv__ = _with
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _with
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __pow__ = __rpow__ = _with
    __neg__ = __abs__ = __invert__ = __pos__ = _with
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compare  # type: ignore[assignment]
    __hash__ = None


class Interval(Symbol):
    """All integers from `lo` to `hi`, inclusive: the range of an index inside a block.

    Args:
        lo: Smallest value in each block, int64.
        hi: Largest value in each block, int64.
        largest: Bound of the absolute values in all blocks. Arithmetic that could overflow int64
            returns an `Unknown`, because tensors would wrap around.
        form: Function that returns (base, parameters). With a modulus other than 0, they need to
            determine only the residue. Default: base lo, no parameters, as for an index.

    >>> q, kv = Interval(*torch.tensor([[128], [255]])), Interval(*torch.tensor([[0], [127]]))
    >>> (q - kv).lo, (q - kv).hi
    (tensor([1]), tensor([255]))
    >>> (kv <= q).value, (kv <= q - 100).value, (kv > q).value  # FULL, UNKNOWN, EMPTY
    (tensor([2], dtype=torch.int8), tensor([1], dtype=torch.int8), tensor([0], dtype=torch.int8))
    >>> (q ^ kv).lo, ((q - kv) * 3 % 1000).hi, (q >> 7 << 3).lo, abs(kv - q).lo
    (tensor([128]), tensor([765]), tensor([8]), tensor([1]))
    """

    def __init__(
        self,
        lo: Numbers,
        hi: Numbers,
        largest: int = _LARGEST,
        form: Callable[[int], Form] | None = None,
    ) -> None:
        self.lo, self.hi, self.largest, self._form = lo, hi, largest, form
        self.like = lo
        self._forms: dict[int, Form] = {}

    @property
    def device(self) -> torch.device:
        """Device of the represented tensor."""
        return blockwise.device(self.lo)

    def form(self, modulus: int = 0) -> Form:
        """Base and parameters in each block."""
        if self._form is None:
            return self.lo, []
        if modulus in self._forms:  # several comparisons ask
            return self._forms[modulus]
        base, parameters = self._form(modulus)
        if parameters:  # a constant value has none
            constant = self.lo == self.hi
            if not blockwise.is_zero(constant):
                base = where(constant, self.lo, base)
                parameters = [where(constant, _NONE, p) for p in parameters]
        self._forms[modulus] = base, parameters
        return base, parameters

    def columns(self) -> Columns:
        """The base and the parameters."""
        base, parameters = self.form()
        return [base, *parameters]

    def __add__(self, other: Any) -> Any:
        return self._linear(other, operator.add)

    def __sub__(self, other: Any) -> Any:
        return self._linear(other, operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __neg__(self) -> Any:
        return self * -1

    def __pos__(self) -> Interval:
        return self

    def __invert__(self) -> Any:
        return -1 - self

    def _linear(self, other: Any, operation: Callable[[Any, Any], Any]) -> Any:
        other = operand(other)
        if isinstance(other, Unknown):
            return Unknown(self, other)
        lo, hi = bounds(other)
        largest = self.largest + magnitude(other)
        if largest >= _FAR:
            return Unknown(self, *symbols(other))
        if operation is operator.sub:
            lo, hi = hi, lo

        def form(modulus: int) -> Form:
            (a, p), (b, r) = self.form(modulus), form_of(other, modulus)
            return operation(a, b), p + r

        return Interval(operation(self.lo, lo), operation(self.hi, hi), largest, form)

    def __mul__(self, other: Any) -> Any:
        other = operand(other)
        if isinstance(other, Unknown):
            return Unknown(self, other)
        largest = self.largest * magnitude(other)
        if largest >= _FAR:
            return Unknown(self, *symbols(other))
        if isinstance(other, int):
            ends = (self.lo * other, self.hi * other)

            def scaled(modulus: int) -> Form:
                base, parameters = self.form(modulus)
                return base * other, parameters

            return Interval(*(ends if other >= 0 else ends[::-1]), largest, scaled)

        def form(modulus: int) -> Form:
            (a, p), (b, r) = self.form(modulus), other.form(modulus)
            factors = [a % modulus, b % modulus] if modulus else [a, b]
            return full(a, 0), p + r + factors

        return Interval(*blockwise.corners(operator.mul, self, other), largest, form)

    def __floordiv__(self, n: Any) -> Any:
        n = operand(n)
        if not isinstance(n, int) or n == 0:
            return self._by_interval(n, operator.floordiv)
        if n < 0:
            return -self // -n

        def form(modulus: int) -> Form:
            base, parameters = self.form(modulus * n if modulus * n < _FAR else 0)
            return blockwise.floor_divide(base, n), [*parameters, blockwise.remainder(base, n)]

        ends = (blockwise.floor_divide(self.lo, n), blockwise.floor_divide(self.hi, n))
        return Interval(*ends, self.largest // n + 1, form)

    def __mod__(self, n: Any) -> Any:
        n = operand(n)
        if not isinstance(n, int) or n == 0:
            return self._by_interval(n, operator.mod)
        if n < 0:
            return -(-self % -n)

        first, width = blockwise.remainder(self.lo, n), self.hi - self.lo
        same = width < n - first  # otherwise it wraps around, and every remainder is possible
        lo, hi = where(same, first, 0), where(same, first + width, n - 1)

        def form(modulus: int) -> Form:
            if modulus and n % modulus == 0:
                base, parameters = self.form(modulus)
                return base if self.largest < n else blockwise.remainder(base, modulus), parameters
            base, parameters = self.form(modulus)
            start = base - self.lo if not modulus else blockwise.remainder(base - self.lo, modulus)
            inside = [where(same, p, _NONE) for p in (*parameters, start)]
            base, parameters = self.form(n)
            around = [where(same, _NONE, p) for p in (*parameters, blockwise.remainder(base, n))]
            return where(same, first, 0), inside + around

        return Interval(lo, hi, n - 1, form)

    def _by_interval(self, n: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """Divide by a positive value that may vary."""
        if not isinstance(n, Interval) or not bool((n.lo > 0).all()):
            raise NotUnderstoodError("a divisor that may be 0 or negative")
        form = _exact_form(self, n)
        if operation is operator.floordiv:
            return Interval(*blockwise.corners(operation, self, n), self.largest, form)
        same = (n.lo == n.hi) & (self.lo // n.lo == self.hi // n.lo)
        lo = where(same, self.lo % n.lo, 0)
        return Interval(lo, where(same, self.hi % n.lo, n.hi - 1), n.largest, form)

    def __rshift__(self, k: Any) -> Any:
        k = shift_operand(k)
        if isinstance(k, int):
            return self // (1 << k)
        form = _exact_form(self, k)
        return Interval(*blockwise.corners(operator.rshift, self, k), self.largest, form)

    def __lshift__(self, k: Any) -> Any:
        k = shift_operand(k)
        if isinstance(k, int):
            return self * (1 << k)
        most = int(k.hi.max()) if len(k.hi) else 0
        if self.largest << most >= _FAR:
            return Unknown(self, k)
        form = _exact_form(self, k)
        return Interval(*blockwise.corners(operator.lshift, self, k), self.largest << most, form)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._constant(other) // self

    def __rmod__(self, other: Any) -> Any:
        return self._constant(other) % self

    def __rlshift__(self, other: Any) -> Any:
        return self._constant(other) << self

    def __rrshift__(self, other: Any) -> Any:
        return self._constant(other) >> self

    def _constant(self, value: Any) -> Interval:
        value = operand(value)
        if not isinstance(value, int):
            raise NotUnderstoodError(f"an index combined with {type(value).__name__}")
        everywhere = full(self.lo, value)
        return Interval(everywhere, everywhere, abs(value))

    def __abs__(self) -> Interval:
        positive, negative = self.lo >= 0, self.hi <= 0
        lo = where(positive, self.lo, where(negative, -self.hi, 0))
        hi = maximum(-self.lo, self.hi)

        def form(modulus: int) -> Form:
            base, parameters = self.form()
            sign = where(positive, 1, where(negative, -1, 0))
            return base * sign, [*parameters, sign, where(sign == 0, base, 0)]

        return Interval(lo, hi, self.largest, form)

    def __and__(self, other: Any) -> Any:
        return self._bitwise(other, operator.and_)

    def __or__(self, other: Any) -> Any:
        return self._bitwise(other, operator.or_)

    def __xor__(self, other: Any) -> Any:
        return self._bitwise(other, operator.xor)

    def _bitwise(self, other: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """High bits that are constant in the block determine the result; low bits may be any."""
        other = operand(other)
        if isinstance(other, Unknown):
            return Unknown(self, other)
        if isinstance(other, int):
            if operation is operator.and_ and other > 0 and other & (other + 1) == 0:
                return self % (other + 1)  # only the lower bits
            other = self._constant(other)
        vary = (self.lo ^ self.hi) | (other.lo ^ other.hi)
        low = where(vary < 0, 63, bit_length(maximum(vary, 0)))  # the sign varies
        span = where(low == 63, 2**63 - 1, (1 << minimum(low, 62)) - 1)
        lo = where(low == 63, -(2**63), operation(self.lo, other.lo) & ~span)
        hi = where(low == 63, 2**63 - 1, lo + span)
        if operation is operator.and_:  # at most the smaller operand, if neither is negative
            hi = where(self.lo >= 0, minimum(hi, self.hi), hi)
            hi = where(other.lo >= 0, minimum(hi, other.hi), hi)
            lo = where((self.lo >= 0) | (other.lo >= 0), maximum(lo, 0), lo)

        def form(modulus: int) -> Form:
            if modulus and modulus & (modulus - 1) == 0:  # lower bits depend on lower bits
                (a, p), (b, r) = self.form(modulus), other.form(modulus)
                below = [blockwise.remainder(x, modulus) for x in (a, b)]
                return full(a, 0), [*p, *r, *below]
            (a, p), (b, r) = self.form(), other.form()
            below = [a - (self.lo & ~span), b - (other.lo & ~span), low]
            base = where(low == 63, 0, operation(self.lo, other.lo) & ~span)
            return base, p + r + below

        largest = (1 << max(self.largest, other.largest).bit_length()) - 1
        edge = largest + 1  # all high bits of a negative number are set
        return Interval(maximum(lo, -edge), minimum(hi, largest), edge, form)

    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    def __pow__(self, n: Any) -> Any:
        n = operand(n)
        if not isinstance(n, int) or not 1 <= n <= 64:
            raise NotUnderstoodError("an exponent that is not a positive int")
        power: Any = self
        for _ in range(n - 1):
            power = power * self
        return power

    def __truediv__(self, other: Any) -> Unknown:
        return Unknown(self, *symbols(operand(other)))

    __rtruediv__ = __truediv__

    def __le__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b, lo, hi: (b <= lo, a <= hi))

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, lambda a, b, lo, hi: (b < lo, a < hi))

    def __ge__(self, other: Any) -> Any:
        return ~(self < other)

    def __gt__(self, other: Any) -> Any:
        return ~(self <= other)

    def __eq__(self, other: object) -> Any:
        return self._compare(other, _equal)

    def __ne__(self, other: object) -> Any:
        return ~(self == other)

    __hash__ = None

    def _compare(self, other: Any, states: Callable[..., tuple[Numbers, Numbers]]) -> Ternary:
        """states: Where a comparison of (lo, hi) with (lo, hi) is sure, and where possible."""
        other = operand(other, floats=True)
        if isinstance(other, Unknown):
            return other._compare(self)

        def decided_by() -> Columns:
            if isinstance(other, float) or self.largest + magnitude(other) >= 1 << 63:
                return [*self.columns(), *(c for s in symbols(other) for c in s.columns())]
            (a, p), (b, r) = self.form(), form_of(other)
            return [a - b, *p, *r]  # a comparison depends only on the difference

        if isinstance(other, float) and not isinstance(self.lo, Tensor):  # torch rounds both
            ends = (blockwise.tensor(self.lo), blockwise.tensor(self.hi), other, other)
            surely, possibly = states(*ends)
            return Ternary.of(surely.numpy(), possibly.numpy(), decided_by)
        return Ternary.of(*states(self.lo, self.hi, *bounds(other)), decided_by)


def _equal(a: Any, b: Any, lo: Any, hi: Any) -> tuple[Numbers, Numbers]:
    meet = (a <= hi) & (b >= lo)
    return meet & (a == b) & (lo == hi), meet


def always(index: Index) -> Truth:
    """True at every index, FULL for every interval."""
    return index >= -_FAR


def never(index: Index) -> Truth:
    """False at every index, EMPTY for every interval."""
    return index < -_FAR


def operand(x: Any, floats: bool = False) -> Any:
    """Convert to an Interval, an Unknown, an int or (with `floats`) a float; refuse others."""
    if type(x) is int or type(x) is Interval:
        return x
    x = x.widened() if isinstance(x, Symbol) else x
    if isinstance(x, Interval | Unknown) or type(x) is int:
        return x
    if isinstance(x, Tensor):
        if x.ndim or x.is_complex() or x.dtype == torch.bool:
            raise NotUnderstoodError(f"a tensor of shape {tuple(x.shape)} and {x.dtype}")
        if x.is_floating_point():
            raise NotUnderstoodError("a tensor of floats")
        return int(x)
    if isinstance(x, float) and floats and not math.isnan(x):
        return x
    if hasattr(x, "__index__") and not isinstance(x, bool):
        return operator.index(x)
    raise NotUnderstoodError(f"an index combined with {type(x).__name__}")


def shift_operand(k: Any) -> Any:
    """Number of bits of a shift, 0..62; larger shifts of tensors differ between devices."""
    k = operand(k)
    inside = 0 <= k <= 62 if isinstance(k, int) else isinstance(k, Interval)
    if isinstance(k, Interval):
        inside = bool(((k.lo >= 0) & (k.hi <= 62)).all())
    if not inside:
        raise NotUnderstoodError("a shift by a number of bits that is not in 0..62")
    return k


def symbols(*values: Any) -> tuple[Symbol, ...]:
    """The values that depend on indices; all others must be numbers."""
    for value in values:
        if isinstance(value, Tensor) and not isinstance(value, Symbol) and value.ndim:
            raise NotUnderstoodError(
                f"a tensor of shape {tuple(value.shape)} combined with an index"
            )
    return tuple(value for value in values if isinstance(value, Symbol))


def bounds(x: Any) -> tuple[Any, Any]:
    """Smallest and largest value."""
    return (x, x) if type(x) is int or not isinstance(x, Interval) else (x.lo, x.hi)


def magnitude(x: Any) -> int:
    """Bound of the absolute value."""
    return abs(x) if type(x) is int or not isinstance(x, Interval) else x.largest


def form_of(x: Any, modulus: int = 0) -> tuple[Any, Columns]:
    """Base and parameters of an interval or a number."""
    return x.form(modulus) if isinstance(x, Interval) else (x, [])


def _exact_form(*values: Interval) -> Callable[[int], Form]:
    """The form of a value determined by others, without further structure."""
    made = columns_of(values)
    return lambda modulus: (full(values[0].lo, 0), made())
