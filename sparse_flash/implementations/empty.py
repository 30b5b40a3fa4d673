"""Attention of no batch entries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations.score_features import FEATURES


class EmptyBatch:
    """Results of size zero, without a launch: calls of every implementation come here."""

    name = "empty"
    features = frozenset(FEATURES)

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """It runs calls without batch entries only."""
        return None if call.q.shape[0] == 0 else "it computes nothing, and there are batch entries"

    def unsupported_scores(self, call: AttentionCall) -> str | None:
        """It has all score features."""
        return None

    def plan(self, call: AttentionCall) -> None:
        """Nothing is kept."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse) of shapes `(0, q_len, h, d_v)` and `(0, h, q_len)`."""
        b, s, h, _ = call.q.shape
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        out = call.q.new_empty((b, s, h, call.v.shape[3]))
        return out, call.q.new_empty((b, h, s), dtype=dtype)

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """(dq, dk, dv), as empty as q, k and v, and zeros for score terms."""
        gradients = [x.new_empty(x.shape) for x in (call.q, call.k, call.v)]
        if call.terms is not None:
            nothing, terms = call.q.new_empty(0), call.terms
            gradients += [
                torch.zeros_like(x) if w and x is not None else nothing
                for x, w in zip(terms.tensors, terms.wants, strict=False)
            ]
        return tuple(gradients)
