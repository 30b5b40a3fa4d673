"""What the backward pass does before and after its products: small kernels bound by memory."""

import math

import cutlass
from cutlass import Float32, Int32, cute

THREADS = 256
VECTOR = 8  # elements that a thread takes: 16 bytes of 16-bit numbers
LOG2_E = math.log2(math.e)


@cute.jit
def vector(tensor, place, alignment: cutlass.Constexpr):
    """VECTOR neighbours of a row of a tensor, from an index in four modes on."""
    start = (tensor.iterator + cute.crd2idx(place, tensor.layout)).align(alignment)
    return cute.make_tensor(start, cute.make_layout(VECTOR))


class Statistics:
    """Of each query lse in powers of 2, and delta = sum(out * dout) - dlse.

    Rows beyond the end, and those without keys, get lse = inf: their P is 0. What stands in memory
    of the tiles of dQ's sums, and of heads, is cleared; and the sums, where they will be added to
    in turns.
    """

    def __init__(self, config) -> None:
        self.config = config
        self.lanes = config.head_dim // VECTOR  # threads of a row: a power of two

    @cute.jit
    def __call__(self, out, dout, lse, dlse, stats, sums, has_dlse: Int32, stream):
        """Launch on the stream."""
        rows = cute.size(stats, mode=[3])
        self.kernel(out, dout, lse, dlse, stats, sums, has_dlse).launch(
            grid=(
                cute.ceil_div(rows * self.lanes, THREADS),
                cute.size(out, mode=[2]),
                cute.size(out, mode=[0]),
            ),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        out: cute.Tensor,
        dout: cute.Tensor,
        lse: cute.Tensor,
        dlse: cute.Tensor,
        stats: cute.Tensor,
        sums: tuple[cute.Tensor, ...],  # dq_sum, what its tiles are, and finished items by head
        has_dlse: Int32,
    ):
        """VECTOR elements for each thread."""
        chunk, head, batch = cute.arch.block_idx()
        thread = chunk * THREADS + cute.arch.thread_idx()[0]
        row, column = thread // self.lanes, thread % self.lanes * VECTOR
        inside = row < cute.size(out, mode=[1])
        total = Float32(0.0)
        if inside and column < cute.size(out, mode=[3]):
            place = (batch, row, head, column)
            a, b = (cute.make_rmem_tensor(VECTOR, x.element_type) for x in (out, dout))
            cute.autovec_copy(vector(out, place, 16), a)
            cute.autovec_copy(vector(dout, place, 16), b)
            for i in cutlass.range_constexpr(VECTOR):
                total += a[i].to(Float32) * b[i].to(Float32)
        padded = row < cute.size(stats, mode=[3])
        if cutlass.const_expr(self.config.ordered):
            if padded:
                start, size = thread * VECTOR, self.config.dq_chunk
                zeros = cute.make_rmem_tensor(VECTOR, Float32)
                zeros.fill(0.0)
                goal = vector(sums[0], (batch, head, start // size, start % size), 16)
                cute.autovec_copy(zeros, goal)
        for step in cutlass.range_constexpr(self.lanes.bit_length() - 1):
            total += cute.arch.shuffle_sync_bfly(total, offset=1 << step)
        if column == 0 and padded:
            log_sum = Float32.inf
            if inside:
                value = lse[batch, head, row]
                log_sum = Float32.inf if value == -Float32.inf else value * LOG2_E
                if has_dlse != 0:
                    total -= dlse[batch, head, row]
            stats[batch, head, 0, row] = log_sum
            stats[batch, head, 1, row] = total
            if cutlass.const_expr(self.config.dq):
                if row % self.config.tile_m == 0:
                    _, done, finished = sums
                    done[batch, head, row // self.config.tile_m] = Int32(0)
                    if row == 0 and head < cute.size(finished, mode=[1]):
                        finished[batch, head] = Int32(0)


class Convert:
    """dQ = scale sum, in the dtype of q, of all tiles. The last heads come first: some of their
    sums are still in the L2 cache.
    """

    def __init__(self, config, dtype: type[cutlass.Numeric]) -> None:
        self.config, self.dtype = config, dtype
        self.groups = config.dq_columns // VECTOR

    @cute.jit
    def __call__(self, sums, done, result, scale: Float32, stream):
        """Launch on the stream: a chunk a CTA."""
        self.kernel(sums, done, result, scale).launch(
            grid=tuple(cute.size(sums, mode=[i]) for i in (2, 1, 0)),
            block=(32 * self.groups, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, sums: cute.Tensor, done: cute.Tensor, result: cute.Tensor, scale: Float32):
        """Eight columns of two rows for each thread."""
        chunk, head, batch = cute.arch.block_idx()
        head = cute.size(sums, mode=[1]) - 1 - head
        batch = cute.size(sums, mode=[0]) - 1 - batch
        there, place = done[batch, head, chunk // 2] != 0, (batch, head, chunk)
        values = read_sums(self.config, sums, place, cute.arch.thread_idx()[0])
        write_queries(self.config, result, place, cute.arch.thread_idx()[0], values, scale, there)


@cute.jit
def read_sums(config, sums, place, thread):
    """The 16 numbers of a chunk at place = (batch, head, chunk) that are this thread's, of 32 for
    each eight columns.

    The sums lie in chunks of 64 rows, as the threads of a warpgroup held them: four numbers of
    each thread, then the next four of each. Number i of thread t is row 16 (t / 32) + (t % 32) / 4
    + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2. Here, a thread takes four neighbours.
    """
    groups = config.dq_columns // VECTOR
    values = cute.make_rmem_tensor((VECTOR, 2), Float32)
    for half in cutlass.range_constexpr(2):
        start = thread % groups * 512 + thread // groups * 16 + half * VECTOR
        cute.autovec_copy(vector(sums, (*place, start), 16), values[None, half])
    return values


@cute.jit
def write_queries(config, result, place, thread, values, scale, there):
    """What `read_sums` gave, scaled, to eight columns of two rows of dQ; 0 if nobody came there."""
    batch, head, chunk = place
    lower, upper = (cute.make_rmem_tensor(VECTOR, result.element_type) for _ in range(2))
    for half in cutlass.range_constexpr(2):
        for i in cutlass.range_constexpr(4):
            index = 4 * (i // 2) + i % 2
            a = values[index, half] if there else Float32(0.0)
            b = values[index + 2, half] if there else Float32(0.0)
            lower[4 * half + i] = (a * scale).to(result.element_type)
            upper[4 * half + i] = (b * scale).to(result.element_type)
    groups = config.dq_columns // VECTOR
    group, quad = thread % groups, thread // groups  # of columns; of four neighbours
    row, column = chunk * 64, group * 8
    if cutlass.const_expr(config.dq_by_columns):
        row, column = chunk // 2 * 64, chunk % 2 * config.dq_columns + group * 8
    row += quad // 8 * 16 + quad % 8
    if column < cute.size(result, mode=[3]):
        if row < cute.size(result, mode=[1]):
            cute.autovec_copy(lower, vector(result, (batch, row, head, column), 16))
        if row + 8 < cute.size(result, mode=[1]):
            cute.autovec_copy(upper, vector(result, (batch, row + 8, head, column), 16))


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
