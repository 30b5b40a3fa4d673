"""Work items of queries at positions: found in the kernel, from numbers that lie on the device.

Query i of batch entry b has position p = i + q_offset[b] - kv_starts[b], and key j of memory has
position r = j - kv_starts[b]. The layout is one of positions, and so are all tiles: a tile of
queries begins at a multiple of tile_m positions, which need not be one of memory. TMA takes any
start, reads zeros where there is no row, and writes nothing there.

The grid of items is dense and its size known to the host: for each batch entry and head the
ceil(s_q / tile_m) + 1 tiles that s_q consecutive positions may touch, each in `num_splits` parts.
What an item's tiles are depends on the offsets, so nothing is built again when these change.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute
from sparse_flash.kernels.sm90.items import Load, PositionItem


class PositionArrays(NamedTuple):
    """Arrays that say where queries and keys lie, all int32."""

    kv_lens: cute.Tensor  # (b,): keys from here on are not read; at most the number of keys
    q_offset: cute.Tensor  # (b,)
    kv_starts: cute.Tensor  # (b,)
    rows: cute.Tensor  # (patterns, block rows + 1): first tile of each row, and the end
    pattern_map: cute.Tensor  # (1 or b, 1 or h)


class PositionNumbers(NamedTuple):
    """Numbers that the host knows, all Int32."""

    q_base: Int32  # added to q_offset
    num_positions: Int32  # q_len of the layout
    num_splits: Int32  # parts of a row


class Shift(NamedTuple):
    """Offsets of a batch entry."""

    queries: Int32  # position of query 0
    keys: Int32  # kv_starts
    limit: Int32  # positions of keys that may be read: r < limit
    known: Int32  # positions of queries that the layout has; 0 where kv_starts is negative


class Positions:
    """The grid of items; `sizes` are those of q and k: (b, s_q, h, s_kv)."""

    def __init__(self, tile, arrays, numbers, sizes):
        (self.tile_m, self.tile_n), self.arrays, self.numbers = tile, arrays, numbers
        self.b, self.s_q, self.h, self.s_kv = sizes

    @cute.jit
    def num_row_tiles(self):
        """Tiles of queries of each head."""
        return row_tiles(self.s_q, self.tile_m)

    @cute.jit
    def num_items(self):
        """Work items of all CTAs."""
        return self.b * self.h * self.num_row_tiles() * self.numbers.num_splits

    @cute.jit
    def shift(self, batch):
        """The offsets of a batch entry."""
        kv_start = self.arrays.kv_starts[batch]
        queries = self.numbers.q_base + self.arrays.q_offset[batch] - kv_start
        limit = cutlass.min(self.arrays.kv_lens[batch], self.s_kv) - kv_start
        known = self.numbers.num_positions if kv_start >= 0 else Int32(0)
        return Shift(queries, kv_start, limit, known)

    @cute.jit
    def item(self, index, tiles):
        """The item of this number, and what to load for it.

        An item without tiles goes through the motions of one tile, all of whose keys are masked.
        """
        splits, row_tiles = self.numbers.num_splits, self.num_row_tiles()
        split, rest = index % splits, index // splits
        # Later rows first: under a causal mask they are the longer ones.
        nth, rest = row_tiles - 1 - rest % row_tiles, rest // row_tiles
        head, batch = rest % self.h, rest // self.h
        shift = self.shift(batch)
        m_block = floor_divide(shift.queries, self.tile_m) + nth
        first, count = self.row(tiles, (m_block, head, batch), shift.limit)
        begin, end = count * split // splits, count * (split + 1) // splits
        first, count, limit = first + begin, end - begin, shift.limit
        if count == 0:
            first, count, limit = Int32(cute.size(tiles, mode=[0]) - 1), Int32(1), Int32(0)
        top = m_block * self.tile_m
        part = split if splits > 1 else Int32(-1)
        start = top - shift.queries
        item = PositionItem(m_block, head, batch, count, part, start, shift.known - top)
        load = Load(m_block, head, batch, first, count, limit, start, shift.keys)
        return item, load

    @cute.jit
    def row(self, tiles, place, limit):
        """(first, count): tiles of the block row at place = (m_block, head, batch), of any sign,
        that begin before key position `limit`.
        """
        (m_block, head, batch), rows = place, self.arrays.rows
        owners = self.arrays.pattern_map
        pattern = owners[batch % cute.size(owners, mode=[0]), head % cute.size(owners, mode=[1])]
        inside = m_block >= 0 and m_block < cute.size(rows, mode=[1]) - 1
        row = m_block if inside else Int32(0)
        first, end = rows[pattern, row], rows[pattern, row + 1]
        count = end - first if inside else Int32(0)
        columns = cute.ceil_div(cutlass.max(limit, Int32(0)), self.tile_n)
        return first, columns_before(tiles, first, count, columns)


@cute.jit
def row_tiles(s_q, tile_m: cutlass.Constexpr):
    """Tiles of tile_m positions that s_q consecutive ones may touch."""
    return (s_q + tile_m - 1) // tile_m + 1


@cute.jit
def floor_divide(x, y: cutlass.Constexpr):
    """Largest integer at most x / y, for any sign of x."""
    quotient = cutlass.max(x, -x) // y
    below = (cutlass.max(-x, Int32(0)) + y - 1) // y
    return quotient if x >= 0 else -below


@cute.jit
def columns_before(tiles, first, count, columns):
    """How many of a row's tiles (columns ascending) lie before block column `columns`."""
    last = first + cutlass.max(count, Int32(1)) - 1
    left, right = tiles[first, 0], tiles[last, 0]
    low, high = Int32(0), count
    if right - left == count - 1:  # a run, as rows of dense and causal layouts are
        low = cutlass.min(cutlass.max(columns - left, Int32(0)), count)
        high = low
    elif right < columns:
        low = count
    while low < high:  # the answer is in low..high
        middle = (low + high) // 2
        if tiles[first + middle, 0] < columns:
            low = middle + 1
        else:
            high = middle
    return low


class ColumnOffsets:
    """Offsets as the kernels of the backward pass use them, whose work the host has listed.

    q_pad: (b,) int32, rows of the first tile of queries before query 0: see `BackwardAtSm90`.
    kv_starts: (b,) int32.
    s_kv: Keys that there are.
    """

    def __init__(self, arrays, s_kv):
        self.q_pad, self.kv_starts = arrays
        self.s_kv = s_kv

    @cute.jit
    def queries(self, batch):
        """The query that lies in the first row of the first tile: 0 or less."""
        return -self.q_pad[batch]

    @cute.jit
    def keys(self, batch):
        """The key that is the first of block 0."""
        return self.kv_starts[batch]

    @cute.jit
    def limit(self, kv_len, batch):
        """Positions of keys that may be read."""
        return cutlass.min(kv_len, self.s_kv) - self.kv_starts[batch]


def positions_of(config, positions):
    """The `Positions` of a kernel's arguments: arrays, numbers and sizes; `None` for `None`."""
    if cutlass.const_expr(positions is None):
        return None
    arrays, numbers, sizes = positions
    return Positions(config.tile, PositionArrays(*arrays), PositionNumbers(*numbers), sizes)
