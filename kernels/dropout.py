"""Dropout in registers: which elements of a thread's accumulators are kept.

The generator and its layout are those of `sparse_flash.scores.philox`. One evaluation of
Philox4x32-7 gives 16 bytes: for two rows and two columns, and for those 8 further on, of a tile of
16 x 16. In the accumulators of mma.sync (m16n8k16) and wgmma, two threads four lanes apart have 8
of these elements each. So of two adjacent tiles each of both threads evaluates one, and they
exchange half of their results.

An element is kept if its byte is at least `dropped`: if byte + (256 - dropped) carries. The carries
of four bytes are computed at once, and each pair of 16-bit elements gets a mask of 32 bits. An
element costs four instructions, half of them for the generator. The forward kernel for Hopper has
more work for its integer units than for its FMA units. It multiplies by factors: see `pair_factor`.
"""

from __future__ import annotations

import cutlass
from cutlass import BFloat16, Float16, Float32, Int32, Uint32, Uint64, const_expr, cute
from sparse_flash.kernels.vectors import as_pairs, pack_pair

ROUNDS = 7
LEVELS = 256  # values of a byte
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
TILE = 16  # rows and columns
BYTES = 0x01010101  # times a byte: in each byte of a word
SIGNS = 0x80 * BYTES


class Dropout:
    """Masks of a thread's elements of accumulators, of which a warp has 16 rows.

    seed: int32 (2,), the low and the high word. dropped: Number of byte values that drop an
    element, Int32 in 1..255. transposed: Whether rows are keys instead of queries. by_factors:
    Whether `masks` are factors of pairs instead, 0 or 1 in float16: see `pair_factor`.
    """

    by_factors = False

    def __init__(self, seed, dropped, transposed: bool, by_factors: bool = False) -> None:
        self.transposed, self.lane = transposed, cute.arch.lane_idx()
        self.by_factors = by_factors
        self.numbers = numbers_of(dropped) if by_factors else None
        # In uniform registers.
        self.keys = round_keys(*(cute.arch.make_warp_uniform(seed[i]) for i in range(2)))
        self.levels = levels_of(dropped)

    @cute.jit
    def masks(self, pair, row, column, count: cutlass.Constexpr):
        """Masks for the warp's 16 rows and `count` tiles of 16 columns.

        pair: Batch entry * query heads + query head. row, column: Positions of the first row and
        column, multiples of 16; q_offset and kv_starts are included. Returns 4 count words: all
        bits of the elements 2 i and 2 i + 1 of the thread that are kept.
        """
        return self.masks_of(self.flags(pair, row, column, count))

    @cute.jit
    def flags(self, pair, row, column, count: cutlass.Constexpr):
        """The same in 2 count words, which need fewer registers: see `masks_of`."""
        found = []
        for tile in cutlass.range_constexpr(0, count, 2):
            if const_expr(tile + 1 < count):
                first, second = self._two_tiles(pair, row, column + tile * TILE)
                found += [*first, *second]
            else:
                words = self._evaluate(pair, row, column // 4 + tile * (TILE // 4) + self.lane % 4)
                found += self._halves(words)[0]
        return found

    def masks_of(self, flags):
        """The masks of `flags`, words or a register tensor of them."""
        # Elements of a thread in a tile: two columns, two rows, then two further columns.
        order = (0, 1, 2, 3) if self.transposed else (0, 2, 1, 3)
        count = len(flags) if isinstance(flags, list) else cute.size(flags)
        if self.by_factors:
            return [
                pair_factor((flags[i], flags[i + 1]), byte, self.numbers)
                for i in range(0, count, 2)
                for byte in order
            ]
        return [
            pair_mask((flags[i], flags[i + 1]), byte) for i in range(0, count, 2) for byte in order
        ]

    @cute.jit
    def _two_tiles(self, pair, row, column):
        """The thread's words of two adjacent tiles."""
        mine, others = self._halves(self._evaluate(pair, row, column // 4 + self.lane % 8))
        given = [self._from_partner(x) for x in others]
        odd = self.lane // 4 % 2 == 1
        first = [b if odd else a for a, b in zip(mine, given, strict=True)]
        second = [a if odd else b for a, b in zip(mine, given, strict=True)]
        return first, second

    @cute.jit
    def _evaluate(self, pair, row, unit):
        """Flags of 16 elements. unit: Index of their columns, in the terms of scores.philox."""
        units = ((row // 4 + self.lane // 8).to(Uint32), unit.to(Uint32))
        q, kv = units[::-1] if self.transposed else units
        words = philox((kv, q, pair.to(Uint32), Uint32(0)), self.keys)
        return words if self.by_factors else [keep_flags(x, self.levels) for x in words]

    @cute.jit
    def _halves(self, words):
        """The words of this thread's row, and those of the thread four lanes away.

        A word of a half is for even columns, the next one for odd columns.
        """
        odd = self.lane // 4 % 2 == 1
        order = (0, 2, 1, 3) if self.transposed else (0, 1, 2, 3)
        of_even, of_odd = ([words[i] for i in order[j : j + 2]] for j in (0, 2))
        mine = [b if odd else a for a, b in zip(of_even, of_odd, strict=True)]
        others = [a if odd else b for a, b in zip(of_even, of_odd, strict=True)]
        return mine, others

    def _from_partner(self, word):
        return cute.arch.shuffle_sync_bfly(word, offset=4)


def round_keys(low, high):
    """The keys of all rounds, from the words of the seed."""
    steps = [[Uint32(i * weyl & 0xFFFFFFFF) for i in range(ROUNDS)] for weyl in WEYL]
    return [(low.to(Uint32) + x, high.to(Uint32) + y) for x, y in zip(*steps, strict=True)]


def levels_of(dropped):
    """256 - dropped in each byte of a word."""
    return ((LEVELS - dropped) * BYTES).to(Uint32)


def philox(counter, keys):
    """The four words of a counter of four words; see `scores.philox.philox4x32`."""
    a, b, c, d = counter
    for low, high in keys:
        first, second = (
            x.to(Uint64) * Uint64(factor) for x, factor in zip((a, c), MULTIPLIERS, strict=True)
        )
        a, b, c, d = (
            (second >> 32).to(Uint32) ^ b ^ low,
            second.to(Uint32),
            (first >> 32).to(Uint32) ^ d ^ high,
            first.to(Uint32),
        )
    return a, b, c, d


def keep_flags(word, levels):
    """In bit 7 of each byte, whether the sum of the bytes of `word` and `levels` carries.

    The other bits mean nothing.
    """
    low = Uint32(SIGNS - BYTES)
    sums = (word & low) + (levels & low)  # bit 7 is the carry into it
    return word & levels | (word | levels) & sums


def pair_mask(flags, byte: int):
    """Bit 7 of a byte of two words, as 16 bits each: prmt replicates signs."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Int32],
        read_only_args=[*flags, Int32(0x1100 * (12 + byte) + 0x11 * (8 + byte))],
    )


def numbers_of(dropped):
    """-(1023 + dropped) twice, in float16, which is exact; and four bytes 0x64."""
    threshold = pack_pair(*[Float32(-1023 - dropped)] * 2, Float16)
    # The sum is 0, which ptxas does not know. It would move all selectors of `permute` instead.
    return threshold, add_saturated(threshold, threshold) | Int32(0x64646464)


def pair_factor(words, byte: int, numbers):
    """1 where a byte of two words is at least `dropped`, else 0, in float16.

    0x6400 + byte is the float16 1024 + byte. Unlike masks, half of the work is that of FMA units.
    """
    threshold, high = numbers
    half, place = byte // 2, byte % 2
    both = permute(*words, 0x7362 if half else 0x5140)  # two bytes of each word in turn
    pair = permute(both, high, 0x4342 if place else 0x4140)
    return add_saturated(pair, threshold)


def permute(a, b, selector: int):
    """Bytes of two words: `prmt`."""
    return cute.arch.inline_ptx(
        "prmt.b32 {$w0}, {$r0}, {$r1}, {$r2};",
        write_only_types=[Int32],
        read_only_args=[a, b, Int32(selector)],
    )


def add_saturated(a, b):
    """The sums of two pairs of float16, no less than 0 and no more than 1."""
    return cute.arch.inline_ptx(
        "add.sat.f16x2 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[a, b]
    )


def multiply(values, factors):
    """Multiply a register tensor of 16-bit elements by factors of its pairs.

    As bfloat16, the float16 1 is 2^-7: see `unit_of_factors`.
    """
    pairs = as_pairs(values)
    name = "bf16x2" if values.element_type is BFloat16 else "f16x2"
    for i in range(cute.size(pairs)):
        pairs[i] = cute.arch.inline_ptx(
            f"mul.rn.{name} {{$w0}}, {{$r0}}, {{$r1}};",
            write_only_types=[Int32],
            read_only_args=[pairs[i], factors[i]],
        )


def unit_of_factors(dtype) -> float:
    """What `multiply` multiplies kept elements by."""
    return 2.0**-7 if dtype is BFloat16 else 1.0


@cute.jit
def drop(values, masks, dropped=None):
    """Set dropped elements of a register tensor of 16-bit elements to 0.

    dropped: Another one, for the values of dropped elements; 0 elsewhere. Or `None`.
    """
    pairs = as_pairs(values)
    others = None if const_expr(dropped is None) else as_pairs(dropped)
    for i in cutlass.range_constexpr(cute.size(pairs)):
        if const_expr(dropped is not None):
            others[i] = pairs[i] & ~masks[i]
        pairs[i] = pairs[i] & masks[i]
