"""Masks from data: a table of blocks, a table of elements, a sparse matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sparse_flash.masks import io
from sparse_flash.masks.arguments import integers, normalize
from sparse_flash.masks.data import Data
from sparse_flash.masks.extents import Extents
from sparse_flash.masks.mask import Mask, Pattern, named, pattern
from sparse_flash.masks.modes import derived
from sparse_flash.masks.patterns.table_values import truth_table
from sparse_flash.masks.tables import IndexTable, RectangleTable
from sparse_flash.masks.ternary import Index, Interval, Truth


@pattern
class from_blocks(Pattern):
    """allowed(q, kv) = table[q // block, kv // block].

    Args:
        table: Bools `(rows, columns)`: a tensor, an array, nested lists, or the text printed by
            repr (shape and compressed bits). Numbers must be 0 and 1. Floats may also be an
            additive mask: 0 where attention is allowed and -inf (or at most -65504) elsewhere. The
            values are copied.
        block: Tokens per block.
        q_len: Number of queries; default: rows x block.
        kv_len: Number of keys; default: columns x block.

    Raises:
        TypeError: The table is a tensor without data: meta, fake or sparse.
        ValueError: The table is not two-dimensional, has other numbers, does not match the
            lengths, or is damaged text.

    >>> mask = from_blocks([[1, 0], [1, 1]], block=128)
    >>> mask == eval(repr(mask)), mask.layout(256).num_tiles
    (True, 3)
    """

    table: Any
    block: int
    q_len: int | None = None
    kv_len: int | None = None
    relative = False

    def __post_init__(self) -> None:
        integers(self, block=1)
        data = _bits("from_blocks", self.table)
        rows, cols = data.shape
        normalize(self, table=data)
        for name, count in (("q_len", rows), ("kv_len", cols)):
            if getattr(self, name) is None:
                normalize(self, **{name: count * self.block})
            integers(self, **{name: 1})
            length = getattr(self, name)
            if -(-length // self.block) != count:
                raise ValueError(
                    f"from_blocks: {name}={length} is not {count} blocks of {self.block}"
                )

    def __repr__(self) -> str:
        rows, cols = self.table.shape
        whole = (self.q_len, self.kv_len) == (rows * self.block, cols * self.block)
        lengths = "" if whole else f", {self.q_len}, {self.kv_len}"
        return f"from_blocks({self.table!r}, {self.block}{lengths})"

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The table entry of the block."""
        i, j = q // self.block, kv // self.block
        if isinstance(i, Interval):
            return self._summary.classify(i, j)
        rows, cols = self.table.shape
        dtype = torch.int32 if rows * cols < 1 << 31 else torch.int64
        bit = (i * cols).to(dtype) + j.to(dtype)
        return self._bytes(bit >> 3) << (bit & 7).to(torch.uint8) >= 128  # the wanted bit on top

    @derived
    def _bytes(self) -> IndexTable:
        """The table, row by row, eight entries per byte, the first in the highest bit."""
        return IndexTable(torch.from_numpy(self.table.content.copy()))

    @derived
    def _summary(self) -> RectangleTable:
        rows, cols = self.table.shape
        cell = 1  # entries per side; coarser bounds suffice below 16 tokens
        while rows * cols > (cell * cell) << (16 if cell * self.block < 16 else 22):
            cell *= 2
        shape = (-(-rows // cell), -(-cols // cell))
        some, every = (np.empty(shape, dtype=bool) for _ in range(2))
        starts, strip = np.arange(0, cols, cell), max(1, (1 << 22) // (cols * cell))
        for i in range(0, shape[0], strip):
            band = self._unpack(i * cell, min((i + strip) * cell, rows))
            lines = np.arange(0, len(band), cell)
            for target, reduce in ((some, np.logical_or), (every, np.logical_and)):
                columns = reduce.reduceat(band, starts, axis=1)
                target[i : i + strip] = reduce.reduceat(columns, lines, axis=0)
        return RectangleTable(torch.from_numpy(some), torch.from_numpy(every), cell)

    def _unpack(self, first: int, end: int) -> np.ndarray:
        """Rows `first` to `end` - 1 of the table, bool `(rows, columns)`."""
        cols = self.table.shape[1]
        start, stop = first * cols, end * cols
        packed = self.table.content[start // 8 : -(-stop // 8)]
        bits = np.unpackbits(packed)[start % 8 : start % 8 + stop - start]
        return bits.view(bool).reshape(end - first, cols)

    def extents(self) -> Extents:
        """`q_len` and `kv_len`."""
        return self.q_len, self.kv_len


@named
def from_dense(table: Any) -> Mask:
    """allowed(q, kv) = table[q, kv], for bools `(q_len, kv_len)`: tensor, array, lists or text.

    An additive mask (0 where attention is allowed, -inf elsewhere) is recognized. Numbers other
    than 0 and 1 are refused (see `from_blocks`).

    >>> from_dense([[1, 0], [1, 1]]).layout(2).to_dense().int()
    tensor([[1, 0],
            [1, 1]], dtype=torch.int32)
    """
    if not isinstance(table, str | Data):
        table = _packed(truth_table("from_dense", table))
    return from_blocks(table, 1)


@pattern
class from_scipy(Pattern):
    """allowed(q, kv) = matrix[q, kv] != 0, for a scipy.sparse matrix or array of any format.

    Memory grows with the nonzero elements. The text of repr parses to an equal mask.

    Raises:
        TypeError: `matrix` is not a scipy.sparse matrix (for arrays and tensors: from_dense).

    >>> import scipy.sparse
    >>> from_scipy(scipy.sparse.eye_array(300)).layout(300).num_tiles
    3
    """

    matrix: Any
    relative = False

    def __post_init__(self) -> None:
        if isinstance(self.matrix, str):
            data = Data.from_text("from_scipy", self.matrix, np.int64)
        elif isinstance(self.matrix, Data):
            data = self.matrix
        else:
            rows, cols, shape = io.elements(self.matrix)
            data = Data(shape, np.sort((rows * shape[1] + cols).numpy()))
        normalize(self, matrix=data)

    def __repr__(self) -> str:
        return f"from_scipy({self.matrix!r})"

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The element is nonzero."""
        if isinstance(q, Interval):
            return self._summary.classify(q, kv)
        wanted = q * self.matrix.shape[1] + kv
        if not len(self.matrix.content):
            return torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(self._elements.on(wanted.device), wanted)
        return self._elements(place.clamp(max=len(self.matrix.content) - 1)) == wanted

    @derived
    def _elements(self) -> IndexTable:
        """Flat index, row * columns + column, of each nonzero element, ascending."""
        return IndexTable(torch.from_numpy(self.matrix.content.copy()))

    @derived
    def _summary(self) -> RectangleTable:
        rows, cols = self.matrix.shape
        cell = -(-max(rows, cols) // 1024)
        keys = torch.from_numpy(self.matrix.content.copy())
        shape = (-(-rows // cell), -(-cols // cell))
        some = torch.zeros(shape, dtype=torch.bool, device="cpu")
        some[keys // cols // cell, keys % cols // cell] = True
        return RectangleTable(some, some & (cell == 1), cell)

    def extents(self) -> Extents:
        """The shape of the matrix."""
        return self.matrix.shape


def _bits(name: str, table: Any) -> Data:
    """Convert nested lists, an array, a tensor or text to packed bits."""
    if isinstance(table, Data):
        return table
    if isinstance(table, str):
        data = Data.from_text(name, table, np.uint8)
        if data.content.nbytes != -(-data.shape[0] * data.shape[1] // 8):
            raise ValueError(
                f"{name}: the text holds {data.content.nbytes} bytes, not a {data.shape} table"
            )
        return data
    return _packed(truth_table(name, table))


def _packed(table: np.ndarray) -> Data:
    return Data((table.shape[0], table.shape[1]), np.packbits(table))
