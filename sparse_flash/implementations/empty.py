"""Attention of no batch entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall


class EmptyBatch:
    """Results of size zero, without a launch: calls of every implementation come here."""

    name = "empty"

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """It runs calls without batch entries only."""
        return None if call.q.shape[0] == 0 else "it computes nothing, and there are batch entries"

    def plan(self, call: AttentionCall) -> None:
        """Nothing is kept."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse) of shapes `(0, q_len, h, d)` and `(0, h, q_len)`."""
        b, s, h, _ = call.q.shape
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        return call.q.new_empty(call.q.shape), call.q.new_empty((b, h, s), dtype=dtype)

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), as empty as q, k and v."""
        return tuple(x.new_empty(x.shape) for x in (call.q, call.k, call.v))  # type: ignore[return-value]
