"""Three-valued logic over blocks of indices: one formula serves elements and blocks alike.

A pattern writes its rule once, as arithmetic and comparisons on `q` and `kv`. Given index tensors,
the rule gives booleans. Given `Interval`s (all indices of a block at once), the same rule gives
Kleene's strong three-valued logic: EMPTY (false everywhere), FULL (true everywhere), or UNKNOWN.
Interval arithmetic (Moore, Interval Analysis, 1966) is conservative: it answers UNKNOWN too often,
never EMPTY or FULL wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Ordered so that "or" is the maximum, "and" the minimum, "not" the reflection.
EMPTY, UNKNOWN, FULL = 0, 1, 2

_FAR = 1 << 62  # below every index, also below those of shifted masks

# What a rule computes with: an index tensor, an Interval, or an Indirect.
Index = Any
# What a rule returns: a bool tensor, or a Ternary.
Truth = Any


@dataclass(frozen=True)
class Blocks:
    """A batch of rectangles of (q, kv) indices, bounds inclusive; four int64 tensors of one shape.

    >>> tile = Blocks(*map(torch.tensor, ([0, 128], [127, 255], [0, 0], [127, 127])))
    >>> tile.q_hi
    tensor([127, 255])
    """

    q_lo: Tensor
    q_hi: Tensor
    kv_lo: Tensor
    kv_hi: Tensor

    @property
    def q(self) -> Interval:
        """The query indices of each rectangle."""
        return Interval(self.q_lo, self.q_hi)

    @property
    def kv(self) -> Interval:
        """The key indices of each rectangle."""
        return Interval(self.kv_lo, self.kv_hi)

    def __getitem__(self, index: Tensor) -> Blocks:
        return Blocks(self.q_lo[index], self.q_hi[index], self.kv_lo[index], self.kv_hi[index])


class Ternary:
    """A tensor of truth values EMPTY, UNKNOWN, FULL (int8) with Kleene's `&`, `|`, `~`.

    >>> a, b = Ternary(torch.tensor([0, 1, 2])), Ternary(torch.tensor([1, 1, 1]))
    >>> (a | b).value, (a & b).value, (~a).value
    (tensor([1, 1, 2]), tensor([0, 1, 1]), tensor([2, 1, 0]))
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def of(cls, surely: Tensor, possibly: Tensor) -> Ternary:
        """FULL where `surely`, UNKNOWN where only `possibly`, EMPTY elsewhere."""
        return cls(surely.to(torch.int8) + (surely | possibly).to(torch.int8))

    def __and__(self, other: Ternary) -> Ternary:
        return Ternary(torch.minimum(self.value, other.value))

    def __or__(self, other: Ternary) -> Ternary:
        return Ternary(torch.maximum(self.value, other.value))

    def __invert__(self) -> Ternary:
        return Ternary(FULL - self.value)


