"""A consumer warpgroup of the forward kernel: 64 query rows of each of the CTA's work tiles.

    S = Q K^T;    P = exp2(scale (S - max));    O = O + P V        (FlashAttention, online softmax)

The tensor cores compute S of the next tile and O of the previous one while the threads compute P.
Inside a warpgroup, both GEMMs are issued before the wait for S. Between warpgroups, named barriers
alternate the GEMMs (ping-pong; FlashAttention-3, Shah et al., 2024). The first GEMM of the next
work tile is issued together with the last one of this work tile, so short rows leave no bubble.
"""

from enum import IntEnum

import cutlass
from cutlass import BFloat16, Float32, Int32, Uint32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import cpasync, warp, warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.kernels.dropout import Dropout, multiply, unit_of_factors
from sparse_flash.kernels.sm90.alibi import Alibi
from sparse_flash.kernels.sm90.barriers import ForwardBarrier
from sparse_flash.kernels.sm90.forward_gather import read_gathered_mask
from sparse_flash.kernels.sm90.forward_producer import FULL_BEYOND
from sparse_flash.kernels.sm90.primitives import (
    check_arrivals,
    clear_rows,
    gemm,
    gemm_after,
    load_a_to_registers,
)
from sparse_flash.kernels.sm90.softcap import Softcap, caps_alone
from sparse_flash.kernels.vectors import pack_pair, round_to, store_pairs
from sparse_flash.kernels.work_tiles import PositionWorkTile, RowWorkTile
from sparse_flash.masks.layout import FULL_TILE

CONSUMER = pipeline.PipelineUserType.Consumer
WARPGROUP = 128  # threads
PAIR = 2 * WARPGROUP  # threads of the waiting warpgroup and of the previous one
RESCALE_THRESHOLD = 8.0  # log2 of the growth of the row maximum that triggers a rescale of O
# With ALiBi scores grow towards the diagonal, by up to 128 slopes a tile. In bfloat16 P may be as
# large, and sums of 2^17 values of up to 2^62 still fit float32.
ALIBI_RESCALE_THRESHOLD = 48.0


class StepKind(IntEnum):
    """Kind of a step of the software pipeline; see `ForwardConsumer.step`."""

    FIRST = 0
    INNER = 1
    BOUNDARY = 2


