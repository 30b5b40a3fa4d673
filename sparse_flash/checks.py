"""Checks of the arguments of a call, with errors that name the allowed values and the way out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from sparse_flash import masks
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.modes import is_fake
from sparse_flash.masks.traceable import Traceable

# Arguments of SDPA, FlashAttention and FlexAttention, with their replacements.
_CAUSAL = "pass the mask masks.causal(), or mask & masks.causal()"
_SCALE = "write softmax_scale"
_DROPOUT = "write dropout_p"
_BIAS = (
    "pass bias= a term of sparse_flash.scores, such as alibi(slopes) or relative(table); softcap= "
    "and sinks= are arguments"
)
_SINKS = "write sinks, one logit (h,) for each query head"
_LENGTHS = (
    "packed sequences are one sequence with the mask masks.documents(lengths), or "
    "masks.documents(cu_seqlens, length=...) where a GPU has the lengths"
)
_OTHERS = {
    "is_causal": _CAUSAL,
    "causal": _CAUSAL,
    "attn_mask": "pass masks.from_dense(attn_mask) as the mask",
    "block_mask": "pass a Mask or a BlockLayout as the mask: masks.custom(fn) takes a predicate",
    "mask_mod": "pass masks.custom(fn) as the mask, with fn(q_idx, kv_idx)",
    "score_mod": _BIAS,
    "attn_bias": _BIAS,
    "score_bias": _BIAS,
    "alibi_slopes": "pass bias=sparse_flash.scores.alibi(slopes)",
    "logits_soft_cap": "write softcap",
    "s_aux": _SINKS,
    "learnable_sink": _SINKS,
    "sink": _SINKS,
    "window_size": "pass the mask masks.local((left, right))",
    "scale": _SCALE,
    "sm_scale": _SCALE,
    "dropout": _DROPOUT,
    "p_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "enable_gqa": "leave it out: k and v may have fewer heads than q",
    "cu_seqlens": _LENGTHS,
    "cu_seqlens_q": _LENGTHS,
    "cu_seqlens_k": _LENGTHS,
    "key_padding_mask": "write kv_lens, the number of valid keys per batch entry",
    "cache_seqlens": "write q_offset, the position of the first query",
}
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_are_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError unless all are tensors."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_mask(mask: Mask | BlockLayout) -> None:
    """TypeError where it is neither."""
    if not isinstance(mask, Traceable):
        name = getattr(mask, "__name__", None)
        if name is not None and getattr(masks, name, None) is mask:
            raise TypeError(f"mask is masks.{name} itself: call it, as in masks.{name}(...)")
        raise TypeError(
            f"mask must be a Mask or a BlockLayout, got {type(mask).__name__}; "
            "masks.parse makes one from text, masks.from_dense from bools, masks.custom from a "
            "function"
        )


def check_heads(mask: Mask | BlockLayout, heads: int) -> None:
    """ValueError where a mask or layout has patterns for another number of heads."""
    pattern_map = mask.pattern_map if isinstance(mask, BlockLayout) else mask.patterns()[1]
    size = pattern_map.shape[1]
    if size not in (1, heads):
        raise ValueError(
            f"the mask has patterns for {size} heads, but there are {heads}: give "
            f"masks.per_head([...]) {heads} masks, one for each query head, or one mask for all"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that layouts, shapes, dtypes and devices are consistent."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.is_nested or x.layout is not torch.strided:
            kind = "a nested tensor" if x.is_nested else str(x.layout)
            raise TypeError(
                f"{name} must be an ordinary tensor (torch.strided), got {kind}: use x.to_dense(); "
                "for sequences of several lengths pad them and pass kv_lens, or concatenate them "
                "and use masks.documents(lengths)"
            )
        if x.ndim != 4 or 0 in x.shape[1:]:
            raise ValueError(
                f"{name} must be (batch, sequence, heads, head_dim), all but the batch at least 1, "
                f"got {tuple(x.shape)}"
            )
        if x.dtype not in _DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise TypeError(f"{name} has dtype {x.dtype}; allowed are {allowed}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but q has {q.dtype}: convert one of them")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}: move one of them")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one batch, sequence and heads; "
            "only the last dimension, the width of a head, may differ"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch (first) "
            "and head_dim (last)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key heads"
        )


def check_not_traced() -> None:
    """Refuse torch.jit.trace, which would record the tiles of one mask at one length."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "block_sparse_attention cannot be traced by torch.jit.trace: use torch.export.export "
            "or torch.compile"
        )


def warn_of_heads_first(k: Tensor) -> None:
    """Hint at swapped dimensions: other libraries use (b, h, s, d)."""
    _, tokens, heads, _ = k.shape
    if heads > max(tokens, 48):
        warnings.warn(
            f"k has {tokens} tokens and {heads} heads: block_sparse_attention takes (batch, "
            "sequence, heads, head_dim). Were q, k and v (batch, heads, sequence, head_dim)? Then "
            "use x.transpose(1, 2)",
            stacklevel=5,
        )


