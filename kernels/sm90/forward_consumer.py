"""A consumer warpgroup of the forward kernel: 64 query rows of each of the CTA's items.

    S = Q K^T;    P = exp2(scale (S - max));    O = O + P V        (FlashAttention, online softmax)

The tensor cores work on S of the next tile and on O of the last one while the threads compute P:
inside a warpgroup because both products are issued before the wait for S, between warpgroups
because named barriers let them take turns (FlashAttention-3, Shah et al., 2024). The first product
of the next item is issued together with the last one of this item, so that short rows leave no
bubble.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from sparse_flash.kernels.sm90 import online_softmax as online
from sparse_flash.kernels.sm90.forward_producer import FULL_BEYOND
from sparse_flash.kernels.sm90.items import ForwardBarrier, PositionItem, RowItem
from sparse_flash.kernels.sm90.primitives import (
    check_arrivals,
    hold,
    multiply,
    pair_of,
    store_pairs,
)
from sparse_flash.masks.layout import FULL_TILE

CONSUMER = pipeline.PipelineUserType.Consumer
FIRST, INNER, BOUNDARY = range(3)  # kinds of steps
WARPGROUP = 128  # threads
PAIR = 2 * WARPGROUP  # those of the warpgroup that waits for its turn, and of the one before
SLACK = 8.0  # by how many powers of two P may exceed 1 before its maximum is taken over


class Consumer:
    """State of one warpgroup: O, the statistics of its rows, and where to find everything."""

    def __init__(
        self, config, dtype, products, store, buffers, pipes, items, bits, results, scale_log2
    ):
        self.config, self.dtype, self.bits, self.scale_log2 = config, dtype, bits, scale_log2
        self.items, self.item_type = items, PositionItem if config.offsets else RowItem
        self.slack = SLACK / scale_log2
        self.qk, self.held, self.pv, self.chunk = products
        self.s_q, s_k, self.s_v, self.s_o, self.s_tiles = buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.store = store
        self.lse, self.out_parts, self.lse_parts, *others = results
        if const_expr(config.offsets):
            (self.out,) = others
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        # V as the second operand of O += P V: (head_dim, keys).
        shape = (config.head_dim, config.tile_n, config.kv_stages)
        s_vt = cute.composition(self.s_v, cute.make_ordered_layout(shape, order=(1, 0, 2)))
        self.f_q = self.qk.make_fragment_A(self.qk.get_slice(0).partition_A(self.s_q))
        self.f_k = self.qk.make_fragment_B(self.qk.get_slice(0).partition_B(s_k))
        self.f_v = self.pv.make_fragment_B(self.pv.get_slice(0).partition_B(s_vt))
        if config.hold_q:
            shape = self.held.partition_shape_A((64, config.head_dim))
            self.r_q = self.held.make_fragment_A(shape)
        self.p = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_n // 16), dtype)
        self.acc_o = cute.make_rmem_tensor(
            self.pv.partition_shape_C((64, config.head_dim)), Float32
        )
        self.stats = cute.make_rmem_tensor((2, 2), Float32)  # of two rows, the maximum and the sum

    @cute.jit
    def run(self):
        """Item after item, until one has no tiles."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(CONSUMER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.items.pipe.num_stages)
        if self.group == self.config.warpgroups - 1:
            self.pass_turn()  # so that warpgroup 0 may begin
        item = self.items.take(work_state, self.item_type)
        work_state.advance()
        remaining = Int32(0)
        if item.count > 0:
            self.q_pipe.consumer_wait(q_state)
            kv_state, remaining = self.step(q_state.index, kv_state, FIRST)
        while item.count > 0:
            self.acc_o.fill(0.0)
            for _ in cutlass.range(item.count - 1, unroll=1):
                kv_state, remaining = self.step(q_state.index, kv_state, INNER)
            self.q_pipe.consumer_release(q_state)
            q_state.advance()
            following = self.items.take(work_state, self.item_type)
            work_state.advance()
            finished = cute.make_rmem_tensor((2, 2), Float32)
            finished.store(self.stats.load())
            if remaining < self.config.tile_n:
                self.v_pipe.consumer_wait(kv_state)
            self.zero_beyond(self.s_v, kv_state.index, remaining)
            if following.count > 0:
                self.q_pipe.consumer_wait(q_state)
                kv_state, remaining = self.step(q_state.index, kv_state, BOUNDARY)
            else:
                self.v_pipe.consumer_wait(kv_state)
                multiply(self.pv, self.acc_o, self.p, self.f_v, kv_state.index, False)
                warpgroup.wait_group(0)
            self.finish(item, finished)
            item = following
        if self.thread < 32:
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def step(self, q_stage, kv_state, kind: cutlass.Constexpr):
        """S and P of a tile, and (unless `kind` is FIRST) O += P V of the tile before it.

        INNER: both belong to one item, whose O is rescaled. BOUNDARY: the tile is the first of
        the next item, whose statistics begin anew. `kv_state` is where the tile before is.
        Returns the state of this tile, and how many keys there are from its first column on.
        """
        config = self.config
        # Made anew for each tile: if it were kept, its old content would have to be.
        acc_s = cute.make_rmem_tensor(self.qk.partition_shape_C((64, config.tile_n)), Float32)
        v_state = kv_state.clone()
        if const_expr(kind != FIRST):
            kv_state.advance()
        slot = q_stage * config.warpgroups + self.group
        if const_expr(config.hold_q and kind != INNER):
            hold(self.held, self.s_q[None, None, slot], self.r_q, self.thread)
        self.k_pipe.consumer_wait(kv_state)
        if const_expr(kind != FIRST):
            self.take_turn()
        if const_expr(config.hold_q):
            multiply(self.held, acc_s, self.r_q, self.f_k, kv_state.index, True)
        else:
            mine = self.f_q[None, None, None, slot]
            multiply(self.qk, acc_s, mine, self.f_k, kv_state.index, True)
        if const_expr(kind != FIRST):
            self.v_pipe.consumer_wait(v_state)
            multiply(self.pv, self.acc_o, self.p, self.f_v, v_state.index, False)
            self.pass_turn()
        bit_tile, remaining = self.what_to_mask(kv_state.index)
        words = online.mask_words(self.bits, bit_tile, self.group, self.thread)
        warpgroup.wait_group(0 if const_expr(kind == FIRST) else 1)
        self.k_pipe.consumer_release(kv_state)
        if bit_tile != FULL_TILE:
            online.apply_mask(acc_s, words, online.columns_within(remaining, self.thread))
        if const_expr(kind != INNER):
            online.reset(self.stats)
        grown, decay = online.take_maximum(acc_s, self.stats, self.scale_log2, self.slack)
        # Always true, but ptxas cannot know: within a basic block it moves the wait for O ahead.
        if const_expr(not config.exponentials_first) or bit_tile >= FULL_BEYOND:
            online.exponentiate(acc_s, self.stats, self.scale_log2)
        if const_expr(kind != FIRST):
            warpgroup.wait_group(0)
            self.v_pipe.consumer_release(v_state)
        # Accumulators of S lie just as the first operand of the next product wants P.
        self.p.store(acc_s.load().to(self.dtype).reshape(self.p.shape))
        if const_expr(kind == INNER):
            if grown:
                online.rescale(self.acc_o, decay)
        return kv_state, remaining

    @cute.jit
    def what_to_mask(self, stage):
        """A tile's bit tile, and how many keys there are from its first column on.

        Read by the thread that frees the stage for its warp, and by no other.
        """
        words, s_tiles = cute.make_rmem_tensor(2, Int32), self.s_tiles
        if self.thread % 32 == 0:
            words[0], words[1] = s_tiles[stage, 0], s_tiles[stage, 1]
        return cute.arch.shuffle_sync(words[0], 0), cute.arch.shuffle_sync(words[1], 0)

    @cute.jit
    def take_turn(self):
        """Wait until the warpgroup before this one has issued its products."""
        cute.arch.barrier(barrier_id=ForwardBarrier.TURN + self.group, number_of_threads=PAIR)

    @cute.jit
    def pass_turn(self):
        """Let the next warpgroup issue its products."""
        following = (self.group + 1) % self.config.warpgroups
        check_arrivals("turn", {"waiting": WARPGROUP, "passing": WARPGROUP}, PAIR)
        assert self.config.warpgroups <= ForwardBarrier.OWN - ForwardBarrier.TURN
        cute.arch.barrier_arrive(barrier_id=ForwardBarrier.TURN + following, number_of_threads=PAIR)

    @cute.jit
    def gather(self):
        """A barrier among the threads of this warpgroup."""
        cute.arch.barrier(barrier_id=ForwardBarrier.OWN + self.group, number_of_threads=WARPGROUP)

    @cute.jit
    def zero_beyond(self, tensor, stage, remaining):
        """Clear the rows of an item's last tile beyond the keys' length: 0 times NaN is NaN.

        Every warpgroup clears them all before it reads any, so they need not wait for each other.
        """
        width, height = self.config.head_dim, self.config.tile_n
        if remaining < height:
            start = cutlass.max(remaining, Int32(0))
            elements = (height - start) * width
            for i in cutlass.range(cute.ceil_div(elements, 128), unroll=1):
                element = i * 128 + self.thread
                if element < elements:
                    tensor[start + element // width, element % width, stage] = self.dtype(0.0)
            cute.arch.fence_view_async_shared()
            self.gather()

    @cute.jit
    def finish(self, item, stats):
        """Write O / sum and the logsumexp: to the output, or as a part of a split row."""
        factors, log_sums = online.normalisers(stats, self.scale_log2)
        if const_expr(self.config.offsets):
            online.mark_unknown(factors, log_sums, item.known, self.row(0))
            online.rescale(self.acc_o, factors)
            self.finish_at_positions(item, log_sums)
        else:
            online.rescale(self.acc_o, factors)
            self.finish_row(item, log_sums)

    @cute.jit
    def row(self, i: cutlass.Constexpr):
        """The query, in the tile, of the thread's row i (0 or 1)."""
        return self.group * 64 + self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * i

    @cute.jit
    def finish_at_positions(self, item, log_sums):
        """Write what is normalised: to the output, or as the part of all rows of this number."""
        lse, out_parts, lse_parts = self.lse, self.out_parts, self.lse_parts
        if item.part < 0:
            self.store_rows(self.out, item)
        for r in cutlass.range_constexpr(2):
            q_idx = item.start + self.row(r)
            if q_idx >= 0 and q_idx < cute.size(lse, mode=[2]):
                if item.part < 0:
                    if self.thread % 4 == 0:
                        lse[item.batch, item.head, q_idx] = log_sums[r]
                else:
                    place = (item.part, item.batch, q_idx, item.head)
                    online.store_part(out_parts, self.acc_o, place, r, self.thread)
                    if self.thread % 4 == 0:
                        lse_parts[item.part, item.batch, item.head, q_idx] = log_sums[r]

    @cute.jit
    def finish_row(self, item, log_sums):
        """Write what is normalised."""
        m_block, head, batch, _, part = item
        lse, out_parts, lse_parts = self.lse, self.out_parts, self.lse_parts
        quad, row = self.thread % 4, self.row(0)
        if part < 0:
            self.store_out(item)
            for r in cutlass.range_constexpr(2):
                q_idx = m_block * self.config.tile_m + row + 8 * r
                if quad == 0 and q_idx < cute.size(lse, mode=[2]):
                    lse[batch, head, q_idx] = log_sums[r]
        else:
            for i in cutlass.range_constexpr(cute.size(self.acc_o)):
                place = (part, row + 8 * (i // 2 % 2), i // 4 * 8 + quad * 2 + i % 2)
                out_parts[place] = self.acc_o[i]
            if quad == 0:
                for r in cutlass.range_constexpr(2):
                    lse_parts[part, row + 8 * r] = log_sums[r]

    @cute.jit
    def store_rows(self, tensor, item):
        """The warpgroup's 64 rows from registers: TMA does not store at negative rows."""
        for r in cutlass.range_constexpr(2):
            starts = range(2 * r, cute.size(self.acc_o), 4)
            pairs = [pair_of(self.acc_o[n], self.acc_o[n + 1], self.dtype) for n in starts]
            place = (item.batch, item.start + self.row(r), item.head, 0)
            store_pairs(tensor, place, pairs, any_row=True)

    @cute.jit
    def store_out(self, item):
        """The warpgroup's 64 rows through shared memory; TMA leaves out rows beyond the end."""
        (o_atom, o_tma), columns = self.store, self.config.o_columns
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.chunk).get_slice(self.thread)
        mine = self.s_o[None, None, self.group]
        block = item.m_block * self.config.warpgroups + self.group
        target = o_tma[None, None, item.head, item.batch]
        target = cute.local_tile(target, (64, columns), (None, None))
        source, goal = cpasync.tma_partition(
            o_atom,
            0,
            cute.make_layout(1),
            cute.group_modes(mine, 0, 2),
            cute.group_modes(target, 0, 2),
        )
        for chunk in cutlass.range_constexpr(self.config.head_dim // columns):
            registers = cute.make_rmem_tensor(
                self.chunk.partition_shape_C((64, columns)), self.dtype
            )
            for i in cutlass.range_constexpr(cute.size(registers)):
                registers[i] = self.acc_o[chunk * cute.size(registers) + i].to(self.dtype)
            if self.thread < 32:  # the store before this one has read its shared memory
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.gather()
            cute.copy(stmatrix, copy.retile(registers), copy.partition_D(mine))
            cute.arch.fence_view_async_shared()
            self.gather()
            if self.thread < 32:
                cute.copy(o_atom, source, goal[None, block, chunk])
                cute.arch.cp_async_bulk_commit_group()
