"""Kernel configs, the shipped ones, and the costs of their work on Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from sparse_flash.kernels.distance_table import scratch_size, window_bytes
from sparse_flash.kernels.schedule import CostModel
from sparse_flash.kernels.sm90.forward_config import ForwardConfig


@dataclass(frozen=True)
class BackwardConfig:
    """One compiled backward kernel: two warpgroups, which share tile_n keys and tile_m queries.

    With tile_n 128 each owns 64 keys, and one chunk of dQ at a time: half of the columns with
    tile_m 64 or 80, half of the rows with 128. With tile_n 64 (large head_dims) both own all keys
    and half of the columns of dK and dV, and both compute the scores. With `dq` and tile_n 64 three
    warpgroups compute one gradient each: see backward_wide.py.

    Args:
        dq: Compute dQ too, accumulated in global memory.
        k_stages: Pipeline stages of K, which is used until the end of a work tile. With two, the
            next K is loaded meanwhile.
        v_stages: Pipeline stages of V, which is released earlier.
        buffers: Buffers per warpgroup for dQ chunks on their way to memory; dV and dK use them too.
        k_in_registers: Columns of K in registers for the whole work tile, as many as fit: these
            kernels are bound by shared-memory bandwidth.
        v_in_registers: Columns of V in registers for the whole work tile.
        p_slices: Slices of P' and dS'. The GEMMs of a slice run while the threads compute the next
            one. At small head_dims the GEMMs are too short to be sliced.
        sliced_statistics: Load lse and delta for one slice at a time: fewer registers, and a
            latency that is not hidden.
        fixed_point: Accumulate dQ in fixed point, so the sum does not depend on the order of the
            additions. See `preprocess.Preprocess`.
    """

    dtype: str
    head_dim: int
    tile_m: int
    dq: bool
    tile_n: int = 128
    q_stages: int = 2  # of Q and dO
    k_stages: int = 1
    v_stages: int = 1
    ds_stages: int = 2
    buffers: int = 1
    k_in_registers: int = 0
    v_in_registers: int = 0
    p_slices: int = 2
    sliced_statistics: bool = False
    early_weights: bool = False  # for fewer registers, see `BackwardScores.round_weights`
    fixed_point: bool = False
    offsets: bool = False  # queries at positions, see position_work_tiles.py
    softcap: bool = False  # see score_terms.py, as the next three
    dropout: bool = False
    distance_bias: bool = False
    distance_grads: bool = False
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if self.wide:
            assert (self.tile_m, self.q_stages, self.ds_stages) == (64, 2, 2)
            assert self.head_dim in _WIDE_REGISTERS
            assert not self.fixed_point
            assert not self.offsets
        elif self.dq:
            assert self.tile_n == 128
            assert self.ds_stages == self.q_stages == 2  # see BackwardConsumer.store_ds
            assert not (
                self.fixed_point and self.dq_transposed
            )  # a row's exponent goes with its thread
            tiles = ((64, 128), (80, 128), (64, 96), (128, 64), (128, 32))
            assert (self.tile_m, self.head_dim) in tiles

    @property
    def wide(self) -> bool:
        """Whether three warpgroups compute dV, dK and dQ: `backward_wide.BackwardWideSm90`."""
        return self.dq and self.tile_n == 64

    @property
    def wide_registers(self) -> tuple[int, ...]:
        """Registers per thread of the producer, and of the warpgroups of dV, dK and dQ."""
        return _WIDE_REGISTERS[self.head_dim]

    @property
    def wide_columns(self) -> int:
        """Columns of dV or dK that one GEMM computes; the register file limits them."""
        return 192 if self.head_dim == 192 else 128

    @property
    def wide_dq_columns(self) -> int:
        """As `wide_columns`, for dQ, whose warpgroup has the fewest registers."""
        return 192 if self.head_dim == 192 else 64

    @property
    def scored(self) -> bool:
        """Whether the kernel has score terms, see score_terms.py."""
        return self.softcap or self.placed

    @property
    def placed(self) -> bool:
        """Whether score terms depend on the positions of queries and keys."""
        return self.dropout or self.distance_bias

    @property
    def tile_words(self) -> int:
        """Int32 words of a tile in shared memory: its bit tile, and its `Place` (see
        backward_scores.py).
        """
        return 5 if self.placed else 1

    @property
    def overlap_items(self) -> bool:
        """Whether the first step of a work tile computes the last dQ of the previous one, and its
        S' is issued before the previous results are stored.
        """
        return self.dq and self.k_stages > 1

    @property
    def defer_handoff(self) -> bool:
        """Whether to delay the shared-memory fence and the hand-off until other work can hide the
        store latency, and to load delta before the last slice of P'. Up to 9 % faster with tiles of
        64 queries, 3 to 8 % slower with tiles of 128.
        """
        return self.tile_m < 128

    @property
    def split_columns(self) -> bool:
        """Whether the warpgroups share the columns of dK and dV instead of their rows."""
        return self.tile_n == 64

    @property
    def columns(self) -> int:
        """Columns of dK and dV that a warpgroup owns."""
        return self.head_dim // 2 if self.split_columns else self.head_dim

    @property
    def tile(self) -> tuple[int, int]:
        """The tile of the transposed layout: (tile_n, tile_m)."""
        return self.tile_n, self.tile_m

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 queries; one of 80 takes 1.17 times that of
        one of 64 (measured on an H200 at head_dim 128).
        """
        return (1.17 * 64 if self.tile_m == 80 else self.tile_m) / 128

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """DK and dV of one split of a column."""
        return (self.tile_n, self.head_dim), (self.tile_n, self.head_dim)

    @property
    def dq_by_columns(self) -> bool:
        """Whether the warpgroups share the columns of dQ instead of its rows."""
        return self.tile_m < 128

    @property
    def dq_transposed(self) -> bool:
        """Whether the dQ GEMM computes the transpose, whose rows are a multiple of 64.

        At head_dim 96 a quarter of the rows is padding: 48 columns would not fit the swizzle.
        """
        return self.tile_m == 80 or self.head_dim == 96

    @property
    def dq_columns(self) -> int:
        """Columns of a chunk of dQ's sums."""
        return self.head_dim // 2 if self.wide else min(64, self.head_dim)

    @property
    def dq_tile(self) -> tuple[int, int]:
        """Tile of dQ, or of its transpose, that a warpgroup computes at a time."""
        return 64, self.tile_m if self.dq_transposed else self.dq_columns

    @property
    def dq_chunk(self) -> int:
        """Elements of dQ that a warpgroup computes at a time."""
        return self.dq_tile[0] * self.dq_tile[1]

    @property
    def results(self) -> int:
        """Number of results (dV, dK) of a warpgroup that fit into one buffer."""
        return 2 * self.dq_chunk // (64 * self.head_dim)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, statistics, and less than 1 KiB of barriers and items."""
        rows = 2 * self.q_stages * self.tile_m + (self.k_stages + self.v_stages) * self.tile_n
        scores = self.ds_stages * self.tile_m * self.tile_n if self.dq else 0
        results = 4 * self.buffers * self.dq_chunk if self.dq else 0
        if self.wide:
            scores, results = 2 * scores, 0  # P and dS; dQ is added from registers
        statistics = 8 * self.tile_m * self.q_stages
        windows = self.q_stages * window_bytes(self.tile) if self.distance_bias else 0
        others = statistics + windows + 4 * self.scratch + 1024
        return 2 * (rows * self.head_dim + scores + results) + others

    @property
    def scratch(self) -> int:
        """Numbers in shared memory for the gradients of a bias by distance, of eight warps."""
        return 8 * scratch_size(self.tile_m // self.p_slices) if self.distance_grads else 0


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
    clear_tile_info = False  # see ForwardConfig

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

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

# By head_dim: see BackwardConfig.wide_registers. Together 512, the register file for 512 threads.
_WIDE_REGISTERS = {192: (24, 184, 176, 128), 256: (24, 208, 208, 72)}

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
)
BACKWARD_COSTS = replace(FORWARD_COSTS, partial_tile=1.05)  # more GEMMs per masked tile

