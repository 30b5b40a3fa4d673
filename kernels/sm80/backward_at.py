"""The kernels of the backward pass for queries at positions, on Ampere and later.

As without offsets, but for where rows lie: see `sm90.backward_at`.
"""

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.sm80.backward import BackwardSm80
from sparse_flash.kernels.sm80.backward_config import BackwardConfig


class BackwardAtSm80(BackwardSm80):
    """`BackwardSm80` with offsets; `config` is all that it is compiled for."""

    def __init__(self, config: BackwardConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.offsets
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
        dk: cute.Tensor,  # (b, s_kv, h_kv, d), zeros
        dv: cute.Tensor,  # (b, s_kv, h_kv, d), zeros
        bounds: cute.Tensor,  # (2, b, h_kv) int32, zeros, or (0, b, h_kv); see preprocess.Bounds
        dq_sum: cute.Tensor,  # (b, h, tiles, dq_chunk) float32 or int32, zeros; see Postprocess
        stats: cute.Tensor,  # (b, h, 2, tiles x tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        q_pad: cute.Tensor,  # (b,) int32: rows of the first tile that come before query 0
        kv_starts: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: tile of the batch entry's queries, and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros; left as zeros
        dk_splits: cute.Tensor,  # (0, tile_n, head_dim) float32: columns are not split
        dv_splits: cute.Tensor,  # (0, tile_n, head_dim) float32
        counts: cute.Tensor,  # (2,) int32: how many items there are, and 0
        num_ctas: Int32,
        has_dlse: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch all on the stream."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, bounds, has_dlse)
        results = (dk, dv, dk_splits, dv_splits, dq_sum)
        offsets, scales = (q_pad, kv_starts), (softmax_scale, scale_log2)
        tensors = (q, dout, k, v)
        self.run(tensors, given, stats, dq, results, lists, offsets, num_ctas, scales, stream)
