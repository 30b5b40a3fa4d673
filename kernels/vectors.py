"""How threads read and write rows of memory: vectors of 16 bytes, pairs, and bits of floats."""

import cutlass
from cutlass import Float32, Int32, cute

VECTOR = 8  # elements of 16 bits that a thread loads at once: 16 bytes


@cute.jit
def bits_of(number):
    """The bits of a Float32 as an Int32."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[number]
    )


@cute.jit
def from_bits(bits):
    """The Float32 of these bits: of exponent << 23 it is 2^(exponent - 127)."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits]
    )


@cute.jit
def pack_pair(first, second, dtype: cutlass.Constexpr):
    """Round two floats to 16 bits and pack them into one register."""
    pair = cute.make_rmem_tensor(2, dtype)
    pair[0], pair[1] = first.to(dtype), second.to(dtype)
    return cute.recast_tensor(pair, Int32)[0]


def round_pair(first, second, dtype):
    """As `pack_pair`, in one instruction wherever it stands: the compiler knows no elements."""
    name = "bf16x2" if dtype is cutlass.BFloat16 else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{name}.f32 {{$w0}}, {{$r0}}, {{$r1}};",
        write_only_types=[Int32],
        read_only_args=[second, first],
    )


@cute.jit
def as_pairs(values):
    """A register tensor of 16-bit elements as int32 pairs."""
    start = cute.recast_ptr(values.iterator, dtype=Int32)
    return cute.make_tensor(start, cute.make_layout(cute.size(values) // 2))


@cute.jit
def round_to(goal, values):
    """Round a register tensor of floats to one of 16-bit elements, pair by pair.

    A conversion of the whole vector moves halves of registers where their number is not a power of
    two. ptxas then ends a group of WGMMAs after each one, and a wait for an earlier group waits
    for almost all of them.
    """
    pairs = as_pairs(goal)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        pairs[i] = round_pair(values[2 * i], values[2 * i + 1], goal.element_type)


@cute.jit
def vector_at(tensor, coord, alignment: cutlass.Constexpr):
    """VECTOR adjacent elements of a row, starting at a four-mode coordinate."""
    start = (tensor.iterator + cute.crd2idx(coord, tensor.layout)).align(alignment)
    return cute.make_tensor(start, cute.make_layout(VECTOR))


@cute.jit
def load_vector(tensor, coord):
    """Load VECTOR elements of a row; coord = (batch, row, head, column), clamped to the tensor.

    Clamping avoids branches, so the loads are independent.
    """
    batch, row, head, column = coord
    row = cutlass.min(row, cute.size(tensor, mode=[1]) - 1)
    column = cutlass.min(column, cute.size(tensor, mode=[3]) - VECTOR)
    values = cute.make_rmem_tensor(VECTOR, tensor.element_type)
    cute.autovec_copy(vector_at(tensor, (batch, row, head, column), 16), values)
    return values


@cute.jit
def grid_coord(chunks, heads):
    """(chunk, head, batch) of this CTA in a grid of one dimension."""
    index = cute.arch.block_idx()[0]
    rest = index // chunks
    return index % chunks, rest % heads, rest // heads


@cute.jit
def store_pairs(tensor, coord, pairs, any_row: cutlass.Constexpr = False):
    """Store pairs of a row from coord = (batch, row, head, column) on, 8 bytes per thread.

    Four adjacent lanes hold one pair each of every 8 columns. Of 16 columns, even lanes store the
    first 8. Columns out of bounds are not stored. Predicated instead of branches, so that stores do
    not wait for each other's operands.
    any_row: Whether the row may be negative; then nothing is stored.
    """
    (batch, row, head, column), lane = coord, cute.arch.lane_idx()
    odd = lane % 2 == 1
    column += lane % 2 * 8 + lane % 4 // 2 * 4
    start = (tensor.iterator + cute.crd2idx((batch, row, head, column), tensor.layout)).toint()
    inside = row < cute.size(tensor, mode=[1])
    if cutlass.const_expr(any_row):
        inside = inside and row >= 0
    left = cute.size(tensor, mode=[3]) - column if inside else Int32(0)
    for i in cutlass.range_constexpr(0, len(pairs), 2):
        mine, given = (pairs[i + 1], pairs[i]) if odd else (pairs[i], pairs[i + 1])
        other = cute.arch.shuffle_sync_bfly(given, offset=1)
        mine, other = (other, mine) if odd else (mine, other)
        cute.arch.inline_ptx(
            "{ .reg .pred p; setp.gt.s32 p, {$r3}, 0; "
            "@p st.global.v2.b32 [{$r0}], {{$r1}, {$r2}}; }",
            read_only_args=[start + 16 * i, mine, other, left - 8 * i],
        )
