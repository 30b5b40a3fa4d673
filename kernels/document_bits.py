"""Kernels for documents that data on the device decide: their numbers and their bit tiles."""

import cutlass
from cutlass import Int32, Int64, Uint8, cute
from sparse_flash.kernels.data_lists import ints

THREADS, MAX_CTAS = 128, 2048  # as many threads as columns of a bit tile at most
MAX_LINES = 256  # rows of a bit tile at most
_STEPS = 7  # halvings of as many columns as there are threads
_LAST = 2**31 - 1
INVALID = 8  # in `errors`: cu_seqlens that do not ascend from 0 to the length


class NumberDocuments:
    """The document of each token; a thread for each.

    It is the first to write for a layout, so it also begins what others add to.

    cu_seqlens: int64 or int32 (n,).
    numbers: int32 (length,): how many of cu_seqlens are not beyond the token. Ascending.
    errors: uint8 (patterns x nq,): INVALID everywhere where cu_seqlens do not ascend from 0 to the
        length, else 0.
    space: int32 (counters + 2 n,): counters, which become 0, and a copy of cu_seqlens as int64.
    """

    @cute.jit
    def __call__(
        self,
        cu_seqlens: cute.Tensor,
        numbers: cute.Tensor,
        errors: cute.Tensor,
        space: cute.Tensor,
        stream,
    ):
        """Launch on the stream."""
        self.kernel(cu_seqlens, numbers, errors, space).launch(
            grid=(cute.ceil_div(cute.size(numbers, mode=[0]), THREADS), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        cu_seqlens: cute.Tensor,
        numbers: cute.Tensor,
        errors: cute.Tensor,
        space: cute.Tensor,
    ):
        """THREADS tokens. Each warp checks cu_seqlens for itself."""
        thread = cute.arch.block_idx()[0] * THREADS + cute.arch.thread_idx()[0]
        n, length = cute.size(cu_seqlens, mode=[0]), cute.size(numbers, mode=[0])
        wrong = Int32(0)
        if cu_seqlens[0] != 0 or cu_seqlens[n - 1] != length:
            wrong = Int32(1)
        for i in cutlass.range(cute.arch.lane_idx(), n - 1, 32, unroll=1):
            if cu_seqlens[i + 1] < cu_seqlens[i]:
                wrong = Int32(1)
        code = Int32(INVALID) if cute.arch.vote_ballot_sync(wrong != 0) != 0 else Int32(0)
        stride = cute.arch.grid_dim()[0] * THREADS
        for i in cutlass.range(thread, cute.size(errors, mode=[0]), stride, unroll=1):
            errors[i] = code.to(Uint8)
        counters = cute.size(space, mode=[0]) - 2 * n
        for i in cutlass.range(thread, counters, stride, unroll=1):
            space[i] = Int32(0)
        for i in cutlass.range(thread, n, stride, unroll=1):
            end = cu_seqlens[i].to(Int64)
            space[counters + 2 * i] = end.to(Int32)
            space[counters + 2 * i + 1] = (end >> 32).to(Int32)
        if thread < length:
            low, high = Int32(0), Int32(n)
            while low < high:
                middle = (low + high) >> 1
                if cu_seqlens[middle] <= thread:
                    low = middle + 1
                else:
                    high = middle
            numbers[thread] = low


class OwnBits:
    """Bit tiles of their own, in fragment order (see kernels.fragment), by some CTAs.

    own, used: As of `ListTiles`.
    numbers: As of `ListTiles`. Ascending, so that each line is allowed an interval of columns.
    mask_bits: Bit tiles of the mask's table in the same order, int32 (known, height / 64, 128, 2).
    bits: int32 (most, height / 64, 128, 2); heights are of keys where lines are columns.
    """

    @cute.jit
    def __call__(
        self,
        own: cute.Tensor,
        used: cute.Tensor,
        numbers: cute.Tensor,
        mask_bits: cute.Tensor,
        bits: cute.Tensor,
        rows: Int32,
        height: Int32,
        width: Int32,
        q_len: Int32,
        kv_len: Int32,
        down: Int32,
        across: Int32,
        numbered: Int32,
        all_blocks: Int32,
        by_column: Int32,
        stream,
    ):
        """Launch on the stream."""
        sizes = (rows, height, width, q_len, kv_len, down, across, numbered, all_blocks, by_column)
        self.kernel(own, used, numbers, mask_bits, bits, sizes).launch(
            grid=(cutlass.min(cute.size(bits, mode=[0]), MAX_CTAS), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        own: cute.Tensor,
        used: cute.Tensor,
        numbers: cute.Tensor,
        mask_bits: cute.Tensor,
        bits: cute.Tensor,
        sizes,
    ):
        """Some bit tiles."""
        smem = cutlass.utils.SmemAllocator()
        s_columns = smem.allocate_tensor(Int32, cute.make_layout(THREADS), 16)
        s_lines = smem.allocate_tensor(Int32, cute.make_layout(MAX_LINES), 16)
        count = cutlass.min(used[1], cute.size(bits, mode=[0]))
        for slot in cutlass.range(
            cute.arch.block_idx()[0], count, cute.arch.grid_dim()[0], unroll=1
        ):
            self.bit_tile(slot, own, numbers, mask_bits, bits, (s_columns, s_lines), sizes)

    @cute.jit
    def bit_tile(self, slot, own, numbers, mask_bits, bits, memory, sizes):
        """One bit tile: two words of a warpgroup's row pairs for each thread."""
        thread = cute.arch.thread_idx()[0]
        rows, height, width, q_len, kv_len, down, across, numbered, all_blocks, by_column = sizes
        s_columns, s_lines = memory
        at, col, state, blocks = (own[slot, i] for i in range(4))
        table = at // rows if numbered > 1 else Int32(0)
        top, left = at % rows * height, col * width
        reach = width if by_column == 0 else height  # columns of the bit tile
        start, end = (left, kv_len) if by_column == 0 else (top, q_len)
        from_line, last_line = (top, q_len - 1) if by_column == 0 else (left, kv_len - 1)
        if numbered != 0:
            cute.arch.sync_threads()  # the tile before has been read
            number = numbers[table, cutlass.min(start + thread, end - 1)]
            s_columns[thread] = number if thread < reach else Int32(_LAST)
            for i in cutlass.range_constexpr(MAX_LINES // THREADS):
                line = i * THREADS + thread
                s_lines[line] = numbers[table, cutlass.min(from_line + line, last_line)]
            cute.arch.sync_threads()
        lines = 16 * (thread // 32) + thread % 32 // 4
        sides = (height // down, width // across, across)
        for group in cutlass.range(cute.size(bits, mode=[1]), unroll=1):
            for n in cutlass.range_constexpr(2):
                line, of_mask = group * 64 + lines + 8 * n, Int32(-1)
                if state >= 0:  # loaded while the documents are searched
                    of_mask = mask_bits[state, group, thread, n]
                low, high = Int32(0), reach
                if numbered != 0:
                    low, high = self.columns_of(s_columns, s_lines[line])
                word = self.interval(low, high, 2 * (thread % 4)) & of_mask
                if blocks != all_blocks:
                    word = word & self.chosen(blocks, line, 2 * (thread % 4), sides, by_column)
                bits[slot, group, thread, n] = word

    @cute.jit
    def columns_of(self, s_columns, number):
        """How many of the columns have numbers below `number`, and how many at most `number`.

        A search without branches, so that several run at once. Columns beyond the tile have the
        largest number.
        """
        low, high = Int32(0), Int32(0)
        for n in cutlass.range_constexpr(_STEPS):
            step = THREADS >> (n + 1)
            low += Int32(step) if s_columns[low + (step - 1)] < number else Int32(0)
            high += Int32(step) if s_columns[high + (step - 1)] <= number else Int32(0)
        low += Int32(1) if s_columns[low] < number else Int32(0)
        high += Int32(1) if s_columns[high] <= number else Int32(0)
        return low, high

    @cute.jit
    def interval(self, low, high, first):
        """The word of columns 8 j + first + c, bit 2 j + c, that lie in low..high - 1."""
        word = Int32(0)
        for c in cutlass.range_constexpr(2):
            begin = cutlass.max(low - first - c + 7, 0) >> 3
            end = cutlass.max(high - first - c + 7, 0) >> 3
            found = ((Int64(1) << (2 * end)) - (Int64(1) << (2 * begin))).to(Int32)
            word = word | (found & 0x55555555) << c
        return word

    @cute.jit
    def chosen(self, blocks, line, first, sides, by_column):
        """The word of columns in blocks of the set."""
        result = Int32(0)
        for j in cutlass.range(16, unroll=1):
            for c in cutlass.range_constexpr(2):
                column = 8 * j + first + c
                q, kv = (line, column) if by_column == 0 else (column, line)
                cell = (q // sides[0] * sides[2] + kv // sides[1]) & 31  # columns beyond the tile
                result = result | (blocks >> cell & 1) << (2 * j + c)
        return result


def compile_number_documents(kind: str, arch: str):
    """Compile for cu_seqlens of "int64" or "int32", whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    size = cute.sym_int
    dtype = {"int64": Int64, "int32": Int32}[kind]
    arguments = (ints(size(), dtype=dtype), ints(size()), ints(size(), dtype=Uint8), ints(size()))
    return compile_kernel(NumberDocuments(), arguments, arch)


def compile_own_bits(arch: str):
    """Compile, whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    size, groups = cute.sym_int, cute.sym_int()
    arguments = (
        *(ints(size(), 4), ints(2), ints(size(), size())),
        *(ints(size(), groups, 128, 2), ints(size(), groups, 128, 2)),
        *(Int32(1) for _ in range(10)),
    )
    return compile_kernel(OwnBits(), arguments, arch)
