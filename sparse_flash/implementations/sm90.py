"""The Hopper kernels as an implementation of attention."""

from __future__ import annotations

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.kernels.sm90 import attention


class Sm90:
    """CuTe DSL kernels for compute capability 9.0: TMA, WGMMA, warp specialization."""

    name = "sm90"

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Dtype, device, head_dim, the DSL, and strides decide."""
        if call.q_offset is not None:
            return "it does not take q_offset or kv_starts"
        return attention.unsupported_reason(call.q, call.k, call.v)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in float32."""
        plan = attention.forward_plan(call.layout, call.q, call.k)
        if call.needs_grad:  # now, and not within somebody's CUDA graph of the backward
            attention.backward_plans(call.layout, call.q, call.k, call.deterministic)
        inputs = (call.q, call.k, call.v, plan, call.kv_lens, call.softmax_scale)
        return attention.forward(*inputs, transient=call.transient)

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        plans = attention.backward_plans(call.layout, call.q, call.k, call.deterministic)
        inputs = (call.q, call.k, call.v, out, lse, plans, call.kv_lens, call.softmax_scale)
        return attention.backward(dout, dlse, *inputs, transient=call.transient)
