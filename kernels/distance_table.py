"""Bias by distance as the kernels see it: a value for each distance, from slopes and tables.

Rows of numbers are indexed by column minus row of a tile's elements: p_k - p_q where rows are
queries, p_q - p_k where they are keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 8  # distance of the two rows of a thread's accumulators
COPIES = 2  # of the values; the second one begins at value 1
UNBOUNDED = 1 << 30  # more than any distance


def window_size(tile: tuple[int, int]) -> int:
    """Values of a tile of rows x columns; one more than it has distances."""
    return sum(tile)


def window_bytes(tile: tuple[int, int]) -> int:
    """Bytes of a tile's window in shared memory."""
    return 4 * COPIES * window_size(tile)


def scratch_size(columns: int) -> int:
    """Numbers of a warp in shared memory for the diagonals of so many columns.

    Each of ROWS rows has ROWS zeros on both sides.
    """
    return ROWS * (columns + 3 * ROWS)


class DistanceBias(NamedTuple):
    """Values by distance, -slopes[h] |d| + table[h, clip(d, -r, r) + r], with d = p_q - p_k.

    slopes: float32 (h,), or None. table: float32 (h, 2 r + 1), or None.
    """

    slopes: Tensor | None
    table: Tensor | None

    @property
    def radius(self) -> int:
        """From this distance on all values of a head and side are equal."""
        if self.table is None or self.slopes is not None:
            return UNBOUNDED
        return self.table.shape[1] // 2


class DistanceGrid(NamedTuple):
    """Which distances a kernel meets.

    rows: Rows of its tiles in all: positions of queries (keys if transposed), rounded up to tiles.
    columns: Columns likewise.
    transposed: Whether rows are keys.
    """

    rows: int
    columns: int
    transposed: bool

    @classmethod
    def of(cls, lengths: tuple[int, int], tile: tuple[int, int], transposed: bool) -> DistanceGrid:
        """For numbers of rows and columns, and a tile of them."""
        rows, columns = (-(-n // size) * size for n, size in zip(lengths, tile, strict=True))
        return cls(rows, columns, transposed)

    @property
    def length(self) -> int:
        """Number of values."""
        return self.rows + self.columns

    def distances(self, device: torch.device, extra: int = 0) -> Tensor:
        """p_q - p_k of each value, and of `extra` further ones, int64 (length + extra,)."""
        apart = torch.arange(-self.rows, self.columns + extra, device=device)
        return apart if self.transposed else -apart


def values_of(bias: DistanceBias, grid: DistanceGrid, unit: float) -> Tensor:
    """The values divided by `unit`, float32 (h, COPIES, length)."""
    given = bias.slopes if bias.table is None else bias.table
    assert given is not None
    distances = grid.distances(given.device, extra=1)
    values = torch.zeros((), device=given.device)
    if bias.table is not None:
        r = bias.table.shape[1] // 2
        values = bias.table[:, distances.clamp(-r, r) + r]
    if bias.slopes is not None:
        values = values - bias.slopes[:, None] * distances.abs()
    values = values / unit
    return torch.stack((values[:, :-1], values[:, 1:]), 1)


def gradients_of(bias: DistanceBias, sums: Tensor, grid: DistanceGrid) -> DistanceBias:
    """Gradients of slopes and table, from those of the values (h, length) of a transposed grid."""
    assert grid.transposed
    slopes = table = None
    if bias.slopes is not None:
        slopes = -(sums * grid.distances(sums.device).abs()).sum(1)
    if bias.table is not None:
        table = folded(sums, 1, grid.rows, bias.table.shape[1] // 2)
    return DistanceBias(slopes, table)


def folded(sums: Tensor, dim: int, center: int, r: int) -> Tensor:
    """Sums by distance as sums by the distance clipped to -r..r; distance 0 is at `center`."""
    size = sums.shape[dim]
    first, end = max(0, center - r), min(size, center + r + 1)
    shape = list(sums.shape)
    shape[dim] = 2 * r + 1
    found = sums.new_zeros(shape)
    found.narrow(dim, first - (center - r), end - first).copy_(sums.narrow(dim, first, end - first))
    found.select(dim, 0).add_(sums.narrow(dim, 0, first).sum(dim))
    found.select(dim, 2 * r).add_(sums.narrow(dim, end, size - end).sum(dim))
    return found
