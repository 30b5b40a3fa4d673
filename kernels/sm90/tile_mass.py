"""The tile-mass kernel for Hopper: the attention probability of each stored tile.

    slice_mass[tile, w] = sum_{i, j of warp w} exp2(scale s_ij - lse_i log2 e - log2 rows)

The logsumexp is known, so tiles do not depend on each other: there is no online softmax and no
schedule. All tiles of all heads are one list, of which each CTA computes equal pieces, in order.
One producer warp loads Q and K by TMA and writes to shared memory, for each tile, what to mask. Two
consumer warpgroups compute S = Q K^T by WGMMA, each its part of the tile. Two CTAs share a
multiprocessor where shared memory allows it: while some warpgroups wait for the tensor cores,
others sum exponentials. The producer is a single warp, without a warpgroup around it: all threads
then have the registers they need.
"""

from enum import IntFlag
from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.mass_config import MassConfig
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    barrier_storage,
    by_tiles,
    gemm,
    make_tiled_mma,
    smem_layout,
    smem_tensor,
    tile_bytes,
    tile_storage,
    tma,
    tma_load,
    tma_pipeline,
)
from sparse_flash.masks.layout import FULL_TILE

PRODUCER, CONSUMER = (
    pipeline.PipelineUserType.Producer,
    pipeline.PipelineUserType.Consumer,
)
FULL_BEYOND = -2  # instead of a bit tile: FULL_TILE, but reaching beyond the keys' length
RECORD = 4  # numbers of a record: `bit_tile, remaining, slot, row_flags`
LOG2_E = 1 / online.LN2


class RowFlags(IntFlag):
    """Where in a row a tile lies: lowest bits of a record's last number, below the block row."""

    FIRST = 1
    LAST = 2


class Record(NamedTuple):
    """The parameters of a tile for a consumer; all Int32."""

    bit_tile: Int32
    remaining: Int32  # keys from its first column on
    slot: Int32  # where its mass goes, among the slots of all heads; -1: no more tiles
    row_flags: Int32  # RowFlags + 4 m_block


