"""Block diagonal: tokens see only their own block, or their own document."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from sparse_flash.masks.arguments import integers, normalise, sizes
from sparse_flash.masks.check import MAX_LENGTH
from sparse_flash.masks.extents import Extents
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.modes import derived
from sparse_flash.masks.tables import IndexTable
from sparse_flash.masks.ternary import Index, Truth


@pattern
class block_diagonal(Pattern):
    """allowed(q, kv) = q // size == kv // size.

    Source: Qiu et al., Blockwise Self-Attention for Long Document Understanding (2019).
    Density for n tokens: size / n. Reach: never (None) with more than one block.

    >>> block_diagonal(256).density(1024)
    0.25
    """

    size: int
    relative = True

    def __post_init__(self) -> None:
        integers(self, size=1)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same block."""
        return q // self.size == kv // self.size


@pattern
class documents(Pattern):
    """allowed(q, kv) = document[q] == document[kv], for documents packed one after the other.

    `lengths`: Tokens of each document, 0 allowed: ints, or a one-dimensional integer array or
    tensor. Of `cu_seqlens` as FlashAttention takes them, pass `cu_seqlens.diff()`.
    Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021).
    Density for lengths l_i: sum l_i^2 / (sum l_i)^2. Reach: never (None) with more than one.

    >>> documents((100, 300, 112)).density(512)
    0.4293212890625
    """

    lengths: tuple[int, ...]
    relative = True

    def __post_init__(self) -> None:
        lengths = sizes("documents", "lengths", self.lengths, 0)
        normalise(self, lengths=lengths)
        if not 1 <= sum(lengths) <= MAX_LENGTH:
            raise ValueError(
                f"documents: lengths must sum to 1..{MAX_LENGTH} tokens, got {sum(lengths)}"
            )

    @derived
    def _document(self) -> IndexTable:
        numbers = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return IndexTable(torch.from_numpy(numbers), ascending=True)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same document."""
        return self._document(q) == self._document(kv)

    def extents(self) -> Extents:
        """The sum of the lengths."""
        return sum(self.lengths), sum(self.lengths)

    def check_lengths(self, q_len: int, kv_len: int, q_start: int = 0, kv_start: int = 0) -> None:
        """As for every mask; an error tells cumulated lengths from lengths."""
        try:
            super().check_lengths(q_len, kv_len, q_start, kv_start)
        except ValueError as error:
            ascending = all(a <= b for a, b in itertools.pairwise(self.lengths))
            if len(self.lengths) < 2 or self.lengths[0] or not ascending:
                raise
            raise ValueError(
                f"{error}; lengths look like cu_seqlens: pass their differences, cu_seqlens.diff()"
            ) from None
