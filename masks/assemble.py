"""From tiles in any order to the arrays of a layout."""

from __future__ import annotations

import torch
from sparse_flash.masks import bits
from torch import Tensor

FULL_TILE = -1  # in bit_tile_indices: every element of the tile is allowed


def extent(index: Tensor, length: int, block: int) -> Tensor:
    """How many of the indices of each block exist: `block`, or less at a ragged end."""
    return (length - index * block).clamp(max=block)


def arrays_of_tiles(
    lengths: tuple[int, int, tuple[int, int]],
    num_patterns: int,
    rows: Tensor,
    cols: Tensor,
    packed: Tensor,
    entries: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """crow_indices, col_indices, bit_tile_indices and bit_tiles: see `BlockLayout.from_tiles`."""
    q_len, kv_len, block = lengths
    nq, nk = -(-q_len // block[0]), -(-kv_len // block[1])
    device = rows.device
    if entries is None:
        entries = torch.arange(len(rows), device=device)
    order = torch.argsort(rows * nk + cols)
    rows, cols, entries = rows[order], cols[order], entries[order]
    area = extent(rows % nq, q_len, block[0]) * extent(cols, kv_len, block[1])
    if len(packed):
        full = (entries < 0) | (bits.count(packed)[entries.clamp(min=0)] == area)
        entries = torch.where(full, FULL_TILE, entries)
    distinct, entries = _renumber(packed, entries)
    starts = torch.searchsorted(rows, torch.arange(num_patterns * nq + 1, device=device))
    first = torch.arange(num_patterns, device=device)[:, None] * nq
    crow = starts[first + torch.arange(nq + 1, device=device)]
    return crow.int(), cols.int(), entries.int(), distinct


def _renumber(packed: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the distinct bit tiles that are in use, in the order of their first use."""
    partial = entries >= 0
    if not bool(partial.any()):
        return packed[:0], entries
    used, index = torch.unique(entries[partial], return_inverse=True)
    distinct, twin = bits.deduplicate(packed if len(used) == len(packed) else packed[used])
    index = twin[index]
    first = torch.full((len(distinct),), len(index), device=index.device)
    first.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amin")
    order = torch.argsort(first)
    entries = entries.clone()
    entries[partial] = torch.argsort(order)[index]
    return distinct[order], entries
