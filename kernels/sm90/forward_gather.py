"""Steps of several tiles whose keys need not be neighbors.

A layout of small key blocks stores few of the keys of a wide tile. Here a stage of K and V is put
together from the next tiles of the row, `kv_block` keys each, wherever they are: softmax and sums
over keys do not depend on their order. A step computes the stage as one tile. Its bits are those of
its tiles side by side.

Where the last step of a row has too few tiles, zeros take the place of the others.
"""

import cutlass
from cutlass import Int32, cute, pipeline
from cutlass.cute.nvgpu import cpasync
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.forward_producer import FULL_BEYOND, PRODUCER, ForwardProducer
from sparse_flash.kernels.sm90.primitives import smem_layout
from sparse_flash.kernels.work_tiles import KeyTile, Load, RowWorkTile, end_of_work, tiles_within
from sparse_flash.masks.layout import FULL_TILE

NO_TILE = -3  # instead of a bit tile: all elements are masked


def box_layout(config, dtype):
    """Layout of the stages of K or V as boxes, which one TMA load each fills.

    As the swizzled layout of a stage has it: the boxes of all tiles for each `box_columns` columns.
    """
    boxes = config.head_dim // config.box_columns * config.tiles_per_step * config.kv_stages
    return smem_layout(dtype, config.kv_block, config.box_columns, boxes)


class GatherProducer(ForwardProducer):
    """Loads, for each step t of the CTA's work tiles, K(t), then V(t - 1).

    In the first `tiles_per_step` lanes, the n_block of a `KeyTile` is that of the lane's tile.
    """

    @cute.jit
    def run(self):
        """Process work tiles until the list is empty, then publish the end."""
        config = self.config
        q_state = pipeline.make_pipeline_state(PRODUCER, config.q_stages)
        k_state = pipeline.make_pipeline_state(PRODUCER, config.kv_stages)
        v_state = pipeline.make_pipeline_state(PRODUCER, config.kv_stages)
        work_state = pipeline.make_pipeline_state(PRODUCER, self.work_tiles.pipe.num_stages)
        index = self.work_tiles.first_index()
        # Coordinates of the tiles whose V is due; none at first.
        v_coord = KeyTile(Int32(-1), Int32(0), Int32(0), Int32(0))
        while index < self.work_tiles.counts[0]:
            load, steps = self.begin_steps(index, work_state)
            work_state.advance()
            self.load_q(q_state, load)
            q_state.advance()
            kv_head = load.head // self.group_size
            for j in cutlass.range(steps, unroll=1):
                if j == cutlass.max(steps - 2, 0):
                    index = self.work_tiles.next_index()
                coord, bit_tile, remaining = self.tiles_of_step(j, load, kv_head)
                self.load_k_of_step(k_state, coord, bit_tile, remaining)
                k_state.advance()
                if v_coord.n_block >= 0:
                    self.load_v(v_state, v_coord)
                    v_state.advance()
                v_coord = coord
        self.work_tiles.announce(work_state, end_of_work(RowWorkTile))
        if v_coord.n_block >= 0:
            self.load_v(v_state, v_coord)
        self.work_tiles.reset_counters()

    @cute.jit
    def begin_steps(self, index, work_state):
        """Publish a work tile. Returns its loads, and its number of steps."""
        m_block, head, batch = (self.work_tiles.work[index, i] for i in range(3))
        first, count, split_idx = (self.work_tiles.work[index, i] for i in range(3, 6))
        limit = self.kv_lens[batch]
        if count == 0:  # as in `ForwardProducer.begin`
            count, limit = Int32(1), Int32(0)
        count = tiles_within(self.tiles, first, count, limit, self.config.kv_block)
        steps = cute.ceil_div(count, self.config.tiles_per_step)
        self.work_tiles.announce(work_state, RowWorkTile(m_block, head, batch, steps, split_idx))
        return Load(m_block, head, batch, first, count, limit, Int32(0), Int32(0)), steps

    @cute.jit
    def tiles_of_step(self, j, load, kv_head):
        """Coordinates and bit tile of the lane's tile, and the number of keys of the step."""
        size, width = self.config.tiles_per_step, self.config.kv_block
        begin = j * size
        nth = begin + cute.arch.lane_idx() % size
        tile = load.first + cutlass.min(nth, load.count - 1)
        n_block, bit_tile = self.tiles[tile, 0], self.tiles[tile, 1]
        last = cutlass.min(load.count - begin, Int32(size)) - 1
        n_last = cute.arch.shuffle_sync(n_block, last)
        remaining = keys_of_step(load.limit, n_last, last, self.config.tile, size)
        if nth >= load.count:  # TMA writes zeros
            n_block = cute.ceil_div(cute.size(self.loads[1][1], mode=[0]), width)
            bit_tile = Int32(NO_TILE)
        return KeyTile(n_block, kv_head, load.batch, Int32(0)), bit_tile, remaining

    @cute.jit
    def load_k_of_step(self, state, coord, bit_tile, remaining):
        """Load K of a step, and publish its bit tiles and number of keys."""
        size, lane = self.config.tiles_per_step, cute.arch.lane_idx()
        self.k_pipe.sync_object_empty.wait(state.index, state.phase)
        sTiles, barrier = self.sTiles, self.k_pipe.producer_get_barrier(state)
        bit_tiles = [cute.arch.shuffle_sync(bit_tile, i) for i in range(size)]
        if lane == 0:
            for i in cutlass.range_constexpr(size):
                sTiles[state.index, i] = bit_tiles[i]
            sTiles[state.index, size] = remaining
            # This arrival releases the stores above.
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, self.k_pipe.sync_object_full.tx_count)
        self.load_keys(1, coord, state, barrier)

    @cute.jit
    def load_keys(self, which: cutlass.Constexpr, coord, state, barrier):
        """Load K (1) or V (2) of a step: a box for each tile and each part of the columns."""
        size, columns = self.config.tiles_per_step, self.config.box_columns
        (atom, tensor), smem = self.loads[which], self.buffers[which]
        tiles = cute.local_tile(
            tensor[None, None, coord.head, coord.batch],
            (self.config.kv_block, columns),
            (None, None),
        )
        modes = (cute.group_modes(smem, 0, 2), cute.group_modes(tiles, 0, 2))
        to, of = cpasync.tma_partition(atom, 0, cute.make_layout(1), *modes)
        chunks = self.config.head_dim // columns
        for i in cutlass.range_constexpr(size):
            n_block = cute.arch.make_warp_uniform(cute.arch.shuffle_sync(coord.n_block, i))
            for chunk in cutlass.range_constexpr(chunks):
                box = (state.index * chunks + chunk) * size + i
                cute.copy(atom, of[None, n_block, chunk], to[None, box], tma_bar_ptr=barrier)


