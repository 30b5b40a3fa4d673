"""The tile-mass kernel for Hopper: the attention probability of each stored tile.

    slice_mass[tile, w] = 1 / rows  sum_{i in rows of warp w} sum_j exp2(scale s_ij - lse_i log2 e)

The logsumexp is known, so tiles do not depend on each other: there is no online softmax and no
schedule. All tiles of all heads are one list, of which each CTA computes an equal piece, in order.
As in the forward kernel one producer warp loads Q and K by TMA and says by records in shared memory
what to mask; two consumer warpgroups with 64 rows each compute S = Q K^T by WGMMA. Two CTAs share a
multiprocessor where they fit: the exponentials of one hide the products of the other. The producer
is a single warp, without a warpgroup around it: all threads then have the registers they need.
"""

from enum import IntFlag
from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warpgroup
from sparse_flash.kernels.sm90 import online_softmax as online
from sparse_flash.kernels.sm90.mass_config import MassConfig
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    barrier_storage,
    bits_of,
    by_tiles,
    from_bits,
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
# Coefficients of 2^x for x in -1/2..1/2 with the least relative error.
POLYNOMIAL = (0.99992806, 0.69326097, 0.24261113, 0.05517166)


class RowFlags(IntFlag):
    """Where in a row a tile lies: lowest bits of a record's last number, below the block row."""

    FIRST = 1
    LAST = 2


