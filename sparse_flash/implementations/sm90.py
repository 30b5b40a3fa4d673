"""The Hopper kernels as an implementation of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import bias_sums, data_layouts
from sparse_flash.implementations.score_features import (
    ALIBI,
    DROPOUT,
    RELATIVE,
    SINKS,
    SLOPES,
    SOFTCAP,
    WIDTH,
    ScoreFeature,
    missing_feature,
    widest,
)
from sparse_flash.kernels.distance_table import DistanceBias
from sparse_flash.kernels.score_arguments import ScoreArguments
from sparse_flash.kernels.sm90 import attention, positions, scored_attention
from sparse_flash.kernels.sm90.scored_config import MOST_HEAD_DIM, MOST_WITH_BIAS_AND_DROPOUT
from sparse_flash.masks.device_layout import DeviceLayout


class Plans(NamedTuple):
    """The plans of both passes; `backward` is None where no gradients are needed.

    at_positions: Whether the kernels for positions run the forward pass.
    biases: Of the gradients of slopes and tables by a kernel of their own; None where the backward
        kernel computes them.
    """

    forward: Any
    backward: Any
    at_positions: bool = False
    biases: Any = None


class Sm90:
    """CuTe DSL kernels for compute capability 9.0: TMA, WGMMA, warp specialization."""

    name = "sm90"
    features: frozenset[ScoreFeature] = frozenset(
        (SOFTCAP, SINKS, ALIBI, SLOPES, RELATIVE, DROPOUT, WIDTH)
    )

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Dtype, device, head_dim, the DSL, and strides decide."""
        reason = attention.unsupported_reason(call.q, call.k, call.v)
        reason = reason or self.unsupported_scores(call)
        if reason is None and isinstance(call.layout, DeviceLayout):
            wide = widest(call)
            reason = attention.unsupported_blocks(call.layout, wide, call.deterministic)
        return reason

    def unsupported_scores(self, call: AttentionCall) -> str | None:
        """Score features of the call decide, and with which others they come."""
        return missing_feature(call, self.features) or _unsupported_terms(call)

    def plan(self, call: AttentionCall) -> Plans:
        """Configs and schedules: made now, and not within somebody's CUDA graph of the backward.

        Layouts of data are planned by `attend`.
        """
        layout, q, k = call.layout, widest(call), call.k
        if call.terms is not None:
            flags = _arguments(call).flags
            if call.q_offset is not None:
                return Plans(scored_attention.forward_plan_at(layout, q, k, flags), None)
            scored = scored_attention.forward_plan(layout, q, k, flags)
            if not call.needs_grad:
                return Plans(scored, None)
            terms = _arguments(call, backward=True)
            given = (layout, q, k, call.deterministic, terms.flags)
            biases = bias_sums.plan_of(call, terms) if _sums_apart(call) else None
            backward_plans = scored_attention.backward_plans(*given)
            return Plans(scored, backward_plans, biases=biases)
        at_positions = _at_positions(call)
        forward = positions.forward_plan_at if at_positions else attention.forward_plan
        backward = positions if call.q_offset is not None else attention
        if not call.needs_grad:
            return Plans(forward(layout, q, k), None, at_positions)
        make = backward.backward_plans_at if backward is positions else backward.backward_plans
        plans = make(layout, q, k, call.deterministic)
        return Plans(forward(layout, q, k), plans, at_positions)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in float32."""
        if call.layout.on_device:  # isinstance takes longer
            return self._attend_by_data(call)
        plan, scale, transient = call.plan.forward, call.softmax_scale, call.transient
        inputs = (call.q, call.k, call.v, plan)
        if call.terms is None and not call.plan.at_positions:
            return attention.forward(*inputs, call.kv_lens, scale, transient=transient)
        given = (call.kv_lens, call.q_offset, call.kv_starts)
        if call.terms is not None:
            terms = _arguments(call)
            if call.q_offset is not None:
                return scored_attention.forward_at(
                    *inputs, *given, scale, terms, transient=transient
                )
            return scored_attention.forward(
                *inputs, call.kv_lens, scale, terms, transient=transient
            )
        return positions.forward_at(*inputs, *given, scale, transient=transient)

    def _attend_by_data(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """As `attend`, with the plans of both passes: the backward's while the GPU is busy."""
        q, k, layout = call.q, call.k, call.layout
        assert isinstance(layout, DeviceLayout)
        wide = widest(call)
        plan = attention.forward_plan(layout, wide, k)
        given = (plan, call.kv_lens, call.softmax_scale)
        out, lse = attention.forward(q, k, call.v, *given, transient=call.transient)
        if plan.errors is not None:
            data_layouts.mark_forward(layout, plan.errors, out, lse)
        if call.needs_grad and not call.transient and layout.keeps_what_is_derived:
            attention.backward_plans(layout, wide, k, call.deterministic)
        return out, lse

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """(dq, dk, dv), and gradients of score terms."""
        layout, scale, transient = call.layout, call.softmax_scale, call.transient
        plans: Any = None if layout.on_device else call.plan.backward
        if isinstance(layout, DeviceLayout):
            plans = attention.backward_plans(layout, widest(call), call.k, call.deterministic)
        inputs = (dout, dlse, call.q, call.k, call.v, out, lse, plans, call.kv_lens)
        if call.q_offset is not None:
            at = (call.q_offset, call.kv_starts)
            return positions.backward_at(*inputs, *at, scale, transient=transient)
        if call.terms is not None:
            terms = _arguments(call, backward=True)
            found = scored_attention.backward(*inputs, scale, terms, transient=transient)
            biases: tuple[Any, ...] = (*found.bias, None)
            if _sums_apart(call):
                given = (call.plan.biases, terms, (out, lse), (dout, dlse))
                biases = bias_sums.gradients_of(call, *given)
            return found.dq, found.dk, found.dv, *_gradients_of_terms(call, biases, found.sinks)
        dq, dk, dv = attention.backward(*inputs, scale, transient=transient)
        if isinstance(layout, DeviceLayout) and plans.dkdv.errors is not None:
            data_layouts.mark_backward(layout, plans.dkdv.errors, dq, dk, dv)
        return dq, dk, dv


