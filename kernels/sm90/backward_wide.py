"""The backward kernel for head_dims above 128 on Hopper: all gradients in one pass.

At these sizes no warpgroup has registers for dK and dV together. So each of three warpgroups
computes one gradient, and together five products, each once:

    dV: S' = K Q',  P' = exp2(scale S' - lse),  dV += P' dO
    dK: dP' = V dO',  dS' = P' (dP' - delta),  dK += dS' Q
    dQ: dQ += dS K

P' and dS' are operands from registers for dV and dK. P' passes from the first warpgroup to the
second through shared memory, in register order, and dS' from the second to the third. Tiles are 64
queries x 64 keys. Work tiles, loads and splits are those of `BackwardSm90`.

Every thread arrives at the barriers of P', not one lane for its warp: compute-sanitizer takes an
arrival to order the stores and loads of the arriving thread only.
"""

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.sm90.backward import BackwardSm90
from sparse_flash.kernels.sm90.backward_producer import BackwardProducer
from sparse_flash.kernels.sm90.backward_wide_consumer import (
    KeyGradient,
    QueryGradient,
    ValueGradient,
)
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    WORK_STAGES,
    WorkList,
    barrier_storage,
    by_tiles,
    check_arrivals,
    make_tiled_mma,
    register_pipeline,
    smem_layout,
    smem_tensor,
    tile_bytes,
    tile_storage,
    tma,
    tma_pipeline,
    work_pipeline,
    work_storage,
)

GROUPS = 3  # consumer warpgroups
THREADS = 128 * (1 + GROUPS)
WARPS = 4  # of a warpgroup


