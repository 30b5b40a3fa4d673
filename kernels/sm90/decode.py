"""The kernel for one query per sequence (decoding): bound by reading K and V from memory.

The query heads that share a kv head and a pattern are the rows of one tile, so that K and V are
read once for all of them. A CTA has a consumer warpgroup, whose 64 rows these heads rarely fill,
and a producer warp, which keeps as many tiles of K and V under way as shared memory takes: what
hides the latency of memory is the bytes in flight. A row's tiles are spread over `num_splits` CTAs
(split-KV: Flash-Decoding, Dao et al., 2023) and put together by `SplitCombine`.

All rows lie at the position of the query, so one row of a bit tile serves them all. See
position_work_tiles.py for positions; a call without offsets is one whose query has position 0.
"""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.position_work_tiles import positions_of
from sparse_flash.kernels.sm90.decode_consumer import DecodeConsumer
from sparse_flash.kernels.sm90.position_config import DecodeConfig
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    barrier_storage,
    by_tiles,
    check_arrivals,
    make_tiled_mma,
    smem_layout,
    smem_tensor,
    tile_bytes,
    tile_storage,
    tma,
    tma_load,
    tma_pipeline,
)
from sparse_flash.kernels.split_combine import SplitCombine
from sparse_flash.kernels.work_tiles import DecodeWorkTile
from sparse_flash.masks.layout import FULL_TILE

CONSUMERS, PRODUCERS = 128, 32
THREADS = CONSUMERS + PRODUCERS  # the warpgroup first: its products want aligned warps


