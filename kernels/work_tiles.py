"""Work tiles and tile coordinates: messages between the warps of a CTA.

The fields of all NamedTuples are Int32.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, const_expr, cute


class RowWorkTile(NamedTuple):
    """A query block, or one split of it. A count of 0 ends the work."""

    m_block: Int32
    head: Int32
    batch: Int32
    count: Int32  # of tiles
    split_idx: Int32  # index of the split; -1: not split


class PositionWorkTile(NamedTuple):
    """A `RowWorkTile` whose query block is one of positions (see position_work_tiles.py)."""

    m_block: Int32
    head: Int32
    batch: Int32
    count: Int32
    split_idx: Int32
    start: Int32  # query in the first row of the tile; may be negative
    known: Int32  # number of rows of the tile inside the layout


class ColumnWorkTile(NamedTuple):
    """A key block, or one split of it. A negative count ends the work."""

    n_block: Int32
    head: Int32  # of k and v
    batch: Int32
    count: Int32  # of tiles
    split_idx: Int32  # index of the split; -1: not split
    first: Int32  # tile
    remaining: Int32  # keys from the first one of the block on; if 0, its tiles are skipped


class KeyTile(NamedTuple):
    """Coordinates of a tile of keys."""

    n_block: Int32  # negative: no tile
    head: Int32  # of k and v
    batch: Int32
    start: Int32  # first key of block 0


class Load(NamedTuple):
    """Loads of the producer for a `RowWorkTile`."""

    m_block: Int32
    head: Int32
    batch: Int32
    first: Int32  # tile
    count: Int32  # of tiles
    limit: Int32  # keys, counted from `key_start`
    start: Int32  # as in `PositionWorkTile`
    key_start: Int32  # as in `KeyTile.start`


class DecodeWorkTile(NamedTuple):
    """Work of a CTA of the decoding kernel: steps `begin` to `end` of a row."""

    head: Int32  # the first of the tile's rows
    batch: Int32
    split_idx: Int32  # index of the split; -1: not split
    first: Int32  # tile of the row
    left: Int32  # its column, if those of the row follow each other; else -1
    begin: Int32
    end: Int32
    limit: Int32  # keys, counted from `key_start`
    key_start: Int32  # first key of block 0
    row: Int32  # row of the bit tiles
    known: Int32  # 0: the query is outside the layout


def end_of_work(record_type, **fields):
    """The record that ends the work: zeros except for the given fields."""
    return record_type(**{name: fields.get(name, Int32(0)) for name in record_type._fields})


@cute.jit
def tiles_within(tiles, first, count, limit, tile_n: cutlass.Constexpr):
    """Number of tiles (columns ascending) that begin before key `limit`; at least 1.

    A row without keys computes one tile with all keys masked.
    """
    low, high = Int32(count), Int32(count)
    if tiles[first + count - 1, 0] * tile_n >= limit:
        low = Int32(1)
    while low < high:  # the answer is in low..high
        middle = (low + high) // 2
        if tiles[first + middle, 0] * tile_n < limit:
            low = middle + 1
        else:
            high = middle
    return low


@cute.jit
def query_coord(column, kv_head, heads):
    """(m_block, q head) of a block column; the q heads of a kv head are stacked in the layout."""
    group_size, num_m_blocks = heads
    return column % num_m_blocks, kv_head * group_size + column // num_m_blocks


@cute.jit
def first_step(config, work_tile, group_size):
    """Step at which a column of tiles begins, with `config.rotated`; else 0.

    It is the number of the queries beside the keys, counted around the tiles of a query head. So
    CTAs that compute neighboring columns add to different rows of dQ, and none waits for another
    one's first sum. That holds in causal layouts too: there a CTA begins a column when another one
    ends a shorter column, so columns that all begin at their diagonal tiles would add to the same
    rows.

    group_size: Query heads of a key head. All CTAs of a key head begin with the first of them,
    whose rows the L2 cache then holds.
    """
    if const_expr(not config.rotated):
        return Int32(0)
    beside = work_tile.n_block * config.tile_n // config.tile_m
    return beside % cutlass.max(work_tile.count // group_size, 1)


@cute.jit
def tile_of_step(config, work_tile, start, step):
    """Index of a step's tile in the list. start: Of `first_step`."""
    if const_expr(config.rotated):
        step = step + start
        step = step - work_tile.count if step >= work_tile.count else step
    return work_tile.first + step
