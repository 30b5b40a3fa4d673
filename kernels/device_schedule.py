"""Schedules of layouts that data on the device decide, without a host wait.

What `kernels.schedule` computes with sizes that follow from the data is computed here with the
largest sizes that may be: the numbers of items and of split rows stand in `Schedule.counts`, which
the kernels read on the GPU. Costs, parts and order are those of the host's schedules.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from sparse_flash.kernels.data_bits import fragments
from sparse_flash.kernels.data_recipes import Lines, ScheduleSizes
from sparse_flash.kernels.data_schedules import MakeSchedule, schedule_by_kernels
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.head_groups import group_count
from sparse_flash.kernels.schedule import EVEN, WORK_FIELDS, CostModel, Schedule
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.device_tiles import DeviceTiles
from torch import Tensor
from torch.nn.functional import pad

_SPARE = 16  # parts beyond the bound, for rounding


class TileList(NamedTuple):
    """Tiles of rows, or of columns, in the order in which they are computed.

    starts: First tile of each row of each pattern, and the end, int32 (P x rows + 1,).
    tiles: Column and bit tile (-1: full), int32 (capacity + 1, 2); the last one is zeros.
    partial: Number of partial tiles of each row, int32 (P x rows,). None: no tile is partial.
    bits: Bit tiles in fragment order, int32 (n, height / 64, 128, 2).
    heads: (1 or batch, 1 or number of heads) that have patterns of their own.
    rows: Rows of a pattern.
    """

    starts: Tensor
    tiles: Tensor
    partial: Tensor | None
    bits: Tensor
    heads: tuple[int, int]
    rows: int


def device_schedule(
    layout: DeviceLayout,
    batch: int,
    heads: int,
    tile: tuple[int, int],
    facts: DeviceFacts,
    costs: CostModel,
    kv_bytes: int = 0,
) -> tuple[Schedule, Tensor]:
    """The schedule of a layout of data for a kernel of this tile, as `schedule.schedule`.

    Returns:
        The schedule, and why block rows are not as asked for, or 0, uint8 (P, nq).

    >>> from sparse_flash.masks import BlockLayout
    >>> from sparse_flash.kernels.sm90.config import FORWARD_COSTS
    >>> h200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> indices = torch.tensor([[[[0, -1], [0, 1]]]])
    >>> layout = BlockLayout.from_topk(indices, (128, 128), 256)
    >>> s, errors = device_schedule(layout, 1, 1, (128, 128), h200, FORWARD_COSTS)
    >>> s.counts.tolist(), s.work[:2, :6].tolist()
    ([2, 0], [[1, 0, 0, 1, 2, -1], [0, 0, 0, 0, 1, -1]])
    """
    return schedule_maker(layout, batch, heads, tile, facts, costs, kv_bytes)(layout)


def schedule_maker(
    layout: DeviceLayout,
    batch: int,
    heads: int,
    tile: tuple[int, int],
    facts: DeviceFacts,
    costs: CostModel,
    kv_bytes: int = 0,
) -> MakeSchedule:
    """The maker of the schedules of `device_schedule`, for all layouts of this one's form."""
    sizes = _sizes((batch, heads), -(-layout.q_len // tile[0]), facts, costs, kv_bytes)
    lines = Lines(tile, heads, 1, transposed=False)

    def by_pytorch(layout: DeviceLayout) -> tuple[Schedule, Tensor]:
        errors = layout.tiles_at(tile).errors
        return _schedule(row_list(layout, tile), layout.kv_len, tile, sizes, costs), errors

    return schedule_by_kernels(layout, lines, sizes, costs, facts) or by_pytorch


def device_backward_schedule(
    layout: DeviceLayout,
    batch: int,
    heads: tuple[int, int],
    tile: tuple[int, int],
    facts: DeviceFacts,
    costs: CostModel,
    q_bytes: int = 0,
) -> tuple[Schedule, Tensor]:
    """The schedule by key blocks for tiles of (keys, queries), as `schedule.backward_schedule`.

    Returns:
        As `device_schedule`.

    >>> from sparse_flash.masks import BlockLayout
    >>> from sparse_flash.kernels.sm90.config import BACKWARD_COSTS
    >>> h200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> indices = torch.tensor([[[[0, -1], [0, 1]]]])
    >>> layout = BlockLayout.from_topk(indices, (128, 128), 256)
    >>> s, errors = device_backward_schedule(layout, 1, (2, 1), (128, 128), h200, BACKWARD_COSTS)
    >>> s.work[:2, :6].tolist(), s.tiles[:, 0].tolist()
    ([[0, 0, 0, 0, 4, -1], [1, 0, 0, 4, 2, -1]], [0, 1, 2, 3, 1, 3, 0, 0, 0])
    """
    return backward_schedule_maker(layout, batch, heads, tile, facts, costs, q_bytes)(layout)


def backward_schedule_maker(
    layout: DeviceLayout,
    batch: int,
    heads: tuple[int, int],
    tile: tuple[int, int],
    facts: DeviceFacts,
    costs: CostModel,
    q_bytes: int = 0,
) -> MakeSchedule:
    """The maker of the schedules of `device_backward_schedule`, as `schedule_maker`."""
    sizes = _sizes((batch, heads[1]), -(-layout.kv_len // tile[0]), facts, costs, q_bytes)
    lines = Lines(tile[::-1], heads[0], heads[0] // heads[1], transposed=True)

    def by_pytorch(layout: DeviceLayout) -> tuple[Schedule, Tensor]:
        errors = layout.tiles_at(tile[::-1]).errors
        listed = column_list(layout, tile, heads)
        return _schedule(listed, layout.kv_len, tile, sizes, costs), errors

    return schedule_by_kernels(layout, lines, sizes, costs, facts) or by_pytorch


def row_list(layout: DeviceLayout, tile: tuple[int, int]) -> TileList:
    """The tiles of each block row of queries."""
    found = layout.tiles_at(tile)
    partial = None
    if len(found.bit_tiles):
        before = pad((found.tiles[:-1, 1] >= 0).cumsum(0, dtype=torch.int32), (1, 0))
        partial = before[found.starts].diff()
    rows = -(-layout.q_len // tile[0])
    return TileList(
        found.starts, found.tiles, partial, _fragments(found), layout.source.heads, rows
    )


def column_list(layout: DeviceLayout, tile: tuple[int, int], heads: tuple[int, int]) -> TileList:
    """The tiles of each block of keys, for tiles of (keys, queries), by key heads.

    Those of the query heads that share a key head follow each other, as in `stack_heads`.
    """
    found = layout.tiles_at((tile[1], tile[0]))
    batches, own = layout.source.heads
    size = heads[0] // heads[1]  # query heads of a key head
    stacked = size if own == heads[0] else 1  # of them with patterns of their own
    repeats = size // stacked
    rows, columns = -(-layout.q_len // tile[1]), -(-layout.kv_len // tile[0])
    capacity, device = len(found.tiles) - 1, found.tiles.device
    index = torch.arange(capacity, dtype=torch.int32, device=device)
    row = torch.searchsorted(found.starts, index, right=True, out_int32=True) - 1
    pattern, m_block = row // rows, row % rows
    column, entry = found.tiles[:-1].unbind(1)
    cells = batches * own * columns
    dtype = torch.int16 if cells < 1 << 15 else torch.int32 if cells < 1 << 31 else torch.int64
    cell = (pattern // stacked * columns + column).to(torch.int64 if cells >= 1 << 31 else None)
    cell = cell * stacked + pattern % stacked
    key = torch.where(index < found.starts[-1], cell, cells).to(dtype)
    key, order = key.sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(cells + 1, device=device).to(dtype))
    value = torch.stack([m_block + pattern % stacked * rows, entry], 1)[order]
    if repeats > 1:
        starts, value = _repeated(starts, value, key, repeats, rows)
    starts = starts[::stacked].int()
    partial = None
    if len(found.bit_tiles):
        before = pad((value[:, 1] >= 0).cumsum(0, dtype=torch.int32), (1, 0))
        partial = before[starts].diff()
    own_heads = heads[1] if own == heads[0] else own
    return TileList(
        starts,
        pad(value, (0, 0, 0, 1)),
        partial,
        _fragments(found, tile),
        (batches, own_heads),
        columns,
    )


def _repeated(
    starts: Tensor, value: Tensor, key: Tensor, repeats: int, rows: int
) -> tuple[Tensor, Tensor]:
    """The tiles of each cell again for every head that shares them."""
    capacity, device = len(value), value.device
    cell = key.long().clamp(max=len(starts) - 2)
    begin, count = starts[cell], starts.diff()[cell]
    exists = torch.arange(capacity, device=device) < starts[-1]
    head = torch.arange(repeats, device=device)[:, None]
    goal = (repeats - 1) * begin + torch.arange(capacity, device=device) + head * count
    goal = torch.where(exists, goal, repeats * capacity)
    result = torch.zeros(repeats * capacity + 1, 2, dtype=torch.int32, device=device)
    shifted = torch.stack([value[:, 0] + head * rows, value[:, 1].expand(repeats, -1)], 2)
    result[goal] = shifted.int()
    return starts * repeats, result[:-1]


def _fragments(found: DeviceTiles, transposed_tile: tuple[int, int] | None = None) -> Tensor:
    """Bit tiles in fragment order; transposed for tiles of (keys, queries) of that size."""
    packed = found.bit_tiles
    if not len(packed):
        height = packed.shape[1] if transposed_tile is None else transposed_tile[0]
        return packed.new_zeros(1, height // 64, 128, 2, dtype=torch.int32)
    return fragments(packed, transposed_tile is not None)


def _sizes(
    pairs: tuple[int, int], rows: int, facts: DeviceFacts, costs: CostModel, kv_bytes: int
) -> ScheduleSizes:
    """Sizes of a schedule for (batch entries, heads)."""
    # Parts have at least so much work, or are those of the last rows.
    extra = math.ceil(max(facts.num_sms / costs.largest_share, 2 * facts.num_sms)) + _SPARE
    groups = group_count(pairs[0] * pairs[1], kv_bytes, facts, costs)
    return ScheduleSizes(*pairs, rows, facts.num_sms, extra, *groups)


def _schedule(
    listed: TileList, kv_len: int, tile: tuple[int, int], sizes: ScheduleSizes, costs: CostModel
) -> Schedule:
    """The schedule of listed tiles."""
    work, combine, counts = _work_items(listed, sizes, costs)
    device = work.device
    return Schedule(
        counts=counts,
        work=work,
        tiles=listed.tiles,
        bits=listed.bits,
        num_bit_tiles=len(listed.bits),
        combine=combine,
        kv_lens=torch.full((sizes.batch,), kv_len, dtype=torch.int32, device=device),
        num_splits=2 * sizes.extra,
        num_ctas=min(len(work), sizes.ctas),
        tile=tile,
    )


def _work_items(
    listed: TileList, sizes: ScheduleSizes, costs: CostModel
) -> tuple[Tensor, Tensor, Tensor]:
    """`work`, `combine` and `counts` of a schedule, with PyTorch."""
    total, device = sizes.total, listed.tiles.device
    owner = _owners(listed, sizes)
    tiles = listed.starts.diff()
    cost = tiles.clamp(min=1) + costs.item
    if listed.partial is not None:
        cost = cost + (costs.partial_tile - 1) * listed.partial
    begin = listed.starts[:-1]
    if owner is not None:
        tiles, cost, begin = tiles[owner], cost[owner], begin[owner]
    share = cost.sum() / sizes.ctas
    parts = torch.minimum(
        (cost / costs.limit(share)).ceil().int(),
        tiles // costs.fewest_tiles,
    ).clamp(min=1)
    if sizes.rest:
        parts = _with_last_split(parts, tiles, cost, sizes, costs)
    ends = parts.cumsum(0, dtype=torch.int32)
    item = torch.arange(total + sizes.extra, dtype=torch.int32, device=device)
    row = torch.searchsorted(ends, item, right=True).clamp(max=total - 1)
    exists = item < ends[-1]
    of, mine = parts[row], tiles[row]
    nth = item - (ends - parts)[row]
    lower, upper = mine * nth // of, mine * (nth + 1) // of
    count = upper - lower
    split = (of > 1) & exists
    part = torch.where(split, split.cumsum(0, dtype=torch.int32) - 1, -1)
    first = torch.where(count > 0, begin[row] + lower, len(listed.tiles) - 1)
    item_cost = (cost / parts)[row]  # a part may have a tile more than another
    work = torch.stack(_records(row, sizes, first, count, part), 1)
    several = parts > 1
    number = several.cumsum(0)
    in_parts = torch.where(several, parts, 0)
    first_part = in_parts.cumsum(0, dtype=torch.int32) - in_parts
    every = torch.arange(total, device=device)
    combined = torch.stack(_records(every, sizes, first_part, parts, torch.zeros_like(parts)), 1)
    most = min(total, sizes.extra)
    combine = torch.zeros(most + 1, WORK_FIELDS, dtype=torch.int32, device=device)
    combine[torch.where(several, number - 1, most).clamp(max=most)] = combined
    largest = torch.minimum(cost.max(), costs.limit(share))
    order = _order(item_cost, exists, row, (share, largest), sizes, costs)
    counts = torch.stack([ends[-1], number[-1].int()])
    return work[order], combine[:-1], counts


def _owners(listed: TileList, sizes: ScheduleSizes) -> Tensor | None:
    """Row of a pattern of each (batch entry, head, row), int64; None where they are the same."""
    if listed.heads == sizes[:2]:
        return None
    device = listed.tiles.device
    batch, heads = (
        torch.arange(n, device=device) * own // n
        for n, own in zip(sizes[:2], listed.heads, strict=True)
    )
    pattern = (batch[:, None] * listed.heads[1] + heads).view(-1, 1)
    return (pattern * listed.rows + torch.arange(listed.rows, device=device)).flatten()


def _with_last_split(
    parts: Tensor, tiles: Tensor, cost: Tensor, sizes: ScheduleSizes, costs: CostModel
) -> Tensor:
    """As `schedule._split_last`, where all rows take about as long."""
    rest, ctas = sizes.rest, sizes.ctas
    mean, fewest = cost.mean(), tiles.min()
    best, least = torch.ones_like(fewest), mean
    for rounds in (1, 2):
        number = (fewest // 2).clamp(max=rounds * ctas // rest)
        time = (mean - costs.item) / number.clamp(min=1) + costs.item + costs.split
        time = rounds * time + costs.combine
        better = (number > 1) & (time < least)
        best, least = torch.where(better, number, best), torch.where(better, time, least)
    even = (parts.max() == 1) & (cost.max() <= EVEN * mean)
    last = torch.where(even, best, parts[-rest:])
    return torch.cat([parts[:-rest], last])


def _records(
    row: Tensor, sizes: ScheduleSizes, first: Tensor, count: Tensor, part: Tensor
) -> list[Tensor]:
    """Columns of `Schedule.work` or `Schedule.combine`, int32."""
    pair = row // sizes.rows
    names = (row % sizes.rows, pair % sizes.heads, pair // sizes.heads)
    zero = torch.zeros_like(count)
    return [x.int() for x in (*names, first, count, part, zero, zero)]


def _order(
    cost: Tensor,
    exists: Tensor,
    row: Tensor,
    limits: tuple[Tensor, Tensor],
    sizes: ScheduleSizes,
    costs: CostModel,
) -> Tensor:
    """The order of the items, as `head_groups.longest_first`; items that do not exist come last.

    limits: Work of a CTA, and the largest cost of an item.
    """
    groups = sizes.groups
    if groups == 1:
        return torch.where(exists, cost, -1.0).argsort(descending=True, stable=True)
    group = row // sizes.rows * groups // (sizes.batch * sizes.heads)
    share, largest = limits
    long = costs.long_item * share * sizes.ctas / exists.sum()
    last = (groups * (1 - torch.minimum(largest, long) / share)).long().clamp(min=sizes.joined)
    group = torch.minimum(group, last)
    late = (cost > share * (groups - group) / groups) & (cost > long)
    group = torch.where(exists, torch.where(late, 0, group + 1), groups + 1)
    # Positive floats are in the order of their bits.
    return ((group << 32) - cost.float().view(torch.int32)).argsort(stable=True)
