"""Bias by distances on an image as the kernels see it: a value for each pair of distances.

Token p at row y and column x of an image has the number a(p) = y (2 width - 1) + x. All pairs of
distances are numbered alike, so that the value of query q and key k has the index
a(q) - a(k) + center: kernels subtract once, where the definition subtracts and clips twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sparse_flash.kernels.distance_table import folded
from torch import Tensor


class ImageBias(NamedTuple):
    """Values by distances, table[h, clip(y_q - y_k) + r_y, clip(x_q - x_k) + r_x].

    table: float32 (h, 2 r_y + 1, 2 r_x + 1).
    coordinates: Row and column of each token, int32 (2, height, width).
    """

    table: Tensor
    coordinates: Tensor

    @property
    def sides(self) -> tuple[int, int]:
        """Numbers of distances along both sides of the image."""
        _, height, width = self.coordinates.shape
        return 2 * height - 1, 2 * width - 1

    @property
    def length(self) -> int:
        """Number of values of a head."""
        height, width = self.sides
        return height * width

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the image."""
        return self.coordinates[0].numel()


def image_numbers(bias: ImageBias, count: int) -> Tensor:
    """a(p) of the positions 0 to count - 1, int32 (count,); later tokens are as the last one."""
    y, x = bias.coordinates
    numbers = (y * bias.sides[1] + x).flatten()
    if count <= len(numbers):
        return numbers[:count].contiguous()
    return torch.cat((numbers, numbers[-1:].expand(count - len(numbers))))


def image_values(bias: ImageBias, unit: float) -> Tensor:
    """The values divided by `unit`, float32 (h, length)."""
    values = bias.table
    for dim, count in enumerate(bias.sides, 1):
        r = values.shape[dim] // 2
        if values.shape[dim] != count:
            distances = torch.arange(-(count // 2), count // 2 + 1, device=values.device)
            values = values.index_select(dim, distances.clamp(-r, r) + r)
    return (values / unit).flatten(1)


def image_gradient(bias: ImageBias, sums: Tensor) -> Tensor:
    """Gradient of the table, from those of the values (h, length)."""
    found = sums.unflatten(1, bias.sides)
    for dim, count in enumerate(bias.sides, 1):
        r = bias.table.shape[dim] // 2
        found = folded(found, dim, count // 2, r)
    return found
