"""Layouts that are read by rows alone, as schedules do."""

from __future__ import annotations

from sparse_flash.masks import bits, host
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import plain_torch
from torch import Tensor


class RowLayout(BlockLayout):
    """A layout that is read by rows alone: without a transpose."""

    def __post_init__(self, validate: bool, known: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Derive nothing."""
        self.derived, self.calls = {}, {}

    @classmethod
    @plain_torch()
    def of_columns(cls, layout: BlockLayout) -> RowLayout:
        """The rows of a layout's transpose."""
        arrays = (
            layout.ccol_indices,
            layout.row_indices,
            host.take(layout.bit_tile_indices, layout.transpose_order),
            bits.transposed(layout.bit_tiles, layout.block[1]),
            layout.pattern_map,
        )
        block = layout.block[1], layout.block[0]
        return cls(layout.kv_len, layout.q_len, block, *arrays, validate=False)
