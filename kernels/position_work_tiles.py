"""Work tiles of queries at positions, computed in the kernel from offsets on the device.

Query i of batch entry b has position p = i + q_offset[b] - kv_starts[b], and key j of memory has
position r = j - kv_starts[b]. The layout and all tiles are in positions: a query tile begins at a
multiple of tile_m positions, at any row of memory. TMA takes any start row, reads zeros out of
bounds and writes nothing there.

The grid of work tiles is dense, and the host knows its size: for each batch entry and head,
ceil(s_q / tile_m) + 1 query tiles, which s_q consecutive positions may touch, times `num_splits`.
The tiles of a work tile depend on the offsets, so nothing is rebuilt when the offsets change.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, cute
from sparse_flash.kernels.work_tiles import Load, PositionWorkTile


class PositionArrays(NamedTuple):
    """Offsets and rows of the layout, all int32."""

    kv_lens: cute.Tensor  # (b,): end of the valid keys; at most the number of keys
    q_offset: cute.Tensor  # (b,)
    kv_starts: cute.Tensor  # (b,)
    rows: cute.Tensor  # (patterns, block rows + 1, 4): see `PositionPlan.rows`
    pattern_map: cute.Tensor  # (1 or b, 1 or h)


class PositionNumbers(NamedTuple):
    """Scalars from the host, all Int32."""

    q_base: Int32  # added to q_offset
    num_positions: Int32  # q_len of the layout
    num_splits: Int32  # splits per row


class Reads(NamedTuple):
    """The first reads of a work tile: none waits for another. All Int32."""

    pattern: Int32
    kv_len: Int32
    q_offset: Int32
    kv_start: Int32


class Shift(NamedTuple):
    """Offsets of a batch entry."""

    queries: Int32  # position of query 0
    keys: Int32  # kv_starts
    limit: Int32  # end of the readable key positions: r < limit
    known: Int32  # number of query positions in the layout; 0 if kv_starts is negative


class Positions:
    """The grid of work tiles. sizes: (b, s_q, h, s_kv) of q and k."""

    def __init__(self, tile, arrays, numbers, sizes):
        (self.tile_m, self.tile_n), self.arrays, self.numbers = tile, arrays, numbers
        self.b, self.s_q, self.h, self.s_kv = sizes

    @cute.jit
    def num_row_tiles(self):
        """Number of query tiles per head."""
        return row_tiles(self.s_q, self.tile_m)

    @cute.jit
    def num_work_tiles(self):
        """Number of work tiles of all CTAs."""
        return self.b * self.h * self.num_row_tiles() * self.numbers.num_splits

    @cute.jit
    def reads(self, head, batch):
        """Start the reads that need nothing but the head and the batch entry."""
        kv_lens, q_offset, kv_starts, _, owners = self.arrays
        pattern = owners[batch % cute.size(owners, mode=[0]), head % cute.size(owners, mode=[1])]
        return Reads(pattern, kv_lens[batch], q_offset[batch], kv_starts[batch])

    @cute.jit
    def shift(self, reads):
        """The offsets of a batch entry."""
        queries = self.numbers.q_base + reads.q_offset - reads.kv_start
        limit = cutlass.min(reads.kv_len, self.s_kv) - reads.kv_start
        known = self.numbers.num_positions if reads.kv_start >= 0 else Int32(0)
        return Shift(queries, reads.kv_start, limit, known)

    @cute.jit
    def work_tile(self, index, tiles):
        """The work tile with this index, and its loads.

        A work tile without tiles computes one tile with all keys masked.
        """
        splits, row_tiles = self.numbers.num_splits, self.num_row_tiles()
        split, rest = index % splits, index // splits
        # Later rows first: with a causal mask they are longer.
        nth, rest = row_tiles - 1 - rest % row_tiles, rest // row_tiles
        head, batch = rest % self.h, rest // self.h
        reads = self.reads(head, batch)
        shift = self.shift(reads)
        m_block = floor_divide(shift.queries, self.tile_m) + nth
        first, count, _ = self.row(tiles, reads.pattern, m_block, shift.limit)
        begin, end = count * split // splits, count * (split + 1) // splits
        first, count, limit = first + begin, end - begin, shift.limit
        if count == 0:
            first, count, limit = Int32(cute.size(tiles, mode=[0]) - 1), Int32(1), Int32(0)
        top = m_block * self.tile_m
        split_idx = split if splits > 1 else Int32(-1)
        start = top - shift.queries
        work_tile = PositionWorkTile(
            m_block, head, batch, count, split_idx, start, shift.known - top
        )
        load = Load(m_block, head, batch, first, count, limit, start, shift.keys)
        return work_tile, load

    @cute.jit
    def row(self, tiles, pattern, m_block, limit):
        """(first, count, left): tiles of block row m_block, of any sign, that begin before key
        position `limit`, and the column of the first if columns follow each other, else -1.
        """
        rows = self.arrays.rows
        inside = m_block >= 0 and m_block < cute.size(rows, mode=[1]) - 1
        row = m_block if inside else cute.size(rows, mode=[1]) - 1  # the empty one
        first, count, left, right = (rows[pattern, row, i] for i in range(4))
        columns = cute.ceil_div(cutlass.max(limit, Int32(0)), self.tile_n)
        kept = columns_before(tiles, first, count, (left, right), columns)
        return first, kept, left if right - left == count - 1 else Int32(-1)


@cute.jit
def row_tiles(s_q, tile_m: cutlass.Constexpr):
    """Number of tiles of tile_m positions that s_q consecutive positions may touch."""
    return (s_q + tile_m - 1) // tile_m + 1


@cute.jit
def floor_divide(x, y: cutlass.Constexpr):
    """Largest integer at most x / y, for any sign of x."""
    quotient = cutlass.max(x, -x) // y
    below = (cutlass.max(-x, Int32(0)) + y - 1) // y
    return quotient if x >= 0 else -below


@cute.jit
def columns_before(tiles, first, count, ends, columns):
    """Number of a row's tiles before block column `columns`.

    tiles: Columns, ascending in a row. first, count: The row's. ends: Its first and last column.
    """
    (left, right), low, high = ends, Int32(0), count
    if right - left == count - 1:  # contiguous, as in dense and causal layouts
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
    """Offsets for the backward kernels, whose work the host lists.

    q_pad: (b,) int32, rows of the first tile of queries before query 0: see `BackwardAtSm90`.
    kv_starts: (b,) int32.
    s_kv: Number of keys.
    """

    def __init__(self, arrays, s_kv):
        self.q_pad, self.kv_starts = arrays
        self.s_kv = s_kv

    @cute.jit
    def queries(self, batch):
        """Query in the first row of the first tile: 0 or negative."""
        return -self.q_pad[batch]

    @cute.jit
    def keys(self, batch):
        """First key of block 0."""
        return self.kv_starts[batch]

    @cute.jit
    def limit(self, kv_len, batch):
        """End of the readable key positions."""
        return cutlass.min(kv_len, self.s_kv) - self.kv_starts[batch]


def positions_of(config, positions):
    """The `Positions` of a kernel's arguments: arrays, numbers and sizes; `None` for `None`."""
    if cutlass.const_expr(positions is None):
        return None
    arrays, numbers, sizes = positions
    return Positions(config.tile, PositionArrays(*arrays), PositionNumbers(*numbers), sizes)
