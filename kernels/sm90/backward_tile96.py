"""The backward kernel on Hopper with tiles of 96 keys and 64 queries, for head_dim 192.

Three warpgroups share each of the five GEMMs of a tile. So each warpgroup has registers for its
third of dK and of dV:

    S = Q K',  P = exp2(scale S - lse),  dP = dO V',  dS = P (dP - delta)    32 keys each
    dV' += dO' P,  dK' += Q' dS,  dQ = dS K                                  64 columns each

where ' is the transpose. P and dS pass through shared memory, and so does dQ on its way to the sums
in memory: each warpgroup has a store warp. Additions from registers would keep the tensor cores
waiting for a third of the time. Each tile adds 64 rows, so there are 1.5 times fewer additions than
with tiles of 64 keys. Work tiles, loads and splits are those of `BackwardSm90`.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode
from sparse_flash.kernels.sm90.backward_producer import (
    CONSUMER,
    FREE,
    READY,
    BackwardStorer,
    load_relaxed,
    sum_address,
)
from sparse_flash.kernels.sm90.backward_tile96_consumer import (
    GROUPS,
    STORE_THREADS,
    Tile96Consumer,
)
from sparse_flash.kernels.sm90.backward_wide import THREADS, WARPS, BackwardWideSm90
from sparse_flash.kernels.sm90.backward_wide_consumer import QueryGradient
from sparse_flash.kernels.sm90.barriers import Tile96BackwardBarrier
from sparse_flash.kernels.sm90.primitives import (
    WORK_STAGES,
    barrier_storage,
    check_arrivals,
    make_tiled_mma,
    smem_layout,
    smem_tensor,
    tile_bytes,
    tile_storage,
    tma_pipeline,
    work_pipeline,
    work_storage,
)
from sparse_flash.kernels.work_tiles import (
    ColumnWorkTile,
    first_step,
    query_coord,
    tile_of_step,
)


class BackwardTile96Sm90(BackwardWideSm90):
    """One compiled kernel. `config` holds its static parameters."""

    @cute.jit
    def _consume(self, warp_idx, tiled_mmas, shared, results, scales):
        """Run a consumer warp: all warpgroups have the same role."""
        buffers, inputs, pipes, (work_tiles, _, bits), _, staging = shared
        cute.arch.setmaxregister_increase(self._registers()[1])
        outside = (buffers, inputs, pipes, (work_tiles, bits), staging, results[::2], scales)
        Tile96Consumer(self.config, self.dtype, tiled_mmas, *outside).run()

    @cute.jit
    def _store(self, warp_idx, staging, sums, work_tiles, inputs):
        """Run the store warp of a consumer warpgroup."""
        Tile96Storer(self.config, sums, staging, work_tiles, inputs, warp_idx - 1).run()

    def _staging(self, smem):
        """Buffers of dQ, and one barrier each: the buffer has been read."""
        config = self.config
        shape = (4, 128, config.tile_m * config.head_dim // (512 * GROUPS), GROUPS)
        layout = cute.make_ordered_layout(shape, order=(0, 1, 2, 3))
        return smem.dq.get_tensor(layout), smem.dq_barriers.data_ptr()

    def _registers(self):
        """Registers per thread of the producer, and of the consumer warpgroups."""
        return self.config.registers

    def _score_layouts(self):
        """Layouts of P and dS, both operands in shared memory."""
        config = self.config
        return (
            smem_layout(self.dtype, config.tile_m, config.tile_n, stages)
            for stages in (1, config.ds_stages)
        )

    def _buffer_of_p(self, smem, layout):
        return smem_tensor(smem.p, layout)

    def _tiled_mmas(self):
        """Tiled MMAs of S and dP, of dV' and dK', and of dQ, for one warpgroup."""
        config, columns = self.config, OperandMajorMode.MN
        keys, width = config.tile_n // GROUPS, config.head_dim // GROUPS
        mma_s = make_tiled_mma(self.dtype, (config.tile_m, keys))
        mma_dkv = make_tiled_mma(self.dtype, (width, config.tile_n), columns, columns)
        mma_dq = make_tiled_mma(self.dtype, (config.tile_m, width), b_mode=columns)
        return mma_s, mma_dkv, mma_dq

    def _storage(self, q_layout, do_layout, k_layout, v_layout, p_layout, ds_layout):
        config, dtype = self.config, self.dtype

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            do_barriers: barrier_storage(config.do_stages)
            k_barriers: barrier_storage(config.k_stages)
            v_barriers: barrier_storage(config.v_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            dq_barriers: cute.struct.MemRange[Int64, GROUPS]
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.q_stages * config.tile_words]
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.q_stages], 128
            ]
            q: tile_storage(dtype, q_layout)
            do: tile_storage(dtype, do_layout)
            k: tile_storage(dtype, k_layout)
            v: tile_storage(dtype, v_layout)
            p: tile_storage(dtype, p_layout)
            ds: tile_storage(dtype, ds_layout)
            dq: cute.struct.Align[
                cute.struct.MemRange[Float32, config.tile_m * config.head_dim], 128
            ]

        return Storage

    def _pipelines(self, smem, layouts):
        """Pipelines: Q with its row statistics, dO, K, V (by TMA), and work tiles."""
        config, warps = self.config, GROUPS * WARPS
        queries, keys = (tile_bytes(layouts[i], self.dtype) for i in (0, 2))
        statistics = tile_bytes(layouts[-1], Float32)
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries + statistics)
        do = tma_pipeline(smem.do_barriers, config.do_stages, warps, queries)
        k = tma_pipeline(smem.k_barriers, config.k_stages, warps, keys)
        v = tma_pipeline(smem.v_barriers, config.v_stages, warps, keys)
        consumers = 128 * GROUPS
        check_arrivals("the whole CTA", {"loading": 128, "consumers": consumers}, THREADS)
        work = work_pipeline(smem.work_barriers, consumers + 32 * GROUPS)
        initialize(smem.dq_barriers.data_ptr())
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, do, k, v, work


@cute.jit
def initialize(barriers):
    """Initialize the barrier of each warpgroup's buffer of dQ: its store warp arrives."""
    if cute.arch.thread_idx()[0] == 0:
        for i in cutlass.range_constexpr(GROUPS):
            cute.arch.mbarrier_init(barriers + i, 1)


