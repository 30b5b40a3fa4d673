"""Tiles of a layout defined by data, listed on the device: no shape depends on a value.

All PyTorch operations here run without a host synchronization. Tensors have worst-case sizes. Rows
that do not fit are marked as invalid; no tile is dropped silently.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from sparse_flash.masks.assemble import FULL_TILE
from sparse_flash.masks.device_within import (
    EMPTY_TILE,
    Evaluated,
    TileTable,
    Uncut,
    cut_of,
    invalid_documents,
)
from sparse_flash.masks.io import Lengths
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from sparse_flash.masks.mask import Mask

# Reasons why a block row is invalid; bits of `errors`.
OUT_OF_RANGE, TILES, BIT_TILES, DOCUMENTS = 1, 2, 4, 8
_DICTIONARY = 1 << 24  # largest table of bit tiles for every set of blocks, bytes
_MOST_CELLS = 32  # blocks in a larger tile: bits of an integer that stands for a set


@dataclass(frozen=True, eq=False)
class Source:
    """Everything that determines the tiles: a snapshot of the data, and static parameters.

    Args:
        lengths: q_len, kv_len, (block_q, block_kv).
        heads: Batch entries and heads with rows of their own: (1 or b, 1 or h_kv or h). P is
            their product.
        indices: Block columns of each block row as given, int (P, nq, k); or None.
        table: Whether each block is chosen, bool (P, nq, nk); or None. Without both, all are.
        within: Mask that restricts the chosen blocks, also a snapshot.
        capacity: Maximum numbers of tiles and bit tiles, at the granularity of the blocks; None:
            the worst case.
        device: Device of the data.
    """

    lengths: Lengths
    heads: tuple[int, int]
    indices: Tensor | None
    table: Tensor | None
    within: Mask | None
    capacity: tuple[int, int] | None
    device: torch.device

    @property
    def num_patterns(self) -> int:
        """Number of batch entries times heads with rows of their own."""
        return self.heads[0] * self.heads[1]

    @functools.cached_property
    def static(self) -> StaticSource:
        """The properties that do not depend on the data."""
        width = None if self.indices is None else self.indices.shape[2]
        return StaticSource(self.lengths, self.heads, width, self.table is not None, self.capacity)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.static.num_blocks

    @property
    def longest(self) -> int:
        """The most tiles of a block row."""
        return self.static.longest

    @property
    def may_fail(self) -> bool:
        """Whether a row may be other than asked for."""
        evaluated = self.within is not None and self.within.on_device
        return self.indices is not None or self.capacity is not None or evaluated

    def listed(self, tile: tuple[int, int]) -> DeviceTiles:
        """The tiles of this size: see `tiles_of`."""
        chosen = _chosen(self)
        if self.capacity is None:
            return tiles_of(self, chosen, tile)
        fitting = tiles_of(self, chosen, self.lengths[2])
        if tile == self.lengths[2]:
            return fitting
        return tiles_of(self, _remaining(self, chosen, fitting.errors), tile)


class StaticSource(NamedTuple):
    """The properties of a `Source` that do not depend on its data.

    lengths: As of the source.
    heads: As of the source.
    width: Number of indices in a block row; None: there are no indices.
    has_table: Whether there is a table of blocks.
    capacity: As of the source.
    """

    lengths: Lengths
    heads: tuple[int, int]
    width: int | None
    has_table: bool
    capacity: tuple[int, int] | None

    @property
    def num_patterns(self) -> int:
        """Batch entries and heads with rows of their own."""
        return self.heads[0] * self.heads[1]

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Numbers of block rows and block columns."""
        q_len, kv_len, block = self.lengths
        return -(-q_len // block[0]), -(-kv_len // block[1])

    @property
    def num_words(self) -> int:
        """Words of 32 blocks in a block row; 0 where all blocks are chosen."""
        every = self.width is None and not self.has_table and self.capacity is None
        return 0 if every else -(-self.num_blocks[1] // 32)

    @property
    def longest(self) -> int:
        """Maximum number of tiles in a block row."""
        columns = self.num_blocks[1]
        if self.capacity is not None:
            columns = min(columns, self.capacity[0])
        return columns if self.width is None else min(columns, self.width)

    def capacities(self, tile: tuple[int, int], evaluated: bool) -> tuple[int, int]:
        """Maximum numbers of tiles of this size, and of bit tiles if a mask is evaluated."""
        grid = grid_of(self.lengths, tile)
        assert grid is not None
        longest = min(grid.cols, self.longest * grid.down * grid.split_across)
        size = self.num_patterns * grid.rows * longest
        if self.capacity is not None:
            size = min(size, self.capacity[0] * grid.split_down * grid.split_across)
        if not evaluated:
            return size, size
        parts = grid.split_down * grid.split_across
        most = 4 * self.num_patterns * (grid.rows + grid.cols)
        if self.capacity is not None:
            given = self.capacity[1] * parts
            most = given if grid.cells == parts == 1 else max(given, most)
        return size, min(size, most)


class Chosen(NamedTuple):
    """The blocks chosen by the data.

    columns: Block columns of each block row, int32 (P, nq, k), or None. Chosen ones ascend;
        num_block_cols stands for no block and may come between them.
    table: Whether each block is chosen, bool (P, nq, nk); or None. Without both, all are.
    errors: Reasons why rows are invalid, uint8 (P, nq). Invalid rows have no blocks.
    """

    columns: Tensor | None
    table: Tensor | None
    errors: Tensor


def _chosen(source: Source) -> Chosen:
    """The chosen blocks, before the capacity is applied."""
    rows, num_blocks = source.num_blocks
    indices, columns = source.indices, None
    if indices is None:
        shape = (source.num_patterns, rows)
        errors = torch.zeros(shape, dtype=torch.uint8, device=source.device)
    else:
        exists = (indices >= 0) & (indices < num_blocks)
        bad = (~exists & (indices != -1)).any(2)
        columns = torch.where(exists & ~bad[..., None], indices, num_blocks).int()
        if columns.shape[2] > 1:
            columns = columns.sort(2).values
            repeated = pad(columns[..., 1:] == columns[..., :-1], (1, 0))
            columns = columns.masked_fill_(repeated, num_blocks)
        errors = bad * torch.full((), OUT_OF_RANGE, dtype=torch.uint8, device=source.device)
    wrong = invalid_documents(source.within)
    if wrong is not None:
        errors = errors | wrong * torch.full_like(errors[:1, :1], DOCUMENTS)
    return Chosen(columns, source.table, errors)


def _remaining(source: Source, chosen: Chosen, errors: Tensor) -> Chosen:
    """The blocks of rows without errors of which the mask leaves something.

    So tiles of another size are never more than the capacity, which counts these blocks.
    """
    columns, num_blocks = chosen.columns, source.num_blocks[1]
    every = torch.arange(num_blocks, device=source.device) if columns is None else columns
    cut = cut_of(source.within, source.lengths, source.lengths[2], source.heads, source.device)
    remain = (cut.states(every) != EMPTY_TILE) & (errors == 0)[..., None]
    if columns is not None:
        return Chosen(columns.masked_fill(~remain, num_blocks), None, errors)
    table = remain if chosen.table is None else chosen.table & remain
    return Chosen(None, table.expand(-1, -1, num_blocks), errors)


class DeviceTiles(NamedTuple):
    """Tiles of one size, in tensors of worst-case size.

    starts: First tile of each row of each pattern, and the end, int32 (P x rows + 1,).
    tiles: Column, and bit tile or -1 (full), int32 (capacity + 1, 2); zeros after the end.
    bit_tiles: uint8 (N, height, ceil(width / 8)).
    errors: Reasons why rows are invalid, uint8 (P, nq), capacity included.
    fragments: Cache of `bit_tiles` in the kernels' register order, if they are those of a mask.
    """

    starts: Tensor
    tiles: Tensor
    bit_tiles: Tensor
    errors: Tensor
    fragments: dict[Hashable, Tensor] | None = None


class Grid(NamedTuple):
    """How tiles of another size divide the blocks; each side is a multiple of the other.

    rows, cols: Number of tiles.
    down, across: Blocks in a tile.
    split_down, split_across: Tiles in a block.
    """

    rows: int
    cols: int
    down: int
    across: int
    split_down: int
    split_across: int

    @property
    def cells(self) -> int:
        """Blocks in a tile."""
        return self.down * self.across


@functools.lru_cache(256)
def grid_of(lengths: Lengths, tile: tuple[int, int]) -> Grid | None:
    """The grid of tiles of this size; None if they do not divide the blocks evenly.

    >>> grid_of((1000, 1000, (64, 256)), (128, 128))
    Grid(rows=8, cols=8, down=2, across=1, split_down=1, split_across=2)
    """
    (q_len, kv_len, block) = lengths
    if any(max(a, b) % min(a, b) for a, b in zip(block, tile, strict=True)):
        return None
    down, across = (max(1, t // b) for t, b in zip(tile, block, strict=True))
    split = (max(1, b // t) for t, b in zip(tile, block, strict=True))
    if down * across > _MOST_CELLS or (across > 1 and block[1] % 8):
        return None
    return Grid(-(-q_len // tile[0]), -(-kv_len // tile[1]), down, across, *split)


class _Found(NamedTuple):
    """Candidates of each row of tiles, `(P, rows, width)`; several may refer to one tile.

    column: Column of the tile, int64, broadcastable.
    take: Whether the candidate is the first of its tile, bool.
    sets: Bit masks whose sum over the candidates of a tile is the set of its blocks, int64; None
        if a tile has at most one block, or all blocks are chosen.
    """

    column: Tensor
    take: Tensor
    sets: Tensor | None = None


def tiles_of(source: Source, chosen: Chosen, tile: tuple[int, int]) -> DeviceTiles:
    """List the tiles of a source, of the size of its blocks or of a size that divides them.

    Rows with more tiles than the capacity are marked as invalid and have no tiles.
    """
    grid = grid_of(source.lengths, tile)
    assert grid is not None, (source.lengths, tile)
    if chosen.columns is not None:
        found = _of_columns(source, chosen.columns, grid)
    else:
        found = _of_table(source, chosen.table, grid)
    cut = cut_of(source.within, source.lengths, tile, source.heads, found.column.device)
    state, take, errors = cut.states(found.column), found.take, chosen.errors
    if not isinstance(cut, Uncut):
        take = take & (state != EMPTY_TILE)
    evaluated = isinstance(cut, Evaluated) and found.sets is None
    size, num_bit_tiles = source.static.capacities(tile, evaluated)
    fitting = take
    if evaluated:
        fits, errors = _fit(take & (state >= 0), num_bit_tiles, BIT_TILES, grid, errors)
        fitting = fitting & fits
    if source.capacity is not None:
        fits, errors = _fit(take, size, TILES, grid, errors)
        fitting = fitting & fits
    take = fitting
    rank = take.flatten().cumsum(0)
    starts = pad(rank.view(-1, take.shape[2])[:, -1], (1, 0)).int()
    slot = torch.where(take.flatten(), rank - 1, size + 1)
    listed = torch.stack([x.expand(take.shape).int() for x in (found.column, state)], 3)
    tiles = torch.zeros(size + 2, 2, dtype=torch.int32, device=take.device)
    tiles[slot] = listed.view(-1, 2)
    sets = None
    if found.sets is not None:
        kept = torch.where(state != EMPTY_TILE, found.sets, 0)
        kept = torch.where(take.any(2, keepdim=True), kept, 0).flatten()
        sets = torch.zeros(size + 2, dtype=torch.int64, device=take.device)
        sets.scatter_add_(0, (rank - 1).clamp(min=0), kept)
    tiles = tiles[: size + 1]
    if isinstance(cut, Evaluated):
        bit_tiles = _evaluate(tiles, starts, cut, sets, num_bit_tiles, grid)
    elif sets is not None:
        bit_tiles = _cut_by_sets(tiles, sets[:size], cut, grid)
    else:
        fragments = None if isinstance(cut, Uncut) else cut.fragments
        return DeviceTiles(starts, tiles, cut.bit_tiles, errors, fragments)
    return DeviceTiles(starts, tiles, bit_tiles, errors)


def _of_columns(source: Source, columns: Tensor, grid: Grid) -> _Found:
    num_blocks = source.num_blocks[1]
    patterns, rows, k = columns.shape
    if grid.down > 1:
        columns = pad(columns, (0, 0, 0, grid.rows * grid.down - rows), value=num_blocks)
        columns = columns.view(patterns, grid.rows, grid.down * k)
    elif grid.split_down > 1:
        columns = columns[:, :, None].expand(-1, -1, grid.split_down, -1).flatten(1, 2)
        columns = columns[:, : grid.rows]
    if grid.split_across > 1:
        parts = torch.arange(grid.split_across, device=columns.device)
        column = (columns[..., None] * grid.split_across + parts).flatten(2)
    else:
        column = torch.where(columns < num_blocks, columns // grid.across, grid.cols)
    if grid.cells == 1:
        return _Found(column, column < grid.cols)
    # Index of each candidate inside its tile; sorting puts candidates of a tile side by side.
    cell = torch.arange(grid.down, device=columns.device).repeat_interleave(k)
    cell = (cell * grid.across + columns % grid.across)[..., None].expand(
        *columns.shape, grid.split_across
    )
    key = (column.long() * grid.cells + cell.flatten(2)).sort(2).values
    column = key // grid.cells
    before = pad(key[..., :-1], (1, 0), value=-1)
    exists = column < grid.cols
    take = exists & (column != torch.where(before < 0, -1, before // grid.cells))
    sets = torch.where(exists & (key != before), 1 << (key % grid.cells), 0)
    return _Found(column, take, sets + torch.where(take, _missing(source, grid, column), 0))


def _of_table(source: Source, table: Tensor | None, grid: Grid) -> _Found:
    column = torch.arange(grid.cols, device=source.device)[None, None]
    if table is None:
        shape = (source.num_patterns, grid.rows, grid.cols)
        return _Found(column, torch.ones(shape, dtype=torch.bool, device=column.device))
    for dim, (split, size) in enumerate(
        ((grid.split_down, grid.rows), (grid.split_across, grid.cols)), 1
    ):
        if split > 1:
            table = table.repeat_interleave(split, dim).narrow(dim, 0, size)
    if grid.cells == 1:
        return _Found(column, table)
    patterns, rows, cols = table.shape
    table = pad(table, (0, grid.cols * grid.across - cols, 0, grid.rows * grid.down - rows))
    cells = table.view(patterns, grid.rows, grid.down, grid.cols, grid.across)
    cell = torch.arange(grid.cells, device=column.device).view(grid.down, 1, grid.across)
    sets = (cells.long() << cell).sum((2, 4))
    take = sets > 0
    return _Found(column, take, sets + torch.where(take, _missing(source, grid, column), 0))


def _missing(source: Source, grid: Grid, column: Tensor) -> Tensor:
    """The set of blocks of a tile that lie beyond the lengths, int64 (1 or P, rows, width)."""
    blocks = source.num_blocks
    down, across = (
        range(n % side or side, side)
        for n, side in zip(blocks, (grid.down, grid.across), strict=True)
    )
    below = sum(1 << (i * grid.across + j) for i in down for j in range(grid.across))
    right = sum(1 << (i * grid.across + j) for i in range(grid.down) for j in across)
    row = torch.arange(grid.rows, device=column.device)[:, None]
    at_end = torch.where(row == grid.rows - 1, below, 0)
    return at_end | torch.where(column == grid.cols - 1, right, 0)


def _fit(
    counted: Tensor, size: int, code: int, grid: Grid, errors: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows that fit, bool (P, rows, 1), and errors of rows past `size` counted tiles."""
    if size >= counted.numel():
        return torch.ones_like(counted[..., :1]), errors
    ends = counted.sum(2).view(-1).cumsum(0).view(counted.shape[:2])
    fits = (ends <= size) | ~counted.any(2)
    beyond = ~fits
    rows = errors.shape[1]
    if grid.down > 1:
        beyond = beyond.repeat_interleave(grid.down, 1)
    elif grid.split_down > 1:
        beyond = pad(beyond, (0, rows * grid.split_down - beyond.shape[1]))
        beyond = beyond.view(len(beyond), rows, grid.split_down).any(2)
    return fits[..., None], errors | (beyond[:, :rows] * code).to(torch.uint8)


def _evaluate(
    tiles: Tensor,
    starts: Tensor,
    cut: Evaluated,
    sets: Tensor | None,
    num_bit_tiles: int,
    grid: Grid,
) -> Tensor:
    """Bit tiles of undecided tiles; writes their numbers to `tiles`, in place."""
    size, device = len(tiles) - 1, tiles.device
    index = torch.arange(size, device=device)
    partial = tiles[:-1, 1] >= 0
    if sets is not None:
        partial |= sets[:size] != (1 << grid.cells) - 1
    partial &= index < starts[-1]
    rank = partial.cumsum(0)
    entry = torch.where(partial, rank - 1, FULL_TILE)
    which = torch.zeros(num_bit_tiles + 1, dtype=torch.int64, device=device)
    which[torch.where(partial, entry, num_bit_tiles)] = index
    which = which[:num_bit_tiles]
    row = torch.searchsorted(starts, which, right=True) - 1
    packed = cut.bits(row // grid.rows, row % grid.rows, tiles[which, 0].long())
    if sets is not None:
        packed &= bits_of_sets(sets[which], grid, packed)
    tiles[:-1, 1] = entry.int()
    return packed


def _cut_by_sets(tiles: Tensor, sets: Tensor, cut: Uncut | TileTable, grid: Grid) -> Tensor:
    """Bit tiles of sets of blocks within a mask; writes their numbers to `tiles`, in place."""
    state, known = tiles[:-1, 1].long(), cut.bit_tiles
    whole = torch.cat([known.new_full((1, *known.shape[1:]), 255), known])  # indexed by state + 1
    complete = sets == (1 << grid.cells) - 1
    if (len(whole) << grid.cells) * whole[0].numel() <= _DICTIONARY:
        every = torch.arange(1 << grid.cells, device=tiles.device)
        made = bits_of_sets(every, grid, known)[None] & whole[:, None]
        entry = len(known) + ((state + 1) << grid.cells) + sets
        tiles[:-1, 1] = torch.where(complete, state, entry).int()
        return torch.cat([known, made.flatten(0, 1)])
    index = torch.arange(len(sets), device=tiles.device)
    tiles[:-1, 1] = torch.where(complete & (state < 0), state, index).int()
    whole = whole[(state + 1).clamp(max=len(known))]  # entries after the end are zero
    return bits_of_sets(sets, grid, known) & whole


def bits_of_sets(sets: Tensor, grid: Grid, like: Tensor) -> Tensor:
    """Bit tiles whose set blocks are full, uint8 (n, height, bytes) with the shape of `like`.

    Bits beyond the lengths may be 1: kernels ignore them.
    """
    height, width = like.shape[1:]
    cell = torch.arange(grid.cells, device=sets.device)
    bytes_ = ((sets[:, None] >> cell) & 1).to(torch.uint8) * 255
    shape = (len(sets), grid.down, height // grid.down, grid.across, width // grid.across)
    spread = bytes_.view(-1, grid.down, 1, grid.across, 1).expand(shape)
    return spread.reshape(len(sets), height, width)
