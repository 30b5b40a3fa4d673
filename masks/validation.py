"""Validation of layout arrays from the user or from a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.bits import unpack
from sparse_flash.masks.modes import unreadable
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.io import Lengths
    from sparse_flash.masks.layout import BlockLayout

MAX_LENGTH = 2**31 - 1  # indices are int32


def checked_lengths(q_len: int, kv_len: int, block: tuple[int, int]) -> Lengths:
    """Lengths and block as plain ints; raise unless they are positive and fit int32."""
    q_len, kv_len = (integer("layout", n, v) for n, v in (("q_len", q_len), ("kv_len", kv_len)))
    for name, value in (("q_len", q_len), ("kv_len", kv_len)):
        if value > MAX_LENGTH:
            raise ValueError(f"{name} must be in 1..{MAX_LENGTH}, got {value}")
    return q_len, kv_len, checked_block("block", block)


def checked_block(name: str, block: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a tile as plain ints; raise unless they are positive and not too large."""
    if not (isinstance(block, tuple | list) and len(block) == 2):
        pair = f"; write {name}=({block}, {block})" if type(block) is int else ""
        raise TypeError(f"{name} must be a pair of ints, (queries, keys), got {block!r}{pair}")
    block_q, block_kv = (integer("layout", name, b, None) for b in block)
    if min(block_q, block_kv) < 1 or block_q * block_kv > 2**24:
        raise ValueError(
            f"{name} sizes must be positive, at most 2^24 elements a tile, got {block}"
        )
    return block_q, block_kv


def checked_device(device: torch.device | str | int) -> torch.device:
    """Convert to a device that can store a layout.

    Raises:
        TypeError: The argument is neither a device nor a string.
        ValueError: The name is unknown, the device does not exist, or it is "meta".

    >>> checked_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: device 'gpu' is unknown: write 'cuda' for a GPU, or 'cpu'
    """
    if not isinstance(device, torch.device | str | int) or isinstance(device, bool):
        raise TypeError(f"device must be a torch.device or its name, like 'cuda', got {device!r}")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"device {device!r} is unknown: write 'cuda' for a GPU, or 'cpu'"
        ) from None
    if found.type == "meta":
        raise ValueError("a layout needs tensors with data, and cannot go to 'meta': take 'cpu'")
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            there = (
                f"CUDA devices are 0..{count - 1}" if count else "PyTorch finds no CUDA GPU here"
            )
            raise ValueError(f"there is no device {str(found)!r}: {there}; take 'cpu'")
    elif found.type != "cpu":
        _check_usable(found)
    return found


