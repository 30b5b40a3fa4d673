"""The forward kernel for Hopper: persistent, warp-specialized, and driven by a Schedule.

A CTA has one producer warp and `config.warpgroups` consumer warpgroups, or these for each of two
slots, which compute work tiles side by side. The producer takes work tiles from a common list (the
first one by the index of the CTA and slot, the next ones by an atomic counter) and loads Q, K and V
tiles by TMA. Each consumer warpgroup owns 64 query rows and runs FlashAttention with the overlaps
of FlashAttention-3 (Shah et al., 2024): see forward_consumer.py.

The kernel knows no mask. A tile is full, or names a bit tile in fragment order (fragment.py), or
extends beyond the number of keys.
"""

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.combine import CombineOutput
from sparse_flash.kernels.distance_bias import DistanceWindows, window_layout, window_storage
from sparse_flash.kernels.distance_table import window_bytes
from sparse_flash.kernels.position_work_tiles import positions_of
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm90.alibi import columns_layout, fill_columns
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.sm90.forward_consumer import WARPGROUP, ForwardConsumer
from sparse_flash.kernels.sm90.forward_gather import GatherProducer, box_layout
from sparse_flash.kernels.sm90.forward_producer import ForwardProducer
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    STORE,
    WORK_STAGES,
    WorkList,
    barrier_storage,
    by_tiles,
    check_arrivals,
    make_tiled_mma,
    moved_pipeline,
    smem_layout,
    smem_tensor,
    tile_bytes,
    tile_storage,
    tma,
    tma_pipeline,
    work_pipeline,
    work_storage,
)


