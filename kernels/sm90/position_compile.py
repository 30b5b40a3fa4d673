"""The compiled Hopper kernels for queries at positions: their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import DqConfig
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.sm90.position_config import DecodeConfig, PositionConfig


def load_position_function(config: PositionConfig) -> Callable[..., None]:
    """The compiled kernel of a config: from this process, else from the disk, else compiled.

    It takes the arguments of `ForwardAtSm90.__call__`, `BackwardAtSm90.__call__`,
    `DqAtSm90.__call__` or `DecodeSm90.__call__` but the stream, as torch tensors and numbers.
    """
    return load(config, compile_position_config)


def compile_position_config(config: PositionConfig) -> Any:
    """Compile the kernel of a config. Needs no GPU."""
    if isinstance(config, DecodeConfig):
        return compile_decode(config)
    if isinstance(config, ForwardConfig):
        return compile_forward_at(config)
    if isinstance(config, BackwardConfig):
        return compile_backward_at(config)
    return compile_dq_at(config)


def compile_forward_at(config: ForwardConfig) -> Any:
    """Compile without a GPU."""
    from sparse_flash.kernels.sm90.forward_at import ForwardAtSm90
    from sparse_flash.kernels.sm90.scored import ForwardAtScoredSm90

    of = Arguments(config)
    if config.scored:
        kernel = ForwardAtScoredSm90(config, of.dtype)
        return compile_kernel(kernel, of.forward_at(scored=True), config.arch)
    return compile_kernel(ForwardAtSm90(config, of.dtype), of.forward_at(), config.arch)


def compile_backward_at(config: BackwardConfig) -> Any:
    """Compile without a GPU."""
    from sparse_flash.kernels.sm90.backward_at import BackwardAtSm90

    of = Arguments(config)
    done = of.ints(of.b, of.h, of.size())
    return compile_kernel(BackwardAtSm90(config, of.dtype), of.backward(done), config.arch)


def compile_dq_at(config: DqConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward_at import DqAtSm90

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, dout, dq
        of.row_stats(64),  # tiles of the kernel over keys: 64 or 128
        of.ints(of.b),  # q_pad
        *of.positions(),
        *of.tiles(config.warpgroups),
        of.ints(2),  # counter
        of.splits(config.tile_m, config.head_dim),
        *(Int32(1), Int32(0), Int32(1), Float32(1.0), Float32(1.0)),
    )
    return compile_kernel(DqAtSm90(config, of.dtype), arguments, config.arch)


def compile_decode(config: DecodeConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.decode import DecodeSm90

    of = Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.splits_of_rows(),
        *of.positions(),
        *of.tiles(config.tile[0] // 64),
        *(Int32(0), Int32(1), Int32(1), Int32(1), Float32(1.0)),
    )
    return compile_kernel(DecodeSm90(config, of.dtype), arguments, config.arch)
