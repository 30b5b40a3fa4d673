"""From the arguments of a call to an AttentionCall and the implementation that runs it."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import Implementation, choose
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.records import CACHE
from sparse_flash.masks.traceable import Traceable

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_CALLS = 4096  # kinds of calls to remember for a mask or a layout


class Options(NamedTuple):
    """The arguments of a call besides q, k, v, the mask and kv_lens."""

    softmax_scale: float | None
    deterministic: bool
    impl: str


class _Known(NamedTuple):
    """What was found out about a call like this one."""

    layout: BlockLayout
    implementation: Implementation


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | BlockLayout,
    kv_lens: Tensor | None,
    options: Options,
    *,
    needs_grad: bool,
    transient: bool = False,
) -> tuple[AttentionCall, Implementation]:
    """The call, and the implementation that runs it.

    Checks take the host longer than a launch does: calls like one before are not checked again.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, devices or lengths that do not fit, or no implementation runs the call.
    """
    calls, state = _calls_of(mask)
    deterministic = options.deterministic or torch.are_deterministic_algorithms_enabled()
    features = (needs_grad, deterministic, kv_lens is None, options.impl)
    like = (*_kind(q), *_kind(k), *_kind(v), state, features)
    known = calls.get(like)
    if kv_lens is not None:
        check_kv_lens(kv_lens, q.shape[0], k.shape[1])
    scale = options.softmax_scale
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    layout: Any = None if known is None else known.layout
    call = AttentionCall(q, k, v, kv_lens, layout, scale, deterministic, needs_grad, transient)
    if known is None:
        known = _find_out(call, mask, options.impl)
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        calls[like] = known
        object.__setattr__(call, "layout", known.layout)
    return call, known.implementation


def _calls_of(mask: Mask | BlockLayout) -> tuple[dict[Any, _Known], Any]:
    """Where known calls with this mask are kept, and what the mask depends on now."""
    if isinstance(mask, Mask):
        record = CACHE.of(mask)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            record.pinned = True
        return record.calls, mask.state()
    check_mask(mask)
    return mask.calls, None


def _kind(x: Tensor) -> tuple[Any, ...]:
    """All that checks and implementations look at: not the numbers."""
    return x.shape, x.stride(), x.storage_offset() % 8, x.dtype, x.device


def _find_out(call: AttentionCall, mask: Mask | BlockLayout, impl: str) -> _Known:
    q, k = call.q, call.k
    check_tensors(q, k, call.v)
    _warn_of_heads_first(k)
    layout = layout_of(mask, q, k) if isinstance(mask, Mask) else mask
    check_layout(layout, q, k)
    object.__setattr__(call, "layout", layout)
    return _Known(layout, choose(impl, call))


def layout_of(mask: Mask, q: Tensor, k: Tensor) -> BlockLayout:
    """The layout of a mask for these tensors; built once."""
    q_len, kv_len, device = q.shape[1], k.shape[1], q.device
    key = (q_len, kv_len, device, mask.state())
    layout = CACHE.of(mask).layout(key, lambda: mask.layout(q_len, kv_len, device=device))
    CACHE.trim()
    return layout


def check_are_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """TypeError where one of them is none."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_mask(mask: Mask | BlockLayout) -> None:
    """TypeError where it is neither."""
    if not isinstance(mask, Traceable):
        raise TypeError(
            f"mask must be a Mask or a BlockLayout, got {type(mask).__name__}; "
            "masks.parse makes one from text, masks.from_dense from bools"
        )


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices that fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
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
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch (first) "
            "and head_dim (last)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key heads"
        )


def _warn_of_heads_first(k: Tensor) -> None:
    """Tensors of other libraries are (b, h, s, d), which nothing but sizes can tell."""
    _, tokens, heads, _ = k.shape
    if heads > max(tokens, 48):
        warnings.warn(
            f"k has {tokens} tokens and {heads} heads: block_sparse_attention takes (batch, "
            "sequence, heads, head_dim). Were q, k and v (batch, heads, sequence, head_dim)? Then "
            "use x.transpose(1, 2)",
            stacklevel=2,
        )


def check_options(softmax_scale: float | None, dropout_p: float) -> float | None:
    """The scale as a number."""
    if isinstance(softmax_scale, Tensor):
        raise TypeError(
            "softmax_scale must be a number, got a tensor: no gradient would reach it. Multiply q "
            "by a learned scale and pass softmax_scale=1.0; otherwise pass scale.item()"
        )
    if softmax_scale is not None:
        if isinstance(softmax_scale, str | bool):
            raise TypeError(f"softmax_scale must be a number, got {softmax_scale!r}")
        if not math.isfinite(softmax_scale):
            raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
        softmax_scale = float(softmax_scale)
    if dropout_p != 0:
        raise ValueError(
            f"dropout_p={dropout_p}: dropout of attention weights is not implemented; pass 0.0, "
            "and apply torch.nn.Dropout to the output of attention instead"
        )
    return softmax_scale


def check_layout(layout: BlockLayout, q: Tensor, k: Tensor) -> None:
    """Lengths, device, heads and batch entries of a layout."""
    if (layout.q_len, layout.kv_len) != (q.shape[1], k.shape[1]):
        swapped = (layout.q_len, layout.kv_len) == (q.shape[2], k.shape[2])
        way_out = (
            "q, k and v seem to be (batch, heads, sequence, head_dim): use x.transpose(1, 2)"
            if swapped
            else f"build it with mask.layout({q.shape[1]}, {k.shape[1]})"
        )
        raise ValueError(
            f"the layout is for {layout.q_len} queries and {layout.kv_len} keys, "
            f"but q has {q.shape[1]} and k {k.shape[1]}: {way_out}"
        )
    if layout.device != q.device:
        raise ValueError(
            f"the layout is on {layout.device}, but q is on {q.device}: "
            f"use layout.to({str(q.device)!r})"
        )
    for name, size, given in zip(
        ("batch entries", "heads"), layout.pattern_map.shape, (q.shape[0], q.shape[2]), strict=True
    ):
        if size not in (1, given) and q.shape[0]:
            raise ValueError(f"the layout has patterns for {size} {name}, but q has {given}")


def check_kv_lens(kv_lens: Tensor, batch: int, kv_len: int) -> None:
    """The type and shape of kv_lens, and its values where the host has them."""
    if (
        not isinstance(kv_lens, Tensor)
        or kv_lens.is_floating_point()
        or kv_lens.dtype == torch.bool
    ):
        what = kv_lens.dtype if isinstance(kv_lens, Tensor) else type(kv_lens).__name__
        raise TypeError(f"kv_lens must be an int tensor of shape ({batch},), got {what}")
    if kv_lens.shape != (batch,):
        raise ValueError(f"kv_lens must have shape ({batch},), got {tuple(kv_lens.shape)}")
    # Within torch.func transforms there may be no value to look at: it is clamped, as on a GPU.
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if kv_lens.device.type == "cpu" and batch and not transformed:
        low, high = int(kv_lens.min()), int(kv_lens.max())
        if low < 0 or high > kv_len:
            raise ValueError(
                f"kv_lens must be in 0..{kv_len} (the number of keys), got {low}..{high}"
            )
