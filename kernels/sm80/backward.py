"""The backward kernel for Ampere and later: by keys, with the transposed layout.

An item is a tile of keys and the tiles of queries that see it; dK and dV stay in registers
(FlashAttention-2, Dao, 2023). Q and dO come by `cp.async`, a tile ahead. dQ is summed up in 32 bits
in memory, in no particular order. All warps of a CTA load and compute.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.combine import CombineGradients
from sparse_flash.kernels.position_work_tiles import row_tiles
from sparse_flash.kernels.preprocess import Bounds, Preprocess
from sparse_flash.kernels.schedule import WORK_FIELDS
from sparse_flash.kernels.sm80.backward_config import BackwardConfig
from sparse_flash.kernels.sm80.backward_mainloop import ANNOUNCED, BackwardMainloop
from sparse_flash.kernels.sm80.backward_postprocess import Postprocess
from sparse_flash.kernels.sm80.backward_tile import BackwardLayouts


class BackwardSm80:
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: BackwardConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype

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
        bounds: cute.Tensor,  # (2, b, h_kv) int32, zeros, or (0, b, h_kv); see preprocess.Bounds
        dq_sum: cute.Tensor,  # (b, h, tiles, dq_chunk) float32 or int32, zeros; see Postprocess
        stats: cute.Tensor,  # (b, h, 2, s_q rounded up to tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: m_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros; left as zeros
        dk_splits: cute.Tensor,  # (parts, tile_n, head_dim) float32
        dv_splits: cute.Tensor,  # (parts, tile_n, head_dim) float32
        combine: cute.Tensor,  # (columns, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: how many items and columns there are
        num_ctas: Int32,
        has_dlse: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch all on the stream. See `Schedule` for the work items and the parts."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, bounds, has_dlse)
        results = (dk, dv, dk_splits, dv_splits, dq_sum)
        scales = (softmax_scale, scale_log2)
        self.run((q, dout, k, v), given, stats, dq, results, lists, None, num_ctas, scales, stream)
        if cute.size(combine, mode=[0]) > 0:
            total = CombineGradients(self.config.tile_n, self.config.head_dim, self.dtype)
            total((dk, dv), combine, counts, (dk_splits, dv_splits), stream)

    @cute.jit
    def run(
        self, tensors, given, stats, dq, results, lists, offsets, num_ctas: Int32, scales, stream
    ):
        """Launch all but the sums of parts.

        offsets: q_pad and kv_starts, as in `ColumnOffsets`, and with score terms the positions of
        the first tiles; or `None`. scales: softmax_scale and scale_log2, and `ScoreTerms` of
        score_terms.py in kernels that have them.
        """
        config, (_, _, k, v), dq_sum = self.config, tensors, results[-1]
        out, dout, lse, dlse, bounds, has_dlse = given
        kv_lens, work, *_, counts = lists
        pads, starts = (None, None) if offsets is None else ((offsets[0],), (offsets[1],))
        if const_expr(config.fixed_point):
            Bounds(config)(k, v, bounds, kv_lens, work, counts, starts, stream)
        preprocess = Preprocess(config)
        keep_scale = scales[2].keep_scale if const_expr(config.dropout) else None
        given = (bounds, pads, has_dlse, stream, keep_scale)
        preprocess(out, dout, lse, dlse, stats, None, *given)
        q_len, tile_m = cute.size(dq, mode=[1]), config.tile_m
        num_m_blocks = row_tiles(q_len, tile_m) if config.offsets else cute.ceil_div(q_len, tile_m)
        heads = (cute.size(dq, mode=[2]) // cute.size(k, mode=[2]), num_m_blocks)
        inputs = (tensors, results, stats, lists, offsets, heads, scales)
        self.kernel(*inputs, self._storage()).launch(
            grid=(num_ctas, 1, 1),
            block=(config.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=config.ctas_per_sm,
            preferred_smem_carveout=100,
        )
        Postprocess(config)(dq_sum, stats, dq, pads, scales[0], stream)

    @cute.kernel
    def kernel(
        self,
        tensors,  # q, dout, k, v
        results,  # dk and dv; their parts; sums of dq
        stats,
        lists,
        offsets,  # as of `run`
        heads,  # q heads for each kv head, and tiles of queries
        scales,
        storage: cutlass.Constexpr,
    ):
        """Item after item, until there are no more."""
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        inputs = (tensors, results, stats, lists, offsets, heads, scales)
        BackwardMainloop(self.config, self.dtype, *inputs, smem).run()

    def _storage(self):
        config, layouts = self.config, BackwardLayouts(self.config)

        def space(nbytes):
            one = cute.struct.MemRange[cutlass.Uint8, nbytes]
            return cute.struct.Align[one, 1024 if nbytes else 1]

        @cute.struct
        class Storage:
            q: space(config.q_stages * layouts.q.nbytes)
            do: space(config.do_stages * layouts.q.nbytes)
            k: space(layouts.k.nbytes)
            ds: space(layouts.ds.nbytes)
            v: space(0 if config.v_in_registers else layouts.k.nbytes)
            p: space(config.exchange * layouts.ds.nbytes)
            stats: cute.struct.Align[
                cute.struct.MemRange[Float32, 2 * config.tile_m * config.stats_stages], 16
            ]
            item: cute.struct.Align[cute.struct.MemRange[Int32, 2 * WORK_FIELDS], 16]
            tiles: cute.struct.Align[cute.struct.MemRange[Int32, 4 * ANNOUNCED], 16]

        return Storage
