"""What the backward pass does before and after its products: small kernels bound by memory."""

import math

import cutlass
from cutlass import Float32, Int32, cute
from sparse_flash.kernels.sm90.primitives import bits_of, from_bits

THREADS = 256
VECTOR = 8  # elements that a thread takes: 16 bytes of 16-bit numbers
LOG2_E = math.log2(math.e)


@cute.jit
def vector(tensor, place, alignment: cutlass.Constexpr):
    """VECTOR neighbours of a row of a tensor, from an index in four modes on."""
    start = (tensor.iterator + cute.crd2idx(place, tensor.layout)).align(alignment)
    return cute.make_tensor(start, cute.make_layout(VECTOR))


@cute.jit
def load(tensor, place):
    """VECTOR elements of a row, place = (batch, row, head, column); beyond the last row or column
    the last ones: loads under no condition need not wait for each other.
    """
    batch, row, head, column = place
    row = cutlass.min(row, cute.size(tensor, mode=[1]) - 1)
    column = cutlass.min(column, cute.size(tensor, mode=[3]) - VECTOR)
    values = cute.make_rmem_tensor(VECTOR, tensor.element_type)
    cute.autovec_copy(vector(tensor, (batch, row, head, column), 16), values)
    return values


@cute.jit
def grid_place(chunks, heads):
    """(chunk, head, batch) of this CTA in a grid of one dimension."""
    index = cute.arch.block_idx()[0]
    rest = index // chunks
    return index % chunks, rest % heads, rest // heads


