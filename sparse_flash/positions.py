"""Positions of queries and keys: the offset of a KV cache, and left padding.

Query i of batch entry b has position i + q_offset[b] - kv_starts[b], key j has position
j - kv_starts[b]. Masks and layouts are over positions.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from sparse_flash.checks import check_has_values, check_integers
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.modes import is_fake

_LEAST_LENGTH = 128  # for which a mask is laid out
_MOST = 2**31 - 1  # of a position


def with_positions(tensors: tuple[Any, ...], mask: Mask | BlockLayout) -> tuple[Any, ...]:
    """The tensors of a call with q_offset and kv_starts as int32 tensors (b,).

    Both are None where positions are those of the tensors.

    Args:
        tensors: In the order of `AttentionCall.TENSORS`; q_offset may be an int or None.
        mask: Mask or layout.

    Raises:
        TypeError: An argument is neither an int nor an int tensor.
        ValueError: An argument has another shape, or is negative (checked for values on the host).
    """
    q, k, v, kv_lens, q_offset, kv_starts = tensors
    if q_offset is kv_starts is None:
        return tensors
    if kv_starts is None and _is_plain(q, k, mask, q_offset):
        return q, k, v, kv_lens, None, None
    offset = _per_entry("q_offset", 0 if q_offset is None else q_offset, q)
    starts = None if kv_starts is None else _per_entry("kv_starts", kv_starts, q)
    return q, k, v, kv_lens, offset, starts


def _is_plain(q: Tensor, k: Tensor, mask: Mask | BlockLayout, q_offset: Any) -> bool:
    """Whether it is 0, and so are all lengths as without it."""
    if isinstance(q_offset, Tensor | np.ndarray) or q_offset != 0:
        return False
    if torch.compiler.is_compiling():
        return q.shape[1] == k.shape[1]
    if isinstance(mask, Mask):
        lengths = q.shape[1], k.shape[1]
        own = zip(lengths, mask.extents(), strict=True)
        return lengths[0] == lengths[1] and all(extent in (None, n) for n, extent in own)
    return (mask.q_len, mask.kv_len) == (q.shape[1], k.shape[1])


def _per_entry(name: str, value: Any, q: Tensor) -> Tensor:
    batch = q.shape[0]
    if not isinstance(value, Tensor):
        value = _number(name, value, batch)
        return torch.full((batch,), value, dtype=torch.int32, device=q.device)
    check_integers(name, value, batch)
    check_has_values(name, value, q)
    return value.to(q.device, torch.int32)


def _number(name: str, value: Any, batch: int) -> int:
    number = isinstance(value, int) or hasattr(value, "__index__")
    array = isinstance(value, np.ndarray) and value.ndim > 0
    if isinstance(value, bool) or not number or array:
        several = isinstance(value, Iterable) and not isinstance(value, str)
        way_out = f": torch.as_tensor({name}) is one" if several else ""
        raise TypeError(
            f"{name} must be an int or an int tensor ({batch},), got {value!r}{way_out}"
        )
    if not 0 <= value <= _MOST:
        raise ValueError(f"{name} must be in 0..{_MOST}, got {value}")
    return value if torch.compiler.is_compiling() else operator.index(value)


def lengths_of(tensors: tuple[Any, ...], mask: Mask | BlockLayout) -> tuple[int, int]:
    """The lengths of the layout of a call: a layout's own, or those for which to lay a mask out.

    For positions these are the mask's own, or powers of two: a cache that grows needs few layouts.
    Where the host does not know the positions, they are taken to lie within the keys or queries.

    Args:
        tensors: In the order of `AttentionCall.TENSORS`; q_offset may be an int or None.
        mask: Mask or layout.

    Raises:
        ValueError: The layout, or the mask's own lengths, do not cover all positions.
    """
    q, k, _, _, q_offset, kv_starts = tensors
    if kv_starts is None and (q_offset is None or _is_plain(q, k, mask, q_offset)):
        return q.shape[1], k.shape[1]
    end = _end_of(q, 0 if q_offset is None else q_offset, kv_starts)
    if isinstance(mask, Mask):
        least = max(q.shape[1], k.shape[1]) if end is None else end
        q_len, kv_len = (
            _power_of_two(needed) if own is None else own
            for own, needed in zip(mask.extents(), (least, k.shape[1]), strict=True)
        )
    else:
        q_len, kv_len = mask.q_len, mask.kv_len
    if end is not None and q_len < end:
        raise ValueError(
            f"with q_offset the last query has position {end - 1}, but the layout or mask is for "
            f"{q_len} queries: it must be for {end} or more"
        )
    if kv_len < k.shape[1]:
        raise ValueError(
            f"with q_offset a layout or mask must be for at least as many keys as k has, "
            f"{k.shape[1]}, but it is for {kv_len}"
        )
    return q_len, kv_len


def end_of(q: Tensor, q_offset: int | Tensor) -> int | None:
    """One more than the last position of any query, at most; None where the host does not know it.

    Args:
        q: Queries, or keys of the same tokens, `(b, s, ...)`.
        q_offset: Position of the first, int or int `(b,)`.

    Raises:
        TypeError: q_offset is neither an int nor an int tensor.
        ValueError: It has another shape, or is negative.
    """
    if isinstance(q_offset, Tensor):
        _per_entry("q_offset", q_offset, q)
        if torch.compiler.is_compiling():
            return None
    return _end_of(q, q_offset, None)


def _end_of(q: Tensor, q_offset: int | Tensor, kv_starts: Tensor | None) -> int | None:
    """One more than the last position of a query, at most; None where only a GPU knows."""
    for name, x in (("q_offset", q_offset), ("kv_starts", kv_starts)):
        if isinstance(x, Tensor):
            check_integers(name, x, q.shape[0])
        if _is_readable(x) and not 0 <= int(x.min()) <= int(x.max()) <= _MOST:
            given = f"{int(x.min())}..{int(x.max())}"
            raise ValueError(f"{name} must be in 0..{_MOST}, got {given}")
    if not isinstance(q_offset, Tensor):
        return _number("q_offset", q_offset, q.shape[0]) + q.shape[1]
    if not _is_readable(q_offset):
        return None
    first = q_offset - kv_starts if _is_readable(kv_starts) else q_offset
    return int(first.max()) + q.shape[1]


def _is_readable(x: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor with values on the host."""
    return (
        isinstance(x, Tensor)
        and x.device.type == "cpu"
        and x.numel() > 0
        and not is_fake(x)
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _power_of_two(least: int) -> int:
    return min(1 << (max(least, _LEAST_LENGTH) - 1).bit_length(), _MOST)


def warn_of_alignment(mask: Mask | BlockLayout, q_len: int, kv_len: int) -> None:
    """Warn of ambiguous alignment where a mask depends on distances."""
    if q_len != kv_len and isinstance(mask, Mask) and mask.relative:
        last = f"where they are the last ones, as in a KV cache, pass q_offset={kv_len - q_len}; "
        warnings.warn(
            f"q has {q_len} tokens and k has {kv_len}: query i is taken to have position i; "
            f"{last if q_len < kv_len else ''}to confirm that they are the first, pass q_offset=0",
            stacklevel=5,  # where block_sparse_attention is called
        )
