"""`BlockLayout.from_scipy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparse_flash.masks import io, validation
from sparse_flash.masks.modes import plain_torch

if TYPE_CHECKING:
    from sparse_flash.masks.layout import BlockLayout


@plain_torch()
def from_scipy(
    cls: type[BlockLayout], matrix: Any, block: tuple[int, int] = (128, 128)
) -> BlockLayout:
    """The layout that allows exactly the nonzero elements of a `scipy.sparse` matrix.

    Raises:
        TypeError: `matrix` is not a scipy.sparse matrix or array.

    >>> import scipy.sparse
    >>> from sparse_flash.masks import BlockLayout
    >>> BlockLayout.from_scipy(scipy.sparse.eye_array(256)).num_bit_tiles
    1
    """
    rows, cols, (q_len, kv_len) = io.elements(matrix)
    q_len, kv_len, block = validation.checked_lengths(q_len, kv_len, block)
    tiles = io.tiles_of_coo(rows, cols, -(-kv_len // block[1]), block)
    return cls.from_tiles((q_len, kv_len, block), *tiles)
