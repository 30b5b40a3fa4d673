"""The compiled backward kernels: their arguments."""

from __future__ import annotations

from typing import Any

from sparse_flash.kernels.compile import Arguments, compile_kernel
from sparse_flash.kernels.sm80.backward_config import BackwardConfig


def compile_backward(config: BackwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm80.backward import BackwardSm80
    from sparse_flash.kernels.sm80.backward_at import BackwardAtSm80

    of = Arguments(config)
    kv_lens, *lists = of.lists(config.tile_n // 64)
    offsets = (of.ints(of.b), of.ints(of.b)) if config.offsets else ()  # q_pad, kv_starts
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, out, dout
        *(of.floats(of.b, of.h, of.q_len) for _ in range(2)),  # lse, dlse
        of.compact(of.dtype, of.b, of.q_len, of.h, of.d),  # dq
        *(of.keys(), of.keys()),  # dk, dv
        of.ints(of.size(), of.b, of.h_kv),  # bounds
        of.floats(of.b, of.h, of.size(), config.dq_chunk),  # dq_sum
        of.row_stats(config.tile_m),
        *(kv_lens, *offsets, *lists),
        of.ints(2),  # counter
        *(of.splits(config.tile_n, config.head_dim) for _ in range(2)),
        *((of.ints(2),) if config.offsets else of.combine_arrays()),  # counts
        *(Int32(1), Int32(0), Float32(1.0), Float32(1.0)),
    )
    kernel = BackwardAtSm80 if config.offsets else BackwardSm80
    return compile_kernel(kernel(config, of.dtype), arguments, config.arch)
