"""All tiles of a mask in one table, on a CPU.

A table of 512 x 512 tiles has 262,144 small numbers: an operation on it takes less time than lists
of rectangles that are cut and sorted. Longer sequences are left to `build`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparse_flash.masks import diagonal, host
from sparse_flash.masks.assemble import EMPTY_TILE, dtype_of, renumber
from sparse_flash.masks.blockwise import numbers, tensor
from sparse_flash.masks.elements import Predicate, TooLargeError, evaluate
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.ternary import UNKNOWN, Blocks
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
        TooLargeError: More than `most` tiles, or 64 times as many elements, are to be looked at.
    """
    if diagonal.applies(predicate, lengths):
        return diagonal.tiles(predicate, lengths)
    found = states(predicate, lengths)
    if most is not None and np.count_nonzero(found) > most:
        raise TooLargeError
    unknown = np.flatnonzero(found == UNKNOWN)
    rows, cols = np.divmod(unknown, found.shape[1])
    index, packed = evaluate(predicate, tensor(rows), tensor(cols), lengths, most and 64 * most)
    table = ((found >> 1) + EMPTY_TILE).astype(dtype_of(len(packed)))  # of full tiles FULL_TILE
    table.ravel()[unknown] = index.numpy()
    return table, packed


def states(predicate: Predicate, lengths: Lengths) -> NDArray[np.int8]:
    """EMPTY, UNKNOWN or FULL for each tile: of rectangles first, then within unknown ones."""
    down, across = _grid(lengths)
    if down * across <= _FEW:
        return _classified(predicate, (np.arange(down)[:, None], np.arange(across)), 1, lengths)
    coarse = -(-down // _SIDE), -(-across // _SIDE)
    corners = (_SIDE * np.arange(coarse[0])[:, None], _SIDE * np.arange(coarse[1]))
    of_rectangles = _classified(predicate, corners, _SIDE, lengths)
    table = np.empty((coarse[0], _SIDE, coarse[1], _SIDE), np.int8)
    table[:] = of_rectangles[:, None, :, None]
    rows, cols = np.nonzero(of_rectangles == UNKNOWN)
    side = np.arange(_SIDE)
    cells = (_SIDE * rows[:, None, None] + side[:, None], _SIDE * cols[:, None, None] + side)
    table[rows, :, cols] = _classified(predicate, cells, 1, lengths)
    whole = table.reshape(coarse[0] * _SIDE, coarse[1] * _SIDE)
    return np.ascontiguousarray(whole[:down, :across])


def _classified(
    predicate: Predicate, cells: tuple[NDArray[Any], NDArray[Any]], side: int, lengths: Lengths
) -> NDArray[np.int8]:
    """The states of rectangles of `side` x `side` tiles at these rows and columns of tiles.

    Rows and columns have shapes that broadcast. Rectangles beyond the lengths have any state.
    """
    first = [np.minimum(x * block, n - 1) for x, block, n in _axes(cells, lengths)]
    last = [np.minimum((x + side) * block, n) - 1 for x, block, n in _axes(cells, lengths)]
    blocks = Blocks(first[0], last[0], first[1], last[1], max(lengths[:2]))
    found = numbers(predicate.classify(blocks))
    return np.broadcast_to(found, np.broadcast_shapes(cells[0].shape, cells[1].shape))


def _axes(cells: tuple[NDArray[Any], NDArray[Any]], lengths: Lengths) -> Any:
    return zip(cells, lengths[2], lengths[:2], strict=True)


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
    crow, cols, entries = [], [], []
    num_tiles = num_bit_tiles = 0
    shared = isinstance(packed, Tensor)
    for pattern, table in enumerate(tables):
        down, across = table.shape
        line = np.ascontiguousarray(table).reshape(-1)
        stored = np.flatnonzero(line != EMPTY_TILE)
        ends = np.searchsorted(stored, across * np.arange(down + 1))
        crow.append(ends + num_tiles)
        begin = np.arange(0, down * across, across, dtype=np.int32)
        cols.append(stored.astype(np.int32) - begin.repeat(np.diff(ends)))
        entry = line.take(stored).astype(np.int32)
        entries.append(
            np.where(entry < 0, entry, entry + num_bit_tiles) if num_bit_tiles else entry
        )
        num_tiles += len(stored)
        num_bit_tiles += 0 if shared else len(packed[pattern])
    tiles = packed if isinstance(packed, Tensor) else host.cat(packed)
    distinct = shared or len(tables) == 1
    tiles, indices = renumber(tiles, tensor(np.concatenate(entries)), distinct)
    made = np.stack(crow).astype(np.int32), np.concatenate(cols)
    return tensor(made[0]), tensor(made[1]), indices, tiles
