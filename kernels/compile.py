"""From a config to a callable kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.config import WORK_FIELDS, ForwardConfig

_lock = threading.Lock()


def forward_kernel(config: ForwardConfig) -> Callable[..., None]:
    """The compiled forward kernel: from this process, else from the disk, else compiled (seconds).

    It takes the arguments of `ForwardSm90.__call__` but the stream, as torch tensors and numbers,
    and runs on torch's current stream.
    """
    with _lock:
        return _forward_kernel(config)


@functools.cache
def _forward_kernel(config: ForwardConfig) -> Callable[..., None]:
    name = f"forward-{config.dtype}-{config.head_dim}-{config.tile_m}x{config.tile_n}"
    return load_or_compile(name, repr(config), lambda: compile_forward(config))


def compile_forward(config: ForwardConfig) -> Any:
    """Compile, whether or not there is a GPU."""
    import cutlass
    from cutlass import Float32, Int32, cute
    from sparse_flash.kernels.forward_sm90 import ForwardSm90

    dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
    size = cute.sym_int

    def strided(*shape: Any) -> Any:
        """Any strides that TMA can take: the last 1, the others multiples of 16 bytes."""
        stride: Any = (*(cute.sym_int64(divisibility=8) for _ in range(3)), 1)
        return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=16)

    def compact(kind: Any, *shape: Any) -> Any:
        order = tuple(reversed(range(len(shape))))
        return cute.runtime.make_fake_compact_tensor(
            kind, shape, stride_order=order, assumed_align=16
        )

    b, q_len, kv_len, h, h_kv, d = (*(size() for _ in range(5)), size(divisibility=8))
    parts = size()
    arguments = (
        strided(b, q_len, h, d),
        strided(b, kv_len, h_kv, d),
        strided(b, kv_len, h_kv, d),
        strided(b, q_len, h, d),
        compact(Float32, b, h, q_len),
        compact(Int32, b),
        compact(Int32, size(), WORK_FIELDS),
        compact(Int32, size(), 2),
        compact(Int32, size(), config.warpgroups, 128, 2),
        compact(Int32, 2),
        compact(Float32, parts, config.tile_m, config.head_dim),
        compact(Float32, parts, config.tile_m),
        compact(Int32, size(), WORK_FIELDS),
        compact(Int32, 2),
        Int32(1),
        Float32(1.0),
        cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True),
    )
    options = f"--enable-tvm-ffi --gpu-arch {config.arch}"
    return cute.compile(ForwardSm90(config, dtype), *arguments, options=options)
