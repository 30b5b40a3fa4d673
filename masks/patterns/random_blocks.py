"""Random blocks with a seed: equal arguments give equal patterns on every machine."""

from __future__ import annotations

import numpy as np
import torch
from sparse_flash.masks.arguments import fraction, integers, normalize
from sparse_flash.masks.extents import Extents
from sparse_flash.masks.kleene import columns_of
from sparse_flash.masks.mask import Pattern, pattern
from sparse_flash.masks.modes import derived
from sparse_flash.masks.tables import IndexTable
from sparse_flash.masks.ternary import Index, Interval, Ternary, Truth, never
from torch import Tensor

_RESOLUTION = 1 << 24  # densities are multiples of 2^-24


@pattern
class random_blocks(Pattern):
    """allowed(q, kv) = hash(seed, q // block, kv // block) < keep: blocks kept independently.

    Defined for any length; a block has the same value at all lengths.
    Source: Zaheer et al., Big Bird (2020), section 2 (random attention), here independent.
    Density: `keep` in expectation. Reach: computed.

    >>> round(random_blocks(0.25, block=64).density(8192), 2)
    0.25
    """

    keep: float
    block: int = 128
    seed: int = 0
    relative = False

    def __post_init__(self) -> None:
        integers(self, block=1, seed=0)
        if self.seed >= 1 << 31:
            raise ValueError(f"random_blocks: seed must be below 2^31, got {self.seed}")
        normalize(self, keep=fraction("random_blocks", "keep", self.keep))

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The hash of the block is below the threshold."""
        i, j = q // self.block, kv // self.block
        if not isinstance(i, Interval):
            return self._coin(i, j)
        heads, one = self._coin(i.lo, j.lo), (i.lo == i.hi) & (j.lo == j.hi)
        return Ternary.of(one & heads, ~one | heads, columns_of((i, j)))

    def _coin(self, i: Tensor, j: Tensor) -> Tensor:
        mixed = _mix(_mix(i + (self.seed << 32)) ^ j)
        return (mixed & (_RESOLUTION - 1)) < round(self.keep * _RESOLUTION)


def _mix(x: Tensor) -> Tensor:
    """The step of SplitMix64 (Steele et al., 2014), in wrapping int64 arithmetic."""
    x = x - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@pattern
class random_blocks_per_row(Pattern):
    """allowed(q, kv) = kv // block is among `count` distinct blocks drawn for row q // block.

    Source: Zaheer et al., Big Bird (2020), section 2 (random attention), for one length.
    Density: count / number of blocks. Reach: computed.

    >>> random_blocks_per_row(1024, 2, block=128).density(1024)
    0.25
    """

    length: int
    count: int
    block: int = 128
    seed: int = 0
    relative = False

    def __post_init__(self) -> None:
        integers(self, length=1, count=0, block=1, seed=0)
        if self.count > self._blocks:
            raise ValueError(
                f"random_blocks_per_row: count {self.count} exceeds the {self._blocks} blocks"
            )

    @property
    def _blocks(self) -> int:
        return -(-self.length // self.block)

    @derived
    def _choices(self) -> list[IndexTable]:
        """`count` tables over block rows: the t-th choice of each row (Floyd's sampling, 1987)."""
        generator = np.random.default_rng(self.seed)
        chosen = np.full((self._blocks, self.count), -1)
        for t, top in enumerate(range(self._blocks - self.count, self._blocks)):
            draw = generator.integers(0, top + 1, self._blocks)
            taken = (chosen == draw[:, None]).any(1)
            chosen[:, t] = np.where(taken, top, draw)
        return [IndexTable(torch.from_numpy(column.copy())) for column in chosen.T]

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The block of the key was drawn."""
        i, j = q // self.block, kv // self.block
        rule = never(q)
        for choice in self._choices:
            rule = rule | (choice(i) == j)
        return rule

    def extents(self) -> Extents:
        """`length` queries and keys."""
        return self.length, self.length
