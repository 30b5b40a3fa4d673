"""From S' to P' in a consumer warpgroup of the backward kernel."""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.masks.layout import FULL_TILE


class BackwardScores:
    """The part of `BackwardConsumer` that knows scores, masks and row statistics."""

    @cute.jit
    def probabilities(self, results, lse, bit_tile, words, remaining, p_slice: cutlass.Constexpr):
        """Compute one slice of P' from S'; masked elements are 0.

        results: P', and P' times the derivative of the scores.
        """
        p, weights = results
        size = cute.size(self.acc_s) // self.config.p_slices
        first = p_slice * size
        acc = cute.make_tensor(self.acc_s.iterator + first, cute.make_layout(size))
        if const_expr(self.config.softcap):
            score_terms.apply_softcap(acc, self.cap_scale)
            self.mask(acc, bit_tile, words, remaining, first, score_terms.MASKED)
            sign, coefficient, start = self.signed_alibi()
            for i in cutlass.range_constexpr(size):
                power = acc[i]
                if const_expr(self.config.alibi):
                    power += sign * score_terms.alibi_of(first + i, coefficient, start, True)
                power = power * self.scale_log2 - lse[i % 2, (first + i) // 4]
                probability = online.exp2(power)
                p[first + i] = probability.to(self.dtype)
                weights[first + i] = (probability * (1.0 - acc[i] * acc[i])).to(self.dtype)
        else:
            if const_expr(self.config.alibi):
                score_terms.add_alibi(acc, *self.alibi_terms(), True, first)
            for i in cutlass.range_constexpr(size):
                power = acc[i] * self.scale_log2 - lse[i % 2, (first + i) // 4]
                acc[i] = online.exp2(power)
            self.mask(acc, bit_tile, words, remaining, first, 0.0)
            for i in cutlass.range_constexpr(size):
                p[first + i] = acc[i].to(self.dtype)

    @cute.jit
    def mask(
        self,
        acc,
        bit_tile,
        words,
        remaining,
        first: cutlass.Constexpr,
        otherwise: cutlass.Constexpr,
    ):
        """Set masked elements of a slice, from the thread's element `first` on, to `otherwise`."""
        if bit_tile != FULL_TILE or remaining < self.config.tile_n:
            mine = cute.make_rmem_tensor(2, Int32)
            for i in cutlass.range_constexpr(2):
                mine[i] = words[i] >> (first // 2) if self.row(i) < remaining else Int32(0)
            online.apply_mask(acc, mine, Int32(-1), otherwise)

    @cute.jit
    def alibi_terms(self):
        """Coefficient, and distance of the thread's first element, of the tile."""
        own = Float32(self.thread % 4 * 2 - self.row(0))
        distance = cute.arch.shuffle_sync(self.alibi[0], 0) + own
        return cute.arch.shuffle_sync(self.alibi[1], 0), distance

    @cute.jit
    def signed_alibi(self):
        """Sign, coefficient, and their product with the first distance; zeros without ALiBi."""
        sign, coefficient, start = Float32(0.0), Float32(0.0), Float32(0.0)
        if const_expr(self.config.alibi):
            coefficient, distance = self.alibi_terms()
            start = coefficient * distance
            sign = Float32(-1.0) if coefficient < 0 else Float32(1.0)
        return sign, coefficient, start

    @cute.jit
    def read_bit_tile(self, stage):
        """Read a tile's bit tile, in the lane that releases the stage for its warp."""
        bit_tile = Int32(0)
        if self.thread % 32 == 0:
            bit_tile = self.sTiles[stage]
        self.bit_tile[0] = bit_tile
        if const_expr(self.config.alibi):
            apart, coefficient, stages = Float32(0.0), Float32(0.0), self.config.q_stages
            if self.thread % 32 == 0:
                apart = Float32(self.sTiles[stages + stage])
                head = self.sTiles[2 * stages + stage]
                coefficient = self.terms.coefficient(head)
            self.alibi[0], self.alibi[1] = apart, coefficient

    @cute.jit
    def statistics(self, which: cutlass.Constexpr, stage):
        """Load lse (0) or delta (1) of the thread's columns: (2, tile_m / 8)."""
        values = cute.make_rmem_tensor((2, self.config.tile_m // 8), Float32)
        mine = self.sStats[None, which, stage].iterator + 2 * (self.thread % 4)
        layout = cute.make_layout((2, self.config.tile_m // 8), stride=(1, 8))
        cute.autovec_copy(cute.make_tensor(mine.align(8), layout), values)
        return values

    @cute.jit
    def row(self, i: cutlass.Constexpr):
        """Index in the tile of the key in the thread's row i (0 or 1)."""
        return self.keys * 64 + self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * i
