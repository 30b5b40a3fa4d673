"""The loading and the storing warps of the backward kernel."""

import cutlass
from cutlass import Int32, const_expr, cute, pipeline
from sparse_flash.kernels.sm90.items import BackwardBarrier, ColumnItem, no_more
from sparse_flash.kernels.sm90.primitives import check_arrivals, tma_load, tma_store

PRODUCER = pipeline.PipelineUserType.Producer
CONSUMER = pipeline.PipelineUserType.Consumer
STORE_THREADS = 128 + 32  # a warpgroup and its storing warp
# Of a chunk of dQ's sums: nobody has come to it; somebody is storing the first addend; it is there.
FREE, BEGUN, READY = range(3)


class BackwardProducer:
    """The loads: of an item K and V once; of each of its tiles Q, the rows' statistics, and dO.

    In the order in which there is room: K is needed to the end of the item before, unless it has
    two stages, and V nearly so long.
    """

    def __init__(self, config, loads, buffers, s_tiles, pipes, items, inputs):
        self.config, self.s_tiles, self.items = config, s_tiles, items
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        self.kv_lens, self.tiles, self.heads, self.offsets = inputs

    @cute.jit
    def run(self):
        """Until the list is empty; then tell the others."""
        config = self.config
        q_state = pipeline.make_pipeline_state(PRODUCER, config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, config.k_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, config.v_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.items.pipe.num_stages)
        index = cute.arch.block_idx()[0]
        while index < self.items.counts[0]:
            n_block, head, batch = (self.items.work[index, i] for i in range(3))
            first, count, part = (self.items.work[index, i] for i in range(3, 6))
            limit = self.kv_lens[batch]
            if const_expr(config.offsets):
                limit = self.offsets.limit(limit, batch)
            remaining = limit - n_block * config.tile_n
            item = ColumnItem(n_block, head, batch, count, part, first, remaining)
            self.items.announce(work_state, item)
            work_state.advance()
            if count > 0 and remaining > 0:
                place = (n_block, head, batch)
                if const_expr(config.k_stages > 1):
                    self.load_keys(2, self.k_pipe, k_state, place)
                self.load_queries(q_state, first, head, batch)
                q_state.advance()
                self.load_keys(3, self.v_pipe, v_state, place)
                v_state.advance()
                if const_expr(config.k_stages == 1):
                    self.load_keys(2, self.k_pipe, k_state, place)
                k_state.advance()
                for j in cutlass.range(1, count - 1, unroll=1):
                    self.load_queries(q_state, first + j, head, batch)
                    q_state.advance()
            index = self.items.next_index()
            if count > 1 and remaining > 0:
                self.load_queries(q_state, first + count - 1, head, batch)
                q_state.advance()
        self.items.announce(work_state, no_more(ColumnItem, count=Int32(-1)))
        self.items.leave()

    @cute.jit
    def load_keys(self, which: cutlass.Constexpr, pipe, state, place):
        """K (2) or V (3)."""
        pipe.producer_acquire(state)
        barrier = pipe.producer_get_barrier(state)
        start = self.offsets.keys(place[2]) if const_expr(self.config.offsets) else None
        tma_load(self.loads[which], self.buffers[which], place, state.index, barrier, start)

    @cute.jit
    def load_queries(self, state, tile, kv_head, batch):
        """Q, statistics and dO of a tile, and what to mask in it."""
        m_block, bit_tile = self.tiles[tile, 0], self.tiles[tile, 1]
        m_block, head = query_place(m_block, kv_head, self.heads)
        place, start = (m_block, head, batch), None
        if const_expr(self.config.offsets):
            start = self.offsets.queries(batch)
        self.q_pipe.sync_object_empty.wait(state.index, state.phase)
        s_tiles, barrier = self.s_tiles, self.q_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            s_tiles[state.index] = bit_tile
            # This arrival releases what was just written.
            size = self.q_pipe.sync_object_full.tx_count
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)
        tma_load(self.loads[0], self.buffers[0], place, state.index, barrier, start)
        tma_load(self.loads[4], self.buffers[4], place, state.index, barrier)
        self.do_pipe.producer_acquire(state)
        barrier = self.do_pipe.producer_get_barrier(state)
        tma_load(self.loads[1], self.buffers[1], place, state.index, barrier, start)


