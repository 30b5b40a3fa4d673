"""Block diagonal: tokens attend only to their own block or document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from sparse_flash.masks import blockwise
from sparse_flash.masks.arguments import integers, normalize, sizes
from sparse_flash.masks.blockwise import full, take
from sparse_flash.masks.device_builders import checked_capacity
from sparse_flash.masks.extents import Extents
from sparse_flash.masks.mask import Mask, Pattern, pattern
from sparse_flash.masks.modes import derived, is_capturing, refuse_mapped
from sparse_flash.masks.tables import IndexTable
from sparse_flash.masks.ternary import Index, Interval, Truth
from sparse_flash.masks.validation import MAX_LENGTH
from torch import Tensor


@pattern
class block_diagonal(Pattern):
    """allowed(q, kv) = q // size == kv // size.

    Source: Qiu et al., Blockwise Self-Attention for Long Document Understanding (2019).
    Density for n tokens: size / n. Reach: never (None) with more than one block.

    >>> block_diagonal(256).density(1024)
    0.25
    """

    size: int
    relative, tables = True, False

    def __post_init__(self) -> None:
        integers(self, size=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same block."""
        return q // self.size == kv // self.size


@pattern
class documents(Pattern):
    """allowed(q, kv) = document[q] == document[kv], for documents packed one after another.

    `lengths`: Number of tokens of each document, 0 allowed: ints, or a one-dimensional integer
    array or tensor. For `cu_seqlens` in FlashAttention's form, pass `cu_seqlens.diff()`.

    With `length`, the first argument is `cu_seqlens` itself, an integer tensor `(n,)` on any
    device: 0, the ends of the documents, then `length` up to the end of the tensor. Each `.layout`
    and each call reads the current values on the device, without a host synchronization. Such masks
    are equal if they share the tensor object. `capacity`: Maximum numbers of tiles and bit tiles of
    a layout; default: all tiles, and four bit tiles per block row and block column. Values that do
    not ascend from 0 to `length`, or a capacity that is too small, make `layout.check()` raise.

    Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021).
    Density for lengths l_i: sum l_i^2 / (sum l_i)^2. Reach: never (None) with more than one.

    >>> documents((100, 300, 112)).density(512)
    0.4293212890625
    >>> cu_seqlens = torch.tensor([0, 100, 400, 512, 512])
    >>> documents(cu_seqlens, length=512).density(512)
    0.4293212890625
    """

    lengths: Any
    length: int | None = None
    capacity: tuple[int, int] | None = None
    relative, tables = True, False

    def __post_init__(self) -> None:
        if self.length is not None:
            return self._check_cu_seqlens()
        if self.capacity is not None:
            raise TypeError("documents: capacity goes with cu_seqlens and length")
        lengths = sizes("documents", "lengths", self.lengths, 0)
        normalize(self, lengths=lengths)
        if not 1 <= sum(lengths) <= MAX_LENGTH:
            raise ValueError(
                f"documents: lengths must sum to 1..{MAX_LENGTH} tokens, got {sum(lengths)}"
            )
        return None

    def _check_cu_seqlens(self) -> None:
        cu_seqlens = self.lengths
        if not isinstance(cu_seqlens, Tensor):
            given = type(cu_seqlens).__name__
            raise TypeError(
                f"documents: with length, cu_seqlens must be an integer tensor, got {given}: pass "
                "documents(lengths) for lengths that the host knows"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"documents: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
            raise ValueError(
                "documents: cu_seqlens must be (n,), n at least 2: 0, the ends of the documents, "
                f"and length; got {tuple(cu_seqlens.shape)}"
            )
        way_out = "one for each batch entry, as masks.per_batch([...])"
        refuse_mapped("documents: cu_seqlens", cu_seqlens, way_out)
        integers(self, length=1)
        normalize(self, capacity=checked_capacity(self.capacity))
        object.__setattr__(self, "on_device", True)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, documents):
            return NotImplemented
        mine, theirs = self._key(), other._key()
        return mine == theirs

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        what = id(self.lengths) if self.on_device else self.lengths
        return self.on_device, what, self.length, self.capacity

    @property
    def form(self) -> Hashable:
        """All but the values of cu_seqlens."""
        x = self.lengths
        return documents, x.shape, x.dtype, x.device, self.length, self.capacity

    def __repr__(self) -> str:
        if not self.on_device:
            return f"documents({self.lengths!r})"
        capacity = "" if self.capacity is None else f", capacity={self.capacity}"
        tensor = f"<{self.lengths.dtype} ({len(self.lengths)},) on {self.lengths.device}>"
        return f"documents({tensor}, length={self.length}{capacity})"

    def now(self, device: torch.device, *, in_call: bool = False) -> Mask:
        """The same documents with a copy of the current cu_seqlens, on a device.

        in_call: The copy is made at first use: what asks for it uses it before it returns.
        """
        numbered = _Numbered(self, device)
        if not in_call:
            numbered.cu_seqlens  # noqa: B018 - the copy
        return numbered

    @property
    def for_arrays(self) -> bool:
        """True unless the documents are on a device."""
        return not self.on_device

    @derived
    def _document(self) -> IndexTable:
        numbers = np.repeat(np.arange(len(self.lengths), dtype=np.int32), self.lengths)
        return IndexTable(torch.from_numpy(numbers), ascending=True)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same document."""
        if self.on_device:
            return self.now(q.device).allowed(q, kv)
        return self._document(q) == self._document(kv)

    def extents(self) -> Extents:
        """The sum of the lengths."""
        total = sum(self.lengths) if self.length is None else self.length
        return total, total

    def check_lengths(self, q_len: int, kv_len: int, q_start: int = 0, kv_start: int = 0) -> None:
        """Check the lengths; the error recognizes cumulative lengths."""
        try:
            super().check_lengths(q_len, kv_len, q_start, kv_start)
        except ValueError as error:
            if self.on_device:
                raise
            ascending = all(a <= b for a, b in itertools.pairwise(self.lengths))
            if len(self.lengths) < 2 or self.lengths[0] or not ascending:
                raise
            raise ValueError(
                f"{error}; lengths look like cu_seqlens: pass their differences, cu_seqlens.diff()"
            ) from None


class _Numbered(Mask):
    """Documents with a copy of cu_seqlens, from `documents.now`; never cached."""

    on_device, relative = True, True

    def __init__(self, of: documents, device: torch.device) -> None:
        self.of, self.device, self.capacity = of, device, of.capacity
        self._copy: Tensor | None = None
        self._numbers: Tensor | None = None
        self._captured = is_capturing(device)
        self.make_copy: Callable[[], Tensor] = self._copied

    def _copied(self) -> Tensor:
        return self.of.lengths.detach().to(self.device, torch.int64, copy=True)

    @property
    def cu_seqlens(self) -> Tensor:
        """int64 (n,), made at first use."""
        if self._copy is None:
            self._copy = self.make_copy()
        return self._copy

    def readable(self) -> Tensor:
        """cu_seqlens for a kernel on the device that runs now: those of the user where it can."""
        given: Tensor = self.of.lengths
        plain = type(given) is Tensor and given.device == self.device and given.is_contiguous()
        unread = self._copy is None and not self.is_numbered
        return given if plain and unread else self.cu_seqlens

    @property
    def form(self) -> Hashable:
        """That of the documents."""
        return self.of.form

    @property
    def is_numbered(self) -> bool:
        """Whether the numbers are there."""
        return self._numbers is not None

    @property
    def numbers(self) -> Tensor:
        """Document of each token, int32 (length,): computed at first use, or given."""
        found = self._numbers
        if found is None:
            ends, length = self.cu_seqlens, self.of.length
            assert length is not None
            tokens = torch.arange(length, device=ends.device)
            found = torch.searchsorted(ends, tokens, right=True, out_int32=True)
            if is_capturing(ends.device) == self._captured:  # else they belong to a CUDA graph
                self._numbers = found
        return found

    @numbers.setter
    def numbers(self, numbers: Tensor) -> None:
        self._numbers = numbers

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same document."""
        return self._look_up(q) == self._look_up(kv)

    def _look_up(self, index: Index) -> Index:
        if not isinstance(index, Interval):
            return self.numbers.index_select(0, index.flatten()).view(index.shape)
        lo, hi = (blockwise.int64(take(self.numbers, end)) for end in (index.lo, index.hi))
        largest, of_index = len(self.cu_seqlens), index.columns
        return Interval(lo, hi, largest, lambda modulus: (full(lo, 0), of_index()))

    def extents(self) -> Extents:
        """`length` queries and keys."""
        return self.of.extents()

    def now(self, device: torch.device, *, in_call: bool = False) -> Mask:
        """Itself."""
        return self

    def invalid(self) -> Tensor:
        """Whether cu_seqlens do not ascend from 0 to the length, bool ()."""
        ends = self.cu_seqlens
        wrong = (ends[0] != 0) | (ends[-1] != self.of.length)
        return wrong | (ends[1:] < ends[:-1]).any()

    def __repr__(self) -> str:
        return repr(self.of)
