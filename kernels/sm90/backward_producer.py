"""The producer warp and the store warps of the backward kernel."""

import cutlass
from cutlass import Int32, const_expr, cute, pipeline
from sparse_flash.kernels.sm90.barriers import BackwardBarrier
from sparse_flash.kernels.sm90.primitives import (
    check_arrivals,
    single_stage,
    tma_load,
    tma_store,
)
from sparse_flash.kernels.work_tiles import (
    ColumnWorkTile,
    end_of_work,
    first_step,
    query_coord,
    tile_of_step,
)

PRODUCER = pipeline.PipelineUserType.Producer
CONSUMER = pipeline.PipelineUserType.Consumer
STORE_THREADS = 128 + 32  # a warpgroup and its storing warp
# States of a chunk of dQ's sums: untouched; first addend being stored; ready for additions.
FREE, BEGUN, READY = range(3)


class BackwardProducer:
    """Loads K and V once per work tile; Q, row statistics and dO once per tile.

    The order follows the release of the stages: K is used until the end of the previous work tile,
    unless it has two stages, and V nearly as long.
    """

    def __init__(self, config, loads, buffers, sTiles, pipes, work_tiles, inputs, windows=None):
        self.config, self.sTiles, self.work_tiles = config, sTiles, work_tiles
        self.windows = windows  # DistanceWindows; only with `config.distance_bias`
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        self.kv_lens, self.tiles, self.heads, self.offsets = inputs

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
            limit = self.kv_lens[batch]
            if const_expr(config.offsets):
                limit = self.offsets.limit(limit, batch)
            remaining = limit - n_block * config.tile_n
            work_tile = ColumnWorkTile(n_block, head, batch, count, split_idx, first, remaining)
            start = first_step(config, work_tile, self.heads[0])
            self.work_tiles.announce(work_state, work_tile)
            work_state.advance()
            if count > 0 and remaining > 0:
                coord = (n_block, head, batch)
                if const_expr(config.k_stages > 1):
                    self.load_keys(2, self.k_pipe, k_state, coord)
                self.load_queries(q_state, tile_of_step(config, work_tile, start, 0), coord)
                q_state.advance()
                self.load_keys(3, self.v_pipe, v_state, coord)
                v_state.advance()
                if const_expr(config.k_stages == 1):
                    self.load_keys(2, self.k_pipe, k_state, coord)
                k_state.advance()
                for j in cutlass.range(1, count - 1, unroll=1):
                    self.load_queries(q_state, tile_of_step(config, work_tile, start, j), coord)
                    q_state.advance()
            index = self.work_tiles.next_index()
            if count > 1 and remaining > 0:
                last = tile_of_step(config, work_tile, start, count - 1)
                self.load_queries(q_state, last, (n_block, head, batch))
                q_state.advance()
        self.work_tiles.announce(work_state, end_of_work(ColumnWorkTile, count=Int32(-1)))
        self.work_tiles.reset_counters()

    @cute.jit
    def load_keys(self, which: cutlass.Constexpr, pipe, state, coord):
        """Load K (2) or V (3)."""
        pipe.producer_acquire(state)
        barrier = pipe.producer_get_barrier(state)
        start = self.offsets.keys(coord[2]) if const_expr(self.config.offsets) else None
        tma_load(self.loads[which], self.buffers[which], coord, state.index, barrier, start)

    @cute.jit
    def load_queries(self, state, tile, coord_of_keys):
        """Load Q, row statistics and dO of a tile, and publish its bit tile."""
        n_block, kv_head, batch = coord_of_keys
        m_block, bit_tile = self.tiles[tile, 0], self.tiles[tile, 1]
        m_block, head = query_coord(m_block, kv_head, self.heads)
        coord, start = (m_block, head, batch), None
        if const_expr(self.config.offsets):
            start = self.offsets.queries(batch)
        self.q_pipe.sync_object_empty.wait(state.index, state.phase)
        sTiles, barrier = self.sTiles, self.q_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            sTiles[state.index, 0] = bit_tile
            if const_expr(self.config.placed):
                pair = batch * cute.size(self.loads[0][1], mode=[2]) + head
                query, key = m_block * self.config.tile_m, n_block * self.config.tile_n
                for i, place in enumerate((query, key, head, pair)):
                    sTiles[state.index, 1 + i] = place
            # This arrival releases the store above.
            size = self.q_pipe.sync_object_full.tx_count
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)
            if const_expr(self.config.distance_bias):
                row, column = n_block * self.config.tile_n, m_block * self.config.tile_m
                self.windows.load(head, row, column, state.index, barrier)
        tma_load(self.loads[0], self.buffers[0], coord, state.index, barrier, start)
        tma_load(self.loads[4], self.buffers[4], coord, state.index, barrier)
        if const_expr(self.config.do_stages < self.config.q_stages):
            state = single_stage(state)
        self.do_pipe.producer_acquire(state)
        barrier = self.do_pipe.producer_get_barrier(state)
        tma_load(self.loads[1], self.buffers[1], coord, state.index, barrier, start)


