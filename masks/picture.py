"""Pictures of patterns: downsampled by exact counts, never by sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHADES = " ░▒▓█"


def cell_size(length: int, block: int, size: int) -> int:
    """Tokens per picture cell: a divisor or multiple of `block`, so that about `size` cells result.

    >>> cell_size(65536, 128, 256), cell_size(1024, 128, 256), cell_size(200, 128, 256)
    (256, 4, 1)
    """
    if length > size * block:
        return block * -(-length // (size * block))
    return next(c for c in range(1, block + 1) if block % c == 0 and length <= c * size)


def areas(shape: tuple[int, int], cells: list[int]) -> Tensor:
    """The number of elements that each cell covers; ragged cells cover fewer."""
    rows, cols = (
        (length - torch.arange(0, length, cell, device="cpu")).clamp(max=cell)
        for length, cell in zip(shape, cells, strict=True)
    )
    return rows[:, None] * cols


def count_parts(tiles: Tensor, cells: list[int]) -> Tensor:
    """Elements in each part of bool tiles that lies in a cell of its own: `(n, parts, parts)`."""
    inner = [min(cell, side) for cell, side in zip(cells, tiles.shape[1:], strict=True)]
    return tiles.unflatten(2, (-1, inner[1])).unflatten(1, (-1, inner[0])).sum((2, 4))


def accumulate(
    grid: Tensor,
    cells: list[int],
    block: tuple[int, int],
    rows: Tensor,
    cols: Tensor,
    counts: Tensor,
) -> None:
    """Add element counts `(n, parts, parts)` of tiles to the cells that they lie in."""
    lines = [
        (index[:, None] * side + torch.arange(parts, device=grid.device) * (side // parts)) // cell
        for index, side, parts, cell in zip(
            (rows, cols), block, counts.shape[1:], cells, strict=True
        )
    ]
    target = lines[0][:, :, None] * grid.shape[1] + lines[1][:, None, :]
    # A tile at a ragged end may reach past the last cell; nothing is counted there.
    inside = (lines[0] < grid.shape[0])[:, :, None] & (lines[1] < grid.shape[1])[:, None, :]
    grid.view(-1).index_add_(0, target[inside], counts[inside].to(grid.dtype))


def text(grid: Tensor) -> str:
    """Shades of a grid of fractions; blank only where empty, solid only where full."""
    levels = (grid * (len(_SHADES) - 1)).round().clamp(1, len(_SHADES) - 2).long()
    levels = torch.where(grid <= 0, 0, torch.where(grid >= 1, len(_SHADES) - 1, levels))
    lines = ["".join(_SHADES[level] * 2 for level in row) for row in levels.tolist()]
    bar = "─" * (2 * grid.shape[1])
    return "\n".join([f"┌{bar}┐", *(f"│{line}│" for line in lines), f"└{bar}┘"])


def draw(grid: Tensor, shape: tuple[int, int], title: str) -> Figure:
    """A matplotlib figure of a grid of fractions, with token indices on the axes."""
    from matplotlib.figure import Figure

    # Whatever is kept must be seen, however thin: from 0.25 on, by the square root of the fraction.
    ink = torch.where(grid > 0, 0.25 + 0.75 * grid.sqrt(), grid)
    figure = Figure(figsize=(5.2, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    extent = (0, shape[1], shape[0], 0)
    axes.imshow(ink.numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set_title(title, fontsize=9, wrap=True)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    per_cell = f"{-(-shape[0] // grid.shape[0])} x {-(-shape[1] // grid.shape[1])}"
    caption = f"a pixel: about {per_cell} elements; white: none kept; darker: more kept"
    figure.supxlabel(caption, fontsize=7)
    return figure