class BackwardStorer:
    """Adds what a warpgroup puts into shared memory, its part of dQ of tile after tile, to sums in
    32 bits in memory; and stores its part of dV and dK before dQ of an item's last tile.

    The first CTA at a chunk of sums stores instead of adding, so that no chunk needs clearing. A
    flag in memory says whether that store has begun or is done. Later CTAs wait for it; the first
    one never waits, so there is no deadlock.
    """

    def __init__(self, config, stores, dq_sum, done, buffers, rooms, items, inputs, group):
        self.config, self.items, self.group, self.stores = config, items, group, stores
        self.rooms = rooms  # a barrier for each buffer: it has been read
        self.dq_sum, self.done, (self.s_dq, self.s_results) = dq_sum, done, buffers
        self.tiles, self.heads, self.offsets = inputs

    @cute.jit
    def run(self):
        """Item after item, until there are no more."""
        state = pipeline.make_pipeline_state(CONSUMER, self.items.pipe.num_stages)
        buffer = Int32(0)
        self.give_room(buffer)
        item = self.items.take(state, ColumnItem)
        state.advance()
        while item.count >= 0:
            n_block, head, batch, count, part, first, remaining = item
            end = first + count if remaining > 0 else first
            for tile in cutlass.range(first, end - 1, unroll=1):
                buffer = self.add_tile(tile, head, batch, buffer)
            if part < 0:
                buffer = self.store((2 * n_block + self.group, head, batch), buffer)
            if end > first:
                buffer = self.add_tile(end - 1, head, batch, buffer)
            item = self.items.take(state, ColumnItem)
            state.advance()
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def add_tile(self, tile, kv_head, batch, buffer):
        """The warpgroup's part of a tile of dQ to the sums. Returns the next buffer."""
        m_block, head = query_place(self.tiles[tile, 0], kv_head, self.heads)
        place = (batch, head, 2 * m_block + self.group)
        done = self.done.iterator + cute.crd2idx(place, self.done.layout)
        found = look(done)  # while the results are still being computed
        self.wait_for_results(buffer)
        if found != READY:
            found = self.come(done)
        cute.arch.fence_proxy("async.global")
        self.add(place, buffer, found)
        buffer = self.following(buffer)
        if found == FREE:
            self.count(done)
        return buffer

    @cute.jit
    def come(self, done):
        """Wait until this CTA may add to a chunk of sums. Returns FREE if it is to be the first."""
        found = Int32(0)
        if cute.arch.lane_idx() == 0:
            # Relaxed: what follows adds in the L2 cache and reads nothing that may be stale.
            found = cute.arch.atomic_max(done, Int32(BEGUN), sem="relaxed", scope="gpu")
        found = cute.arch.shuffle_sync(found, 0)
        if found == BEGUN:
            while look(done) != READY:
                pass
        return found

    @cute.jit
    def count(self, done):
        """Once what was added is there, say so."""
        cute.arch.cp_async_bulk_wait_group(0)
        if cute.arch.lane_idx() == 0:  # which has issued the additions
            cute.arch.fence_proxy("async.global")
            cute.arch.atomic_add(done, Int32(1), sem="release", scope="gpu")

    @cute.jit
    def add(self, place, buffer, found):
        """The buffer to a chunk of sums: one run of memory."""
        smem = self.s_dq[None, None, None, self.group, buffer].iterator
        sums = sum_address(self.dq_sum, place)
        if cute.arch.lane_idx() == 0:
            arguments = [sums, smem.toint(), Int32(4 * self.config.dq_chunk)]
            if found != FREE:
                kind = "s32" if const_expr(self.config.fixed) else "f32"
                cute.arch.inline_ptx(
                    f"cp.reduce.async.bulk.global.shared::cta.bulk_group.add.{kind} "
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
    def store(self, place, buffer):
        """The warpgroup's part of dV and dK, by TMA: what is beyond their ends is left out. Returns
        the next buffer.
        """
        size = self.config.results
        start = self.offsets.keys(place[2]) if const_expr(self.config.offsets) else None
        for i in cutlass.range_constexpr(0, 2, size):
            self.wait_for_results(buffer)
            for j in cutlass.range_constexpr(size):
                which = (self.group, buffer, j)
                tma_store(self.stores[i + j], self.s_results, which, place, start)
            cute.arch.cp_async_bulk_commit_group()
            buffer = self.following(buffer)
        return buffer

    @cute.jit
    def wait_for_results(self, buffer):
        """Until the warpgroup has filled the buffer."""
        check_arrivals("results", {"warpgroup": 128, "storing warp": 32}, STORE_THREADS)
        assert 2 * self.config.buffers <= BackwardBarrier.STAGGER - BackwardBarrier.READY
        cute.arch.barrier(
            barrier_id=BackwardBarrier.READY + 2 * buffer + self.group,
            number_of_threads=STORE_THREADS,
        )

    @cute.jit
    def following(self, buffer):
        """The next buffer, once it has been read; each is given just before its turn."""
        buffers = self.config.buffers
        cute.arch.cp_async_bulk_wait_group(buffers - 1, read=True)
        buffer = (buffer + 1) % buffers
        self.give_room(buffer)
        return buffer

    @cute.jit
    def give_room(self, buffer):
        """Tell the warpgroup that it may fill a buffer."""
        if cute.arch.lane_idx() == 0:  # which has issued what has read it
            cute.arch.mbarrier_arrive(self.rooms + (2 * buffer + self.group))


@cute.jit
def sum_address(dq_sum, place):
    """Where a chunk of dQ's sums begins: place = (batch, q head, chunk)."""
    return (dq_sum.iterator + cute.crd2idx((*place, 0), dq_sum.layout)).toint()


@cute.jit
def look(pointer):
    """A number that others change."""
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[pointer.toint()],
    )


@cute.jit
def query_place(column, kv_head, heads):
    """(m_block, q head) of a block column of the layout in which a group's q heads are stacked."""
    group_size, num_m_blocks = heads
    return column % num_m_blocks, kv_head * group_size + column // num_m_blocks