class ForwardConsumer:
    """State of one warpgroup: accumulator of O, online-softmax state, operands, pipelines."""

    def __init__(
        self,
        config,
        dtype,
        tiled_mmas,
        store,
        buffers,
        pipes,
        work_tiles,
        bits,
        results,
        scale_log2,
        terms=None,
    ):
        self.config, self.dtype, self.bits, self.scale_log2 = config, dtype, bits, scale_log2
        self.work_tiles, self.work_tile_type = (
            work_tiles,
            PositionWorkTile if config.offsets else RowWorkTile,
        )
        growth = RESCALE_THRESHOLD
        if const_expr(config.alibi and dtype is BFloat16):
            growth = ALIBI_RESCALE_THRESHOLD
        self.rescale_threshold = growth / scale_log2
        if const_expr(config.scored):  # see score_terms.py; and kv_lens
            self.terms, self.windows, *self.lengths = terms
            # Batch entry and head in one, and positions of the warp's first row and of the first
            # key beyond the end.
            self.places = cute.make_rmem_tensor(3, Int32)
        if const_expr(config.skips_constant_bias):
            self.bias = cute.make_rmem_tensor(1, Float32)  # see `add_bias`
        if const_expr(caps_alone(config)):
            by_norm = config.warpgroups == 2
            self.softcap = Softcap(self.terms.cap_scale, scale_log2, dtype, by_norm)
        if const_expr(config.dropout):
            self.dropout = Dropout(self.terms.seed, self.terms.dropped, False, by_factors=True)
            self.keep_flags = cute.make_rmem_tensor(config.tile_n // 8, Uint32)
        self.thread = cute.arch.thread_idx()[0] % 128
        self.mma_qk, self.mma_qk_rs, self.mma_pv, self.mma_store = tiled_mmas
        self.sQ, sK, self.sV, self.sO, self.sTiles = buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        if const_expr(config.alibi):
            self.alibi = Alibi(tiled_mmas[:2], self.windows, config.tile_n, self.thread, scale_log2)
        self.store = store
        self.lse, self.out_splits, self.lse_splits, *others = results
        if const_expr(config.offsets or config.direct_store):
            (self.out,) = others
        # Among all consumers, and among those of the slot.
        self.warpgroup = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        self.group = self.warpgroup
        if const_expr(config.slots > 1):
            self.group = self.warpgroup % config.warpgroups
        # V as operand B of O += P V: (head_dim, keys).
        shape = (config.head_dim, config.tile_n, config.kv_stages)
        sVt = cute.composition(self.sV, cute.make_ordered_layout(shape, order=(1, 0, 2)))
        self.tSrQ = self.mma_qk.make_fragment_A(self.mma_qk.get_slice(0).partition_A(self.sQ))
        self.tSrK = self.mma_qk.make_fragment_B(self.mma_qk.get_slice(0).partition_B(sK))
        self.tOrV = self.mma_pv.make_fragment_B(self.mma_pv.get_slice(0).partition_B(sVt))
        if config.q_in_registers:
            shape = self.mma_qk_rs.partition_shape_A((64, config.head_dim))
            self.rQ = self.mma_qk_rs.make_fragment_A(shape)
        self.p = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_n // 16), dtype)
        self.acc_o = cute.make_rmem_tensor(
            self.mma_pv.partition_shape_C((64, config.head_dim)), Float32
        )
        self.stats = cute.make_rmem_tensor(
            (2, 2), Float32
        )  # row maximum and row sum of the thread's two rows

    @cute.jit
    def run(self):
        """Process work tiles until one has no tiles."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(CONSUMER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        if self.group == self.config.warpgroups - 1:
            self.pass_turn()  # lets warpgroup 0 begin
        work_tile = self.work_tiles.take(work_state, self.work_tile_type)
        work_state.advance()
        remaining = Int32(0)
        if work_tile.count > 0:
            self.begin_terms(work_tile)
            self.q_pipe.consumer_wait(q_state)
            kv_state, remaining = self.step(q_state.index, kv_state, StepKind.FIRST)
            self.release_q(q_state, True)
        while work_tile.count > 0:
            self.acc_o.fill(0.0)
            for _ in cutlass.range(work_tile.count - 1, unroll=1):
                kv_state, remaining = self.step(q_state.index, kv_state, StepKind.INNER)
            self.release_q(q_state, False)
            q_state.advance()
            following = self.work_tiles.take(work_state, self.work_tile_type)
            work_state.advance()
            finished = cute.make_rmem_tensor((2, 2), Float32)
            finished.store(self.stats.load())
            if remaining < self.config.tile_n:
                self.v_pipe.consumer_wait(kv_state)
            self.zero_beyond(self.sV, kv_state.index, remaining)
            if following.count > 0:
                self.begin_terms(following)
                self.q_pipe.consumer_wait(q_state)
                kv_state, remaining = self.step(q_state.index, kv_state, StepKind.BOUNDARY)
                self.release_q(q_state, True)
            else:
                self.v_pipe.consumer_wait(kv_state)
                gemm(self.mma_pv, self.acc_o, self.p, self.tOrV, kv_state.index, False)
                warpgroup.wait_group(0)
            self.finish(work_tile, finished)
            work_tile = following
        if self.thread < 32:
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def step(self, q_stage, kv_state, kind: cutlass.Constexpr):
        """Compute S and P of a tile, and (unless `kind` is FIRST) O += P V of the previous tile.

        INNER: both tiles belong to one work tile, whose O is rescaled. BOUNDARY: the tile is the
        first of the next work tile, whose online-softmax state is reset. `kv_state` is the state of
        the previous tile. Returns the state of this tile, and the number of keys from its first
        column on.
        """
        config = self.config
        # A new tensor for each tile: a reused one would keep its dead content in registers.
        acc_s = cute.make_rmem_tensor(self.mma_qk.partition_shape_C((64, config.tile_n)), Float32)
        v_state = kv_state.clone()
        if const_expr(kind != StepKind.FIRST):
            kv_state.advance()
        slot = q_stage * config.warpgroups + self.group
        if const_expr(config.q_in_registers and kind != StepKind.INNER):
            load_a_to_registers(self.mma_qk_rs, self.sQ[None, None, slot], self.rQ, self.thread)
        self.k_pipe.consumer_wait(kv_state)
        if const_expr(kind != StepKind.FIRST):
            self.take_turn()
        of_s = (self.mma_qk, self.tSrQ[None, None, None, slot])
        if const_expr(config.q_in_registers):
            of_s = (self.mma_qk_rs, self.rQ)
        tiled_mma, mine = of_s
        if const_expr(config.alibi):
            gemm_after(self.alibi.operands, tiled_mma, acc_s, mine, self.tSrK, kv_state.index)
        else:
            gemm(tiled_mma, acc_s, mine, self.tSrK, kv_state.index, True)
        if const_expr(kind != StepKind.FIRST):
            self.v_pipe.consumer_wait(v_state)
            gemm(self.mma_pv, self.acc_o, self.p, self.tOrV, v_state.index, False)
            self.pass_turn()
        bit_tile, remaining, words = self.read_mask(kv_state.index)
        self.draw_flags(bit_tile, remaining)
        warpgroup.wait_group(0 if const_expr(kind == StepKind.FIRST) else 1)
        self.add_terms(acc_s, remaining, kv_state)
        grown, decay = self.probabilities(acc_s, bit_tile, words, remaining, kind)
        if const_expr(kind != StepKind.FIRST):
            warpgroup.wait_group(0)
            self.v_pipe.consumer_release(v_state)
        # S accumulators have the register layout of operand A of the next GEMM.
        round_to(self.p, acc_s)
        self.apply_dropout(remaining)
        if const_expr(kind == StepKind.INNER):
            if grown:
                online.rescale(self.acc_o, decay)
        return kv_state, remaining

    @cute.jit
    def probabilities(self, acc_s, bit_tile, words, remaining, kind: cutlass.Constexpr):
        """Replace scores by P. Returns whether to rescale O, and the factors."""
        config, threshold = self.config, self.rescale_threshold
        row_bias = self.alibi.row_bias if const_expr(config.alibi) else None
        if const_expr(config.skips_constant_bias):
            row_bias = (self.bias[0], self.bias[0])
        if const_expr(not caps_alone(config)):
            if bit_tile != FULL_TILE:
                online.apply_mask(acc_s, words, online.columns_within(remaining, self.thread))
        if const_expr(kind != StepKind.INNER):
            online.reset(self.stats)
        if const_expr(caps_alone(config)):
            masking = (bit_tile, words, remaining, self.thread)
            grown, decay = self.softcap.probabilities(acc_s, self.stats, masking, threshold)
        else:
            scale = self.scale_log2
            grown, decay = online.update_row_max(acc_s, self.stats, scale, threshold, row_bias)
            # Always true, but opaque to ptxas, which moves the wait for O ahead in a basic block.
            if const_expr(not config.exp_before_pv_wait) or bit_tile >= FULL_BEYOND:
                online.exp2_and_sum(acc_s, self.stats, scale, 0, row_bias)
        return grown, decay

    @cute.jit
    def release_q(self, q_state, early: cutlass.Constexpr):
        """Release Q after the first step of a work tile (`early`) or after the last one."""
        if const_expr(early == self.config.early_q_release):
            self.q_pipe.consumer_release(q_state)

    @cute.jit
    def read_mask(self, stage):
        """Read the bit tile of a step, its number of keys, and the thread's words of bits."""
        if const_expr(self.config.gathers):
            return read_gathered_mask(self.config, (self.sTiles, self.bits), stage, self.thread)
        bit_tile, remaining = self.read_tile_info(stage)
        halves = const_expr(self.config.steps_per_tile == 2)
        words_of = online.half_mask_words if halves else online.mask_words
        return bit_tile, remaining, words_of(self.bits, bit_tile, self.group, self.thread)

    @cute.jit
    def add_terms(self, acc_s, remaining, kv_state):
        """Turn S into scores, and release the stage of K."""
        if const_expr(not self.config.distance_bias):
            self.k_pipe.consumer_release(kv_state)
        if const_expr(self.config.softcap and not caps_alone(self.config)):
            score_terms.apply_softcap(acc_s, self.terms.cap_scale)
        if const_expr(self.config.alibi):
            self.alibi.complete(acc_s, remaining)
        if const_expr(self.config.distance_bias):
            self.add_bias(acc_s, remaining, kv_state.index)
            cute.arch.sync_warp()  # one lane releases for all
            self.k_pipe.consumer_release(kv_state)

    @cute.jit
    def add_bias(self, acc_s, remaining, stage):
        """Add the bias by distance to S; where it is one value, leave that to the rows' maxima."""
        if const_expr(not self.config.skips_constant_bias):
            self.add_values(acc_s, stage)
        else:
            bias, apart = self.bias, self.places[1] - self.places[2] + remaining
            bias[0] = Float32(0.0)
            if self.windows.is_constant(apart, (16, self.config.tile_n)):
                bias[0] = self.windows.value(stage, self.row(0))
            else:
                self.add_values(acc_s, stage)

    @cute.jit
    def add_values(self, acc_s, stage):
        """Add the bias of each element to S."""
        values = self.windows.values(stage, self.row(0), 0, cute.size(acc_s))
        for i in cutlass.range_constexpr(cute.size(acc_s)):
            acc_s[i] = acc_s[i] + values[i]

    @cute.jit
    def draw_flags(self, bit_tile, remaining):
        """Draw which elements of the next P are kept, before the wait for its S."""
        if const_expr(self.config.draws_ahead):
            pair, row, column = self.places[0], self.places[1], self.places[2] - remaining
            keep_flags = self.keep_flags
            # Always true, but opaque to ptxas, as in `step`: the wait for S stays behind.
            if bit_tile >= FULL_BEYOND:
                flags = self.dropout.flags(pair, row, column, self.config.tile_n // 16)
                for i in cutlass.range_constexpr(len(flags)):
                    keep_flags[i] = flags[i]

    @cute.jit
    def apply_dropout(self, remaining):
        """Drop elements of P, whose row sums are those without dropout."""
        if const_expr(self.config.draws_ahead):
            multiply(self.p, self.dropout.masks_of(self.keep_flags))
        elif const_expr(self.config.dropout):
            pair, row, column = self.places[0], self.places[1], self.places[2] - remaining
            multiply(self.p, self.dropout.masks(pair, row, column, self.config.tile_n // 16))

    @cute.jit
    def begin_terms(self, work_tile):
        """Prepare positions of a work tile, and the coefficient of its head."""
        placed = self.config.dropout or self.config.skips_constant_bias
        if const_expr(self.config.alibi or placed):
            kv_lens, *at = self.lengths
            limit = kv_lens[work_tile.batch]
            if const_expr(self.config.offsets):  # as in `Positions.shift`
                kv_starts, s_kv = at
                limit = cutlass.min(limit, s_kv) - kv_starts[work_tile.batch]
            query = work_tile.m_block * self.config.tile_m
            if const_expr(self.config.alibi):
                coefficient = self.terms.coefficient(work_tile.head)
                self.alibi.begin(coefficient, query + self.row(0) - limit)
            if const_expr(placed):
                heads = cute.size(self.lse, mode=[1])
                self.places[0] = work_tile.batch * heads + work_tile.head
                self.places[1] = query + self.group * 64 + self.thread // 32 * 16
                self.places[2] = limit

    @cute.jit
    def read_tile_info(self, stage):
        """Read a tile's bit tile, and the number of keys from its first column on.

        Only the lane that releases the stage for its warp reads shared memory.
        """
        words, sTiles = cute.make_rmem_tensor(2, Int32), self.sTiles
        if const_expr(self.config.clear_tile_info):
            words.fill(0)  # without a value in all lanes, the old ones would keep their registers
        if self.thread % 32 == 0:
            words[0], words[1] = sTiles[stage, 0], sTiles[stage, 1]
        return cute.arch.shuffle_sync(words[0], 0), cute.arch.shuffle_sync(words[1], 0)

    @cute.jit
    def take_turn(self):
        """Wait until the previous warpgroup has issued its GEMMs."""
        if const_expr(self.config.takes_turns):
            turn = ForwardBarrier.TURN + self.warpgroup
            cute.arch.barrier(barrier_id=turn, number_of_threads=PAIR)

    @cute.jit
    def pass_turn(self):
        """Let the next warpgroup issue its GEMMs."""
        groups = self.config.warpgroups
        if const_expr(self.config.takes_turns):
            first = ForwardBarrier.TURN + (self.warpgroup - self.group)  # of the slot
            following = first + (self.group + 1) % groups
            check_arrivals("turn", {"waiting": WARPGROUP, "passing": WARPGROUP}, PAIR)
            assert self.config.slots * groups <= ForwardBarrier.OWN - ForwardBarrier.TURN
            cute.arch.barrier_arrive(barrier_id=following, number_of_threads=PAIR)

    @cute.jit
    def sync_warpgroup(self):
        """A barrier among the threads of this warpgroup."""
        own = ForwardBarrier.OWN + self.warpgroup
        cute.arch.barrier(barrier_id=own, number_of_threads=WARPGROUP)

    @cute.jit
    def zero_beyond(self, tensor, stage, remaining):
        """Clear rows beyond the number of keys in the last tile of a work tile: 0 times NaN is NaN.

        Every warpgroup clears all rows before its own reads, so no synchronization is needed.
        """
        if remaining < self.config.tile_n:
            clear_rows(tensor, cutlass.max(remaining, Int32(0)), stage, self.thread, WARPGROUP)
            self.sync_warpgroup()

    @cute.jit
    def finish(self, work_tile, stats):
        """Store O / sum and the logsumexp: to the output, or as one split of a row."""
        sink = None
        if const_expr(self.config.sinks):  # of a split row, the combination adds it
            of_head = self.terms.sink(work_tile.head)
            sink = of_head if work_tile.split_idx < 0 else -Float32.inf
        factors, log_sums = online.row_normalizers(stats, self.scale_log2, sink)
        if const_expr(self.config.dropout):
            for r in cutlass.range_constexpr(2):
                factors[r] = factors[r] * (self.terms.keep_scale / unit_of_factors(self.dtype))
        if const_expr(self.config.offsets):
            online.mark_unknown(factors, log_sums, work_tile.known, self.row(0))
            online.rescale(self.acc_o, factors)
            self.finish_at_positions(work_tile, log_sums)
        else:
            online.rescale(self.acc_o, factors)
            self.finish_row(work_tile, log_sums)

    @cute.jit
    def row(self, i: cutlass.Constexpr):
        """Index in the tile of the query in the thread's row i (0 or 1)."""
        return self.group * 64 + self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * i

    @cute.jit
    def finish_at_positions(self, work_tile, log_sums):
        """Store normalized O and logsumexp: to the output, or to the arrays of the split."""
        lse, out_splits, lse_splits = self.lse, self.out_splits, self.lse_splits
        if work_tile.split_idx < 0:
            self.store_rows(self.out, work_tile)
        for r in cutlass.range_constexpr(2):
            q_idx = work_tile.start + self.row(r)
            if q_idx >= 0 and q_idx < cute.size(lse, mode=[2]):
                if work_tile.split_idx < 0:
                    if self.thread % 4 == 0:
                        lse[work_tile.batch, work_tile.head, q_idx] = log_sums[r]
                else:
                    coord = (work_tile.split_idx, work_tile.batch, q_idx, work_tile.head)
                    online.store_split(out_splits, self.acc_o, coord, r, self.thread)
                    if self.thread % 4 == 0:
                        lse_splits[work_tile.split_idx, work_tile.batch, work_tile.head, q_idx] = (
                            log_sums[r]
                        )

    @cute.jit
    def finish_row(self, work_tile, log_sums):
        """Store normalized O and logsumexp: to the output, or to the buffers of the split."""
        m_block, head, batch, _, split_idx = work_tile
        lse, out_splits, lse_splits = self.lse, self.out_splits, self.lse_splits
        quad, row = self.thread % 4, self.row(0)
        if split_idx < 0:
            if const_expr(self.config.direct_store):
                self.store_rows(self.out, work_tile)
            else:
                self.store_out(work_tile)
            for r in cutlass.range_constexpr(2):
                q_idx = m_block * self.config.tile_m + row + 8 * r
                if quad == 0 and q_idx < cute.size(lse, mode=[2]):
                    lse[batch, head, q_idx] = log_sums[r]
        else:
            for i in cutlass.range_constexpr(cute.size(self.acc_o)):
                coord = (split_idx, row + 8 * (i // 2 % 2), i // 4 * 8 + quad * 2 + i % 2)
                out_splits[coord] = self.acc_o[i]
            if quad == 0:
                for r in cutlass.range_constexpr(2):
                    lse_splits[split_idx, row + 8 * r] = log_sums[r]

    @cute.jit
    def store_rows(self, tensor, work_tile):
        """Store the warpgroup's 64 rows from registers: TMA cannot store at negative rows."""
        at_positions = const_expr(self.config.offsets)
        if const_expr(at_positions):
            start = work_tile.start
        else:
            start = work_tile.m_block * self.config.tile_m
        for r in cutlass.range_constexpr(2):
            starts = range(2 * r, cute.size(self.acc_o), 4)
            pairs = [pack_pair(self.acc_o[n], self.acc_o[n + 1], self.dtype) for n in starts]
            coord = (work_tile.batch, start + self.row(r), work_tile.head, 0)
            store_pairs(tensor, coord, pairs, any_row=at_positions)

    @cute.jit
    def store_out(self, work_tile):
        """Store the warpgroup's 64 rows through shared memory; TMA drops rows out of bounds."""
        (o_atom, o_tma), columns = self.store, self.config.o_columns
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.mma_store).get_slice(self.thread)
        mine = self.sO[None, None, self.group]
        block = work_tile.m_block * self.config.warpgroups + self.group
        target = o_tma[None, None, work_tile.head, work_tile.batch]
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
                self.mma_store.partition_shape_C((64, columns)), self.dtype
            )
            for i in cutlass.range_constexpr(cute.size(registers)):
                registers[i] = self.acc_o[chunk * cute.size(registers) + i].to(self.dtype)
            if self.thread < 32:  # the previous store has read its shared memory
                cute.arch.cp_async_bulk_wait_group(0, read=True)
            self.sync_warpgroup()
            cute.copy(stmatrix, copy.retile(registers), copy.partition_D(mine))
            cute.arch.fence_view_async_shared()
            self.sync_warpgroup()
            if self.thread < 32:
                cute.copy(o_atom, source, goal[None, block, chunk])
                cute.arch.cp_async_bulk_commit_group()
