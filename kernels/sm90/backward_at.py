"""The kernels of the backward pass for queries at positions.

They differ from the kernels without offsets in the location of rows. Tiles are aligned to
positions. For each batch entry, the host lists the tiles that its queries touch, and numbers query
tiles from the first one (position_lists.backward_lists). The kernels need two numbers per batch
entry: the rows of the first tile before query 0, and the key at which block 0 begins. Row
statistics and sums of dQ begin with the first tile. Rows without a query have lse = inf, so their P
is 0.
"""

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.sm90.backward import BackwardSm90
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import DqConfig
from sparse_flash.kernels.sm90.dq import DqSm90


class BackwardAtSm90(BackwardSm90):
    """`BackwardSm90` with offsets."""

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
        done: cute.Tensor,  # (b, h, tiles x 2) int32: states of dq_sum, see BackwardStorer
        bounds: cute.Tensor,  # (2, b, h_kv) int32, zeros, or (0, b, h_kv); see preprocess.Bounds
        dq_sum: cute.Tensor,  # (b, h, tiles x 2, dq_chunk) float32 or int32; see Postprocess
        stats: cute.Tensor,  # (b, h, 2, tiles x tile_m) float32
        kv_lens: cute.Tensor,  # (b,) int32
        q_pad: cute.Tensor,  # (b,) int32: rows of the first tile before query 0
        kv_starts: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: tile of the batch entry's queries, and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_n / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        dk_splits: cute.Tensor,  # (0, tile_n, head_dim) float32: columns are not split
        dv_splits: cute.Tensor,  # (0, tile_n, head_dim) float32
        counts: cute.Tensor,  # (2,) int32: number of work tiles, and 0
        num_ctas: Int32,
        has_dlse: Int32,
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch all kernels on the stream."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        given = (out, dout, lse, dlse, bounds, has_dlse)
        results = ((dv, dk), (dq_sum, done), (dv_splits, dk_splits))
        offsets, scales = (q_pad, kv_starts), (softmax_scale, scale_log2)
        tensors = (q, dout, k, v)
        self.run(tensors, given, stats, dq, results, lists, offsets, num_ctas, scales, stream)


class DqAtSm90(DqSm90):
    """`DqSm90` with offsets. `Positions` finds its work tiles."""

    def __init__(self, config: DqConfig, dtype: type[cutlass.Numeric]) -> None:
        assert config.offsets
        super().__init__(config, dtype)

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        dout: cute.Tensor,  # (b, s_q, h, d)
        dq: cute.Tensor,  # (b, s_q, h, d)
        stats: cute.Tensor,  # (b, h, 2, tiles x tile_m) float32, of BackwardAtSm90
        q_pad: cute.Tensor,  # (b,) int32, of BackwardAtSm90
        kv_lens: cute.Tensor,  # (b,) int32
        q_offset: cute.Tensor,  # (b,) int32
        kv_starts: cute.Tensor,  # (b,) int32
        rows: cute.Tensor,  # (patterns, block rows + 1) int32: first tile of each row, and the end
        pattern_map: cute.Tensor,  # (1 or b, 1 or h) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, warpgroups, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros before and after
        splits: cute.Tensor,  # (0, tile_m, head_dim) float32: rows are not split
        num_ctas: Int32,
        q_base: Int32,  # added to q_offset
        num_positions: Int32,  # q_len of the layout
        softmax_scale: Float32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream."""
        b, s_q, h, _ = q.shape
        positions = (
            (kv_lens, q_offset, kv_starts, rows, pattern_map),
            (q_base, num_positions, Int32(1)),
            (b, s_q, h, cute.size(k, mode=[1])),
        )
        lists, scales = (kv_lens, None, tiles, bits, counter, None), (softmax_scale, scale_log2)
        inputs = (stats, splits, q_pad, dq)
        self.launch((q, k, v, dout, dq), lists, positions, inputs, num_ctas, scales, stream)
