"""Kernels that list the tiles of a layout of data by rows, or by columns for the backward pass.

    indices or table -> BlockBits -> words, a bit for each block
    words, mask -> ListTiles (count) -> WorkItems (sums) -> ListTiles (fill) -> OwnBits

A line is a row of tiles of a pattern, or a column of tiles with the query heads of a key head in
turn. Each lane of a warp looks at one of 32 candidates: lists come out in order, whatever
the timing.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, Uint8, cute

THREADS = 256
WARPS = THREADS // 32
EMPTY, FULL = -2, -1  # states of tiles in the table of a mask; bit tiles from 0 on


class Sizes(NamedTuple):
    """What all kernels here are told, Int32.

    rows, cols: Tiles of the matrix, down and across.
    height, width: Queries and keys of a tile.
    q_len, kv_len: Tokens.
    down, across: Blocks in a tile.
    split_down, split_across: Tiles in a block.
    nq, nk: Blocks of the matrix.
    words: Words of a block row; 0: all blocks are chosen.
    all_blocks: The set of all blocks of a tile, bit by bit.
    tables: Patterns of the table of a mask; 0: there is none.
    numbered: Patterns whose tokens have numbers of documents: none, one for all, or each.
    own: Whether each partial tile has a bit tile of its own, 0 or 1.
    known: Bit tiles of the mask's table, before those of sets of blocks.
    patterns: Patterns.
    own_heads, heads: Heads with patterns of their own, and query heads.
    group: Query heads of a key head.
    stacked: Key heads with lines of their own, by columns; 0: lines are rows.
    """

    rows: Int32
    cols: Int32
    height: Int32
    width: Int32
    q_len: Int32
    kv_len: Int32
    down: Int32
    across: Int32
    split_down: Int32
    split_across: Int32
    nq: Int32
    nk: Int32
    words: Int32
    all_blocks: Int32
    tables: Int32
    numbered: Int32
    own: Int32
    known: Int32
    patterns: Int32
    own_heads: Int32
    heads: Int32
    group: Int32
    stacked: Int32


class BlockBits:
    """A warp for each block row: its blocks as bits, and whether an index is out of range.

    data: Indices (patterns x nq, k), int64 or int32, or bools (patterns x nq, nk) as uint8.
    words: int32 (patterns x nq, ceil(nk / 32)), zeros at first where the data are indices.
    errors: uint8 (patterns x nq,), zeros at first: 1 where an index is none of -1 and 0..nk - 1.
        Such rows have no blocks.
    """

    def __init__(self, from_table: bool) -> None:
        self.from_table = from_table

    @cute.jit
    def __call__(
        self,
        data: cute.Tensor,
        words: cute.Tensor,
        errors: cute.Tensor,
        blocks: Int32,
        none: Int32,
        stream,
    ):
        """Launch on the stream. blocks: nk. none: Another index that stands for none."""
        self.kernel(data, words, errors, blocks, none).launch(
            grid=(cute.ceil_div(cute.size(words, mode=[0]), WARPS), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        data: cute.Tensor,
        words: cute.Tensor,
        errors: cute.Tensor,
        blocks: Int32,
        none: Int32,
    ):
        """One block row for each warp."""
        row = cute.arch.block_idx()[0] * WARPS + cute.arch.warp_idx()
        if row < cute.size(words, mode=[0]):
            if cutlass.const_expr(self.from_table):
                self.of_table(data, words, row, blocks)
            else:
                self.of_indices(data, words, errors, row, (blocks, none))

    @cute.jit
    def of_table(self, data, words, row, blocks):
        """The words of a row of bools."""
        lane = cute.arch.lane_idx()
        for i in cutlass.range(cute.size(words, mode=[1]), unroll=1):
            block, chosen = i * 32 + lane, Int32(0)
            if block < blocks:
                chosen = data[row, block].to(Int32)
            word = cute.arch.vote_ballot_sync(chosen != 0)
            if lane == 0:
                words[row, i] = word

    @cute.jit
    def of_indices(self, data, words, errors, row, limits):
        """The words of a row of indices, or an error."""
        (blocks, none), lane = limits, cute.arch.lane_idx()
        count, wrong = cute.size(data, mode=[1]), Int32(0)
        for i in cutlass.range(lane, count, 32, unroll=1):
            index = data[row, i]
            outside = index < 0 or index >= blocks
            if outside and index != -1 and index != none:  # noqa: PLR1714
                wrong = Int32(1)
        if cute.arch.vote_ballot_sync(wrong != 0) != 0:
            if lane == 0:
                errors[row] = Uint8(1)
        else:
            for i in cutlass.range(lane, count, 32, unroll=1):
                index = data[row, i]
                if index >= 0 and index < blocks:
                    block = index.to(Int32)
                    goal = words.iterator + cute.crd2idx((row, block // 32), words.layout)
                    bit = Int32(1) << block % 32
                    cute.arch.atomic_or(goal, bit, sem="relaxed", scope="gpu")


class ListTiles:
    """A warp for each line: its tiles are counted, or listed.

    words: As of `BlockBits`. states: Table of a mask, int32 (tables, rows, cols). table_of: Its
    pattern for each pattern, int32 (patterns,). numbers: Document of each token, int32 (1 or
    patterns, tokens).
    counts, partials: Tiles and partial tiles of each line, int32; filled where `fill` is False.

    Where `fill` is True, begins and own_begins are the sums over the lines before, and
    tiles: Column (row, with the heads stacked) and bit tile or -1, int32 (capacity + 1, 2).
    own: For each bit tile of its own pattern x rows + row, column, state in the table, and set of
        blocks, int32 (most, 4).
    errors: uint8 (patterns x nq,): 4 where a bit tile finds no space.
    """

    def __init__(self, fill: bool) -> None:
        self.fill = fill

    @cute.jit
    def __call__(
        self,
        words: cute.Tensor,
        states: cute.Tensor,
        table_of: cute.Tensor,
        numbers: cute.Tensor,
        counts: cute.Tensor,
        partials: cute.Tensor,
        tiles: cute.Tensor,
        own: cute.Tensor,
        errors: cute.Tensor,
        rows: Int32,
        cols: Int32,
        height: Int32,
        width: Int32,
        q_len: Int32,
        kv_len: Int32,
        down: Int32,
        across: Int32,
        split_down: Int32,
        split_across: Int32,
        nq: Int32,
        nk: Int32,
        num_words: Int32,
        all_blocks: Int32,
        tables: Int32,
        numbered: Int32,
        has_own: Int32,
        known: Int32,
        patterns: Int32,
        own_heads: Int32,
        heads: Int32,
        group: Int32,
        stacked: Int32,
        stream,
    ):
        """Launch on the stream. counts and partials are begins and own_begins to fill by."""
        sizes = (rows, cols, height, width, q_len, kv_len, down, across, split_down, split_across)
        sizes = (*sizes, nq, nk, num_words, all_blocks, tables, numbered, has_own, known)
        sizes = (*sizes, patterns, own_heads, heads, group, stacked)
        data = (words, states, table_of, numbers)
        self.kernel(data, (counts, partials), (tiles, own, errors), sizes).launch(
            grid=(cute.ceil_div(cute.size(counts, mode=[0]), WARPS), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, data, sums, lists, sizes):
        """One line for each warp."""
        s = Sizes(*sizes)
        counts, partials = sums
        lane = cute.arch.lane_idx()
        line = cute.arch.block_idx()[0] * WARPS + cute.arch.warp_idx()
        if line < cute.size(counts, mode=[0]):
            candidates = s.cols if s.stacked == 0 else s.rows * s.group
            found, own = Int32(0), Int32(0)
            if cutlass.const_expr(self.fill):
                found, own = counts[line], partials[line]
            before = (Int32(1) << lane) - 1
            for i in cutlass.range(cute.ceil_div(candidates, 32), unroll=4):
                place = self.place(line, i * 32 + lane, candidates, s)
                exists, partial, state, blocks = self.tile(data, place, s)
                here = cute.arch.vote_ballot_sync(exists != 0)
                cut = cute.arch.vote_ballot_sync(partial != 0)
                if cutlass.const_expr(self.fill):
                    if exists != 0:
                        slot = own + cute.arch.popc(cut & before)
                        where = found + cute.arch.popc(here & before)
                        values = (partial, state, blocks, slot)
                        self.put(lists, place, where, values, s)
                found += cute.arch.popc(here)
                own += cute.arch.popc(cut)
            if cutlass.const_expr(not self.fill):
                if lane == 0:
                    counts[line], partials[line] = found, own

    @cute.jit
    def place(self, line, candidate, candidates, s):
        """Pattern, row, column, and name in the list of a candidate; a pattern below 0: none."""
        pattern, row, col, name = line // s.rows, line % s.rows, candidate, candidate
        if s.stacked != 0:
            stack, head = line // s.cols, candidate // s.rows
            query_head = stack % s.stacked * s.group + head
            pattern = stack // s.stacked * s.own_heads + query_head * s.own_heads // s.heads
            row, col = candidate % s.rows, line % s.cols
        return (pattern if candidate < candidates else Int32(-1)), row, col, name

    @cute.jit
    def tile(self, data, place, s):
        """Whether a tile exists, whether it is partial, its state in the table, and its blocks."""
        words, states, table_of, numbers = data
        pattern, row, col, _ = place
        exists, partial, state, blocks = Int32(0), Int32(0), Int32(FULL), s.all_blocks
        if pattern >= 0:
            exists = Int32(1)
            if s.words != 0:
                blocks, exists = self.blocks(words, pattern, row, col, s)
            if s.tables != 0 and exists != 0:
                table = table_of[pattern]
                state = states[table, row, col]
                exists = Int32(0) if state == EMPTY else exists
            partial = Int32(0) if state == FULL and blocks == s.all_blocks else Int32(1)
            if s.numbered != 0 and exists != 0:
                first, key = row * s.height, col * s.width
                end = cutlass.min(first + s.height, s.q_len) - 1
                key_end = cutlass.min(key + s.width, s.kv_len) - 1
                table = pattern if s.numbered > 1 else Int32(0)
                low, high = numbers[table, first], numbers[table, end]
                key_low, key_high = numbers[table, key], numbers[table, key_end]
                if low > key_high or key_low > high:
                    exists = Int32(0)
                elif low != high or key_low != key_high:
                    partial = Int32(1)
            partial = partial * exists
        return exists, partial, state, blocks

    @cute.jit
    def blocks(self, words, pattern, row, col, s):
        """The set of a tile's blocks that are chosen, or beyond the end, and whether any is."""
        found, any_chosen = Int32(0), Int32(0)
        top, left = row // s.split_down * s.down, col // s.split_across * s.across
        for i in cutlass.range(s.down, unroll=1):
            for j in cutlass.range(s.across, unroll=1):
                bit = Int32(1)
                if top + i < s.nq and left + j < s.nk:
                    word = words[pattern * s.nq + top + i, (left + j) // 32]
                    bit = word >> (left + j) % 32 & 1
                    any_chosen = any_chosen | bit
                found = found | bit << (i * s.across + j)
        return found, any_chosen

    @cute.jit
    def put(self, lists, place, where, values, s):
        """Write a tile to the list, and what its own bit tile is made of."""
        tiles, own, errors = lists
        pattern, row, col, name = place
        partial, state, blocks, slot = values
        entry = Int32(FULL)
        if partial != 0:
            entry = state
            if blocks != s.all_blocks:  # sets follow the bit tiles of the table, for each of them
                entry = s.known + ((state + 1) * (s.all_blocks + 1)) + blocks
            if s.own != 0:
                entry = Int32(FULL)
                if slot < cute.size(own, mode=[0]):
                    entry = slot
                    fields = (pattern * s.rows + row, col, state, blocks)
                    for i in cutlass.range_constexpr(4):
                        own[slot, i] = fields[i]
                else:
                    top = row // s.split_down * s.down
                    for i in cutlass.range(top, cutlass.min(top + s.down, s.nq), unroll=1):
                        errors[pattern * s.nq + i] = Uint8(4)
        if where < cute.size(tiles, mode=[0]) - 1:
            tiles[where, 0], tiles[where, 1] = name, entry


class OwnBits:
    """A CTA for each bit tile of its own: bits in fragment order (see kernels.fragment).

    own: As of `ListTiles`. counts: int32 (4,); the last is the number of bit tiles.
    mask_bits: Bit tiles of the mask's table in the same order, int32 (known, height / 64, 128, 2).
    bits: int32 (most, height / 64, 128, 2); heights are of keys where lines are columns.
    """

    @cute.jit
    def __call__(
        self,
        own: cute.Tensor,
        counts: cute.Tensor,
        numbers: cute.Tensor,
        mask_bits: cute.Tensor,
        bits: cute.Tensor,
        rows: Int32,
        height: Int32,
        width: Int32,
        q_len: Int32,
        kv_len: Int32,
        down: Int32,
        across: Int32,
        numbered: Int32,
        all_blocks: Int32,
        stacked: Int32,
        stream,
    ):
        """Launch on the stream."""
        sizes = (rows, height, width, q_len, kv_len, down, across, numbered, all_blocks, stacked)
        self.kernel(own, counts, numbers, mask_bits, bits, sizes).launch(
            grid=(cute.size(bits, mode=[0]), 1, 1), block=(128, 1, 1), stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        own: cute.Tensor,
        counts: cute.Tensor,
        numbers: cute.Tensor,
        mask_bits: cute.Tensor,
        bits: cute.Tensor,
        sizes,
    ):
        """One bit tile."""
        slot, thread = cute.arch.block_idx()[0], cute.arch.thread_idx()[0]
        rows, height, width, _, _, down, across, numbered, _, _ = sizes
        if slot < counts[3]:
            row, col, state, blocks = (own[slot, i] for i in range(4))
            table = row // rows if numbered > 1 else Int32(0)
            corner = (row % rows * height, col * width, table)
            sides = (height // down, width // across)
            lines = 16 * (thread // 32) + thread % 32 // 4
            for group in cutlass.range(cute.size(bits, mode=[1]), unroll=1):
                for n in cutlass.range_constexpr(2):
                    line = group * 64 + lines + 8 * n
                    word = Int32(-1)
                    if state >= 0:
                        word = mask_bits[state, group, thread, n]
                    place = (line, 2 * (thread % 4))
                    bits[slot, group, thread, n] = word & self.word(
                        numbers, place, corner, sides, blocks, sizes
                    )

    @cute.jit
    def word(self, numbers, place, corner, sides, blocks, sizes):
        """32 bits of a line: columns 8 j + place[1] and the next one, for j in 0..15."""
        _, height, width, q_len, kv_len, _, across, numbered, all_blocks, stacked = sizes
        line, first = place
        reach = width if stacked == 0 else height
        result = Int32(0)
        for j in cutlass.range(16, unroll=4):
            for c in cutlass.range_constexpr(2):
                column = 8 * j + first + c
                if column < reach:
                    q, kv = (line, column) if stacked == 0 else (column, line)
                    allowed = Int32(1)
                    if blocks != all_blocks:
                        cell = q // sides[0] * across + kv // sides[1]
                        allowed = blocks >> cell & 1
                    if numbered != 0:
                        query = cutlass.min(corner[0] + q, q_len - 1)
                        key = cutlass.min(corner[1] + kv, kv_len - 1)
                        same = numbers[corner[2], query] == numbers[corner[2], key]
                        allowed = allowed if same else Int32(0)
                    result = result | allowed << (2 * j + c)
        return result


def _ints(*shape, dtype=Int32):
    order = tuple(reversed(range(len(shape))))
    return cute.runtime.make_fake_compact_tensor(dtype, shape, stride_order=order)


def compile_block_bits(kind: str, arch: str):
    """Compile for data of "int64", "int32" or "table", whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    dtype = {"int64": cutlass.Int64, "int32": Int32, "table": Uint8}[kind]
    rows, size = cute.sym_int(), cute.sym_int
    arguments = (_ints(rows, size(), dtype=dtype), _ints(rows, size()), _ints(rows, dtype=Uint8))
    return compile_kernel(BlockBits(kind == "table"), (*arguments, Int32(1), Int32(1)), arch)


def compile_list_tiles(fill: bool, arch: str):
    """Compile, whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    lines, size = cute.sym_int(), cute.sym_int
    arguments = (
        *(_ints(size(), size()), _ints(size(), size(), size())),
        *(_ints(size()), _ints(size(), size())),
        *(_ints(lines), _ints(lines), _ints(size(), 2), _ints(size(), 4)),
        _ints(size(), dtype=Uint8),
        *(Int32(1) for _ in Sizes._fields),
    )
    return compile_kernel(ListTiles(fill), arguments, arch)


def compile_own_bits(arch: str):
    """Compile, whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    size, groups = cute.sym_int, cute.sym_int()
    arguments = (
        *(_ints(size(), 4), _ints(4), _ints(size(), size())),
        *(_ints(size(), groups, 128, 2), _ints(size(), groups, 128, 2)),
        *(Int32(1) for _ in range(10)),
    )
    return compile_kernel(OwnBits(), arguments, arch)
