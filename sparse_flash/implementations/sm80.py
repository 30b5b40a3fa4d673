"""The mma.sync kernels as an implementation of attention: GPUs from Ampere on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.kernels.sm80 import attention, gradients, positions
from sparse_flash.masks.device_layout import DeviceLayout


class Plans(NamedTuple):
    """The plans of both passes; `backward` is None where no gradients are needed."""

    forward: Any
    backward: Any


class Sm80:
    """CuTe DSL kernels for compute capability 8.0 and later: mma.sync, ldmatrix, cp.async."""

    name = "sm80"

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Dtype, device, head_dim, the DSL, and strides decide."""
        if isinstance(call.layout, DeviceLayout):
            return (
                "layouts of indices, tables or lengths on the device need the Hopper kernels or "
                "the reference; layout.fixed() gives a layout for all"
            )
        return attention.unsupported_reason(call.q, call.k, call.v)

    def plan(self, call: AttentionCall) -> Plans:
        """Configs and schedules: made now, and not within somebody's CUDA graph of the backward."""
        layout, q, k = call.layout, call.q, call.k
        at = call.q_offset is not None
        forward = positions.forward_plan_at if at else attention.forward_plan
        if not call.needs_grad:
            return Plans(forward(layout, q, k), None)
        backward = gradients.backward_plan_at if at else gradients.backward_plan
        return Plans(forward(layout, q, k), backward(layout, q, k, call.deterministic))

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in float32."""
        inputs, plan, scale = (call.q, call.k, call.v), call.plan.forward, call.softmax_scale
        if call.q_offset is not None:
            given = (call.kv_lens, call.q_offset, call.kv_starts)
            return positions.forward_at(*inputs, plan, *given, scale, transient=call.transient)
        return attention.forward(*inputs, plan, call.kv_lens, scale, transient=call.transient)

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        inputs = (dout, dlse, call.q, call.k, call.v, out, lse, call.plan.backward, call.kv_lens)
        scale, transient = call.softmax_scale, call.transient
        if call.q_offset is None:
            return gradients.backward(*inputs, scale, transient=transient)
        given = (call.q_offset, call.kv_starts)
        return gradients.backward_at(*inputs, *given, scale, transient=transient)
