"""The backward kernel for Hopper: one work tile per key block, from the transposed layout.

A CTA has one producer warp, two consumer warpgroups, and one store warp per consumer warpgroup. A
work tile is a block of keys with the query blocks that see it; dK and dV stay in registers
(FlashAttention-2, Dao, 2023). dQ is accumulated in float32 in global memory by bulk reductions, in
no particular order.
"""

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.combine import CombineGradients
from sparse_flash.kernels.distance_bias import DistanceWindows, window_layout, window_storage
from sparse_flash.kernels.distance_table import window_bytes
from sparse_flash.kernels.position_work_tiles import ColumnOffsets, row_tiles
from sparse_flash.kernels.preprocess import Bounds, Preprocess
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.backward_consumer import BackwardConsumer
from sparse_flash.kernels.sm90.backward_producer import BackwardProducer, BackwardStorer
from sparse_flash.kernels.sm90.postprocess import Postprocess
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    STORE,
    WORK_STAGES,
    WorkList,
    barrier_storage,
    by_tiles,
    check_arrivals,
    make_tiled_mma,
    smem_layout,
    smem_tensor,
    tile_bytes,
    tile_storage,
    tma,
    tma_pipeline,
    work_pipeline,
    work_storage,
)

CONSUMER_WARPS = 8
THREADS = 128 + 32 * CONSUMER_WARPS
# Together with the other roles they fill the register file.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


