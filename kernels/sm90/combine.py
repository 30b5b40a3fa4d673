"""Rows that were computed in parts, put together.

With out_i and lse_i of the parts of a row,
    lse = log sum_i exp(lse_i),    out = sum_i exp(lse_i - lse) out_i        (Flash-Decoding, 2023)
in the order of the parts, whichever was ready first: so the result does not depend on timing.
"""

import math

import cutlass
from cutlass import Float32, Int32, cute

ROWS = 16  # of a CTA of four warps; a warp takes a row at a time
LOG2_E = math.log2(math.e)


class Combine:
    """The kernel for parts of tile_m x head_dim."""

    def __init__(self, tile_m: int, head_dim: int, dtype: type[cutlass.Numeric]) -> None:
        self.tile_m, self.head_dim, self.dtype = tile_m, head_dim, dtype

    @cute.jit
    def __call__(self, out, lse, combine, counts, out_parts, lse_parts, stream):
        """Launch on the stream; out is (b, s, h, d), lse (b, h, s). See `Schedule.combine`."""
        self.kernel(out, lse, combine, counts, out_parts, lse_parts).launch(
            grid=(cute.size(combine, mode=[0]), self.tile_m // ROWS, 1),
            block=(128, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        lse: cute.Tensor,
        combine: cute.Tensor,
        counts: cute.Tensor,
        out_parts: cute.Tensor,
        lse_parts: cute.Tensor,
    ):
        """Four rows for each warp."""
        item, chunk, _ = cute.arch.block_idx()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        if item < counts[1]:
            m_block, head, batch = combine[item, 0], combine[item, 1], combine[item, 2]
            parts = (combine[item, 3], combine[item, 4])
            for i in cutlass.range(ROWS // 4, unroll=1):
                row = chunk * ROWS + i * 4 + warp
                q_idx = m_block * self.tile_m + row
                if q_idx < cute.size(out, mode=[1]):
                    place = (batch, q_idx, head)
                    self.row(out, lse, out_parts, lse_parts, parts, row, place, lane)

    @cute.jit
    def row(self, out, lse, out_parts, lse_parts, parts, row, place, lane):
        """One row by one warp, its columns spread over the lanes."""
        first, count = parts
        batch, q_idx, head = place
        top = -Float32.inf
        for part in cutlass.range(first, first + count, unroll=1):
            top = cute.arch.fmax(top, lse_parts[part, row])
        shift = Float32(0.0) if top == -Float32.inf else top
        total = Float32(0.0)
        sums = cute.make_rmem_tensor(self.head_dim // 32, Float32)
        sums.fill(0.0)
        for part in cutlass.range(first, first + count, unroll=1):
            weight = cute.math.exp2((lse_parts[part, row] - shift) * LOG2_E, fastmath=True)
            total += weight
            for j in cutlass.range_constexpr(self.head_dim // 32):
                sums[j] = sums[j] + weight * out_parts[part, row, lane + 32 * j]
        empty = total == 0.0
        factor = Float32(0.0) if empty else 1.0 / total
        for j in cutlass.range_constexpr(self.head_dim // 32):
            if lane + 32 * j < cute.size(out, mode=[3]):
                out[batch, q_idx, head, lane + 32 * j] = (sums[j] * factor).to(self.dtype)
        if lane == Int32(0):
            log_sum = shift + cute.math.log2(total, fastmath=True) / LOG2_E
            lse[batch, head, q_idx] = -Float32.inf if empty else log_sum
