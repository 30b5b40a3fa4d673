"""AttentionCall: one call of attention, as all implementations see it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sparse_flash.masks import BlockLayout


class ScoreTerms(NamedTuple):
    """Score terms, sinks and dropout of one call: tensors, numbers, and which gradients are wanted.

    Score of query i and key j at positions p_i and p_j, in natural logits:

        softcap * tanh(softmax_scale * q_i k_j / softcap) - slopes * |p_i - p_j|
            + table[clip(p_i - p_j, -r, r) + r] + image_table[clip(y_i - y_j) + r_y, ...]
    """

    slopes: Tensor | None  # ALiBi, (h,)
    table: Tensor | None  # by distance, (h, 2 r + 1)
    image_table: Tensor | None  # by vertical and horizontal distance, (h, 2 r_y + 1, 2 r_x + 1)
    sinks: Tensor | None  # logits without a value, (h,)
    coordinates: Tensor | None  # row and column of each token of an image, int32 (2, height, width)
    seed: Tensor | None  # of dropout, int64 (1,)
    wants: tuple[bool, bool, bool, bool]  # whether the first four need gradients
    softcap: float  # 0: none
    dropped: int  # dropout: elements out of 256

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in the order of `TERM_TENSORS`."""
        return self[: len(TERM_TENSORS)]  # type: ignore[return-value]

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that an implementation may look at, without the numbers in tensors."""
        shapes = [None if x is None else x.shape for x in self.tensors]
        return (*shapes, *self[len(TERM_TENSORS) :])

    def with_tensors(self, tensors: Iterable[Tensor | None]) -> ScoreTerms:
        """The same terms of other tensors."""
        return terms_of_options(self.wants, self.softcap, self.dropped, tensors)

    def without_tensors(self) -> ScoreTerms:
        """The options alone."""
        return terms_of_options(self.wants, self.softcap, self.dropped)


TERM_TENSORS = ScoreTerms._fields[:6]
NUM_DIFFERENTIABLE = 4  # of these, at the beginning


def terms_of_options(
    wants: Iterable[bool],
    softcap: float,
    dropped: int,
    tensors: Iterable[Tensor | None] = (None,) * len(TERM_TENSORS),
) -> ScoreTerms:
    """The terms with these options, and with these tensors or none."""
    a, b, c, d = wants
    slopes, table, image_table, sinks, *others = tensors
    coordinates, seed = others
    own = (slopes, table, image_table, sinks, coordinates, seed)
    return ScoreTerms(*own, (a, b, c, d), softcap, dropped)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Validated inputs and options of one call."""

    q: Tensor  # queries (b, q_len, h, d)
    k: Tensor  # keys (b, kv_len, h_kv, d)
    v: Tensor  # values (b, kv_len, h_kv, d_v)
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
    terms: ScoreTerms | None = None  # of the scores

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensor arguments, in the order of `TENSORS`, then those of the score terms."""
        tensors = _tensors_of(self)
        return tensors if self.terms is None else tensors + self.terms.tensors

    def with_tensors(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None = None,
        q_offset: Tensor | None = None,
        kv_starts: Tensor | None = None,
        *terms: Tensor | None,
    ) -> AttentionCall:
        """The same call of other tensors. Faster than dataclasses.replace."""
        new = object.__new__(AttentionCall)
        attributes = new.__dict__
        attributes.update(self.__dict__)
        attributes["q"], attributes["k"], attributes["v"] = q, k, v
        attributes["kv_lens"], attributes["q_offset"] = kv_lens, q_offset
        attributes["kv_starts"] = kv_starts
        if self.terms is not None:
            attributes["terms"] = self.terms.with_tensors(terms)
        if self.q is None:
            attributes["_options"] = self
        return new

    def with_layout(self, layout: BlockLayout) -> AttentionCall:
        """The same call of another layout. Faster than dataclasses.replace."""
        new = object.__new__(AttentionCall)
        new.__dict__.update(self.__dict__)
        new.__dict__["layout"] = layout
        return new

    def without_tensors(self) -> AttentionCall:
        """The options alone, for a graph that saves the tensors elsewhere."""
        found: AttentionCall | None = self.__dict__.get("_options")
        if found is None:
            nothing: dict[str, Any] = dict.fromkeys(self.TENSORS)
            if self.terms is not None:
                nothing["terms"] = self.terms.without_tensors()
            return replace(self, **nothing)
        return found


_tensors_of = operator.attrgetter(*AttentionCall.TENSORS)