class ForwardSm90:
    """One compiled kernel. `config` holds its static parameters."""

    def __init__(self, config: ForwardConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype
        self.consumers = 128 * config.warpgroups

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, s_q, h, d)
        lse: cute.Tensor,  # (b, h, s_q) float32
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        out_splits: cute.Tensor,  # (parts, tile_m, head_dim) float32
        lse_splits: cute.Tensor,  # (parts, tile_m) float32
        combine: cute.Tensor,  # (rows, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: numbers of work tiles and of combined rows
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream. See `Schedule` for work tiles and splits."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        results = (lse, out_splits, lse_splits)
        if cutlass.const_expr(self.config.direct_store):
            results = (*results, out)
        self.launch((q, k, v, out), lists, None, results, num_ctas, scale_log2, stream)
        if cute.size(combine, mode=[0]) > 0:
            rows = CombineOutput(self.config.tile_m, self.config.head_dim, self.dtype)
            rows(out, lse, combine, counts, out_splits, lse_splits, stream)

    @cute.jit
    def launch(
        self,
        tensors,
        lists,
        positions,
        results,
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
        terms=None,
    ):
        """Launch the attention kernel itself.

        positions: Arrays, numbers and sizes of `Positions`, or `None`. terms: `ScoreTerms` of
        score_terms.py, or `None`.
        """
        config, width = self.config, self.config.head_dim
        q, k, v, out = by_tiles(tensors)
        q_layout = smem_layout(self.dtype, 64, width, config.warpgroups * config.q_stages)
        kv_layout = smem_layout(self.dtype, config.tile_n, width, config.kv_stages)
        o_layout = smem_layout(self.dtype, 64, config.o_columns, config.warpgroups)
        load, store = LOAD(), STORE()
        loaded = kv_layout
        if cutlass.const_expr(config.gathers):
            loaded = box_layout(config, self.dtype)
        self.kernel(
            (tma(load, q, q_layout), tma(load, k, loaded), tma(load, v, loaded)),
            None if config.direct_store else tma(store, out, o_layout),
            (q_layout, kv_layout, o_layout),
            self._tiled_mmas(),
            lists,
            positions,
            results,
            cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
            scale_log2,
            terms,
            self._storage(q_layout, kv_layout, o_layout),
        ).launch(
            grid=(num_ctas, 1, 1),
            block=(128 + config.slots * self.consumers, 1, 1),
            stream=stream,
            min_blocks_per_mp=config.resident_ctas,
            # All for shared memory: the DSL would ask a driver for the size.
            preferred_smem_carveout=100 if config.resident_ctas > 1 else None,
        )

    @cute.kernel
    def kernel(
        self,
        loads,  # (TMA atom, tensor) of q, k, v
        store,  # (TMA atom, tensor) of out, or None
        layouts,
        tiled_mmas,
        lists,
        positions,
        results,
        group_size: Int32,  # q heads for each kv head
        scale_log2: Float32,
        terms,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, then run the role of the warp."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in loads if config.direct_store else (*loads, store):
                cpasync.prefetch_descriptor(atom)
        slot = self._slot(warp_idx)
        smem, (*pipes, work_pipe) = self._of_slot(storage, layouts, slot)
        q_layout, kv_layout, o_layout = layouts
        sQ, sK, sV = (
            smem_tensor(field, layout)
            for field, layout in ((smem.q, q_layout), (smem.k, kv_layout), (smem.v, kv_layout))
        )
        sO = None if config.direct_store else smem_tensor(smem.o, o_layout)
        words = config.tiles_per_step + 1  # bit tiles, and the number of keys
        shape = (config.kv_stages, words)
        sTiles = smem.tiles.get_tensor(cute.make_layout(shape, stride=(words, 1)))
        windows = columns = None
        if cutlass.const_expr(config.distance_bias):
            sWindows = smem.windows.get_tensor(window_layout(config.tile, config.kv_stages))
            windows = DistanceWindows(ScoreTerms(*terms), sWindows, config.tile)
        elif cutlass.const_expr(config.alibi):
            columns = smem_tensor(smem.windows, columns_layout(self.dtype, config.tile_n))
            fill_columns(columns)
            cute.arch.sync_threads()
        kv_lens, work, tiles, bits, counter, counts = lists
        work_tiles = WorkList(work, counter, counts, smem.work, work_pipe, config.slots, slot)
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(config.producer_registers)
            if warp_idx < config.slots:
                inputs = (kv_lens, tiles, group_size)
                outside = (sTiles, pipes, work_tiles, inputs, positions_of(config, positions))
                if cutlass.const_expr(config.gathers):
                    boxes = (
                        smem_tensor(x, box_layout(config, self.dtype)) for x in (smem.k, smem.v)
                    )
                    GatherProducer(config, loads, (sQ, *boxes), *outside).run()
                else:
                    ForwardProducer(config, loads, (sQ, sK, sV), *outside, windows).run()
        else:
            cute.arch.setmaxregister_increase(config.consumer_registers)
            outside = (store, (sQ, sK, sV, sO, sTiles), pipes, work_tiles, bits, results)
            of_scores = None
            if cutlass.const_expr(config.scored):
                of_scores = (ScoreTerms(*terms), windows if columns is None else columns, kv_lens)
                if cutlass.const_expr(config.offsets):  # kv_starts and the number of keys
                    of_scores = (*of_scores, positions[0][2], positions[2][3])
            ForwardConsumer(config, self.dtype, tiled_mmas, *outside, scale_log2, of_scores).run()

    def _tiled_mmas(self):
        """Tiled MMAs of S = Q K^T (Q in shared memory), S (Q in registers), O += P V (P in
        registers), and of one epilogue store.
        """
        config, of_p = self.config, {"a_source": warpgroup.OperandSource.RMEM}
        columns = OperandMajorMode.MN
        mma_qk = make_tiled_mma(self.dtype, (64, config.tile_n))
        mma_pv = make_tiled_mma(self.dtype, (64, config.head_dim), b_mode=columns, **of_p)
        mma_store = make_tiled_mma(self.dtype, (64, config.o_columns), b_mode=columns, **of_p)
        mma_qk_rs = make_tiled_mma(self.dtype, (64, config.tile_n), **of_p)
        return mma_qk, mma_qk_rs, mma_pv, mma_store

    def _storage(self, q_layout, kv_layout, o_layout):
        config = self.config
        window_memory = window_storage(config.tile, config.kv_stages if config.distance_bias else 0)
        if config.alibi:
            window_memory = tile_storage(self.dtype, columns_layout(self.dtype, config.tile_n))
        o_storage = tile_storage(self.dtype, o_layout)
        if cutlass.const_expr(config.direct_store):
            o_storage = cute.struct.MemRange[Float32, 0]

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.kv_stages)
            v_barriers: barrier_storage(config.kv_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.kv_stages * (config.tiles_per_step + 1)]
            q: tile_storage(self.dtype, q_layout)
            k: tile_storage(self.dtype, kv_layout)
            v: tile_storage(self.dtype, kv_layout)
            o: o_storage
            windows: window_memory

        return Storage

    @cute.jit
    def _slot(self, warp_idx):
        """Slot of a consumer warp, or of one of the first warps, which produce."""
        slot = Int32(0)
        if cutlass.const_expr(self.config.slots > 1):
            slot = warp_idx
            if warp_idx >= 4:
                slot = (warp_idx // 4 - 1) // self.config.warpgroups
            slot = cute.arch.make_warp_uniform(slot)
        return slot

    def _of_slot(self, storage, layouts, slot):
        """Shared memory and pipelines of a slot. Sets up the pipelines of all slots."""
        slots = self.config.slots
        size = -(-storage.size_in_bytes() // 1024) * 1024
        start = cutlass.utils.SmemAllocator().allocate(slots * size, 1024)
        pipes = [self._pipelines(storage(start + i * size), layouts) for i in range(slots)]
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if cutlass.const_expr(slots == 1):
            return storage(start), pipes[0]
        offset = cute.assume(slot * size, divby=1024)
        return storage(start + offset), [moved_pipeline(pipe, offset) for pipe in pipes[0]]

    def _pipelines(self, smem, layouts):
        """Pipelines: Q, K, V (filled by TMA), and work tiles (filled by the producer)."""
        config, warps = self.config, self.consumers // 32
        queries = tile_bytes(layouts[0], self.dtype, config.warpgroups)
        keys = tile_bytes(layouts[1], self.dtype)
        check_arrivals("items", {"consumers": 32 * warps}, WARPGROUP * config.warpgroups)
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries)
        windows = window_bytes(config.tile) if config.distance_bias else 0
        k = tma_pipeline(smem.k_barriers, config.kv_stages, warps, keys + windows)
        v = tma_pipeline(smem.v_barriers, config.kv_stages, warps, keys)
        work = work_pipeline(smem.work_barriers, self.consumers)
        return q, k, v, work
