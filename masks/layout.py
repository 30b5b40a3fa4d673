"""BlockLayout: which tiles of the attention matrix exist, as arrays."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from sparse_flash.masks import bits, check, exchange, picture
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from scipy.sparse import bsr_array

ARRAYS = ["crow_indices", "col_indices", "bit_tile_indices", "bit_tiles", "pattern_map"]
FULL_TILE = -1  # in bit_tile_indices: every element of the tile is allowed


@dataclass(eq=False, repr=False)
class BlockLayout:
    """Block-sparse rows (BSR) of one or more patterns, their transpose, and the distinct bit tiles.

    With P patterns, nq = ceil(q_len / block_q) block rows, nk = ceil(kv_len / block_kv) block
    columns, T stored tiles and N distinct bit tiles, all int32 but the bits:

    - `crow_indices` (P, nq + 1): row i of pattern p owns tiles crow[p, i] to crow[p, i + 1] - 1;
      the patterns follow each other, so crow[p, nq] == crow[p + 1, 0].
    - `col_indices` (T,): the block column of each tile, ascending within a row.
    - `bit_tile_indices` (T,): -1 where the tile is full, otherwise its entry in `bit_tiles`.
    - `bit_tiles` (N, block_q, ceil(block_kv / 8)) uint8: bit j % 8 of byte j // 8 is column j.
      Bits beyond the lengths are 0. A full tile at a ragged end is full up to the lengths.
    - `pattern_map` (1 or batch, 1 or heads): the pattern of each batch entry and head; a size of
      1 means that all share it.
    - `ccol_indices` (P, nk + 1), `row_indices` (T,): the transpose, derived; tile t of the
      transpose is tile `transpose_order[t]` of the rows.

    Build one with `mask.layout(...)`, or from arrays of your own: they are validated.

    Raises:
        TypeError: An array is no tensor, or has the wrong dtype.
        ValueError: Shapes disagree, or indices are out of range, unsorted or repeated.

    >>> from sparse_flash import masks
    >>> layout = masks.causal().layout(256, 256, block=(128, 128))
    >>> layout
    BlockLayout(256 x 256, block 128 x 128, 3 tiles, 2 partial, 1 bit tiles, density 0.502, cpu)
    >>> layout.crow_indices, layout.col_indices
    (tensor([[0, 1, 3]], dtype=torch.int32), tensor([0, 0, 1], dtype=torch.int32))
    """

    q_len: int
    kv_len: int
    block: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    bit_tile_indices: Tensor
    bit_tiles: Tensor
    pattern_map: Tensor
    validate: InitVar[bool] = True
    ccol_indices: Tensor = field(init=False)
    row_indices: Tensor = field(init=False)
    transpose_order: Tensor = field(init=False)
    # Values derived from this layout (plans of kernels). `follow(other)` of each checks a new layout
    # and returns the step that adopts it; `update_` runs the steps once all values have agreed.
    derived: dict[Hashable, Any] = field(init=False, default_factory=dict)

    def __post_init__(self, validate: bool) -> None:
        """Check arrays that come from outside, and derive the transpose."""
        if validate:
            check.check_layout(self)
        rows, nk = self.tile_rows, self.num_block_cols
        patterns = rows // self.num_block_rows
        keys = patterns.long() * nk + self.col_indices
        order = torch.argsort(keys, stable=True)  # rows stay ascending within a column
        starts = torch.arange(self.num_patterns * nk + 1, device=self.device)
        ccol = torch.searchsorted(keys[order], starts)
        cells = torch.arange(self.num_patterns, device=self.device)[:, None] * nk
        cells = cells + torch.arange(nk + 1, device=self.device)
        derived = {
            "ccol_indices": ccol[cells].int(),
            "row_indices": (rows[order] % self.num_block_rows).int(),
            "transpose_order": order.int(),
        }
        for name, value in derived.items():
            setattr(self, name, value)

    def update_(self, other: BlockLayout) -> None:
        """Become another layout of the same lengths, blocks and sharing; the object stays the same.

        Values in `derived` follow: CUDA graphs that were captured with this layout compute the new
        pattern when they are replayed, if it has no more tiles than the old one had.

        Raises:
            ValueError: Lengths, blocks, devices or shared heads differ, or there is no room.

        >>> from sparse_flash import masks
        >>> layout = masks.local(100).layout(300, block=(64, 64))
        >>> layout.update_(masks.sinks(64).layout(300, block=(64, 64)))
        >>> layout.col_indices
        tensor([0, 0, 0, 0, 0], dtype=torch.int32)
        """
        for what in ("lengths", "device"):
            if getattr(self, what) != getattr(other, what):
                given, had = getattr(other, what), getattr(self, what)
                raise ValueError(f"the layout has {what} {given}, but this one has {had}")
        if self.pattern_map.shape != other.pattern_map.shape:
            raise ValueError(
                f"the layout has a pattern map of {tuple(other.pattern_map.shape)}, but this one "
                f"of {tuple(self.pattern_map.shape)}"
            )
        steps = [value.follow(other) for value in list(self.derived.values())]  # may refuse
        for name in (*ARRAYS, "ccol_indices", "row_indices", "transpose_order"):
            setattr(self, name, getattr(other, name))
        for name in ("num_partial", "pattern_densities"):  # what was computed of the old arrays
            self.__dict__.pop(name, None)
        for step in steps:
            step()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles derive their own values."""
        return {**self.__dict__, "derived": {}}

    @property
    def device(self) -> torch.device:
        """Where the arrays live."""
        return self.crow_indices.device

    @property
    def lengths(self) -> exchange.Lengths:
        """q_len, kv_len and block."""
        return self.q_len, self.kv_len, self.block

    @property
    def num_patterns(self) -> int:
        """Distinct patterns that heads and batch entries share."""
        return self.crow_indices.shape[0]

    @property
    def num_block_rows(self) -> int:
        """Blocks of queries: ceil(q_len / block_q)."""
        return -(-self.q_len // self.block[0])

    @property
    def num_block_cols(self) -> int:
        """Blocks of keys: ceil(kv_len / block_kv)."""
        return -(-self.kv_len // self.block[1])

    @property
    def num_tiles(self) -> int:
        """Stored tiles, of all patterns."""
        return self.col_indices.shape[0]

    @property
    def num_bit_tiles(self) -> int:
        """Distinct bit tiles."""
        return self.bit_tiles.shape[0]

    @cached_property
    def num_partial(self) -> int:
        """Stored tiles that are not full."""
        return int((self.bit_tile_indices != FULL_TILE).sum())

    @property
    def tile_rows(self) -> Tensor:
        """The stacked block row of each tile, int64 `(T,)`: pattern x num_block_rows + row."""
        starts = self.crow_indices[:, :-1].flatten().long()
        ends = self.crow_indices[:, 1:].flatten().long()
        rows = torch.arange(len(starts), device=self.device)
        return torch.repeat_interleave(rows, ends - starts, output_size=self.num_tiles)

    @property
    def tile_counts(self) -> Tensor:
        """Allowed elements in each tile, int64 `(T,)`."""
        heights = _extent(self.tile_rows % self.num_block_rows, self.q_len, self.block[0])
        widths = _extent(self.col_indices.long(), self.kv_len, self.block[1])
        if not self.num_bit_tiles:
            return heights * widths
        partial = bits.count(self.bit_tiles)[self.bit_tile_indices.clamp(min=0).long()]
        return torch.where(self.bit_tile_indices == FULL_TILE, heights * widths, partial)

    @cached_property
    def pattern_densities(self) -> Tensor:
        """The kept fraction of each pattern, float64 `(P,)` on the CPU."""
        owner = self.tile_rows // self.num_block_rows
        kept = torch.zeros(self.num_patterns, dtype=torch.int64, device=self.device)
        kept.index_add_(0, owner, self.tile_counts)
        return (kept.double() / (self.q_len * self.kv_len)).cpu()

    @property
    def density(self) -> float:
        """Kept fraction of all (q, kv) elements, 0..1, exact; the mean over batch and heads."""
        return float(self.pattern_densities[self.pattern_map.flatten().cpu().long()].mean())

    def __repr__(self) -> str:
        shape = f"{self.q_len} x {self.kv_len}, block {self.block[0]} x {self.block[1]}"
        shared = "" if self.num_patterns == 1 else f"{self.num_patterns} patterns, "
        return (
            f"BlockLayout({shape}, {shared}{self.num_tiles} tiles, {self.num_partial} partial, "
            f"{self.num_bit_tiles} bit tiles, density {self.density:.3g}, {self.device})"
        )

    def equal(self, other: BlockLayout) -> bool:
        """Whether both describe the same tiles with the same arrays, wherever they live."""
        return (self.q_len, self.kv_len, self.block) == (
            other.q_len,
            other.kv_len,
            other.block,
        ) and all(
            torch.equal(a.cpu(), b.cpu())
            for a, b in zip(self.arrays().values(), other.arrays().values(), strict=True)
        )

    def arrays(self) -> dict[str, Tensor]:
        """The defining arrays by name (the transpose follows from them)."""
        return {name: getattr(self, name) for name in ARRAYS}

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device; itself where it is already there."""
        if torch.empty(0, device=device).device == self.device:
            return self
        arrays: dict[str, Any] = {n: array.to(device) for n, array in self.arrays().items()}
        return BlockLayout(*self.lengths, **arrays, validate=False)

    def transpose(self) -> BlockLayout:
        """The layout with queries and keys exchanged.

        >>> from sparse_flash import masks
        >>> layout = masks.causal().layout(200, 300)
        >>> layout.transpose().transpose().equal(layout)
        True
        """
        order = self.transpose_order.long()
        tiles = bits.unpack(self.bit_tiles, self.block[1]).transpose(1, 2)
        return BlockLayout(
            self.kv_len,
            self.q_len,
            (self.block[1], self.block[0]),
            crow_indices=self.ccol_indices,
            col_indices=self.row_indices,
            bit_tile_indices=self.bit_tile_indices[order],
            bit_tiles=bits.pack(tiles),
            pattern_map=self.pattern_map,
            validate=False,
        )

    def pattern(self, index: int) -> BlockLayout:
        """The layout of one pattern alone, shared by all heads."""
        if not 0 <= index < self.num_patterns:
            raise ValueError(f"pattern {index} of a layout with {self.num_patterns} pattern(s)")
        crow = self.crow_indices[index : index + 1]
        mine = slice(int(crow[0, 0]), int(crow[0, -1]))
        used, indices = torch.unique(self.bit_tile_indices[mine], return_inverse=True)
        has_full = int((used == FULL_TILE).any())
        return BlockLayout(
            self.q_len,
            self.kv_len,
            self.block,
            crow_indices=crow - crow[0, 0],
            col_indices=self.col_indices[mine],
            bit_tile_indices=(indices - has_full).int(),
            bit_tiles=self.bit_tiles[used[has_full:].long()],
            pattern_map=torch.zeros(1, 1, dtype=torch.int32, device=self.device),
            validate=False,
        )

    def tiles(self, select: Tensor | slice = slice(None)) -> Tensor:
        """The elements of the selected tiles (default: all): bool `(n, block_q, block_kv)`.

        Elements beyond the lengths are False.
        """
        entries = self.bit_tile_indices[select]
        height = _extent(self.tile_rows[select] % self.num_block_rows, self.q_len, self.block[0])
        width = _extent(self.col_indices[select].long(), self.kv_len, self.block[1])
        rows = torch.arange(self.block[0], device=self.device) < height[:, None]
        cols = torch.arange(self.block[1], device=self.device) < width[:, None]
        tiles = rows[:, :, None] & cols[:, None, :]
        partial = (entries != FULL_TILE).nonzero().squeeze(1)
        tiles[partial] = bits.unpack(self.bit_tiles[entries[partial].long()], self.block[1])
        return tiles

    def to_dense(self) -> Tensor:
        """Every element: bool `(q_len, kv_len)`, or `(batch or 1, heads or 1, q_len, kv_len)`
        where there are several patterns. For inspection and tests: this one is O(s^2).

        >>> from sparse_flash import masks
        >>> masks.local(1).layout(4, 4).to_dense().int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        (bq, bk), nq, nk = self.block, self.num_block_rows, self.num_block_cols
        grid = torch.zeros(self.num_patterns * nq, nk, bq, bk, dtype=torch.bool, device=self.device)
        grid[self.tile_rows, self.col_indices.long()] = self.tiles()
        dense = grid.view(-1, nq, nk, bq, bk).transpose(2, 3).reshape(-1, nq * bq, nk * bk)
        dense = dense[:, : self.q_len, : self.kv_len]
        return dense[0] if self.pattern_map.numel() == 1 else dense[self.pattern_map.long()]

    def coverage(self, size: int = 256, pattern: int = 0) -> Tensor:
        """The kept fraction of each cell of a grid, exact: float32, at most about `size` a side.

        A cell is a whole number of blocks, or a whole fraction of one, so that nothing is sampled.
        """
        one = self.pattern(pattern)
        shape = (self.q_len, self.kv_len)
        cells = [picture.cell_size(n, b, size) for n, b in zip(shape, self.block, strict=True)]
        sizes = [-(-n // c) for n, c in zip(shape, cells, strict=True)]
        grid = torch.zeros(sizes, dtype=torch.float64, device=self.device)
        rows, cols = one.tile_rows, one.col_indices.long()
        if all(cell >= block for cell, block in zip(cells, self.block, strict=True)):
            picture.accumulate(grid, cells, self.block, rows, cols, one.tile_counts[:, None, None])
        else:  # a tile has parts in several cells: its elements are counted
            chunk = max(1, (1 << 22) // (self.block[0] * self.block[1]))
            for part in torch.arange(one.num_tiles, device=self.device).split(chunk):
                counts = picture.count_parts(one.tiles(part), cells)
                picture.accumulate(grid, cells, self.block, rows[part], cols[part], counts)
        return (grid / picture.areas(shape, cells).to(grid)).float()

    def plot(self, pattern: int = 0, title: str | None = None) -> Figure:
        """A picture of one pattern: white is empty, the darker the fuller. Needs matplotlib."""
        title = title or f"{self.q_len} x {self.kv_len}, density {self.density:.3%}"
        return picture.draw(self.coverage(384, pattern).cpu(), (self.q_len, self.kv_len), title)

    def text(self, width: int = 48, pattern: int = 0) -> str:
        """A picture of one pattern for the terminal.

        >>> from sparse_flash import masks
        >>> print(masks.causal().layout(1024, 1024).text(width=4))
        ┌────────┐
        │▒▒      │
        │██▒▒    │
        │████▒▒  │
        │██████▒▒│
        └────────┘
        """
        return picture.text(self.coverage(width, pattern).cpu())

    def to_scipy(self, pattern: int = 0) -> bsr_array:
        """One pattern as `scipy.sparse.bsr_array` of bools, padded to whole blocks."""
        one = self.pattern(pattern)
        return exchange.to_bsr(self.lengths, one.crow_indices[0], one.col_indices, one.tiles())

    @classmethod
    def from_scipy(cls, matrix: Any, block: tuple[int, int] = (128, 128)) -> BlockLayout:
        """The layout that allows exactly the nonzero elements of a `scipy.sparse` matrix.

        Raises:
            TypeError: It is no scipy.sparse matrix or array.

        >>> import scipy.sparse
        >>> BlockLayout.from_scipy(scipy.sparse.eye_array(256)).num_bit_tiles
        1
        """
        rows, cols, (q_len, kv_len) = exchange.elements(matrix)
        check.check_lengths(q_len, kv_len, block)
        tiles = exchange.tiles_of_coo(rows, cols, -(-kv_len // block[1]), block)
        return cls.from_tiles((q_len, kv_len, block), *tiles)

    @classmethod
    def from_tiles(
        cls,
        lengths: exchange.Lengths,
        rows: Tensor,
        cols: Tensor,
        packed: Tensor,
        entries: Tensor | None = None,
        pattern_map: Tensor | None = None,
    ) -> BlockLayout:
        """Assemble a layout from tiles in any order.

        Args:
            lengths: q_len, kv_len, (block_q, block_kv).
            rows: Stacked block rows, int64 `(T,)`: pattern x num_block_rows + row.
            cols: Block columns, int64 `(T,)`.
            packed: Bit tiles, uint8 `(n, block_q, ceil(block_kv / 8))`, in which full tiles and
                repetitions are recognised.
            entries: For each tile its bit tile, or -1 where it is full; default: one bit tile each.
            pattern_map: As in the class; default: one pattern, shared by all.
        """
        q_len, kv_len, block = lengths
        nq, nk = -(-q_len // block[0]), -(-kv_len // block[1])
        device = rows.device
        if entries is None:
            entries = torch.arange(len(rows), device=device)
        if pattern_map is None:
            pattern_map = torch.zeros(1, 1, dtype=torch.int32, device=device)
        order = torch.argsort(rows * nk + cols)
        rows, cols, entries = rows[order], cols[order], entries[order]
        area = _extent(rows % nq, q_len, block[0]) * _extent(cols, kv_len, block[1])
        if len(packed):
            full = (entries < 0) | (bits.count(packed)[entries.clamp(min=0)] == area)
            entries = torch.where(full, FULL_TILE, entries)
        distinct, entries = _renumber(packed, entries)
        starts = torch.searchsorted(
            rows, torch.arange((int(pattern_map.max()) + 1) * nq + 1, device=device)
        )
        first = torch.arange(int(pattern_map.max()) + 1, device=device)[:, None] * nq
        crow = starts[first + torch.arange(nq + 1, device=device)]
        arrays = (crow.int(), cols.int(), entries.int(), distinct, pattern_map)
        return cls(q_len, kv_len, block, *arrays, validate=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a compressed npz file, atomically; read it back with `BlockLayout.load`."""
        exchange.write_npz(path, self.lengths, self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> BlockLayout:
        """Read what `save` wrote, and validate it.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no layout, or damaged.
        """
        lengths, arrays = exchange.read_npz(path, ARRAYS)
        try:
            return cls(*lengths, **arrays).to(device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no valid layout: {error}") from error


def _renumber(packed: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the distinct bit tiles that are in use, in the order of their first use."""
    partial = entries >= 0
    if not bool(partial.any()):
        return packed[:0], entries
    used, index = torch.unique(entries[partial], return_inverse=True)
    distinct, twin = bits.deduplicate(packed[used])
    index = twin[index]
    first = torch.full((len(distinct),), len(index), device=index.device)
    first.scatter_reduce_(0, index, torch.arange(len(index), device=index.device), "amin")
    order = torch.argsort(first)
    entries = entries.clone()
    entries[partial] = torch.argsort(order)[index]
    return distinct[order], entries


def _extent(index: Tensor, length: int, block: int) -> Tensor:
    """How many of the indices of each block exist: `block`, or less at a ragged end."""
    return (length - index * block).clamp(max=block)
