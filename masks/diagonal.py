"""Tiles of masks that depend on the distance q - kv alone, such as local and causal ones.

All tiles on a diagonal are equal. A tile is determined by the truth at its 2 block - 1 distances.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from sparse_flash.masks import bits, host
from sparse_flash.masks.assemble import EMPTY_TILE, FULL_TILE, dtype_of
from sparse_flash.masks.blockwise import numbers, tensor
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.ternary import FULL, UNKNOWN, Blocks
from torch import Tensor


def applies(predicate: Any, lengths: Lengths) -> bool:
    """Whether a predicate depends on q - kv alone, and whether tiles are square and whole."""
    q_len, kv_len, (block, across) = lengths
    whole = block == across and q_len % block == kv_len % block == 0
    return whole and getattr(predicate, "diagonal", False) and predicate.for_host


def tiles(predicate: Any, lengths: Lengths) -> tuple[NDArray[Any], Tensor]:
    """The index of each tile's bit tile, EMPTY_TILE or FULL_TILE; the distinct bit tiles."""
    q_len, kv_len, (block, _) = lengths
    down, across = q_len // block, kv_len // block
    offsets, states = _classified(predicate, lengths)
    open_ = np.flatnonzero(states == UNKNOWN)
    lines, index = _lines(predicate, offsets[open_], block)
    entries = np.where(states == FULL, FULL_TILE, EMPTY_TILE).astype(dtype_of(len(lines)))
    entries[open_] = index
    step = entries.itemsize  # the diagonals of a table, in one line: no copies
    table = as_strided(entries[across - 1 :], (down, across), (step, -step))
    return table, _packed(lines, block)


def states(
    predicate: Any, rows: NDArray[np.int64], cols: NDArray[np.int64], lengths: Lengths
) -> NDArray[np.int8]:
    """EMPTY, UNKNOWN or FULL for tiles at rows and columns whose shapes broadcast."""
    _, found = _classified(predicate, lengths)
    return found.take(rows - cols + (lengths[1] // lengths[2][1] - 1))


def _classified(predicate: Any, lengths: Lengths) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Distances q - kv of the first elements on each diagonal of tiles, ascending; states."""
    q_len, kv_len, (block, _) = lengths
    offsets = block * np.arange(1 - kv_len // block, q_len // block)
    q, kv = np.maximum(offsets, 0), np.maximum(-offsets, 0)
    blocks = Blocks(q, q + (block - 1), kv, kv + (block - 1), max(q_len, kv_len))
    return offsets, numbers(predicate.classify(blocks))


def bits_at(predicate: Any, offsets: NDArray[np.int64], block: int) -> NDArray[np.uint8]:
    """The bits of tiles whose first elements are at these distances."""
    first, twin = kinds(offsets // block, np.zeros_like(offsets))
    lines = _truth(predicate, offsets.take(first.numpy()), block)
    return _packed(lines, block).numpy().take(twin.numpy(), axis=0)


def kinds(rows: NDArray[np.int64], cols: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """The first tile of each diagonal, and the diagonal of each tile at these block indices."""
    distance = rows - cols
    distance -= distance.min(initial=0)
    return host.kinds(tensor(distance), int(distance.max(initial=0)) + 1)


def _lines(
    predicate: Any, offsets: NDArray[np.int64], block: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """The truths at all distances within tiles at these offsets.

    Returns:
        The distinct truths of partial tiles `(n, 2 block - 1)`; the index of each offset's truth
        among them, EMPTY_TILE or FULL_TILE.
    """
    packed = bits.pack(tensor(_truth(predicate, offsets, block)[:, None]))
    distinct, twin = bits.deduplicate(packed)
    lines = bits.unpack(distinct, 2 * block - 1)[:, 0].numpy()
    some, every = lines.any(1), lines.all(1)
    partial = some & ~every
    entry = np.where(every, FULL_TILE, np.where(some, partial.cumsum() - 1, EMPTY_TILE))
    return lines[partial], entry[twin.numpy()]


def _truth(predicate: Any, offsets: NDArray[np.int64], block: int) -> NDArray[np.bool_]:
    """The truth at all distances within tiles at these offsets `(n, 2 block - 1)`, ascending."""
    distances = offsets[:, None] + np.arange(1 - block, block)
    q, kv = np.maximum(distances, 0), np.maximum(-distances, 0)
    truth: NDArray[np.bool_] = predicate.allowed(q, kv)
    return truth


def _packed(lines: NDArray[np.bool_], block: int) -> Tensor:
    """Bit tiles of truths at distances: element (i, j) is at distance i - j."""
    step, shape = lines.shape[1], (len(lines), block, block)
    backwards = np.ascontiguousarray(lines[:, ::-1])
    tiles = as_strided(backwards[:, block - 1 :], shape, (step, -1, 1))
    return tensor(bits.pack_arrays(tiles))
