"""The kernels for Hopper with score terms (see score_terms.py): those without, with an argument."""

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.combine import CombineGradients, CombineOutput
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm90.backward import BackwardSm90
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.forward import ForwardSm90
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.split_combine import SplitCombine


class ForwardScoredSm90(ForwardSm90):
    """`ForwardSm90` with score terms."""

    def __init__(self, config: ForwardConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.scored
        super().__init__(config, dtype)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, s_q, h, d)
        lse: cute.Tensor,  # (b, h, s_q) float32
        kv_lens: cute.Tensor,  # (b,) int32
        terms: ScoreTerms,
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        out_splits: cute.Tensor,  # (parts, tile_m, head_dim) float32
        lse_splits: cute.Tensor,  # (parts, tile_m) float32
        combine: cute.Tensor,  # (rows, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: numbers of work tiles and of combined rows
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream. See `Schedule` for work tiles and splits."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        results = (lse, out_splits, lse_splits)
        self.launch((q, k, v, out), lists, None, results, num_ctas, scale_log2, stream, terms)
        if cute.size(combine, mode=[0]) > 0:
            rows = CombineOutput(self.config.tile_m, self.config.head_dim, self.dtype)
            with_sinks = terms if cutlass.const_expr(self.config.sinks) else None
            rows(out, lse, combine, counts, out_splits, lse_splits, stream, with_sinks)


class ForwardAtScoredSm90(ForwardSm90):
    """`ForwardAtSm90` with score terms."""

    def __init__(self, config: ForwardConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.scored
        assert config.offsets
        super().__init__(config, dtype)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, s_q, h, d)
        lse: cute.Tensor,  # (b, h, s_q) float32
        out_splits: cute.Tensor,  # (splits, b, s_q, h, head_dim) float32; empty if num_splits is 1
        lse_splits: cute.Tensor,  # (splits, b, h, s_q) float32
        kv_lens: cute.Tensor,  # (b,) int32
        q_offset: cute.Tensor,  # (b,) int32
        kv_starts: cute.Tensor,  # (b,) int32
        terms: ScoreTerms,
        rows: cute.Tensor,  # (patterns, block rows + 1, 4) int32: see `PositionPlan`
        pattern_map: cute.Tensor,  # (1 or b, 1 or h) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        num_ctas: Int32,
        q_base: Int32,  # added to q_offset
        num_positions: Int32,  # q_len of the layout
        num_splits: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream."""
        b, s_q, h, _ = q.shape
        positions = (
            (kv_lens, q_offset, kv_starts, rows, pattern_map),
            (q_base, num_positions, num_splits),
            (b, s_q, h, cute.size(k, mode=[1])),
        )
        lists = (kv_lens, None, tiles, bits, counter, None)
        results = (lse, out_splits, lse_splits, out)
        self.launch((q, k, v, out), lists, positions, results, num_ctas, scale_log2, stream, terms)
        if num_splits > 1:
            combine = SplitCombine(self.config.head_dim, self.dtype)
            with_sinks = terms if cutlass.const_expr(self.config.sinks) else None
            combine(out, lse, out_splits, lse_splits, num_splits, stream, with_sinks)


class BackwardScoredSm90(BackwardSm90):
    """`BackwardSm90` with score terms."""

    def __init__(self, config: BackwardConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.scored
        super().__init__(config, dtype)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, s_q, h, d)
        dout: cute.Tensor,  # (b, s_q, h, d)
        lse: cute.Tensor,  # (b, h, s_q) float32
        dlse: cute.Tensor,  # (b, h, s_q) float32
        dq: cute.Tensor,  # (b, s_q, h, d)
        dk: cute.Tensor,  # (b, s_kv, h_kv, d)
        dv: cute.Tensor,  # (b, s_kv, h_kv, d)
        done: cute.Tensor,  # (b, h, tiles x 2) int32: states of dq_sum, see BackwardStorer
        bounds: cute.Tensor,  # (2, b, h_kv) int32, zeros, or (0, b, h_kv); see preprocess.Bounds
        dq_sum: cute.Tensor,  # (b, h, tiles x 2, dq_chunk) float32 or int32; see Postprocess
        stats: cute.Tensor,  # (b, h, 2, s_q rounded up to tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        terms: ScoreTerms,
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: m_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        dk_splits: cute.Tensor,  # (parts, tile_n, head_dim) float32
        dv_splits: cute.Tensor,  # (parts, tile_n, head_dim) float32
        combine: cute.Tensor,  # (columns, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: numbers of work tiles and of combined columns
        num_ctas: Int32,
        has_dlse: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch all kernels on the stream. See `Schedule` for work tiles and splits."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, bounds, has_dlse)
        results = ((dv, dk), (dq_sum, done), (dv_splits, dk_splits))
        scales = (softmax_scale, scale_log2, terms)
        self.run((q, dout, k, v), given, stats, dq, results, lists, None, num_ctas, scales, stream)
        if cute.size(combine, mode=[0]) > 0:
            total = CombineGradients(self.config.tile_n, self.config.head_dim, self.dtype)
            total((dk, dv), combine, counts, (dk_splits, dv_splits), stream)
