"""Attention with score terms as PyTorch operators, for torch.compile, export and dispatch modes.

Calls without score terms have operators with fewer arguments, in `operators`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_flash import autograd, autograd_key
from sparse_flash.call import NUM_DIFFERENTIABLE, TERM_TENSORS, ScoreTerms, terms_of_options
from sparse_flash.masks.traceable import SCHEMA_TYPE, from_operator, source_of, to_operator
from sparse_flash.operators import (
    TENSORS,
    attention_flops,
    backward_flops,
    fake_attention,
    fake_backward,
    remember,
    vmap_rule,
)
from sparse_flash.prepare import Options, prepare
from sparse_flash.scores.arguments import draw_seed

_TERMS = ", ".join(f"Tensor? {name}" for name in TERM_TENSORS)
_OPTIONS = "bool[] wants, float softcap, int dropped"
_CALL = "float? softmax_scale, bool deterministic, str impl"
_INPUTS = f"{TENSORS}, {_TERMS}, {_OPTIONS}, {SCHEMA_TYPE} mask, {_CALL}"
_GIVEN = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
_GRADIENTS = ", ".join(["Tensor"] * (3 + NUM_DIFFERENTIABLE))
_library = torch.library.Library("sparse_flash", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define(f"scored_attention({_INPUTS}) -> (Tensor, Tensor)", tags=_tags)
_library.define(f"scored_attention_backward({_GIVEN}, {_INPUTS}) -> ({_GRADIENTS})", tags=_tags)
_library.define(
    "dropout_seed(Tensor like) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
scored_attention = torch.ops.sparse_flash.scored_attention
scored_attention_backward = torch.ops.sparse_flash.scored_attention_backward
_TAIL = 7  # arguments from `wants` on


def attend(
    tensors: tuple[Any, ...], mask: Any, options: Options, terms: ScoreTerms
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call."""
    flags = (list(terms.wants), terms.softcap, terms.dropped)
    source = to_operator(mask, tensors[0])
    return scored_attention(*tensors, *terms.tensors, *flags, source, *options)


def _prepared(inputs: tuple[Any, ...], needs_grad: bool) -> Any:
    *tensors, wants, softcap, dropped, mask, scale, deterministic, impl = inputs
    split = len(tensors) - len(TERM_TENSORS)
    terms = terms_of_options(wants, softcap, dropped, tensors[split:])
    return prepare(
        tuple(tensors[:split]),
        from_operator(mask),
        Options(scale, deterministic, impl),
        needs_grad=needs_grad,
        transient=True,
        terms=terms,
    )


def _attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    call, implementation = _prepared(inputs, needs_grad=False)
    return remember(implementation.attend(call), from_operator(inputs[-4]))


def _attention_backward(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *inputs: Any
) -> tuple[Tensor, ...]:
    autograd.check_unchanged(getattr(lse, "pattern", None), from_operator(inputs[-4]))
    call, implementation = _prepared(inputs, needs_grad=True)
    return tuple(x.contiguous() for x in implementation.gradients(call, out, lse, dout, dlse))


def _fake_scored_backward(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Any, *inputs: Any
) -> tuple[Tensor, ...]:
    *tensors, wants, _softcap, _dropped, _mask, _scale, _deterministic, _impl = inputs
    terms = tensors[len(tensors) - len(TERM_TENSORS) :]
    results = fake_backward(out, lse, dout, dlse, *inputs)
    of_terms = (
        x.new_empty(x.shape) if w else out.new_empty(0) for x, w in zip(terms, wants, strict=False)
    )
    return *results, *of_terms


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.wants, ctx.softcap, ctx.dropped, ctx.mask, scale, deterministic, impl = inputs
    ctx.options = (scale, deterministic, impl)
    ctx.pattern = autograd.pattern_of(source_of(ctx.mask))
    ctx.save_for_backward(*output, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * (len(tensors) + _TAIL)
    autograd.check_unchanged(ctx.pattern, source_of(ctx.mask))
    dout = torch.zeros_like(out) if dout is None else dout
    options = (ctx.wants, ctx.softcap, ctx.dropped, ctx.mask, *ctx.options)
    gradients = scored_attention_backward(out, lse, dout, dlse, *tensors, *options)
    terms = terms_of_options(ctx.wants, ctx.softcap, ctx.dropped)
    return *autograd.by_input(gradients, terms, len(tensors)), *[None] * len(options)


def _fake_seed(like: Tensor) -> Tensor:
    return like.new_empty((1,), dtype=torch.int64)


def _seed_vmap(info: Any, in_dims: Any, like: Tensor) -> Any:
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: dropout draws random numbers: pass randomness='same' or 'different' to "
            "torch.vmap, or dropout_p=0.0"
        )
    if info.randomness == "same":
        return draw_seed(like), None
    return torch.stack([draw_seed(like) for _ in range(info.batch_size)]), 0


for _name, _run, _fake, _batched in (
    ("scored_attention", _attention, fake_attention, vmap_rule(scored_attention)),
    (
        "scored_attention_backward",
        _attention_backward,
        _fake_scored_backward,
        vmap_rule(scored_attention_backward),
    ),
    ("dropout_seed", draw_seed, _fake_seed, _seed_vmap),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparse_flash::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"sparse_flash::{_name}", _batched, lib=_library)
autograd_key.register(_library, "scored_attention", _differentiate, _setup)
autograd_key.register(_library, "scored_attention_backward", autograd.refuse_second_derivative)


def _plain(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the operator without score terms."""
    *tensors, _wants, _softcap, _dropped, mask, scale, deterministic, impl = inputs
    tensors = tensors[: len(tensors) - len(TERM_TENSORS)]
    return *tensors, mask, scale, deterministic, impl


@register_flop_formula(scored_attention, get_raw=True)
def _scored_flops(*inputs: Any, **_: Any) -> int:
    """Products only, as without score terms."""
    return attention_flops(*_plain(inputs))


@register_flop_formula(scored_attention_backward, get_raw=True)
def _scored_backward_flops(*inputs: Any, **_: Any) -> int:
    """Products only, as without score terms."""
    return backward_flops(*inputs[:4], *_plain(inputs[4:]))
