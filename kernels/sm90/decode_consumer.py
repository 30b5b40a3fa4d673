"""The consumer warpgroup of the decoding kernel: online softmax over the steps of one item."""

import cutlass
from cutlass import Float32, Int32, cute, pipeline
from cutlass.cute.nvgpu import warpgroup
from sparse_flash.kernels.sm90 import online_softmax as online
from sparse_flash.kernels.sm90.forward_consumer import SLACK
from sparse_flash.kernels.sm90.items import DecodeBarrier
from sparse_flash.kernels.sm90.primitives import multiply
from sparse_flash.masks.layout import FULL_TILE

CONSUMER = pipeline.PipelineUserType.Consumer


class DecodeConsumer:
    """State of the warpgroup: O, the statistics of its rows, and where to find everything."""

    def __init__(self, config, dtype, products, buffers, pipes, bits, results, pack, scale_log2):
        self.config, self.dtype, self.bits, self.scale_log2 = config, dtype, bits, scale_log2
        self.qk, self.pv = products
        s_q, s_k, self.s_v, self.s_tiles = buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.results, self.pack = results, pack
        self.thread = cute.arch.thread_idx()[0]
        # V as the second operand of O += P V: (head_dim, keys).
        shape = (config.head_dim, config.tile_n, config.kv_stages)
        s_vt = cute.composition(self.s_v, cute.make_ordered_layout(shape, order=(1, 0, 2)))
        self.f_q = self.qk.make_fragment_A(self.qk.get_slice(0).partition_A(s_q))
        self.f_k = self.qk.make_fragment_B(self.qk.get_slice(0).partition_B(s_k))
        self.f_v = self.pv.make_fragment_B(self.pv.get_slice(0).partition_B(s_vt))
        self.p = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_n // 16), dtype)
        self.acc_o = cute.make_rmem_tensor(
            self.pv.partition_shape_C((64, config.head_dim)), Float32
        )
        self.stats = cute.make_rmem_tensor((2, 2), Float32)  # of two rows, the maximum and the sum

    @cute.jit
    def run(self, item):
        """All steps, then the results."""
        self.acc_o.fill(0.0)
        online.reset(self.stats)
        state = pipeline.make_pipeline_state(CONSUMER, self.config.kv_stages)
        self.q_pipe.consumer_wait(pipeline.make_pipeline_state(CONSUMER, 1))
        for _ in cutlass.range(item.end - item.begin, unroll=1):
            self.step(state, item.row)
            state.advance()
        cute.arch.griddepcontrol_launch_dependents()
        self.finish(item)

    @cute.jit
    def step(self, state, row):
        """O and the statistics with tile_n more keys."""
        config, slack = self.config, SLACK / self.scale_log2
        acc_s = cute.make_rmem_tensor(self.qk.partition_shape_C((64, config.tile_n)), Float32)
        self.k_pipe.consumer_wait(state)
        multiply(self.qk, acc_s, self.f_q[None, None, None, 0], self.f_k, state.index, True)
        code, remaining = self.what_to_mask(state.index)
        words = self.mask_words(code, row)
        warpgroup.wait_group(0)
        self.k_pipe.consumer_release(state)
        if code != FULL_TILE:
            online.apply_mask(acc_s, words, online.columns_within(remaining, self.thread))
        grown, decay = online.take_maximum(acc_s, self.stats, self.scale_log2, slack)
        online.exponentiate(acc_s, self.stats, self.scale_log2)
        # Accumulators of S lie just as the first operand of the next product wants P.
        self.p.store(acc_s.load().to(self.dtype).reshape(self.p.shape))
        if grown:
            online.rescale(self.acc_o, decay)
        self.v_pipe.consumer_wait(state)
        self.zero_beyond(state.index, remaining)
        multiply(self.pv, self.acc_o, self.p, self.f_v, state.index, False)
        warpgroup.wait_group(0)
        self.v_pipe.consumer_release(state)

    @cute.jit
    def what_to_mask(self, stage):
        """A step's code (see `DecodeSm90.load`), and how many keys there are from its first one on.

        Read by the thread that frees the stage for its warp, and by no other.
        """
        words, s_tiles = cute.make_rmem_tensor(2, Int32), self.s_tiles
        if self.thread % 32 == 0:
            words[0], words[1] = s_tiles[stage, 0], s_tiles[stage, 1]
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
        width, height = self.config.head_dim, self.config.tile_n
        if remaining < height:
            start, s_v = cutlass.max(remaining, Int32(0)), self.s_v
            for i in cutlass.range(self.thread, (height - start) * width, 128, unroll=1):
                s_v[start + i // width, i % width, stage] = self.dtype(0.0)
            cute.arch.fence_view_async_shared()
            cute.arch.barrier(barrier_id=DecodeBarrier.CONSUMERS, number_of_threads=128)

    @cute.jit
    def finish(self, item):
        """Write O / sum and the logsumexp of the heads: to the output, or as a part."""
        out, lse, out_parts, lse_parts = self.results
        factors, log_sums = online.normalisers(self.stats, self.scale_log2)
        # All rows are at one position: none of the tile's rows is known, or all are.
        known = 64 if item.known != 0 else Int32(0)
        online.mark_unknown(factors, log_sums, known, Int32(0))
        online.rescale(self.acc_o, factors)
        for r in cutlass.range_constexpr(2):
            row = self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * r
            head = item.head + row
            if row < self.pack:
                if item.part < 0:
                    self.store(out, (item.batch, 0, head), r)
                    if self.thread % 4 == 0:
                        lse[item.batch, head, 0] = log_sums[r]
                else:
                    place = (item.part, item.batch, 0, head)
                    online.store_part(out_parts, self.acc_o, place, r, self.thread)
                    if self.thread % 4 == 0:
                        lse_parts[item.part, item.batch, head, 0] = log_sums[r]

    @cute.jit
    def store(self, out, place, r: cutlass.Constexpr):
        """Row r (0 or 1) of the thread's O."""
        for i in cutlass.range_constexpr(2 * r, cute.size(self.acc_o), 4):
            column = i // 4 * 8 + self.thread % 4 * 2
            if column < cute.size(out, mode=[3]):
                for c in cutlass.range_constexpr(2):
                    out[(*place, column + c)] = self.acc_o[i + c].to(self.dtype)
