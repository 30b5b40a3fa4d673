"""Scores in the forward kernel: S = Q K^T with its score terms, masks, and P.

See `score_terms.py` for softcap, ALiBi and sinks.
"""

import cutlass
from cutlass import Float32, const_expr, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.kernels.sm80.biases import Biases, TileCorner
from sparse_flash.kernels.sm80.forward_items import COEFFICIENT, HEAD, TOP
from sparse_flash.kernels.sm80.primitives import (
    accumulators,
    as_operand_a,
    as_operand_b,
    as_pairs,
    fragment,
    in_loop,
    load_fragments,
    multiply,
)
from sparse_flash.kernels.vectors import from_bits
from sparse_flash.masks.layout import FULL_TILE


class ForwardScores:
    """The part of `ForwardMainloop` that knows scores and masks."""

    @cute.jit
    def mask_words(self, tile):
        """For each of the thread's rows the bits of its columns."""
        return [
            online.mask_words(self.bits, tile.bit_tile, self.row_group(group), self.thread)
            for group in range(self.config.row_groups)
        ]

    @cute.jit
    def row_group(self, group: cutlass.Constexpr):
        """Which 64 rows of the tile the thread's group of rows belongs to."""
        return self.tid // 128 + group * (self.config.warps // 4)

    @cute.jit
    def scores(self, item, tile, stage):
        """S = Q K^T of the thread's groups of rows, with biases unless they follow a softcap."""
        config = self.config
        acc_s = [accumulators(config.tile_n) for _ in range(config.row_groups)]
        for group in cutlass.range_constexpr(config.row_groups):
            if const_expr(config.alibi and not config.softcap):
                coefficient, apart = self.alibi(tile, item.slot)
                own = self.own_distance(group)
                score_terms.fill_with_alibi(acc_s[group], coefficient, apart, own, config.tile)
            elif const_expr(config.biased and not config.softcap):
                self.biases().begin(acc_s[group], self.corner(group, tile, item.slot))
            else:
                acc_s[group].fill(0.0)
        k_lane, q_lane = self.first_keys(stage), self.first_queries()
        step = 64 if config.recompute == 2 else config.tile_n  # keys in registers at a time
        for column in cutlass.range_constexpr(0, config.head_dim, 16):
            queries = [None] * config.row_groups
            for first in cutlass.range_constexpr(0, config.tile_n, step):
                places = [(row, column) for row in range(first, first + step, 16)]
                keys = load_fragments(self.kv_layout, k_lane, places, False)
                keys = as_operand_b(keys, self.dtype)
                for group in cutlass.range_constexpr(config.row_groups):
                    if const_expr(first == 0):
                        place = (group * 16 * config.warps, column)
                        queries[group] = load_fragments(self.q_layout, q_lane, [place], False)
                    start = acc_s[group].iterator + first // 2
                    acc = cute.make_tensor(start, cute.make_layout((4, 1, step // 8)))
                    multiply(acc, as_operand_a(queries[group], self.dtype), keys)
        return acc_s

    @cute.jit
    def first_keys(self, stage):
        """Address of the first keys of a stage for a lane."""
        lane = self.again(self.tid, 2) % 32
        start = self.k_base + self.kv_layout.columns_first(lane) + stage * self.kv_layout.nbytes
        return start if const_expr(self.config.recompute == 2) else in_loop(start)

    @cute.jit
    def first_queries(self):
        """Address of the first group of queries of a lane."""
        tid, layout = self.again(self.tid, 1), self.q_layout
        row = tid // 128 * 64 + tid % 128 // 32 * 16
        start = self.q_base + row * layout.pitch + layout.rows_first(tid % 32)
        return start if const_expr(self.config.recompute) else in_loop(start)

    @cute.jit
    def alibi(self, tile, slot):
        """Coefficient, and position of the tile's first row minus that of its first column."""
        coefficient = from_bits(self.places[slot, COEFFICIENT])
        return coefficient, self.places[slot, TOP] - tile.n_block * self.config.tile_n

    def biases(self):
        """Biases that are looked up."""
        return Biases(self.config, self.terms, self.config.tile, transposed=False)

    @cute.jit
    def corner(self, group: cutlass.Constexpr, tile, slot):
        """Where a tile is, and the thread's first element of a group of rows."""
        thread = in_loop(self.thread)
        row = self.row_group(group) * 64 + thread // 32 * 16 + thread % 32 // 4
        place = (self.places[slot, HEAD], self.places[slot, TOP])
        return TileCorner(*place, tile.n_block * self.config.tile_n, row, thread % 4 * 2)

    @cute.jit
    def own_distance(self, group: cutlass.Constexpr):
        """Row minus column of the thread's first element of a group."""
        thread = in_loop(self.thread)
        return self.row_group(group) * 64 + thread // 32 * 16 + thread % 32 // 4 - thread % 4 * 2

    @cute.jit
    def apply_softcap(self, acc_s, tile, slot):
        """The softcap, where there is one, and the ALiBi or other biases that follow it."""
        config = self.config
        if const_expr(config.softcap):
            for group in cutlass.range_constexpr(config.row_groups):
                score_terms.apply_softcap(acc_s[group], self.terms.cap_scale)
                if const_expr(config.alibi):
                    coefficient, apart = self.alibi(tile, slot)
                    distance = Float32(apart + self.own_distance(group))
                    score_terms.add_alibi(acc_s[group], coefficient, distance, False)
                if const_expr(config.biased):
                    self.biases().add(acc_s[group], self.corner(group, tile, slot))

    @cute.jit
    def sink(self, place):
        """Logit of the sink in base 2, or `None`; the combination adds that of a split row."""
        if const_expr(not self.config.sinks):
            return None
        of_head = self.terms.sink(place.head)
        return of_head if place.part < 0 else -Float32.inf

    @cute.jit
    def apply_mask(self, acc_s, words, tile, limit):
        """-inf where the tile is masked, or beyond the keys' length."""
        remaining = limit - tile.n_block * self.config.tile_n
        if tile.bit_tile != FULL_TILE or remaining < self.config.tile_n:
            within = online.columns_within(remaining, self.thread)
            for group in cutlass.range_constexpr(self.config.row_groups):
                online.apply_mask(acc_s[group], words[group], within)

    @cute.jit
    def exponentiate(self, acc_s, group: cutlass.Constexpr, row: cutlass.Constexpr):
        """S of 16 keys from `row` on becomes P. Returns it as operand a of the next product."""
        acc = cute.make_tensor(acc_s.iterator + row // 2, cute.make_layout(8))
        online.exp2_and_sum(acc, self.stats[group], self.scale_log2)
        return fragment(as_operand_a(as_pairs(acc, self.dtype), self.dtype), 0)

    @cute.jit
    def dropped(self, acc_s, group: cutlass.Constexpr, tile, place):
        """S of all keys becomes P, in pairs of 16 bits; 0 where dropout drops it.

        place: `PAIR` and `TOP` of the item.
        """
        config, (pair, top) = self.config, place
        online.exp2_and_sum(acc_s, self.stats[group], self.scale_log2)
        p = as_pairs(acc_s, self.dtype)
        row = top + self.row_group(group) * 64 + in_loop(self.thread) // 32 * 16
        for first in cutlass.range_constexpr(0, config.tile_n, 32):  # keys of an evaluation
            column = tile.n_block * config.tile_n + first
            masks = self.dropout.masks(pair, row, column, 2)
            for i in cutlass.range_constexpr(len(masks)):
                p[first // 4 + i] = p[first // 4 + i] & masks[i]
        return p
