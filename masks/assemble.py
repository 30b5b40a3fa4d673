"""Sort tiles and build the arrays of a layout from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks import bits, blockwise, host
from sparse_flash.masks.blockwise import argsort, int64, numbers, take, tensor, where
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
    nk, nq, patterns = layout.num_block_cols, layout.num_block_rows, layout.num_patterns
    crow, cols, device = layout.crow_indices, layout.col_indices, layout.device
    if device.type == "cpu" and patterns * nk <= _RADIX:
        ccol, rows, order = map(torch.from_numpy, _by_columns(crow.numpy(), cols.numpy(), (nq, nk)))
        return ccol, rows, order
    pattern, rows = host.divided(layout.tile_rows, nq)
    cols, number = host.int64(cols) + pattern * nk, host.arange(len(rows), device)
    _, rows, order, starts = _in_order(cols, rows, number, (patterns * nk, nq))
    cells = torch.arange(patterns, device=device)[:, None] * nk
    cells = cells + torch.arange(nk + 1, device=device)
    return host.int32(host.take(starts, cells)), host.int32(rows), host.int32(order)


def _by_columns(
    crow: NDArray[np.int32], cols: NDArray[Any], grid: tuple[int, int]
) -> list[NDArray[np.int32]]:
    """As `transposed`, from crow_indices, col_indices, and the numbers of rows and of columns."""
    patterns, (nq, nk) = len(crow), grid
    rows = np.tile(np.arange(nq, dtype=np.int32), patterns).repeat(np.diff(crow).reshape(-1))
    if patterns > 1:  # stacked columns
        cols = cols + np.arange(0, patterns * nk, nk).repeat(crow[:, -1] - crow[:, 0])
    ends = np.bincount(cols, minlength=patterns * nk).cumsum().reshape(patterns, nk)
    ccol = np.zeros((patterns, nk + 1), np.int32)
    ccol[:, 1:], ccol[1:, 0] = ends, ends[:-1, -1]
    size, order = patterns * nk * nq, np.arange(len(cols), dtype=np.int32)
    if len(cols) <= host.MOST or size > 8 * len(cols) + _SMALL:
        by_column = np.argsort(cols.astype(np.uint16), kind="stable")  # radix sort
        return [ccol, rows.take(by_column), order.take(by_column)]
    width = nq + 8  # columns that are powers of two apart would share few sets of the cache
    place = np.multiply(cols, width, dtype=np.int64)
    place += rows
    table = np.full(patterns * nk * width, -1, np.int32)
    table[place] = order  # takes less time than sorting
    order = table[table >= 0]
    return [ccol, rows.take(order), order]


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
    allowed = numbers(host.take(bits.count(distinct), twin))
    found = where(allowed == numbers(areas), FULL_TILE, numbers(twin))
    return tensor(where(allowed == 0, EMPTY_TILE, found)), distinct


def renumber(packed: Tensor, entries: Tensor, are_distinct: bool) -> tuple[Tensor, Tensor]:
    """Keep the distinct bit tiles in use, in the order of first use."""
    entry = numbers(entries)
    partial = blockwise.nonzero(entry >= 0)
    index = int64(take(entry, partial))
    if not are_distinct:
        packed, twin = bits.deduplicate(packed)
        index = take(numbers(twin), index)
    first = numbers(host.firsts(tensor(index), len(packed)))
    used = blockwise.nonzero(first < len(index))
    order = take(used, argsort(take(first, used)))
    if are_distinct and len(order) == len(packed) and bool((order[1:] > order[:-1]).all()):
        return packed, entries
    first[order] = blockwise.arange(len(order), order)  # the number of each
    if len(index) == len(entry):  # all are partial
        return host.take(packed, tensor(order)), tensor(take(first, index))
    entry[partial] = take(first, index)
    return host.take(packed, tensor(order)), entries
