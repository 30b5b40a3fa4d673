"""A consumer warpgroup of the backward kernel: 64 keys of each of the CTA's work tiles.

Scores are transposed, so P and dS are in the register layout of operand A (FlashAttention-3, Shah
et al., 2024). For each tile of queries:

    S' = K Q';   P' = exp2(scale S' - lse);   dP' = V dO';   dS' = P' (dP' - delta)
    dV += P' dO;   dK += dS' Q;   dQ += dS K

where ' is the transpose, and lse and delta belong to the columns, which are queries. To keep the
tensor cores busy, S' of the next tile is issued before dQ of this one is stored, dP' before P' is
computed, and dV and dK in slices.

dQ needs dS' of both warpgroups. It is computed one tile later, so the warpgroups need not run in
lockstep. The second warpgroup starts half a tile after the first, so one computes exponentials
while the GEMMs of the other run.

With small tiles, `defer_handoff` delays the fence and the hand-off of shared-memory stores: a warp
that waited for its own stores would delay its next GEMMs.

With two stages of K, work tiles overlap (`overlap_items`): S' of the next one is issued before dK
and dV are stored, and dQ of the last tile is computed in the first step of the next one.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warp, warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.kernels.dropout import Dropout
from sparse_flash.kernels.preprocess import exponent_in
from sparse_flash.kernels.sm90.backward_gemms import BackwardGemms
from sparse_flash.kernels.sm90.backward_producer import STORE_THREADS
from sparse_flash.kernels.sm90.backward_scores import BackwardScores, Place
from sparse_flash.kernels.sm90.barriers import BackwardBarrier
from sparse_flash.kernels.sm90.primitives import clear_rows
from sparse_flash.kernels.vectors import from_bits, pack_pair, store_pairs
from sparse_flash.kernels.work_tiles import ColumnWorkTile

CONSUMER = pipeline.PipelineUserType.Consumer
BOTH = 2 * 128  # threads of the two warpgroups


class BackwardConsumer(BackwardScores):
    """State of one warpgroup: accumulators of dK and dV, operands, pipelines."""

    def __init__(
        self,
        config,
        dtype,
        tiled_mmas,
        buffers,
        pipes,
        signals,
        lists,
        results,
        scales,
        of_distances=(None, None),
    ):
        self.config, self.dtype = config, dtype
        self.work_tiles, self.bits, self.offsets = lists
        self.scale, self.scale_log2, *terms = scales
        if const_expr(config.scored):
            self.terms = score_terms.ScoreTerms(*terms[0])
            self.windows, self.scratch = of_distances
        if const_expr(config.dropout):
            self.dropout = Dropout(self.terms.seed, self.terms.dropped, transposed=True)
        _, _, self.sK, _, self.sdS, self.sdQ, self.sdKV, *others = buffers
        self.sStats, self.sTiles = others
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        # mbarriers: one for dS' of all consumer warps, one per free buffer of dQ. (Named barriers
        # would make the warps of a warpgroup wait.)
        self.ds_published, self.buffer_free = signals
        self.results, self.splits = results  # dV and dK
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        self.clear_scratch()
        # Index of this warpgroup's 64 keys, and of its columns of dK and dV.
        self.keys, self.columns = self.group, 0
        if const_expr(config.split_columns):
            self.keys, self.columns = 0, self.group
        owned = (self.keys, self.columns, self.group)
        self.gemms = BackwardGemms(config, tiled_mmas, buffers[:5], owned, self.thread)
        shape = tiled_mmas[0].partition_shape_C((64, config.tile_m))
        self.acc_s = cute.make_rmem_tensor(shape, Float32)
        shape = tiled_mmas[2].partition_shape_C((64, config.columns))
        self.acc_dk = cute.make_rmem_tensor(shape, Float32)
        self.acc_dv = cute.make_rmem_tensor(shape, Float32)
        # Bit tile of the tile whose S' has been issued; valid in the first lane of each warp.
        self.bit_tile = cute.make_rmem_tensor(1, Int32)
        # Likewise, its `Place`.
        self.place = cute.make_rmem_tensor(len(Place._fields), Int32)
        # Fixed-point exponents of the thread's two rows of dQ, for the previous tile.
        self.exponents = cute.make_rmem_tensor(1, Int32)

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        overlap_items = self.config.overlap_items
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(CONSUMER, self.config.k_stages)
        v_state = pipeline.make_pipeline_state(CONSUMER, self.config.v_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        k_before, buffers_filled = k_state.clone(), Int32(0)
        pending = Int32(0)  # 1: the last dQ of the previous work tile, with K at `k_before`, is due
        work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
        work_state.advance()
        if const_expr(overlap_items):
            self.begin(q_state, k_state, work_tile)
            warpgroup.wait_group(0)
        while work_tile.count >= 0:
            count, remaining = work_tile.count, work_tile.remaining
            self.acc_dk.fill(0.0)
            self.acc_dv.fill(0.0)
            if count > 0 and remaining > 0:
                if const_expr(not overlap_items):
                    self.begin(q_state, k_state, work_tile)
                self.v_pipe.consumer_wait(v_state)
                self.gemms.load_v_to_registers(v_state.index)
                warpgroup.wait_group(0)
                kv_states = (k_state, v_state, k_before, pending)
                shared = (kv_states, remaining)
                q_state, buffers_filled = self.tiles(count, q_state, buffers_filled, shared)
                v_state.advance()
                k_before = k_state.clone()
                k_state.advance()
                pending = Int32(1)
            following = self.work_tiles.take(work_state, ColumnWorkTile)
            work_state.advance()
            early = 0  # number of results stored before S' is issued, which frees buffers sooner
            if const_expr(overlap_items):
                early = 2 - self.config.results
                buffers_filled = self.finish(work_tile, buffers_filled, range(early))
                self.begin(q_state, k_state, following)
            buffers_filled = self.finish(work_tile, buffers_filled, range(early, 2))
            # No later step would compute this dQ, and other CTAs may wait for its sums.
            last_step = following.count <= 0 or following.remaining <= 0
            if pending != 0 and (not overlap_items or last_step):
                if const_expr(self.config.dq):
                    buffers_filled = self.last_dq(q_state.count, k_before, buffers_filled)
                self.k_pipe.consumer_release(k_before)
                pending = Int32(0)
            # Not later: ptxas would serialize GEMMs in flight across iterations.
            warpgroup.wait_group(0)
            work_tile = following

    @cute.jit
    def begin(self, q_state, k_state, work_tile):
        """Issue S' of the first tile of a work tile, and load the register part of K.

        Without tiles, S' is computed from stale data and not used: a branch would cost more.
        """
        count, remaining = work_tile.count, work_tile.remaining
        if count > 0 and remaining > 0:
            self.k_pipe.consumer_wait(k_state)
            self.zero_beyond(k_state, remaining)
            self.q_pipe.consumer_wait(q_state)
            self.read_bit_tile(q_state.index)
        self.gemms.load_k_to_registers(k_state.index)
        self.gemms.gemm_s(self.acc_s, k_state.index, q_state.index)

    @cute.jit
    def tiles(self, count, q_state, buffers_filled, shared):
        """Process all tiles of a work tile; dQ lags one tile behind.

        Where work tiles overlap, the first step computes the last dQ of the previous work tile.
        Returns the new q_state and `buffers_filled`.
        """
        if const_expr(not self.config.dq):
            for _ in cutlass.range(count - 1, unroll=1):
                q_state, buffers_filled = self.step(q_state, buffers_filled, shared)
            q_state, buffers_filled = self.step(q_state, buffers_filled, shared, last=True)
        elif count == 1:
            q_state, buffers_filled = self.step(
                q_state, buffers_filled, shared, first=True, last=True
            )
        else:
            q_state, buffers_filled = self.step(q_state, buffers_filled, shared, first=True)
            for _ in cutlass.range(count - 2, unroll=1):
                q_state, buffers_filled = self.step(q_state, buffers_filled, shared)
            q_state, buffers_filled = self.step(q_state, buffers_filled, shared, last=True)
        return q_state, buffers_filled

    @cute.jit
    def last_dq(self, following, k_state, buffers_filled):
        """Compute dQ of the tile before `following`. Returns the new `buffers_filled`."""
        acc_dq = self.gemms.make_dq_accumulator()
        self.wait_for_ds(following + 1)
        self.gemms.gemm_dq(acc_dq, k_state.index, following + 1)
        warpgroup.wait_group(0)
        buffers_filled = self.store_dq(acc_dq, buffers_filled)
        self.publish_buffer(buffers_filled)
        return buffers_filled

    @cute.jit
    def step(
        self,
        q_state,
        buffers_filled,
        shared,
        first: cutlass.Constexpr = False,
        last: cutlass.Constexpr = False,
    ):
        """Process a tile whose S' has been issued. Returns the new q_state and `buffers_filled`.

        Computes dQ of the previous tile unless this is the first of its work tile and work tiles do
        not overlap. Issues S' of the next tile unless this is the last one.
        """
        config, stage, (kv_states, remaining) = self.config, q_state.index, shared
        k_state, v_state, k_before, pending = kv_states
        before = config.dq and (config.overlap_items or not first)
        k_before = k_before if const_expr(first) else k_state  # of the previous tile
        staggered = config.dq and first and not last
        p, factors, acc_dp, delta = self.values(q_state, v_state, remaining, staggered)
        ds = cute.make_rmem_tensor(p.shape, self.dtype)
        late = config.fixed_point and config.scored  # S' and dP' leave registers first
        early = config.fixed_point and not late
        exponents = self.exponents_of(stage) if const_expr(early) else Int32(0)
        warpgroup.wait_group(config.p_slices)
        if const_expr(last):
            self.v_pipe.consumer_release(v_state)
        self.zero_rows(acc_dp, remaining)
        for p_slice in cutlass.range_constexpr(config.p_slices):
            self.derive(ds, acc_dp, factors, self.of_slice(1, stage, p_slice, delta), p_slice)
            if const_expr(config.dq and p_slice == config.p_slices - 1):
                self.store_ds(ds, q_state, before)
            self.gemms.gemm_dk(self.acc_dk, ds, stage, p_slice)
        following = q_state.clone()
        following.advance()
        acc_dq = self.gemms.make_dq_accumulator()
        if const_expr(before):
            self.gemms.gemm_dq(acc_dq, k_before.index, q_state.count + 1)
        exponents = self.exponents_of(stage) if const_expr(late) else exponents
        if const_expr(config.dq and config.defer_handoff):
            cute.arch.fence_view_async_shared()  # the stores of dS' have completed by now
        warpgroup.wait_group(1 if const_expr(before) else 0)  # the GEMMs have read P' and dS'
        self.q_pipe.consumer_release(q_state)
        self.do_pipe.consumer_release(q_state)
        if const_expr(not last):
            self.q_pipe.consumer_wait(following)
            self.acc_s.fill(0.0)  # frees its registers: the old content is dead
            self.gemms.gemm_s(self.acc_s, k_state.index, following.index)
        self.add_distance_grads(ds)
        if const_expr(before):
            warpgroup.wait_group(0 if const_expr(last) else 1)
        if const_expr(config.dq):
            self.publish_ds()
        there = pending if const_expr(first) else Int32(1)  # whether there is a previous tile
        if const_expr(before):
            buffers_filled = self.store_dq_if_any(acc_dq, buffers_filled, there, k_before, first)
        if const_expr(not last):
            self.read_bit_tile(following.index)
        if const_expr(config.fixed_point):
            self.exponents[0] = exponents
        # Not later: ptxas would serialize GEMMs in flight across iterations.
        warpgroup.wait_group(0)
        if const_expr(before and config.defer_handoff):
            self.publish_if_any(buffers_filled, there, first)
        return following, buffers_filled

    @cute.jit
    def values(self, q_state, v_state, remaining, staggered: cutlass.Constexpr):
        """Compute P' of a tile; dP' and dV are in flight.

        Returns P' for dV, factors of dS' (see `derive`), dP' and delta.

        staggered: The second warpgroup waits for the first to finish its P'.
        """
        config, stage = self.config, q_state.index
        if const_expr(staggered):
            if self.group == 1:
                cute.arch.barrier(barrier_id=BackwardBarrier.STAGGER, number_of_threads=BOTH)
        acc_dp = cute.make_rmem_tensor(self.acc_s.shape, Float32)
        p = cute.make_rmem_tensor(acc_dp.shape, self.dtype)
        weights, negated = p, None
        if const_expr(config.softcap):
            weights = cute.make_rmem_tensor(acc_dp.shape, self.dtype)
        elif const_expr(config.dropout):
            negated = cute.make_rmem_tensor(acc_dp.shape, self.dtype)
        # Then lse fits into registers before dP' is issued.
        sliced = config.sliced_statistics
        few = const_expr(config.tile_m == 64 and not config.softcap and not sliced)
        lse, delta = self.statistics(0, stage) if few else None, None
        self.do_pipe.consumer_wait(q_state)
        self.gemms.gemm_dp(acc_dp, v_state.index, stage)
        lse = lse if few or sliced else self.statistics(0, stage)
        bit_tile = cute.arch.shuffle_sync(self.bit_tile[0], 0)
        words = online.mask_words(self.bits, bit_tile, self.keys, self.thread)
        if const_expr(config.early_weights):
            for i in cutlass.range_constexpr(2):
                words[i] = words[i] if self.row(i) < remaining else Int32(0)
        shared = ((bit_tile, words, remaining), self.place_of_warp(), stage)
        for p_slice in cutlass.range_constexpr(config.p_slices):
            last = const_expr(p_slice == config.p_slices - 1 and not sliced)
            # Overlaps the exponentials, which hide the load latency.
            if const_expr(config.defer_handoff and last):
                delta = self.statistics(1, stage)
            lse_of_slice = self.of_slice(0, stage, p_slice, lse)
            self.probabilities(p, (weights, negated), lse_of_slice, shared, p_slice)
            if const_expr(not config.defer_handoff and last):
                delta = self.statistics(1, stage)
            self.gemms.gemm_dv(self.acc_dv, p, stage, p_slice)
        if const_expr(staggered):
            if self.group == 0:
                cute.arch.barrier_arrive(barrier_id=BackwardBarrier.STAGGER, number_of_threads=BOTH)
        return p, (weights, negated), acc_dp, delta

    @cute.jit
    def zero_rows(self, acc, remaining):
        """Set rows of keys beyond the length to 0; their values may be NaN."""
        if remaining < self.config.tile_n:
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] if self.row(i // 2 % 2) < remaining else Float32(0.0)

    @cute.jit
    def zero_beyond(self, state, remaining):
        """Clear keys beyond the length: the dQ GEMM would compute 0 times NaN.

        Both warpgroups clear all rows, between the last read of the previous tile and the first
        read of this one.
        """
        if remaining < self.config.tile_n:
            cute.arch.barrier(barrier_id=BackwardBarrier.BOTH, number_of_threads=BOTH)
            clear_rows(self.sK, remaining, state.index, self.thread, 128)
            cute.arch.barrier(barrier_id=BackwardBarrier.BOTH, number_of_threads=BOTH)

    @cute.jit
    def store_ds(self, ds, q_state, before: cutlass.Constexpr):
        """Store dS' to shared memory for the dQ GEMM; `publish_ds` signals it.

        The other stage holds the previous tile, whose dQ is due. This stage is free once both
        warpgroups have published the previous tile.
        """
        stage = q_state.index
        if const_expr(before):
            self.wait_for_ds(q_state.count + 1)
        n, m, stages = self.config.tile_n, self.config.tile_m, self.config.ds_stages
        strides = (m, 1, 64 * m) if const_expr(self.config.dq_transposed) else (1, n, 64)
        layout = cute.make_layout((64, m, 2, stages), stride=(*strides, n * m))
        target = cute.composition(self.sdS, layout)[None, None, self.group, stage % stages]
        operation = warp.StMatrix8x8x16bOp(transpose=self.config.dq_transposed, num_matrices=4)
        stmatrix = cute.make_copy_atom(operation, self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.gemms.mma_s).get_slice(self.thread)
        cute.copy(stmatrix, copy.retile(ds), copy.partition_D(target))
        if const_expr(not self.config.defer_handoff):
            cute.arch.fence_view_async_shared()

    @cute.jit
    def publish_ds(self):
        """Arrive: dS' of this tile is stored, and dQ of the previous tile is computed."""
        cute.arch.sync_warp()
        if self.thread % 32 == 0:
            cute.arch.mbarrier_arrive(self.ds_published)

    @cute.jit
    def wait_for_ds(self, tile):
        """Block until both warpgroups have published dS' of `tile`; the barrier phase is the parity
        of the CTA-wide tile counter.
        """
        cute.arch.mbarrier_wait(self.ds_published, tile % 2)

    @cute.jit
    def store_dq_if_any(self, acc_dq, buffers_filled, there, k_before, first: cutlass.Constexpr):
        """Store dQ of the previous tile, if there is one. Returns `buffers_filled`."""
        if const_expr(not first):
            buffers_filled = self.store_dq(acc_dq, buffers_filled)
        elif there != 0:  # of the previous work tile
            buffers_filled = self.store_dq(acc_dq, buffers_filled)
            self.k_pipe.consumer_release(k_before)
        if const_expr(not self.config.defer_handoff):
            self.publish_if_any(buffers_filled, there, first)
        return buffers_filled

    @cute.jit
    def publish_if_any(self, buffers_filled, there, first: cutlass.Constexpr):
        """Publish dQ of the previous tile, if there is one."""
        if const_expr(not first) or there != 0:
            self.publish_buffer(buffers_filled)

    @cute.jit
    def store_dq(self, acc, buffers_filled):
        """Store dQ to shared memory in register order. Returns the new `buffers_filled`."""
        if const_expr(self.config.fixed_point):
            self.to_fixed_point(acc)
        buffer = self.acquire_buffer(buffers_filled)
        goal = self.sdQ[None, self.thread, None, self.group, buffer]
        cute.autovec_copy(cute.make_tensor(acc.iterator, goal.shape), goal)
        return buffers_filled + 1

    @cute.jit
    def exponents_of(self, stage):
        """Fixed-point exponents of the thread's two rows of dQ, 8 rows apart."""
        row = self.thread // 32 * 16 + self.thread % 32 // 4
        if const_expr(not self.config.dq_by_columns):
            row += 64 * self.group
        upper, lower = (
            exponent_in(*(self.sStats[row + 8 * i, which, stage] for which in range(2)))
            for i in range(2)
        )
        return upper | lower << 8

    @cute.jit
    def to_fixed_point(self, acc):
        """Convert to int32 in place, with the exponents of `preprocess.Preprocess`."""
        exponents = self.exponents[0]
        factors = [from_bits((exponents >> 8 * i & 255) << 23) for i in range(2)]
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = cute.arch.inline_ptx(
                "{ .reg .b32 i; cvt.rni.s32.f32 i, {$r0}; mov.b32 {$w0}, i; }",
                write_only_types=[Float32],
                read_only_args=[acc[i] * factors[i // 2 % 2]],
            )

    @cute.jit
    def acquire_buffer(self, buffers_filled):
        """Block until the next buffer has been read. Returns its index."""
        buffers = self.config.buffers
        buffer = buffers_filled % buffers
        cute.arch.mbarrier_wait(
            self.buffer_free + (2 * buffer + self.group), buffers_filled // buffers % 2
        )
        return buffer

    @cute.jit
    def publish_buffer(self, buffers_filled):
        """Publish the last filled buffer to the store warp."""
        buffer = (buffers_filled - 1) % self.config.buffers
        cute.arch.fence_view_async_shared()
        cute.arch.barrier_arrive(
            barrier_id=BackwardBarrier.READY + 2 * buffer + self.group,
            number_of_threads=STORE_THREADS,
        )

    @cute.jit
    def finish(self, work_tile, buffers_filled, which: cutlass.Constexpr):
        """Store dV (0) and dK (1): to the results, or as a split. Returns `buffers_filled`."""
        split_idx = work_tile.split_idx
        if const_expr(self.config.dropout and 0 in which):
            for i in cutlass.range_constexpr(cute.size(self.acc_dv)):
                self.acc_dv[i] = self.acc_dv[i] * self.terms.keep_scale
        if const_expr(1 in which):
            for i in cutlass.range_constexpr(cute.size(self.acc_dk)):
                self.acc_dk[i] = self.acc_dk[i] * self.scale
        accumulators, results, all_splits = (
            [x[i] for i in which] for x in ((self.acc_dv, self.acc_dk), self.results, self.splits)
        )
        if split_idx < 0:
            if const_expr(self.config.dq):
                buffers_filled = self.store_dkv_to_smem(accumulators, buffers_filled)
            else:
                for acc, result in zip(accumulators, results, strict=True):
                    self.store_dkv_to_gmem(acc, result, work_tile)
        else:
            for acc, splits in zip(accumulators, all_splits, strict=True):
                for i in cutlass.range_constexpr(cute.size(acc)):
                    column = self.columns * self.config.columns + self.thread % 4 * 2
                    splits[split_idx, self.row(i // 2 % 2), column + i // 4 * 8 + i % 2] = acc[i]
        return buffers_filled

    @cute.jit
    def store_dkv_to_smem(self, accumulators, buffers_filled):
        """Store dV and dK to shared memory, to the buffers of dQ. Returns `buffers_filled`."""
        operation = warp.StMatrix8x8x16bOp(num_matrices=4)
        stmatrix = cute.make_copy_atom(operation, self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.gemms.mma_dkv).get_slice(self.thread)
        size = self.config.results
        for i in cutlass.range_constexpr(0, len(accumulators), size):
            buffer = self.acquire_buffer(buffers_filled)
            for j in cutlass.range_constexpr(size):
                rounded = cute.make_rmem_tensor(accumulators[i + j].shape, self.dtype)
                for n in cutlass.range_constexpr(cute.size(rounded)):
                    rounded[n] = accumulators[i + j][n].to(self.dtype)
                goal = self.sdKV[None, None, self.group, buffer, j]
                cute.copy(stmatrix, copy.retile(rounded), copy.partition_D(goal))
            buffers_filled += 1
            self.publish_buffer(buffers_filled)
        return buffers_filled

    @cute.jit
    def store_dkv_to_gmem(self, acc, result, work_tile):
        """Store dK or dV from registers, in configs without a buffer in shared memory."""
        head, batch = work_tile.head, work_tile.batch
        for i in cutlass.range_constexpr(2):
            key = work_tile.n_block * self.config.tile_n + self.row(i)
            if const_expr(self.config.offsets):
                key += self.offsets.keys(batch)
            starts = range(2 * i, cute.size(acc), 4)
            pairs = [pack_pair(acc[n], acc[n + 1], self.dtype) for n in starts]
            coord = (batch, key, head, self.columns * self.config.columns)
            store_pairs(result, coord, pairs, self.config.offsets)
