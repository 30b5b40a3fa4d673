"""Index tables for rules: permutations, document numbers and tables of the user."""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sparse_flash.masks import blockwise
from sparse_flash.masks.array_functions import look_up
from sparse_flash.masks.blockwise import (
    Numbers,
    bit_length,
    floor_divide,
    full,
    maximum,
    minimum,
    numbers,
    remainder,
    take,
    tensor,
)
from sparse_flash.masks.dense import Dense
from sparse_flash.masks.kleene import Columns, NotUnderstoodError, Symbol, answer, columns_of
from sparse_flash.masks.modes import is_fake, plain_torch, unreadable
from sparse_flash.masks.ternary import (
    FULL,
    Form,
    Index,
    Interval,
    Ternary,
    Unknown,
    bounds,
    operand,
    symbols,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEW = 8  # entries of a range that are looked at one by one
_CELLS = 1 << 24  # entries of the largest table with a summed-area table


class RangeTable:
    """Minimum and maximum of `table[lo..hi]` in O(1) per range, by a sparse table.

    Its k-th level has those of all ranges of 2^k entries. Blocks have few lengths, so a CPU makes
    only the levels that are asked for.
    Source: Bender & Farach-Colton, The LCA Problem Revisited, 2000.

    >>> table = RangeTable(torch.tensor([3, 1, 4, 1, 5]))
    >>> table.bounds(torch.tensor([2]), torch.tensor([4]))
    (tensor([1]), tensor([5]))
    """

    def __init__(self, table: Tensor) -> None:
        least, most = (x.item() for x in table.aminmax())
        self.is_float = table.is_floating_point()
        self.largest = 0 if self.is_float else int(max(abs(least), abs(most)))
        if not self.is_float:
            table = table.to(torch.int32 if self.largest < 1 << 31 else torch.int64)
        self.table = table
        first = table if self.is_float else numbers(table)
        if not self.is_float and self.largest < 1 << 15:  # levels take time by their bytes
            first = blockwise.convert(first, "int16")
        self._levels: dict[int, tuple[Numbers, Numbers]] = {0: (first, first)}
        self._stacked: tuple[Tensor, Tensor] | None = None

    def bounds(self, lo: Numbers, hi: Numbers) -> tuple[Numbers, Numbers]:
        """Minimum and maximum of `table[lo..hi]`, bounds inclusive; integers as int64.

        Floats are tensors.
        """
        if self.is_float:
            return self._of_tensors(blockwise.tensor(lo), blockwise.tensor(hi))
        if isinstance(lo, Tensor):
            least, most = self._of_tensors(lo, hi)
            return least.long(), most.long()
        level = bit_length(hi - lo + 1) - 1
        if level.size and level.min() == level.max():
            return self._of_level(int(level.min()), lo, hi)
        found = np.empty(lo.shape, np.int64), np.empty(lo.shape, np.int64)
        for k in np.unique(level).tolist():
            at = level == k
            found[0][at], found[1][at] = self._of_level(k, lo[at], hi[at])
        return found

    def _of_level(self, k: int, lo: Numbers, hi: Numbers) -> tuple[Numbers, Numbers]:
        """As `bounds`, of ranges of 2^k to 2^(k + 1) - 1 entries: two of 2^k cover each."""
        (low, high), second = self._level(k), hi + 1 - (1 << k)
        least = minimum(take(low, lo), take(low, second))
        most = maximum(take(high, lo), take(high, second))
        return blockwise.int64(least), blockwise.int64(most)

    def _level(self, k: int) -> tuple[Numbers, Numbers]:
        """Minima and maxima of all ranges of 2^k entries."""
        if k not in self._levels:
            (low, high), half = self._level(k - 1), 1 << (k - 1)
            ends = minimum(low[:-half], low[half:]), maximum(high[:-half], high[half:])
            self._levels[k] = ends
        return self._levels[k]

    def _of_tensors(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """As `bounds`, from all levels in one tensor, so that a GPU need not be waited for."""
        if self._stacked is None:
            n = len(self.table)
            levels = [self._level(k) for k in range(n.bit_length())]
            low, high = (
                torch.stack([_pad(blockwise.tensor(x), n) for x in ends])
                for ends in zip(*levels, strict=True)
            )
            self._stacked = low, high
        low, high = (x.to(lo.device).view(-1) for x in self._stacked)
        k = bit_length(hi - lo + 1) - 1
        first = k * len(self.table)
        first, second = first + lo, first + hi + 1 - (1 << k)
        return low[first].minimum(low[second]), high[first].maximum(high[second])


def _pad(x: Tensor, n: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, n - len(x)))


class Entries(Interval):
    """The entries of a table at a range of indices.

    Equality looks at each entry where a range has few: the entries 3 and 90 have bounds around 40,
    but none is 40. Blocks of a random pattern are then decided by themselves.

    >>> entries = Entries(RangeTable(torch.tensor([3, 90])), Interval(*torch.tensor([[0], [1]])))
    >>> (entries == 40).value, (entries == 90).value  # EMPTY, UNKNOWN
    (tensor([0], dtype=torch.int8), tensor([1], dtype=torch.int8))
    """

    def __init__(self, table: RangeTable, index: Interval) -> None:
        self.table, self.index = table, index
        super().__init__(*table.bounds(index.lo, index.hi), table.largest, _of_index(index))

    def __eq__(self, other: object) -> Any:
        truth, other = super().__eq__(other), operand(other, floats=True)
        first, last = self.index.lo, self.index.hi
        most = int((last - first).max()) + 1 if len(first) else 0
        if most > _FEW or isinstance(other, Unknown):
            return truth
        (lo, hi), table = bounds(other), self.table.table.to(blockwise.device(first))
        met = first > last
        for t in range(most):
            entry = take(table, minimum(first + t, last))
            met = met | (entry >= lo) & (entry <= hi)
        return truth & Ternary(FULL * blockwise.int8(met), list)

    __hash__ = None


class Indirect(Entries):
    """The values of a table at an index, with a reference to the table for tight `//` and `%`.

    Without the table, a 16 x 8 pixel patch in Morton order would have only bounds of its raster
    index, and no bounds of its columns.
    """

    def __init__(self, tables: Callable[[str, int], RangeTable], index: Interval) -> None:
        self.tables, self.index, self.like = tables, index, index.like
        self._form, self._forms = _of_index(index), {}

    @functools.cached_property
    def table(self) -> RangeTable:  # type: ignore[override]
        """Of the values themselves."""
        return self.tables("//", 1)

    @functools.cached_property
    def _ends(self) -> tuple[Numbers, Numbers]:
        return self.table.bounds(self.index.lo, self.index.hi)

    @property
    def lo(self) -> Numbers:
        """Smallest value in each block."""
        return self._ends[0]

    @property
    def hi(self) -> Numbers:
        """Largest value in each block."""
        return self._ends[1]

    @property
    def largest(self) -> int:  # type: ignore[override]
        """Bound of the absolute values in all blocks."""
        return self.table.largest

    def __floordiv__(self, n: Any) -> Any:
        return self._look_up("//", n) if type(n) is int and n > 0 else super().__floordiv__(n)

    def __mod__(self, n: Any) -> Any:
        return self._look_up("%", n) if type(n) is int and n > 0 else super().__mod__(n)

    def _look_up(self, op: str, n: int) -> Interval:
        return Entries(self.tables(op, n), self.index)


def _of_index(index: Interval) -> Callable[[int], Form]:
    """The form of values that an index determines, without further structure."""
    return lambda modulus: (full(index.lo, 0), index.columns())


class IndexTable:
    """`table[index]` for index tensors and for intervals, on any device.

    Args:
        table: Integers, one-dimensional.
        ascending: Whether the values never decrease, so that bounds need no sparse table.

    >>> table = IndexTable(torch.tensor([5, 3, 8, 1]))
    >>> table(torch.tensor([2, 0]))
    tensor([8, 5])
    >>> seen = table(Interval(torch.tensor([1]), torch.tensor([3])))
    >>> seen.lo, seen.hi
    (tensor([1]), tensor([8]))
    """

    def __init__(self, table: Tensor, ascending: bool = False) -> None:
        self.table, self.ascending = table, ascending
        self._tables = {table.device: table}
        self._ranges: dict[tuple[str, int, torch.device], RangeTable] = {}

    def __call__(self, index: Index) -> Index:
        """The values at these indices."""
        if isinstance(index, Interval):
            return self._bounds(index)
        if isinstance(index, Dense):
            return look_up(self.table, (index,))
        if type(index) is np.ndarray:
            return self.table.numpy()[index]
        if is_fake(index):
            table = index.fake_mode.from_tensor(self.table).to(index.device)
        else:
            table = self.on(index.device)
        # table[index] would accept negative indices.
        return table.index_select(0, index.flatten()).view(index.shape)

    def _bounds(self, index: Interval) -> Interval:
        device = blockwise.device(index.lo)
        if not self.ascending:
            return Indirect(lambda op, n: self._range(op, n, device), index)
        table = self.on(device)
        lo, hi = (blockwise.int64(take(table, end)) for end in (index.lo, index.hi))
        largest = max(abs(int(self.table[0])), abs(int(self.table[-1])))
        return Interval(lo, hi, largest, _of_index(index))

    def on(self, device: torch.device) -> Tensor:
        """The table on a device, cached there."""
        if device not in self._tables:
            with plain_torch():
                return self._tables.setdefault(device, self.table.to(device))
        return self._tables[device]

    def _range(self, op: str, n: int, device: torch.device) -> RangeTable:
        key = (op, n, device)
        if key not in self._ranges:
            with plain_torch():
                operation = floor_divide if op == "//" else remainder
                made = RangeTable(tensor(operation(numbers(self.on(device)), n)))
                return self._ranges.setdefault(key, made)
        return self._ranges[key]


class RectangleTable:
    """Whether any, or every, entry of a rectangle of a large bool table is true.

    Two summed-area tables over cells of `cell` x `cell` entries (Crow, 1984). A rectangle that cuts
    a cell is extended to all of it, so the answer may be UNKNOWN, but never wrong.

    >>> table = torch.eye(4).bool()
    >>> corner = Interval(torch.tensor([0]), torch.tensor([1])), Interval(*torch.tensor([[2], [3]]))
    >>> RectangleTable(table, table, 1).classify(*corner).value
    tensor([0], dtype=torch.int8)
    """

    def __init__(self, some: Tensor, every: Tensor, cell: int) -> None:
        self.cell = cell
        self.some = _summed(some)
        self.every = self.some if every is some else _summed(every)

    def classify(self, rows: Interval, cols: Interval) -> Ternary:
        """EMPTY, UNKNOWN or FULL for each rectangle rows x cols."""
        i, j = rows // self.cell, cols // self.cell
        area = (i.hi + 1 - i.lo) * (j.hi + 1 - j.lo)
        some, every = (
            _within(t.to(i.lo.device) if isinstance(i.lo, Tensor) else t.numpy(), i, j)
            for t in (self.some, self.every)
        )
        return Ternary.of(every == area, some > 0, columns_of((rows, cols)))


def _within(summed: Numbers, i: Interval, j: Interval) -> Numbers:
    """The sum over each rectangle, by a summed-area table."""
    below = summed[i.hi + 1, j.hi + 1] - summed[i.hi + 1, j.lo]
    return below - summed[i.lo, j.hi + 1] + summed[i.lo, j.lo]


def _summed(table: Tensor) -> Tensor:
    """Summed-area table: sums above and to the left, with a leading row and column of zeros."""
    summed = table.new_zeros(table.shape[0] + 1, table.shape[1] + 1, dtype=torch.int32)
    inner = summed[1:, 1:]
    torch.cumsum(table, 1, dtype=torch.int32, out=inner)
    if len(inner) > 1 << 13:
        return summed.cumsum(0, dtype=torch.int32)
    for row in range(1, len(inner)):  # several times as fast as cumsum
        inner[row] += inner[row - 1]
    return summed


class Narrow(Symbol):
    """Integers of fewer than 64 bits: exact in comparisons, and promoted to int64 beside int64.

    Arithmetic between them, and with numbers, may wrap around; its result is an `Unknown`.
    """

    def __init__(self, wide: Interval, dtype: torch.dtype) -> None:
        self.wide, self.like = wide, wide.like
        self.dtype, self._limits = dtype, torch.iinfo(dtype)

    def columns(self) -> Columns:
        """The signature of the same values in int64."""
        return self.wide.columns()

    def widened(self) -> Interval:
        """The same integers as int64."""
        return self.wide

    def _arithmetic(self, *others: Any) -> Any:
        if any(isinstance(other, Interval) for other in others):
            return NotImplemented  # the interval handles the operation
        return Unknown(self, *symbols(*others))

    def _limit(self, other: Any) -> Any:
        other = other if isinstance(other, Symbol) else operand(other, floats=True)
        if isinstance(other, int) and not self._limits.min <= other <= self._limits.max:
            raise NotUnderstoodError(f"{self.dtype} compared with {other}")
        return other

    def __lt__(self, other: Any) -> Any:
        return self.wide < self._limit(other)

    def __le__(self, other: Any) -> Any:
        return self.wide <= self._limit(other)

    def __gt__(self, other: Any) -> Any:
        return self.wide > self._limit(other)

    def __ge__(self, other: Any) -> Any:
        return self.wide >= self._limit(other)

    def __eq__(self, other: object) -> Any:
        return self.wide == self._limit(other)

    def __ne__(self, other: object) -> Any:
        return self.wide != self._limit(other)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __truediv__ = __rtruediv__ = _arithmetic
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _arithmetic
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __pow__ = __rpow__ = _arithmetic
    __neg__ = __abs__ = __invert__ = __pos__ = _arithmetic
    __hash__ = None


class Floats(Symbol):
    """Entries of a table of floats, from `lo` to `hi`; supports only comparisons."""

    def __init__(self, lo: Tensor, hi: Tensor, index: Interval) -> None:
        self.lo, self.hi, self.like, self._index = lo, hi, index.like, index

    def columns(self) -> Columns:
        """The signature of the index."""
        return self._index.columns()

    def _compare(self, other: Any, states: Callable[[Any, Any], tuple[Tensor, Tensor]]) -> Any:
        if isinstance(other, Floats) and other.lo.dtype == self.lo.dtype:
            lo, hi = other.lo, other.hi
        elif type(other) in (int, float) and not math.isnan(other):
            lo = hi = other  # torch compares bounds as it compares entries
        else:
            return Unknown(self)._compare(other)
        ends: tuple[Numbers, Numbers] = states(lo, hi)
        if not isinstance(self.like, Tensor):
            ends = ends[0].numpy(), ends[1].numpy()
        return Ternary.of(*ends, columns_of([self, *symbols(other)]))

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, lambda lo, hi: (self.hi < lo, self.lo < hi))

    def __le__(self, other: Any) -> Any:
        return self._compare(other, lambda lo, hi: (self.hi <= lo, self.lo <= hi))

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, lambda lo, hi: (self.lo > hi, self.hi > lo))

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, lambda lo, hi: (self.lo >= hi, self.hi >= lo))

    def __eq__(self, other: object) -> Any:
        return self._compare(
            other, lambda lo, hi: (self.hi < self.lo, (self.lo <= hi) & (self.hi >= lo))
        )

    def __ne__(self, other: object) -> Any:
        return ~(self == other)

    def _arithmetic(self, *others: Any) -> Unknown:
        return Unknown(self, *symbols(*others))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _arithmetic
    __truediv__ = __rtruediv__ = __neg__ = __abs__ = _arithmetic
    __hash__ = None


_NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32)


class TableLookups(TorchFunctionMode):
    """Mode that lets intervals index tensors: `table[q]`, `table[q // 8, kv // 8]`.

    Results derived from a table are cached until the mode ends; the table must not change before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[Any, tuple[Tensor, Any]] = {}  # holding the tensor keeps its id unique

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Intercept indexing by a symbol."""
        answer(sys._getframe(1))
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, Dense) for i in index):
                return look_up(args[0], index)
            if any(isinstance(i, Symbol) for i in index):
                return self._look_up(args[0], index)
        return func(*args, **(kwargs or {}))

    def _look_up(self, table: Tensor, index: tuple[Any, ...]) -> Any:
        intervals: list[Any] = [i.widened() for i in index if isinstance(i, Symbol)]
        fixed = tuple(None if isinstance(i, Symbol) else operator.index(i) for i in index)
        if any(isinstance(i, Narrow) and i.dtype != torch.int32 for i in index):
            raise NotUnderstoodError("an index that is neither int64 nor int32")
        if len(index) != table.ndim or unreadable(table):
            raise NotUnderstoodError(
                f"a table of shape {tuple(table.shape)} at {len(index)} indices"
            )
        if not all(isinstance(i, Interval) for i in intervals):
            return Unknown(*intervals)
        rest = table.detach()[tuple(slice(None) if i is None else i for i in fixed)]
        if not all(
            bool(((i.lo >= 0) & (i.hi < n)).all())
            for i, n in zip(intervals, rest.shape, strict=True)
        ):
            return Unknown(*intervals)  # negative, or out of range
        if rest.ndim == 2 and rest.dtype == torch.bool and rest.numel() <= _CELLS:
            key = (id(table), fixed)
            return self._keep(key, table, lambda: RectangleTable(rest, rest, 1)).classify(
                *intervals
            )
        if rest.ndim != 1:
            return Unknown(*intervals)
        return self._values(table, fixed, rest, intervals[0])

    def _values(self, table: Tensor, fixed: tuple[Any, ...], rest: Tensor, index: Interval) -> Any:
        """Entries of a one-dimensional table."""

        def ranges(op: str, n: int) -> RangeTable:
            divided = rest if (op, n) == ("//", 1) else rest // n if op == "//" else rest % n
            return self._keep((id(table), fixed, op, n), table, lambda: RangeTable(divided))

        if rest.dtype == torch.int64:
            return Indirect(ranges, index)
        if rest.dtype in _NARROW:
            return Narrow(Indirect(ranges, index), rest.dtype)
        if rest.dtype == torch.bool:
            key = (id(table), fixed)
            made = self._keep(key, table, lambda: RangeTable(rest.int()))
            least, most = made.bounds(index.lo, index.hi)
            return Ternary.of(least == 1, most == 1, index.columns)
        if rest.is_floating_point() and not bool(rest.isnan().any()):
            return Floats(*ranges("//", 1).bounds(index.lo, index.hi), index)
        return Unknown(index)

    def _keep(self, key: Any, table: Tensor, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = (table, make())
        return self._kept[key][1]
