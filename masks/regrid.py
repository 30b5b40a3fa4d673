"""Tiles of another size from a table of all tiles, on a CPU: for `retile`.

A new tile is made of parts of a few old ones. Which old tiles, and which parts of them, is one
number. Few of these numbers differ, so few new tiles are made of bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparse_flash.masks import bits, grid, host
from sparse_flash.masks.assemble import EMPTY_TILE, dtype_of, numbered
from sparse_flash.masks.blockwise import tensor
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

_MOST = 1 << 20  # numbers of which a table of bools is made
_AT_ONCE = 1 << 22  # bytes of new bit tiles made at a time
_OFFSET = -EMPTY_TILE  # added to entries: 0 is an empty tile, 1 a full one


@dataclass
class _Axis:
    """How old blocks of tokens make new ones, along queries or keys.

    Attributes:
        first: The first old block of each new one.
        kind: The kind of each new block: where it begins in the first old one, and how long it is.
        parts: Number of old blocks that a new one may touch.
        part: For each kind and each token of a new block, which of these it is in.
        inner: The position of each token in its old block.
        sizes: Number of tokens of each kind that exist.
    """

    first: NDArray[np.int64]
    kind: NDArray[np.int64]
    parts: int
    part: NDArray[np.int64]
    inner: NDArray[np.int64]
    sizes: NDArray[np.int64]
    is_same: bool  # whether new blocks are the old ones

    @classmethod
    def of(cls, length: int, old: int, new: int) -> _Axis:
        begin, common = np.arange(0, length, new), math.gcd(old, new)
        kind, starts = begin % old // common, np.arange(0, old, common)
        sizes = np.full(len(starts), new)
        if length % new:  # the last block has a kind of its own
            starts, sizes = np.append(starts, begin[-1] % old), np.append(sizes, length % new)
            kind[-1] = len(starts) - 1
        part, inner = np.divmod(starts[:, None] + np.arange(new), old)
        return cls(begin // old, kind, int(part.max()) + 1, part, inner, sizes, old == new)


def regrid(
    layout: BlockLayout, block: tuple[int, int], made: type[BlockLayout]
) -> BlockLayout | None:
    """The layout in blocks of another size; None where tables would be too large."""
    lengths = (layout.q_len, layout.kv_len, block)
    old = layout.block
    cut = old[1] != block[1] and math.gcd(old[1], block[1]) % 8  # bytes
    fits = grid.fits(layout.lengths) and grid.fits(lengths)
    if layout.device.type != "cpu" or cut or not fits:
        return None
    axes = (_Axis.of(lengths[0], old[0], block[0]), _Axis.of(lengths[1], old[1], block[1]))
    parts, kinds = (axes[0].parts, axes[1].parts), len(axes[0].sizes) * len(axes[1].sizes)
    base = layout.num_bit_tiles + _OFFSET
    size = base ** math.prod(parts) * kinds
    if size >= 1 << 62:
        return None
    dtype = next(x for x in (np.uint8, np.uint16, np.int32, np.int64) if size <= np.iinfo(x).max)
    codes = _codes(layout, parts, dtype)
    stored = [_numbers(table, axes, base) for table in codes]
    number, index = _distinct(np.concatenate([number for _, number in stored]), size)
    entry, bit_tiles = _made(layout, number, axes, block)
    tiles = [some for some, _ in stored]
    entries = np.split(entry.take(index), np.cumsum([len(some) for some in tiles[:-1]]))
    if (entry == EMPTY_TILE).any():  # of parts without allowed elements
        kept = [np.flatnonzero(some != EMPTY_TILE) for some in entries]
        tiles = [some.take(keep) for some, keep in zip(tiles, kept, strict=True)]
        entries = [some.take(keep) for some, keep in zip(entries, kept, strict=True)]
    shape = len(axes[0].first), len(axes[1].first)
    arrays = grid.arrays_of_stored(tiles, entries, shape, bit_tiles)
    return made(*lengths, *arrays, layout.pattern_map, validate=False)


def _codes(layout: BlockLayout, parts: tuple[int, int], dtype: Any) -> Iterator[NDArray[Any]]:
    """A table of the entries of each pattern, with empty tiles below and to the right."""
    shape = layout.num_block_rows + parts[0], layout.num_block_cols + parts[1]
    cols, first = layout.col_indices.numpy(), shape[1] * np.arange(layout.num_block_rows)
    # Assigned in another dtype, they would take several times as long.
    entries = (layout.bit_tile_indices.numpy() + _OFFSET).astype(dtype)
    for starts in layout.crow_indices.numpy():
        some = slice(starts[0], starts[-1])
        place = first.repeat(np.diff(starts))
        place += cols[some]  # in place: new memory takes as long as arithmetic
        codes = np.zeros(shape, dtype)
        codes.ravel()[place] = entries[some]
        yield codes


def _numbers(
    codes: NDArray[Any], axes: tuple[_Axis, _Axis], base: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The new tiles that touch stored ones, and the number of each, in the dtype of the codes."""
    down, across = axes
    width = len(across.first)
    number = np.zeros((len(down.first), width), codes.dtype)
    for i in range(down.parts):
        rows = codes.take(down.first + i, axis=0)
        for j in range(across.parts):
            number *= base
            number += rows[:, :width] if across.is_same else rows.take(across.first + j, axis=1)
    stored = np.flatnonzero(number != 0)
    number *= len(down.sizes)
    number += down.kind.astype(codes.dtype)[:, None]
    number *= len(across.sizes)
    number += across.kind.astype(codes.dtype)
    return stored, number.ravel().take(stored)


