"""The kernel that makes the work items of a layout of data, in their order.

The result equals that of `device_schedule`, which uses PyTorch, item by item. No CTA waits for
another: each computes the sums over all lines itself, which is faster than a wait.
"""

import operator

import cutlass
from cutlass import Float32, Int32, Int64, cute
from sparse_flash.kernels.schedule import EVEN

THREADS = 1024
WARPS = THREADS // 32
MAX_CTAS = 132  # CTAs take several chunks of rows each beyond that
_LAST = 2**31 - 1
_FLOAT_SUMS, _INT_SUMS = 3, 3  # results of one reduction


@cute.jit
def bits_of(number):
    """The bits of a Float32 as an Int32: in the order of the numbers, where none is negative."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number]
    )


class WorkItems:
    """The kernel for all layouts. A warp writes the items of a row.

    The rank of an item is the number of items that come before it (sorting by counting). Heads
    are computed in groups, of which the last are joined as in head_groups.py. So only the rows of
    its own group need to be compared, unless some are so long that they come before all.

    begins, tiles, partials: First tile, tiles, and partial tiles of each line, int32 (lines,).
    work, combine: As of a `Schedule`.
    counts: int32 (2,). Items and split rows.
    kv_lens: int32 (batch,), which all become `kv_len`.

    Then kv_len, and the numbers of `sizes` and `costs`:

    sizes: batch, heads, batch entries and heads with lines of their own, lines of each, groups of
        heads, index of the tile that stands for none, number of CTAs of the attention kernel, rows
        of the last round, fewest tiles of a part, and the first group that others may join.
    costs: Fields of the `CostModel`: item, extra cost of a partial tile, largest_share, split,
        combine, long_item.
    """

    @cute.jit
    def __call__(
        self,
        begins: cute.Tensor,
        tiles: cute.Tensor,
        partials: cute.Tensor,
        work: cute.Tensor,
        combine: cute.Tensor,
        counts: cute.Tensor,
        kv_lens: cute.Tensor,
        kv_len: Int32,
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
        joinable: Int32,
        item: Float32,
        partial_tile: Float32,
        largest_share: Float32,
        split: Float32,
        combine_cost: Float32,
        long_item: Float32,
        stream,
    ):
        """Launch on the stream."""
        sizes = (batch, heads, own_batch, own_heads, rows, groups, no_tile, ctas, rest, fewest)
        sizes = (*sizes, joinable)
        costs = (item, partial_tile, largest_share, split, combine_cost, long_item)
        chunks = cute.ceil_div(batch * heads * rows, WARPS)
        lists, results = (begins, tiles, partials), (work, combine, counts)
        self.kernel(lists, results, sizes, costs, kv_lens, kv_len).launch(
            grid=(cutlass.min(chunks, MAX_CTAS), 1, 1), block=(THREADS, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(self, lists, results, sizes, costs, kv_lens, kv_len):
        """Some chunks of as many rows as there are warps."""
        thread, cta = cute.arch.thread_idx()[0], cute.arch.block_idx()[0]
        smem = cutlass.utils.SmemAllocator()
        layout = cute.make_layout((_FLOAT_SUMS, WARPS), stride=(WARPS, 1))
        s_floats = smem.allocate_tensor(Float32, layout, 16)
        layout = cute.make_layout((_INT_SUMS, WARPS), stride=(WARPS, 1))
        s_ints = smem.allocate_tensor(Int32, layout, 16)
        s_keys = smem.allocate_tensor(Int64, cute.make_layout(THREADS), 16)
        s_parts = smem.allocate_tensor(Int32, cute.make_layout(THREADS), 16)
        s_fronts = smem.allocate_tensor(Int32, cute.make_layout(WARPS), 16)
        inverses = (1 / sizes[4].to(Float32), 1 / (sizes[0] * sizes[1]).to(Float32))
        sizes = (*sizes, *inverses)
        total = sizes[0] * sizes[1] * sizes[4]
        work_sum, dearest, last, items, splits = self.totals(
            lists, sizes, costs, (thread, total), (s_floats, s_ints)
        )
        share = work_sum / sizes[7].to(Float32)
        limit, long = self.limit(share, costs), costs[5] * (work_sum / items.to(Float32))
        common = cutlass.min(cutlass.min(dearest, limit), long)
        joined = sizes[5].to(Float32) * (1 - common / share)  # the group that the last ones join
        shares = (share, limit, long, last, cutlass.max(joined.to(Int32), sizes[10]))
        if cta == 0 and thread == 0:
            results[2][0], results[2][1] = items, splits
        if cta == 0:
            for i in cutlass.range(thread, cute.size(kv_lens, mode=[0]), THREADS, unroll=1):
                kv_lens[i] = kv_len
        simple = Int32(0) if (sizes[5] > 1 and dearest > long) or splits > 0 else Int32(1)
        memory = (s_ints, s_keys, s_parts, s_fronts)
        for chunk in cutlass.range(
            cta, cute.ceil_div(total, WARPS), cute.arch.grid_dim()[0], unroll=1
        ):
            self.chunk(chunk * WARPS, lists, results, sizes, costs, shares, simple, memory)

    @cute.jit
    def chunk(self, first, lists, results, sizes, costs, shares, simple, memory):
        """The items of the rows from `first` on, one row for each warp."""
        _, s_keys, s_parts, _ = memory
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        total = sizes[0] * sizes[1] * sizes[4]
        row = first + warp
        mine = self.row(lists, sizes, costs, shares, cutlass.min(row, total - 1))
        key, parts, front = mine[0], mine[1], mine[2]
        end = cutlass.min(first + WARPS, total)
        low = self.first_row(cutlass.min(self.group(first, sizes), shares[4]), sizes)
        above = self.group(end - 1, sizes) + 1
        high = self.first_row(above, sizes) if above <= shares[4] else total
        before, of_front, splits, in_splits = low, Int32(0), Int32(0), Int32(0)
        if simple == 0:
            before, of_front, splits, in_splits = self.before(
                lists, sizes, costs, shares, (first, low, high), (row, key, front), memory
            )
            earlier = Int32(1) if lane < warp and first + lane < total else Int32(0)
            cute.arch.sync_threads()
            if lane == 0:
                s_parts[warp] = parts
            cute.arch.sync_threads()
            other = s_parts[lane] * earlier
            some = Int32(1) if other > 1 else Int32(0)
            splits += cute.arch.warp_reduction(some, operator.add)
            in_splits += cute.arch.warp_reduction(other * some, operator.add)
        rank = Int32(0)
        thread = cute.arch.thread_idx()[0]
        for i in cutlass.range(cute.ceil_div(high - low, THREADS), unroll=1):
            start = low + i * THREADS
            other, number = Int64(_LAST << 32), Int32(0)
            if start + thread < high:
                found = self.row(lists, sizes, costs, shares, start + thread)
                other, number = found[0], found[1]
            cute.arch.sync_threads()
            s_keys[thread], s_parts[thread] = other, number
            cute.arch.sync_threads()
            count = cute.ceil_div(cutlass.min(high - start, THREADS), 32)
            for j in cutlass.range(count, unroll=4):
                rank += self.parts_before(j * 32 + lane, start, (row, key), s_keys, s_parts)
        cute.arch.sync_threads()
        rank = before + cute.arch.warp_reduction(rank, operator.add)
        rank = of_front if front > 0 else rank
        if row < total:
            self.emit(row, mine, (rank, splits, in_splits), lists, results, sizes)

    @cute.jit
    def parts_before(self, index, start, mine, s_keys, s_parts):
        """The parts of row `start + index`, if they come before those of my row; else 0."""
        bound = mine[1] + (Int64(1) if start + index < mine[0] else Int64(0))
        return s_parts[index] if s_keys[index] < bound else Int32(0)

    @cute.jit
    def totals(self, lists, sizes, costs, extents, memory):
        """Of all rows: sum and largest of the costs, parts of the last rows, items, split rows.

        Each line stands for the same number of rows.
        """
        (thread, total), (s_floats, s_ints) = extents, memory
        _, tiles, partials = lists
        lines = cute.size(tiles, mode=[0])
        repeats = total // lines
        work_sum, dearest, few = Float32(0.0), Float32(0.0), Float32.inf
        for line in cutlass.range(thread, lines, THREADS, unroll=4):
            count = tiles[line]
            cost = self.cost(count, partials[line], costs)
            work_sum += cost
            dearest, few = cutlass.max(dearest, cost), cutlass.min(few, count.to(Float32))
        work_sum, dearest, few = self.reduce((work_sum, dearest, few), s_floats)
        mean = work_sum / lines.to(Float32)
        work_sum, few = work_sum * repeats.to(Float32), few.to(Int32)
        limit = self.limit(work_sum / sizes[7].to(Float32), costs)
        items, splits = Int32(0), Int32(0)
        for line in cutlass.range(thread, lines, THREADS, unroll=4):
            count = tiles[line]
            parts = self.parts(count, self.cost(count, partials[line], costs), limit, sizes)
            items += parts
            splits += Int32(1) if parts > 1 else Int32(0)
        items, splits, _ = self.add((items, splits, Int32(0)), s_ints)
        items, splits, last = items * repeats, splits * repeats, Int32(1)
        if sizes[8] > 0 and splits == 0 and dearest <= EVEN * mean:
            last = self.last_parts(few, mean, sizes, costs)
            if last > 1:
                items += sizes[8] * (last - 1)
                splits = sizes[8]
        return work_sum, dearest, last, items, splits

    @cute.jit
    def before(self, lists, sizes, costs, shares, extents, mine, memory):
        """Numbers of items and parts before a chunk, whose groups have the rows low..high - 1.

        mine: The row of this warp, its key, and whether it comes before all groups.

        Returns:
            Number of items before these groups, of items before the warp's row if that comes before
            all groups, of split rows before `first`, and of their parts.
        """
        s_ints, s_keys, s_parts, s_fronts = memory
        (first, low, high), (row, key, front) = extents, mine
        thread, lane = cute.arch.thread_idx()[0], cute.arch.lane_idx()
        items, splits, in_splits, of_front = Int32(0), Int32(0), Int32(0), Int32(0)
        total = sizes[0] * sizes[1] * sizes[4]
        several, _, _ = self.add((front, Int32(0), Int32(0)), s_ints)
        for i in cutlass.range(cute.ceil_div(total, THREADS), unroll=1):
            other = i * THREADS + thread
            found = self.row(lists, sizes, costs, shares, cutlass.min(other, total - 1))
            parts, in_front = found[1], Int32(0)
            if other < total:
                in_front = found[2]
                if other < low or (other >= high and in_front > 0):
                    items += parts
                if other < first and parts > 1:
                    splits += Int32(1)
                    in_splits += parts
            if several > 0:
                cute.arch.sync_threads()
                s_keys[thread] = found[0] if in_front > 0 else Int64(_LAST << 32)
                s_parts[thread] = parts
                some = cute.arch.vote_ballot_sync(in_front > 0)
                if lane == 0:
                    s_fronts[thread // 32] = some
                cute.arch.sync_threads()
                warps = cute.arch.vote_ballot_sync(s_fronts[lane] != 0)
                if front > 0:
                    for j in cutlass.range(WARPS, unroll=1):
                        if (warps >> j) & 1 != 0:
                            of_front += self.parts_before(
                                j * 32 + lane, i * THREADS, (row, key), s_keys, s_parts
                            )
        of_front = cute.arch.warp_reduction(of_front, operator.add)
        items, splits, in_splits = self.add((items, splits, in_splits), s_ints)
        return items, of_front, splits, in_splits

    @cute.jit
    def row(self, lists, sizes, costs, shares, row):
        """Key, number of parts, whether it comes before all groups, line, and tiles of a row.

        Items are in the order of (key, row); the parts of a row take as long as each other, but
        for a tile.
        """
        _, tiles, partials = lists
        share, limit, long, last, joined = shares
        pairs, lines = sizes[0] * sizes[1], cute.size(tiles, mode=[0])
        total, line, group = pairs * sizes[4], row, Int32(0)
        if lines != total or sizes[5] > 1:
            pair = self.divide(row, sizes[4], sizes[11])
            group = pair
            if sizes[5] != pairs:
                group = self.divide(pair * sizes[5], pairs, sizes[12])
            group = cutlass.min(group, joined)
            if lines != total:
                line = row - pair * sizes[4]
                if lines != sizes[4]:
                    head, batch = pair % sizes[1], pair // sizes[1]
                    pattern = batch * sizes[2] // sizes[0] * sizes[3] + head * sizes[3] // sizes[1]
                    line += pattern * sizes[4]
        count = tiles[line]
        cost = self.cost(count, partials[line], costs)
        parts = self.parts(count, cost, limit, sizes)
        if row >= total - sizes[8]:
            parts = cutlass.max(parts, last)
        if parts > 1:
            cost = cost / parts.to(Float32)
        front = Int32(0)
        if sizes[5] > 1 and cost > long:
            later = share * (sizes[5] - group).to(Float32) / sizes[5].to(Float32)
            front = Int32(1) if cost > later else Int32(0)
        order = Int32(0) if front > 0 else group + 1
        key = (order.to(Int64) << 32) | (_LAST - bits_of(cost)).to(Int64)
        return key, parts, front, line, count

    @cute.jit
    def divide(self, number, by, inverse):
        """The quotient number // by, without the steps that signs and large quotients take.

        Both are positive, or number is 0; the quotient is below 2^20. inverse: 1 / by.
        """
        found = (number.to(Float32) * inverse).to(Int32)
        rest = number - found * by
        found -= Int32(1) if rest < 0 else Int32(0)
        return found + (Int32(1) if rest >= by else Int32(0))

    @cute.jit
    def group(self, row, sizes):
        """The group of heads of a row, before the last ones are joined."""
        return row // sizes[4] * sizes[5] // (sizes[0] * sizes[1])

    @cute.jit
    def first_row(self, group, sizes):
        """The first row of a group of heads."""
        return cute.ceil_div(group * (sizes[0] * sizes[1]), sizes[5]) * sizes[4]

    @cute.jit
    def cost(self, count, partial, costs):
        """The cost of a line, as `CostModel.rows`."""
        whole = cutlass.max(count, 1).to(Float32) + costs[0]
        return whole + costs[1] * partial.to(Float32)

    @cute.jit
    def limit(self, share, costs):
        """The largest cost of an item."""
        return cutlass.max(share * costs[2], Float32(1e-6))

    @cute.jit
    def parts(self, count, cost, limit, sizes):
        """As `CostModel.parts`."""
        whole = Int32(1)
        if cost > limit:
            wanted = cutlass.min(cost / limit, Float32(1 << 20))
            whole = wanted.to(Int32)
            whole += Int32(1) if whole.to(Float32) < wanted else Int32(0)
            whole = cutlass.max(cutlass.min(whole, count // sizes[9]), 1)
        return whole

    @cute.jit
    def last_parts(self, fewest, mean, sizes, costs):
        """As `CostModel.last_parts`."""
        best, least = Int32(1), mean
        for rounds in cutlass.range_constexpr(1, 3):
            number = cutlass.min(rounds * sizes[7] // sizes[8], fewest // 2)
            if number > 1:
                time = (mean - costs[0]) / number.to(Float32) + costs[0] + costs[3]
                time = rounds * time + costs[4]
                if time < least:
                    best, least = number, time
        return best

    @cute.jit
    def reduce(self, values, s_floats):
        """Sum, largest and least of three Float32 of all threads, to all threads.

        In a fixed order.
        """
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()  # `warp_idx` is a shuffle
        operations = (operator.add, cutlass.max, cutlass.min)
        cute.arch.sync_threads()  # earlier values have been read
        for n in cutlass.range_constexpr(_FLOAT_SUMS):
            value = cute.arch.warp_reduction(values[n], operations[n])
            if lane == 0:
                s_floats[n, warp] = value
        cute.arch.sync_threads()
        return tuple(
            cute.arch.warp_reduction(s_floats[n, lane], operations[n]) for n in range(_FLOAT_SUMS)
        )

    @cute.jit
    def add(self, values, s_ints):
        """Sums of Int32 over all threads, to all threads."""
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        cute.arch.sync_threads()  # earlier values have been read
        for n in cutlass.range_constexpr(_INT_SUMS):
            value = cute.arch.warp_reduction(values[n], operator.add)
            if lane == 0:
                s_ints[n, warp] = value
        cute.arch.sync_threads()
        sums = (s_ints[n, lane] for n in range(_INT_SUMS))
        return tuple(cute.arch.warp_reduction(value, operator.add) for value in sums)

    @cute.jit
    def emit(self, row, mine, ranks, lists, results, sizes):
        """The items of a row, four at a time, and its record where it is split."""
        _, parts, _, line, count = mine
        rank, split, first_part = ranks
        work, combine, _ = results
        lane = cute.arch.lane_idx()
        field, pair = lane & 7, row // sizes[4]
        head = pair % sizes[1] if field == 1 else pair // sizes[1]
        name = row - pair * sizes[4] if field == 0 else head
        begin = lists[0][line]
        for i in cutlass.range(cute.ceil_div(parts, 4), unroll=1):
            nth = i * 4 + (lane >> 3)
            lower, upper = Int32(0), count
            if parts > 1:
                lower, upper = count * nth // parts, count * (nth + 1) // parts
            first = begin + lower if upper > lower else sizes[6]
            part = first_part + nth if parts > 1 else Int32(-1)
            value = self.choose(field, name, first, upper - lower, part)
            if nth < parts and rank + nth < cute.size(work, mode=[0]):
                work[rank + nth, field] = value
        if parts > 1 and lane < 8 and split < cute.size(combine, mode=[0]):
            combine[split, field] = self.choose(field, name, first_part, parts, Int32(0))

    @cute.jit
    def choose(self, field, name, first, count, part):
        """The value of a field of a record whose first three fields are `name`."""
        value = name if field < 3 else first
        value = count if field == 4 else value
        value = part if field == 5 else value
        return Int32(0) if field > 5 else value


def compile_work_items(arch: str):
    """Compile for an architecture, as "sm_90a", whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    def ints(*shape):
        order = tuple(reversed(range(len(shape))))
        return cute.runtime.make_fake_compact_tensor(Int32, shape, stride_order=order)

    size = cute.sym_int
    lines = size()
    arguments = (
        *(ints(lines) for _ in range(3)),
        *(ints(size(), 8), ints(size(), 8), ints(2), ints(size())),
        *(Int32(1) for _ in range(12)),
        *(Float32(1.0) for _ in range(6)),
    )
    return compile_kernel(WorkItems(), arguments, arch)