class Tile96Storer(BackwardStorer):
    """Adds a warpgroup's columns of dQ from shared memory to the sums, as `BackwardStorer`.

    The warpgroups share the state of a tile. Bit g of it is set when the first store of warpgroup g
    begins, and bit 16 + g when it is visible.
    """

    claim_rows = QueryGradient.claim_rows

    def __init__(self, config, sums, staging, work_tiles, inputs, group):
        self.config, self.work_tiles, self.group = config, work_tiles, group
        (self.dq_sum, self.done), (self.sdQ, self.read) = sums, staging
        self.tiles, self.heads, _ = inputs

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        self.release()
        work_tile = self.work_tiles.take(state, ColumnWorkTile)
        state.advance()
        while work_tile.count >= 0:
            count = work_tile.count if work_tile.remaining > 0 else Int32(0)
            start = first_step(self.config, work_tile, self.heads[0])
            for j in cutlass.range(count, unroll=1):
                tile = tile_of_step(self.config, work_tile, start, j)
                self.add_chunk(tile, work_tile.head, work_tile.batch)
            work_tile = self.work_tiles.take(state, ColumnWorkTile)
            state.advance()
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def add_chunk(self, tile, kv_head, batch):
        """Add the warpgroup's columns of dQ of a tile to the sums."""
        m_block, head = query_coord(self.tiles[tile, 0], kv_head, self.heads)
        coord = (batch, head, 2 * m_block)  # its two chunks are contiguous
        done = self.done.iterator + cute.crd2idx(coord, self.done.layout)
        begun = Int32(1) << self.group
        found = load_relaxed(done)  # overlaps the computation of the tile
        cute.arch.barrier(
            barrier_id=Tile96BackwardBarrier.READY + self.group, number_of_threads=STORE_THREADS
        )
        first = Int32(0)
        if (found & begun << 16) == 0:
            first = self.claim_rows(done, begun)
        state = Int32(READY) if first == 0 else Int32(FREE)
        cute.arch.fence_proxy("async.global")
        size = self.config.tile_m * self.config.head_dim // GROUPS
        sums = sum_address(self.dq_sum, coord) + 4 * size * self.group
        self.bulk(sums, self.sdQ[None, None, None, self.group].iterator, 4 * size, state)
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        self.release()
        if first != 0:
            self.publish_rows(done, begun)

    @cute.jit
    def release(self):
        """Let the warpgroup fill its buffer."""
        if cute.arch.lane_idx() == 0:  # the lane that issued the store
            cute.arch.mbarrier_arrive(self.read + self.group)
