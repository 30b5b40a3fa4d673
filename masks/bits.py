"""Bit tiles: one bit per (q, kv) element of a partial tile; equal tiles are stored once."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks import host
from torch import Tensor
from torch.nn.functional import pad

# Multiplying eight 0/1 bytes by this gathers their bits in the top byte of the product.
_GATHER = 0x0102040810204080
_AT_ONCE = 1 << 16  # words hashed or compared per step
_PREFIX = 32  # words: tiles of noise differ in these
_FEW = 64  # rows that show whether many are distinct
_BUCKETS = 1 << 16


def pack(tiles: Tensor) -> Tensor:
    """Pack bool `(n, block_q, block_kv)` into uint8 `(n, block_q, ceil(block_kv / 8))`.

    Bit `j % 8` of byte `j // 8` is column j (little-endian, as numpy.packbits(bitorder="little")).

    >>> pack(torch.tensor([[[True, False, True, False, False, False, False, False, True]]]))
    tensor([[[5, 1]]], dtype=torch.uint8)
    """
    if tiles.device.type == "cpu":
        return torch.from_numpy(pack_arrays(tiles.numpy()))
    n, rows, cols = tiles.shape
    padded = tiles.new_zeros(n, rows, -(-cols // 8) * 8)
    padded[..., :cols] = tiles
    words = padded.view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def pack_arrays(tiles: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """As `pack`, of any shape."""
    tiles = np.ascontiguousarray(tiles)
    *shape, width = tiles.shape
    if width % 8:
        return np.packbits(tiles, axis=-1, bitorder="little")
    # All at once: along an axis it would take several times as long.
    return np.packbits(tiles.reshape(-1), bitorder="little").reshape(*shape, width // 8)


def unpack(packed: Tensor, block_kv: int) -> Tensor:
    """The inverse of `pack`: bool `(n, block_q, block_kv)`.

    >>> unpack(torch.tensor([[[5, 1]]], dtype=torch.uint8), 9).int()
    tensor([[[1, 0, 1, 0, 0, 0, 0, 0, 1]]], dtype=torch.int32)
    """
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(packed)
    if packed.device.type == "cpu" and not transformed:
        each = np.unpackbits(packed.numpy(), axis=-1, bitorder="little")[..., :block_kv]
        return torch.from_numpy(each.view(np.bool_))
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :block_kv].bool()


def clip(packed: NDArray[np.uint8], heights: NDArray[Any], widths: NDArray[Any]) -> None:
    """Set bits of tiles `(n, r, c)` below `heights` rows and beyond `widths` columns to 0.

    >>> tile = np.full((1, 2, 1), 255, np.uint8)
    >>> clip(tile, np.array([1]), np.array([3]))
    >>> tile.tolist()
    [[[7], [0]]]
    """
    _, rows, width = packed.shape
    for low in np.flatnonzero(heights < rows):
        packed[low, heights[low] :] = 0
    narrow = np.flatnonzero(widths < 8 * width)
    if len(narrow):
        within = np.arange(8 * width) < widths[narrow, None]
        packed[narrow] &= np.packbits(within, axis=1, bitorder="little")[:, None]


def transposed(packed: Tensor, block_kv: int) -> Tensor:
    """Tiles `(n, block_q, ceil(block_kv / 8))` with rows and columns exchanged.

    >>> transposed(torch.tensor([[[5], [1]]], dtype=torch.uint8), 3)
    tensor([[[3],
             [0],
             [1]]], dtype=torch.uint8)
    """
    n, rows, width = packed.shape
    if packed.device.type != "cpu" or rows % 8 or block_kv % 8:
        return pack(unpack(packed, block_kv).transpose(1, 2))
    # Bytes of eight rows as words, whose bits are exchanged (Warren, Hacker's Delight, 7-3).
    octets = packed.numpy().reshape(n, rows // 8, 8, width).transpose(0, 3, 1, 2)
    words = np.array(octets, order="C").view(np.uint64)[..., 0]  # (n, width, rows / 8)
    for shift, kept in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0xF0F0F0F0)):
        exchange_bits(words, shift, kept)
    octets = words[..., None].view(np.uint8).transpose(0, 1, 3, 2)  # (n, width, 8, rows / 8)
    return torch.from_numpy(np.ascontiguousarray(octets).reshape(n, 8 * width, rows // 8))


def exchange_bits(words: NDArray[np.uint64], distance: int, mask: int) -> None:
    """Exchange the bits in the mask with those `distance` above them, in place."""
    change = words >> distance
    change ^= words
    change &= mask
    words ^= change
    change <<= distance
    words ^= change


def deduplicate(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tiles of uint8 `(n, r, c)`, and for each tile its index among them, int64 `(n,)`.

    >>> tiles = torch.tensor([[[7]], [[1]], [[7]]], dtype=torch.uint8)
    >>> distinct, index = deduplicate(tiles)
    >>> len(distinct), torch.equal(distinct[index], tiles)
    (2, True)
    """
    flat = host.reshaped(packed, (len(packed), packed.shape[1] * packed.shape[2]))
    rest = -flat.shape[1] % 8
    words = (pad(flat, (0, rest)) if rest else flat.contiguous()).view(torch.int64)
    first, index = distinct_rows(words)
    return (packed if len(first) == len(packed) else host.take(packed, first)), index


