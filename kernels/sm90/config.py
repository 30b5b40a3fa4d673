"""Kernel configs, the shipped ones, and the costs of their work on Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from sparse_flash.kernels.schedule import CostModel
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.forward_config import ForwardConfig


@dataclass(frozen=True)
class DqConfig:
    """One compiled kernel for dQ by query blocks: two warpgroups of 64 rows each."""

    dtype: str
    head_dim: int
    tile_n: int
    o_columns: int
    tile_m: int = 128
    q_stages: int = 1
    kv_stages: int = 2
    offsets: bool = False  # queries at positions, see position_work_tiles.py
    arch: str = "sm_90a"
    warpgroups: int = 2
    consumer_registers: int = 240
    producer_registers: int = 24
    # See ForwardConfig.
    clear_tile_info = False
    steps_per_tile = 1

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

    @property
    def kv_block(self) -> int:
        """Keys of a tile of the schedule."""
        return self.tile_n

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128."""
        return self.tile_n / 128

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """DQ of one split of a row."""
        return ((self.tile_m, self.head_dim),)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and less than 1 KiB of barriers and work items."""
        rows = 2 * self.q_stages * self.tile_m + 2 * self.kv_stages * self.tile_n
        return 2 * (rows * self.head_dim + self.tile_m * self.o_columns) + 1024


Config = ForwardConfig | BackwardConfig | DqConfig

# From speeds on an H200. Two random densities give `item` (1.0 at head_dim 64, 1.9 at 128), masks
# with and without partial tiles `partial_tile` (1.2 and 1.05): one value stands between both.
# `part` and `combine` are estimates that balance what tests/kernels/test_schedule.py simulates.
FORWARD_COSTS = CostModel(
    partial_tile=1.1,
    item=1.5,
    largest_share=0.5,
    long_item=2.5,
    fewest_tiles=8,
    split=1.0,
    combine=2.0,
    l2_share=0.4,
    last_l2_share=0.75,
)
BACKWARD_COSTS = replace(FORWARD_COSTS, partial_tile=1.05)  # more GEMMs per masked tile

DTYPES = ("bfloat16", "float16")
_ANY = "bfloat16"  # stands for either


def _two_slots(head_dim: int, **options: Any) -> ForwardConfig:
    """A config with four warpgroups of fewer registers: half of the keys of a tile at a time."""
    return ForwardConfig(_ANY, head_dim, 128, 64, kv_stages=3, steps_per_tile=2, slots=2, **options)


_FORWARD = {
    32: (
        ForwardConfig(_ANY, 32, tile_m=128),  # short rows: Q would not stay in registers for long
        _two_slots(32, q_in_registers=True),
        ForwardConfig(_ANY, 32, tile_m=192, q_in_registers=True, exp_before_pv_wait=True),
    ),
    64: (
        ForwardConfig(_ANY, 64, tile_m=128, kv_stages=3),
        _two_slots(64),
        ForwardConfig(_ANY, 64, tile_m=192),
    ),
    96: (
        ForwardConfig(_ANY, 96, tile_m=128),
        ForwardConfig(_ANY, 96, 192, tile_n=96, exp_before_pv_wait=True),
        ForwardConfig(
            *(_ANY, 96, 192, 112), clear_tile_info=True, turns=False, exp_before_pv_wait=True
        ),
    ),
    128: (
        ForwardConfig(_ANY, 128, tile_m=128, q_in_registers=True),
        ForwardConfig(_ANY, 128, 192, tile_n=80),
    ),
    192: (
        ForwardConfig(_ANY, 192, 128, 64, q_stages=1, kv_stages=3, o_columns=64, turns=False),
        ForwardConfig(_ANY, 192, 128, 112, q_stages=1, o_columns=32),
    ),
    256: (
        ForwardConfig(_ANY, 256, 128, tile_n=64, q_stages=1, kv_stages=2, o_columns=64),
        ForwardConfig(_ANY, 256, 128, tile_n=80, q_stages=1, direct_store=True),
    ),
}


def _small_forward(head_dim: int, kv_stages: int, **options: Any) -> ForwardConfig:
    """A config for layouts of small blocks, of which taller tiles compute more than is stored.

    A step takes 64 keys, or several blocks. Q in registers frees its stage early.
    """
    given: dict[str, Any] = {"q_in_registers": True, "resident_ctas": 2} | options
    return ForwardConfig(_ANY, head_dim, 64, given.pop("tile_n", 64), 1, kv_stages, **given)


# Blocks of 64 keys, and blocks of 32. At head_dim 128 three stages of K and V leave no shared
# memory for the output.
_SMALL_FORWARD = {
    32: (_small_forward(32, 6, resident_ctas=3), _small_forward(32, 6, tiles_per_step=2)),
    64: (
        _small_forward(64, 3, resident_ctas=3),
        _small_forward(64, 3, tile_n=128, tiles_per_step=4, direct_store=True),
    ),
    96: (_small_forward(96, 3), _small_forward(96, 3, tiles_per_step=2)),
    128: (
        _small_forward(128, 3, direct_store=True, q_in_registers=False),
        _small_forward(128, 3, direct_store=True, tiles_per_step=2),
    ),
}

_DQ = {
    32: BackwardConfig(
        _ANY, 32, 128, True, k_stages=2, v_stages=2, buffers=2, k_in_registers=32, p_slices=1
    ),
    64: BackwardConfig(_ANY, 64, 128, True, k_stages=2, v_stages=2, k_in_registers=64),
    96: BackwardConfig(
        _ANY, 96, 64, True, k_stages=2, v_stages=2, k_in_registers=96, v_in_registers=96
    ),
    128: BackwardConfig(_ANY, 128, 64, True, k_stages=2, k_in_registers=64, v_in_registers=16),
}
# Fixed point: the exponents take the registers of V.
_DETERMINISTIC = {
    size: replace(config, fixed_point=True, v_in_registers=0)
    for size, config in _DQ.items()
    if not config.dq_transposed
}
# Instead of _DQ[128], for layouts that blocks of this width cover well.
_TILE80 = {128: BackwardConfig(_ANY, 128, tile_m=80, dq=True, p_slices=5)}


def _small_dq(
    head_dim: int,
    kv_stages: tuple[int, int],
    held: int,
    p_slices: int,
    staging: tuple[int, int],
    **options: Any,
) -> BackwardConfig:
    """A config for layouts of small blocks: tiles of 64 keys and 64 queries.

    held: Columns of K and V in registers.
    staging: Buffers of dQ of each warp, and columns in each.
    """
    (k_stages, v_stages), (buffers, staged_columns) = kv_stages, staging
    return BackwardConfig(
        *(_ANY, head_dim, 64, True, 64),
        k_stages=k_stages,
        v_stages=v_stages,
        ds_stages=1,
        k_in_registers=held,
        v_in_registers=held,
        p_slices=p_slices,
        small=True,
        buffers=buffers,
        staged_columns=staged_columns,
        resident_ctas=2,
        **options,
    )


# At head_dim 128 only 6 KiB are left for buffers of dQ.
_SMALL_DQ = {
    32: _small_dq(32, (2, 2), 32, 1, (2, 16)),
    64: _small_dq(64, (2, 2), 64, 1, (2, 32)),
    96: _small_dq(96, (2, 1), 0, 2, (3, 24)),
    128: _small_dq(128, (1, 1), 0, 1, (1, 64), stage_in_do=True),
}
_GATHERED_DQ = {
    size: replace(config, tiles_per_step=2, p_slices=2 if size == 128 else config.p_slices)
    for size, config in _SMALL_DQ.items()
}
# All gradients in one pass above head_dim 128. Tiles of 64 keys suit blocks that tiles of 96 do not
# divide, and all layouts of data: the device lists no tiles of 96.
_TILE96 = {192: BackwardConfig(_ANY, 192, tile_m=64, dq=True, tile_n=96, ds_stages=1)}
_WIDE = {
    192: BackwardConfig(_ANY, 192, tile_m=64, dq=True, tile_n=64, k_stages=2, v_stages=2),
    256: BackwardConfig(_ANY, 256, tile_m=64, dq=True, tile_n=64),
}
_DKDV = {
    32: BackwardConfig(_ANY, 32, tile_m=128, dq=False, k_in_registers=32, p_slices=1),
    64: BackwardConfig(_ANY, 64, tile_m=128, dq=False, k_in_registers=48),
    128: BackwardConfig(_ANY, 128, tile_m=64, dq=False, k_in_registers=64),
    256: BackwardConfig(_ANY, 256, tile_m=64, tile_n=64, dq=False),
}


def forward_configs(dtype: str, head_dim: int) -> tuple[ForwardConfig, ...]:
    """The configs that compute this head_dim, the default first; none above 256.

    Taller tiles keep more warps busy at small head_dims, but only suit layouts whose neighboring
    rows agree. Those of 64 rows suit small blocks and bands, two slots short rows.
    The plan decides by the layout.
    """
    for size, configs in _FORWARD.items():
        if head_dim <= size:
            candidates = (*configs, *_SMALL_FORWARD.get(size, ()))
            return tuple(replace(config, dtype=dtype) for config in candidates)
    return ()


def all_forward_configs() -> list[ForwardConfig]:
    """All shipped forward configs."""
    return [c for dtype in DTYPES for size in _FORWARD for c in forward_configs(dtype, size)]


class BackwardVariant(Enum):
    """The backward kernels.

    DQ: dQ, dK and dV in one kernel; dQ is accumulated in memory, in float32, in any order.
    TILE80: As DQ, with tiles of 80 queries, for layouts that they cover well.
    SMALL: As DQ, with tiles of 64 keys and 64 queries, for layouts of small blocks.
    GATHERED: As SMALL, with tiles of 32 queries.
    DETERMINISTIC: As DQ, in fixed point: bitwise repeatable.
    TILE96: As DQ, for head_dims above 128 up to 192, with tiles of 96 keys and 64 queries: three
        warpgroups share each GEMM.
    WIDE: As DQ, for head_dims above 128: three warpgroups compute one gradient each.
    DKDV: dK and dV only, bitwise repeatable; dQ comes from a kernel of its own. Seven GEMMs
        instead of five, without accumulation in memory.
    """

    DQ = "dq"
    TILE80 = "tile80"
    SMALL = "small"
    GATHERED = "gathered"
    DETERMINISTIC = "deterministic"
    TILE96 = "tile96"
    WIDE = "wide"
    DKDV = "dkdv"


_VARIANTS = {
    BackwardVariant.DQ: _DQ,
    BackwardVariant.TILE80: _TILE80,
    BackwardVariant.SMALL: _SMALL_DQ,
    BackwardVariant.GATHERED: _GATHERED_DQ,
    BackwardVariant.DETERMINISTIC: _DETERMINISTIC,
    BackwardVariant.TILE96: _TILE96,
    BackwardVariant.WIDE: _WIDE,
    BackwardVariant.DKDV: _DKDV,
}


def variant_config(variant: BackwardVariant, dtype: str, head_dim: int) -> BackwardConfig:
    """The config of a variant for this head_dim, which must not exceed the variant's largest."""
    configs = _VARIANTS[variant]
    return replace(configs[min(size for size in configs if head_dim <= size)], dtype=dtype)


def backward_configs(
    dtype: str, head_dim: int, deterministic: bool = False
) -> tuple[BackwardConfig, ...]:
    """The candidates for this head_dim, the default first. `dq` tells whether they compute dQ."""
    if head_dim > 128 and deterministic:
        variants = [BackwardVariant.DKDV]
    elif head_dim > 128:
        variants = [BackwardVariant.WIDE]
        if head_dim <= 192:
            variants.insert(0, BackwardVariant.TILE96)
    elif deterministic:
        variants = [BackwardVariant.DETERMINISTIC]
    else:
        variants = [BackwardVariant.DQ, BackwardVariant.SMALL, BackwardVariant.GATHERED]
        if head_dim > 96:
            variants.insert(1, BackwardVariant.TILE80)
    return tuple(variant_config(variant, dtype, head_dim) for variant in variants)


def all_backward_configs() -> list[BackwardConfig]:
    """All shipped backward configs."""
    configs = [config for sizes in _VARIANTS.values() for config in sizes.values()]
    return [replace(config, dtype=dtype) for dtype in DTYPES for config in configs]


_DQ_ONLY = {
    32: DqConfig(_ANY, 32, tile_n=128, o_columns=32),
    64: DqConfig(_ANY, 64, tile_n=128, o_columns=64),
    128: DqConfig(_ANY, 128, tile_n=64, o_columns=128),
    256: DqConfig(_ANY, 256, tile_n=32, o_columns=64),
}


def dq_config(dtype: str, head_dim: int) -> DqConfig:
    """The config that computes this head_dim, which must not exceed 256."""
    size = min(size for size in _DQ_ONLY if head_dim <= size)
    return replace(_DQ_ONLY[size], dtype=dtype)


def all_dq_configs() -> list[DqConfig]:
    """All shipped configs of the dQ kernel."""
    return [replace(config, dtype=dtype) for dtype in DTYPES for config in _DQ_ONLY.values()]


def all_configs() -> list[Config]:
    """All shipped configs."""
    return [*all_forward_configs(), *all_backward_configs(), *all_dq_configs()]
