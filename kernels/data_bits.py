"""How a mask cuts the tiles of a layout of data, as kernels see it."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import NamedTuple

import torch
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.masks import bits
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.device_tiles import Grid, Source, bits_of_sets, grid_of
from sparse_flash.masks.device_within import (
    TileTable,
    numbers_and_rest_exist,
    rest_of,
    tile_table,
)
from sparse_flash.masks.modes import is_capturing
from torch import Tensor

DEFAULT_ORDER: Hashable = (None, False)  # key of `kept_fragments` without sets, not transposed
_MOST_BYTES = 1 << 24  # of bit tiles that are made in advance, for every set of blocks


class CutFacts(NamedTuple):
    """The properties of a `Cut` that the host knows.

    tables: Patterns of the table; 0: there is none.
    numbered: Patterns whose tokens have numbers of documents.
    known: Bit tiles of the table.
    own: Whether each partial tile gets a bit tile of its own.
    sets: Whether tiles may hold some of several blocks.
    """

    tables: int
    numbered: int
    known: int
    own: bool
    sets: bool


class Cut(NamedTuple):
    """Restriction of tiles to a mask, and precomputed bit tiles.

    table: States of all tiles, int32 (tables, rows, cols); None: all are full.
    table_of: Table of each pattern, int32 (patterns,).
    bits: In fragment order, int32 (n, height / 64, 128, 2): those of the table, with `own` False
        then those of sets of blocks. At least one, whatever it contains.
    facts: Its properties that the host knows.
    """

    table: Tensor | None
    table_of: Tensor | None
    bits: Tensor
    facts: CutFacts


def is_known(source: Source) -> bool:
    """Whether kernels know how the mask of a source cuts tiles."""
    mask = source.within
    return mask is None or not mask.on_device or numbers_and_rest_exist(mask)


def cut_by(layout: DeviceLayout, tile: tuple[int, int], transposed: bool | None) -> Cut:
    """How the layout's mask, which `is_known`, cuts tiles of (queries, keys).

    transposed: Bit tiles are of (keys, queries). None: no bit tiles are needed.
    """
    source, mask = layout.source, layout.source.within
    numbered = 0
    if mask is not None and mask.on_device:
        numbered = source.num_patterns if mask.by_head else 1
        mask = rest_of(mask)
    grid = grid_of(source.lengths, tile)
    assert grid is not None
    table: TileTable | None = None
    if mask is not None:
        table = tile_table(mask, source.lengths, tile, source.heads, layout.device)
    known = 0 if table is None else len(table.bit_tiles)
    size = ((known + 1) << grid.cells) * tile[0] * tile[1] // 8
    several = grid.cells > 1 and (source.indices is not None or source.table is not None)
    own = numbered > 0 or (several and size > _MOST_BYTES)
    if transposed is None:
        made = torch.empty(0, dtype=torch.int32, device=layout.device)
    else:
        made = _bits(table, tile, grid if several and not own else None, transposed, layout.device)
    return Cut(
        table=None if table is None else table.table,
        table_of=None if table is None or table.patterns is None else table.patterns.int(),
        bits=made,
        facts=CutFacts(
            tables=0 if table is None else len(table.table),
            numbered=numbered,
            known=known,
            own=own,
            sets=several,
        ),
    )


def _bits(
    table: TileTable | None,
    tile: tuple[int, int],
    sets: Grid | None,
    transposed: bool,
    device: torch.device,
) -> Tensor:
    """Bit tiles of the table in fragment order, and those of sets of blocks."""
    if table is None:
        return kept_fragments(*_of_full(tile, device), sets, transposed)
    return kept_fragments(table.fragments, table.bit_tiles, sets, transposed)


@functools.cache
def _of_full(tile: tuple[int, int], device: torch.device) -> tuple[dict[Hashable, Tensor], Tensor]:
    """Of layouts without a mask: fragments so far, which graphs read, and no bit tiles."""
    return {}, torch.empty(0, tile[0], -(-tile[1] // 8), dtype=torch.uint8, device=device)


def kept_fragments(
    kept: dict[Hashable, Tensor], packed: Tensor, sets: Grid | None = None, transposed: bool = False
) -> Tensor:
    """Bit tiles in fragment order, and those of sets of blocks; at least one.

    They are made once and kept, but not in the capture of a CUDA graph, which would own them.
    """
    key = (sets, transposed)
    found = kept.get(key)
    if found is None:
        found = _fragments(packed, sets, transposed)
        if not is_capturing(packed.device):
            kept[key] = found
    return found


def _fragments(known: Tensor, sets: Grid | None, transposed: bool) -> Tensor:
    packed = known
    if sets is not None:
        whole = torch.cat([known.new_full((1, *known.shape[1:]), 255), known])
        every = torch.arange(1 << sets.cells, device=known.device)
        made = bits_of_sets(every, sets, known)[None] & whole[:, None]
        packed = torch.cat([known, made.flatten(0, 1)])
    if not len(packed):
        packed = known.new_zeros(1, *known.shape[1:])
    return fragments(packed, transposed)


def fragments(packed: Tensor, transposed: bool) -> Tensor:
    """Bit tiles (n, height, bytes) in fragment order, those of (keys, queries) where transposed."""
    if not transposed:
        return fragment_order(packed)
    step = max(1, (1 << 28) // (packed.shape[1] * packed.shape[2] * 8))
    parts = [
        fragment_order(bits.pack(bits.unpack(part, 8 * part.shape[2]).transpose(1, 2)))
        for part in packed.split(step)
    ]
    return torch.cat(parts)
