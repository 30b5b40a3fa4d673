"""Attention on layouts of data inside compiled functions, as PyTorch operators.

A compiled graph cannot make a layout. There `BlockLayout.from_topk` and `from_blocks` return a
`TracedLayout`, and these operators take its data and make the layout when they run, in the forward
and in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_flash import autograd
from sparse_flash.call import ScoreTerms
from sparse_flash.masks import full
from sparse_flash.masks.device_builders import TracedLayout, layout_of_data
from sparse_flash.masks.traceable import SCHEMA_TYPE, from_operator, to_operator
from sparse_flash.operators import fake_attention, fake_backward, vmap_rule
from sparse_flash.prepare import Options, prepare

FULL = full()  # stands for no mask
_DATA = f"Tensor data, {SCHEMA_TYPE} within, bool cut, str kind, int[] sizes, int[] capacity"
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? kv_lens, "
    f"{_DATA}, float? softmax_scale, bool deterministic, str impl"
)
_GIVEN = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
_library = torch.library.Library("sparse_flash", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define(f"attention_of_data({_INPUTS}) -> (Tensor, Tensor)", tags=_tags)
_library.define(
    f"attention_of_data_backward({_GIVEN}, {_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_tags
)
attention_of_data = torch.ops.sparse_flash.attention_of_data
attention_of_data_backward = torch.ops.sparse_flash.attention_of_data_backward
_OPTIONS = 3  # arguments at the end


def attend(
    tensors: tuple[Any, ...],
    layout: TracedLayout,
    options: Options,
    terms: ScoreTerms | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call in a compiled function.

    Raises:
        ValueError: The call has positions or score terms.
    """
    if terms is not None:
        raise ValueError(
            "a layout that is made of data inside a compiled function takes no bias, softcap, "
            "sinks or dropout: make the layout outside of it, or do not compile this call"
        )
    q, k, v, kv_lens, q_offset, kv_starts = tensors
    first = q_offset is None or (type(q_offset) is int and q_offset == 0)
    if not first or kv_starts is not None:
        raise ValueError(
            "a layout of data on the device takes neither q_offset nor kv_starts: make it outside "
            "of the compiled function and pass layout.fixed()"
        )
    within = FULL if layout.within is None else layout.within
    q_len, kv_len, block = layout.lengths
    return attention_of_data(
        *(q, k, v, kv_lens, layout.data, to_operator(within, q), layout.within is not None),
        *(layout.kind, [q_len, kv_len, *block], list(layout.capacity or ()), *options),
    )


def _prepared(inputs: tuple[Any, ...], needs_grad: bool) -> Any:
    q, k, v, kv_lens, data, within, cut, kind, sizes, capacity, *options = inputs
    mask = from_operator(within) if cut else None
    lengths = (sizes[0], sizes[1], (sizes[2], sizes[3]))
    layout = layout_of_data(kind, data, lengths, mask, tuple(capacity) or None)
    tensors = (q, k, v, kv_lens, None, None)
    return prepare(tensors, layout, Options(*options), needs_grad=needs_grad, transient=True)


def _attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    call, implementation = _prepared(inputs, needs_grad=False)
    return implementation.attend(call)


def _attention_backward(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *inputs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    call, implementation = _prepared(inputs, needs_grad=True)
    dq, dk, dv = implementation.gradients(call, out, lse, dout, dlse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, kv_lens, data, ctx.within, *ctx.rest = inputs
    ctx.save_for_backward(*output, q, k, v, kv_lens, data)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, kv_lens, data = ctx.saved_tensors
    rest = (None,) * (3 + len(ctx.rest))  # of kv_lens, data, within and the others
    if dout is None and dlse is None:
        return (None,) * 3 + rest
    dout = torch.zeros_like(out) if dout is None else dout
    inputs = (q, k, v, kv_lens, data, ctx.within, *ctx.rest)
    return *attention_of_data_backward(out, lse, dout, dlse, *inputs), *rest


for _name, _run, _fake in (
    ("attention_of_data", _attention, fake_attention),
    ("attention_of_data_backward", _attention_backward, fake_backward),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_flash::{_name}", _fake, lib=_library)
    torch.library.register_vmap(
        f"sparse_flash::{_name}", vmap_rule(getattr(torch.ops.sparse_flash, _name)), lib=_library
    )
torch.library.register_autograd(
    "sparse_flash::attention_of_data", _differentiate, setup_context=_setup, lib=_library
)
torch.library.register_autograd(
    "sparse_flash::attention_of_data_backward", autograd.refuse_second_derivative, lib=_library
)


def _products(*inputs: Any) -> int:
    """Operations of a product of the elements that the layout keeps. The host waits."""
    q, k = inputs[:2]
    call, _ = _prepared(inputs, needs_grad=False)
    b, q_len, h, d = q.shape
    return round(2 * b * h * d * q_len * k.shape[1] * call.layout.density)


@register_flop_formula(attention_of_data, get_raw=True)
def _attention_flops(*inputs: Any, **_: Any) -> int:
    return 2 * _products(*inputs)


@register_flop_formula(attention_of_data_backward, get_raw=True)
def _backward_flops(*inputs: Any, **_: Any) -> int:
    return 5 * _products(*inputs[4:])
