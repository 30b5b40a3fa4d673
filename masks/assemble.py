"""Sort tiles and build the arrays of a layout from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks import bits, host
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.layout import BlockLayout

_ABSENT = -3  # in a table of values of tiles
_RADIX = 1 << 16  # numbers of 16 bits, which numpy sorts by radix
_SMALL = 1 << 16  # tiles of a table that costs less than an operation
FULL_TILE = -1  # in bit_tile_indices: every element of the tile is allowed
EMPTY_TILE = -2  # of a tile without allowed elements, which is not stored


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
        entries = host.arange(len(rows), device)
    rows, cols, entries, starts = _in_order(rows, cols, entries, (num_patterns * nq, nk))
    if len(packed) and not distinct:
        some = host.positions(entries, 0)
        row, col, entry = (host.take(x, some) for x in (rows, cols, entries))
        area = extent(row % nq, q_len, block[0]) * extent(col, kv_len, block[1])
        whole = host.take(bits.count(packed), entry) == area
        host.put(entries, some, torch.where(whole, FULL_TILE, entry))
    tiles, entries = renumber(packed, entries, distinct)
    first = torch.arange(num_patterns, device=device)[:, None] * nq
    crow = host.take(starts, first + torch.arange(nq + 1, device=device))
    return host.int32(crow), host.int32(cols), host.int32(entries), tiles


def transposed(layout: BlockLayout) -> tuple[Tensor, Tensor, Tensor]:
    """ccol_indices, row_indices and transpose_order of a layout, from its rows."""
    rows, nk, nq = layout.tile_rows, layout.num_block_cols, layout.num_block_rows
    patterns, device, cols = layout.num_patterns, rows.device, layout.col_indices
    if patterns > 1:
        pattern, rows = host.divided(rows, nq)
        cols = cols + pattern * nk
    if device.type == "cpu" and patterns * nk <= _RADIX:
        starts, rows, order = _by_columns(rows.numpy(), cols.numpy(), (patterns * nk, nq))
    else:
        number = host.arange(len(rows), device)
        _, rows, order, starts = _in_order(host.int64(cols), rows, number, (patterns * nk, nq))
    if patterns == 1:
        return host.int32(starts)[None], host.int32(rows), host.int32(order)
    cells = torch.arange(patterns, device=device)[:, None] * nk
    cells = cells + torch.arange(nk + 1, device=device)
    return host.int32(host.take(starts, cells)), host.int32(rows), host.int32(order)


def _by_columns(
    rows: NDArray[np.int64], cols: NDArray[Any], grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles that are in the order of their rows, in the order of their columns.

    Args:
        rows: Their rows.
        cols: Their stacked columns.
        grid: Numbers of stacked columns and of rows.

    Returns:
        The first tile of each column and the end of the last; rows and numbers of tiles, in order.
    """
    counts = np.bincount(cols, minlength=grid[0])
    size = grid[0] * grid[1]
    order: NDArray[Any]
    if len(cols) <= host.MOST or size > 8 * len(cols) + _SMALL:
        order = np.argsort(cols.astype(np.uint16), kind="stable")  # radix sort
    else:  # a table takes less time
        table, place = np.full(size, -1, np.int32), np.multiply(cols, grid[1], dtype=np.int64)
        place += rows
        table[place] = np.arange(len(cols), dtype=np.int32)
        order = table[table >= 0]
    starts = np.concatenate([[0], counts.cumsum()])
    return torch.from_numpy(starts), torch.from_numpy(rows.take(order)), torch.from_numpy(order)


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
    if rows.device.type != "cpu":
        order = torch.argsort(rows * grid[1] + cols)
        rows = rows[order]
        starts = torch.searchsorted(rows, torch.arange(grid[0] + 1, device=rows.device))
        return rows, cols[order], values[order], starts
    keys, size = rows.numpy() * grid[1] + cols.numpy(), grid[0] * grid[1]
    if size > 8 * len(keys) + _SMALL:
        by_key = np.argsort(keys)
        stored, kept = keys[by_key], values.numpy()[by_key]
    else:  # where many of all tiles occur, a table of them takes less time than sorting
        table = np.full(size, _ABSENT, dtype=np.int32)
        table[keys] = values.numpy()
        stored = np.flatnonzero(table != _ABSENT)
        kept = table[stored].astype(np.int64)
    ends = np.searchsorted(stored, np.arange(grid[0] + 1) * grid[1])
    in_order = np.repeat(np.arange(grid[0]), np.diff(ends))
    arrays = (in_order, stored - in_order * grid[1], kept, ends)
    rows, cols, values, firsts = map(torch.from_numpy, arrays)
    return rows, cols, values, firsts


def dtype_of(num_bit_tiles: int) -> type[np.int16 | np.int32]:
    """The dtype of a table of tiles with entries of so many bit tiles."""
    return np.int16 if num_bit_tiles < 1 << 15 else np.int32


def numbered(packed: Tensor, areas: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each tile among the distinct ones, EMPTY_TILE or FULL_TILE; the distinct."""
    distinct, twin = bits.deduplicate(packed)
    allowed = host.take(bits.count(distinct), twin)
    found = torch.where(allowed == areas, FULL_TILE, twin)
    return torch.where(allowed == 0, EMPTY_TILE, found), distinct


def renumber(packed: Tensor, entries: Tensor, are_distinct: bool) -> tuple[Tensor, Tensor]:
    """Keep the distinct bit tiles in use, in the order of first use."""
    partial = host.positions(entries, 0)
    index = host.take(entries, partial)
    if not len(index):
        return packed[:0], entries
    if are_distinct and len(index) == len(packed) and bool((index[1:] > index[:-1]).all()):
        return packed, entries  # each tile has its own, in this order
    used, index = host.unique(index, len(packed))
    distinct = packed if len(used) == len(packed) else host.take(packed, used)
    if not are_distinct:
        distinct, twin = bits.deduplicate(distinct)
        index = host.take(twin, index)
    order = host.argsort(host.firsts(index, len(distinct)))
    host.put(entries, partial, host.take(bits.inverse(order), index))
    return host.take(distinct, order), entries
