"""The derivatives of attention, for every implementation.

The backward pass is a function of its own, so that second derivatives and forward mode, which no
implementation has, are refused instead of being silently zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse_flash.call import NUM_DIFFERENTIABLE, TERM_TENSORS, AttentionCall, ScoreTerms
from sparse_flash.implementations import Implementation
from sparse_flash.masks import BlockLayout, Mask

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


def refuse_batches_of_gradients() -> NoReturn:
    """Raise: PyTorch's older vmap, which does not know functions with a backward of their own."""
    raise NotImplementedError(
        "block_sparse_attention takes no batches of gradients (is_grads_batched=True, "
        "torch.autograd.functional.jacobian with vectorize=True): use torch.func.jacrev, or "
        "torch.func.vmap over the function of torch.func.vjp"
    )


def attend(
    call: AttentionCall, implementation: Implementation, *, return_lse: bool = True
) -> tuple[Tensor, Any]:
    """(out, lse), differentiable where an input requires gradients; lse is a Tensor if asked for.

    A function with one result costs less host time.
    """
    if _forward_ad._current_level >= 0:
        _check_no_tangents(call)
    if _peek_interpreter_stack() is not None:
        return _Transformed.apply((call, implementation), *call.tensors)
    if not call.needs_grad:
        return implementation.attend(call)
    # Fewer tensors cost less host time, too.
    if call.kv_lens is call.q_offset is call.kv_starts is call.terms is None:
        tensors: tuple[Tensor | None, ...] = (call.q, call.k, call.v)
    else:
        tensors = call.tensors
    if return_lse:
        return _apply((call, implementation), *tensors)
    return _apply_for_out((call, implementation), *tensors), None


_forward_ad = torch.autograd.forward_ad
_peek_interpreter_stack = torch._C._functorch.peek_interpreter_stack
Bound = tuple[AttentionCall, Implementation]


def _check_no_tangents(call: AttentionCall) -> None:
    for x in call.tensors:
        if x is None or not x.is_floating_point():
            continue
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            refuse_forward_mode()


def pattern_of(source: Any) -> Any:
    """An object that differs after a change of the pattern; None where nothing can change."""
    if type(source) is BlockLayout:
        return source.crow_indices  # `update_` replaces it
    if Mask in type(source).__mro__ and source.changeable:  # not a stand-in of torch.compile
        return source.state()
    return None


def check_unchanged(before: Any, source: Any) -> None:
    """Raise if a layout or mask changed since the forward pass, when its `pattern_of` was `before`.

    The gradients would be those of another function.
    """
    now = None if before is None else pattern_of(source)
    if before is not now and (isinstance(before, Tensor) or before != now):
        what = (
            "layout was changed by update_" if isinstance(before, Tensor) else "mask's data changed"
        )
        raise RuntimeError(
            f"the {what} between the forward and the backward pass, which needs the pattern of the "
            "forward pass: change it after backward(), or use another one"
        )


_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    """The gradients of (bound, *tensors)."""
    out, lse, *tensors = ctx.saved_tensors
    given = [x for x in (dout, dlse) if x is not None]
    if not given:
        return (None,) * (1 + len(tensors))
    check_unchanged(ctx.pattern, ctx.bound[0].layout)
    if any(map(_is_batched, given)):
        refuse_batches_of_gradients()
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = (ctx.bound, out, lse, dout, dlse, *tensors)
    # create_graph=True; torch.func
    if torch.is_grad_enabled() or any(map(_is_transformed, (out, *given))):
        gradients = _Gradients.apply(*inputs)
    else:
        gradients = _Gradients.forward(*inputs)
    return None, *by_input(gradients, ctx.bound[0].terms, len(tensors))


def by_input(
    gradients: Tensors, terms: ScoreTerms | None, inputs: int
) -> tuple[Tensor | None, ...]:
    """The gradient of each tensor of a call, in their order; None where it needs none.

    gradients: Of q, k and v, then of the first tensors of the terms, empty where not wanted.
    """
    if terms is None:
        return *gradients, *[None] * (inputs - 3)
    positions = [None] * (inputs - 3 - len(TERM_TENSORS))
    wanted = [x if w else None for x, w in zip(gradients[3:], terms.wants, strict=True)]
    others = [None] * (len(TERM_TENSORS) - NUM_DIFFERENTIABLE)
    return *gradients[:3], *positions, *wanted, *others


class _Attention(torch.autograd.Function):
    """(out, lse) of the tensors of a call; those at its end may be left out where all are None."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, *tensors: Any) -> tuple[Tensor, Tensor]:
        call, implementation = bound
        out, lse = implementation.attend(call)
        ctx.bound, ctx.pattern = (call.without_tensors(), implementation), pattern_of(call.layout)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    backward = staticmethod(_backward)
    jvp: Any = staticmethod(refuse_forward_mode)


class _AttentionOut(torch.autograd.Function):
    """The same, without lse as a result."""

    @staticmethod
    def forward(ctx: Any, bound: Bound, *tensors: Any) -> Tensor:
        call, implementation = bound
        out, lse = implementation.attend(call)
        ctx.bound, ctx.pattern = (call.without_tensors(), implementation), pattern_of(call.layout)
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return _backward(ctx, dout, None)

    jvp: Any = staticmethod(refuse_forward_mode)


# torch.autograd.Function.apply first looks for transforms of torch.func, of which there are none
# here, and takes several microseconds for it.
_apply: Any = super(torch.autograd.Function, _Attention).apply
_apply_for_out: Any = super(torch.autograd.Function, _AttentionOut).apply


class _Transformed(torch.autograd.Function):
    """The same for torch.func, whose Functions cost several times as much host time."""

    @staticmethod
    def forward(bound: Bound, *tensors: Any) -> tuple[Tensor, Tensor]:
        call, implementation = bound
        return implementation.attend(call.with_tensors(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        (call, implementation), *tensors = inputs
        ctx.bound, ctx.pattern = (call.without_tensors(), implementation), pattern_of(call.layout)
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)

    backward = staticmethod(_backward)
    jvp: Any = staticmethod(refuse_forward_mode)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        return one_by_one(_Transformed.apply, info.batch_size, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """(dq, dk, dv), and gradients of score terms, which have no derivatives."""

    @staticmethod
    def forward(
        bound: Bound,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        *tensors: Any,
    ) -> Tensors:
        call, implementation = bound
        return implementation.gradients(call.with_tensors(*tensors), out, lse, dout, dlse)

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
    pairs = list(zip(inputs, in_dims, strict=True))
    if not size:  # the shapes of the results are those of an entry of zeros
        zeros = (x.new_zeros(x.sum(d).shape) if isinstance(d, int) else x for x, d in pairs)
        stacked = tuple(part.new_empty((0, *part.shape)) for part in apply(*zeros))
        return stacked, (0,) * len(stacked)
    results = []
    for i in range(size):
        entries = (x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs)
        results.append(apply(*entries))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
