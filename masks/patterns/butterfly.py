"""Flat butterfly: block i attends to itself and to blocks whose index differs in one bit."""

from __future__ import annotations

from typing import Any

from sparse_flash.masks.arguments import integers
from sparse_flash.masks.blockwise import bit_length, is_zero, maximum, where
from sparse_flash.masks.kleene import Columns
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.ternary import Index, Interval, Ternary, Truth


@pattern
class butterfly(Pattern):
    """allowed(q, kv) = i == j or i XOR j = 2^k, k < n_factors; i = q // block, j = kv // block.

    The union of the butterfly factors and the diagonal; n_factors=None uses all factors.
    Source: Dao et al., Pixelated Butterfly (2021), section 3 (flat block butterfly).
    Density for m = 2^p blocks: (1 + min(p, n_factors)) / m. Reach: p (a hypercube's diameter).

    >>> print(butterfly(64).text(1024, width=16))
    ┌────────────────────────────────┐
    │██████  ██      ██              │
    │████  ██  ██      ██            │
    │██  ████    ██      ██          │
    │  ██████      ██      ██        │
    │██      ██████          ██      │
    │  ██    ████  ██          ██    │
    │    ██  ██  ████            ██  │
    │      ██  ██████              ██│
    │██              ██████  ██      │
    │  ██            ████  ██  ██    │
    │    ██          ██  ████    ██  │
    │      ██          ██████      ██│
    │        ██      ██      ██████  │
    │          ██      ██    ████  ██│
    │            ██      ██  ██  ████│
    │              ██      ██  ██████│
    └────────────────────────────────┘
    """

    block: int = 128
    n_factors: int | None = None
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, block=1)
        if self.n_factors is not None:
            integers(self, n_factors=0)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The block indices differ in at most one bit, below n_factors."""
        i, j = q // self.block, kv // self.block
        limit = None if self.n_factors is None else 1 << min(self.n_factors, 62)
        if isinstance(i, Interval):
            return _classify(i, j, limit)
        return _one_bit(i ^ j, limit)


def _one_bit(differ: Any, limit: int | None, shift: Any = 0) -> Any:
    """Whether numbers have at most one bit, and are below the limit if shifted to the left."""
    one = differ & (differ - 1) == 0
    return one if limit is None else one & (differ << shift < limit)


def _classify(i: Interval, j: Interval, limit: int | None) -> Ternary:
    """Decide by the bits that are constant in both intervals.

    Above bit m, i and j are constant, and so is their XOR. Below, every combination may occur. An
    interval that crosses zero (of a shifted mask) has no constant bits, not even the sign.
    """

    def columns() -> Columns:  # only a few blocks need them
        found: Columns = (i ^ j).columns()
        return found

    differ = i.lo ^ j.lo
    if is_zero(i.lo ^ i.hi) and is_zero(j.lo ^ j.hi):  # single blocks
        one = _one_bit(differ, limit)
        return Ternary.of(one, one, columns)
    vary = (i.lo ^ i.hi) | (j.lo ^ j.hi)
    m = where(vary < 0, 63, bit_length(maximum(vary, 0)))
    at_most_one_bit = _one_bit(differ >> m, limit, m) | (m == 63)
    return Ternary.of(at_most_one_bit & (m == 0), at_most_one_bit, columns)