class Interval:
    """Every integer from `lo` to `hi`, inclusive: what an index inside a block may be.

    >>> q, kv = Interval(*torch.tensor([[128], [255]])), Interval(*torch.tensor([[0], [127]]))
    >>> (q - kv).lo, (q - kv).hi
    (tensor([1]), tensor([255]))
    >>> (kv <= q).value, (kv <= q - 100).value, (kv > q).value  # FULL, UNKNOWN, EMPTY
    (tensor([2], dtype=torch.int8), tensor([1], dtype=torch.int8), tensor([0], dtype=torch.int8))
    """

    def __init__(self, lo: Tensor, hi: Tensor) -> None:
        self.lo, self.hi = lo, hi

    def __add__(self, other: Interval | int) -> Interval:
        lo, hi = _bounds(other)
        return Interval(self.lo + lo, self.hi + hi)

    def __sub__(self, other: Interval | int) -> Interval:
        lo, hi = _bounds(other)
        return Interval(self.lo - hi, self.hi - lo)

    def __floordiv__(self, n: int) -> Interval:
        return Interval(self.lo // n, self.hi // n)

    def __mod__(self, n: int) -> Interval:
        same = self.lo // n == self.hi // n  # otherwise it wraps around: any remainder
        return Interval(torch.where(same, self.lo % n, 0), torch.where(same, self.hi % n, n - 1))

    def __le__(self, other: Interval | int) -> Ternary:
        lo, hi = _bounds(other)
        return Ternary.of(self.hi <= lo, self.lo <= hi)

    def __lt__(self, other: Interval | int) -> Ternary:
        lo, hi = _bounds(other)
        return Ternary.of(self.hi < lo, self.lo < hi)

    def __ge__(self, other: Interval | int) -> Ternary:
        return ~(self < other)

    def __gt__(self, other: Interval | int) -> Ternary:
        return ~(self <= other)

    def __eq__(self, other: object) -> Ternary:  # type: ignore[override]
        lo, hi = _bounds(other)
        meet = (self.lo <= hi) & (self.hi >= lo)
        return Ternary.of(meet & (self.lo == self.hi) & (lo == hi), meet)

    def __ne__(self, other: object) -> Ternary:  # type: ignore[override]
        return ~(self == other)

    __hash__ = None  # type: ignore[assignment]


def always(index: Index) -> Truth:
    """True at every index, FULL for every interval."""
    return index >= -_FAR


def never(index: Index) -> Truth:
    """False at every index, EMPTY for every interval."""
    return index < -_FAR


def _bounds(x: Any) -> tuple[Any, Any]:
    return (x.lo, x.hi) if isinstance(x, Interval) else (x, x)


class RangeTable:
    """Minimum and maximum of `table[lo..hi]` for many ranges, each in O(1): a sparse table.

    Memory: 2 n log2(n) integers. Source: Bender & Farach-Colton, The LCA Problem Revisited, 2000.

    >>> table = RangeTable(torch.tensor([3, 1, 4, 1, 5]))
    >>> bounds = table.bounds(torch.tensor([2]), torch.tensor([4]))
    >>> bounds.lo, bounds.hi
    (tensor([1]), tensor([5]))
    """

    def __init__(self, table: Tensor) -> None:
        lows, highs = [table.to(torch.int32)], [table.to(torch.int32)]
        for k in range(len(table).bit_length() - 1):
            n = len(table) - (2 << k) + 1  # starts from which 2^(k+1) entries fit
            lows.append(_pad(torch.minimum(lows[k][:n], lows[k][1 << k :][:n]), len(table)))
            highs.append(_pad(torch.maximum(highs[k][:n], highs[k][1 << k :][:n]), len(table)))
        self.low, self.high = torch.stack(lows), torch.stack(highs)

    def bounds(self, lo: Tensor, hi: Tensor) -> Interval:
        """The interval of values in `table[lo..hi]`, bounds inclusive."""
        low, high = self.low.to(lo.device), self.high.to(lo.device)
        k = bit_length(hi - lo + 1) - 1
        second = hi + 1 - (1 << k)  # two overlapping ranges of 2^k cover lo..hi
        return Interval(
            torch.minimum(low[k, lo], low[k, second]).long(),
            torch.maximum(high[k, lo], high[k, second]).long(),
        )


def _pad(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, n - len(x)))


class Indirect(Interval):
    """The values `table[lo..hi]`, remembering the table, so that `//` and `%` stay tight.

    Without the table, a 16 x 8 pixel patch in Morton order would be known only by its smallest and
    largest raster index, and its columns not at all.
    """

    def __init__(self, tables: Callable[[str, int], RangeTable], lo: Tensor, hi: Tensor) -> None:
        self.tables, self.source = tables, (lo, hi)
        values = tables("//", 1).bounds(lo, hi)
        super().__init__(values.lo, values.hi)

    def __floordiv__(self, n: int) -> Interval:
        return self.tables("//", n).bounds(*self.source)

    def __mod__(self, n: int) -> Interval:
        return self.tables("%", n).bounds(*self.source)


def bit_length(x: Tensor) -> Tensor:
    """Bits needed for each non-negative integer below 2^53: 0 -> 0, 1 -> 1, 255 -> 8, 256 -> 9."""
    return torch.frexp(x.double()).exponent.long()
