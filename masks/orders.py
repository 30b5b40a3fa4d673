"""Token orders for images: which pixel is the p-th token.

In raster order a block of 128 tokens is half a line of a 256-pixel image; in Morton order it is a
patch of 8 x 16 pixels, so that what is near in the image is near in the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.check import MAX_LENGTH
from sparse_flash.masks.mask import named
from sparse_flash.masks.modes import derived, reduce_without_derived
from sparse_flash.masks.tables import IndexTable
from torch import Tensor


@dataclass(frozen=True, repr=False)
class TokenOrder:
    """A permutation of the pixels of an image of `height` x `width`.

    >>> from sparse_flash import masks
    >>> masks.morton(2, 4).permutation
    tensor([0, 1, 4, 5, 2, 3, 6, 7])
    >>> image = torch.arange(8) * 10
    >>> tokens = image[masks.morton(2, 4).permutation]   # raster to token order
    >>> tokens[masks.morton(2, 4).inverse].equal(image)  # and back
    True
    """

    name: str
    height: int
    width: int

    def __post_init__(self) -> None:
        """The size must be positive."""
        for side in ("height", "width"):
            value = getattr(self, side)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{self!r}: height and width must be positive ints")
            object.__setattr__(self, side, integer(self.name, side, value))
        if len(self) > MAX_LENGTH:
            raise ValueError(f"{self!r} has more than {MAX_LENGTH} pixels")

    __reduce_ex__ = reduce_without_derived

    def __len__(self) -> int:
        return self.height * self.width

    def __repr__(self) -> str:
        return f"{self.name}({self.height}, {self.width})"

    @derived
    def permutation(self) -> Tensor:
        """int64 `(height * width,)`: the raster index (row * width + column) of each token."""
        raster = torch.arange(len(self), device="cpu")
        key = {"raster": _raster_key, "morton": _morton_key, "hilbert": _hilbert_key}[self.name]
        return torch.argsort(
            key(raster // self.width, raster % self.width, self.width), stable=True
        )

    @derived
    def inverse(self) -> Tensor:
        """int64 `(height * width,)`: the token position of each raster index."""
        return torch.argsort(self.permutation)

    @derived
    def table(self) -> IndexTable:
        """The permutation as a table that masks look indices up in."""
        return IndexTable(self.permutation)


def _raster_key(row: Tensor, col: Tensor, width: int) -> Tensor:
    return row * width + col


def _morton_key(row: Tensor, col: Tensor, width: int) -> Tensor:
    """Interleave the bits of row and column (Morton, 1966); row bits are the higher ones."""
    key = torch.zeros_like(row)
    for bit in range(24):
        key |= ((col >> bit) & 1) << (2 * bit) | ((row >> bit) & 1) << (2 * bit + 1)
    return key


def _hilbert_key(row: Tensor, col: Tensor, width: int) -> Tensor:
    """Distance along the Hilbert curve of the enclosing square of 2^k pixels (Hilbert, 1891).

    From the top bit down: each quadrant adds its rank, and the next level is turned so that the
    curve enters where it left the one before.
    """
    side = 1 << max(int(row.max()), int(col.max())).bit_length()
    x, y, key = col.clone(), row.clone(), torch.zeros_like(row)
    half = side >> 1
    while half:
        right, low = (x & half) > 0, (y & half) > 0
        key += half * half * torch.where(right, torch.where(low, 2, 3), torch.where(low, 1, 0))
        flip = right & ~low
        x, y = (
            torch.where(flip, half - 1 - (x & (half - 1)), x & (half - 1)),
            torch.where(flip, half - 1 - (y & (half - 1)), y & (half - 1)),
        )
        x, y = torch.where(low, x, y), torch.where(low, y, x)
        half >>= 1
    return key


@named
def raster(height: int, width: int) -> TokenOrder:
    """Line by line: the p-th token is pixel (p // width, p % width)."""
    return TokenOrder("raster", height, width)


@named
def morton(height: int, width: int) -> TokenOrder:
    """Z-order, by interleaving the bits of row and column: aligned runs of 4^k are squares."""
    return TokenOrder("morton", height, width)


@named
def hilbert(height: int, width: int) -> TokenOrder:
    """The Hilbert curve: like Morton, and neighbours in sequence are neighbours in the image.

    (Where the image is no square of 2^k pixels, the parts of the curve outside it are left out,
    and the sequence jumps there.)

    >>> order = hilbert(8, 8).permutation
    >>> steps = (order.diff() // 8).abs() + (order % 8).diff().abs()
    >>> bool(((order % 8).diff().abs() + (order // 8).diff().abs() == 1).all())
    True
    """
    return TokenOrder("hilbert", height, width)
