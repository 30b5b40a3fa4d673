"""From S' to P' and dS' in the backward kernel: score terms, masks, and row statistics."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.kernels.sm80.biases import Biases, TileCorner
from sparse_flash.kernels.sm80.primitives import as_pairs
from sparse_flash.kernels.vectors import pack_pair
from sparse_flash.masks.layout import FULL_TILE

SIGNS = -0x7FFF8000  # of two 16-bit numbers


@cute.jit
def recomputed(number):
    """The number, opaque to the compiler: values derived from it, such as addresses, are recomputed
    at each use instead of occupying registers.
    """
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number]
    )


class TilePlace(NamedTuple):
    """Where a tile is, for score terms."""

    query: Int32  # position of the first one
    key: Int32  # position of the first one
    pair: Int32  # batch entry * query heads + query head
    coefficient: Float32  # of ALiBi
    head: Int32  # of q


class BackwardScores:
    """The part of `BackwardTile` that knows scores, masks and row statistics."""

    @cute.jit
    def begin_scores(self, acc, place, first: cutlass.Constexpr):
        """Initialize S' for its product: with biases unless they follow a softcap, or zeros."""
        config = self.config
        for n in cutlass.range_constexpr(self.atoms):
            if const_expr(config.biased and not config.softcap):
                self.biases().begin(acc[n], self.corner(place, n, first))
            elif const_expr(config.alibi and not config.softcap):
                tile, own = (config.tile_m, config.tile_n), self.own_distance(n, first)
                distances = (place.coefficient, place.query - place.key, own)
                score_terms.fill_with_alibi(acc[n], *distances, tile, True)
            else:
                acc[n].fill(0.0)

    def biases(self):
        """Biases that are looked up."""
        return Biases(self.config, self.terms, self.config.tile, transposed=True)

    @cute.jit
    def corner(self, place, n: cutlass.Constexpr, first: cutlass.Constexpr):
        """Where a tile is, and the thread's first element of 16 keys of a chunk."""
        lane = recomputed(self.lane)
        row, column = self.first_key + 16 * n + lane // 4, self.first_query + first + lane % 4 * 2
        return TileCorner(place.head, place.key, place.query, row, column)

    @cute.jit
    def own_distance(self, n: cutlass.Constexpr, first: cutlass.Constexpr):
        """Column minus row of the thread's first element of 16 keys."""
        lane = recomputed(self.lane)
        column = self.first_query + first + lane % 4 * 2
        return column - (self.first_key + 16 * n + lane // 4)

    @cute.jit
    def mask_words(self, bit_tile):
        """For each 16 keys two words, as `online.mask_words`, from the warp's first query on."""
        words = [cute.make_rmem_tensor(2, Int32) for _ in range(self.atoms)]
        lane = recomputed(self.lane)
        for n in cutlass.range_constexpr(self.atoms):
            block = self.warp_n * self.atoms + n
            thread = block % 4 * 32 + lane
            found = online.mask_words(self.bits, bit_tile, block // 4, thread)
            for i in cutlass.range_constexpr(2):
                words[n][i] = found[i]
        return words

    @cute.jit
    def probabilities(self, acc, lse, words, limits, place, first: cutlass.Constexpr):
        """P' from S', in 16 bits, and P' times the derivative of the softcap; 0 where the mask or
        the keys' length says so.
        """
        if const_expr(self.config.softcap):
            return self.capped_probabilities(acc, lse, words, limits, place, first)
        for n in cutlass.range_constexpr(self.atoms):
            for i in cutlass.range_constexpr(cute.size(acc[n])):
                power = acc[n][i] * self.scale_log2 - lse[i % 2, i // 4]
                acc[n][i] = online.exp2(power)
        self.mask(acc, words, limits, first, 0.0)
        p = [as_pairs(acc[n], self.dtype) for n in range(self.atoms)]
        return p, p

    @cute.jit
    def capped_probabilities(self, acc, lse, words, limits, place, first: cutlass.Constexpr):
        """As `probabilities`, with a softcap; ALiBi follows it."""
        for n in cutlass.range_constexpr(self.atoms):
            score_terms.apply_softcap(acc[n], self.terms.cap_scale)
        self.mask(acc, words, limits, first, score_terms.MASKED)
        p, weights = [], []
        for n in cutlass.range_constexpr(self.atoms):
            derived = cute.make_rmem_tensor(cute.size(acc[n]), Float32)
            if const_expr(self.config.biased):
                for i in cutlass.range_constexpr(cute.size(acc[n])):
                    derived[i] = 1.0 - acc[n][i] * acc[n][i]
                self.biases().add(acc[n], self.corner(place, n, first))
                for i in cutlass.range_constexpr(cute.size(acc[n])):
                    acc[n][i] = online.exp2(acc[n][i] * self.scale_log2 - lse[i % 2, i // 4])
                    derived[i] = derived[i] * acc[n][i]
            else:
                sign, coefficient, start = self.signed_alibi(place, n, first)
                for i in cutlass.range_constexpr(cute.size(acc[n])):
                    power = acc[n][i]
                    if const_expr(self.config.alibi):
                        power += sign * score_terms.alibi_of(i, coefficient, start, True)
                    probability = online.exp2(power * self.scale_log2 - lse[i % 2, i // 4])
                    derived[i] = probability * (1.0 - acc[n][i] * acc[n][i])
                    acc[n][i] = probability
            p.append(as_pairs(acc[n], self.dtype))
            weights.append(as_pairs(derived, self.dtype))
        return p, weights

    @cute.jit
    def signed_alibi(self, place, n: cutlass.Constexpr, first: cutlass.Constexpr):
        """Sign, coefficient, and their product with the first distance; zeros without ALiBi."""
        sign, coefficient, start = Float32(0.0), Float32(0.0), Float32(0.0)
        if const_expr(self.config.alibi):
            coefficient, apart = place.coefficient, place.query - place.key
            start = coefficient * Float32(apart + self.own_distance(n, first))
            sign = Float32(-1.0) if coefficient < 0 else Float32(1.0)
        return sign, coefficient, start

    @cute.jit
    def mask(self, acc, words, limits, first: cutlass.Constexpr, otherwise: cutlass.Constexpr):
        """Set masked elements, and those beyond the keys' length, to `otherwise`."""
        bit_tile, remaining = limits
        if bit_tile != FULL_TILE or remaining < self.config.tile_n:
            lane = recomputed(self.lane)
            for n in cutlass.range_constexpr(self.atoms):
                mine = cute.make_rmem_tensor(2, Int32)
                row = self.first_key + 16 * n + lane // 4
                for i in cutlass.range_constexpr(2):
                    word = words[n][i]
                    if const_expr(self.chunk < self.config.tile_m):
                        word = word >> (self.first_query + first) // 4
                    mine[i] = word if row + 8 * i < remaining else Int32(0)
                online.apply_mask(acc[n], mine, Int32(-1), otherwise)

    @cute.jit
    def drop(self, p, weights, place, first: cutlass.Constexpr):
        """P' for dV, without the elements that dropout drops, and the weights of dS', whose signs
        are set for these elements.
        """
        kept, signed = [], []
        column = place.query + self.first_query + first
        for n in cutlass.range_constexpr(self.atoms):
            row = place.key + self.first_key + 16 * n
            masks = self.dropout.masks(place.pair, row, column, self.chunk // 16)
            kept.append(cute.make_rmem_tensor(len(masks), Int32))
            signed.append(cute.make_rmem_tensor(len(masks), Int32))
            for i in cutlass.range_constexpr(len(masks)):
                kept[n][i] = p[n][i] & masks[i]
                signed[n][i] = weights[n][i] | ~masks[i] & Int32(SIGNS)
        return kept, signed

    @cute.jit
    def derive(self, acc, weights, delta):
        """dS': weights times dP' - delta, the product in 16 bits, two at a time.

        With dropout dP' is scaled, or 0 where the weight is negative.
        """
        results = []
        for n in cutlass.range_constexpr(self.atoms):
            for i in cutlass.range_constexpr(cute.size(acc[n])):
                dp = acc[n][i]
                if const_expr(self.config.dropout):
                    dp = dp * self.terms.keep_scale
                acc[n][i] = dp - delta[i % 2, i // 4]
            ds = as_pairs(acc[n], self.dtype)
            for i in cutlass.range_constexpr(cute.size(ds)):
                if const_expr(self.config.dropout):
                    dropped = sign_mask(weights[n][i])
                    of_delta = pack_pair(delta[0, i // 2], delta[1, i // 2], self.dtype)
                    ds[i] = ds[i] & ~dropped | of_delta & dropped
                ds[i] = multiply_pair(ds[i], weights[n][i], self.dtype)
            results.append(ds)
        return results

    @cute.jit
    def statistics(self, which: cutlass.Constexpr, stage, first: cutlass.Constexpr):
        """The lse (0) or delta (1) of the thread's columns: (2, chunk / 8)."""
        count, lane = self.chunk // 8, recomputed(self.lane)
        values = cute.make_rmem_tensor((2, count), Float32)
        mine = self.stats[None, which, stage].iterator + (self.first_query + first + 2 * (lane % 4))
        layout = cute.make_layout((2, count), stride=(1, 8))
        cute.autovec_copy(cute.make_tensor(mine.align(8), layout), values)
        return values


@cute.jit
def sign_mask(pair):
    """All bits of each of two 16-bit numbers whose sign is set."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, 0, 0xBB99;", write_only_types=[Int32], read_only_args=[pair]
    )


@cute.jit
def multiply_pair(pair, factors, dtype: cutlass.Constexpr):
    """Two numbers in 16 bits times two others; bfloat16 has no such product before sm_90."""
    code = "mul.rn.f16x2 {$w0}, {$r0}, {$r1};"
    if const_expr(dtype is cutlass.BFloat16):
        code = "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 {$w0}, {$r0}, {$r1}, z; }"
    return cute.arch.inline_ptx(code, write_only_types=[Int32], read_only_args=[pair, factors])
