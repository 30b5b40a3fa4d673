"""AttentionCall: one call of attention, as all implementations see it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_flash.masks import BlockLayout


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Validated inputs and options of one call.

    Attributes:
        q: Queries `(b, q_len, h, d)`.
        k: Keys `(b, kv_len, h_kv, d)`.
        v: Values, shaped as the keys.
        kv_lens: Number of valid keys per batch entry, int `(b,)`; None for all.
        layout: The tiles to compute, on the device of the inputs.
        softmax_scale: Factor of the logits.
        deterministic: Whether gradients must be bitwise repeatable.
        needs_grad: Whether gradients may be asked for.
        transient: Whether memory that the call allocates may not outlive it: it comes from the
            pool of somebody else's CUDA graph.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kv_lens: Tensor | None
    layout: BlockLayout
    softmax_scale: float
    deterministic: bool
    needs_grad: bool
    transient: bool = False

    TENSORS: ClassVar = ("q", "k", "v", "kv_lens")  # what autograd saves

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensor arguments, in the order of `TENSORS`."""
        return tuple(getattr(self, name) for name in self.TENSORS)

    def with_tensors(self, tensors: Iterable[Tensor | None]) -> AttentionCall:
        """The same call of other tensors; faster than dataclasses.replace."""
        new = object.__new__(AttentionCall)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(zip(self.TENSORS, tensors, strict=True))
        return new

    def without_tensors(self) -> AttentionCall:
        """The options alone, for a graph that saves the tensors elsewhere."""
        return self.with_tensors((None,) * len(self.TENSORS))
