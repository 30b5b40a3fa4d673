"""Thread-level operations on the accumulators of S: mask, online softmax, rescale.

Accumulator layout of a 64 x n WGMMA (m64nNk16, PTX ISA): element i of thread t of a warpgroup has
row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2) and column 8 (i / 4) + 2 (t % 4) + i % 2.
A thread has two rows, shared by the four threads of a quad.
"""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, Int16, Int32, const_expr, cute
from sparse_flash.kernels.score_terms import absolute, with_sink

LN2 = math.log(2.0)
# Of 2^f for |f| <= 1/2, from the highest power: the least relative error, 1.1e-4, with 1 at 0.
EXP2_POLYNOMIAL = (0.05477747, 0.24224344, 0.6933121, 1.0)


@cute.jit
def mask_words(bits, bit_tile, group, thread):
    """Load the mask bits of the thread's two rows: one word each, one bit per column.

    Bit 2 j + c is column 8 j + 2 (t % 4) + c. With a negative `bit_tile` all bits are set.
    """
    words = cute.make_rmem_tensor(2, Int32)
    words.fill(-1)
    if bit_tile >= 0:
        words[0] = bits[bit_tile, group, thread, 0]
        words[1] = bits[bit_tile, group, thread, 1]
    return words


@cute.jit
def half_mask_words(bits, start, group, thread):
    """As `mask_words`, of one half of a tile's columns: the lower 16 bits of each word.

    start: Index of the first 16-bit word of the half: lower and upper words alternate in `bits`.
    """
    words = cute.make_rmem_tensor(2, Int32)
    words.fill(-1)
    if start >= 0:
        halves = cute.recast_ptr(bits.iterator, dtype=Int16) + start
        mine = cute.make_tensor(halves + 4 * (128 * group + thread), cute.make_layout(4))
        words[0], words[1] = mine[0].to(Int32), mine[2].to(Int32)
    return words


