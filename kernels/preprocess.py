"""Preprocess of the backward pass: row statistics, and bounds for fixed-point sums."""

import math

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.vectors import VECTOR, bits_of, from_bits, grid_coord, load_vector

THREADS = 256
REPEAT = 4  # rows of a thread, whose loads overlap
LOG2_E = math.log2(math.e)


class Preprocess:
    """Computes, for each query, lse in base 2 and delta = sum(out * dout) - dlse.

    Rows out of bounds and rows without keys get lse = inf, so their P is 0. The states of the
    chunks of dQ's sums are cleared.

    With fixed-point sums, the last four bits of delta and of lse encode an exponent e. The row's
    addends are multiplied by 2^(e - 127), so that every partial sum stays below 2^30. Since P sums
    to 1, without the softmax scale

        |dQ| <= sum P |dP - delta| |K| <= (2 |dO| max |V| + |dlse|) max |K|

    (norms of dO and of a value, largest absolute element of K: see `Bounds`). Dropout scales dP.
    Exponent 255 marks a row with NaN.
    """

    def __init__(self, config) -> None:
        self.config = config
        # Threads per row: a power of two.
        self.lanes = 1 << (config.head_dim // VECTOR - 1).bit_length()
        self.rows = THREADS // self.lanes  # at once

    @cute.jit
    def __call__(
        self,
        out,
        dout,
        lse,
        dlse,
        stats,
        done,
        bounds,
        offsets,
        has_dlse: Int32,
        stream,
        keep_scale=None,
    ):
        """Launch on the stream. offsets: q_pad, in a tuple, or `None`. keep_scale: Factor of dP
        with dropout.
        """
        chunks = cute.ceil_div(cute.size(stats, mode=[3]), REPEAT * self.rows)
        # A 1-D grid: the other dimensions are limited to 65,535.
        grid = (chunks * cute.size(out, mode=[2]) * cute.size(out, mode=[0]), 1, 1)
        given = (bounds, offsets, has_dlse, keep_scale)
        self.kernel(out, dout, lse, dlse, stats, done, *given).launch(
            grid=grid, block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        dout: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        stats: cute.Tensor,
        done: cute.Tensor,
        bounds: cute.Tensor,
        offsets,
        has_dlse: Int32,
        keep_scale,
    ):
        """VECTOR elements of REPEAT rows per thread."""
        chunks = cute.ceil_div(cute.size(stats, mode=[3]), REPEAT * self.rows)
        chunk, head, batch = grid_coord(chunks, cute.size(out, mode=[2]))
        thread = cute.arch.thread_idx()[0]
        first = chunk * (REPEAT * self.rows) + thread // self.lanes
        column = thread % self.lanes * VECTOR
        queries = [self.query_of(first + i * self.rows, batch, out, offsets) for i in range(REPEAT)]
        loaded = [
            [load_vector(x, (batch, query, head, column)) for x in (out, dout)]
            for query, _ in queries
        ]
        last = cute.size(out, mode=[1]) - 1
        log_sums = [lse[batch, head, cutlass.min(query, last)] for query, _ in queries]
        for i in cutlass.range_constexpr(REPEAT):
            row, (query, inside), (a, b) = first + i * self.rows, queries[i], loaded[i]
            there = inside and column < cute.size(out, mode=[3])
            sums = self.sums_of_row(a, b, there)
            if column == 0 and row < cute.size(stats, mode=[3]):
                coord = (batch, head, row, query)
                given = (log_sums[i], dlse, bounds, has_dlse, keep_scale)
                self.store(stats, done, coord, inside, sums, given)

    @cute.jit
    def query_of(self, row, batch, out, offsets):
        """Query of a row, at least 0, and whether there is one."""
        query = row
        inside = row < cute.size(out, mode=[1])
        if cutlass.const_expr(self.config.offsets):
            query = row - offsets[0][batch]
            inside = query >= 0 and query < cute.size(out, mode=[1])
            query = cutlass.max(query, 0)
        return query, inside

    @cute.jit
    def store(self, stats, done, coord, inside, sums, given):
        """Store the statistics of a row, and clear the states of its tile's chunks."""
        batch, head, row, query = coord
        value, dlse, bounds, has_dlse, keep_scale = given
        total, square = sums
        log_sum, d_lse = Float32.inf, Float32(0.0)
        if inside:
            log_sum = Float32.inf if value == -Float32.inf else value * LOG2_E
            if has_dlse != 0:
                d_lse = dlse[batch, head, query]
                total -= d_lse
        if cutlass.const_expr(self.config.fixed_point):
            kv_head = head // (cute.size(stats, mode=[1]) // cute.size(bounds, mode=[2]))
            norm, largest = (from_bits(bounds[n, batch, kv_head]) for n in range(2))
            if cutlass.const_expr(keep_scale is not None):
                norm *= keep_scale
            log_sum, total = with_exponent(log_sum, total, (norm, largest), square, d_lse)
        stats[batch, head, 0, row] = log_sum
        stats[batch, head, 1, row] = total
        if cutlass.const_expr(self.config.dq):
            if row % self.config.tile_m == 0:
                for n in cutlass.range_constexpr(2):
                    done[batch, head, row // self.config.tile_m * 2 + n] = Int32(0)

    @cute.jit
    def sums_of_row(self, a, b, there):
        """Row sums of out * dout and of dout squared, in all threads of the row."""
        total, square = Float32(0.0), Float32(0.0)
        if there:
            for i in cutlass.range_constexpr(VECTOR):
                total += a[i].to(Float32) * b[i].to(Float32)
                if cutlass.const_expr(self.config.fixed_point):
                    square += b[i].to(Float32) * b[i].to(Float32)
        for step in cutlass.range_constexpr(self.lanes.bit_length() - 1):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
            if cutlass.const_expr(self.config.fixed_point):
                square += cute.arch.shuffle_sync_bfly(square, offset=1 << step)
        return total, square


@cute.jit
def with_exponent(log_sum, delta, bounds, square, dlse):
    """Row statistics with the fixed-point exponent in their last bits.

    bounds: Bounds of the head. square: Squared norm of dO.
    """
    norm, largest = bounds
    bound = (2 * cute.math.sqrt(square) * norm + cutlass.max(dlse, -dlse)) * largest
    total = log_sum + delta
    exponent = fixed_point_exponent(bound) if total == total else Int32(255)  # noqa: PLR0124 NaN
    delta = from_bits(bits_of(delta) & -16 | exponent >> 4)
    if log_sum != Float32.inf:  # or it would be NaN; where it is, P is 0
        log_sum = from_bits(bits_of(log_sum) & -16 | exponent & 15)
    return log_sum, delta


@cute.jit
def fixed_point_exponent(bound):
    """Biased exponent e of the largest 2^(e - 127) with 2^(e - 127) * bound < 2^30."""
    exponent = bits_of(bound) >> 23 & 255  # bound < 2^(exponent - 126)
    fitting = cutlass.min(cutlass.max(283 - exponent, 1), 252)
    return fitting if exponent < 255 else Int32(255)


class Bounds:
    """Computes the largest norm of a value and the largest element of a key, per kv head.

    Results are float32 bits. Only keys of stored tiles and finite elements count.
    """

    def __init__(self, config) -> None:
        self.config = config
        self.lanes = config.head_dim // VECTOR  # threads of a row
        self.rows = THREADS // self.lanes  # at once

    @cute.jit
    def __call__(self, k, v, bounds, kv_lens, work, counts, kv_starts, stream):
        """Launch on the stream, one CTA per work tile; bounds are zeros before. kv_starts: in a
        tuple, or `None`.
        """
        self.kernel(k, v, bounds, kv_lens, work, counts, kv_starts).launch(
            grid=(cute.size(work, mode=[0]), 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        k: cute.Tensor,
        v: cute.Tensor,
        bounds: cute.Tensor,
        kv_lens: cute.Tensor,
        work: cute.Tensor,
        counts: cute.Tensor,
        kv_starts,
    ):
        """VECTOR elements of several rows per thread."""
        work_tile = cute.arch.block_idx()[0]
        if work_tile < counts[0]:
            block, head, batch = (work[work_tile, i] for i in range(3))
            first = block * self.config.tile_n
            if cutlass.const_expr(self.config.offsets):
                first = cutlass.max(first + kv_starts[0][batch], 0)
            end = cutlass.min(kv_lens[batch], first + self.config.tile_n)
            if cutlass.const_expr(self.config.offsets):
                end = cutlass.min(end, cute.size(k, mode=[1]))
            if work[work_tile, 4] > 0 and first < end:
                self.of_tile(k, v, bounds, (batch, head), (first, end))

    @cute.jit
    def of_tile(self, k, v, bounds, coord, rows):
        """Update the bounds with rows `rows[0]` to `rows[1]` of k and v."""
        (batch, head), (first, end) = coord, rows
        thread = cute.arch.thread_idx()[0]
        row, column = first + thread // self.lanes, thread % self.lanes * VECTOR
        rows = [row + i * self.rows for i in range(self.config.tile_n // self.rows)]
        coords = [(batch, cutlass.min(row, end - 1), head, column) for row in rows]
        loaded = [(load_vector(k, coord), load_vector(v, coord)) for coord in coords]
        largest, norm = Float32(0.0), Float32(0.0)
        for n in cutlass.range_constexpr(len(loaded)):
            square, (a, b) = Float32(0.0), loaded[n]
            for i in cutlass.range_constexpr(VECTOR):
                largest = cutlass.max(largest, finite(a[i].to(Float32), a[i].to(Float32)))
                square += finite(b[i].to(Float32), b[i].to(Float32) * b[i].to(Float32))
            square = square if column < cute.size(v, mode=[3]) else Float32(0.0)
            for i in cutlass.range_constexpr(self.lanes.bit_length() - 1):
                square += cute.arch.shuffle_sync_bfly(square, offset=1 << i)
            norm = cutlass.max(norm, square)
        for i in cutlass.range_constexpr(5):
            largest = cutlass.max(largest, cute.arch.shuffle_sync_bfly(largest, offset=1 << i))
            norm = cutlass.max(norm, cute.arch.shuffle_sync_bfly(norm, offset=1 << i))
        if thread % 32 == 0:
            found = (cute.math.sqrt(norm), largest)
            for i in cutlass.range_constexpr(2):
                goal = bounds.iterator + cute.crd2idx((i, batch, head), bounds.layout)
                # The bits of non-negative floats are ordered as the floats.
                cute.arch.atomic_max(goal, bits_of(found[i]), sem="relaxed", scope="gpu")


@cute.jit
def finite(number, value):
    """Absolute value of `value`; 0 if `number` is not finite."""
    size = cutlass.max(value, -value)
    return size if cutlass.max(number, -number) < Float32.inf else Float32(0.0)


@cute.jit
def exponent_in(log_sum, delta):
    """The fixed-point exponent in the last bits of a row's statistics."""
    return (bits_of(delta) & 15) << 4 | bits_of(log_sum) & 15
