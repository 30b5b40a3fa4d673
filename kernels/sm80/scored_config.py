"""Configs of the kernels with score terms: tiles that compile without spills."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

from sparse_flash.kernels.score_arguments import ScoreFlags
from sparse_flash.kernels.sm80 import backward_config as backward
from sparse_flash.kernels.sm80 import config as forward
from sparse_flash.kernels.sm80.backward_config import BackwardConfig
from sparse_flash.kernels.sm80.config import ForwardConfig

_BIASES = ({}, {"alibi": True}, *({"distance_bias": n < 2, "image_bias": n > 0} for n in range(3)))
# All sets of features.
FLAGS = tuple(
    ScoreFlags(softcap=softcap, sinks=sinks, dropout=dropout, **biases)
    for biases in _BIASES
    for softcap, sinks, dropout in itertools.product((False, True), repeat=3)
    if softcap or sinks or dropout or biases
)
_ANY = "bfloat16"  # stands for either
_NARROW = ForwardConfig(_ANY, 64, tile_m=128, tile_n=64, stages=2)
# Tiles for one feature where the plain ones leave too few registers. Time relative to the plain
# kernel without the feature on an H200, causal, 16K queries, where it was measured:
_FORWARD = {
    ("alibi", 64): (
        ForwardConfig(_ANY, 64, tile_m=128, tile_n=128, recompute=2),  # 1.10
        _NARROW,  # 1.22
    ),
    ("alibi", 128): (ForwardConfig(_ANY, 128, tile_m=128, tile_n=64, recompute=2),),
    ("distance_bias", 64): (ForwardConfig(_ANY, 64, tile_m=128, tile_n=128, recompute=2), _NARROW),
    ("distance_bias", 128): (ForwardConfig(_ANY, 128, tile_m=128, tile_n=64, recompute=2),),
    ("image_bias", 128): (ForwardConfig(_ANY, 128, tile_m=128, tile_n=64, recompute=2),),
    ("softcap", 64): (_NARROW,),  # 1.38
    ("softcap", 128): (ForwardConfig(_ANY, 128, tile_m=128, tile_n=32, stages=2),),  # 1.21
    ("dropout", 128): (ForwardConfig(_ANY, 128, tile_m=64, tile_n=128),),  # 1.25
}
# Tiles for features that need many registers.
_SMALL_FORWARD = {
    32: ForwardConfig(_ANY, 32, tile_m=128, tile_n=64, stages=2),
    64: _NARROW,
    96: ForwardConfig(_ANY, 96, tile_m=64, tile_n=64),
    128: ForwardConfig(_ANY, 128, tile_m=64, tile_n=64),
    192: ForwardConfig(_ANY, 192, tile_m=64, tile_n=64, ctas_per_sm=1),
    256: ForwardConfig(_ANY, 256, tile_m=64, tile_n=64, ctas_per_sm=1),
}
# Tiles for an image bias without softcap or dropout, where the small ones spill.
_IMAGE_FORWARD = {("sm_120", 192): ForwardConfig(_ANY, 192, tile_m=64, tile_n=32)}
# Tiles for a softcap, dropout and biases that are looked up, where the small ones spill.
_CROWDED_FORWARD = {64: ForwardConfig(_ANY, 64, tile_m=64, tile_n=64, stages=2)}
# A GPU takes the first that fits its shared memory, or where there is none the plain tiles.
_SMALL_BACKWARD = {
    32: (BackwardConfig(_ANY, 32, 64, 128, 4, 1, 4, stats_stages=1, chunks=4, ctas_per_sm=2),),
    64: (BackwardConfig(_ANY, 64, 64, 128, 4, 2, 2),),
    96: (BackwardConfig(_ANY, 96, 64, 64, 4, 2, 4),),
    128: (
        BackwardConfig(_ANY, 128, 32, 128, 4, 2, 2),
        BackwardConfig(_ANY, 128, 64, 64, 4, 2, 2, do_stages=1),
    ),
    192: (BackwardConfig(_ANY, 192, 32, 64, 4, 2, 2, do_stages=1),),
    256: (
        BackwardConfig(_ANY, 256, 32, 64, 4, 2, 2, do_stages=1, stats_stages=1),
        BackwardConfig(
            *(_ANY, 256, 32, 64, 4, 2, 2),
            q_stages=1,
            do_stages=1,
            stats_stages=1,
            v_in_registers=True,
        ),
    ),
}
# Tiles for a softcap, dropout and biases that are looked up, where the small ones spill.
_CROWDED_BACKWARD = {
    64: (BackwardConfig(_ANY, 64, 64, 64, 4, 2, 2),),
    128: (BackwardConfig(_ANY, 128, 64, 64, 4, 2, 2, do_stages=1),),
    256: (BackwardConfig(_ANY, 256, 32, 64, 4, 2, 2, q_stages=1, do_stages=1, stats_stages=1),),
}


def of_forward(flags: ScoreFlags) -> dict[str, Any]:
    """The features of forward kernels."""
    return of_backward(flags) | {"sinks": flags.sinks}


def of_backward(flags: ScoreFlags) -> dict[str, Any]:
    """The features of backward kernels; the sinks' gradients need none."""
    names = ("softcap", "alibi", "dropout", "distance_bias", "image_bias")
    return {name: getattr(flags, name) for name in names}