def _distinct(number: NDArray[Any], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct numbers, and the index of each number among them."""
    if size <= _MOST:
        distinct, index = host.unique(tensor(number), size)
        return distinct.numpy(), index.numpy()
    first, index = bits.distinct_rows(tensor(number.astype(np.int64)[:, None]))
    return number[first.numpy()].astype(np.int64), index.numpy()


def _made(
    layout: BlockLayout,
    number: NDArray[np.int64],
    axes: tuple[_Axis, _Axis],
    block: tuple[int, int],
) -> tuple[NDArray[np.int64], Tensor]:
    """Of distinct numbers: the index of their bit tile, EMPTY_TILE or FULL_TILE; the bit tiles."""
    down, across = axes
    given, width = layout.bit_tiles.numpy(), -(-block[1] // 8)
    old = np.zeros((_OFFSET + len(given), *given.shape[1:]), np.uint8)
    old[1] = np.packbits(np.ones(layout.block[1], np.bool_), bitorder="little")
    old[_OFFSET:] = given
    number, col_kind = np.divmod(number, len(across.sizes))
    number, row_kind = np.divmod(number, len(down.sizes))
    codes = np.empty((len(number), down.parts * across.parts), np.int64)
    for i in reversed(range(codes.shape[1])):
        number, codes[:, i] = np.divmod(number, len(old))
    tiles = np.empty((len(codes), block[0], width), np.uint8)
    step = max(1, _AT_ONCE // (block[0] * width))
    for start in range(0, len(codes), step):
        some = slice(start, start + step)
        row, col = row_kind[some], col_kind[some]
        part, inner = down.part[row] * across.parts, down.inner[row]
        if across.is_same:  # whole lines of old tiles
            line = np.take_along_axis(codes[some], part, 1) * layout.block[0] + inner
            tiles[some] = old.reshape(-1, width).take(line, axis=0)
            continue
        part = part[:, :, None] + across.part[col][:, None, ::8]
        code = codes[some][np.arange(len(row))[:, None, None], part]
        tiles[some] = old[code, inner[:, :, None], across.inner[col][:, None, ::8] // 8]
    heights, widths = down.sizes[row_kind], across.sizes[col_kind]
    bits.clip(tiles, heights, widths)
    index, distinct = numbered(tensor(tiles), tensor(heights * widths))
    return index.numpy().astype(dtype_of(len(distinct))), distinct
