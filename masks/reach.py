"""How many layers until every token can influence every other."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from sparse_flash.masks import bits
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.modes import plain_torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from sparse_flash.masks.mask import Mask

Bounds = tuple[int | float, int | None]
MAX_BLOCKS = 512  # blocks a side of which bounds are computed
_WORK = 4e10  # words of 64 sources that an exact reach may combine, about a minute's work
_GROUP = 8  # rows of which all unions are tabulated


def union_layout(heads: Sequence[Mask], length: int, block: int) -> BlockLayout:
    """All heads together, as a layer mixes them.

    Args:
        heads: The distinct masks.
        length: Number of tokens.
        block: Smallest size of a block; doubled until there are at most MAX_BLOCKS a side.
    """
    length = integer("reach", "length", length)
    while -(-length // block) > MAX_BLOCKS:
        block *= 2
    return functools.reduce(operator.or_, heads).layout(length, block=(block, block))


@plain_torch()
def reach_bounds(layout: BlockLayout) -> Bounds:
    """(least, most) layers for a square layout of one pattern, from its tiles alone.

    The least is infinite where some token surely never influences one that it should; the most is
    None where tiles do not show that every token does.
    """
    return _Tiles(layout).bounds()


@plain_torch()
def layers_to_reach(layout: BlockLayout) -> int | None:
    """The smallest L with (A or I)^L as full as it gets, for a square layout of one pattern.

    All pairs of tokens count; where no stored element lies above the diagonal, all (query, earlier
    key). None where no L is enough.

    Raises:
        ValueError: Elements would have to be followed for too long; the message has the bounds.
    """
    tiles = _Tiles(layout)
    least, most = tiles.bounds()
    if least == math.inf:
        return None
    if least == most:
        return most
    open_ = tiles.open_columns(int(least))
    words = -(-len(open_) * layout.block[1] // 64)
    work = float(least) * words * (layout.num_bit_tiles + 2 * layout.num_block_rows) * 2048
    if work > _WORK:
        raise ValueError(
            f"reach of {layout.q_len} tokens: at least {least} layers, "
            + (f"at most {most}; " if most else "with no upper bound from tiles; ")
            + "following single elements would take minutes: take reach_bounds(length), or a "
            "shorter length"
        )
    followed = _follow(layout, open_, tiles.causal)
    return None if followed is None else max(int(least), followed)


class _Tiles:
    """What the tiles of a layout say about paths, as bool matrices of blocks."""

    def __init__(self, layout: BlockLayout) -> None:
        if layout.q_len != layout.kv_len:
            raise ValueError(
                f"reach needs as many queries as keys, got {layout.q_len}, {layout.kv_len}"
            )
        n, size = layout.num_block_rows, layout.block[0]
        rows, cols = layout.tile_rows, layout.col_indices.long()
        entries = layout.bit_tile_indices.long()
        whole, diagonal = entries == FULL_TILE, rows == cols
        single = (layout.q_len - rows * size).clamp(max=size) == 1  # blocks of one token
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
        if layout.q_len % size == 1 or size == 1:  # a token alone has itself
            self.done[-1, -1] = True
        if size == 1:
            self.done = self.done | eye
        self.goal = torch.ones_like(eye).tril() if self.causal else torch.ones_like(eye)

    def bounds(self) -> Bounds:
        """(least, most), by the tiles that hold some element, and by paths through full ones."""
        least = _smallest_power(self.some, lambda power: self.goal & ~power)
        if least is None:
            return math.inf, None
        n = len(self.some)
        most = _smallest_power(self._paths(), lambda power: self.goal & ~self._surely(power, n))
        return max(1, least), None if most is None else max(1, most)

    def open_columns(self, layers: int) -> Tensor:
        """Blocks of sources that tiles do not show to be everywhere after so many layers."""
        sure = self._surely(_power(self._paths(), layers), len(self.some))
        return (self.goal & ~sure).any(0).nonzero().squeeze(1)

    def _paths(self) -> Tensor:
        """Two copies of each block: steps that find some key for each query, one step through a
        full tile, steps that serve each key by some query. Such a path joins all of both ends.
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
    """For each tile: an element in every row, in every column, and all of `lower`; bools `(T,)`.

    Rows and columns beyond the length count as filled.
    """
    n, (height, width) = layout.q_len, layout.block
    kinds = [_filled(layout.bit_tiles, width, lower)]
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
        filled = bits.pack(below[:, :, None] | beyond[:, None, :])
        kinds.append(_filled(layout.bit_tiles[entries[ragged]] | filled, width, lower))
        at[ragged] = layout.num_bit_tiles + torch.arange(len(ragged), device=layout.device)
    found = []
    for flags in zip(*kinds, strict=True):
        every = torch.cat([*flags, flags[0].new_ones(1)])  # the last one is of full tiles
        found.append(every[torch.where(partial, at, len(every) - 1)])
    return found[0], found[1], found[2]


