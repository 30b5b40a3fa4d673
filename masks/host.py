"""Operations on large index tensors of the CPU that start no threads.

Torch splits an operation on 32768 or more elements among threads, indexing from 3000 elements on,
and `repeat_interleave` always. Their work is then shorter than the wait for the last of them, above
all on a machine whose cores are busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

MOST = (1 << 15) - 1  # elements of an operation that torch computes in the calling thread
_MOST_CUDA = 1 << 20
_SOME = 1 << 14  # elements that are looked at first


def pieces(n: int, device: torch.device, each: int = 1) -> Iterator[slice]:
    """Slices of n items, `each` elements per item, at least one, possibly empty.

    >>> list(pieces(5, torch.device("cpu"), 16000))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    step = max(1, (MOST if device.type == "cpu" else _MOST_CUDA) // each)
    return (slice(start, start + step) for start in range(0, max(1, n), step))


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`; a single tensor itself."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].device.type != "cpu":
        return torch.cat(list(tensors), dim)
    return torch.from_numpy(np.concatenate([x.numpy() for x in tensors], dim))


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for indices of the first dimension, `(n,)`."""
    if x.device.type != "cpu":
        return x[index]
    array = x.numpy()
    if not array.flags.c_contiguous:  # `take` would copy all of it
        return torch.from_numpy(array[index.numpy()])
    return torch.from_numpy(array.take(index.numpy(), axis=0))


def put(x: Tensor, index: Tensor, values: Tensor) -> None:
    """`x[index] = values`."""
    if x.device.type != "cpu":
        x[index] = values
    else:
        x.numpy()[index.numpy()] = values.numpy()


def arange(n: int, device: torch.device) -> Tensor:
    """0, 1, ..., n - 1, int64."""
    if device.type != "cpu":
        return torch.arange(n, device=device)
    return torch.from_numpy(np.arange(n))


def argsort(x: Tensor) -> Tensor:
    """The order of distinct integers `(n,)`."""
    if x.device.type != "cpu":
        return torch.argsort(x)
    return torch.from_numpy(np.argsort(x.numpy()))


def full(n: int, value: int, device: torch.device) -> Tensor:
    """The same number n times, int64."""
    if device.type != "cpu":
        return torch.full((n,), value, device=device)
    return torch.from_numpy(np.full(n, value))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.zeros`."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    made = torch.empty(shape, dtype=dtype, device="cpu")
    made.numpy().fill(0)
    return made


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """As `x.reshape(shape)`."""
    if x.device.type != "cpu":
        return x.reshape(shape)
    return torch.from_numpy(x.numpy().reshape(shape))


def count(x: Tensor) -> int:
    """The number of True in `x`."""
    return int(x.sum()) if x.device.type != "cpu" else int(np.count_nonzero(x.numpy()))


def int32(x: Tensor) -> Tensor:
    """As int32; itself if it is."""
    if x.device.type != "cpu":
        return x.int()
    return torch.from_numpy(x.numpy().astype(np.int32, copy=False))


def int64(x: Tensor) -> Tensor:
    """As int64; itself if it is."""
    if x.device.type != "cpu":
        return x.long()
    return torch.from_numpy(x.numpy().astype(np.int64, copy=False))


def positions(x: Tensor, least: int, most: int | None = None) -> Tensor:
    """Indices of the elements of `x` `(n,)` from `least` to `most`, int64."""
    if x.device.type != "cpu":
        found = x >= least if most is None else (x >= least) & (x <= most)
        return found.nonzero().squeeze(1)
    array = x.numpy()
    inside = array >= least if most is None else (array >= least) & (array <= most)
    return torch.from_numpy(np.flatnonzero(inside))


def unique(x: Tensor, end: int | None = None) -> tuple[Tensor, Tensor]:
    """Distinct integers of `x` `(n,)`, ascending, and for each element its index among them.

    end: All integers are in 0..end - 1, and `end` is not much larger than n.
    """
    if x.device.type != "cpu" or (end is None and len(x) > MOST):
        return torch.unique(x, return_inverse=True)
    if end is None:
        distinct, index = np.unique(x.numpy(), return_inverse=True)
    else:
        number, seen = x.numpy().astype(np.int64, copy=False), np.zeros(end, np.bool_)
        seen[number] = True
        distinct, index = np.flatnonzero(seen), (seen.cumsum() - 1).take(number)
    return torch.from_numpy(distinct), torch.from_numpy(index)


def firsts(index: Tensor, n: int) -> Tensor:
    """The first position of each of 0..n - 1 in `index`, int64 `(n,)`; `len(index)` if none."""
    if index.device.type != "cpu":
        first = torch.full((n,), len(index), device=index.device)
        every = torch.arange(len(index), device=index.device)
        return first.scatter_reduce_(0, index, every, "amin")
    array, found, step = index.numpy(), np.full(n, len(index)), max(_SOME, n)
    for start in range(0, len(array), step):  # most often, all occur early
        some = array[start : start + step][::-1]
        here = np.full(n, len(array))
        here[some] = np.arange(start + len(some) - 1, start - 1, -1)  # the last assignment counts
        np.minimum(found, here, out=found)
        if found.max() < len(array):
            break
    return torch.from_numpy(found)


def kinds(x: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """The first position of each distinct integer of `x` `(n,)`; for each element, which it is.

    The distinct ones ascend. end: As in `unique`.
    """
    if x.device.type != "cpu":
        distinct, index = unique(x, end)
        return firsts(index, len(distinct)), index
    first = firsts(x, end).numpy()
    occurs = first < len(x)
    index = torch.from_numpy((occurs.cumsum() - 1).take(x.numpy()))
    return torch.from_numpy(first[occurs]), index


def divided(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Quotients x // n and remainders x % n."""
    if x.device.type != "cpu":
        return x // n, x % n
    quotient, rest = np.divmod(x.numpy(), n)
    return torch.from_numpy(quotient), torch.from_numpy(rest)


def repeat(counts: Tensor, total: int) -> Tensor:
    """Each index of `counts` as often as its count, int64 `(total,)`."""
    if counts.device.type != "cpu":
        return torch.repeat_interleave(counts, output_size=total)
    return torch.from_numpy(np.repeat(np.arange(len(counts)), counts.numpy()))
