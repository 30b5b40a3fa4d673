"""The implementations of attention, and which of them runs a call."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations.empty import EmptyBatch
from sparse_flash.implementations.reference import Reference
from sparse_flash.implementations.score_features import ScoreFeature
from sparse_flash.implementations.sm80 import Sm80
from sparse_flash.implementations.sm90 import Sm90


class Implementation(Protocol):
    """One way to compute attention.

    A call that it cannot run is refused by `unsupported_reason`; the other methods take only calls
    that it can. None of them records anything for autograd.
    """

    name: str
    features: frozenset[ScoreFeature]  # of the scores; a call with others is refused

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Why this implementation cannot run the call, with the way out; None where it can."""

    def unsupported_scores(self, call: AttentionCall) -> str | None:
        """Why it cannot compute the scores of a call, whatever its device; None where it can."""

    def plan(self, call: AttentionCall) -> Any:
        """State that similar calls can reuse; they find it in `call.plan`."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Output `(b, q_len, h, d_v)` and logsumexp `(b, h, q_len)`."""

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k and v, from those of the output and, if any, of the logsumexp.

        Where the call has score terms, also those of the terms' first tensors, in the order of
        `ScoreTerms`; empty ones stand for gradients that are not wanted.
        """


# Best first: "auto" takes the first one that can run a call; the last one runs all.
IMPLEMENTATIONS: tuple[Implementation, ...] = (Sm90(), Sm80(), Reference())
_EMPTY = EmptyBatch()


def choose(impl: str, call: AttentionCall) -> Implementation:
    """The implementation of that name, or with "auto" the best that can run the call.

    An implementation asked for by name never falls back to another; "auto" warns where a GPU is
    there and the kernels cannot be used.

    Raises:
        ValueError: No such implementation, or it cannot run the call (with the reason).
    """
    if impl == "auto":
        return _best(call) if call.q.shape[0] else _EMPTY
    for implementation in IMPLEMENTATIONS:
        if implementation.name == impl:
            if not call.q.shape[0]:
                return _EMPTY
            reason = implementation.unsupported_reason(call)
            if reason:
                raise ValueError(f"impl={impl!r} cannot run this: {reason}; use impl='auto'")
            return implementation
    known = ", ".join(repr(i.name) for i in IMPLEMENTATIONS)
    raise ValueError(f"unknown impl={impl!r}; there are 'auto', {known}")


def _best(call: AttentionCall) -> Implementation:
    reasons: list[str] = []
    for implementation in IMPLEMENTATIONS:
        reason = implementation.unsupported_reason(call)
        if reason is None:
            if implementation is IMPLEMENTATIONS[-1] and call.q.is_cuda:
                name = implementation.name
                warnings.warn(
                    f"impl='auto' takes {name!r}, which is slow: {reasons[-1]}", stacklevel=6
                )
            return implementation
        reasons.append(reason)
    raise ValueError(f"no implementation can run this: {'; '.join(reasons)}")