DTYPES = ("bfloat16", "float16")
_ANY = "bfloat16"  # stands for either
_FORWARD = {
    32: (
        ForwardConfig(_ANY, 32, tile_m=128),  # short rows: Q would not stay in registers for long
        ForwardConfig(_ANY, 32, tile_m=192, q_in_registers=True),
    ),
    64: (ForwardConfig(_ANY, 64, tile_m=128), ForwardConfig(_ANY, 64, tile_m=192)),
    96: (ForwardConfig(_ANY, 96, tile_m=128), ForwardConfig(_ANY, 96, tile_m=192, tile_n=96)),
    128: (ForwardConfig(_ANY, 128, tile_m=128, q_in_registers=True),),
    192: (ForwardConfig(_ANY, 192, 128, tile_n=64, q_stages=1, kv_stages=3, o_columns=64),),
    256: (ForwardConfig(_ANY, 256, 128, tile_n=64, q_stages=1, kv_stages=2, o_columns=64),),
}


def _small(head_dim: int, kv_stages: int, resident_ctas: int, tiles_per_step: int) -> ForwardConfig:
    """A config for layouts of small blocks, of which taller tiles compute more than is stored.

    A step takes 64 keys, in one block or in several. Q in registers frees its stage early. At
    head_dim 128 three stages of K and V leave no shared memory for the output.
    """
    config = ForwardConfig(_ANY, head_dim, 64, 64, q_stages=1, q_in_registers=True)
    return replace(
        config,
        kv_stages=kv_stages,
        resident_ctas=resident_ctas,
        tiles_per_step=tiles_per_step,
        direct_store=head_dim == 128,
    )


