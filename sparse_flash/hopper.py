"""The Hopper implementation as PyTorch knows it: custom ops, and the derivative."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from sparse_flash.kernels.plan import PackedPlans, Plan, pack, unpack
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.config import ForwardConfig, config_from_text
from sparse_flash.masks import BlockLayout


@torch.library.custom_op("sparse_flash::sm90_forward", mutates_args=())
def sm90_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_lens: Tensor | None,
    softmax_scale: float,
    arrays: list[Tensor],
    sizes: list[int],
    configs: str,
) -> tuple[Tensor, Tensor]:
    """(out, lse); the plan comes packed: see `PackedPlans`."""
    (plan,) = unpack(arrays, sizes, configs, config_from_text)
    return sm90.forward(q, k, v, plan, kv_lens, softmax_scale, transient=True)


@sm90_forward.register_fake
def _(q, *_):  # type: ignore[no-untyped-def]
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
    kv_lens: Tensor | None,
    softmax_scale: float,
    arrays: list[Tensor],
    sizes: list[int],
    configs: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); the plans come packed: see `PackedPlans`."""
    plans = sm90.BackwardPlans(*unpack(arrays, sizes, configs, config_from_text))
    given = (dout, dlse, q, k, v, out, lse, plans, kv_lens, softmax_scale)
    return sm90.backward(*given, transient=True)


@sm90_backward.register_fake
def _(dout, dlse, q, k, v, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Attention(torch.autograd.Function):
    """Differentiable attention in eager mode, without the overhead of an op."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        softmax_scale: float,
        plan: Plan[ForwardConfig],
        plans: sm90.BackwardPlans,
    ) -> tuple[Tensor, Tensor]:
        ctx.plans, ctx.softmax_scale = plans, softmax_scale
        out, lse = sm90.forward(q, k, v, plan, kv_lens, softmax_scale)
        ctx.save_for_backward(q, k, v, out, lse, kv_lens)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = grads
        q, k, v, out, lse, kv_lens = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 7
        dout = torch.zeros_like(out) if dout is None else dout
        rest = (q, k, v, out, lse, ctx.plans, kv_lens, ctx.softmax_scale)
        return *sm90.backward(dout, dlse, *rest), None, None, None, None


class _CompiledAttention(torch.autograd.Function):
    """The same by ops, with plans as torch.compile can take them; see `PackedPlans`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        softmax_scale: float,
        arrays: list[Tensor],
        sizes: list[int],
        configs: str,
        back_arrays: list[Tensor],
        back_sizes: list[int],
        back_configs: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.sizes, ctx.configs, ctx.softmax_scale = back_sizes, back_configs, softmax_scale
        out, lse = sm90_forward(q, k, v, kv_lens, softmax_scale, arrays, sizes, configs)
        ctx.save_for_backward(q, k, v, out, lse, kv_lens, *back_arrays)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        dout, dlse = grads
        q, k, v, out, lse, kv_lens, *arrays = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 11
        dout = torch.zeros_like(out) if dout is None else dout
        rest = (kv_lens, ctx.softmax_scale, arrays, ctx.sizes, ctx.configs)
        return *sm90_backward(dout, dlse, q, k, v, out, lse, *rest), *(None,) * 8


@torch.compiler.assume_constant_result  # runs while torch.compile traces; its result is a constant
def _packed_forward(
    layout: BlockLayout, dtype: torch.dtype, q_shape: tuple[int, ...], kv_heads: int
) -> PackedPlans:
    return pack([sm90.forward_plan(layout, *_like(dtype, q_shape, kv_heads))])


@torch.compiler.assume_constant_result
def _packed_backward(
    layout: BlockLayout,
    dtype: torch.dtype,
    q_shape: tuple[int, ...],
    kv_heads: int,
    deterministic: bool,
) -> PackedPlans:
    like = _like(dtype, q_shape, kv_heads)
    return pack(sm90.backward_plans(layout, *like, deterministic).plans())


def _like(dtype: torch.dtype, q_shape: tuple[int, ...], kv_heads: int) -> tuple[Tensor, Tensor]:
    """Tensors without memory that stand for q and k."""
    b, _, _, d = q_shape
    return (
        torch.empty(q_shape, dtype=dtype, device="meta"),
        torch.empty((b, 1, kv_heads, d), dtype=dtype, device="meta"),
    )


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
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if torch.compiler.is_compiling():
        # operator.index: a size that varies is a symbol to torch.compile, and a plan is for one.
        q_shape = tuple(operator.index(size) for size in q.shape)
        like = (layout, q.dtype, q_shape, operator.index(k.shape[2]))
        arrays, sizes, configs = _packed_forward(*like)
        plan = (arrays, sizes, configs)
        if not grad:
            return sm90_forward(q, k, v, kv_lens, softmax_scale, *plan)
        arrays, sizes, configs = _packed_backward(*like, deterministic)
        given = (q, k, v, kv_lens, softmax_scale, *plan, arrays, sizes, configs)
        return _CompiledAttention.apply(*given)
    forward_plan = sm90.forward_plan(layout, q, k)
    if not grad:
        return sm90.forward(q, k, v, forward_plan, kv_lens, softmax_scale)
    plans = sm90.backward_plans(layout, q, k, deterministic)
    return _Attention.apply(q, k, v, kv_lens, softmax_scale, forward_plan, plans)


def why_not(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why this implementation cannot run these inputs; None where it can."""
    return sm90.unsupported_reason(q, k, v)
