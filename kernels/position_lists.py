"""Tiles of the backward pass of queries at positions, listed on the device for each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sparse_flash.kernels.schedule import WORK_FIELDS
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from sparse_flash.kernels.positions import PositionPlan


class BackwardLists(NamedTuple):
    """Tiles of the backward pass of one call; see `backward_lists`. All int32.

    q_pad: (b,). Rows of each batch entry's first tile of queries that come before query 0.
    work: (items, 8). n_block, kv head, batch, first tile, number of tiles, -1, and two zeros.
    tiles: (b x tiles + 1, 2). Tile of the entry's queries, heads stacked, and bit tile.
    counts: (2,). Number of items, twice.
    """

    q_pad: Tensor
    work: Tensor
    tiles: Tensor
    counts: Tensor


def backward_lists(
    plan: PositionPlan[Any], shift: Tensor, s: int, s_kv: int, kv_heads: int
) -> BackwardLists:
    """The tiles that the queries of each batch entry touch, by key blocks.

    Tiles of queries are counted from the first one that has a query of the entry, and the query
    heads of a kv head follow each other, `row_tiles` each. Sizes are those of the worst case, so
    that nothing waits for the device.

    Args:
        plan: Plan of a kernel that computes by key blocks.
        shift: Position of query 0 of each batch entry, int32 (b,).
        s: Number of queries.
        s_kv: Number of keys.
        kv_heads: Number of heads of k.
    """
    tile_n, tile_m = plan.config.tile
    b, device = len(shift), shift.device
    num_m_blocks, row_tiles = -(-plan.num_positions // tile_m), -(-s // tile_m) + 1
    begin = torch.div(shift, tile_m, rounding_mode="floor").long()
    end = torch.div(shift.long() + s - 1, tile_m, rounding_mode="floor") + 1
    column, bit_tile = plan.tiles[:-1].long().unbind(1)
    m_block, head = column % num_m_blocks, column // num_m_blocks
    keep = (m_block >= begin[:, None]) & (m_block < end[:, None])  # (b, tiles)
    before = pad(keep.cumsum(1), (1, 0))
    entry = torch.arange(b, device=device)[:, None] * len(column)
    goal = torch.where(keep, entry + before[:, :-1], b * len(column))
    local = m_block - begin[:, None] + row_tiles * head
    tiles = torch.zeros(b * len(column) + 1, 2, dtype=torch.int32, device=device)
    tiles[goal, 0], tiles[goal, 1] = local.int(), bit_tile.expand(b, -1).int()
    columns = min(plan.rows.shape[1] - 1, -(-s_kv // tile_n))
    owners = plan.pattern_map.long().expand(b, kv_heads)
    starts = plan.rows[:, : columns + 1, 0].long()[owners]  # (b, kv heads, columns + 1)
    index = torch.arange(b, device=device)[:, None, None]
    first = before[index, starts]
    count = first.diff()
    names = torch.cartesian_prod(
        *(torch.arange(n, device=device) for n in (b, kv_heads, columns))
    ).unbind(1)
    fields = (names[2], names[1], names[0], (first[..., :-1] + entry[..., None]).flatten())
    work = torch.zeros(b * kv_heads * columns, WORK_FIELDS, dtype=torch.int32, device=device)
    for i, values in enumerate((*fields, count.flatten())):
        work[:, i] = values
    work[:, 5] = -1
    work = work[count.flatten().argsort(descending=True, stable=True)]
    counts = torch.full((2,), len(work), dtype=torch.int32, device=device)
    return BackwardLists((shift - begin * tile_m).int(), work, tiles, counts)
