"""Biases of the scores in registers: by distance, and by distances on an image.

Their values lie in global memory (see distance_table.py and image_table.py), and a thread loads
those of its accumulators: the L1 cache has most of them, since a tile's values are few. They are
where a product of queries and keys begins, so that they take no registers of their own; after a
softcap they are added.
"""

from typing import NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute
from sparse_flash.kernels.distance_bias import add_to_sum
from sparse_flash.kernels.distance_table import ROWS
from sparse_flash.kernels.sm80.primitives import address_of


class TileCorner(NamedTuple):
    """Where a tile is, and the thread's first element in it. All Int32.

    Rows are queries, or keys where the product is transposed.
    """

    head: Int32
    row: Int32  # position of the tile's first row
    column: Int32
    own_row: Int32  # of the thread, in the tile
    own_column: Int32


class Biases:
    """The biases of a config's kernel.

    terms: `ScoreTerms`. tile: (rows, columns). transposed: Whether rows are keys.
    """

    def __init__(self, config, terms, tile, transposed):
        self.config, self.terms, self.tile = config, terms, tile
        self.transposed = transposed

    @cute.jit
    def begin(self, acc, corner):
        """Set accumulators to the biases."""
        if const_expr(self.config.distance_bias):
            self.add_distances(acc, corner, True)
        if const_expr(self.config.image_bias):
            self.add_image(acc, corner, not self.config.distance_bias)

    @cute.jit
    def add(self, acc, corner):
        """Add the biases to accumulators."""
        if const_expr(self.config.distance_bias):
            self.add_distances(acc, corner, False)
        if const_expr(self.config.image_bias):
            self.add_image(acc, corner, False)

    @cute.jit
    def add_distances(self, acc, corner, first: cutlass.Constexpr):
        """Add the bias by distance, or set accumulators to it where it is the first one.

        Two adjacent columns have adjacent values, and the thread's second row has those of the
        columns before. The second copy of the values aligns the pairs of odd rows.
        """
        bias = self.terms.bias
        copy = corner.own_row % 2
        index = self.first_distance(corner, cute.size(bias, mode=[2])) - copy
        address = address_of(bias, (corner.head, copy, index))
        groups = cute.size(acc) // 4
        for group in cutlass.range_constexpr(-1, groups):
            pair = load_pair(address + 4 * ROWS * group, Float32)
            for c in cutlass.range_constexpr(2):
                for row in cutlass.range_constexpr(2):
                    i = 4 * (group + row) + 2 * row + c
                    if const_expr(0 <= group + row < groups):
                        acc[i] = pair[c] if const_expr(first) else acc[i] + pair[c]

    @cute.jit
    def first_distance(self, corner, length):
        """Index of the value of the thread's first element.

        A tile without queries or keys, at any position, gets other values.
        """
        start = self.terms.bias_rows + corner.column - corner.row
        rows, columns = self.tile
        start = cutlass.max(cutlass.min(start, length - columns), Int32(rows))
        return start + corner.own_column - corner.own_row

    @cute.jit
    def add_image(self, acc, corner, first: cutlass.Constexpr):
        """Add the bias by distances on an image, or set accumulators to it."""
        rows, columns = self.image_places(corner)
        image = self.terms.image
        base = address_of(image, (corner.head, cute.size(image, mode=[1]) // 2))
        sign = 1 if const_expr(self.transposed) else -1
        starts = [base - (sign * 4) * x.to(Int64) for x in rows]
        for group in cutlass.range_constexpr(cute.size(acc) // 4):
            pair = load_pair(columns + 4 * ROWS * group, Int32)
            for row in cutlass.range_constexpr(2):
                for c in cutlass.range_constexpr(2):
                    i = 4 * group + 2 * row + c
                    value = load_indexed(starts[row], pair[c], 4 * sign)
                    acc[i] = value if const_expr(first) else acc[i] + value

    @cute.jit
    def add_image_sums(self, ds, corner, factor):
        """Add dS to the sums of the values of its elements. factor: As of `add_to_sum`."""
        rows, columns = self.image_places(corner)
        sums = self.terms.image_sums
        base = address_of(sums, (corner.head, cute.size(sums, mode=[1]) // 2))
        width = 4 if const_expr(factor is None) else 8
        scale = width if const_expr(self.transposed) else -width
        starts = [base - scale * x.to(Int64) for x in rows]
        for group in cutlass.range_constexpr(cute.size(ds) // 4):
            pair = load_pair(columns + 4 * ROWS * group, Int32)
            for row in cutlass.range_constexpr(2):
                for c in cutlass.range_constexpr(2):
                    value = ds[4 * group + 2 * row + c]
                    if value != 0.0:
                        add_to_sum(starts[row] + scale * pair[c].to(Int64), value, factor)

    @cute.jit
    def image_places(self, corner):
        """Numbers of the thread's two rows, and the address of that of its first column."""
        numbers = self.terms.image_numbers
        count = cute.size(numbers)
        row, column = (
            cutlass.max(cutlass.min(x, count - size), Int32(0))
            for x, size in zip((corner.row, corner.column), self.tile, strict=True)
        )
        row = row + corner.own_row
        rows = [numbers[row], numbers[row + ROWS]]
        return rows, address_of(numbers, (column + corner.own_column,))


@cute.jit
def load_pair(address, dtype: cutlass.Constexpr):
    """Two adjacent numbers of 32 bits that no kernel changes."""
    code = "ld.global.nc.v2.b32 {{$w0}, {$w1}}, [{$r0}];"
    return cute.arch.inline_ptx(code, write_only_types=[dtype] * 2, read_only_args=[address])


@cute.jit
def load_indexed(address, index, scale: cutlass.Constexpr):
    """The Float32 `scale * index` bytes from an address on, which no kernel changes."""
    return cute.arch.inline_ptx(
        f"{{ .reg .b64 a; mad.wide.s32 a, {{$r1}}, {scale}, {{$r0}}; "
        "ld.global.nc.f32 {$w0}, [a]; }",
        write_only_types=[Float32],
        read_only_args=[address, index],
    )
