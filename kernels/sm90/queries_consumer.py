"""A consumer warpgroup of the kernel that computes dQ by queries: 64 of an item's rows.

    S = Q K';   P = exp2(scale S - lse);   dP = dO V';   dS = P (dP - delta);   dQ += dS K

It walks the forward's lists, needs no sums in memory, and so repeats its result to the last bit.
S and dP of a tile are issued together with dQ of the tile before it.
"""

import cutlass
from cutlass import Float32, const_expr, cute, pipeline
from cutlass.cute.nvgpu import warpgroup
from sparse_flash.kernels.sm90 import online_softmax as online
from sparse_flash.kernels.sm90.forward_consumer import CONSUMER, Consumer
from sparse_flash.kernels.sm90.items import PositionItem, RowItem
from sparse_flash.kernels.sm90.primitives import multiply, multiply_pairs
from sparse_flash.masks.layout import FULL_TILE

FIRST, INNER = range(2)  # kinds of steps


class QueriesConsumer(Consumer):
    """State of one warpgroup: dQ, and where to find everything."""

    def __init__(self, config, dtype, products, store, buffers, pipes, items, bits, inputs, scales):
        self.config, self.dtype, self.items, self.bits = config, dtype, items, bits
        self.item_type = PositionItem if config.offsets else RowItem
        self.scale, self.scale_log2 = scales
        self.scores, self.of_queries, self.chunk = products
        s_q, s_do, self.s_k, s_v, self.s_o, self.s_tiles = buffers
        self.q_pipe, self.k_pipe, self.v_pipe = pipes
        self.store = store
        self.stats, self.parts, *others = inputs
        if const_expr(config.offsets):
            self.q_pad, self.dq = others
        self.thread = cute.arch.thread_idx()[0] % 128
        self.group = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 128 - 1)
        scores, of_queries = self.scores.get_slice(0), self.of_queries.get_slice(0)
        self.f_q = self.scores.make_fragment_A(scores.partition_A(s_q))
        self.f_do = self.scores.make_fragment_A(scores.partition_A(s_do))
        self.f_k = self.scores.make_fragment_B(scores.partition_B(self.s_k))
        self.f_v = self.scores.make_fragment_B(scores.partition_B(s_v))
        shape = (config.head_dim, config.tile_n, config.kv_stages)
        columns = cute.composition(self.s_k, cute.make_ordered_layout(shape, order=(1, 0, 2)))
        self.f_kt = self.of_queries.make_fragment_B(of_queries.partition_B(columns))
        self.ds = cute.make_rmem_tensor(((2, 2, 2), 1, config.tile_n // 16), dtype)
        self.acc_o = cute.make_rmem_tensor(
            self.of_queries.partition_shape_C((64, config.head_dim)), Float32
        )

    @cute.jit
    def run(self):
        """Item after item, until one has no tiles."""
        q_state = pipeline.make_pipeline_state(CONSUMER, self.config.q_stages)
        kv_state = pipeline.make_pipeline_state(CONSUMER, self.config.kv_stages)
        work_state = pipeline.make_pipeline_state(CONSUMER, self.items.pipe.num_stages)
        item = self.items.take(work_state, self.item_type)
        work_state.advance()
        while item.count > 0:
            stats = self.statistics(item)
            self.acc_o.fill(0.0)
            self.q_pipe.consumer_wait(q_state)
            kv_state, remaining = self.step(q_state.index, kv_state, stats, FIRST)
            for _ in cutlass.range(item.count - 1, unroll=1):
                kv_state, remaining = self.step(q_state.index, kv_state, stats, INNER)
            self.q_pipe.consumer_release(q_state)
            q_state.advance()
            self.zero_beyond(self.s_k, kv_state.index, remaining)
            multiply(self.of_queries, self.acc_o, self.ds, self.f_kt, kv_state.index, False)
            warpgroup.wait_group(0)
            self.k_pipe.consumer_release(kv_state)
            kv_state.advance()
            self.finish(item)
            item = self.items.take(work_state, self.item_type)
            work_state.advance()
        if self.thread < 32:
            cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def step(self, q_stage, kv_state, stats, kind: cutlass.Constexpr):
        """DS of a tile, and (unless `kind` is FIRST) dQ += dS K of the tile before it.

        `kv_state` is where the tile before is. Returns the state of this tile, and how many keys
        there are from its first column on.
        """
        config, before = self.config, kv_state.clone()
        shape = self.scores.partition_shape_C((64, config.tile_n))
        acc_s, acc_dp = (cute.make_rmem_tensor(shape, Float32) for _ in range(2))
        if const_expr(kind != FIRST):
            kv_state.advance()
        mine = q_stage * config.warpgroups + self.group
        self.k_pipe.consumer_wait(kv_state)
        rows = self.f_q[None, None, None, mine]
        multiply(self.scores, acc_s, rows, self.f_k, kv_state.index, True)
        self.v_pipe.consumer_wait(kv_state)
        rows = self.f_do[None, None, None, mine]
        multiply(self.scores, acc_dp, rows, self.f_v, kv_state.index, True)
        if const_expr(kind != FIRST):
            multiply(self.of_queries, self.acc_o, self.ds, self.f_kt, before.index, False)
        pending = 1 if const_expr(kind != FIRST) else 0
        bit_tile, remaining = self.what_to_mask(kv_state.index)
        words = online.mask_words(self.bits, bit_tile, self.group, self.thread)
        warpgroup.wait_group(1 + pending)
        for i in cutlass.range_constexpr(cute.size(acc_s)):
            acc_s[i] = online.exp2(acc_s[i] * self.scale_log2 - stats[0, i // 2 % 2])
        if bit_tile != FULL_TILE:
            within = online.columns_within(remaining, self.thread)
            online.apply_mask(acc_s, words, within, 0.0)
        p = cute.make_rmem_tensor(self.ds.shape, self.dtype)
        p.store(acc_s.load().to(self.dtype).reshape(p.shape))
        warpgroup.wait_group(pending)
        self.v_pipe.consumer_release(kv_state)
        if remaining < config.tile_n:  # values beyond the length may be NaN
            within = online.columns_within(remaining, self.thread)
            online.apply_mask(acc_dp, words, within, 0.0)
        if const_expr(kind != FIRST):
            warpgroup.wait_group(0)
            self.k_pipe.consumer_release(before)
        for i in cutlass.range_constexpr(cute.size(acc_dp)):
            self.ds[i] = (acc_dp[i] - stats[1, i // 2 % 2]).to(self.dtype)
        multiply_pairs(self.ds, p)
        return kv_state, remaining

    @cute.jit
    def statistics(self, item):
        """The lse (0) and delta (1) of the thread's rows."""
        values, stats = cute.make_rmem_tensor((2, 2), Float32), self.stats
        for i in cutlass.range_constexpr(2):
            values[0, i], values[1, i] = Float32.inf, Float32(0.0)
            inside, q_idx = self.place_of(item, self.row(i))
            if inside:
                values[0, i] = stats[item.batch, item.head, 0, q_idx]
                values[1, i] = stats[item.batch, item.head, 1, q_idx]
        return values

    @cute.jit
    def place_of(self, item, row):
        """Whether a row of the tile has statistics, and where."""
        if const_expr(self.config.offsets):
            # They begin with the tile of the kernel by keys in which query 0 lies.
            q_idx = item.start + row + self.q_pad[item.batch]
            return q_idx >= 0 and q_idx < cute.size(self.stats, mode=[3]), q_idx
        q_idx = item.m_block * self.config.tile_m + row
        return q_idx < cute.size(self.stats, mode=[3]), q_idx

    @cute.jit
    def finish(self, item):
        """Write dQ: to the result, or as a part of a split row."""
        part, parts = item.part, self.parts
        for i in cutlass.range_constexpr(cute.size(self.acc_o)):
            self.acc_o[i] = self.acc_o[i] * self.scale
        if const_expr(self.config.offsets):  # rows are not split
            self.store_rows(self.dq, item)
        elif part < 0:
            self.store_out(item)
        else:
            for i in cutlass.range_constexpr(cute.size(self.acc_o)):
                column = i // 4 * 8 + self.thread % 4 * 2 + i % 2
                parts[part, self.row(i // 2 % 2), column] = self.acc_o[i]
