"""Configs of the forward kernel, the shipped ones, and their cost model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_flash.kernels.device import DeviceFacts


@dataclass(frozen=True)
class ForwardConfig:
    """One compiled forward kernel.

    A CTA computes tile_m x tile_n at a time; head_dim is the largest it takes (the loads pad
    smaller ones with zeros). A warp owns 16 rows of each 16 x warps of the tile.

    Args:
        dtype: "bfloat16" or "float16".
        head_dim: Columns of Q, K and V in shared memory.
        tile_m: Queries of a tile.
        tile_n: Keys of a tile.
        warps: Warps of a CTA, 4 or 8.
        stages: Tiles of K and V in shared memory. With 1, V is loaded during S = Q K^T and the
            next K during O += P V; with 2, both are loaded a tile ahead.
        ctas_per_sm: CTAs that share a multiprocessor.
        recompute: Values recomputed for each tile, to save registers: 0 none, 1 addresses of
            queries, 2 all addresses and the rescale threshold. With 2, registers have 64 keys at a
            time.
        offsets: Queries at positions (see `Positions`).
        softcap, alibi, sinks, dropout, distance_bias, image_bias: Score terms, as of `ScoreFlags`.
        arch: Compiler target.
    """

    dtype: str
    head_dim: int
    tile_m: int
    tile_n: int
    warps: int = 4
    stages: int = 1
    ctas_per_sm: int = 2
    recompute: int = 0
    offsets: bool = False
    softcap: bool = False
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False
    distance_bias: bool = False
    image_bias: bool = False
    arch: str = "sm_80"

    def __post_init__(self) -> None:
        assert self.head_dim % 32 == 0
        assert self.warps in (4, 8)
        assert self.tile_m % (16 * self.warps) == 0
        assert self.tile_m % 64 == 0
        assert self.tile_n % 16 == 0
        assert self.tile_n <= 128  # a row's bits fill one word a thread
        assert self.stages in (1, 2)
        assert self.recompute in (0, 1, 2)
        assert not (self.alibi and self.biased)  # it is a part of the bias by distance then

    @property
    def biased(self) -> bool:
        """Whether biases are looked up (see biases.py)."""
        return self.distance_bias or self.image_bias

    @property
    def scored(self) -> bool:
        """Whether there are score terms (see score_terms.py)."""
        return self.softcap or self.alibi or self.sinks or self.dropout or self.biased

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps

    @property
    def row_groups(self) -> int:
        """Groups of 16 rows that a warp owns."""
        return self.tile_m // (16 * self.warps)

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_m, tile_n)."""
        return self.tile_m, self.tile_n

    @property
    def tile_cost(self) -> float:
        """Time of a full tile, in units of one of 128 x 128; measured on an H200."""
        slower = {(32, 64): 1.16, (64, 64): 1.02}.get((self.head_dim, self.tile_n), 1.0)
        return slower * self.tile_m * self.tile_n / 128**2

    @property
    def split_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Output and logsumexp of one part of a split row."""
        return (self.tile_m, self.head_dim), (self.tile_m,)

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory: tiles, and the next work item, aligned."""
        rows = self.tile_m + 2 * self.stages * self.tile_n
        return 2 * rows * self.head_dim + 1024


DTYPES = ("bfloat16", "float16")
# Bytes of shared memory that a CTA can use, by compiler target.
_SMALL_LIMIT, _A100_LIMIT, _LARGE_LIMIT = LIMITS = (99 << 10, 163 << 10, 227 << 10)
LIMIT_OF = {
    "sm_80": _A100_LIMIT,
    "sm_86": _SMALL_LIMIT,
    "sm_89": _SMALL_LIMIT,
    "sm_90": _LARGE_LIMIT,
    "sm_100": _LARGE_LIMIT,
    "sm_110": _SMALL_LIMIT,
    "sm_120": _SMALL_LIMIT,
}
_UNMEASURED = (87, 110)  # treated as 8.6
_TARGETS = {
    8: ("sm_80", "sm_86", "sm_89"),
    9: ("sm_90",),
    10: ("sm_100",),
    11: ("sm_110",),
    12: ("sm_120",),
}
_ANY = "bfloat16"  # stands for either
_SMALL = ForwardConfig(_ANY, 128, tile_m=64, tile_n=64)  # 310
_NARROW = ForwardConfig(_ANY, 64, tile_m=128, tile_n=64, stages=2)  # 330
# Of each head_dim the best first: a GPU takes the first ones that fit its shared memory. Those of a
# tuple fit together, and a plan takes the one whose tiles cover its layout at the least cost.
# TFLOP/s on an H200, dense, 16K queries (torch's FlashAttention-2: 200, 296, 339, 346, 309, 321):
_FORWARD = {
    32: (
        (
            ForwardConfig(_ANY, 32, tile_m=128, tile_n=128, stages=2, recompute=1),  # 234
            ForwardConfig(_ANY, 32, tile_m=128, tile_n=64, stages=2),  # 195
        ),
    ),
    64: (
        (
            ForwardConfig(_ANY, 64, tile_m=128, tile_n=128, recompute=1),  # 338
            _NARROW,
        ),
    ),
    96: (
        (ForwardConfig(_ANY, 96, tile_m=128, tile_n=64, stages=2),),  # 362
        (ForwardConfig(_ANY, 96, tile_m=128, tile_n=64),),  # 354
    ),
    128: (
        (ForwardConfig(_ANY, 128, tile_m=128, tile_n=64, stages=2),),  # 374
        (ForwardConfig(_ANY, 128, tile_m=128, tile_n=64),),  # 370
        (ForwardConfig(_ANY, 128, tile_m=128, tile_n=32),),  # 348
    ),
    192: (
        (ForwardConfig(_ANY, 192, tile_m=64, tile_n=64),),  # 309
        (ForwardConfig(_ANY, 192, tile_m=128, tile_n=64, warps=8, ctas_per_sm=1),),  # 293
    ),
    256: (
        (ForwardConfig(_ANY, 256, tile_m=64, tile_n=64),),  # 330
        (ForwardConfig(_ANY, 256, tile_m=128, tile_n=64, warps=8, ctas_per_sm=1),),  # 311
        (ForwardConfig(_ANY, 256, tile_m=64, tile_n=64, ctas_per_sm=1),),  # 273
    ),
}

