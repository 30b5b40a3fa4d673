"""The Hopper kernels as an implementation of attention."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import data_layouts
from sparse_flash.kernels.sm90 import attention, positions
from sparse_flash.masks.device_layout import DeviceLayout


class Plans(NamedTuple):
    """The plans of both passes; `backward` is None where no gradients are needed."""

    forward: Any
    backward: Any


class Sm90:
    """CuTe DSL kernels for compute capability 9.0: TMA, WGMMA, warp specialization."""

    name = "sm90"

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Dtype, device, head_dim, the DSL, and strides decide."""
        reason = attention.unsupported_reason(call.q, call.k, call.v)
        if reason is None and isinstance(call.layout, DeviceLayout):
            reason = attention.unsupported_blocks(call.layout, call.q, call.deterministic)
        return reason

    def plan(self, call: AttentionCall) -> Plans:
        """Configs and schedules: made now, and not within somebody's CUDA graph of the backward."""
        layout, q, k = call.layout, call.q, call.k
        forward = positions.forward_plan_at if _at_positions(call) else attention.forward_plan
        backward = positions if call.q_offset is not None else attention
        if not call.needs_grad:
            return Plans(forward(layout, q, k), None)
        make = backward.backward_plans_at if backward is positions else backward.backward_plans
        return Plans(forward(layout, q, k), make(layout, q, k, call.deterministic))

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in float32."""
        inputs, plan, scale = (call.q, call.k, call.v), call.plan.forward, call.softmax_scale
        if _at_positions(call):
            given = (call.kv_lens, call.q_offset, call.kv_starts)
            return positions.forward_at(*inputs, plan, *given, scale, transient=call.transient)
        out, lse = attention.forward(*inputs, plan, call.kv_lens, scale, transient=call.transient)
        if isinstance(call.layout, DeviceLayout) and plan.errors is not None:
            data_layouts.mark_forward(call.layout, plan.errors, out, lse)
        return out, lse

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        inputs = (dout, dlse, call.q, call.k, call.v, out, lse, call.plan.backward, call.kv_lens)
        scale, transient = call.softmax_scale, call.transient
        if call.q_offset is None:
            dq, dk, dv = attention.backward(*inputs, scale, transient=transient)
            errors = call.plan.backward.dkdv.errors
            if isinstance(call.layout, DeviceLayout) and errors is not None:
                data_layouts.mark_backward(call.layout, errors, dq, dk, dv)
            return dq, dk, dv
        given = (call.q_offset, call.kv_starts)
        return positions.backward_at(*inputs, *given, scale, transient=transient)


def _at_positions(call: AttentionCall) -> bool:
    """Whether the kernels for positions run the forward pass; one query takes the decoding one."""
    one = call.q.shape[1] == 1 and not call.layout.on_device
    return call.q_offset is not None or one
