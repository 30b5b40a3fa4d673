"""What a kernel is compiled for, which configs are shipped, and what their work costs on Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from sparse_flash.kernels.schedule import CostModel


@dataclass(frozen=True)
class ForwardConfig:
    """One compiled forward kernel.

    tile_m x tile_n is what a CTA computes at a time; head_dim is the largest it takes (smaller
    ones are padded with zeros by the loads); o_columns are the columns of the output that leave
    through shared memory at a time.
    """

    dtype: str  # "bfloat16" or "float16"
    head_dim: int
    tile_m: int
    tile_n: int = 128
    q_stages: int = 2
    kv_stages: int = 2
    o_columns: int = 0  # 0: all
    hold_q: bool = False  # in registers, as long as an item lasts, where there is room
    offsets: bool = False  # queries at positions: see position_items.py
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if not self.o_columns:
            object.__setattr__(self, "o_columns", self.head_dim)
        assert self.tile_m in (128, 192)  # warpgroups that take turns: two or three
        assert self.tile_n % 16 == 0
        assert self.tile_n <= 128  # a row's bits fill one word a thread

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128.

        Measured on an H200 at head_dim 64: 571 TFLOP/s with tile_m 192, 461 with 128.
        """
        return (1.2 if self.tile_m == 192 else 1.0) * self.tile_n / 128

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Output and logsumexp of one part of a split row."""
        return (self.tile_m, self.head_dim), (self.tile_m,)

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups; each owns 64 query rows."""
        return self.tile_m // 64

    @property
    def exponentials_first(self) -> bool:
        """Whether to keep the wait for O += P V behind the exponentials, which it could overlap.

        ptxas moves it ahead of them. On an H200 three warpgroups then lose 2 to 10 %, while two
        gain up to 2 %.
        """
        return self.warpgroups == 3

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread may use: with the producer's they fill the register file."""
        return {2: 232, 3: 160}[self.warpgroups]

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread may use."""
        return {2: 40, 3: 32}[self.warpgroups]

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and less than 1 KiB of barriers and work items."""
        rows = self.q_stages * self.tile_m + 2 * self.kv_stages * self.tile_n
        return 2 * (rows * self.head_dim + self.tile_m * self.o_columns) + 1024


@dataclass(frozen=True)
class BackwardConfig:
    """One compiled backward kernel: two warpgroups, which share tile_n keys and tile_m queries.

    With tile_n 128 each owns 64 keys, and of dQ a chunk at a time: with tile_m 64 or 80 half of the
    columns, with 128 half of the rows. With tile_n 64 (for large head_dims) both own all keys,
    each half of the columns of dK and dV, and both compute the scores.
    k_stages: K is needed to the end of an item, and the next one's can be loaded meanwhile if there
        are two. V is needed less long.
    buffers: How many tiles of dQ of each warpgroup may wait to be added; dV and dK leave by them
        too.
    held, held_v: How many columns of K and V stay in registers as long as an item lasts: as many
        as there is room for, since shared memory is what these kernels wait for.
    parts: Into how many parts of the queries P' and dS' are cut: with a part of them, the tensor
        cores begin with dV and dK while the threads compute the next. At small head_dims these
        products are too short to be cut.
    dq: Whether to compute dQ too, by adding up in memory.
    fixed: Whether to add in fixed point, so that the result is the same every time: what integers
        add up to does not depend on their order. See elementwise.Statistics.
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
    held: int = 0
    held_v: int = 0
    parts: int = 2
    fixed: bool = False
    offsets: bool = False  # queries at positions: see position_items.py
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if self.dq:
            assert self.tile_n == 128
            assert self.ds_stages == self.q_stages == 2  # see BackwardConsumer.share
            assert not (self.fixed and self.dq_transposed)  # a row's exponent goes with its thread
            tiles = ((64, 128), (80, 128), (64, 96), (128, 64), (128, 32))
            assert (self.tile_m, self.head_dim) in tiles

    @property
    def across(self) -> bool:
        """Whether an item's last dQ is computed in the next one's first step, whose S' is issued
        before the results are stored.
        """
        return self.dq and self.k_stages > 1

    @property
    def late(self) -> bool:
        """Whether to delay the shared-memory fence and the hand-off until other work can hide the
        store latency, and to load delta before the last part of P'. Up to 9 % faster with tiles of
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
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """DK and dV of one part of a split column."""
        return (self.tile_n, self.head_dim), (self.tile_n, self.head_dim)

    @property
    def dq_by_columns(self) -> bool:
        """Whether the warpgroups share the columns of dQ instead of its rows."""
        return self.tile_m < 128

    @property
    def dq_transposed(self) -> bool:
        """Whether the accumulators of dQ are those of its transpose, whose rows come by 64.

        At head_dim 96 a quarter of these is not dQ's; but 48 columns would not fit the swizzle.
        """
        return self.tile_m == 80 or self.head_dim == 96

    @property
    def dq_columns(self) -> int:
        """Columns of dQ that a warpgroup computes at a time."""
        return min(64, self.head_dim)

    @property
    def dq_tile(self) -> tuple[int, int]:
        """What a warpgroup computes of dQ, or of its transpose, at a time."""
        return 64, self.tile_m if self.dq_transposed else self.dq_columns

    @property
    def dq_chunk(self) -> int:
        """Elements of dQ that a warpgroup computes at a time."""
        return self.dq_tile[0] * self.dq_tile[1]

    @property
    def results(self) -> int:
        """Of how many results, dV and dK, a warpgroup's part fits into one of its buffers."""
        return 2 * self.dq_chunk // (64 * self.head_dim)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, statistics, and less than 1 KiB of barriers and items."""
        rows = 2 * self.q_stages * self.tile_m + (self.k_stages + self.v_stages) * self.tile_n
        scores = self.ds_stages * self.tile_m * self.tile_n if self.dq else 0
        results = 4 * self.buffers * self.dq_chunk if self.dq else 0
        statistics = 8 * self.tile_m * self.q_stages
        return 2 * (rows * self.head_dim + scores + results) + statistics + 1024