class Record(NamedTuple):
    """What a consumer must know of a tile; all Int32."""

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
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream."""
        config = self.config
        q, k = by_tiles((q, k))
        rows = min(config.tile_m, 64)
        groups = config.tile_m // rows
        q_layout = smem_layout(self.dtype, rows, config.head_dim, groups * config.q_stages)
        k_layout = smem_layout(self.dtype, config.tile_n, config.head_dim, config.k_stages)
        load = LOAD()
        self.kernel(
            (tma(load, q, q_layout), tma(load, k, k_layout)),
            (q_layout, k_layout),
            make_tiled_mma(self.dtype, (64, config.tile_n)),
            (lse, kv_lens, owners, starts, tiles, bits, slice_mass),
            (row_slots, by_column),
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
        slots,  # row_slots, by_column
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
            outside = (records, pipes, arrays, slots, group_size)
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
        queries = tile_bytes(layouts[0], self.dtype, max(1, config.tile_m // 64))
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries)
        keys = tile_bytes(layouts[1], self.dtype)
        k = tma_pipeline(smem.k_barriers, config.k_stages, warps, keys)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, k


class MassProducer:
    """The loads of a CTA's piece of the list: Q of each block row, K of each tile."""

    def __init__(self, config, loads, buffers, records, pipes, arrays, slots, group_size):
        self.config, self.loads, self.buffers, self.records = config, loads, buffers, records
        self.q_pipe, self.k_pipe = pipes
        self.lse, self.kv_lens, self.owners, self.starts, self.tiles, _, self.slice_mass = arrays
        (self.row_slots, self.by_column), self.group_size = slots, group_size

    @cute.jit
    def run(self):
        """Row after row, until the end of the piece; then tell the consumers."""
        config, starts, tiles = self.config, self.starts, self.tiles
        q_state = pipeline.make_pipeline_state(PRODUCER, config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, config.k_stages)
        heads, q_len = cute.size(self.lse, mode=[1]), cute.size(self.lse, mode=[2])
        rows = cute.ceil_div(q_len, config.tile_m)
        per_head = cute.size(self.slice_mass, mode=[1])
        work_tile, end = piece_of(cute.size(self.slice_mass, mode=[0]) * per_head)
        known, row = Int32(-1), Int32(0)  # head whose row is known
        while work_tile < end:
            pair = work_tile // per_head
            top = self.owners[pair] * rows
            index = starts[top] + work_tile - pair * per_head
            count = (
                pair + 1
            ) * per_head - work_tile  # to skip, where the pattern has no more tiles
            if index < starts[top + rows]:
                if pair != known:
                    row = row_of(starts, top, rows, index)
                while starts[top + row + 1] <= index:
                    row += 1
                count = cutlass.min(starts[top + row + 1] - index, end - work_tile)
                batch, head = pair // heads, pair % heads
                self.load_q(q_state, (row, head, batch))
                q_state.advance()
                limit = self.kv_lens[batch]
                slot, by_column = work_tile, Int32(0)
                if self.row_slots > 0:
                    slot = pair * per_head + row * self.row_slots + index - starts[top + row]
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
                known = pair
            work_tile += count
        self.finish(k_state)

    @cute.jit
    def load_q(self, state, coord):
        """A block row, 64 rows a tile of shared memory."""
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        (row, head, batch), tiles = coord, max(1, self.config.tile_m // 64)
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
            # This arrival releases what was just written.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.k_pipe.sync_object_full.tx_count)
        tma_load(self.loads[1], self.buffers[1], coord, state.index, barrier)

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
    """One warpgroup: 64 rows of each tile, or with tile_m 64 every second tile."""

    def __init__(self, config, mma_qk, buffers, records, pipes, arrays, scale_log2):
        self.config, self.mma_qk, self.records, self.scale_log2 = (
            config,
            mma_qk,
            records,
            scale_log2,
        )
        self.q_pipe, self.k_pipe = pipes
        self.lse, *_, self.bits, self.slice_mass = arrays
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128)
        self.tSrQ = mma_qk.make_fragment_A(mma_qk.get_slice(0).partition_A(buffers[0]))
        self.tSrK = mma_qk.make_fragment_B(mma_qk.get_slice(0).partition_B(buffers[1]))
        self.shifts = cute.make_rmem_tensor(2, Float32)  # lse log2 e of the thread's two rows
        self.inverse = cute.make_rmem_tensor(1, Float32)  # 1 / rows of the tile

    @cute.jit
    def run(self):
        """Tile after tile, until a record has none."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(CONSUMER, self.config.k_stages)
        self.shifts.fill(0.0)
        self.inverse.fill(0.0)
        self.k_pipe.consumer_wait(k_state)
        record = self.read(k_state.index)
        while record.slot >= 0:
            if record.row_flags % 2 == RowFlags.FIRST.value:
                self.q_pipe.consumer_wait(q_state)
                self.begin_row(record)
            mine = record.slot % 2 == self.group
            if const_expr(self.config.tile_m == 128):
                mine = record.slot >= 0
            if mine:
                self.step(q_state.index, k_state.index, record)
            self.k_pipe.consumer_release(k_state)
            if record.row_flags // 2 % 2 == 1:
                self.q_pipe.consumer_release(q_state)
                q_state.advance()
            k_state.advance()
            self.k_pipe.consumer_wait(k_state)
            record = self.read(k_state.index)

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
        """The logsumexps of a block row. Without keys, or beyond the last query, all is 0."""
        config, lse, shifts = self.config, self.lse, self.shifts
        heads, q_len = cute.size(lse, mode=[1]), cute.size(lse, mode=[2])
        pair = record.slot // cute.size(self.slice_mass, mode=[1])
        start = record.row_flags // 4 * config.tile_m
        row = start + self.thread // 32 * 16 + self.thread % 32 // 4
        if const_expr(config.tile_m == 128):
            row += self.group * 64
        for r in cutlass.range_constexpr(2):
            shift = Float32.inf
            if row + 8 * r < q_len:
                value = lse[pair // heads, pair % heads, row + 8 * r]
                if value != -Float32.inf:
                    shift = value * LOG2_E
            shifts[r] = shift
        inverse = self.inverse
        rows = cutlass.min(q_len - start, Int32(config.tile_m))
        inverse[0] = cute.arch.rcp_approx(rows.to(Float32))

    @cute.jit
    def step(self, q_stage, k_stage, record):
        """S, its exponentials, and their sum over the 16 rows of each warp."""
        config = self.config
        acc_s = cute.make_rmem_tensor(self.mma_qk.partition_shape_C((64, config.tile_n)), Float32)
        slot = q_stage
        if const_expr(config.tile_m == 128):
            slot = q_stage * 2 + self.group
        gemm(self.mma_qk, acc_s, self.tSrQ[None, None, None, slot], self.tSrK, k_stage, True)
        group = self.group if const_expr(config.tile_m == 128) else 0
        words = online.mask_words(self.bits, record.bit_tile, group, self.thread)
        warpgroup.wait_group(0)
        if record.bit_tile != FULL_TILE:
            within = online.columns_within(record.remaining, self.thread)
            online.apply_mask(acc_s, words, within)
        sums = [Float32(0.0) for _ in range(4)]
        for i in cutlass.range_constexpr(cute.size(acc_s)):
            x = acc_s[i] * self.scale_log2 - self.shifts[i // 2 % 2]
            if const_expr(i % 8 < config.polynomials):
                sums[i % 4] = sums[i % 4] + polynomial_exp2(x)
            else:
                sums[i % 4] = sums[i % 4] + online.exp2(x)
        total = (sums[0] + sums[1]) + (sums[2] + sums[3])
        for offset in (1, 2, 4, 8, 16):
            total = total + cute.arch.shuffle_sync_bfly(total, offset=offset)
        self.store(record, total * self.inverse[0])

    @cute.jit
    def store(self, record, total):
        """One number a warp."""
        slice_mass, warp = self.slice_mass, self.thread // 32
        if const_expr(self.config.tile_m == 128):
            warp += 4 * self.group
        per_head = cute.size(slice_mass, mode=[1])
        if self.thread % 32 == 0:
            slice_mass[record.slot // per_head, record.slot % per_head, warp] = total


@cute.jit
def polynomial_exp2(x):
    """2^x by additions and multiplications, to 1e-4 of it (as in FlashAttention-4); x below 127.

    Adding 1.5 2^23 rounds to an integer, which stands in the lowest bits and becomes the exponent.
    """
    x = cute.arch.fmax(x, Float32(-126.0))
    rounded = x + Float32(12582912.0)
    rest = x - (rounded - Float32(12582912.0))  # -1/2 to 1/2
    value = Float32(POLYNOMIAL[-1])
    for i in cutlass.range_constexpr(len(POLYNOMIAL) - 1):
        value = value * rest + Float32(POLYNOMIAL[-2 - i])
    return from_bits(bits_of(value) + (bits_of(rounded) << 23))


@cute.jit
def piece_of(total):
    """First and end of this CTA's piece of a list: all pieces are equal but for one tile."""
    number, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
    size, rest = total // ctas, total % ctas
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
