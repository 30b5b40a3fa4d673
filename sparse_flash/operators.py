"""Attention as PyTorch operators for torch.compile, export, and dispatch modes.

`sparse_flash::attention` and `sparse_flash::attention_backward` take the mask or layout itself
(see `masks.traceable`) and find layout, implementation and schedule when they run.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_flash import autograd, autograd_key
from sparse_flash.call import AttentionCall
from sparse_flash.checks import check_tensors
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.traceable import SCHEMA_TYPE, from_operator, source_of
from sparse_flash.prepare import Options, layout_of, prepare

# The tensors of a call, in the language of operator schemas.
TENSORS = ", ".join(
    f"Tensor{'' if name in ('q', 'k', 'v') else '?'} {name}" for name in AttentionCall.TENSORS
)
_INPUTS = f"{TENSORS}, {SCHEMA_TYPE} mask, float? softmax_scale, bool deterministic, str impl"
_GIVEN = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
_library = torch.library.Library("sparse_flash", "DEF")
# The launched kernels depend on the mask, which a recorded CUDA graph would not notice.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define(f"attention({_INPUTS}) -> (Tensor, Tensor)", tags=_tags)
_library.define(f"attention_backward({_GIVEN}, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_tags)
attention = torch.ops.sparse_flash.attention
attention_backward = torch.ops.sparse_flash.attention_backward


def _attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    *tensors, mask, scale, deterministic, impl = inputs
    options, source = Options(scale, deterministic, impl), from_operator(mask)
    call, implementation = prepare(
        tuple(tensors), source, options, needs_grad=False, transient=True
    )
    return remember(implementation.attend(call), source)


def remember(results: tuple[Tensor, Tensor], source: Any) -> tuple[Tensor, Tensor]:
    """(out, lse), with the pattern of this pass as an attribute of lse.

    A compiled graph saves lse for the backward pass, mostly the same object, but nothing that is no
    tensor.
    """
    pattern = autograd.pattern_of(source)
    if pattern is not None:
        cast(Any, results[1]).pattern = pattern
    return results


def _attention_backward(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, mask, scale, deterministic, impl = inputs
    options, source = Options(scale, deterministic, impl), from_operator(mask)
    autograd.check_unchanged(getattr(lse, "pattern", None), source)
    call, implementation = prepare(tuple(tensors), source, options, needs_grad=True, transient=True)
    dq, dk, dv = implementation.gradients(call, out, lse, dout, dlse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()  # as `fake_backward` says


def fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Output and lse without values, for all operators of attention."""
    check_tensors(q, k, v)
    b, s, h = q.shape[:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((b, s, h, v.shape[3])), q.new_empty((b, h, s), dtype=dtype)


def fake_backward(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v without values, for all operators of gradients."""
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.mask, softmax_scale, deterministic, impl = inputs
    ctx.options = (softmax_scale, deterministic, impl)
    ctx.pattern = autograd.pattern_of(source_of(ctx.mask))
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    rest = (None,) * (len(tensors) - 3 + 1 + len(ctx.options))
    if dout is None and dlse is None:
        return (None,) * 3 + rest
    autograd.check_unchanged(ctx.pattern, source_of(ctx.mask))
    dout = torch.zeros_like(out) if dout is None else dout
    return *attention_backward(out, lse, dout, dlse, *tensors, ctx.mask, *ctx.options), *rest


def vmap_rule(operator: Any) -> Any:
    """The vmap rule of an operator: one call for each entry of the mapped dimension."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return autograd.one_by_one(operator, info.batch_size, in_dims, inputs)

    return vmap


for _name, _run, _fake in (
    ("attention", _attention, fake_attention),
    ("attention_backward", _attention_backward, fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_flash::{_name}", _fake, lib=_library)
    torch.library.register_vmap(
        f"sparse_flash::{_name}", vmap_rule(getattr(torch.ops.sparse_flash, _name)), lib=_library
    )
autograd_key.register(_library, "attention", _differentiate, _setup)
autograd_key.register(_library, "attention_backward", autograd.refuse_second_derivative)


def _elements(q: Tensor, k: Tensor, mask: Any) -> float:
    """Twice the number of elements that the mask keeps: as PyTorch counts a product of width 1."""
    source, lengths = from_operator(mask), (q.shape[1], k.shape[1])
    layout = source if isinstance(source, BlockLayout) else layout_of(source, q, lengths)
    b, q_len, h, _ = q.shape
    return 2 * b * h * q_len * k.shape[1] * layout.density


@register_flop_formula(attention, get_raw=True)
def attention_flops(*inputs: Any, **_: Any) -> int:
    """S = Q K^T and O = P V."""
    q, k, v, *_rest, mask, _scale, _deterministic, _impl = inputs
    return round(_elements(q, k, mask) * (q.shape[3] + v.shape[3]))


@register_flop_formula(attention_backward, get_raw=True)
def backward_flops(*inputs: Any, **_: Any) -> int:
    """S again, dP = dO V^T, dV = P^T dO, dQ = dS K and dK = dS^T Q."""
    q, k, v, *_rest, mask, _scale, _deterministic, _impl = inputs[4:]
    return round(_elements(q, k, mask) * (3 * q.shape[3] + 2 * v.shape[3]))
