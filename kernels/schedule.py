"""Who computes what, when: a Schedule, from a layout, once.

Sparse layouts are badly balanced: one global block makes a row of 512 tiles among rows of 4. The
kernels are persistent; their CTAs take work items off one list. Items are ordered longest first
(LPT: Graham, 1969), and a row that would keep one CTA busy for too large a part of the whole is
split into parts, whose results are combined through their logsumexp (Flash-Decoding, Dao et al.,
2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.sm90.config import Config
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.retile import retile
from torch import Tensor
from torch.nn.functional import pad

WORK_FIELDS = 8  # int32 words of a work item, padded to a sector of memory


@dataclass(frozen=True)
class CostModel:
    """What things cost, in units of the time that a full tile takes.

    From speeds on an H200. `tall_tile` is from head_dim 64 (571 against 461 TFLOP/s). Two random
    densities give `item` (1.0 at head_dim 64, 1.9 at 128), masks with and without partial tiles
    `partial_tile` (1.2 and 1.05): one value stands between both. The last two are estimates that
    balance what tests/kernels/test_schedule.py simulates.
    """

    partial_tile: float = 1.1
    tall_tile: float = 1.2  # a full tile of 192 x 128, in units of one of 128 x 128
    wide_tile: float = 1.17  # of the backward, 80 queries wide, in units of one of 64
    item: float = 1.5  # loading Q, the first softmax, writing O
    largest_share: float = 0.5  # of what a CTA gets, that one item may be
    long_item: float = 2.5  # in units of the mean item; see _longest_first
    fewest_tiles: int = 8  # of a part: shorter ones cost more than they balance
    part: float = 1.0  # writing a part and reading it again
    combine: float = 2.0  # launching the kernel that adds up parts

    def tile(self, tile_m: int, tile_n: int) -> float:
        """The cost of a full tile, comparable between tiles of different sizes."""
        if tile_n == 80:
            return self.wide_tile * 64 / 128
        return (self.tall_tile if tile_m == 192 else 1.0) * tile_n / 128

    def rows(self, layout: BlockLayout) -> Tensor:
        """The cost of each block row `(patterns, block rows)`, float32."""
        partial = (layout.bit_tile_indices != FULL_TILE).float()
        before = pad(partial.cumsum(0, dtype=torch.float64), (1, 0))
        starts = layout.crow_indices.long()
        tiles, partials = starts.diff(), before[starts].diff()
        # The kernel walks through an empty row as through one tile.
        cost = tiles.clamp(min=1) + (self.partial_tile - 1) * partials + self.item
        return cost.float()

    def parts(self, tiles: Tensor, costs: Tensor, share: Tensor) -> Tensor:
        """In how many parts to compute rows of so many tiles and such costs: int64, 1 or more."""
        limit = share * self.largest_share
        wanted = (costs / limit.clamp(min=1e-6)).ceil().long()
        return torch.minimum(wanted, tiles // self.fewest_tiles).clamp(min=1)

    def last_parts(self, rest: int, tiles: int, row: float, num_ctas: int) -> int:
        """In how many parts to compute each of the last `rest` rows, all of so many tiles and such
        a cost, that would not give each CTA one.

        They are to fill one round of the CTAs, or two (so there are never more parts than that).
        """
        best, least = 1, row
        for rounds in (1, 2):
            parts = min(rounds * num_ctas // rest, tiles // 2)
            if parts > 1:
                cost = rounds * ((row - self.item) / parts + self.item + self.part) + self.combine
                best, least = (parts, cost) if cost < least else (best, least)
        return best


COSTS = CostModel()
BACKWARD_COSTS = CostModel(partial_tile=1.05)  # more products for each tile to mask
L2_BYTES = 24 << 20  # what keys and values may count on: of the 50 MB, each half may hold a copy


@dataclass
class Schedule:
    """Arrays that the forward kernel reads, all int32. See `schedule`.

    work: (items, 8). m_block, head, batch, first tile, number of tiles, part (-1: not split), and
        two zeros.
    tiles: (tiles + 1, 2). n_block, and the bit tile or -1 for a full one; columns ascend in a row.
        The last one is what items without tiles name as their first.
    bits: (bit tiles and some room, tile_m / 64, 128, 2), in fragment order; `num_bit_tiles` of
        them are used.
    combine: (split rows, 8). m_block, head, batch, first part, number of parts, and three zeros.
    kv_lens: (batch,), the whole length each; for calls that give none.
    counts: (2,). How many items of `work` and rows of `combine` there are: read on the GPU, so that
        a CUDA graph's replays see what `update_` has changed.
    num_parts: parts of split rows, each a float32 (tile_m, head_dim) and a logsumexp.
    """

    work: Tensor
    tiles: Tensor
    bits: Tensor
    combine: Tensor
    kv_lens: Tensor
    counts: Tensor
    num_bit_tiles: int
    num_parts: int
    tile: tuple[int, int]

    def arrays(self) -> list[Tensor]:
        """work, tiles, bits, combine, kv_lens, counts."""
        return [self.work, self.tiles, self.bits, self.combine, self.kv_lens, self.counts]

    def update_(self, other: Schedule) -> None:
        """Take over another schedule in place, so that captured CUDA graphs follow it.

        Raises:
            ValueError: As `check_room`.
        """
        self.check_room(other)
        for room, new in zip(self.arrays(), other._used(), strict=True):
            room[: len(new)] = new
        self.num_bit_tiles = other.num_bit_tiles

    def _used(self) -> list[Tensor]:
        """The arrays of a schedule that was just made, without room to spare."""
        return [x[: self.num_bit_tiles] if x is self.bits else x for x in self.arrays()]

    def check_room(self, other: Schedule) -> None:
        """Whether `update_` would work.

        Raises:
            ValueError: It is for another tile, or has more of something than this one has room for.
        """
        if other.tile != self.tile:
            raise ValueError(f"the schedule is for tiles of {other.tile}, this one of {self.tile}")
        if other.num_parts > self.num_parts:
            raise ValueError(
                f"no room for {other.num_parts} parts of split rows: there were {self.num_parts}"
            )
        names = ("work", "tiles", "bits", "combine", "kv_lens", "counts")
        for name, room, new in zip(names, self.arrays(), other._used(), strict=True):
            if len(new) > len(room):
                raise ValueError(
                    f"no room for {len(new)} entries of `{name}`: there were {len(room)}; "
                    "begin with the layout that needs most"
                )

    @property
    def num_items(self) -> int:
        """Work items."""
        return self.work.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays."""
        return sum(x.numel() * x.element_size() for x in self.arrays())


def schedule(
    layout: BlockLayout,
    batch: int,
    heads: int,
    tile: tuple[int, int],
    num_ctas: int,
    kv_bytes: int = 0,
    costs: CostModel = COSTS,
    tail: bool = True,
) -> Schedule:
    """The schedule of a layout of any granularity for a kernel of this tile.

    kv_bytes: Size of one head's keys and values: heads are taken in groups whose keys and values
        fit the L2 cache together.
    tail: Whether to split the last rows, where all take as long, so that no CTA waits for them.

    >>> from sparse_flash import masks
    >>> layout = masks.global_tokens(128).layout(65536)  # one row of 512 tiles, 511 rows of 1
    >>> s = schedule(layout, batch=1, heads=8, tile=(128, 128), num_ctas=132)
    >>> s.work[0, 4].item(), s.work[-1, 4].item(), s.num_parts, len(s.combine)
    (52, 1, 80, 8)
    """
    layout = retile(layout, tile)
    starts = layout.crow_indices.long()
    owners = layout.pattern_map.long().expand(batch, heads).reshape(-1)  # of (batch, head) pairs
    tiles = starts.diff()[owners].flatten()  # of (batch, head, row) triples, as all that follows
    cost = costs.rows(layout)[owners].flatten()
    share = cost.sum() / num_ctas
    parts = costs.parts(tiles, cost, share)
    if tail:
        _split_last(parts, tiles, cost, num_ctas, costs)
    row = torch.repeat_interleave(torch.arange(len(parts), device=parts.device), parts)
    of = parts[row]
    nth = torch.arange(len(row), device=row.device) - (parts.cumsum(0) - parts)[row]
    begin, end = tiles[row] * nth // of, tiles[row] * (nth + 1) // of
    split = of > 1
    part = torch.where(split, split.cumsum(0) - 1, -1)
    first = starts[:, :-1][owners].flatten()[row] + begin
    first = torch.where(end > begin, first, layout.num_tiles)
    item_cost = cost[row] * (end - begin).clamp(min=1) / tiles[row].clamp(min=1)
    group = _head_groups(batch * heads, kv_bytes, parts.device)[row // layout.num_block_rows]
    work = _records(row, (heads, layout.num_block_rows), first, end - begin, part)
    in_parts = torch.where(parts > 1, parts, 0)
    combined = (parts > 1).nonzero().squeeze(1)
    first_part = (in_parts.cumsum(0) - in_parts)[combined]
    counts = torch.tensor([len(work), len(combined)], dtype=torch.int32, device=layout.device)
    return Schedule(
        counts=counts,
        work=work[_longest_first(item_cost, group, share, costs.long_item)],
        tiles=pad(
            torch.stack([layout.col_indices, layout.bit_tile_indices], 1).int(), (0, 0, 0, 1)
        ),
        bits=_with_room(fragment_order(layout.bit_tiles)),
        num_bit_tiles=layout.num_bit_tiles,
        combine=_records(combined, (heads, layout.num_block_rows), first_part, parts[combined]),
        kv_lens=torch.full((batch,), layout.kv_len, dtype=torch.int32, device=layout.device),
        num_parts=int(in_parts.sum()),
        tile=tile,
    )


def backward_schedule(
    layout: BlockLayout,
    batch: int,
    heads: tuple[int, int],
    tile: tuple[int, int],
    num_ctas: int,
    q_bytes: int = 0,
    costs: CostModel = BACKWARD_COSTS,
    tail: bool = True,
) -> Schedule:
    """The schedule of the transposed layout, by kv heads, for tiles of (keys, queries).

    heads: Of q and of k. The q heads that share a kv head are stacked: their tiles follow each
        other, with block columns counted on. Otherwise all is as in `schedule`, with keys and
        queries exchanged.
    q_bytes: Size of what is read and written of the queries of a kv head.
    tail: As in `schedule`.

    >>> from sparse_flash import masks
    >>> layout = masks.local(100).layout(384)   # columns of 2, 3 and 2 tiles of 128
    >>> s = backward_schedule(layout, 1, (4, 2), (128, 128), num_ctas=132)
    >>> s.work[:, 4].tolist(), s.tiles[:4, 0].tolist()
    ([6, 6, 4, 4, 4, 4], [0, 1, 3, 4])
    """
    stacked = stack_heads(retile(layout.transpose(), tile), heads[0] // heads[1])
    plan = schedule(stacked, batch, heads[1], tile, num_ctas, q_bytes, costs, tail)
    return replace(plan, kv_lens=torch.full_like(plan.kv_lens, layout.kv_len))


def stack_heads(layout: BlockLayout, size: int) -> BlockLayout:
    """A layout whose block columns are those of `size` heads next to each other.

    Its pattern map is that of groups of so many heads.

    >>> from sparse_flash import masks
    >>> layout = stack_heads(masks.causal().layout(256), 2)
    >>> layout.crow_indices.tolist(), layout.col_indices.tolist()
    ([[0, 2, 6]], [0, 2, 0, 1, 2, 3])
    """
    if size == 1:
        return layout
    owners = layout.pattern_map.long()
    shared = owners.shape[1] == 1
    groups = owners[..., None].expand(-1, -1, size) if shared else owners.unflatten(1, (-1, size))
    patterns, which = groups.reshape(-1, size).unique(dim=0, return_inverse=True)
    starts = layout.crow_indices.long()
    counts = starts.diff()[patterns].transpose(1, 2).flatten()  # of (pattern, row, head) triples
    begin = starts[:, :-1][patterns].transpose(1, 2).flatten()
    crow = pad(counts.cumsum(0), (1, 0))
    owner = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    tile = begin[owner] + torch.arange(len(owner), device=owner.device) - crow[owner]
    rows, columns = layout.num_block_rows, layout.num_block_cols
    index = torch.arange(len(patterns), device=crow.device)[:, None] * rows
    index = index + torch.arange(rows + 1, device=crow.device)
    return BlockLayout(
        layout.q_len,
        size * columns * layout.block[1],
        layout.block,
        crow_indices=crow[index * size].int(),
        col_indices=(layout.col_indices[tile] + owner % size * columns).int(),
        bit_tile_indices=layout.bit_tile_indices[tile],
        bit_tiles=layout.bit_tiles,
        pattern_map=which.view(groups.shape[:2]).int(),
        validate=False,
    )


def best_config(
    layout: BlockLayout, configs: tuple[Config, ...], costs: CostModel = COSTS
) -> Config:
    """The config whose tiles cover the layout at the least cost.

    Tiles are counted over the stored blocks, as if all these were full: exact where neither
    granularity cuts the blocks of the other, and else close enough.
    """
    return min(configs, key=lambda c: cover(layout, c.tile) * costs.tile(*c.tile))


def cover(layout: BlockLayout, tile: tuple[int, int]) -> int:
    """How many tiles of this size touch stored blocks of the layout, over all its patterns.

    >>> from sparse_flash import masks
    >>> layout = masks.block_local(128, 1).layout(768)  # 128-blocks: 2, 3, 3, 3, 3, 2 in a row
    >>> cover(layout, (128, 128)), cover(layout, (192, 128)), cover(layout, (128, 64))
    (16, 14, 32)
    """
    (block_q, block_kv), (tile_m, tile_n) = layout.block, tile
    rows = layout.tile_rows.long()
    pattern, rows = rows // layout.num_block_rows, rows % layout.num_block_rows
    top, left = rows * block_q, layout.col_indices.long() * block_kv
    bottom = (top + block_q).clamp(max=layout.q_len) - 1
    right = (left + block_kv).clamp(max=layout.kv_len) - 1
    height, width = -(-layout.q_len // tile_m), -(-layout.kv_len // tile_n)
    touched = []
    for i in range((block_q - 1) // tile_m + 2):
        for j in range((block_kv - 1) // tile_n + 2):
            m, n = top // tile_m + i, left // tile_n + j
            inside = (m <= bottom // tile_m) & (n <= right // tile_n)
            touched.append(((pattern * height + m) * width + n)[inside])
    return len(torch.cat(touched).unique())


def _split_last(
    parts: Tensor, tiles: Tensor, cost: Tensor, num_ctas: int, costs: CostModel
) -> None:
    """Split, in place, what would keep a few CTAs busy for a last round of its own.

    2048 rows of 128 tiles take 132 CTAs 16 rounds, of which the last has work for half of them.
    Where rows differ, the shortest come last, and there is nothing to gain.
    """
    rest = len(parts) % num_ctas
    if not rest or len(parts) < num_ctas:
        return
    facts = torch.stack([cost.max(), cost.min(), parts.max(), tiles.min()])  # for one wait
    dearest, cheapest, most, fewest = facts.tolist()
    if most == 1 and dearest <= 1.02 * cheapest:
        parts[-rest:] = costs.last_parts(rest, int(fewest), dearest, num_ctas)


def _with_room(bits: Tensor) -> Tensor:
    """Room for the bit tiles of other patterns (see `update_`): as many again, to some 2 MiB."""
    room = min(len(bits) + 16, 1024)
    return torch.cat([bits, bits.new_zeros(room, *bits.shape[1:])])


def _records(row: Tensor, sizes: tuple[int, int], *fields: Tensor) -> Tensor:
    """m_block, head, batch and the fields of each row index: int32 (n, WORK_FIELDS)."""
    heads, rows = sizes
    record = row.new_zeros(len(row), WORK_FIELDS, dtype=torch.int32)
    columns = (row % rows, row // rows % heads, row // (rows * heads), *fields)
    for i, column in enumerate(columns):
        record[:, i] = column
    return record


def _longest_first(cost: Tensor, group: Tensor, share: Tensor, long_item: float) -> Tensor:
    """The order of the items: group by group, in each the longest first.

    Long items that would be the last to end if they began with their group come before all groups.
    They must be few, for they mix the groups, and what these read no longer fits the L2 cache: so
    items must be much longer than most.
    """
    groups = group.max() + 1 if len(group) else 1
    rest = share * (groups - group) / groups  # of a CTA's work when a group begins
    late = (cost > rest) & (cost > long_item * cost.mean())
    group = torch.where(late, -1, group)
    by_cost = cost.argsort(descending=True, stable=True)
    return by_cost[group[by_cost].argsort(stable=True)]


def _head_groups(pairs: int, kv_bytes: int, device: torch.device) -> Tensor:
    """The group of each (batch, head) pair: int64 (pairs,)."""
    size = max(1, L2_BYTES // max(1, kv_bytes))
    groups = -(-pairs // size)
    return torch.arange(pairs, device=device) * groups // pairs  # of equal size, or nearly
