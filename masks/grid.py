"""All tiles of a mask in one table, on a CPU.

A table of 512 x 512 tiles has 262,144 small numbers: an operation on it takes less time than lists
of rectangles that are cut and sorted. Longer sequences are left to `build`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparse_flash.masks import blockwise, composed, diagonal, host, undecided
from sparse_flash.masks.assemble import EMPTY_TILE, FULL_TILE, dtype_of, renumber
from sparse_flash.masks.blockwise import numbers, tensor
from sparse_flash.masks.composed import Tiles
from sparse_flash.masks.elements import Predicate, TooLargeError
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.ternary import FULL, UNKNOWN, Blocks, Ternary
from torch import Tensor

_MOST = 1 << 18  # tiles of a table
_FEW = 1 << 10  # tiles that are looked at one by one
_SIDE = 8  # tiles per side of the rectangles that are looked at before

Table = NDArray[Any]  # of int16 or int32: see `dtype_of`


def fits(lengths: Lengths) -> bool:
    """Whether the tiles fit into a table."""
    return math.prod(_grid(lengths)) <= _MOST


def tiles(predicate: Predicate, lengths: Lengths, most: int | None) -> tuple[Table, Tensor]:
    """The index of each tile's bit tile, EMPTY_TILE or FULL_TILE; the distinct bit tiles.

    Raises:
        TooLargeError: More than `most` tiles, or 256 times as many elements, are to be looked at.
    """
    if diagonal.applies(predicate, lengths):
        return diagonal.tiles(predicate, lengths)
    table, open_, of_leaves = _states(predicate, lengths)
    if most is not None and np.count_nonzero(table != EMPTY_TILE) + len(open_.rows) > most:
        raise TooLargeError
    index, packed = undecided.evaluate(predicate, open_, of_leaves, most and 256 * most)
    table = table.astype(dtype_of(len(packed)), copy=False)
    table[open_.rows, open_.cols] = index
    return table, packed


def _states(predicate: Predicate, lengths: Lengths) -> tuple[Table, Tiles, list[NDArray[np.int8]]]:
    """The state of each tile: of rectangles first, then within unknown ones.

    Returns:
        FULL_TILE for full tiles, else EMPTY_TILE; the unknown tiles, and the states of each leaf of
        the predicate in these.
    """
    leaves, (down, across) = composed.leaves(predicate), _grid(lengths)
    side = _SIDE if down * across > _FEW else 1
    coarse = -(-down // side), -(-across // side)
    cells = side * np.arange(coarse[0])[:, None], side * np.arange(coarse[1])
    of_leaves = [_classified(leaf, cells, side, lengths) for leaf in leaves]
    states = _combined(predicate, of_leaves)
    open_ = np.flatnonzero(states == UNKNOWN)
    rows, cols = np.divmod(open_, coarse[1])
    of_leaves = [x.reshape(-1).take(open_) for x in of_leaves]
    if side == 1:
        return _entries(states), Tiles(rows, cols, lengths), of_leaves
    parts = [
        _within(leaf, x, rows, cols, lengths) for leaf, x in zip(leaves, of_leaves, strict=True)
    ]
    within = _combined(predicate, parts)
    table = _entries(states).repeat(side, 1).repeat(side, 0)
    table.reshape(coarse[0], side, coarse[1], side)[rows, :, cols] = _entries(within)
    open_ = np.flatnonzero(within == UNKNOWN)
    of_leaves = [x.reshape(-1).take(open_) for x in parts]
    line, col = blockwise.floor_divide(open_, side), blockwise.remainder(open_, side)
    nth, row = blockwise.floor_divide(line, side), blockwise.remainder(line, side)
    tiles = Tiles(side * rows[nth] + row, side * cols[nth] + col, lengths)
    if down % side or across % side:  # rectangles reach beyond the lengths
        exist = np.flatnonzero((tiles.rows < down) & (tiles.cols < across))
        tiles, of_leaves = tiles[exist], [x[exist] for x in of_leaves]
        table = np.ascontiguousarray(table[:down, :across])
    return table, tiles, of_leaves


def _entries(states: NDArray[np.int8]) -> NDArray[np.int16]:
    """FULL_TILE for FULL, else EMPTY_TILE."""
    return np.where(states == FULL, np.int16(FULL_TILE), np.int16(EMPTY_TILE))


def _combined(predicate: Predicate, of_leaves: list[NDArray[np.int8]]) -> NDArray[np.int8]:
    """The states of a composite, from those of its leaves."""
    found: NDArray[np.int8] = composed.combined(predicate, map(Ternary, of_leaves)).value
    return found


def _within(
    leaf: Predicate,
    states: NDArray[np.int8],
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    lengths: Lengths,
) -> NDArray[np.int8]:
    """The states of the tiles in rectangles `(n, _SIDE, _SIDE)`, of which some are unknown.

    Args:
        leaf: The mask.
        states: Its states in the rectangles.
        rows: Their block rows, in units of _SIDE tiles.
        cols: Their block columns, likewise.
        lengths: q_len, kv_len, block.
    """
    found = np.empty((len(states), _SIDE, _SIDE), np.int8)
    found[:] = states[:, None, None]
    open_, side = np.flatnonzero(states == UNKNOWN), np.arange(_SIDE)
    rows, cols = _SIDE * rows[open_], _SIDE * cols[open_]
    cells = rows[:, None, None] + side[:, None], cols[:, None, None] + side
    found[open_] = _classified(leaf, cells, 1, lengths)
    return found


def _classified(
    predicate: Predicate, cells: tuple[NDArray[Any], NDArray[Any]], side: int, lengths: Lengths
) -> NDArray[np.int8]:
    """The states of rectangles of `side` x `side` tiles at these rows and columns of tiles.

    Rows and columns have shapes that broadcast. Rectangles beyond the lengths have any state.
    """
    if side == 1 and diagonal.applies(predicate, lengths):
        return diagonal.states(predicate, *cells, lengths)
    q_len, kv_len, (block_q, block_kv) = lengths
    q, kv = cells[0] * block_q, cells[1] * block_kv
    q_hi = np.minimum(q + (side * block_q - 1), q_len - 1)
    kv_hi = np.minimum(kv + (side * block_kv - 1), kv_len - 1)
    blocks = Blocks(np.minimum(q, q_hi), q_hi, np.minimum(kv, kv_hi), kv_hi, max(q_len, kv_len))
    found: NDArray[np.int8] = numbers(predicate.classify(blocks))
    return found


def _grid(lengths: Lengths) -> tuple[int, int]:
    """Numbers of tiles down and across."""
    q_len, kv_len, (block_q, block_kv) = lengths
    return -(-q_len // block_q), -(-kv_len // block_kv)


def arrays_of_tables(
    tables: list[Table], packed: list[Tensor] | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """crow_indices, col_indices, bit_tile_indices and bit_tiles of a layout, one table a pattern.

    packed: The bit tiles of each table, distinct within it; or those of all, distinct.
    """
    stored, entries = [], []
    for table in tables:
        line = np.ascontiguousarray(table).reshape(-1)
        stored.append(np.flatnonzero(line != EMPTY_TILE))
        entries.append(line.take(stored[-1]))
    return arrays_of_stored(stored, entries, tables[0].shape, packed)


def arrays_of_stored(
    stored: list[NDArray[np.int64]],
    entries: list[Table],
    shape: tuple[int, int],
    packed: list[Tensor] | Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `arrays_of_tables`.

    Args:
        stored: The stored tiles of each pattern: row x number of columns + column, ascending.
        entries: Their bit tiles, or FULL_TILE.
        shape: Numbers of rows and of columns.
        packed: As in `arrays_of_tables`.
    """
    crow, cols, of_all = [], [], []
    num_tiles = num_bit_tiles = 0
    shared = isinstance(packed, Tensor)
    down, across = shape
    first = np.arange(0, down * across, across, dtype=np.int32)  # tile of each row
    for pattern, (tiles, entry) in enumerate(zip(stored, entries, strict=True)):
        ends = np.searchsorted(tiles, across * np.arange(down + 1))
        crow.append(ends + num_tiles)
        cols.append(tiles.astype(np.int32))
        cols[-1] -= first.repeat(np.diff(ends))
        index = entry.astype(np.int32)
        of_all.append(np.where(index < 0, index, index + num_bit_tiles) if num_bit_tiles else index)
        num_tiles += len(tiles)
        num_bit_tiles += 0 if shared else len(packed[pattern])
    bit_tiles = packed if isinstance(packed, Tensor) else host.cat(packed)
    distinct = shared or len(stored) == 1
    bit_tiles, indices = renumber(bit_tiles, host.cat([tensor(x) for x in of_all]), distinct)
    starts = tensor(np.array(crow, np.int32))
    return starts, host.cat([tensor(x) for x in cols]), host.int32(indices), bit_tiles
