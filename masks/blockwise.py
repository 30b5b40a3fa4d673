"""Operations on one number per block or item: arrays of numpy on a CPU, tensors on a GPU.

There are a few thousand of them, so an operation takes about as long as its call. A call of numpy
takes a third of one of torch. Operators are the same for both; other operations are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Numbers = Any  # an array of numpy, or a tensor


def numbers(x: Numbers) -> Numbers:
    """A tensor as numbers; on a CPU they share its memory."""
    return x.numpy() if isinstance(x, Tensor) and x.device.type == "cpu" else x


def tensor(x: Numbers) -> Tensor:
    """Numbers as a tensor."""
    return torch.from_numpy(x) if type(x) is np.ndarray else x


def device(x: Numbers) -> torch.device:
    """Where numbers are."""
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def where(condition: Numbers, a: Any, b: Any) -> Numbers:
    """`a` where the condition holds, elsewhere `b`."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return np.where(condition, a, b)


def minimum(a: Numbers, b: Any) -> Numbers:
    """The smaller of two numbers. b: Numbers, or an int."""
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    return np.minimum(a, b)


def maximum(a: Numbers, b: Any) -> Numbers:
    """The larger of two numbers. b: Numbers, or an int."""
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    return np.maximum(a, b)


def full(like: Numbers, value: int) -> Numbers:
    """The same int64 for each block."""
    if isinstance(like, Tensor):
        return torch.full_like(like, value, dtype=torch.int64)
    return np.full(like.shape, value, np.int64)


def int32(values: list[int], like: Numbers) -> Numbers:
    """A few numbers as int32."""
    if isinstance(like, Tensor):
        return torch.tensor(values, dtype=torch.int32, device=like.device)
    return np.array(values, np.int32)


def states(like: Numbers, value: int) -> Numbers:
    """The same int8 for each block."""
    if isinstance(like, Tensor):
        return torch.full_like(like, value, dtype=torch.int8)
    return np.full(like.shape, value, np.int8)


def int8(truth: Numbers) -> Numbers:
    """Bools as 0 and 1, int8."""
    return truth.to(torch.int8) if isinstance(truth, Tensor) else truth.view(np.int8)


def int64(x: Numbers) -> Numbers:
    """Integers or bools as int64."""
    return convert(x, "int64")


def is_zero(x: Numbers) -> bool:
    """Whether all numbers are known to be 0. Nothing waits for a GPU, of which nothing is known."""
    return not isinstance(x, Tensor) and not x.any()


def bit_length(x: Numbers) -> Numbers:
    """Bit length of each non-negative integer below 2^53: 0 -> 0, 1 -> 1, 255 -> 8, 256 -> 9.

    >>> bit_length(np.array([0, 1, 255, 256]))
    array([0, 1, 8, 9])
    """
    if isinstance(x, Tensor):
        return torch.frexp(x.double()).exponent.long()
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


def floor_divide(x: Numbers, n: int) -> Numbers:
    """Floor of x / n for n > 0; a shift for powers of two, several times as fast."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else x // n


def remainder(x: Numbers, n: int) -> Numbers:
    """Remainder x % n for n > 0; a bit mask for powers of two."""
    return x & (n - 1) if n & (n - 1) == 0 else x % n


def corners(operation: Callable[[Any, Any], Any], a: Any, b: Any) -> tuple[Numbers, Numbers]:
    """Bounds of an operation that is monotone in each operand, both with bounds `lo` and `hi`."""
    values = [operation(x, y) for x in (a.lo, a.hi) for y in (b.lo, b.hi)]
    least, most = values[0], values[0]
    for value in values[1:]:
        least, most = minimum(least, value), maximum(most, value)
    return least, most


def take(table: Numbers, index: Numbers, axis: int = 0) -> Numbers:
    """Entries of a table, numbers or a tensor, at indices of one dimension."""
    if isinstance(index, Tensor):
        return table[(slice(None),) * axis + (index,)]
    return numbers(table).take(index, axis)  # several times as fast as table[index]


def convert(x: Numbers, dtype: str) -> Numbers:
    """Numbers in another dtype, such as "int32"."""
    if isinstance(x, Tensor):
        return x.to(getattr(torch, dtype))
    return x.astype(dtype, copy=False)


def arange(n: int, like: Numbers) -> Numbers:
    """0, 1, ..., n - 1, int64."""
    return torch.arange(n, device=like.device) if isinstance(like, Tensor) else np.arange(n)


def zeros(shape: tuple[int, ...], like: Numbers, dtype: str = "int32") -> Numbers:
    """Zeros, or False, of a dtype such as "bool"."""
    if isinstance(like, Tensor):
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=like.device)
    return np.zeros(shape, dtype)


def repeat(counts: Numbers) -> Numbers:
    """Each index of `counts` as often as its count, int64."""
    if isinstance(counts, Tensor):
        return torch.repeat_interleave(counts)
    return np.repeat(np.arange(len(counts)), counts)


def spread(values: Numbers, counts: Numbers) -> Numbers:
    """Each value as often as its count."""
    if isinstance(values, Tensor):
        return torch.repeat_interleave(values, counts)
    return values.repeat(counts)


def starts(counts: Numbers) -> Numbers:
    """Where runs of such lengths begin, and where the last one ends: one more, int64."""
    if isinstance(counts, Tensor):
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    found = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=found[1:])
    return found


def nonzero(truth: Numbers) -> Numbers:
    """Indices where a truth `(n,)` holds, int64."""
    return truth.nonzero().squeeze(1) if isinstance(truth, Tensor) else np.flatnonzero(truth)


def searchsorted(ascending: Numbers, x: Numbers) -> Numbers:
    """How many of the ascending numbers are below each of `x`, int64."""
    if isinstance(x, Tensor):
        return torch.searchsorted(ascending, x)
    return np.searchsorted(ascending, x)


def argsort(x: Numbers) -> Numbers:
    """The ascending order; equal numbers keep theirs."""
    if isinstance(x, Tensor):
        return x.argsort(stable=True)
    return x.argsort(kind="stable")


def rows_of(columns: list[Numbers], like: Tensor) -> Tensor:
    """Columns of integers as rows, int64 `(n, k)`; a column may have one number for all blocks."""
    n, first = len(like), numbers(like)
    made: Numbers
    if isinstance(first, Tensor):
        made = first.new_empty(len(columns), n, dtype=torch.int64)
    else:
        made = np.empty((len(columns), n), np.int64)
    for row, column in zip(made, columns, strict=True):  # written whole, then seen as rows
        row[:] = column
    return tensor(made).T