@dataclass(frozen=True)
class QueriesConfig:
    """One compiled kernel for dQ by queries: two warpgroups, each with 64 rows."""

    dtype: str
    head_dim: int
    tile_n: int
    o_columns: int
    tile_m: int = 128
    q_stages: int = 1
    kv_stages: int = 2
    offsets: bool = False  # queries at positions: see position_items.py
    arch: str = "sm_90a"
    warpgroups: int = 2
    consumer_registers: int = 240
    producer_registers: int = 24

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128."""
        return self.tile_n / 128

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """DQ of one part of a split row."""
        return ((self.tile_m, self.head_dim),)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and less than 1 KiB of barriers and work items."""
        rows = 2 * self.q_stages * self.tile_m + 2 * self.kv_stages * self.tile_n
        return 2 * (rows * self.head_dim + self.tile_m * self.o_columns) + 1024


Config = ForwardConfig | BackwardConfig | QueriesConfig


# From speeds on an H200. Two random densities give `item` (1.0 at head_dim 64, 1.9 at 128), masks
# with and without partial tiles `partial_tile` (1.2 and 1.05): one value stands between both.
# `part` and `combine` are estimates that balance what tests/kernels/test_schedule.py simulates.
FORWARD_COSTS = CostModel(
    partial_tile=1.1,
    item=1.5,
    largest_share=0.5,
    long_item=2.5,
    fewest_tiles=8,
    part=1.0,
    combine=2.0,
    l2_share=0.4,
)
BACKWARD_COSTS = replace(FORWARD_COSTS, partial_tile=1.05)  # more products for each tile to mask

DTYPES = ("bfloat16", "float16")
_ANY = "bfloat16"  # stands for either
_FORWARD = {
    32: (
        ForwardConfig(_ANY, 32, tile_m=128),  # short rows: Q is not held for long
        ForwardConfig(_ANY, 32, tile_m=192, hold_q=True),
    ),
    64: (ForwardConfig(_ANY, 64, tile_m=128), ForwardConfig(_ANY, 64, tile_m=192)),
    96: (ForwardConfig(_ANY, 96, tile_m=128), ForwardConfig(_ANY, 96, tile_m=192, tile_n=96)),
    128: (ForwardConfig(_ANY, 128, tile_m=128, hold_q=True),),
    192: (ForwardConfig(_ANY, 192, 128, tile_n=64, q_stages=1, kv_stages=3, o_columns=64),),
    256: (ForwardConfig(_ANY, 256, 128, tile_n=64, q_stages=1, kv_stages=2, o_columns=64),),
}

