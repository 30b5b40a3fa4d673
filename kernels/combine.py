"""Combine the splits of split rows and columns.

With out_i and lse_i of split i of a row,
    lse = log sum_i exp(lse_i),    out = sum_i exp(lse_i - lse) out_i        (Flash-Decoding, 2023)
The order of the sums is the order of the splits, whichever ends first: the result is repeatable.
"""

import math

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.vectors import VECTOR, vector_at

GRADIENT_THREADS = 64  # of a CTA that adds gradients
ROWS = 4  # of a CTA, a warp for each: few rows are split, and all loads then overlap
UNROLL = 4  # splits whose loads overlap
LOG2_E = math.log2(math.e)


class CombineOutput:
    """Combine the outputs of split rows; a split is tile_m x head_dim."""

    def __init__(self, tile_m: int, head_dim: int, dtype: type[cutlass.Numeric]) -> None:
        self.tile_m, self.head_dim, self.dtype = tile_m, head_dim, dtype

    @cute.jit
    def __call__(self, out, lse, combine, counts, out_splits, lse_splits, stream, terms=None):
        """Launch on the stream; out is (b, s, h, d), lse (b, h, s). See `Schedule.combine`.

        terms: `ScoreTerms`, whose sinks are added, or `None`.
        """
        self.kernel(out, lse, combine, counts, out_splits, lse_splits, terms).launch(
            grid=(cute.size(combine, mode=[0]), self.tile_m // ROWS, 1),
            block=(32 * ROWS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        lse: cute.Tensor,
        combine: cute.Tensor,
        counts: cute.Tensor,
        out_splits: cute.Tensor,
        lse_splits: cute.Tensor,
        terms,
    ):
        """One row for each warp."""
        record, chunk, _ = cute.arch.block_idx()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        if record < counts[1]:
            m_block, head, batch = (
                combine[record, 0],
                combine[record, 1],
                combine[record, 2],
            )
            splits = (combine[record, 3], combine[record, 4])
            row = chunk * ROWS + warp
            q_idx = m_block * self.tile_m + row
            if q_idx < cute.size(out, mode=[1]):
                coord = (batch, q_idx, head)
                self.row(out, lse, out_splits, lse_splits, splits, row, coord, lane, terms)

    @cute.jit
    def row(self, out, lse, out_splits, lse_splits, splits, row, coord, lane, terms):
        """One row by one warp, its columns spread over the lanes."""
        first, count = splits
        batch, q_idx, head = coord
        top = -Float32.inf
        for split_idx in cutlass.range(first + lane, first + count, 32, unroll=1):
            top = cute.arch.fmax(top, lse_splits[split_idx, row])
        for step in cutlass.range_constexpr(5):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, offset=1 << step))
        if cutlass.const_expr(terms is not None):
            sink = ScoreTerms(*terms).sink(head)
            top = cute.arch.fmax(top, sink / LOG2_E)
        shift = Float32(0.0) if top == -Float32.inf else top
        total = Float32(0.0)
        if cutlass.const_expr(terms is not None):
            total = cute.math.exp2(sink - shift * LOG2_E, fastmath=True)
        sums = cute.make_rmem_tensor(self.head_dim // 32, Float32)
        sums.fill(0.0)
        for split_idx in cutlass.range(first, first + count, unroll=UNROLL):
            weight = cute.math.exp2((lse_splits[split_idx, row] - shift) * LOG2_E, fastmath=True)
            total += weight
            for j in cutlass.range_constexpr(self.head_dim // 32):
                sums[j] = sums[j] + weight * out_splits[split_idx, row, lane + 32 * j]
        empty = total == 0.0
        factor = Float32(0.0) if empty else 1.0 / total
        for j in cutlass.range_constexpr(self.head_dim // 32):
            if lane + 32 * j < cute.size(out, mode=[3]):
                out[batch, q_idx, head, lane + 32 * j] = (sums[j] * factor).to(self.dtype)
        if lane == Int32(0):
            log_sum = shift + cute.math.log2(total, fastmath=True) / LOG2_E
            lse[batch, head, q_idx] = -Float32.inf if empty else log_sum


class CombineGradients:
    """Add the gradients of split columns, in the order of the splits: repeatable."""

    def __init__(self, height: int, width: int, dtype: type[cutlass.Numeric]) -> None:
        self.height, self.width, self.dtype = height, width, dtype
        self.threads = width // VECTOR  # of a row

    @cute.jit
    def __call__(self, results, combine, counts, splits, stream):
        """Launch on the stream; `splits` holds those of each result. See `Schedule.combine`."""
        rows = GRADIENT_THREADS // self.threads
        self.kernel(results, combine, counts, splits).launch(
            grid=(cute.size(combine, mode=[0]), cute.ceil_div(self.height, rows), len(results)),
            block=(GRADIENT_THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, results, combine: cute.Tensor, counts: cute.Tensor, splits):
        """VECTOR elements of a result for each thread."""
        record, chunk, which = cute.arch.block_idx()
        thread = cute.arch.thread_idx()[0]
        row = chunk * (GRADIENT_THREADS // self.threads) + thread // self.threads
        column = thread % self.threads * VECTOR
        result = results[0]
        if record < counts[1] and row < self.height:
            block, head, batch = (combine[record, i] for i in range(3))
            first, count = combine[record, 3], combine[record, 4]
            index = block * self.height + row
            if index < cute.size(result, mode=[1]) and thread < self.threads * (
                GRADIENT_THREADS // self.threads
            ):
                for i in cutlass.range_constexpr(len(results)):
                    if which == i and column < cute.size(results[i], mode=[3]):
                        coord = (batch, index, head, column)
                        self.add(results[i], splits[i], (first, count), row, coord)

    @cute.jit
    def add(self, result, splits, which, row, coord):
        """VECTOR elements of a row of one result. which: First split, and their number."""
        first, count = which
        total = cute.make_rmem_tensor(VECTOR, Float32)
        total.fill(0.0)
        for split_idx in cutlass.range(first, first + count, unroll=UNROLL):
            value = cute.make_rmem_tensor(VECTOR, Float32)
            cute.autovec_copy(self.split_vector(splits, split_idx, row, coord[3]), value)
            total.store(total.load() + value.load())
        rounded = cute.make_rmem_tensor(VECTOR, self.dtype)
        rounded.store(total.load().to(self.dtype))
        cute.autovec_copy(rounded, vector_at(result, coord, 16))

    @cute.jit
    def split_vector(self, splits, split_idx, row, column):
        """VECTOR elements of a row of a split."""
        start = (splits.iterator + cute.crd2idx((split_idx, row, column), splits.layout)).align(16)
        return cute.make_tensor(start, cute.make_layout(VECTOR))
