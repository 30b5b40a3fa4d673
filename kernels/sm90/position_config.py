"""Configs of the kernels for queries at positions, and of the one for a single query (decoding)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import (
    DTYPES,
    DqConfig,
    backward_configs,
    dq_config,
    forward_configs,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig


@dataclass(frozen=True)
class DecodeConfig:
    """One compiled decoding kernel (one query per sequence): a warpgroup whose rows are heads.

    A step is tile_n keys, a fraction of a layout tile. Several CTAs share a multiprocessor, so one
    computes while another waits. Together they fill its shared memory with tiles in flight.
    """

    dtype: str
    head_dim: int
    kv_stages: int
    ctas_per_sm: int
    tile_n: int = 64
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        assert self.tile[1] % self.tile_n == 0
        # A multiprocessor has 228 KiB; each CTA reserves 1 KiB more.
        assert self.ctas_per_sm * (self.shared_memory + 1024) <= 228 * 1024

    @property
    def tile(self) -> tuple[int, int]:
        """The tile of the layout."""
        return 128, 128

    @property
    def tile_cost(self) -> float:
        """Time of a full tile; there is one config for each head_dim."""
        return 1.0

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: the splits of all rows are separate arrays (see positions.py)."""
        return ()

    @property
    def steps(self) -> int:
        """Steps of a tile of the layout."""
        return self.tile[1] // self.tile_n

    @property
    def bytes_in_flight(self) -> int:
        """K and V that a CTA has under way."""
        return 2 * 2 * self.kv_stages * self.tile_n * self.head_dim

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and less than 1 KiB of barriers and steps."""
        return 2 * self.head_dim * (64 + 2 * self.kv_stages * self.tile_n) + 1024


PositionConfig = ForwardConfig | BackwardConfig | DqConfig | DecodeConfig
_ANY = "bfloat16"  # stands for either
_DECODE = {
    32: DecodeConfig(_ANY, 32, kv_stages=8, ctas_per_sm=3),
    64: DecodeConfig(_ANY, 64, kv_stages=2, ctas_per_sm=3),
    96: DecodeConfig(_ANY, 96, kv_stages=4, ctas_per_sm=2),
    128: DecodeConfig(_ANY, 128, kv_stages=3, ctas_per_sm=2),
    192: DecodeConfig(_ANY, 192, kv_stages=4, ctas_per_sm=1),
    256: DecodeConfig(_ANY, 256, kv_stages=3, ctas_per_sm=1),
}


def decode_config(dtype: str, head_dim: int) -> DecodeConfig:
    """The config that computes this head_dim, which must not exceed 256."""
    return replace(_DECODE[min(size for size in _DECODE if head_dim <= size)], dtype=dtype)


def forward_at_config(dtype: str, head_dim: int) -> ForwardConfig:
    """The config with offsets that computes this head_dim, with the default one's tiles."""
    return replace(forward_configs(dtype, head_dim)[0], offsets=True)


def backward_at_config(dtype: str, head_dim: int, deterministic: bool = False) -> BackwardConfig:
    """The config with offsets that computes this head_dim, with the default one's tiles.

    Above head_dim 128 it is the deterministic one, without dQ.
    """
    deterministic = deterministic or head_dim > 128
    return replace(backward_configs(dtype, head_dim, deterministic)[0], offsets=True)


def dq_at_config(dtype: str, head_dim: int) -> DqConfig:
    """The config with offsets that computes this head_dim."""
    return replace(dq_config(dtype, head_dim), offsets=True)


def all_position_configs() -> list[PositionConfig]:
    """All shipped configs for positions."""
    configs: dict[PositionConfig, None] = {}
    for dtype in DTYPES:
        for head_dim in _DECODE:
            configs[decode_config(dtype, head_dim)] = None
            configs[forward_at_config(dtype, head_dim)] = None
            for deterministic in (False, True):
                backward = backward_at_config(dtype, head_dim, deterministic)
                configs[backward] = None
                if not backward.dq:
                    configs[dq_at_config(dtype, head_dim)] = None
    return list(configs)
