"""The Hopper implementation as PyTorch knows it: a custom op, and its derivative.

The backward pass is the reference implementation's, from the forward's output and logsumexp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_flash.kernels import sm90
from sparse_flash.masks import BlockLayout
from sparse_flash.reference import reference_backward


@torch.library.custom_op("sparse_flash::sm90_forward", mutates_args=())
def sm90_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: list[Tensor],
    kv_lens: Tensor | None,
    num_parts: int,
    tile_m: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse); the schedule comes as its arrays, the number of its parts and its tile_m."""
    return sm90.launch(q, k, v, plan, kv_lens, num_parts, tile_m, softmax_scale)


@sm90_forward.register_fake
def _(q, k, v, plan, kv_lens, num_parts, tile_m, softmax_scale):  # type: ignore[no-untyped-def]
    b, s, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((b, h, s), dtype=torch.float32)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By the op where a compiler looks, which must see one; else without its overhead."""
    return (sm90_forward if torch.compiler.is_compiling() else sm90.launch)(*arguments)


class _Attention(torch.autograd.Function):
    """Differentiable attention. `layout` are a layout's arrays; tensors only, for torch.compile."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        plan: list[Tensor],
        layout: list[Tensor],
        sizes: tuple[int, int, tuple[int, int], float, bool],
    ) -> tuple[Tensor, Tensor]:
        num_parts, tile_m, *ctx.options = sizes
        out, lse = _forward(q, k, v, plan, kv_lens, num_parts, tile_m, sizes[3])
        ctx.save_for_backward(q, k, v, out, lse, kv_lens, *layout)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = grads
        q, k, v, out, lse, kv_lens, *layout = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 7
        dout = torch.zeros_like(out) if dout is None else dout
        block, *options = ctx.options
        dq, dk, dv = reference_backward(
            dout, dlse, q, k, v, out, lse, *layout, list(block), kv_lens, *options
        )
        return dq, dk, dv, None, None, None, None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kv_lens: Tensor | None,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of validated inputs."""
    plan = sm90.schedule_of(layout, q, k)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        sizes = (plan.num_parts, plan.tile[0], layout.block, softmax_scale, deterministic)
        arrays = list(layout.arrays().values())
        return _Attention.apply(q, k, v, kv_lens, plan.arrays(), arrays, sizes)
    return _forward(q, k, v, plan.arrays(), kv_lens, plan.num_parts, plan.tile[0], softmax_scale)


def why_not(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why this implementation cannot run these inputs; None where it can."""
    return sm90.why_not(q, k, v)
