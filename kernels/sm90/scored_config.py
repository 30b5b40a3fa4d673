"""Configs of the kernels with score terms: those without, with fewer operands in registers."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

from sparse_flash.kernels.score_arguments import ScoreFlags
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import (
    DTYPES,
    backward_configs,
    forward_configs,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.sm90.position_config import forward_at_config

MOST_HEAD_DIM = 128  # of gradients with softcap, bias or dropout
MOST_WITH_BIAS_AND_DROPOUT = 96  # likewise, of gradients of a bias with dropout
MOST_SHARED_MEMORY = 227 << 10  # of a CTA, in bytes
# (head_dim, tile_n) of forward configs that leave no registers or shared memory for terms.
_WITHOUT_TERMS = ((96, 112), (192, 112), (256, 80))
# Columns of K in registers beside a bias alone, by head_dim: 2 % faster as measured.
_K_BESIDE_BIAS = {64: 64, 96: 96, 128: 64}
_CLEARED = ((32, True), (64, False), (96, True))  # head_dim, and whether there is dropout


@functools.cache
def scored_forward_configs(
    dtype: str, head_dim: int, flags: ScoreFlags
) -> tuple[ForwardConfig, ...]:
    """The forward configs of a head_dim with these features, of tiles of 128 rows or more."""
    few = not (flags.softcap or flags.alibi or flags.distance_bias)
    # With the other terms at head_dim 128, 192 rows took 3 to 5 % more time than 128.
    tall = 128 if 96 < head_dim <= 128 and not few else 192
    configs = [
        c
        for c in forward_configs(dtype, head_dim)
        if 128 <= c.tile_m <= tall and c.slots == 1 and (c.head_dim, c.tile_n) not in _WITHOUT_TERMS
    ]
    return tuple(_with_terms(c, flags) for c in configs)


def scored_forward_at_config(dtype: str, head_dim: int, flags: ScoreFlags) -> ForwardConfig:
    """The config with these features and offsets."""
    return _with_terms(forward_at_config(dtype, head_dim), flags)


def _with_terms(config: ForwardConfig, flags: ScoreFlags) -> ForwardConfig:
    """The config with these features; they take registers of Q, and windows take shared memory of
    the output.
    """
    config = replace(config, **flags.of_forward)
    if config.warpgroups == 3:
        config = replace(config, **_changes_of_three(config.head_dim, flags))
    if config.draws_ahead:
        config = replace(config, q_in_registers=False)
    if config.shared_memory > MOST_SHARED_MEMORY:
        config = replace(config, o_columns=config.o_columns // 2)
    return config


def _changes_of_three(head_dim: int, flags: ScoreFlags) -> dict[str, Any]:
    """Changes of a forward config with three warpgroups.

    Turns, and where the exponentials come first, are as measured: 1 to 5 % with dropout, up to 4 %
    with other terms. `clear_tile_info` is as compiled: ptxas spills without it here, and with it in
    some of the others. With a softcap and a bias it spills too unless the exponentials come first.
    """
    both = flags.softcap and flags.distance_bias
    clear = (head_dim, flags.dropout) in _CLEARED if both else head_dim == 64
    return {
        "exp_before_pv_wait": (head_dim == 96 and not flags.dropout) or both,
        "turns": not (flags.dropout and head_dim >= 96),
        "clear_tile_info": clear and flags.distance_bias,
    }


@functools.cache
def scored_backward_configs(
    dtype: str, head_dim: int, deterministic: bool, flags: ScoreFlags
) -> tuple[BackwardConfig, ...]:
    """The backward configs of a head_dim with these features; sinks need no kernel of their own.

    The terms take the registers of K and V, but for those of K beside a bias alone.
    """
    used = flags.of_backward
    if not any(used.values()):
        return backward_configs(dtype, head_dim, deterministic)
    size = min(n for n in (32, 64, 96, 128) if head_dim <= n)
    others = flags.dropout or flags.distance_bias
    crowded = (flags.softcap and others) or (flags.distance_grads and flags.dropout)
    if (size == 64 and crowded) or (size == 32 and flags.softcap and others):
        size = 96  # with tiles of 128 queries, P' and its factors would spill
    if size == 96 and deterministic:
        size = 128
    config = backward_configs(dtype, size, deterministic)[0]
    without = {"k_in_registers": 0, "v_in_registers": 0}
    changes = used | without | _changes(size, deterministic, flags)
    if deterministic:
        changes |= {"k_stages": 1, "v_stages": 1}  # the exponents take registers too
    return (replace(config, **changes),)


def _changes(size: int, deterministic: bool, flags: ScoreFlags) -> dict[str, Any]:
    """Changes of the config of a head_dim that leave enough registers and shared memory."""
    crowded = flags.softcap + flags.dropout + flags.distance_bias + flags.distance_grads > 1
    held = {}
    if flags.distance_bias and size in _K_BESIDE_BIAS and not (crowded or deterministic):
        held = {"k_in_registers": _K_BESIDE_BIAS[size]}
    if size == 32:
        return {"v_stages": 1, "k_stages": 1} if crowded else {}
    if size == 64:
        slices: dict[str, Any] = {"p_slices": 1} if flags.dropout else {"p_slices": 2}
        if flags.softcap:
            slices = {"p_slices": 4, "sliced_statistics": True, "early_weights": True}
        return slices | held | {"v_stages": 1} | ({"k_stages": 1} if crowded else {})
    if crowded:
        found = {"k_stages": 1, "sliced_statistics": True}
        if size == 128 and flags.softcap:
            found |= _changes_of_softcap(deterministic, flags)
        return found
    if flags.softcap and size == 128:
        return {"p_slices": 1}
    return held | ({"k_stages": 1} if flags.distance_bias and size == 128 else {})


def _changes_of_softcap(deterministic: bool, flags: ScoreFlags) -> dict[str, Any]:
    """Further changes with a softcap and other terms at head_dim 128, all that ptxas needs."""
    if flags.dropout and deterministic:
        return {} if flags.distance_bias else {"p_slices": 1}
    return {"early_weights": True} if flags.distance_bias else {}


def flag_sets() -> list[ScoreFlags]:
    """The sets of features that calls can have; gradients of a bias need one, without a softcap."""
    names = ("softcap", "sinks", "dropout", "distance_bias")
    sets = [
        dict(zip(names, used, strict=True)) for used in itertools.product((False, True), repeat=4)
    ]
    found = [ScoreFlags(**used) for used in sets if any(used.values())]
    found += [ScoreFlags(alibi=True, sinks=sinks) for sinks in (False, True)]
    graded = [f._replace(distance_grads=True) for f in found if f.distance_bias and not f.softcap]
    return found + graded


def all_scored_configs() -> list[ForwardConfig | BackwardConfig]:
    """All configs that calls with score terms can have."""
    found: dict[ForwardConfig | BackwardConfig, None] = {}
    for dtype, flags in itertools.product(DTYPES, flag_sets()):
        for size in (32, 64, 96, 128, 192, 256):
            found |= dict.fromkeys(scored_forward_configs(dtype, size, flags))
            if not flags.alibi:  # with offsets it is a bias by distance
                found[scored_forward_at_config(dtype, size, flags)] = None
            for deterministic in (False, True):
                refused = deterministic and flags.distance_grads
                both = flags.distance_grads and flags.dropout
                most = MOST_WITH_BIAS_AND_DROPOUT if both else MOST_HEAD_DIM
                if size <= most and not refused:
                    backward = scored_backward_configs(dtype, size, deterministic, flags)
                    found |= dict.fromkeys(c for c in backward if c.scored)
    return list(found)
