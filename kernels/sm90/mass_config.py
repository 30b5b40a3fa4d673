"""Config of the tile-mass kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace

BLOCKS = (64, 128)  # block sizes of layouts that the kernel takes, each way
_TWO_CTAS = 113 << 10  # bytes of shared memory with which two CTAs fit a multiprocessor


@dataclass(frozen=True)
class MassConfig:
    """One compiled tile-mass kernel. Its tile is the block of the layout.

    Two consumer warpgroups share each tile: its rows with tile_m 128, its columns with 64.

    Args:
        dtype: "bfloat16" or "float16".
        head_dim: The largest it takes; smaller ones are padded with zeros by the loads.
        tile_m: Queries of a tile.
        tile_n: Keys of a tile.
        q_stages: Tiles of Q in shared memory.
        k_stages: Tiles of K in shared memory.
        polynomial: Exponentials out of 8 that are computed by a polynomial, not by the special
            function unit, which is the bottleneck of small head_dims.
        arch: Compiler target.
        warpgroups: Consumer warpgroups.
    """

    dtype: str
    head_dim: int
    tile_m: int
    tile_n: int
    q_stages: int = 2
    k_stages: int = 3
    polynomial: int = 0
    arch: str = "sm_90a"
    warpgroups: int = 2

    def __post_init__(self) -> None:
        assert self.tile_m in BLOCKS
        assert self.tile_n in BLOCKS

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128."""
        return self.tile_m * self.tile_n / 128**2

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """No row is split: tiles do not depend on each other."""
        return ()

    @property
    def row_tiles(self) -> int:
        """Tiles of shared memory of a Q tile, 64 rows each."""
        return self.tile_m // 64

    @property
    def columns(self) -> int:
        """Columns of S that a warpgroup computes."""
        return self.tile_n * self.row_tiles // 2

    @property
    def column_tiles(self) -> int:
        """Tiles of shared memory of a K tile, one for each part of the columns."""
        return self.tile_n // self.columns

    @property
    def slices(self) -> int:
        """Numbers of a tile, one from each warp."""
        return 8

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and less than 1 KiB of barriers and records."""
        rows = self.q_stages * self.tile_m + self.k_stages * self.tile_n
        return 2 * rows * self.head_dim + 1024

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that share a multiprocessor: one computes while the other waits."""
        return 2 if self.shared_memory <= _TWO_CTAS else 1


_STAGES = {32: (2, 4), 64: (2, 3), 96: (2, 2), 128: (1, 2), 192: (1, 2), 256: (1, 2)}


def mass_config(dtype: str, head_dim: int, block: tuple[int, int]) -> MassConfig:
    """The config for a layout's block; head_dim must not exceed 256."""
    size = min(size for size in _STAGES if head_dim <= size)
    q_stages, k_stages = _STAGES[size]
    return MassConfig(dtype, size, *block, q_stages, k_stages, 2 * (size <= 64))


def all_mass_configs() -> list[MassConfig]:
    """All configs that are shipped."""
    configs = [
        mass_config("bfloat16", size, (m, n)) for size in _STAGES for m in BLOCKS for n in BLOCKS
    ]
    return [replace(config, dtype=dtype) for dtype in ("bfloat16", "float16") for config in configs]
