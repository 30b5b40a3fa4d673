"""The producer warp of the forward kernel: it walks the work list and loads tiles by TMA."""

import cutlass
from cutlass import Int32, cute, pipeline
from sparse_flash.kernels.sm90.primitives import tma_load
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

    def __init__(self, config, loads, buffers, s_tiles, pipes, items, inputs):
        self.config, self.s_tiles, self.items = config, s_tiles, items
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.kv_lens, self.tiles, self.group_size = inputs

    @cute.jit
    def run(self):
        """Until the list is empty; then tell the consumers."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.items.pipe.num_stages)
        index = cute.arch.block_idx()[0]
        # The tile whose V is still to be loaded: none at first.
        v_place = (Int32(-1), Int32(0), Int32(0))
        num_items = self.items.counts[0]
        while index < num_items:
            (m_block, head, batch), (first, count), limit = self.begin(index, work_state)
            work_state.advance()
            self.load_q(q_state, m_block, head, batch)
            q_state.advance()
            kv_head = head // self.group_size
            n_block, bit_tile = self.tiles[first, 0], self.tiles[first, 1]
            for j in cutlass.range(count, unroll=1):
                if j == cutlass.max(count - 2, 0):
                    index = self.items.next_index()
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
        self.items.announce(work_state, (none, none, none, none, none))
        if v_place[0] >= 0:
            self.load_v(v_state, v_place)
        self.items.leave()

    @cute.jit
    def begin(self, index, work_state):
        """Announce an item. Returns its place, its tiles (first and number), and its keys."""
        m_block, head, batch = (self.items.work[index, i] for i in range(3))
        first, count, part = (self.items.work[index, i] for i in range(3, 6))
        limit = self.kv_lens[batch]
        if count == 0:  # a row without tiles: all keys of the tile that it names are masked
            count, limit = Int32(1), Int32(0)
        count = tiles_within(self.tiles, first, count, limit, self.config.tile_n)
        self.items.announce(work_state, (m_block, head, batch, count, part))
        return (m_block, head, batch), (first, count), limit

    @cute.jit
    def load_q(self, state, m_block, head, batch):
        """A stage of Q is a tile of 64 rows for each warpgroup."""
        groups = self.config.warpgroups
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        for i in cutlass.range_constexpr(groups):
            place = (m_block * groups + i, head, batch)
            tma_load(self.loads[0], self.buffers[0], place, state.index * groups + i, barrier)

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
        tma_load(self.loads[1], self.buffers[1], place, state.index, barrier)

    @cute.jit
    def load_v(self, state, place):
        """V of a tile."""
        self.v_pipe.producer_acquire(state)
        barrier = self.v_pipe.producer_get_barrier(state)
        tma_load(self.loads[2], self.buffers[2], place, state.index, barrier)


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
