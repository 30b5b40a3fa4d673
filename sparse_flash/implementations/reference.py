"""The reference implementation: exact block-sparse attention in PyTorch, on any device.

Work and memory grow with the stored tiles. Block rows with the same number of tiles are gathered
into one batch of matrix products; long rows are walked in slices with the online softmax
(Milakov & Gimelshein, 2018). The backward pass recomputes the probabilities from the logsumexp
(Dao et al., FlashAttention, 2022), so nothing of size s^2 is stored.

float64 inputs are computed in float64, all others in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_flash.call import AttentionCall
from sparse_flash.implementations import data_layouts
from sparse_flash.implementations.score_features import FEATURES
from sparse_flash.implementations.score_tiles import (
    Places,
    add_sinks,
    gradients_of,
    tiles_of,
)
from sparse_flash.masks import bits
from sparse_flash.masks.device_layout import DeviceLayout
from sparse_flash.masks.layout import FULL_TILE

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Heads:
    """The heads of a part, n of them, of any batch entries: where their tokens and blocks begin."""

    count: int
    index: Tensor  # (n,) among b * h
    q_tokens: Tensor  # (n, 1, 1) first query among tokens (b * q_len * h)
    kv_tokens: Tensor  # (n, 1, 1, 1) first key among tokens (b * kv_len * h_kv)
    q_blocks: Tensor  # (n, 1) block of position 0 among blocks (b * h * nq)
    kv_blocks: Tensor  # (n, 1, 1) first among blocks (b * h_kv * nk)
    q_shift: Tensor  # (n, 1, 1) position of the first query
    kv_shift: Tensor  # (n, 1, 1, 1) index of the first valid key
    limits: Tensor  # (n, 1, 1, 1) number of keys


@dataclass(frozen=True)
class _Part:
    """Some block rows of equal length, for some heads (of any batch entries) that share them.

    Sizes: n heads, r block rows, c tiles of each. Values used several times are computed
    once: on a CPU, many small calls dominate the time.
    """

    shape: tuple[int, int, int]  # n, r, c
    places: Places | None  # of the elements (n, r, block_q, c, block_kv); None without score terms
    q_tokens: Tensor  # (n * r * block_q,) among tokens (b * q_len * h)
    kv_tokens: Tensor  # (n * r * c * block_kv,) among tokens (b * kv_len * h_kv)
    q_blocks: Tensor  # (n * r,) among results (b * h * nq)
    kv_blocks: Tensor  # (n * r * c,) among results (b * h_kv * nk)
    partial: list[int]  # which of c have bit tiles
    entries: Tensor  # (r, len(partial)) bit tiles of these, -1 for full
    after_q: Tensor | None  # (n, r, block_q) whether there is no such query; None: nowhere
    after_kv: Tensor | None  # (n, r, c, block_kv) whether beyond the last key; None: nowhere
    first: bool  # the first slice of these rows
    last: bool  # the last one


class _Problem:
    """The inputs, the parts of the work, and what each part needs of the inputs.

    Rows and keys are gathered token by token from where they are. Indices beyond the end of a
    sequence are clamped to its last token, and their results get weight 0. This needs neither
    padding nor copies, and keys beyond kv_lens are never read.
    """

    def __init__(self, call: AttentionCall) -> None:
        q, k, v, tiles = call.q, call.k, call.v, call.layout
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the reference implementation looks at its layout on the host, and cannot become "
                "part of a CUDA graph: bring the call to the kernels (impl='sm90' says what they "
                "need), or run it without a graph (training: --train.no-graph)"
            )
        self.tiles, self.scale = tiles, call.softmax_scale
        self.batch, self.q_len, self.heads, _ = q.shape
        self.kv_len, self.kv_heads = k.shape[1:3]
        self.dtype, device = _compute_dtype(q), q.device
        # Where queries and keys lie; and for each batch entry its first block row and their number.
        self.q_shift, self.kv_shift = _shifts(call)
        self.base = self.q_shift // tiles.block[0]
        self.at_positions = call.q_offset is not None
        self.nq = -(-self.q_len // tiles.block[0]) + self.at_positions
        self.nk = -(-self.kv_len // tiles.block[1])
        self.q, self.k, self.v = _tokens(q), _tokens(k), _tokens(v)
        self.terms = tiles_of(call)
        whole = torch.full((self.batch,), self.kv_len, device=device)
        limits = whole if call.kv_lens is None else call.kv_lens.to(device, torch.int64)
        self.limits = limits.clamp(0, self.kv_len)
        self.shortest = int((self.limits - self.kv_shift).min())
        self.shifted = self.at_positions or call.kv_starts is not None
        self.beyond = -(-tiles.kv_len // tiles.block[1]) * tiles.block[1] > self.shortest
        self.partial = tiles.num_partial > 0
        if self.at_positions and self.batch:
            self._check_positions()
        self.within = [torch.arange(block, device=device) for block in tiles.block]
        full = torch.full_like(tiles.bit_tiles[:1], 255)
        self.bit_tiles = torch.cat([tiles.bit_tiles, full])  # so that entry -1, the last, is full

    def _check_positions(self) -> None:
        """Check positions on the host; a kernel returns NaN for invalid ones."""
        end = int(self.q_shift.max()) + self.q_len
        if end > self.tiles.q_len:
            raise ValueError(
                f"with q_offset the last query has position {end - 1}, but the layout is for "
                f"{self.tiles.q_len} queries"
            )
        coordinates = None if self.terms is None else self.terms.terms.coordinates
        tokens = end if coordinates is None else coordinates[0].numel()
        if end > tokens:
            raise ValueError(
                f"relative2d: with q_offset the last query has position {end - 1}, but the image "
                f"has {tokens} tokens: give a larger height and width, or a smaller "
                "q_offset"
            )

    def query_blocks(self, like: Tensor) -> Tensor:
        """Zeros (b * h * nq, block_q, d) for results shaped as `like` (b, q_len, h, d)."""
        shape = (self.batch * self.heads * self.nq, self.tiles.block[0], like.shape[3])
        return like.new_zeros(shape, dtype=self.dtype)

    def key_blocks(self, like: Tensor) -> Tensor:
        """Zeros (b * h_kv * nk, block_kv, d) for results shaped as `like` (b, kv_len, h_kv, d)."""
        shape = (self.batch * self.kv_heads * self.nk, self.tiles.block[1], like.shape[3])
        return like.new_zeros(shape, dtype=self.dtype)

    def of_queries(self, blocks: Tensor) -> Tensor:
        """Blocks of positions (b * h * nq, block_q, d) as (b, q_len, h, d)."""
        rows = blocks.view(self.batch, self.heads, -1, blocks.shape[2])
        if self.at_positions:
            first = (self.q_shift - self.base * self.tiles.block[0])[:, None]
            rows = _rows_at(rows, first + torch.arange(self.q_len, device=rows.device))
        return rows[:, :, : self.q_len].transpose(1, 2)

    def of_keys(self, blocks: Tensor) -> Tensor:
        """Blocks of positions (b * h_kv * nk, block_kv, d) as (b, kv_len, h_kv, d)."""
        rows = blocks.view(self.batch, self.kv_heads, -1, blocks.shape[2])
        if self.at_positions:
            index = torch.arange(self.kv_len, device=rows.device) - self.kv_shift[:, None]
            rows = _rows_at(rows, index)
        return rows[:, :, : self.kv_len].transpose(1, 2)

    def parts(self, logits: int) -> Iterator[_Part]:
        """All the work, in pieces of about that many logits; slices of rows follow each other."""
        t = self.tiles
        chunk = max(1, logits // (t.block[0] * t.block[1]))  # in tiles
        idle = (self.limits <= self.kv_shift)[:, None]  # sequences without keys
        owners = t.pattern_map.expand(self.batch, self.heads).masked_fill(idle, -1)
        cols, entries = t.col_indices.long(), t.bit_tile_indices.long()
        for base, (pattern, starts) in itertools.product(
            self.base.unique().tolist(), enumerate(t.crow_indices.cpu().long())
        ):
            here = (owners == pattern) & (self.base == base)[:, None]
            mine = here.flatten().nonzero().squeeze(1)
            degrees = starts.diff()
            first, end = max(base, 0), max(base + self.nq, 0)
            for degree in degrees[first:end].unique().tolist() if len(mine) else []:
                if not degree:
                    continue
                rows = (degrees[first:end] == degree).nonzero() + first
                tiles = (starts[rows] + torch.arange(degree, device="cpu")).to(cols.device)
                work = (rows.to(cols.device), cols[tiles], entries[tiles])
                width = min(degree, chunk)
                for heads in map(self._heads, mine.split(chunk // width)):
                    size = max(1, chunk // (width * heads.count))
                    for some, columns, bit_tiles in zip(
                        *(x.split(size) for x in work), strict=True
                    ):
                        for i in range(0, degree, width):
                            piece = slice(i, i + width)
                            yield self._part(
                                heads,
                                some,
                                columns[:, piece],
                                bit_tiles[:, piece],
                                i == 0,
                                i + width >= degree,
                            )

    def _heads(self, index: Tensor) -> _Heads:
        """Of heads among b * h."""
        batch, head = index // self.heads, index % self.heads
        kv_head = head // (self.heads // self.kv_heads)
        return _Heads(
            len(index),
            index,
            (batch * self.q_len * self.heads + head)[:, None, None],
            (batch * self.kv_len * self.kv_heads + kv_head)[:, None, None, None],
            (index * self.nq - self.base[batch])[:, None],
            ((batch * self.kv_heads + kv_head) * self.nk)[:, None, None],
            self.q_shift[batch][:, None, None],
            self.kv_shift[batch][:, None, None, None],
            self.limits[batch][:, None, None, None],
        )

    def _part(
        self, heads: _Heads, rows: Tensor, cols: Tensor, entries: Tensor, first: bool, last: bool
    ) -> _Part:
        """Of block rows (r, 1), and tiles (r, c): their columns and bit tiles."""
        block_q, block_kv = self.tiles.block
        query = rows * block_q + self.within[0]  # (r, block_q)
        key = (cols * block_kv)[..., None] + self.within[1]  # (r, c, block_kv)
        places = None
        if self.terms is not None:
            pair = heads.index[:, None, None, None, None]
            places = Places(pair, query[:, :, None, None], key[:, None])
        if self.shifted:  # positions become indices, other ones for each batch entry
            query, key = query - heads.q_shift, key + heads.kv_shift
        after_q = after_kv = None
        if self.nq * block_q > self.q_len:
            after_q = ((query < 0) | (query >= self.q_len)).expand(heads.count, -1, -1)
            query = query.clamp(0, self.q_len - 1)
        if self.beyond and (int(cols.max()) + 1) * block_kv > self.shortest:
            after_kv = key >= heads.limits
            key = torch.minimum(key, heads.limits - 1)
            cols = cols.clamp(max=self.nk - 1)  # of tiles beyond the keys, whose weights are 0
        partial = (entries != FULL_TILE).any(0).nonzero().flatten().tolist() if self.partial else []
        return _Part(
            (heads.count, *cols.shape),
            places,
            (query * self.heads + heads.q_tokens).flatten(),
            (key * self.kv_heads + heads.kv_tokens).flatten(),
            (rows[:, 0] + heads.q_blocks).flatten(),
            (cols + heads.kv_blocks).flatten(),
            partial,
            entries[:, partial] if partial else entries[:, :0],
            after_q,
            after_kv,
            first,
            last,
        )

    def rows(self, part: _Part, *tensors: Tensor) -> list[Tensor]:
        """The part's rows of tensors of tokens `(b * q_len * h, d)`: `(n * r, block_q, d)`."""
        return [self._take(x, part.q_tokens, part) for x in tensors]

    def keys(self, part: _Part, *tensors: Tensor) -> list[Tensor]:
        """The part's keys of tensors `(b * kv_len * h_kv, d)`: `(n * r, c * block_kv, d)`."""
        return [self._take(x, part.kv_tokens, part) for x in tensors]

    def _take(self, tokens: Tensor, index: Tensor, part: _Part) -> Tensor:
        n, r, _ = part.shape
        return tokens.index_select(0, index).to(self.dtype).view(n * r, -1, tokens.shape[1])

    def logits(
        self, part: _Part, shift: Tensor | None, q: Tensor, k: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """To base 2: log2(e) times the scores, + shift, -inf where not allowed.

        shift: (n * r, block_q, 1). Returns (n * r, block_q, c * block_kv), and, with a shift, the
        derivative of the scores by scale q k^T; None where it is 1. (Base 2 because torch.exp is
        several times slower than exp2 where its result is 0.)
        """
        factor = None
        if self.terms is not None and part.places is not None:
            logits = torch.bmm(q, k.transpose(1, 2)).mul_(self.scale)
            factor = self.terms.add_(self.view(part, logits), part.places, shift is not None)
            logits.mul_(_LOG2_E)
            if shift is not None:
                logits.add_(shift)
        else:
            beta, start = (0, q.new_zeros(1)) if shift is None else (1, shift)
            alpha = self.scale * _LOG2_E
            logits = torch.baddbmm(start, q, k.transpose(1, 2), beta=beta, alpha=alpha)
        view, block_kv = self.view(part, logits), self.tiles.block[1]
        if part.partial:
            bias = _bias(~bits.unpack(self.bit_tiles[part.entries], block_kv), self.dtype)
            for j, column in zip(part.partial, bias.unbind(1), strict=True):
                view[:, :, :, j].add_(column)
        if part.after_kv is not None:
            view.add_(_bias(part.after_kv, self.dtype)[:, :, None])
        return logits, factor

    def view(self, part: _Part, elements: Tensor) -> Tensor:
        """(n * r, block_q, c * block_kv) as (n, r, block_q, c, block_kv)."""
        (n, r, c), (block_q, block_kv) = part.shape, self.tiles.block
        return elements.view(n, r, block_q, c, block_kv)

    def keep(self, part: _Part, like: Tensor) -> Tensor | None:
        """Factors of dropout, shaped as `like` (n * r, block_q, c * block_kv); None without."""
        if self.terms is None or part.places is None:
            return None
        kept = self.terms.keep(part.places, self.dtype)
        return (
            None if kept is None else kept.expand(self.view(part, like).shape).reshape(like.shape)
        )


def _chunk(q: Tensor, share: int) -> int:
    """Logits to hold at a time: `q.numel() / share` where a problem is large.

    As many as fill a GPU; on a CPU, many where a problem is small and calls are what costs, few
    where it is large, so that temporaries stay a fraction of its inputs and in the caches.
    """
    if q.device.type != "cpu":
        return 1 << 26
    return 1 << 19 if q.numel() <= 1 << 20 else max(1 << 16, q.numel() // share)


def _bias(forbidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 or -inf: adding it is much faster than masked_fill_ with a mask that broadcasts."""
    zeros = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
    return zeros.masked_fill_(forbidden, -torch.inf)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tokens(x: Tensor) -> Tensor:
    """(b, s, h, d) as (b * s * h, d); a copy only where the strides do not allow a view."""
    return x.reshape(-1, x.shape[-1])


def _rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[b, h, index[b]] of (b, h, n, d); zeros where the index is negative."""
    b, h, n, d = rows.shape
    place = index.clamp(0, n - 1)[:, None, :, None].expand(b, h, -1, d)
    return rows.gather(2, place).masked_fill_((index < 0)[:, None, :, None], 0)


def _shifts(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """What to subtract from positions to get indices of queries, and to add for keys: (b,)."""
    b, device = call.q.shape[0], call.q.device
    none = torch.zeros(b, dtype=torch.int64, device=device)
    starts = none if call.kv_starts is None else call.kv_starts.long().clamp(0, call.k.shape[1])
    return none if call.q_offset is None else call.q_offset.long() - starts, starts


def _forward(problem: _Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output as blocks, and logsumexp (b * h * nq, block_q)."""
    p = problem
    out = p.query_blocks(v)
    lse = torch.full_like(out[:, :, 0], -torch.inf)
    for part in p.parts(_chunk(p.q, share=8)):  # no gradients are held: twice those of _backward
        (queries,), (keys, values) = p.rows(part, p.q), p.keys(part, p.k, p.v)
        logits, _ = p.logits(part, None, queries, keys)
        if part.first:
            top = torch.full_like(logits[:, :, 0], -torch.inf)
            total = torch.zeros_like(top)
            acc = out.new_zeros((*top.shape, out.shape[2]))
        new = torch.maximum(top, logits.amax(2))
        shift = new.masked_fill(new == -torch.inf, 0)  # a row without keys yet: 2^-inf, not NaN
        weights = logits.sub_(shift[:, :, None]).exp2_()
        decay = (top - shift).exp2()
        total = total * decay + weights.sum(2)
        kept = p.keep(part, weights)
        weights = weights if kept is None else weights.mul_(kept)
        acc = acc.mul_(decay[:, :, None]).baddbmm_(weights, values)
        top = new
        if part.last:
            some = total > 0
            out[part.q_blocks] = acc / total.where(some, 1)[:, :, None]
            lse[part.q_blocks] = ((shift + total.log2()) / _LOG2_E).where(some, -torch.inf)
    return out, lse


def _backward(
    problem: _Problem,
    likes: tuple[Tensor, ...],
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    deterministic: bool,
) -> list[Tensor]:
    """Blocks of dq, dk, dv, from dout, lse and delta by token (b * q_len * h, d_v or 1)."""
    p, (q, k, v) = problem, likes
    dq, dk, dv = p.query_blocks(q), p.key_blocks(k), p.key_blocks(v)

    def accumulate(part: _Part) -> None:  # a function of its own, so that temporaries end with it
        """P = exp(S - lse), dV = P^T dO, dS = P (dO V^T - delta) scale, dQ = dS K, dK = dS^T Q."""
        grad, top, d = p.rows(part, dout, lse, delta)
        if part.after_q is not None:  # repetitions of the last row
            top.view(-1, *part.after_q.shape).masked_fill_(part.after_q, torch.inf)
        (queries,), (keys,) = p.rows(part, p.q), p.keys(part, p.k)
        weights, factor = p.logits(part, top.neg_(), queries, keys)
        weights.exp2_()
        del queries, keys
        kept = p.keep(part, weights)
        dropped = weights if kept is None else weights * kept
        _add(dv, part.kv_blocks, torch.bmm(dropped.transpose(1, 2), grad), deterministic)
        del dropped
        (values,) = p.keys(part, p.v)
        if p.terms is None or part.places is None:
            ds = torch.baddbmm(d, grad, values.transpose(1, 2), beta=-p.scale, alpha=p.scale)
            ds.mul_(weights)
        else:
            ds = torch.bmm(grad, values.transpose(1, 2))
            ds = ds if kept is None else ds.mul_(kept)
            ds.sub_(d).mul_(weights)
            view = p.view(part, ds)
            p.terms.collect(view, part.places)
            view = view if factor is None else view.mul_(factor)
            view.mul_(p.scale)
        del weights, values
        # Gathered twice rather than held:
        (queries,), (keys,) = p.rows(part, p.q), p.keys(part, p.k)
        _add(dq, part.q_blocks, torch.bmm(ds, keys), deterministic)
        _add(dk, part.kv_blocks, torch.bmm(ds.transpose(1, 2), queries), deterministic)

    for part in p.parts(_chunk(q, share=16)):
        accumulate(part)
    return [dq, dk, dv]


def _add(blocks: Tensor, index: Tensor, values: Tensor, deterministic: bool) -> None:
    """blocks[index] += values, with repeated indices; in a fixed order where asked."""
    values = values.view(-1, *blocks.shape[1:])
    if deterministic and blocks.is_cuda:  # index_add_ is atomic there, index_put_ sorts
        blocks.index_put_((index,), values, accumulate=True)
    else:
        blocks.index_add_(0, index, values)


class Reference:
    """Exact block-sparse attention in PyTorch, for calls without a kernel."""

    name = "reference"
    features = frozenset(FEATURES)

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """It runs all."""
        return None

    def unsupported_scores(self, call: AttentionCall) -> str | None:
        """It has all score features."""
        return None

    def plan(self, call: AttentionCall) -> None:
        """Nothing is kept."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """(out, lse), lse in the dtype that is computed in."""
        if isinstance(call.layout, DeviceLayout):
            return data_layouts.attend(call, call.layout, self.attend)
        problem, q = _Problem(call), call.q
        with torch.autocast(q.device.type, enabled=False):  # the precision here is ours to choose
            out, lse = _forward(problem, call.v)
            lse = problem.of_queries(lse[..., None])[..., 0].transpose(1, 2)
            out, lse = add_sinks(call.terms, problem.of_queries(out), lse)
        return out.to(q.dtype).contiguous(), lse.contiguous()

    def gradients(
        self, call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
    ) -> tuple[Tensor, ...]:
        """(dq, dk, dv), and gradients of score terms."""
        if isinstance(call.layout, DeviceLayout):
            given = (out, lse, dout, dlse)
            return data_layouts.gradients(call, call.layout, given, self.gradients)
        problem = _Problem(call)
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        if dlse is not None:
            delta -= dlse.transpose(1, 2)
        top = torch.mul(lse.transpose(1, 2), _LOG2_E, out=torch.empty_like(delta))
        top.masked_fill_(top == -torch.inf, torch.inf)  # rows without keys: P = 2^(S - inf) = 0
        rows = (_tokens(dout), _tokens(top[..., None]), _tokens(delta[..., None]))
        likes = (call.q, call.k, call.v)
        with torch.autocast(call.q.device.type, enabled=False):
            dq, dk, dv = _backward(problem, likes, *rows, call.deterministic)
        dtype = call.q.dtype  # views of the blocks where nothing is converted: copies take memory
        dq, dk, dv = problem.of_queries(dq), problem.of_keys(dk), problem.of_keys(dv)
        of_terms = gradients_of(call, problem.terms, lse, delta)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), *of_terms
