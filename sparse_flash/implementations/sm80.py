"""The mma.sync kernels as an implementation of attention: GPUs from Ampere on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import bias_sums, data_layouts
from sparse_flash.implementations.score_features import (
    ALIBI,
    DROPOUT,
    RELATIVE,
    RELATIVE_2D,
    SINKS,
    SLOPES,
    SOFTCAP,
    WIDTH,
    ScoreFeature,
    missing_feature,
    widest,
)
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.distance_table import DistanceBias
from sparse_flash.kernels.image_table import ImageBias
from sparse_flash.kernels.score_arguments import NO_FLAGS, ScoreArguments, ScoreFlags
from sparse_flash.kernels.sm80 import attention, gradients, positions
from sparse_flash.kernels.sm80.config import shared_memory_of
from sparse_flash.kernels.sm80.scored_config import unsupported_gradients
from sparse_flash.masks.device_layout import DeviceLayout

NO_BIASES: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)


class Plans(NamedTuple):
    """The plans of both passes; `backward` is None where no gradients are needed.

    biases: Of the gradients of slopes and tables; None where they are not needed.
    """

    forward: Any
    backward: Any
    biases: Any = None


class Sm80:
    """CuTe DSL kernels for compute capability 8.0 and later: mma.sync, ldmatrix, cp.async."""

    name = "sm80"
    features: frozenset[ScoreFeature] = frozenset(
        (SOFTCAP, SINKS, ALIBI, SLOPES, RELATIVE, RELATIVE_2D, DROPOUT, WIDTH)
    )

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
        at, biases = call.q_offset is not None, None
        make: Any = positions.forward_plan_at if at else attention.forward_plan
        forward = make(*given, flags)
        if not call.needs_grad:
            return Plans(forward, None)
        if bias_sums.wants_biases(call):
            biases = bias_sums.plan_of(call, _arguments(call))
        make = gradients.backward_plan_at if at else gradients.backward_plan
        return Plans(forward, make(*given, call.deterministic, flags), biases)

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
        terms = None if call.terms is None else _arguments(call)
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
        given: tuple[Any, ...] = (call.kv_lens,)
        if call.q_offset is not None:
            given = (call.kv_lens, call.q_offset, call.kv_starts)
        backward: Any = gradients.backward if call.q_offset is None else gradients.backward_at
        plan = call.plan.backward
        found = backward(*inputs, plan, *given, scale, terms, transient=transient)
        of_terms = _gradients_of_terms(call, (out, lse), (dout, dlse), found.sinks)
        return found.dq, found.dk, found.dv, *of_terms


def _flags(call: AttentionCall) -> ScoreFlags:
    return NO_FLAGS if call.terms is None else _arguments(call).flags


def _arguments(call: AttentionCall) -> ScoreArguments:
    assert call.terms is not None
    terms, slopes, bias, image = call.terms, call.terms.slopes, None, None
    if terms.image_table is not None:
        assert terms.coordinates is not None
        image = ImageBias(terms.image_table, terms.coordinates)
    # ALiBi is computed in registers, but not along with biases that are looked up.
    if terms.table is not None or (image is not None and slopes is not None):
        bias, slopes = DistanceBias(slopes, terms.table), None
    of_call = (terms.softcap, slopes, terms.sinks, terms.seed, terms.dropped)
    return ScoreArguments(*of_call, bias, image=image)


def _unsupported_terms(call: AttentionCall) -> str | None:
    """Why the kernels cannot take a call with score terms; None where they can."""
    if call.terms is None:
        return None
    if isinstance(call.layout, DeviceLayout):
        return "it computes score terms on stored layouts only: pass layout.fixed()"
    if call.softmax_scale == 0:
        return "it computes score terms with a softmax_scale other than 0 only"
    return None


def _gradients_of_terms(
    call: AttentionCall,
    outputs: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor | None],
    sinks: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of the first tensors of the terms, if any; empty where not wanted.

    outputs: Output and logsumexp. gradients: Theirs.
    """
    if call.terms is None:
        return ()
    nothing, biases = call.q.new_empty(0), NO_BIASES
    if bias_sums.wants_biases(call):
        given = (call.plan.biases, _arguments(call), outputs, gradients)
        biases = bias_sums.gradients_of(call, *given)
    return tuple(
        x if wanted and x is not None else nothing
        for x, wanted in zip((*biases, sinks), call.terms.wants, strict=True)
    )
