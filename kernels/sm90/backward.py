"""The backward kernel for Hopper: like the forward's, but by keys, with the transposed layout.

A CTA has one loading warp, two consumer warpgroups, and a storing warp for each of them. An item is
a tile of keys and the tiles of queries that see it; dK and dV stay in registers (FlashAttention-2,
Dao, 2023). dQ is summed up in 32 bits in memory, by bulk reductions in no particular order.
"""

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.sm90.backward_consumer import BackwardConsumer
from sparse_flash.kernels.sm90.backward_producer import BackwardProducer, BackwardStorer
from sparse_flash.kernels.sm90.config import BackwardConfig
from sparse_flash.kernels.sm90.convert import Convert
from sparse_flash.kernels.sm90.elementwise import Bounds, Statistics, Sum
from sparse_flash.kernels.sm90.position_items import ColumnOffsets, row_tiles
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    STORE,
    WORK_STAGES,
    WorkList,
    barriers,
    buffer,
    by_tiles,
    check_arrivals,
    product,
    smem_layout,
    tensor_in,
    tile_bytes,
    tma,
    tma_ring,
    work_ring,
    work_room,
)

CONSUMER_WARPS = 8
THREADS = 128 + 32 * CONSUMER_WARPS
# With those of the other roles they fill the register file.
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240


