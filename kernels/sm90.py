"""Attention on Hopper: which calls the kernels can take, and how they are launched."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Callable

import torch
from sparse_flash.kernels.compile import forward_kernel
from sparse_flash.kernels.config import ForwardConfig, forward_configs
from sparse_flash.kernels.dsl import why_no_dsl
from sparse_flash.kernels.schedule import Schedule, best_config, schedule
from sparse_flash.masks.layout import BlockLayout, layout_by_number
from torch import Tensor

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_LOG2_E = math.log2(math.e)


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, with the way out; None where they can."""
    if q.dtype not in _DTYPES:
        return f"it computes bfloat16 and float16, not {q.dtype}: convert q, k and v"
    if not q.is_cuda:
        return f"it needs a Hopper GPU, but q is on {q.device}"
    head_dim = q.shape[3]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        return f"head_dim must be a multiple of 8 from 16 to 256, got {head_dim}: pad q, k and v"
    reason = _why_not_device(q.device.index)
    if reason:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not _aligned(x):
            return (
                f"{name} has strides {x.stride()}: the last must be 1, and all others, as the "
                f"address, multiples of 16 bytes: use {name}.contiguous()"
            )
    return None


@torch.compiler.assume_constant_result
def _why_not_device(index: int) -> str | None:
    if index not in _reasons:
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        _reasons[index] = (
            why_no_dsl()
            if (major, minor) == (9, 0)
            else f"it needs a Hopper GPU (compute capability 9.0), {name} has {major}.{minor}"
        )
    return _reasons[index]


_reasons: dict[int, str | None] = {}


def _aligned(x: Tensor) -> bool:
    """What TMA can load: the stride of a dimension of size 1 does not matter."""
    b, s, h, d = x.stride()
    # Dynamo cannot trace an offset; a compiled graph meets the kernel's own check of addresses.
    if d != 1 or (not torch.compiler.is_compiling() and x.storage_offset() % 8):
        return False
    return not ((b | s | h) % 8) or not any(
        stride % 8 and size > 1 for stride, size in zip((b, s, h), x.shape, strict=False)
    )


class _Schedules:
    """The schedules of layouts, kept as attributes of this object as long as their layouts live.

    As attributes, because that is what torch.compile can follow: it runs `name_of` while it
    traces, takes the name as a constant, and reads the schedule where it finds it in later calls.
    """

    def __init__(self) -> None:
        self.names: dict[tuple[int, ...], str] = {}

    @torch.compiler.assume_constant_result
    def name_of(
        self, number: int, batch: int, heads: int, head_dim: int, dtype: str, kv_bytes: int
    ) -> str:
        """The attribute that holds the schedule of this layout for such tensors; builds it."""
        key = (number, batch, heads, _bucket(dtype, head_dim), kv_bytes)
        name = self.names.get(key)
        if name is None:
            layout = layout_by_number(number)
            name = f"schedule_{next(_numbers)}"
            plan = best_schedule(layout, batch, heads, head_dim, dtype, kv_bytes)
            setattr(self, name, plan)
            self.names[key] = name
            layout.on_update.append(functools.partial(_follow, plan, batch, heads, kv_bytes))
            weakref.finalize(layout, self._forget, key)
        return name

    def _forget(self, key: tuple[int, ...]) -> None:
        delattr(self, self.names.pop(key))


def _follow(
    plan: Schedule, batch: int, heads: int, kv_bytes: int, layout: BlockLayout
) -> Callable[[], None]:
    """What makes this schedule that of another layout, in place."""
    new = schedule(layout, batch, heads, plan.tile, _num_sms(layout.device), kv_bytes)
    plan.check_room(new)
    return functools.partial(plan.update_, new)


_numbers = itertools.count()
_schedules = _Schedules()


@functools.cache
def _bucket(dtype: str, head_dim: int) -> int:
    return forward_configs(dtype, head_dim)[0].head_dim


def schedule_of(layout: BlockLayout, q: Tensor, k: Tensor) -> Schedule:
    """The schedule of a layout for these tensors: built once, kept as long as the layout."""
    batch, _, heads, head_dim = q.shape
    kv_bytes = 2 * k.shape[1] * head_dim * k.element_size()
    dtype = _DTYPES[q.dtype]
    name = _schedules.name_of(layout.number, batch, heads, head_dim, dtype, kv_bytes)
    return getattr(_schedules, name)


