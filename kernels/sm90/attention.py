"""Attention on Hopper: which calls the kernels can take, and how they are launched."""

from __future__ import annotations

import functools
import math

import torch
from sparse_flash.kernels.dsl import why_no_dsl
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.plans import DTYPES
from sparse_flash.kernels.sm90.compile import backward_kernel, forward_kernel, queries_kernel
from sparse_flash.kernels.sm90.config import (
    BackwardConfig,
    backward_config,
    forward_configs,
    queries_config,
)
from torch import Tensor

_LOG2_E = math.log2(math.e)


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, with the way out; None where they can."""
    if q.dtype not in DTYPES:
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
    kernel = _forward(DTYPES[q.dtype], d, tile_m)
    device = q.device
    out = torch.empty((b, s, h, d), dtype=q.dtype, device=device)
    lse = torch.empty((b, h, s), dtype=torch.float32, device=device)
    lens = whole if kv_lens is None else kv_lens.to(device, torch.int32).clamp(max=k.shape[1])
    before = (q, k, v, out, lse, lens, work, tiles, bits)
    after = (combine, counts)
    kernel.launch(before, num_parts, after, (softmax_scale * _LOG2_E,), device)
    return out, lse


def launch_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kind: str,
    plan: list[Tensor],
    by_queries: list[Tensor],
    kv_lens: Tensor | None,
    num_parts: list[int],
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) on torch's current stream.

    kind, plan: Of the schedule, and its arrays.
    by_queries: Those of a "queries" schedule where `kind` is "keys".
    num_parts: Of each of them.
    """
    b, s, h, d = q.shape
    device, dtype = q.device, DTYPES[q.dtype]
    config = backward_config(kind, dtype, d)
    dout = dout if _aligned(dout) else dout.contiguous()
    dq = torch.empty((b, s, h, d), dtype=q.dtype, device=device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (k, v))
    rows = -(-s // config.tile_m) * config.tile_m
    chunks = 2 * rows // config.tile_m if config.dq else 0
    dq_sum = torch.empty((b, h, chunks, config.dq_chunk), dtype=torch.float32, device=device)
    stats = torch.empty((b, h, 2, rows), dtype=torch.float32, device=device)
    done = torch.empty((b, h, chunks), dtype=torch.int32, device=device)
    bounds = torch.zeros((2 * config.fixed, b, k.shape[2]), dtype=torch.int32, device=device)
    work, tiles, bits, combine, whole, counts = plan
    lens = whole if kv_lens is None else kv_lens.to(device, torch.int32).clamp(max=k.shape[1])
    given = lse if dlse is None else dlse.contiguous()
    tensors = (
        q,
        k,
        v,
        out,
        dout,
        lse,
        given,
        dq,
        dk,
        dv,
        done,
        bounds,
        dq_sum,
        stats,
        lens,
    )
    before = (*tensors, work, tiles, bits)
    scales = (softmax_scale, softmax_scale * _LOG2_E)
    numbers = (int(dlse is not None), *scales)
    _backward(config).launch(before, num_parts[0], (combine, counts), numbers, device)
    if by_queries:
        work, tiles, bits, combine, _, counts = by_queries
        inputs = (q, k, v, dout, dq, stats, lens, work, tiles, bits)
        _queries(dtype, d).launch(inputs, num_parts[1], (combine, counts), scales, device)
    return dq, dk, dv


@functools.cache
def _forward(dtype: str, head_dim: int, tile_m: int) -> Kernel:
    config = next(c for c in forward_configs(dtype, head_dim) if c.tile_m == tile_m)
    parts = ((config.tile_m, config.head_dim), (config.tile_m,))
    return Kernel(forward_kernel(config), parts, work=6)


@functools.cache
def _backward(config: BackwardConfig) -> Kernel:
    parts = ((config.tile_n, config.head_dim),) * 2
    return Kernel(backward_kernel(config), parts, work=15)


@functools.cache
def _queries(dtype: str, head_dim: int) -> Kernel:
    config = queries_config(dtype, head_dim)
    return Kernel(queries_kernel(config), ((config.tile_m, config.head_dim),), work=7)


unsupported_reason = why_not
