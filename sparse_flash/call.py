"""AttentionCall: one call of attention, as all implementations see it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from sparse_flash.masks import BlockLayout


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Validated inputs and options of one call."""

    q: Tensor  # queries (b, q_len, h, d)
    k: Tensor  # keys (b, kv_len, h_kv, d)
    v: Tensor  # values, shaped as the keys
    kv_lens: Tensor | None  # number of valid keys per batch entry, int (b,); None for all
    q_offset: Tensor | None  # position of the first query, int32 (b,); None: see `positions`
    kv_starts: Tensor | None  # first valid key per batch entry, int32 (b,); None for 0
    TENSORS: ClassVar = ("q", "k", "v", "kv_lens", "q_offset", "kv_starts")  # autograd saves them
    layout: BlockLayout  # tiles to compute, on the device of the inputs
    plan: Any  # result of `Implementation.plan` for this signature
    softmax_scale: float  # factor of the logits
    deterministic: bool  # whether gradients must be bitwise repeatable
    needs_grad: bool  # whether gradients may be needed
    # Whether memory allocated by the call must not outlive it: it may come from the memory pool
    # of a foreign CUDA graph.
    transient: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensor arguments, in the order of `TENSORS`."""
        return _tensors_of(self)

    def with_tensors(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None = None,
        q_offset: Tensor | None = None,
        kv_starts: Tensor | None = None,
    ) -> AttentionCall:
        """The same call of other tensors. Faster than dataclasses.replace."""
        new = object.__new__(AttentionCall)
        attributes = new.__dict__
        attributes.update(self.__dict__)
        attributes["q"], attributes["k"], attributes["v"] = q, k, v
        attributes["kv_lens"], attributes["q_offset"] = kv_lens, q_offset
        attributes["kv_starts"] = kv_starts
        if self.q is None:
            attributes["_options"] = self
        return new

    def without_tensors(self) -> AttentionCall:
        """The options alone, for a graph that saves the tensors elsewhere."""
        found: AttentionCall | None = self.__dict__.get("_options")
        if found is None:
            nothing: dict[str, Any] = dict.fromkeys(self.TENSORS)
            return replace(self, **nothing)
        return found


_tensors_of = operator.attrgetter(*AttentionCall.TENSORS)
