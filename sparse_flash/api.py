"""block_sparse_attention: validate, choose an implementation, call it."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from sparse_flash import autograd, data_operators, operators, score_operators
from sparse_flash.checks import (
    check_are_tensors,
    check_mask,
    check_scale,
    check_tensors,
    refuse_arguments,
)
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.device_builders import TracedLayout
from sparse_flash.masks.traceable import to_operator
from sparse_flash.positions import with_positions
from sparse_flash.prepare import Options, prepare
from sparse_flash.scores.arguments import score_terms
from sparse_flash.scores.bias import ScoreBias


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout,
    *,
    softmax_scale: float | None = ...,
    kv_lens: Tensor | None = ...,
    q_offset: int | Tensor | None = ...,
    kv_starts: Tensor | None = ...,
    bias: ScoreBias | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    generator: torch.Generator | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout,
    *,
    softmax_scale: float | None = ...,
    kv_lens: Tensor | None = ...,
    q_offset: int | Tensor | None = ...,
    kv_starts: Tensor | None = ...,
    bias: ScoreBias | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    generator: torch.Generator | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout | None = None,
    *,
    softmax_scale: float | None = None,
    kv_lens: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    kv_starts: Tensor | None = None,
    bias: ScoreBias | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention restricted to a mask: softmax(scale q k^T, where allowed) v.

    Computes only the tiles that the mask keeps. A query without any key gives output 0, lse -inf
    and gradients 0. Source: Dao et al., FlashAttention (2022), section 3.3 (block-sparse).

    With all score terms, the score of a query and a key is
    softcap * tanh(scale q k / softcap) + bias; then the mask applies; then sinks join the
    denominator; then dropout drops probabilities.

    Args:
        q: Queries `(b, q_len, h, d)`; float64, float32, bfloat16 or float16, any strides.
        k: Keys `(b, kv_len, h_kv, d)`; h is a multiple of h_kv (grouped queries): head i of the
            queries uses head i // (h / h_kv) of the keys.
        v: Values `(b, kv_len, h_kv, d_v)`; d_v may differ from d.
        mask: A Mask, whose layout is built once for these lengths and this device and then
            cached, or a BlockLayout on the device of the inputs.
        softmax_scale: Factor of the logits; default d ** -0.5.
        kv_lens: Number of keys that exist in each batch entry, int `(b,)`, 0..kv_len; what lies
            beyond is padding, and is never looked at. Values on a GPU, or in a compiled graph, are
            clamped to that range, not checked: checking would make the host wait.
        q_offset: Position of the first query, int or int `(b,)`, as in a KV cache: query i of
            batch entry b has position i + q_offset[b], and key j is allowed where
            mask(i + q_offset[b], j). A layout is then over positions: its q_len must exceed the
            last one, and its kv_len be at least that of k. A mask is laid out for the next powers
            of two (or its own lengths), so that a growing cache needs few layouts. Values on a GPU
            are not checked: queries beyond the layout come out as NaN.
        kv_starts: First valid key of each batch entry, int `(b,)`, where padding is on the left;
            positions of keys and queries count from it. Earlier queries have no keys.
        bias: Terms of `sparse_flash.scores`, which add with `+`, such as alibi(slopes) or
            relative(table); by positions, q_offset included. Gradients reach their tensors.
        softcap: Bound of the scores, by tanh; a positive number. None: no bound. Source: Gemma
            Team, Gemma 2 (2024).
        sinks: A logit for each query head, floating point `(h,)`, which takes probability but has
            no value; differentiable. Source: gpt-oss model card, OpenAI (2025).
        dropout_p: Rate in [0, 1) at which probabilities are dropped, rounded to a multiple of
            1/256; kept ones are divided by 1 - the rounded rate. lse is without dropout.
        generator: Source of the seed of dropout; default: torch's own of the device.
        return_lse: Also return the logsumexp of the scores of each query (natural logarithm),
            `(b, h, q_len)`, float32 (float64 for float64 inputs); differentiable. Sinks are in it:
            of a query without any key it is then the sink's logit.
        deterministic: Gradients are bitwise repeatable; also on with
            torch.use_deterministic_algorithms.
        impl: "auto", or the name of an implementation, which then never falls back to another.
        **unknown: Refused; arguments of other functions by what to write instead.

    Returns:
        Output `(b, q_len, h, d_v)` in the inputs' dtype; with return_lse, (output, lse).

    Raises:
        TypeError: An argument of the wrong type or dtype, an unknown argument (is_causal, attn_mask
            and so on, with what to write instead), or no mask.
        ValueError: Shapes, devices or lengths that do not fit, or kv_lens, softcap or dropout_p out
            of range.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks
    >>> q, k, v = (torch.randn(2, 300, 4, 32) for _ in range(3))
    >>> out, lse = block_sparse_attention(q, k, v, masks.causal(), return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 300, 4, 32]), torch.Size([2, 4, 300]))
    >>> dense = torch.nn.functional.scaled_dot_product_attention(
    ...     *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    >>> torch.allclose(out, dense.transpose(1, 2), atol=1e-6)
    True
    """
    if mask is None or unknown:
        refuse_arguments(unknown)
    if torch._C._is_any_autocast_enabled():
        check_are_tensors(q, k, v)
        q, k, v = _autocast(q, k, v)
    options = _DEFAULTS
    if not (softmax_scale is None and impl == "auto" and deterministic is False):
        options = Options(check_scale(softmax_scale), deterministic, impl)
    terms = None
    if (
        not (bias is softcap is sinks is generator is None and type(dropout_p) is float)
        or dropout_p
    ):
        check_tensors(q, k, v)
        lengths = q.shape[1], k.shape[1]
        terms = score_terms(q, lengths, bias, softcap, sinks, dropout_p, generator)
    tensors = (q, k, v, kv_lens, q_offset, kv_starts)
    if isinstance(mask, TracedLayout):
        out, lse = data_operators.attend(tensors, mask, options, terms)
    elif torch.compiler.is_compiling() or _is_watched(q, k, v):
        check_mask(mask)
        check_tensors(q, k, v)
        tensors = with_positions(tensors, mask)
        if terms is None:
            out, lse = operators.attention(*tensors, to_operator(mask, q), *options)
        else:
            out, lse = score_operators.attend(tensors, mask, options, terms)
    else:
        needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
        needs_grad = needs_grad or (terms is not None and any(terms.wants))
        needs_grad = needs_grad and torch.is_grad_enabled()
        call = prepare(tensors, mask, options, needs_grad=needs_grad, terms=terms)
        out, lse = autograd.attend(*call, return_lse=return_lse)
    return (out, lse) if return_lse else out


_DEFAULTS = Options(None, deterministic=False, impl="auto")


def _is_watched(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether something wants to see an operator, or has tensors without numbers."""
    if not type(q) is type(k) is type(v) is Tensor:
        check_are_tensors(q, k, v)
        if not {type(q), type(k), type(v)} <= {Tensor, torch.nn.Parameter}:
            return True
    if torch._C._len_torch_dispatch_stack() > 0 or q.is_meta:
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None and _is_functionalized()


def _is_functionalized() -> bool:
    """Whether torch.func.functionalize is active, which knows operators, but no Functions."""
    key = torch._C._functorch.TransformType.Functionalize
    return any(x.key() == key for x in torch._C._functorch.get_interpreter_stack() or ())


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta knows no autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )
