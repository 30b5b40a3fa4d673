"""The gradients of biases on Ampere and later: sums of dS over the elements of each value.

A kernel of its own, launched only where slopes or tables need gradients: it computes S and dP by
tiles again, as the backward kernel does, whose registers leave no space for the sums.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels import score_terms
from sparse_flash.kernels.distance_bias import add_diagonals, clear_scratch
from sparse_flash.kernels.distance_table import ROWS
from sparse_flash.kernels.position_work_tiles import row_tiles
from sparse_flash.kernels.preprocess import Preprocess
from sparse_flash.kernels.schedule import WORK_FIELDS
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm80.backward_mainloop import ANNOUNCED, DO, LOADS, BackwardMainloop, Q
from sparse_flash.kernels.sm80.backward_tile import BackwardLayouts, BackwardTile
from sparse_flash.kernels.sm80.bias_config import BiasGradientsConfig
from sparse_flash.kernels.sm80.primitives import accumulators


class BiasGradientsSm80:
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: BiasGradientsConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d_v)
        out: cute.Tensor,  # (b, s_q, h, d_v)
        dout: cute.Tensor,  # (b, s_q, h, d_v)
        lse: cute.Tensor,  # (b, h, s_q) float32
        dlse: cute.Tensor,  # (b, h, s_q) float32
        stats: cute.Tensor,  # (b, h, 2, s_q rounded up to tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        terms: ScoreTerms,  # with zeros as sums
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: m_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        combine: cute.Tensor,  # (columns, WORK_FIELDS) int32, not used
        counts: cute.Tensor,  # (2,) int32: number of work tiles, and another
        num_ctas: Int32,
        has_dlse: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch both kernels on the stream. See `Schedule` for work tiles."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, has_dlse)
        self.run((q, dout, k, v), given, stats, lists, None, num_ctas, (scale_log2, terms), stream)

    @cute.jit
    def run(self, tensors, given, stats, lists, offsets, num_ctas: Int32, scales, stream):
        """Launch the statistics of rows, then the sums. offsets: As of `BackwardSm80.run`."""
        config, (q, _, k, _) = self.config, tensors
        out, dout, lse, dlse, has_dlse = given
        pads = None if offsets is None else (offsets[0],)
        keep_scale = scales[1].keep_scale if const_expr(config.dropout) else None
        preprocess = Preprocess(config)
        preprocess(out, dout, lse, dlse, stats, None, None, pads, has_dlse, stream, keep_scale)
        q_len, tile_m = cute.size(q, mode=[1]), config.tile_m
        num_m_blocks = row_tiles(q_len, tile_m) if config.offsets else cute.ceil_div(q_len, tile_m)
        heads = (cute.size(q, mode=[2]) // cute.size(k, mode=[2]), num_m_blocks)
        inputs = (tensors, stats, lists, offsets, heads, scales)
        self.kernel(*inputs, self._storage()).launch(
            grid=(num_ctas, 1, 1),
            block=(config.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=config.ctas_per_sm,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        tensors,  # q, dout, k, v
        stats,
        lists,
        offsets,  # as of `run`
        heads,  # q heads for each kv head, and tiles of queries
        scales,  # scale_log2 and terms
        storage: cutlass.Constexpr,
    ):
        """Item after item, until there are no more."""
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        inputs = (tensors, (None,) * 5, stats, lists, offsets, heads, (None, *scales))
        BiasGradientsMainloop(self.config, self.dtype, *inputs, smem).run()

    def _storage(self):
        config, layouts = self.config, BackwardLayouts(self.config)

        def space(nbytes):
            one = cute.struct.MemRange[cutlass.Uint8, nbytes]
            return cute.struct.Align[one, 1024 if nbytes else 1]

        def numbers(count):
            return cute.struct.Align[cute.struct.MemRange[Float32, count], 16 if count else 1]

        @cute.struct
        class Storage:
            q: space(config.q_stages * layouts.q.nbytes)
            do: space(config.do_stages * layouts.q.nbytes)
            k: space(layouts.k.nbytes)
            v: space(0 if config.v_in_registers else layouts.k.nbytes)
            p: space(0)
            ds: space(0)
            stats: numbers(2 * config.tile_m * config.stats_stages)
            scratch: numbers(config.warps * config.scratch)
            item: cute.struct.Align[cute.struct.MemRange[Int32, 2 * WORK_FIELDS], 16]
            tiles: cute.struct.Align[cute.struct.MemRange[Int32, 4 * ANNOUNCED], 16]

        return Storage


class BiasGradientsAtSm80(BiasGradientsSm80):
    """`BiasGradientsSm80` for queries at positions."""

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d_v)
        out: cute.Tensor,  # (b, s_q, h, d_v)
        dout: cute.Tensor,  # (b, s_q, h, d_v)
        lse: cute.Tensor,  # (b, h, s_q) float32
        dlse: cute.Tensor,  # (b, h, s_q) float32
        stats: cute.Tensor,  # (b, h, 2, tiles x tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        terms: ScoreTerms,  # with zeros as sums
        q_pad: cute.Tensor,  # (b,) int32: rows of the first tile that come before query 0
        kv_starts: cute.Tensor,  # (b,) int32
        q_tops: cute.Tensor,  # (b,) int32: position of the first row of the first tile
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: tile of the batch entry's queries, and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        counts: cute.Tensor,  # (2,) int32: number of work tiles, and 0
        num_ctas: Int32,
        has_dlse: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch both kernels on the stream."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given, scales = (out, dout, lse, dlse, has_dlse), (scale_log2, terms)
        offsets = (q_pad, kv_starts, q_tops)
        self.run((q, dout, k, v), given, stats, lists, offsets, num_ctas, scales, stream)


class BiasGradientsMainloop(BackwardMainloop):
    """Item after item: K and V once, then all tiles of queries."""

    def __init__(self, config, dtype, tensors, results, stats, lists, offsets, heads, scales, smem):
        given = (tensors, results, stats, lists, offsets, heads, scales, smem)
        super().__init__(config, dtype, *given)
        if const_expr(config.distance_grads):
            warp = self.tile.warp
            layout = cute.make_layout((config.scratch, config.warps))
            self.scratch = smem.scratch.get_tensor(layout)[None, warp]

    def new_tile(self, *given):
        """The computation of a tile."""
        return BiasGradientsTile(*given)

    @cute.jit
    def run(self):
        """Item after item, until there are no more."""
        if const_expr(self.config.distance_grads):
            clear_scratch(self.scratch)
        if self.thread == 0:
            self.fetch(cute.arch.block_idx()[0])
        self.take()
        while self.item().count >= 0:
            if self.item().count > 0 and self.item().remaining > 0:
                self.compute()
            elif self.thread == 0:
                self.fetch(self.next_index())
            self.take()
        self.leave()

    @cute.jit
    def step(self, j, r_v):
        """Tile j. r_v: V in registers, or None."""
        config, stage = self.config, j % 2
        q_stage, do_stage, stats_stage = (
            stage if self.stages(which) == 2 else Int32(0) for which in LOADS
        )
        q, do = self.s_q + q_stage * self.q_size, self.s_do + do_stage * self.q_size
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_threads()  # the tile is there, and all warps are done with the one before
        self.load_ahead(j, stage ^ 1)
        limits = (self.tile_at(j).bit_tile, self.item().remaining)
        words = self.tile.mask_words(limits[0])
        for first in cutlass.range_constexpr(0, config.tile_m, self.tile.chunk):
            given = ((q, do, r_v), stats_stage, words, limits, self.place(j), first)
            ds = self.tile.score_gradients(*given)
            self.add_distance_sums(ds, self.place(j), first)
            self.add_image_sums(ds, self.place(j), first)
        if const_expr(self.stages(Q) == 1 or self.stages(DO) == 1):
            cute.arch.sync_threads()
            for which in cutlass.range_constexpr(len(LOADS)):
                self.load_again(which, j)

    @cute.jit
    def factor(self, head):
        """Factor of sums in fixed point; `None` of others."""
        if const_expr(not self.config.fixed_sums):
            return None
        return self.terms.sum_factors[head]

    @cute.jit
    def add_distance_sums(self, ds, place, first: cutlass.Constexpr):
        """Add the diagonals of dS' to the sums of their distances."""
        if const_expr(self.config.distance_grads):
            sums, tile = self.terms.bias_sums, self.tile
            for n in cutlass.range_constexpr(tile.atoms):
                row = place.key + tile.first_key + 16 * n
                column = place.query + tile.first_query + first
                index = self.terms.bias_rows + column - row - ROWS
                goal = sums.iterator + cute.crd2idx((place.head, index), sums.layout)
                add_diagonals(ds[n], self.scratch, goal, self.factor(place.head))

    @cute.jit
    def add_image_sums(self, ds, place, first: cutlass.Constexpr):
        """Add each element of dS' to the sum of its distances on the image."""
        if const_expr(self.config.image_grads):
            factor = self.factor(place.head)
            for n in cutlass.range_constexpr(self.tile.atoms):
                corner = self.tile.corner(place, n, first)
                self.tile.biases().add_image_sums(ds[n], corner, factor)


class BiasGradientsTile(BackwardTile):
    """dS' of a tile, by one warp."""

    @cute.jit
    def score_gradients(self, operands, stage, words, limits, place, first: cutlass.Constexpr):
        """Gradients dS' of a chunk of queries in 32 bits, without the derivative of a softcap.

        Arguments are those of `scores`.
        """
        q, do, held = operands
        ds = [accumulators(self.chunk) for _ in range(self.atoms)]
        self.begin_scores(ds, place, first)
        self.add_products_of_rows(ds, self.k, None, q, first)
        self.exact_probabilities(ds, stage, words, limits, place, first)
        dp = [accumulators(self.chunk) for _ in range(self.atoms)]
        for n in cutlass.range_constexpr(self.atoms):
            dp[n].fill(0.0)
        self.add_products_of_rows(dp, self.v, held, do, first)
        self.scale_kept(dp, place, first)
        delta = self.statistics(1, stage, first)
        for n in cutlass.range_constexpr(self.atoms):
            for i in cutlass.range_constexpr(cute.size(ds[n])):
                ds[n][i] = ds[n][i] * (dp[n][i] - delta[i % 2, i // 4])
        return ds

    @cute.jit
    def exact_probabilities(self, acc, stage, words, limits, place, first: cutlass.Constexpr):
        """S' becomes P' in 32 bits; 0 where the mask or the keys' length says so."""
        lse = self.statistics(0, stage, first)
        for n in cutlass.range_constexpr(self.atoms):
            if const_expr(self.config.softcap):
                score_terms.apply_softcap(acc[n], self.terms.cap_scale)
                self.biases().add(acc[n], self.corner(place, n, first))
            for i in cutlass.range_constexpr(cute.size(acc[n])):
                acc[n][i] = online.exp2(acc[n][i] * self.scale_log2 - lse[i % 2, i // 4])
        self.mask(acc, words, limits, first, 0.0)

    @cute.jit
    def scale_kept(self, dp, place, first: cutlass.Constexpr):
        """With dropout, scale dP' where an element is kept; elsewhere it is 0."""
        if const_expr(self.config.dropout):
            column = place.query + self.first_query + first
            for n in cutlass.range_constexpr(self.atoms):
                row = place.key + self.first_key + 16 * n
                masks = self.dropout.masks(place.pair, row, column, self.chunk // 16)
                for i in cutlass.range_constexpr(cute.size(dp[n])):
                    half = Int32(-0x10000 if i % 2 else 0xFFFF)
                    kept = masks[i // 2] & half != 0
                    dp[n][i] = dp[n][i] * self.terms.keep_scale if kept else Float32(0.0)
