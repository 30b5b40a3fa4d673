"""The kernel for Hopper that computes dQ by queries: by the forward's lists, repeatable to the bit.

Its products are seven with those of the backward kernel without dQ, instead of five together; but
nothing is summed up in memory.
"""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.sm90.config import QueriesConfig
from sparse_flash.kernels.sm90.elementwise import Sum
from sparse_flash.kernels.sm90.forward_producer import PRODUCER, Producer
from sparse_flash.kernels.sm90.items import KeyTile, no_more
from sparse_flash.kernels.sm90.position_items import positions_of
from sparse_flash.kernels.sm90.primitives import (
    LOAD,
    STORE,
    WORK_STAGES,
    WorkList,
    barriers,
    buffer,
    by_tiles,
    product,
    smem_layout,
    tensor_in,
    tile_bytes,
    tma,
    tma_ring,
    work_ring,
    work_room,
)
from sparse_flash.kernels.sm90.queries_consumer import QueriesConsumer


class QueriesProducer(Producer):
    """The loads: for each item Q and dO; for each of its tiles K, then V."""

    @cute.jit
    def run(self):
        """Until the list is empty; then tell the consumers."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.items.pipe.num_stages)
        index = cute.arch.block_idx()[0]
        num_items = self.num_items()
        while index < num_items:
            load = self.begin(index, work_state)
            work_state.advance()
            self.load_q(q_state, load)
            q_state.advance()
            for j in cutlass.range(load.count, unroll=1):
                if j == cutlass.max(load.count - 2, 0):
                    index = self.items.next_index()
                n_block, bit_tile = self.tiles[load.first + j, 0], self.tiles[load.first + j, 1]
                head = load.head // self.group_size
                place = KeyTile(n_block, head, load.batch, load.key_start)
                self.load_k(kv_state, place, bit_tile, load.limit)
                self.load_v(kv_state, place)
                kv_state.advance()
        self.items.announce(work_state, no_more(self.item_type))
        self.items.leave()

    @cute.jit
    def load_q(self, state, load):
        """A stage of Q and of dO is a tile of 64 rows for each warpgroup."""
        groups = self.config.warpgroups
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        for i in cutlass.range_constexpr(groups):
            self.load_rows(0, load, i, state, barrier)
            self.load_rows(3, load, i, state, barrier)


class QueriesSm90:
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: QueriesConfig, dtype: type[cutlass.Numeric]) -> None:
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
        stats: cute.Tensor,  # (b, h, 2, s_q and more) float32: see elementwise.Statistics
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros; left as zeros
        parts: cute.Tensor,  # (parts, tile_m, head_dim) float32
        combine: cute.Tensor,  # (rows, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: how many items and rows there are
        num_ctas: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream. See `Schedule` for the work items and the parts."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        scales = (softmax_scale, scale_log2)
        self.launch((q, k, v, dout, dq), lists, None, (stats, parts), num_ctas, scales, stream)
        if cute.size(combine, mode=[0]) > 0:
            total = Sum(self.config.tile_m, self.config.head_dim, self.dtype)
            total((dq,), combine, counts, (parts,), stream)

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
            self._products(),
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
        products,
        lists,
        positions,
        inputs,  # stats and parts; with offsets q_pad, see BackwardAtSm90
        group_size: Int32,  # q heads for each kv head
        scales,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory and barriers, then part ways."""
        config = self.config
        warp_idx = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp_idx == 0:
            for atom, _ in (*loads, store):
                cpasync.prefetch_descriptor(atom)
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        *pipes, work_pipe = self._pipelines(smem, layouts)
        q_layout, kv_layout, o_layout = layouts
        s_q, s_do, s_k, s_v, s_o = (
            tensor_in(room, layout)
            for room, layout in (
                (smem.q, q_layout),
                (smem.do, q_layout),
                (smem.k, kv_layout),
                (smem.v, kv_layout),
                (smem.o, o_layout),
            )
        )
        s_tiles = smem.tiles.get_tensor(cute.make_layout((config.kv_stages, 2), stride=(2, 1)))
        kv_lens, work, tiles, bits, counter, counts = lists
        items = WorkList(work, counter, counts, smem.work, work_pipe)
        if warp_idx < 4:
            cute.arch.setmaxregister_decrease(config.producer_registers)
            if warp_idx == 0:
                buffers, given = (s_q, s_k, s_v, s_do), (kv_lens, tiles, group_size)
                outside = (s_tiles, pipes, items, given, positions_of(config, positions))
                QueriesProducer(config, loads, buffers, *outside).run()
        else:
            cute.arch.setmaxregister_increase(config.consumer_registers)
            buffers = (s_q, s_do, s_k, s_v, s_o, s_tiles)
            outside = (store, buffers, pipes, items, bits, inputs)
            QueriesConsumer(config, self.dtype, products, *outside, scales).run()

    def _products(self):
        """S and dP; dQ += dS K, with dS in registers; and the part of dQ that leaves at a time."""
        config, of_ds = self.config, {"a_source": warpgroup.OperandSource.RMEM}
        columns = OperandMajorMode.MN
        scores = product(self.dtype, (64, config.tile_n))
        of_queries = product(self.dtype, (64, config.head_dim), b_mode=columns, **of_ds)
        chunk = product(self.dtype, (64, config.o_columns), b_mode=columns, **of_ds)
        return scores, of_queries, chunk

    def _storage(self, q_layout, kv_layout, o_layout):
        config = self.config

        @cute.struct
        class Storage:
            q_barriers: barriers(config.q_stages)
            k_barriers: barriers(config.kv_stages)
            v_barriers: barriers(config.kv_stages)
            work_barriers: barriers(WORK_STAGES)
            work: work_room()
            tiles: cute.struct.MemRange[Int32, config.kv_stages * 2]
            q: buffer(self.dtype, q_layout)
            do: buffer(self.dtype, q_layout)
            k: buffer(self.dtype, kv_layout)
            v: buffer(self.dtype, kv_layout)
            o: buffer(self.dtype, o_layout)

        return Storage

    def _pipelines(self, smem, layouts):
        """Rings of barriers: Q with dO, K, V (filled by TMA) and work items."""
        config, warps = self.config, self.consumers // 32
        queries = 2 * tile_bytes(layouts[0], self.dtype, config.warpgroups)
        keys = tile_bytes(layouts[1], self.dtype)
        q = tma_ring(smem.q_barriers, config.q_stages, warps, queries)
        k = tma_ring(smem.k_barriers, config.kv_stages, warps, keys)
        v = tma_ring(smem.v_barriers, config.kv_stages, warps, keys)
        work = work_ring(smem.work_barriers, self.consumers)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, k, v, work