def best_schedule(
    layout: BlockLayout, batch: int, heads: int, head_dim: int, dtype: str, kv_bytes: int
) -> Schedule:
    """The schedule for the config that computes this layout soonest."""
    config = best_config(layout, forward_configs(dtype, head_dim))
    return schedule(layout, batch, heads, config.tile, _num_sms(layout.device), kv_bytes)


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    kv_lens: Tensor | None,
    num_parts: int,
    tile_m: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) on torch's current stream, by a schedule's `arrays()`, `num_parts` and tile.

    out is `(b, s, h, d)` in q's dtype, lse `(b, h, s)` float32.
    """
    work, tiles, bits, combine, whole, counts = plan
    b, s, h, d = q.shape
    if softmax_scale <= 0:  # the kernel takes maxima before it scales
        q = -q if softmax_scale < 0 else torch.zeros_like(q)
        softmax_scale = -softmax_scale or 1.0
    kernel = _loaded(_DTYPES[q.dtype], d, tile_m)
    device = q.device
    out = torch.empty((b, s, h, d), dtype=q.dtype, device=device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=device)
    lens = whole if kv_lens is None else kv_lens.to(device, torch.int32).clamp(max=k.shape[1])
    arguments = (q, k, v, out, lse, lens, work, tiles, bits)
    scale_log2 = softmax_scale * _LOG2_E
    if device.index == torch.cuda.current_device():
        kernel.run(arguments, (combine, counts), num_parts, scale_log2, device)
    else:
        with torch.cuda.device(device):
            kernel.run(arguments, (combine, counts), num_parts, scale_log2, device)
    return out, lse


@functools.cache
def _loaded(dtype: str, head_dim: int, tile_m: int) -> _Kernel:
    return _Kernel(next(c for c in forward_configs(dtype, head_dim) if c.tile_m == tile_m))


class _Kernel:
    """A compiled kernel, and what its launches on each device and stream need."""

    def __init__(self, config: ForwardConfig) -> None:
        self.function = forward_kernel(config)
        self.part = (config.tile_m, config.head_dim)
        self.num_ctas: dict[int, int] = {}  # of devices where it was launched
        self.no_parts: dict[int, tuple[Tensor, Tensor]] = {}
        self.counters: dict[tuple[int, int], Tensor] = {}

    def run(
        self,
        arguments: tuple[Tensor, ...],
        rest: tuple[Tensor, Tensor],
        num_parts: int,
        scale_log2: float,
        device: torch.device,
    ) -> None:
        """Launch on the current stream of the current device."""
        index = device.index
        counter = self.counter(index)
        out_parts, lse_parts = self.parts(num_parts, device)
        items = arguments[6].shape[0]
        ctas = max(1, min(items, self.num_ctas[index]))
        self.function(*arguments, counter, out_parts, lse_parts, *rest, ctas, scale_log2)

    def parts(self, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for the parts of split rows."""
        if number == 0 and device.index in self.no_parts:
            return self.no_parts[device.index]
        shape = (number, *self.part)
        out_parts = torch.empty(shape, dtype=torch.float32, device=device)
        lse_parts = torch.empty(shape[:2], dtype=torch.float32, device=device)
        if number == 0:
            self.no_parts[device.index] = out_parts, lse_parts
        return out_parts, lse_parts

    def counter(self, index: int) -> Tensor:
        """Zeros for a launch to count with; it leaves them zero.

        Launches that may overlap must not share them: each stream has its own, and so has each
        launch in a CUDA graph, whose replays may run on any stream.
        """
        if torch.cuda.is_current_stream_capturing():
            if index not in self.num_ctas:
                raise RuntimeError(
                    "the first launch of a kernel loads it, which a CUDA graph cannot capture: "
                    "run the same call once before the capture (see torch.cuda.graph: warm up)"
                )
            return torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")
        if index not in self.num_ctas:
            self.num_ctas[index] = _num_sms(torch.device("cuda", index))
        # As Triton does: torch.cuda.current_stream makes an object first, which takes longer.
        key = (index, torch._C._cuda_getCurrentRawStream(index))
        if key not in self.counters:
            self.counters[key] = torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")
        return self.counters[key]
