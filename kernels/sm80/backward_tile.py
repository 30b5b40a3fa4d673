"""The five products of a tile of the backward pass, by one warp.

With the scores transposed, so that P' and dS' lie in registers as the products want them, for each
tile of queries

    S' = K Q';   P' = exp2(scale S' - lse);   dP' = V dO';   dS' = P' (dP' - delta)
    dV += P' dO;   dK += dS' Q;   dQ = dS K

where ' is the transpose, and lse and delta belong to the queries, which are the columns.
"""

import itertools

import cutlass
from cutlass import Int32, const_expr, cute
from sparse_flash.kernels.dropout import Dropout
from sparse_flash.kernels.preprocess import exponent_in
from sparse_flash.kernels.sm80.backward_postprocess import dq_index, dq_place
from sparse_flash.kernels.sm80.backward_scores import BackwardScores, recomputed
from sparse_flash.kernels.sm80.primitives import (
    TileLayout,
    accumulators,
    as_operand_a,
    as_operand_b,
    ldmatrix,
    multiply,
)
from sparse_flash.kernels.vectors import from_bits


class BackwardLayouts:
    """Tiles in shared memory: of Q and dO, of K and V, of P' and dS'."""

    def __init__(self, config):
        self.q = TileLayout(config.tile_m, config.head_dim)
        self.k = TileLayout(config.tile_n, config.head_dim)
        self.ds = TileLayout(config.tile_n, config.tile_m)


class Operand:
    """Where the lanes of a warp find an operand in shared memory.

    lane: A lane's offset from the first row, swizzled. base: Address of the row, or of what is
    known before `start`, which is added.
    """

    def __init__(self, layout, lane, base):
        self.layout, self.lane, self.base = layout, lane, base

    def at(self, start, row, column):
        """The address of a lane's part so many rows and columns further."""
        return self.layout.moved(self.lane, row, column) + (self.base + start)

    @cute.jit
    def load(self, start, places: cutlass.Constexpr, transpose: cutlass.Constexpr = False):
        """The 16 x 16 numbers at each (row, column) of `places`, four Int32 each."""
        registers = cute.make_rmem_tensor(4 * len(places), Int32)
        for i in cutlass.range_constexpr(len(places)):
            loaded = ldmatrix(self.at(start, *places[i]), transpose)
            for n in cutlass.range_constexpr(4):
                registers[4 * i + n] = loaded[n]
        return registers


