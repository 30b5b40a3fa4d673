"""Postprocess of the backward pass: convert the sums of dQ to dQ."""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.preprocess import exponent_in
from sparse_flash.kernels.sm90.backward_producer import FREE, sum_address
from sparse_flash.kernels.vectors import bits_of, from_bits, grid_coord, pack_pair, store_pairs

ROWS = 16  # accumulator rows of a slice of a chunk, one warp's; see BackwardConsumer.store_dq
SLICES = 64 // ROWS
NAN_PAIR = 0x7FFF7FFF  # two NaN, in both 16-bit types
THREADS = 2 * SLICES * 32  # for a tile of queries, which has two chunks


class Postprocess:
    """Scales each chunk of sums and rounds it to 16 bits. Untouched chunks give 0.

    The last heads go first: their sums may still be in the L2 cache.
    """

    def __init__(self, config) -> None:
        self.config = config

    @cute.jit
    def __call__(self, dq_sum, done, stats, dq, offsets, scale: Float32, stream):
        """Launch on the stream, a CTA for each tile of queries. offsets: q_pad, in a tuple, or
        `None`.
        """
        batch, heads, chunks = (cute.size(dq_sum, mode=[i]) for i in range(3))
        # A 1-D grid: the other dimensions are limited to 65,535.
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
        """One slice per warp."""
        batches, heads, chunks = (cute.size(dq_sum, mode=[i]) for i in range(3))
        tile, head, batch = grid_coord(chunks // 2, heads)
        head, batch = heads - 1 - head, batches - 1 - batch
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        coord = (batch, head, 2 * tile + warp // SLICES)
        pad = offsets[0][batch] if const_expr(self.config.offsets) else Int32(0)
        self.convert_slice(dq_sum, done, stats, dq, scale, pad, coord, warp % SLICES)

    @cute.jit
    def convert_slice(self, dq_sum, done, stats, dq, scale, pad, coord, nth):
        """Convert ROWS rows of a chunk, or of its transpose.

        The sums are in accumulator order: four elements of each thread, then the next four of each.
        The first four of lane t of the slice's warp are two adjacent ones in row t / 4, columns
        2 (t % 4) and 2 (t % 4) + 1, and two in row t / 4 + 8; the next four are 8 columns further.
        All slices of 8 columns are neighbors, or with `small` all columns of a slice.
        """
        config, (batch, head, chunk) = self.config, coord
        lane = cute.arch.lane_idx()
        row, column = chunk * 64, Int32(0)
        if const_expr(config.dq_by_columns):
            row, column = chunk // 2 * config.tile_m, chunk % 2 * config.dq_columns
        row += lane // 4
        if const_expr(config.dq_transposed):
            column += nth * ROWS
        else:
            row += nth * ROWS
        pieces = config.dq_tile[1] // 8
        offset, stride = 16 * (nth * 32 + lane), 512 * SLICES
        if const_expr(config.small):
            offset, stride = 16 * (nth * 32 * pieces + lane), 512
        start = sum_address(dq_sum, coord) + offset
        numbers = [read_four(start + stride * i) for i in range(pieces)]
        # One state for both chunks where each part of a tile has a bit of it.
        state = chunk // 2 * 2 if const_expr(config.one_state) else chunk
        there = Int32(0) if done[batch, head, state] == FREE else Int32(-1)
        if const_expr(config.small):  # a bit for each slice: a step may have half of the tile
            there = Int32(0) - (done[batch, head, state] >> nth & 1)
        scales = [self.scale_of(stats, scale, (batch, head, row + 8 * i)) for i in range(2)]
        if const_expr(config.dq_transposed):
            rows = [(x[:2], x[2:]) for x in numbers]
        else:
            rows = [[x[2 * i : 2 * i + 2] for x in numbers] for i in range(2)]
        for i in cutlass.range_constexpr(len(rows)):  # rows 8 apart
            pairs = [self.scaled(x, scales[i % 2], dq.element_type) & there for x in rows[i]]
            if const_expr(config.offsets):
                log_sum = stats[batch, head, 0, row + 8 * i]
                unknown = log_sum != log_sum  # noqa: PLR0124 NaN: outside the layout
                pairs = [Int32(NAN_PAIR) if unknown else pair for pair in pairs]
            coord = (batch, row + 8 * i - pad, head, column)
            store_pairs(dq, coord, pairs, config.offsets)

    @cute.jit
    def scale_of(self, stats, scale, coord):
        """Scale of a row's sums, including its fixed-point exponent."""
        if const_expr(self.config.fixed_point):
            batch, head, row = coord
            exponent = exponent_in(*(stats[batch, head, i, row] for i in range(2)))
            unit = from_bits(254 - exponent << 23) if exponent < 255 else Float32.nan
            scale *= unit
        return scale

    @cute.jit
    def scaled(self, numbers, scale, dtype: cutlass.Constexpr):
        """Two adjacent elements of dQ, scaled and packed into one register."""
        if const_expr(self.config.fixed_point):
            numbers = [bits_of(x).to(Float32) for x in numbers]
        pair = pack_pair(*(x * scale for x in numbers), dtype)
        return transpose(pair) if const_expr(self.config.dq_transposed) else pair


@cute.jit
def transpose(pair):
    """Transpose an 8 x 8 matrix of 16-bit elements; lane t holds a pair of row t / 4."""
    return cute.arch.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[pair],
    )


@cute.jit
def read_four(address):
    """Load four adjacent float32."""
    return cute.arch.inline_ptx(
        "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )
