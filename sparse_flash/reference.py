"""The reference implementation: exact block-sparse attention in PyTorch, on any device.

Work and memory grow with the stored tiles. Block rows with the same number of tiles are gathered
into one batch of matrix products; long rows are walked in slices with the online softmax
(Milakov & Gimelshein, 2018). The backward pass recomputes the probabilities from the logsumexp
(Dao et al., FlashAttention, 2022), so nothing of size s^2 is stored.

float64 inputs are computed in float64, all others in float32. Everything here is a
`torch.library` custom op, so that autograd, torch.compile and opcheck know it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_flash.masks import BlockLayout, bits
from sparse_flash.masks.layout import FULL_TILE

_CHUNK_CPU, _CHUNK_GPU = 1 << 17, 1 << 26  # logits at a time: what caches hold, what fills a GPU


@dataclass(frozen=True)
class _Tiles:
    """A layout as the op receives it: tensors and integers only."""

    crow_indices: Tensor
    col_indices: Tensor
    bit_tile_indices: Tensor
    bit_tiles: Tensor
    pattern_map: Tensor
    block: tuple[int, int]


@dataclass(frozen=True)
class _Part:
    """Some block rows of equal length, for some heads (of any batch entries) that share them.

    Sizes: n heads, r block rows, c tiles of each.
    """

    batch: Tensor  # (n, 1, 1)
    head: Tensor  # (n, 1, 1)
    kv_head: Tensor  # (n, 1, 1)
    rows: Tensor  # (r, 1)
    cols: Tensor  # (r, c)
    entries: Tensor  # (r, c) bit tiles, -1 for full
    partial: bool  # whether any of them is partial
    first: bool  # the first slice of these rows
    last: bool  # the last one


class _Problem:
    """Inputs seen as blocks, without a copy where the blocks divide the lengths."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: _Tiles, kv_lens: Tensor | None, scale: float
    ) -> None:
        self.tiles, self.scale = tiles, scale
        self.batch, self.q_len, self.heads, _ = q.shape
        self.kv_len, self.kv_heads = k.shape[1:3]
        self.dtype = _compute_dtype(q)
        whole = torch.full((self.batch,), self.kv_len, device=q.device)
        self.limits = whole if kv_lens is None else kv_lens.to(q.device, torch.int64)
        self.within = torch.arange(tiles.block[1], device=q.device)
        self.ragged = kv_lens is not None or self.kv_len % tiles.block[1] != 0
        if kv_lens is not None:  # what lies beyond must not be seen at all, not even times zero
            beyond = torch.arange(self.kv_len, device=q.device) >= self.limits[:, None]
            k, v = (x.masked_fill(beyond[:, :, None, None], 0) for x in (k, v))
        block_q, block_kv = tiles.block
        self.q, self.k, self.v = _blocks(q, block_q), _blocks(k, block_kv), _blocks(v, block_kv)
        dictionary = bits.unpack(tiles.bit_tiles, block_kv)  # and for entry -1 a last one, all ones
        self.bits = torch.cat([dictionary, torch.ones_like(dictionary[:1])]) if len(dictionary) else None

    def parts(self) -> Iterator[_Part]:
        """All the work, in pieces of about a chunk; slices of the same rows follow each other.

        A chunk grows with the inputs: temporaries stay a fraction of them.
        """
        t, on_cpu = self.tiles, self.q.device.type == "cpu"
        chunk = max(_CHUNK_CPU, self.q.numel() // 16) if on_cpu else _CHUNK_GPU
        chunk = max(1, chunk // (t.block[0] * t.block[1]))  # in tiles
        owners = t.pattern_map.expand(self.batch, self.heads).flatten()
        cols, entries = t.col_indices.long(), t.bit_tile_indices.long()
        for pattern, starts in enumerate(t.crow_indices.cpu().long()):
            mine = (owners == pattern).nonzero().squeeze(1)
            degrees = starts.diff()
            for degree in degrees[degrees > 0].unique().tolist() if len(mine) else []:
                rows = (degrees == degree).nonzero()
                width = min(degree, chunk)
                for heads in mine.split(chunk // width):
                    for some in rows.split(max(1, chunk // (width * len(heads)))):
                        tiles = starts[some] + torch.arange(degree)
                        for i in range(0, degree, width):
                            piece = tiles[:, i : i + width].to(cols.device)
                            ends = (i == 0, i + width >= degree)
                            yield self._part(heads, some, cols[piece], entries[piece], ends)

    def _part(
        self, heads: Tensor, rows: Tensor, cols: Tensor, entries: Tensor, ends: tuple[bool, bool]
    ) -> _Part:
        heads = heads[:, None, None]
        batch, head = heads // self.heads, heads % self.heads
        kv_head = head // (self.heads // self.kv_heads)
        partial = self.bits is not None and bool((entries != FULL_TILE).any())
        return _Part(batch, head, kv_head, rows.to(cols.device), cols, entries, partial, *ends)

    def rows(self, part: _Part, blocks: Tensor) -> Tensor:
        """The part's block rows of a tensor `(b, h, nq, block_q, d)`: `(n * r, block_q, d)`."""
        return blocks[part.batch, part.head, part.rows].flatten(0, 2).to(self.dtype)

    def cols(self, part: _Part, blocks: Tensor) -> Tensor:
        """The keys or values of the part's tiles: `(n * r, c * block_kv, d)`."""
        taken = blocks[part.batch, part.kv_head, part.cols].to(self.dtype)
        return taken.flatten(2, 3).flatten(0, 1)

    def row_index(self, part: _Part) -> Tensor:
        """Where the part's block rows are in tensors `(b * h * nq, ...)`: `(n * r,)`."""
        first = (part.batch * self.heads + part.head) * self.q.shape[2]
        return (first + part.rows).flatten()

    def col_index(self, part: _Part) -> Tensor:
        """Where the part's tiles are in tensors `(b * h_kv * nk, ...)`: `(n * r * c,)`."""
        first = (part.batch * self.kv_heads + part.kv_head) * self.k.shape[2]
        return (first + part.cols).flatten()

    def logits(self, part: _Part, q: Tensor, k: Tensor) -> Tensor:
        """(n * r, block_q, c * block_kv), -inf where not allowed."""
        logits = torch.bmm(q, k.transpose(1, 2)).mul_(self.scale)
        n, (r, c), (block_q, block_kv) = len(part.batch), part.cols.shape, self.tiles.block
        view = logits.view(n, r, block_q, c, block_kv)
        if part.partial:
            allowed = self.bits[part.entries].transpose(1, 2)  # type: ignore[index]
            view.masked_fill_(~allowed, -torch.inf)
        if self.ragged:
            keys = part.cols[:, None, :, None] * block_kv + self.within
            view.masked_fill_(keys >= self.limits[part.batch[..., None, None]], -torch.inf)
        return logits


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor, block: int) -> Tensor:
    """(b, s, h, ...) seen as (b, h, blocks, block, ...); a ragged end is filled up with zeros."""
    missing = -x.shape[1] % block
    if missing:
        x = pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return x.transpose(1, 2).unflatten(2, (-1, block))


def _new_blocks(like: Tensor, block: int) -> Tensor:
    """Zeros (b * h * blocks, block, d) for results shaped as `like` (b, s, h, d)."""
    b, s, h, d = like.shape
    return like.new_zeros(b * h * -(-s // block), block, d, dtype=_compute_dtype(like))


def _joined(blocks: Tensor, like: Tensor) -> Tensor:
    """Blocks (b * h * blocks, block, d) seen as (b, s, h, d), in the dtype of `like`."""
    b, s, h, d = like.shape
    return blocks.view(b, h, -1, d)[:, :, :s].transpose(1, 2).to(like.dtype)


def _forward(problem: _Problem, q: Tensor) -> tuple[Tensor, Tensor]:
    """Output as blocks and logsumexp (b * h * nq, block_q)."""
    p = problem
    out = _new_blocks(q, p.tiles.block[0])
    lse = torch.full_like(out[:, :, 0], -torch.inf)
    for part in p.parts():
        queries = p.rows(part, p.q)
        logits = p.logits(part, queries, p.cols(part, p.k))
        if part.first:
            top, total = torch.full_like(logits[:, :, 0], -torch.inf), 0
            acc = torch.zeros_like(queries)
        new = torch.maximum(top, logits.amax(2))
        shift = new.masked_fill(new == -torch.inf, 0)  # a row without keys yet: exp(-inf), not NaN
        weights = logits.sub_(shift[:, :, None]).exp_()
        decay = (top - shift).exp()
        total = total * decay + weights.sum(2)
        acc = acc.mul_(decay[:, :, None]).baddbmm_(weights, p.cols(part, p.v))
        top = new
        if part.last:
            index, some = p.row_index(part), total > 0
            out[index] = acc / total.where(some, 1)[:, :, None]
            lse[index] = (shift + total.log()).where(some, -torch.inf)
    return out, lse


def _backward(
    problem: _Problem,
    likes: tuple[Tensor, ...],
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    deterministic: bool,
) -> list[Tensor]:
    """Blocks of dq, dk, dv, from dout as blocks, lse and delta (b * h * nq, block_q)."""
    p, (block_q, block_kv) = problem, problem.tiles.block
    blocks = (block_q, block_kv, block_kv)
    dq, dk, dv = (_new_blocks(x, block) for x, block in zip(likes, blocks, strict=True))

    def accumulate(part: _Part) -> None:  # a function of its own, so that temporaries end with it
        """P = exp(S - lse): dV = P^T dO, dS = scale P * (dO V^T - delta), dQ = dS K, dK = dS^T Q."""
        rows, cols = p.row_index(part), p.col_index(part)
        queries, grad = p.rows(part, p.q), p.rows(part, dout)
        keys = p.cols(part, p.k)
        shift = lse[rows].masked_fill_(lse[rows] == -torch.inf, torch.inf)  # rows without keys: P = 0
        weights = p.logits(part, queries, keys).sub_(shift[:, :, None]).exp_()
        _add(dv, cols, torch.bmm(weights.transpose(1, 2), grad), deterministic)
        dots = torch.bmm(grad, p.cols(part, p.v).transpose(1, 2))
        ds = dots.sub_(delta[rows][:, :, None]).mul_(weights).mul_(p.scale)
        del weights
        dq.index_add_(0, rows, torch.bmm(ds, keys))
        _add(dk, cols, torch.bmm(ds.transpose(1, 2), queries), deterministic)

    for part in p.parts():
        accumulate(part)
    return [dq, dk, dv]


def _add(blocks: Tensor, index: Tensor, values: Tensor, deterministic: bool) -> None:
    """blocks[index] += values, with repeated indices; in a fixed order where asked."""
    values = values.view(-1, *blocks.shape[1:])
    if deterministic and blocks.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        blocks.index_put_((index,), values, accumulate=True)
    else:
        blocks.index_add_(0, index, values)


@torch.library.custom_op("sparse_flash::reference_forward", mutates_args=())
def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bit_tile_indices: Tensor,
    bit_tiles: Tensor,
    pattern_map: Tensor,
    block: list[int],
    kv_lens: Tensor | None,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse); the layout comes as its arrays and its block."""
    problem = _Problem(q, k, v, _Tiles(crow_indices, col_indices, bit_tile_indices, bit_tiles, pattern_map, (block[0], block[1])), kv_lens, softmax_scale)
    with torch.autocast(q.device.type, enabled=False):  # the precision here is ours to choose
        out, lse = _forward(problem, q)
    b, s, h, _ = q.shape
    return _joined(out, q).contiguous(), lse.view(b, h, -1)[:, :, :s].contiguous()


@reference_forward.register_fake
def _(q, k, v, *layout_and_options):  # type: ignore[no-untyped-def]
    b, s, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, h, s, dtype=_compute_dtype(q))


@torch.library.custom_op("sparse_flash::reference_backward", mutates_args=())
def reference_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bit_tile_indices: Tensor,
    bit_tiles: Tensor,
    pattern_map: Tensor,
    block: list[int],
    kv_lens: Tensor | None,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), from the gradients of out and lse."""
    problem = _Problem(q, k, v, _Tiles(crow_indices, col_indices, bit_tile_indices, bit_tiles, pattern_map, (block[0], block[1])), kv_lens, softmax_scale)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    if dlse is not None:
        delta -= dlse.transpose(1, 2)
    delta = _blocks(delta, block[0]).flatten(0, 2)
    lse = _blocks(lse.transpose(1, 2), block[0]).flatten(0, 2)
    with torch.autocast(q.device.type, enabled=False):
        grads = _backward(problem, (q, k, v), _blocks(dout, block[0]), lse, delta, deterministic)
    return tuple(_joined(g, x) for g, x in zip(grads, (q, k, v), strict=True))  # type: ignore[return-value]


@reference_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, crow, col, entries, tiles, pattern_map, block, *options):  # type: ignore[no-untyped-def]
    blocks = (block[0], block[1], block[1])
    return tuple(_joined(_new_blocks(x, b), x) for x, b in zip((q, k, v), blocks, strict=True))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *layout, ctx.block, kv_lens, ctx.softmax_scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, *output, kv_lens, *layout)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, kv_lens, *layout = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 12
    dout = torch.zeros_like(out) if dout is None else dout
    options = (*layout, ctx.block, kv_lens, ctx.softmax_scale, ctx.deterministic)
    return (*reference_backward(dout, dlse, q, k, v, out, lse, *options), *(None,) * 9)


reference_forward.register_autograd(_differentiate, setup_context=_setup)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    kv_lens: Tensor | None,
    softmax_scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of validated inputs."""
    arrays, block = layout.arrays().values(), list(layout.block)
    return reference_forward(q, k, v, *arrays, block, kv_lens, softmax_scale, deterministic)


def why_not(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> str | None:
    """Why this implementation cannot run these inputs: it runs all."""
    return None
