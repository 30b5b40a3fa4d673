"""What the warps of a CTA tell each other: work items, places of tiles, named barriers.

The fields of all NamedTuples are Int32.
"""

from enum import IntEnum
from typing import NamedTuple

from cutlass import Int32


class RowItem(NamedTuple):
    """Work by queries: a block row, or a part of it. No tiles: there are no more items."""

    m_block: Int32
    head: Int32
    batch: Int32
    count: Int32  # of tiles
    part: Int32  # where a split row's partial result goes; -1: not split


class PositionItem(NamedTuple):
    """A `RowItem` whose block row is one of positions (see position_items.py)."""

    m_block: Int32
    head: Int32
    batch: Int32
    count: Int32
    part: Int32
    start: Int32  # query that lies in the first row of the tile; negative: the tile begins earlier
    known: Int32  # rows of the tile that are positions of the layout


class ColumnItem(NamedTuple):
    """Work by keys: a block column, or a part of it. A negative count: there are no more items."""

    n_block: Int32
    head: Int32  # of k and v
    batch: Int32
    count: Int32  # of tiles
    part: Int32  # where a split column's partial result goes; -1: not split
    first: Int32  # tile
    remaining: Int32  # keys from the block's first one on; without any, its tiles are left out


class KeyTile(NamedTuple):
    """Where a tile of keys lies."""

    n_block: Int32  # negative: no tile
    head: Int32  # of k and v
    batch: Int32
    start: Int32  # key that is the first of block 0


class Load(NamedTuple):
    """What the producer of a `RowItem` loads."""

    m_block: Int32
    head: Int32
    batch: Int32
    first: Int32  # tile
    count: Int32  # of tiles
    limit: Int32  # keys, counted from `key_start`
    start: Int32  # as in `PositionItem`
    key_start: Int32  # as in `KeyTile.start`


class DecodeItem(NamedTuple):
    """What a CTA of the decoding kernel computes: steps `begin` to `end` of a row."""

    head: Int32  # the first of the tile's rows
    batch: Int32
    part: Int32  # where a split row's partial result goes; -1: not split
    first: Int32  # tile of the row
    begin: Int32
    end: Int32
    limit: Int32  # keys, counted from `key_start`
    key_start: Int32  # key that is the first of block 0
    row: Int32  # row of the bit tiles
    known: Int32  # 0: the layout does not have the query's position


class ForwardBarrier(IntEnum):
    """Named barriers of the kernels by queries."""

    ALL = 0  # the whole CTA's
    TURN = 1  # one for each warpgroup, of two or three: its turn to issue products
    OWN = 4  # one for each warpgroup, among its own threads


class DecodeBarrier(IntEnum):
    """Named barriers of the decoding kernel."""

    ALL = 0  # the whole CTA's
    CONSUMERS = 1


class BackwardBarrier(IntEnum):
    """Named barriers of the kernel by keys."""

    ALL = 0  # the whole CTA's
    BOTH = 1  # both warpgroups
    READY = 2  # for each buffer one for each warpgroup and its storing warp: results lie there
    STAGGER = 10  # the second warpgroup follows the first


def no_more(kind, **fields):
    """The item of this type that ends the work: zeros, but for what is given."""
    return kind(**{name: fields.get(name, Int32(0)) for name in kind._fields})