@functools.cache
def scored_forward_configs(
    dtype: str, head_dim: int, target: str, shared_memory: int, flags: ScoreFlags
) -> tuple[ForwardConfig, ...]:
    """As `forward_configs`, with these features."""
    configs = forward.forward_configs(dtype, head_dim, target, shared_memory)
    size = configs[0].head_dim
    used = "+".join(name for name, used in of_backward(flags).items() if used)
    listed, older = _FORWARD.get((used, size), ()), _is_older(target)
    if listed and older and max(map(forward.space, listed)) <= shared_memory:
        configs = listed
    elif _is_heavy(flags) or (used and not older):
        configs = (_small_forward(size, flags, target),)
    features = of_forward(flags)
    return tuple(replace(c, dtype=dtype, arch=target, **features) for c in configs)


def _small_forward(size: int, flags: ScoreFlags, target: str) -> ForwardConfig:
    small, spared = _SMALL_FORWARD[size], flags.dropout and target != "sm_120"
    if size == 256 and _biases(flags) and not (_is_older(target) or flags.softcap or spared):
        return replace(small, recompute=2)  # ptxas spills otherwise
    if flags.image_bias and not (flags.softcap or flags.dropout):
        small = _IMAGE_FORWARD.get((target, size), small)
    return _CROWDED_FORWARD.get(size, small) if _is_crowded(flags) else small


def _biases(flags: ScoreFlags) -> int:
    """The number of biases that are looked up."""
    return flags.distance_bias + flags.image_bias


def _is_crowded(flags: ScoreFlags) -> bool:
    """Whether there are all of a softcap, dropout, and biases that are looked up."""
    return flags.softcap and flags.dropout and (flags.distance_bias or flags.image_bias)


def _is_older(target: str) -> bool:
    """Whether a compiler target is below 10.0, from which on ptxas needs more registers."""
    return int(target[3:]) < 100


def _is_heavy(flags: ScoreFlags) -> bool:
    """Whether the features need more registers than any one of softcap and ALiBi."""
    biased = flags.distance_bias or flags.image_bias
    return flags.dropout or biased or (flags.softcap and flags.alibi)


def scored_forward_at_config(
    dtype: str, head_dim: int, target: str, shared_memory: int, flags: ScoreFlags
) -> ForwardConfig:
    """As `forward_at_config`, with these features."""
    config = forward.forward_at_config(dtype, head_dim, target, shared_memory)
    if not any(flags):
        return config
    small = _small_forward(config.head_dim, flags, target)
    double = replace(small, stages=2)
    if small.recompute and _biases(flags) == 1 and forward.space(double) <= shared_memory:
        small = double  # with one stage ptxas spills for sm_100
    return replace(small, dtype=dtype, arch=target, offsets=True, **of_forward(flags))


