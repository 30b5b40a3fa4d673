"""Sort tiles and build the arrays of a layout from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sparse_flash.masks import bits
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.layout import BlockLayout

_ABSENT = -3  # in a table of values of tiles
_SMALL = 1 << 16  # tiles of a table that costs less than an operation
FULL_TILE = -1  # in bit_tile_indices: every element of the tile is allowed


def extent(index: Tensor, length: int, block: int) -> Tensor:
    """Number of tokens in each block: `block`, or fewer at a ragged end."""
    return (length - index * block).clamp(max=block)


def arrays_of_tiles(
    lengths: tuple[int, int, tuple[int, int]],
    num_patterns: int,
    rows: Tensor,
    cols: Tensor,
    packed: Tensor,
    entries: Tensor | None,
    distinct: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """crow_indices, col_indices, bit_tile_indices and bit_tiles: see `BlockLayout.from_tiles`."""
    q_len, kv_len, block = lengths
    nq, nk = -(-q_len // block[0]), -(-kv_len // block[1])
    device = rows.device
    if entries is None:
        entries = torch.arange(len(rows), device=device)
    rows, cols, entries, starts = _in_order(rows, cols, entries, (num_patterns * nq, nk))
    if len(packed) and not distinct:
        some = (entries >= 0).nonzero().squeeze(1)
        area = extent(rows[some] % nq, q_len, block[0]) * extent(cols[some], kv_len, block[1])
        entries[some[bits.count(packed)[entries[some]] == area]] = FULL_TILE
    tiles, entries = _renumber(packed, entries, distinct)
    first = torch.arange(num_patterns, device=device)[:, None] * nq
    crow = starts[first + torch.arange(nq + 1, device=device)]
    return crow.int(), cols.int(), entries.int(), tiles


def transposed(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """ccol_indices, row_indices and transpose_order of a layout, from its rows."""
    rows, nk, nq = layout.tile_rows, layout.num_block_cols, layout.num_block_rows
    patterns, device = layout.num_patterns, rows.device
    columns = rows // nq * nk + layout.col_indices
    number = torch.arange(len(rows), device=device)
    _, rows, order, starts = _in_order(columns, rows % nq, number, (patterns * nk, nq))
    cells = torch.arange(patterns, device=device)[:, None] * nk
    cells = cells + torch.arange(nk + 1, device=device)
    return starts[cells].int(), rows.int(), order.int()


def _in_order(
    rows: Tensor, cols: Tensor, values: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles in the order of their rows, then of their columns.

    Args:
        rows: Stacked rows of distinct tiles, int64 `(T,)`.
        cols: Their columns.
        values: A number of each, above -3.
        grid: Numbers of stacked rows and of columns.

    Returns:
        rows, cols and values in order, and the first tile of each row and the end of the last.
    """
    keys, size = rows * grid[1] + cols, grid[0] * grid[1]
    if keys.device.type != "cpu" or size > 8 * len(keys) + _SMALL:
        order = torch.argsort(keys)
        rows = rows[order]
        starts = torch.searchsorted(rows, torch.arange(grid[0] + 1, device=rows.device))
        return rows, cols[order], values[order], starts
    # Where many of all tiles occur, a table of them takes less time than sorting.
    table = np.full(size, _ABSENT, dtype=np.int32)
    table[keys.numpy()] = values.numpy()
    stored = np.flatnonzero(table != _ABSENT)
    rows, cols = (torch.from_numpy(x) for x in np.divmod(stored, grid[1]))
    starts = torch.from_numpy(np.searchsorted(stored, np.arange(grid[0] + 1) * grid[1]))
    return rows, cols, torch.from_numpy(table[stored]).long(), starts


def _renumber(packed: Tensor, entries: Tensor, are_distinct: bool) -> tuple[Tensor, Tensor]:
    """Keep the distinct bit tiles in use, in the order of first use."""
    partial = entries >= 0
    index = entries[partial]
    if not len(index):
        return packed[:0], entries
    if are_distinct and len(index) == len(packed) and bool((index[1:] > index[:-1]).all()):
        return packed, entries  # each tile has its own, in this order
    used, index = torch.unique(index, return_inverse=True)
    distinct = packed if len(used) == len(packed) else packed[used]
    if not are_distinct:
        distinct, twin = bits.deduplicate(distinct)
        index = twin[index]
    first = torch.full((len(distinct),), len(index), device=index.device)
    first.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amin")
    order = torch.argsort(first)
    entries = entries.clone()
    entries[partial] = torch.argsort(order)[index]
    return distinct[order], entries