_SMALL = {
    32: (_small(32, 6, 3, 1), _small(32, 6, 2, 2)),
    64: (_small(64, 3, 3, 1), _small(64, 5, 2, 2)),
    96: (_small(96, 3, 2, 1), _small(96, 3, 2, 2)),
    128: (_small(128, 3, 2, 1), _small(128, 3, 2, 2)),
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
# All gradients in one pass above head_dim 128.
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
    rows agree. Those of 64 rows suit layouts of small blocks. The plan decides by the layout.
    """
    for size, configs in _FORWARD.items():
        if head_dim <= size:
            candidates = (*configs, *_SMALL.get(size, ()))
            return tuple(replace(config, dtype=dtype) for config in candidates)
    return ()


def all_forward_configs() -> list[ForwardConfig]:
    """All shipped forward configs."""
    return [c for dtype in DTYPES for size in _FORWARD for c in forward_configs(dtype, size)]


class BackwardVariant(Enum):
    """The backward kernels.

    DQ: dQ, dK and dV in one kernel; dQ is accumulated in memory, in float32, in any order.
    TILE80: As DQ, with tiles of 80 queries, for layouts that they cover well.
    DETERMINISTIC: As DQ, in fixed point: bitwise repeatable.
    WIDE: As DQ, for head_dims above 128: three warpgroups compute one gradient each.
    DKDV: dK and dV only, bitwise repeatable; dQ comes from a kernel of its own. Seven GEMMs
        instead of five, without accumulation in memory.
    """

    DQ = "dq"
    TILE80 = "tile80"
    DETERMINISTIC = "deterministic"
    WIDE = "wide"
    DKDV = "dkdv"


_VARIANTS = {
    BackwardVariant.DQ: _DQ,
    BackwardVariant.TILE80: _TILE80,
    BackwardVariant.DETERMINISTIC: _DETERMINISTIC,
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
    if head_dim > 128:
        variants = [BackwardVariant.DKDV if deterministic else BackwardVariant.WIDE]
    elif deterministic:
        variants = [BackwardVariant.DETERMINISTIC]
    elif head_dim > 96:
        variants = [BackwardVariant.DQ, BackwardVariant.TILE80]
    else:
        variants = [BackwardVariant.DQ]
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
