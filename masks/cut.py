"""Blocks cut into smaller tiles that divide them, on a CPU: for `retile`.

Each part of a stored block is full, empty, or one of few bit tiles. Parts are put in the order of
their rows by arithmetic on the numbers of tiles in each row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sparse_flash.masks import host
from sparse_flash.masks.assemble import EMPTY_TILE, FULL_TILE, numbered, renumber
from sparse_flash.masks.blockwise import tensor
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor, full


def cut(layout: BlockLayout, block: tuple[int, int], made: type[BlockLayout]) -> BlockLayout | None:
    """The layout in smaller blocks; None where they do not divide its blocks and lengths, or on a
    GPU.
    """
    old, (q_len, kv_len) = layout.block, layout.lengths[:2]
    ragged = old[0] % block[0] or old[1] % block[1] or q_len % block[0] or kv_len % block[1]
    whole_bytes = block[1] % 8 == 0 or block[1] == old[1]
    if layout.device.type != "cpu" or ragged or not whole_bytes:
        return None
    parts = old[0] // block[0], old[1] // block[1]
    entry, bit_tiles = _entries(layout, block, parts)
    place, starts = _places(layout, parts)
    entries, cols = np.empty(place.size, np.int32), np.empty(place.size, np.int32)
    entries[place] = entry.take(layout.bit_tile_indices.numpy(), axis=0)  # -1: the last one, full
    across = layout.col_indices.numpy()[:, None] * np.int32(parts[1]) + np.arange(parts[1])
    cols[place] = across[:, None]
    kept, down = entries != EMPTY_TILE, q_len // block[0]
    if q_len % old[0] or kv_len % old[1]:  # parts are outside
        kept &= cols < kv_len // block[1]
        for of_pattern in starts:
            kept[of_pattern[down] : of_pattern[-1]] = False
    before = np.zeros(len(kept) + 1, np.int32)
    np.cumsum(kept, out=before[1:])
    crow = before.take(starts[:, : down + 1])
    bit_tiles, found = renumber(bit_tiles, tensor(entries[kept]), True)
    arrays = (tensor(crow), tensor(cols[kept]), host.int32(found))
    return made(q_len, kv_len, block, *arrays, bit_tiles, layout.pattern_map, validate=False)


def _entries(
    layout: BlockLayout, block: tuple[int, int], parts: tuple[int, int]
) -> tuple[NDArray[np.int32], Tensor]:
    """Of the parts of each bit tile, and at last of a full one: index of the bit tile, EMPTY_TILE
    or FULL_TILE `(N + 1, down, across)`; and the bit tiles.
    """
    n, width = layout.num_bit_tiles, -(-block[1] // 8)
    packed = layout.bit_tiles.view(n, parts[0], block[0], parts[1], width).transpose(2, 3)
    packed = packed.reshape(-1, block[0], width)
    index, distinct = numbered(packed, full((len(packed),), block[0] * block[1]))
    whole = np.full((1, *parts), FULL_TILE)
    entries = np.concatenate([index.numpy().reshape(n, *parts), whole])
    return entries.astype(np.int32), distinct


def _places(
    layout: BlockLayout, parts: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The place of each part of each stored block in the order of rows of parts `(T, down,
    across)`; and where each row of parts begins, `(patterns, rows + 1)`.
    """
    down, across = parts
    area, begin = down * across, layout.crow_indices.numpy().astype(np.int64)
    counts = np.diff(begin)
    first = np.repeat(begin[:, :-1], counts.ravel())
    within = np.arange(len(first)) - first  # number of the block in its row
    steps = np.repeat(counts * across, counts.ravel())
    place = (first * area + within * across)[:, None] + steps[:, None] * np.arange(down)
    of_parts = begin[:, :-1, None] * area + (counts * across)[:, :, None] * np.arange(down)
    starts = np.concatenate([of_parts.reshape(len(begin), -1), begin[:, -1:] * area], 1)
    return place[:, :, None] + np.arange(across), starts