class BackwardStorer:
    """Adds a warpgroup's chunks of dQ from shared memory to float32 sums in global memory.

    It also stores the warpgroup's dV and dK, before dQ of the last tile of a work tile. The first
    CTA at a chunk stores instead of adding, so no kernel clears the sums. A flag in global memory
    tells whether that store has begun or is done. Later CTAs wait for it. The first one never
    waits, so there is no deadlock.
    """

    def __init__(
        self, config, stores, dq_sum, done, buffers, buffer_free, work_tiles, inputs, group
    ):
        self.config, self.work_tiles, self.group, self.stores = config, work_tiles, group, stores
        self.buffer_free = buffer_free  # one barrier per buffer: the buffer has been read
        self.dq_sum, self.done, (self.sdQ, self.sdKV) = dq_sum, done, buffers
        self.tiles, self.heads, self.offsets = inputs

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        config = self.config
        state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        buffer = Int32(0)
        self.release_buffer(buffer)
        work_tile = self.work_tiles.take(state, ColumnWorkTile)
        state.advance()
        while work_tile.count >= 0:
            n_block, head, batch, count, split_idx, _, remaining = work_tile
            count = count if remaining > 0 else Int32(0)
            start = first_step(config, work_tile, self.heads[0])
            for j in cutlass.range(0, count - 1, unroll=1):
                tile = tile_of_step(config, work_tile, start, j)
                buffer = self.add_tile(tile, head, batch, buffer)
            if split_idx < 0:
                buffer = self.store((2 * n_block + self.group, head, batch), buffer)
            if count > 0:
                tile = tile_of_step(config, work_tile, start, count - 1)
                buffer = self.add_tile(tile, head, batch, buffer)
            work_tile = self.work_tiles.take(state, ColumnWorkTile)
            state.advance()
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def add_tile(self, tile, kv_head, batch, buffer):
        """Add the warpgroup's chunk of dQ of a tile to the sums. Returns the next buffer."""
        m_block, head = query_coord(self.tiles[tile, 0], kv_head, self.heads)
        coord = (batch, head, 2 * m_block + self.group)
        done = self.done.iterator + cute.crd2idx(coord, self.done.layout)
        found = load_relaxed(done)  # overlaps the computation of the chunk
        self.wait_until_filled(buffer)
        if found != READY:
            found = self.claim_chunk(done)
        cute.arch.fence_proxy("async.global")
        self.add(coord, buffer, found)
        buffer = self.following(buffer)
        if found == FREE:
            self.mark_ready(done)
        return buffer

    @cute.jit
    def claim_chunk(self, done):
        """Wait until this CTA may add to a chunk. Returns FREE if this CTA is the first one."""
        found = Int32(0)
        if cute.arch.lane_idx() == 0:
            # Relaxed: the additions below happen in the L2 cache and read no stale data.
            found = cute.arch.atomic_max(done, Int32(BEGUN), sem="relaxed", scope="gpu")
        found = cute.arch.shuffle_sync(found, 0)
        if found == BEGUN:
            while load_relaxed(done) != READY:
                pass
        return found

    @cute.jit
    def mark_ready(self, done):
        """Mark a chunk READY once its first addend is visible."""
        cute.arch.cp_async_bulk_wait_group(0)
        if cute.arch.lane_idx() == 0:  # the lane that issued the store
            cute.arch.fence_proxy("async.global")
            cute.arch.atomic_add(done, Int32(1), sem="release", scope="gpu")

    @cute.jit
    def add(self, coord, buffer, found):
        """Add a buffer to a chunk of sums, or store it there."""
        smem = self.sdQ[None, None, None, self.group, buffer].iterator
        self.bulk(sum_address(self.dq_sum, coord), smem, 4 * self.config.dq_chunk, found)

    @cute.jit
    def bulk(self, sums, smem, size: cutlass.Constexpr, found):
        """Issue the bulk store (FREE) or bulk reduction of a buffer of `size` bytes."""
        if cute.arch.lane_idx() == 0:
            arguments = [sums, smem.toint(), Int32(size)]
            if found != FREE:
                operand_type = "s32" if const_expr(self.config.fixed_point) else "f32"
                cute.arch.inline_ptx(
                    f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{operand_type} "
                    "[{$r0}], [{$r1}], {$r2};",
                    read_only_args=arguments,
                )
            else:
                cute.arch.inline_ptx(
                    "cp.async.bulk.global.shared::cta.bulk_group [{$r0}], [{$r1}], {$r2};",
                    read_only_args=arguments,
                )
        cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def publish_rows(self, done, begun):
        """As `mark_ready`, with states whose bit `begun` << 16 tells that a part is stored."""
        cute.arch.cp_async_bulk_wait_group(0)
        if cute.arch.lane_idx() == 0:  # the lane that issued the store
            cute.arch.fence_proxy("async.global")
            cute.arch.atomic_or(done, begun << 16, sem="release", scope="gpu")

    @cute.jit
    def store(self, coord, buffer):
        """Store the warpgroup's dV and dK by TMA, which drops rows out of bounds.

        Returns the next buffer.
        """
        size = self.config.results
        start = self.offsets.keys(coord[2]) if const_expr(self.config.offsets) else None
        for i in cutlass.range_constexpr(0, 2, size):
            self.wait_until_filled(buffer)
            for j in cutlass.range_constexpr(size):
                which = (self.group, buffer, j)
                tma_store(self.stores[i + j], self.sdKV, which, coord, start)
            cute.arch.cp_async_bulk_commit_group()
            buffer = self.following(buffer)
        return buffer

    @cute.jit
    def wait_until_filled(self, buffer):
        """Block until the warpgroup has filled the buffer."""
        check_arrivals("results", {"warpgroup": 128, "storing warp": 32}, STORE_THREADS)
        assert 2 * self.config.buffers <= BackwardBarrier.STAGGER - BackwardBarrier.READY
        cute.arch.barrier(
            barrier_id=BackwardBarrier.READY + 2 * buffer + self.group,
            number_of_threads=STORE_THREADS,
        )

    @cute.jit
    def following(self, buffer):
        """Release the next buffer as soon as its last store has read it. Returns its index."""
        buffers = self.config.buffers
        cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
        buffer = (buffer + 1) % buffers
        self.release_buffer(buffer)
        return buffer

    @cute.jit
    def release_buffer(self, buffer):
        """Arrive at the barrier that lets the warpgroup fill a buffer."""
        if cute.arch.lane_idx() == 0:  # the lane that issued the store
            cute.arch.mbarrier_arrive(self.buffer_free + (2 * buffer + self.group))


@cute.jit
def sum_address(dq_sum, coord):
    """Address of a chunk of dQ's sums; coord = (batch, q head, chunk)."""
    return (dq_sum.iterator + cute.crd2idx((*coord, 0), dq_sum.layout)).toint()


@cute.jit
def load_relaxed(pointer):
    """Relaxed load of a flag that other CTAs write."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[pointer.toint()],
    )