class BackwardTile(BackwardScores):
    """A warp's share of the products, and where it finds their operands.

    Of an operand's address, the part that depends on the lane is kept apart: it is the only one
    that the swizzle changes, and several operands share it.

    shared: Addresses of K, V, P' and dS' in shared memory.
    stats: Statistics in shared memory (tile_m, 2, stages).
    scales: scale_log2, and `ScoreTerms` or `None`.
    """

    def __init__(self, config, dtype, shared, stats, bits, scales, warp, lane):
        self.config, self.dtype, self.layouts = config, dtype, BackwardLayouts(config)
        self.stats, self.bits = stats, bits
        self.scale_log2, self.terms = scales
        if const_expr(config.dropout):
            self.dropout = Dropout(self.terms.seed, self.terms.dropped, transposed=True)
        k, v, p, ds = shared
        of_q, of_k, of_ds = self.layouts.q, self.layouts.k, self.layouts.ds
        self.warp, self.lane = warp, lane
        # Keys; queries in S', and columns of dK and dV: every warps_m-th group of 16.
        self.warp_n, self.warp_m = warp % config.warps_n, warp // config.warps_n
        self.atoms = config.tile_n // config.warps_n // 16  # of 16 keys
        self.queries = config.tile_m // config.warps_m  # in S'
        self.chunk = self.queries // config.chunks  # of them at a time
        self.groups = config.head_dim // (16 * config.warps_m)
        self.first_key = self.warp_n * (16 * self.atoms)
        self.first_query = self.warp_m * self.queries
        rows = of_k.rows_first(lane)
        self.k = Operand(of_k, rows, k + self.first_key * of_k.pitch)
        self.v = Operand(of_k, rows, v + self.first_key * of_k.pitch)
        self.q_rows = Operand(of_q, of_q.columns_first(lane), self.first_query * of_q.pitch)
        rows = of_q.moved(of_q.rows_first(lane), 0, 16 * self.warp_m)
        self.q_columns = Operand(of_q, rows, 0)
        rows = of_ds.rows_first(lane)
        self.p_rows = Operand(of_ds, rows, p + self.first_key * of_ds.pitch)
        self.ds_rows = Operand(of_ds, rows, ds + self.first_key * of_ds.pitch)
        place = of_ds.moved(of_ds.offset(lane // 4, 0), 0, self.first_query)
        place = place + lane % 4 * 4
        self.p_place = Operand(of_ds, place, p + self.first_key * of_ds.pitch)
        self.ds_place = Operand(of_ds, place, ds + self.first_key * of_ds.pitch)
        # dQ: queries, and every dq_columns-th group of 16 columns.
        self.dq_atoms, self.dq_groups = config.dq_atoms, config.dq_groups
        first_query, column = warp % config.dq_warps * (16 * self.dq_atoms), warp // config.dq_warps
        rows = of_ds.moved(of_ds.columns_first(lane), 0, first_query)
        self.ds_columns = Operand(of_ds, rows, ds)
        rows = of_k.moved(of_k.rows_first(lane), 0, 16 * column)
        self.k_columns = Operand(of_k, rows, k)

    def keys_accumulators(self):
        """Registers for dK or dV: one tensor for each 16 keys."""
        return [accumulators(16 * self.groups) for _ in range(self.atoms)]

    @cute.jit
    def scores(self, operands, stage, words, limits, place, first: cutlass.Constexpr, acc_dv=None):
        """P' and dS' of a chunk of the warp's queries, in 16 bits: in registers, and as far as
        others read them in shared memory.

        operands: Addresses of the tile's Q and dO; V in registers, or None.
        stage: Of the tile's statistics.
        words: Of `mask_words`.
        limits: Bit tile, and number of keys from the tile's first one on.
        place: `TilePlace`, or `None` without score terms.
        first: The chunk's first query.
        acc_dv: dV, to which P' dO is added at once where dS' has other weights than P', so that
            both do not occupy registers.
        """
        q, do, held = operands
        acc = [accumulators(self.chunk) for _ in range(self.atoms)]
        self.begin_scores(acc, place, first)
        self.add_products_of_rows(acc, self.k, None, q, first)
        lse = self.statistics(0, stage, first)
        p, weights = self.probabilities(acc, lse, words, limits, place, first)
        if const_expr(self.config.dropout):
            p, weights = self.drop(p, weights, place, first)
        if const_expr(self.config.exchange):
            self.put(p, self.p_place, first)
        elif const_expr(self.config.weighted):
            self.add(acc_dv, p, None, do, first)
        acc = [accumulators(self.chunk) for _ in range(self.atoms)]
        for n in cutlass.range_constexpr(self.atoms):
            acc[n].fill(0.0)
        self.add_products_of_rows(acc, self.v, held, do, first)
        ds = self.derive(acc, weights, self.statistics(1, stage, first))
        self.put(ds, self.ds_place, first)
        return p, ds

    @cute.jit
    def add_products_of_rows(self, acc, a, held, b, first: cutlass.Constexpr):
        """Add the warp's keys times a chunk of its queries to S' or dP'."""
        if const_expr(self.config.recompute):
            a = Operand(a.layout, recomputed(a.lane), a.base)
        queries = range(first, first + self.chunk, 16)
        for k in cutlass.range_constexpr(self.config.head_dim // 16):
            rows = as_operand_b(self.q_rows.load(b, [(i, 16 * k) for i in queries]), self.dtype)
            for n in cutlass.range_constexpr(self.atoms):
                mine = a.load(0, [(16 * n, 16 * k)]) if const_expr(held is None) else held[n, k]
                multiply(acc[n], as_operand_a(mine, self.dtype), rows)

    @cute.jit
    def add(self, acc, pairs, shared, b, first: cutlass.Constexpr):
        """Add a b to dV or dK: a is P' or dS', of a chunk of queries in registers or of all in
        shared memory, and b the columns of dO or Q.
        """
        config = self.config
        step, count = 16 * config.warps_m, config.tile_m if config.exchange else self.chunk
        for k in cutlass.range_constexpr(0, count, 16):
            places = [(first + k, step * c) for c in range(self.groups)]
            columns = as_operand_b(self.q_columns.load(b, places, True), self.dtype)
            for n in cutlass.range_constexpr(self.atoms):
                if const_expr(config.exchange):
                    mine = shared.load(0, [(16 * n, k)])
                else:
                    mine = cute.make_tensor(pairs[n].iterator + k // 4, cute.make_layout(4))
                multiply(acc[n], as_operand_a(mine, self.dtype), columns)

    @cute.jit
    def queries_gradient(self, groups: cutlass.Constexpr):
        """Some groups of columns of the warp's part of dQ = dS K: (4, 1, columns / 8) for each 16
        queries.
        """
        step = 16 * self.config.dq_columns
        acc = [accumulators(16 * len(groups)) for _ in range(self.dq_atoms)]
        for n in cutlass.range_constexpr(self.dq_atoms):
            acc[n].fill(0.0)
        for k in cutlass.range_constexpr(0, self.config.tile_n, 16):
            places = [(k, step * c) for c in groups]
            columns = as_operand_b(self.k_columns.load(0, places, True), self.dtype)
            for n in cutlass.range_constexpr(self.dq_atoms):
                mine = self.ds_columns.load(0, [(k, 16 * n)], True)
                multiply(acc[n], as_operand_a(mine, self.dtype), columns)
        return acc

    def result_rows(self):
        """(16 keys, group of columns, 8 keys) of each row of 16 columns of dK and dV."""
        return itertools.product(range(self.atoms), range(self.groups), range(2))

    def result_row(self, acc, n, c, i):
        """The thread's four numbers of a row: two neighbors, and two 8 columns on."""
        return [acc[n][8 * c + 4 * (e // 2) + 2 * i + e % 2] for e in range(4)]

    def result_place(self, n, c, i):
        """(key of the tile, column) where a row begins."""
        column = 16 * (self.config.warps_m * c + self.warp_m)
        return self.first_key + 16 * n + 8 * i + self.lane // 4, column

    @cute.jit
    def put(self, pairs, goal, first: cutlass.Constexpr):
        """P' or dS' into shared memory, from a query of the warp on."""
        goal = Operand(goal.layout, recomputed(goal.lane), goal.base)
        for n in cutlass.range_constexpr(self.atoms):
            for i in cutlass.range_constexpr(cute.size(pairs[n])):
                address = goal.at(0, 16 * n + i % 2 * 8, first + i // 2 * 8)
                cute.arch.inline_ptx(
                    "st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, pairs[n][i]]
                )

    @cute.jit
    def exponents(self, stage):
        """Fixed-point factors of the thread's rows of dQ, one byte each."""
        packed = Int32(0)
        for n in cutlass.range_constexpr(2 * self.dq_atoms):
            row, _ = dq_place(self.config, self.warp, self.lane, n, 0)
            found = exponent_in(*(self.stats[row, i, stage] for i in range(2)))
            packed = packed | found << 8 * n
        return packed

    @cute.jit
    def add_to_sums(self, acc, groups: cutlass.Constexpr, address, exponents):
        """Add these groups of dQ in memory, where a warp's elements lie next to each other: 128
        bytes at a time.

        address: Of the thread's first element of the tile's sums.
        """
        for n in cutlass.range_constexpr(self.dq_atoms):
            size = cute.size(acc[n])
            first = dq_index(self.config, 2 * n, groups[0])
            factors = [from_bits((exponents >> 8 * (2 * n + i) & 255) << 23) for i in range(2)]
            for i in cutlass.range_constexpr(size):
                goal = address + 4 * self.config.threads * (first + i)
                if const_expr(self.config.fixed_point):
                    cute.arch.inline_ptx(
                        "{ .reg .b32 i; cvt.rni.s32.f32 i, {$r1}; "
                        "red.relaxed.gpu.global.add.s32 [{$r0}], i; }",
                        read_only_args=[goal, acc[n][i] * factors[i // 2 % 2]],
                    )
                else:
                    cute.arch.inline_ptx(
                        "red.relaxed.gpu.global.add.f32 [{$r0}], {$r1};",
                        read_only_args=[goal, acc[n][i]],
                    )
