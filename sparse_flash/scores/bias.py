"""Biases of the scores, as values that hold tensors.

p_i is the position of query i, p_j that of key j; q_offset and kv_starts are included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_flash.masks.arguments import integer
from sparse_flash.masks.modes import is_fake
from sparse_flash.masks.orders import TokenOrder


class ScoreBias:
    """A sum of terms that are added to the scores; made by `alibi`, `relative`, `relative2d`."""

    @property
    def terms(self) -> tuple[ScoreBias, ...]:
        """The summands."""
        return (self,)

    def __add__(self, other: ScoreBias) -> ScoreBias:
        """Both terms."""
        if not isinstance(other, ScoreBias):
            return NotImplemented
        return Sum(self.terms + other.terms)


class Sum(ScoreBias):
    """Several terms."""

    def __init__(self, terms: tuple[ScoreBias, ...]) -> None:
        self._terms = terms

    @property
    def terms(self) -> tuple[ScoreBias, ...]:
        """The summands."""
        return self._terms

    def __repr__(self) -> str:
        return " + ".join(map(repr, self._terms))


class Alibi(ScoreBias):
    """-slopes[h] |p_i - p_j|."""

    def __init__(self, slopes: Tensor) -> None:
        _check("alibi", "slopes", slopes, "(h,)", 1)
        self.slopes = slopes

    def __repr__(self) -> str:
        return f"alibi(slopes of {tuple(self.slopes.shape)})"


class Relative(ScoreBias):
    """table[h, clip(p_i - p_j, -r, r) + r]."""

    def __init__(self, table: Tensor) -> None:
        _check("relative", "table", table, "(h, 2 r + 1)", 2)
        self.table = table

    def __repr__(self) -> str:
        return f"relative(table of {tuple(self.table.shape)})"


class Relative2d(ScoreBias):
    """table[h, clip(y_i - y_j, -r_y, r_y) + r_y, clip(x_i - x_j, -r_x, r_x) + r_x]."""

    def __init__(self, table: Tensor, height: int, width: int, order: TokenOrder | None) -> None:
        _check("relative2d", "table", table, "(h, 2 r_y + 1, 2 r_x + 1)", 3)
        self.table = table
        self.height = integer("relative2d", "height", height, least=1)
        self.width = integer("relative2d", "width", width, least=1)
        if order is not None and not isinstance(order, TokenOrder):
            raise TypeError(
                f"relative2d: order must be a token order such as masks.morton(height, width), "
                f"got {type(order).__name__}"
            )
        if order is not None and len(order) != height * width:
            raise ValueError(
                f"relative2d: {order!r} orders {len(order)} tokens, but an image of "
                f"{height} x {width} has {height * width}"
            )
        self.order = order
        if order is not None and not torch.compiler.is_compiling():
            order.permutation  # noqa: B018 made now, not in each compiled call

    @property
    def grid(self) -> tuple[int, int, TokenOrder | None]:
        """Height, width and order: terms of the same grid can be added."""
        return self.height, self.width, self.order

    def coordinates(self) -> Tensor:
        """Row and column of each token, int32 (2, height, width), on the table's device.

        Token p is at [:, p // width, p % width]; the shape tells implementations the image's.
        """
        device, shape = self.table.device, (2, self.height, self.width)
        if not torch.compiler.is_compiling() and (self.table.is_meta or is_fake(self.table)):
            return self.table.new_empty(shape, dtype=torch.int32)
        if self.order is None:
            pixel = torch.arange(self.height * self.width, device=device)
        elif torch.compiler.is_compiling():
            pixel = self.order.permutation.to(device)
        else:
            pixel = self.order.table.on(device)
        return torch.stack((pixel // self.width, pixel % self.width)).to(torch.int32).view(shape)

    def __repr__(self) -> str:
        shape = tuple(self.table.shape)
        order = "" if self.order is None else f", {self.order!r}"
        return f"relative2d(table of {shape}, {self.height}, {self.width}{order})"


def alibi(slopes: Tensor) -> Alibi:
    """A linear penalty of the distance: -slopes[h] |p_i - p_j|.

    Source: Press et al., Train Short, Test Long (2022).

    Args:
        slopes: Slope of each query head, floating point `(h,)`; `alibi_slopes` gives the published
            ones. Gradients reach them.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Another shape.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks, scores
    >>> q, k, v = (torch.randn(1, 100, 4, 16) for _ in range(3))
    >>> bias = scores.alibi(scores.alibi_slopes(4))
    >>> block_sparse_attention(q, k, v, masks.causal(), bias=bias).shape
    torch.Size([1, 100, 4, 16])
    """
    return Alibi(slopes)


def relative(table: Tensor) -> Relative:
    """A learned value for each distance: table[h, clip(p_i - p_j, -r, r) + r].

    Sources: Shaw et al. (2018) for clipped distances; Raffel et al., T5 (2020) for scalars.

    Args:
        table: Value by query head and distance, floating point `(h, 2 r + 1)`; column r is distance
            0, later columns are earlier keys. Gradients reach it.

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Another shape, or an even number of columns.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks, scores
    >>> q, k, v = (torch.randn(1, 100, 4, 16) for _ in range(3))
    >>> table = torch.zeros(4, 2 * 20 + 1, requires_grad=True)
    >>> out = block_sparse_attention(q, k, v, masks.local(30), bias=scores.relative(table))
    >>> out.square().sum().backward()
    >>> table.grad.shape
    torch.Size([4, 41])
    """
    return Relative(table)


def relative2d(
    table: Tensor, height: int, width: int, order: TokenOrder | None = None
) -> Relative2d:
    """A learned value for each distance on the grid of an image.

    Token p is pixel (y, x) = (p // width, p % width), or that of order.permutation[p]. The term is
    table[h, clip(y_i - y_j, -r_y, r_y) + r_y, clip(x_i - x_j, -r_x, r_x) + r_x].

    Source: Liu et al., Swin Transformer (2021), whose tables are
    `(h, 2 height - 1, 2 width - 1)`.

    Args:
        table: Value by query head and distances, floating point `(h, 2 r_y + 1, 2 r_x + 1)`.
        height: Rows of the image.
        width: Columns of the image.
        order: Order of the tokens, such as masks.morton(height, width); default: line by line.

    Raises:
        TypeError: No floating-point tensor, or order is not a token order.
        ValueError: Another shape, an even side, or an order of another number of tokens.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks, scores
    >>> q, k, v = (torch.randn(1, 64, 4, 16) for _ in range(3))
    >>> bias = scores.relative2d(torch.randn(4, 15, 15), 8, 8, masks.morton(8, 8))
    >>> block_sparse_attention(q, k, v, masks.full(), bias=bias).shape
    torch.Size([1, 64, 4, 16])
    """
    return Relative2d(table, height, width, order)


def alibi_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
    """The published slopes: 2^(-8 i / n), i = 1..n, for n heads, float32 `(heads,)`.

    For other numbers of heads than powers of two: those of the next lower power n, then every
    second one of 2 n. Source: Press et al., Train Short, Test Long (2022), and their code.

    Args:
        heads: Number of query heads.
        device: Device of the result.

    Raises:
        TypeError: heads is not an int.
        ValueError: heads is below 1.

    >>> from sparse_flash import scores
    >>> scores.alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])
    >>> scores.alibi_slopes(3)
    tensor([0.0625, 0.0039, 0.2500])
    """
    heads = integer("alibi_slopes", "heads", heads, least=1)
    power = 1 << (heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)]
    exponents += [4 * i / power for i in range(1, 2 * power, 2)]
    return torch.tensor([2.0**-e for e in exponents[:heads]], dtype=torch.float32, device=device)


def _check(kind: str, name: str, x: Tensor, shape: str, ndim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{kind}: {name} must be a torch.Tensor {shape}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{kind}: {name} must be floating point, got {x.dtype}")
    if x.ndim != ndim or 0 in x.shape or any(size % 2 == 0 for size in x.shape[1:]):
        odd = "" if ndim == 1 else ", with odd sizes after the heads"
        raise ValueError(f"{kind}: {name} must be {shape}{odd}, got {tuple(x.shape)}")
