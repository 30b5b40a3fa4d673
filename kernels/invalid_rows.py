"""The kernel that writes NaN for block rows of a layout of data that are not as asked for."""

import cutlass
from cutlass import Float32, Int32, cute

THREADS = 128


@cute.jit
def _nan(dtype: cutlass.Constexpr):
    number = cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[Int32(0x7FC00000)]
    )
    return number.to(dtype)


class InvalidRows:
    """A CTA for each 32 block rows of batch entries and heads, which all its warps look at.

    It ends at once where all is well.

    errors: Why the row is not as asked for, or 0, uint8 (patterns x rows,).
    of_queries: Results (b, s, h, d), of which the rows of the block get NaN.
    lse: Forward, float32 (b, h, s), likewise; backward the next two in its place:
    of_keys: Results (b, s_kv, h_kv, d), of which the whole key head gets NaN: nothing tells which
        keys the row should have seen.
    own_batch, own_heads: Batch entries and heads with patterns of their own.
    block: Queries of a block row.
    """

    def __init__(self, dtype: type[cutlass.Numeric], backward: bool) -> None:
        self.dtype, self.backward = dtype, backward

    @cute.jit
    def __call__(
        self,
        errors: cute.Tensor,
        of_queries: cute.Tensor,
        first: cute.Tensor,
        second: cute.Tensor,
        own_batch: Int32,
        own_heads: Int32,
        block: Int32,
        stream,
    ):
        """Launch on the stream; first and second: results by key, or lse twice."""
        others = (first, second)
        rows = cute.ceil_div(cute.size(of_queries, mode=[1]), block)
        total = rows * cute.size(of_queries, mode=[2]) * cute.size(of_queries, mode=[0])
        self.kernel(errors, of_queries, others, own_batch, own_heads, block, rows, total).launch(
            grid=(cute.ceil_div(total, 32), 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        errors: cute.Tensor,
        of_queries: cute.Tensor,
        others,
        own_batch: Int32,
        own_heads: Int32,
        block: Int32,
        rows: Int32,
        total: Int32,
    ):
        """32 block rows."""
        first, lane = cute.arch.block_idx()[0] * 32, cute.arch.lane_idx()
        own, wrong, filled = (own_batch, own_heads), Int32(0), Int32(-1)
        if first + lane < total:
            at, _, _, _ = self.place(of_queries, first + lane, rows, own)
            wrong = errors[at].to(Int32)
        bad = cute.arch.vote_ballot_sync(wrong != 0)
        for n in cutlass.range(32, unroll=1):
            if (bad >> n) & 1 != 0:
                _, batch, head, row = self.place(of_queries, first + n, rows, own)
                filled = self.mark(of_queries, others, (batch, head), row * block, block, filled)

    @cute.jit
    def place(self, of_queries, index, rows, own):
        """Index of a block row's errors, its batch entry, its head, and its row."""
        batches, heads = cute.size(of_queries, mode=[0]), cute.size(of_queries, mode=[2])
        row, pair = index % rows, index // rows
        head, batch = pair % heads, pair // heads
        pattern = batch * own[0] // batches * own[1] + head * own[1] // heads
        return pattern * rows + row, batch, head, row

    @cute.jit
    def mark(self, of_queries, others, pair, first, block, filled):
        """Write NaN for a block row. filled: The last key head that got NaN; returns the next."""
        thread, (batch, head) = cute.arch.thread_idx()[0], pair
        end = cutlass.min(first + block, cute.size(of_queries, mode=[1]))
        self.fill(of_queries, batch, head, first, end, thread)
        if cutlass.const_expr(self.backward):
            kv_heads = cute.size(others[0], mode=[2])
            kv_head = head // (cute.size(of_queries, mode=[2]) // kv_heads)
            if batch * kv_heads + kv_head != filled:  # once for the rows of a head
                for n in cutlass.range_constexpr(2):
                    keys = cute.size(others[n], mode=[1])
                    self.fill(others[n], batch, kv_head, Int32(0), keys, thread)
            filled = batch * kv_heads + kv_head
        else:
            for i in cutlass.range(first + thread, end, THREADS, unroll=1):
                others[0][batch, head, i] = _nan(Float32)
        return filled

    @cute.jit
    def fill(self, tensor, batch, head, first, end, thread):
        """Tokens `first` to `end - 1` of a head."""
        width = cute.size(tensor, mode=[3])
        for i in cutlass.range(thread, (end - first) * width, THREADS, unroll=1):
            tensor[batch, first + i // width, head, i % width] = _nan(self.dtype)


def compile_invalid_rows(dtype: str, backward: bool, arch: str):
    """Compile for "bfloat16" or "float16", whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    element = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[dtype]
    b, h, h_kv, s, s_kv, d, n = (cute.sym_int() for _ in range(7))

    def compact(kind, *shape):
        order = tuple(reversed(range(len(shape))))
        return cute.runtime.make_fake_compact_tensor(kind, shape, stride_order=order)

    if backward:
        others = [compact(element, b, s_kv, h_kv, d) for _ in range(2)]
    else:
        others = [compact(Float32, b, h, s) for _ in range(2)]
    arguments = (compact(cutlass.Uint8, n), compact(element, b, s, h, d), *others)
    kernel = InvalidRows(element, backward)
    return compile_kernel(kernel, (*arguments, *(Int32(1) for _ in range(3))), arch)
