"""Token orders: permutations of a sequence, such as the pixels of an image along a curve.

In raster order a block of 128 tokens is half a line of a 256-pixel image. In Morton order it is a
patch of 8 x 16 pixels, so that near pixels are near in the sequence.

A mask with an order, `mask.through(order)`, expects q, k and v in that order. Attention does not
permute them. The model permutes its tokens once, after the embedding and the positions, with
`order.permute(x)`, and restores the order of its output with `order.restore(x)`. All layers between
work on permuted tokens; layers that act on single tokens do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sparse_flash.masks.arguments import integer, sizes
from sparse_flash.masks.data import Data
from sparse_flash.masks.mask import named
from sparse_flash.masks.modes import derived, plain_torch, reduce_without_derived, unreadable
from sparse_flash.masks.tables import IndexTable
from sparse_flash.masks.validation import MAX_LENGTH
from torch import Tensor


class TokenOrder:
    """A permutation of the tokens. Built by `raster`, `morton`, `hilbert` and `order`.

    >>> from sparse_flash import masks
    >>> masks.morton(2, 4).permutation
    tensor([0, 1, 4, 5, 2, 3, 6, 7])
    >>> image = torch.arange(8)[None, :, None] * 10  # (batch, tokens, dim) in raster order
    >>> tokens = masks.morton(2, 4).permute(image)
    >>> tokens[0, :, 0]
    tensor([ 0, 10, 40, 50, 20, 30, 60, 70])
    >>> masks.morton(2, 4).restore(tokens).equal(image)
    True
    """

    __reduce_ex__ = reduce_without_derived

    def __len__(self) -> int:
        raise NotImplementedError

    def _make(self) -> Tensor:
        """The permutation, int64 on the CPU."""
        raise NotImplementedError

    @derived
    def permutation(self) -> Tensor:
        """Original position (of pixels: row * width + column) of each token, int64 `(n,)`."""
        return self._make()

    @derived
    def inverse(self) -> Tensor:
        """Token at each original position, int64 `(n,)`."""
        return torch.argsort(self.permutation)

    @derived
    def table(self) -> IndexTable:
        """The permutation as an index table for masks."""
        return IndexTable(self.permutation)

    @derived
    def inverse_table(self) -> IndexTable:
        """The inverse permutation as an index table for masks."""
        return IndexTable(self.inverse)

    def permute(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tokens in this order: result[p] = x[permutation[p]] along `dim`.

        Args:
            x: Tensor with one entry per token along `dim`, such as (b, s, h, d); differentiable.
            dim: Dimension of the tokens; default 1.

        Raises:
            ValueError: x has another number of tokens.
        """
        return self._select(x, dim, self.table)

    def restore(self, x: Tensor, dim: int = 1) -> Tensor:
        """The inverse of `permute`: result[permutation[p]] = x[p] along `dim`.

        Args and errors: As of `permute`.
        """
        return self._select(x, dim, self.inverse_table)

    def _select(self, x: Tensor, dim: int, table: IndexTable) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"x of shape {tuple(x.shape)} has no dimension {dim}: pass dim=")
        if x.shape[dim] != len(self):
            raise ValueError(
                f"{self!r} orders {len(self)} tokens, but x of shape {tuple(x.shape)} has "
                f"{x.shape[dim]} along dim {dim}: pass dim= the dimension of the tokens"
            )
        return x.index_select(dim, table.on(x.device))


@dataclass(frozen=True, repr=False)
class ImageOrder(TokenOrder):
    """An order of the pixels of an image of `height` x `width`."""

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

    def __len__(self) -> int:
        return self.height * self.width

    def __repr__(self) -> str:
        return f"{self.name}({self.height}, {self.width})"

    def _make(self) -> Tensor:
        row, col = (torch.arange(n, device="cpu") for n in (self.height, self.width))
        key = {"raster": _raster_key, "morton": _morton_key, "hilbert": _hilbert_key}[self.name]
        return _ascending(key(row[:, None], col).flatten())


@dataclass(frozen=True, repr=False)
class OwnOrder(TokenOrder):
    """An order from a permutation. Built by `order`; compares by content and name."""

    data: Data
    name: str | None = None

    def __len__(self) -> int:
        return self.data.shape[1]

    def __repr__(self) -> str:
        return f"order({self.data!r}{'' if self.name is None else f', {self.name!r}'})"

    def _make(self) -> Tensor:
        return torch.from_numpy(self.data.content.astype(np.int64))