# Targets for which ptxas spills registers with the tiles above.
_WITHOUT_SPILLS = {
    (target, size): ((config,),)
    for target in ("sm_100", "sm_110")
    for size, config in ((64, _NARROW), (128, _SMALL))
}
# Queries at positions take more registers, so that smaller tiles do without spills.
_FORWARD_AT = {
    32: ForwardConfig(_ANY, 32, tile_m=128, tile_n=64, stages=2),
    64: _NARROW,
    128: _SMALL,
}


def capability_of(facts: DeviceFacts) -> tuple[int, int]:
    """Compute capability (major, minor).

    >>> capability_of(DeviceFacts("sm_120", num_sms=170, shared_memory=99 << 10, l2_bytes=96 << 20))
    (12, 0)
    """
    return int(facts.arch[3:-1]), int(facts.arch[-1])


def target_of(facts: DeviceFacts) -> str:
    """Compiler target of a GPU: the latest whose code runs on it, among the major version's own.

    >>> facts = DeviceFacts("sm_87", num_sms=16, shared_memory=163 << 10, l2_bytes=4 << 20)
    >>> target_of(facts)
    'sm_86'
    """
    major, minor = capability_of(facts)
    fitting = [target for target in _TARGETS[major] if int(target[-1]) <= minor]
    return fitting[-1]


def shared_memory_of(facts: DeviceFacts) -> int:
    """Bytes of shared memory that configs may use: the real limit, or the largest tested value."""
    major, minor = capability_of(facts)
    tried = LIMITS[0] if 10 * major + minor in _UNMEASURED else facts.shared_memory
    return min(tried, facts.shared_memory)


def space(config: ForwardConfig) -> int:
    """Bytes that a CTA must be able to use so that all CTAs of a multiprocessor fit."""
    # CTAs that share a multiprocessor take 1 KiB more each; it has 1 KiB more than one can use.
    return config.ctas_per_sm * (config.shared_memory + 1024) - 1024


def forward_configs(
    dtype: str, head_dim: int, target: str, shared_memory: int
) -> tuple[ForwardConfig, ...]:
    """The candidates for this head_dim, the default first; all run as many CTAs at a time.

    Args:
        dtype: "bfloat16" or "float16".
        head_dim: At most 256.
        target: Compiler target.
        shared_memory: Bytes of shared memory that a CTA can use on the GPU.

    Raises:
        ValueError: All configs need more shared memory.

    >>> [c.tile for c in forward_configs("bfloat16", 128, "sm_89", shared_memory=99 << 10)]
    [(128, 32)]
    """
    size = min(size for size in _FORWARD if head_dim <= size)
    listed = _WITHOUT_SPILLS.get((target, size), _FORWARD[size])
    needs = {candidates: max(map(space, candidates)) for candidates in listed}
    for candidates, need in needs.items():
        if need <= shared_memory:
            return tuple(_variant(replace(c, dtype=dtype, arch=target)) for c in candidates)
    raise ValueError(
        f"head_dim {head_dim} needs {min(needs.values())} bytes of shared memory, but this GPU "
        f"({target}) has {shared_memory} bytes for a CTA: use impl='reference'"
    )


def _variant(config: ForwardConfig) -> ForwardConfig:
    """The config that compiles without spills for this dtype and target."""
    wide = config.head_dim == 64 and config.tile_n == 128
    if wide and (config.dtype == "float16" or config.arch in ("sm_86", "sm_89")):
        return replace(config, recompute=2)
    return config


def forward_at_config(dtype: str, head_dim: int, target: str, shared_memory: int) -> ForwardConfig:
    """The config for queries at positions. Arguments are those of `forward_configs`."""
    config, *_ = forward_configs(dtype, head_dim, target, shared_memory)
    config = replace(_FORWARD_AT.get(config.head_dim, config), dtype=dtype, arch=target)
    return replace(config, offsets=True)


def all_forward_configs(target: str) -> list[ForwardConfig]:
    """All forward configs that GPUs of a compiler target take."""
    found: dict[ForwardConfig, None] = {}
    for dtype in DTYPES:
        for size in _FORWARD:
            limits = (target, LIMIT_OF[target])
            found |= dict.fromkeys(forward_configs(dtype, size, *limits))
            found[forward_at_config(dtype, size, *limits)] = None
    return list(found)