class TileMassSm90:
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: MassConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype
        self.consumers = 128 * config.warpgroups

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, sQ, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        lse: cute.Tensor,  # (b, h, sQ) float32
        kv_lens: cute.Tensor,  # (b,) int32
        owners: cute.Tensor,  # (b * h,) int32: the pattern of each head
        starts: cute.Tensor,  # (patterns * nq + 1,) int32: first tile of each block row, and end
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block, and bit tile or FULL_TILE
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        slice_mass: cute.Tensor,  # (b * h, slots of a head, slices) float32, zeros
        row_slots: Int32,  # slots of each block row; 0: tiles follow each other
        by_column: Int32,  # 1: the slot in a row is n_block
        rounds: Int32,  # pieces of each CTA
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream."""
        config = self.config
        q, k = by_tiles((q, k))
        sizes = (
            (64, config.row_tiles * config.q_stages),
            (config.columns, config.column_tiles * config.k_stages),
        )
        q_layout, k_layout = (
            smem_layout(self.dtype, rows, config.head_dim, tiles) for rows, tiles in sizes
        )
        load = LOAD()
        self.kernel(
            (tma(load, q, q_layout), tma(load, k, k_layout)),
            (q_layout, k_layout),
            make_tiled_mma(self.dtype, (64, config.columns)),
            (lse, kv_lens, owners, starts, tiles, bits, slice_mass),
            (row_slots, by_column, rounds),
            cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
            scale_log2,
            self._storage(q_layout, k_layout),
        ).launch(
            grid=(num_ctas, 1, 1),
            block=(self.consumers + 32, 1, 1),
            stream=stream,
            min_blocks_per_mp=2,  # registers as for two CTAs, also where shared memory has one
            preferred_smem_carveout=100,  # all: the DSL would ask a driver for the size
        )

    @cute.kernel
    def kernel(
        self,
        loads,  # (TMA atom, tensor) of q, k
        layouts,
        mma_qk,
        arrays,
        walk,  # row_slots, by_column, rounds
        group_size: Int32,  # q heads for each kv head
        scale_log2: Float32,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barrier_storage, then part ways."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in loads:
                cpasync.prefetch_descriptor(atom)
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        pipes = self._pipelines(smem, layouts)
        sQ, sK = smem_tensor(smem.q, layouts[0]), smem_tensor(smem.k, layouts[1])
        layout = cute.make_layout((config.k_stages, RECORD), stride=(RECORD, 1))
        records = smem.records.get_tensor(layout)
        if warp_idx == self.consumers // 32:
            outside = (records, pipes, arrays, walk, group_size)
            MassProducer(config, loads, (sQ, sK), *outside).run()
        else:
            MassConsumer(config, mma_qk, (sQ, sK), records, pipes, arrays, scale_log2).run()

    def _storage(self, q_layout, k_layout):
        config = self.config

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.k_stages)
            records: cute.struct.MemRange[Int32, config.k_stages * RECORD]
            q: tile_storage(self.dtype, q_layout)
            k: tile_storage(self.dtype, k_layout)

        return Storage

    def _pipelines(self, smem, layouts):
        """Rings of barrier_storage of Q and K, filled by TMA."""
        config, warps = self.config, self.consumers // 32
        queries = tile_bytes(layouts[0], self.dtype, config.row_tiles)
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries)
        keys = tile_bytes(layouts[1], self.dtype, config.column_tiles)
        k = tma_pipeline(smem.k_barriers, config.k_stages, warps, keys)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, k


class MassProducer:
    """The loads of a CTA's piece of the list: Q of each block row, K of each tile."""

    def __init__(self, config, loads, buffers, records, pipes, arrays, walk, group_size):
        self.config, self.loads, self.buffers, self.records = config, loads, buffers, records
        self.q_pipe, self.k_pipe = pipes
        self.lse, self.kv_lens, self.owners, self.starts, self.tiles, _, self.slice_mass = arrays
        self.row_slots, self.by_column, self.rounds = walk
        self.group_size = group_size

    @cute.jit
    def run(self):
        """Piece after piece, row after row; then tell the consumers."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, self.config.k_stages)
        per_head = cute.size(self.slice_mass, mode=[1])
        total = cute.size(self.slice_mass, mode=[0]) * per_head
        known, row = Int32(-1), Int32(0)  # head whose row is known
        for i in cutlass.range(self.rounds, unroll=1):
            work_tile, end = piece_of(total, i, self.rounds)
            while work_tile < end:
                pair = work_tile // per_head
                row, first, count = self.find(work_tile, end, row, pair == known)
                known = pair
                if first >= 0:
                    q_state, k_state = self.load_row(
                        (q_state, k_state), work_tile, (pair, row, first), count
                    )
                work_tile += count
        self.finish(k_state)

    @cute.jit
    def find(self, work_tile, end, row, known):
        """The block row of a tile, its index in the list, and how many of its tiles to load.

        The index is -1 where the pattern has no more tiles: they are then to be skipped.
        known: Whether the tile's row is the given one, or a later one.
        """
        starts, per_head = self.starts, cute.size(self.slice_mass, mode=[1])
        rows = cute.ceil_div(cute.size(self.lse, mode=[2]), self.config.tile_m)
        pair = work_tile // per_head
        top = self.owners[pair] * rows
        index = starts[top] + work_tile - pair * per_head
        first, count = Int32(-1), (pair + 1) * per_head - work_tile
        if index < starts[top + rows]:
            if not known:
                row = row_of(starts, top, rows, index)
            while starts[top + row + 1] <= index:
                row += 1
            first, count = index, cutlass.min(starts[top + row + 1] - index, end - work_tile)
        return row, first, count

    @cute.jit
    def load_row(self, states, work_tile, place, count):
        """Q of a block row, and K of `count` of its tiles."""
        (pair, row, index), tiles = place, self.tiles
        q_state, k_state = (state.clone() for state in states)
        heads, per_head = cute.size(self.lse, mode=[1]), cute.size(self.slice_mass, mode=[1])
        rows = cute.ceil_div(cute.size(self.lse, mode=[2]), self.config.tile_m)
        batch, head = pair // heads, pair % heads
        self.load_q(q_state, (row, head, batch))
        q_state.advance()
        limit = self.kv_lens[batch]
        slot, by_column = work_tile, Int32(0)
        if self.row_slots > 0:
            begin = self.starts[self.owners[pair] * rows + row]
            slot = pair * per_head + row * self.row_slots + index - begin
            if self.by_column != 0:
                slot, by_column = pair * per_head + row * self.row_slots, Int32(1)
        n_block, bit_tile = tiles[index, 0], tiles[index, 1]
        for j in cutlass.range(count, unroll=1):
            # Read ahead: the wait below hides how long it takes.
            following = index + cutlass.min(j + 1, count - 1)
            next_block, next_bit_tile = tiles[following, 0], tiles[following, 1]
            row_flags = row * 4
            if j == 0:
                row_flags += RowFlags.FIRST.value
            if j == count - 1:
                row_flags += RowFlags.LAST.value
            goal = slot + (n_block if by_column == 1 else j)
            coord = (n_block, head // self.group_size, batch)
            self.load_k(k_state, coord, (bit_tile, limit, goal, row_flags))
            k_state.advance()
            n_block, bit_tile = next_block, next_bit_tile
        return q_state, k_state

    @cute.jit
    def load_q(self, state, coord):
        """A block row, 64 rows a tile of shared memory."""
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        (row, head, batch), tiles = coord, self.config.row_tiles
        for i in cutlass.range_constexpr(tiles):
            stage = state.index * tiles + i
            tile_coord = (row * tiles + i, head, batch)
            tma_load(self.loads[0], self.buffers[0], tile_coord, stage, barrier)

    @cute.jit
    def load_k(self, state, coord, facts):
        """K of a tile, with its record."""
        bit_tile, limit, slot, row_flags = facts
        remaining = limit - coord[0] * self.config.tile_n
        if bit_tile == FULL_TILE and remaining < self.config.tile_n:
            bit_tile = Int32(FULL_BEYOND)
        self.k_pipe.sync_object_empty.wait(state.index, state.phase)
        barrier = self.k_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            self.write(state.index, Record(bit_tile, remaining, slot, row_flags))
            # This arrival releases the preceding writes.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.k_pipe.sync_object_full.tx_count)
        (n_block, head, batch), tiles = coord, self.config.column_tiles
        for i in cutlass.range_constexpr(tiles):
            stage, tile_coord = state.index * tiles + i, (n_block * tiles + i, head, batch)
            tma_load(self.loads[1], self.buffers[1], tile_coord, stage, barrier)

    @cute.jit
    def finish(self, state):
        """A record without a tile."""
        self.k_pipe.sync_object_empty.wait(state.index, state.phase)
        if cute.arch.lane_idx() == 0:
            self.write(state.index, Record(Int32(0), Int32(0), Int32(-1), Int32(0)))
            cute.arch.mbarrier_arrive(self.k_pipe.producer_get_barrier(state))

    @cute.jit
    def write(self, stage, record):
        """Into shared memory, by one thread."""
        records = self.records
        for i in cutlass.range_constexpr(RECORD):
            records[stage, i] = record[i]


class MassConsumer:
    """One warpgroup: 64 rows of each tile, or with tile_m 64 half of its columns.

    It waits for its product before it sums the exponentials. The other warpgroups of the
    multiprocessor keep the tensor cores busy meanwhile.
    """

    def __init__(self, config, mma_qk, buffers, records, pipes, arrays, scale_log2):
        self.config, self.mma_qk, self.records = config, mma_qk, records
        self.scale_log2 = scale_log2
        self.q_pipe, self.k_pipe = pipes
        self.lse, *_, self.bits, self.slice_mass = arrays
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        # Which 64 rows of the tile, and which part of its columns.
        self.row_group = self.group if const_expr(config.tile_m == 128) else 0
        self.part = 0 if const_expr(config.tile_m == 128) else self.group
        self.tSrQ = mma_qk.make_fragment_A(mma_qk.get_slice(0).partition_A(buffers[0]))
        self.tSrK = mma_qk.make_fragment_B(mma_qk.get_slice(0).partition_B(buffers[1]))
        self.acc = cute.make_rmem_tensor(mma_qk.partition_shape_C((64, config.columns)), Float32)
        self.shifts = cute.make_rmem_tensor(2, Float32)  # of the thread's two rows, see `begin_row`

    @cute.jit
    def run(self):
        """Tile after tile, until a record has none.

        While a product is computed, the previous tile's mass is summed over threads and stored.
        """
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(CONSUMER, self.config.k_stages)
        self.shifts.fill(0.0)
        slot, total = Int32(-1), Float32(0.0)  # of the previous tile
        self.k_pipe.consumer_wait(k_state)
        record = self.read(k_state.index)
        while record.slot >= 0:
            if record.row_flags % 2 == RowFlags.FIRST.value:
                self.q_pipe.consumer_wait(q_state)
            self.issue(q_state.index, k_state.index)
            if record.row_flags % 2 == RowFlags.FIRST.value:
                self.begin_row(record)
            words = online.mask_words(self.bits, record.bit_tile, self.row_group, self.thread)
            self.store(slot, total)
            warpgroup.wait_group(0)
            self.k_pipe.consumer_release(k_state)
            k_state.advance()
            if record.row_flags // 2 % 2 == 1:
                self.q_pipe.consumer_release(q_state)
                q_state.advance()
            slot, total = record.slot, self.exp_sum(record, words)
            self.k_pipe.consumer_wait(k_state)
            record = self.read(k_state.index)
        self.store(slot, total)

    @cute.jit
    def issue(self, q_stage, k_stage):
        """Begin the product."""
        config = self.config
        q_slot = q_stage * config.row_tiles + self.row_group
        k_slot = k_stage * config.column_tiles + self.part
        mine = self.tSrQ[None, None, None, q_slot]
        gemm(self.mma_qk, self.acc, mine, self.tSrK, k_slot, True)

    @cute.jit
    def read(self, stage):
        """A tile's record, read by the thread that frees the stage for its warp, and no other."""
        words, records = cute.make_rmem_tensor(RECORD, Int32), self.records
        if self.thread % 32 == 0:
            for i in cutlass.range_constexpr(RECORD):
                words[i] = records[stage, i]
        return Record(*(cute.arch.shuffle_sync(words[i], 0) for i in range(RECORD)))

    @cute.jit
    def begin_row(self, record):
        """Load lse log2 e + log2 rows of the thread's two rows of the next block row.

        It is inf, and all is 0, for a query without keys and beyond the last query.
        """
        config, lse, shifts = self.config, self.lse, self.shifts
        heads, q_len = cute.size(lse, mode=[1]), cute.size(lse, mode=[2])
        pair = record.slot // cute.size(self.slice_mass, mode=[1])
        start = record.row_flags // 4 * config.tile_m
        rows = cutlass.min(q_len - start, Int32(config.tile_m))
        mean = cute.math.log2(rows.to(Float32), fastmath=True)
        row = start + self.row_group * 64 + self.thread // 32 * 16 + self.thread % 32 // 4
        for r in cutlass.range_constexpr(2):
            shift = Float32.inf
            if row + 8 * r < q_len:
                value = lse[pair // heads, pair % heads, row + 8 * r]
                if value != -Float32.inf:
                    shift = value * LOG2_E + mean
            shifts[r] = shift

    @cute.jit
    def exp_sum(self, record, words):
        """The sum of the thread's exponentials."""
        config, acc = self.config, self.acc
        if record.bit_tile != FULL_TILE:
            within = online.columns_within(record.remaining, self.thread)
            place = self.part * (config.columns // 4)  # of the part's first bit
            online.apply_mask(acc, [words[r] >> place for r in range(2)], within >> place)
        sums = [Float32(0.0) for _ in range(4)]
        for i in cutlass.range_constexpr(cute.size(acc)):
            x = acc[i] * self.scale_log2 - self.shifts[i // 2 % 2]
            polynomial = i * config.polynomial % 8 < config.polynomial  # spread evenly
            y = online.exp2_polynomial(x) if const_expr(polynomial) else online.exp2(x)
            sums[i % 4] = sums[i % 4] + y
        return (sums[0] + sums[1]) + (sums[2] + sums[3])

    @cute.jit
    def store(self, slot, total):
        """The sum over the threads of a warp; nothing before the first tile."""
        slices = self.config.slices
        for offset in (1, 2, 4, 8, 16):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
        layout = cute.make_layout(
            (cute.size(self.slice_mass) // slices, slices), stride=(slices, 1)
        )
        by_slot = cute.make_tensor(self.slice_mass.iterator, layout)
        if self.thread % 32 == 0 and slot >= 0:
            by_slot[slot, 4 * self.group + self.thread // 32] = total


@cute.jit
def piece_of(total, i, rounds):
    """First and end of this CTA's piece i of a list.

    All pieces are equal but for one tile. The pieces i of all CTAs follow each other.
    """
    ctas = cute.arch.grid_dim()[0]
    number, pieces = i * ctas + cute.arch.block_idx()[0], rounds * ctas
    size, rest = total // pieces, total % pieces
    start = number * size + cutlass.min(number, rest)
    end = start + size
    if number < rest:
        end += 1
    return start, end


@cute.jit
def row_of(starts, top, rows, index):
    """A block row that begins at or before tile `index`, the last such one."""
    low, high = Int32(0), Int32(rows - 1)
    while low < high:  # the answer is in low..high
        middle = (low + high + 1) // 2
        if starts[top + middle] <= index:
            low = middle
        else:
            high = middle - 1
    return low
