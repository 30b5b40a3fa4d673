"""Elements of the tiles that three-valued logic cannot decide, from the kinds of each leaf.

For each leaf, a tile is empty, full, or of one of a few kinds. These determine the tile of the
composite. So few tiles are evaluated for each leaf, and few combinations of them are made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sparse_flash.masks import bits, composed, diagonal, host
from sparse_flash.masks.assemble import numbered
from sparse_flash.masks.blockwise import tensor
from sparse_flash.masks.composed import Bits, Tiles
from sparse_flash.masks.elements import Predicate, TooLargeError, evaluate_all, kinds_of
from sparse_flash.masks.ternary import FULL, UNKNOWN
from torch import Tensor

_TABLE = 1 << 16  # numbers of which a table of bools takes little time


def evaluate(
    predicate: Predicate, tiles: Tiles, of_leaves: list[NDArray[np.int8]], most: int | None
) -> tuple[NDArray[Any], Tensor]:
    """The bits of unknown tiles.

    Args:
        predicate: The mask.
        tiles: The tiles.
        of_leaves: Their states for each leaf of the mask.
        most: Largest number of elements to evaluate; default: any.

    Returns:
        The index of each tile's bit tile, EMPTY_TILE or FULL_TILE; the distinct bit tiles, uint8.

    Raises:
        TooLargeError: More than `most` elements are to be evaluated.
    """
    leaves = composed.leaves(predicate)
    found = [_kinds(leaf, x, tiles) for leaf, x in zip(leaves, of_leaves, strict=True)]
    first, twin = _combinations([(code, 2 + len(kinds.rows)) for code, kinds in found])
    areas = tiles.lengths[2][0] * tiles.lengths[2][1]
    if most is not None and len(first) * areas > most:
        raise TooLargeError
    some = tiles[first]
    if composed.few(predicate, len(first), tiles.lengths):
        values = [
            _codes(leaf, kinds).take(code[first], axis=0)
            for leaf, (code, kinds) in zip(leaves, found, strict=True)
        ]
        packed: Bits = composed.combined(predicate, values)
        some.clip(packed)
        index, distinct = numbered(tensor(packed), tensor(some.areas))
    else:
        rows, cols = tensor(some.rows), tensor(some.cols)
        index, distinct = evaluate_all(predicate, rows, cols, tiles.lengths)
    return index.numpy().take(twin), distinct


def _kinds(leaf: Any, states: NDArray[np.int8], tiles: Tiles) -> tuple[NDArray[np.int64], Tiles]:
    """The number of each tile: 0 if empty, 1 if full, else 2 + its kind; a tile of each kind."""
    code = (states == FULL).astype(np.int64)
    open_ = np.flatnonzero(states == UNKNOWN)
    some = tiles[open_]
    if not len(open_):
        return code, some
    if diagonal.applies(leaf, tiles.lengths):
        first, twin = diagonal.kinds(some.rows, some.cols)
    else:
        first, twin = kinds_of(leaf, tensor(some.rows), tensor(some.cols), tiles.lengths)
    code[open_] = twin.numpy() + 2
    return code, some[first.numpy()]


def _combinations(
    codes: list[tuple[NDArray[np.int64], int]],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first tile of each combination of numbers, and the combination of each tile.

    codes: Numbers of the tiles `(n,)` below an end, and that end, for each leaf.
    """
    number, size = codes[0]
    for code, end in codes[1:]:
        if size * end > 1 << 62:
            distinct, index = host.unique(tensor(number))
            number, size = index.numpy(), len(distinct)
        number, size = number * end + code, size * end
    if size > _TABLE:
        first, twin = bits.distinct_rows(tensor(number[:, None]))
    else:
        first, twin = host.kinds(tensor(number), size)
    return first.numpy(), twin.numpy()


def _codes(leaf: Any, kinds: Tiles) -> Bits:
    """The bits of each number of `_kinds`; any bits beyond the lengths."""
    _, _, (block_q, block_kv) = kinds.lengths
    found = np.zeros((2 + len(kinds.rows), block_q, -(-block_kv // 8)), np.uint8)
    found[1] = 255
    if len(kinds.rows):
        found[2:] = composed.evaluated(leaf, kinds)
    return found