class BackwardSm90:
    """One compiled kernel. `config` holds its static parameters."""

    def __init__(self, config: BackwardConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, s_q, h, d)
        dout: cute.Tensor,  # (b, s_q, h, d)
        lse: cute.Tensor,  # (b, h, s_q) float32
        dlse: cute.Tensor,  # (b, h, s_q) float32
        dq: cute.Tensor,  # (b, s_q, h, d)
        dk: cute.Tensor,  # (b, s_kv, h_kv, d)
        dv: cute.Tensor,  # (b, s_kv, h_kv, d)
        done: cute.Tensor,  # (b, h, tiles x 2) int32: states of dq_sum, see BackwardStorer
        bounds: cute.Tensor,  # (2, b, h_kv) int32, zeros, or (0, b, h_kv); see preprocess.Bounds
        dq_sum: cute.Tensor,  # (b, h, tiles x 2, dq_chunk) float32 or int32; see Postprocess
        stats: cute.Tensor,  # (b, h, 2, s_q rounded up to tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: m_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        dk_splits: cute.Tensor,  # (parts, tile_n, head_dim) float32
        dv_splits: cute.Tensor,  # (parts, tile_n, head_dim) float32
        combine: cute.Tensor,  # (columns, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: numbers of work tiles and of combined columns
        num_ctas: Int32,
        has_dlse: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch all kernels on the stream. See `Schedule` for work tiles and splits."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, bounds, has_dlse)
        results = ((dv, dk), (dq_sum, done), (dv_splits, dk_splits))
        scales = (softmax_scale, scale_log2)
        self.run((q, dout, k, v), given, stats, dq, results, lists, None, num_ctas, scales, stream)
        if cute.size(combine, mode=[0]) > 0:
            total = CombineGradients(self.config.tile_n, self.config.head_dim, self.dtype)
            total((dk, dv), combine, counts, (dk_splits, dv_splits), stream)

    @cute.jit
    def run(
        self, tensors, given, stats, dq, results, lists, offsets, num_ctas: Int32, scales, stream
    ):
        """Launch all kernels except the combination of splits.

        offsets: q_pad and kv_starts, as in `ColumnOffsets`, or `None`. scales: softmax_scale and
        scale_log2, and `ScoreTerms` of score_terms.py in kernels that have them.
        """
        config, (_, _, k, v), (dq_sum, done) = self.config, tensors, results[1]
        out, dout, lse, dlse, bounds, has_dlse = given
        kv_lens, work, *_, counts = lists
        pads, starts = (None, None) if offsets is None else ((offsets[0],), (offsets[1],))
        if cutlass.const_expr(config.fixed_point):
            Bounds(config)(k, v, bounds, kv_lens, work, counts, starts, stream)
        preprocess = Preprocess(config)
        factor = scales[2].keep_scale if cutlass.const_expr(config.dropout) else None
        preprocess(out, dout, lse, dlse, stats, done, bounds, pads, has_dlse, stream, factor)
        self.launch(tensors, stats, results, lists, offsets, num_ctas, scales, stream)
        if cutlass.const_expr(config.dq):
            Postprocess(config)(dq_sum, done, stats, dq, pads, scales[0], stream)

    @cute.jit
    def launch(self, tensors, stats, results, lists, offsets, num_ctas: Int32, scales, stream):
        """Launch the attention kernel itself."""
        config, width = self.config, self.config.head_dim
        q, dout, k, v = by_tiles(tensors)
        stats = cute.make_tensor(stats.iterator, cute.select(stats.layout, mode=[3, 2, 1, 0]))
        m, n, stages = config.tile_m, config.tile_n, config.q_stages
        q_layout = smem_layout(self.dtype, m, width, stages)
        k_layout = smem_layout(self.dtype, n, width, config.k_stages)
        v_layout = smem_layout(self.dtype, n, width, config.v_stages)
        rows, columns = (m, n) if config.dq_transposed else (n, m)
        ds_layout = smem_layout(self.dtype, rows, columns, config.ds_stages)
        # (4 elements, thread, chunk, warpgroup, buffer): 16 bytes per thread at a time.
        shape = (4, 128, config.dq_chunk // 512, 2, config.buffers)
        dq_layout = cute.make_ordered_layout(shape, order=(0, 1, 2, 3, 4))
        stats_layout = cute.make_layout((m, 2, stages), stride=(1, m, 2 * m))
        result_layout = smem_layout(self.dtype, 64, width, 1)
        loaded = ((q, q_layout), (dout, q_layout), (k, k_layout), (v, v_layout))
        loaded = (*loaded, (stats, stats_layout))
        self.kernel(
            tuple(tma(LOAD(), *tensor_and_layout) for tensor_and_layout in loaded),
            [tma(STORE(), x, result_layout) for x in by_tiles(results[0])] if config.dq else [],
            results,
            (q_layout, k_layout, v_layout, ds_layout, dq_layout, stats_layout, result_layout),
            self._tiled_mmas(),
            lists,
            offsets,
            (
                cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
                row_tiles(cute.size(q, mode=[0]), m)
                if config.offsets
                else cute.ceil_div(cute.size(q, mode=[0]), m),
            ),
            scales,
            self._storage(q_layout, k_layout, v_layout, ds_layout, dq_layout),
        ).launch(
            grid=(num_ctas, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        loads,  # (TMA atom, tensor) of q, dout, k, v, stats
        stores,  # of dv and dk
        results,  # dv and dk; sums of dq and their states; splits of dv and dk
        layouts,
        tiled_mmas,
        lists,
        offsets,  # q_pad and kv_starts, or None
        heads,  # q heads for each kv head, and tiles of queries
        scales,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, then run the role of the warp."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in (*loads, *stores):
                cpasync.prefetch_descriptor(atom)
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        ds_published, buffer_free = smem.ds_published.data_ptr(), smem.buffer_free.data_ptr()
        if warp_idx == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(ds_published, CONSUMER_WARPS)
                for i in cutlass.range_constexpr(2 * config.buffers):
                    cute.arch.mbarrier_init(buffer_free + i, 1)
        *pipes, work_pipe = self._pipelines(smem, layouts)
        q_layout, k_layout, v_layout, ds_layout, dq_layout, stats_layout, result_layout = layouts
        sQ, sdO, sK, sV, sdS = (
            smem_tensor(field, layout)
            for field, layout in (
                (smem.q, q_layout),
                (smem.do, q_layout),
                (smem.k, k_layout),
                (smem.v, v_layout),
                (smem.ds, ds_layout),
            )
        )
        sdQ = smem.dq.get_tensor(dq_layout)
        sdKV = self._dkv_buffers(sdQ, result_layout)
        sStats = smem.stats.get_tensor(stats_layout)
        sTiles = smem.tiles.get_tensor(cute.make_layout((config.q_stages, config.tile_words)))
        windows = scratch = None
        if cutlass.const_expr(config.distance_bias):
            sWindows = smem.windows.get_tensor(window_layout(config.tile, config.q_stages))
            windows = DistanceWindows(ScoreTerms(*scales[2]), sWindows, config.tile)
        if cutlass.const_expr(config.distance_grads):
            shape = (config.scratch // CONSUMER_WARPS, CONSUMER_WARPS)
            scratch = smem.scratch.get_tensor(cute.make_layout(shape))
        kv_lens, work, tiles, bits, counter, counts = lists
        work_tiles = WorkList(work, counter, counts, smem.work, work_pipe)
        if cutlass.const_expr(config.offsets):
            offsets = ColumnOffsets(offsets, cute.size(loads[2][1], mode=[0]))
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_idx == 0:
                buffers = (sQ, sdO, sK, sV, sStats)
                inputs = (kv_lens, tiles, heads, offsets)
                outside = (buffers, sTiles, pipes, work_tiles, inputs, windows)
                BackwardProducer(config, loads, *outside).run()
            elif cutlass.const_expr(config.dq):
                if warp_idx <= 2:
                    inputs, group = (tiles, heads, offsets), warp_idx - 1
                    buffers = (sdQ, sdKV)
                    outside = (buffers, buffer_free, work_tiles, inputs, group)
                    BackwardStorer(config, stores, *results[1], *outside).run()
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            buffers = (sQ, sdO, sK, sV, sdS, sdQ, sdKV, sStats, sTiles)
            given = (buffers, pipes, (ds_published, buffer_free), (work_tiles, bits, offsets))
            outside = (*given, results[::2], scales, (windows, scratch))
            BackwardConsumer(config, self.dtype, tiled_mmas, *outside).run()

    def _dkv_buffers(self, sdQ, layout):
        """Buffers of dQ, reused for dV and dK: (64 keys, head_dim, warpgroup, buffer, result)."""
        config = self.config
        if cutlass.const_expr(not config.dq):
            return None
        one = cute.select(layout.outer, mode=[0, 1])
        shape = (*one.shape, 2, config.buffers, config.results)
        size = 2 * config.dq_chunk  # of a buffer, in numbers of 16 bits
        stride = (*one.stride, size, 2 * size, 64 * config.head_dim)
        start = cute.recast_ptr(sdQ.iterator, layout.inner, dtype=self.dtype)
        return cute.make_tensor(start, cute.make_layout(shape, stride=stride))

    def _tiled_mmas(self):
        """Tiled MMAs of S (K in shared memory), S (K in registers), dK and dV (P' and dS' in
        registers), and dQ.
        """
        config, columns = self.config, OperandMajorMode.MN
        mma_s = make_tiled_mma(self.dtype, (64, config.tile_m))
        registers = {"a_source": warpgroup.OperandSource.RMEM}
        mma_dkv = make_tiled_mma(self.dtype, (64, config.columns), b_mode=columns, **registers)
        if config.dq_transposed:  # dQ' = K' dS', with the queries of dS' as rows
            mma_dq = make_tiled_mma(self.dtype, config.dq_tile, columns)
        else:
            mma_dq = make_tiled_mma(self.dtype, config.dq_tile, columns, columns)
        mma_s_rs = make_tiled_mma(self.dtype, (64, config.tile_m), **registers)
        return mma_s, mma_s_rs, mma_dkv, mma_dq

    def _storage(self, q_layout, k_layout, v_layout, ds_layout, dq_layout):
        config, dtype = self.config, self.dtype
        window_memory = window_storage(config.tile, config.q_stages if config.distance_bias else 0)
        ds_storage = dq_storage = cute.struct.MemRange[Float32, 1]  # not used
        if cutlass.const_expr(config.dq):
            ds_storage, dq_storage = (
                tile_storage(dtype, ds_layout),
                tile_storage(Float32, dq_layout),
            )

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            do_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.k_stages)
            v_barriers: barrier_storage(config.v_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            ds_published: cute.struct.MemRange[cutlass.Int64, 1]
            buffer_free: cute.struct.MemRange[cutlass.Int64, 2 * config.buffers]
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.q_stages * config.tile_words]
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.q_stages], 128
            ]
            q: tile_storage(dtype, q_layout)
            do: tile_storage(dtype, q_layout)
            k: tile_storage(dtype, k_layout)
            v: tile_storage(dtype, v_layout)
            dq: dq_storage
            ds: ds_storage
            windows: window_memory
            scratch: cute.struct.Align[cute.struct.MemRange[Float32, config.scratch], 128]

        return Storage

    def _pipelines(self, smem, layouts):
        """Pipelines: Q with its row statistics, dO, K, V (by TMA), and work tiles."""
        config, warps = self.config, CONSUMER_WARPS
        queries, keys = (tile_bytes(layouts[i], self.dtype) for i in range(2))
        statistics = tile_bytes(layouts[5], Float32)
        windows = window_bytes(config.tile) if config.distance_bias else 0
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries + statistics + windows)
        do = tma_pipeline(smem.do_barriers, config.q_stages, warps, queries)
        k = tma_pipeline(smem.k_barriers, config.k_stages, warps, keys)
        v = tma_pipeline(smem.v_barriers, config.v_stages, warps, keys)
        storing = 2 if config.dq else 0
        roles = {"loading": 32, "storing": 64, "not used": 32, "consumers": 32 * warps}
        check_arrivals("the whole CTA", roles, THREADS)
        work = work_pipeline(smem.work_barriers, 32 * (warps + storing))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, do, k, v, work
