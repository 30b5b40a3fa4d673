"""The same pattern in tiles of another size."""

from __future__ import annotations

import torch
from sparse_flash.masks import validation
from sparse_flash.masks.blockwise import tensor
from sparse_flash.masks.build import build_layout
from sparse_flash.masks.cells import cell_of, retile_by_cells
from sparse_flash.masks.cut import cut
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.regrid import regrid
from sparse_flash.masks.rows import RowLayout
from sparse_flash.masks.tables import RectangleTable
from sparse_flash.masks.ternary import Blocks
from torch import Tensor

_CELLS = 1 << 22  # maximum number of cells in the table of stored tiles


@plain_torch()
def retile(layout: BlockLayout, block: tuple[int, int]) -> BlockLayout:
    """The same elements as a layout with blocks of another size.

    A pattern can thus be described in one block size and computed in another.

    Raises:
        TypeError: `block` is not a pair of ints.
        ValueError: A block size is out of range.

    >>> from sparse_flash import masks
    >>> fine = masks.causal().layout(300, block=(16, 16))
    >>> masks.retile(fine, (128, 64)).equal(masks.causal().layout(300, block=(128, 64)))
    True
    """
    return _retiled(layout, block, BlockLayout)


@plain_torch()
def rows_in(layout: BlockLayout, block: tuple[int, int]) -> BlockLayout:
    """As `retile`. The result may have no transpose."""
    if block == layout.block:
        return layout
    return _retiled(layout, block, RowLayout)


def _retiled(layout: BlockLayout, block: tuple[int, int], kind: type[BlockLayout]) -> BlockLayout:
    lengths = validation.checked_lengths(layout.q_len, layout.kv_len, block)
    if lengths == layout.lengths:
        return layout
    for method in (cut, regrid):
        made = method(layout, lengths[2], kind)
        if made is not None:
            return made
    cell = cell_of(layout.block, lengths[2])
    if cell is not None:
        return retile_by_cells(layout, lengths[2], cell)
    patterns = [_Stored(layout.pattern(p)) for p in range(layout.num_patterns)]
    return build_layout(patterns, layout.pattern_map, lengths, layout.device)


class _Stored:
    """A layout of one pattern as a `Predicate`, for `build_layout`."""

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        rows, cols = layout.tile_rows, layout.col_indices.long()
        self.keys = rows * layout.num_block_cols + cols  # ascending
        shape = (layout.num_block_rows, layout.num_block_cols)
        cell = 1
        while (-(-shape[0] // cell)) * (-(-shape[1] // cell)) > _CELLS:
            cell *= 2
        grid = [-(-n // cell) for n in shape]
        index = rows // cell * grid[1] + cols // cell
        full = layout.bit_tile_indices == FULL_TILE
        zeros = torch.zeros(grid[0] * grid[1], dtype=torch.int64, device=layout.device)
        stored = zeros.index_add(0, index, torch.ones_like(index)).view(grid)
        whole = zeros.index_add(0, index, full.long()).view(grid)
        heights, widths = (
            (n - torch.arange(0, n, cell, device=layout.device)).clamp(max=cell) for n in shape
        )
        self.table = RectangleTable(stored > 0, whole == heights[:, None] * widths, cell)

    def classify(self, blocks: Blocks) -> Tensor:
        """EMPTY, UNKNOWN or FULL for each rectangle, int8."""
        block_q, block_kv = self.layout.block
        return tensor(self.table.classify(blocks.q // block_q, blocks.kv // block_kv).value)

    def signature(self, blocks: Blocks) -> None:
        """None: stored bits have no signature."""

    def __call__(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The stored bit of each element."""
        layout, (block_q, block_kv) = self.layout, self.layout.block
        key = q_idx // block_q * layout.num_block_cols + kv_idx // block_kv
        if not layout.num_tiles:
            return torch.zeros_like(key, dtype=torch.bool)
        tile = torch.searchsorted(self.keys, key).clamp(max=layout.num_tiles - 1)
        stored = self.keys[tile] == key
        entry = layout.bit_tile_indices[tile]
        full = entry == FULL_TILE
        if not layout.num_bit_tiles:
            return stored & full
        column = kv_idx % block_kv
        byte = layout.bit_tiles[entry.clamp(min=0).long(), q_idx % block_q, column // 8]
        return stored & (full | ((byte >> (column % 8)) & 1).bool())
