"""Sums of dQ become dQ."""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.sm90.backward_producer import FREE, sum_address
from sparse_flash.kernels.sm90.elementwise import exponent_in, grid_place
from sparse_flash.kernels.sm90.primitives import bits_of, from_bits, pair_of, store_pairs

ROWS = 16  # of the accumulators: a slice of a chunk, a warp's; see BackwardConsumer.put_queries
SLICES = 64 // ROWS
NAN_PAIR = 0x7FFF7FFF  # two NaN, in both 16-bit types
THREADS = 2 * SLICES * 32  # for a tile of queries, which has two chunks


class Convert:
    """Of each chunk of sums the part of dQ, in 16 bits; a chunk that nobody came to is 0.

    What was added last comes first: it may still be in the L2 cache.
    """

    def __init__(self, config) -> None:
        self.config = config

    @cute.jit
    def __call__(self, dq_sum, done, stats, dq, offsets, scale: Float32, stream):
        """Launch on the stream, a CTA for each tile of queries. offsets: q_pad, in a tuple, or
        `None`.
        """
        batch, heads, chunks = (cute.size(dq_sum, mode=[i]) for i in range(3))
        # In one dimension: the others end at 65,535.
        self.kernel(dq_sum, done, stats, dq, offsets, scale).launch(
            grid=(chunks // 2 * heads * batch, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        dq_sum: cute.Tensor,  # (b, h, chunks, dq_chunk)
        done: cute.Tensor,  # (b, h, chunks): see BackwardStorer
        stats: cute.Tensor,
        dq: cute.Tensor,
        offsets,
        scale: Float32,
    ):
        """A slice for each warp."""
        batches, heads, chunks = (cute.size(dq_sum, mode=[i]) for i in range(3))
        tile, head, batch = grid_place(chunks // 2, heads)
        head, batch = heads - 1 - head, batches - 1 - batch
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        place = (batch, head, 2 * tile + warp // SLICES)
        pad = offsets[0][batch] if const_expr(self.config.offsets) else Int32(0)
        self.convert_slice(dq_sum, done, stats, dq, scale, pad, place, warp % SLICES)

    @cute.jit
    def convert_slice(self, dq_sum, done, stats, dq, scale, pad, place, nth):
        """ROWS rows of a chunk, or of its transpose.

        The sums lie as the threads of a warpgroup held them: four numbers of each thread, then the
        next four of each. The first four of lane t of the slice's warp are two neighbours in row
        t / 4, columns 2 (t % 4) and one on, and two in the row 8 below; the next four those 8
        columns on.
        """
        config, (batch, head, chunk) = self.config, place
        lane = cute.arch.lane_idx()
        row, column = chunk * 64, Int32(0)
        if const_expr(config.dq_by_columns):
            row, column = chunk // 2 * config.tile_m, chunk % 2 * config.dq_columns
        row += lane // 4
        if const_expr(config.dq_transposed):
            column += nth * ROWS
        else:
            row += nth * ROWS
        start = sum_address(dq_sum, place) + 16 * (nth * 32 + lane)
        numbers = [read_four(start + 2048 * i) for i in range(config.dq_tile[1] // 8)]
        there = Int32(0) if done[place] == FREE else Int32(-1)
        scales = [self.scale_of(stats, scale, (batch, head, row + 8 * i)) for i in range(2)]
        if const_expr(config.dq_transposed):
            rows = [(x[:2], x[2:]) for x in numbers]
        else:
            rows = [[x[2 * i : 2 * i + 2] for x in numbers] for i in range(2)]
        for i in cutlass.range_constexpr(len(rows)):  # every eighth
            pairs = [self.scaled(x, scales[i % 2], dq.element_type) & there for x in rows[i]]
            if const_expr(config.offsets):
                log_sum = stats[batch, head, 0, row + 8 * i]
                unknown = log_sum != log_sum  # noqa: PLR0124 NaN: no position of the layout
                pairs = [Int32(NAN_PAIR) if unknown else pair for pair in pairs]
            place = (batch, row + 8 * i - pad, head, column)
            store_pairs(dq, place, pairs, config.offsets)

    @cute.jit
    def scale_of(self, stats, scale, place):
        """What a row's sums are to be multiplied by."""
        if const_expr(self.config.fixed):
            batch, head, row = place
            exponent = exponent_in(*(stats[batch, head, i, row] for i in range(2)))
            unit = from_bits(254 - exponent << 23) if exponent < 255 else Float32.nan
            scale *= unit
        return scale

    @cute.jit
    def scaled(self, numbers, scale, dtype: cutlass.Constexpr):
        """Two neighbours of dQ in one register."""
        if const_expr(self.config.fixed):
            numbers = [bits_of(x).to(Float32) for x in numbers]
        pair = pair_of(*(x * scale for x in numbers), dtype)
        return transpose(pair) if const_expr(self.config.dq_transposed) else pair


@cute.jit
def transpose(pair):
    """Neighbours in a row of an 8 x 8 matrix, lane t's in row t / 4, become the transpose's."""
    return cute.arch.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[pair],
    )


@cute.jit
def read_four(address):
    """Four neighbours."""
    return cute.arch.inline_ptx(
        "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )
