"""Who computes what, when: a Schedule, from a layout, once.

Sparse layouts are badly balanced: one global block makes a row of 512 tiles among rows of 4. The
kernels are persistent; their CTAs take work items off one list. Items are ordered longest first
(LPT: Graham, 1969), and a row that would keep one CTA busy for too large a part of the whole is
split into parts, whose results are combined through their logsumexp (Flash-Decoding, Dao et al.,
2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.masks import blockwise, host
from sparse_flash.masks.blockwise import (
    Numbers,
    argsort,
    convert,
    int64,
    maximum,
    minimum,
    numbers,
    take,
    tensor,
    where,
)
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.retile import rows_in
from sparse_flash.masks.rows import RowLayout
from sparse_flash.masks.transfer import moved
from torch import Tensor
from torch.nn.functional import pad

WORK_FIELDS = 8  # int32 words of a work item, padded to a sector of memory
_MOST_ON_HOST = 1 << 14  # tiles, and rows of all heads, of a schedule that is made on the CPU
_MOST_WITH_COPY = 1 << 18  # tiles, where the CPU has the layout already
_CUT_ON_HOST = 8  # times as few tiles if they are cut into others, which takes longest on a CPU
EVEN = 1.25  # largest cost of a row, in units of the mean one, for rows of about equal cost
ARRAYS = ("work", "tiles", "bits", "combine", "kv_lens", "counts")  # of a Schedule


@dataclass(frozen=True)
class CostModel:
    """Cost model of one architecture, in units of the time of a full tile.

    Args:
        partial_tile: Cost of a partial tile.
        item: Cost of a work item besides its tiles: loading Q, the first softmax, writing O.
        largest_share: Largest cost of one item, as a fraction of the mean work of a CTA.
        long_item: Cost of an item, in units of the mean item, above which items must be few: they
            may come before all groups of heads (see `_longest_first`).
        fewest_tiles: Least number of tiles of a part; shorter ones cost more than they balance.
        split: Cost of writing a split and reading it again.
        combine: Cost of launching the kernel that combines parts.
        l2_share: Fraction of the L2 cache for the keys and values of a group of heads; each half
            of the cache may hold a copy.
        last_l2_share: The same for groups that join the last one (see `_head_groups`).
    """

    partial_tile: float
    item: float
    largest_share: float
    long_item: float
    fewest_tiles: int
    split: float
    combine: float
    l2_share: float
    last_l2_share: float

    def rows(self, layout: BlockLayout) -> Numbers:
        """The cost of each block row `(patterns, block rows)`, float32."""
        partial = blockwise.starts(numbers(layout.bit_tile_indices) != FULL_TILE)
        starts = int64(numbers(layout.crow_indices))
        before = take(partial, starts)
        tiles, partials = (x[:, 1:] - x[:, :-1] for x in (starts, before))
        # The kernel walks through an empty row as through one tile.
        cost = maximum(tiles, 1) + (self.partial_tile - 1) * convert(partials, "float64")
        return convert(cost + self.item, "float32")

    def parts(self, tiles: Numbers, costs: Numbers, share: Any) -> Numbers:
        """In how many parts to compute rows of so many tiles and such costs: int64, 1 or more."""
        wanted = costs / self.limit(share)
        whole = int64(wanted)
        return maximum(minimum(whole + (wanted > whole), tiles // self.fewest_tiles), 1)

    def limit(self, share: Any) -> Any:
        """The largest cost of an item, where a CTA's share of the work is so much."""
        return maximum(share * self.largest_share, 1e-6)

    def last_parts(self, rest: int, tiles: int, row: float, num_ctas: int) -> int:
        """In how many parts to compute each of the last `rest` rows, of at least so many tiles and
        such a mean cost, that would not give each CTA one.

        They are to fill one round of the CTAs, or two (so there are never more parts than that).
        """
        best, least = 1, row
        for rounds in (1, 2):
            parts = min(rounds * num_ctas // rest, tiles // 2)
            if parts > 1:
                cost = rounds * ((row - self.item) / parts + self.item + self.split) + self.combine
                best, least = (parts, cost) if cost < least else (best, least)
        return best


@dataclass
class Schedule:
    """Arrays that a kernel reads, all int32. See `schedule`.

    work: (items, 8). m_block, head, batch, first tile, number of tiles, part (-1: not split), and
        two zeros.
    tiles: (tiles + 1, 2). n_block, and the bit tile or -1 for a full one; columns ascend in a row.
        Items without tiles refer to the last one as their first.
    bits: (bit tiles and spare ones, tile_m / 64, 128, 2), in fragment order; `num_bit_tiles` of
        them are used.
    combine: (split rows, 8). m_block, head, batch, first part, number of parts, and three zeros.
    kv_lens: (batch,), the whole length each; for calls that give none.
    counts: (2,). Numbers of items in `work` and of rows in `combine`: read on the GPU, so that
        a CUDA graph's replays see what `update_` has changed.
    num_bit_tiles: Entries of `bits` in use.
    num_splits: Number of splits of all split rows; the config's `split_shapes` are those of each.
    num_ctas: Number of CTAs to launch; they take items off the list until none is left.
    tile: Height and width of the tiles.
    """

    work: Tensor
    tiles: Tensor
    bits: Tensor
    combine: Tensor
    kv_lens: Tensor
    counts: Tensor
    num_bit_tiles: int
    num_splits: int
    num_ctas: int
    tile: tuple[int, int]

    def arrays(self) -> list[Tensor]:
        """The arrays in the order of `ARRAYS`."""
        return [self.work, self.tiles, self.bits, self.combine, self.kv_lens, self.counts]

    def to(self, device: torch.device) -> Schedule:
        """The same schedule with its arrays on another device, where they share one buffer."""
        arrays: dict[str, Any] = dict(zip(ARRAYS, moved(self.arrays(), device), strict=True))
        return replace(self, **arrays)

    def update_(self, other: Schedule) -> None:
        """Take over another schedule in place, so that captured CUDA graphs follow it.

        Raises:
            ValueError: As `check_capacity`.
        """
        self.check_capacity(other)
        for name in ARRAYS:
            new = other.used(name)
            getattr(self, name)[: len(new)] = new
        self.num_bit_tiles = other.num_bit_tiles

    def used(self, name: str) -> Tensor:
        """An array of a schedule that was just made, without spare entries."""
        array: Tensor = getattr(self, name)
        return array[: self.num_bit_tiles] if name == "bits" else array

    def check_capacity(self, other: Schedule) -> None:
        """Whether `update_` would work.

        Raises:
            ValueError: The other schedule is for another tile, or has more of something than fits
                into this one.
        """
        if other.tile != self.tile:
            raise ValueError(f"the schedule is for tiles of {other.tile}, this one of {self.tile}")
        if other.num_splits > self.num_splits:
            raise ValueError(
                f"no room for {other.num_splits} splits of rows: there were {self.num_splits}"
            )
        for name in ARRAYS:
            new, capacity = len(other.used(name)), len(getattr(self, name))
            if new > capacity:
                raise ValueError(
                    f"no room for {new} entries of `{name}`: there were {capacity}; "
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
    facts: DeviceFacts,
    costs: CostModel,
    kv_bytes: int = 0,
    split_last_wave: bool = True,
) -> Schedule:
    """The schedule of a layout of any granularity for a kernel of this tile.

    Args:
        layout: The layout, on any device.
        batch: Number of batch entries.
        heads: Number of query heads.
        tile: (tile_m, tile_n) of the kernel.
        facts: The GPU that runs it: a CTA for each of its multiprocessors.
        costs: Costs of the kernel's work.
        kv_bytes: Size of one head's keys and values, in bytes: heads are taken in groups whose
            keys and values fit the L2 cache together. Default 0: all heads are one group.
        split_last_wave: Split the last rows, where all take about as long, so that no CTA waits
            for them. Default True.

    >>> from sparse_flash import masks
    >>> from sparse_flash.kernels.sm90.config import FORWARD_COSTS
    >>> h200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> layout = masks.global_tokens(128).layout(65536)  # one row of 512 tiles, 511 rows of 1
    >>> s = schedule(layout, 1, 8, (128, 128), h200, FORWARD_COSTS)
    >>> s.work[0, 4].item(), s.work[-1, 4].item(), s.num_splits, len(s.combine)
    (52, 1, 80, 8)
    """
    device = layout.device
    layout = rows_in(on_host(layout, batch * heads, tile), tile)
    starts = int64(numbers(layout.crow_indices))
    owners = int64(numbers(layout.pattern_map.expand(batch, heads))).reshape(-1)  # of pairs
    # Of (batch, head, row) triples, as all that follows.
    begin, end = (take(x, owners).reshape(-1) for x in (starts[:, :-1], starts[:, 1:]))
    tiles, cost = end - begin, take(costs.rows(layout), owners).reshape(-1)
    share = cost.sum() / facts.num_sms
    parts = costs.parts(tiles, cost, share)
    if split_last_wave:
        _split_last(parts, tiles, cost, facts.num_sms, costs)
    shape = (heads, layout.num_block_rows)
    row = blockwise.repeat(parts)
    first, count, part = _items(row, parts, tiles, begin)
    first = where(count > 0, first, layout.num_tiles)
    item_cost = take(cost, row) * maximum(count, 1) / maximum(take(tiles, row), 1)
    long = costs.long_item * share * facts.num_sms / len(row)
    longest = cost.max() if len(cost) else share
    common = minimum(minimum(longest, costs.limit(share)), long)
    groups, left = _head_groups(
        batch * heads, group_count(batch * heads, kv_bytes, facts, costs), share, common, parts
    )
    pair = row // shape[1]
    order = _longest_first(item_cost, take(groups, pair), take(left, pair), long)
    in_parts = where(parts > 1, parts, 0)
    combined, splits = blockwise.nonzero(in_parts), blockwise.starts(in_parts)
    combine = (combined, shape, take(splits, combined), take(parts, combined))
    made = Schedule(
        counts=torch.tensor([len(row), len(combined)], dtype=torch.int32, device=layout.device),
        work=tensor(take(_records(row, shape, first, count, part), order)),
        tiles=_tiles(layout),
        bits=_with_spares(fragment_order(layout.bit_tiles)),
        num_bit_tiles=layout.num_bit_tiles,
        combine=tensor(_records(*combine)),
        kv_lens=torch.full((batch,), layout.kv_len, dtype=torch.int32, device=layout.device),
        num_splits=int(splits[-1]),
        num_ctas=min(len(row), facts.num_sms),
        tile=tile,
    )
    return made if device == layout.device else made.to(device)


def _items(
    row: Numbers, parts: Numbers, tiles: Numbers, begin: Numbers
) -> tuple[Numbers, Numbers, Numbers]:
    """First tile and number of tiles of each item, and its number among all parts, or -1.

    Args:
        row: The row of each item.
        parts: Number of parts of each row.
        tiles: Number of tiles of each row.
        begin: First tile of each row.
    """
    of, length = take(parts, row), take(tiles, row)
    nth = blockwise.arange(len(row), row) - take(blockwise.starts(parts), row)
    # Quotients of floats are exact below 2^53, and take a tenth of the time of `//`.
    start, stop = (int64(convert(length * n, "float64") / of) for n in (nth, nth + 1))
    split = of > 1
    part = where(split, split.cumsum(0) - 1, -1)
    return take(begin, row) + start, stop - start, part


def on_host(
    layout: BlockLayout, pairs: int = 1, tile: tuple[int, int] | None = None
) -> BlockLayout:
    """A layout's copy on the CPU where that has few tiles and rows, or is there; else itself.

    A schedule takes some 100 small operations. On a GPU each takes 5 to 10 us whatever its size,
    and some make the host wait; on a CPU those on a few thousand tiles take 1 to 3 us.

    Args:
        layout: The layout.
        pairs: Number of (batch, head) pairs, whose rows a schedule lists.
        tile: Tile of the schedule; default: the layout's block.
    """
    rows = pairs * max(layout.num_block_rows, layout.num_block_cols)
    cut = _CUT_ON_HOST if tile not in (None, layout.block) else 1
    most = _MOST_WITH_COPY if "_host" in layout.__dict__ else _MOST_ON_HOST // cut
    small = layout.num_tiles <= most and rows <= _MOST_ON_HOST
    return layout.host if small else layout


def backward_schedule(
    layout: BlockLayout,
    batch: int,
    heads: tuple[int, int],
    tile: tuple[int, int],
    facts: DeviceFacts,
    costs: CostModel,
    q_bytes: int = 0,
    split_last_wave: bool = True,
) -> Schedule:
    """The schedule of the transposed layout, by kv heads, for tiles of (keys, queries).

    All is as in `schedule`, with keys and queries exchanged, but for two arguments.

    heads: Numbers of query heads and of key heads. The query heads that share a key head are
        stacked: their tiles follow each other, with block columns counted on.
    q_bytes: Size of all that is read and written for the queries of one key head, in bytes.

    >>> from sparse_flash import masks
    >>> from sparse_flash.kernels.sm90.config import BACKWARD_COSTS
    >>> h200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
    >>> layout = masks.local(100).layout(384)   # columns of 2, 3 and 2 tiles of 128
    >>> s = backward_schedule(layout, 1, (4, 2), (128, 128), h200, BACKWARD_COSTS)
    >>> s.work[:, 4].tolist(), s.tiles[:4, 0].tolist()
    ([6, 6, 4, 4, 4, 4], [0, 1, 3, 4])
    """
    device = layout.device
    layout = on_host(layout, batch * heads[0], tile[::-1])
    stacked = stack_heads(rows_in(RowLayout.of_columns(layout), tile), heads[0] // heads[1])
    plan = schedule(stacked, batch, heads[1], tile, facts, costs, q_bytes, split_last_wave)
    plan = replace(plan, kv_lens=torch.full_like(plan.kv_lens, layout.kv_len))
    return plan if device == layout.device else plan.to(device)


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
    # Of (pattern, row, head) triples.
    counts = host.take(starts.diff(), patterns).transpose(1, 2).flatten()
    begin = host.take(starts[:, :-1], patterns).transpose(1, 2).flatten()
    crow = pad(counts.cumsum(0), (1, 0))
    owner = host.repeat(counts, int(crow[-1]))
    tile = host.arange(len(owner), owner.device) + host.take(begin - crow[:-1], owner)
    rows, columns = layout.num_block_rows, layout.num_block_cols
    index = torch.arange(len(patterns), device=crow.device)[:, None] * rows
    index = index + torch.arange(rows + 1, device=crow.device)
    return BlockLayout(
        layout.q_len,
        size * columns * layout.block[1],
        layout.block,
        crow_indices=host.int32(host.take(crow, index * size)),
        col_indices=host.int32(host.take(layout.col_indices, tile) + owner % size * columns),
        bit_tile_indices=host.take(layout.bit_tile_indices, tile),
        bit_tiles=layout.bit_tiles,
        pattern_map=which.view(groups.shape[:2]).int(),
        validate=False,
    )


def _split_last(
    parts: Numbers, tiles: Numbers, cost: Numbers, num_ctas: int, costs: CostModel
) -> None:
    """Split, in place, what would keep a few CTAs busy for a last round of its own.

    2048 rows of 128 tiles take 132 CTAs 16 rounds, of which the last has work for half of them.
    Where rows differ much, the shortest come last, and there is nothing to gain.
    """
    rest = len(parts) % num_ctas
    if not rest or len(parts) < num_ctas:
        return
    facts = [cost.max(), cost.mean(), parts.max(), tiles.min()]
    if isinstance(parts, Tensor):
        facts = torch.stack(facts).tolist()  # one wait for all
    dearest, mean, most, fewest = facts
    if most == 1 and dearest <= EVEN * mean:
        parts[-rest:] = costs.last_parts(rest, int(fewest), float(mean), num_ctas)


def _with_spares(bits: Tensor) -> Tensor:
    """Space for the bit tiles of other patterns (see `update_`): as many again, to some 2 MiB."""
    spares = min(len(bits) + 16, 1024)
    return host.cat([bits, host.zeros((spares, *bits.shape[1:]), bits.dtype, bits.device)])


def _records(row: Numbers, sizes: tuple[int, int], *fields: Numbers) -> Numbers:
    """m_block, head, batch and the fields of each row index: int32 (n, WORK_FIELDS)."""
    heads, rows = sizes
    pair = row // rows
    matrix = blockwise.zeros((len(row), WORK_FIELDS), row)
    for i, column in enumerate((row - pair * rows, pair % heads, pair // heads, *fields)):
        matrix[:, i] = column
    return matrix


def _tiles(layout: BlockLayout) -> Tensor:
    """Block column and bit tile of each tile, and a last one of zeros: int32 (tiles + 1, 2)."""
    columns = numbers(layout.col_indices), numbers(layout.bit_tile_indices)
    matrix = blockwise.zeros((layout.num_tiles + 1, 2), columns[0])
    for i, column in enumerate(columns):
        matrix[:-1, i] = column
    return tensor(matrix)


def _longest_first(cost: Numbers, group: Numbers, left: Numbers, long: Any) -> Numbers:
    """The order of the items: group by group, in each the longest first.

    Long items that would be the last to end if they began with their group come before all groups.
    They must be few, for they mix the groups, and what these read no longer fits the L2 cache: so
    they cost more than `long`, much more than most. Shorter ones begin in time, as the last groups
    are joined (see `_head_groups`).
    """
    late = (cost > left) & (cost > long)
    by_cost = argsort(-cost)
    return take(by_cost, argsort(take(where(late, -1, group), by_cost)))


def group_count(pairs: int, kv_bytes: int, facts: DeviceFacts, costs: CostModel) -> tuple[int, int]:
    """In how many groups to compute (batch, head) pairs, and the first one that others may join."""
    size, most = (
        max(1, int(share * facts.l2_bytes) // max(1, kv_bytes))
        for share in (costs.l2_share, costs.last_l2_share)
    )
    count = -(-pairs // size)
    first = (pairs - most - 1) * count // max(pairs, 1) + 1
    return count, max(0, min(first, count - 1))


def _head_groups(
    pairs: int, count: tuple[int, int], share: Any, common: Any, like: Numbers
) -> tuple[Numbers, Numbers]:
    """The group of each (batch, head) pair, and the work that a CTA has left when it begins.

    A group must not begin with less work left than its common long items take, for which CTAs
    would wait in the end: such groups join the last one before them, as long as the L2 cache can
    hold their keys and values.

    Args:
        pairs: Number of pairs.
        count: Of `group_count`.
        share: Work of a CTA.
        common: Cost of an item of which a group may have many.
        like: Numbers of the kind to return.

    Returns:
        Groups `(pairs,)`, int16 if possible: numpy sorts them by radix. Work left `(pairs,)`.
    """
    number, first = count
    groups = blockwise.arange(pairs, like) * number // pairs  # of equal size, or nearly
    groups = minimum(groups, maximum(int64(number * (1 - common / share)), first))
    groups = convert(groups, "int16") if pairs < 1 << 15 else groups
    return groups, share * (number - groups) / number
