"""Work items that turn the sums of dQ into dQ, between those of attention.

The sums of a head are float32 and as large as all of its other tensors together. Right after its
last item they are still in the L2 cache, and while one multiprocessor converts, the others compute;
a pass over all sums at the end finds most of them in memory, and every multiprocessor waiting for
it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from sparse_flash.kernels.config import CONVERT, WORK_FIELDS
from sparse_flash.kernels.schedule import BACKWARD_COSTS, CostModel, Schedule, head_groups
from torch import Tensor

ITEM_ELEMENTS = 1 << 16  # of sums, converted by one item: 256 KiB


def with_conversions(
    plan: Schedule,
    heads: tuple[int, int],
    q_len: int,
    head_dim: int,
    num_ctas: int,
    q_bytes: int = 0,
    costs: CostModel = BACKWARD_COSTS,
) -> Schedule:
    """A backward schedule with the conversions of all its heads.

    heads: Of q and of k.
    q_bytes: As the schedule was made with.

    Those of a group of heads come one by one among the items of the next group, the first when all
    items of their own should have ended; and those of the last group at the end. A conversion waits
    until all items of its kv head are done, whatever happens. In `work` it is first tile of
    queries, q head, batch, 0, 0, CONVERT, number of tiles.

    >>> from sparse_flash import masks
    >>> from sparse_flash.kernels.schedule import backward_schedule
    >>> layout = masks.causal().layout(1024)
    >>> plan = backward_schedule(layout, 1, (2, 2), (128, 128), num_ctas=4)
    >>> plan = with_conversions(plan, (2, 2), 1024, 64, num_ctas=4)
    >>> plan.work[-2:, :7].tolist(), plan.per_head.tolist()
    ([[0, 0, 0, 0, 0, -2, 8], [0, 1, 0, 0, 0, -2, 8]], [8, 8])
    """
    q_heads, kv_heads = heads
    work, device = plan.work, plan.work.device
    pairs = len(plan.kv_lens) * kv_heads
    groups = head_groups(pairs, q_bytes, device)
    pair = work[:, 2].long() * kv_heads + work[:, 1]
    cost = work[:, 4].double() + costs.item
    begin = (cost.cumsum(0) - cost) / num_ctas
    number = int(groups[-1]) + 1
    ends = begin.new_zeros(number).scatter_reduce(0, groups[pair], begin + cost, "amax")
    ends = ends.cummax(0).values
    added = _items(len(plan.kv_lens), q_heads, q_len, plan.tile[1], head_dim, device)
    group = groups[added[:, 2].long() * kv_heads + added[:, 1].long() // (q_heads // kv_heads)]
    time = _times(group, ends)
    order = torch.cat([begin, time]).argsort(stable=True)
    counts = plan.counts.clone()
    counts[0] += len(added)
    per_head = torch.bincount(pair, minlength=pairs).int()
    work = torch.cat([work, added])[order]
    return replace(plan, work=work, counts=counts, per_head=per_head)


def _items(
    batch: int, heads: int, q_len: int, tile_m: int, head_dim: int, device: torch.device
) -> Tensor:
    """The items of all q heads, in their order: int32 (n, WORK_FIELDS)."""
    tiles, size = -(-q_len // tile_m), max(1, ITEM_ELEMENTS // (tile_m * head_dim))
    first = torch.arange(0, tiles, size, device=device)
    index = torch.arange(batch * heads, device=device).repeat_interleave(len(first))
    first = first.repeat(batch * heads)
    items = torch.zeros(len(first), WORK_FIELDS, dtype=torch.int32, device=device)
    items[:, 5] = CONVERT
    places = {0: first, 1: index % heads, 2: index // heads, 6: (tiles - first).clamp(max=size)}
    for i, field in places.items():
        items[:, i] = field
    return items


def _times(group: Tensor, ends: Tensor) -> Tensor:
    """When each item is to come: evenly from the end of its group to that of the next."""
    count = torch.bincount(group, minlength=len(ends))
    nth = torch.arange(len(group), device=group.device) - (count.cumsum(0) - count)[group]
    following = torch.cat([ends[1:], ends[-1:]])
    return ends[group] + (following - ends)[group] * nth / count[group]
