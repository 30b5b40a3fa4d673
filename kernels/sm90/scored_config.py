"""Configs of the kernels with score terms: those without, with fewer operands in registers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from sparse_flash.kernels.score_arguments import ScoreFlags
from sparse_flash.kernels.sm90.config import (
    BackwardConfig,
    ForwardConfig,
    backward_configs,
    forward_configs,
)
from sparse_flash.kernels.sm90.position_config import forward_at_config

MOST_SHARED_MEMORY = 227 << 10  # of a CTA, in bytes


@functools.cache
def scored_forward_configs(
    dtype: str, head_dim: int, flags: ScoreFlags
) -> tuple[ForwardConfig, ...]:
    """The forward configs of a head_dim with these features."""
    return tuple(_with_terms(c, flags) for c in forward_configs(dtype, head_dim))


def scored_forward_at_config(dtype: str, head_dim: int, flags: ScoreFlags) -> ForwardConfig:
    """The config with these features and offsets."""
    return _with_terms(forward_at_config(dtype, head_dim), flags)


def _with_terms(config: ForwardConfig, flags: ScoreFlags) -> ForwardConfig:
    """The config with these features; windows take shared memory of the output."""
    config = replace(config, **flags.of_forward)
    if config.shared_memory > MOST_SHARED_MEMORY:
        config = replace(config, o_columns=config.o_columns // 2)
    return config


@functools.cache
def scored_backward_configs(
    dtype: str, head_dim: int, deterministic: bool, flags: ScoreFlags
) -> tuple[BackwardConfig, ...]:
    """The backward configs of a head_dim with these features; sinks need no kernel of their own.

    The terms take the registers of K and V.
    """
    used = flags.of_backward
    if not any(used.values()):
        return backward_configs(dtype, head_dim, deterministic)
    size = min(n for n in (32, 64, 96, 128) if head_dim <= n)
    if size == 64 and (flags.softcap or flags.distance_grads):
        size = 96  # with tiles of 128 queries, P' and its factors would spill
    if size == 96 and deterministic:
        size = 128
    config = backward_configs(dtype, size, deterministic)[0]
    changes = used | {"k_in_registers": 0, "v_in_registers": 0} | _changes(size, flags)
    if deterministic:
        changes |= {"k_stages": 1, "v_stages": 1}  # the exponents take registers too
    return (replace(config, **changes),)


def _changes(size: int, flags: ScoreFlags) -> dict[str, Any]:
    """Changes of the config of a head_dim that leave enough registers and shared memory."""
    crowded = flags.softcap + flags.dropout + flags.distance_bias + flags.distance_grads > 1
    if size == 32:
        return {"v_stages": 1, "k_stages": 1} if crowded else {}
    if size == 64:
        slices = {"p_slices": 1} if flags.dropout else {"p_slices": 2}
        return slices | {"v_stages": 1} | ({"k_stages": 1} if crowded else {})
    if crowded:
        return {"k_stages": 1, "sliced_statistics": True}
    return {}


def checked_scored_configs() -> list[ForwardConfig | BackwardConfig]:
    """Configs whose compiled code tests look into."""
    everything = ScoreFlags(softcap=True, alibi=True, sinks=True)
    return [*scored_forward_configs("bfloat16", 64, everything)[:1]]
