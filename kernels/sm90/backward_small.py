"""The backward kernel for small blocks on Hopper: 64 keys of one work tile, in one warpgroup.

`BackwardSm90` shares tiles of queries between two warpgroups with 64 keys each. Where neighboring
blocks of keys see different queries, most of these tiles are half empty. Here a CTA has one
consumer warpgroup, and two CTAs share a multiprocessor: while one waits or computes exponentials,
the other one's GEMMs run. Work tiles, splits and results are those of `BackwardSm90`.

A step takes 64 queries, in one tile of the schedule or in several, whose queries need not be
neighbors: each has its own loads of Q, dO and row statistics, and its own rows of dQ. Each warp
adds its rows of dQ to memory by bulk reductions from shared memory. Where there is no memory for
them, they take the place of dO of the step.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from sparse_flash.kernels.sm90.backward import BackwardSm90
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.backward_producer import PRODUCER, BackwardProducer
from sparse_flash.kernels.sm90.backward_small_consumer import SmallConsumer
from sparse_flash.kernels.sm90.forward_gather import NO_TILE
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
    tma_load,
    tma_pipeline,
    work_pipeline,
    work_storage,
)
from sparse_flash.kernels.work_tiles import ColumnWorkTile, end_of_work, query_coord

WARPS = 4  # of the consumer warpgroup, and of that of the producer
THREADS = 32 * 2 * WARPS


class BackwardSmallSm90(BackwardSm90):
    """One compiled kernel. `config` holds its static parameters."""

    def __init__(self, config: BackwardConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.small
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
        ds_layout = smem_layout(self.dtype, n, m, config.ds_stages)
        boxes, stats_boxes = self._boxes()
        loaded = ((q, boxes), (dout, boxes), (k, k_layout), (v, v_layout), (stats, stats_boxes))
        self.kernel(
            tuple(tma(LOAD(), *tensor_and_layout) for tensor_and_layout in loaded),
            results,
            (q_layout, k_layout, v_layout, ds_layout),
            self._tiled_mmas(),
            lists,
            (
                cute.size(q, mode=[2]) // cute.size(k, mode=[2]),
                cute.ceil_div(cute.size(q, mode=[0]), config.query_block),
            ),
            scales,
            self._storage(q_layout, k_layout, v_layout, ds_layout),
        ).launch(
            grid=(num_ctas, 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=config.resident_ctas,
            preferred_smem_carveout=100,  # all: the DSL would ask a driver for the size
        )

    def _boxes(self):
        """Layouts of the stages of Q or dO, and of row statistics, as boxes that a TMA load fills.

        In a stage, for each `box_columns` columns: the boxes of all tiles.
        """
        config = self.config
        rows, tiles = config.query_block, config.tiles_per_step * config.q_stages
        boxes = config.head_dim // config.box_columns * tiles
        statistics = cute.make_layout((rows, 2, tiles), stride=(1, rows, 2 * rows))
        return smem_layout(self.dtype, rows, config.box_columns, boxes), statistics

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
        sQ, sdO, sK, sV, sdS = (
            smem_tensor(field, layout)
            for field, layout in (
                (smem.q, layouts[0]),
                (smem.do, layouts[0]),
                (smem.k, layouts[1]),
                (smem.v, layouts[2]),
                (smem.ds, layouts[3]),
            )
        )
        boxes, stats_boxes = self._boxes()
        sStats = smem.stats.get_tensor(stats_boxes)
        words = 3 * config.tiles_per_step
        shape = (config.q_stages, words)
        sTiles = smem.tiles.get_tensor(cute.make_layout(shape, stride=(words, 1)))
        kv_lens, work, tiles, bits, counter, counts = lists
        work_tiles = WorkList(work, counter, counts, smem.work, work_pipe)
        if warp_idx < WARPS:
            cute.arch.setmaxregister_decrease(config.registers[0])
            if warp_idx == 0:
                inputs = (kv_lens, tiles, heads, None)
                of_queries = (smem_tensor(x, boxes) for x in (smem.q, smem.do))
                outside = ((*of_queries, sK, sV, sStats), sTiles, pipes, work_tiles, inputs)
                SmallProducer(config, loads, *outside).run()
        else:
            cute.arch.setmaxregister_increase(config.registers[1])
            buffers = (sQ, sdO, sK, sV, sdS, self._staging(smem))
            outside = (buffers, (sStats, sTiles), pipes, (work_tiles, bits), results, scales)
            SmallConsumer(config, self.dtype, tiled_mmas, *outside).run()

    def _staging(self, smem):
        """Buffers of dQ: (four numbers, lane, 8 columns, buffer, warp, stage)."""
        config = self.config
        storage, stages = (smem.do, config.q_stages) if config.stage_in_do else (smem.dq, 1)
        shape = (4, 32, config.staged_columns // 8, config.buffers, WARPS)
        layout = cute.append(
            cute.make_ordered_layout(shape, order=(0, 1, 2, 3, 4)),
            cute.make_layout(stages, stride=config.tile_m * config.head_dim // 2),
        )
        return cute.make_tensor(cute.recast_ptr(storage.data_ptr(), dtype=Float32), layout)

    def _tiled_mmas(self):
        """Tiled MMAs of S (K in shared memory), S (K in registers), dK and dV (P' and dS' in
        registers), and dQ.
        """
        config, columns = self.config, OperandMajorMode.MN
        registers = {"a_source": warpgroup.OperandSource.RMEM}
        mma_s = make_tiled_mma(self.dtype, (64, config.tile_m))
        mma_s_rs = make_tiled_mma(self.dtype, (64, config.tile_m), **registers)
        mma_dkv = make_tiled_mma(self.dtype, (64, config.head_dim), b_mode=columns, **registers)
        mma_dq = make_tiled_mma(self.dtype, (64, config.small_dq_columns), columns, columns)
        return mma_s, mma_s_rs, mma_dkv, mma_dq

    def _storage(self, q_layout, k_layout, v_layout, ds_layout):
        config, dtype = self.config, self.dtype

        @cute.struct
        class Storage:
            q_barriers: barrier_storage(config.q_stages)
            do_barriers: barrier_storage(config.q_stages)
            k_barriers: barrier_storage(config.k_stages)
            v_barriers: barrier_storage(config.v_stages)
            work_barriers: barrier_storage(WORK_STAGES)
            work: work_storage()
            tiles: cute.struct.MemRange[Int32, config.q_stages * 3 * config.tiles_per_step]
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.q_stages], 128
            ]
            q: tile_storage(dtype, q_layout)
            do: tile_storage(dtype, q_layout)
            k: tile_storage(dtype, k_layout)
            v: tile_storage(dtype, v_layout)
            ds: tile_storage(dtype, ds_layout)
            dq: cute.struct.Align[
                cute.struct.MemRange[Float32, 0 if config.stage_in_do else config.dq_staging // 4],
                128,
            ]

        return Storage

    def _pipelines(self, smem, layouts):
        """Pipelines: Q with its row statistics, dO, K, V (by TMA), and work tiles."""
        config = self.config
        queries, keys = (tile_bytes(layouts[i], self.dtype) for i in range(2))
        statistics = 2 * config.tile_m * Float32.width // 8
        q = tma_pipeline(smem.q_barriers, config.q_stages, WARPS, queries + statistics)
        do = tma_pipeline(smem.do_barriers, config.q_stages, WARPS, queries)
        k = tma_pipeline(smem.k_barriers, config.k_stages, WARPS, keys)
        v = tma_pipeline(smem.v_barriers, config.v_stages, WARPS, keys)
        check_arrivals("the whole CTA", {"loading": 128, "consumers": 128}, THREADS)
        work = work_pipeline(smem.work_barriers, 128)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return q, do, k, v, work


class SmallProducer(BackwardProducer):
    """Loads K and V once per work tile; Q, row statistics and dO once per step.

    In the first `tiles_per_step` lanes, coordinates of queries are those of the lane's tile.
    """

    @cute.jit
    def run(self):
        """Process work tiles until the list is empty, then publish the end."""
        config = self.config
        q_state = pipeline.make_pipeline_state(PRODUCER, config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, config.k_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, config.v_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.work_tiles.pipe.num_stages)
        index = cute.arch.block_idx()[0]
        while index < self.work_tiles.counts[0]:
            n_block, head, batch = (self.work_tiles.work[index, i] for i in range(3))
            first, count, split_idx = (self.work_tiles.work[index, i] for i in range(3, 6))
            remaining = self.kv_lens[batch] - n_block * config.tile_n
            steps = cute.ceil_div(count, config.tiles_per_step)
            work_tile = ColumnWorkTile(n_block, head, batch, steps, split_idx, first, remaining)
            self.work_tiles.announce(work_state, work_tile)
            work_state.advance()
            if count > 0 and remaining > 0:
                coord = (n_block, head, batch)
                if const_expr(config.k_stages > 1):
                    self.load_keys(2, self.k_pipe, k_state, coord)
                self.load_step(q_state, first, Int32(0), count, coord)
                q_state.advance()
                self.load_keys(3, self.v_pipe, v_state, coord)
                v_state.advance()
                if const_expr(config.k_stages == 1):
                    self.load_keys(2, self.k_pipe, k_state, coord)
                k_state.advance()
                for j in cutlass.range(1, steps - 1, unroll=1):
                    self.load_step(q_state, first, j, count, coord)
                    q_state.advance()
            index = self.work_tiles.next_index()
            if steps > 1 and remaining > 0:
                self.load_step(q_state, first, steps - 1, count, (n_block, head, batch))
                q_state.advance()
        self.work_tiles.announce(work_state, end_of_work(ColumnWorkTile, count=Int32(-1)))
        self.work_tiles.reset_counters()

    @cute.jit
    def load_step(self, state, first, j, count, coord_of_keys):
        """Load Q, row statistics and dO of step j, and publish its tiles.

        Of each tile: its bit tile, its block of queries (negative: no tile), and its head.
        """
        size, lane, (_, kv_head, batch) = (
            self.config.tiles_per_step,
            cute.arch.lane_idx(),
            coord_of_keys,
        )
        nth = j * size + lane % size
        tile = first + cutlass.min(nth, count - 1)
        bit_tile = self.tiles[tile, 1]
        m_block, head = query_coord(self.tiles[tile, 0], kv_head, self.heads)
        published = m_block
        if nth >= count:  # TMA writes zeros
            m_block, bit_tile, published = self.heads[1], Int32(NO_TILE), Int32(-1)
        self.q_pipe.sync_object_empty.wait(state.index, state.phase)
        sTiles, barrier = self.sTiles, self.q_pipe.producer_get_barrier(state)
        values = [
            cute.arch.shuffle_sync(x, i) for x in (bit_tile, published, head) for i in range(size)
        ]
        if lane == 0:
            for i in cutlass.range_constexpr(3 * size):
                sTiles[state.index, i] = values[i]
            # This arrival releases the stores above.
            size_of_stage = self.q_pipe.sync_object_full.tx_count
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size_of_stage)
        coord = (m_block, head, batch)
        self.load_boxes(0, coord, state, barrier)
        for i in cutlass.range_constexpr(size):
            box = state.index * size + i
            tma_load(self.loads[4], self.buffers[4], self.of_lane(coord, i), box, barrier)
        self.do_pipe.producer_acquire(state)
        self.load_boxes(1, coord, state, self.do_pipe.producer_get_barrier(state))

    @cute.jit
    def of_lane(self, coord, i: cutlass.Constexpr):
        """The coordinates of lane i."""
        block, head = (cute.arch.make_warp_uniform(cute.arch.shuffle_sync(x, i)) for x in coord[:2])
        return block, head, coord[2]

    @cute.jit
    def load_boxes(self, which: cutlass.Constexpr, coord, state, barrier):
        """Load Q (0) or dO (1): a box for each tile and each part of the columns."""
        size, columns = self.config.tiles_per_step, self.config.box_columns
        (atom, tensor), smem = self.loads[which], self.buffers[which]
        chunks = self.config.head_dim // columns
        for i in cutlass.range_constexpr(size):
            block, head, batch = self.of_lane(coord, i)
            rows = (self.config.query_block, columns)
            tiles = cute.local_tile(tensor[None, None, head, batch], rows, (None, None))
            modes = (cute.group_modes(smem, 0, 2), cute.group_modes(tiles, 0, 2))
            to, of = cpasync.tma_partition(atom, 0, cute.make_layout(1), *modes)
            for chunk in cutlass.range_constexpr(chunks):
                box = (state.index * chunks + chunk) * size + i
                cute.copy(atom, of[None, block, chunk], to[None, box], tma_bar_ptr=barrier)