def _check_usable(device: torch.device) -> None:
    """Refuse a device that this PyTorch cannot use; its own message has 70 lines."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError):  # by the kind of device
        raise ValueError(
            f"PyTorch cannot use the device {str(device)!r} here: write 'cuda' for a GPU, or 'cpu'"
        ) from None


def check_layout(layout: BlockLayout) -> None:
    """Raise TypeError or ValueError with the name of the array and its problem."""
    layout.q_len, layout.kv_len, layout.block = checked_lengths(*layout.lengths)
    _check_types(layout)
    _check_shapes(layout)
    _check_rows(layout)
    _check_columns(layout)
    _check_references(layout)
    _check_bits(layout)


def _check_types(layout: BlockLayout) -> None:
    for name, array in layout.arrays().items():
        dtype = torch.uint8 if name == "bit_tiles" else torch.int32
        if not isinstance(array, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(array).__name__}")
        reason = unreadable(array)
        if reason:
            raise ValueError(f"{name}: {reason}; a layout needs tensors with data")
        if array.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {array.dtype}")
        if array.device != layout.device:
            raise ValueError(
                f"{name} is on {array.device} but crow_indices on {layout.device}: "
                "all arrays of a layout live on one device"
            )


def _check_shapes(layout: BlockLayout) -> None:
    crow, tiles = layout.crow_indices, layout.bit_tiles
    nq = layout.num_block_rows
    if crow.ndim != 2 or crow.shape[0] < 1 or crow.shape[1] != nq + 1:
        raise ValueError(
            f"crow_indices must be (patterns, {nq + 1}) for {nq} block rows, "
            f"got {tuple(crow.shape)}"
        )
    if layout.col_indices.ndim != 1 or layout.bit_tile_indices.shape != layout.col_indices.shape:
        raise ValueError(
            "col_indices and bit_tile_indices must be one-dimensional and of one length, got "
            f"{tuple(layout.col_indices.shape)} and {tuple(layout.bit_tile_indices.shape)}"
        )
    shape = (layout.block[0], -(-layout.block[1] // 8))
    if tiles.ndim != 3 or tuple(tiles.shape[1:]) != shape:
        raise ValueError(f"bit_tiles must be (n, {shape[0]}, {shape[1]}), got {tuple(tiles.shape)}")
    if layout.pattern_map.ndim != 2 or not layout.pattern_map.numel():
        raise ValueError(
            f"pattern_map must be (1 or batch, 1 or heads), got {tuple(layout.pattern_map.shape)}"
        )


def _check_rows(layout: BlockLayout) -> None:
    crow = layout.crow_indices.long()
    if int(crow[0, 0]) != 0 or int(crow[-1, -1]) != layout.num_tiles:
        raise ValueError(
            f"crow_indices must run from 0 to {layout.num_tiles} (the number of tiles), "
            f"got {int(crow[0, 0])} to {int(crow[-1, -1])}"
        )
    if bool((crow.diff(dim=1) < 0).any()) or not torch.equal(crow[:-1, -1], crow[1:, 0]):
        raise ValueError(
            "crow_indices must not decrease, and each pattern starts where the last ended"
        )


def _check_columns(layout: BlockLayout) -> None:
    cols, nk = layout.col_indices.long(), layout.num_block_cols
    bad = ((cols < 0) | (cols >= nk)).nonzero()
    if len(bad):
        tile = int(bad[0])
        raise ValueError(f"col_indices[{tile}] = {int(cols[tile])} is not in 0..{nk - 1}")
    keys = layout.tile_rows * nk + cols
    bad = (keys.diff() <= 0).nonzero()
    if len(bad):
        tile = int(bad[0]) + 1
        what = "repeats" if int(keys[tile]) == int(keys[tile - 1]) else "comes after a larger one"
        raise ValueError(
            f"col_indices[{tile}] = {int(cols[tile])} {what} in its row: "
            "columns must be ascending, without repeats"
        )


def _check_references(layout: BlockLayout) -> None:
    entries, patterns = layout.bit_tile_indices, layout.pattern_map
    if bool(((entries < -1) | (entries >= layout.num_bit_tiles)).any()):
        raise ValueError(
            f"bit_tile_indices must be -1 (full) or in 0..{layout.num_bit_tiles - 1}, "
            f"got {int(entries.min())}..{int(entries.max())}"
        )
    if bool(((patterns < 0) | (patterns >= layout.num_patterns)).any()):
        raise ValueError(
            f"pattern_map must be in 0..{layout.num_patterns - 1}, "
            f"got {int(patterns.min())}..{int(patterns.max())}"
        )


def _check_bits(layout: BlockLayout) -> None:
    """Check that bits beyond the lengths are 0; counts and kernels rely on this."""
    spare = -layout.block[1] % 8
    if spare and bool((layout.bit_tiles[..., -1] >> (8 - spare)).any()):
        raise ValueError("bit_tiles: the padding bits of the last byte of a row must be 0")
    block_q, block_kv = layout.block
    entries = layout.bit_tile_indices.long()
    ends = (
        (
            "q",
            layout.q_len % block_q,
            layout.tile_rows % layout.num_block_rows == layout.num_block_rows - 1,
        ),
        ("kv", layout.kv_len % block_kv, layout.col_indices == layout.num_block_cols - 1),
    )
    for name, rest, at_end in ends:
        used = torch.unique(entries[at_end & (entries >= 0)]) if rest else entries[:0]
        tiles = unpack(layout.bit_tiles[used], block_kv)
        beyond = tiles[:, rest:] if name == "q" else tiles[:, :, rest:]
        if bool(beyond.any()):
            raise ValueError(
                f"bit_tiles: a tile at the ragged {name} end allows elements beyond {name}_len"
            )
