"""The kernel that makes the work items of a layout of data: one CTA for all lines.

What it computes is what `device_schedule` computes with PyTorch, item by item.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute

THREADS = 1024
WARPS = THREADS // 32
MOST_SORTED = 1 << 14  # items that the kernel sorts itself
MOST_GROUPS = 1 << 10  # of heads that a key distinguishes
_ITEM_BITS, _LAST = 20, 2**31 - 1  # of a key: group, cost from the largest down, item
_SCANNED = 3  # numbers whose sums over the rows before are needed


@cute.jit
def bits_of(number):
    """The bits of a Float32 as an Int32: in the order of the numbers, where none is negative."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number]
    )


class WorkItems:
    """The kernel for all layouts.

    tiles, partials: Tiles and partial tiles of each line, int32 (lines,).
    begins, own_begins: Their sums over the lines before, int32 (lines,).
    work, combine: As of a `Schedule`.
    draft: Shaped as work: the items in another order. Without `sort` work is not written.
    keys: int64 (items,), by which the draft is to be sorted.
    counts: int32 (4,). Items, split rows, tiles, and partial tiles.

    Then the numbers of `sizes` and `costs`:

    sizes: batch, heads, batch entries and heads with lines of their own, lines of each, groups of
        heads, index of the tile that stands for none, number of CTAs, rows of the last round,
        fewest tiles of a part, and the number of items to sort as a power of two, or 0.
    costs: Those of the `CostModel`: item, what a partial tile adds, largest_share, part, combine,
        long_item.
    """

    @cute.jit
    def __call__(
        self,
        tiles: cute.Tensor,
        partials: cute.Tensor,
        begins: cute.Tensor,
        own_begins: cute.Tensor,
        draft: cute.Tensor,
        work: cute.Tensor,
        keys: cute.Tensor,
        combine: cute.Tensor,
        counts: cute.Tensor,
        batch: Int32,
        heads: Int32,
        own_batch: Int32,
        own_heads: Int32,
        rows: Int32,
        groups: Int32,
        no_tile: Int32,
        ctas: Int32,
        rest: Int32,
        fewest: Int32,
        log_items: Int32,
        item: Float32,
        partial_tile: Float32,
        largest_share: Float32,
        part: Float32,
        combine_cost: Float32,
        long_item: Float32,
        stream,
    ):
        """Launch on the stream."""
        sizes = (batch, heads, own_batch, own_heads, rows, groups, no_tile, ctas, rest, fewest)
        sizes = (*sizes, log_items)
        costs = (item, partial_tile, largest_share, part, combine_cost, long_item)
        lists = (tiles, partials, begins, own_begins)
        self.kernel(lists, (draft, work, keys, combine, counts), sizes, costs).launch(
            grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, lists, results, sizes, costs):
        """All rows, THREADS at a time."""
        draft, work, keys, combine, counts = results
        thread = cute.arch.thread_idx()[0]
        smem = cutlass.utils.SmemAllocator()
        s_floats = smem.allocate_tensor(Float32, cute.make_layout(WARPS), 16)
        layout = cute.make_layout((2, _SCANNED, WARPS), stride=(_SCANNED * WARPS, WARPS, 1))
        s_sums = smem.allocate_tensor(Int32, layout, 16)
        s_keys = smem.allocate_tensor(Int64, cute.make_layout(MOST_SORTED), 16)
        self.sum_lines(lists, counts, s_sums, thread)
        total = sizes[0] * sizes[1] * sizes[4]
        chunks = cute.ceil_div(total, THREADS)
        work_sum, dearest, cheapest, fewest = self.statistics(
            lists, sizes, costs, thread, total, chunks, s_floats
        )
        share = work_sum / sizes[7].to(Float32)
        limit = cutlass.max(share * costs[2], Float32(1e-6))
        most, items = Int32(1), Int32(0)
        for i in cutlass.range(chunks, unroll=1):
            row = i * THREADS + thread
            if row < total:
                _, count, cost = self.row(lists, sizes, costs, row)
                parts = self.parts(count, cost, limit, sizes)
                most = cutlass.max(most, parts)
                items += parts
        most = self.reduce(most.to(Float32), s_floats, cutlass.max).to(Int32)
        items = self.reduce(items.to(Float32), s_floats, lambda a, b: a + b).to(Int32)
        last = Int32(1)
        if sizes[8] > 0 and most == 1 and dearest <= 1.02 * cheapest:
            last = self.last_parts(fewest, dearest, sizes, costs)
        items += sizes[8] * (last - 1)
        shares = (share, limit, work_sum / items.to(Float32))
        carry = (Int32(0), Int32(0), Int32(0))
        for i in cutlass.range(chunks, unroll=1):
            row = i * THREADS + thread
            begin, count, cost, parts = Int32(0), Int32(0), Float32(0.0), Int32(0)
            if row < total:
                begin, count, cost = self.row(lists, sizes, costs, row)
                parts = self.parts(count, cost, limit, sizes)
                if row >= total - sizes[8]:
                    parts = cutlass.max(parts, last)
            split = Int32(1) if parts > 1 else Int32(0)
            before, carry = self.scan((parts, split, parts * split), carry, s_sums, i % 2)
            if row < total:
                named = (row, begin, count, cost, parts)
                self.emit(named, before, shares, draft, keys, combine, sizes, costs)
        rest = cute.size(keys, mode=[0]) - items
        for i in cutlass.range(thread, rest, THREADS, unroll=1):
            keys[items + i] = Int64(1 << 62)
        if thread == 0:
            counts[0], counts[1] = items, carry[1]
        if sizes[10] > 0:
            cute.arch.sync_threads()
            self.sort(keys, s_keys, sizes[10], thread)
            for i in cutlass.range(thread, items, THREADS, unroll=1):
                item = (s_keys[i] & Int64((1 << _ITEM_BITS) - 1)).to(Int32)
                for n in cutlass.range_constexpr(8):
                    work[i, n] = draft[item, n]

    @cute.jit
    def sum_lines(self, lists, counts, s_sums, thread):
        """First tiles, and first partial tiles, of all lines."""
        tiles, partials, begins, own_begins = lists
        lines = cute.size(tiles, mode=[0])
        carry = (Int32(0), Int32(0), Int32(0))
        for i in cutlass.range(cute.ceil_div(lines, THREADS), unroll=1):
            line = i * THREADS + thread
            mine, cut = Int32(0), Int32(0)
            if line < lines:
                mine, cut = tiles[line], partials[line]
            before, carry = self.scan((mine, cut, Int32(0)), carry, s_sums, i % 2)
            if line < lines:
                begins[line], own_begins[line] = before[0], before[1]
        if thread == 0:
            counts[2], counts[3] = carry[0], carry[1]
        cute.arch.sync_threads()

    @cute.jit
    def sort(self, keys, s_keys, log_items, thread):
        """Sort the keys into shared memory, in ascending order (bitonic: Batcher, 1968)."""
        size = Int32(1) << log_items
        for i in cutlass.range(thread, size, THREADS, unroll=1):
            s_keys[i] = keys[i] if i < cute.size(keys, mode=[0]) else Int64(1 << 62)
        for k in cutlass.range(log_items, unroll=1):
            for j in cutlass.range(k + 1, unroll=1):
                cute.arch.sync_threads()
                distance = Int32(1) << (k - j)
                for i in cutlass.range(thread, size // 2, THREADS, unroll=4):
                    low = i & (distance - 1)
                    first = 2 * (i - low) + low
                    a, b = s_keys[first], s_keys[first + distance]
                    ascending = (first >> (k + 1)) & 1
                    if (a > b and ascending == 0) or (a < b and ascending == 1):
                        s_keys[first], s_keys[first + distance] = b, a
        cute.arch.sync_threads()

    @cute.jit
    def row(self, lists, sizes, costs, row):
        """First tile, number of tiles, and cost of a row."""
        tiles, partials, begins, _ = lists
        pair = row // sizes[4]
        head, batch = pair % sizes[1], pair // sizes[1]
        pattern = batch * sizes[2] // sizes[0] * sizes[3] + head * sizes[3] // sizes[1]
        line = pattern * sizes[4] + row % sizes[4]
        count = tiles[line]
        cost = cutlass.max(count, 1).to(Float32) + costs[0]
        return begins[line], count, cost + costs[1] * partials[line].to(Float32)

    @cute.jit
    def parts(self, count, cost, limit, sizes):
        """As `CostModel.parts`."""
        wanted = cutlass.min(cost / limit, Float32(1 << 20))
        whole = wanted.to(Int32)
        whole += Int32(1) if whole.to(Float32) < wanted else Int32(0)
        return cutlass.max(cutlass.min(whole, count // sizes[9]), 1)

    @cute.jit
    def last_parts(self, fewest, dearest, sizes, costs):
        """As `CostModel.last_parts`."""
        best, least = Int32(1), dearest
        for rounds in cutlass.range_constexpr(1, 3):
            number = cutlass.min(rounds * sizes[7] // sizes[8], fewest // 2)
            if number > 1:
                time = (dearest - costs[0]) / number.to(Float32) + costs[0] + costs[3]
                time = rounds * time + costs[4]
                if time < least:
                    best, least = number, time
        return best

    @cute.jit
    def statistics(self, lists, sizes, costs, thread, total, chunks, s_floats):
        """Of all rows the sum, the largest and the least cost, and the fewest tiles."""
        work_sum, dearest = Float32(0.0), Float32(0.0)
        cheapest, fewest = Float32.inf, Float32.inf
        for i in cutlass.range(chunks, unroll=1):
            row = i * THREADS + thread
            if row < total:
                _, count, cost = self.row(lists, sizes, costs, row)
                work_sum += cost
                dearest, cheapest = cutlass.max(dearest, cost), cutlass.min(cheapest, cost)
                fewest = cutlass.min(fewest, count.to(Float32))
        work_sum = self.reduce(work_sum, s_floats, lambda a, b: a + b)
        dearest = self.reduce(dearest, s_floats, cutlass.max)
        cheapest = self.reduce(cheapest, s_floats, cutlass.min)
        return work_sum, dearest, cheapest, self.reduce(fewest, s_floats, cutlass.min).to(Int32)

    @cute.jit
    def reduce(self, value, s_floats, operation: cutlass.Constexpr):
        """One number of all threads, to all threads, in a fixed order."""
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        for i in cutlass.range_constexpr(5):
            value = operation(value, cute.arch.shuffle_sync_bfly(value, offset=1 << i))
        cute.arch.sync_threads()  # what was there has been read
        if lane == 0:
            s_floats[warp] = value
        cute.arch.sync_threads()
        value = s_floats[lane]
        for i in cutlass.range_constexpr(5):
            value = operation(value, cute.arch.shuffle_sync_bfly(value, offset=1 << i))
        return value

    @cute.jit
    def scan(self, mine, carry, s_sums, buffer):
        """Sums of numbers over all threads and chunks before, and with all of this chunk's."""
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        values = [mine[0], mine[1], mine[2]]
        for n in cutlass.range_constexpr(_SCANNED):
            values[n] = self.scan_warp(values[n], lane)
            if lane == 31:
                s_sums[buffer, n, warp] = values[n]
        cute.arch.sync_threads()
        before, after = [], []
        for n in cutlass.range_constexpr(_SCANNED):
            sums = self.scan_warp(s_sums[buffer, n, lane], lane)
            others = cute.arch.shuffle_sync(sums, cutlass.max(warp - 1, 0))
            others = others if warp > 0 else Int32(0)
            before.append(carry[n] + others + values[n] - mine[n])
            after.append(carry[n] + cute.arch.shuffle_sync(sums, 31))
        return tuple(before), tuple(after)

    @cute.jit
    def scan_warp(self, value, lane):
        """The sum over the lanes up to this one."""
        for i in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_up(value, offset=1 << i)
            value += other if lane >= 1 << i else Int32(0)
        return value

    @cute.jit
    def emit(self, named, before, shares, draft, keys, combine, sizes, costs):
        """The items of a row, and its record where it is split."""
        row, begin, count, cost, parts = named
        pair = row // sizes[4]
        names = (row % sizes[4], pair % sizes[1], pair // sizes[1])
        group = pair * sizes[5] // (sizes[0] * sizes[1])
        later = shares[0] * (sizes[5] - group).to(Float32) / sizes[5].to(Float32)
        for nth in cutlass.range(parts, unroll=1):
            item = before[0] + nth
            lower, upper = count * nth // parts, count * (nth + 1) // parts
            tiles = upper - lower
            first = begin + lower if tiles > 0 else sizes[6]
            part = before[2] + nth if parts > 1 else Int32(-1)
            mine = cost * cutlass.max(tiles, 1).to(Float32)
            mine = mine / cutlass.max(count, 1).to(Float32)
            front = sizes[5] > 1 and mine > later and mine > costs[5] * shares[2]
            if item < cute.size(draft, mode=[0]):
                fields = (*names, first, tiles, part, Int32(0), Int32(0))
                for i in cutlass.range_constexpr(8):
                    draft[item, i] = fields[i]
                place = (Int32(0) if front else group + 1).to(Int64)
                by_cost = (_LAST - bits_of(mine)).to(Int64)
                keys[item] = (place << (31 + _ITEM_BITS)) | (by_cost << _ITEM_BITS) | item.to(Int64)
        if parts > 1 and before[1] < cute.size(combine, mode=[0]):
            fields = (*names, before[2], parts, Int32(0), Int32(0), Int32(0))
            for i in cutlass.range_constexpr(8):
                combine[before[1], i] = fields[i]


def compile_work_items(arch: str):
    """Compile for an architecture, as "sm_90a", whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    def ints(*shape, dtype=Int32):
        order = tuple(reversed(range(len(shape))))
        return cute.runtime.make_fake_compact_tensor(dtype, shape, stride_order=order)

    size = cute.sym_int
    items, lines = size(), size()
    arguments = (
        *(ints(lines) for _ in range(4)),
        *(ints(items, 8), ints(size(), 8), ints(items, dtype=Int64)),
        *(ints(size(), 8), ints(4)),
        *(Int32(1) for _ in range(11)),
        *(Float32(1.0) for _ in range(6)),
    )
    return compile_kernel(WorkItems(), arguments, arch)
