"""Configs of the kernel of the gradients of biases."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

from sparse_flash.kernels.distance_table import scratch_size
from sparse_flash.kernels.score_arguments import ScoreFlags
from sparse_flash.kernels.sm80.backward_config import DTYPES, BackwardConfig
from sparse_flash.kernels.sm80.config import LIMIT_OF


@dataclass(frozen=True)
class BiasGradientsConfig(BackwardConfig):
    """One compiled kernel of the gradients of biases: a backward kernel that computes dS' alone.

    distance_grads, image_grads: Biases whose gradients it computes.
    fixed_sums: Sum up in fixed point, so that the result does not depend on the order.
    """

    distance_grads: bool = False
    image_grads: bool = False
    fixed_sums: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert not self.exchange
        assert self.distance_bias >= self.distance_grads
        assert self.image_bias >= self.image_grads
        assert not self.fixed_point  # of dQ

    @property
    def scratch(self) -> int:
        """Numbers in shared memory for the diagonals of a warp's dS'."""
        return scratch_size(self.tile_m // self.chunks) if self.distance_grads else 0

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: parts of a column add to the same sums."""
        return ()

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, statistics, scratch, items and their tiles, aligned."""
        rows = (self.q_stages + self.do_stages) * self.tile_m
        rows += (1 if self.v_in_registers else 2) * self.tile_n
        numbers = 2 * self.tile_m * self.stats_stages + self.warps * self.scratch
        size = 2 * rows * self.head_dim + 4 * numbers + 192
        return -(-size // 1024) * 1024


_ANY = "bfloat16"  # stands for either
# Each fits all GPUs.
_CONFIGS = {
    32: BiasGradientsConfig(_ANY, 32, 64, 64, 4, 1, 2, ctas_per_sm=2),
    64: BiasGradientsConfig(_ANY, 64, 64, 64, 4, 1, 2, q_stages=1, do_stages=1, ctas_per_sm=2),
    96: BiasGradientsConfig(_ANY, 96, 64, 64, 4, 1, 2),
    128: BiasGradientsConfig(_ANY, 128, 64, 64, 4, 1, 2, do_stages=1),
    192: BiasGradientsConfig(_ANY, 192, 32, 64, 4, 1, 2, do_stages=1),
    256: BiasGradientsConfig(_ANY, 256, 32, 64, 4, 1, 2, do_stages=1, v_in_registers=True),
}
# Sets of features: a kernel has the gradients of at least one bias, and no ALiBi of its own.
FLAGS = tuple(
    ScoreFlags(
        softcap=softcap,
        dropout=dropout,
        distance_bias=distance > 0,
        distance_grads=distance > 1,
        image_bias=image > 0,
        image_grads=image > 1,
    )
    for distance, image in itertools.product(range(3), repeat=2)
    for softcap, dropout in itertools.product((False, True), repeat=2)
    if max(distance, image) > 1
)


@functools.cache
def bias_gradients_config(
    dtype: str,
    head_dim: int,
    target: str,
    deterministic: bool,
    flags: ScoreFlags,
    offsets: bool = False,
) -> BiasGradientsConfig:
    """The config for this head_dim, at most 256, and these features.

    offsets: Queries at positions.
    """
    size = min(size for size in _CONFIGS if head_dim <= size)
    names = ("softcap", "dropout", "distance_bias", "distance_grads", "image_bias", "image_grads")
    used: dict[str, Any] = {name: getattr(flags, name) for name in names}
    used |= {"arch": target, "fixed_sums": deterministic, "offsets": offsets}
    terms = (flags.softcap, flags.dropout, flags.distance_bias, flags.image_bias)
    if target == "sm_120" and size == 256 and offsets and all(terms):
        used["recompute"] = True  # ptxas spills otherwise
    return replace(_CONFIGS[size], dtype=dtype, **used)


def all_bias_gradients_configs(target: str) -> list[BiasGradientsConfig]:
    """All configs that GPUs of a compiler target take."""
    assert target in LIMIT_OF
    cases = itertools.product(DTYPES, _CONFIGS, (False, True), FLAGS, (False, True))
    return [
        bias_gradients_config(dtype, size, target, deterministic, flags, offsets)
        for dtype, size, deterministic, flags, offsets in cases
    ]