def check_scale(softmax_scale: float | None) -> float | None:
    """Check the scale; returns it as a float."""
    if softmax_scale is None:
        return None
    if isinstance(softmax_scale, Tensor):
        raise TypeError(
            "softmax_scale must be a number, got a tensor: no gradient would reach it. Multiply q "
            "by a learned scale and pass softmax_scale=1.0; otherwise pass scale.item()"
        )
    number = isinstance(softmax_scale, int | float) or hasattr(softmax_scale, "__float__")
    if isinstance(softmax_scale, bool) or not number:
        raise TypeError(
            f"softmax_scale must be a number, got {softmax_scale!r}"
            + _as_number("softmax_scale", softmax_scale)
        )
    try:
        scale = float(softmax_scale)
    except OverflowError:  # an int beyond all floats
        scale = math.inf
    if not abs(scale) < math.inf:  # torch.compile cannot trace isfinite
        raise ValueError(f"softmax_scale must be finite, got {scale}")
    return scale


def _as_number(name: str, value: object) -> str:
    """The way out where text is a number."""
    try:
        return f": write {name}={float(value):g}" if isinstance(value, str) else ""
    except ValueError:
        return ""


def refuse_arguments(unknown: dict[str, Any]) -> NoReturn:
    """TypeError for a call without a mask, or with arguments of other functions of attention."""
    for name, value in unknown.items():
        way_out = _OTHERS.get(name, "see help(block_sparse_attention)")
        raise TypeError(f"block_sparse_attention has no argument {name}={_brief(value)}: {way_out}")
    raise TypeError(
        "mask must be a Mask or a BlockLayout, got None: pass masks.causal(), or masks.full() for "
        "dense attention"
    )


def _brief(value: object) -> str:
    """A value in a message: of a tensor the shape."""
    return f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]


def check_layout(layout: BlockLayout, q: Tensor, lengths: tuple[int, int], kv_heads: int) -> None:
    """Check lengths, device, heads and batch entries of a layout."""
    q_len, kv_len = lengths
    if (layout.q_len, layout.kv_len) != lengths:
        swapped = layout.q_len == q.shape[2]
        way_out = (
            "q, k and v seem to be (batch, heads, sequence, head_dim): use x.transpose(1, 2)"
            if swapped
            else f"build it with mask.layout({q_len}, {kv_len}), or pass q_offset if it is over "
            "positions"
        )
        raise ValueError(
            f"the layout is for {layout.q_len} queries and {layout.kv_len} keys, "
            f"but q has {q_len} and k {kv_len}: {way_out}"
        )
    if layout.device != q.device:
        raise ValueError(
            f"the layout is on {layout.device}, but q is on {q.device}: "
            f"use layout.to({str(q.device)!r})"
        )
    for name, size, given in zip(
        ("batch entries", "heads"), layout.pattern_map.shape, (q.shape[0], q.shape[2]), strict=True
    ):
        shared = name == "heads" and layout.on_device and size == kv_heads
        if size not in (1, given) and not shared and q.shape[0]:
            if layout.on_device:
                also = f", {kv_heads} (those of k)" if name == "heads" else ""
                raise ValueError(
                    f"the layout has rows for {size} {name}, but q has {given} {name}: give "
                    f"indices or tables for {given}{also} or 1"
                )
            maker = "per_head" if name == "heads" else "per_batch"
            each = "query head" if name == "heads" else "batch entry"
            raise ValueError(
                f"the layout has patterns for {size} {name}, but q has {given} {name}: give "
                f"masks.{maker}([...]) {given} masks, one for each {each}, or one mask for all"
            )


def check_has_values(name: str, x: Tensor, q: Tensor) -> None:
    """ValueError for positions or lengths without values (meta, fake) where the queries have some.

    Under a FakeTensorMode torch itself refuses mixed tensors.
    """
    if x.is_meta and not q.is_meta:
        raise ValueError(
            f"{name} is on meta and has no values, but q is on {q.device}: make it on {q.device}"
        )
    if is_fake(x) and not is_fake(q):
        raise ValueError(
            f"{name} is a fake tensor and has no values, but q is a real one: make both alike"
        )


def check_integers(name: str, x: Any, batch: int) -> None:
    """Check type and shape of an argument that has an int for each batch entry."""
    if not isinstance(x, Tensor):
        several = isinstance(x, Iterable) and not isinstance(x, str)
        way_out = f": torch.as_tensor({name}) is one" if several else ""
        got = f"{type(x).__name__}{way_out}"
        raise TypeError(f"{name} must be an int tensor of shape ({batch},), got {got}")
    if x.dtype not in _INTEGERS:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _INTEGERS)
        got = f"{x.dtype}: the types are {names}"
        raise TypeError(f"{name} must be an int tensor of shape ({batch},), got {got}")
    if x.shape != (batch,):
        raise ValueError(f"{name} must have shape ({batch},), got {tuple(x.shape)}")


def check_kv_lens(kv_lens: Tensor, q: Tensor, kv_len: int) -> None:
    """Check type and shape of kv_lens, and its values if they are on the host."""
    batch = q.shape[0]
    check_integers("kv_lens", kv_lens, batch)
    check_has_values("kv_lens", kv_lens, q)
    # Within torch.func transforms there may be no value to look at: it is clamped, as on a GPU.
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if kv_lens.device.type == "cpu" and batch and not transformed:
        low, high = int(kv_lens.min()), int(kv_lens.max())
        if low < 0 or high > kv_len:
            raise ValueError(
                f"kv_lens must be in 0..{kv_len} (the number of keys), got {low}..{high}"
            )
