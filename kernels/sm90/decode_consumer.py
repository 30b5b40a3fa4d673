"""The consumer warpgroup of the decoding kernel: online softmax over the steps of one item."""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.barriers import DecodeBarrier
from sparse_flash.kernels.sm90.forward_consumer import RESCALE_THRESHOLD
from sparse_flash.kernels.sm90.primitives import clear_rows, gemm
from sparse_flash.kernels.vectors import round_to
from sparse_flash.masks.layout import FULL_TILE

CONSUMER = pipeline.PipelineUserType.Consumer


class DecodeConsumer:
    """State of the warpgroup: O, the statistics of its rows, and where to find everything."""

    def __init__(self, config, dtype, tiled_mmas, buffers, pipes, bits, results, pack, scale_log2):
        self.config, self.dtype, self.bits, self.scale_log2 = config, dtype, bits, scale_log2
        self.mma_qk, self.mma_pv = tiled_mmas
        sQ, sK, self.sV, self.sTiles = buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.results, self.pack = results, pack
        self.thread = cute.arch.thread_idx()[0]
        # V as the second operand of O += P V: (head_dim, keys).
        shape = (config.head_dim, config.tile_n, config.kv_stages)
        sVt = cute.composition(self.sV, cute.make_ordered_layout(shape, order=(1, 0, 2)))
        self.tSrQ = self.mma_qk.make_fragment_A(self.mma_qk.get_slice(0).partition_A(sQ))
        self.tSrK = self.mma_qk.make_fragment_B(self.mma_qk.get_slice(0).partition_B(sK))
        self.tOrV = self.mma_pv.make_fragment_B(self.mma_pv.get_slice(0).partition_B(sVt))
        self.p = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_n // 16), dtype)
        self.acc_o = cute.make_rmem_tensor(
            self.mma_pv.partition_shape_C((64, config.head_dim)), Float32
        )
        self.stats = cute.make_rmem_tensor((2, 2), Float32)  # of two rows, the maximum and the sum

    @cute.jit
    def run(self, work_tile):
        """All steps, then the results."""
        self.acc_o.fill(0.0)
        online.reset(self.stats)
        state = pipeline.make_pipeline_state(CONSUMER, self.config.kv_stages)
        self.q_pipe.consumer_wait(pipeline.make_pipeline_state(CONSUMER, 1))
        for _ in cutlass.range(work_tile.end - work_tile.begin, unroll=1):
            self.step(state, work_tile.row)
            state.advance()
        cute.arch.griddepcontrol_launch_dependents()
        self.finish(work_tile)

    @cute.jit
    def step(self, state, row):
        """O and the statistics with tile_n more keys."""
        config, rescale_threshold = self.config, RESCALE_THRESHOLD / self.scale_log2
        acc_s = cute.make_rmem_tensor(self.mma_qk.partition_shape_C((64, config.tile_n)), Float32)
        self.k_pipe.consumer_wait(state)
        gemm(self.mma_qk, acc_s, self.tSrQ[None, None, None, 0], self.tSrK, state.index, True)
        code, remaining = self.read_tile_info(state.index)
        words = self.mask_words(code, row)
        warpgroup.wait_group(0)
        self.k_pipe.consumer_release(state)
        if code != FULL_TILE:
            online.apply_mask(acc_s, words, online.columns_within(remaining, self.thread))
        grown, decay = online.update_row_max(acc_s, self.stats, self.scale_log2, rescale_threshold)
        online.exp2_and_sum(acc_s, self.stats, self.scale_log2)
        # Accumulators of S lie just as the first operand of the next product wants P.
        round_to(self.p, acc_s)
        if grown:
            online.rescale(self.acc_o, decay)
        self.v_pipe.consumer_wait(state)
        self.zero_beyond(state.index, remaining)
        gemm(self.mma_pv, self.acc_o, self.p, self.tOrV, state.index, False)
        warpgroup.wait_group(0)
        self.v_pipe.consumer_release(state)

    @cute.jit
    def read_tile_info(self, stage):
        """A step's code (see `DecodeSm90.load`), and how many keys there are from its first one on.

        Read by the thread that frees the stage for its warp, and by no other.
        """
        words, sTiles = cute.make_rmem_tensor(2, Int32), self.sTiles
        if self.thread % 32 == 0:
            words[0], words[1] = sTiles[stage, 0], sTiles[stage, 1]
        return cute.arch.shuffle_sync(words[0], 0), cute.arch.shuffle_sync(words[1], 0)

    @cute.jit
    def mask_words(self, code, row):
        """For both rows of the thread, the word of its columns: both are at one position."""
        words = cute.make_rmem_tensor(2, Int32)
        words.fill(-1)
        if code >= 0:
            bit_tile, nth = code // self.config.steps, code % self.config.steps
            word = online.word_of_row(self.bits, bit_tile, row, self.thread)
            # Of every 8 columns of a tile two are the thread's.
            word = word >> (nth * (self.config.tile_n // 4))
            words[0] = word
            words[1] = word
        return words

    @cute.jit
    def zero_beyond(self, stage, remaining):
        """Clear values beyond the keys' length: 0 times NaN is NaN."""
        if remaining < self.config.tile_n:
            clear_rows(self.sV, cutlass.max(remaining, Int32(0)), stage, self.thread, 128)
            cute.arch.barrier(barrier_id=DecodeBarrier.CONSUMERS, number_of_threads=128)

    @cute.jit
    def finish(self, work_tile):
        """Write O / sum and the logsumexp of the heads: to the output, or as a part."""
        out, lse, out_splits, lse_splits = self.results
        factors, log_sums = online.row_normalizers(self.stats, self.scale_log2)
        # All rows are at one position: none of the tile's rows is known, or all are.
        known = 64 if work_tile.known != 0 else Int32(0)
        online.mark_unknown(factors, log_sums, known, Int32(0))
        online.rescale(self.acc_o, factors)
        for r in cutlass.range_constexpr(2):
            row = self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * r
            head = work_tile.head + row
            if row < self.pack:
                if work_tile.split_idx < 0:
                    self.store(out, (work_tile.batch, 0, head), r)
                    if self.thread % 4 == 0:
                        lse[work_tile.batch, head, 0] = log_sums[r]
                else:
                    coord = (work_tile.split_idx, work_tile.batch, 0, head)
                    online.store_split(out_splits, self.acc_o, coord, r, self.thread)
                    if self.thread % 4 == 0:
                        lse_splits[work_tile.split_idx, work_tile.batch, head, 0] = log_sums[r]

    @cute.jit
    def store(self, out, coord, r: cutlass.Constexpr):
        """Row r (0 or 1) of the thread's O."""
        for i in cutlass.range_constexpr(2 * r, cute.size(self.acc_o), 4):
            column = i // 4 * 8 + self.thread % 4 * 2
            if column < cute.size(out, mode=[3]):
                for c in cutlass.range_constexpr(2):
                    out[(*coord, column + c)] = self.acc_o[i + c].to(self.dtype)
