"""Selectors: modules that score the key blocks of each block of queries.

A selector is called with q `(b, s, h, d)`, k `(b, s, h_kv, d)` and kv_lens `(b,)` or None, and
returns scores `(b, h_kv, nq, nk)`. Three published ways of learning to select:

- none: the scores are those of q and k themselves (`PooledSelector`; MoBA, Lu et al., 2025);
- the scores have weights of their own, which learn from the attention that was paid
  (`IndexSelector`; the indexer of DeepSeek-V3.2-Exp, 2025);
- the scores are those of attention to compressed blocks, whose output takes part in the layer's
  (`CompressedSelector`; NSA, Yuan et al., 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from sparse_flash import masks
from sparse_flash.api import block_sparse_attention
from sparse_flash.masks.modes import without_autocast
from sparse_flash.selection.scores import Pool, block_scores, checked_block

_LOGITS = 1 << 26  # of compressed attention, in memory at a time


class PooledSelector(nn.Module):
    """Scores of pooled queries and keys, without weights and gradients, as in MoBA.

    Args:
        block: (block_q, block_kv), in tokens.
        pool: As in `block_scores`.
        causal: As in `block_scores`.
    """

    def __init__(self, block: tuple[int, int], pool: Pool = "mean", causal: bool = False) -> None:
        super().__init__()
        self.block, self.pool, self.causal = checked_block(block), pool, causal

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Scores `(b, h_kv, nq, nk)`."""
        given = {"pool": self.pool, "causal": self.causal, "kv_lens": kv_lens}
        return block_scores(q, k, self.block, **given)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"block={self.block}, pool={self.pool!r}, causal={self.causal}"


class IndexSelector(nn.Module):
    """Scores of learned projections of q and k, a small indexer in the manner of DeepSeek-V3.2-Exp.

    Its weights begin as the same random orthonormal projection of q and k, so that the first scores
    estimate q k^T. Nothing but a loss on the scores trains them: q and k are detached. Without the
    ReLU and the head weights of the original.

    Args:
        heads: Query heads.
        head_dim: Width of a head.
        block: (block_q, block_kv), in tokens.
        kv_heads: Key heads; default: as many as query heads.
        dim: Width of the projections; default: head_dim, at most 32.
        pool: As in `block_scores`.
        causal: As in `block_scores`.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        block: tuple[int, int],
        kv_heads: int | None = None,
        dim: int | None = None,
        pool: Pool = "mean",
        causal: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        dim = min(32, head_dim) if dim is None else dim
        if not 1 <= dim <= head_dim:
            raise ValueError(f"dim must be 1 to head_dim={head_dim}, got {dim}")
        self.block, self.pool, self.causal = checked_block(block), pool, causal
        basis = torch.linalg.qr(torch.randn(kv_heads, head_dim, head_dim))[0][..., :dim]
        basis = basis * (head_dim / dim) ** 0.25
        self.of_k = nn.Parameter(basis)
        self.of_q = nn.Parameter(basis.repeat_interleave(heads // kv_heads, 0).clone())

    def forward(self, q: Tensor, k: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Scores `(b, h_kv, nq, nk)`, differentiable in the weights."""
        scale = (self.of_q.shape[2] / q.shape[3]) ** 0.5
        q = torch.einsum("bshd,hdr->bshr", q.detach().to(self.of_q.dtype), self.of_q * scale)
        k = torch.einsum("bshd,hdr->bshr", k.detach().to(self.of_k.dtype), self.of_k)
        given = {"pool": self.pool, "causal": self.causal, "kv_lens": kv_lens}
        return block_scores(q, k.to(q.dtype), self.block, **given)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return (
            f"{tuple(self.of_q.shape)}, block={self.block}, pool={self.pool!r}, "
            f"causal={self.causal}"
        )