def _at_positions(call: AttentionCall) -> bool:
    """Whether the kernels for positions run the forward pass; one query takes the decoding one."""
    one = call.q.shape[1] == 1 and not call.layout.on_device
    return call.q_offset is not None or (one and call.q.shape[3] == call.v.shape[3])


def _arguments(call: AttentionCall, backward: bool = False) -> ScoreArguments:
    """The terms of the forward or of the backward kernel."""
    assert call.terms is not None
    terms, graded = call.terms, backward and any(call.terms.wants[:2])
    graded = graded and not _sums_apart(call)
    bias, slopes = None, terms.slopes
    # ALiBi alone has a forward kernel of its own. Beside other terms it is a bias by distance.
    at = call.q_offset is not None
    others = (terms.softcap, terms.seed is not None, backward, at)
    if terms.table is not None or (slopes is not None and any(others)):
        bias, slopes = DistanceBias(slopes, terms.table), None
    return ScoreArguments(
        terms.softcap, slopes, terms.sinks, terms.seed, terms.dropped, bias, graded
    )


def _unsupported_terms(call: AttentionCall) -> str | None:
    """Why the kernels cannot take a call with score terms; None where they can."""
    terms = call.terms
    if terms is None and call.q.shape[3] == call.v.shape[3]:
        return None
    if call.q_offset is not None and call.q.shape[3] != call.v.shape[3]:
        return "it computes values of another head_dim without q_offset and kv_starts only"
    if terms is None:
        return None
    if call.q_offset is not None and call.needs_grad:
        return "it computes gradients with score terms without q_offset and kv_starts only"
    if isinstance(call.layout, DeviceLayout):
        return "it computes score terms on stored layouts only: pass layout.fixed()"
    if call.softmax_scale == 0:
        return "it computes score terms with a softmax_scale other than 0 only"
    return _unsupported_gradients(call) if call.needs_grad else None


def _unsupported_gradients(call: AttentionCall) -> str | None:
    flags, width = _arguments(call, backward=True).flags, max(call.q.shape[3], call.v.shape[3])
    if any(flags.of_backward.values()) and width > MOST_HEAD_DIM:
        return (
            f"it computes gradients with softcap, bias or dropout up to head_dim "
            f"{MOST_HEAD_DIM}, not {width}"
        )
    return None


def _sums_apart(call: AttentionCall) -> bool:
    """Whether gradients of slopes and tables have a kernel of their own: the backward kernel lacks
    registers for them beside other terms, and adds them up in no fixed order.
    """
    if not bias_sums.wants_biases(call):
        return False
    assert call.terms is not None
    width = max(call.q.shape[3], call.v.shape[3])
    wide = call.terms.seed is not None and width > MOST_WITH_BIAS_AND_DROPOUT
    return call.deterministic or call.terms.softcap > 0 or wide


def _gradients_of_terms(
    call: AttentionCall, biases: tuple[Any, ...], sinks: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of the first tensors of the terms, empty where not wanted.

    biases: Those of slopes, table and image table.
    """
    assert call.terms is not None
    nothing = call.q.new_empty(0)
    return tuple(
        x if wanted and x is not None else nothing
        for x, wanted in zip((*biases, sinks), call.terms.wants, strict=True)
    )
