"""Attention and its gradients, for the kernels of all architectures: checks of tensors, and the
arguments of a launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.dsl import dsl_unsupported_reason
from sparse_flash.kernels.plan import Plan, Planner, fitting
from sparse_flash.masks.layout import BlockLayout
from torch import Tensor

DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
HEAD_DIMS = range(16, 257, 8)
LOG2_E = math.log2(math.e)


def unsupported_reason(
    q: Tensor, k: Tensor, v: Tensor, gpu: str, unsupported_gpu: Callable[[str, str], str | None]
) -> str | None:
    """Why kernels cannot take these tensors, with the way out; None where they can.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        gpu: The GPU that the kernels need, for the message.
        unsupported_gpu: Returns why a GPU is not one of these, from its architecture ("sm_80") and
            from its name with its compute capability.
    """
    if q.dtype not in DTYPES:
        return f"it computes bfloat16 and float16, not {q.dtype}: convert q, k and v"
    if not q.is_cuda:
        return f"it needs {gpu}, but q is on {q.device}"
    if q.shape[3] not in HEAD_DIMS:
        return f"head_dim must be a multiple of 8 from 16 to 256, got {q.shape[3]}: pad q, k and v"
    arch = DeviceFacts.of(q.device).arch
    gpu_name = torch.cuda.get_device_name(q.device)
    reason = unsupported_gpu(arch, f"{gpu_name} has {arch[3:-1]}.{arch[-1]}")
    reason = reason or dsl_unsupported_reason()
    if reason:
        return reason
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not is_aligned(x):
            return (
                f"{name} has strides {x.stride()}: the last must be 1, and all others, as the "
                f"address, multiples of 16 bytes: use {name}.contiguous()"
            )
    if v.shape[3] not in HEAD_DIMS:
        return f"head_dim of v must be a multiple of 8 from 16 to 256, got {v.shape[3]}: pad v"
    return None


def unsupported_blocks(layout: BlockLayout, planners: Sequence[Planner[Any]]) -> str | None:
    """Why kernels cannot take a layout of data with such blocks; None where they can.

    planners: The planners of all passes.
    """
    if all(fitting(layout, planner) for planner in planners):
        return None
    return (
        f"a layout of data on the device has blocks of {layout.block}, which do not fit its tiles: "
        "take powers of two, at least 16 queries and 32 keys, or pass layout.fixed()"
    )


def is_aligned(x: Tensor) -> bool:
    """Whether kernels can load it, 16 bytes at a time: the stride of a dimension of size 1 does not
    matter.
    """
    b, s, h, d = x.stride()
    # Dynamo cannot trace an offset; a compiled graph meets the kernel's own check of addresses.
    if d != 1 or (not torch.compiler.is_compiling() and x.storage_offset() % 8):
        return False
    return not ((b | s | h) % 8) or not any(
        stride % 8 and size > 1 for stride, size in zip((b, s, h), x.shape, strict=False)
    )


def with_positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """Queries and a positive scale with the same logits: kernels take maxima before they scale."""
    if softmax_scale > 0:
        return q, softmax_scale
    return (-q if softmax_scale < 0 else torch.zeros_like(q)), -softmax_scale or 1.0


def lengths_of(plan: Plan[Any], kv_lens: Tensor | None, k: Tensor) -> Tensor:
    """Number of valid keys per batch entry, int32 (b,), on k's device. None given: the plan's."""
    if kv_lens is None:
        return plan.schedule.kv_lens
    return kv_lens.to(k.device, torch.int32).clamp(0, k.shape[1])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan[Any],
    kv_lens: Tensor | None,
    softmax_scale: float,
    *,
    transient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention on torch's current stream: (out, lse).

    Args:
        q: Queries `(b, s, h, d)`, bfloat16 or float16, with strides as in `is_aligned`.
        k: Keys `(b, s_kv, h_kv, d)`.
        v: Values, shaped as the keys.
        plan: Plan of a forward kernel, with its kernel bound.
        kv_lens: Number of valid keys per batch entry, int `(b,)`, on any device. None: all.
        softmax_scale: Factor of the logits, of any sign.
        transient: As in `Kernel.launch`.

    Returns:
        out `(b, s, h, d)` in q's dtype, and lse `(b, h, s)` in float32.
    """
    b, s, h, d = q.shape
    if softmax_scale <= 0:
        q, softmax_scale = with_positive_scale(q, softmax_scale)
    if v.shape[3] == d:  # the host takes less time for this
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        out = q.new_empty((b, s, h, v.shape[3]))
    assert out.data_ptr(), "meta and fake tensors have no memory to launch on"
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    lens = plan.schedule.kv_lens if kv_lens is None else lengths_of(plan, kv_lens, k)
    inputs = (q, k, v, out, lse, lens)
    assert plan.kernel is not None
    plan.kernel.launch(inputs, plan, (softmax_scale * LOG2_E,), q.device, transient)
    return out, lse


class GradientTensors(NamedTuple):
    """What every kernel of a backward pass takes of a call.

    inputs: q, k, v, out, dout, lse and dlse.
    dq, dk, dv: The results, contiguous, without values.
    scalars: Whether dlse counts (0 or 1), the softmax scale, and the same in base 2.
    """

    inputs: tuple[Tensor, ...]
    dq: Tensor
    dk: Tensor
    dv: Tensor
    scalars: tuple[float, ...]

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        return self.dq, self.dk, self.dv


def gradient_tensors(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    *,
    zeros: bool = False,
) -> GradientTensors:
    """The tensors of a backward pass.

    Args:
        dout: Gradient of out `(b, s, h, d)`, of any strides.
        dlse: Gradient of lse `(b, h, s)`, float32, of any strides. None: zeros.
        q: Queries; they, k, v and softmax_scale are those of `forward`.
        k: Keys.
        v: Values.
        out: Output of `forward`.
        lse: Output of `forward`.
        softmax_scale: Factor of the logits.
        zeros: dk and dv are zeros: the kernels write only the keys of listed tiles.
    """
    dout = dout if is_aligned(dout) else dout.contiguous()
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    assert dq.data_ptr(), "meta and fake tensors have no memory to launch on"
    new = torch.zeros_like if zeros else torch.empty_like
    dk, dv = (new(x, memory_format=torch.contiguous_format) for x in (k, v))
    given = lse if dlse is None else dlse.contiguous()
    scalars = (0 if dlse is None else 1, softmax_scale, softmax_scale * LOG2_E)
    return GradientTensors((q, k, v, out, dout, lse, given), dq, dk, dv, scalars)


def row_tiles_of(config: Any, q: Tensor) -> int:
    """Tiles of queries of a head; at positions a tile may begin before query 0."""
    return -(-q.shape[1] // config.tile_m) + config.offsets


def bounds_and_statistics(config: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds for fixed-point sums, zeros (see `preprocess.Bounds`), and the row statistics lse and
    delta, without values.
    """
    (b, _, h, _), h_kv = q.shape, k.shape[2]
    rows = row_tiles_of(config, q) * config.tile_m
    bounds = torch.zeros((2 * config.fixed_point, b, h_kv), dtype=torch.int32, device=q.device)
    return bounds, torch.empty((b, h, 2, rows), dtype=torch.float32, device=q.device)
