"""The lengths that a mask is made for, and the indices that it can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from sparse_flash.masks.modes import unreadable
from torch import Tensor

Extents = tuple[int | None, int | None]  # the q_len and kv_len that a mask is made for; None: any


class HasExtents(Protocol):
    """A mask, as far as lengths are concerned."""

    def extents(self) -> Extents:
        """The (q_len, kv_len) that it is made for."""


def merge_extents(owner: object, masks: Sequence[HasExtents]) -> Extents:
    """The lengths that all masks agree on; ValueError where they do not."""
    merged = []
    for name, axis in (("q_len", 0), ("kv_len", 1)):
        lengths = {n for n in (m.extents()[axis] for m in masks) if n is not None}
        if len(lengths) > 1:
            raise ValueError(f"masks made for different {name} {sorted(lengths)} in {owner!r}")
        merged.append(lengths.pop() if lengths else None)
    return merged[0], merged[1]


def require_extents(mask: HasExtents, given: tuple[int, int], starts: tuple[int, int]) -> None:
    """Raise ValueError where a mask is made for other lengths than `given`, from `starts` on."""
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

    Only values on the CPU are looked at: a GPU would have to be waited for.
    """
    for name, n, index in zip(("query", "key"), mask.extents(), (q, kv), strict=True):
        if n is None or index.device.type != "cpu" or unreadable(index) or not index.numel():
            continue
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= n:
            raise IndexError(f"{name} indices {low}..{high} are not in 0..{n - 1} of {mask!r}")


def index_tensor(name: str, index: Tensor) -> Tensor:
    """An index tensor as int64, in which no rule overflows."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(index).__name__}")
    if index.dtype == torch.int64:
        return index
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(f"{name} must be an integer tensor, got dtype {index.dtype}")
    return index.long()
