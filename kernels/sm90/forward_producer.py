"""The producer warp of the forward kernel: takes work tiles and loads Q, K, V by TMA."""

import cutlass
from cutlass import Int32, const_expr, cute, pipeline
from sparse_flash.kernels.sm90.primitives import tma_load
from sparse_flash.kernels.work_tiles import (
    KeyTile,
    Load,
    PositionWorkTile,
    RowWorkTile,
    end_of_work,
    tiles_within,
)
from sparse_flash.masks.layout import FULL_TILE

FULL_BEYOND = -2  # instead of a bit tile: a full tile that extends beyond the number of keys
PRODUCER = pipeline.PipelineUserType.Producer


class ForwardProducer:
    """Loads, for each tile t of the CTA's work tiles, K(t), then V(t - 1).

    That is the order in which consumers need them. The pipelines also carry the coordinates and
    number of tiles of a work tile, and for each tile its bit tile and the number of keys from its
    first column on.

    (Values written inside a dynamic `if` must be local names: the DSL cannot carry attributes.)
    """

    def __init__(
        self,
        config,
        loads,
        buffers,
        sTiles,
        pipes,
        work_tiles,
        inputs,
        positions=None,
        windows=None,
    ):
        self.config, self.sTiles, self.work_tiles = config, sTiles, work_tiles
        self.loads, self.buffers = loads, buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.kv_lens, self.tiles, self.group_size = inputs
        self.windows = windows  # DistanceWindows, for a bias by distance
        self.positions = positions  # see position_work_tiles.Positions; only with `config.offsets`
        self.work_tile_type = PositionWorkTile if config.offsets else RowWorkTile

    @cute.jit
    def run(self):
        """Process work tiles until the list is empty, then publish the end."""
        q_state = pipeline.make_pipeline_state(PRODUCER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.work_tiles.pipe.num_stages)
        index = self.work_tiles.first_index()
        # Coordinates of the tile whose V is due; none at first.
        v_coord = KeyTile(Int32(-1), Int32(0), Int32(0), Int32(0))
        num_work_tiles = self.num_work_tiles()
        while index < num_work_tiles:
            load = self.begin(index, work_state)
            work_state.advance()
            self.load_q(q_state, load)
            q_state.advance()
            first, count = load.first, load.count
            kv_head = load.head // self.group_size
            n_block, bit_tile = self.tile_of_step(first, Int32(0))
            for j in cutlass.range(count, unroll=1):
                if j == cutlass.max(count - 2, 0):
                    index = self.work_tiles.next_index()
                # Prefetch: the wait below hides the latency.
                following = cutlass.min(j + 1, count - 1)
                next_block, next_bit_tile = self.tile_of_step(first, following)
                coord = KeyTile(n_block, kv_head, load.batch, load.key_start)
                self.load_k(k_state, coord, bit_tile, load)
                k_state.advance()
                if v_coord.n_block >= 0:
                    self.load_v(v_state, v_coord)
                    v_state.advance()
                v_coord = coord
                n_block, bit_tile = next_block, next_bit_tile
        self.work_tiles.announce(work_state, end_of_work(self.work_tile_type))
        if v_coord.n_block >= 0:
            self.load_v(v_state, v_coord)
        self.work_tiles.reset_counters()

    @cute.jit
    def num_work_tiles(self):
        """Number of work tiles of all CTAs."""
        if const_expr(self.config.offsets):
            return self.positions.num_work_tiles()
        return self.work_tiles.counts[0]

    @cute.jit
    def begin(self, index, work_state):
        """Publish a work tile. Returns its loads."""
        if const_expr(self.config.offsets):
            return self.begin_at_positions(index, work_state)
        m_block, head, batch = (self.work_tiles.work[index, i] for i in range(3))
        first, count, split_idx = (self.work_tiles.work[index, i] for i in range(3, 6))
        limit = self.kv_lens[batch]
        if count == 0:  # a row without tiles: all keys of its placeholder tile are masked
            count, limit = Int32(1), Int32(0)
        count = self.steps_within(first, count, limit)
        self.work_tiles.announce(work_state, RowWorkTile(m_block, head, batch, count, split_idx))
        return Load(m_block, head, batch, first, count, limit, Int32(0), Int32(0))

    @cute.jit
    def steps_within(self, first, count, limit):
        """Number of steps of a work tile that begin before key `limit`; at least 1."""
        config, steps = self.config, self.config.steps_per_tile
        count = tiles_within(self.tiles, first, count, limit, config.kv_block)
        if const_expr(steps > 1):
            keys = limit - self.tiles[first + count - 1, 0] * config.kv_block  # of the last tile
            of_last = cutlass.min(cutlass.max(cute.ceil_div(keys, config.tile_n), 1), steps)
            count = steps * (count - 1) + of_last
        return count

    @cute.jit
    def tile_of_step(self, first, step):
        """N_block of a step, in units of its keys, and its bit tile.

        Where a tile takes two steps, the second number is the index of the half's first 16-bit word
        (see `half_mask_words`), unless it is negative.
        """
        steps = self.config.steps_per_tile
        if const_expr(steps == 1):
            return self.tiles[first + step, 0], self.tiles[first + step, 1]
        tile, part = first + step // steps, step % steps
        n_block, bit_tile = self.tiles[tile, 0], self.tiles[tile, 1]
        words = steps * 2 * 128 * self.config.warpgroups  # of a bit tile, of 16 bits
        return steps * n_block + part, words * bit_tile + part if bit_tile >= 0 else bit_tile

    @cute.jit
    def begin_at_positions(self, index, work_state):
        """Publish a work tile of the grid of `Positions`. Returns its loads."""
        row, load = self.positions.work_tile(index, self.tiles)
        self.work_tiles.announce(work_state, row)
        return load

    @cute.jit
    def load_q(self, state, load):
        """Load a stage of Q: 64 rows for each warpgroup."""
        groups = self.config.warpgroups
        self.q_pipe.producer_acquire(state)
        barrier = self.q_pipe.producer_get_barrier(state)
        for i in cutlass.range_constexpr(groups):
            self.load_rows(0, load, i, state, barrier)

    @cute.jit
    def load_rows(self, which: cutlass.Constexpr, load, i: cutlass.Constexpr, state, barrier):
        """Load the 64 rows of warpgroup i from tensor `which` to its buffer."""
        groups = self.config.warpgroups
        tensor, stages, stage = self.loads[which], self.buffers[which], state.index * groups + i
        if const_expr(self.config.offsets):
            tma_load(tensor, stages, (i, load.head, load.batch), stage, barrier, load.start)
        else:
            coord = (load.m_block * groups + i, load.head, load.batch)
            tma_load(tensor, stages, coord, stage, barrier)

    @cute.jit
    def load_k(self, state, coord, bit_tile, load):
        """Load K of a tile, and publish its bit tile and number of keys."""
        remaining = load.limit - coord.n_block * self.config.tile_n
        if bit_tile == FULL_TILE and remaining < self.config.tile_n:
            bit_tile = Int32(FULL_BEYOND)
        self.k_pipe.sync_object_empty.wait(state.index, state.phase)
        sTiles, barrier = self.sTiles, self.k_pipe.producer_get_barrier(state)
        if cute.arch.lane_idx() == 0:
            sTiles[state.index, 0] = bit_tile
            sTiles[state.index, 1] = remaining
            # This arrival releases the stores above.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.k_pipe.sync_object_full.tx_count)
            if const_expr(self.windows is not None):
                tile_m, tile_n = self.config.tile
                row, column = load.m_block * tile_m, coord.n_block * tile_n
                self.windows.load(load.head, row, column, state.index, barrier)
        self.load_keys(1, coord, state, barrier)

    @cute.jit
    def load_v(self, state, coord):
        """Load V of a tile."""
        self.v_pipe.producer_acquire(state)
        self.load_keys(2, coord, state, self.v_pipe.producer_get_barrier(state))

    @cute.jit
    def load_keys(self, which: cutlass.Constexpr, coord, state, barrier):
        """Load K (1) or V (2)."""
        start = coord.start if const_expr(self.config.offsets) else None
        tma_load(self.loads[which], self.buffers[which], coord[:3], state.index, barrier, start)
