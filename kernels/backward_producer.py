"""The loading and the storing warp of the backward kernel."""

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync
from sparse_flash.kernels.primitives import tma_load

PRODUCER = pipeline.PipelineUserType.Producer
CONSUMER = pipeline.PipelineUserType.Consumer
# What the other warps know of an item: n_block, kv head, batch, tiles (negative: no more items),
# part, first tile, and how many keys there are from its first one on: where there are none, its
# tiles are left out.
ITEM_FIELDS = 7
# Named barriers of a warpgroup, for each of its buffers, and the storing warp: its results lie
# ready, or have been read.
READY_BARRIER, TAKEN_BARRIER = 2, 6
STORE_THREADS = 128 + 32
# Of a tile of dQ's sums: nobody has come to it; somebody is storing the first addend; it is there.
FREE, BEGUN, READY = range(3)
# After how many tiles of the next item all that an item has added is surely there.
SOME_TILES = 3
WHOLE = -1  # instead of a part


class BackwardProducer:
    """The loads: of an item K and V once; of each of its tiles Q, the rows' statistics, and dO.

    The first Q and dO come before K and V, because their room is free sooner: K and V are needed
    to the end of the item before.
    """

    def __init__(self, config, loads, buffers, s_tiles, pipes, items, inputs):
        self.config, self.s_tiles, self.items = config, s_tiles, items
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        self.kv_lens, self.tiles, self.heads = inputs

    @cute.jit
    def run(self):
        """Until the list is empty; then tell the others."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.items.pipe.num_stages)
        num_items = self.items.counts[0]
        # Conversions of dQ's sums wait for items: so none belongs to a CTA that may not be there
        # yet, the first ones neither.
        index = self.items.next_index() - cute.arch.grid_dim()[0]
        while index < num_items:
            n_block, head, batch = (self.items.work[index, i] for i in range(3))
            first, count, part = (self.items.work[index, i] for i in range(3, 6))
            remaining = self.kv_lens[batch] - n_block * self.config.tile_n
            item = (n_block, head, batch, count, part, first, remaining)
            self.items.announce(work_state, item)
            work_state.advance()
            index = self.items.next_index() - cute.arch.grid_dim()[0]
            if count > 0 and remaining > 0:
                self.load_queries(q_state, first, head, batch)
                q_state.advance()
                place = (n_block, head, batch)
                self.v_pipe.producer_acquire(kv_state)
                barrier = self.v_pipe.producer_get_barrier(kv_state)
                tma_load(self.loads[3], self.buffers[3], place, kv_state.index, barrier)
                self.k_pipe.producer_acquire(kv_state)
                barrier = self.k_pipe.producer_get_barrier(kv_state)
                tma_load(self.loads[2], self.buffers[2], place, kv_state.index, barrier)
                kv_state.advance()
                for j in cutlass.range(1, count, unroll=1):
                    self.load_queries(q_state, first + j, head, batch)
                    q_state.advance()
        none = Int32(0)
        self.items.announce(work_state, (none, none, none, Int32(-1), none, none, none))
        self.items.leave()

    @cute.jit
    def load_queries(self, state, tile, kv_head, batch):
        """Q, statistics and dO of a tile, and what to mask in it."""
        m_block, bit_tile = self.tiles[tile, 0], self.tiles[tile, 1]
        m_block, head = query_place(m_block, kv_head, self.heads)
        place = (m_block, head, batch)
        self.q_pipe.sync_object_empty.wait(state.index, state.phase)
        s_tiles, barrier = self.s_tiles, self.q_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            s_tiles[state.index] = bit_tile
            # This arrival releases what was just written.
            size = self.q_pipe.sync_object_full.tx_count
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size)
        tma_load(self.loads[0], self.buffers[0], place, state.index, barrier)
        tma_load(self.loads[4], self.buffers[4], place, state.index, barrier)
        self.do_pipe.producer_acquire(state)
        barrier = self.do_pipe.producer_get_barrier(state)
        tma_load(self.loads[1], self.buffers[1], place, state.index, barrier)


class BackwardStorer:
    """Takes what the warpgroups put into shared memory to where it belongs: dQ is added, tile by
    tile, to sums in float32; dV and dK of an item that is no part are stored.

    Who comes first to a tile of sums stores instead of adding, so that nobody needs to clear it;
    whether that is under way or done stands in memory. Those who come meanwhile wait for it: it
    waits for nobody.
    """

    def __init__(self, config, dq_sum, order, stores, buffers, items, inputs):
        self.config, self.items, self.dq_sum = config, items, dq_sum
        self.done, self.progress = order
        self.dk_store, self.dv_store = stores
        self.s_dq, self.s_out = buffers
        self.tiles, self.heads = inputs

    @cute.jit
    def run(self):
        """Item after item, until there are no more."""
        state = pipeline.make_pipeline_state(CONSUMER, self.items.pipe.num_stages)
        buffer = Int32(0)
        before = Int32(-1)  # the group of heads of the item before, if it is still to be counted
        groups = cute.size(self.progress, mode=[1]) - 1
        pairs = cute.size(self.dq_sum, mode=[0]) * self.heads[2]
        self.give_room(buffer)
        item = self.items.take(state, ITEM_FIELDS)
        state.advance()
        while item[3] >= 0:
            n_block, head, batch, _, part, _, remaining = item
            if cutlass.const_expr(self.config.dq):
                if remaining > 0:
                    buffer, before = self.add_tiles(item, buffer, before)
                before = self.count_item(before, 0)
                before = (batch * self.heads[2] + head) * groups // pairs
            if part == WHOLE:
                place = (n_block, head, batch)
                for store in (self.dv_store, self.dk_store):
                    for group in cutlass.range_constexpr(2):
                        self.wait_for_results(buffer, group)
                        self.store(store, place, buffer, group)
                    buffer = self.following(buffer)
            item = self.items.take(state, ITEM_FIELDS)
            state.advance()
        if cutlass.const_expr(self.config.dq):
            self.count_item(before, 0)
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def add_tiles(self, item, buffer, before):
        """An item's dQ to the sums. Returns the next buffer, and what is still to be counted."""
        _, head, batch, count, _, first, _ = item
        for j in cutlass.range(count, unroll=1):
            m_block, q_head = query_place(self.tiles[first + j, 0], head, self.heads)
            place = (batch, q_head, m_block)
            found = self.come(place)
            for group in cutlass.range_constexpr(2):
                self.wait_for_results(buffer, group)
                self.add((batch, q_head, 2 * m_block + group), buffer, group, found)
            if found == FREE:
                self.count(place)
            if j == SOME_TILES - 1:
                before = self.count_item(before, 2 * SOME_TILES)
            buffer = self.following(buffer)
        return buffer, before

    @cute.jit
    def come(self, place):
        """Wait until this CTA may add to a tile of sums. Returns FREE if it is to be the first.

        While the results are still being computed, which takes longer.
        """
        found = Int32(0)
        done = self.done.iterator + cute.crd2idx(place, self.done.layout)
        if cute.arch.lane_idx() == 0:
            # Relaxed: what follows adds in the L2 cache and reads nothing that may be stale.
            found = cute.arch.atomic_max(done, Int32(BEGUN), sem="relaxed", scope="gpu")
        found = cute.arch.shuffle_sync(found, 0)
        if found == BEGUN:
            wait_until(done.toint(), Int32(READY))
        cute.arch.fence_proxy("async.global")
        return found

    @cute.jit
    def count(self, place):
        """Once what was added is there, say so."""
        cute.arch.cp_async_bulk_wait_group(0)
        done = self.done.iterator + cute.crd2idx(place, self.done.layout)
        if cute.arch.lane_idx() == 0:  # which has issued the additions
            cute.arch.fence_proxy("async.global")
            cute.arch.atomic_add(done, Int32(1), sem="release", scope="gpu")

    @cute.jit
    def count_item(self, group, later: cutlass.Constexpr):
        """Once what an item added is there, count it among those of its group of heads.

        Not right after its last addition, whose end this warp would have to wait for: `later`
        additions have been issued since. Returns -1, which stands for no item.
        """
        if group >= 0:
            cute.arch.cp_async_bulk_wait_group(later)
            if cute.arch.lane_idx() == 0:
                cute.arch.fence_proxy("async.global")
                cute.arch.atomic_add(
                    self.progress.iterator + group, Int32(1), sem="release", scope="gpu"
                )
        return Int32(-1)

    @cute.jit
    def add(self, place, buffer, group: cutlass.Constexpr, found):
        """A warpgroup's part of dQ to the sums: one run of memory."""
        smem = self.s_dq[None, None, None, group, buffer].iterator
        sums = sum_address(self.dq_sum, place)
        if cute.arch.lane_idx() == 0:
            arguments = [sums, smem.toint(), Int32(4 * self.config.dq_chunk)]
            if found != FREE:
                kind = "s32" if cutlass.const_expr(self.config.fixed) else "f32"
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
    def store(self, store, place, buffer, group: cutlass.Constexpr):
        """A warpgroup's dV or dK."""
        (atom, tensor), (block, head, batch) = store, place
        tile = cute.product_each(cute.select(self.s_out.shape, [0, 1]))
        goal = cute.local_tile(tensor[None, None, head, batch], tile, (None, None))
        modes = (cute.group_modes(self.s_out, 0, 2), cute.group_modes(goal, 0, 2))
        of, to = cpasync.tma_partition(atom, 0, cute.make_layout(1), *modes)
        slot = (2 * buffer + group) * self.config.out_slots
        row, column = (block, group) if self.config.split_columns else (2 * block + group, 0)
        cute.copy(atom, of[None, slot], to[None, row, column])
        cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def wait_for_results(self, buffer, group: cutlass.Constexpr):
        """Until the warpgroup has filled the buffer."""
        cute.arch.barrier(
            barrier_id=READY_BARRIER + 2 * buffer + group, number_of_threads=STORE_THREADS
        )

    @cute.jit
    def following(self, buffer):
        """The next buffer, once it has been read; each is given just before its turn."""
        buffers = self.config.buffers
        cute.arch.cp_async_bulk_wait_group(2 * (buffers - 1), read=True)
        buffer = (buffer + 1) % buffers
        self.give_room(buffer)
        return buffer

    @cute.jit
    def give_room(self, buffer):
        """Tell both warpgroups that they may fill a buffer."""
        for group in cutlass.range_constexpr(2):
            cute.arch.barrier_arrive(
                barrier_id=TAKEN_BARRIER + 2 * buffer + group, number_of_threads=STORE_THREADS
            )


@cute.jit
def sum_address(dq_sum, place):
    """Where a chunk of dQ's sums begins: place = (batch, q head, chunk)."""
    return (dq_sum.iterator + cute.crd2idx((*place, 0), dq_sum.layout)).toint()


@cute.jit
def wait_until(address, goal):
    """Until a number that others change is this one; it is read before all that follows."""
    count = acquire(address)
    while count != goal:
        count = acquire(address)


@cute.jit
def acquire(address):
    """A number that others change, read before all that follows."""
    return cute.arch.inline_ptx(
        "ld.acquire.gpu.global.b32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[address],
    )


@cute.jit
def query_place(column, kv_head, heads):
    """(m_block, q head) of a block column of the layout in which a group's q heads are stacked."""
    group_size, num_m_blocks, _ = heads
    return column % num_m_blocks, kv_head * group_size + column // num_m_blocks
