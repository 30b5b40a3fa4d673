"""From a config to a callable kernel, for all architectures."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

from sparse_flash.kernels.cache import load_or_compile
from sparse_flash.kernels.config import KernelConfig
from sparse_flash.kernels.schedule import WORK_FIELDS

Config = TypeVar("Config", bound=KernelConfig)
_lock = threading.Lock()


def load(config: Config, build: Callable[[Config], Any]) -> Callable[..., None]:
    """The compiled kernel of a config: from this process, else from the disk, else built (seconds).

    The config is the key. Concurrent threads compile it once.

    Args:
        config: Config of the kernel.
        build: Compiles it.

    Returns:
        A function of torch tensors and numbers that launches on torch's current stream.
    """
    key: Any = config  # hashable, as all frozen dataclasses
    with _lock:
        return _load(key, build)


@functools.cache
def _load(config: Any, build: Callable[[Any], Any]) -> Callable[..., None]:
    return load_or_compile(name_of(config), repr(config), lambda: build(config))


def name_of(config: KernelConfig) -> str:
    """A readable name: computation, architecture, dtype, head_dim and tile, and slots if several.

    >>> from sparse_flash.kernels.sm90.config import forward_configs
    >>> name_of(forward_configs("bfloat16", 64)[0])
    'forward-sm_90a-bfloat16-64-128x128'
    """
    computation = type(config).__name__.removesuffix("Config").lower()
    height, width = config.tile
    name = f"{computation}-{config.arch}-{config.dtype}-{config.head_dim}-{height}x{width}"
    slots = getattr(config, "slots", 1)
    return f"{name}-{slots}" if slots > 1 else name


class Arguments:
    """Arguments of a kernel for compilation: tensors without memory, with symbolic sizes."""

    def __init__(self, config: KernelConfig) -> None:
        import cutlass
        from cutlass import cute

        self.config: Any = config
        self.dtype = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}[config.dtype]
        self.size = cute.sym_int
        self.b, self.q_len, self.kv_len, self.h, self.h_kv = (self.size() for _ in range(5))
        self.d, self.num_splits = self.size(divisibility=8), self.size()
        self.d_v = self.d  # of values; kernels that take another width set it

    def with_value_width(self) -> Self:
        """The same, for values of another head_dim than queries and keys."""
        self.d_v = self.size(divisibility=8)
        return self

    def forward(self, scored: bool = False) -> tuple[Any, ...]:
        """All arguments of a forward kernel but the stream.

        scored: Whether it has score terms: see score_terms.py.
        """
        from cutlass import Float32, Int32

        height, _ = self.config.tile
        kv_lens, *lists = self.lists(height // 64)
        return (
            *(self.queries(), self.keys(), self.values(), self.outputs()),  # q, k, v, out
            self.floats(self.b, self.h, self.q_len),  # lse
            *(kv_lens, *self.terms(scored), *lists),
            self.ints(2),  # counter
            self.splits(height, self.config.head_dim),
            self.splits(height),
            *self.combine_arrays(),
            *(Int32(1), Float32(1.0)),
        )

    def forward_at(self, scored: bool = False) -> tuple[Any, ...]:
        """As `forward`, for queries at positions."""
        from cutlass import Float32, Int32

        return (
            *(self.queries(), self.keys(), self.values(), self.outputs()),  # q, k, v, out
            self.floats(self.b, self.h, self.q_len),  # lse
            *self.splits_of_rows(),
            *self.positions(self.terms(scored)),
            *self.tiles(self.config.tile[0] // 64),
            self.ints(2),  # counter
            *(Int32(1), Int32(0), Int32(1), Int32(1), Float32(1.0)),
        )

    def backward(self, *states: Any, scored: bool = False) -> tuple[Any, ...]:
        """All arguments of a backward kernel but the stream; at positions too.

        states: States of dQ's sums, for kernels that have them. scored: As of `forward`.
        """
        from cutlass import Float32, Int32

        config = self.config
        kv_lens, *lists = self.lists(-(-config.tile_n // 64))
        offsets = [self.ints(self.b) for _ in range(2 + scored)] if config.offsets else []
        return (
            *(self.queries(), self.keys(), self.values()),  # q, k, v
            *(self.outputs(), self.outputs()),  # out, dout
            *(self.floats(self.b, self.h, self.q_len) for _ in range(2)),  # lse, dlse
            self.compact(self.dtype, self.b, self.q_len, self.h, self.d),  # dq
            *(self.keys(), self.values()),  # dk, dv
            *states,
            self.ints(self.size(), self.b, self.h_kv),  # bounds
            self.floats(self.b, self.h, self.size(), config.dq_chunk),  # dq_sum
            self.row_stats(config.tile_m),
            *(kv_lens, *self.terms(scored), *offsets, *lists),  # offsets: q_pad, kv_starts, q_tops
            self.ints(2),  # counter
            *(self.splits(config.tile_n, config.head_dim) for _ in range(2)),
            *((self.ints(2),) if config.offsets else self.combine_arrays()),  # counts
            *(Int32(1), Int32(0), Float32(1.0), Float32(1.0)),
        )

    def bias_gradients(self) -> tuple[Any, ...]:
        """All arguments of a kernel of the gradients of biases but the stream."""
        from cutlass import Float32, Int32

        config = self.config
        kv_lens, *lists = self.lists(config.tile_n // 64)
        offsets = [self.ints(self.b) for _ in range(3)] if config.offsets else []
        return (
            *(self.queries(), self.keys(), self.values()),  # q, k, v
            *(self.outputs(), self.outputs()),  # out, dout
            *(self.floats(self.b, self.h, self.q_len) for _ in range(2)),  # lse, dlse
            self.row_stats(config.tile_m),
            *(kv_lens, *self.terms(True), *offsets, *lists),
            self.ints(2),  # counter
            *((self.ints(2),) if config.offsets else self.combine_arrays()),  # counts
            *(Int32(1), Int32(0), Float32(1.0)),
        )

    def terms(self, scored: bool) -> tuple[Any, ...]:
        """The `ScoreTerms` of the config, in a tuple; an empty one for kernels without."""
        from cutlass import Float32, Int32, cute
        from sparse_flash.kernels.score_terms import ScoreTerms

        def values(dtype: Any, size: Any) -> Any:
            return cute.runtime.make_fake_compact_tensor(
                dtype, (size,), stride_order=(0,), assumed_align=4
            )

        if not scored:
            return ()
        found: dict[str, Any] = {}
        if getattr(self.config, "alibi", False):
            found |= {"slopes": values(Float32, self.h), "slope_scale": Float32(1.0)}
        if self.config.softcap:
            found |= {"cap_scale": Float32(1.0)}
        if getattr(self.config, "sinks", False):  # of the forward pass alone
            found |= {"sinks": values(Float32, self.h)}
        if self.config.dropout:
            seed = values(Int32, 2)
            found |= {"seed": seed, "dropped": Int32(1), "keep_scale": Float32(1.0)}
        if self.config.distance_bias:
            length = self.size(divisibility=16)
            found |= {"bias": self.floats(self.h, 2, length)}
            found |= {"bias_rows": Int32(1), "bias_radius": Int32(1)}
        if getattr(self.config, "distance_grads", False):  # of the backward pass alone
            found |= {"bias_sums": self.sums(length)}
        return (ScoreTerms(**found, **self.image_terms()),)

    def image_terms(self) -> dict[str, Any]:
        """The fields of `ScoreTerms` of a bias by distances on an image."""
        found: dict[str, Any] = {}
        if getattr(self.config, "image_bias", False):
            size = self.size()
            found |= {"image": self.floats(self.h, size)}
            found |= {"image_numbers": self.ints(self.size(divisibility=16))}
            if getattr(self.config, "image_grads", False):
                found |= {"image_sums": self.sums(size)}
        if getattr(self.config, "fixed_sums", False):
            found |= {"sum_factors": self.floats(self.h)}
        return found

    def sums(self, length: Any) -> Any:
        """Sums of the gradients of a bias' values: (h, length)."""
        from cutlass import Float32, Int64

        fixed = getattr(self.config, "fixed_sums", False)
        return self.compact(Int64 if fixed else Float32, self.h, length)

    def queries(self) -> Any:
        """As q: (b, s_q, h, d)."""
        return self.strided(self.b, self.q_len, self.h, self.d)

    def keys(self) -> Any:
        """As k: (b, s_kv, h_kv, d)."""
        return self.strided(self.b, self.kv_len, self.h_kv, self.d)

    def values(self) -> Any:
        """As v: (b, s_kv, h_kv, d_v)."""
        return self.strided(self.b, self.kv_len, self.h_kv, self.d_v)

    def outputs(self) -> Any:
        """As out: (b, s_q, h, d_v)."""
        return self.strided(self.b, self.q_len, self.h, self.d_v)

    def row_stats(self, tile_m: int) -> Any:
        """Row statistics lse and delta: (b, h, 2, s_q rounded up to a multiple of tile_m)."""
        return self.floats(self.b, self.h, 2, self.size(divisibility=tile_m))

    def lists(self, groups: int) -> tuple[Any, ...]:
        """kv_lens, work items, tiles, and bits for this many warpgroups."""
        return self.ints(self.b), self.ints(self.size(), WORK_FIELDS), *self.tiles(groups)

    def tiles(self, groups: int) -> tuple[Any, ...]:
        """Tiles, and bits for this many warpgroups."""
        return self.ints(self.size(), 2), self.ints(self.size(), groups, 128, 2)

    def positions(self, terms: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """kv_lens, q_offset, kv_starts, terms, rows and pattern map of queries at positions."""
        offsets = tuple(self.ints(self.b) for _ in range(3))
        rows = self.ints(self.size(), self.size(), 4)
        return *offsets, *terms, rows, self.ints(self.size(), self.size())

    def splits_of_rows(self) -> tuple[Any, ...]:
        """Split arrays of all rows at positions: of O and of the logsumexp."""
        sizes = (self.b, self.q_len, self.h, self.config.head_dim)
        return self.floats(self.num_splits, *sizes), self.floats(
            self.num_splits, self.b, self.h, self.q_len
        )

    def splits(self, *shape: int) -> Any:
        """Buffers for the splits of rows or columns: (splits, *shape)."""
        return self.floats(self.num_splits, *shape)

    def combine_arrays(self) -> tuple[Any, ...]:
        """The combine list (rows, WORK_FIELDS), and the numbers of work tiles and rows (2,)."""
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


def compile_kernel(kernel: Any, arguments: tuple[Any, ...], arch: str) -> Any:
    """Compile for an architecture. Needs no GPU.

    Args:
        kernel: A `@cute.jit` callable that takes the arguments and then a stream, which is torch's
            current one at each call.
        arguments: Fake tensors (see `Arguments`) and numbers.
        arch: Compiler target, as "sm_90a".
    """
    from cutlass import cute

    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    options = f"--enable-tvm-ffi --gpu-arch {arch}"
    return cute.compile(kernel, *arguments, stream, options=options)
