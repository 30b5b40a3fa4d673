"""Masks given as data: a table of blocks, a table of elements, a sparse matrix."""

from __future__ import annotations

import base64
import hashlib
import zlib
from dataclasses import field
from typing import Any

import numpy as np
import torch
from sparse_flash.masks import exchange
from sparse_flash.masks.mask import Extents, Mask, Pattern, named, pattern
from sparse_flash.masks.patterns.arguments import integer, normalise
from sparse_flash.masks.tables import RectangleTable
from sparse_flash.masks.ternary import Index, Interval, Truth
from torch import Tensor
from torch.nn.functional import pad

_TEXT_LIMIT = 1 << 20  # bytes of data beyond which a repr abbreviates


class _Data:
    """Immutable arrays that compare by content; small ones print as text that makes them again."""

    def __init__(self, shape: tuple[int, int], content: np.ndarray) -> None:
        self.shape, self.content = shape, content
        self.digest = hashlib.sha256(f"{shape}".encode() + content.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Data) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        rows, cols = self.shape
        if self.content.nbytes > _TEXT_LIMIT:
            return f"<{rows} x {cols}, sha256 {self.digest[:12]}>"
        return repr(
            f"{rows}x{cols}:{base64.b64encode(zlib.compress(self.content.tobytes())).decode()}"
        )

    @classmethod
    def from_text(cls, name: str, text: str, dtype: type[np.generic]) -> _Data:
        try:
            size, _, code = text.partition(":")
            rows, cols = map(int, size.split("x"))
            raw = zlib.decompress(base64.b64decode(code, validate=True))
            return cls((rows, cols), np.frombuffer(raw, dtype))
        except (ValueError, zlib.error) as error:
            raise ValueError(f"{name}: {text[:40]!r} is no text that repr() printed") from error


