"""Arrays, and layouts, that move to another device as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.layout import BlockLayout

_ALIGNMENT = 128  # bytes: TMA and vector loads want 16, and caches have lines of 128


def moved(arrays: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The arrays on another device. From a CPU to a GPU they travel as one.

    A copy takes the host some 10 us whatever its size, and one from memory that is not pinned waits
    for the GPU. So the arrays go through one pinned buffer, and become slices of one on the GPU.
    """
    if device.type != "cuda" or any(x.device.type != "cpu" for x in arrays):
        return [x.to(device) for x in arrays]
    starts, end = [], 0
    for x in arrays:
        starts.append(end)
        end += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=True)
    for x, slot in zip(arrays, _slices(buffer, starts, arrays), strict=True):
        np.copyto(slot.numpy(), x.numpy())  # torch copies with threads: see `host`
    # PyTorch keeps pinned memory until copies from it have ended.
    return _slices(buffer.to(device, non_blocking=True), starts, arrays)


def layout_on(cls: type[BlockLayout], layout: BlockLayout, device: torch.device) -> BlockLayout:
    """A layout on another device. One that leaves the CPU remembers its arrays there."""
    known = (layout.ccol_indices, layout.row_indices, layout.transpose_order)
    arrays = list(layout.arrays().values())
    *there, a, b, c = moved([*arrays, *known], device)
    made = cls(*layout.lengths, *there, validate=False, known=(a, b, c))
    if layout.device.type == "cpu":  # an object of its own: `update_` may change the layout
        made.__dict__["_host"] = cls(*layout.lengths, *arrays, validate=False, known=known)
    return made


def _slices(buffer: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a buffer with the dtypes and shapes of other arrays."""
    return [
        buffer[start : start + x.nbytes].view(x.dtype).view(x.shape)
        for start, x in zip(starts, like, strict=True)
    ]
