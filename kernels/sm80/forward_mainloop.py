"""The work of the threads of a CTA of the forward kernel.

    S = Q K^T;    P = exp2(scale (S - max));    O = O + P V        (FlashAttention, online softmax)

A warp owns 16 rows of each of its groups of rows, and their S, P and O in registers. K and V come
by cp.async while products are computed. The first tile of the next item is loaded during the last
one of this item, so that short rows leave no bubble.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, const_expr, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.dropout import Dropout
from sparse_flash.kernels.sm80.forward_items import (
    COEFFICIENT,
    PAIR,
    TOP,
    KeyTile,
    RowPlace,
    RowWork,
    place_words,
)
from sparse_flash.kernels.sm80.forward_scores import ForwardScores
from sparse_flash.kernels.sm80.primitives import (
    TileLayout,
    TileLoader,
    accumulators,
    address_of,
    as_operand_a,
    as_operand_b,
    copy_small,
    fragment,
    in_loop,
    load_fragments,
    multiply,
    shared_address,
)
from sparse_flash.kernels.vectors import bits_of, from_bits, pack_pair, store_pairs
from sparse_flash.kernels.work_tiles import tiles_within

# The next item in shared memory: its record, as in `Schedule.work`, then the data of the record. A
# count of -1 ends the list; the record's last word is the item's number.
BATCH, FIRST, COUNT, INDEX, KV_LEN, TILES, NUM_WORDS = 2, 3, 4, 7, 8, 10, 16
SLACK = 8.0  # powers of two by which P may exceed 1 before the maximum is updated


class ForwardMainloop(ForwardScores):
    """State of a thread: O, the statistics of its rows, and where to find everything.

    (Values assigned inside a dynamic `if` must be local names: the DSL cannot carry attributes.)
    """

    def __init__(self, config, dtype, buffers, inputs, group_size, scale_log2, terms):
        self.config, self.dtype = config, dtype
        self.group_size, self.scale_log2, self.terms = group_size, scale_log2, terms
        (q, k, v), lists, self.positions, results = inputs
        self.records = not config.offsets  # whether items have records: see `Schedule.work`
        self.kv_lens, self.work, self.tiles, self.bits, self.counter, self.counts = lists
        self.out, self.lse, self.out_splits, self.lse_splits = results
        q_room, k_room, v_room, following, places = buffers
        self.following = following.get_tensor(cute.make_layout(NUM_WORDS))
        self.following_address = shared_address(following.data_ptr())
        words = place_words(config)
        self.places = places.get_tensor(cute.make_layout((2, words), stride=(words, 1)))
        self.q_base, self.k_base, self.v_base = (
            shared_address(room.data_ptr()) for room in (q_room, k_room, v_room)
        )
        self.q_layout = TileLayout(config.tile_m, config.head_dim)
        self.kv_layout = TileLayout(config.tile_n, config.head_dim)
        if const_expr(config.dropout):
            self.dropout = Dropout(terms.seed, terms.dropped, transposed=False)
        self.tid = cute.arch.thread_idx()[0]
        self.thread = self.tid % 128  # among the four warps that share 64 rows
        self.q, self.k, self.v = q, k, v
        self.v_lane = self.v_base + self.kv_layout.rows_first(cute.arch.lane_idx())
        self.acc_o = [accumulators(config.head_dim) for _ in range(config.row_groups)]
        self.stats = [cute.make_rmem_tensor((2, 2), Float32) for _ in range(config.row_groups)]

    @cute.jit
    def run(self):
        """Item after item, until there are no more."""
        item, place = self.item(cute.arch.block_idx()[0], Int32(0))
        tile, ahead = self.first_tiles(item)
        stage = Int32(0)
        if item.count > 0:
            self.take(item, place)
            self.load_k(item, tile, stage)
            if const_expr(self.config.stages == 2):
                self.load_v(item, tile, stage)
        cute.arch.cp_async_commit_group()
        while item.count > 0:
            for group in cutlass.range_constexpr(self.config.row_groups):
                self.acc_o[group].fill(0.0)
                online.reset(self.stats[group])
            following = item
            for j in cutlass.range(item.count, unroll=1):
                if const_expr(self.config.stages == 1):
                    following, tile = self.step_one(item, j, tile)
                else:
                    following, tile, ahead = self.step_two(item, j, tile, ahead, stage)
                    stage = 1 - stage
            self.finish(item)
            item = following
        self.leave()

    @cute.jit
    def step_one(self, item, j, tile):
        """A tile, with one stage. Returns the next item, and the tile that follows."""
        ticket = self.ask(item, j)
        ahead = self.tile_at(item.first + cutlass.min(j + 1, item.count - 1))
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # K is there, and all warps are done with the last V
        if const_expr(self.records):
            self.fetch_details(item, j)
        self.load_v(item, tile, 0)
        cute.arch.cp_async_commit_group()
        words = self.mask_words(tile)
        acc_s = self.scores(item, tile, 0)
        self.fetch(item, j, ticket)
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # V is there, and all warps are done with Q and K
        following = item
        if j == item.count - 1:
            following, place, ahead, _ = self.next_item(item)
            self.take(following, place)
        if following.count > 0:
            self.load_k(following, ahead, 0)
        cute.arch.cp_async_commit_group()
        self.accumulate(acc_s, words, tile, item, 0)
        return following, ahead

    @cute.jit
    def step_two(self, item, j, tile, ahead, stage):
        """A tile, with two stages. Returns the next item, and the two tiles that follow."""
        is_last = j == item.count - 1
        early = self.fetches(item) if const_expr(self.records) else Boolean(False)
        ticket = self.ask(item, j)
        later = self.tile_at(item.first + cutlass.min(j + 2, item.count - 1))
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # K and V are there, and all warps are done with the last ones
        if const_expr(self.records):
            self.fetch_details(item, j)
        following = item
        if const_expr(self.records):
            if is_last and early:
                following, _, ahead, later = self.fetched_item(item)
        if following.count > 0 and (early or not is_last):
            self.load_k(following, ahead, 1 - stage)
            self.load_v(following, ahead, 1 - stage)
        cute.arch.cp_async_commit_group()
        words = self.mask_words(tile)
        acc_s = self.scores(item, tile, stage)
        self.fetch(item, j, ticket)
        if is_last:
            cute.arch.sync_threads()  # all warps are done with Q
            following, place, ahead, later = self.next_item(item)
            self.take(following, place)
            if following.count > 0 and not early:
                self.load_k(following, ahead, 1 - stage)
                self.load_v(following, ahead, 1 - stage)
        cute.arch.cp_async_commit_group()
        self.accumulate(acc_s, words, tile, item, stage)
        return following, ahead, later

    def fetches(self, item):
        """Whether the record of the next item comes into shared memory while this one is computed.

        It takes three steps: its number, its record, and the data of the record.
        """
        return item.count >= 3

    @cute.jit
    def ask(self, item, j):
        """Thread 0 asks for the number of the next item. Who asks early may get what another CTA
        has long had time for.
        """
        ticket, counter = Int32(0), self.counter
        if in_loop(self.tid) == 0 and j == cutlass.max(item.count - 3, 0):
            ticket = cute.arch.atomic_add(counter.iterator, Int32(1), sem="relaxed", scope="gpu")
        return ticket

    @cute.jit
    def fetch(self, item, j, ticket):
        """Thread 0 publishes the number of the next item, and copies its record."""
        following, record = self.following, self.following_address
        if in_loop(self.tid) == 0 and j == cutlass.max(item.count - 3, 0):
            index = ticket + cute.arch.grid_dim()[0]
            following[INDEX] = index
            if const_expr(self.records):
                if self.fetches(item):
                    if index < self.counts[0]:
                        copy_small(record, address_of(self.work, (index, 0)), 16)
                        copy_small(record + 16, address_of(self.work, (index, 4)), 16)
                    else:
                        following[COUNT] = Int32(-1)

    @cute.jit
    def fetch_details(self, item, j):
        """Thread 0 copies the data of the record of the next item."""
        is_time = self.fetches(item) and j == item.count - 2
        if in_loop(self.tid) == 0 and is_time:
            # An `if` of its own: both sides of an `and` are read, here by all threads, while thread
            # 0 may already write.
            if self.following[COUNT] >= 0:
                self.copy_details()

    @cute.jit
    def copy_details(self):
        """Copy the length of the next item's keys, and its first two tiles and the last one."""
        following, start = self.following, self.following_address
        first, last = following[FIRST], cutlass.max(following[COUNT] - 1, 0)
        kv_len = address_of(self.kv_lens, (following[BATCH],))
        copy_small(start + 4 * KV_LEN, kv_len, 4)
        for n in cutlass.range_constexpr(3):
            nth = (Int32(0), cutlass.min(Int32(1), last), last)[n]
            tile = address_of(self.tiles, (first + nth, 0))
            copy_small(start + 4 * TILES + 8 * n, tile, 8)

    @cute.jit
    def fetched_item(self, item):
        """The next item, where its rows lie, and its first two tiles, from shared memory."""
        record, tile_n = [self.following[i] for i in range(NUM_WORDS)], self.config.tile_n
        m_block, head, batch, first, count, part = record[:6]
        tile, ahead = (KeyTile(*record[TILES + i : TILES + i + 2]) for i in (0, 2))
        limit = record[KV_LEN]
        if count == 0:  # a row without tiles: all keys of the tile that it names are masked
            count, limit = Int32(1), Int32(0)
        elif count > 0 and record[TILES + 4] * tile_n >= limit:
            count = tiles_within(self.tiles, first, count, limit, tile_n)
        count = cutlass.max(count, Int32(0))
        work = RowWork(self.kv_head(head), batch, first, count, limit, Int32(0), 1 - item.slot)
        place = RowPlace(head, batch, part, m_block * self.config.tile_m, Int32(0))
        return work, place, tile, ahead

    @cute.jit
    def next_item(self, item):
        """The next item, where its rows lie, and its first two tiles."""
        if const_expr(not self.records):
            return self.looked_up_item(item)
        zero = Int32(0)
        following, place = item, RowPlace(zero, zero, zero, zero, zero)
        tile, ahead = KeyTile(zero, zero), KeyTile(zero, zero)
        if self.fetches(item):
            following, place, tile, ahead = self.fetched_item(item)
        else:
            following, place, tile, ahead = self.looked_up_item(item)
        return following, place, tile, ahead

    @cute.jit
    def looked_up_item(self, item):
        """As `next_item`, from memory."""
        following, place = self.item(self.following[INDEX], 1 - item.slot)
        return following, place, *self.first_tiles(following)

    @cute.jit
    def take(self, item, place):
        """Issue the copies of an item's queries, and keep where its rows lie in shared memory."""
        places = self.places
        if in_loop(self.tid) == 0:
            for i in cutlass.range_constexpr(len(place)):
                places[item.slot, i] = place[i]
            if const_expr(self.config.scored):
                heads = cute.size(self.q, mode=[2])
                places[item.slot, TOP] = self.top(place)
                places[item.slot, PAIR] = place.batch * heads + place.head
            if const_expr(self.config.alibi):
                head = place.head if item.count > 0 else Int32(0)  # after the last item any number
                places[item.slot, COEFFICIENT] = bits_of(self.terms.coefficient(head))
        if item.count > 0:
            limit, any_row = cute.size(self.q, mode=[1]), self.config.offsets
            coord = (place.head, place.batch)
            loader = self.loader(self.q, self.q_layout)
            loader.start(self.q_base, coord, place.start, limit, any_row)

    def top(self, place):
        """Position of the tile's first row."""
        if const_expr(self.records):
            return place.start
        return self.positions.numbers.num_positions - place.known

    @cute.jit
    def first_tiles(self, item):
        """The first two tiles of an item."""
        second = item.first + cutlass.min(Int32(1), cutlass.max(item.count - 1, 0))
        return self.tile_at(item.first), self.tile_at(second)

    @cute.jit
    def tile_at(self, index):
        """The tile of this index in the list."""
        return KeyTile(self.tiles[index, 0], self.tiles[index, 1])

    @cute.jit
    def item(self, index, slot):
        """The work item of this number, and where its rows lie; after the last one no tiles."""
        zero = Int32(0)
        work = RowWork(zero, zero, zero, zero, zero, zero, slot)
        place = RowPlace(zero, zero, zero, zero, zero)
        if const_expr(self.config.offsets):
            if index < self.positions.num_work_tiles():
                row, load = self.positions.work_tile(index, self.tiles)
                head, batch, first, count = load.head, load.batch, load.first, load.count
                keys = (first, count, load.limit, load.key_start)
                work = RowWork(self.kv_head(head), batch, *keys, slot)
                place = RowPlace(head, batch, row.split_idx, row.start, row.known)
        elif index < self.counts[0]:
            m_block, head, batch = (self.work[index, i] for i in range(3))
            first, count, part = (self.work[index, i] for i in range(3, 6))
            limit = self.kv_lens[batch]
            if count == 0:  # a row without tiles: all keys of the tile that it names are masked
                count, limit = Int32(1), Int32(0)
            count = tiles_within(self.tiles, first, count, limit, self.config.tile_n)
            work = RowWork(self.kv_head(head), batch, first, count, limit, zero, slot)
            place = RowPlace(head, batch, part, m_block * self.config.tile_m, zero)
        return work, place

    def kv_head(self, head):
        """The head of k and v of a query head."""
        return head // self.group_size

    @cute.jit
    def leave(self):
        """The last CTA to take no more work leaves the counters as it found them: zero."""
        counter = self.counter
        if self.tid == 0:
            done = cute.arch.atomic_add(counter.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
            if done == cute.arch.grid_dim()[0] - 1:
                counter[0] = Int32(0)
                counter[1] = Int32(0)

    @cute.jit
    def load_k(self, item, tile, stage):
        """Issue the copies of a tile's keys."""
        self.load_keys(self.k, self.k_base, item, tile, stage)

    @cute.jit
    def load_v(self, item, tile, stage):
        """Issue the copies of a tile's values; 0 beyond the limit, for 0 times NaN is NaN."""
        self.load_keys(self.v, self.v_base, item, tile, stage)

    @cute.jit
    def load_keys(self, tensor, base, item, tile, stage):
        """Issue the copies of a tile of K or V."""
        coord = (item.kv_head, item.batch)
        first = item.key_start + tile.n_block * self.config.tile_n
        limit = item.key_start + item.limit
        address = base + stage * self.kv_layout.nbytes
        loader = self.loader(tensor, self.kv_layout)
        loader.start(address, coord, first, limit, self.config.offsets)

    def loader(self, tensor, layout):
        """Loads tiles of a tensor."""
        return TileLoader(tensor, layout, self.config.threads, self.again(self.tid, 2))

    def again(self, number, level):
        """The Int32, unknown to the compiler where the config recomputes at this level."""
        return in_loop(number) if self.config.recompute >= level else number

    @cute.jit
    def accumulate(self, acc_s, words, tile, item, stage):
        """S becomes P; O += P V."""
        config = self.config
        self.apply_softcap(acc_s, tile, item.slot)
        self.apply_mask(acc_s, words, tile, item.limit)
        scale_log2 = from_bits(self.again(bits_of(self.scale_log2), 2))
        slack = SLACK * cute.arch.rcp_approx(scale_log2)
        for group in cutlass.range_constexpr(config.row_groups):
            acc, stats = acc_s[group], self.stats[group]
            grown, decay = online.update_row_max(acc, stats, self.scale_log2, slack)
            if grown:
                online.rescale(self.acc_o[group], decay)
        if const_expr(config.dropout):
            place = (self.places[item.slot, PAIR], self.places[item.slot, TOP])
            p = [self.dropped(acc_s[g], g, tile, place) for g in range(config.row_groups)]
        for row in cutlass.range_constexpr(0, config.tile_n, 16):
            if const_expr(config.dropout):
                pairs = [fragment(as_operand_a(x, self.dtype), row // 16) for x in p]
            else:
                pairs = [self.exponentiate(acc_s[g], g, row) for g in range(config.row_groups)]
            self.add_values(pairs, row, stage)

    @cute.jit
    def add_values(self, p, row: cutlass.Constexpr, stage):
        """O += P V of 16 keys from `row` on."""
        v_lane = in_loop(self.v_lane + stage * self.kv_layout.nbytes)
        places = [(row, column) for column in range(0, self.config.head_dim, 16)]
        values = load_fragments(self.kv_layout, v_lane, places, True)
        values = as_operand_b(values, self.dtype)
        for group in cutlass.range_constexpr(self.config.row_groups):
            multiply(self.acc_o[group], p[group], values)

    @cute.jit
    def finish(self, item):
        """Write O / sum and the logsumexp: to the output, or as a part of a split row."""
        fields = len(RowPlace._fields)
        place = RowPlace(*(self.places[item.slot, i] for i in range(fields)))
        for group in cutlass.range_constexpr(self.config.row_groups):
            sink = self.sink(place)
            factors, log_sums = online.row_normalizers(self.stats[group], self.scale_log2, sink)
            row = self.row_group(group) * 64 + self.thread // 32 * 16 + self.thread % 32 // 4
            if const_expr(self.config.offsets):
                online.mark_unknown(factors, log_sums, place.known, row)
            if const_expr(self.config.dropout):
                for r in cutlass.range_constexpr(2):
                    factors[r] = factors[r] * self.terms.keep_scale
            online.rescale(self.acc_o[group], factors)
            for r in cutlass.range_constexpr(2):
                self.finish_row(place, self.acc_o[group], r, row + 8 * r, log_sums[r])

    @cute.jit
    def finish_row(self, place, acc_o, r: cutlass.Constexpr, row, log_sum):
        """Write row r (0 or 1) of a group of rows; `row` is its number in the tile."""
        lse, lse_splits = self.lse, self.lse_splits
        q_idx, quad = place.start + row, self.thread % 4
        inside = q_idx >= 0 and q_idx < cute.size(lse, mode=[2])
        if place.part < 0:
            pairs = [
                pack_pair(acc_o[n], acc_o[n + 1], self.dtype)
                for n in range(2 * r, cute.size(acc_o), 4)
            ]
            coord = (place.batch, q_idx, place.head, 0)
            store_pairs(self.out, coord, pairs, any_row=self.config.offsets)
            if quad == 0 and inside:
                lse[place.batch, place.head, q_idx] = log_sum
        elif const_expr(self.config.offsets):
            if inside:
                coord = (place.part, place.batch, q_idx, place.head)
                online.store_split(self.out_splits, acc_o, coord, r, self.thread)
                if quad == 0:
                    lse_splits[place.part, place.batch, place.head, q_idx] = log_sum
        else:
            online.store_split(self.out_splits, acc_o, (place.part, row), r, self.thread)
            if quad == 0:
                lse_splits[place.part, row] = log_sum
