"""The consumer warpgroup of the backward kernel for small blocks: all gradients of 64 keys.

The GEMMs of a tile are those of backward_consumer.py, but one warpgroup has all of dS', so dQ
belongs to the same step. S' of the next tile is issued before dQ of this one is added to memory.

A warp stages its 16 rows of dQ in shared memory, some columns at a time, and one lane issues a bulk
reduction of them. No warp waits for another one meanwhile. Each buffer is filled again once its
reduction has read it. With `stage_in_do` the buffers lie in the stage of dO that all GEMMs of the
step have read. The next step releases that stage.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warp, warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.backward_gemms import BackwardGemms
from sparse_flash.kernels.sm90.backward_producer import (
    FREE,
    READY,
    BackwardStorer,
    load_relaxed,
    sum_address,
)
from sparse_flash.kernels.sm90.backward_scores import BackwardScores
from sparse_flash.kernels.sm90.backward_wide_consumer import QueryGradient
from sparse_flash.kernels.sm90.barriers import SmallBackwardBarrier
from sparse_flash.kernels.sm90.forward_gather import gathered_words
from sparse_flash.kernels.sm90.primitives import clear_rows, gemm
from sparse_flash.kernels.vectors import pack_pair, store_pairs
from sparse_flash.kernels.work_tiles import ColumnWorkTile

CONSUMER = pipeline.PipelineUserType.Consumer


class SmallGemms(BackwardGemms):
    """The GEMMs of one warpgroup that has all keys of the CTA."""

    def _partition_dq_operands(self, sK, sdS):
        """Partition shared memory into the operands of the dQ GEMM."""
        config, columns = self.config, self.config.small_dq_columns
        m, n, mma_dq = config.tile_m, config.tile_n, self.mma_dq.get_slice(0)
        # K: (columns of a chunk, keys, chunks, stage).
        shape = (columns, n, config.head_dim // columns, config.k_stages)
        keys = cute.composition(sK, cute.make_ordered_layout(shape, order=(1, 0, 2, 3)))
        self.tdQrK = self.mma_dq.make_fragment_B(mma_dq.partition_B(keys))
        # dS: (queries, keys, stage).
        layout = cute.make_ordered_layout((m, n, config.ds_stages), order=(1, 0, 2))
        self.tdQrdS = self.mma_dq.make_fragment_A(mma_dq.partition_A(cute.composition(sdS, layout)))

    @cute.jit
    def gemm_dq_chunk(self, acc, chunk: cutlass.Constexpr, k_stage):
        """Issue a chunk of columns of dQ = dS K."""
        keys = self.tdQrK[None, None, None, chunk, None]
        gemm(self.mma_dq, acc, self.tdQrdS[None, None, None, 0], keys, k_stage, True)


class SmallConsumer(BackwardScores):
    """State of the warpgroup: accumulators of dK and dV, operands, pipelines."""

    claim_rows = QueryGradient.claim_rows
    bulk, publish_rows = BackwardStorer.bulk, BackwardStorer.publish_rows

    def __init__(self, config, dtype, tiled_mmas, buffers, inputs, pipes, lists, results, scales):
        self.config, self.dtype = config, dtype
        self.work_tiles, self.bits = lists
        self.scale, self.scale_log2 = scales
        self.sStats, self.sTiles = inputs
        *buffers, self.sdQ = buffers
        _, _, self.sK, _, self.sdS = buffers
        self.q_pipe, self.do_pipe, self.k_pipe, self.v_pipe = pipes
        self.results, (self.dq_sum, self.done), self.splits = results  # of dV and dK
        self.thread = cute.arch.thread_idx()[0] % 128
        self.keys = 0  # see `BackwardScores.row`
        self.gemms = SmallGemms(config, tiled_mmas, buffers, (0, 0, 0), self.thread)
        shape = tiled_mmas[0].partition_shape_C((64, config.tile_m))
        self.acc_s = cute.make_rmem_tensor(shape, Float32)
        shape = tiled_mmas[2].partition_shape_C((64, config.head_dim))
        self.acc_dk = cute.make_rmem_tensor(shape, Float32)
        self.acc_dv = cute.make_rmem_tensor(shape, Float32)

    @cute.jit
    def run(self):
        """Process work tiles until the end of the list."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        k_state = pipeline.make_pipeline_state(CONSUMER, self.config.k_stages)
        v_state = pipeline.make_pipeline_state(CONSUMER, self.config.v_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
        work_state.advance()
        while work_tile.count >= 0:
            self.acc_dk.fill(0.0)
            self.acc_dv.fill(0.0)
            if work_tile.count > 0 and work_tile.remaining > 0:
                self.k_pipe.consumer_wait(k_state)
                self.zero_beyond(k_state, work_tile.remaining)
                self.q_pipe.consumer_wait(q_state)
                self.gemms.load_k_to_registers(k_state.index)
                self.gemms.gemm_s(self.acc_s, k_state.index, q_state.index)
                self.v_pipe.consumer_wait(v_state)
                self.gemms.load_v_to_registers(v_state.index)
                warpgroup.wait_group(0)
                shared = (k_state, v_state, work_tile.remaining, work_tile.batch)
                for _ in cutlass.range(work_tile.count - 1, unroll=1):
                    q_state = self.step(q_state, shared, False)
                q_state = self.step(q_state, shared, True)
                self.v_pipe.consumer_release(v_state)
                v_state.advance()
                self.k_pipe.consumer_release(k_state)
                k_state.advance()
            self.finish(work_tile)
            work_tile = self.work_tiles.take(work_state, ColumnWorkTile)
            work_state.advance()
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def step(self, q_state, shared, last: cutlass.Constexpr):
        """Process a tile whose S' is computed. Issues S' of the next one unless this is the last.

        Returns the state of the next tile.
        """
        config, stage, (k_state, v_state, remaining, batch) = self.config, q_state.index, shared
        acc_dp = cute.make_rmem_tensor(self.acc_s.shape, Float32)
        p, ds = (cute.make_rmem_tensor(acc_dp.shape, self.dtype) for _ in range(2))
        lse = self.statistics(0, stage)
        self.do_pipe.consumer_wait(q_state)
        self.gemms.gemm_dp(acc_dp, v_state.index, stage)
        words, block, head = self.read_tiles(stage)
        place = self.sums_of(batch, block, head)
        masking = ((*words, remaining), self.place_of_warp(), stage)
        for p_slice in cutlass.range_constexpr(config.p_slices):
            of_slice = self.of_slice(0, stage, p_slice, lse)
            self.probabilities(p, (p, None), of_slice, masking, p_slice)
            self.gemms.gemm_dv(self.acc_dv, p, stage, p_slice)
        if const_expr(config.stage_in_do):
            self.release_previous(q_state)
        delta = self.statistics(1, stage)
        warpgroup.wait_group(config.p_slices)
        self.zero_rows(acc_dp, remaining)
        for p_slice in cutlass.range_constexpr(config.p_slices):
            of_slice = self.of_slice(1, stage, p_slice, delta)
            self.derive(ds, acc_dp, (p, None), of_slice, p_slice)
            if const_expr(p_slice == config.p_slices - 1):
                self.store_ds(ds)
            self.gemms.gemm_dk(self.acc_dk, ds, stage, p_slice)
        if const_expr(config.stage_in_do):
            warpgroup.wait_group(config.p_slices)  # dV: after the barrier no GEMM reads dO
        self.sync()  # dS' of all warps is stored
        acc_dq = self.dq_accumulator()
        self.gemms.gemm_dq_chunk(acc_dq, 0, k_state.index)
        warpgroup.wait_group(1)  # the GEMMs have read P' and dS'
        self.q_pipe.consumer_release(q_state)
        if const_expr(not config.stage_in_do):
            self.do_pipe.consumer_release(q_state)
        following = q_state.clone()
        following.advance()
        if const_expr(not last):
            self.q_pipe.consumer_wait(following)
            self.acc_s.fill(0.0)  # frees its registers: the old content is dead
            self.gemms.gemm_s(self.acc_s, k_state.index, following.index)
        warpgroup.wait_group(0 if const_expr(last) else 1)
        self.add_chunk(acc_dq, place, 0, stage)
        for chunk in cutlass.range_constexpr(1, config.head_dim // config.small_dq_columns):
            rest = self.dq_accumulator()
            self.gemms.gemm_dq_chunk(rest, chunk, k_state.index)
            warpgroup.wait_group(0)
            self.add_chunk(rest, place, chunk, stage)
        # Not later: ptxas would serialize GEMMs in flight across iterations.
        warpgroup.wait_group(0)
        return following

    @cute.jit
    def release_previous(self, q_state):
        """Release dO of the step before, once the reductions have read dQ in its place."""
        cute.arch.cp_async_bulk_wait_group(0, read=True)
        if q_state.count > 0:
            index = 1 - q_state.index
            state = pipeline.PipelineState(2, q_state.count, index, q_state.phase)
            self.do_pipe.consumer_release(state)

    @cute.jit
    def read_tiles(self, stage):
        """Read the tiles of a step: (FULL_TILE or not, the thread's words of bits), and the block
        of queries and the head of the warp's rows of dQ.

        Only the lane that releases the stage for its warp reads shared memory.
        """
        size, sTiles = self.config.tiles_per_step, self.sTiles
        mine = self.thread // (128 // size)  # the warp's tile
        words = cute.make_rmem_tensor(size + 2, Int32)
        if self.thread % 32 == 0:
            for i in cutlass.range_constexpr(size):
                words[i] = sTiles[stage, i]
            words[size] = sTiles[stage, size + mine]
            words[size + 1] = sTiles[stage, 2 * size + mine]
        found = [cute.arch.shuffle_sync(words[i], 0) for i in range(size + 2)]
        if const_expr(size == 1):
            masking = (found[0], online.mask_words(self.bits, found[0], 0, self.thread))
        else:
            masking = gathered_words(self.bits, found[:size], self.config.query_block, self.thread)
        return masking, found[size], found[size + 1]

    @cute.jit
    def statistics(self, which: cutlass.Constexpr, stage, first: cutlass.Constexpr = 0, slices=1):
        """Load lse (0) or delta (1) of the thread's columns: (2, tile_m / 8)."""
        size, rows = self.config.tiles_per_step, self.config.query_block
        values = cute.make_rmem_tensor((2, self.config.tile_m // 8), Float32)
        start = self.sStats[None, which, stage * size].iterator + 2 * (self.thread % 4)
        layout = cute.make_layout((2, (rows // 8, size)), stride=(1, (8, 2 * rows)))
        goal = cute.make_tensor(values.iterator, cute.make_layout((2, (rows // 8, size))))
        cute.autovec_copy(cute.make_tensor(start.align(8), layout), goal)
        return values

    @cute.jit
    def zero_rows(self, acc, remaining):
        """Set rows of keys beyond the length to 0; their values may be NaN."""
        if remaining < self.config.tile_n:
            for i in cutlass.range_constexpr(cute.size(acc)):
                acc[i] = acc[i] if self.row(i // 2 % 2) < remaining else Float32(0.0)

    @cute.jit
    def zero_beyond(self, state, remaining):
        """Clear keys beyond the length: the dQ GEMM would compute 0 times NaN."""
        if remaining < self.config.tile_n:
            clear_rows(self.sK, remaining, state.index, self.thread, 128)
            self.sync()

    @cute.jit
    def store_ds(self, ds):
        """Store dS' to shared memory for the dQ GEMM, once all warps have read the previous one."""
        self.sync()
        stmatrix = cute.make_copy_atom(warp.StMatrix8x8x16bOp(num_matrices=4), self.dtype)
        copy = cute.make_tiled_copy_C(stmatrix, self.gemms.mma_s).get_slice(self.thread)
        cute.copy(stmatrix, copy.retile(ds), copy.partition_D(self.sdS[None, None, 0]))
        cute.arch.fence_view_async_shared()

    @cute.jit
    def sync(self):
        """A barrier among the threads of the warpgroup."""
        cute.arch.barrier(barrier_id=SmallBackwardBarrier.CONSUMERS, number_of_threads=128)

    def dq_accumulator(self):
        """An accumulator for a chunk of columns of dQ."""
        shape = self.gemms.mma_dq.partition_shape_C((64, self.config.small_dq_columns))
        return cute.make_rmem_tensor(shape, Float32)

    @cute.jit
    def sums_of(self, batch, block, head):
        """Where the warp adds its rows of dQ.

        Whether there is a tile, the address of the rows' first half of the columns, the pointer to
        the state of the tile of 64 queries, the state, and the slice of 16 rows.
        """
        size, warp_idx = self.config.tiles_per_step, self.thread // 32
        there, block = block >= 0, cutlass.max(block, Int32(0))
        coord = (batch, head, 2 * (block // size))
        slot = block % size * (4 // size) + warp_idx % (4 // size)
        address = sum_address(self.dq_sum, coord) + self.config.dq_chunk * slot  # of 4 slices
        done = self.done.iterator + cute.crd2idx(coord, self.done.layout)
        return there, address, done, load_relaxed(done), slot

    @cute.jit
    def add_chunk(self, acc, place, chunk: cutlass.Constexpr, stage):
        """Add a chunk of dQ to the sums, or store it if the warp is the first at its rows."""
        config, (there, address, done, found, slot) = self.config, place
        rounds = config.small_dq_columns // config.staged_columns
        if there:
            begun, first = Int32(1) << (4 * chunk + slot), Int32(0)
            if (found & begun << 16) == 0:
                first = self.claim_rows(done, begun)
            cute.arch.fence_proxy("async.global")
            for i in cutlass.range_constexpr(rounds):
                self.add_columns(acc, i, address, chunk * rounds + i, stage, first)
            if first != 0:
                self.publish_rows(done, begun)

    @cute.jit
    def add_columns(self, acc, i: cutlass.Constexpr, address, nth: cutlass.Constexpr, stage, first):
        """Add or store `staged_columns` of the warp's rows: the i-th of the accumulator, the nth of
        the tile.
        """
        config = self.config
        self.wait_for_buffer(nth)
        index = stage if const_expr(config.stage_in_do) else 0
        buffer = self.sdQ[None, None, None, nth % config.buffers, self.thread // 32, index]
        goal = buffer[None, cute.arch.lane_idx(), None]
        source = cute.make_tensor(acc.iterator + i * cute.size(goal), goal.shape)
        cute.autovec_copy(source, goal)
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        # A half of the columns is a chunk of the sums.
        half, part = divmod(nth, config.head_dim // 2 // config.staged_columns)
        size = 64 * config.staged_columns
        found = Int32(READY) if first == 0 else Int32(FREE)
        sums = address + (half * 4 * config.dq_chunk + part * size)
        self.bulk(sums, buffer.iterator, size, found)

    @cute.jit
    def wait_for_buffer(self, nth: cutlass.Constexpr):
        """Wait until the reduction before has read the buffer of the nth columns of a tile."""
        buffers = self.config.buffers
        if const_expr(nth >= buffers or (nth == 0 and not self.config.stage_in_do)):
            # All reductions of the tile before must have read theirs, of this one all but the last.
            pending = buffers - 1 if const_expr(nth > 0) else 0
            cute.arch.cp_async_bulk_wait_group(pending, read=True)
            cute.arch.sync_warp()

    @cute.jit
    def finish(self, work_tile):
        """Store dV and dK: to the results, or as a split."""
        split_idx = work_tile.split_idx
        for i in cutlass.range_constexpr(cute.size(self.acc_dk)):
            self.acc_dk[i] = self.acc_dk[i] * self.scale
        for i, acc in enumerate((self.acc_dv, self.acc_dk)):
            result, splits = self.results[i], self.splits[i]
            if split_idx < 0:
                for r in cutlass.range_constexpr(2):
                    key = work_tile.n_block * self.config.tile_n + self.row(r)
                    starts = range(2 * r, cute.size(acc), 4)
                    pairs = [pack_pair(acc[n], acc[n + 1], self.dtype) for n in starts]
                    store_pairs(result, (work_tile.batch, key, work_tile.head, 0), pairs)
            else:
                for n in cutlass.range_constexpr(cute.size(acc)):
                    column = self.thread % 4 * 2 + n // 4 * 8 + n % 2
                    splits[split_idx, self.row(n // 2 % 2), column] = acc[n]