class CompressedSelector(nn.Module):
    """Attention to one compressed key and value per block, which scores the blocks, as in NSA.

        k_c = W_k sum_t a_t k_t,    v_c = W_v sum_t a_t v_t,    a = softmax over the block's tokens

    a (by position in the block), W_k, W_v and a gate sigmoid(q w + c) per head are learned through
    `branch`, whose output is merged with that of exact attention. They begin as the mean,
    identities and 1/2. A causal query sees the blocks that end before it. NSA compresses
    overlapping blocks by an MLP, and has a third branch for a window: here `local` blocks are
    always chosen.

    Args:
        heads: Query heads.
        head_dim: Width of a head.
        block: (block_q, block_kv), in tokens.
        kv_heads: Key heads; default: as many as query heads.
        causal: Whether a query sees earlier blocks only.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        block: tuple[int, int],
        kv_heads: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        self.block, self.causal = checked_block(block), causal
        # The shift says that query i is at position i, though there are fewer keys.
        earlier = masks.custom(_EndsBefore(self.block[1])).shift(q=1)
        self.mask = earlier if causal else masks.full()
        self.positions = nn.Parameter(torch.zeros(self.block[1]))
        self.of_k = nn.Parameter(torch.eye(head_dim).repeat(kv_heads, 1, 1))
        self.of_v = nn.Parameter(torch.eye(head_dim).repeat(kv_heads, 1, 1))
        self.gate = nn.Parameter(torch.zeros(heads, head_dim))
        self.gate_bias = nn.Parameter(torch.zeros(heads))

    def compress(self, x: Tensor, weight: Tensor, kv_lens: Tensor | None) -> Tensor:
        """Blocks `(b, nk, h_kv, d)` of tokens `(b, s, h_kv, d)`."""
        s, size = x.shape[1], self.block[1]
        lens = torch.full((1,), s, device=x.device) if kv_lens is None else kv_lens.to(x.device)
        valid = torch.arange(s + -s % size, device=x.device) < lens[:, None]
        logits = self.positions.repeat(-(-s // size)).masked_fill(~valid, torch.finfo().min)
        shares = logits.unflatten(1, (-1, size)).softmax(2)  # (1 or b, nk, size)
        shares = torch.where(valid.unflatten(1, (-1, size)), shares, 0.0)
        valid = valid[:, :s, None, None]
        x = pad(torch.where(valid, x, 0.0), (0, 0, 0, 0, 0, -s % size)).unflatten(1, (-1, size))
        mean = torch.einsum("bkthd,bkt->bkhd", x, shares.to(x.dtype).expand(len(x), -1, -1))
        return torch.einsum("bkhd,hde->bkhe", mean, weight.to(x.dtype))

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Probabilities `(b, h_kv, nq, nk)` of compressed attention, summed over a block of queries
        and the heads of a group.
        """
        blocks = self.compress(k, self.of_k, kv_lens)
        b, s, h, _ = q.shape
        rows, nk = -(-s // self.block[0]), blocks.shape[1]
        step = max(1, _LOGITS // max(1, b * h * nk * self.block[0])) * self.block[0]
        sums = [self._importance(q[:, i : i + step], blocks, i, kv_lens) for i in range(0, s, step)]
        assert sum(x.shape[2] for x in sums) == rows
        return torch.cat(sums, 2)

    def _importance(self, q: Tensor, blocks: Tensor, start: int, kv_lens: Tensor | None) -> Tensor:
        """Of some block rows, whose first query has this index."""
        size_q, size = self.block
        with without_autocast(q):
            of_q = q.float().unflatten(2, (blocks.shape[2], -1))
            logits = torch.einsum("bqhgd,bkhd->bhgqk", of_q, blocks.float()) * q.shape[3] ** -0.5
        column = torch.arange(blocks.shape[1], device=q.device)
        if self.causal:
            q_idx = torch.arange(start, start + q.shape[1], device=q.device)[:, None]
            logits = logits.masked_fill((column + 1) * size > q_idx + 1, -torch.inf)
        if kv_lens is not None:
            beyond = column * size >= kv_lens.to(q.device).view(-1, 1, 1, 1, 1)
            logits = logits.masked_fill(beyond, -torch.inf)
        shares = logits.softmax(-1).nan_to_num(0.0).sum(2)
        shares = pad(shares, (0, 0, 0, -q.shape[1] % size_q))
        return shares.unflatten(2, (-1, size_q)).sum(3)

    def branch(
        self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of compressed attention; lse with the logarithm of the gate."""
        of_k, of_v = (self.compress(x, w, kv_lens) for x, w in ((k, self.of_k), (v, self.of_v)))
        size = self.block[1]
        lens = None if kv_lens is None else (kv_lens + size - 1) // size
        given = {"kv_lens": lens, "return_lse": True}
        out, lse = block_sparse_attention(q, of_k, of_v, self.mask, **given)  # type: ignore[call-overload]
        gate = torch.einsum("bshd,hd->bhs", q.to(self.gate.dtype), self.gate)
        return out, lse + logsigmoid(gate + self.gate_bias[:, None]).to(lse.dtype)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"block={self.block}, causal={self.causal}"


@dataclass(frozen=True)
class _EndsBefore:
    """Whether a block of keys ends before query q."""

    size: int

    def __call__(self, q: Tensor, kv: Tensor) -> Tensor:
        return (kv + 1) * self.size <= q
