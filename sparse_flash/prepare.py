"""From the arguments of a call to an AttentionCall and the implementation that runs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall, ScoreTerms
from sparse_flash.checks import (
    check_kv_lens,
    check_layout,
    check_mask,
    check_not_traced,
    check_tensors,
    warn_of_heads_first,
)
from sparse_flash.implementations import Implementation, choose
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.device_builders import layout_of_call
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.records import CACHE
from sparse_flash.positions import lengths_of, warn_of_alignment, with_positions

_MOST_CALLS = 4096  # kinds of calls to remember for a mask or a layout
Tensors = tuple[Any, ...]  # as AttentionCall.TENSORS


class Options(NamedTuple):
    """The arguments of a call besides its tensors and the mask."""

    softmax_scale: float | None
    deterministic: bool
    impl: str


class _Known(NamedTuple):
    """A prepared call: the call without its tensors, and derived objects."""

    call: AttentionCall
    implementation: Implementation


def prepare(
    tensors: Tensors,
    mask: Mask | BlockLayout,
    options: Options,
    *,
    needs_grad: bool,
    transient: bool = False,
    terms: ScoreTerms | None = None,
) -> tuple[AttentionCall, Implementation]:
    """The call, and the implementation that runs it.

    Checks take the host longer than a launch does: calls like one before are not checked again.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: Shapes, devices or lengths that do not fit, or no implementation runs the call.
    """
    q, k, v, kv_lens, q_offset, kv_starts = tensors
    if getattr(mask, "on_device", False):
        mask = layout_of_data(mask, tensors)
        q_offset, tensors = None, (q, k, v, kv_lens, None, None)
    try:
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    except RuntimeError:  # nested tensors have none
        check_tensors(q, k, v)
        raise
    if len(q_shape) != 4 or len(k_shape) != 4 or not q_shape[3]:
        check_tensors(q, k, v)
    if q_offset is kv_starts is None:
        lengths = q_shape[1], k_shape[1]
    else:
        check_mask(mask)
        lengths = lengths_of(tensors, mask)
        tensors = with_positions(tensors, mask)
        *_, q_offset, kv_starts = tensors
    scale, deterministic, impl = options
    scale = q_shape[3] ** -0.5 if scale is None else scale
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    rest = (scale, deterministic, needs_grad, transient)
    calls, state = _calls_of(mask)
    # All that checks and implementations look at: not the numbers.
    given = (kv_lens is None, q_offset is None, kv_starts is None)
    sizes = (lengths, q_shape, q.stride(), k_shape, k.stride(), v_shape, v.stride())
    offset = (q.storage_offset() | k.storage_offset() | v.storage_offset()) % 8
    types = (q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
    like = (state, impl, rest, offset, given, sizes, types, terms and terms.signature)
    known = calls.get(like)
    if known is None:
        known = _first_of_its_kind(tensors, mask, lengths, impl, rest, terms)
        if len(calls) >= _MOST_CALLS:
            calls.clear()
        calls[like] = known
    if kv_lens is not None:
        check_kv_lens(kv_lens, q, k_shape[1])
    call = known.call
    if terms is not None:
        tensors = (*tensors, *terms.tensors)
    if mask.on_device:  # the layout is another one, and is planned with the launches
        call = call.with_layout(mask)
    return call.with_tensors(*tensors), known.implementation


def _first_of_its_kind(
    tensors: Tensors,
    mask: Mask | BlockLayout,
    lengths: tuple[int, int],
    impl: str,
    options: tuple[float, bool, bool, bool],
    terms: ScoreTerms | None,
) -> _Known:
    """Check a call, and plan it. options: Those of AttentionCall after the plan."""
    q, k, v, kv_lens, q_offset, kv_starts = tensors
    check_not_traced()
    check_tensors(q, k, v)
    warn_of_heads_first(k)
    if q_offset is None:
        warn_of_alignment(mask, *lengths)
    layout = mask if isinstance(mask, BlockLayout) else layout_of(mask, q, lengths)
    check_layout(layout, q, lengths, k.shape[2])
    call = AttentionCall(q, k, v, kv_lens, q_offset, kv_starts, layout, None, *options, terms=terms)
    implementation = choose(impl, call)
    nothing: Any = None  # a layout of data lives shorter than its prepared calls
    changed = {"layout": nothing} if layout.on_device else {"plan": implementation.plan(call)}
    return _Known(replace(call, **changed).without_tensors(), implementation)


def _calls_of(mask: Mask | BlockLayout) -> tuple[dict[Any, _Known], Any]:
    """The cache of prepared calls of this mask, and the current state of the mask."""
    if type(mask) is BlockLayout:  # isinstance takes longer
        return mask.calls, None
    if type(mask) is DeviceLayout:  # constructed in every call: prepared calls are shared
        return CACHE.calls_of_data, mask.signature
    record = getattr(mask, "_record", None)
    if record is None:
        check_mask(mask)
        record = CACHE.of(mask)
    return record.calls, mask.state() if mask.changeable else ()


def layout_of_data(mask: Mask | BlockLayout, tensors: Tensors) -> DeviceLayout:
    """The layout of data on the device that a call is given, or that its mask makes now.

    Raises:
        ValueError: The call has positions.
    """
    q, k, _, _, q_offset, kv_starts = tensors
    if kv_starts is not None or not (q_offset is None or (type(q_offset) is int and q_offset == 0)):
        raise ValueError(
            "a layout or mask of data on the device takes neither q_offset nor kv_starts: pass "
            "layout.fixed(), which makes the host wait for the data"
        )
    if isinstance(mask, Mask):
        ordinary = q.layout is k.layout is torch.strided and q.ndim == k.ndim == 4
        if not ordinary or q.is_nested or k.is_nested:
            check_tensors(q, k, tensors[2])
        mask = layout_of_call(mask, q.shape[1], k.shape[1], q.device)
    assert isinstance(mask, DeviceLayout)
    return mask


def layout_of(mask: Mask, q: Tensor, lengths: tuple[int, int]) -> BlockLayout:
    """The layout of a mask for these lengths, on the device of q; cached, except for data."""
    if mask.on_device:
        return mask.layout(*lengths, device=q.device)
    key = (lengths, q.device, mask.state())
    layout = CACHE.of(mask).layout(key, lambda: mask.layout(*lengths, device=q.device))
    CACHE.trim(mask)
    return layout
