"""The reference implementation of layouts of data, without a host wait.

In step j every block row takes its j-th tile, if it has one: the number of steps is the most tiles
that a row can have. Online softmax and backward pass are those of the reference implementation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_flash.call import AttentionCall
from sparse_flash.implementations.score_tiles import Places, add_sinks, gradients_of, tiles_of
from sparse_flash.masks import bits
from sparse_flash.masks.device_layout import DeviceLayout

_LOGITS = 1 << 26  # to hold at a time


class _Step(NamedTuple):
    """The j-th tiles of the rows of n batch entries and heads.

    blocks: Blocks of keys among all (b * h_kv * nk), int64 (n, nq).
    allowed: bool (n, nq, block_q, block_kv).
    places: Which elements these are.
    """

    blocks: Tensor
    allowed: Tensor
    places: Places


class _Problem:
    """Inputs by blocks: queries (b * h, nq, block_q, d), keys (b * h_kv * nk, block_kv, d)."""

    def __init__(self, call: AttentionCall, layout: DeviceLayout) -> None:
        self.call, self.layout, q, k = call, layout, call.q, call.k
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.listed = layout.tiles_at(layout.block)
        (b, s, h, _), (_, s_kv, h_kv, _) = q.shape, k.shape
        device, (block_q, block_kv) = q.device, layout.block
        self.nq, self.nk = -(-s // block_q), -(-s_kv // block_kv)
        self.terms = tiles_of(call)
        pairs = torch.arange(b * h, device=device)
        batch, head = pairs // h, pairs % h
        own = layout.source.heads
        pattern = batch * own[0] // b * own[1] + head * own[1] // h
        rows = pattern[:, None] * self.nq + torch.arange(self.nq, device=device)
        self.begin, self.end = self.listed.starts[rows], self.listed.starts[rows + 1]
        self.first = (batch * h_kv + head // (h // h_kv)) * self.nk  # block of keys of each pair
        limits = torch.full((b,), s_kv, device=device)
        if call.kv_lens is not None:
            limits = call.kv_lens.to(device, torch.int64).clamp(0, s_kv)
        self.limits = limits[batch][:, None, None]
        tokens = torch.arange(self.nk * block_kv, device=device).view(self.nk, block_kv)
        exists = (tokens < limits[:, None, None])[:, None, ..., None]  # (b, 1, nk, block_kv, 1)
        self.k, self.v = (self.keys(x).where(exists, 0).flatten(0, 2) for x in (call.k, call.v))
        self.q = self.queries(q)
        self.bit_tiles = torch.cat(
            [
                self.listed.bit_tiles,
                self.listed.bit_tiles.new_full((1, block_q, -(-block_kv // 8)), 255),
            ]
        )
        self.chunk = max(1, _LOGITS // (self.nq * block_q * block_kv))

    def queries(self, x: Tensor) -> Tensor:
        """(b, s, h, d) as blocks (b * h, nq, block_q, d)."""
        return _blocks(x, self.nq, self.layout.block[0], self.dtype).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """(b, s_kv, h_kv, d) as blocks (b, h_kv, nk, block_kv, d)."""
        return _blocks(x, self.nk, self.layout.block[1], self.dtype)

    def of_queries(self, blocks: Tensor) -> Tensor:
        """The inverse of `queries`."""
        b, s, h, _ = self.call.q.shape
        return blocks.view(b, h, -1, blocks.shape[3])[:, :, :s].transpose(1, 2)

    def of_keys(self, blocks: Tensor) -> Tensor:
        """The inverse of `keys`, of blocks (b * h_kv * nk, block_kv, d)."""
        b, s, h, _ = self.call.k.shape
        return blocks.view(b, h, -1, blocks.shape[2])[:, :, :s].transpose(1, 2)

    def chunks(self) -> Iterator[slice]:
        """Batch entries and heads, so many at a time that temporaries stay small."""
        for i in range(0, len(self.q), self.chunk):
            yield slice(i, i + self.chunk)

    def steps(self, part: slice) -> Iterator[_Step]:
        """All tiles of a chunk."""
        block_kv = self.layout.block[1]
        within = torch.arange(block_kv, device=self.q.device)
        pair = torch.arange(len(self.q), device=self.q.device)[part, None, None, None]
        size = self.layout.block[0]
        query = torch.arange(self.nq * size, device=self.q.device).view(1, self.nq, size, 1)
        for j in range(self.layout.source.longest):
            tile = self.begin[part] + j
            exists = tile < self.end[part]
            tile = torch.where(exists, tile, len(self.listed.tiles) - 1)
            column, entry = self.listed.tiles[tile].long().unbind(2)
            key = column[..., None] * block_kv + within
            here = (key < self.limits[part]) & exists[..., None]
            allowed = bits.unpack(self.bit_tiles[entry].flatten(0, 1), block_kv)
            allowed = allowed.view(*entry.shape, -1, block_kv) & here[:, :, None]
            places = Places(pair, query, key[:, :, None])
            yield _Step(self.first[part, None] + column, allowed, places)

    def logits(
        self, part: slice, step: _Step, derivative: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (n, nq, block_q, block_kv), -inf where not allowed, and their derivative by
        scale q k^T; None where it is 1 or not asked for.
        """
        s = self.q[part] @ self.k[step.blocks].transpose(2, 3) * self.call.softmax_scale
        factor = None if self.terms is None else self.terms.add_(s, step.places, derivative)
        return s.masked_fill_(~step.allowed, -torch.inf), factor

    def keep(self, step: _Step) -> Tensor | None:
        """Factors of dropout; None without it."""
        return None if self.terms is None else self.terms.keep(step.places, self.dtype)


