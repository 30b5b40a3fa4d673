"""Configs of the kernels with score terms: those without, in as many registers as there are."""

from __future__ import annotations

import functools
from dataclasses import replace

from sparse_flash.kernels.score_arguments import ScoreFlags
from sparse_flash.kernels.sm80 import backward_config as backward
from sparse_flash.kernels.sm80 import config as forward
from sparse_flash.kernels.sm80.backward_config import BackwardConfig
from sparse_flash.kernels.sm80.config import ForwardConfig

# All sets of features.
FLAGS = tuple(ScoreFlags(*(bool(n >> i & 1) for i in range(3))) for n in range(1, 8))


@functools.cache
def scored_forward_configs(
    dtype: str, head_dim: int, target: str, shared_memory: int, flags: ScoreFlags
) -> tuple[ForwardConfig, ...]:
    """As `forward_configs`, with these features."""
    configs = forward.forward_configs(dtype, head_dim, target, shared_memory)
    return tuple(_forward_variant(config, flags) for config in configs)


def scored_forward_at_config(
    dtype: str, head_dim: int, target: str, shared_memory: int, flags: ScoreFlags
) -> ForwardConfig:
    """As `forward_at_config`, with these features."""
    config = forward.forward_at_config(dtype, head_dim, target, shared_memory)
    return _forward_variant(config, flags)


def _forward_variant(config: ForwardConfig, flags: ScoreFlags) -> ForwardConfig:
    if not any(flags):
        return config
    full = config.row_groups > 1 and config.head_dim * config.tile_n >= 64 * 128
    recompute = 3 if full else config.recompute
    return replace(config, recompute=recompute, **flags._asdict())


@functools.cache
def scored_backward_config(
    dtype: str,
    head_dim: int,
    target: str,
    shared_memory: int,
    deterministic: bool,
    flags: ScoreFlags,
) -> BackwardConfig:
    """As `backward_config`, with these features; sinks need no kernel of their own."""
    config = backward.backward_config(dtype, head_dim, target, shared_memory, deterministic)
    config = replace(config, softcap=flags.softcap, alibi=flags.alibi)
    if config.scored and config.head_dim == 64:
        return replace(config, chunks=4, do_stages=1)
    if config.scored and config.head_dim == 96 and config.tile_m == 128:
        return replace(config, tile_m=64)
    return config


def all_scored_configs(target: str) -> list[ForwardConfig | BackwardConfig]:
    """All configs with score terms that GPUs of a compiler target take."""
    found: dict[ForwardConfig | BackwardConfig, None] = {}
    for dtype in forward.DTYPES:
        for size in (32, 64, 96, 128, 192, 256):
            limits = (dtype, size, target, forward.LIMIT_OF[target])
            for flags in FLAGS:
                found |= dict.fromkeys(scored_forward_configs(*limits, flags))
                found[scored_forward_at_config(*limits, flags)] = None
                for fixed in (False, True):
                    config = scored_backward_config(*limits, fixed, flags)
                    if config.scored:
                        found[config] = None
    return list(found)
