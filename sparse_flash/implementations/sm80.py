"""The mma.sync kernels as an implementation of attention: GPUs from Ampere on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import data_layouts
from sparse_flash.implementations.score_features import (
    ALIBI,
    DROPOUT,
    SINKS,
    SOFTCAP,
    WIDTH,
    ScoreFeature,
    missing_feature,
    widest,
)
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.score_arguments import NO_FLAGS, ScoreArguments, ScoreFlags
from sparse_flash.kernels.sm80 import attention, gradients, positions
from sparse_flash.kernels.sm80.config import shared_memory_of
from sparse_flash.kernels.sm80.scored_config import unsupported_gradients
from sparse_flash.masks.device_layout import DeviceLayout


class Plans(NamedTuple):
    """The plans of both passes; `backward` is None where no gradients are needed."""

    forward: Any
    backward: Any


class Sm80:
    """CuTe DSL kernels for compute capability 8.0 and later: mma.sync, ldmatrix, cp.async."""

    name = "sm80"
    features: frozenset[ScoreFeature] = frozenset((SOFTCAP, SINKS, ALIBI, DROPOUT, WIDTH))

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Dtype, device, head_dim, the DSL, and strides decide."""
        reason = attention.unsupported_reason(call.q, call.k, call.v)
        reason = reason or self.unsupported_scores(call)
        width = max(call.q.shape[3], call.v.shape[3])
        if reason is None and call.needs_grad and call.terms is not None:
            limit = shared_memory_of(DeviceFacts.of(call.q.device))
            reason = unsupported_gradients(width, limit, _arguments(call).flags)
        if reason is None and isinstance(call.layout, DeviceLayout):
            given = (call.layout, call.q, call.deterministic, width)
            reason = gradients.unsupported_blocks(*given)
        return reason

    def unsupported_scores(self, call: AttentionCall) -> str | None:
        """Score features of the call decide, and with which others they come."""
        return missing_feature(call, self.features) or _unsupported_terms(call)

    def plan(self, call: AttentionCall) -> Plans:
        """Configs and schedules: made now, and not within somebody's CUDA graph of the backward.

        Layouts of data are planned with the launches.
        """
        given, flags = (call.layout, widest(call), call.k), _flags(call)
        if call.q_offset is None:
            forward: Any = attention.forward_plan(*given, flags)
            if not call.needs_grad:
                return Plans(forward, None)
            return Plans(forward, gradients.backward_plan(*given, call.deterministic, flags))
        forward = positions.forward_plan_at(*given, flags)
        if not call.needs_grad:
            return Plans(forward, None)
        return Plans(forward, gradients.backward_plan_at(*given, call.deterministic, flags))

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in float32."""
        inputs, scale, layout = (call.q, call.k, call.v), call.softmax_scale, call.layout
        if isinstance(layout, DeviceLayout):
            plan = attention.forward_plan(layout, widest(call), call.k)
            out, lse = attention.forward(
                *inputs, plan, call.kv_lens, scale, transient=call.transient
            )
            if plan.errors is not None:
                data_layouts.mark_forward(layout, plan.errors, out, lse)
            return out, lse
        plan, transient = call.plan.forward, call.transient
        terms = None if call.terms is None else _arguments(call).for_kernel
        if call.q_offset is not None:
            given = (call.kv_lens, call.q_offset, call.kv_starts)
            return positions.forward_at(*inputs, plan, *given, scale, terms, transient=transient)
        return attention.forward(*inputs, plan, call.kv_lens, scale, terms, transient=transient)

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """(dq, dk, dv), and gradients of score terms."""
        scale, transient, layout = call.softmax_scale, call.transient, call.layout
        inputs = (dout, dlse, call.q, call.k, call.v, out, lse)
        if isinstance(layout, DeviceLayout):
            plan = gradients.backward_plan(layout, widest(call), call.k, call.deterministic)
            found = gradients.backward(*inputs, plan, call.kv_lens, scale, transient=transient)
            if plan.errors is not None:
                data_layouts.mark_backward(layout, plan.errors, found.dq, found.dk, found.dv)
            return found.dq, found.dk, found.dv
        terms = None if call.terms is None else _arguments(call)
        given = (call.plan.backward, call.kv_lens)
        if call.q_offset is None:
            found = gradients.backward(*inputs, *given, scale, terms, transient=transient)
        else:
            at = (call.q_offset, call.kv_starts)
            found = gradients.backward_at(*inputs, *given, *at, scale, terms, transient=transient)
        return found.dq, found.dk, found.dv, *_gradients_of_terms(call, found.sinks)


def _flags(call: AttentionCall) -> ScoreFlags:
    return NO_FLAGS if call.terms is None else _arguments(call).flags


def _arguments(call: AttentionCall) -> ScoreArguments:
    assert call.terms is not None
    terms = call.terms
    return ScoreArguments(terms.softcap, terms.slopes, terms.sinks, terms.seed, terms.dropped)


def _unsupported_terms(call: AttentionCall) -> str | None:
    """Why the kernels cannot take a call with score terms; None where they can."""
    if call.terms is None:
        return None
    if isinstance(call.layout, DeviceLayout):
        return "it computes score terms on stored layouts only: pass layout.fixed()"
    if call.softmax_scale == 0:
        return "it computes score terms with a softmax_scale other than 0 only"
    return None


def _gradients_of_terms(call: AttentionCall, sinks: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of the first tensors of the terms, if any; empty where not wanted."""
    if call.terms is None:
        return ()
    nothing = call.q.new_empty(0)
    wanted = call.terms.wants[3] and sinks is not None
    return nothing, nothing, nothing, sinks if wanted and sinks is not None else nothing
