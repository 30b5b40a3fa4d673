"""Advice in words for a predicted layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_flash.masks import BlockLayout
from sparse_flash.masks.coverage import percent
from sparse_flash.prediction_devices import Gpu

if TYPE_CHECKING:
    from sparse_flash.prediction import Prediction


def advice(layout: BlockLayout, tile: tuple[int, int], gpu: Gpu, made: Prediction) -> list[str]:
    """Sentences about what would make attention faster, or that nothing would.

    Args:
        layout: The layout.
        tile: (rows, columns) of the tiles that the forward pass computes.
        gpu: The GPU.
        made: The prediction without advice.

    >>> from sparse_flash import masks, predict
    >>> predict(masks.full().layout(4096), 8, 64, device="H200").advice[0].partition(" (")[0]
    'as slow as dense attention'
    """
    said = []
    computed, density = layout.computed_density(tile), layout.density
    if not density:
        return ["no query has a key: nothing is computed"]
    if made.speed_up < 1.05:
        said.append(
            f"as slow as dense attention ({made.speed_up:.2f}x): below a density of "
            f"{percent(made.break_even_density)} a pattern of this kind would be faster"
        )
    waste = 1 - layout.tile_density / computed if computed else 0.0
    smaller = layout.block[0] < tile[0] or layout.block[1] < tile[1]
    if smaller and waste > 0.15:
        said.append(
            f"blocks of {layout.block[0]} x {layout.block[1]} waste {waste:.0%} of the computed "
            f"elements, since the kernel computes tiles of {tile[0]} x {tile[1]}: reorder tokens "
            f"so that stored blocks are neighbors, or use blocks of {max(tile)}"
        )
    inside = 1 - density / layout.tile_density
    if inside > 0.5:
        said.append(
            f"{inside:.0%} of the elements of stored tiles are masked: another token order, or a "
            "window that is a multiple of the block, computes fewer"
        )
    busy = made.forward_tflops * computed / max(layout.tile_density, 1e-9)
    if made.forward_ms < 0.03:
        said.append(
            f"the forward pass takes {1e3 * made.forward_ms:.0f} us, mostly launch and latency: "
            "capture the model in a CUDA graph, or raise the batch size"
        )
    elif busy < 0.3 * gpu.tflops and made.speed_up >= 1.05 and computed < 0.5:
        said.append(
            "rows have few tiles, so loading queries and writing results take much of the time: "
            "a denser pattern costs little more"
        )
    if not said:
        said.append(f"well suited: {made.speed_up:.1f}x the speed of dense attention")
    return said
