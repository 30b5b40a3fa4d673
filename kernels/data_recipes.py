"""Sizes and arguments of the kernels that make a layout's schedule, all known on the host."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from sparse_flash.kernels.data_bits import CutFacts
from sparse_flash.kernels.schedule import WORK_FIELDS, CostModel
from sparse_flash.masks.device_tiles import Grid, StaticSource, grid_of

ALIGNED = 4  # numbers: kernels take arrays at multiples of 16 bytes


class ScheduleSizes(NamedTuple):
    """Sizes of a schedule, all known on the host.

    batch, heads: Batch entries and heads with items.
    rows: Lines of each: rows of tiles, or columns for the backward pass.
    ctas: Number of CTAs.
    extra: Items at most beyond one for each line; a bound of split lines, too.
    groups: Groups of heads that are computed one after the other.
    joined: First group that the ones after it may join.
    """

    batch: int
    heads: int
    rows: int
    ctas: int
    extra: int
    groups: int
    joined: int

    @property
    def total(self) -> int:
        """Lines of all batch entries and heads."""
        return self.batch * self.heads * self.rows

    @property
    def rest(self) -> int:
        """Lines of the last round, which may be split; 0: none."""
        return self.total % self.ctas if self.total >= self.ctas else 0


class Lines(NamedTuple):
    """How the tiles of a layout are listed.

    tile: Queries and keys of a tile.
    heads: Number of query heads.
    group: Query heads of a key head.
    transposed: List by columns, for key heads.
    """

    tile: tuple[int, int]
    heads: int
    group: int
    transposed: bool

    @property
    def height(self) -> int:
        """Rows of a bit tile."""
        return self.tile[1] if self.transposed else self.tile[0]


class Recipe(NamedTuple):
    """Arguments of a schedule's kernels that do not depend on the data: see `recipe_of`.

    lists: The fields of `data_lists.Sizes`.
    items: The numbers of `work_items.WorkItems`.
    own: The numbers of `data_lists.OwnBits`.
    parts: Shape, strides and offset of parts of one array: work, combine, counts, kv_lens, tiles,
        begins, tiles and partial tiles of each line, `own`, and the bit tiles of their own, if any.
    size: Numbers in that array.
    """

    lists: tuple[int, ...]
    items: tuple[float, ...]
    own: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], tuple[int, ...], int], ...]
    size: int


@functools.lru_cache(1024)
def recipe_of(
    source: StaticSource,
    lines: Lines,
    sizes: ScheduleSizes,
    costs: CostModel,
    cut: CutFacts,
) -> Recipe:
    """The recipe of a schedule.

    Args:
        source: Properties of the layout that do not depend on the data.
        lines: How the tiles are listed.
        sizes: Sizes of the schedule.
        costs: Costs of the kernel.
        cut: Facts of a `Cut`.
    """
    stacks = sizes.heads if source.heads[1] == lines.heads else source.heads[1]
    own_heads = stacks if lines.transposed else source.heads[1]
    count = source.heads[0] * own_heads * sizes.rows
    repeats = 1
    if lines.transposed:
        repeats = source.heads[0] * own_heads * lines.group // source.num_patterns
    capacity, own_most = source.capacities(lines.tile, cut.numbered > 0 and not cut.sets)
    capacity, own_most = repeats * capacity, max(1, repeats * own_most)
    grid = grid_of(source.lengths, lines.tile)
    assert grid is not None
    items, most_split = sizes.total + sizes.extra, min(sizes.total, sizes.extra)
    shapes = (
        *((items, WORK_FIELDS), (most_split, WORK_FIELDS), (2,), (sizes.batch,)),
        *((capacity + 1, 2), (count,), (count,), (count,), (own_most if cut.own else 1, 4)),
        *([(own_most, lines.height // 64, 128, 2)] if cut.own else []),
    )
    aligned = (-(-math.prod(shape) // ALIGNED) * ALIGNED for shape in shapes)
    starts = tuple(itertools.accumulate(aligned, initial=0))
    return Recipe(
        lists=list_sizes(source, grid, lines, own_heads, cut),
        items=(
            *(source.lengths[1], sizes.batch, sizes.heads, source.heads[0], own_heads),
            *(sizes.rows, sizes.groups),
            *(capacity, sizes.ctas, sizes.rest, costs.fewest_tiles, sizes.joined),
            *(costs.item, costs.partial_tile - 1, costs.largest_share, costs.split, costs.combine),
            costs.long_item,
        ),
        own=(
            *(grid.rows, *lines.tile, *source.lengths[:2], grid.down, grid.across),
            *(cut.numbered, _all_blocks(grid), int(lines.transposed)),
        ),
        parts=tuple(zip(shapes, map(_strides, shapes), starts[:-1], strict=True)),
        size=starts[-1],
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous array."""
    return tuple(math.prod(shape[n + 1 :]) for n in range(len(shape)))


def list_sizes(
    source: StaticSource,
    grid: Grid,
    lines: Lines,
    stacked: int,
    cut: CutFacts,
) -> tuple[int, ...]:
    """The fields of `data_lists.Sizes`."""
    q_len, kv_len, _ = source.lengths
    return (
        *(grid.rows, grid.cols, *lines.tile, q_len, kv_len, *grid[2:], *source.num_blocks),
        *(source.num_words, _all_blocks(grid), cut.tables, cut.numbered, int(cut.own), cut.known),
        *(source.heads[1], lines.heads, lines.group, stacked),
    )


def _all_blocks(grid: Grid) -> int:
    """The set of all blocks of a tile, as an int32."""
    every = (1 << grid.cells) - 1
    return every - (1 << 32) if every >= 1 << 31 else every
