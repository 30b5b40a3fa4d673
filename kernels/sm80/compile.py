"""The compiled kernels for Ampere and later: their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.sm80.config import ForwardConfig
from sparse_flash.kernels.sm90.position_compile import PositionArguments


def load_forward(config: ForwardConfig) -> Callable[..., None]:
    """The compiled kernel of a config: from this process, else from the disk, else compiled.

    It takes the arguments of `ForwardSm80.__call__` but the stream, as torch tensors and numbers.
    """
    return load(config, compile_forward)


def load_forward_at(config: ForwardConfig) -> Callable[..., None]:
    """As `load_forward`, with the arguments of `ForwardAtSm80.__call__`."""
    return load(config, compile_forward_at)


def compile_forward(config: ForwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm80.forward import ForwardSm80

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.lists(config.tile_m // 64),
        of.ints(2),  # counter
        of.splits(config.tile_m, config.head_dim),
        of.splits(config.tile_m),
        *of.combine_arrays(),
        *(Int32(1), Float32(1.0)),
    )
    return compile_kernel(ForwardSm80(config, of.dtype), arguments, config.arch)


def compile_forward_at(config: ForwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm80.forward_at import ForwardAtSm80

    of = PositionArguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.splits_of_rows(config.head_dim),
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), config.tile_m // 64, 128, 2),  # bits
        of.ints(2),  # counter
        *(Int32(1), Int32(0), Int32(1), Int32(1), Float32(1.0)),
    )
    return compile_kernel(ForwardAtSm80(config, of.dtype), arguments, config.arch)
