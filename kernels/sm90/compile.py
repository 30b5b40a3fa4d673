"""From a config to a callable kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.schedule import WORK_FIELDS
from sparse_flash.kernels.sm90.config import (
    BackwardConfig,
    Config,
    DecodeConfig,
    ForwardConfig,
    QueriesConfig,
)

_lock = threading.Lock()


def forward_kernel(config: ForwardConfig) -> Callable[..., None]:
    """The compiled forward kernel: from this process, else from the disk, else compiled (seconds).

    It takes the arguments of `ForwardSm90.__call__` but the stream, as torch tensors and numbers,
    and runs on torch's current stream.
    """
    return _locked("forward", config, compile_forward)


def backward_kernel(config: BackwardConfig) -> Callable[..., None]:
    """The compiled backward kernel, likewise, with the arguments of `BackwardSm90.__call__`."""
    kind = "keys" if not config.dq else "fixed" if config.fixed else "backward"
    return _locked(kind, config, compile_backward)


def queries_kernel(config: QueriesConfig) -> Callable[..., None]:
    """The compiled kernel for dQ by queries, likewise, with the arguments of `QueriesSm90`."""
    return _locked("queries", config, compile_queries)


def decode_kernel(config: DecodeConfig) -> Callable[..., None]:
    """The compiled kernel for one query, likewise, with the arguments of `DecodeSm90`."""
    return _locked("decode", config, compile_decode)


def forward_at_kernel(config: ForwardConfig) -> Callable[..., None]:
    """The compiled forward kernel with offsets, likewise: the arguments of `ForwardAtSm90`."""
    return _locked("forward-at", config, compile_forward_at)


def backward_at_kernel(config: BackwardConfig) -> Callable[..., None]:
    """The compiled backward kernel with offsets, likewise: the arguments of `BackwardAtSm90`."""
    return _locked("backward-at", config, compile_backward_at)


def queries_at_kernel(config: QueriesConfig) -> Callable[..., None]:
    """The compiled kernel for dQ with offsets, likewise: the arguments of `QueriesAtSm90`."""
    return _locked("queries-at", config, compile_queries_at)


def _locked(kind: str, config: Config, compiled: Callable[[Any], Any]) -> Callable[..., None]:
    with _lock:  # threads that come together compile once
        return _kernel(kind, config, compiled)


@functools.cache
def _kernel(kind: str, config: Config, compiled: Callable[[Any], Any]) -> Callable[..., None]:
    height, width = config.tile
    name = f"{kind}-{config.dtype}-{config.head_dim}-{height}x{width}"
    return load_or_compile(name, repr(config), lambda: compiled(config))


class _Arguments:
    """What a kernel is called with: tensors that have no memory, whose sizes are symbols."""

    def __init__(self, config: Config) -> None:
        import cutlass
        from cutlass import cute

        self.dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
        self.size = cute.sym_int
        self.b, self.q_len, self.kv_len, self.h, self.h_kv = (self.size() for _ in range(5))
        self.d, self.num_parts = self.size(divisibility=8), self.size()

    def queries(self) -> Any:
        """As q: (b, s_q, h, d)."""
        return self.strided(self.b, self.q_len, self.h, self.d)

    def keys(self) -> Any:
        """As k: (b, s_kv, h_kv, d)."""
        return self.strided(self.b, self.kv_len, self.h_kv, self.d)

    def statistics(self, tile_m: int) -> Any:
        """(b, h, 2, s_q rounded up to tiles of so many queries)."""
        return self.floats(self.b, self.h, 2, self.size(divisibility=tile_m))

    def lists(self, groups: int) -> tuple[Any, ...]:
        """kv_lens, work items, tiles, and bits for this many warpgroups."""
        items = self.ints(self.size(), WORK_FIELDS)
        tiles = self.ints(self.size(), 2)
        return self.ints(self.b), items, tiles, self.ints(self.size(), groups, 128, 2)

    def positions(self) -> tuple[Any, ...]:
        """kv_lens, q_offset, kv_starts, rows and pattern map."""
        rows = self.ints(self.size(), self.size())
        return *(self.ints(self.b) for _ in range(3)), rows, self.ints(self.size(), self.size())

    def all_rows(self, head_dim: int) -> tuple[Any, ...]:
        """Parts of all rows: of O and of their logsumexp."""
        out = self.floats(self.num_parts, self.b, self.q_len, self.h, head_dim)
        return out, self.floats(self.num_parts, self.b, self.h, self.q_len)

    def parts(self, *shape: int) -> Any:
        """Room for parts of split rows or columns."""
        return self.floats(self.num_parts, *shape)

    def sums(self) -> tuple[Any, ...]:
        """Which parts belong together, and how many items and sums there are."""
        return self.ints(self.size(), WORK_FIELDS), self.ints(2)

    def strided(self, *shape: Any) -> Any:
        """Of any strides that TMA can take: the last 1, the others multiples of 16 bytes."""
        from cutlass import cute

        stride: Any = (*(cute.sym_int64(divisibility=8) for _ in range(3)), 1)
        return cute.runtime.make_fake_tensor(self.dtype, shape, stride=stride, assumed_align=16)

    def floats(self, *shape: Any) -> Any:
        """In float32, contiguous."""
        from cutlass import Float32

        return self.compact(Float32, *shape)

    def ints(self, *shape: Any) -> Any:
        """In int32, contiguous."""
        from cutlass import Int32

        return self.compact(Int32, *shape)

    def compact(self, dtype: Any, *shape: Any) -> Any:
        """Contiguous."""
        from cutlass import cute

        order = tuple(reversed(range(len(shape))))
        return cute.runtime.make_fake_compact_tensor(
            dtype, shape, stride_order=order, assumed_align=16
        )


def compile_forward(config: ForwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.forward import ForwardSm90

    of = _Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.lists(config.warpgroups),
        of.ints(2),  # counter
        of.parts(config.tile_m, config.head_dim),
        of.parts(config.tile_m),
        *of.sums(),
        *(Int32(1), Float32(1.0)),
    )
    return _compile(ForwardSm90(config, of.dtype), arguments)


def compile_backward(config: BackwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward import BackwardSm90

    of = _Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, out, dout
        *(of.floats(of.b, of.h, of.q_len) for _ in range(2)),  # lse, dlse
        of.compact(of.dtype, of.b, of.q_len, of.h, of.d),  # dq
        *(of.keys(), of.keys()),  # dk, dv
        of.ints(of.b, of.h, of.size()),  # done
        of.ints(of.size(), of.b, of.h_kv),  # bounds
        of.floats(of.b, of.h, of.size(), config.dq_chunk),  # dq_sum
        of.statistics(config.tile_m),
        *of.lists(config.tile_n // 64),
        of.ints(2),  # counter
        *(of.parts(config.tile_n, config.head_dim) for _ in range(2)),
        *of.sums(),
        *(Int32(1), Int32(0), Float32(1.0), Float32(1.0)),
    )
    return _compile(BackwardSm90(config, of.dtype), arguments)


def compile_queries(config: QueriesConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.queries import QueriesSm90

    of = _Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, dout, dq
        of.statistics(64),  # tiles of the kernel over keys: 64 or 128
        *of.lists(config.warpgroups),
        of.ints(2),  # counter
        of.parts(config.tile_m, config.head_dim),
        *of.sums(),
        *(Int32(1), Float32(1.0), Float32(1.0)),
    )
    return _compile(QueriesSm90(config, of.dtype), arguments)


def compile_forward_at(config: ForwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.forward_at import ForwardAtSm90

    of = _Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), config.warpgroups, 128, 2),  # bits
        of.ints(2),  # counter
        *of.all_rows(config.head_dim),
        *(Int32(1), Int32(0), Int32(1), Int32(1), Float32(1.0)),
    )
    return _compile(ForwardAtSm90(config, of.dtype), arguments)


def compile_backward_at(config: BackwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward_at import BackwardAtSm90

    of = _Arguments(config)
    kv_lens, *lists = of.lists(config.tile_n // 64)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, out, dout
        *(of.floats(of.b, of.h, of.q_len) for _ in range(2)),  # lse, dlse
        of.compact(of.dtype, of.b, of.q_len, of.h, of.d),  # dq
        *(of.keys(), of.keys()),  # dk, dv
        of.ints(of.b, of.h, of.size()),  # done
        of.ints(of.size(), of.b, of.h_kv),  # bounds
        of.floats(of.b, of.h, of.size(), config.dq_chunk),  # dq_sum
        of.statistics(config.tile_m),
        *(kv_lens, of.ints(of.b), of.ints(of.b)),  # q_pad, kv_starts
        *lists,
        of.ints(2),  # counter
        *(of.parts(config.tile_n, config.head_dim) for _ in range(2)),
        of.ints(2),  # counts
        *(Int32(1), Int32(0), Float32(1.0), Float32(1.0)),
    )
    return _compile(BackwardAtSm90(config, of.dtype), arguments)


def compile_queries_at(config: QueriesConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.backward_at import QueriesAtSm90

    of = _Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries(), of.queries()),  # q, k, v, dout, dq
        of.statistics(64),  # tiles of the kernel over keys: 64 or 128
        of.ints(of.b),  # q_pad
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), config.warpgroups, 128, 2),  # bits
        of.ints(2),  # counter
        of.parts(config.tile_m, config.head_dim),
        *(Int32(1), Int32(0), Int32(1), Float32(1.0), Float32(1.0)),
    )
    return _compile(QueriesAtSm90(config, of.dtype), arguments)


def compile_decode(config: DecodeConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    from cutlass import Float32, Int32
    from sparse_flash.kernels.sm90.decode import DecodeSm90

    of = _Arguments(config)
    arguments = (
        *(of.queries(), of.keys(), of.keys(), of.queries()),  # q, k, v, out
        of.floats(of.b, of.h, of.q_len),  # lse
        *of.positions(),
        of.ints(of.size(), 2),  # tiles
        of.ints(of.size(), 2, 128, 2),  # bits
        *of.all_rows(config.head_dim),
        *(Int32(0), Int32(1), Int32(1), Int32(1), Float32(1.0)),
    )
    return _compile(DecodeSm90(config, of.dtype), arguments)


def _compile(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """With a stream after the arguments: torch's current one at each call."""
    from cutlass import cute

    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    options = f"--enable-tvm-ffi --gpu-arch {kernel.config.arch}"
    return cute.compile(kernel, *arguments, stream, options=options)
