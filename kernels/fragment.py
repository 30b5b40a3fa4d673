"""Bit tiles in the order in which the threads of a warpgroup hold a product's accumulators.

In a 64 x n product the thread t of a warpgroup holds, of rows r = 16 (t / 32) + (t % 32) / 4 and
r + 8, the columns 8 j + 2 (t % 4) + c with c in 0, 1 (WGMMA m64nNk16, PTX ISA). So one 32-bit word
holds its bits of one row of up to 128 columns: bit 2 j + c. The two words of a thread lie next to
each other, those of the threads follow, and a warpgroup reads 1 KiB in one go.
"""

from __future__ import annotations

import torch
from sparse_flash.masks import host
from torch import Tensor
from torch.nn.functional import pad

_FEW_PIECES = 16  # of so many bit tiles that an operation on a CPU starts no threads
_CHUNK = 1 << 24  # bytes of bit tiles reordered at a time; temporaries are 16 times as large


def fragment_order(bit_tiles: Tensor) -> Tensor:
    """Reorder uint8 `(n, tile_m, tile_n / 8)` into int32 `(n, tile_m / 64, 128, 2)`.

    tile_m must be a multiple of 64, and tile_n at most 128. No bit is lost: every one is in
    exactly one word.

    >>> tile = torch.zeros(1, 64, 16, dtype=torch.uint8)
    >>> tile[0, 8, 1] = 1 << 3              # row 8, column 8 + 3
    >>> words = fragment_order(tile)        # thread 1, its second row, j = 1, c = 1
    >>> words.nonzero().tolist(), int(words[0, 0, 1, 1])
    ([[0, 0, 1, 1]], 8)
    """
    n, rows, width = bit_tiles.shape
    assert rows % 64 == 0, rows
    assert width <= 16, width
    words = bit_tiles.new_empty(n, rows // 64, 128, 2, dtype=torch.int32)
    step, few = max(1, _CHUNK // (rows * width)), host.MOST // (rows * 64)
    if bit_tiles.device.type == "cpu" and n <= _FEW_PIECES * few:
        step = few
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
