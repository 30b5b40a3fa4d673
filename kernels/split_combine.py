"""Combine the splits of all rows (split-KV).

With out_s and lse_s of split s of a row,
    lse = log sum_s exp(lse_s),    out = sum_s exp(lse_s - lse) out_s        (Flash-Decoding, 2023)
A CTA combines one row; each of its warps takes every eighth split. Split rows are few and have many
splits, so their latencies must overlap. The order of all sums is fixed.
"""

import math

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.score_terms import ScoreTerms

WARPS = 8
LOG2_E = math.log2(math.e)


class SplitCombine:
    """Combines splits of `head_dim` columns.

    dependent: Whether to launch while the previous kernel still runs (programmatic dependent
        launch), and wait for its results on the device.
    """

    def __init__(self, head_dim: int, dtype: type[cutlass.Numeric], dependent: bool = False):
        self.head_dim, self.dtype, self.dependent = head_dim, dtype, dependent
        self.vector = head_dim // 32  # columns of a lane, 32 apart

    @cute.jit
    def __call__(self, out, lse, out_splits, lse_splits, num_splits: Int32, stream, terms=None):
        """Launch on the stream.

        terms: `ScoreTerms`, whose sinks are added, or `None`.

        out: (b, s, h, d). lse: (b, h, s) float32. out_parts: (splits, b, s, h, head_dim) float32.
        lse_parts: (splits, b, h, s) float32.
        """
        rows = cute.size(out, mode=[0]) * cute.size(out, mode=[1]) * cute.size(out, mode=[2])
        self.kernel(out, lse, out_splits, lse_splits, num_splits, terms).launch(
            grid=(rows, 1, 1), block=(32 * WARPS, 1, 1), stream=stream, use_pdl=self.dependent
        )

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        lse: cute.Tensor,
        out_splits: cute.Tensor,
        lse_splits: cute.Tensor,
        num_splits: Int32,
        terms,
    ):
        """One row."""
        index = cute.arch.block_idx()[0]
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        heads, queries = cute.size(out, mode=[2]), cute.size(out, mode=[1])
        head, rest = index % heads, index // heads
        query, batch = rest % queries, rest // queries
        smem = cutlass.utils.SmemAllocator()
        s_sums = smem.allocate_tensor(
            Float32, cute.make_layout((WARPS, self.head_dim), stride=(self.head_dim, 1)), 16
        )
        s_totals = smem.allocate_tensor(Float32, cute.make_layout(WARPS), 16)
        if cutlass.const_expr(self.dependent):
            cute.arch.griddepcontrol_wait()
        top = -Float32.inf
        for split in cutlass.range(lane, num_splits, 32, unroll=4):
            top = cute.arch.fmax(top, lse_splits[split, batch, head, query])
        for i in cutlass.range_constexpr(5):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << i))
        if cutlass.const_expr(terms is not None):
            sink = ScoreTerms(*terms).sink(head) / LOG2_E
            top = cute.arch.fmax(top, sink)
        shift = Float32(0.0) if top == -Float32.inf else top
        total, sums = Float32(0.0), cute.make_rmem_tensor(self.vector, Float32)
        sums.fill(0.0)
        for split in cutlass.range(warp, num_splits, WARPS, unroll=4):
            log_sum = lse_splits[split, batch, head, query]
            weight = cute.math.exp2((log_sum - shift) * LOG2_E, fastmath=True)
            total += weight
            for j in cutlass.range_constexpr(self.vector):
                split_idx = out_splits[split, batch, query, head, lane + 32 * j]
                sums[j] = sums[j] + weight * split_idx
        for j in cutlass.range_constexpr(self.vector):
            s_sums[warp, lane + 32 * j] = sums[j]
        if cutlass.const_expr(terms is not None):
            of_sink = cute.math.exp2((sink - shift) * LOG2_E, fastmath=True)
            total += of_sink if warp == 0 else Float32(0.0)
        if lane == 0:
            s_totals[warp] = total
        cute.arch.sync_threads()
        self.finish(out, lse, (batch, query, head), shift, s_sums, s_totals)

    @cute.jit
    def finish(self, out, lse, coord, shift, s_sums, s_totals):
        """Add the sums of the warps in their order, and store the row."""
        thread, (batch, query, head) = cute.arch.thread_idx()[0], coord
        total = Float32(0.0)
        for i in cutlass.range_constexpr(WARPS):
            total += s_totals[i]
        empty = total == 0.0
        if thread < cute.size(out, mode=[3]):
            value = Float32(0.0)
            for i in cutlass.range_constexpr(WARPS):
                value += s_sums[i, thread]
            value = Float32(0.0) if empty else value / total
            out[batch, query, head, thread] = value.to(self.dtype)
        if thread == 0:
            log_sum = shift + cute.math.log2(total, fastmath=True) / LOG2_E
            lse[batch, head, query] = -Float32.inf if empty else log_sum
