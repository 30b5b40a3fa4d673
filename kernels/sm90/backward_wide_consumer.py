"""The three consumer warpgroups of the backward kernel for large head_dims: dV, dK and dQ.

Each overlaps its threads' work on a tile with its own GEMM of the previous tile, and all three with
each other's. Two stages of P' and of dS' let each run a tile ahead of the next.
"""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warp, warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.backward_producer import load_relaxed, query_coord, sum_address
from sparse_flash.kernels.sm90.barriers import WideBackwardBarrier
from sparse_flash.kernels.sm90.primitives import arrive_once, clear_rows, gemm, mul_pairs
from sparse_flash.kernels.vectors import pack_pair, store_pairs
from sparse_flash.kernels.work_tiles import ColumnWorkTile, first_step, tile_of_step
from sparse_flash.masks.layout import FULL_TILE

CONSUMER = pipeline.PipelineUserType.Consumer


class KeyAccumulator:
    """Base of the warpgroups of dV and dK: (64 keys, head_dim) of a gradient in registers.

    mmas: Tiled MMAs of a score GEMM and of the gradient.
    operands: Shared memory of the keys or values, of the query tiles in the score GEMM, and of the
        query tiles in the gradient's GEMM (Q or dO).
    pipes: Pipelines of the operands.
    """

    def __init__(self, config, dtype, work_tiles, mmas, operands, pipes, result):
        self.config, self.dtype, self.work_tiles = config, dtype, work_tiles
        self.result, self.splits = result
        self.mma_s, self.mma_dkv = mmas
        self.key_pipe, self.score_pipe, self.sum_pipe = pipes
        self.thread = cute.arch.thread_idx()[0] % 128
        mma_s, mma_dkv = self.mma_s.get_slice(0), self.mma_dkv.get_slice(0)
        sKeys, sScores, sSum = operands
        self.keys = self.mma_s.make_fragment_A(mma_s.partition_A(sKeys))
        self.queries = self.mma_s.make_fragment_B(mma_s.partition_B(sScores))
        columns, self.chunks = config.wide_columns, config.head_dim // config.wide_columns
        # (columns of a chunk, queries, chunks, stage).
        shape = (columns, config.tile_m, self.chunks, config.q_stages)
        summed = cute.composition(sSum, cute.make_ordered_layout(shape, order=(1, 0, 2, 3)))
        self.summed = self.mma_dkv.make_fragment_B(mma_dkv.partition_B(summed))
        shape = self.mma_dkv.partition_shape_C((64, columns))
        self.accs = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.chunks)]
        # P' or dS' as operand A.
        self.scores = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_m // 16), dtype)

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        key_state = pipeline.make_pipeline_state(CONSUMER, self.key_pipe.num_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
        work_state.advance()
        while work_tile.count >= 0:
            count, remaining = work_tile.count, work_tile.remaining
            for chunk in cutlass.range_constexpr(self.chunks):
                self.accs[chunk].fill(0.0)
            if count > 0 and remaining > 0:
                self.key_pipe.consumer_wait(key_state)
                acc = self.issue_scores(key_state, q_state)
                mask = self.load_mask(q_state)
                warpgroup.wait_group(0)
                self.modify(acc, mask, q_state, remaining)
                self.publish(acc, q_state, remaining)
                for _ in cutlass.range(count - 1, unroll=1):
                    q_state = self.step(key_state, q_state, remaining)
                self.key_pipe.consumer_release(key_state)
                key_state.advance()
                self.issue_sum(q_state)
                warpgroup.wait_group(0)
                self.sum_pipe.consumer_release(q_state)
                q_state.advance()
            self.finish(work_tile)
            work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
            work_state.advance()

    @cute.jit
    def step(self, key_state, q_state, remaining):
        """Add a tile to the gradient, and compute the scores of the next one; returns its state."""
        following = q_state.clone()
        following.advance()
        acc = self.issue_scores(key_state, following)
        mask = self.load_mask(following)
        self.issue_sum(q_state)
        warpgroup.wait_group(self.chunks)
        self.modify(acc, mask, following, remaining)
        warpgroup.wait_group(0)  # the GEMM has read `scores`
        self.sum_pipe.consumer_release(q_state)
        self.publish(acc, following, remaining)
        return following

    @cute.jit
    def issue_scores(self, key_state, q_state):
        """Issue S' or dP' of a tile. Returns its accumulator."""
        shape = self.mma_s.partition_shape_C((self.config.tile_n, self.config.tile_m))
        acc = cute.make_rmem_tensor(shape, Float32)
        self.score_pipe.consumer_wait(q_state)
        mine = self.keys[None, None, None, key_state.index]
        gemm(self.mma_s, acc, mine, self.queries, q_state.index, True)
        return acc

    @cute.jit
    def issue_sum(self, q_state):
        """Issue the gradient's GEMMs of a tile, one for each chunk of columns."""
        self.sum_pipe.consumer_wait(q_state)
        for chunk in cutlass.range_constexpr(self.chunks):
            summed = self.summed[None, None, None, chunk, None]
            gemm(self.mma_dkv, self.accs[chunk], self.scores, summed, q_state.index, False)

    @cute.jit
    def columns_of(self, sStats, which: cutlass.Constexpr, stage):
        """Load lse (0) or delta (1) of the thread's columns: (2, tile_m / 8)."""
        values = cute.make_rmem_tensor((2, self.config.tile_m // 8), Float32)
        mine = sStats[None, which, stage].iterator + 2 * (self.thread % 4)
        layout = cute.make_layout((2, self.config.tile_m // 8), stride=(1, 8))
        cute.autovec_copy(cute.make_tensor(mine.align(8), layout), values)
        return values

    @cute.jit
    def row(self, i: cutlass.Constexpr):
        """Index in the tile of the key in the thread's row i (0 or 1)."""
        return self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * i

    @cute.jit
    def finish(self, work_tile):
        """Store the gradient: to the result, or as a split."""
        splits, split_idx = self.splits, work_tile.split_idx
        for chunk in cutlass.range_constexpr(self.chunks):
            acc, start = self.accs[chunk], chunk * self.config.wide_columns
            if split_idx < 0:
                for i in cutlass.range_constexpr(2):
                    key = work_tile.n_block * self.config.tile_n + self.row(i)
                    starts = range(2 * i, cute.size(acc), 4)
                    pairs = [pack_pair(acc[n], acc[n + 1], self.dtype) for n in starts]
                    store_pairs(self.result, (work_tile.batch, key, work_tile.head, start), pairs)
            else:
                for i in cutlass.range_constexpr(cute.size(acc)):
                    column = start + self.thread % 4 * 2 + i // 4 * 8 + i % 2
                    splits[split_idx, self.row(i // 2 % 2), column] = acc[i]


class ValueGradient(KeyAccumulator):
    """dV, and P' for the warpgroup of dK."""

    def __init__(
        self, config, dtype, work_tiles, mmas, operands, pipes, given_p, inputs, result, scale_log2
    ):
        super().__init__(config, dtype, work_tiles, mmas, operands, pipes, result)
        self.scale_log2 = scale_log2
        self.sP, self.p_pipe = given_p
        self.sStats, self.sTiles, self.bits = inputs

    @cute.jit
    def load_mask(self, q_state):
        """Load a tile's bit tile, and its mask bits of the thread, while GEMMs run.

        Only the lane that releases the stage for its warp reads shared memory.
        """
        bit_tile = Int32(0)
        if self.thread % 32 == 0:
            bit_tile = self.sTiles[q_state.index, 0]
        bit_tile = cute.arch.shuffle_sync(bit_tile, 0)
        return bit_tile, online.mask_words(self.bits, bit_tile, 0, self.thread)

    @cute.jit
    def modify(self, acc, mask, q_state, remaining):
        """Replace S' by P'; masked elements are 0. Releases Q."""
        lse, (bit_tile, words) = self.columns_of(self.sStats, 0, q_state.index), mask
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = online.exp2(acc[i] * self.scale_log2 - lse[i % 2, i // 4])
        if bit_tile != FULL_TILE or remaining < self.config.tile_n:
            for i in cutlass.range_constexpr(2):
                words[i] = words[i] if self.row(i) < remaining else Int32(0)
            online.apply_mask(acc, words, Int32(-1), 0.0)
        cute.arch.sync_warp()  # all lanes have read the stage
        self.score_pipe.consumer_release(q_state)

    @cute.jit
    def publish(self, acc, q_state, remaining):
        """Round P', and give it to the warpgroup of dK."""
        for i in cutlass.range_constexpr(cute.size(acc)):
            self.scores[i] = acc[i].to(self.dtype)
        self.p_pipe.sync_object_empty.wait(q_state.index, q_state.phase ^ 1)
        goal = self.sP[None, self.thread, None, q_state.index]
        cute.autovec_copy(cute.make_tensor(self.scores.iterator, goal.shape), goal)
        cute.arch.mbarrier_arrive(self.p_pipe.sync_object_full.get_barrier(q_state.index))


class KeyGradient(KeyAccumulator):
    """dK, and dS' for the warpgroup of dQ."""

    def __init__(
        self,
        config,
        dtype,
        work_tiles,
        mmas,
        operands,
        pipes,
        given_p,
        given_ds,
        sStats,
        result,
        scale,
    ):
        super().__init__(config, dtype, work_tiles, mmas, operands, pipes, result)
        self.scale, self.sStats = scale, sStats
        self.sP, self.p_pipe = given_p
        self.sdS, self.ds_pipe = given_ds

    def load_mask(self, q_state):
        """No mask: P' of masked elements is 0."""
        return

    @cute.jit
    def modify(self, acc, mask, q_state, remaining):
        """Subtract delta from dP'. Releases dO."""
        self.score_pipe.consumer_release(q_state)
        self.sum_pipe.consumer_wait(q_state)  # Q, with the row statistics
        delta = self.columns_of(self.sStats, 1, q_state.index)
        for i in cutlass.range_constexpr(cute.size(acc)):
            acc[i] = acc[i] - delta[i % 2, i // 4]
        if remaining < self.config.tile_n:  # values beyond the length may be NaN
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] if self.row(i // 2 % 2) < remaining else Float32(0.0)

    @cute.jit
    def publish(self, acc, q_state, remaining):
        """Multiply by P', and give dS' to the warpgroup of dQ."""
        stage = q_state.index
        self.p_pipe.consumer_wait(q_state)
        source = self.sP[None, self.thread, None, stage]
        p = cute.make_rmem_tensor(cute.size(acc), self.dtype)
        cute.autovec_copy(source, cute.make_tensor(p.iterator, source.shape))
        for i in cutlass.range_constexpr(cute.size(acc)):
            self.scores[i] = acc[i].to(self.dtype)
        mul_pairs(self.scores, p)
        cute.arch.mbarrier_arrive(self.p_pipe.sync_object_empty.get_barrier(stage))
        self.ds_pipe.sync_object_empty.wait(stage, q_state.phase ^ 1)
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.mma_s).get_slice(self.thread)
        ds = cute.make_tensor(self.scores.iterator, acc.layout)
        cute.copy(stmatrix, copy.retile(ds), copy.partition_D(self.sdS[None, None, stage]))
        cute.arch.fence_view_async_shared()
        arrive_once(self.ds_pipe.sync_object_full, stage)

    @cute.jit
    def finish(self, work_tile):
        """Scale and store the gradient."""
        for chunk in cutlass.range_constexpr(self.chunks):
            acc = self.accs[chunk]
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] * self.scale
        KeyAccumulator.finish(self, work_tile)


class QueryGradient:
    """dQ = dS K of each tile, added to float32 sums in memory.

    As in `BackwardStorer` the first CTA at a tile stores instead of adding, and later CTAs wait for
    that store. A warp decides for its rows of a chunk of columns. Bit 4 chunk + warp of the tile's
    state is set when that store begins, and bit 16 + 4 chunk + warp when it is visible.
    No warp waits for another one in between, so there is no deadlock.
    """

    def __init__(self, config, dtype, work_tiles, mma_dq, keys, given_ds, inputs):
        self.config, self.dtype, self.work_tiles, self.mma_dq = config, dtype, work_tiles, mma_dq
        self.sK, self.k_pipe = keys
        sdS, self.ds_pipe = given_ds
        self.dq_sum, self.done, self.tiles, self.heads = inputs
        self.thread = cute.arch.thread_idx()[0] % 128
        m, n, columns = config.tile_m, config.tile_n, config.wide_dq_columns
        slice_ = mma_dq.get_slice(0)
        # K: (columns of a chunk, keys, chunks, stage).
        shape = (columns, n, config.head_dim // columns, config.k_stages)
        layout = cute.make_ordered_layout(shape, order=(1, 0, 2, 3))
        self.keys = mma_dq.make_fragment_B(slice_.partition_B(cute.composition(self.sK, layout)))
        layout = cute.make_ordered_layout((m, n, config.ds_stages), order=(1, 0, 2))
        self.ds = mma_dq.make_fragment_A(slice_.partition_A(cute.composition(sdS, layout)))

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        k_state = pipeline.make_pipeline_state(CONSUMER, self.config.k_stages)
        ds_state = pipeline.make_pipeline_state(CONSUMER, self.config.ds_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
        work_state.advance()
        while work_tile.count >= 0:
            count, remaining = work_tile.count, work_tile.remaining
            if count > 0 and remaining > 0:
                self.k_pipe.consumer_wait(k_state)
                self.zero_beyond(k_state, remaining)
                start = first_step(self.config, work_tile, self.heads[0])
                for j in cutlass.range(count, unroll=1):
                    column = self.tiles[tile_of_step(self.config, work_tile, start, j), 0]
                    m_block, head = query_coord(column, work_tile.head, self.heads)
                    coord = (work_tile.batch, head, 2 * m_block)
                    self.add_tile(coord, k_state, ds_state)
                    ds_state.advance()
                self.k_pipe.consumer_release(k_state)
                k_state.advance()
            work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
            work_state.advance()

    @cute.jit
    def add_tile(self, coord, k_state, ds_state):
        """Compute dQ of a tile, in chunks of columns, and add it to the sums."""
        columns = self.config.wide_dq_columns
        chunks = self.config.head_dim // columns
        address = sum_address(self.dq_sum, coord) + 16 * self.thread
        done = self.done.iterator + cute.crd2idx(coord, self.done.layout)
        found = load_relaxed(done)  # overlaps the GEMM
        self.ds_pipe.consumer_wait(ds_state)
        ds = self.ds[None, None, None, ds_state.index]
        for chunk in cutlass.range(chunks, unroll=1):
            acc = cute.make_rmem_tensor(self.mma_dq.partition_shape_C((64, columns)), Float32)
            keys = self.keys[None, None, None, chunk, None]
            gemm(self.mma_dq, acc, ds, keys, k_state.index, True)
            warpgroup.wait_group(0)
            if chunk == chunks - 1:
                arrive_once(self.ds_pipe.sync_object_empty, ds_state.index)
            begun, first = Int32(1) << (4 * chunk + self.thread // 32), Int32(0)
            if (found & begun << 16) == 0:
                first = self.claim_rows(done, begun)
            self.add(acc, address + chunk * (columns * 256), first)
            if first != 0:
                self.mark_stored(done, begun)

    @cute.jit
    def add(self, acc, address, first):
        """Add an accumulator to the sums, or store it, in register order; 8 columns take 2 KiB."""
        if first == 0:
            for i in cutlass.range_constexpr(0, cute.size(acc), 4):
                cute.arch.inline_ptx(
                    "red.relaxed.gpu.global.add.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                    read_only_args=[address + 512 * i, *(acc[i + n] for n in range(4))],
                )
        else:
            for i in cutlass.range_constexpr(0, cute.size(acc), 4):
                cute.arch.inline_ptx(
                    "st.global.v4.f32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};",
                    read_only_args=[address + 512 * i, *(acc[i + n] for n in range(4))],
                )

    @cute.jit
    def claim_rows(self, done, begun):
        """Wait until this warp may add to its rows. Returns 1 if it is the first to do so."""
        found = Int32(0)
        if cute.arch.lane_idx() == 0:
            # Relaxed: the additions happen in the L2 cache and read no stale data.
            found = cute.arch.atomic_or(done, begun, sem="relaxed", scope="gpu")
        found = cute.arch.shuffle_sync(found, 0) & begun
        if found != 0:
            while (load_relaxed(done) & begun << 16) == 0:
                pass
        return Int32(1) if found == 0 else Int32(0)

    @cute.jit
    def mark_stored(self, done, begun):
        """Publish the warp's stores."""
        cute.arch.fence_acq_rel_gpu()
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.atomic_or(done, begun << 16, sem="release", scope="gpu")

    @cute.jit
    def zero_beyond(self, state, remaining):
        """Clear keys beyond the length: the dQ GEMM would compute 0 times NaN.

        The warpgroup of dV may read them meanwhile; it masks their rows.
        """
        if remaining < self.config.tile_n:
            clear_rows(self.sK, remaining, state.index, self.thread, 128)
            cute.arch.barrier(barrier_id=WideBackwardBarrier.QUERIES, number_of_threads=128)
