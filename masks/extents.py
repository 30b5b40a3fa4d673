"""Lengths for which a mask is defined, and checks of indices against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from sparse_flash.masks.kleene import NotUnderstoodError, Symbol
from sparse_flash.masks.modes import unreadable
from torch import Tensor

Extents = tuple[int | None, int | None]  # q_len and kv_len for which a mask is defined; None: any


class HasExtents(Protocol):
    """An object with lengths, such as a mask."""

    def extents(self) -> Extents:
        """(q_len, kv_len) for which it is defined."""


def merge_extents(owner: object, masks: Sequence[HasExtents]) -> Extents:
    """The common lengths of all masks; raise ValueError if they differ."""
    merged = []
    for name, axis in (("q_len", 0), ("kv_len", 1)):
        lengths = {n for n in (m.extents()[axis] for m in masks) if n is not None}
        if len(lengths) > 1:
            raise ValueError(f"masks made for different {name} {sorted(lengths)} in {owner!r}")
        merged.append(lengths.pop() if lengths else None)
    return merged[0], merged[1]


def require_extents(mask: HasExtents, given: tuple[int, int], starts: tuple[int, int]) -> None:
    """Raise ValueError unless a mask is defined for indices from `starts`, `given` of each."""
    for name, n, length, start in zip(
        ("q_len", "kv_len"), mask.extents(), given, starts, strict=True
    ):
        if n is None or (start >= 0 and start + length == n):
            continue
        if start:
            raise ValueError(
                f"{mask!r} is made for {name}={n}, indices 0..{n - 1}, not for the indices "
                f"{start}..{start + length - 1} that it is shifted to"
            )
        raise ValueError(f"{mask!r} is made for {name}={n}, not {length}")


def check_indices(mask: HasExtents, q: Tensor, kv: Tensor) -> None:
    """Raise IndexError for indices outside the extents of the mask.

    Checks only tensors on the CPU: reading a GPU tensor would synchronize the host.
    """
    for name, n, index in zip(("query", "key"), mask.extents(), (q, kv), strict=True):
        if n is None or index.device.type != "cpu" or unreadable(index) or not index.numel():
            continue
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= n:
            raise IndexError(f"{name} indices {low}..{high} are not in 0..{n - 1} of {mask!r}")


def index_tensors(mask: HasExtents, q_idx: Tensor, kv_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Convert index tensors to int64, where no rule overflows, and check them.

    A rule of the user may apply a mask to symbols; they pass unless the mask has lengths, which
    nothing could check.
    """
    if isinstance(q_idx, Symbol) and isinstance(kv_idx, Symbol):
        if mask.extents() != (None, None):
            raise NotUnderstoodError(f"{mask!r} inside a function")
        return q_idx, kv_idx
    q, kv = _int64("q_idx", q_idx), _int64("kv_idx", kv_idx)
    check_indices(mask, q, kv)
    return q, kv


def expanded(truth: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """The truth for all pairs of indices that broadcast with each other."""
    if isinstance(truth, Symbol):
        return truth
    return truth.expand(torch.broadcast_tensors(q, kv)[0].shape)


def _int64(name: str, index: Tensor) -> Tensor:
    """Convert an index tensor to int64, where no rule overflows."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(index).__name__}")
    if index.dtype == torch.int64:
        return index
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(f"{name} must be an integer tensor, got dtype {index.dtype}")
    return index.long()
