"""The derivatives of attention, for every implementation.

The backward pass is a function of its own, so that second derivatives and forward mode, which no
implementation has, are refused instead of being silently zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import Implementation

Tensors = tuple[Tensor, ...]
_WAY_OUT = (
    "Compute this part with dense attention that PyTorch differentiates, such as "
    "scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) of torch.nn.attention"
)


def refuse_second_derivative(*_: Any) -> NoReturn:
    """Raise: gradients of gradients."""
    raise NotImplementedError(
        "block_sparse_attention has no second derivative (create_graph=True, gradient penalties, "
        f"torch.func.hessian). {_WAY_OUT}."
    )


def refuse_forward_mode(*_: Any) -> NoReturn:
    """Raise: tangents."""
    raise NotImplementedError(
        "block_sparse_attention has no forward-mode derivative (torch.func.jvp, jacfwd, "
        f"forward_ad); torch.func.grad, vjp and jacrev work. {_WAY_OUT}."
    )


def attend(call: AttentionCall, implementation: Implementation) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable where an input requires gradients."""
    if torch.autograd.forward_ad._current_level >= 0:
        _check_no_tangents(call)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _Transformed.apply(call, implementation, *call.tensors)
    if call.needs_grad:
        return _Attention.apply(call, implementation, *call.tensors)
    return implementation.attend(call)


def _check_no_tangents(call: AttentionCall) -> None:
    for x in (call.q, call.k, call.v):
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            refuse_forward_mode()


def _save(
    ctx: Any,
    call: AttentionCall,
    implementation: Implementation,
    tensors: tuple[Tensor | None, ...],
    output: Tensors,
) -> None:
    ctx.call, ctx.implementation = call.without_tensors(), implementation
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """The gradients of (call, implementation, *tensors)."""
    out, lse, *tensors = ctx.saved_tensors
    rest = (None,) * (len(tensors) - 3)
    if dout is None and dlse is None:
        return (None,) * 5 + rest
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = (ctx.call, ctx.implementation, out, lse, dout, dlse, *tensors)
    if torch.is_grad_enabled():  # create_graph=True
        return None, None, *_Gradients.apply(*inputs), *rest
    return None, None, *_Gradients.forward(*inputs), *rest


class _Attention(torch.autograd.Function):
    """(out, lse) of the tensors of a call."""

    @staticmethod
    def forward(
        ctx: Any, call: AttentionCall, implementation: Implementation, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output = implementation.attend(call)
        _save(ctx, call, implementation, tensors, output)
        return output

    backward = staticmethod(_backward)
    jvp: Any = staticmethod(refuse_forward_mode)


class _Transformed(torch.autograd.Function):
    """The same for torch.func, whose form of a Function costs the host several times as much."""

    @staticmethod
    def forward(
        call: AttentionCall, implementation: Implementation, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return implementation.attend(call.with_tensors(tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        call, implementation, *tensors = inputs
        _save(ctx, call, implementation, tuple(tensors), output)

    backward = staticmethod(_backward)
    jvp: Any = staticmethod(refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        return one_by_one(_Transformed.apply, info.batch_size, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """(dq, dk, dv), which have no derivatives."""

    @staticmethod
    def forward(
        call: AttentionCall,
        implementation: Implementation,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensors:
        return implementation.gradients(call.with_tensors(tensors), out, lse, dout, dlse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    backward: Any = staticmethod(refuse_second_derivative)
    jvp: Any = staticmethod(refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        return one_by_one(_Gradients.apply, info.batch_size, in_dims, inputs)


def one_by_one(
    apply: Callable[..., Tensors],
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
) -> tuple[Tensors, tuple[int, ...]]:
    """A call for each entry of a vmapped dimension; results are stacked along dimension 0."""
    results = []
    for i in range(size):
        entries = (
            x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims, strict=True)
        )
        results.append(apply(*entries))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
