"""ALiBi in the forward kernel for Hopper: a step of 16 columns more of the GEMM S = Q K^T.

In a tile whose distances have one sign, as almost all have, the bias of an element is a multiple of
its column plus a number of its row. The tensor cores add the first, exactly: the columns are
integers, and the slope is the sum of three 16-bit numbers. The second moves the row's maximum. So a
score costs no instruction.

The GEMM takes the sign of the tile before, and of keys before queries in the first tile. It need
not wait to know its tile. Elements of the other sign are corrected in registers. So are all of them
where slopes are so large that rounding would show.
"""

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.online_softmax import LN2
from sparse_flash.kernels.score_terms import absolute, add_alibi
from sparse_flash.kernels.sm90.primitives import smem_layout
from sparse_flash.kernels.vectors import as_pairs, pack_pair

DEPTH = 16  # of a step of the GEMM
ROWS = 16  # of a warp
TERMS = 3  # 16-bit numbers of a slope
SIGNS = -0x7FFF8000  # of a pair of 16-bit numbers
MOST = 6e4  # coefficient of the GEMM: the range of float16
# Slope of the GEMM. A correction is rounded by 2^-24 of the slope times some 300 positions, which
# are 3e-4 here.
STEEPEST = 16.0


def columns_layout(dtype, tile_n: int):
    """Layout of operand B, (tile_n, DEPTH, 1): each column's index in the first TERMS numbers."""
    return smem_layout(dtype, tile_n, DEPTH, 1)


@cute.jit
def fill_columns(columns):
    """Fill operand B in shared memory, before a barrier of all threads."""
    threads = cute.arch.block_dim()[0]
    for i in cutlass.range(cute.arch.thread_idx()[0], cute.size(columns), threads):
        column, k = i // DEPTH, i % DEPTH
        value = Float32(column) if k < TERMS else Float32(0.0)
        columns[column, k, 0] = value.to(columns.element_type)
    cute.arch.fence_view_async_shared()


class Alibi:
    """The bias of a warpgroup's tiles.

    tiled_mmas: Of S, with operand A in shared memory and in registers. columns: Operand B.
    thread: In the warpgroup. scale_log2: softmax_scale log2(e).
    """

    def __init__(self, tiled_mmas, columns, tile_n, thread, scale_log2) -> None:
        mma_qk, self.mma_qk_rs = tiled_mmas
        self.tSrC = mma_qk.make_fragment_B(mma_qk.get_slice(0).partition_B(columns))
        self.slopes = self.mma_qk_rs.make_fragment_A(self.mma_qk_rs.partition_shape_A((64, DEPTH)))
        self.dtype, self.tile_n, self.quad = columns.element_type, tile_n, thread % 4
        self.most = cutlass.min(Float32(MOST), Float32(STEEPEST / LN2) / scale_log2)
        self.coefficient = cute.make_rmem_tensor(1, Float32)  # see score_terms.py
        self.terms = cute.make_rmem_tensor(1, Int32)  # the thread's pair of its terms
        # Positions of the thread's and of the warp's first row minus that of the first key beyond
        # the end.
        self.position = cute.make_rmem_tensor(1, Float32)
        self.of_warp = cute.make_rmem_tensor(1, Int32)
        # Sign of the distances for which operand A is, or 0: no bias. And the bias of its rows.
        self.sign = cute.make_rmem_tensor(1, Int32)
        self.row_bias = cute.make_rmem_tensor(2, Float32)

    @cute.jit
    def begin(self, coefficient, position):
        """Prepare a work tile."""
        terms = terms_of(coefficient, self.dtype)
        first = pack_pair(terms[0], terms[1], self.dtype)
        second = pack_pair(terms[2], Float32(0.0), self.dtype)
        pair = first if self.quad == 0 else second
        self.terms[0] = pair if self.quad < 2 else Int32(0)
        self.coefficient[0], self.position[0] = coefficient, Float32(position)
        row = cute.arch.thread_idx()[0] % 32 // 4
        self.of_warp[0] = cute.arch.make_warp_uniform(position - row)
        self.turn(Int32(1) if absolute(coefficient) <= self.most else Int32(0))

    @cute.jit
    def turn(self, sign):
        """Make operand A for a sign of the distances, or for no bias."""
        pairs, terms = as_pairs(self.slopes), self.terms[0]
        pair = terms ^ Int32(SIGNS) if sign > 0 else terms
        pair = pair if sign != 0 else Int32(0)
        # Two rows of the first 8 numbers, and of the next ones.
        for i in cutlass.range_constexpr(4):
            pairs[i] = pair if i < 2 else Int32(0)
        self.sign[0] = sign

    @property
    def operands(self):
        """Arguments of `primitives.gemm_after`."""
        return self.mma_qk_rs, self.slopes, self.tSrC

    @cute.jit
    def complete(self, acc_s, remaining):
        """Complete S after the GEMM: `row_bias`, and elements of another sign than operand A's.

        remaining: Keys from the tile's first column on. Prepares operand A for the next tile.
        """
        coefficient, sign, apart = self.coefficient[0], self.sign[0], self.of_warp[0] + remaining
        here = Int32(1) if apart >= self.tile_n else Int32(0)
        here = Int32(-1) if apart <= -ROWS else here
        distance = self.position[0] + Float32(remaining)
        signed = coefficient * Float32(sign)
        for row in cutlass.range_constexpr(2):
            self.row_bias[row] = signed * (distance + 8.0 * row)
        distance -= Float32(2 * self.quad)
        if sign == 0:
            add_alibi(acc_s, coefficient, distance, False)
        elif here != sign:
            correct(acc_s, coefficient, Float32(-sign), distance)
            if here != 0:
                self.turn(here)


@cute.jit
def correct(acc, coefficient, other, distance):
    """Turn other * -coefficient (p_q - p_k) into coefficient |p_q - p_k|, where it is not that.

    The difference is 2 coefficient max(other (p_q - p_k), 0). distance: p_q - p_k of the thread's
    first element.
    """
    start, twice = other * distance, 2.0 * coefficient
    for i in cutlass.range_constexpr(cute.size(acc)):
        place = i // 2 % 2 * 8 - (i // 4 * 8 + i % 2)
        acc[i] = acc[i] + twice * cutlass.max(start + other * Float32(place), Float32(0.0))


def terms_of(number, dtype):
    """A number as a sum of TERMS 16-bit numbers, the largest first."""
    terms = []
    for _ in range(TERMS):
        terms.append(number.to(dtype).to(Float32))
        number = number - terms[-1]
    return terms
