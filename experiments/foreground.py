"""Content-based attention: blocks with foreground attend to each other.

foreground(64)                          blocks of 64 tokens that hold a nonzero token
foreground(64, threshold=40)            tokens above 40
foreground(64) | block_local(64, 1)     and a mask for all blocks

The layout of each sequence follows from its own tokens, so that this attention uses the content of
an image where a mask uses only positions. It is a variant, not a fixed sparsity pattern.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from sparse_flash.experiments.parallel import Workers
from sparse_flash.experiments.selected import Selected, arguments
from sparse_flash.masks import BlockLayout, Mask
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from sparse_flash import block_sparse_attention

KERNEL_TILE = 128  # kernels unite smaller blocks to tiles of this many tokens
_NAME = re.compile(r"\bforeground\s*\(")
_CALL = re.compile(r"(foreground\s*\([^()]*\))\s*(?:\|(.*))?", re.DOTALL)


class CapacityError(ValueError):
    """A batch with more foreground than the capacity of the layout."""


@dataclass(frozen=True)
class Foreground(Selected):
    """Blocks with foreground attend to each other, all other blocks to themselves.

        layout[i, j] = (F_i and F_j) or i == j or mask[i, j],    F_i = any(tokens of i > threshold)

    In Morton order a block of 64 tokens is a square of 8 x 8 pixels. A row without foreground
    attends to its own block. Its output is then a mean of values as in every other row. An empty
    row would give zeros, and max pooling would choose these over negative values.
    """

    block: int = 64
    """Size of the blocks, in tokens."""
    threshold: int = 0
    """Largest token that counts as background."""
    capacity: float = 1.0
    """Largest part of the attention matrix that a batch may store, 0..1; saves memory. A batch that
    needs more has rows of NaN, and training stops with a CapacityError."""
    mask: Mask | None = None
    """Mask of whole blocks for all rows, whatever the image."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        for name, least in (("block", 1), ("threshold", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        if isinstance(self.capacity, bool) or not isinstance(self.capacity, int | float):
            raise ValueError(f"capacity must be a number, got {self.capacity!r}")
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity must be above 0 and at most 1, got {self.capacity}")
        if self.mask is not None and self.mask.on_device:
            raise ValueError(
                "foreground takes masks whose rule is known before training, not one that reads "
                f"data on the device, got {self.mask!r}"
            )

    @property
    def digest(self) -> str:
        """Identifies the settings that affect training; the mask counts by its layout."""
        settings = (self.block, self.threshold, self.capacity)
        return hashlib.sha256(repr(("foreground", *settings)).encode()).hexdigest()

    def make(self, length: int, heads: int, head_dim: int) -> FromTokens:
        """The module of a layer."""
        return FromTokens()

    def token_layouts(self, length: int, extra: int = 0) -> ForegroundLayouts:
        """The module that makes the layout of a batch, for all layers.

        Args:
            length: Tokens that attention sees.
            extra: Number of them that come before those of the task: the CLS token.

        Raises:
            ValueError: The mask has other lengths, blocks that are not whole, or patterns per head.
        """
        return ForegroundLayouts(self, length, extra)

    def density(self, length: int) -> None:
        """None: it depends on the images. Training measures it."""

    def tile_density(self, length: int) -> None:
        """None, as the density."""

    def flops(self, length: int, head_dim: int) -> None:
        """None, as the density."""

    def static_blocks(self, length: int) -> Tensor:
        """The blocks stored for every image: the diagonal and the mask, bool (n, n).

        Raises:
            ValueError: As `token_layouts`.
        """
        n = -(-length // self.block)
        table = torch.eye(n, dtype=torch.bool)
        if self.mask is None:
            return table
        layout = self.mask.layout(length, block=(self.block, self.block))
        if layout.num_patterns > 1:
            raise ValueError("foreground takes masks that all heads and batch entries share")
        if layout.num_partial:
            raise ValueError(
                f"the mask beside foreground must consist of whole blocks of {self.block} tokens, "
                f"but {self.mask!r} cuts {layout.num_partial} of them: take "
                f"block_local({self.block}, 1), or another block"
            )
        table[layout.tile_rows.long(), layout.col_indices.long()] = True
        return table


class FromTokens(nn.Module):
    """Attention with a layout that the encoder sets for each batch, see `Encoder.hidden`."""

    layout: BlockLayout | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        if self.layout is None:
            raise RuntimeError("this attention needs the layout of a batch: call it in an Encoder")
        return block_sparse_attention(q, k, v, self.layout, kv_lens=kv_lens)


class ForegroundLayouts(nn.Module):
    """Makes the layouts of batches on their device, and measures them, without synchronization.

    Args:
        kind: Settings.
        length: Tokens that attention sees.
        extra: Number of them before those of the task; their blocks count as foreground.

    Attributes:
        layout: That of the last batch; `layout.check()` raises if it exceeds the capacity.

    Raises:
        ValueError: As `Foreground.static_blocks`; or the capacity is below the blocks that every
            image stores.

    >>> layouts = ForegroundLayouts(Foreground(block=2), length=8)
    >>> layouts(torch.tensor([[0, 3, 0, 0, 0, 0, 9, 0]])).to_dense()[::2, ::2].int()
    tensor([[1, 0, 0, 1],
            [0, 1, 0, 0],
            [0, 0, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """

    static: Tensor
    sums: Tensor
    exceeded: Tensor

    def __init__(self, kind: Foreground, length: int, extra: int = 0) -> None:
        super().__init__()
        self.kind, self.length, self.extra = kind, length, extra
        self.layout: BlockLayout | None = None
        static = kind.static_blocks(length)
        least = static.float().mean().item()
        if kind.capacity < least:
            raise ValueError(
                f"capacity={kind.capacity} is below the {least:.4f} of the matrix that every image "
                "stores: raise it"
            )
        sizes = (length - kind.block * torch.arange(len(static))).clamp(max=kind.block)
        for name, value in (
            ("static", static),
            ("sizes", sizes.double()),
            ("sums", torch.zeros(4, dtype=torch.float64)),
            ("exceeded", torch.zeros((), dtype=torch.bool)),
        ):
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> BlockLayout:
        """The layout of tokens `(b, s)`, with a pattern for each sequence."""
        block, n = self.kind.block, len(self.static)
        inked = pad(tokens > self.kind.threshold, (self.extra, 0), value=True)
        inked = pad(inked, (0, n * block - self.length)).unflatten(1, (n, block)).any(2)
        table = inked[:, :, None] & inked[:, None] | self.static
        capacity, tiles = None, int(self.kind.capacity * table.numel())
        if self.kind.capacity < 1:
            capacity = (tiles, 0)
            self.exceeded.logical_or_(table.sum() > tiles)
        if self.training:
            self._measure(table)
        lengths = ((block, block), self.length)
        self.layout = BlockLayout.from_blocks(table[:, None], *lengths, capacity=capacity)
        return self.layout

    def _measure(self, table: Tensor) -> None:
        """Add to `sums`: images; stored elements, tiles, kernel tiles, as parts of the matrix."""
        parts = table.double().mean((1, 2)).sum()
        elements = parts
        if self.length % self.kind.block:
            elements = torch.einsum("bij,i,j->", table.double(), self.sizes, self.sizes)
            elements = elements / self.length**2
        computed = torch.full_like(parts, torch.nan)
        if KERNEL_TILE % self.kind.block == 0:
            side = KERNEL_TILE // self.kind.block
            united = max_pool2d(table.float()[:, None], side, ceil_mode=True)
            computed = united.double().mean((1, 2, 3)).sum()
        elif self.kind.block % KERNEL_TILE == 0:
            computed = parts
        count = torch.full_like(parts, len(table))
        self.sums += torch.stack([count, elements, parts, computed])

    def check(self) -> None:
        """Raise if any batch so far exceeded the capacity. Synchronizes the host.

        Raises:
            CapacityError: The message has the setting to change.
        """
        if self.exceeded:
            raise CapacityError(
                f"a batch stores more than capacity={self.kind.capacity} of the attention matrix: "
                "raise capacity of foreground(...), or threshold"
            )


def check_layouts(model: nn.Module) -> None:
    """Raise CapacityError if a batch exceeded the capacity of layouts that its tokens decide."""
    for module in model.modules():
        if isinstance(module, ForegroundLayouts):
            module.check()


def take_sums(model: nn.Module, workers: Workers) -> list[float]:
    """The sums of training batches since the last call, over all workers; empty without any."""
    for module in model.modules():
        if isinstance(module, ForegroundLayouts):
            sums = module.sums.tolist()
            module.sums.zero_()
            return list(workers.sums(*sums))
    return []


def added(a: list[float], b: list[float]) -> list[float]:
    """Element by element; an empty list is zero.

    >>> added([], [1.0, 2.0]), added([1.0, 2.0], [1.0, 2.0])
    ([1.0, 2.0], [2.0, 4.0])
    """
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else a or b


def mean_densities(sums: list[float]) -> dict[str, float]:
    """Measured densities of the images of training, means; empty where nothing was measured.

    The computed density is that of tiles of 128 x 128, which kernels compute.

    >>> mean_densities([4.0, 1.0, 1.0, 2.0])
    {'density': 0.25, 'tile_density': 0.25, 'computed_density': 0.5}
    """
    if not sums or not sums[0]:
        return {}
    names = ("density", "tile_density", "computed_density")
    found = zip(names, (total / sums[0] for total in sums[1:]), strict=True)
    return {name: value for name, value in found if not math.isnan(value)}


def is_foreground(text: str) -> bool:
    """Whether a text is of this kind.

    >>> is_foreground("foreground(64) | local(3)"), is_foreground("local(3)")
    (True, False)
    """
    return _NAME.search(text) is not None


def read_foreground(text: str) -> Foreground:
    """The kind of a text.

    Raises:
        ValueError: It cannot be read.

    >>> read_foreground("foreground(128, capacity=0.1) | block_local(128, 1)")
    Foreground(block=128, threshold=0, capacity=0.1, mask=block_local(128, 1))
    """
    from sparse_flash.experiments.user_code import read_mask

    found = _CALL.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"{text}: write foreground(64), foreground(64, threshold=40), or foreground(64) | "
            "MASK, with foreground first and once"
        )
    try:
        call: Any = ast.parse(found[1], mode="eval").body
        given = arguments(call, Foreground, "foreground")
        if "mask" in given:
            raise ValueError("the mask comes after it: foreground(64) | block_local(64, 1)")
        if found[2] is not None:
            if is_foreground(found[2]):
                raise ValueError("foreground is given twice")
            given["mask"] = read_mask(found[2].strip())
        return Foreground(**given)
    except SyntaxError as error:
        raise ValueError(f"{text}: {error.msg}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None
