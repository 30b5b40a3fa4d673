"""Primitives of the mma.sync kernels: tiles in shared memory, loads, and GEMMs.

A product is made of `mma.sync.m16n8k16`. Its operands come from shared memory by `ldmatrix`, four
8 x 8 matrices at a time; tiles come into shared memory by `cp.async`, 16 bytes per thread. Thread t
of a warp has, of each 16 x 8 accumulator, rows t / 4 and t / 4 + 8 and columns 2 (t % 4) + {0, 1}.
"""

from dataclasses import dataclass

import cutlass
from cutlass import Float32, Int32, cute
from cutlass.cute.nvgpu import warp

CHUNK = 8  # elements of 16 bits that one cp.async and one row of an 8 x 8 matrix have


@dataclass(frozen=True)
class TileLayout:
    """Where a row-major tile of 16-bit numbers lies in shared memory.

    Blocks of 64 columns (32, where 64 do not divide the columns) follow each other, each with all
    rows. Within a block the chunks of a row are swizzled, so that the eight rows of a matrix lie in
    different banks. Offsets are in bytes; numbers may be Python's or Int32. The tile must begin at
    a multiple of 1024 bytes.

    >>> TileLayout(128, 64).offset(row=9, chunk=2), TileLayout(16, 128).offset(row=0, chunk=8)
    (1200, 2048)
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        assert self.rows % 16 == 0
        assert self.columns % 32 == 0

    @property
    def block(self) -> int:
        """Columns of a block."""
        return 64 if self.columns % 64 == 0 else 32

    @property
    def pitch(self) -> int:
        """Bytes of a row of a block."""
        return 2 * self.block

    @property
    def nbytes(self) -> int:
        """Bytes of the tile."""
        return 2 * self.rows * self.columns

    def offset(self, row, chunk):
        """Of a chunk of 8 columns in a row."""
        chunks = self.block // CHUNK
        swizzle = row % 8 if self.block == 64 else row // 2 % 4
        start = (chunk // chunks * self.rows + row) * self.pitch
        return start + ((chunk % chunks) ^ swizzle) * 16

    def moved(self, address, row, column):
        """The address of what lies so many rows and columns further, both multiples of 16.

        address: Of a chunk in the first two chunks of a row of the tile.
        """
        chunk, chunks = column // CHUNK, self.block // CHUNK
        return (address ^ (chunk % chunks * 16)) + (chunk // chunks * self.rows + row) * self.pitch

    def rows_first(self, lane):
        """Offset of a lane's row where `ldmatrix` reads 16 x 16 numbers: its four matrices are the
        left half's two, then those of the right half.

        As they are, these are operand a of a product of the tile's rows. Transposed, they are two
        fragments of operand b, of a product with the tile's columns.
        """
        return self.offset(lane % 16, lane // 16)

    def columns_first(self, lane):
        """As `rows_first`, but with the upper half's two matrices first, then the lower half's.

        As they are, these are two fragments of operand b, of a product with the tile's rows.
        Transposed, they are operand a of a product of the tile's columns.
        """
        return self.offset(lane % 8 + lane // 16 * 8, lane // 8 % 2)


def shared_address(pointer):
    """The Int32 address of a pointer to shared memory."""
    return Int32(pointer.toint())


@cute.jit
def in_loop(number):
    """The same Int32, opaque to the compiler: values derived from it are computed inside the loop.

    Values hoisted out of a loop occupy registers, and the GEMMs need all of them.
    """
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number]
    )


@cute.jit
def ldmatrix(address, transpose: cutlass.Constexpr = False):
    """Four 8 x 8 matrices, whose rows lie at the lanes' addresses, as four Int32 a thread."""
    suffix = ".trans" if cutlass.const_expr(transpose) else ""
    return cute.arch.inline_ptx(
        f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 "
        "{{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )


@cute.jit
def load_fragments(layout: cutlass.Constexpr, address, places: cutlass.Constexpr, transpose):
    """The 16 x 16 numbers at each (row, column) of `places`, as four Int32 a thread each.

    address: Of the tile, plus the lane's `rows_first` or `columns_first`.
    """
    registers = cute.make_rmem_tensor(4 * len(places), Int32)
    for i in cutlass.range_constexpr(len(places)):
        loaded = ldmatrix(layout.moved(address, *places[i]), transpose)
        for n in cutlass.range_constexpr(4):
            registers[4 * i + n] = loaded[n]
    return registers


def as_operand_a(registers, dtype):
    """Registers as fragments of operand a: (8, fragments)."""
    return _as_fragments(registers, dtype, 8)


def as_operand_b(registers, dtype):
    """Registers as fragments of operand b: (4, fragments)."""
    return _as_fragments(registers, dtype, 4)


def _as_fragments(registers, dtype, size):
    layout = cute.make_layout((size, 2 * cute.size(registers) // size))
    return cute.make_tensor(cute.recast_ptr(registers.iterator, dtype=dtype), layout)


def fragment(operand, nth):
    """One fragment of operand a, (8, 1)."""
    size = cute.size(operand, mode=[0])
    return cute.make_tensor(operand.iterator + nth * size, cute.make_layout((size, 1)))


def accumulators(columns):
    """Float32 registers for 16 rows of a product, (4, 1, columns / 8)."""
    return cute.make_rmem_tensor((4, 1, columns // 8), Float32)


@cute.jit
def multiply(acc, a, b):
    """Add a b^T to acc: (4, 1, n) += (8, 1) (4, n), by n mma.sync."""
    atom = cute.make_mma_atom(warp.MmaF16BF16Op(a.element_type, Float32, (16, 8, 16)))
    cute.gemm(atom, acc, a, b, acc)


@cute.jit
def as_pairs(acc, dtype: cutlass.Constexpr):
    """Accumulators in 16 bits, two in an Int32. Those of 16 columns are operand a of a product."""
    rounded = cute.make_rmem_tensor(cute.size(acc), dtype)
    for i in cutlass.range_constexpr(cute.size(acc)):
        rounded[i] = acc[i].to(dtype)
    return cute.recast_tensor(rounded, Int32)


@cute.jit
def copy_async(target, source, size=None):
    """Start to copy 16 bytes from memory to shared memory.

    target: Address in shared memory. source: Address, Int64. size: Bytes to read, 0 or 16, before
    zeros. Default: all.
    """
    code = "cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16"
    if cutlass.const_expr(size is None):
        cute.arch.inline_ptx(code + ";", read_only_args=[target, source])
    else:
        cute.arch.inline_ptx(code + ", {$r2};", read_only_args=[target, source, size])


@cute.jit
def copy_small(target, source, size: cutlass.Constexpr):
    """Start to copy 4, 8 or 16 bytes from memory to shared memory, by the L1 cache."""
    code = f"cp.async.ca.shared.global [{{$r0}}], [{{$r1}}], {size};"
    cute.arch.inline_ptx(code, read_only_args=[target, source])


def address_of(tensor, coord):
    """The Int64 address of an element of a tensor in memory."""
    return (tensor.iterator + cute.crd2idx(coord, tensor.layout)).toint()


class TileLoader:
    """Copies tiles of rows of a (b, s, h, d) tensor into shared memory, by all threads of a CTA.

    Rows outside the tensor, and columns from d to those of the layout, become zeros.
    """

    def __init__(self, tensor, layout, threads, thread):
        self.tensor, self.layout = tensor, layout
        self.chunks = layout.block // CHUNK  # threads of a row of a block
        self.step = threads // self.chunks  # rows at a time
        assert layout.rows % self.step == 0
        assert self.step % 8 == 0  # so that the swizzle is the same in all steps
        self.row, self.chunk = thread // self.chunks, thread % self.chunks
        self.target = layout.offset(self.row, self.chunk)

    @cute.jit
    def start(self, address, coord, first, limit, any_row: cutlass.Constexpr = False):
        """Issue the copies; the caller commits.

        address: Of the tile in shared memory.
        coord: (head, batch).
        first: Row of the tensor that is the tile's first.
        limit: Rows of the tensor from here on become zeros.
        any_row: `first` may be negative; rows below 0 become zeros.
        """
        layout, (head, batch) = self.layout, coord
        row = first + self.row
        place = (batch, row, head, self.chunk * CHUNK)
        source = (self.tensor.iterator + cute.crd2idx(place, self.tensor.layout)).toint()
        target = address + self.target
        width = in_loop(cute.size(self.tensor, mode=[3]))
        inside = first + layout.rows <= limit and width == layout.columns
        if cutlass.const_expr(any_row):
            inside = inside and first >= 0
        if inside:
            for moved, offset in self._copies():
                copy_async(target + moved, source + offset)
        else:
            self._start_cut(target, source, row, limit, any_row)

    @cute.jit
    def _start_cut(self, target, source, row, limit, any_row: cutlass.Constexpr):
        """Issue the copies of a tile that the tensor does not have as a whole."""
        columns = in_loop(cute.size(self.tensor, mode=[3]) - self.chunk * CHUNK)
        copies = self._copies()
        for i in cutlass.range_constexpr(len(copies)):
            blocks = self.layout.columns // self.layout.block
            nth = row + i // blocks * self.step
            there = nth < limit and columns > i % blocks * self.layout.block
            if cutlass.const_expr(any_row):
                there = there and nth >= 0
            moved, offset = copies[i]
            copy_async(target + moved, source + offset, Int32(16) if there else Int32(0))

    def _copies(self):
        """Of each copy of a thread, bytes from its first one in shared memory and in memory."""
        layout, stride = self.layout, cutlass.Int64(self.tensor.stride[1])
        return [
            ((i * self.step + block * layout.rows) * layout.pitch, self._source(i, block, stride))
            for i in range(layout.rows // self.step)
            for block in range(layout.columns // layout.block)
        ]

    def _source(self, i, block, stride):
        return 2 * (i * self.step * stride + block * self.layout.block)
