"""The forward kernel for Ampere and later: persistent, by mma.sync, and driven by a Schedule.

The CTAs take work items off a common list: the first one by their number, the next ones off an
atomic counter. All threads of a CTA load tiles (cp.async) and compute: see forward_mainloop.py.
Nothing here knows a mask: a tile is full, or names a bit tile whose bits lie in the order in which
threads hold S (fragment.py), or reaches beyond the keys' length.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.combine import CombineOutput
from sparse_flash.kernels.position_work_tiles import positions_of
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm80.config import ForwardConfig
from sparse_flash.kernels.sm80.forward_items import place_words
from sparse_flash.kernels.sm80.forward_mainloop import NUM_WORDS, ForwardMainloop
from sparse_flash.kernels.sm80.primitives import TileLayout


class ForwardSm80:
    """One kernel; `config` is all that it is compiled for."""

    def __init__(self, config: ForwardConfig, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,  # (b, s_q, h, d)
        k: cute.Tensor,  # (b, s_kv, h_kv, d)
        v: cute.Tensor,  # (b, s_kv, h_kv, d)
        out: cute.Tensor,  # (b, s_q, h, d)
        lse: cute.Tensor,  # (b, h, s_q) float32
        kv_lens: cute.Tensor,  # (b,) int32
        work: cute.Tensor,  # (items, WORK_FIELDS) int32
        tiles: cute.Tensor,  # (tiles, 2) int32: n_block and bit tile
        bits: cute.Tensor,  # (bit tiles, tile_m / 64, 128, 2) int32, in fragment order
        counter: cute.Tensor,  # (2,) int32, zeros; left as zeros
        out_splits: cute.Tensor,  # (parts, tile_m, head_dim) float32
        lse_splits: cute.Tensor,  # (parts, tile_m) float32
        combine: cute.Tensor,  # (rows, WORK_FIELDS) int32
        counts: cute.Tensor,  # (2,) int32: how many items and rows there are
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
    ):
        """Launch on the stream. See `Schedule` for the work items and the parts."""
        lists = (kv_lens, work, tiles, bits, counter, counts)
        results = (out, lse, out_splits, lse_splits)
        self.launch((q, k, v), lists, None, results, num_ctas, scale_log2, stream)
        if cute.size(combine, mode=[0]) > 0:
            rows = CombineOutput(self.config.tile_m, self.config.head_dim, self.dtype)
            rows(out, lse, combine, counts, out_splits, lse_splits, stream)

    @cute.jit
    def launch(
        self,
        tensors,
        lists,
        positions,
        results,
        num_ctas: Int32,
        scale_log2: Float32,
        stream,
        terms=None,
    ):
        """Launch the attention kernel itself.

        positions: Arrays, numbers and sizes of `Positions`, or `None`. terms: `ScoreTerms` of
        score_terms.py, or `None`.
        """
        q, k, _ = tensors
        group_size = cute.size(q, mode=[2]) // cute.size(k, mode=[2])
        arguments = (tensors, lists, positions, results, group_size, scale_log2, terms)
        self.kernel(*arguments, self._storage()).launch(
            grid=(num_ctas, 1, 1),
            block=(self.config.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=self.config.ctas_per_sm,
            preferred_smem_carveout=100,  # percent
        )

    @cute.kernel
    def kernel(
        self,
        tensors,  # q, k, v
        lists,
        positions,
        results,
        group_size: Int32,  # q heads for each kv head
        scale_log2: Float32,
        terms,
        storage: cutlass.Constexpr,
    ):
        """Set up shared memory, then compute item after item."""
        smem = cutlass.utils.SmemAllocator().allocate(storage)
        buffers = (smem.q, smem.k, smem.v, smem.following, smem.places)
        positions = positions_of(self.config, positions)
        inputs = (tensors, lists, positions, results)
        if const_expr(self.config.scored):
            terms = ScoreTerms(*terms)
        scales = (group_size, scale_log2, terms)
        ForwardMainloop(self.config, self.dtype, buffers, inputs, *scales).run()

    def _storage(self):
        config, dtype = self.config, self.dtype
        q_size = TileLayout(config.tile_m, config.head_dim).nbytes // 2
        kv_size = TileLayout(config.tile_n, config.head_dim).nbytes // 2 * config.stages

        @cute.struct
        class Storage:
            q: cute.struct.Align[cute.struct.MemRange[dtype, q_size], 1024]
            k: cute.struct.Align[cute.struct.MemRange[dtype, kv_size], 1024]
            v: cute.struct.Align[cute.struct.MemRange[dtype, kv_size], 1024]
            following: cute.struct.Align[cute.struct.MemRange[Int32, NUM_WORDS], 16]  # work item
            places: cute.struct.MemRange[Int32, 2 * place_words(config)]

        return Storage