def _filled(packed: Tensor, width: int, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each bit tile: an element in every row, in every column, and all of `lower`."""
    union = packed[:, 0].clone()
    for line in range(1, packed.shape[1]):
        union |= packed[:, line]
    wanted = bits.pack(lower[None])
    return (
        (packed != 0).any(2).all(1),
        bits.unpack(union[:, None], width).flatten(1).all(1),
        ((packed & wanted) == wanted).flatten(1).all(1),
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
    """The smallest L with nothing `missing(matrix^L)`, for powers that only grow; None without."""
    powers = [matrix]  # the 2^k-th
    while bool(missing(powers[-1]).any()):
        square = _product(powers[-1], powers[-1])
        if torch.equal(square, powers[-1]):
            return None
        powers.append(square)
    if len(powers) == 1:
        return 1
    reached, layers = powers[-2], 1 << (len(powers) - 2)  # the largest that is not enough so far
    for k in range(len(powers) - 3, -1, -1):
        further = _product(reached, powers[k])
        if bool(missing(further).any()):
            reached, layers = further, layers + (1 << k)
    return layers + 1


def _follow(layout: BlockLayout, columns: Tensor, causal: bool) -> int | None:
    """Layers until sources in these blocks are everywhere, followed element by element."""
    n, (height, width) = layout.q_len, layout.block
    total = layout.num_block_rows * height
    sources = columns[:, None] * width + torch.arange(width, device=columns.device)
    sources = sources.flatten()
    sources = sources[sources < n]
    words = -(-len(sources) // 64)
    seen = torch.zeros(total, words, dtype=torch.int64, device=columns.device)
    place = torch.arange(len(sources), device=columns.device)
    seen[sources, place // 64] = torch.ones_like(place) << place % 64
    goal = _goal(n, sources, words, causal)
    step, layers = _Step(layout), 0
    while not torch.equal(seen[:n] & goal, goal):
        wider = step(seen)
        layers += 1
        if torch.equal(wider, seen):
            return None
        seen = wider
    return layers


def _goal(n: int, sources: Tensor, words: int, causal: bool) -> Tensor:
    """A bit for each source that a token is to be influenced by: int64 `(n, words)`."""
    parts = []
    for tokens in torch.arange(n, device=sources.device).split(1024):
        wanted = (tokens[:, None] >= sources) | (not causal)
        packed = bits.pack(pad(wanted, (0, words * 64 - len(sources)))[None])[0]
        parts.append(packed.contiguous().view(torch.int64))
    return torch.cat(parts)


class _Step:
    """One layer: what each token has seen, and what the tokens that it attends to have seen.

    Each distinct product of a bit tile with a block of keys is made once, by tables of the unions
    of eight rows at a time (Arlazarov, Dinic, Kronrod & Faradzev, 1970): bytes of a bit tile are
    entries of the tables.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        rows, cols = layout.tile_rows, layout.col_indices.long()
        entries = layout.bit_tile_indices.long()
        full = entries == FULL_TILE
        self.full = [cols[full & (rows == i)] for i in range(layout.num_block_rows)]
        order = torch.argsort(cols[~full] * max(1, layout.num_bit_tiles) + entries[~full])
        self.rows, self.cols, self.entries = (x[~full][order] for x in (rows, cols, entries))
        starts = torch.searchsorted(
            self.cols, torch.arange(layout.num_block_cols + 1, device=layout.device)
        )
        self.starts = starts.tolist()

    def __call__(self, seen: Tensor) -> Tensor:
        """The union for each token; int64 `(block rows x block_q, words)`."""
        height, words = self.layout.block[0], seen.shape[1]
        blocks = seen.view(-1, height, words)
        wider = blocks.clone()
        whole = _union(blocks.transpose(0, 1))  # of all tokens of each block
        for i, cols in enumerate(self.full):
            if len(cols):
                wider[i] |= _union(whole[cols])
        for column, (start, stop) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if start < stop:
                self._partial(wider, blocks[column], start, stop)
        return wider.view_as(seen)

    def _partial(self, wider: Tensor, block: Tensor, start: int, stop: int) -> None:
        """Add the products of the partial tiles of one block column."""
        kinds, which = self.entries[start:stop].unique(return_inverse=True)
        packed = self.layout.bit_tiles[kinds].long()  # (kinds, block_q, bytes)
        products = torch.zeros(*packed.shape[:2], block.shape[1], dtype=torch.int64,
                               device=block.device)  # fmt: skip
        for group in range(packed.shape[2]):
            eight = block[_GROUP * group : _GROUP * (group + 1)]
            products |= _unions(eight)[packed[:, :, group]]
        for row, kind in zip(self.rows[start:stop].tolist(), which.tolist(), strict=True):
            wider[row] |= products[kind]


def _unions(rows: Tensor) -> Tensor:
    """The union of each subset of at most eight rows: `(256, words)`, by the subset's bits."""
    table = torch.zeros(1, rows.shape[1], dtype=torch.int64, device=rows.device)
    for k in range(_GROUP):
        table = torch.cat([table, table | rows[k] if k < len(rows) else table])
    return table


def _union(rows: Tensor) -> Tensor:
    """The bitwise or along the first dimension, by halves."""
    while len(rows) > 1:
        half = len(rows) // 2
        rest = rows[2 * half :]
        rows = torch.cat([rows[:half] | rows[half : 2 * half], rest])
    return rows[0]
