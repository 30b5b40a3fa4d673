"""Sums of dQ become dQ: by two warps beside those that compute, and by all once these are done.

The sums of a head are float32 and as large as all of its other tensors together. Right after its
last item they are still in the L2 cache, and the tensor cores need not wait for this; a pass over
all sums at the end finds most of them in memory.
"""

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.backward_producer import FREE, acquire, sum_address
from sparse_flash.kernels.elementwise import exponent_in
from sparse_flash.kernels.primitives import bits_of, from_bits

ROWS = 16  # of the accumulators: a slice of a chunk, a warp's; see BackwardConsumer.put_queries
SLICES = 2  # that a warp takes at a time
# Nanoseconds between two looks at whether a head is done, while others compute and when none do.
PATIENCE = 500, 50


class BackwardConverter:
    """One warp: groups of heads (those of the schedule) in their order, of each what nobody else
    has taken.

    `progress[0]` is how many items of attention of each group are done, `progress[1]` how many
    parts of its sums have been taken; after the last, the first group of which some are left. A
    warp that waits for a group has taken nothing of it: nobody waits for this warp.
    """

    def __init__(self, config, dq_sum, order, convert, heads, scale):
        self.config, self.dq_sum, self.scale = config, dq_sum, scale
        self.done, self.progress = order
        self.result, self.per_group, self.stats = convert
        self.group_size, _, self.kv_heads = heads
        self.groups = cute.size(self.progress, mode=[1]) - 1
        self.slices = 64 // ROWS // SLICES  # parts of a chunk of sums
        self.parts = self.group_size * cute.size(dq_sum, mode=[2]) * self.slices  # of a kv head

    @cute.jit
    def run(self, beside: cutlass.Constexpr):
        """Until there is nothing left.

        beside: Whether others compute meanwhile: then there are few registers, and time.
        """
        at_once = 1 if beside else self.config.dq_tile[1] // 16
        group = self.first_left()
        while group < self.groups:
            self.wait(group, beside)
            begin = self.begin(group)
            parts = (self.begin(group + 1) - begin) * self.parts
            part = self.take(group, parts)
            while part < parts:
                self.convert(begin + part // self.parts, part % self.parts, at_once)
                part = self.take(group, parts)
            group = cutlass.max(group + 1, self.first_left())

    @cute.jit
    def first_left(self):
        """The first group of which something may be left."""
        return cute.arch.shuffle_sync(relaxed(self.progress, (1, self.groups)), 0)

    @cute.jit
    def begin(self, group):
        """The first (batch, kv head) of a group; see `Schedule`."""
        pairs = cute.size(self.dq_sum, mode=[0]) * self.kv_heads
        return (group * pairs + self.groups - 1) // self.groups

    @cute.jit
    def wait(self, group, beside: cutlass.Constexpr):
        """Until all items of attention of a group are done."""
        goal = self.per_group[group]
        if cute.arch.lane_idx() == 0:
            place = self.progress.iterator + cute.crd2idx((0, group), self.progress.layout)
            count = acquire(place.toint())
            while count != goal:
                cute.arch.inline_ptx(f"nanosleep.u32 {PATIENCE[0 if beside else 1]};")
                count = acquire(place.toint())
        cute.arch.sync_warp()

    @cute.jit
    def take(self, group, parts):
        """A part of a group that nobody has taken; who is the first to find none says so."""
        part = Int32(0)
        if cute.arch.lane_idx() == 0:
            taken = self.progress.iterator + cute.crd2idx((1, group), self.progress.layout)
            part = cute.arch.atomic_add(taken, Int32(1), sem="relaxed", scope="gpu")
            if part == parts:
                place = cute.crd2idx((1, self.groups), self.progress.layout)
                left = self.progress.iterator + place
                cute.arch.atomic_max(left, group + 1, sem="relaxed", scope="gpu")
        return cute.arch.shuffle_sync(part, 0)

    @cute.jit
    def convert(self, pair, part, at_once: cutlass.Constexpr):
        """SLICES slices of a chunk of a (batch, kv head)."""
        batch, kv_head = pair // self.kv_heads, pair % self.kv_heads
        chunks = cute.size(self.dq_sum, mode=[2])
        chunk, part = part // self.slices, part % self.slices
        head, chunk = kv_head * self.group_size + chunk // chunks, chunk % chunks
        # A tile that nobody came to is 0, whatever stands in its sums.
        there = Int32(0) if relaxed(self.done, (batch, head, chunk // 2)) == FREE else Int32(-1)
        for i in cutlass.range(SLICES, unroll=1):
            self.convert_slice((batch, head, chunk), part * SLICES + i, there, at_once)

    @cute.jit
    def convert_slice(self, place, nth, there, at_once: cutlass.Constexpr):
        """ROWS rows of a chunk, or of its transpose, `at_once` times 16 columns at a time.

        The sums lie as the threads of a warpgroup held them: four numbers of each thread, then the
        next four of each. The first four of lane t of the slice's warp are two neighbours in row
        t / 4, columns 2 (t % 4) and one on, and two in the row 8 below; the next four those 8
        columns on.
        """
        config, (batch, head, chunk) = self.config, place
        # Through PTX: else what follows from it stays in registers through items of attention.
        lane = cute.arch.inline_ptx(
            "and.b32 {$w0}, {$r0}, 31;",
            write_only_types=[Int32],
            read_only_args=[cute.arch.thread_idx()[0]],
        )
        row, column = chunk * 64, Int32(0)
        if const_expr(config.dq_by_columns):
            row, column = chunk // 2 * config.tile_m, chunk % 2 * config.dq_columns
        row, column = row + lane // 4, column + lane % 2 * 8 + lane % 4 // 2 * 4
        if const_expr(config.dq_transposed):
            column += nth * ROWS
        else:
            row += nth * ROWS
        scales = [self.scale_of((batch, head, row + 8 * i)) for i in range(2)]
        start = sum_address(self.dq_sum, place) + 16 * (nth * 32 + lane)
        goal = self.result.iterator + cute.crd2idx((batch, row, head, column), self.result.layout)
        goal = goal.toint()
        left = [cute.size(self.result, mode=[i]) - at for i, at in ((1, row), (3, column))]
        below = self.result.element_type.width * self.result.layout.stride[1]  # 8 rows, in bytes
        for _ in cutlass.range(config.dq_tile[1] // 16 // at_once, unroll=1):
            numbers = [read_four(start + 2048 * i) for i in range(2 * at_once)]
            for i in cutlass.range_constexpr(2 * at_once):
                # Two groups of two rows or columns of 8: where they go, and what is in them.
                if const_expr(config.dq_transposed):
                    quads = (numbers[i][:2], numbers[i][2:])
                    rows, columns = 8 * i, 0
                else:
                    quads = [x[i % 2 * 2 : i % 2 * 2 + 2] for x in numbers[i // 2 * 2 :][:2]]
                    rows, columns = i % 2 * 8, i // 2 * 16
                pairs = [self.pair_of(x, scales[i % 2]) & there for x in quads]
                pairs = exchange(*pairs, lane)
                if left[0] > rows and left[1] > columns:
                    store(goal + rows // 8 * below + 2 * columns, pairs)
            start += 4096 * at_once
            if const_expr(config.dq_transposed):
                goal += 2 * below * at_once
                left[0] -= 16 * at_once
            else:
                goal += 32 * at_once
                left[1] -= 16 * at_once

    @cute.jit
    def scale_of(self, place):
        """What a row's sums are to be multiplied by."""
        scale = self.scale
        if const_expr(self.config.fixed):
            batch, head, row = place
            exponent = exponent_in(*(self.stats[batch, head, i, row] for i in range(2)))
            unit = from_bits(254 - exponent << 23) if exponent < 255 else Float32.nan
            scale *= unit
        return scale

    @cute.jit
    def pair_of(self, numbers, scale):
        """Two neighbours of dQ in one register."""
        pair = cute.make_rmem_tensor(2, self.result.element_type)
        for i in cutlass.range_constexpr(2):
            number = numbers[i]
            if const_expr(self.config.fixed):
                number = bits_of(number).to(Float32)
            pair[i] = (number * scale).to(pair.element_type)
        bits = cute.recast_tensor(pair, Int32)[0]
        return transpose(bits) if const_expr(self.config.dq_transposed) else bits


@cute.jit
def transpose(pair):
    """Neighbours in a row of an 8 x 8 matrix, lane t's in row t / 4, become the transpose's."""
    return cute.arch.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 {$w0}, {$r0};",
        write_only_types=[Int32],
        read_only_args=[pair],
    )


@cute.jit
def store(address, numbers):
    """Two registers side by side."""
    cute.arch.inline_ptx(
        "st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, *numbers]
    )


@cute.jit
def exchange(first, second, lane):
    """Two neighbours of each of two groups of 8 columns become four of one, with the lane next to
    this one: the first group is for the even one.
    """
    odd = lane % 2 == 1
    mine, given = (second, first) if odd else (first, second)
    other = cute.arch.shuffle_sync_bfly(given, offset=1)
    return (other, mine) if odd else (mine, other)


@cute.jit
def read_four(address):
    """Four neighbours."""
    return cute.arch.inline_ptx(
        "ld.global.v4.f32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )


@cute.jit
def relaxed(tensor, place):
    """A number that others change."""
    address = tensor.iterator + cute.crd2idx(place, tensor.layout)
    return cute.arch.inline_ptx(
        "ld.relaxed.gpu.global.b32 {$w0}, [{$r0}];",
        write_only_types=[Int32],
        read_only_args=[address.toint()],
    )
