"""Number of layers until every token can influence every other."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from sparse_flash.masks import bits, build, following
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.memory import available_memory
from sparse_flash.masks.modes import plain_torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.mask import Mask

Bounds = tuple[int | float, int | None]
MAX_BLOCKS = 512  # maximum number of blocks per side for bounds
_SMALLEST = 16  # tokens per block for bounds
_ELEMENTS = 1e9  # maximum number of elements evaluated for bounds, a few seconds
_WORK = 3e10  # words of 64 sources combined for an exact reach, below a minute


def union_layout(heads: Sequence[Mask], length: int, block: int) -> BlockLayout:
    """The union of all heads, which a layer mixes.

    Args:
        heads: The distinct masks.
        length: Number of tokens.
        block: Smallest size of a block; doubled until there are at most MAX_BLOCKS a side.
    """
    block = _block(length, block)
    return functools.reduce(operator.or_, heads).layout(length, block=(block, block))


def _block(length: int, block: int) -> int:
    length = integer("reach", "length", length)
    while -(-length // block) > MAX_BLOCKS:
        block *= 2
    return block


@plain_torch()
def reach_bounds(heads: Sequence[Mask], length: int) -> Bounds:
    """(least, most) layers of all heads together, from tiles alone.

    The minimum is infinite if some token never influences a required one. The maximum is None if
    tiles do not prove that every token does. If there are too many elements to evaluate, undecided
    tiles count as unknown.
    """
    block, mask = _block(length, _SMALLEST), functools.reduce(operator.or_, heads)
    mask.check_lengths(length, length)
    lengths = (length, length, (block, block))
    full, unknown, evaluated = build.classify_tiles(mask, lengths)
    if evaluated * block * block <= _ELEMENTS:
        return _Tiles(mask.layout(*lengths)).bounds()
    rows, cols = (torch.cat(axis) for axis in zip(full, unknown, strict=True))
    n = -(-length // block)
    eye = torch.eye(n, dtype=torch.bool)
    goal = torch.ones_like(eye) if bool((rows < cols).any()) else torch.ones_like(eye).tril()
    least = _smallest_power(_matrix(n, rows, cols) | eye, lambda power: goal & ~power)
    return (math.inf if least is None else least), None


@plain_torch()
def layers_to_reach(layout: BlockLayout) -> int | None:
    """The smallest L for which (A or I)^L is full, for a square layout of one pattern.

    If no stored element lies above the diagonal, only the pairs (query, earlier key) count. None if
    no L suffices.

    Raises:
        ValueError: The search by elements would take too long; the message has the bounds.
    """
    tiles = _Tiles(layout)
    least, most = tiles.bounds()
    if least == math.inf:
        return None
    if least == most:
        return most
    open_ = torch.zeros(layout.num_block_cols, dtype=torch.bool)
    open_[tiles.open_columns(int(least))] = True
    try:
        followed = _follow(layout, open_.repeat_interleave(layout.block[1]), tiles.causal)
    except following.TooLongError as error:
        least = max(int(least), error.layers + 1)
        raise ValueError(
            f"reach of {layout.q_len} tokens: at least {least} layers, "
            + (f"at most {most}; " if most else "with no upper bound from tiles; ")
            + "the exact number would take minutes: use reach_bounds(length), or a "
            "shorter length"
        ) from None
    return None if followed is None else max(int(least), followed)


def _follow(layout: BlockLayout, open_: Tensor, causal: bool) -> int | None:
    """Layers until the open tokens influence all required ones, element by element."""
    n, budget = layout.q_len, following.Budget(_WORK)
    budget.spend(n * n / 2)
    available = available_memory(torch.device("cpu"))
    if available is not None and n * n > available:  # several bit matrices
        raise following.TooLongError(0)
    tokens = following.Tokens.of(following.bit_rows(layout), open_[:n].numpy())
    return following.layers(tokens, causal, budget)


class _Tiles:
    """Paths through the tiles of a layout, as bool matrices of blocks."""

    def __init__(self, layout: BlockLayout) -> None:
        if layout.q_len != layout.kv_len:
            raise ValueError(
                f"reach needs as many queries as keys, got {layout.q_len}, {layout.kv_len}"
            )
        n, size = layout.num_block_rows, layout.block[0]
        rows, cols = layout.tile_rows, layout.col_indices.long()
        entries = layout.bit_tile_indices.long()
        whole, diagonal = entries == FULL_TILE, rows == cols
        single = (layout.q_len - rows * size).clamp(max=size) == 1  # one token per block
        lower = torch.ones(layout.block, dtype=torch.bool, device=layout.device).tril()
        kinds = layout.bit_tiles[entries[diagonal & ~whole].unique()]
        crossing = (kinds & bits.pack(~lower[None])).any()
        self.causal = not bool((rows < cols).any() | crossing | (diagonal & whole & ~single).any())
        by_row, by_col, covers = _coverage(layout, lower)
        eye = torch.eye(n, dtype=torch.bool, device=layout.device)
        self.some = _matrix(n, rows, cols) | eye
        self.whole = _matrix(n, rows[whole], cols[whole])
        self.by_row = _matrix(n, rows[by_row], cols[by_row]) | eye
        self.by_col = _matrix(n, rows[by_col], cols[by_col]) | eye
        done = diagonal & covers & self.causal
        self.done = self.whole | _matrix(n, rows[done], cols[done])
        if layout.q_len % size == 1 or size == 1:  # a single token influences itself
            self.done[-1, -1] = True
        if size == 1:
            self.done = self.done | eye
        self.goal = torch.ones_like(eye).tril() if self.causal else torch.ones_like(eye)

    def bounds(self) -> Bounds:
        """(least, most) layers: from nonempty tiles, and from paths through full tiles."""
        least = _smallest_power(self.some, lambda power: self.goal & ~power)
        if least is None:
            return math.inf, None
        n = len(self.some)
        most = _smallest_power(self._paths(), lambda power: self.goal & ~self._surely(power, n))
        return max(1, least), None if most is None else max(1, most)

    def open_columns(self, layers: int) -> Tensor:
        """Blocks of sources without a proof by tiles after this number of layers."""
        sure = self._surely(_power(self._paths(), layers), len(self.some))
        return (self.goal & ~sure).any(0).nonzero().squeeze(1)

    def _paths(self) -> Tensor:
        """Adjacency of two copies of each block, before and after a step through a full tile.

        Before it, every query of a tile has some key; after it, every key has some query. Such a
        path connects all tokens of both end blocks.
        """
        zero = torch.zeros_like(self.whole)
        return torch.cat(
            [torch.cat([self.by_row, self.whole], 1), torch.cat([zero, self.by_col], 1)]
        )

    def _surely(self, power: Tensor, n: int) -> Tensor:
        return power[:n, n:] | self.done


def _matrix(n: int, rows: Tensor, cols: Tensor) -> Tensor:
    matrix = torch.zeros(n, n, dtype=torch.bool, device=rows.device)
    matrix[rows, cols] = True
    return matrix


def _coverage(layout: BlockLayout, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each tile has an element in every row, in every column, and all of `lower`: `(T,)`.

    Rows and columns beyond the length count as covered.
    """
    n, (height, width) = layout.q_len, layout.block
    kinds = [_filled(layout.bit_tiles, layout.bit_tiles, layout.bit_tiles, width, lower)]
    entries = layout.bit_tile_indices.long()
    rows, cols = layout.tile_rows, layout.col_indices.long()
    last = layout.num_block_rows - 1
    partial = entries != FULL_TILE
    ragged = (partial & ((rows == last) | (cols == last)) & (n % height != 0)).nonzero().squeeze(1)
    at = entries.clone()
    if len(ragged):
        tokens = torch.arange(max(height, width), device=layout.device)
        below = tokens[:height] >= (n - rows[ragged] * height)[:, None]
        beyond = tokens[:width] >= (n - cols[ragged] * width)[:, None]
        tiles = layout.bit_tiles[entries[ragged]]
        by_rows = tiles | bits.pack(below[:, :, None].expand(-1, -1, width))
        by_cols = tiles | bits.pack(beyond[:, None, :].expand(-1, height, -1))
        kinds.append(_filled(by_rows, by_cols, by_rows | by_cols, width, lower))
        at[ragged] = layout.num_bit_tiles + torch.arange(len(ragged), device=layout.device)
    found = []
    for flags in zip(*kinds, strict=True):
        every = torch.cat([*flags, flags[0].new_ones(1)])  # the last entry stands for full tiles
        found.append(every[torch.where(partial, at, len(every) - 1)])
    return found[0], found[1], found[2]


def _filled(
    by_rows: Tensor, by_cols: Tensor, whole: Tensor, width: int, lower: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each bit tile has an element in every row, in every column, all of `lower`."""
    union = by_cols[:, 0].clone()
    for line in range(1, by_cols.shape[1]):
        union |= by_cols[:, line]
    wanted = bits.pack(lower[None])
    return (
        (by_rows != 0).any(2).all(1),
        bits.unpack(union[:, None], width).flatten(1).all(1),
        ((whole & wanted) == wanted).flatten(1).all(1),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() @ b.float()) > 0


def _power(matrix: Tensor, exponent: int) -> Tensor:
    result, square = None, matrix
    while exponent:
        if exponent & 1:
            result = square if result is None else _product(result, square)
        exponent >>= 1
        square = _product(square, square) if exponent else square
    assert result is not None
    return result


def _smallest_power(matrix: Tensor, missing: Callable[[Tensor], Tensor]) -> int | None:
    """The smallest L with nothing `missing(matrix^L)`, for monotone powers; None if none has."""
    powers = [matrix]  # matrix^(2^k)
    while bool(missing(powers[-1]).any()):
        square = _product(powers[-1], powers[-1])
        if torch.equal(square, powers[-1]):
            return None
        powers.append(square)
    if len(powers) == 1:
        return 1
    reached, layers = powers[-2], 1 << (len(powers) - 2)  # largest L known to be too small
    for k in range(len(powers) - 3, -1, -1):
        further = _product(reached, powers[k])
        if bool(missing(further).any()):
            reached, layers = further, layers + (1 << k)
    return layers + 1
