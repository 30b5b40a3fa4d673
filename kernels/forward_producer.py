"""The producer warp of the forward kernel: it walks the work list and loads tiles by TMA."""

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync
from sparse_flash.masks.layout import FULL_TILE

FULL_BEYOND = -2  # instead of a bit tile: FULL_TILE, but reaching beyond the keys' length
PRODUCER = pipeline.PipelineUserType.Producer


class Producer:
    """The loads: for each tile t of the CTA's items, one after the other, K(t), then V(t - 1).

    That is the order in which the consumers need them. What consumers must know travels with the
    barriers: an item's place and its number of tiles, and of each tile its bit tile and how many
    keys there are from its first column on.

    (What is written inside a dynamic `if` must be a local name: the DSL cannot carry attributes.)
    """

    def __init__(self, config, loads, buffers, s_work, s_tiles, pipes, inputs):
        self.config, self.s_work, self.s_tiles = config, s_work, s_tiles
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.k_pipe, self.v_pipe, self.work_pipe = pipes
        self.kv_lens, self.work, self.tiles, self.counter, self.counts, self.group_size = inputs

    @cute.jit
    def run(self):
        """Until the list is empty; then tell the consumers."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.work_pipe.num_stages)
        index = cute.arch.block_idx()[0]
        # The tile whose V is still to be loaded: none at first.
        v_place = (Int32(-1), Int32(0), Int32(0))
        num_items = self.counts[0]
        while index < num_items:
            m_block, head, batch = (self.work[index, i] for i in range(3))
            first, count, part = (self.work[index, i] for i in range(3, 6))
            limit = self.kv_lens[batch]
            if count == 0:  # a row without tiles: all keys of the tile that it names are masked
                count, limit = Int32(1), Int32(0)
            count = tiles_within(self.tiles, first, count, limit, self.config.tile_n)
            self.announce(work_state, (m_block, head, batch, count, part))
            work_state.advance()
            index = self.next_index()
            self.load_q(q_state, m_block, head, batch)
            q_state.advance()
            kv_head = head // self.group_size
            n_block, bit_tile = self.tiles[first, 0], self.tiles[first, 1]
            for j in cutlass.range(count, unroll=1):
                # Read ahead: the wait below hides how long it takes.
                following = first + cutlass.min(j + 1, count - 1)
                next_block, next_bit_tile = self.tiles[following, 0], self.tiles[following, 1]
                self.load_k(k_state, (n_block, kv_head, batch), bit_tile, limit)
                k_state.advance()
                if v_place[0] >= 0:
                    self.load_v(v_state, v_place)
                    v_state.advance()
                v_place = (n_block, kv_head, batch)
                n_block, bit_tile = next_block, next_bit_tile
        none = Int32(0)
        self.announce(work_state, (none, none, none, none, none))
        if v_place[0] >= 0:
            self.load_v(v_state, v_place)
        self.leave()

    @cute.jit
    def next_index(self):
        """The number of an item that nobody has taken yet."""
        ticket = Int32(0)
        if cute.arch.lane_idx() == 0:
            ticket = cute.arch.atomic_add(
                self.counter.iterator, Int32(1), sem="relaxed", scope="gpu"
            )
        return cute.arch.grid_dim()[0] + cute.arch.shuffle_sync(ticket, 0)

    @cute.jit
    def announce(self, state, fields):
        """Hand an item to the consumers."""
        self.work_pipe.producer_acquire(state)
        s_work = self.s_work
        if cute.arch.lane_idx() == 0:
            for i in cutlass.range_constexpr(len(fields)):
                s_work[state.index, i] = fields[i]
        cute.arch.sync_warp()
        self.work_pipe.producer_commit(state)

    @cute.jit
    def load_q(self, state, m_block, head, batch):
        """A stage of Q is a tile of 64 rows for each warpgroup."""
        groups = self.config.warpgroups
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        for i in cutlass.range_constexpr(groups):
            place = (m_block * groups + i, head, batch)
            self.load(0, place, state.index * groups + i, barrier)

    @cute.jit
    def load_k(self, state, place, bit_tile, limit):
        """K, and what to mask in its tile."""
        remaining = limit - place[0] * self.config.tile_n
        if bit_tile == FULL_TILE and remaining < self.config.tile_n:
            bit_tile = Int32(FULL_BEYOND)
        self.k_pipe.sync_object_empty.wait(state.index, state.phase)
        s_tiles, barrier = self.s_tiles, self.k_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            s_tiles[state.index, 0] = bit_tile
            s_tiles[state.index, 1] = remaining
            # This arrival releases what was just written.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.k_pipe.sync_object_full.tx_count)
        self.load(1, place, state.index, barrier)

    @cute.jit
    def load_v(self, state, place):
        """V of a tile."""
        self.v_pipe.producer_acquire(state)
        self.load(2, place, state.index, self.v_pipe.producer_get_barrier(state))

    @cute.jit
    def load(self, which: cutlass.Constexpr, place, stage, barrier):
        """One TMA load: the tile at place = (block, head, batch) into a stage of shared memory."""
        (atom, tensor), smem = self.loads[which], self.buffers[which]
        block, head, batch = place
        tile = cute.product_each(cute.select(smem.shape, [0, 1]))
        source = cute.local_tile(tensor[None, None, head, batch], tile, (None, 0))
        modes = (cute.group_modes(smem, 0, 2), cute.group_modes(source, 0, 2))
        to, of = cpasync.tma_partition(atom, 0, cute.make_layout(1), *modes)
        cute.copy(atom, of[None, block], to[None, stage], tma_bar_ptr=barrier)

    @cute.jit
    def leave(self):
        """The last CTA to take no more work leaves the counters as it found them: zero."""
        counter = self.counter
        if cute.arch.lane_idx() == 0:
            done = cute.arch.atomic_add(counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == cute.arch.grid_dim()[0] - 1:
                counter[0] = Int32(0)
                counter[1] = Int32(0)


@cute.jit
def tiles_within(tiles, first, count, limit, tile_n: cutlass.Constexpr):
    """How many of an item's tiles (columns ascending) begin before key `limit`; at least 1.

    One, because a row without keys goes through the same motions, with all its keys masked.
    """
    low, high = Int32(count), Int32(count)
    if tiles[first + count - 1, 0] * tile_n >= limit:
        low = Int32(1)
    while low < high:  # the answer is in low..high
        middle = (low + high) // 2
        if tiles[first + middle, 0] * tile_n < limit:
            low = middle + 1
        else:
            high = middle
    return low
