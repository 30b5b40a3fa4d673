"""Kernels that list the tiles of a layout of data by rows, or by columns for the backward pass.

    indices or table -> BlockBits -> words, a bit for each block
    words, mask -> ListTiles -> lists -> WorkItems (work_items.py), OwnBits (document_bits.py)

A line is a row of tiles of a pattern, or a column of tiles with the query heads of a key head in
turn. Each lane of a warp looks at one of 32 candidates.
"""

from typing import NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint8, cute

THREADS = 128
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
    own_heads, heads: Heads with patterns of their own, and query heads.
    group: Query heads of a key head.
    stacked: Key heads with lines of their own, by columns.
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
    own_heads: Int32
    heads: Int32
    group: Int32
    stacked: Int32


class BlockBits:
    """A warp for each block row: its blocks as bits, and whether an index is out of range.

    data: Indices (patterns x nq, k), int64 or int32, or bools (patterns x nq, nk) as uint8.
    words: int32 (patterns x nq, ceil(nk / 32)).
    errors: uint8 (patterns x nq,): 1 is added where an index is none of -1 and 0..nk - 1. Such rows
        have no blocks.
    """

    def __init__(self, from_table: bool) -> None:
        self.from_table = from_table

    @cute.jit
    def __call__(
        self, data: cute.Tensor, words: cute.Tensor, errors: cute.Tensor, blocks: Int32, stream
    ):
        """Launch on the stream. blocks: nk."""
        self.kernel(data, words, errors, blocks).launch(
            grid=(cute.ceil_div(cute.size(words, mode=[0]), WARPS), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(self, data: cute.Tensor, words: cute.Tensor, errors: cute.Tensor, blocks: Int32):
        """One block row for each warp."""
        row = cute.arch.block_idx()[0] * WARPS + cute.arch.warp_idx()
        if row < cute.size(words, mode=[0]):
            if cutlass.const_expr(self.from_table):
                self.of_table(data, words, row, blocks)
            else:
                self.of_indices(data, words, errors, row, blocks)

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
    def of_indices(self, data, words, errors, row, blocks):
        """The words of a row of indices, or an error. Each lane makes one word of 32."""
        lane = cute.arch.lane_idx()
        count, wrong = cute.size(data, mode=[1]), Int32(0)
        for i in cutlass.range(lane, count, 32, unroll=1):
            index = data[row, i]
            if index < -1 or index >= blocks:
                wrong = Int32(1)
        wrong = cute.arch.vote_ballot_sync(wrong != 0)
        if wrong != 0 and lane == 0:
            errors[row] = (errors[row].to(Int32) | 1).to(Uint8)
        for n in cutlass.range(cute.ceil_div(cute.size(words, mode=[1]), 32), unroll=1):
            i, word = n * 32 + lane, Int32(0)
            for j in cutlass.range(cute.ceil_div(count, 32), unroll=1):
                block = Int32(-1)
                if j * 32 + lane < count:
                    index = data[row, j * 32 + lane]
                    if index >= 0 and index < blocks:
                        block = index.to(Int32)
                for source in cutlass.range_constexpr(32):
                    other = cute.arch.shuffle_sync(block, source)
                    bit = Int32(1) << (other & 31)
                    word = word | (bit if other >> 5 == i else Int32(0))
            if i < cute.size(words, mode=[1]):
                words[row, i] = word if wrong == 0 else Int32(0)


class ListTiles:
    """A warp for each line: its tiles, in the next free stretch of the list.

    Tiles of a line are in order; where its stretch lies is up to the timing.

    words: As of `BlockBits`. states: Table of a mask, int32 (tables, rows, cols). table_of: Its
    pattern for each pattern, int32 (patterns,). numbers: Document of each token, int32 (1 or
    patterns, tokens), ascending.
    begins, counts, partials: First tile, tiles, and partial tiles of each line, int32 (lines,).
    tiles: Column (row, with the heads stacked) and bit tile or -1, int32 (capacity + 1, 2). The
        last one is zeros.
    own: For each bit tile of its own pattern x rows + row, column, state in the table, and set of
        blocks, int32 (most, 4).
    used: Tiles in the list, and bit tiles of their own, int32 (2,), zeros at first.
    errors: uint8 (patterns x nq,): 2 is added where a tile, 4 where a bit tile finds no space.

    With `fit` the lines are block rows, and nothing is listed: `tiles` are the words of the blocks
    of which the mask leaves something, int32 (lines, ceil(nk / 32)).
    """

    def __init__(self, by_column: bool, fit: bool = False) -> None:
        self.by_column, self.fit = by_column, fit

    @cute.jit
    def __call__(
        self,
        words: cute.Tensor,
        states: cute.Tensor,
        table_of: cute.Tensor,
        numbers: cute.Tensor,
        begins: cute.Tensor,
        counts: cute.Tensor,
        partials: cute.Tensor,
        tiles: cute.Tensor,
        own: cute.Tensor,
        used: cute.Tensor,
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
        own_heads: Int32,
        heads: Int32,
        group: Int32,
        stacked: Int32,
        stream,
    ):
        """Launch on the stream."""
        sizes = (rows, cols, height, width, q_len, kv_len, down, across, split_down, split_across)
        sizes = (*sizes, nq, nk, num_words, all_blocks, tables, numbered, has_own, known)
        sizes = (*sizes, own_heads, heads, group, stacked)
        data = (words, states, table_of, numbers)
        self.kernel(data, (begins, counts, partials), (tiles, own, used, errors), sizes).launch(
            grid=(cute.ceil_div(cute.size(counts, mode=[0]), WARPS), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, data, lines, lists, sizes):
        """One line for each warp."""
        s = Sizes(*sizes)
        begins, counts, partials = lines
        tiles, _, used, _ = lists
        lane = cute.arch.lane_idx()
        line = cute.arch.block_idx()[0] * WARPS + cute.arch.warp_idx()
        if line < cute.size(counts, mode=[0]):
            zero, ends = (Int32(0), Int32(0)), (Int32(0), s.rows if self.by_column else s.cols)
            found, own, ends = self.walk(data, lists, line, (zero, ends), s, True)
            if lane == 0:
                counts[line], partials[line] = found, own
            if cutlass.const_expr(not self.fit):
                first, slot = Int32(0), Int32(0)
                if lane == 0:
                    if line == 0:
                        last = cute.size(tiles, mode=[0]) - 1
                        tiles[last, 0], tiles[last, 1] = Int32(0), Int32(0)
                    first = _add(used.iterator, found)
                    if own > 0 and s.own != 0:
                        slot = _add(used.iterator + 1, own)
                    begins[line] = first
                start = (cute.arch.shuffle_sync(first, 0), cute.arch.shuffle_sync(slot, 0))
                if found > 0:
                    self.walk(data, lists, line, (start, ends), s, False)

    @cute.jit
    def walk(self, data, lists, line, start, s, first: cutlass.Constexpr):
        """Look at the candidates of a line, 32 at a time: count the tiles, or list them.

        start: Sums to begin with, and the ends of the candidates, which the first walk finds.

        Returns:
            Number of tiles and of partial tiles, added to those of `start`, and the ends.
        """
        sums, ends = start
        found, own = sums
        if cutlass.const_expr(self.by_column):
            stack, col = line // s.cols, line % s.cols
            for head in cutlass.range(s.group, unroll=1):
                query_head = stack % s.stacked * s.group + head
                pattern = stack // s.stacked * s.own_heads + query_head * s.own_heads // s.heads
                of_line = self.of_line(data, pattern, col, s)
                find = s.numbered > 1  # heads of a group may have ends of their own
                if cutlass.const_expr(first):
                    find = find or head == 0
                if find:
                    ends = self.candidates(data[3], of_line, s)
                found, own = self.some(
                    data, lists, (line, of_line, head * s.rows), ends, (found, own), s, first
                )
        else:
            of_line = self.of_line(data, line // s.rows, line % s.rows, s)
            if cutlass.const_expr(first and not self.fit):
                ends = self.candidates(data[3], of_line, s)
            found, own = self.some(
                data, lists, (line, of_line, Int32(0)), ends, (found, own), s, first
            )
        return found, own, ends

    @cute.jit
    def of_line(self, data, pattern, at, s):
        """Pattern, row or column, the table of the mask and of the numbers, and the documents."""
        _, _, table_of, numbers = data
        mask_table, table = Int32(0), pattern if s.numbered > 1 else Int32(0)
        low, high = Int32(0), Int32(0)
        if s.tables != 0:
            mask_table = table_of[pattern]
        if s.numbered != 0:
            low, high = self.documents(numbers, table, at, self.by_column, s)
        return pattern, at, mask_table, table, low, high

    @cute.jit
    def documents(self, numbers, table, at, of_keys: cutlass.Constexpr, s):
        """The documents of the first and last token of a row, or column, of tiles."""
        side, length = (s.width, s.kv_len) if of_keys else (s.height, s.q_len)
        end = cutlass.min(at * side + side, length)
        return numbers[table, at * side], numbers[table, end - 1]

    @cute.jit
    def candidates(self, numbers, of_line, s):
        """The ends of the columns, or rows, of tiles that have tokens of a line's documents.

        Documents ascend, so a warp finds both ends in few steps, each of 32 probes.
        """
        total = s.rows if self.by_column else s.cols
        begin, end = Int32(0), total
        if s.numbered != 0:
            _, _, _, table, low, high = of_line
            lane, left, right = cute.arch.lane_idx(), total, total
            end = Int32(0)
            while left > 0 or right > 0:  # unknown ones from `begin`, and from `end`, on
                steps = (cute.ceil_div(left, 32), cute.ceil_div(right, 32))
                probes = (lane * steps[0], lane * steps[1])
                at = cutlass.min(begin + probes[0], total - 1)
                _, last = self.documents(numbers, table, at, not self.by_column, s)
                at = cutlass.min(end + probes[1], total - 1)
                first, _ = self.documents(numbers, table, at, not self.by_column, s)
                before = probes[0] < left and last < low
                within = probes[1] < right and first <= high
                number = cute.arch.popc(cute.arch.vote_ballot_sync(before))
                begin, left = self.narrowed(begin, left, steps[0], number)
                number = cute.arch.popc(cute.arch.vote_ballot_sync(within))
                end, right = self.narrowed(end, right, steps[1], number)
        return begin, end

    @cute.jit
    def narrowed(self, first, unknown, step, number):
        """The first unknown one, and how many are, once `number` probes are known to be before."""
        passed = cutlass.max(number - 1, 0) * step + cutlass.min(number, 1)
        rest = cutlass.min(unknown - passed, step - 1)
        return first + passed, rest if number > 0 else Int32(0)

    @cute.jit
    def some(self, data, lists, coord, ends, sums, s, first: cutlass.Constexpr):
        """Count, or list, the tiles of a line with a pattern. Returns the new sums."""
        lane = cute.arch.lane_idx()
        before = (Int32(1) << lane) - 1
        line, of_line, name = coord
        found, own = sums
        begin, end = ends
        for i in cutlass.range(cute.ceil_div(end - begin, 32), unroll=4):
            at = begin + i * 32 + lane
            exists, partial, state, blocks = self.tile(data, of_line, at, at < end, s)
            here = cute.arch.vote_ballot_sync(exists != 0)
            cut = cute.arch.vote_ballot_sync(partial != 0)
            if cutlass.const_expr(self.fit):
                if lane == 0:
                    lists[0][line, i] = here
            elif cutlass.const_expr(not first):
                if exists != 0:
                    slot = own + cute.arch.popc(cut & before)
                    where = found + cute.arch.popc(here & before)
                    goal = (of_line[0], of_line[1], at, name + at)
                    if cutlass.const_expr(self.by_column):
                        goal = (of_line[0], at, of_line[1], name + at)
                    self.put(lists, goal, where, (partial, state, blocks, slot), s)
            found, own = found + cute.arch.popc(here), own + cute.arch.popc(cut)
        return found, own

    @cute.jit
    def tile(self, data, of_line, at, inside, s):
        """Whether a tile exists, whether it is partial, its state in the table, and its blocks."""
        words, states, _, numbers = data
        pattern, line, mask_table, table, low, high = of_line
        row, col = (at, line) if self.by_column else (line, at)
        exists, partial, state, blocks = Int32(0), Int32(0), Int32(FULL), s.all_blocks
        if inside:
            exists = Int32(1)
            if s.words != 0:
                blocks, exists = self.blocks(words, pattern, row, col, s)
            if s.tables != 0 and exists != 0:
                state = states[mask_table, row, col]
                exists = Int32(0) if state == EMPTY else exists
            partial = Int32(0) if state == FULL and blocks == s.all_blocks else Int32(1)
            if s.numbered != 0 and exists != 0:
                first, last = self.documents(numbers, table, at, not self.by_column, s)
                if low > last or first > high:
                    exists = Int32(0)
                elif low != high or first != last:
                    partial = Int32(1)
            partial = partial * exists
        return exists, partial, state, blocks

    @cute.jit
    def blocks(self, words, pattern, row, col, s):
        """The set of a tile's blocks that are chosen, or beyond the end, and whether any is."""
        found, any_chosen = Int32(0), Int32(0)
        top, left = (
            row * s.down,
            col * s.across,
        )  # blocks are split, or tiles hold several: not both
        if s.split_down > 1:
            top = row // s.split_down
        if s.split_across > 1:
            left = col // s.split_across
        for i in cutlass.range(s.down, unroll=1):
            for j in cutlass.range(s.across, unroll=1):
                bit, block = Int32(1), left + j
                if top + i < s.nq and block < s.nk:
                    word = words[pattern * s.nq + top + i, block >> 5]
                    bit = word >> (block & 31) & 1
                    any_chosen = any_chosen | bit
                found = found | bit << (i * s.across + j)
        return found, any_chosen

    @cute.jit
    def put(self, lists, coord, where, values, s):
        """Write a tile to the list, with the source of its own bit tile."""
        tiles, own, _, errors = lists
        pattern, row, col, name = coord
        partial, state, blocks, slot = values
        entry, wrong = Int32(FULL), Int32(0)
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
                    wrong = Int32(4)
        if where < cute.size(tiles, mode=[0]) - 1:
            tiles[where, 0], tiles[where, 1] = name, entry
        else:
            wrong = wrong | 2
        if wrong != 0:
            top = row * s.down
            if s.split_down > 1:
                top = row // s.split_down
            for i in cutlass.range(top, cutlass.min(top + s.down, s.nq), unroll=1):
                at = pattern * s.nq + i
                errors[at] = (errors[at].to(Int32) | wrong).to(Uint8)


@cute.jit
def _add(goal, number):
    """Add to a number in memory. Returns its value before."""
    return cute.arch.atomic_add(goal, number, sem="relaxed", scope="gpu")


def ints(*shape, dtype=Int32):
    """A compact tensor without memory, for compilation."""
    order = tuple(reversed(range(len(shape))))
    return cute.runtime.make_fake_compact_tensor(dtype, shape, stride_order=order)


def compile_block_bits(kind: str, arch: str):
    """Compile for data of "int64", "int32" or "table", whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    dtype = {"int64": Int64, "int32": Int32, "table": Uint8}[kind]
    rows, size = cute.sym_int(), cute.sym_int
    arguments = (ints(rows, size(), dtype=dtype), ints(rows, size()), ints(rows, dtype=Uint8))
    return compile_kernel(BlockBits(kind == "table"), (*arguments, Int32(1)), arch)


def compile_list_tiles(by_column: bool, fit: bool, arch: str):
    """Compile, whether or not there is a GPU."""
    from sparse_flash.kernels.compile import compile_kernel

    lines, size = cute.sym_int(), cute.sym_int
    arguments = (
        *(ints(size(), size()), ints(size(), size(), size())),
        *(ints(size()), ints(size(), size())),
        *(ints(lines) for _ in range(3)),
        *(ints(lines, size()) if fit else ints(size(), 2), ints(size(), 4), ints(2)),
        ints(size(), dtype=Uint8),
        *(Int32(1) for _ in Sizes._fields),
    )
    return compile_kernel(ListTiles(by_column, fit), arguments, arch)