@named
def order(
    permutation: Tensor | np.ndarray | Sequence[int] | str, name: str | None = None
) -> OwnOrder:
    """A custom order: token p is at position permutation[p] of the original sequence.

    Masks are defined on original positions: allowed(p, r) = mask(permutation[p], permutation[r]).
    The caller permutes the tokens from which q, k and v are computed by `order.permute(x)`, and
    restores their order by `order.restore(x)`.

    Args:
        permutation: Each of 0..n-1 once, `(n,)`: a tensor (on any device) or array of integers, a
            list, or the text printed by repr. Copied. (A repr of more than 1 MiB of data is
            abbreviated and does not evaluate.)
        name: Name in pictures and tables; orders with different names are different.

    Raises:
        TypeError: The entries are not integers, or a tensor has no data.
        ValueError: An entry is missing, repeated or out of range, or the text is damaged.

    >>> from sparse_flash import masks
    >>> by_score = masks.order(torch.tensor([2, 0, 3, 1]), name="by score")
    >>> mask = masks.local(1).through(by_score)
    >>> mask == eval(repr(mask), vars(masks)), len(by_score)
    (True, 4)
    >>> x = torch.tensor([10, 20, 30, 40])
    >>> by_score.permute(x, dim=0), by_score.restore(by_score.permute(x, dim=0), dim=0).equal(x)
    (tensor([30, 10, 40, 20]), True)
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"order: name must be a str, got {name!r}")
    if isinstance(permutation, str):
        content = Data.from_text("order", permutation, np.int32).content
    else:
        content = _integers(permutation)
    n = len(content)
    if not 1 <= n <= MAX_LENGTH:
        raise ValueError(f"order: the permutation must have 1..{MAX_LENGTH} entries, got {n}")
    outside = content[(content < 0) | (content >= n)]
    if len(outside):
        raise ValueError(
            f"order: {int(outside[0])} is not in 0..{n - 1}: a permutation of {n} tokens holds "
            f"each of 0..{n - 1} once"
        )
    counts = np.bincount(content, minlength=n)
    if counts.max() > 1:
        raise ValueError(
            f"order: {int(counts.argmax())} occurs {int(counts.max())} times and "
            f"{int(counts.argmin())} never: a permutation holds each of 0..{n - 1} once; "
            "torch.argsort(key, stable=True) makes one from any key"
        )
    return OwnOrder(Data((1, n), content.astype(np.int32)), name)


def _integers(values: Any) -> np.ndarray:
    """A one-dimensional array of integers."""
    if isinstance(values, Tensor):
        reason = unreadable(values)
        if reason:
            raise TypeError(f"order: the permutation must hold integers, and {reason}")
        with plain_torch():
            values = values.detach().cpu().numpy()
    elif not isinstance(values, np.ndarray):
        values = np.asarray(sizes("order", "permutation", values, 0))
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise TypeError(
            "order: the permutation must be one-dimensional integers, got shape "
            f"{values.shape} of {values.dtype}"
        )
    return values.astype(np.int64)


def _ascending(keys: Tensor) -> Tensor:
    """The order of distinct keys, all at least 0."""
    if torch.compiler.is_dynamo_compiling():  # the graph computes it
        return torch.argsort(keys)
    end = int(keys.max()) + 1
    if end > 8 * len(keys):
        return torch.argsort(keys)
    place = np.full(end, -1)
    place[keys.numpy()] = np.arange(len(keys))
    return torch.from_numpy(place[place >= 0])


def _raster_key(row: Tensor, col: Tensor) -> Tensor:
    return row * len(col) + col


def _morton_key(row: Tensor, col: Tensor) -> Tensor:
    """Interleave the bits of row and column (Morton, 1966), row bits first."""
    return _spread(row) << 1 | _spread(col)


def _spread(x: Tensor) -> Tensor:
    """Bit i of numbers below 2^32 moves to bit 2 i (Warren, Hacker's Delight, 7-2)."""
    for shift, kept in (
        (16, 0x0000FFFF0000FFFF),
        (8, 0x00FF00FF00FF00FF),
        (4, 0x0F0F0F0F0F0F0F0F),
        (2, 0x3333333333333333),
        (1, 0x5555555555555555),
    ):
        x = (x | x << shift) & kept
    return x


def _hilbert_key(row: Tensor, col: Tensor) -> Tensor:
    """Distance along the Hilbert curve of the enclosing square of 2^k pixels (Hilbert, 1891).

    From the top bit down, each quadrant adds its rank. The next level is rotated so that the curve
    is continuous.
    """
    side = 1 << (max(len(row), len(col)) - 1).bit_length()
    x, y = torch.broadcast_tensors(col, row)
    key = torch.zeros_like(x)
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
def raster(height: int, width: int) -> ImageOrder:
    """Line by line: token p is pixel (p // width, p % width)."""
    return ImageOrder("raster", height, width)


@named
def morton(height: int, width: int) -> ImageOrder:
    """Z-order: interleaved bits of row and column; aligned runs of 4^k tokens are squares."""
    return ImageOrder("morton", height, width)


@named
def hilbert(height: int, width: int) -> ImageOrder:
    """The Hilbert curve: like Morton order, but adjacent tokens are adjacent pixels.

    (If the image is not a square of 2^k pixels, parts of the curve outside it are omitted, and the
    sequence jumps there.)

    >>> order = hilbert(8, 8).permutation
    >>> steps = (order.diff() // 8).abs() + (order % 8).diff().abs()
    >>> bool(((order % 8).diff().abs() + (order // 8).diff().abs() == 1).all())
    True
    """
    return ImageOrder("hilbert", height, width)
