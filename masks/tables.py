"""Tables of integers that rules look indices up in: permutations, document numbers."""

from __future__ import annotations

import torch
from sparse_flash.masks.modes import is_fake, plain_torch
from sparse_flash.masks.ternary import Index, Indirect, Interval, RangeTable, Ternary
from torch import Tensor


class IndexTable:
    """`table[index]` for index tensors and for intervals, on any device.

    >>> table = IndexTable(torch.tensor([5, 3, 8, 1]))
    >>> table(torch.tensor([2, 0]))
    tensor([8, 5])
    >>> seen = table(Interval(torch.tensor([1]), torch.tensor([3])))
    >>> seen.lo, seen.hi
    (tensor([1]), tensor([8]))
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self._tables = {table.device: table}
        self._ranges: dict[tuple[str, int, torch.device], RangeTable] = {}

    def __call__(self, index: Index) -> Index:
        """The values at these indices."""
        if isinstance(index, Interval):
            device = index.lo.device
            return Indirect(lambda op, n: self._range(op, n, device), index.lo, index.hi)
        if is_fake(index):
            table = index.fake_mode.from_tensor(self.table).to(index.device)
        else:
            table = self.on(index.device)
        # Not table[index], which takes a negative index from the end.
        return table.index_select(0, index.flatten()).view(index.shape)

    def on(self, device: torch.device) -> Tensor:
        """The table on a device, where it stays."""
        if device not in self._tables:
            with plain_torch():
                return self._tables.setdefault(device, self.table.to(device))
        return self._tables[device]

    def _range(self, op: str, n: int, device: torch.device) -> RangeTable:
        key = (op, n, device)
        if key not in self._ranges:
            with plain_torch():
                table = self.on(device)
                made = RangeTable(table // n if op == "//" else table % n)
                return self._ranges.setdefault(key, made)
        return self._ranges[key]


class RectangleTable:
    """Whether any, or every, entry of a rectangle of a large bool table is true.

    Two summed-area tables over cells of `cell` x `cell` entries (Crow, 1984). A rectangle that cuts
    a cell counts as touching all of it, so the answer may be UNKNOWN, never wrong.

    >>> table = torch.eye(4).bool()
    >>> corner = Interval(torch.tensor([0]), torch.tensor([1])), Interval(*torch.tensor([[2], [3]]))
    >>> RectangleTable(table, table, 1).classify(*corner).value
    tensor([0], dtype=torch.int8)
    """

    def __init__(self, some: Tensor, every: Tensor, cell: int) -> None:
        self.cell = cell
        self.some, self.every = (
            torch.nn.functional.pad(t.long().cumsum(0).cumsum(1).int(), (1, 0, 1, 0))
            for t in (some, every)
        )

    def classify(self, rows: Interval, cols: Interval) -> Ternary:
        """EMPTY, UNKNOWN or FULL for each rectangle rows x cols."""
        i, j = rows // self.cell, cols // self.cell
        area = (i.hi + 1 - i.lo) * (j.hi + 1 - j.lo)
        some, every = (
            t[i.hi + 1, j.hi + 1] - t[i.lo, j.hi + 1] - t[i.hi + 1, j.lo] + t[i.lo, j.lo]
            for t in (self.some.to(i.lo.device), self.every.to(i.lo.device))
        )
        return Ternary.of(every == area, some > 0)
