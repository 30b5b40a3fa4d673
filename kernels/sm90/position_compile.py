"""The compiled Hopper kernels for queries at positions: their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel, load
from sparse_flash.kernels.sm90.config import BackwardConfig, DqConfig, ForwardConfig
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


class PositionArguments(Arguments):
    """Arguments of a kernel for queries at positions."""

    def positions(self) -> tuple[Any, ...]:
        """kv_lens, q_offset, kv_starts, rows and pattern map."""
        rows = self.ints(self.size(), self.size(), 4)
        return *(self.ints(self.b) for _ in range(3)), rows, self.ints(self.size(), self.size())

    def splits_of_rows(self, head_dim: int) -> tuple[Any, ...]:
        """Split arrays of all rows: of O and of the logsumexp."""
        out = self.floats(self.num_splits, self.b, self.q_len, self.h, head_dim)
        return out, self.floats(self.num_splits, self.b, self.h, self.q_len)


def compile_forward_at(config: ForwardConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.forward_at import ForwardAtSm90

    of = PositionArguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.splits_of_rows(config.head_dim),
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), config.warpgroups, 128, 2),  # bits
        of.ints(2),  # counter
        *(Int32(1), Int32(0), Int32(1), Int32(1), Float32(1.0)),
    )
    return compile_kernel(ForwardAtSm90(config, of.dtype), arguments, config.arch)


def compile_backward_at(config: BackwardConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward_at import BackwardAtSm90

    of = PositionArguments(config)
    kv_lens, *lists = of.lists(config.tile_n // 64)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, out, dout
        *(of.floats(of.b, of.h, of.q_len) for _ in range(2)),  # lse, dlse
        of.compact(of.dtype, of.b, of.q_len, of.h, of.d),  # dq
        *(of.keys(), of.keys()),  # dk, dv
        of.ints(of.b, of.h, of.size()),  # done
        of.ints(of.size(), of.b, of.h_kv),  # bounds
        of.floats(of.b, of.h, of.size(), config.dq_chunk),  # dq_sum
        of.row_stats(config.tile_m),
        *(kv_lens, of.ints(of.b), of.ints(of.b)),  # q_pad, kv_starts
        *lists,
        of.ints(2),  # counter
        *(of.splits(config.tile_n, config.head_dim) for _ in range(2)),
        of.ints(2),  # counts
        *(Int32(1), Int32(0), Float32(1.0), Float32(1.0)),
    )
    return compile_kernel(BackwardAtSm90(config, of.dtype), arguments, config.arch)


def compile_dq_at(config: DqConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward_at import DqAtSm90

    of = PositionArguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, dout, dq
        of.row_stats(64),  # tiles of the kernel over keys: 64 or 128
        of.ints(of.b),  # q_pad
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), config.warpgroups, 128, 2),  # bits
        of.ints(2),  # counter
        of.splits(config.tile_m, config.head_dim),
        *(Int32(1), Int32(0), Int32(1), Float32(1.0), Float32(1.0)),
    )
    return compile_kernel(DqAtSm90(config, of.dtype), arguments, config.arch)


def compile_decode(config: DecodeConfig) -> Any:
    """Compile without a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.decode import DecodeSm90

    of = PositionArguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.splits_of_rows(config.head_dim),
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), 2, 128, 2),  # bits
        *(Int32(0), Int32(1), Int32(1), Int32(1), Float32(1.0)),
    )
    return compile_kernel(DecodeSm90(config, of.dtype), arguments, config.arch)