class BackwardWideSm90(BackwardSm90):
    """One compiled kernel. `config` holds its static parameters."""

    @cute.jit
    def launch(self, tensors, stats, results, lists, offsets, num_ctas: Int32, scales, stream):
        """Launch the attention kernel itself."""
        config, width = self.config, self.config.head_dim
        q, dout, k, v = by_tiles(tensors)
        stats = cute.make_tensor(stats.iterator, cute.select(stats.layout, mode=[3, 2, 1, 0]))
        m, n, stages = config.tile_m, config.tile_n, config.q_stages
        q_layout = smem_layout(self.dtype, m, width, stages)
        do_layout = smem_layout(self.dtype, m, width, config.do_stages)
        k_layout = smem_layout(self.dtype, n, width, config.k_stages)
        v_layout = smem_layout(self.dtype, n, width, config.v_stages)
        p_layout, ds_layout = self._score_layouts()
        stats_layout = cute.make_layout((m, 2, stages), stride=(1, m, 2 * m))
        loaded = ((q, q_layout), (dout, do_layout), (k, k_layout), (v, v_layout))
        loaded = (*loaded, (stats, stats_layout))
        self.kernel(
            tuple(tma(LOAD(), *tensor_and_layout) for tensor_and_layout in loaded),
            results,
            (q_layout, do_layout, k_layout, v_layout, p_layout, ds_layout, stats_layout),
            self._tiled_mmas(),
            lists,
            (
                cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
                cute.ceil_div(cute.size(q, mode=[0]), m),
            ),
            scales,
            self._storage(q_layout, do_layout, k_layout, v_layout, p_layout, ds_layout),
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
        results,  # dv and dk; sums of dq and their states; splits of dv and dk
        layouts,
        tiled_mmas,
        lists,
        heads,  # q heads for each kv head, and tiles of queries
        scales,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, then run the role of the warp."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in loads:
                cpasync.prefetch_descriptor(atom)
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        *pipes, work_pipe = self._pipelines(smem, layouts)
        q_layout, do_layout, k_layout, v_layout, p_layout, ds_layout, stats_layout = layouts
        sQ, sdO, sK, sV, sdS = (
            smem_tensor(field, layout)
            for field, layout in (
                (smem.q, q_layout),
                (smem.do, do_layout),
                (smem.k, k_layout),
                (smem.v, v_layout),
                (smem.ds, ds_layout),
            )
        )
        sP, sStats = self._buffer_of_p(smem, p_layout), smem.stats.get_tensor(stats_layout)
        sTiles = smem.tiles.get_tensor(cute.make_layout((config.q_stages, config.tile_words)))
        kv_lens, work, tiles, bits, counter, counts = lists
        work_tiles = WorkList(work, counter, counts, smem.work, work_pipe)
        staging = self._staging(smem)
        if warp_idx < WARPS:
            cute.arch.setmaxregister_decrease(self._registers()[0])
            if warp_idx == 0:
                inputs = (kv_lens, tiles, heads, None)
                outside = ((sQ, sdO, sK, sV, sStats), sTiles, pipes[:4], work_tiles, inputs)
                BackwardProducer(config, loads, *outside).run()
            else:
                self._store(warp_idx, staging, results[1], work_tiles, (tiles, heads, None))
        else:
            buffers, inputs = (sQ, sdO, sK, sV, sP, sdS), (sStats, sTiles)
            shared = (buffers, inputs, pipes, (work_tiles, tiles, bits), heads, staging)
            self._consume(warp_idx, tiled_mmas, shared, results, scales)

    @cute.jit
    def _consume(self, warp_idx, tiled_mmas, shared, results, scales):
        """Run the role of a consumer warp."""
        (sQ, sdO, sK, sV, sP, sdS), (sStats, sTiles), pipes, lists, heads, _ = shared
        (q_pipe, do_pipe, k_pipe, v_pipe, p_pipe, ds_pipe), (work_tiles, tiles, bits) = pipes, lists
        (dv, dk), (dq_sum, done), (dv_splits, dk_splits) = results
        mma_s, mma_dkv, mma_dq = tiled_mmas
        registers, common = self._registers()[1:], (self.config, self.dtype, work_tiles)
        if warp_idx < 2 * WARPS:
            cute.arch.setmaxregister_increase(registers[0])
            operands, given = (sK, sQ, sdO), (k_pipe, q_pipe, do_pipe)
            outside = ((mma_s, mma_dkv), operands, given, (sP, p_pipe), (sStats, sTiles, bits))
            ValueGradient(*common, *outside, (dv, dv_splits), scales[1]).run()
        elif warp_idx < 3 * WARPS:
            cute.arch.setmaxregister_increase(registers[1])
            operands, given = (sV, sdO, sQ), (v_pipe, do_pipe, q_pipe)
            outside = ((mma_s, mma_dkv), operands, given, (sP, p_pipe), (sdS, ds_pipe), sStats)
            KeyGradient(*common, *outside, (dk, dk_splits), scales[0]).run()
        else:
            cute.arch.setmaxregister_decrease(registers[2])
            outside = ((sK, k_pipe), (sdS, ds_pipe), (dq_sum, done, tiles, heads))
            QueryGradient(*common, mma_dq, *outside).run()

    def _staging(self, smem):
        """Shared memory of dQ on its way to memory: none, it is added from registers."""
        return

    def _store(self, warp_idx, staging, sums, work_tiles, inputs):
        """Run another warp of the producer's warpgroup: none has work."""

    def _registers(self):
        """Registers per thread of the producer, and of each consumer warpgroup."""
        return self.config.wide_registers

    def _score_layouts(self):
        """Layouts of P' and dS'. P' is (8 elements, thread, chunk, stage): 16 bytes per thread at
        a time.
        """
        config = self.config
        m, n = config.tile_m, config.tile_n
        shape = (8, 128, n * m // 1024, config.ds_stages)
        p_layout = cute.make_ordered_layout(shape, order=(0, 1, 2, 3))
        return p_layout, smem_layout(self.dtype, n, m, config.ds_stages)

    def _buffer_of_p(self, smem, layout):
        return smem.p.get_tensor(layout)

    def _tiled_mmas(self):
        """Tiled MMAs of S' and dP', of dV and dK (P' and dS' in registers), and of dQ."""
        config, columns = self.config, OperandMajorMode.MN
        registers = {"a_source": warpgroup.OperandSource.RMEM}
        mma_s = make_tiled_mma(self.dtype, (config.tile_n, config.tile_m))
        mma_dkv = make_tiled_mma(self.dtype, (64, config.wide_columns), b_mode=columns, **registers)
        mma_dq = make_tiled_mma(self.dtype, (64, config.wide_dq_columns), columns, columns)
        return mma_s, mma_dkv, mma_dq

    def _storage(self, q_layout, do_layout, k_layout, v_layout, p_layout, ds_layout):
        config, dtype = self.config, self.dtype

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            do_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.k_stages)
            v_barriers: barrier_storage(config.v_stages)
            p_barriers: barrier_storage(config.ds_stages)
            ds_barriers: barrier_storage(config.ds_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.q_stages]
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.q_stages], 128
            ]
            q: tile_storage(dtype, q_layout)
            do: tile_storage(dtype, do_layout)
            k: tile_storage(dtype, k_layout)
            v: tile_storage(dtype, v_layout)
            p: tile_storage(dtype, p_layout)
            ds: tile_storage(dtype, ds_layout)

        return Storage

    def _pipelines(self, smem, layouts):
        """Pipelines: Q with its row statistics, dO, K, V (by TMA), P', dS', and work tiles."""
        config = self.config
        queries, keys = (tile_bytes(layouts[i], self.dtype) for i in (0, 2))
        statistics = tile_bytes(layouts[-1], Float32)
        # Consumers of Q and dO: the warpgroups of dV and dK; of K those of dV and dQ.
        q = tma_pipeline(smem.q_barriers, config.q_stages, 2 * WARPS, queries + statistics)
        do = tma_pipeline(smem.do_barriers, config.q_stages, 2 * WARPS, queries)
        k = tma_pipeline(smem.k_barriers, config.k_stages, 2 * WARPS, keys)
        v = tma_pipeline(smem.v_barriers, config.v_stages, WARPS, keys)
        p = register_pipeline(smem.p_barriers, config.ds_stages, 128, 128)
        ds = register_pipeline(smem.ds_barriers, config.ds_stages, WARPS, WARPS)
        check_arrivals("the whole CTA", {"loading": 128, "consumers": GROUPS * 128}, THREADS)
        work = work_pipeline(smem.work_barriers, GROUPS * 128)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, do, k, v, p, ds, work