class DecodeSm90:
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: DecodeConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, 1, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, 1, h, d)
        lse: cute.Tensor,  # (b, h, 1) float32
        out_splits: cute.Tensor,  # (splits, b, 1, h, head_dim) float32; none if num_splits is 1
        lse_splits: cute.Tensor,  # (splits, b, h, 1) float32
        kv_lens: cute.Tensor,  # (b,) int32
        q_offset: cute.Tensor,  # (b,) int32
        kv_starts: cute.Tensor,  # (b,) int32
        rows: cute.Tensor,  # (patterns, block rows + 1, 4) int32: see `PositionPlan`
        pattern_map: cute.Tensor,  # (1 or b, 1 or h) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, 2, 128, 2) int32, in fragment order
        q_base: Int32,  # added to q_offset
        num_positions: Int32,  # q_len of the layout
        num_splits: Int32,
        pack: Int32,  # heads of a CTA: a divisor of the query heads of a kv head, at most 64
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream."""
        config, width = self.config, self.config.head_dim
        b, _, h, _ = q.shape
        # Rows are heads: (h, d, 1, b).
        by_heads = cute.make_tensor(q.iterator, cute.select(q.layout, mode=[2, 3, 1, 0]))
        k, v = by_tiles((k, v))
        q_layout = smem_layout(self.dtype, 64, width, 1)
        kv_layout = smem_layout(self.dtype, config.tile_n, width, config.kv_stages)
        self.kernel(
            (tma(LOAD(), by_heads, q_layout), tma(LOAD(), k, kv_layout), tma(LOAD(), v, kv_layout)),
            (q_layout, kv_layout),
            self._tiled_mmas(),
            (tiles, bits),
            (
                (kv_lens, q_offset, kv_starts, rows, pattern_map),
                (q_base, num_positions, num_splits),
                (b, Int32(1), h, cute.size(k, mode=[0])),
            ),
            (out, lse, out_splits, lse_splits),
            (pack, h // cute.size(k, mode=[2])),
            scale_log2,
            self._storage(q_layout, kv_layout),
        ).launch(
            grid=(num_splits * (h // pack) * b, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=config.ctas_per_sm,
            preferred_smem_carveout=100,  # percent
        )
        if num_splits > 1:
            combine = SplitCombine(width, self.dtype, dependent=True)
            combine(out, lse, out_splits, lse_splits, num_splits, stream)

    @cute.kernel
    def kernel(
        self,
        loads,  # (TMA atom, tensor) of q, k, v
        layouts,
        tiled_mmas,
        lists,
        positions,
        results,
        heads,  # of a CTA; and q heads for each kv head
        scale_log2: Float32,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, find the work tile, then branch by warp role."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == CONSUMERS // 32:
            for atom, _ in loads:
                cpasync.prefetch_descriptor(atom)
        coord = self.coord(cute.arch.block_idx()[0], positions, heads[0])
        # Under way while barriers are set up; nothing waits for them before.
        reads = positions_of(config, positions).reads(*coord[1:])
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        pipes = self._pipelines(smem, layouts)
        q_layout, kv_layout = layouts
        sQ, sK, sV = (
            smem_tensor(field, layout)
            for field, layout in ((smem.q, q_layout), (smem.k, kv_layout), (smem.v, kv_layout))
        )
        sTiles = smem.tiles.get_tensor(cute.make_layout((config.kv_stages, 2), stride=(2, 1)))
        tiles, bits = lists
        if warp_idx == CONSUMERS // 32:
            self.load_queries(loads[0], sQ, pipes[0], *coord[1:])
        work_tile = self.work_tile(coord, reads, tiles, positions)
        if warp_idx == CONSUMERS // 32:
            kv_head = work_tile.head // heads[1]
            self.load(loads[1:], (sK, sV), sTiles, pipes[1:], work_tile, kv_head, tiles)
        elif warp_idx < CONSUMERS // 32:
            buffers = (sQ, sK, sV, sTiles)
            outside = (tiled_mmas, buffers, pipes, bits, results, heads[0], scale_log2)
            DecodeConsumer(config, self.dtype, *outside).run(work_tile)

    @cute.jit
    def work_tile(self, coord, reads, tiles, positions):
        """The work of the CTA with this number: steps of tile_n keys, in the order of tiles."""
        config, positions = self.config, positions_of(self.config, positions)
        splits, (split, head, batch) = positions.numbers.num_splits, coord
        shift = positions.shift(reads)
        query, tile_m = shift.queries, config.tile[0]
        # A position that the layout does not know gives NaN, whatever is read.
        m_block = query // tile_m if query >= 0 else Int32(-1)
        first, count, left = positions.row(tiles, reads.pattern, m_block, shift.limit)
        steps = count * config.steps
        begin, end = steps * split // splits, steps * (split + 1) // splits
        split_idx = split if splits > 1 else Int32(-1)
        row = query % tile_m if query >= 0 else Int32(0)
        known = Int32(1) if query < shift.known else Int32(0)
        steps_of_row = (first, left, begin, end)
        return DecodeWorkTile(
            head, batch, split_idx, *steps_of_row, shift.limit, shift.keys, row, known
        )

    @cute.jit
    def coord(self, index, positions, pack):
        """(split, first head, batch entry) of the CTA of this number: known without reading."""
        positions = positions_of(self.config, positions)
        splits, groups = positions.numbers.num_splits, positions.h // pack
        split, rest = index % splits, index // splits
        return split, rest % groups * pack, rest // groups

    @cute.jit
    def load_queries(self, load, buffer, q_pipe, head, batch):
        """The producer's first load, under way while the work tile is read from memory."""
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, 1)
        q_pipe.producer_acquire(state)
        barrier = q_pipe.producer_get_barrier(state)
        tma_load(load, buffer, (Int32(0), Int32(0), batch), state.index, barrier, head)

    @cute.jit
    def load(self, loads, buffers, sTiles, pipes, work_tile, kv_head, tiles):
        """The producer: of each step K and V, with what to mask."""
        config, (k_pipe, v_pipe) = self.config, pipes
        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, config.kv_stages)
        n_block, bit_tile = self.tile_of(tiles, work_tile, work_tile.begin)
        for step in cutlass.range(work_tile.begin, work_tile.end, unroll=1):
            # Read ahead: the waits below hide how long it takes.
            next_block, next_bit_tile = self.tile_of(
                tiles, work_tile, cutlass.min(step + 1, work_tile.end - 1)
            )
            nth = step % config.steps
            block = n_block * config.steps + nth
            coord = (block, kv_head, work_tile.batch)
            k_pipe.sync_object_empty.wait(state.index, state.phase)
            k_barrier = k_pipe.producer_get_barrier(state)
            tma_load(loads[0], buffers[0], coord, state.index, k_barrier, work_tile.key_start)
            v_pipe.producer_acquire(state)
            v_barrier = v_pipe.producer_get_barrier(state)
            tma_load(loads[1], buffers[1], coord, state.index, v_barrier, work_tile.key_start)
            # The bit tile is read while K and V are under way. Until the arrival below, the phase
            # of K's barrier cannot end, however many bytes have come.
            remaining = work_tile.limit - block * config.tile_n
            code = bit_tile * config.steps + nth
            if bit_tile == FULL_TILE:
                code = Int32(FULL_TILE) if remaining >= config.tile_n else Int32(FULL_TILE - 1)
            if cute.arch.lane_idx() == 0:
                sTiles[state.index, 0] = code
                sTiles[state.index, 1] = remaining
                # This arrival releases the preceding writes.
                cute.arch.mbarrier_arrive_and_expect_tx(k_barrier, k_pipe.sync_object_full.tx_count)
            state.advance()
            n_block, bit_tile = next_block, next_bit_tile

    @cute.jit
    def tile_of(self, tiles, work_tile, step):
        """Column and bit tile of a step. Columns that follow each other are not read."""
        nth = step // self.config.steps
        n_block = work_tile.left + nth
        if work_tile.left < 0:
            n_block = tiles[work_tile.first + nth, 0]
        return n_block, tiles[work_tile.first + nth, 1]

    def _tiled_mmas(self):
        """S = Q K^T, and O += P V with P in registers."""
        config = self.config
        mma_qk = make_tiled_mma(self.dtype, (64, config.tile_n))
        columns, registers = OperandMajorMode.MN, warpgroup.OperandSource.RMEM
        mma_pv = make_tiled_mma(
            self.dtype, (64, config.head_dim), b_mode=columns, a_source=registers
        )
        return mma_qk, mma_pv

    def _storage(self, q_layout, kv_layout):
        config = self.config

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(1)
            k_barriers: barrier_storage(config.kv_stages)
            v_barriers: barrier_storage(config.kv_stages)
            tiles: cute.struct.MemRange[Int32, config.kv_stages * 2]
            q: tile_storage(self.dtype, q_layout)
            k: tile_storage(self.dtype, kv_layout)
            v: tile_storage(self.dtype, kv_layout)

        return Storage

    def _pipelines(self, smem, layouts):
        """Rings of barriers: Q, which is never freed, K, V (filled by TMA)."""
        stages, warps = self.config.kv_stages, CONSUMERS // 32
        check_arrivals("the whole CTA", {"consumers": 32 * warps, "producer": 32}, THREADS)
        queries, keys = (tile_bytes(layout, self.dtype) for layout in layouts)
        q = tma_pipeline(smem.q_barriers, 1, warps, queries)
        k = tma_pipeline(smem.k_barriers, stages, warps, keys)
        v = tma_pipeline(smem.v_barriers, stages, warps, keys)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, k, v
