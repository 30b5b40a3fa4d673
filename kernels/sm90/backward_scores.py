"""From S' to P' and dS' in a consumer warpgroup of the backward kernel."""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.kernels.distance_bias import add_diagonals, add_total, clear_scratch
from sparse_flash.kernels.distance_table import ROWS
from sparse_flash.kernels.sm90.primitives import add_products, mul_pairs, split_signs
from sparse_flash.kernels.vectors import as_pairs, round_pair
from sparse_flash.masks.layout import FULL_TILE


class Place(NamedTuple):
    """Where a tile is, for score terms that depend on positions; the fields are Int32."""

    query: Int32  # the first one
    key: Int32  # the first one
    head: Int32  # of q
    pair: Int32  # batch entry * query heads + query head


def polynomials(config) -> int:
    """Of eight exponentials, how many are polynomials: with a softcap, whose tanh takes the
    special-function unit too, as far as there are registers for it.
    """
    return 3 if config.softcap and not config.placed and not config.fixed_point else 0


class BackwardScores:
    """The part of `BackwardConsumer` that knows scores, masks and row statistics."""

    @cute.jit
    def probabilities(self, p, factors, lse, shared, p_slice: cutlass.Constexpr):
        """Compute one slice of P' from S'; masked elements are 0.

        p: P' for dV. factors: As of `derive`. lse: Of the slice. shared: Arguments of `mask`, the
        warp's place, and the stage.
        """
        masking, place, stage = shared
        acc, first = self.slice_of(self.acc_s, p_slice)
        weights = factors[0]
        bias = None
        if const_expr(self.config.distance_bias):
            bias = self.windows.values(stage, self.row(0), first, cute.size(acc))
        if const_expr(self.config.softcap):
            score_terms.apply_softcap(acc, self.terms.cap_scale)
            self.mask(acc, *masking, first, score_terms.MASKED)
            early = self.config.early_weights
            goal = acc if const_expr(early) else self.slice_of(weights, p_slice)[0]
            for i in cutlass.range_constexpr(cute.size(acc)):
                power = acc[i]
                if const_expr(self.config.distance_bias):
                    power += bias[i]
                power = power * self.scale_log2 - lse[i % 2, i // 4]
                # Spread evenly: the tanh takes the special-function unit too.
                polynomial = polynomials(self.config)
                by_polynomial = i // 2 * polynomial % 8 < polynomial
                exp2 = online.exp2_polynomial if const_expr(by_polynomial) else online.exp2
                probability = exp2(power)
                p[first + i] = probability.to(self.dtype)
                goal[i] = (probability * (1.0 - acc[i] * acc[i])).to(goal.element_type)
            self.round_weights(acc, weights, p, masking[0], p_slice)
        else:
            for i in cutlass.range_constexpr(cute.size(acc)):
                if const_expr(self.config.distance_bias):
                    acc[i] = acc[i] + bias[i]
                power = acc[i] * self.scale_log2 - lse[i % 2, i // 4]
                acc[i] = online.exp2(power)
            self.mask(acc, *masking, first, 0.0)
            for i in cutlass.range_constexpr(cute.size(acc)):
                p[first + i] = acc[i].to(self.dtype)
        if const_expr(self.config.dropout):
            self.apply_dropout(p, factors, place, p_slice)

    @cute.jit
    def round_weights(self, acc, weights, p, bit_tile, p_slice: cutlass.Constexpr):
        """With `early_weights`, round the weights of a slice before the next slice."""
        # Always true, but opaque to ptxas, which would round where dS' is computed, and keep both
        # factors in float32 until then.
        if const_expr(self.config.early_weights):
            (mine, first), pairs = self.slice_of(weights, p_slice), None
            if const_expr(not self.config.placed):  # where pairs would need more registers
                pairs = as_pairs(mine)
            if bit_tile >= FULL_TILE:
                for i in cutlass.range_constexpr(cute.size(acc)):
                    if const_expr(pairs is None):
                        mine[i] = acc[i].to(self.dtype)
                    elif const_expr(i % 2 == 1):
                        pairs[i // 2] = round_pair(acc[i - 1], acc[i], self.dtype)
            else:  # never; without a value here, the old ones would keep their registers
                for i in cutlass.range_constexpr(cute.size(acc)):
                    if const_expr(pairs is None):
                        mine[i] = p[first + i]
                    elif const_expr(i % 2 == 1):
                        pairs[i // 2] = Int32(0)

    @cute.jit
    def apply_dropout(self, p, factors, place, p_slice: cutlass.Constexpr):
        """Drop elements of a slice of P', and mark them in the factors of dS' (see `derive`)."""
        (p, first), (weights, _) = (self.slice_of(x, p_slice) for x in (p, factors[0]))
        signs, pairs = Int32(-0x7FFF8000), as_pairs(p)
        step = 2 if const_expr(cute.size(p) % 16 == 0) else 1  # tiles of 16 columns
        for tile in cutlass.range_constexpr(0, cute.size(p) // 8, step):
            column = place.query + 2 * first + 16 * tile
            for i, mask in enumerate(
                self.dropout.masks(place.pair, place.key, column, step), 4 * tile
            ):
                if const_expr(self.config.softcap):
                    as_pairs(weights)[i] = as_pairs(weights)[i] | ~mask & signs
                else:
                    negated = as_pairs(self.slice_of(factors[1], p_slice)[0])
                    negated[i] = (pairs[i] | signs) & ~mask
                pairs[i] = pairs[i] & mask

    @cute.jit
    def clear_scratch(self):
        """Clear the warp's scratch for gradients of the bias by distance."""
        if const_expr(self.config.distance_grads):
            clear_scratch(self.scratch[None, self.group * 4 + self.thread // 32])

    @cute.jit
    def add_distance_grads(self, ds):
        """Add dS' to the gradients of the bias by distance, slice by slice."""
        if const_expr(self.config.distance_grads):
            place = self.place_of_warp()  # again: it would take registers until here
            sums, warp = self.terms.bias_sums, self.group * 4 + self.thread // 32
            start = self.terms.bias_rows + place.query - place.key - ROWS
            index = cute.crd2idx((place.head, start), sums.layout)
            if self.windows.is_constant(place.key - place.query, (16, self.config.tile_m)):
                add_total(ds, sums.iterator + (index + ROWS))
            else:
                for p_slice in cutlass.range_constexpr(self.config.p_slices):
                    mine, first = self.slice_of(ds, p_slice)
                    goal = sums.iterator + (index + 2 * first)
                    add_diagonals(mine, self.scratch[None, warp], goal)

    @cute.jit
    def derive(self, ds, acc_dp, factors, delta, p_slice: cutlass.Constexpr):
        """Compute one slice of dS' = P' (dP' - delta), multiplying 16-bit pairs.

        delta: Of the slice. factors: P' times the derivative of the scores. With dropout, kept
        elements, whose dP' is scaled, and negated dropped ones, whose dP' is 0; or, with a softcap,
        both in one: dropped elements are negative.
        """
        (weights, first), (mine, _) = (self.slice_of(x, p_slice) for x in (factors[0], ds))
        for i in cutlass.range_constexpr(cute.size(mine)):
            dp = acc_dp[first + i]
            if const_expr(self.config.dropout):
                dp *= self.terms.keep_scale
            mine[i] = (dp - delta[i % 2, i // 4]).to(self.dtype)
        if const_expr(not self.config.dropout):
            mul_pairs(mine, weights)
        else:
            negated = None
            if const_expr(self.config.softcap):
                weights, negated = split_signs(weights)
            else:
                negated, _ = self.slice_of(factors[1], p_slice)
            mul_pairs(mine, weights)
            delta_pairs = cute.make_rmem_tensor(mine.shape, self.dtype)
            for i in cutlass.range_constexpr(cute.size(mine)):
                delta_pairs[i] = delta[i % 2, i // 4].to(self.dtype)
            add_products(mine, negated, delta_pairs)

    def slice_of(self, tensor, p_slice: int):
        """A slice of a thread's elements, and the index of its first one."""
        size = cute.size(tensor) // self.config.p_slices
        first = p_slice * size
        return cute.make_tensor(tensor.iterator + first, cute.make_layout(size)), first

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
        """Set masked elements of a slice, from the thread's element `first` on, to `otherwise`.

        words: Of the thread's two rows; with `early_weights` 0 beyond the length.
        """
        if bit_tile != FULL_TILE or remaining < self.config.tile_n:
            mine = cute.make_rmem_tensor(2, Int32)
            for i in cutlass.range_constexpr(2):
                if const_expr(self.config.early_weights):
                    mine[i] = words[i] >> (first // 2)
                else:
                    mine[i] = words[i] >> (first // 2) if self.row(i) < remaining else Int32(0)
            online.apply_mask(acc, mine, Int32(-1), otherwise)

    @cute.jit
    def place_of_warp(self):
        """The tile's `Place` from the warp's first key on; zeros where it is not used."""
        place = Place(*[Int32(0)] * len(Place._fields))
        if const_expr(self.config.placed):
            of_lane_0 = (cute.arch.shuffle_sync(self.place[i], 0) for i in range(4))
            query, key, head, pair = (cute.arch.make_warp_uniform(x) for x in of_lane_0)
            key += self.keys * 64 + self.thread // 32 * 16
            place = Place(query, key, head, pair)
        return place

    @cute.jit
    def read_bit_tile(self, stage):
        """Read a tile's bit tile and place, in the lane that releases the stage for its warp."""
        bit_tile = Int32(0)
        if self.thread % 32 == 0:
            bit_tile = self.sTiles[stage, 0]
        self.bit_tile[0] = bit_tile
        if const_expr(self.config.placed):
            place = cute.make_rmem_tensor(self.place.shape, Int32)
            place.fill(0)
            if self.thread % 32 == 0:
                for i in cutlass.range_constexpr(cute.size(place)):
                    place[i] = self.sTiles[stage, 1 + i]
            self.place.store(place.load())

    @cute.jit
    def statistics(self, which: cutlass.Constexpr, stage, first: cutlass.Constexpr = 0, slices=1):
        """Load lse (0) or delta (1) of the thread's columns: (2, tile_m / 8).

        first: First column. slices: Number of slices of which one is loaded.
        """
        shape = (2, self.config.tile_m // 8 // slices)
        values = cute.make_rmem_tensor(shape, Float32)
        mine = self.sStats[None, which, stage].iterator + (2 * (self.thread % 4) + first)
        layout = cute.make_layout(shape, stride=(1, 8))
        cute.autovec_copy(cute.make_tensor(mine.align(8), layout), values)
        return values

    @cute.jit
    def of_slice(self, which: cutlass.Constexpr, stage, p_slice: cutlass.Constexpr, values):
        """Lse (0) or delta (1) of a slice's columns. values: Those of all columns, or `None`."""
        slices = self.config.p_slices
        first = self.config.tile_m // slices * p_slice
        if const_expr(self.config.sliced_statistics):
            return self.statistics(which, stage, first, slices)
        shape = (2, self.config.tile_m // 8 // slices)
        return cute.make_tensor(values.iterator + first // 4, cute.make_layout(shape))

    @cute.jit
    def row(self, i: cutlass.Constexpr):
        """Index in the tile of the key in the thread's row i (0 or 1)."""
        return self.keys * 64 + self.thread // 32 * 16 + self.thread % 32 // 4 + 8 * i