def attend(call: AttentionCall, layout: DeviceLayout) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call."""
    p = _Problem(call, layout)
    out = p.q.new_zeros((*p.q.shape[:3], call.v.shape[3]))
    lse = torch.full_like(p.q[..., 0], -torch.inf)
    for part in p.chunks():
        top, total = torch.full_like(lse[part], -torch.inf), torch.zeros_like(lse[part])
        acc = torch.zeros_like(out[part])
        for step in p.steps(part):
            logits, _ = p.logits(part, step)
            new = torch.maximum(top, logits.amax(3))
            shift = new.masked_fill(new == -torch.inf, 0)
            weights, decay = (logits - shift[..., None]).exp(), (top - shift).exp()
            total = total * decay + weights.sum(3)
            kept = p.keep(step)
            weights = weights if kept is None else weights * kept
            acc = acc * decay[..., None] + weights @ p.v[step.blocks]
            top = new
        some = total > 0
        out[part] = acc / total.where(some, 1)[..., None]
        lse[part] = (top + total.log()).where(some, -torch.inf)
    b, s, h, _ = call.q.shape
    out, lse = add_sinks(call.terms, p.of_queries(out), lse.view(b, h, -1)[:, :, :s])
    return out.to(call.q.dtype).contiguous(), lse.contiguous()


def gradients(
    call: AttentionCall,
    layout: DeviceLayout,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor, ...]:
    """(dq, dk, dv) of a call, and gradients of score terms."""
    p, scale = _Problem(call, layout), call.softmax_scale
    delta = (dout.to(p.dtype) * out.to(p.dtype)).sum(3, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.transpose(1, 2)[..., None]
    rows = delta[..., 0]
    grad, delta = p.queries(dout), p.queries(delta)
    top = p.queries(lse.transpose(1, 2)[..., None])
    top = top.masked_fill(top == -torch.inf, torch.inf)  # rows without keys: P = 0
    dq, dk, dv = torch.zeros_like(p.q), torch.zeros_like(p.k), torch.zeros_like(p.v)
    for part in p.chunks():
        for step in p.steps(part):
            logits, factor = p.logits(part, step, derivative=True)
            weights, kept = (logits - top[part]).exp(), p.keep(step)
            dropped = weights if kept is None else weights * kept
            _add(dv, step.blocks, dropped.transpose(2, 3) @ grad[part], call.deterministic)
            ds = grad[part] @ p.v[step.blocks].transpose(2, 3)
            ds = ds if kept is None else ds.mul_(kept)
            ds = ds.sub_(delta[part]).mul_(weights)
            if p.terms is not None:
                p.terms.collect(ds, step.places)
            ds = (ds if factor is None else ds.mul_(factor)).mul_(scale)
            dq[part] += ds @ p.k[step.blocks]
            _add(dk, step.blocks, ds.transpose(2, 3) @ p.q[part], call.deterministic)
    dtype = call.q.dtype
    of_terms = gradients_of(call, p.terms, lse, rows)
    return p.of_queries(dq).to(dtype), p.of_keys(dk).to(dtype), p.of_keys(dv).to(dtype), *of_terms


def _blocks(x: Tensor, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """(b, s, h, d) as (b, h, count, size, d), with zeros beyond the end."""
    x = pad(x.to(dtype).transpose(1, 2), (0, 0, 0, count * size - x.shape[1]))
    return x.unflatten(2, (count, size))


def _add(blocks: Tensor, index: Tensor, values: Tensor, deterministic: bool) -> None:
    """blocks[index] += values; in a fixed order where asked."""
    if deterministic and blocks.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        blocks.index_put_((index.flatten(),), values.flatten(0, 1), accumulate=True)
    else:
        blocks.index_add_(0, index.flatten(), values.flatten(0, 1))
