"""The forward kernel for queries at positions: offsets of queries and keys lie on the device.

The same kernel as `ForwardSm80`, whose items come from `Positions` instead of a list.
"""

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.sm80.config import ForwardConfig
from sparse_flash.kernels.sm80.forward import ForwardSm80
from sparse_flash.kernels.split_combine import SplitCombine


class ForwardAtSm80(ForwardSm80):
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: ForwardConfig, dtype: type[cutlass.Numeric]) -> None:
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
        out_splits: cute.Tensor,  # (splits, b, s_q, h, head_dim) float32; none if num_splits is 1
        lse_splits: cute.Tensor,  # (splits, b, h, s_q) float32
        kv_lens: cute.Tensor,  # (b,) int32
        q_offset: cute.Tensor,  # (b,) int32
        kv_starts: cute.Tensor,  # (b,) int32
        rows: cute.Tensor,  # (patterns, block rows + 1) int32: first tile of each row, and the end
        pattern_map: cute.Tensor,  # (1 or b, 1 or h) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_m / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros; left as zeros
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
        results = (out, lse, out_splits, lse_splits)
        self.launch((q, k, v), lists, positions, results, num_ctas, scale_log2, stream)
        if num_splits > 1:
            combine = SplitCombine(self.config.head_dim, self.dtype)
            combine(out, lse, out_splits, lse_splits, num_splits, stream)
