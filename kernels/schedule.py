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
from sparse_flash.kernels.head_groups import group_count, head_groups, longest_first
from sparse_flash.masks import blockwise, host
from sparse_flash.masks.blockwise import (
    Numbers,
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
            may come before all groups of heads (see `longest_first`).
        fewest_tiles: Least number of tiles of a part; shorter ones cost more than they balance.
        split: Cost of writing a split and reading it again.
        combine: Cost of launching the kernel that combines parts.
        l2_share: Fraction of the L2 cache for the keys and values of a group of heads; each half
            of the cache may hold a copy.
        last_l2_share: The same for groups that join the last one (see `head_groups`).
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
        starts = int64(numbers(layout.crow_indices))
        partial = blockwise.nonzero(numbers(layout.bit_tile_indices) != FULL_TILE)
        before = blockwise.searchsorted(partial, starts)  # partial tiles before each row
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
    num_ctas: Number of CTAs, or of their slots, that take items off the list until none is left.
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
    rows = rows_in(on_host(layout, batch * heads, tile), tile)
    made = _of_rows(rows, batch, heads, facts, costs, kv_bytes, split_last_wave)
    return made if layout.device == rows.device else made.to(layout.device)


def _of_rows(
    layout: BlockLayout,
    batch: int,
    heads: int,
    facts: DeviceFacts,
    costs: CostModel,
    kv_bytes: int,
    split_last_wave: bool,
    kv_len: int | None = None,
) -> Schedule:
    """As `schedule`, where the layout's blocks are the tiles. kv_len: Number of keys."""
    pairs, starts = batch * heads, int64(numbers(layout.crow_indices))
    owners = int64(numbers(layout.pattern_map.expand(batch, heads))).reshape(-1)  # of pairs
    begin, tiles, cost = starts[:, :-1], starts[:, 1:] - starts[:, :-1], costs.rows(layout)
    # Of (batch, head, row) triples, as all that follows.
    begin, tiles, cost = (
        take(x, owners).reshape(-1)
        for x in (where(tiles > 0, begin, layout.num_tiles), tiles, cost)
    )
    share = cost.sum() / facts.num_sms
    parts = costs.parts(tiles, cost, share)
    if split_last_wave:
        _split_last(parts, tiles, cost, facts.num_sms, costs)
    row = blockwise.repeat(parts)
    records = _records((batch, heads, layout.num_block_rows), begin, tiles)
    work, item_cost, combine = take(records, row), convert(take(cost, row), "float64"), records[:0]
    num_splits = len(row) - len(parts)
    if num_splits:
        combine = _split(work, item_cost, row, parts, records)
        num_splits += len(combine)
    long = costs.long_item * share * facts.num_sms / len(row)
    longest = cost.max() if len(cost) else share
    common = minimum(minimum(longest, costs.limit(share)), long)
    count = group_count(pairs, kv_bytes, facts, costs)
    groups, left = head_groups(pairs, count, share, common, parts)
    pair = row // layout.num_block_rows
    late = item_cost > take(maximum(left, long), pair)
    order = longest_first(item_cost, take(groups, pair), late)
    lens = layout.kv_len if kv_len is None else kv_len
    return Schedule(
        counts=tensor(blockwise.int32([len(row), len(combine)], row)),
        work=tensor(take(work, order)),
        tiles=_tiles(layout),
        bits=_with_spares(fragment_order(layout.bit_tiles)),
        num_bit_tiles=layout.num_bit_tiles,
        combine=tensor(combine),
        kv_lens=tensor(blockwise.int32([lens] * batch, row)),
        num_splits=num_splits,
        num_ctas=min(len(row), facts.num_sms),
        tile=layout.block,
    )


def _split(work: Numbers, cost: Numbers, row: Numbers, parts: Numbers, records: Numbers) -> Numbers:
    """Give each part of a row its share of the tiles and of the cost, in place.

    Args:
        work: Records of the items, of which all parts of a row have that of the whole row.
        cost: Their costs, likewise.
        row: The row of each item.
        parts: Number of parts of each row.
        records: Records of the rows.

    Returns:
        Records of the split rows, for `Schedule.combine`.
    """
    of = take(parts, row)
    some = blockwise.nonzero(of > 1)
    of, row = take(of, some), take(row, some)
    part, length = blockwise.arange(len(some), row), int64(take(work[:, 4], some))
    nth = some - take(blockwise.starts(parts), row)
    # Quotients of floats are exact below 2^53, and take a tenth of the time of `//`.
    start, stop = (int64(convert(length * n, "float64") / of) for n in (nth, nth + 1))
    cost[some] = take(cost, some) * maximum(stop - start, 1) / maximum(length, 1)
    for field, value in ((3, take(work[:, 3], some) + start), (4, stop - start), (5, part)):
        work[some, field] = convert(value, "int32")
    combined = blockwise.nonzero(parts > 1)
    combine, parts = take(records, combined), take(parts, combined)
    combine[:, 3], combine[:, 4], combine[:, 5] = blockwise.starts(parts)[:-1], parts, 0
    return combine


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
    made = _of_rows(
        on_host(stacked, batch * heads[1], tile),
        batch,
        heads[1],
        facts,
        costs,
        q_bytes,
        split_last_wave,
        kv_len=layout.kv_len,
    )
    return made if device == made.work.device else made.to(device)


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
    made = host.zeros((len(bits) + spares, *bits.shape[1:]), bits.dtype, bits.device)
    numbers(made)[: len(bits)] = numbers(bits)
    return made


def _records(sizes: tuple[int, int, int], begin: Numbers, tiles: Numbers) -> Numbers:
    """Items that are whole rows: int32 (batch x heads x rows, WORK_FIELDS)."""
    batch, heads, rows = sizes
    matrix = blockwise.zeros((*sizes, WORK_FIELDS), begin)
    matrix[..., 0] = blockwise.arange(rows, begin)
    matrix[..., 1] = blockwise.arange(heads, begin)[:, None]
    matrix[..., 2] = blockwise.arange(batch, begin)[:, None, None]
    records = matrix.reshape(-1, WORK_FIELDS)
    records[:, 3], records[:, 4], records[:, 5] = begin, tiles, -1
    return records


def _tiles(layout: BlockLayout) -> Tensor:
    """Block column and bit tile of each tile, and a last one of zeros: int32 (tiles + 1, 2)."""
    columns = numbers(layout.col_indices), numbers(layout.bit_tile_indices)
    matrix = blockwise.zeros((layout.num_tiles + 1, 2), columns[0])
    for i, column in enumerate(columns):
        matrix[:-1, i] = column
    return tensor(matrix)
