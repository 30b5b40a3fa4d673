"""The numbers that predict speed: how much of the attention matrix a kernel computes.

A kernel computes whole tiles, so a pattern with few elements in many tiles costs as much as its
tiles. Three densities, shown side by side, reveal it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from sparse_flash.kernels.choice import best_config
from sparse_flash.kernels.sm90.config import DTYPES, forward_configs
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.coverage import hint, percent
from sparse_flash.masks.layout import BlockLayout
from sparse_flash.masks.modes import plain_torch


@dataclass(frozen=True)
class Densities:
    """Allowed, stored and computed fractions of the attention matrix of a layout.

    Args:
        density: Allowed elements / all elements, 0..1.
        tile_density: Stored tiles / (block rows x block columns), 0..1.
        computed_density: Elements in executed tiles / all elements, 0..1. It predicts the time of
            attention, relative to that of dense attention; with tiles of 64 rows it takes up to
            twice as long.
        tile: (rows, columns) of the executed tiles.
        hint: Advice where computed_density > 4 density, else None.

    The first three are means over batch entries and heads.

    >>> from sparse_flash import masks
    >>> print(densities(masks.local(256).layout(8192), head_dim=128))
    density 6.16 %, tile density 7.67 %, computed density 7.67 % (128 x 128 tiles)
    """

    density: float
    tile_density: float
    computed_density: float
    tile: tuple[int, int]
    hint: str | None

    def __str__(self) -> str:
        return (
            f"density {percent(self.density)}, tile density {percent(self.tile_density)}, computed "
            f"density {percent(self.computed_density)} ({self.tile[0]} x {self.tile[1]} tiles)"
        )

    def record(self) -> dict[str, float]:
        """The three fractions by name, as recorded results keep them."""
        return {
            "density": self.density,
            "tile_density": self.tile_density,
            "computed_density": self.computed_density,
        }


def densities(
    layout: BlockLayout,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    arch: str | None = "sm_90",
) -> Densities:
    """Element, tile and computed density of a layout, and a hint where they are far apart.

    Args:
        layout: The layout, on any device.
        head_dim: Width of a head, at least 1; default 64.
        dtype: Data type of q, k and v; default bfloat16.
        arch: Compute capability of the GPU, as "sm_90", the default: the numbers predict the speed
            on that GPU, wherever the layout is. None: the reference implementation.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: head_dim is below 1, or arch is not a compute capability.

    >>> from sparse_flash import masks
    >>> layout = masks.random_blocks(0.1, block=32).layout(16384, block=(32, 32))
    >>> found = densities(layout, head_dim=128)
    >>> round(found.density, 2), round(found.tile_density, 2), round(found.computed_density, 2)
    (0.1, 0.1, 0.19)
    >>> found = densities(masks.random_blocks(0.05, block=16).layout(4096, block=(16, 16)), 256)
    >>> found.hint.partition(";")[0]
    '4.98 % of elements in 80.4 % of tiles: costs 80.4 % of dense attention, 16 times its share'
    """
    tile = executed_tile(layout, head_dim, dtype, arch)
    density, computed = layout.density, layout.computed_density(tile)
    configs = _configs(layout, head_dim, dtype, arch)
    advice = hint(density, computed, configs[0].tile if configs else None)
    return Densities(density, layout.tile_density, computed, tile, advice)


def computed_density(
    layout: BlockLayout,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    arch: str | None = "sm_90",
) -> float:
    """Elements in the tiles that the forward pass executes / all elements, 0..1.

    It predicts the time of that pass, relative to that of dense attention. The backward pass may
    have other tiles. Arguments and errors are those of `densities`.

    >>> from sparse_flash import masks
    >>> layout = masks.random_blocks(0.1, block=32).layout(16384, block=(32, 32))
    >>> [round(computed_density(layout, head_dim), 2) for head_dim in (64, 128, 256)]
    [0.19, 0.19, 0.57]
    """
    tile = executed_tile(layout, head_dim, dtype, arch)
    return layout.computed_density(tile)


@plain_torch()
def executed_tile(
    layout: BlockLayout, head_dim: int, dtype: torch.dtype, arch: str | None
) -> tuple[int, int]:
    """(rows, columns) of the tiles that the forward pass computes a layout by.

    With few rows of all heads, a plan may take others than these.
    Where no kernel takes the head_dim, the dtype or the GPU, the reference implementation computes
    the layout by its own blocks. Arguments and errors are those of `densities`.

    >>> from sparse_flash import masks
    >>> layout = masks.causal().layout(1024, block=(64, 64))
    >>> executed_tile(layout, 64, torch.bfloat16, "sm_90")
    (128, 128)
    >>> executed_tile(layout, 64, torch.float32, "sm_90")
    (64, 64)
    """
    configs = _configs(layout, head_dim, dtype, arch)
    return best_config(layout, configs).tile if configs else layout.block


def _configs(
    layout: BlockLayout, head_dim: int, dtype: torch.dtype, arch: str | None
) -> tuple[ForwardConfig, ...]:
    """The configs that a plan would choose from, the default first; none where no kernel runs."""
    if not isinstance(layout, BlockLayout):
        raise TypeError(
            f"layout must be a BlockLayout, got {type(layout).__name__}; a mask has one "
            "layout for each length: mask.layout(length)"
        )
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, as torch.bfloat16, got {dtype!r}")
    if arch is not None and not (isinstance(arch, str) and re.fullmatch(r"sm_\d+", arch)):
        raise ValueError(f"arch must be a compute capability, as 'sm_90', or None, got {arch!r}")
    head_dim = integer("densities", "head_dim", head_dim)
    name = str(dtype).removeprefix("torch.")
    # As `attention.HEAD_DIMS`: the reference computes other head_dims.
    if arch != "sm_90" or name not in DTYPES or head_dim < 16 or head_dim % 8:
        return ()
    return forward_configs(name, head_dim)
