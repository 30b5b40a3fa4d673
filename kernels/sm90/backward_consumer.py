"""A consumer warpgroup of the backward kernel: 64 keys of each of the CTA's items.

With the scores transposed, so that P and dS lie in registers as the products want them
(FlashAttention-3, Shah et al., 2024), for each tile of queries

    S' = K Q';   P' = exp2(scale S' - lse);   dP' = V dO';   dS' = P' (dP' - delta)
    dV += P' dO;   dK += dS' Q;   dQ += dS K

where ' is the transpose, and lse and delta belong to the queries, which are the columns. S' of the
next tile is issued before the results of this one are taken away, dP' before its P' is computed,
and dV and dK in parts, so that the tensor cores have work while the threads compute.

dQ wants dS' of both warpgroups. It is computed a tile later, when the other's has long been there,
so that they need not keep step; and the second begins an item of several tiles half a tile after
the first, so that one computes exponentials while the products of the other run.

Where tiles are small, what is written to shared memory for others is handed over later, when it is
there: a warp that waited for its own stores would keep its next products from the tensor cores.

Where K has room for two items, one flows into the next: S' of its first tile is issued before dK
and dV are stored, and dQ of the last tile is computed in its first step.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warp, warpgroup
from sparse_flash.kernels.sm90 import online_softmax as online
from sparse_flash.kernels.sm90.backward_producer import STORE_THREADS
from sparse_flash.kernels.sm90.backward_products import BackwardProducts
from sparse_flash.kernels.sm90.elementwise import exponent_in
from sparse_flash.kernels.sm90.items import BackwardBarrier, ColumnItem
from sparse_flash.kernels.sm90.primitives import (
    from_bits,
    multiply_pairs,
    pair_of,
    store_pairs,
)
from sparse_flash.masks.layout import FULL_TILE

CONSUMER = pipeline.PipelineUserType.Consumer
BOTH = 2 * 128  # threads of the two warpgroups


class BackwardConsumer:
    """State of one warpgroup: dK and dV of its keys, and where to find everything."""

    def __init__(self, config, dtype, products, buffers, pipes, signals, lists, results, scales):
        self.config, self.dtype = config, dtype
        self.items, self.bits, self.offsets = lists
        self.scale, self.scale_log2 = scales
        _, _, self.s_k, _, self.s_ds, self.s_dq, self.s_results, *others = buffers
        self.s_stats, self.s_tiles = others
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        # Barriers: of all consumer warps, passed once a tile; and of each buffer of dQ, passed when
        # there is room. (At named barriers the warps of a warpgroup would wait for each other.)
        self.ds_shared, self.rooms = signals
        self.results, self.parts = results  # dV and dK
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        # Which 64 keys, and which columns of dK and dV, are this warpgroup's.
        self.keys, self.columns = self.group, 0
        if const_expr(config.split_columns):
            self.keys, self.columns = 0, self.group
        part = (self.keys, self.columns, self.group)
        self.products = BackwardProducts(config, products, buffers[:5], part, self.thread)
        shape = products[0].partition_shape_C((64, config.tile_m))
        self.acc_s = cute.make_rmem_tensor(shape, Float32)
        shape = products[2].partition_shape_C((64, config.columns))
        self.acc_dk = cute.make_rmem_tensor(shape, Float32)
        self.acc_dv = cute.make_rmem_tensor(shape, Float32)
        # Of the tile whose S' has been issued: the bit tile, where the thread is its warp's first.
        self.bit_tile = cute.make_rmem_tensor(1, Int32)
        # Of the tile before: the exponents of both rows of dQ that are the thread's.
        self.exponents = cute.make_rmem_tensor(1, Int32)

    @cute.jit
    def run(self):
        """Item after item, until there are no more."""
        across = self.config.across
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(CONSUMER, self.config.k_stages)
        v_state = pipeline.make_pipeline_state(CONSUMER, self.config.v_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.items.pipe.num_stages)
        k_before, puts = k_state.clone(), Int32(0)  # puts: how many buffers have been filled
        pending = Int32(0)  # whether the last dQ of the item before, whose K is `k_before`, is
        item = self.items.take(work_state, ColumnItem)
        work_state.advance()
        if const_expr(across):
            self.begin(q_state, k_state, item)
            warpgroup.wait_group(0)
        while item.count >= 0:
            count, remaining = item.count, item.remaining
            self.acc_dk.fill(0.0)
            self.acc_dv.fill(0.0)
            if count > 0 and remaining > 0:
                if const_expr(not across):
                    self.begin(q_state, k_state, item)
                self.v_pipe.consumer_wait(v_state)
                self.products.hold_values(v_state.index)
                warpgroup.wait_group(0)
                states = (k_state, v_state, k_before, pending)
                q_state, puts = self.tiles(count, q_state, states, puts, remaining)
                v_state.advance()
                k_before = k_state.clone()
                k_state.advance()
                pending = Int32(1)
            following = self.items.take(work_state, ColumnItem)
            work_state.advance()
            early = 0  # results that are taken away before S' is issued: then there is room sooner
            if const_expr(across):
                early = 2 - self.config.results
                puts = self.finish(item, puts, range(early))
                self.begin(q_state, k_state, following)
            puts = self.finish(item, puts, range(early, 2))
            # Where no step follows that would do it. (Others may be waiting for this one's sums.)
            if pending != 0 and (not across or following.count <= 0 or following.remaining <= 0):
                if const_expr(self.config.dq):
                    puts = self.last_queries(q_state.count, k_before, puts)
                self.k_pipe.consumer_release(k_before)
                pending = Int32(0)
            # Not later: ptxas would serialise what is under way from one round to the next.
            warpgroup.wait_group(0)
            item = following

    @cute.jit
    def begin(self, q_state, k_state, item):
        """Issue S' of an item's first tile, and hold what is held of K; of an item without tiles
        S' is of what happens to lie there, and not used: a branch around it would cost more.
        """
        count, remaining = item.count, item.remaining
        if count > 0 and remaining > 0:
            self.k_pipe.consumer_wait(k_state)
            self.zero_beyond(k_state, remaining)
            self.q_pipe.consumer_wait(q_state)
            self.read_bit_tile(q_state.index)
        self.products.hold_keys(k_state.index)
        self.products.keys_queries(self.acc_s, k_state.index, q_state.index)

    @cute.jit
    def tiles(self, count, q_state, kv_states, puts, remaining):
        """All tiles of an item, and dQ of all but the last; of the item before that, where it goes
        across items. Returns the next states.
        """
        states = (q_state, kv_states, puts, remaining)
        if const_expr(not self.config.dq):
            for _ in cutlass.range(count - 1, unroll=1):
                q_state, puts = self.step(q_state, kv_states, puts, remaining)
            q_state, puts = self.step(q_state, kv_states, puts, remaining, last=True)
        elif count == 1:
            q_state, puts = self.step(*states, first=True, last=True)
        else:
            q_state, puts = self.step(*states, first=True)
            for _ in cutlass.range(count - 2, unroll=1):
                q_state, puts = self.step(q_state, kv_states, puts, remaining)
            q_state, puts = self.step(q_state, kv_states, puts, remaining, last=True)
        return q_state, puts

    @cute.jit
    def last_queries(self, following, k_state, puts):
        """The dQ of an item's last tile, the one before `following`. Returns the new `puts`."""
        acc_dq = self.products.queries_accumulator()
        self.wait_for_shared(following + 1)
        self.products.queries(acc_dq, k_state.index, following + 1)
        warpgroup.wait_group(0)
        puts = self.put_queries(acc_dq, puts)
        self.hand_over(puts)
        return puts

    @cute.jit
    def step(
        self,
        q_state,
        kv_states,
        puts,
        remaining,
        first: cutlass.Constexpr = False,
        last: cutlass.Constexpr = False,
    ):
        """A tile, whose S' has been issued before. Returns the next states.

        If it is not the item's first, or if it goes across items, dQ of the one before is computed
        too; if it is not the last, S' of the next is issued.
        """
        config, stage = self.config, q_state.index
        k_state, v_state, k_before, pending = kv_states
        before = config.dq and (config.across or not first)
        k_before = k_before if const_expr(first) else k_state  # of the tile before
        staggered = config.dq and first and not last
        p, acc_dp, delta = self.values(q_state, v_state, remaining, staggered)
        ds = cute.make_rmem_tensor(p.shape, self.dtype)
        exponents = self.exponents_of(stage) if const_expr(config.fixed) else Int32(0)
        warpgroup.wait_group(config.parts)
        if const_expr(last):
            self.v_pipe.consumer_release(v_state)
        self.zero_rows(acc_dp, remaining)
        for part in cutlass.range_constexpr(config.parts):
            self.derive(ds, acc_dp, p, delta, part)
            if const_expr(config.dq and part == config.parts - 1):
                self.share(ds, q_state, before)
            self.products.add_keys(self.acc_dk, ds, stage, part)
        following = q_state.clone()
        following.advance()
        acc_dq = self.products.queries_accumulator()
        if const_expr(before):
            self.products.queries(acc_dq, k_before.index, q_state.count + 1)
        if const_expr(config.dq and config.late):
            cute.arch.fence_view_async_shared()  # what was shared is written by now
        warpgroup.wait_group(1 if const_expr(before) else 0)  # P' and dS' have been used
        self.q_pipe.consumer_release(q_state)
        self.do_pipe.consumer_release(q_state)
        if const_expr(not last):
            self.q_pipe.consumer_wait(following)
            self.acc_s.fill(0.0)  # so that its old content need not be kept
            self.products.keys_queries(self.acc_s, k_state.index, following.index)
        if const_expr(before):
            warpgroup.wait_group(0 if const_expr(last) else 1)
        if const_expr(config.dq):
            self.say_shared()
        there = pending if const_expr(first) else Int32(1)  # whether there is a tile before
        if const_expr(before):
            puts = self.put_if_any(acc_dq, puts, there, k_before, first)
        if const_expr(not last):
            self.read_bit_tile(following.index)
        if const_expr(config.fixed):
            self.exponents[0] = exponents
        # Not later: ptxas would serialise products that are under way from one round to the next.
        warpgroup.wait_group(0)
        if const_expr(before and config.late):
            self.hand_over_if_any(puts, there, first)
        return following, puts

    @cute.jit
    def values(self, q_state, v_state, remaining, staggered: cutlass.Constexpr):
        """P' of a tile; dP' and dV are under way. Returns P', dP', and delta.

        staggered: The second warpgroup waits until the first has got so far.
        """
        config, stage = self.config, q_state.index
        if const_expr(staggered):
            if self.group == 1:
                cute.arch.barrier(barrier_id=BackwardBarrier.STAGGER, number_of_threads=BOTH)
        acc_dp = cute.make_rmem_tensor(self.acc_s.shape, Float32)
        p = cute.make_rmem_tensor(acc_dp.shape, self.dtype)
        few = const_expr(config.tile_m == 64)  # statistics: there are registers for them early
        lse = self.statistics(0, stage) if few else None
        self.do_pipe.consumer_wait(q_state)
        self.products.values_gradients(acc_dp, v_state.index, stage)
        lse = lse if few else self.statistics(0, stage)
        bit_tile = cute.arch.shuffle_sync(self.bit_tile[0], 0)
        words = online.mask_words(self.bits, bit_tile, self.keys, self.thread)
        for part in cutlass.range_constexpr(config.parts):
            # While exponentials are computed: later it would be waited for.
            if const_expr(config.late and part == config.parts - 1):
                delta = self.statistics(1, stage)
            self.probabilities(p, lse, bit_tile, words, remaining, part)
            if const_expr(not config.late and part == config.parts - 1):
                delta = self.statistics(1, stage)
            self.products.add_values(self.acc_dv, p, stage, part)
        if const_expr(staggered):
            if self.group == 0:
                cute.arch.barrier_arrive(barrier_id=BackwardBarrier.STAGGER, number_of_threads=BOTH)
        return p, acc_dp, delta

    @cute.jit
    def derive(self, ds, acc_dp, p, delta, part: cutlass.Constexpr):
        """A part of dS' = P' (dP' - delta), the product in 16 bits, two at a time."""
        size = cute.size(acc_dp) // self.config.parts
        for i in cutlass.range_constexpr(part * size, (part + 1) * size):
            ds[i] = (acc_dp[i] - delta[i % 2, i // 4]).to(self.dtype)
        mine, factors = (
            cute.make_tensor(x.iterator + part * size, cute.make_layout(size)) for x in (ds, p)
        )
        multiply_pairs(mine, factors)

    @cute.jit
    def probabilities(self, p, lse, bit_tile, words, remaining, part: cutlass.Constexpr):
        """A part of P' from S'; 0 where the mask or the keys' length says so."""
        size = cute.size(self.acc_s) // self.config.parts
        acc = cute.make_tensor(self.acc_s.iterator + part * size, cute.make_layout(size))
        for i in cutlass.range_constexpr(size):
            power = acc[i] * self.scale_log2 - lse[i % 2, (part * size + i) // 4]
            acc[i] = online.exp2(power)
        if bit_tile != FULL_TILE or remaining < self.config.tile_n:
            mine = cute.make_rmem_tensor(2, Int32)
            for i in cutlass.range_constexpr(2):
                mine[i] = words[i] >> (part * size // 2) if self.row(i) < remaining else Int32(0)
            online.apply_mask(acc, mine, Int32(-1), 0.0)
        for i in cutlass.range_constexpr(size):
            p[part * size + i] = acc[i].to(self.dtype)

    @cute.jit
    def read_bit_tile(self, stage):
        """By the thread that frees the stage for its warp; all want it when P' is computed."""
        bit_tile = Int32(0)
        if self.thread % 32 == 0:
            bit_tile = self.s_tiles[stage]
        self.bit_tile[0] = bit_tile

    @cute.jit
    def statistics(self, which: cutlass.Constexpr, stage):
        """The lse (0) or delta (1) of the thread's columns: (2, tile_m / 8)."""
        values = cute.make_rmem_tensor((2, self.config.tile_m // 8), Float32)
        mine = self.s_stats[None, which, stage].iterator + 2 * (self.thread % 4)
        layout = cute.make_layout((2, self.config.tile_m // 8), stride=(1, 8))
        cute.autovec_copy(cute.make_tensor(mine.align(8), layout), values)
        return values

    @cute.jit
    def row(self, i: cutlass.Constexpr):
        """The key, in the tile, of the thread's row i (0 or 1)."""
        return self.keys * 64 + self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * i

    @cute.jit
    def zero_rows(self, acc, remaining):
        """0 for keys beyond the length, whose values may be NaN."""
        if remaining < self.config.tile_n:
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] if self.row(i // 2 % 2) < remaining else Float32(0.0)

    @cute.jit
    def zero_beyond(self, state, remaining):
        """Clear keys beyond the length, which dQ would multiply with 0: 0 times NaN is NaN.

        Both warpgroups clear all of them, between the last read of the old tile and the first
        read of the new one.
        """
        width, height, s_k = self.config.head_dim, self.config.tile_n, self.s_k
        if remaining < height:
            cute.arch.barrier(barrier_id=BackwardBarrier.BOTH, number_of_threads=BOTH)
            for i in cutlass.range(self.thread, (height - remaining) * width, 128, unroll=1):
                s_k[remaining + i // width, i % width, state.index] = self.dtype(0.0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=BackwardBarrier.BOTH, number_of_threads=BOTH)

    @cute.jit
    def share(self, ds, q_state, before: cutlass.Constexpr):
        """Put dS' into shared memory, where dQ's product reads it; `say_shared` says so.

        Of two stages, the other one is that of the tile before, of which dQ is still to be
        computed; this one is free once both warpgroups have shared the tile before, if any.
        """
        stage = q_state.index
        if const_expr(before):
            self.wait_for_shared(q_state.count + 1)
        n, m, stages = self.config.tile_n, self.config.tile_m, self.config.ds_stages
        strides = (m, 1, 64 * m) if const_expr(self.config.dq_transposed) else (1, n, 64)
        layout = cute.make_layout((64, m, 2, stages), stride=(*strides, n * m))
        place = cute.composition(self.s_ds, layout)[None, None, self.group, stage % stages]
        operation = warp.StMatrix8x8x16bOp(transpose=self.config.dq_transposed, num_matrices=4)
        stmatrix = cute.make_copy_atom(operation, self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.products.scores).get_slice(self.thread)
        cute.copy(stmatrix, copy.retile(ds), copy.partition_D(place))
        if const_expr(not self.config.late):
            cute.arch.fence_view_async_shared()

    @cute.jit
    def say_shared(self):
        """Say that this warpgroup has shared dS' of a tile, and computed dQ of the one before."""
        cute.arch.sync_warp()
        if self.thread % 32 == 0:
            cute.arch.mbarrier_arrive(self.ds_shared)

    @cute.jit
    def wait_for_shared(self, tile):
        """Until both warpgroups have said so of a tile, or of one an even number later: all tiles
        of a CTA are numbered. Of one before the first it has been said.
        """
        cute.arch.mbarrier_wait(self.ds_shared, tile % 2)

    @cute.jit
    def put_if_any(self, acc_dq, puts, there, k_before, first: cutlass.Constexpr):
        """Put dQ of the tile before, if there is one. Returns the new `puts`."""
        if const_expr(not first):
            puts = self.put_queries(acc_dq, puts)
        elif there != 0:  # that of the item before
            puts = self.put_queries(acc_dq, puts)
            self.k_pipe.consumer_release(k_before)
        if const_expr(not self.config.late):
            self.hand_over_if_any(puts, there, first)
        return puts

    @cute.jit
    def hand_over_if_any(self, puts, there, first: cutlass.Constexpr):
        """Hand over dQ of the tile before, if there is one."""
        if const_expr(not first) or there != 0:
            self.hand_over(puts)

    @cute.jit
    def put_queries(self, acc, puts):
        """Put dQ into shared memory, as threads hold it. Returns the new `puts`; `hand_over` is
        still to be called.
        """
        if const_expr(self.config.fixed):
            self.to_fixed_point(acc)
        buffer = self.wait_for_room(puts)
        goal = self.s_dq[None, self.thread, None, self.group, buffer]
        cute.autovec_copy(cute.make_tensor(acc.iterator, goal.shape), goal)
        return puts + 1

    @cute.jit
    def exponents_of(self, stage):
        """The exponents of the thread's two rows of dQ, 8 apart."""
        row = self.thread // 32 * 16 + self.thread % 32 // 4
        if const_expr(not self.config.dq_by_columns):
            row += 64 * self.group
        upper, lower = (
            exponent_in(*(self.s_stats[row + 8 * i, which, stage] for which in range(2)))
            for i in range(2)
        )
        return upper | lower << 8

    @cute.jit
    def to_fixed_point(self, acc):
        """Numbers become integers, whose bits take their place; see elementwise.Statistics."""
        exponents = self.exponents[0]
        factors = [from_bits((exponents >> 8 * i & 255) << 23) for i in range(2)]
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = cute.arch.inline_ptx(
                "{ .reg .b32 i; cvt.rni.s32.f32 i, {$r0}; mov.b32 {$w0}, i; }",
                write_only_types=[Float32],
                read_only_args=[acc[i] * factors[i // 2 % 2]],
            )

    @cute.jit
    def wait_for_room(self, puts):
        """Until what was in the next buffer has been read. Returns the buffer."""
        buffers = self.config.buffers
        buffer = puts % buffers
        cute.arch.mbarrier_wait(self.rooms + (2 * buffer + self.group), puts // buffers % 2)
        return buffer

    @cute.jit
    def hand_over(self, puts):
        """The last buffer that was filled to the storing warp."""
        buffer = (puts - 1) % self.config.buffers
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(
            barrier_id=BackwardBarrier.READY + 2 * buffer + self.group,
            number_of_threads=STORE_THREADS,
        )

    @cute.jit
    def finish(self, item, puts, which: cutlass.Constexpr):
        """Write dV (0) and dK (1) of an item: to the results, or as a part of a split column.
        Returns the new `puts`.
        """
        part = item.part
        if const_expr(1 in which):
            for i in cutlass.range_constexpr(cute.size(self.acc_dk)):
                self.acc_dk[i] = self.acc_dk[i] * self.scale
        accumulators, results, all_parts = (
            [x[i] for i in which] for x in ((self.acc_dv, self.acc_dk), self.results, self.parts)
        )
        if part < 0:
            if const_expr(self.config.dq):
                puts = self.put_keys(accumulators, puts)
            else:
                for acc, result in zip(accumulators, results, strict=True):
                    self.store_keys(acc, result, item)
        else:
            for acc, parts in zip(accumulators, all_parts, strict=True):
                for i in cutlass.range_constexpr(cute.size(acc)):
                    column = self.columns * self.config.columns + self.thread % 4 * 2
                    parts[part, self.row(i // 2 % 2), column + i // 4 * 8 + i % 2] = acc[i]
        return puts

    @cute.jit
    def put_keys(self, accumulators, puts):
        """Put dV and dK into shared memory, into the buffers of dQ. Returns the new `puts`."""
        operation = warp.StMatrix8x8x16bOp(num_matrices=4)
        stmatrix = cute.make_copy_atom(operation, self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.products.of_keys).get_slice(self.thread)
        size = self.config.results
        for i in cutlass.range_constexpr(0, len(accumulators), size):
            buffer = self.wait_for_room(puts)
            for j in cutlass.range_constexpr(size):
                rounded = cute.make_rmem_tensor(accumulators[i + j].shape, self.dtype)
                for n in cutlass.range_constexpr(cute.size(rounded)):
                    rounded[n] = accumulators[i + j][n].to(self.dtype)
                goal = self.s_results[None, None, self.group, buffer, j]
                cute.copy(stmatrix, copy.retile(rounded), copy.partition_D(goal))
            puts += 1
            self.hand_over(puts)
        return puts

    @cute.jit
    def store_keys(self, acc, result, item):
        """Store dK or dV from registers, where there is no shared memory for it."""
        head, batch = item.head, item.batch
        for i in cutlass.range_constexpr(2):
            key = item.n_block * self.config.tile_n + self.row(i)
            if const_expr(self.config.offsets):
                key += self.offsets.keys(batch)
            starts = range(2 * i, cute.size(acc), 4)
            pairs = [pair_of(acc[n], acc[n + 1], self.dtype) for n in starts]
            place = (batch, key, head, self.columns * self.config.columns)
            store_pairs(result, place, pairs, self.config.offsets)
