"""Configs of the backward kernel, and the shipped ones."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class BackwardConfig:
    """One compiled backward kernel.

    A CTA computes tile_m queries x tile_n keys at a time. Its warps form a grid: `warps_n` share
    the keys of a tile, `warps_m` its queries in S' and dP', and the columns of dK and dV. In the
    product of dQ, `dq_warps` of all warps share the queries, and the others the columns.

    With one warp over the queries, P' and dS' stay in registers as operands of dV and dK. With
    more, the warps exchange them through shared memory, and each reads less of Q and dO.

    head_dim: Largest head_dim; smaller ones are padded with zeros by the loads.
    q_stages, do_stages, stats_stages: Pipeline stages of Q, of dO, and of lse and delta.
    chunks: Number of parts in which a warp computes its queries, one after the other, in fewer
        registers.
    v_in_registers: Keep V as an operand in registers instead of shared memory.
    split_dq: Compute dQ half by half, in fewer registers.
    recompute: Recompute the addresses of K and V for each product, to save registers.
    ctas_per_sm: CTAs on a multiprocessor.
    offsets: Queries at positions (see `BackwardAtSm80`).
    fixed_point: Add dQ in fixed point, so that the result does not depend on the order.
    softcap, alibi, dropout, distance_bias, image_bias: Score terms, as of `ScoreFlags`.
    """

    dtype: str  # "bfloat16" or "float16"
    head_dim: int
    tile_m: int
    tile_n: int
    warps_n: int
    warps_m: int
    dq_warps: int
    q_stages: int = 2
    do_stages: int = 2
    stats_stages: int = 2
    chunks: int = 1
    v_in_registers: bool = False
    split_dq: bool = False
    recompute: bool = False
    ctas_per_sm: int = 1
    fixed_point: bool = False
    offsets: bool = False
    softcap: bool = False
    alibi: bool = False
    dropout: bool = False
    distance_bias: bool = False
    image_bias: bool = False
    arch: str = "sm_80"

    def __post_init__(self) -> None:
        assert self.tile_n % 64 == 0  # a bit tile's rows come by 64
        assert self.tile_m in (32, 64, 96, 128)  # a row's bits fill one word a thread
        assert self.tile_n % (16 * self.warps_n) == 0
        assert self.tile_m % (16 * self.warps_m * self.chunks) == 0
        assert self.head_dim % (16 * self.warps_m) == 0
        assert self.tile_m % (16 * self.dq_warps) == 0
        assert self.warps % self.dq_warps == 0
        assert self.head_dim % (16 * self.dq_columns) == 0
        assert self.chunks == 1 or not self.exchange
        assert not (self.split_dq and self.dq_groups % 2)

        assert not (self.alibi and self.biased)  # it is a part of the bias by distance then

    dq = False  # whether preprocess.Preprocess clears flags of sums

    @property
    def biased(self) -> bool:
        """Whether biases are looked up (see biases.py)."""
        return self.distance_bias or self.image_bias

    @property
    def scored(self) -> bool:
        """Whether there are score terms (see score_terms.py)."""
        return self.softcap or self.alibi or self.dropout or self.biased

    @property
    def weighted(self) -> bool:
        """Whether dS' has other weights than P'."""
        return self.softcap or self.dropout

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.warps_n * self.warps_m

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    @property
    def exchange(self) -> bool:
        """Whether warps exchange P' and dS' through shared memory."""
        return self.warps_m > 1

    @property
    def dq_columns(self) -> int:
        """Number of warps that share the columns of dQ."""
        return self.warps // self.dq_warps

    @property
    def dq_atoms(self) -> int:
        """Number of 16 queries of dQ that a warp computes."""
        return self.tile_m // (16 * self.dq_warps)

    @property
    def dq_groups(self) -> int:
        """Number of groups of 16 columns of dQ that a warp computes."""
        return self.head_dim // (16 * self.dq_columns)

    @property
    def tile(self) -> tuple[int, int]:
        """The tile of the transposed layout: (tile_n, tile_m)."""
        return self.tile_n, self.tile_m

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128."""
        return self.tile_m * self.tile_n / (128 * 128)

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """DK and dV of one part of a split column."""
        return (self.tile_n, self.head_dim), (self.tile_n, self.head_dim)

    @property
    def dq_chunk(self) -> int:
        """Elements of a tile of dQ."""
        return self.tile_m * self.head_dim

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, statistics, items and their tiles, aligned."""
        rows = (self.q_stages + self.do_stages) * self.tile_m
        rows += (1 if self.v_in_registers else 2) * self.tile_n
        scores = (1 + self.exchange) * self.tile_m * self.tile_n
        size = 2 * (rows * self.head_dim + scores) + 8 * self.tile_m * self.stats_stages + 192
        return -(-size // 1024) * 1024


DTYPES = ("bfloat16", "float16")
_ANY = "bfloat16"  # stands for either
# Of each head_dim, the best first: a GPU takes the first one that fits its shared memory.
_BACKWARD = {
    32: (BackwardConfig(_ANY, 32, 64, 128, 4, 1, 4, stats_stages=1, chunks=2, ctas_per_sm=2),),
    64: (
        BackwardConfig(_ANY, 64, 64, 128, 4, 1, 2, stats_stages=1, chunks=2, ctas_per_sm=2),
        BackwardConfig(
            *(_ANY, 64, 64, 128, 4, 1, 2),
            q_stages=1,
            do_stages=1,
            stats_stages=1,
            chunks=4,
            v_in_registers=True,
            ctas_per_sm=2,
        ),
    ),
    96: (
        BackwardConfig(_ANY, 96, 128, 128, 4, 2, 4),
        BackwardConfig(_ANY, 96, 64, 128, 4, 2, 4),
        BackwardConfig(_ANY, 96, 64, 64, 4, 2, 4),
    ),
    128: (
        BackwardConfig(_ANY, 128, 64, 128, 4, 2, 2),
        BackwardConfig(
            *(_ANY, 128, 64, 128, 8, 1, 2),
            do_stages=1,
            stats_stages=1,
            chunks=2,
            v_in_registers=True,
        ),
    ),
    192: (
        BackwardConfig(_ANY, 192, 64, 64, 4, 2, 2),
        BackwardConfig(_ANY, 192, 32, 64, 4, 2, 2, do_stages=1),
    ),
    256: (
        BackwardConfig(_ANY, 256, 64, 64, 4, 2, 2),
        BackwardConfig(
            *(_ANY, 256, 32, 64, 4, 2, 2),
            q_stages=1,
            do_stages=1,
            stats_stages=1,
            v_in_registers=True,
        ),
    ),
}


def _variant(
    config: BackwardConfig, dtype: str, target: str, deterministic: bool, offsets: bool = False
) -> BackwardConfig:
    found = replace(config, dtype=dtype, arch=target, fixed_point=deterministic, offsets=offsets)
    # Registers are few: these compile without spills.
    if config.head_dim == 64 and (deterministic or target == "sm_100"):
        return replace(found, chunks=4)
    if deterministic and config.head_dim == 256:
        if not config.v_in_registers:
            return replace(found, q_stages=1, stats_stages=1 if offsets else 2)
        if not offsets:
            return replace(found, do_stages=2, stats_stages=2, split_dq=True)
    return found


def fits(config: BackwardConfig, shared_memory: int) -> bool:
    """Whether a GPU with so much shared memory for a CTA runs the config."""
    # CTAs that share a multiprocessor take 1 KiB more each; it has 1 KiB more than one can use.
    return config.ctas_per_sm * (config.shared_memory + 1024) <= shared_memory + 1024


def backward_config(
    dtype: str,
    head_dim: int,
    target: str,
    shared_memory: int,
    deterministic: bool = False,
    offsets: bool = False,
) -> BackwardConfig:
    """The config for this head_dim, at most 256, on a GPU with so much shared memory for a CTA.

    offsets: Queries at positions.

    Raises:
        ValueError: It is too little.

    >>> backward_config("bfloat16", 128, "sm_89", shared_memory=99 << 10).tile
    (128, 64)
    """
    size = min(size for size in _BACKWARD if head_dim <= size)
    for config in _BACKWARD[size]:
        if fits(config, shared_memory):
            return _variant(config, dtype, target, deterministic, offsets)
    raise ValueError(
        f"the kernels need {_BACKWARD[size][-1].shared_memory} bytes of shared memory, but this "
        f"GPU ({target}) has {shared_memory}: use impl='reference'"
    )


def all_backward_configs(target: str) -> list[BackwardConfig]:
    """All backward configs that are shipped, for this target."""
    return [
        _variant(config, dtype, target, fixed)
        for configs in _BACKWARD.values()
        for config in configs
        for dtype in DTYPES
        for fixed in (False, True)
    ]
