"""Layouts of data on the device in the reference implementation, and NaN where they are invalid."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import reference_steps
from sparse_flash.kernels import data_kernels
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.device_layout import DeviceLayout


def stored_layout(layout: DeviceLayout, heads: int) -> BlockLayout:
    """The layout with arrays of exact sizes, for so many query heads. The host waits."""
    stored = copy.copy(layout.stored())
    repeats = max(1, heads // layout.source.heads[1])
    stored.pattern_map = stored.pattern_map.repeat_interleave(repeats, 1)
    return stored


def host_has(layout: DeviceLayout) -> bool:
    """Whether the host can look at the data without waiting for a device."""
    return layout.device.type == "cpu"


def mark_queries(layout: DeviceLayout, errors: Tensor, *results: Tensor) -> None:
    """Write NaN into results `(b, q_len, h, ...)` of block rows with errors, in place.

    errors: uint8 (P, nq), by block rows of the layout.
    """
    for x in results:
        b, s, h = x.shape[:3]
        bad = _expanded(layout, errors, b, h).repeat_interleave(layout.block[0], 2)[..., :s]
        bad = bad.transpose(1, 2)
        x.masked_fill_(bad.view(b, s, h, *(1,) * (x.ndim - 3)), torch.nan)


def mark_keys(layout: DeviceLayout, errors: Tensor, heads: int, *results: Tensor) -> None:
    """Write NaN into gradients `(b, kv_len, h_kv, d)` of key heads with errors, in place.

    Nothing tells which keys the rows with errors should have seen: it may be any.
    """
    for x in results:
        b, _, h_kv, _ = x.shape
        bad = _expanded(layout, errors, b, heads).any(2).view(b, h_kv, -1).any(2)
        x.masked_fill_(bad[:, None, :, None], torch.nan)


def mark_forward(layout: DeviceLayout, errors: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write NaN into (out, lse) of block rows with errors, in place."""
    heads, block = layout.source.heads, layout.block[0]
    if not data_kernels.mark_invalid(errors, heads, block, out, lse):
        mark_queries(layout, errors, out, lse.transpose(1, 2))


def mark_backward(layout: DeviceLayout, errors: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Write NaN into the gradients that block rows with errors concern, in place."""
    heads, block = layout.source.heads, layout.block[0]
    if not data_kernels.mark_invalid(errors, heads, block, dq, dk, dv):
        mark_queries(layout, errors, dq)
        mark_keys(layout, errors, dq.shape[2], dk, dv)


def _expanded(layout: DeviceLayout, errors: Tensor, b: int, h: int) -> Tensor:
    """Whether block rows have errors, bool (b, h, nq)."""
    bad = (errors != 0).view(*layout.source.heads, -1)
    return bad.repeat_interleave(max(1, h // bad.shape[1]), 1).expand(b, -1, -1)


def attend(
    call: AttentionCall, layout: DeviceLayout, reference: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the reference implementation, NaN in block rows with errors."""
    with torch.autocast(call.q.device.type, enabled=False):
        if host_has(layout):
            out, lse = reference(replace(call, layout=stored_layout(layout, call.q.shape[2])))
        else:
            out, lse = reference_steps.attend(call, layout)
    mark_forward(layout, layout.tiles_at(layout.block).errors, out, lse)
    return out, lse


def gradients(
    call: AttentionCall,
    layout: DeviceLayout,
    given: tuple[Any, ...],
    reference: Callable[..., Any],
) -> tuple[Tensor, ...]:
    """(dq, dk, dv), and gradients of score terms, of the reference implementation.

    given: out, lse, dout and dlse.
    """
    with torch.autocast(call.q.device.type, enabled=False):
        if host_has(layout):
            stored = stored_layout(layout, call.q.shape[2])
            results = reference(replace(call, layout=stored), *given)
        else:
            results = reference_steps.gradients(call, layout, *given)
    dq, dk, dv, *of_terms = (x.contiguous() for x in results)
    mark_backward(layout, layout.tiles_at(layout.block).errors, dq, dk, dv)
    return dq, dk, dv, *of_terms