@cute.jit
def word_of_row(bits, bit_tile, row, thread):
    """Load the mask bits of a thread's columns in any row of a bit tile."""
    owner = row % 64 // 16 * 32 + row % 8 * 4 + thread % 4
    return bits[bit_tile, row // 64, owner, row % 16 // 8]


@cute.jit
def columns_within(remaining, thread):
    """A word with bits set for the thread's columns before column `remaining`."""
    columns = cutlass.max(remaining - 2 * (thread % 4), Int32(0))
    count = 2 * (columns // 8) + cutlass.min(columns % 8, Int32(2))
    return (Int32(1) << count) - 1 if count < 32 else Int32(-1)


@cute.jit
def apply_mask(acc_s, words, within, otherwise: cutlass.Constexpr = -math.inf):
    """Set elements to `otherwise` unless their bit is set in the row's word and in `within`.

    A select, so NaN of masked keys does not propagate.
    """
    for i in cutlass.range_constexpr(cute.size(acc_s)):
        bit = 1 << (i // 4 * 2 + i % 2)
        bit = bit - (1 << 32) if bit >= 1 << 31 else bit
        allowed = (words[i // 2 % 2] & within & Int32(bit)) != 0
        acc_s[i] = acc_s[i] if allowed else Float32(otherwise)


@cute.jit
def reset(stats):
    """Reset the online-softmax state: maximum -inf, sum 0."""
    for row in cutlass.range_constexpr(2):
        stats[row, 0] = -Float32.inf
        stats[row, 1] = Float32(0.0)


@cute.jit
def update_row_max(acc_s, stats, scale_log2, rescale_threshold, row_bias=None):
    """Update the row maxima with S. Returns whether to rescale O, and the factors.

    row_bias: Numbers that the scores of both rows have in addition to S, or `None`.

    Online softmax: Milakov & Gimelshein, 2018. Growth below `rescale_threshold`, 8 / scale_log2, is
    ignored (as in FlashAttention-4): P stays below 2^8 without loss of precision, and no exchange
    or rescale is needed.
    """
    tops = [row_max(acc_s, row) for row in range(2)]
    if const_expr(row_bias is not None):
        tops = [top + row_bias[row] for row, top in enumerate(tops)]
    return update_max(tops, stats, scale_log2, rescale_threshold)


def row_max(acc_s, row: int):
    """Maximum of a row's elements in this thread."""
    return _reduce([acc_s[i] for i in row_elements(acc_s, row)], cute.arch.fmax)


def row_min(acc_s, row: int):
    """Minimum of a row's elements in this thread."""
    return _reduce([acc_s[i] for i in row_elements(acc_s, row)], cute.arch.fmin)


def row_max_abs(acc_s, row: int):
    """Maximum of the absolute values of a row's elements in this thread."""
    return _reduce([absolute(acc_s[i]) for i in row_elements(acc_s, row)], cute.arch.fmax)


def row_norm(acc_s, row: int, groups: int = 4):
    """A bound of the absolute values of a row's elements in this thread, 1 + 2^-16 times the
    largest norm of `groups` of them: an FMA for each takes half the time of a maximum.
    """
    values = [acc_s[i] for i in row_elements(acc_s, row)]
    sums = [x * x for x in values[:groups]]
    for i, x in enumerate(values[groups:]):
        sums[i % groups] = x * x + sums[i % groups]
    # The factor covers rounding.
    return cute.math.sqrt(_reduce(sums, cute.arch.fmax), fastmath=True) * Float32(1 + 2**-16)


@cute.jit
def update_max(tops, stats, scale_log2, rescale_threshold):
    """As `update_row_max`. tops: Maxima of the thread's elements of both rows."""
    decay = cute.make_rmem_tensor(2, Float32)
    decay.fill(1.0)
    grown = tops[0] > stats[0, 0] + rescale_threshold or tops[1] > stats[1, 0] + rescale_threshold
    grown = cute.arch.vote_any_sync(grown)
    if grown:
        for row in cutlass.range_constexpr(2):
            old = stats[row, 0]
            top = _quad(cute.arch.fmax(tops[row], old), cute.arch.fmax)
            decay[row] = (
                cute.math.exp2((old - top) * scale_log2, fastmath=True)
                if top > old
                else Float32(1.0)
            )
            stats[row, 0] = top
            stats[row, 1] = stats[row, 1] * decay[row]
    return grown, decay


@cute.jit
def exp2_and_sum(acc_s, stats, scale_log2, polynomial: cutlass.Constexpr = 0, row_bias=None):
    """Replace S by exp2(scale (S - maximum)), and add it to the row sums.

    Row sums cover the thread's own columns until `row_normalizers` reduces them.

    polynomial: Of eight exponentials, how many take `exp2_polynomial`.
    row_bias: As of `update_row_max`.
    """
    for row in cutlass.range_constexpr(2):
        # A row without keys so far has maximum -inf.
        shift = Float32(0.0) if stats[row, 0] == -Float32.inf else stats[row, 0]
        if const_expr(row_bias is not None):
            shift = shift - row_bias[row]
        scaled = shift * scale_log2
        for i in row_elements(acc_s, row):
            x = acc_s[i] * scale_log2 - scaled
            by_polynomial = i // 2 * polynomial % 8 < polynomial  # spread evenly
            acc_s[i] = exp2_polynomial(x) if const_expr(by_polynomial) else exp2(x)
        add_row(acc_s, stats, row)


def add_row(acc_s, stats, row: int):
    """Add a row of P to its sum."""
    stats[row, 1] = stats[row, 1] + _reduce([acc_s[i] for i in row_elements(acc_s, row)], _add)


def exp2(x):
    """exp2 as one MUFU; inline PTX, because the compiler duplicates the intrinsic at uses of P."""
    return cute.arch.inline_ptx(
        "ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


@cute.jit
def exp2_polynomial(x):
    """exp2 of x <= 127 without a MUFU: 0 for x <= -127; relative error 1.1e-4.

    With x = n + f, |f| <= 1/2: a polynomial in f, and n added to its exponent. FlashAttention-4
    computes part of its exponentials so.
    """
    x = cute.arch.fmax(x, Float32(-127.0))  # there the polynomial is 1, and its exponent becomes 0
    shifted = x + Float32(1.5 * 2**23)  # its lowest bits are n
    f = x - (shifted - Float32(1.5 * 2**23))
    p = Float32(EXP2_POLYNOMIAL[0])
    for coefficient in EXP2_POLYNOMIAL[1:]:
        p = p * f + Float32(coefficient)
    return cute.arch.inline_ptx(
        "{ .reg .b32 n; shl.b32 n, {$r0}, 23; add.s32 {$w0}, n, {$r1}; }",
        write_only_types=[Float32],
        read_only_args=[shifted, p],
    )


def row_elements(acc_s, row):
    """Indices of a row's elements among a thread's accumulators."""
    return [4 * j + 2 * row + c for j in range(cute.size(acc_s) // 4) for c in range(2)]


@cute.jit
def row_normalizers(stats, scale_log2, sink=None):
    """1 / sum and log sum exp(scale S) of each row; 0 and -inf for rows without keys.

    sink: Logit without a value, times log2(e), or None.
    """
    factors = cute.make_rmem_tensor(2, Float32)
    log_sums = cute.make_rmem_tensor(2, Float32)
    for row in cutlass.range_constexpr(2):
        total, top = _quad(stats[row, 1], _add), stats[row, 0] * scale_log2
        if const_expr(sink is not None):
            top, decay, total = with_sink(top, total, sink)
        empty = total == 0.0
        factors[row] = Float32(0.0) if empty else cute.arch.rcp_approx(total)
        if const_expr(sink is not None):
            factors[row] = factors[row] * decay
        log_sum = (top + cute.math.log2(total, fastmath=True)) * LN2
        log_sums[row] = -Float32.inf if empty else log_sum
    return factors, log_sums


@cute.jit
def mark_unknown(factors, log_sums, known, row):
    """Set the results of `row_normalizers` to NaN in rows from `known` on.

    row: First row of the thread.
    """
    for r in cutlass.range_constexpr(2):
        if row + 8 * r >= known:
            factors[r] = Float32.nan
            log_sums[r] = Float32.nan


@cute.jit
def store_split(splits, acc_o, coord, r: cutlass.Constexpr, thread):
    """Row r (0 or 1) of a thread's O, in float32, to the row at `place` of the array of splits."""
    for i in cutlass.range_constexpr(2 * r, cute.size(acc_o), 4):
        column = i // 4 * 8 + thread % 4 * 2
        for c in cutlass.range_constexpr(2):
            splits[(*coord, column + c)] = acc_o[i + c]


@cute.jit
def rescale(acc_o, factors):
    """Multiply each row of O by its factor."""
    for i in cutlass.range_constexpr(cute.size(acc_o)):
        acc_o[i] = acc_o[i] * factors[i // 2 % 2]


def _add(x, y):
    return x + y


def _reduce(values, combine, chains=4):
    """Reduce in four independent chains, for instruction-level parallelism with few warps."""
    heads = values[:chains]
    for i, value in enumerate(values[chains:]):
        heads[i % chains] = combine(heads[i % chains], value)
    while len(heads) > 1:
        pairs = [combine(a, b) for a, b in zip(heads[::2], heads[1::2], strict=False)]
        heads = pairs + heads[len(heads) // 2 * 2 :]
    return heads[0]


def _quad(value, combine):
    """Reduce over the four threads that share a row."""
    for offset in (1, 2):
        value = combine(value, cute.arch.shuffle_sync_bfly(value, offset=offset))
    return value
