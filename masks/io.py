"""Tile data in other formats: npz files and scipy.sparse matrices."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sparse_flash.masks.files import atomic_write
from sparse_flash.masks.memory import require_memory
from torch import Tensor

from sparse_flash.extras import require

if TYPE_CHECKING:
    from scipy.sparse import bsr_array
    from sparse_flash.masks.layout import BlockLayout

_FORMAT = "sparse_flash BlockLayout 1"
Lengths = tuple[int, int, tuple[int, int]]  # q_len, kv_len, block


def write_npz(path: str | os.PathLike[str], lengths: Lengths, arrays: dict[str, Tensor]) -> None:
    """Write lengths and arrays to a compressed npz file, atomically."""
    q_len, kv_len, block = lengths
    content: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
    content |= {"format": np.array(_FORMAT), "lengths": np.array([q_len, kv_len, *block])}
    with atomic_write(path) as file:
        np.savez_compressed(file, **content)


def read_npz(path: str | os.PathLike[str], names: list[str]) -> tuple[Lengths, dict[str, Any]]:
    """Read a file of `write_npz`; raise ValueError if it is another file, or damaged."""
    if not Path(path).exists():
        raise FileNotFoundError(f"no layout file at {path}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a layout file in it")
    try:
        with np.load(path, allow_pickle=False) as file:
            if "format" not in file or str(file["format"]) != _FORMAT:
                raise _NoLayoutError(f"it is not marked {_FORMAT!r}")
            q_len, kv_len, block_q, block_kv = (int(n) for n in file["lengths"])
            arrays = {name: torch.from_numpy(file[name]) for name in names}
    except Exception as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(
            f"{path} is not a readable layout file ({_damage(path, error)}); write one with "
            "layout.save(path)"
        ) from None
    return (q_len, kv_len, (block_q, block_kv)), arrays


class _NoLayoutError(ValueError):
    """The file is readable, but not a layout."""


def _damage(path: str | os.PathLike[str], error: Exception) -> str:
    """The problem with a file, without the advice of numpy to unpickle it, which runs code."""
    if isinstance(error, _NoLayoutError):
        return str(error)
    if not Path(path).stat().st_size:
        return "it is empty"
    if not zipfile.is_zipfile(path):
        return "it is not an npz archive, or is truncated"
    if isinstance(error, KeyError):
        return f"it has no array {error}"
    return "its content is damaged"


def to_dense(layout: BlockLayout) -> Tensor:
    """Every element of each pattern: bool `(num_patterns, q_len, kv_len)`.

    Raises:
        ValueError: The available memory does not suffice.
    """
    (bq, bk), nq, nk = layout.block, layout.num_block_rows, layout.num_block_cols
    padded = nq * bq * nk * bk
    results = layout.num_patterns + (layout.pattern_map.numel() if layout.num_patterns > 1 else 0)
    require_memory(
        f"to_dense() of {layout.q_len:,} x {layout.kv_len:,} elements",
        (layout.num_patterns + results) * padded + 2 * layout.num_tiles * bq * bk,
        layout.device,
        "layout.coverage(256) for a grid of exact fractions, layout.plot() for a picture, "
        "layout.tiles(select) for the elements of some tiles, or layout.to_scipy()",
    )
    grid = torch.zeros(layout.num_patterns * nq, nk, bq, bk, dtype=torch.bool, device=layout.device)
    grid[layout.tile_rows, layout.col_indices.long()] = layout.tiles()
    dense = grid.view(-1, nq, nk, bq, bk).transpose(2, 3).reshape(-1, nq * bq, nk * bk)
    return dense[:, : layout.q_len, : layout.kv_len]


def to_bsr(lengths: Lengths, crow_indices: Tensor, col_indices: Tensor, tiles: Tensor) -> bsr_array:
    """One pattern's tiles, bool `(n, block_q, block_kv)`, as a matrix padded to whole blocks."""
    require("scipy")
    from scipy.sparse import bsr_array

    q_len, kv_len, (block_q, block_kv) = lengths
    shape = (-(-q_len // block_q) * block_q, -(-kv_len // block_kv) * block_kv)
    data = (tiles.cpu().numpy(), col_indices.cpu().numpy(), crow_indices.cpu().numpy())
    return bsr_array(data, shape=shape)


def elements(matrix: Any) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Rows and columns (int64) of the nonzero elements of a scipy.sparse matrix, and its shape."""
    require("scipy")
    from scipy.sparse import coo_array, issparse

    if not issparse(matrix) or matrix.ndim != 2:
        raise TypeError(
            f"expected a two-dimensional scipy.sparse matrix or array, got {type(matrix).__name__}"
        )
    if matrix.dtype.kind == "f" and not (matrix.data > -65504).all():
        raise ValueError(
            "the matrix has -inf, nan or as low values, like an additive mask: pass a matrix "
            "whose nonzero elements are the allowed ones"
        )
    coo = coo_array(matrix.astype(bool))
    coo.sum_duplicates()
    coo.eliminate_zeros()
    rows, cols = (torch.from_numpy(np.asarray(axis, dtype=np.int64)) for axis in coo.coords)
    return rows, cols, matrix.shape


def tiles_of_coo(
    rows: Tensor, cols: Tensor, num_block_cols: int, block: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Group distinct elements into tiles: block rows, block columns, packed bits.

    >>> r, c = torch.tensor([0, 0, 5]), torch.tensor([0, 9, 9])
    >>> tiles_of_coo(r, c, 2, (4, 8))
    (tensor([0, 0, 1]), tensor([0, 1, 1]), tensor([[[1],
             [0],
             [0],
             [0]],
    <BLANKLINE>
            [[2],
             [0],
             [0],
             [0]],
    <BLANKLINE>
            [[0],
             [2],
             [0],
             [0]]], dtype=torch.uint8))
    """
    (block_q, block_kv), width = block, -(-block[1] // 8)
    keys = rows // block_q * num_block_cols + cols // block_kv
    cells, tile = torch.unique(keys, return_inverse=True)
    inner = cols % block_kv
    byte = (tile * block_q + rows % block_q) * width + inner // 8
    packed = torch.zeros(len(cells) * block_q * width, dtype=torch.int32, device="cpu")
    packed.index_add_(0, byte, (1 << inner % 8).int())  # distinct: a sum is a bitwise or
    tiles = packed.to(torch.uint8).view(-1, block_q, width)
    return cells // num_block_cols, cells % num_block_cols, tiles
