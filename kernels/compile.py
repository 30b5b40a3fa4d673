"""From a config to a callable kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.config import (
    WORK_FIELDS,
    BackwardConfig,
    ForwardConfig,
    QueriesConfig,
)

_lock = threading.Lock()


def forward_kernel(config: ForwardConfig) -> Callable[..., None]:
    """The compiled forward kernel: from this process, else from the disk, else compiled (seconds).

    It takes the arguments of `ForwardSm90.__call__` but the stream, as torch tensors and numbers,
    and runs on torch's current stream.
    """
    with _lock:
        return _forward_kernel(config)


def backward_kernel(config: BackwardConfig) -> Callable[..., None]:
    """The compiled backward kernel, likewise, with the arguments of `BackwardSm90.__call__`."""
    with _lock:
        return _backward_kernel(config)


def queries_kernel(config: QueriesConfig) -> Callable[..., None]:
    """The compiled kernel for dQ by queries, likewise, with the arguments of `QueriesSm90`."""
    with _lock:
        return _queries_kernel(config)


@functools.cache
def _queries_kernel(config: QueriesConfig) -> Callable[..., None]:
    name = f"queries-{config.dtype}-{config.head_dim}-{config.tile_m}x{config.tile_n}"
    return load_or_compile(name, repr(config), lambda: compile_queries(config))


@functools.cache
def _backward_kernel(config: BackwardConfig) -> Callable[..., None]:
    kind = "keys" if not config.dq else "ordered" if config.ordered else "backward"
    name = f"{kind}-{config.dtype}-{config.head_dim}-{config.tile_n}x{config.tile_m}"
    return load_or_compile(name, repr(config), lambda: compile_backward(config))


@functools.cache
def _forward_kernel(config: ForwardConfig) -> Callable[..., None]:
    name = f"forward-{config.dtype}-{config.head_dim}-{config.tile_m}x{config.tile_n}"
    return load_or_compile(name, repr(config), lambda: compile_forward(config))


def _strided(dtype: Any, *shape: Any) -> Any:
    """A tensor of any strides that TMA can take: the last 1, the others multiples of 16 bytes."""
    from cutlass import cute

    stride: Any = (*(cute.sym_int64(divisibility=8) for _ in range(3)), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=16)


def _compact(dtype: Any, *shape: Any) -> Any:
    from cutlass import cute

    order = tuple(reversed(range(len(shape))))
    return cute.runtime.make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=16)


def _compile(kernel: Any, arguments: tuple[Any, ...]) -> Any:
    """With a stream after the arguments: torch's current one at each call."""
    from cutlass import cute

    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    options = f"--enable-tvm-ffi --gpu-arch {kernel.config.arch}"
    return cute.compile(kernel, *arguments, stream, options=options)


def compile_forward(config: ForwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    import cutlass
    from cutlass import Float32, Int32, cute
    from sparse_flash.kernels.forward_sm90 import ForwardSm90

    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
    size, strided = cute.sym_int, functools.partial(_strided, dtype)
    b, q_len, kv_len, h, h_kv, d = (*(size() for _ in range(5)), size(divisibility=8))
    parts = size()
    arguments = (
        strided(b, q_len, h, d),
        strided(b, kv_len, h_kv, d),
        strided(b, kv_len, h_kv, d),
        strided(b, q_len, h, d),
        _compact(Float32, b, h, q_len),
        _compact(Int32, b),
        _compact(Int32, size(), WORK_FIELDS),
        _compact(Int32, size(), 2),
        _compact(Int32, size(), config.warpgroups, 128, 2),
        _compact(Int32, 2),
        _compact(Float32, parts, config.tile_m, config.head_dim),
        _compact(Float32, parts, config.tile_m),
        _compact(Int32, size(), WORK_FIELDS),
        _compact(Int32, 2),
        Int32(1),
        Float32(1.0),
    )
    return _compile(ForwardSm90(config, dtype), arguments)


def compile_backward(config: BackwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    import cutlass
    from cutlass import Float32, Int32, cute
    from sparse_flash.kernels.backward_sm90 import BackwardSm90

    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
    size, strided = cute.sym_int, functools.partial(_strided, dtype)
    b, q_len, kv_len, h, h_kv, d = (*(size() for _ in range(5)), size(divisibility=8))
    parts = size()
    arguments = (
        strided(b, q_len, h, d),
        strided(b, kv_len, h_kv, d),
        strided(b, kv_len, h_kv, d),
        strided(b, q_len, h, d),
        strided(b, q_len, h, d),
        _compact(Float32, b, h, q_len),
        _compact(Float32, b, h, q_len),
        _compact(dtype, b, q_len, h, d),
        strided(b, kv_len, h_kv, d),
        strided(b, kv_len, h_kv, d),
        _compact(Int32, b, h, size()),
        _compact(Float32, b, h, size(), config.dq_chunk),
        _compact(Float32, b, h, 2, size(divisibility=64)),
        _compact(Int32, b),
        _compact(Int32, size(), WORK_FIELDS),
        _compact(Int32, size(), 2),
        _compact(Int32, size(), config.tile_n // 64, 128, 2),
        _compact(Int32, size()),
        _compact(Int32, 2),
        _compact(Float32, parts, config.tile_n, config.head_dim),
        _compact(Float32, parts, config.tile_n, config.head_dim),
        _compact(Int32, size(), WORK_FIELDS),
        _compact(Int32, 2),
        Int32(1),
        Int32(0),
        Float32(1.0),
        Float32(1.0),
    )
    return _compile(BackwardSm90(config, dtype), arguments)


def compile_queries(config: QueriesConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    import cutlass
    from cutlass import Float32, Int32, cute
    from sparse_flash.kernels.queries_sm90 import QueriesSm90

    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
    size, strided = cute.sym_int, functools.partial(_strided, dtype)
    b, q_len, kv_len, h, h_kv, d = (*(size() for _ in range(5)), size(divisibility=8))
    arguments = (
        strided(b, q_len, h, d),
        strided(b, kv_len, h_kv, d),
        strided(b, kv_len, h_kv, d),
        strided(b, q_len, h, d),
        strided(b, q_len, h, d),
        _compact(Float32, b, h, 2, size(divisibility=64)),
        _compact(Int32, b),
        _compact(Int32, size(), WORK_FIELDS),
        _compact(Int32, size(), 2),
        _compact(Int32, size(), config.warpgroups, 128, 2),
        _compact(Int32, 2),
        _compact(Float32, size(), config.tile_m, config.head_dim),
        _compact(Int32, size(), WORK_FIELDS),
        _compact(Int32, 2),
        Int32(1),
        Float32(1.0),
        Float32(1.0),
    )
    return _compile(QueriesSm90(config, dtype), arguments)
