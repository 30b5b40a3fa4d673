"""Sums of dQ become dQ."""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.preprocess import exponent_in
from sparse_flash.kernels.vectors import bits_of, from_bits, grid_coord, pack_pair, store_pairs

NAN_PAIR = 0x7FFF7FFF  # two NaN, in both 16-bit types


def dq_place(config, warp, lane, n, c):
    """(query of the tile, column) where a thread's part of dQ begins, in the n-th of its rows,
    which are 8 apart, and the c-th group of columns: numbers i of (0, 1, 8, 9) follow in columns
    2 (lane % 4) + i.
    """
    row = warp % config.dq_warps * (16 * config.dq_atoms) + 8 * n + lane // 4
    return row, 16 * (config.dq_columns * c + warp // config.dq_warps)


def dq_index(config, n, c):
    """The first two of these four numbers among a thread's; the others follow four further."""
    return n // 2 * (8 * config.dq_groups) + 8 * c + 2 * (n % 2)


class Postprocess:
    """DQ from its sums, in 16 bits, scaled.

    The sums lie as the threads of `BackwardTile` hold them: one number of each thread, then the
    next of each. The sums added last are read first: they may still be in the L2 cache.
    """

    def __init__(self, config) -> None:
        self.config = config

    @cute.jit
    def __call__(self, dq_sum, stats, dq, offsets, scale: Float32, stream):
        """Launch on the stream, a CTA for each tile of queries. offsets: q_pad, in a tuple, or
        `None`.
        """
        batch, heads, tiles = (cute.size(dq_sum, mode=[i]) for i in range(3))
        # In one dimension: the others end at 65,535.
        self.kernel(dq_sum, stats, dq, offsets, scale).launch(
            grid=(tiles * heads * batch, 1, 1), block=(self.config.threads, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        dq_sum: cute.Tensor,  # (b, h, tiles, dq_chunk)
        stats: cute.Tensor,
        dq: cute.Tensor,
        offsets,
        scale: Float32,
    ):
        """Each thread the elements that are its own in `BackwardTile.add_to_sums`."""
        config = self.config
        batches, heads, tiles = (cute.size(dq_sum, mode=[i]) for i in range(3))
        tile, head, batch = grid_coord(tiles, heads)
        head, batch = heads - 1 - head, batches - 1 - batch
        thread = cute.arch.thread_idx()[0]
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        start = dq_sum.iterator + cute.crd2idx((batch, head, tile, thread), dq_sum.layout)
        size = config.dq_chunk // config.threads
        mine = cute.make_tensor(start, cute.make_layout(size, stride=config.threads))
        numbers = cute.make_rmem_tensor(size, Float32)
        for i in cutlass.range_constexpr(size):
            numbers[i] = mine[i]
        pad = offsets[0][batch] if const_expr(config.offsets) else Int32(0)
        for n in cutlass.range_constexpr(2 * config.dq_atoms):
            row = tile * config.tile_m + dq_place(config, warp, lane, n, 0)[0]
            factor = self.scale_of(stats, scale, (batch, head, row))
            for c in cutlass.range_constexpr(config.dq_groups):
                first, column = dq_index(config, n, c), dq_place(config, warp, lane, n, c)[1]
                pairs = [
                    self.scaled([numbers[i], numbers[i + 1]], factor, dq.element_type)
                    for i in (first, first + 4)
                ]
                if const_expr(config.offsets):
                    log_sum = stats[batch, head, 0, row]
                    unknown = log_sum != log_sum  # noqa: PLR0124 NaN: no position of the layout
                    pairs = [Int32(NAN_PAIR) if unknown else pair for pair in pairs]
                store_pairs(dq, (batch, row - pad, head, column), pairs, config.offsets)

    @cute.jit
    def scale_of(self, stats, scale, place):
        """The factor of the sums of a row."""
        if const_expr(self.config.fixed_point):
            batch, head, row = place
            exponent = exponent_in(*(stats[batch, head, i, row] for i in range(2)))
            unit = from_bits(254 - exponent << 23) if exponent < 255 else Float32.nan
            scale *= unit
        return scale

    @cute.jit
    def scaled(self, numbers, factor, dtype: cutlass.Constexpr):
        """Two neighbors of dQ in one register."""
        if const_expr(self.config.fixed_point):
            numbers = [bits_of(x).to(Float32) for x in numbers]
        return pack_pair(*(x * factor for x in numbers), dtype)