@functools.cache
def scored_backward_config(
    dtype: str,
    head_dim: int,
    target: str,
    shared_memory: int,
    deterministic: bool,
    flags: ScoreFlags,
    offsets: bool = False,
) -> BackwardConfig:
    """As `backward_config`, with these features; sinks need no kernel of their own.

    offsets: Queries at positions.
    """
    limits = (dtype, head_dim, target, shared_memory)
    config = backward.backward_config(*limits, deterministic, offsets)
    features = of_backward(flags)
    if not any(features.values()):
        return config
    if offsets or _is_tight(config.head_dim, shared_memory, deterministic, flags):
        listed = _SMALL_BACKWARD[config.head_dim]
        if _is_crowded(flags):
            listed = _CROWDED_BACKWARD.get(config.head_dim, listed)
        fitting = [c for c in listed if backward.fits(c, shared_memory)]
        small = fitting[0] if fitting else config
        config = replace(small, dtype=dtype, arch=target, fixed_point=deterministic)
        if offsets and _is_crowded(flags) and config.head_dim == 256:
            config = replace(config, dq_warps=1)  # as compiled: ptxas spills otherwise
        if config.v_in_registers:
            config = replace(config, **_for_v_in_registers(config, flags))
    elif config.head_dim == 64:
        config = replace(config, chunks=4, **_for_plain_64(config, flags))
    elif config.split_dq:
        config = replace(config, split_dq=False)
    return replace(config, offsets=offsets, **features)


def _is_tight(head_dim: int, shared_memory: int, deterministic: bool, flags: ScoreFlags) -> bool:
    """Whether the plain tiles of the gradients leave too few registers for the features."""
    large = shared_memory > forward.LIMITS[0]
    looked_up = flags.distance_bias or flags.image_bias
    biased = flags.alibi or looked_up
    if head_dim == 64:
        several = flags.dropout and (flags.softcap or biased)
        several = several or (looked_up and flags.softcap)
        return not large or several or (deterministic and (flags.dropout or not flags.softcap))
    if head_dim == 128:
        return not large or flags.softcap or (flags.dropout and (biased or deterministic))
    return head_dim == 96 or _is_heavy(flags)


def _for_plain_64(config: BackwardConfig, flags: ScoreFlags) -> dict[str, Any]:
    """Options of the plain tiles at head_dim 64 without which ptxas spills.

    With biases it needs more registers for sm_90 than for sm_80.
    """
    biases = _biases(flags) * (config.arch == "sm_90")
    single = flags.softcap or flags.dropout or biases > 0 or not _is_older(config.arch)
    return {"do_stages": 1 if single else config.do_stages, "recompute": biases == 2}


def _for_v_in_registers(config: BackwardConfig, flags: ScoreFlags) -> dict[str, Any]:
    """Options with V in registers without which ptxas spills; some add spills elsewhere."""
    older, capped_image = _is_older(config.arch), flags.softcap and flags.image_bias
    if older and config.fixed_point:
        return {"recompute": flags.image_bias or (flags.softcap and flags.alibi)}
    if capped_image and older:
        return {"stats_stages": 2, "dq_warps": 1}
    if capped_image and config.fixed_point:
        return {"stats_stages": 2, "split_dq": True}
    plain = not (older or flags.softcap or config.fixed_point)
    return {"recompute": flags.image_bias and plain}


def unsupported_gradients(head_dim: int, shared_memory: int, flags: ScoreFlags) -> str | None:
    """Why the gradients with these features have no config without spills; None where they have."""
    if not flags.dropout or head_dim <= 192:
        return None
    smallest = _SMALL_BACKWARD[256][0]  # the other one spills with dropout
    if backward.fits(smallest, shared_memory):
        return None
    return (
        f"its gradients with dropout need {smallest.shared_memory} bytes of shared memory above "
        f"head_dim 192, but this GPU has {shared_memory} bytes for a CTA"
    )


def all_scored_configs(target: str) -> list[ForwardConfig | BackwardConfig]:
    """All configs with score terms that GPUs of a compiler target take."""
    found: dict[ForwardConfig | BackwardConfig, None] = {}
    for dtype in forward.DTYPES:
        for size in (32, 64, 96, 128, 192, 256):
            limits = (dtype, size, target, forward.LIMIT_OF[target])
            for flags in FLAGS:
                found |= dict.fromkeys(scored_forward_configs(*limits, flags))
                found[scored_forward_at_config(*limits, flags)] = None
                for fixed, offsets in itertools.product((False, True), repeat=2):
                    config = scored_backward_config(*limits, fixed, flags, offsets)
                    if config.scored and not unsupported_gradients(size, limits[3], flags):
                        found[config] = None
    return list(found)
