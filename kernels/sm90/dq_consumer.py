"""A consumer warpgroup of the dQ kernel: 64 rows of each work tile.

    S = Q K';   P = exp2(scale S - lse);   dP = dO V';   dS = P (dP - delta);   dQ += dS K

It follows the work list of the forward pass and accumulates dQ in registers, so the result is
bitwise repeatable. S and dP of a tile are issued together with dQ of the previous tile.
"""

import cutlass
from cutlass import Float32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warpgroup
from sparse_flash.kernels import online_softmax as online
from sparse_flash.kernels.sm90.forward_consumer import CONSUMER, ForwardConsumer, StepKind
from sparse_flash.kernels.sm90.primitives import gemm, mul_pairs
from sparse_flash.kernels.vectors import round_to
from sparse_flash.kernels.work_tiles import PositionWorkTile, RowWorkTile
from sparse_flash.masks.layout import FULL_TILE


class DqConsumer(ForwardConsumer):
    """State of one warpgroup: accumulator of dQ, operands, pipelines."""

    def __init__(
        self, config, dtype, tiled_mmas, store, buffers, pipes, work_tiles, bits, inputs, scales
    ):
        self.config, self.dtype, self.work_tiles, self.bits = config, dtype, work_tiles, bits
        self.work_tile_type = PositionWorkTile if config.offsets else RowWorkTile
        self.scale, self.scale_log2 = scales
        self.mma_s, self.mma_dq, self.mma_store = tiled_mmas
        sQ, sdO, self.sK, sV, self.sO, self.sTiles = buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.store = store
        self.stats, self.splits, *others = inputs
        if const_expr(config.offsets):
            self.q_pad, self.dq = others
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        self.warpgroup = self.group  # among all consumers
        mma_s, mma_dq = self.mma_s.get_slice(0), self.mma_dq.get_slice(0)
        self.tSrQ = self.mma_s.make_fragment_A(mma_s.partition_A(sQ))
        self.tdPrdO = self.mma_s.make_fragment_A(mma_s.partition_A(sdO))
        self.tSrK = self.mma_s.make_fragment_B(mma_s.partition_B(self.sK))
        self.tdPrV = self.mma_s.make_fragment_B(mma_s.partition_B(sV))
        shape = (config.head_dim, config.tile_n, config.kv_stages)
        columns = cute.composition(self.sK, cute.make_ordered_layout(shape, order=(1, 0, 2)))
        self.tdQrK = self.mma_dq.make_fragment_B(mma_dq.partition_B(columns))
        self.ds = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_n // 16), dtype)
        self.acc_o = cute.make_rmem_tensor(
            self.mma_dq.partition_shape_C((64, config.head_dim)), Float32
        )

    @cute.jit
    def run(self):
        """Process work tiles until one has no tiles."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(CONSUMER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.work_tiles.pipe.num_stages)
        work_tile = self.work_tiles.take(work_state, self.work_tile_type)
        work_state.advance()
        while work_tile.count > 0:
            stats = self.statistics(work_tile)
            self.acc_o.fill(0.0)
            self.q_pipe.consumer_wait(q_state)
            kv_state, remaining = self.step(q_state.index, kv_state, stats, StepKind.FIRST)
            for _ in cutlass.range(work_tile.count - 1, unroll=1):
                kv_state, remaining = self.step(q_state.index, kv_state, stats, StepKind.INNER)
            self.q_pipe.consumer_release(q_state)
            q_state.advance()
            self.zero_beyond(self.sK, kv_state.index, remaining)
            gemm(self.mma_dq, self.acc_o, self.ds, self.tdQrK, kv_state.index, False)
            warpgroup.wait_group(0)
            self.k_pipe.consumer_release(kv_state)
            kv_state.advance()
            self.finish(work_tile)
            work_tile = self.work_tiles.take(work_state, self.work_tile_type)
            work_state.advance()
        if self.thread < 32:
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def step(self, q_stage, kv_state, stats, kind: cutlass.Constexpr):
        """Compute dS of a tile, and (unless `kind` is FIRST) dQ += dS K of the previous tile.

        `kv_state` is the state of the previous tile. Returns the state of this tile, and the number
        of keys from its first column on.
        """
        config, before = self.config, kv_state.clone()
        shape = self.mma_s.partition_shape_C((64, config.tile_n))
        acc_s, acc_dp = (cute.make_rmem_tensor(shape, Float32) for _ in range(2))
        if const_expr(kind != StepKind.FIRST):
            kv_state.advance()
        mine = q_stage * config.warpgroups + self.group
        self.k_pipe.consumer_wait(kv_state)
        rows = self.tSrQ[None, None, None, mine]
        gemm(self.mma_s, acc_s, rows, self.tSrK, kv_state.index, True)
        self.v_pipe.consumer_wait(kv_state)
        rows = self.tdPrdO[None, None, None, mine]
        gemm(self.mma_s, acc_dp, rows, self.tdPrV, kv_state.index, True)
        if const_expr(kind != StepKind.FIRST):
            gemm(self.mma_dq, self.acc_o, self.ds, self.tdQrK, before.index, False)
        pending = 1 if const_expr(kind != StepKind.FIRST) else 0
        bit_tile, remaining = self.read_tile_info(kv_state.index)
        words = online.mask_words(self.bits, bit_tile, self.group, self.thread)
        warpgroup.wait_group(1 + pending)
        for i in cutlass.range_constexpr(cute.size(acc_s)):
            acc_s[i] = online.exp2(acc_s[i] * self.scale_log2 - stats[0, i // 2 % 2])
        if bit_tile != FULL_TILE:
            within = online.columns_within(remaining, self.thread)
            online.apply_mask(acc_s, words, within, 0.0)
        p = cute.make_rmem_tensor(self.ds.shape, self.dtype)
        round_to(p, acc_s)
        warpgroup.wait_group(pending)
        self.v_pipe.consumer_release(kv_state)
        if remaining < config.tile_n:  # values beyond the length may be NaN
            within = online.columns_within(remaining, self.thread)
            online.apply_mask(acc_dp, words, within, 0.0)
        if const_expr(kind != StepKind.FIRST):
            warpgroup.wait_group(0)
            self.k_pipe.consumer_release(before)
        for i in cutlass.range_constexpr(cute.size(acc_dp)):
            self.ds[i] = (acc_dp[i] - stats[1, i // 2 % 2]).to(self.dtype)
        mul_pairs(self.ds, p)
        return kv_state, remaining

    @cute.jit
    def statistics(self, work_tile):
        """Load lse (0) and delta (1) of the thread's rows."""
        values, stats = cute.make_rmem_tensor((2, 2), Float32), self.stats
        for i in cutlass.range_constexpr(2):
            values[0, i], values[1, i] = Float32.inf, Float32(0.0)
            inside, q_idx = self.coord_of(work_tile, self.row(i))
            if inside:
                values[0, i] = stats[work_tile.batch, work_tile.head, 0, q_idx]
                values[1, i] = stats[work_tile.batch, work_tile.head, 1, q_idx]
        return values

    @cute.jit
    def coord_of(self, work_tile, row):
        """Whether a row of the tile has statistics, and its index."""
        if const_expr(self.config.offsets):
            # They begin with the backward kernel's tile that contains query 0.
            q_idx = work_tile.start + row + self.q_pad[work_tile.batch]
            return q_idx >= 0 and q_idx < cute.size(self.stats, mode=[3]), q_idx
        q_idx = work_tile.m_block * self.config.tile_m + row
        return q_idx < cute.size(self.stats, mode=[3]), q_idx

    @cute.jit
    def finish(self, work_tile):
        """Store dQ: to the result, or as one split of a row."""
        split_idx, splits = work_tile.split_idx, self.splits
        for i in cutlass.range_constexpr(cute.size(self.acc_o)):
            self.acc_o[i] = self.acc_o[i] * self.scale
        if const_expr(self.config.offsets):  # rows are not split
            self.store_rows(self.dq, work_tile)
        elif split_idx < 0:
            self.store_out(work_tile)
        else:
            for i in cutlass.range_constexpr(cute.size(self.acc_o)):
                column = i // 4 * 8 + self.thread % 4 * 2 + i % 2
                splits[split_idx, self.row(i // 2 % 2), column] = self.acc_o[i]
