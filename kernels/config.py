"""What a kernel is compiled for, and which of these there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

WORK_FIELDS = 8  # int32 words of a work item, padded to a sector of memory; see schedule.py


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
    arch: str = "sm_90a"

    def __post_init__(self) -> None:
        if not self.o_columns:
            object.__setattr__(self, "o_columns", self.head_dim)
        assert self.tile_m in (128, 192)  # warpgroups that take turns: two or three
        assert self.tile_n % 16 == 0
        assert self.tile_n <= 128  # a row's bits fill one word a thread
        assert self.shared_memory <= SHARED_MEMORY

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

    @property
    def warpgroups(self) -> int:
        """Consumer warpgroups; each owns 64 query rows."""
        return self.tile_m // 64

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


SHARED_MEMORY = 227 * 1024  # what a CTA may have on sm_90


def forward_configs(dtype: str, head_dim: int) -> tuple[ForwardConfig, ...]:
    """The configs that compute this head_dim, the default first; none above 256.

    Taller tiles keep more warps busy where head_dim is small, but only rows that agree over their
    height can use them: the schedule decides.
    """
    for size, configs in _FORWARD.items():
        if head_dim <= size:
            return tuple(replace(config, dtype=dtype) for config in configs)
    return ()


def all_forward_configs() -> list[ForwardConfig]:
    """Everything that is shipped."""
    return [c for dtype in DTYPES for size in _FORWARD for c in forward_configs(dtype, size)]


DTYPES = ("bfloat16", "float16")
_ANY = "bfloat16"  # stands for either
_FORWARD = {
    32: (ForwardConfig(_ANY, 32, tile_m=128), ForwardConfig(_ANY, 32, tile_m=192)),
    64: (ForwardConfig(_ANY, 64, tile_m=128), ForwardConfig(_ANY, 64, tile_m=192)),
    96: (ForwardConfig(_ANY, 96, tile_m=128),),
    128: (ForwardConfig(_ANY, 128, tile_m=128),),
    192: (ForwardConfig(_ANY, 192, 128, tile_n=64, q_stages=1, kv_stages=3, o_columns=64),),
    256: (ForwardConfig(_ANY, 256, 128, tile_n=64, q_stages=1, kv_stages=2, o_columns=64),),
}
