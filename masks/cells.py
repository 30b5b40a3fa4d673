"""Tiles cut into cells, and other tiles made of the same cells: for `retile`.

Blocks of 128 and tiles of 192 are both made of cells of 64. Few cells differ, so tiles of another
size are made by copying numbers of cells, not by looking at elements.
"""

from __future__ import annotations

import math

import torch
from sparse_flash.masks import bits, host
from sparse_flash.masks.assemble import FULL_TILE
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

_EMPTY, _FULL = 0, 1  # codes of cells; the others are in a table
_MOST = 64  # cells of a tile
_GRID = 1 << 22  # tiles that are looked up in a table of all


def cell_of(old: tuple[int, int], new: tuple[int, int]) -> tuple[int, int] | None:
    """The cells that blocks and tiles of two sizes are made of; None where they would be too small.

    >>> cell_of((128, 128), (192, 128)), cell_of((99, 128), (128, 128))
    ((64, 128), None)
    """
    cell = math.gcd(old[0], new[0]), math.gcd(old[1], new[1])
    whole_bytes = cell[1] % 8 == 0 or old[1] == new[1]
    counts = [(size[0] // cell[0]) * (size[1] // cell[1]) for size in (old, new)]
    return cell if whole_bytes and max(counts) <= _MOST else None


def retile_by_cells(
    layout: BlockLayout, block: tuple[int, int], cell: tuple[int, int]
) -> BlockLayout:
    """The layout in tiles of another size, both made of whole cells."""
    lengths = (layout.q_len, layout.kv_len, block)
    grid = (-(-layout.q_len // block[0]), -(-layout.kv_len // block[1]))
    parts = (block[0] // cell[0], block[1] // cell[1])  # cells of a new tile
    kinds, codes = _codes(layout, cell)  # codes (T, a, b)
    a, b = codes.shape[1:]
    down, across = -(-layout.q_len // cell[0]), -(-layout.kv_len // cell[1])
    rows = layout.tile_rows % layout.num_block_rows * a
    rows = rows[:, None] + torch.arange(a, device=rows.device)
    cols = layout.col_indices.long()[:, None] * b + torch.arange(b, device=rows.device)
    # The new tile of each cell, and the cell's number in it.
    pattern = layout.tile_rows // layout.num_block_rows * grid[0]
    key = ((pattern[:, None] + rows // parts[0]) * grid[1])[:, :, None] + (cols // parts[1])[
        :, None
    ]
    slot = (rows % parts[0] * parts[1])[:, :, None] + (cols % parts[1])[:, None]
    if layout.q_len % layout.block[0] or layout.kv_len % layout.block[1]:
        inside = (rows < down)[:, :, None] & (cols < across)[:, None]
        key, slot, codes = key[inside], slot[inside], codes[inside]
    area = parts[0] * parts[1]
    keys, index = _distinct(key.flatten(), layout.num_patterns * grid[0] * grid[1])
    made = host.zeros((len(keys), area), torch.int64, key.device)
    host.put(made.view(-1), index * area + slot.flatten(), codes.flatten())
    stored = made.any(1)
    if not bool(stored.all()):  # where a partial tile has nothing
        kept = stored.nonzero().squeeze(1)
        keys, made = host.take(keys, kept), host.take(made, kept)
    rows, cols = keys // grid[1], keys % grid[1]
    # At a ragged end, cells beyond the lengths do not count; their bits are cleared later.
    ends = (down - (grid[0] - 1) * parts[0], across - (grid[1] - 1) * parts[1])
    last = (rows % grid[0] == grid[0] - 1, cols == grid[1] - 1)
    by_cell = made.view(-1, *parts)
    if ends[0] < parts[0]:
        by_cell[last[0], ends[0] :] = _FULL
    if ends[1] < parts[1]:
        by_cell[last[1], :, ends[1] :] = _FULL
    partial = (made != _FULL).any(1).nonzero().squeeze(1)
    ragged = 2 * last[0].long() + last[1].long()
    described = torch.cat([host.take(made, partial), host.take(ragged, partial)[:, None]], 1)
    first, twin = bits.distinct_rows(described)
    packed = _compose(kinds, host.take(made, partial[first]).view(-1, *parts), block)
    ragged = ragged[partial[first]]
    some = host.positions(ragged, 1)
    host.put(packed, some, host.take(packed, some) & _extents(host.take(ragged, some), lengths))
    entries = torch.full_like(keys, FULL_TILE)
    host.put(entries, partial, twin)
    return BlockLayout.from_tiles(lengths, rows, cols, packed, entries, layout.pattern_map)


def _codes(layout: BlockLayout, cell: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The cells of all stored tiles.

    Returns:
        Bits of each code, uint8 `(codes, height, bytes)`; codes, int64 `(T, down, across)`.
    """
    a, b = layout.block[0] // cell[0], layout.block[1] // cell[1]
    n, width = layout.num_bit_tiles, -(-cell[1] // 8)
    cut = layout.bit_tiles.view(n, a, cell[0], b, width).permute(0, 1, 3, 2, 4)
    table, twin = bits.deduplicate(host.reshaped(cut, (n * a * b, cell[0], width)))
    counts = bits.count(table)
    codes = torch.arange(len(table), device=twin.device) + 2
    codes = torch.where(counts == cell[0] * cell[1], _FULL, codes)
    codes = torch.where(counts == 0, _EMPTY, codes)
    whole = torch.full((1, a, b), _FULL, dtype=torch.int64, device=twin.device)
    of_entry = torch.cat([host.take(codes, twin).view(n, a, b), whole])  # entry -1 is the last one
    ones = bits.pack(torch.ones(1, *cell, dtype=torch.bool, device=twin.device))
    kinds = torch.cat([torch.zeros_like(ones), ones, table])
    return kinds, host.take(of_entry, layout.bit_tile_indices.long())


def _distinct(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Distinct keys in 0..size - 1, ascending, and for each key its index among them."""
    if size > _GRID or keys.device.type == "cpu":
        return host.unique(keys, size if size <= _GRID else None)
    seen = torch.zeros(size, dtype=torch.bool, device=keys.device)
    seen[keys] = True
    return seen.nonzero().squeeze(1), (seen.cumsum(0) - 1)[keys]


def _compose(kinds: Tensor, codes: Tensor, block: tuple[int, int]) -> Tensor:
    """Tiles of cells `(n, down, across)` as bits: uint8 `(n, block_q, ceil(block_kv / 8))`."""
    tiles = host.take(kinds, codes).permute(0, 1, 3, 2, 4)  # (n, down, height, across, bytes)
    return host.reshaped(tiles, (len(codes), block[0], -(-block[1] // 8)))


def _extents(ragged: Tensor, lengths: tuple[int, int, tuple[int, int]]) -> Tensor:
    """Bits of the elements that exist: of the last block row (2), the last column (1), or both."""
    q_len, kv_len, (block_q, block_kv) = lengths
    ends = (q_len - (q_len - 1) // block_q * block_q, kv_len - (kv_len - 1) // block_kv * block_kv)
    exist = host.zeros((4, block_q, block_kv), torch.bool, ragged.device)
    for kind in range(4):
        exist[kind, : ends[0] if kind & 2 else block_q, : ends[1] if kind & 1 else block_kv] = True
    return host.take(bits.pack(exist), ragged)
