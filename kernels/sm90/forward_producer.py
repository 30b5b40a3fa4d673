"""The producer warp of the forward kernel: it walks the work list and loads tiles by TMA."""

import cutlass
from cutlass import Int32, const_expr, cute, pipeline
from sparse_flash.kernels.sm90.items import KeyTile, Load, PositionItem, RowItem, no_more
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

    def __init__(self, config, loads, buffers, s_tiles, pipes, items, inputs, positions=None):
        self.config, self.s_tiles, self.items = config, s_tiles, items
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.kv_lens, self.tiles, self.group_size = inputs
        self.positions = positions  # see position_items.Positions; only with `config.offsets`
        self.item_type = PositionItem if config.offsets else RowItem

    @cute.jit
    def run(self):
        """Until the list is empty; then tell the consumers."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.items.pipe.num_stages)
        index = cute.arch.block_idx()[0]
        # The tile whose V is still to be loaded: none at first.
        v_place = KeyTile(Int32(-1), Int32(0), Int32(0), Int32(0))
        num_items = self.num_items()
        while index < num_items:
            load = self.begin(index, work_state)
            work_state.advance()
            self.load_q(q_state, load)
            q_state.advance()
            first, count = load.first, load.count
            kv_head = load.head // self.group_size
            n_block, bit_tile = self.tiles[first, 0], self.tiles[first, 1]
            for j in cutlass.range(count, unroll=1):
                if j == cutlass.max(count - 2, 0):
                    index = self.items.next_index()
                # Read ahead: the wait below hides how long it takes.
                following = first + cutlass.min(j + 1, count - 1)
                next_block, next_bit_tile = self.tiles[following, 0], self.tiles[following, 1]
                place = KeyTile(n_block, kv_head, load.batch, load.key_start)
                self.load_k(k_state, place, bit_tile, load.limit)
                k_state.advance()
                if v_place.n_block >= 0:
                    self.load_v(v_state, v_place)
                    v_state.advance()
                v_place = place
                n_block, bit_tile = next_block, next_bit_tile
        self.items.announce(work_state, no_more(self.item_type))
        if v_place.n_block >= 0:
            self.load_v(v_state, v_place)
        self.items.leave()

    @cute.jit
    def num_items(self):
        """Work items of all CTAs."""
        if const_expr(self.config.offsets):
            return self.positions.num_items()
        return self.items.counts[0]

    @cute.jit
    def begin(self, index, work_state):
        """Announce an item. Returns what to load for it."""
        if const_expr(self.config.offsets):
            return self.begin_at_positions(index, work_state)
        m_block, head, batch = (self.items.work[index, i] for i in range(3))
        first, count, part = (self.items.work[index, i] for i in range(3, 6))
        limit = self.kv_lens[batch]
        if count == 0:  # a row without tiles: all keys of the tile that it names are masked
            count, limit = Int32(1), Int32(0)
        count = tiles_within(self.tiles, first, count, limit, self.config.tile_n)
        self.items.announce(work_state, RowItem(m_block, head, batch, count, part))
        return Load(m_block, head, batch, first, count, limit, Int32(0), Int32(0))

    @cute.jit
    def begin_at_positions(self, index, work_state):
        """Announce an item of the grid of `Positions`, whose tiles are found here."""
        row, load = self.positions.item(index, self.tiles)
        self.items.announce(work_state, row)
        return load

    @cute.jit
    def load_q(self, state, load):
        """A stage of Q is a tile of 64 rows for each warpgroup."""
        groups = self.config.warpgroups
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        for i in cutlass.range_constexpr(groups):
            self.load_rows(0, load, i, state, barrier)

    @cute.jit
    def load_rows(self, which: cutlass.Constexpr, load, i: cutlass.Constexpr, state, barrier):
        """The 64 rows of warpgroup i, of the tensor and into the buffer of this number."""
        groups = self.config.warpgroups
        tensor, stages, stage = self.loads[which], self.buffers[which], state.index * groups + i
        if const_expr(self.config.offsets):
            tma_load(tensor, stages, (i, load.head, load.batch), stage, barrier, load.start)
        else:
            place = (load.m_block * groups + i, load.head, load.batch)
            tma_load(tensor, stages, place, stage, barrier)

    @cute.jit
    def load_k(self, state, place, bit_tile, limit):
        """K, and what to mask in its tile."""
        remaining = limit - place.n_block * self.config.tile_n
        if bit_tile == FULL_TILE and remaining < self.config.tile_n:
            bit_tile = Int32(FULL_BEYOND)
        self.k_pipe.sync_object_empty.wait(state.index, state.phase)
        s_tiles, barrier = self.s_tiles, self.k_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            s_tiles[state.index, 0] = bit_tile
            s_tiles[state.index, 1] = remaining
            # This arrival releases what was just written.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.k_pipe.sync_object_full.tx_count)
        self.load_keys(1, place, state, barrier)

    @cute.jit
    def load_v(self, state, place):
        """V of a tile."""
        self.v_pipe.producer_acquire(state)
        self.load_keys(2, place, state, self.v_pipe.producer_get_barrier(state))

    @cute.jit
    def load_keys(self, which: cutlass.Constexpr, place, state, barrier):
        """K (1) or V (2)."""
        start = place.start if const_expr(self.config.offsets) else None
        tma_load(self.loads[which], self.buffers[which], place[:3], state.index, barrier, start)


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
