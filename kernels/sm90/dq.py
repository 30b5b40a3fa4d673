"""The dQ kernel for Hopper: one work tile per query block, bitwise repeatable.

It follows the work list of the forward pass. Together with the backward kernel without dQ it needs
seven GEMMs instead of five, but no accumulation in memory.
"""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.combine import CombineGradients
from sparse_flash.kernels.position_work_tiles import positions_of
from sparse_flash.kernels.sm90.config import DqConfig
from sparse_flash.kernels.sm90.dq_consumer import DqConsumer
from sparse_flash.kernels.sm90.forward_producer import PRODUCER, ForwardProducer
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    STORE,
    WORK_STAGES,
    WorkList,
    barrier_storage,
    by_tiles,
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
from sparse_flash.kernels.work_tiles import KeyTile, end_of_work


class DqProducer(ForwardProducer):
    """Loads Q and dO once per work tile; K, then V, once per tile."""

    @cute.jit
    def run(self):
        """Process work tiles until the list is empty, then publish the end."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.work_tiles.pipe.num_stages)
        index = cute.arch.block_idx()[0]
        num_work_tiles = self.num_work_tiles()
        while index < num_work_tiles:
            load = self.begin(index, work_state)
            work_state.advance()
            self.load_q(q_state, load)
            q_state.advance()
            for j in cutlass.range(load.count, unroll=1):
                if j == cutlass.max(load.count - 2, 0):
                    index = self.work_tiles.next_index()
                n_block, bit_tile = self.tiles[load.first + j, 0], self.tiles[load.first + j, 1]
                head = load.head // self.group_size
                coord = KeyTile(n_block, head, load.batch, load.key_start)
                self.load_k(kv_state, coord, bit_tile, load)
                self.load_v(kv_state, coord)
                kv_state.advance()
        self.work_tiles.announce(work_state, end_of_work(self.work_tile_type))
        self.work_tiles.reset_counters()

    @cute.jit
    def load_q(self, state, load):
        """Load a stage of Q and dO: 64 rows for each warpgroup."""
        groups = self.config.warpgroups
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        for i in cutlass.range_constexpr(groups):
            self.load_rows(0, load, i, state, barrier)
            self.load_rows(3, load, i, state, barrier)


class DqSm90:
    """One compiled kernel. `config` holds its static parameters."""

    def __init__(self, config: DqConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype
        self.consumers = 128 * config.warpgroups

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        dout: cute.Tensor,  # (b, s_q, h, d)
        dq: cute.Tensor,  # (b, s_q, h, d)
        stats: cute.Tensor,  # (b, h, 2, s_q and more) float32: see preprocess.Preprocess
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        splits: cute.Tensor,  # (parts, tile_m, head_dim) float32
        combine: cute.Tensor,  # (rows, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: numbers of work tiles and of combined rows
        num_ctas: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream. See `Schedule` for work tiles and splits."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        scales = (softmax_scale, scale_log2)
        self.launch((q, k, v, dout, dq), lists, None, (stats, splits), num_ctas, scales, stream)
        if cute.size(combine, mode=[0]) > 0:
            total = CombineGradients(self.config.tile_m, self.config.head_dim, self.dtype)
            total((dq,), combine, counts, (splits,), stream)

    @cute.jit
    def launch(self, tensors, lists, positions, inputs, num_ctas: Int32, scales, stream):
        """Launch the attention kernel itself.

        positions: Arrays, numbers and sizes of `Positions`, or `None`.
        """
        config, width = self.config, self.config.head_dim
        q, k, v, dout, dq = by_tiles(tensors)
        q_layout = smem_layout(self.dtype, 64, width, config.warpgroups * config.q_stages)
        kv_layout = smem_layout(self.dtype, config.tile_n, width, config.kv_stages)
        o_layout = smem_layout(self.dtype, 64, config.o_columns, config.warpgroups)
        load, store = LOAD(), STORE()
        self.kernel(
            (
                tma(load, q, q_layout),
                tma(load, k, kv_layout),
                tma(load, v, kv_layout),
                tma(load, dout, q_layout),
            ),
            tma(store, dq, o_layout),
            (q_layout, kv_layout, o_layout),
            self._tiled_mmas(),
            lists,
            positions,
            inputs,
            cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
            scales,
            self._storage(q_layout, kv_layout, o_layout),
        ).launch(
            grid=(num_ctas, 1, 1),
            block=(128 + self.consumers, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        loads,  # (TMA atom, tensor) of q, k, v, dout
        store,  # (TMA atom, tensor) of dq
        layouts,
        tiled_mmas,
        lists,
        positions,
        inputs,  # stats and parts; with offsets q_pad, see BackwardAtSm90
        group_size: Int32,  # q heads for each kv head
        scales,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, then run the role of the warp."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in (*loads, store):
                cpasync.prefetch_descriptor(atom)
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        *pipes, work_pipe = self._pipelines(smem, layouts)
        q_layout, kv_layout, o_layout = layouts
        sQ, sdO, sK, sV, sO = (
            smem_tensor(field, layout)
            for field, layout in (
                (smem.q, q_layout),
                (smem.do, q_layout),
                (smem.k, kv_layout),
                (smem.v, kv_layout),
                (smem.o, o_layout),
            )
        )
        sTiles = smem.tiles.get_tensor(cute.make_layout((config.kv_stages, 2), stride=(2, 1)))
        kv_lens, work, tiles, bits, counter, counts = lists
        work_tiles = WorkList(work, counter, counts, smem.work, work_pipe)
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(config.producer_registers)
            if warp_idx == 0:
                buffers, given = (sQ, sK, sV, sdO), (kv_lens, tiles, group_size)
                outside = (sTiles, pipes, work_tiles, given, positions_of(config, positions))
                DqProducer(config, loads, buffers, *outside).run()
        else:
            cute.arch.setmaxregister_increase(config.consumer_registers)
            buffers = (sQ, sdO, sK, sV, sO, sTiles)
            outside = (store, buffers, pipes, work_tiles, bits, inputs)
            DqConsumer(config, self.dtype, tiled_mmas, *outside, scales).run()

    def _tiled_mmas(self):
        """Tiled MMAs of S and dP, of dQ += dS K with dS in registers, and of one epilogue store."""
        config, of_ds = self.config, {"a_source": warpgroup.OperandSource.RMEM}
        columns = OperandMajorMode.MN
        mma_s = make_tiled_mma(self.dtype, (64, config.tile_n))
        mma_dq = make_tiled_mma(self.dtype, (64, config.head_dim), b_mode=columns, **of_ds)
        mma_store = make_tiled_mma(self.dtype, (64, config.o_columns), b_mode=columns, **of_ds)
        return mma_s, mma_dq, mma_store

    def _storage(self, q_layout, kv_layout, o_layout):
        config = self.config

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.kv_stages)
            v_barriers: barrier_storage(config.kv_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.kv_stages * 2]
            q: tile_storage(self.dtype, q_layout)
            do: tile_storage(self.dtype, q_layout)
            k: tile_storage(self.dtype, kv_layout)
            v: tile_storage(self.dtype, kv_layout)
            o: tile_storage(self.dtype, o_layout)

        return Storage

    def _pipelines(self, smem, layouts):
        """Pipelines: Q with dO, K, V (filled by TMA), and work tiles."""
        config, warps = self.config, self.consumers // 32
        queries = 2 * tile_bytes(layouts[0], self.dtype, config.warpgroups)
        keys = tile_bytes(layouts[1], self.dtype)
        q = tma_pipeline(smem.q_barriers, config.q_stages, warps, queries)
        k = tma_pipeline(smem.k_barriers, config.kv_stages, warps, keys)
        v = tma_pipeline(smem.v_barriers, config.kv_stages, warps, keys)
        work = work_pipeline(smem.work_barriers, self.consumers)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, k, v, work
