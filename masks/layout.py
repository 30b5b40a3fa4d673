"""BlockLayout: the stored tiles of the attention matrix, as arrays."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sparse_flash.masks import (
    assemble,
    bits,
    coverage,
    device_builders,
    host,
    io,
    notebook,
    picture,
    scipy_layout,
    validation,
)
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.assemble import extent
from sparse_flash.masks.memory import require_memory
from sparse_flash.masks.modes import derived as derived_property
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.traceable import Traceable
from sparse_flash.masks.transfer import layout_on
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from scipy.sparse import bsr_array

ARRAYS = ["crow_indices", "col_indices", "bit_tile_indices", "bit_tiles", "pattern_map"]
FULL_TILE = assemble.FULL_TILE  # -1 in bit_tile_indices: every element of the tile is allowed


@dataclass(eq=False, repr=False)
class BlockLayout(Traceable):
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
      1 is shared by all.
    - `ccol_indices` (P, nk + 1), `row_indices` (T,): the transpose, derived; tile t of the
      transpose is tile `transpose_order[t]` of the rows.

    Build one with `mask.layout(...)`, or from your own arrays, which are validated.

    Raises:
        TypeError: An array is not a tensor, or has the wrong dtype.
        ValueError: Shapes disagree, or indices are out of range, unsorted or repeated.

    >>> from sparse_flash import masks
    >>> layout = masks.causal().layout(256, 256, block=(128, 128))
    >>> layout
    BlockLayout(256 x 256, block 128 x 128, 3 tiles, 2 partial, 1 bit tiles, density 0.502, \
tile density 0.75, computed 0.75, cpu)
    >>> layout.crow_indices, layout.col_indices
    (tensor([[0, 1, 3]], dtype=torch.int32), tensor([0, 0, 1], dtype=torch.int32))
    """

    on_device: ClassVar[bool] = False  # whether data on the device define the tiles
    q_len: int
    kv_len: int
    block: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    bit_tile_indices: Tensor
    bit_tiles: Tensor
    pattern_map: Tensor
    validate: InitVar[bool] = True
    known: InitVar[tuple[Tensor, Tensor, Tensor] | None] = None  # the three arrays that follow
    ccol_indices: Tensor = field(init=False)
    row_indices: Tensor = field(init=False)
    transpose_order: Tensor = field(init=False)
    # Objects derived from this layout, such as schedules; they live as long as the layout.
    # `update_` calls `follow(other)` of each: it may refuse, and returns a step; None replaces it.
    derived: dict[Hashable, Any] = field(init=False)
    # Prepared calls of attention with this layout; see `api`.
    calls: dict[Hashable, Any] = field(init=False)

    @plain_torch()
    def __post_init__(self, validate: bool, known: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Validate arrays of the user, and derive the transpose unless it is known."""
        self.derived, self.calls = {}, {}
        if validate:
            validation.check_layout(self)
        for name, array in self.arrays().items():  # inference tensors cannot be used in training
            setattr(self, name, array.clone() if array.is_inference() else array)
        arrays = assemble.transposed(self) if known is None else known
        self.ccol_indices, self.row_indices, self.transpose_order = arrays

    def update_(self, other: BlockLayout) -> None:
        """Replace the pattern in place, by a layout of the same lengths, blocks and pattern map.

        Objects derived from this layout are updated too (see `derived`). CUDA graphs captured with
        it compute the new pattern at the next replay, which must not have more tiles than the old
        pattern.

        Raises:
            ValueError: Lengths, blocks, devices or pattern maps differ, or the new pattern does
                not fit a captured graph.

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
        given, had = (tuple(x.pattern_map.shape) for x in (other, self))
        if given != had:
            raise ValueError(f"the layout has a pattern map of {given}, but this one of {had}")
        follow = {key: x.follow(other) for key, x in dict(self.derived).items()}  # may refuse
        for name in (*ARRAYS, "ccol_indices", "row_indices", "transpose_order"):
            setattr(self, name, getattr(other, name))
        for name in ("_host", "num_partial", "pattern_densities", "_computed"):
            self.__dict__.pop(name, None)  # cached from the old arrays
        for key, step in follow.items():
            if step is not None:
                step()
            else:  # the next call derives another one
                self.derived.pop(key, None)
                self.calls.clear()  # they hold it

    def __getstate__(self) -> dict[str, Any]:
        """Lengths and defining arrays; the rest is derived from them."""
        arrays = {name: array.clone() for name, array in self.arrays().items()}  # no slices
        return {"lengths": self.lengths, "arrays": arrays}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Derive the rest again in copies and unpickled layouts."""
        BlockLayout.__init__(self, *state["lengths"], **state["arrays"], validate=False)

    @property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return self.crow_indices.device

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays and of the objects derived from them."""
        arrays = (*self.arrays().values(), self.ccol_indices, self.row_indices)
        own = sum(x.nbytes for x in (*arrays, self.transpose_order))
        return own + sum(value.nbytes for value in list(self.derived.values()))

    @property
    def lengths(self) -> io.Lengths:
        """q_len, kv_len and block."""
        return self.q_len, self.kv_len, self.block

    @property
    def host(self) -> BlockLayout:
        """The same layout on the CPU, from which schedules are made; itself if it is there."""
        return self if self.device.type == "cpu" else self._host

    @derived_property
    def _host(self) -> BlockLayout:
        return self.to("cpu")

    @property
    def num_patterns(self) -> int:
        """Number of distinct patterns."""
        return self.crow_indices.shape[0]

    @property
    def num_block_rows(self) -> int:
        """Number of blocks of queries: ceil(q_len / block_q)."""
        return -(-self.q_len // self.block[0])

    @property
    def num_block_cols(self) -> int:
        """Number of blocks of keys: ceil(kv_len / block_kv)."""
        return -(-self.kv_len // self.block[1])

    @property
    def num_tiles(self) -> int:
        """Number of stored tiles, over all patterns."""
        return self.col_indices.shape[0]

    @property
    def num_bit_tiles(self) -> int:
        """Number of distinct bit tiles."""
        return self.bit_tiles.shape[0]

    @derived_property
    def num_partial(self) -> int:
        """Number of stored tiles that are not full."""
        return int((self.bit_tile_indices != FULL_TILE).sum())

    @property
    @plain_torch()
    def tile_rows(self) -> Tensor:
        """The stacked block row of each tile, int64 `(T,)`: pattern x num_block_rows + row."""
        crow = self.crow_indices
        return host.repeat((crow[:, 1:] - crow[:, :-1]).flatten(), self.num_tiles)

    @property
    @plain_torch()
    def tile_counts(self) -> Tensor:
        """Number of allowed elements in each tile, int64 `(T,)`."""
        heights = extent(self.tile_rows % self.num_block_rows, self.q_len, self.block[0])
        widths = extent(self.col_indices.long(), self.kv_len, self.block[1])
        if not self.num_bit_tiles:
            return heights * widths
        partial = bits.count(self.bit_tiles)[self.bit_tile_indices.clamp(min=0).long()]
        return torch.where(self.bit_tile_indices == FULL_TILE, heights * widths, partial)

    @derived_property
    def pattern_densities(self) -> Tensor:
        """The kept fraction of each pattern, float64 `(P,)` on the CPU."""
        owner = self.tile_rows // self.num_block_rows
        kept = torch.zeros(self.num_patterns, dtype=torch.int64, device=self.device)
        kept.index_add_(0, owner, self.tile_counts)
        return (kept.double() / (self.q_len * self.kv_len)).cpu()

    @property
    def density(self) -> float:
        """Kept fraction of all (q, kv) elements, 0..1, exact; the mean over batch and heads."""
        return self._mean(self.pattern_densities)

    @property
    @plain_torch()
    def tile_density(self) -> float:
        """Stored tiles / (block rows x block columns), 0..1; the mean over batch and heads.

        A ragged tile counts as a whole tile.

        >>> from sparse_flash import masks
        >>> masks.causal().layout(256).tile_density   # 3 of 4 tiles
        0.75
        """
        tiles = self.crow_indices[:, -1] - self.crow_indices[:, 0]
        return self._mean(tiles.double().cpu() / (self.num_block_rows * self.num_block_cols))

    @plain_torch()
    def computed_density(self, tile: tuple[int, int] = (128, 128)) -> float:
        """Fraction of all elements, 0..1, that lie in tiles of this size with an allowed element.

        A kernel computes whole tiles, so this number predicts its time relative to dense attention.
        Ragged tiles count only elements within the lengths. The mean over batch and heads.
        `sparse_flash.computed_density` uses the tile of the kernel that would run.

        Args:
            tile: (rows, columns) of the tiles, in tokens; they may cut the layout's blocks.

        Raises:
            TypeError: tile is not a pair of ints.
            ValueError: A side of the tile is below 1.

        >>> from sparse_flash import masks
        >>> layout = masks.random_blocks(0.1, block=32).layout(16384, block=(32, 32))
        >>> [round(x, 2) for x in (layout.density, layout.tile_density, layout.computed_density())]
        [0.1, 0.1, 0.82]
        """
        tile = validation.checked_block("tile", tile)
        if tile not in self._computed:
            self._computed[tile] = coverage.computed_fractions(self, tile)
        return self._mean(self._computed[tile])

    @derived_property
    def _computed(self) -> dict[tuple[int, int], Tensor]:
        """Results of `computed_density` by tile: float64 `(P,)`."""
        return {}

    @plain_torch()
    def _mean(self, of_patterns: Tensor) -> float:
        """The mean over batch entries and heads of a value per pattern `(P,)`."""
        return float(of_patterns[self.pattern_map.flatten().cpu().long()].mean())

    def __repr__(self) -> str:
        shape = f"{self.q_len} x {self.kv_len}, block {self.block[0]} x {self.block[1]}"
        shared = "" if self.num_patterns == 1 else f"{self.num_patterns} patterns, "
        return (
            f"BlockLayout({shape}, {shared}{self.num_tiles} tiles, {self.num_partial} partial, "
            f"{self.num_bit_tiles} bit tiles, density {self.density:.3g}, tile density "
            f"{self.tile_density:.3g}, computed {self.computed_density():.3g}, {self.device})"
        )

    @plain_torch()
    def equal(self, other: BlockLayout) -> bool:
        """Whether both have the same lengths and arrays, on any devices."""
        pairs = zip(self.arrays().values(), other.arrays().values(), strict=True)
        return self.lengths == other.lengths and all(
            torch.equal(mine.cpu(), theirs.cpu()) for mine, theirs in pairs
        )

    def arrays(self) -> dict[str, Tensor]:
        """The defining arrays by name (the transpose is derived)."""
        return {name: getattr(self, name) for name in ARRAYS}

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout on another device; self if it is already there."""
        device = validation.checked_device(device)
        if device == self.device or device == torch.device("cpu") == self.device:
            return self
        with plain_torch():
            if torch.empty(0, dtype=torch.uint8, device=device).device == self.device:
                return self  # "cuda" is the current device
            return layout_on(BlockLayout, self, device)

    @plain_torch()
    def transpose(self) -> BlockLayout:
        """The layout with queries and keys exchanged.

        >>> from sparse_flash import masks
        >>> layout = masks.causal().layout(200, 300)
        >>> layout.transpose().transpose().equal(layout)
        True
        """
        order = self.transpose_order.long()
        return BlockLayout(
            self.kv_len,
            self.q_len,
            (self.block[1], self.block[0]),
            crow_indices=self.ccol_indices,
            col_indices=self.row_indices,
            bit_tile_indices=host.take(self.bit_tile_indices, order),
            bit_tiles=bits.transposed(self.bit_tiles, self.block[1]),
            pattern_map=self.pattern_map,
            validate=False,
            known=(self.crow_indices, self.col_indices, bits.inverse(self.transpose_order)),
        )

    @plain_torch()
    def pattern(self, index: int) -> BlockLayout:
        """The layout of a single pattern, shared by all heads."""
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

    @plain_torch()
    def tiles(self, select: Tensor | slice = slice(None)) -> Tensor:
        """The elements of the selected tiles (default: all): bool `(n, block_q, block_kv)`.

        Elements beyond the lengths are False. Raises ValueError if memory does not suffice.
        """
        entries = self.bit_tile_indices[select]
        nbytes = 3 * len(entries) * self.block[0] * self.block[1]
        instead = "tiles(select) for some of them, or coverage() for a grid of fractions"
        require_memory(f"tiles() of {len(entries):,} tiles", nbytes, self.device, instead)
        height = extent(self.tile_rows[select] % self.num_block_rows, self.q_len, self.block[0])
        width = extent(self.col_indices[select].long(), self.kv_len, self.block[1])
        rows = torch.arange(self.block[0], device=self.device) < height[:, None]
        cols = torch.arange(self.block[1], device=self.device) < width[:, None]
        tiles = rows[:, :, None] & cols[:, None, :]
        partial = (entries != FULL_TILE).nonzero().squeeze(1)
        tiles[partial] = bits.unpack(self.bit_tiles[entries[partial].long()], self.block[1])
        return tiles

    @plain_torch()
    def to_dense(self) -> Tensor:
        """Every element: bool `(q_len, kv_len)`, or `(batch or 1, heads or 1, q_len, kv_len)`
        if there are several patterns. For inspection and tests: it needs O(s^2) memory.

        Raises:
            ValueError: The available memory does not suffice.

        >>> from sparse_flash import masks
        >>> masks.local(1).layout(4, 4).to_dense().int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
        """
        dense = io.to_dense(self)
        return dense[0] if self.pattern_map.numel() == 1 else dense[self.pattern_map.long()]

    @plain_torch()
    def coverage(self, size: int = 256, pattern: int = 0) -> Tensor:
        """The exact kept fraction of each cell of a grid: float32, at most about `size` a side.

        A cell is a multiple or a divisor of a block; nothing is sampled.
        """
        return coverage.grid_of(self, size, pattern)

    @plain_torch()
    def plot(self, pattern: int | None = None, title: str | None = None) -> Figure:
        """A picture: white is empty, darker is fuller. Needs matplotlib.

        Args:
            pattern: Index of a single pattern; default: the first 8, one panel each, with their
                heads and densities.
            title: Title of the figure; default: lengths and block.
        """
        return picture.figure(self, pattern, title)

    @plain_torch()
    def text(self, width: int = 48, pattern: int | None = None) -> str:
        """A picture for the terminal.

        Args:
            width: About this many cells each way, 1..256; a cell is two characters wide.
            pattern: Index of a single pattern; default: the first 4, with their heads.

        >>> from sparse_flash import masks
        >>> print(masks.causal().layout(1024, 1024).text(width=4))
        ┌────────┐
        │▒▒      │
        │██▒▒    │
        │████▒▒  │
        │██████▒▒│
        └────────┘
        """
        if integer("text", "width", width, None) not in range(1, 257):
            raise ValueError(f"width must be in 1..256 cells, got {width}")
        return picture.text(self, width, pattern)

    _repr_html_, _repr_png_ = notebook.layout_html, notebook.layout_png

    @plain_torch()
    def to_scipy(self, pattern: int = 0) -> bsr_array:
        """One pattern as `scipy.sparse.bsr_array` of bools, padded to whole blocks."""
        one = self.pattern(pattern)
        return io.to_bsr(self.lengths, one.crow_indices[0], one.col_indices, one.tiles())

    @classmethod
    @plain_torch()
    def from_tiles(
        cls,
        lengths: io.Lengths,
        rows: Tensor,
        cols: Tensor,
        packed: Tensor,
        entries: Tensor | None = None,
        pattern_map: Tensor | None = None,
        distinct: bool = False,
    ) -> BlockLayout:
        """Assemble a layout from tiles in any order.

        Args:
            lengths: q_len, kv_len, (block_q, block_kv).
            rows: Stacked block rows, int64 `(T,)`: pattern x num_block_rows + row.
            cols: Block columns, int64 `(T,)`.
            packed: Bit tiles, uint8 `(n, block_q, ceil(block_kv / 8))`; full tiles and repetitions
                are recognized.
            entries: Bit tile of each tile, or -1 if it is full; default: one bit tile each.
            pattern_map: As in the class; default: one pattern, shared by all.
            distinct: Whether the bit tiles are known to be distinct, and entries of full tiles -1.
        """
        if pattern_map is None:
            pattern_map = torch.zeros(1, 1, dtype=torch.int32, device=rows.device)
        patterns = int(pattern_map.max()) + 1
        arrays = assemble.arrays_of_tiles(lengths, patterns, rows, cols, packed, entries, distinct)
        return cls(*lengths, *arrays, pattern_map, validate=False)

    from_scipy = classmethod(scipy_layout.from_scipy)
    from_topk = classmethod(device_builders.from_topk)
    from_blocks = classmethod(device_builders.from_blocks)

    def check(self) -> None:
        """Raise ValueError if data on the device give an invalid layout: see `DeviceLayout`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a compressed npz file, atomically; read it back with `BlockLayout.load`."""
        io.write_npz(path, self.lengths, self.arrays())

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> BlockLayout:
        """Read and validate a file of `save`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a layout, or is damaged.
        """
        device = validation.checked_device(device)
        with plain_torch():
            lengths, arrays = io.read_npz(path, ARRAYS)
        try:
            return cls(*lengths, **arrays).to(device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no valid layout: {error}") from error
