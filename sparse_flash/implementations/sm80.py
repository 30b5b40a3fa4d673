"""The mma.sync kernels as an implementation of attention: GPUs from Ampere on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import data_layouts
from sparse_flash.implementations.score_features import ScoreFeature, missing_feature
from sparse_flash.kernels.sm80 import attention, gradients, positions
from sparse_flash.masks.device_layout import DeviceLayout


class Plans(NamedTuple):
    """The plans of both passes; `backward` is None where no gradients are needed."""

    forward: Any
    backward: Any


class Sm80:
    """CuTe DSL kernels for compute capability 8.0 and later: mma.sync, ldmatrix, cp.async."""

    name = "sm80"
    features: frozenset[ScoreFeature] = frozenset()

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Dtype, device, head_dim, the DSL, and strides decide."""
        reason = attention.unsupported_reason(call.q, call.k, call.v)
        reason = reason or self.unsupported_scores(call)
        if reason is None and isinstance(call.layout, DeviceLayout):
            reason = gradients.unsupported_blocks(call.layout, call.q, call.deterministic)
        return reason

    def unsupported_scores(self, call: AttentionCall) -> str | None:
        """Score features of the call decide."""
        return missing_feature(call, self.features)

    def plan(self, call: AttentionCall) -> Plans:
        """Configs and schedules: made now, and not within somebody's CUDA graph of the backward.

        Layouts of data are planned with the launches.
        """
        layout, q, k = call.layout, call.q, call.k
        at = call.q_offset is not None
        forward = positions.forward_plan_at if at else attention.forward_plan
        if not call.needs_grad:
            return Plans(forward(layout, q, k), None)
        backward = gradients.backward_plan_at if at else gradients.backward_plan
        return Plans(forward(layout, q, k), backward(layout, q, k, call.deterministic))

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in float32."""
        inputs, scale, layout = (call.q, call.k, call.v), call.softmax_scale, call.layout
        if isinstance(layout, DeviceLayout):
            plan = attention.forward_plan(layout, call.q, call.k)
            out, lse = attention.forward(
                *inputs, plan, call.kv_lens, scale, transient=call.transient
            )
            if plan.errors is not None:
                data_layouts.mark_forward(layout, plan.errors, out, lse)
            return out, lse
        plan = call.plan.forward
        if call.q_offset is not None:
            given = (call.kv_lens, call.q_offset, call.kv_starts)
            return positions.forward_at(*inputs, plan, *given, scale, transient=call.transient)
        return attention.forward(*inputs, plan, call.kv_lens, scale, transient=call.transient)

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        scale, transient, layout = call.softmax_scale, call.transient, call.layout
        inputs = (dout, dlse, call.q, call.k, call.v, out, lse)
        if isinstance(layout, DeviceLayout):
            plan = gradients.backward_plan(layout, call.q, call.k, call.deterministic)
            dq, dk, dv = gradients.backward(*inputs, plan, call.kv_lens, scale, transient=transient)
            if plan.errors is not None:
                data_layouts.mark_backward(layout, plan.errors, dq, dk, dv)
            return dq, dk, dv
        given = (call.plan.backward, call.kv_lens)
        if call.q_offset is None:
            return gradients.backward(*inputs, *given, scale, transient=transient)
        at = (call.q_offset, call.kv_starts)
        return gradients.backward_at(*inputs, *given, *at, scale, transient=transient)
