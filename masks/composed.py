"""Composites from their leaves: the patterns at the ends of `|`, `&` and `~`.

States and bits of a composite are those of its leaves, combined.

Three-valued logic decides most operands in most tiles. Only the others are evaluated, as arrays of
numpy. Where there are many tiles, `elements` traces the rule of the whole mask instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparse_flash.masks import bits, diagonal
from sparse_flash.masks.blockwise import numbers, tensor
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.rectangles import Elements
from sparse_flash.masks.ternary import FULL, UNKNOWN, Blocks

_MOST = 1 << 22  # elements of all tiles
_AT_ONCE = 1 << 19  # elements of an array

Bits = NDArray[np.uint8]


@dataclass
class Tiles:
    """Tiles at some block rows and block columns, int64 `(n,)`."""

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    lengths: Lengths

    def __getitem__(self, index: Any) -> Tiles:
        return Tiles(self.rows[index], self.cols[index], self.lengths)

    @property
    def blocks(self) -> Blocks:
        """Their ranges of indices."""
        q_len, kv_len, (block_q, block_kv) = self.lengths
        q, kv = self.rows * block_q, self.cols * block_kv
        ends = np.minimum(q + block_q, q_len) - 1, np.minimum(kv + block_kv, kv_len) - 1
        return Blocks(q, ends[0], kv, ends[1], max(q_len, kv_len))

    @property
    def areas(self) -> NDArray[np.int64]:
        """Number of elements of each tile."""
        q_len, kv_len, (block_q, block_kv) = self.lengths
        heights = np.minimum(q_len - self.rows * block_q, block_q)
        areas: NDArray[np.int64] = heights * np.minimum(kv_len - self.cols * block_kv, block_kv)
        return areas

    def clip(self, found: Bits) -> None:
        """Set bits beyond the lengths to 0."""
        q_len, kv_len, (block_q, block_kv) = self.lengths
        heights = np.minimum(q_len - self.rows * block_q, block_q)
        bits.clip(found, heights, np.minimum(kv_len - self.cols * block_kv, block_kv))


def leaves(mask: Any) -> list[Any]:
    """The masks that a composite combines, at any depth; of another predicate, itself."""
    if not getattr(mask, "combines", False):
        return [mask]
    return [leaf for operand in mask.operands() for leaf in leaves(operand)]


def combined(mask: Any, values: Iterable[Any]) -> Any:
    """A composite's truth from those of its leaves: any values with `|`, `&` and `~`."""
    following = iter(values)

    def of(part: Any) -> Any:
        if not getattr(part, "combines", False):
            return next(following)
        return part.combined([of(operand) for operand in part.operands()])

    return of(mask)


def few(mask: Any, n: int, lengths: Lengths) -> bool:
    """Whether `n` tiles are few enough to combine their bits."""
    return n * lengths[2][0] * lengths[2][1] <= _MOST and hasattr(mask, "combined")


def packed(mask: Any, tiles: Tiles) -> Bits | None:
    """The bits of tiles, uint8 `(n, block_q, bytes)`; None where there are too many, or no mask."""
    if not few(mask, len(tiles.rows), tiles.lengths):
        return None
    found: Bits = combined(mask, [_bits(leaf, tiles) for leaf in leaves(mask)])
    tiles.clip(found)
    return found


def _bits(leaf: Any, tiles: Tiles) -> Bits:
    """The bits of tiles; any bits beyond the lengths."""
    _, _, (block_q, block_kv) = tiles.lengths
    states = numbers(leaf.classify(tiles.blocks))
    whole = np.where(states == FULL, 255, 0).astype(np.uint8)
    found = np.empty((len(states), block_q, -(-block_kv // 8)), np.uint8)
    found[:] = whole[:, None, None]
    unknown = np.flatnonzero(states == UNKNOWN)
    if len(unknown):
        found[unknown] = evaluated(leaf, tiles[unknown])
    return found


def evaluated(leaf: Any, tiles: Tiles) -> Bits:
    """The bits of tiles, element by element; any bits beyond the lengths."""
    q_len, kv_len, (block_q, block_kv) = tiles.lengths
    if diagonal.applies(leaf, tiles.lengths):
        return diagonal.bits_at(leaf, block_q * (tiles.rows - tiles.cols), block_q)
    if not (leaf.for_arrays and leaf.for_host):
        return _traced(leaf, tiles)
    found = np.empty((len(tiles.rows), block_q, -(-block_kv // 8)), np.uint8)
    step = max(1, _AT_ONCE // (block_q * block_kv))
    for start in range(0, len(tiles.rows), step):
        some = tiles[start : start + step]
        # Rules see only indices that exist.
        q = np.minimum(some.rows[:, None] * block_q + np.arange(block_q), q_len - 1)
        kv = np.minimum(some.cols[:, None] * block_kv + np.arange(block_kv), kv_len - 1)
        truth = leaf.allowed(q[:, :, None], kv[:, None])
        truth = np.broadcast_to(truth, (len(q), block_q, block_kv))
        found[start : start + step] = bits.pack_arrays(truth)
    return found


def _traced(mask: Any, tiles: Tiles) -> Bits:
    """As `_evaluated`, for a rule that reads tensors."""
    q_len, kv_len, (block_q, block_kv) = tiles.lengths
    size = min(block_q, q_len), min(block_kv, kv_len)
    first = tensor(tiles.rows * block_q), tensor(tiles.cols * block_kv)
    some: Bits = Elements(mask, (q_len, kv_len)).packed(*first, size).numpy()
    if some.shape[1:] == (block_q, -(-block_kv // 8)):
        return some
    found = np.zeros((len(some), block_q, -(-block_kv // 8)), np.uint8)
    found[:, : size[0], : some.shape[2]] = some
    return found
