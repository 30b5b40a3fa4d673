"""The backward kernel on Hopper with tiles of 96 keys and 64 queries, for head_dim 192.

Three warpgroups share each of the five GEMMs of a tile. So each warpgroup has registers for its
third of dK and of dV:

    S = Q K',  P = exp2(scale S - lse),  dP = dO V',  dS = P (dP - delta)    32 keys each
    dV' += dO' P,  dK' += Q' dS,  dQ = dS K                                  64 columns each

where ' is the transpose. P and dS pass through shared memory. Each tile adds 64 rows to dQ in
memory, so there are 1.5 times fewer additions than with tiles of 64 keys. Work tiles, loads and
splits are those of `BackwardSm90`.
"""

from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode
from sparse_flash.kernels.sm90.backward_tile96_consumer import GROUPS, Tile96Consumer
from sparse_flash.kernels.sm90.backward_wide import THREADS, WARPS, BackwardWideSm90
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


class BackwardTile96Sm90(BackwardWideSm90):
    """One compiled kernel. `config` holds its static parameters."""

    @cute.jit
    def _consume(self, warp_idx, tiled_mmas, shared, results, scales):
        """Run a consumer warp: all warpgroups have the same role."""
        buffers, inputs, pipes, (work_tiles, _, bits), _ = shared
        cute.arch.setmaxregister_increase(self._registers()[1])
        outside = (buffers, inputs, pipes, (work_tiles, bits), results, scales)
        Tile96Consumer(self.config, self.dtype, tiled_mmas, *outside).run()

    def _registers(self):
        """Registers per thread of the producer, and of the consumer warpgroups."""
        return self.config.registers

    def _score_layouts(self):
        """Layouts of P and dS, both operands in shared memory."""
        config = self.config
        return (
            smem_layout(self.dtype, config.tile_m, config.tile_n, stages)
            for stages in (config.q_stages, config.ds_stages)
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
