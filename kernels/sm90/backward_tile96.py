"""The backward kernel on Hopper with tiles of 96 keys and 64 queries, for head_dim 192.

Three warpgroups share each of the five GEMMs of a tile. So each warpgroup has registers for its
third of dK and of dV:

    S = Q K',  P = exp2(scale S - lse),  dP = dO V',  dS = P (dP - delta)    32 keys each
    dV' += dO' P,  dK' += Q' dS,  dQ = dS K                                  64 columns each

where ' is the transpose. P and dS pass through shared memory. Each tile adds 64 rows to dQ in
memory, so there are 1.5 times fewer additions than with tiles of 64 keys. Work tiles, loads and
splits are those of `BackwardSm90`.
"""

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync
from sparse_flash.kernels.sm90.backward import BackwardSm90
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.backward_producer import BackwardProducer
from sparse_flash.kernels.sm90.backward_tile96_consumer import GROUPS, Tile96Consumer
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
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

THREADS = 128 * (1 + GROUPS)
WARPS = 4  # of a warpgroup


class BackwardTile96Sm90(BackwardSm90):
    """One compiled kernel. `config` holds its static parameters."""

    def __init__(self, config: BackwardConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.tile96
        super().__init__(config, dtype)

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
        p_layout = smem_layout(self.dtype, m, n, stages)
        ds_layout = smem_layout(self.dtype, m, n, config.ds_stages)
        stats_layout = cute.make_layout((m, 2, stages), stride=(1, m, 2 * m))
        loaded = ((q, q_layout), (dout, q_layout), (k, k_layout), (v, v_layout))
        loaded = (*loaded, (stats, stats_layout))
        self.kernel(
            tuple(tma(LOAD(), *tensor_and_layout) for tensor_and_layout in loaded),
            results,
            (q_layout, k_layout, v_layout, p_layout, ds_layout, stats_layout),
            self._tiled_mmas(),
            lists,
            (
                cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
                cute.ceil_div(cute.size(q, mode=[0]), m),
            ),
            scales,
            self._storage(q_layout, k_layout, v_layout, p_layout, ds_layout),
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
        q_layout, k_layout, v_layout, p_layout, ds_layout, stats_layout = layouts
        sQ, sdO, sK, sV, sP, sdS = (
            smem_tensor(field, layout)
            for field, layout in (
                (smem.q, q_layout),
                (smem.do, q_layout),
                (smem.k, k_layout),
                (smem.v, v_layout),
                (smem.p, p_layout),
                (smem.ds, ds_layout),
            )
        )
        sStats = smem.stats.get_tensor(stats_layout)
        sTiles = smem.tiles.get_tensor(cute.make_layout((config.q_stages, config.tile_words)))
        kv_lens, work, tiles, bits, counter, counts = lists
        work_tiles = WorkList(work, counter, counts, smem.work, work_pipe)
        producer_registers, consumer_registers = config.registers
        if warp_idx < WARPS:
            cute.arch.setmaxregister_decrease(producer_registers)
            if warp_idx == 0:
                inputs = (kv_lens, tiles, heads, None)
                outside = ((sQ, sdO, sK, sV, sStats), sTiles, pipes, work_tiles, inputs)
                BackwardProducer(config, loads, *outside).run()
        else:
            cute.arch.setmaxregister_increase(consumer_registers)
            buffers, inputs = (sQ, sdO, sK, sV, sP, sdS), (sStats, sTiles)
            outside = (buffers, inputs, pipes, (work_tiles, bits), results, scales)
            Tile96Consumer(config, self.dtype, tiled_mmas, *outside).run()

    def _tiled_mmas(self):
        """Tiled MMAs of S and dP, of dV' and dK', and of dQ, for one warpgroup."""
        config, columns = self.config, OperandMajorMode.MN
        keys, width = config.tile_n // GROUPS, config.head_dim // GROUPS
        mma_s = make_tiled_mma(self.dtype, (config.tile_m, keys))
        mma_dkv = make_tiled_mma(self.dtype, (width, config.tile_n), columns, columns)
        mma_dq = make_tiled_mma(self.dtype, (config.tile_m, width), b_mode=columns)
        return mma_s, mma_dkv, mma_dq

    def _storage(self, q_layout, k_layout, v_layout, p_layout, ds_layout):
        config, dtype = self.config, self.dtype

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            do_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.k_stages)
            v_barriers: barrier_storage(config.v_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.q_stages * config.tile_words]
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.q_stages], 128
            ]
            q: tile_storage(dtype, q_layout)
            do: tile_storage(dtype, q_layout)
            k: tile_storage(dtype, k_layout)
            v: tile_storage(dtype, v_layout)
            p: tile_storage(dtype, p_layout)
            ds: tile_storage(dtype, ds_layout)

        return Storage

    def _pipelines(self, smem, layouts):
        """Pipelines: Q with its row statistics, dO, K, V (by TMA), and work tiles."""
        config, warps = self.config, GROUPS * WARPS
        queries, keys = (tile_bytes(layouts[i], self.dtype) for i in range(2))
        statistics = tile_bytes(layouts[5], Float32)
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries + statistics)
        do = tma_pipeline(smem.do_barriers, config.q_stages, warps, queries)
        k = tma_pipeline(smem.k_barriers, config.k_stages, warps, keys)
        v = tma_pipeline(smem.v_barriers, config.v_stages, warps, keys)
        consumers = 128 * GROUPS
        check_arrivals("the whole CTA", {"loading": 128, "consumers": consumers}, THREADS)
        work = work_pipeline(smem.work_barriers, consumers)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, do, k, v, work