_DQ = {
    32: BackwardConfig(_ANY, 32, 128, True, k_stages=2, v_stages=2, buffers=2, held=32, parts=1),
    64: BackwardConfig(_ANY, 64, 128, True, k_stages=2, v_stages=2, held=64),
    96: BackwardConfig(_ANY, 96, 64, True, k_stages=2, v_stages=2, held=96, held_v=96),
    128: BackwardConfig(_ANY, 128, 64, True, k_stages=2, held=64, held_v=16),
}
# The repeatable ones, whose exponents take the registers that V would be held in.
_DETERMINISTIC = {
    size: replace(config, fixed=True, held_v=0)
    for size, config in _DQ.items()
    if not config.dq_transposed
}
# In place of the first, where blocks of such a width do not cover much more than is needed.
_TILE80 = {128: BackwardConfig(_ANY, 128, tile_m=80, dq=True, parts=5)}
_DKDV = {
    32: BackwardConfig(_ANY, 32, tile_m=128, dq=False, held=32, parts=1),
    64: BackwardConfig(_ANY, 64, tile_m=128, dq=False, held=48),
    128: BackwardConfig(_ANY, 128, tile_m=64, dq=False, held=64),
    256: BackwardConfig(_ANY, 256, tile_m=64, tile_n=64, dq=False),
}


def forward_configs(dtype: str, head_dim: int) -> tuple[ForwardConfig, ...]:
    """The configs that compute this head_dim, the default first; none above 256.

    Taller tiles keep more warps busy where head_dim is small, but only rows that agree over their
    height can use them: the plan decides by the layout.
    """
    for size, configs in _FORWARD.items():
        if head_dim <= size:
            return tuple(replace(config, dtype=dtype) for config in configs)
    return ()


def all_forward_configs() -> list[ForwardConfig]:
    """All forward configs that are shipped."""
    return [c for dtype in DTYPES for size in _FORWARD for c in forward_configs(dtype, size)]


class BackwardVariant(Enum):
    """The backward kernels: what they compute, and how.

    DQ: dQ, dK and dV in one kernel; dQ is added up in memory, in float32, in any order.
    TILE80: As DQ, with tiles of 80 queries, for layouts that these cover well.
    DETERMINISTIC: As DQ, in fixed point: bitwise repeatable.
    DKDV: dK and dV only, bitwise repeatable; dQ comes from a kernel of its own. Seven products
        instead of five, but nothing is added up in memory, which has no space above head_dim 128.
    """

    DQ = "dq"
    TILE80 = "tile80"
    DETERMINISTIC = "deterministic"
    DKDV = "dkdv"


_VARIANTS = {
    BackwardVariant.DQ: _DQ,
    BackwardVariant.TILE80: _TILE80,
    BackwardVariant.DETERMINISTIC: _DETERMINISTIC,
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
        variants = [BackwardVariant.DKDV]
    elif deterministic:
        variants = [BackwardVariant.DETERMINISTIC]
    elif head_dim > 96:
        variants = [BackwardVariant.DQ, BackwardVariant.TILE80]
    else:
        variants = [BackwardVariant.DQ]
    return tuple(variant_config(variant, dtype, head_dim) for variant in variants)


def all_backward_configs() -> list[BackwardConfig]:
    """All backward configs that are shipped."""
    configs = [config for sizes in _VARIANTS.values() for config in sizes.values()]
    return [replace(config, dtype=dtype) for dtype in DTYPES for config in configs]


_QUERIES = {
    32: QueriesConfig(_ANY, 32, tile_n=128, o_columns=32),
    64: QueriesConfig(_ANY, 64, tile_n=128, o_columns=64),
    128: QueriesConfig(_ANY, 128, tile_n=64, o_columns=128),
    256: QueriesConfig(_ANY, 256, tile_n=32, o_columns=64),
}


def queries_config(dtype: str, head_dim: int) -> QueriesConfig:
    """The config that computes this head_dim, which must not exceed 256."""
    size = min(size for size in _QUERIES if head_dim <= size)
    return replace(_QUERIES[size], dtype=dtype)


def all_queries_configs() -> list[QueriesConfig]:
    """All configs of the dQ kernel that are shipped."""
    return [replace(config, dtype=dtype) for dtype in DTYPES for config in _QUERIES.values()]


def all_configs() -> list[Config]:
    """Everything that is shipped."""
    return [*all_forward_configs(), *all_backward_configs(), *all_queries_configs()]