@cute.jit
def keys_of_step(limit, n_last, last, tile: cutlass.Constexpr, size: cutlass.Constexpr):
    """Number of keys from the first column of a step on: all, unless the length cuts its last tile.

    Columns ascend, so the length cuts no other one.
    limit: Number of keys. n_last, last: Column of that tile, and its index in the step.
    """
    inside = limit - n_last * tile[1]
    return last * tile[1] + inside if inside < tile[1] else Int32(size * tile[1])


@cute.jit
def read_gathered_mask(config: cutlass.Constexpr, given, stage, thread):
    """Read the mask of a step: FULL_TILE or not, its number of keys, the thread's words of bits.

    given: Bit tiles and numbers of keys of the stages, in shared memory, and the words of all bit
        tiles. Only the lane that releases the stage for its warp reads shared memory.
    """
    (sTiles, bits), size = given, config.tiles_per_step
    words = cute.make_rmem_tensor(size + 1, Int32)
    if thread % 32 == 0:
        for i in cutlass.range_constexpr(size + 1):
            words[i] = sTiles[stage, i]
    remaining = cute.arch.shuffle_sync(words[size], 0)
    bit_tiles = [cute.arch.shuffle_sync(words[i], 0) for i in range(size)]
    whole, mine = gathered_words(bits, bit_tiles, config.kv_block, thread)
    found = Int32(FULL_TILE)
    if whole != FULL_TILE or remaining < config.tile_n:
        found = Int32(FULL_BEYOND)
    return found, remaining, mine


@cute.jit
def gathered_words(bits, bit_tiles, width: cutlass.Constexpr, thread):
    """Mask bits of the thread's two rows in tiles of so many columns side by side.

    Returns FULL_TILE if all tiles are full, else another number, and the two words.
    """
    mine, whole = cute.make_rmem_tensor(2, Int32), Int32(FULL_TILE)
    mine.fill(0)
    shift = width // 4  # bits of a thread's row of one tile
    for i in cutlass.range_constexpr(len(bit_tiles)):
        bit_tile = bit_tiles[i]
        whole = whole & bit_tile  # -1 if all are
        of_tile = online.mask_words(bits, bit_tile, 0, thread)
        field = Int32(0) if bit_tile == NO_TILE else Int32((1 << shift) - 1)
        for r in cutlass.range_constexpr(2):
            mine[r] = mine[r] | (of_tile[r] & field) << (shift * i)
    return whole, mine
