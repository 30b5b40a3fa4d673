"""The compiled Hopper kernels: their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.sm90.config import (
    BackwardConfig,
    Config,
    DqConfig,
    ForwardConfig,
)


def load_function(config: Config) -> Callable[..., None]:
    """The compiled kernel of a config: from this process, else from the disk, else compiled.

    It takes the arguments of `ForwardSm90.__call__`, `BackwardSm90.__call__` or
    `DqSm90.__call__` but the stream, as torch tensors and numbers.
    """
    return load(config, compile_config)


def compile_config(config: Config) -> Any:
    """Compile the kernel of a config. Needs no GPU."""
    if isinstance(config, ForwardConfig):
        return compile_forward(config)
    if isinstance(config, BackwardConfig):
        return compile_backward(config)
    return compile_dq(config)


def compile_forward(config: ForwardConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.forward import ForwardSm90

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.lists(config.warpgroups),
        of.ints(2),  # counter
        of.splits(config.tile_m, config.head_dim),
        of.splits(config.tile_m),
        *of.combine_arrays(),
        *(Int32(1), Float32(1.0)),
    )
    return compile_kernel(ForwardSm90(config, of.dtype), arguments, config.arch)


def compile_backward(config: BackwardConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward import BackwardSm90

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, out, dout
        *(of.floats(of.b, of.h, of.q_len) for _ in range(2)),  # lse, dlse
        of.compact(of.dtype, of.b, of.q_len, of.h, of.d),  # dq
        *(of.keys(), of.keys()),  # dk, dv
        of.ints(of.b, of.h, of.size()),  # done
        of.ints(of.size(), of.b, of.h_kv),  # bounds
        of.floats(of.b, of.h, of.size(), config.dq_chunk),  # dq_sum
        of.row_stats(config.tile_m),
        *of.lists(config.tile_n // 64),
        of.ints(2),  # counter
        *(of.splits(config.tile_n, config.head_dim) for _ in range(2)),
        *of.combine_arrays(),
        *(Int32(1), Int32(0), Float32(1.0), Float32(1.0)),
    )
    return compile_kernel(BackwardSm90(config, of.dtype), arguments, config.arch)


def compile_dq(config: DqConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.dq import DqSm90

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, dout, dq
        of.row_stats(64),  # tiles of the kernel over keys: 64 or 128
        *of.lists(config.warpgroups),
        of.ints(2),  # counter
        of.splits(config.tile_m, config.head_dim),
        *of.combine_arrays(),
        *(Int32(1), Float32(1.0), Float32(1.0)),
    )
    return compile_kernel(DqSm90(config, of.dtype), arguments, config.arch)
