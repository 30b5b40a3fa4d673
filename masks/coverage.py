"""Exact counts of elements and tiles that a layout covers, and advice about speed."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from sparse_flash.masks import bits
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.layout import BlockLayout

_WASTEFUL = 4.0  # computed density / density; above this ratio a hint is shown
_AS_DENSE = 0.95  # computed density from which the hint says `as much as dense`
_GRID_CELLS = 1 << 27  # largest table of kernel tiles; above, tile numbers are sorted
_CHUNK = 1 << 22  # elements processed per step


def grid_of(layout: BlockLayout, size: int, pattern: int) -> Tensor:
    """The kept fraction of each cell of a picture: see `BlockLayout.coverage`."""
    one = layout.pattern(pattern)
    shape, block = (one.q_len, one.kv_len), one.block
    cells = [cell_size(n, b, size) for n, b in zip(shape, block, strict=True)]
    sizes = [-(-n // c) for n, c in zip(shape, cells, strict=True)]
    grid = torch.zeros(sizes, dtype=torch.float64, device=one.device)
    rows, cols = one.tile_rows, one.col_indices.long()
    if all(cell >= side for cell, side in zip(cells, block, strict=True)):
        _accumulate(grid, cells, block, rows, cols, one.tile_counts[:, None, None])
    else:  # a tile spans several cells: count the elements of each part
        chunk = max(1, _CHUNK // (block[0] * block[1]))
        for part in torch.arange(one.num_tiles, device=one.device).split(chunk):
            counts = _count_parts(one.tiles(part), cells)
            _accumulate(grid, cells, block, rows[part], cols[part], counts)
    return (grid / _areas(shape, cells).to(grid)).float()


def cell_size(length: int, block: int, size: int) -> int:
    """Tokens per picture cell: a divisor or multiple of `block` that gives about `size` cells.

    >>> cell_size(65536, 128, 256), cell_size(1024, 128, 256), cell_size(200, 128, 256)
    (256, 4, 1)
    """
    if length > size * block:
        return block * -(-length // (size * block))
    return next(c for c in range(1, block + 1) if block % c == 0 and length <= c * size)


def _areas(shape: tuple[int, int], cells: list[int]) -> Tensor:
    """Number of elements in each cell; fewer at ragged ends."""
    rows, cols = (
        (length - torch.arange(0, length, cell, device="cpu")).clamp(max=cell)
        for length, cell in zip(shape, cells, strict=True)
    )
    return rows[:, None] * cols


def _count_parts(tiles: Tensor, cells: list[int]) -> Tensor:
    """Number of elements in each cell-sized part of bool tiles: `(n, parts, parts)`."""
    inner = [min(cell, side) for cell, side in zip(cells, tiles.shape[1:], strict=True)]
    return tiles.unflatten(2, (-1, inner[1])).unflatten(1, (-1, inner[0])).sum((2, 4))


def _accumulate(
    grid: Tensor,
    cells: list[int],
    block: tuple[int, int],
    rows: Tensor,
    cols: Tensor,
    counts: Tensor,
) -> None:
    """Add element counts `(n, parts, parts)` of tiles to their cells."""
    lines = [
        (index[:, None] * side + torch.arange(parts, device=grid.device) * (side // parts)) // cell
        for index, side, parts, cell in zip(
            (rows, cols), block, counts.shape[1:], cells, strict=True
        )
    ]
    target = lines[0][:, :, None] * grid.shape[1] + lines[1][:, None, :]
    # A tile at a ragged end may extend past the last cell.
    inside = (lines[0] < grid.shape[0])[:, :, None] & (lines[1] < grid.shape[1])[:, None, :]
    grid.view(-1).index_add_(0, target[inside], counts[inside].to(grid.dtype))


def computed_fractions(layout: BlockLayout, tile: tuple[int, int]) -> Tensor:
    """The fraction of each pattern's elements that lie in nonempty tiles of a size.

    A tile is nonempty if at least one of its elements is allowed: `retile` to this size would store
    it. Tiles begin at (0, 0). Ragged tiles count only elements within the lengths.

    Args:
        layout: The layout, of any block size.
        tile: (rows, columns) of the tiles.

    Returns:
        Fractions 0..1, float64 `(num_patterns,)` on the CPU.
    """
    sides = [-(-n // t) for n, t in zip((layout.q_len, layout.kv_len), tile, strict=True)]
    touched = _Touched(layout.num_patterns, sides, layout.device)
    owner, row = layout.tile_rows // layout.num_block_rows, layout.tile_rows % layout.num_block_rows
    top, left = row * layout.block[0], layout.col_indices.long() * layout.block[1]
    whole = layout.bit_tile_indices < 0
    if layout.block == tuple(tile):
        whole = torch.ones_like(whole)  # stored tiles are the computed ones
    _mark_full(layout, tile, touched, owner[whole], top[whole], left[whole])
    if not bool(whole.all()):
        some = ~whole
        entries = layout.bit_tile_indices[some].long()
        _mark_partial(layout, tile, touched, owner[some], top[some], left[some], entries)
    owner, rows, cols = touched.tiles()
    heights = (layout.q_len - rows * tile[0]).clamp(max=tile[0])
    widths = (layout.kv_len - cols * tile[1]).clamp(max=tile[1])
    area = torch.zeros(layout.num_patterns, dtype=torch.int64, device=layout.device)
    area.index_add_(0, owner, heights * widths)
    return (area.double() / (layout.q_len * layout.kv_len)).cpu()


class _Touched:
    """The set of nonempty tiles, as (pattern, row, column)."""

    def __init__(self, patterns: int, sides: list[int], device: torch.device) -> None:
        self.sides = sides
        cells = patterns * sides[0] * sides[1]
        small = cells <= _GRID_CELLS
        self.table = torch.zeros(cells, dtype=torch.bool, device=device) if small else None
        self.keys: list[Tensor] = [torch.empty(0, dtype=torch.int64, device=device)]

    def add(self, owner: Tensor, row: Tensor, col: Tensor) -> None:
        key = (owner * self.sides[0] + row) * self.sides[1] + col
        if self.table is not None:
            self.table[key] = True
        else:
            self.keys.append(key.unique())

    def tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        table = self.table
        key = torch.cat(self.keys).unique() if table is None else table.nonzero().squeeze(1)
        row, col = key // self.sides[1], key % self.sides[1]
        return row // self.sides[0], row % self.sides[0], col


def _mark_full(
    layout: BlockLayout,
    tile: tuple[int, int],
    touched: _Touched,
    owner: Tensor,
    top: Tensor,
    left: Tensor,
) -> None:
    """Add the tiles that overlap full blocks."""
    bottom = (top + layout.block[0]).clamp(max=layout.q_len) - 1
    right = (left + layout.block[1]).clamp(max=layout.kv_len) - 1
    row, col = top // tile[0], left // tile[1]
    across = right // tile[1] - col + 1
    counts = (bottom // tile[0] - row + 1) * across
    most = ((layout.block[0] - 1) // tile[0] + 2) * ((layout.block[1] - 1) // tile[1] + 2)
    for blocks in torch.arange(len(top), device=top.device).split(max(1, _CHUNK // most)):
        block = torch.repeat_interleave(blocks, counts[blocks])
        first = torch.repeat_interleave(
            counts[blocks].cumsum(0) - counts[blocks], counts[blocks], output_size=len(block)
        )
        nth = torch.arange(len(block), device=top.device) - first
        i, j = nth // across[block], nth % across[block]
        touched.add(owner[block], row[block] + i, col[block] + j)


def _mark_partial(
    layout: BlockLayout,
    tile: tuple[int, int],
    touched: _Touched,
    owner: Tensor,
    top: Tensor,
    left: Tensor,
    entries: Tensor,
) -> None:
    """Add the tiles that overlap partial blocks; cells divide both blocks and tiles."""
    cell = math.gcd(layout.block[0], tile[0]), math.gcd(layout.block[1], tile[1])
    order = entries.argsort()
    chunk = max(1, _CHUNK // (layout.block[0] * layout.block[1]))
    bounds = torch.arange(0, layout.num_bit_tiles + chunk, chunk, device=entries.device)
    starts = torch.searchsorted(entries[order], bounds).tolist()
    for number, (begin, end) in enumerate(itertools.pairwise(starts)):
        some = _nonempty_cells(layout, slice(number * chunk, (number + 1) * chunk), cell)
        for blocks in order[begin:end].split(max(1, _CHUNK // (some.shape[1] * some.shape[2]))):
            index, i, j = some[entries[blocks] - number * chunk].nonzero(as_tuple=True)
            index = blocks[index]
            row, col = (top[index] + i * cell[0]) // tile[0], (left[index] + j * cell[1]) // tile[1]
            touched.add(owner[index], row, col)


def _nonempty_cells(layout: BlockLayout, part: slice, cell: tuple[int, int]) -> Tensor:
    """Whether each cell of some bit tiles has an allowed element: bool `(n, rows, columns)`."""
    tiles, width = layout.bit_tiles[part], cell[1]
    if width % 8 == 0:
        width //= 8  # compare bytes, without unpacking
    else:
        tiles = bits.unpack(tiles, layout.block[1])
    return (tiles != 0).unflatten(2, (-1, width)).unflatten(1, (-1, cell[0])).any(4).any(2)


def percent(fraction: float) -> str:
    """A fraction with three digits, in percent.

    >>> percent(0.13912), percent(1.0), percent(0.000123)
    ('13.9 %', '100 %', '0.0123 %')
    """
    digits = f"{100 * fraction:.3g}"
    return f"{float(digits):g} %" if "e" in digits else f"{digits} %"


def hint(density: float, computed: float, kernel_tile: tuple[int, int] | None) -> str | None:
    """Advice if few of the computed elements are allowed, else None.

    Args:
        density: Allowed elements / all elements.
        computed: Elements in executed tiles / all elements.
        kernel_tile: Default tile of the kernel; None if the layout's own blocks are computed.

    >>> hint(0.139, 1.0, None)
    '13.9 % of elements in 100 % of tiles: costs as much as dense; another token order or smaller \
blocks may help'
    """
    if computed <= _WASTEFUL * density:
        return None
    if computed >= _AS_DENSE:
        cost = "costs as much as dense"
    else:
        cost = f"costs {percent(computed)} of dense attention"
        cost += f", {computed / density:.2g} times its share" if density else ""
    smaller = "smaller blocks"
    if kernel_tile:  # its size does not depend on the blocks of the layout
        smaller = f"a pattern of {kernel_tile[0]} x {kernel_tile[1]} blocks"
    return (
        f"{percent(density)} of elements in {percent(computed)} of tiles: {cost}; "
        f"another token order or {smaller} may help"
    )