class BackwardSm90:
    """One kernel; `config` is all that it is compiled for."""

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
        done: cute.Tensor,  # (b, h, tiles x 2) int32: what stands in dq_sum; see BackwardStorer
        bounds: cute.Tensor,  # (2, b, h_kv) int32, zeros, or (0, b, h_kv); see elementwise.Bounds
        dq_sum: cute.Tensor,  # (b, h, tiles x 2, dq_chunk) float32 or int32; see Convert
        stats: cute.Tensor,  # (b, h, 2, s_q rounded up to tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: m_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros; left as zeros
        dk_parts: cute.Tensor,  # (parts, tile_n, head_dim) float32
        dv_parts: cute.Tensor,  # (parts, tile_n, head_dim) float32
        combine: cute.Tensor,  # (columns, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: how many items and columns there are
        num_ctas: Int32,
        has_dlse: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch all on the stream. See `Schedule` for the work items and the parts."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, bounds, has_dlse)
        results = ((dv, dk), (dq_sum, done), (dv_parts, dk_parts))
        scales = (softmax_scale, scale_log2)
        self.run((q, dout, k, v), given, stats, dq, results, lists, None, num_ctas, scales, stream)
        if cute.size(combine, mode=[0]) > 0:
            total = Sum(self.config.tile_n, self.config.head_dim, self.dtype)
            total((dk, dv), combine, counts, (dk_parts, dv_parts), stream)

    @cute.jit
    def run(
        self, tensors, given, stats, dq, results, lists, offsets, num_ctas: Int32, scales, stream
    ):
        """Launch all but the sums of parts.

        offsets: q_pad and kv_starts, as in `ColumnOffsets`, or `None`.
        """
        config, (_, _, k, v), (dq_sum, done) = self.config, tensors, results[1]
        out, dout, lse, dlse, bounds, has_dlse = given
        kv_lens, work, *_, counts = lists
        pads, starts = (None, None) if offsets is None else ((offsets[0],), (offsets[1],))
        if cutlass.const_expr(config.fixed):
            Bounds(config)(k, v, bounds, kv_lens, work, counts, starts, stream)
        preprocess = Statistics(config)
        preprocess(out, dout, lse, dlse, stats, done, bounds, pads, has_dlse, stream)
        self.launch(tensors, stats, results, lists, offsets, num_ctas, scales, stream)
        if cutlass.const_expr(config.dq):
            Convert(config)(dq_sum, done, stats, dq, pads, scales[0], stream)

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
        # (4 numbers, thread, more numbers, warpgroup, buffer): 16 bytes a thread at a time.
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
            self._products(),
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
        results,  # dv and dk; sums of dq, and what stands there; parts of dv and dk
        layouts,
        products,
        lists,
        offsets,  # q_pad and kv_starts, or None
        heads,  # q heads for each kv head, and tiles of queries
        scales,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, then part ways."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in (*loads, *stores):
                cpasync.prefetch_descriptor(atom)
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        ds_shared, rooms = smem.ds_shared.data_ptr(), smem.rooms.data_ptr()
        if warp_idx == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_init(ds_shared, CONSUMER_WARPS)
                for i in cutlass.range_constexpr(2 * config.buffers):
                    cute.arch.mbarrier_init(rooms + i, 1)
        *pipes, work_pipe = self._pipelines(smem, layouts)
        q_layout, k_layout, v_layout, ds_layout, dq_layout, stats_layout, result_layout = layouts
        s_q, s_do, s_k, s_v, s_ds = (
            tensor_in(room, layout)
            for room, layout in (
                (smem.q, q_layout),
                (smem.do, q_layout),
                (smem.k, k_layout),
                (smem.v, v_layout),
                (smem.ds, ds_layout),
            )
        )
        s_dq = smem.dq.get_tensor(dq_layout)
        s_results = self._results_in(s_dq, result_layout)
        s_stats = smem.stats.get_tensor(stats_layout)
        s_tiles = smem.tiles.get_tensor(cute.make_layout(config.q_stages))
        kv_lens, work, tiles, bits, counter, counts = lists
        items = WorkList(work, counter, counts, smem.work, work_pipe)
        if cutlass.const_expr(config.offsets):
            offsets = ColumnOffsets(offsets, cute.size(loads[2][1], mode=[0]))
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(PRODUCER_REGISTERS)
            if warp_idx == 0:
                buffers = (s_q, s_do, s_k, s_v, s_stats)
                inputs = (kv_lens, tiles, heads, offsets)
                outside = (buffers, s_tiles, pipes, items, inputs)
                BackwardProducer(config, loads, *outside).run()
            elif cutlass.const_expr(config.dq):
                if warp_idx <= 2:
                    inputs, group = (tiles, heads, offsets), warp_idx - 1
                    buffers = (s_dq, s_results)
                    outside = (buffers, rooms, items, inputs, group)
                    BackwardStorer(config, stores, *results[1], *outside).run()
        else:
            cute.arch.setmaxregister_increase(CONSUMER_REGISTERS)
            buffers = (s_q, s_do, s_k, s_v, s_ds, s_dq, s_results, s_stats, s_tiles)
            given = (buffers, pipes, (ds_shared, rooms), (items, bits, offsets))
            outside = (*given, results[::2], scales)
            BackwardConsumer(config, self.dtype, products, *outside).run()

    def _results_in(self, s_dq, layout):
        """(64 keys, head_dim, warpgroup, buffer, result): the buffers of dQ, for dV and dK."""
        config = self.config
        if cutlass.const_expr(not config.dq):
            return None
        one = cute.select(layout.outer, mode=[0, 1])
        shape = (*one.shape, 2, config.buffers, config.results)
        size = 2 * config.dq_chunk  # of a buffer, in numbers of 16 bits
        stride = (*one.stride, size, 2 * size, 64 * config.head_dim)
        start = cute.recast_ptr(s_dq.iterator, layout.inner, dtype=self.dtype)
        return cute.make_tensor(start, cute.make_layout(shape, stride=stride))

    def _products(self):
        """Of scores, with K in shared memory or in registers; of dK and dV, with P' or dS' in
        registers; and of dQ.
        """
        config, columns = self.config, OperandMajorMode.MN
        scores = product(self.dtype, (64, config.tile_m))
        registers = {"a_source": warpgroup.OperandSource.RMEM}
        of_keys = product(self.dtype, (64, config.columns), b_mode=columns, **registers)
        if config.dq_transposed:  # dQ' = K' dS', with the queries of dS' as rows
            of_queries = product(self.dtype, config.dq_tile, columns)
        else:
            of_queries = product(self.dtype, config.dq_tile, columns, columns)
        held = product(self.dtype, (64, config.tile_m), **registers)
        return scores, held, of_keys, of_queries

    def _storage(self, q_layout, k_layout, v_layout, ds_layout, dq_layout):
        config, dtype = self.config, self.dtype

        ds_room = dq_room = cute.struct.MemRange[Float32, 1]  # not used
        if cutlass.const_expr(config.dq):
            ds_room, dq_room = buffer(dtype, ds_layout), buffer(Float32, dq_layout)

        @cute.struct
        class Storage:
            q_barriers: barriers(config.q_stages)
            do_barriers: barriers(config.q_stages)
            k_barriers: barriers(config.k_stages)
            v_barriers: barriers(config.v_stages)
            work_barriers: barriers(WORK_STAGES)
            ds_shared: cute.struct.MemRange[cutlass.Int64, 1]
            rooms: cute.struct.MemRange[cutlass.Int64, 2 * config.buffers]
            work: work_room()
            tiles: cute.struct.MemRange[Int32, config.q_stages]
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.q_stages], 128
            ]
            q: buffer(dtype, q_layout)
            do: buffer(dtype, q_layout)
            k: buffer(dtype, k_layout)
            v: buffer(dtype, v_layout)
            dq: dq_room
            ds: ds_room

        return Storage

    def _pipelines(self, smem, layouts):
        """Rings of barriers: Q with its statistics, dO, K, V (by TMA) and work items."""
        config, warps = self.config, CONSUMER_WARPS
        queries, keys = (tile_bytes(layouts[i], self.dtype) for i in range(2))
        statistics = tile_bytes(layouts[5], Float32)
        q = tma_ring(smem.q_barriers, config.q_stages, warps, queries + statistics)
        do = tma_ring(smem.do_barriers, config.q_stages, warps, queries)
        k = tma_ring(smem.k_barriers, config.k_stages, warps, keys)
        v = tma_ring(smem.v_barriers, config.v_stages, warps, keys)
        storing = 2 if config.dq else 0
        roles = {"loading": 32, "storing": 64, "not used": 32, "consumers": 32 * warps}
        check_arrivals("the whole CTA", roles, THREADS)
        work = work_ring(smem.work_barriers, 32 * (warps + storing))
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, do, k, v, work
