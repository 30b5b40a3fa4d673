"""A CTA of the backward kernel: its loads, its loop over tiles, and its results."""

from typing import NamedTuple

import cutlass
from cutlass import Int32, const_expr, cute
from sparse_flash.kernels.position_work_tiles import ColumnOffsets
from sparse_flash.kernels.schedule import WORK_FIELDS
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm80.backward_scores import TilePlace, recomputed
from sparse_flash.kernels.sm80.backward_tile import BackwardLayouts, BackwardTile
from sparse_flash.kernels.sm80.primitives import TileLoader, copy_async, shared_address
from sparse_flash.kernels.vectors import bits_of, from_bits, pack_pair, store_pairs
from sparse_flash.kernels.work_tiles import ColumnWorkTile, query_coord

LOADS = Q, DO, STATS = range(3)  # loads per tile
ANNOUNCED = 4  # tiles in shared memory: the one before, this one, and two ahead


class QueryTile(NamedTuple):
    """A tile of an item."""

    m_block: Int32
    head: Int32  # of q
    bit_tile: Int32


COEFFICIENT = len(QueryTile._fields)  # behind these: the bits of the head's, with ALiBi
TOP = 7  # field of an item, with score terms: position of the first row of tile 0


class BackwardMainloop:
    """Items after item: K and V once, then all tiles of queries; dK and dV at the end."""

    def __init__(self, config, dtype, tensors, results, stats, lists, offsets, heads, scales, smem):
        self.config, self.dtype = config, dtype
        q, dout, k, v = tensors
        self.v = v
        self.dk, self.dv, self.dk_splits, self.dv_splits, self.dq_sum = results
        self.stats, self.heads = stats, heads
        self.kv_lens, self.work, self.tiles, bits, self.counter, self.counts = lists
        self.scale, scale_log2, *terms = scales
        self.terms = ScoreTerms(*terms[0]) if const_expr(config.scored) else None
        self.thread = cute.arch.thread_idx()[0]
        layouts = BackwardLayouts(config)
        self.q_size = layouts.q.nbytes
        addresses = [shared_address(x.data_ptr()) for x in (smem.q, smem.do, smem.k, smem.v)]
        self.s_q, self.s_do, self.s_k, self.s_v = addresses
        s_p, s_ds = (shared_address(x.data_ptr()) for x in (smem.p, smem.ds))
        shape = (config.tile_m, 2, config.stats_stages)
        self.s_stats = smem.stats.get_tensor(cute.make_layout(shape))
        self.stats_address = shared_address(smem.stats.data_ptr())
        # This item's fields, and those of the next one.
        self.s_item = smem.item.get_tensor(cute.make_layout((WORK_FIELDS, 2)))
        self.item_address = shared_address(smem.item.data_ptr())
        self.s_tiles = smem.tiles.get_tensor(cute.make_layout((4, ANNOUNCED)))
        self.q, self.dout, self.k = q, dout, k
        self.layouts = layouts
        shared = (self.s_k, self.s_v, s_p, s_ds)
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        scales = (scale_log2, self.terms)
        self.tile = self.new_tile(config, dtype, shared, self.s_stats, bits, scales, warp, lane)
        self.q_len = cute.size(q, mode=[1])
        if const_expr(config.offsets):
            self.offsets = ColumnOffsets(offsets[:2], cute.size(k, mode=[1]))
            self.q_tops = offsets[2] if const_expr(config.scored) else None
        self.acc_dk, self.acc_dv = self.tile.keys_accumulators(), self.tile.keys_accumulators()

    def new_tile(self, *given):
        """The computation of a tile."""
        return BackwardTile(*given)

    @cute.jit
    def run(self):
        """Item after item, until there are no more."""
        if self.thread == 0:
            self.fetch(cute.arch.block_idx()[0])
        self.take()
        while self.item().count >= 0:
            for n in cutlass.range_constexpr(self.tile.atoms):
                self.acc_dk[n].fill(0.0)
                self.acc_dv[n].fill(0.0)
            if self.item().count > 0 and self.item().remaining > 0:
                self.compute()
            elif self.thread == 0:
                self.fetch(self.next_index())
            self.finish(self.item())
            self.take()
        self.leave()

    @cute.jit
    def fetch(self, index):
        """Start to load the work item of this number, by one thread."""
        s_item, work = self.s_item, self.work
        if index < self.counts[0]:
            source = (work.iterator + cute.crd2idx((index, 0), work.layout)).toint()
            for i in cutlass.range_constexpr(2):
                copy_async(self.item_address + 4 * WORK_FIELDS + 16 * i, source + 16 * i)
        else:
            s_item[4, 1] = Int32(-1)  # no more

    @cute.jit
    def take(self):
        """The item that was fetched becomes that of all threads, once they are done with theirs."""
        cute.arch.cp_async_commit_group()
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()
        s_item = self.s_item
        if self.thread == 0:
            for i in cutlass.range_constexpr(6):
                s_item[i, 0] = s_item[i, 1]
            if s_item[4, 1] >= 0:
                batch = s_item[2, 1]
                limit = self.kv_lens[batch]
                if const_expr(self.config.offsets):
                    limit = self.offsets.limit(limit, batch)
                    if const_expr(self.config.scored):
                        s_item[TOP, 0] = self.q_tops[batch]
                s_item[6, 0] = limit - s_item[0, 1] * self.config.tile_n
        cute.arch.sync_threads()

    @cute.jit
    def item(self):
        """The work item, from shared memory: registers are few while it is computed."""
        n_block, head, batch, first, count, part, remaining = (self.s_item[i, 0] for i in range(7))
        return ColumnWorkTile(n_block, head, batch, count, part, first, remaining)

    @cute.jit
    def next_index(self):
        """The number of an item that nobody has taken yet, for one thread.

        To be asked for near the end of the item before: who asks early may get what another CTA
        has long had time for.
        """
        counter = self.counter
        ticket = cute.arch.atomic_add(counter.iterator, Int32(1), sem="relaxed", scope="gpu")
        return cute.arch.grid_dim()[0] + ticket

    @cute.jit
    def leave(self):
        """The last CTA to take no more work leaves the counters as it found them: zero."""
        counter = self.counter
        if self.thread == 0:
            done = cute.arch.atomic_add(counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == cute.arch.grid_dim()[0] - 1:
                counter[0] = Int32(0)
                counter[1] = Int32(0)

    @cute.jit
    def compute(self):
        """All tiles of an item."""
        item = self.item()
        r_v = self.load_keys(item)
        tile = self.tile_of(item, Int32(0))
        for which in cutlass.range_constexpr(len(LOADS)):
            self.load(which, tile, item.batch, Int32(0))
        cute.arch.cp_async_commit_group()
        if self.thread == 0:
            self.announce_tile(Int32(0))
            self.announce_tile(Int32(1))
        for j in cutlass.range(item.count, unroll=1):
            self.step(j, r_v)

    @cute.jit
    def step(self, j, r_v):
        """Tile j. r_v: V in registers, or None."""
        config, stage = self.config, j % 2
        q_stage, do_stage, stats_stage = (
            stage if self.stages(which) == 2 else Int32(0) for which in LOADS
        )
        q, do = self.s_q + q_stage * self.q_size, self.s_do + do_stage * self.q_size
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # the tile is there, and all warps are done with the one before
        self.load_ahead(j, stage ^ 1)
        exponents = Int32(0)
        if const_expr(config.fixed_point):
            exponents = self.tile.exponents(stats_stage)
        limits = (self.tile_at(j).bit_tile, self.item().remaining)
        words = self.tile.mask_words(limits[0])
        operands = (q, do, r_v)
        if const_expr(config.exchange):
            p, ds = self.tile.scores(operands, stats_stage, words, limits, self.place(j), 0)
            cute.arch.sync_threads()
            self.load_again(STATS, j)
            self.tile.add(self.acc_dv, p, self.tile.p_rows, do, 0)
            if const_expr(config.do_stages == 1):
                cute.arch.sync_threads()
            self.load_again(DO, j)
            self.tile.add(self.acc_dk, ds, self.tile.ds_rows, q, 0)
            if const_expr(config.q_stages == 1):
                cute.arch.sync_threads()
            self.load_again(Q, j)
        else:
            for first in cutlass.range_constexpr(0, config.tile_m, self.tile.chunk):
                given = (operands, stats_stage, words, limits, self.place(j), first)
                p, ds = self.tile.scores(*given, self.acc_dv)
                if const_expr(not config.weighted):
                    self.tile.add(self.acc_dv, p, None, do, first)
                self.tile.add(self.acc_dk, ds, None, q, first)
            cute.arch.sync_threads()
            for which in cutlass.range_constexpr(len(LOADS)):
                self.load_again(which, j)
        self.add_queries(j, exponents)

    @cute.jit
    def load_ahead(self, j, stage):
        """Load the two-stage operands of the tile after j; after the last tile fetch an item.

        Announces tile j + 2.
        """
        item = self.item()
        if j + 1 < item.count:
            tile = self.tile_at(j + 1)
            for which in cutlass.range_constexpr(len(LOADS)):
                if const_expr(self.stages(which) == 2):
                    self.load(which, tile, item.batch, stage)
            if self.thread == 0:
                self.announce_tile(j + 2)
        elif self.thread == 0:
            self.fetch(self.next_index())
        cute.arch.cp_async_commit_group()

    @cute.jit
    def load_again(self, which: cutlass.Constexpr, j):
        """Load the single-stage operands of the tile after j. All warps released those of j."""
        if const_expr(self.stages(which) == 1):
            item = self.item()
            if j + 1 < item.count:
                self.load(which, self.tile_at(j + 1), item.batch, Int32(0))
            cute.arch.cp_async_commit_group()

    @cute.jit
    def load(self, which: cutlass.Constexpr, tile, batch, stage):
        """Start to load Q, dO or the statistics of a tile into a stage."""
        if const_expr(which == Q):
            self.load_rows(self.q, self.s_q + stage * self.q_size, tile, batch)
        elif const_expr(which == DO):
            self.load_rows(self.dout, self.s_do + stage * self.q_size, tile, batch)
        else:
            self.load_statistics(tile, batch, stage)

    def stages(self, which):
        """How many stages something has."""
        return (self.config.q_stages, self.config.do_stages, self.config.stats_stages)[which]

    @cute.jit
    def first_key(self, item):
        """The key in the first row of an item's tile."""
        first = item.n_block * self.config.tile_n
        if const_expr(self.config.offsets):
            first += self.offsets.keys(item.batch)
        return first

    @cute.jit
    def first_query(self, tile, batch):
        """The query in the first row of a tile."""
        first = tile.m_block * self.config.tile_m
        if const_expr(self.config.offsets):
            first += self.offsets.queries(batch)
        return first

    @cute.jit
    def load_keys(self, item):
        """Start to load K and V. Returns V where it stays in registers, or None."""
        config, coord, first = self.config, (item.head, item.batch), self.first_key(item)
        limit = cutlass.min(first + item.remaining, cute.size(self.v, mode=[1]))
        arguments = (self.layouts.k, config.threads, recomputed(self.thread))
        TileLoader(self.k, *arguments).start(self.s_k, coord, first, limit, config.offsets)
        if const_expr(config.v_in_registers):
            return self.values(item, first, limit)
        TileLoader(self.v, *arguments).start(self.s_v, coord, first, limit, config.offsets)
        return None

    @cute.jit
    def add_queries(self, j, exponents):
        """Add dQ of tile j to its sums."""
        tile, count = self.tile_at(j), self.config.dq_groups
        coord = (self.item().batch, tile.head, tile.m_block, self.thread)
        sums = (self.dq_sum.iterator + cute.crd2idx(coord, self.dq_sum.layout)).toint()
        size = count // 2 if const_expr(self.config.split_dq) else count
        for first in cutlass.range_constexpr(0, count, size):
            groups = range(first, first + size)
            acc = self.tile.queries_gradient(groups)
            self.tile.add_to_sums(acc, groups, sums, exponents)

    @cute.jit
    def tile_of(self, item, j):
        """The item's tile j, or its last one, from the list."""
        index = item.first + cutlass.min(j, item.count - 1)
        column, bit_tile = self.tiles[index, 0], self.tiles[index, 1]
        m_block, head = query_coord(column, item.head, self.heads)
        return QueryTile(m_block, head, bit_tile)

    @cute.jit
    def announce_tile(self, j):
        """Put the item's tile j into shared memory, by one thread, for the others' next step."""
        tile, s_tiles = self.tile_of(self.item(), j), self.s_tiles
        if const_expr(self.config.alibi):
            s_tiles[COEFFICIENT, j % ANNOUNCED] = bits_of(self.terms.coefficient(tile.head))
        for i in cutlass.range_constexpr(len(tile)):
            s_tiles[i, j % ANNOUNCED] = tile[i]

    @cute.jit
    def tile_at(self, j):
        """Tile j, of which nothing is kept in registers while others are computed."""
        return QueryTile(*(self.s_tiles[i, j % ANNOUNCED] for i in range(len(QueryTile._fields))))

    def place(self, j):
        """Where tile j is, for score terms; None without."""
        if const_expr(not self.config.scored):
            return None
        j = recomputed(j)
        tile, item, heads = self.tile_at(j), self.item(), cute.size(self.q, mode=[2])
        query, key = tile.m_block * self.config.tile_m, item.n_block * self.config.tile_n
        if const_expr(self.config.offsets):
            query += self.s_item[TOP, 0]
        coefficient = from_bits(self.s_tiles[COEFFICIENT, j % ANNOUNCED])
        pair = item.batch * heads + tile.head
        return TilePlace(query, key, pair, coefficient, tile.head)

    @cute.jit
    def load_statistics(self, tile, batch, stage):
        """Start to load lse and delta of a tile into a stage."""
        tile_m = self.config.tile_m
        chunks = tile_m // 4  # 16 bytes each, of lse and of delta
        thread = recomputed(self.thread)
        if thread < 2 * chunks:
            which, row = thread // chunks, thread % chunks * 4
            coord = (batch, tile.head, which, tile.m_block * tile_m + row)
            source = (self.stats.iterator + cute.crd2idx(coord, self.stats.layout)).toint()
            copy_async(self.stats_address + 8 * tile_m * stage + 16 * thread, source)

    @cute.jit
    def load_rows(self, tensor, address, tile, batch):
        """Start to load a tile of Q or dO."""
        first = self.first_query(tile, batch)
        thread = recomputed(self.thread)
        loader = TileLoader(tensor, self.layouts.q, self.config.threads, thread)
        loader.start(address, (tile.head, batch), first, self.q_len, self.config.offsets)

    @cute.jit
    def values(self, item, first, limit):
        """The warp's keys of V as operand a, by 16 keys and 16 columns.

        From `limit` on the last key is read, and beyond the tensor's columns the last ones: P' is 0
        there, and so is dO.
        """
        tile, v, lane = self.tile, self.v, self.thread % 32
        found, width = {}, cute.size(v, mode=[3])
        for n in cutlass.range_constexpr(tile.atoms):
            for k in cutlass.range_constexpr(self.config.head_dim // 16):
                registers = cute.make_rmem_tensor(4, Int32)
                for i in cutlass.range_constexpr(4):
                    row = tile.first_key + 16 * n + 8 * (i % 2) + lane // 4
                    key = cutlass.max(cutlass.min(first + row, limit - 1), 0)
                    column = cutlass.min(16 * k + 8 * (i // 2), width - 8) + 2 * (lane % 4)
                    start = v.iterator + cute.crd2idx(
                        (item.batch, key, item.head, column), v.layout
                    )
                    registers[i] = cute.arch.inline_ptx(
                        "ld.global.b32 {$w0}, [{$r0}];",
                        write_only_types=[Int32],
                        read_only_args=[start.toint()],
                    )
                found[n, k] = registers
        return found

    @cute.jit
    def finish(self, item):
        """Write dK and dV of an item: to the results, or as a part of a split column."""
        for n in cutlass.range_constexpr(self.tile.atoms):
            for i in cutlass.range_constexpr(cute.size(self.acc_dk[n])):
                self.acc_dk[n][i] = self.acc_dk[n][i] * self.scale
                if const_expr(self.config.dropout):
                    self.acc_dv[n][i] = self.acc_dv[n][i] * self.terms.keep_scale
        if item.split_idx < 0:
            self.store(self.acc_dk, self.dk, item)
            self.store(self.acc_dv, self.dv, item)
        else:
            self.store_split(self.acc_dk, self.dk_splits, item.split_idx)
            self.store_split(self.acc_dv, self.dv_splits, item.split_idx)

    @cute.jit
    def store(self, acc, result, item):
        """Write dK or dV in 16 bits."""
        first = self.first_key(item)
        for n, c, i in self.tile.result_rows():
            row, column = self.tile.result_place(n, c, i)
            x = self.tile.result_row(acc, n, c, i)
            pairs = [pack_pair(x[0], x[1], self.dtype), pack_pair(x[2], x[3], self.dtype)]
            coord = (item.batch, first + row, item.head, column)
            store_pairs(result, coord, pairs, self.config.offsets)

    @cute.jit
    def store_split(self, acc, parts, part):
        """Write dK or dV in float32, as a part of a split column."""
        for n, c, i in self.tile.result_rows():
            row, column = self.tile.result_place(n, c, i)
            x = self.tile.result_row(acc, n, c, i)
            for e in cutlass.range_constexpr(4):
                parts[part, row, column + e // 2 * 8 + self.thread % 4 * 2 + e % 2] = x[e]
