"""The compiled Hopper kernels: their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import (
    Config,
    DqConfig,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig


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
    from sparse_flash.kernels.sm90.forward import ForwardSm90
    from sparse_flash.kernels.sm90.scored import ForwardScoredSm90

    of = Arguments(config).with_value_width()
    if config.scored:
        kernel = ForwardScoredSm90(config, of.dtype)
        return compile_kernel(kernel, of.forward(scored=True), config.arch)
    return compile_kernel(ForwardSm90(config, of.dtype), of.forward(), config.arch)


def compile_backward(config: BackwardConfig) -> Any:
    """Compile without a GPU."""
    from sparse_flash.kernels.sm90.backward import BackwardSm90
    from sparse_flash.kernels.sm90.backward_small import BackwardSmallSm90
    from sparse_flash.kernels.sm90.backward_tile96 import BackwardTile96Sm90
    from sparse_flash.kernels.sm90.backward_wide import BackwardWideSm90
    from sparse_flash.kernels.sm90.scored import BackwardScoredSm90

    of = Arguments(config).with_value_width()
    done = of.ints(of.b, of.h, of.size())
    if config.scored:
        kernel = BackwardScoredSm90(config, of.dtype)
        return compile_kernel(kernel, of.backward(done, scored=True), config.arch)
    plain = BackwardWideSm90 if config.wide else BackwardSm90
    plain = BackwardSmallSm90 if config.small else plain
    plain = BackwardTile96Sm90 if config.tile96 else plain
    return compile_kernel(plain(config, of.dtype), of.backward(done), config.arch)


def compile_dq(config: DqConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.dq import DqSm90

    of = Arguments(config).with_value_width()
    arguments = (
        *(of.queries(), of.keys(), of.values(), of.outputs(), of.queries()),  # q, k, v, dout, dq
        of.row_stats(64),  # tiles of the kernel over keys: 64 or 128
        *of.lists(config.warpgroups),
        of.ints(2),  # counter
        of.splits(config.tile_m, config.head_dim),
        *of.combine_arrays(),
        *(Int32(1), Float32(1.0), Float32(1.0)),
    )
    return compile_kernel(DqSm90(config, of.dtype), arguments, config.arch)
