"""Bit tiles in the order in which the threads of a warpgroup hold a product's accumulators.

In a 64 x n product the thread t of a warpgroup holds, of rows r = 16 (t / 32) + (t % 32) / 4 and
r + 8, the columns 8 j + 2 (t % 4) + c with c in 0, 1 (WGMMA m64nNk16, PTX ISA). So one 32-bit word
holds its bits of one row of up to 128 columns: bit 2 j + c. The two words of a thread lie next to
each other, those of the threads follow, and a warpgroup reads 1 KiB in one go.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks.bits import exchange_bits
from torch import Tensor
from torch.nn.functional import pad

_PAIRS = {  # masks of the pairs whose numbers have bit a, but not bit b
    (a, b): sum(3 << (2 * i) for i in range(32) if i >> a & 1 and not i >> b & 1)
    for a, b in ((0, 2), (1, 3), (2, 4))
}
_HALVES = np.uint64(0x0000FFFF0000FFFF)  # every other 16 bits
_CHUNK = 1 << 24  # bytes of bit tiles reordered at a time; temporaries are 16 times as large


def fragment_order(bit_tiles: Tensor) -> Tensor:
    """Reorder uint8 `(n, tile_m, tile_n / 8)` into int32 `(n, ceil(tile_m / 64), 128, 2)`.

    tile_n must be at most 128. No bit is lost: every one is in exactly one word. Rows beyond tile_m
    have no bits set.

    >>> tile = torch.zeros(1, 64, 16, dtype=torch.uint8)
    >>> tile[0, 8, 1] = 1 << 3              # row 8, column 8 + 3
    >>> words = fragment_order(tile)        # thread 1, its second row, j = 1, c = 1
    >>> words.nonzero().tolist(), int(words[0, 0, 1, 1])
    ([[0, 0, 1, 1]], 8)
    """
    n, rows, width = bit_tiles.shape
    assert width <= 16, width
    if rows % 64:
        bit_tiles = pad(bit_tiles, (0, 0, 0, -rows % 64))
        rows = bit_tiles.shape[1]
    if bit_tiles.device.type == "cpu":
        return torch.from_numpy(_reorder_words(bit_tiles.numpy()))
    words = bit_tiles.new_empty(n, rows // 64, 128, 2, dtype=torch.int32)
    step = max(1, _CHUNK // (rows * width))
    for i in range(0, n, step):
        words[i : i + step] = _reorder(bit_tiles[i : i + step])
    return words


def _reorder(bit_tiles: Tensor) -> Tensor:
    # Byte j of a row holds columns 8 j to 8 j + 7; thread q of a quad takes bits 2 q, 2 q + 1.
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=bit_tiles.device)
    pairs = (bit_tiles.unsqueeze(2) >> shifts[:, None]) & 3  # (n, rows, 4, bytes)
    pairs = pad(pairs, (0, 16 - pairs.shape[3])).unflatten(3, (4, 4))
    first, second, third, fourth = pairs.unbind(4)  # four pairs a byte: (n, rows, 4, 4)
    packed = first | second << 2 | third << 4 | fourth << 6
    words = packed.view(torch.int32).squeeze(3)  # (n, rows, q)
    # A row is (warpgroup, warp, which of the thread's two, octet).
    n, rows, _ = words.shape
    parts = words.view(n, rows // 64, 4, 2, 8, 4).permute(0, 1, 2, 4, 5, 3)
    return parts.reshape(n, rows // 64, 128, 2)


def _reorder_words(bit_tiles: NDArray[np.uint8]) -> NDArray[np.int32]:
    """As `_reorder`, with eight bytes of a row as a word of 32 pairs of bits.

    Pair q of byte j has the number 4 j + q, and is to have 8 q + j: the bits of numbers move.
    """
    n, rows, width = bit_tiles.shape
    if width < 16:
        bit_tiles = np.pad(bit_tiles, ((0, 0), (0, 0), (0, 16 - width)))
    words = np.array(bit_tiles, order="C").view(np.uint64)  # (n, rows, 2)
    for a, b in ((0, 2), (1, 3), (2, 4)):
        exchange_bits(words, 2 * ((1 << b) - (1 << a)), _PAIRS[a, b])
    # The two words hold the lower and the upper halves of the bits of threads 0, 2, 1, 3.
    lower, upper = words[..., 0], words[..., 1]
    threads = np.empty_like(words)
    threads[..., 0] = (lower & _HALVES) | (upper & _HALVES) << 16
    threads[..., 1] = (lower >> 16 & _HALVES) | (upper & ~_HALVES)
    # A row is (warpgroup and warp, which of the thread's two, octet).
    parts = threads.view(np.int32).reshape(-1, 2, 32)
    pairs = np.empty((len(parts), 32, 2), np.int32)
    for i in range(2):  # several times as fast as a copy of the transpose
        pairs[..., i] = parts[:, i]
    return pairs.reshape(n, rows // 64, 128, 2)