@pattern
class from_blocks(Pattern):
    """allowed(q, kv) = table[q // block, kv // block].

    Args:
        table: Bools `(rows, columns)`: a tensor, an array, nested lists, or the text that repr
            prints (shape and compressed bits), so that a repr makes the same mask again.
        block: Tokens per block.
        q_len: Number of queries; default: rows x block.
        kv_len: Number of keys; default: columns x block.

    Raises:
        ValueError: The table is not two-dimensional, does not fit the lengths, or is damaged text.

    >>> mask = from_blocks([[1, 0], [1, 1]], block=128)
    >>> mask == eval(repr(mask)), mask.layout(256).num_tiles
    (True, 3)
    """

    table: Any
    block: int
    q_len: int | None = None
    kv_len: int | None = None
    _entries: dict[Any, Any] = field(init=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        integer("from_blocks", "block", self.block)
        data = _bits("from_blocks", self.table)
        rows, cols = data.shape
        normalise(self, table=data)
        for name, count in (("q_len", rows), ("kv_len", cols)):
            length = getattr(self, name)
            if length is None:
                normalise(self, **{name: count * self.block})
            elif -(-integer("from_blocks", name, length) // self.block) != count:
                raise ValueError(
                    f"from_blocks: {name}={length} is not {count} blocks of {self.block}"
                )

    def __repr__(self) -> str:
        rows, cols = self.table.shape
        whole = (self.q_len, self.kv_len) == (rows * self.block, cols * self.block)
        lengths = "" if whole else f", {self.q_len}, {self.kv_len}"
        return f"from_blocks({self.table!r}, {self.block}{lengths})"

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The entry of the block."""
        i, j = q // self.block, kv // self.block
        if isinstance(i, Interval):
            return self._summary().classify(i, j)
        return self._table(i.device)[i, j]

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._entries:
            rows, cols = self.table.shape
            flat = np.unpackbits(self.table.content, count=rows * cols).astype(bool)
            self._entries[device] = torch.from_numpy(flat.reshape(rows, cols)).to(device)
        return self._entries[device]

    def _summary(self) -> RectangleTable:
        if "summary" not in self._entries:
            table = self._table(torch.device("cpu"))
            cell = 1 if table.numel() <= 1 << 22 else 16
            rows, cols = (-n % cell for n in table.shape)
            reduce = torch.nn.functional.max_pool2d
            some = reduce(pad(table.float(), (0, cols, 0, rows))[None], cell)[0] > 0
            holes = reduce(pad((~table).float(), (0, cols, 0, rows))[None], cell)[0] > 0
            self._entries["summary"] = RectangleTable(some, ~holes, cell)
        return self._entries["summary"]

    def extents(self) -> Extents:
        """The lengths that it is made for."""
        return self.q_len, self.kv_len


@named
def from_dense(table: Any) -> Mask:
    """allowed(q, kv) = table[q, kv], for bools `(q_len, kv_len)`: tensor, array, lists or text.

    >>> from_dense([[1, 0], [1, 1]]).layout(2).to_dense().int()
    tensor([[1, 0],
            [1, 1]], dtype=torch.int32)
    """
    return from_blocks(table, 1)


@pattern
class from_scipy(Pattern):
    """allowed(q, kv) = matrix[q, kv] != 0, for a scipy.sparse matrix or array of any format.

    Memory grows with the nonzero elements. A repr's text makes the same mask again.

    Raises:
        TypeError: It is no scipy.sparse matrix (for an array or tensor, use from_dense).

    >>> import scipy.sparse
    >>> from_scipy(scipy.sparse.eye_array(300)).layout(300).num_tiles
    3
    """

    matrix: Any
    _entries: dict[Any, Any] = field(init=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.matrix, str):
            data = _Data.from_text("from_scipy", self.matrix, np.int64)
        elif isinstance(self.matrix, _Data):
            data = self.matrix
        else:
            rows, cols, shape = exchange.elements(self.matrix)
            data = _Data(shape, np.sort((rows * shape[1] + cols).numpy()))
        normalise(self, matrix=data)

    def __repr__(self) -> str:
        return f"from_scipy({self.matrix!r})"

    def allowed(self, q: Index, kv: Index) -> Truth:
        """Whether the element is among the nonzero ones."""
        if isinstance(q, Interval):
            return self._summary().classify(q, kv)
        elements, wanted = self._elements(q.device), q * self.matrix.shape[1] + kv
        if not len(elements):
            return torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(elements, wanted).clamp(max=len(elements) - 1)
        return elements[place] == wanted

    def _elements(self, device: torch.device) -> Tensor:
        if device not in self._entries:
            self._entries[device] = torch.from_numpy(self.matrix.content.copy()).to(device)
        return self._entries[device]

    def _summary(self) -> RectangleTable:
        if "summary" not in self._entries:
            rows, cols = self.matrix.shape
            cell = -(-max(rows, cols) // 1024)
            keys = self._elements(torch.device("cpu"))
            some = torch.zeros(-(-rows // cell), -(-cols // cell), dtype=torch.bool)
            some[keys // cols // cell, keys % cols // cell] = True
            self._entries["summary"] = RectangleTable(some, some & (cell == 1), cell)
        return self._entries["summary"]

    def extents(self) -> Extents:
        """The shape of the matrix."""
        return self.matrix.shape


def _bits(name: str, table: Any) -> _Data:
    """Nested lists, an array, a tensor, or text, as packed bits."""
    if isinstance(table, _Data):
        return table
    if isinstance(table, str):
        data = _Data.from_text(name, table, np.uint8)
        if data.content.nbytes != -(-data.shape[0] * data.shape[1] // 8):
            raise ValueError(
                f"{name}: the text holds {data.content.nbytes} bytes, not a {data.shape} table"
            )
        return data
    if isinstance(table, Tensor):
        table = table.detach().cpu().numpy()
    array = np.asarray(table)
    if array.ndim != 2 or not array.size or array.dtype.kind not in "buif":
        raise ValueError(
            f"{name}: the table must be two-dimensional bools, "
            f"got shape {array.shape} of {array.dtype}"
        )
    return _Data((array.shape[0], array.shape[1]), np.packbits(array != 0))