class Statistics:
    """Of each query lse in powers of 2, and delta = sum(out * dout) - dlse.

    Rows beyond the end, and those without keys, get lse = inf: their P is 0. What stands in memory
    of the chunks of dQ's sums is cleared.

    Where dQ is added in fixed point, the last four bits of delta and of lse say what for: the row's
    sums are multiplied by 2^(those - 127), so that they stay below 2^30 whatever the order. P sums
    up to 1, so that without the softmax scale

        |dQ| <= sum P |dP - delta| |K| <= (2 |dO| max |V| + |dlse|) max |K|

    (the norms of dO and of a value, the largest number in K: see `Bounds`). 255 stands for a row
    with NaN.
    """

    def __init__(self, config) -> None:
        self.config = config
        # Threads of a row: a power of two.
        self.lanes = 1 << (config.head_dim // VECTOR - 1).bit_length()
        self.rows = THREADS // self.lanes

    @cute.jit
    def __call__(self, out, dout, lse, dlse, stats, done, bounds, offsets, has_dlse: Int32, stream):
        """Launch on the stream. offsets: q_pad, in a tuple, or `None`."""
        chunks = cute.ceil_div(cute.size(stats, mode=[3]), self.rows)
        # In one dimension: the others end at 65,535.
        grid = (chunks * cute.size(out, mode=[2]) * cute.size(out, mode=[0]), 1, 1)
        self.kernel(out, dout, lse, dlse, stats, done, bounds, offsets, has_dlse).launch(
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
    ):
        """VECTOR elements for each thread."""
        chunks = cute.ceil_div(cute.size(stats, mode=[3]), self.rows)
        chunk, head, batch = grid_place(chunks, cute.size(out, mode=[2]))
        thread = cute.arch.thread_idx()[0]
        row, column = chunk * self.rows + thread // self.lanes, thread % self.lanes * VECTOR
        query = row
        inside = row < cute.size(out, mode=[1])
        if cutlass.const_expr(self.config.offsets):
            query = row - offsets[0][batch]
            inside = query >= 0 and query < cute.size(out, mode=[1])
            query = cutlass.max(query, 0)
        a, b = (load(x, (batch, query, head, column)) for x in (out, dout))
        there = inside and column < cute.size(out, mode=[3])
        total, square = self.sums_of_row(a, b, there)
        if column == 0 and row < cute.size(stats, mode=[3]):
            log_sum, given = Float32.inf, Float32(0.0)
            if inside:
                value = lse[batch, head, query]
                log_sum = Float32.inf if value == -Float32.inf else value * LOG2_E
                if has_dlse != 0:
                    given = dlse[batch, head, query]
                    total -= given
            if cutlass.const_expr(self.config.fixed):
                kv_head = head // (cute.size(out, mode=[2]) // cute.size(bounds, mode=[2]))
                found = tuple(from_bits(bounds[n, batch, kv_head]) for n in range(2))
                log_sum, total = with_exponent(log_sum, total, found, square, given)
            stats[batch, head, 0, row] = log_sum
            stats[batch, head, 1, row] = total
            if cutlass.const_expr(self.config.dq):
                if row % self.config.tile_m == 0:
                    for n in cutlass.range_constexpr(2):
                        done[batch, head, row // self.config.tile_m * 2 + n] = Int32(0)

    @cute.jit
    def sums_of_row(self, a, b, there):
        """The sum of out * dout, and that of dout squared, of a row, to all its threads."""
        total, square = Float32(0.0), Float32(0.0)
        if there:
            for i in cutlass.range_constexpr(VECTOR):
                total += a[i].to(Float32) * b[i].to(Float32)
                if cutlass.const_expr(self.config.fixed):
                    square += b[i].to(Float32) * b[i].to(Float32)
        for step in cutlass.range_constexpr(self.lanes.bit_length() - 1):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
            if cutlass.const_expr(self.config.fixed):
                square += cute.arch.shuffle_sync_bfly(square, offset=1 << step)
        return total, square


@cute.jit
def with_exponent(log_sum, delta, bounds, square, dlse):
    """A row's statistics, with what its sums are multiplied by in their last bits.

    bounds: Of its head. square: Of the norm of dO.
    """
    norm, largest = bounds
    bound = (2 * cute.math.sqrt(square) * norm + cutlass.max(dlse, -dlse)) * largest
    total = log_sum + delta
    exponent = fixed_point(bound) if total == total else Int32(255)  # noqa: PLR0124 NaN
    delta = from_bits(bits_of(delta) & -16 | exponent >> 4)
    if log_sum != Float32.inf:  # or it would be NaN; where it is, P is 0
        log_sum = from_bits(bits_of(log_sum) & -16 | exponent & 15)
    return log_sum, delta


@cute.jit
def fixed_point(bound):
    """The exponent of the largest power of two times which a bound is below 2^30, plus 127."""
    exponent = bits_of(bound) >> 23 & 255  # bound < 2^(exponent - 126)
    fitting = cutlass.min(cutlass.max(283 - exponent, 1), 252)
    return fitting if exponent < 255 else Int32(255)


class Bounds:
    """The largest norm of a value and the largest number in a key, per kv head, as bits of float32.

    Only keys of stored tiles and finite numbers count.
    """

    def __init__(self, config) -> None:
        self.config = config
        self.lanes = config.head_dim // VECTOR  # threads of a row
        self.rows = THREADS // self.lanes  # at once

    @cute.jit
    def __call__(self, k, v, bounds, kv_lens, work, counts, kv_starts, stream):
        """Launch on the stream, for each work item its tile of keys; bounds are zeros. kv_starts:
        In a tuple, or `None`.
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
        """VECTOR elements of some rows for each thread."""
        item = cute.arch.block_idx()[0]
        if item < counts[0]:
            block, head, batch = (work[item, i] for i in range(3))
            first = block * self.config.tile_n
            if cutlass.const_expr(self.config.offsets):
                first = cutlass.max(first + kv_starts[0][batch], 0)
            end = cutlass.min(kv_lens[batch], first + self.config.tile_n)
            if cutlass.const_expr(self.config.offsets):
                end = cutlass.min(end, cute.size(k, mode=[1]))
            if work[item, 4] > 0 and first < end:
                self.of_tile(k, v, bounds, (batch, head), (first, end))

    @cute.jit
    def of_tile(self, k, v, bounds, place, rows):
        """What is largest in rows `rows[0]` to `rows[1]` of k and v, into the bounds."""
        (batch, head), (first, end) = place, rows
        thread = cute.arch.thread_idx()[0]
        row, column = first + thread // self.lanes, thread % self.lanes * VECTOR
        rows = [row + i * self.rows for i in range(self.config.tile_n // self.rows)]
        places = [(batch, cutlass.min(row, end - 1), head, column) for row in rows]
        loaded = [(load(k, place), load(v, place)) for place in places]
        largest, norm = Float32(0.0), Float32(0.0)
        for n in cutlass.range_constexpr(len(loaded)):
            square, (a, b) = Float32(0.0), loaded[n]
            for i in cutlass.range_constexpr(VECTOR):
                largest = cutlass.max(largest, finite(a[i].to(Float32), a[i].to(Float32)))
                square += finite(b[i].to(Float32), b[i].to(Float32) * b[i].to(Float32))
            square = square if column < cute.size(k, mode=[3]) else Float32(0.0)
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
                # Numbers that are not negative are in the order of their bits.
                cute.arch.atomic_max(goal, bits_of(found[i]), sem="relaxed", scope="gpu")


@cute.jit
def finite(number, value):
    """The absolute of a value that goes with a number; 0 where the number is not finite."""
    size = cutlass.max(value, -value)
    return size if cutlass.max(number, -number) < Float32.inf else Float32(0.0)


@cute.jit
def exponent_in(log_sum, delta):
    """What stands in the last bits of a row's statistics."""
    return (bits_of(delta) & 15) << 4 | bits_of(log_sum) & 15


class Sum:
    """The parts of split columns, added in their order: the result does not depend on timing."""

    def __init__(self, height: int, width: int, dtype: type[cutlass.Numeric]) -> None:
        self.height, self.width, self.dtype = height, width, dtype
        self.threads = width // VECTOR  # of a row

    @cute.jit
    def __call__(self, results, combine, counts, parts, stream):
        """Launch on the stream; for each result its parts. See `Schedule.combine`."""
        rows = THREADS // self.threads
        self.kernel(results, combine, counts, parts).launch(
            grid=(cute.size(combine, mode=[0]), cute.ceil_div(self.height, rows), 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, results, combine: cute.Tensor, counts: cute.Tensor, parts):
        """VECTOR elements of each result for each thread."""
        item, chunk, _ = cute.arch.block_idx()
        thread = cute.arch.thread_idx()[0]
        row = chunk * (THREADS // self.threads) + thread // self.threads
        column = thread % self.threads * VECTOR
        result = results[0]
        if item < counts[1] and row < self.height and column < cute.size(result, mode=[3]):
            block, head, batch = combine[item, 0], combine[item, 1], combine[item, 2]
            first, count = combine[item, 3], combine[item, 4]
            index = block * self.height + row
            if index < cute.size(result, mode=[1]) and thread < self.threads * (
                THREADS // self.threads
            ):
                for i in cutlass.range_constexpr(len(results)):
                    total = cute.make_rmem_tensor(VECTOR, Float32)
                    total.fill(0.0)
                    value = cute.make_rmem_tensor(VECTOR, Float32)
                    for part in cutlass.range(first, first + count, unroll=1):
                        cute.autovec_copy(self.of_part(parts[i], part, row, column), value)
                        total.store(total.load() + value.load())
                    rounded = cute.make_rmem_tensor(VECTOR, self.dtype)
                    rounded.store(total.load().to(self.dtype))
                    place = (batch, index, head, column)
                    cute.autovec_copy(rounded, vector(results[i], place, 16))

    @cute.jit
    def of_part(self, parts, part, row, column):
        """VECTOR elements of a row of a part."""
        start = (parts.iterator + cute.crd2idx((part, row, column), parts.layout)).align(16)
        return cute.make_tensor(start, cute.make_layout(VECTOR))
