"""The pictures of README and the site: each PNG carries the numbers that it shows."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tools import io_model, path_tables, tables

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# Ink, grid line, ours, and the baselines, by theme; backgrounds are transparent.
THEMES = {
    "light": ("#24292f", "#d0d7de", "#4051b5", ("#8c959f", "#adb5bd", "#ced4da")),
    "dark": ("#e6edf3", "#3d444d", "#8c9eff", ("#8b949e", "#6e7681", "#484f58")),
}
MASK = "local(256) | global_tokens(64) | butterfly(128)"
MASK_LENGTH, MASK_CELLS = 4096, 128
_CASES = {
    "16K dense": "dense",
    "16K causal": "causal",
    "16K random 0.25": "random blocks,\n25 % kept",
    "16K random 0.05": "random blocks,\n5 % kept",
    "64K butterfly": "butterfly",
    "64K local+global": "local + one\nglobal block",
}


def speed_data() -> dict[str, Any]:
    """TFLOP/s at head_dim 128 by pass, case and implementation."""
    return {
        which: {
            case: {
                baseline: round(found[f"{case} d128"][baseline]["tflops"], 1)
                for baseline in tables.BASELINES
            }
            for case in _CASES
        }
        for which in ("forward", "backward")
        for found in [tables.bench_rows(which)]
    }


@functools.cache
def mask_data() -> dict[str, Any]:
    """The mask, and the kept fraction of each cell of its picture, in per cent."""
    from sparse_flash import masks

    grid = masks.parse(MASK).layout(MASK_LENGTH).coverage(MASK_CELLS)
    return {"mask": MASK, "length": MASK_LENGTH, "cells": (grid * 100).round().int().tolist()}


def _figures() -> dict[Path, Callable[[], dict[str, Any]]]:
    kinds = {"speed": speed_data, "mask": mask_data, "io": io_model.data, "path": path_tables.data}
    return {
        IMAGES / f"{name}-{theme}.png": data for name, data in kinds.items() for theme in THEMES
    }


FIGURES = _figures()


def stored_data(path: Path) -> dict[str, Any] | None:
    """The numbers that a figure carries; None where there is no figure yet."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return json.loads(image.text["data"])  # type: ignore[attr-defined]


def write(path: Path) -> None:
    """Draw a figure."""
    name, theme = path.stem.rsplit("-", 1)
    data = FIGURES[path]()
    draw = {"speed": _draw_speed, "mask": _draw_mask, "io": _draw_io, "path": _draw_path}[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(data, theme).savefig(path, dpi=160, transparent=True, metadata={"data": json.dumps(data)})


def _draw_speed(data: dict[str, Any], theme: str) -> Any:
    """Grouped bars, forward and backward."""
    from matplotlib.figure import Figure

    ink, line, ours, others = THEMES[theme]
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    width = 0.8 / len(tables.BASELINES)
    for axes, (which, cases) in zip(figure.subplots(2, 1, sharex=True), data.items(), strict=True):
        for i, (baseline, color) in enumerate(zip(tables.BASELINES, (ours, *others), strict=False)):
            heights = [case[baseline] for case in cases.values()]
            coordinates = [j + (i - 1) * width for j in range(len(cases))]
            label = tables.TITLES.get(baseline, baseline)
            bars = axes.bar(coordinates, heights, width * 0.92, color=color, label=label)
            if baseline == "ours":
                axes.bar_label(bars, fmt="%.0f", color=ink, fontsize=8, padding=2)
        axes.set_ylabel(f"{which}, TFLOP/s", color=ink)
        names = [f"{_CASES[case]}\n{case.split()[0]} tokens" for case in cases]
        axes.set_xticks(range(len(cases)), names)
        axes.set_ylim(0, 800)
        axes.tick_params(colors=ink, length=0)
        axes.grid(axis="y", color=line, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[:].set_visible(False)
    figure.axes[0].tick_params(labelbottom=False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=4, frameon=False, labelcolor=ink
    )
    return figure


def _draw_mask(data: dict[str, Any], theme: str) -> Any:
    """Cells of the attention matrix: the fuller, the stronger."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    ink, line, ours, _ = THEMES[theme]
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    axes = figure.subplots()
    colors = LinearSegmentedColormap.from_list("", [(*_rgb(ours), 0.0), (*_rgb(ours), 1.0)])
    edge = (0, data["length"], data["length"], 0)
    axes.imshow(data["cells"], cmap=colors, vmin=0, vmax=100, extent=edge, interpolation="none")
    ticks = range(0, data["length"] + 1, data["length"] // 4)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    axes.set_xlabel("key", color=ink)
    axes.set_ylabel("query", color=ink)
    axes.tick_params(colors=ink, length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(line)
    return figure


def _draw_io(data: dict[str, Any], theme: str) -> Any:
    return io_model.draw(data, THEMES[theme])


def _draw_path(data: dict[str, Any], theme: str) -> Any:
    return path_tables.draw(data, THEMES[theme])


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]
