"""The Hopper implementation as PyTorch knows it: custom ops, and the derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_flash.kernels.plans import schedule_of
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.config import kernel_of
from sparse_flash.masks import BlockLayout


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


@torch.library.custom_op("sparse_flash::sm90_backward", mutates_args=())
def sm90_backward(
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
    """(dq, dk, dv); schedules come as their arrays and the numbers of their parts."""
    return sm90.launch_backward(
        dout, dlse, q, k, v, out, lse, kind, plan, by_queries, kv_lens, num_parts, softmax_scale
    )


@sm90_backward.register_fake
def _(dout, dlse, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """By the op where a compiler looks, which must see one; else without its overhead."""
    return (sm90_forward if torch.compiler.is_compiling() else sm90.launch)(*arguments)


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (sm90_backward if torch.compiler.is_compiling() else sm90.launch_backward)(*arguments)


class _Attention(torch.autograd.Function):
    """Differentiable attention. Schedules come as their arrays, for torch.compile.

    sizes: num_parts and tile_m of the forward's schedule.
    kinds: Of the backward's schedule, or of both its schedules; see `schedule_of`.
    back: Their arrays.
    back_parts: num_parts of each of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        plan: list[Tensor],
        sizes: tuple[int, int],
        kinds: tuple[str, ...],
        back: list[Tensor],
        back_parts: list[int],
        softmax_scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.kinds, ctx.back_parts, ctx.softmax_scale = kinds, back_parts, softmax_scale
        out, lse = _forward(q, k, v, plan, kv_lens, *sizes, softmax_scale)
        ctx.save_for_backward(q, k, v, out, lse, kv_lens, *back)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = grads
        q, k, v, out, lse, kv_lens, *back = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 10
        dout = torch.zeros_like(out) if dout is None else dout
        size = len(back) // len(ctx.back_parts)
        rest = (ctx.kinds[0], back[:size], back[size:], kv_lens, ctx.back_parts, ctx.softmax_scale)
        gradients = _backward(dout, dlse, q, k, v, out, lse, *rest)
        return *gradients, *(None,) * 7


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
    plan = schedule_of("forward", layout, q, k)
    arrays, sizes = plan.arrays(), (plan.num_parts, plan.tile[0])
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        return _forward(q, k, v, arrays, kv_lens, *sizes, softmax_scale)
    kinds = _backward_kinds(q.shape[3], deterministic)
    plans = [schedule_of(kind, layout, q, k) for kind in kinds]
    kinds = tuple(kernel_of(kind, plan.tile) for kind, plan in zip(kinds, plans, strict=True))
    back = [x for plan in plans for x in plan.arrays()]
    parts = [plan.num_parts for plan in plans]
    return _Attention.apply(q, k, v, kv_lens, arrays, sizes, kinds, back, parts, softmax_scale)


def _backward_kinds(head_dim: int, deterministic: bool) -> tuple[str, ...]:
    """Which kernels compute the gradients.

    One for all of them adds up dQ in memory, in any order: in float32, or, where the result is to
    be the same every time, in fixed point. Where that has no room, two kernels, whose results are
    repeatable anyway, compute dK and dV, and dQ: seven products instead of five.
    """
    if head_dim > 128:
        return ("keys", "queries")
    return ("fixed",) if deterministic else ("backward",)


def why_not(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why this implementation cannot run these inputs; None where it can."""
    return sm90.why_not(q, k, v)
