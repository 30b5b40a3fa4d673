"""Pictures of layouts: one panel per distinct pattern, downsampled by exact counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sparse_flash.masks.coverage import percent
from sparse_flash.masks.files import atomic_write
from torch import Tensor

from sparse_flash.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sparse_flash.masks.layout import BlockLayout

MOST_PANELS = 8  # panels of a figure
_MOST_TEXTS = 4  # panels in the terminal
_COLUMNS = 4
_LONGEST_LABEL = 60
_LONGEST_TITLE = 240
_SHADES = " ░▒▓█"


def panels(layout: BlockLayout, pattern: int | None, most: int) -> tuple[list[int], str]:
    """The patterns to show, the given one or the first `most`, and a note about the rest."""
    if pattern is not None:
        return [pattern], ""
    left = layout.num_patterns - most
    note = (
        f"and {left} more pattern{'s' * (left > 1)}: pattern=0..{layout.num_patterns - 1} shows one"
    )
    return list(range(min(layout.num_patterns, most))), note if left > 0 else ""


def label(layout: BlockLayout, pattern: int) -> str:
    """The heads and batch entries of a pattern, in words; "" if there is only one pattern.

    >>> from sparse_flash import masks
    >>> a, b = masks.causal(), masks.local(9)
    >>> layout = masks.per_head([a, a, b, a]).layout(64)
    >>> label(layout, 0), label(layout, 1)
    ('heads 0-1, 3', 'head 2')
    >>> label(masks.per_batch([masks.per_head([a, b]), masks.per_head([b, b])]).layout(64), 1)
    'batch entry 0: head 1; batch entry 1: all heads'
    """
    owners = (layout.pattern_map == pattern).tolist()
    batch, heads = layout.pattern_map.shape
    if layout.num_patterns == 1:
        return ""
    entries_of: dict[str, list[int]] = {}  # by their heads
    for entry, row in enumerate(owners):
        if any(row):
            name = _numbers("head", [h for h, mine in enumerate(row) if mine], heads)
            entries_of.setdefault(name, []).append(entry)
    if not entries_of:
        return "no head"
    parts = []
    for name, entries in entries_of.items():
        of = _numbers("batch entr", entries, batch, ("y", "ies"))
        parts.append(name if batch == 1 else of if heads == 1 else f"{of}: {name}")
    return shortened("; ".join(parts), _LONGEST_LABEL)


def _numbers(what: str, numbers: list[int], of: int, endings: tuple[str, str] = ("", "s")) -> str:
    """A list of numbers in words, with runs as ranges."""
    if len(numbers) == of:
        return f"all {what}{endings[1]}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{what}{endings[len(numbers) > 1]} {shown}"


def shortened(text: str, length: int = _LONGEST_TITLE) -> str:
    """Text truncated to `length` characters: the repr of a mask may contain much data."""
    return text if len(text) <= length else text[: length - 3] + "..."


def numbers(layout: BlockLayout, pattern: int | None = None) -> str:
    """The three densities of a layout or of one of its patterns, in words."""
    one = layout if pattern is None or layout.num_patterns == 1 else layout.pattern(pattern)
    return (
        f"density {percent(one.density)}, tile density {percent(one.tile_density)}, "
        f"computed {percent(one.computed_density())}"
    )


def text(layout: BlockLayout, width: int, pattern: int | None) -> str:
    """Pictures for the terminal, one below another: see `BlockLayout.text`."""
    shown, note = panels(layout, pattern, _MOST_TEXTS)
    pictures = []
    for number in shown:
        name = label(layout, number)
        head = f"{name}: {numbers(layout, number)}\n" if name else ""
        pictures.append(head + shades(layout.coverage(width, number).cpu()))
    return "\n".join(pictures + [note] * bool(note))


def shades(grid: Tensor) -> str:
    """Shades of a grid of fractions; blank only if empty, solid only if full."""
    levels = (grid * (len(_SHADES) - 1)).round().clamp(1, len(_SHADES) - 2).long()
    levels = torch.where(grid <= 0, 0, torch.where(grid >= 1, len(_SHADES) - 1, levels))
    lines = ["".join(_SHADES[level] * 2 for level in row) for row in levels.tolist()]
    bar = "─" * (2 * grid.shape[1])
    return "\n".join([f"┌{bar}┐", *(f"│{line}│" for line in lines), f"└{bar}┘"])


def ink(grid: Tensor) -> Tensor:
    """Darkness of each cell, 0..1; single allowed elements remain visible."""
    return torch.where(grid > 0, 0.25 + 0.75 * grid.sqrt(), grid)


def figure(layout: BlockLayout, pattern: int | None, title: str | None) -> Figure:
    """A matplotlib figure with one panel per pattern: see `BlockLayout.plot`."""
    require("matplotlib")  # without it, layout.text() and mask.text() draw in the terminal
    from matplotlib.figure import Figure

    shown, note = panels(layout, pattern, MOST_PANELS)
    columns = min(len(shown), _COLUMNS)
    rows = -(-len(shown) // columns)
    size = (5.2, 5.9) if len(shown) == 1 else (max(2, columns) * 3.4, rows * 3.7 + 0.7)
    made = Figure(figsize=size, dpi=120, layout="constrained")
    resolution = 384 if len(shown) == 1 else 192
    cell = (1, 1)
    for place, number in enumerate(shown):
        grid = layout.coverage(resolution, number).cpu()
        _draw(made.add_subplot(rows, columns, place + 1), grid, layout, number)
        cell = (-(-layout.q_len // grid.shape[0]), -(-layout.kv_len // grid.shape[1]))
    title = (
        title or f"{layout.q_len} x {layout.kv_len}, block {layout.block[0]} x {layout.block[1]}"
    )
    if len(shown) > 1:
        title += f"\n{numbers(layout)} (mean over heads)"
    made.suptitle(shortened(title), fontsize=9, wrap=True)
    caption = (
        f"computed: in 128 x 128 tiles; a pixel: about {cell[0]} x {cell[1]} elements; "
        "white: none allowed; darker: more"
    )
    made.supxlabel("\n".join([note] * bool(note) + [caption]), fontsize=7)
    return made


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, in the format of its suffix; missing folders are created.

    Raises:
        OSError: The path is a folder, or cannot be written.
        ValueError: The suffix is not a known format.
    """
    formats = figure.canvas.get_supported_filetypes()
    ending = path.suffix.removeprefix(".").lower()
    if ending not in formats and not path.is_dir():
        raise ValueError(f"cannot save a picture as {path}: use the suffix .png, .pdf or .svg")
    with atomic_write(path) as file:
        figure.savefig(file, format=ending)


def _draw(axes: Axes, grid: Tensor, layout: BlockLayout, pattern: int) -> None:
    """A grid of fractions, with token indices on the axes."""
    extent = (0, layout.kv_len, layout.q_len, 0)
    axes.imshow(
        ink(grid).numpy(), cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest",
        aspect="auto" if max(extent) > 4 * min(layout.kv_len, layout.q_len) else "equal",
    )  # fmt: skip
    name = label(layout, pattern)
    small = layout.num_patterns > 1
    words = numbers(layout, pattern)
    axes.set_title("\n".join(filter(None, [name, words])), fontsize=6.5 if small else 9, wrap=True)
    axes.set_xlabel("key", fontsize=7 if small else 9)
    axes.set_ylabel("query", fontsize=7 if small else 9)
    axes.tick_params(labelsize=6 if small else 8)
