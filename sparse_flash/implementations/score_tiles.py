"""Score terms, sinks and dropout on tiles of scores, for the reference implementation.

A tile batch is a tensor of scores with any dimensions; `Places` says which elements they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall, ScoreTerms
from sparse_flash.scores.philox import LEVELS, keep_mask


class Places(NamedTuple):
    """Which elements a batch of tiles has: int64 tensors that broadcast to the tiles' shape."""

    pair: Tensor  # batch entry * heads + head
    q: Tensor  # positions of queries
    kv: Tensor  # positions of keys


class ScoreTiles:
    """The terms of one call, applied tile by tile, and the gradients that they collect."""

    def __init__(self, terms: ScoreTerms, heads: int, deterministic: bool) -> None:
        self.terms, self.heads, self.deterministic = terms, heads, deterministic
        self.gradients = [
            torch.zeros_like(x) if w and x is not None else None
            for x, w in zip(terms.tensors, terms.wants, strict=False)
        ]
        self.keep_scale = LEVELS / (LEVELS - terms.dropped)

    def add_(self, products: Tensor, places: Places, derivative: bool) -> Tensor | None:
        """Turn scaled products q k^T into scores, in place.

        Returns the derivative of the scores by the products; None where it is 1 or not asked for.
        """
        terms, factor = self.terms, None
        if terms.softcap:
            products.div_(terms.softcap).tanh_()
            factor = 1 - products.square() if derivative else None
            products.mul_(terms.softcap)
        head = places.pair % self.heads
        if terms.slopes is not None:
            products.sub_(terms.slopes[head] * (places.q - places.kv).abs())
        if terms.table is not None:
            products.add_(terms.table.flatten()[self._table_index(places)])
        if terms.image_table is not None:
            products.add_(terms.image_table.flatten()[self._image_index(places)])
        return factor

    def collect(self, ds: Tensor, places: Places) -> None:
        """Add gradients of the scores to those of slopes and tables."""
        slopes, table, image, _ = self.gradients
        head = places.pair % self.heads
        if slopes is not None:
            by_distance = -ds * (places.q - places.kv).abs()
            self._scatter(slopes, head.expand(ds.shape), by_distance)
        if table is not None:
            self._scatter(table, self._table_index(places), ds)
        if image is not None:
            self._scatter(image, self._image_index(places), ds)

    def keep(self, places: Places, dtype: torch.dtype) -> Tensor | None:
        """0 where dropout drops, 1 / (1 - rate) elsewhere; None without dropout."""
        if self.terms.seed is None:
            return None
        kept = keep_mask(self.terms.seed, self.terms.dropped, *places)
        return kept.to(dtype) * self.keep_scale

    def _table_index(self, places: Places) -> Tensor:
        assert self.terms.table is not None
        size = self.terms.table.shape[1]
        return places.pair % self.heads * size + _clipped(places.q - places.kv, size)

    def _image_index(self, places: Places) -> Tensor:
        table, coordinates = self.terms.image_table, self.terms.coordinates
        assert table is not None
        assert coordinates is not None
        of_sides = coordinates.long().flatten(1)
        last = of_sides.shape[1] - 1
        index = places.pair % self.heads
        for of_side, size in zip(of_sides, table.shape[1:], strict=True):
            of_q, of_kv = (of_side[x.clamp(0, last)] for x in (places.q, places.kv))
            index = index * size + _clipped(of_q - of_kv, size)
        return index

    def _scatter(self, sums: Tensor, index: Tensor, values: Tensor) -> None:
        """sums[index] += values, in a fixed order where asked."""
        index, values = index.expand(values.shape).flatten(), values.flatten().to(sums.dtype)
        if self.deterministic and sums.is_cuda:  # index_add_ is atomic there, index_put_ sorts
            sums.view(-1).index_put_((index,), values, accumulate=True)
        else:
            sums.view(-1).index_add_(0, index, values)


def _clipped(distance: Tensor, size: int) -> Tensor:
    """Column of a table of 2 r + 1 = size for each distance."""
    r = size // 2
    return distance.clamp(-r, r) + r


def tiles_of(call: AttentionCall) -> ScoreTiles | None:
    """The terms of a call; None where it has none."""
    if call.terms is None:
        return None
    return ScoreTiles(call.terms, call.q.shape[2], call.deterministic)


def add_sinks(terms: ScoreTerms | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) with the sinks in the denominator.

    out: `(b, s, h, d_v)`; lse: `(b, h, s)`.
    """
    if terms is None or terms.sinks is None:
        return out, lse
    total = torch.logaddexp(lse, terms.sinks.to(lse.dtype)[:, None])
    decay = (lse - total).exp().masked_fill(lse == -torch.inf, 0)
    return out * decay.transpose(1, 2)[..., None], total


def sink_gradients(terms: ScoreTerms, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum exp(sinks - lse) delta, `(h,)`: a sink's score has probability, and no value.

    lse: `(b, h, s)`, sinks included. delta: dO O - dlse by row, `(b, s, h)`.
    """
    assert terms.sinks is not None
    probability = (terms.sinks.to(lse.dtype)[:, None] - lse).exp()
    probability = probability.masked_fill(lse == -torch.inf, 0)
    products = probability * delta.transpose(1, 2).to(lse.dtype)
    return products.sum((0, 2)).neg_().to(terms.sinks.dtype)


def gradients_of(
    call: AttentionCall, tiles: ScoreTiles | None, lse: Tensor, delta: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of the first tensors of the terms, empty where not wanted."""
    if tiles is None:
        return ()
    if tiles.terms.wants[-1]:
        tiles.gradients[-1] = sink_gradients(tiles.terms, lse, delta)
    return tuple(call.q.new_empty(0) if x is None else x for x in tiles.gradients)
