"""Block diagonal: tokens see only their own block, or their own document."""

from __future__ import annotations

from functools import cached_property

import torch
from sparse_flash.masks.mask import Extents, Pattern, pattern
from sparse_flash.masks.patterns.arguments import integer, normalise, sizes
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

    def __post_init__(self) -> None:
        integer("block_diagonal", "size", self.size)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same block."""
        return q // self.size == kv // self.size


@pattern
class documents(Pattern):
    """allowed(q, kv) = document[q] == document[kv], for documents packed one after the other.

    Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021).
    Density for lengths l_i: sum l_i^2 / (sum l_i)^2. Reach: never (None) with more than one.

    >>> documents((100, 300, 112)).density(512)
    0.4293212890625
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        normalise(self, lengths=sizes("documents", "lengths", self.lengths))

    @cached_property
    def _document(self) -> IndexTable:
        numbers = torch.arange(len(self.lengths))
        return IndexTable(torch.repeat_interleave(numbers, torch.tensor(self.lengths)))

    def allowed(self, q: Index, kv: Index) -> Truth:
        """In the same document."""
        return self._document(q) == self._document(kv)

    def extents(self) -> Extents:
        """The sum of the lengths."""
        return sum(self.lengths), sum(self.lengths)
