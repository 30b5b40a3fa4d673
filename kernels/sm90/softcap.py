"""Scores with a softcap and their probabilities, in a consumer warpgroup of the forward kernel.

A tanh for each score would double the work of the special-function unit, which bounds the kernel
at small head_dims. Where no score of a warp's tile exceeds LIMIT times the softcap, the exponent
is a polynomial in S, which the FMA units compute. The other tiles take the tanh.

A bound of |S| decides between both. In bfloat16 it also replaces the row's maximum, so it costs no
further instruction: P may then be as small as 2^-GAP. With three warpgroups it is the maximum of
|S|, with two a norm, as measured: 2 to 3 % faster. Float16 has no such range, and takes the maximum
and the minimum. Tiles with masked elements take the maximum of the others: P of a row's only key is
1, which rounding leaves as it is.
"""

import cutlass
from cutlass import BFloat16, Boolean, Float32, Int32, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.score_terms import apply_softcap, tanh
from sparse_flash.masks.layout import FULL_TILE

LIMIT = 0.75
# Tanh x = x p(x^2) for |x| <= LIMIT, from the lowest power: the least relative error, 2^-12.2.
TANH_POLYNOMIAL = (0.9997852, -0.3262967, 0.09735545)
POLYNOMIAL = 3  # of eight exponentials after a tanh
GAP = 100.0  # most of log2 of a row's bound over its largest P
# S of masked elements; the polynomial is -inf there. Its coefficients underflow below LEAST_SCALE.
MASKED = -1e18
LEAST_SCALE = 1e-6


def caps_alone(config) -> bool:
    """Whether a forward kernel adds nothing to its scores with a softcap."""
    return config.softcap and not config.alibi and not config.distance_bias


class Softcap:
    """The softcap of a launch. cap_scale: softmax_scale / softcap. scale_log2: softcap log2(e).

    by_norm: Whether the bound of |S| is a norm.
    """

    def __init__(self, cap_scale, scale_log2, dtype, by_norm: bool = False) -> None:
        self.cap_scale, self.scale_log2, self.by_norm = cap_scale, scale_log2, by_norm
        self.with_minimum = dtype is not BFloat16
        square = cap_scale * cap_scale
        factors = [scale_log2 * cap_scale]
        for _ in TANH_POLYNOMIAL[1:]:
            factors.append(factors[-1] * square)
        self.coefficients = [
            uniform(Float32(c) * x) for c, x in zip(TANH_POLYNOMIAL, factors, strict=True)
        ]
        self.limit = uniform(limit_of(cap_scale, scale_log2))

    @cute.jit
    def probabilities(self, acc_s, stats, masking, rescale_threshold):
        """Replace S by P, with `online.update_row_max`. Returns whether to rescale O, and how.

        masking: Bit tile, its words, number of keys from the first column on, and the thread.
        """
        bit_tile, words, *columns = masking
        tops = cute.make_rmem_tensor(2, Float32)
        short = Boolean(True)
        for row in cutlass.range_constexpr(2):
            top, bound = self.extremes(acc_s, row)
            tops[row] = tanh(top * self.cap_scale)
            short = short and bound <= self.limit
        short = cute.arch.vote_all_sync(short)
        if short:
            if bit_tile != FULL_TILE:
                online.apply_mask(acc_s, words, online.columns_within(*columns), MASKED)
                for row in cutlass.range_constexpr(2):
                    tops[row] = self.top_of(online.row_max(acc_s, row))
        else:
            apply_softcap(acc_s, self.cap_scale)
            if bit_tile != FULL_TILE:
                online.apply_mask(acc_s, words, online.columns_within(*columns))
            for row in cutlass.range_constexpr(2):
                tops[row] = online.row_max(acc_s, row)
        grown, decay = online.update_max(tops, stats, self.scale_log2, rescale_threshold)
        if short:
            self.exp2_of_polynomial(acc_s, stats)
        else:
            online.exp2_and_sum(acc_s, stats, self.scale_log2, POLYNOMIAL)
        return grown, decay

    def extremes(self, acc_s, row: int):
        """A bound of a row's S, and one of |S|, of the thread's elements."""
        if self.with_minimum:
            top, low = online.row_max(acc_s, row), online.row_min(acc_s, row)
            return top, cute.arch.fmax(top, -low)
        bound = (online.row_norm if self.by_norm else online.row_max_abs)(acc_s, row)
        return bound, bound

    @cute.jit
    def exp2_of_polynomial(self, acc_s, stats):
        """As `online.exp2_and_sum`, from S without a softcap."""
        for row in cutlass.range_constexpr(2):
            scaled = stats[row, 0] * self.scale_log2
            for i in online.row_elements(acc_s, row):
                acc_s[i] = online.exp2(acc_s[i] * self.factor(acc_s[i]) - scaled)
            online.add_row(acc_s, stats, row)

    def factor(self, s):
        """Exponent of a short score over its S."""
        square, factor = s * s, self.coefficients[-1]
        for coefficient in self.coefficients[-2::-1]:
            factor = factor * square + coefficient
        return factor

    @cute.jit
    def top_of(self, s):
        """A maximum of S with the softcap, by the polynomial; -1 where all elements are masked."""
        top = s * self.factor(s) / self.scale_log2
        return top if s >= -self.limit else Float32(-1.0)


def uniform(x):
    """Keep x in a uniform register: by its bits, since `make_warp_uniform` takes integers."""
    return cute.arch.make_warp_uniform(x.bitcast(Int32)).bitcast(Float32)


@cute.jit
def limit_of(cap_scale, scale_log2):
    """The largest |S| of the polynomial."""
    limit = cutlass.min(Float32(LIMIT), Float32(GAP / 2) / scale_log2) / cap_scale
    return limit if cap_scale >= LEAST_SCALE else Float32(-1.0)
