"""A bias by distance in registers: relative positions, and all terms of p_q - p_k alone.

Its values are rows of numbers, one for each distance (see distance_table.py). A tile of R rows and
C columns needs R + C of them: its window, which the producer copies to shared memory. Adjacent
columns have adjacent values, so a thread loads the values of two columns at once. Two copies of the
values, one shifted by an element, align all these loads.

The gradient of a value is the sum of a diagonal of dS. A warp sums the diagonals of its 16 rows
through shared memory, and adds the sums to global memory, in no particular order.
"""

from __future__ import annotations

import operator

import cutlass
from cutlass import Float32, Int32, const_expr, cute
from sparse_flash.kernels.distance_table import COPIES, ROWS, window_size
from sparse_flash.kernels.vectors import as_pairs


def window_layout(tile: tuple[int, int], stages: int):
    """Of windows in shared memory: (value, copy, stage)."""
    size = window_size(tile)
    return cute.make_layout((size, COPIES, stages), stride=(1, size, COPIES * size))


class DistanceWindows:
    """The windows of a CTA's stages: their producer, and the reads of consumer warps.

    terms: `ScoreTerms`. windows: Shared memory of `window_layout`. tile: (rows, columns).
    """

    def __init__(self, terms, windows, tile: tuple[int, int]) -> None:
        self.bias, self.num_rows, self.windows = terms.bias, terms.bias_rows, windows
        self.radius, self.rows, self.size = terms.bias_radius, tile[0], window_size(tile)

    @cute.jit
    def load(self, head, row, column, stage, barrier):
        """Copy the window of a tile to a stage; completes on the barrier. One lane calls it.

        row, column: Positions of the tile's first row and column.
        """
        start = self.num_rows + column - row - self.rows
        start = cutlass.max(cutlass.min(start, cute.size(self.bias, mode=[2]) - self.size), 0)
        for copy in cutlass.range_constexpr(COPIES):
            source = self.bias.iterator + cute.crd2idx((head, copy, start), self.bias.layout)
            goal = self.windows[None, copy, stage].iterator
            cute.arch.inline_ptx(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                "[{$r0}], [{$r1}], {$r2}, [{$r3}];",
                read_only_args=[
                    goal.toint(),
                    source.toint(),
                    Int32(4 * self.size),
                    barrier.toint(),
                ],
            )

    @cute.jit
    def is_constant(self, apart, shape: cutlass.Constexpr):
        """Whether some rows and columns have one value: none of them is within the radius.

        apart: Position of the first row minus that of the first column. shape: Rows, columns.
        """
        rows, columns = shape
        return apart - (columns - 1) >= self.radius or apart + (rows - 1) <= -self.radius

    @cute.jit
    def value(self, stage, row):
        """Value of the thread's first element. row: In the tile."""
        return self.windows[self.start(row) + ROWS, 0, stage]

    def start(self, row):
        """Index of the value ROWS columns before the thread's first element."""
        # All that depends on the thread is one number, which takes one register; with an odd row
        # it is in the second copy, whose values begin one later.
        own = row % 2 * (self.size - 1) - row + 2 * (cute.arch.lane_idx() % 4)
        return own + (self.rows - ROWS)

    @cute.jit
    def values(self, stage, row, first: cutlass.Constexpr, size: cutlass.Constexpr):
        """Values for `size` elements of a thread's accumulators, from element `first` on.

        row: In the tile, of the thread's first element. Returns a list.
        """
        groups = size // 4 + 1  # of 8 columns
        mine = self.windows[None, 0, stage].iterator + (self.start(row) + 2 * first)
        values = cute.make_rmem_tensor((2, groups), Float32)
        layout = cute.make_layout((2, groups), stride=(1, 8))
        cute.autovec_copy(cute.make_tensor(mine.align(8), layout), values)
        return [values[i % 2, i // 4 - i // 2 % 2 + 1] for i in range(size)]


def window_storage(tile: tuple[int, int], stages: int):
    """Shared-memory storage of `window_layout`."""
    return cute.struct.Align[
        cute.struct.MemRange[Float32, stages * COPIES * window_size(tile)], 128
    ]


@cute.jit
def clear_scratch(scratch):
    """Set a warp's scratch to 0, once before all `add_diagonals`."""
    for i in cutlass.range(cute.arch.lane_idx(), cute.size(scratch), 32):
        scratch[i] = Float32(0.0)


@cute.jit
def add_diagonals(ds, scratch, sums, factor=None):
    """Add the diagonals of a warp's dS to sums in global memory.

    ds: Thread's elements of some columns. scratch: Shared memory of the warp. sums: Pointer to the
    sum of the distance of the first row and column, minus ROWS. factor: Of sums in int64, or None.
    """
    lane, groups = cute.arch.lane_idx(), cute.size(ds) // 4 + 1
    width = 8 * groups
    stride = width + 2 * ROWS
    # ROWS rows: the thread's second one is added to the first one, ROWS columns to the right.
    totals = cute.make_rmem_tensor((2, groups), Float32)
    totals.fill(0.0)
    for i in cutlass.range_constexpr(cute.size(ds)):
        group = i // 4 - i // 2 % 2 + 1
        totals[i % 2, group] = totals[i % 2, group] + ds[i].to(Float32)
    start = scratch.iterator + (lane // 4 * stride + 2 * (lane % 4) + ROWS)
    layout = cute.make_layout((2, groups), stride=(1, 8))
    cute.arch.sync_warp()  # the previous sums have been read
    cute.autovec_copy(totals, cute.make_tensor(start.align(8), layout))
    cute.arch.sync_warp()
    for part in cutlass.range_constexpr(cute.ceil_div(width + ROWS - 1, 32)):
        diagonal = part * 32 + lane - (ROWS - 1)  # column minus row
        first = cutlass.min(diagonal, width - 1) + ROWS
        total = scratch[first]
        for row in cutlass.range_constexpr(1, ROWS):
            total += scratch[first + row * (stride + 1)]
        if diagonal < width and total != 0.0:
            add_to_sum((sums + diagonal).toint(), total, factor)


@cute.jit
def add_total(ds, address):
    """Add all elements of a warp's dS to one sum in global memory.

    The tensor cores add 16 x 16 elements at a time: a product with a matrix of ones.
    """
    pairs, sums = as_pairs(ds), [Float32(0.0)] * 4
    for i in cutlass.range_constexpr(0, cute.size(pairs), 4):
        sums = add_rows([pairs[i + n] for n in range(4)], sums, ds.element_type)
    # Two rows of a thread; four threads of a quad have the same ones.
    total = cute.arch.warp_reduction(sums[0] + sums[2], operator.add) * 0.25
    if cute.arch.lane_idx() == 0:
        add_to_sum(address.toint(), total)


def add_rows(pairs, sums, dtype):
    """`sums` plus the row sums of 16 x 16 elements, by mma.m16n8k16 with a matrix of ones."""
    bfloat16 = dtype is cutlass.BFloat16
    kind, ones = ("bf16", 0x3F803F80) if bfloat16 else ("f16", 0x3C003C00)

    def registers(letter, first, count):
        listed = ", ".join(f"{{${letter}{i}}}" for i in range(first, first + count))
        return "{" + listed + "}"

    operands = [registers("w", 0, 4), registers("r", 0, 4), "{ones, ones}", registers("r", 4, 4)]
    return cute.arch.inline_ptx(
        f"{{ .reg .b32 ones; mov.b32 ones, {ones}; "
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {', '.join(operands)}; }}",
        write_only_types=[Float32] * 4,
        read_only_args=[*pairs, *sums],
    )


@cute.jit
def add_to_sum(address, value, factor=None):
    """Add a value to a float32 number in global memory; with a factor, in fixed point to int64."""
    if const_expr(factor is None):
        cute.arch.inline_ptx(
            "red.relaxed.gpu.global.add.f32 [{$r0}], {$r1};", read_only_args=[address, value]
        )
    else:
        cute.arch.inline_ptx(
            "{ .reg .b64 i; cvt.rni.s64.f32 i, {$r1}; red.relaxed.gpu.global.add.u64 [{$r0}], i; }",
            read_only_args=[address, value * factor],
        )
