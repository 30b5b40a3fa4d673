"""Work items of the forward kernel, as its threads see them."""

from typing import NamedTuple

from cutlass import Int32


class RowWork(NamedTuple):
    """The keys of a work item: of a block row, or a part of it. All Int32."""

    kv_head: Int32
    batch: Int32
    first: Int32  # tile
    count: Int32  # of tiles; 0: there are no more items
    limit: Int32  # keys, counted from `key_start`
    key_start: Int32  # key that is the first of block 0
    slot: Int32  # where its `RowPlace` is in shared memory, 0 or 1


class RowPlace(NamedTuple):
    """The rows of a work item. All Int32; in shared memory while the item is computed."""

    head: Int32
    batch: Int32
    part: Int32  # where a split row's partial result goes; -1: not split
    start: Int32  # query that lies in the first row of the tile; negative: the tile begins earlier
    known: Int32  # rows of the tile that are positions of the layout; only with offsets


HEAD = 0  # word of a `RowPlace`
# Words behind the `RowPlace` in kernels with score terms: the position of the tile's first row,
# batch entry * query heads + query head, and the bits of ALiBi's coefficient.
TOP, PAIR, COEFFICIENT = range(len(RowPlace._fields), len(RowPlace._fields) + 3)


def place_words(config) -> int:
    """Words of shared memory of the place of an item."""
    return len(RowPlace._fields) + (3 if config.scored else 0)


class KeyTile(NamedTuple):
    """A stored tile: its block column, and its bit tile or FULL_TILE. Both Int32."""

    n_block: Int32
    bit_tile: Int32