def distinct_rows(words: Tensor) -> tuple[Tensor, Tensor]:
    """First occurrence of each distinct row of int64 `(n, w)`, and the distinct row of each row.

    Rows are compared by a 64-bit hash; a check word by word makes the result exact.

    >>> distinct_rows(torch.tensor([[7, 1], [5, 5], [7, 1]]))[0].sort().values
    tensor([0, 1])
    """
    n = len(words)
    if n == 0:
        return (torch.empty(0, dtype=torch.int64, device=words.device),) * 2
    if words.device.type == "cpu":
        wide = words.shape[1] >= 4 * _PREFIX  # looked up in about the time of hashing
        if n <= _FEW or (wide and n <= 4 * _FEW):
            return _by_content(words.numpy())
        if (found := _by_buckets(words.numpy())) is not None:
            return found
    every = host.arange(n, words.device)
    if words.shape[1] >= 4 * _PREFIX and len(host.unique(_hashes(words[:, :_PREFIX], 0))[0]) == n:
        return every, every
    for seed in range(8):
        distinct, index = host.unique(_hashes(words, seed))
        if len(distinct) == n:
            return every, every
        first = host.firsts(index, len(distinct))
        if _all_equal(words, host.take(first, index)):
            return first, index
    raise AssertionError("eight independent 64-bit hashes collided")


def _by_content(words: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """As `distinct_rows`, for a few rows."""
    first: dict[Any, int] = {}
    hashes = words @ _factors(words.shape[1], 0).numpy()
    twin = [first.setdefault(row, i) for i, row in enumerate(hashes.tolist())]
    if len(first) < len(twin) and not np.array_equal(words.take(twin, axis=0), words):
        first.clear()  # two rows have the same hash
        twin = [first.setdefault(row.tobytes(), i) for i, row in enumerate(words)]
    number = {i: n for n, i in enumerate(first.values())}
    index = np.array([number[i] for i in twin], np.int64)
    return torch.from_numpy(np.array(list(first.values()), np.int64)), torch.from_numpy(index)


def _by_buckets(words: NDArray[np.int64]) -> tuple[Tensor, Tensor] | None:
    """As `distinct_rows`, without sorting, where few rows are distinct; None where many are.

    All rows in a bucket of hashes must agree with the first of them.
    """
    factors = _factors(words.shape[1], 0).numpy()
    if len(set((words[:_FEW] @ factors).tolist())) > _FEW // 2:
        return None
    columns = np.ascontiguousarray(words.T)
    bucket = np.zeros(len(words), np.int64)
    for column, factor in zip(columns, factors, strict=True):
        bucket += column * factor  # several times as fast as a product of matrices
    bucket >>= 32
    bucket &= _BUCKETS - 1
    first = np.empty(_BUCKETS, np.int64)
    first[bucket[::-1]] = np.arange(len(words))[::-1]  # the last assignment counts
    twin = first.take(bucket)
    if any(not (column.take(twin) == column).all() for column in columns):
        return None
    return _of_twins(twin)


def _of_twins(twin: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """The result of `distinct_rows`, from the first of all rows that equal each row."""
    is_first = twin == np.arange(len(twin))
    index = (np.cumsum(is_first, dtype=np.int64) - 1)[twin]
    return torch.from_numpy(np.flatnonzero(is_first)), torch.from_numpy(index)


def _hashes(words: Tensor, seed: int) -> Tensor:
    """A 64-bit hash of each row of int64 `(n, w)`."""
    step = max(1, _AT_ONCE // max(1, words.shape[1]))
    factors = _factors(words.shape[1], seed).to(words.device)
    return host.cat([_mix(part, factors) for part in words.split(step)])


def _all_equal(words: Tensor, twin: Tensor) -> bool:
    """Whether each row of int64 `(n, w)` equals the row of its twin."""
    if words.device.type != "cpu":
        return torch.equal(words[twin], words)
    rows, others, step = words.numpy(), twin.numpy(), max(1, _AT_ONCE // max(1, words.shape[1]))
    parts = (slice(start, start + step) for start in range(0, len(rows), step))
    return all(np.array_equal(rows[others[part]], rows[part]) for part in parts)


@functools.lru_cache(64)
def _factors(n: int, seed: int) -> Tensor:
    """Odd random numbers of 64 bits, the same on every machine: int64 `(n,)`."""
    generator = torch.Generator("cpu").manual_seed(seed)
    size, options = (n,), {"generator": generator, "dtype": torch.int64, "device": "cpu"}
    return torch.randint(-(2**63), 2**63 - 1, size, **options) | 1  # type: ignore[call-overload]


def _mix(words: Tensor, factors: Tensor) -> Tensor:
    """A 64-bit multiply-xorshift hash of each row of int64 `(n, w)`."""
    if words.device.type == "cpu":  # several times as fast as torch
        product = words.numpy() * factors.numpy()
        product ^= product >> 29
        return torch.from_numpy(product @ np.roll(factors.numpy(), 1))
    product = words * factors
    return (product ^ (product >> 29)).mul(factors.roll(1)).sum(1)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes another one `(n,)`, of its dtype.

    >>> inverse(torch.tensor([2, 0, 1]))
    tensor([1, 2, 0])
    """
    back = torch.empty_like(order)
    host.put(back, host.int64(order), host.arange(len(order), order.device).to(order.dtype))
    return back


def count(packed: Tensor) -> Tensor:
    """Number of ones in each tile of uint8 `(n, r, c)`: int64 `(n,)`.

    >>> count(torch.tensor([[[255, 1]], [[0, 0]]], dtype=torch.uint8))
    tensor([9, 0])
    """
    if packed.device.type == "cpu":
        size = packed.shape[1] * packed.shape[2]
        words = np.ascontiguousarray(packed.numpy()).reshape(len(packed), size)
        words = words.view(np.uint64) if size and size % 8 == 0 else words
        return torch.from_numpy(np.bitwise_count(words).sum(1, dtype=np.int64))
    # Sums of adjacent bits, pairs and nibbles (Warren, Hacker's Delight, 5-1).
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum((1, 2))
