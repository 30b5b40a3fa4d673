"""Scores of blocks of keys for blocks of queries."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import reduce
from torch import Tensor
from torch.nn.functional import pad

from sparse_flash.checks import check_are_tensors, check_kv_lens, check_tensors
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.modes import without_autocast

Pool = Literal["mean", "max", "token"]
_LOGITS = 1 << 26  # token scores in memory at a time


def checked_block(block: tuple[int, int]) -> tuple[int, int]:
    """(block_q, block_kv) as ints; TypeError or ValueError where it is none."""
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise TypeError(f"block must be a pair (block_q, block_kv) of ints, got {block!r}")
    block_q, block_kv = (integer("selection", "block", size) for size in block)
    return block_q, block_kv


def pool_blocks(x: Tensor, block: int, pool: Literal["mean", "max"] = "mean") -> Tensor:
    """Mean or elementwise maximum of each block of tokens.

    A ragged last block pools the tokens that exist.

    Args:
        x: Tokens `(b, s, h, d)`.
        block: Tokens per block.
        pool: "mean" or "max".

    Returns:
        `(b, ceil(s / block), h, d)` in x's dtype; differentiable.

    Raises:
        ValueError: x is not (b, s, h, d), block is below 1, or pool is unknown.

    >>> pool_blocks(torch.arange(5.0).view(1, 5, 1, 1), 2).flatten()
    tensor([0.5000, 2.5000, 4.0000])
    """
    block = integer("pool_blocks", "block", block)
    if x.ndim != 4 or not x.shape[1]:
        raise ValueError(f"x must be (b, s, h, d) with at least one token, got {tuple(x.shape)}")
    if pool not in ("mean", "max"):
        raise ValueError(f"pool must be 'mean' or 'max', got {pool!r}")
    missing = -x.shape[1] % block
    x = pad(x, (0, 0, 0, 0, 0, missing), value=-torch.inf if pool == "max" else 0.0)
    pooled = reduce(x, "b (n t) h d -> b n h d", pool, t=block)
    if missing and pool == "mean":
        factor = torch.ones(pooled.shape[1], dtype=x.dtype, device=x.device)
        factor[-1] = block / (block - missing)
        pooled = pooled * factor[:, None, None]
    return pooled


def block_scores(
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    *,
    pool: Pool = "mean",
    causal: bool = False,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """Scores of key blocks for query blocks; those of query heads that share a key head are summed.

    - "mean": the product of mean query and mean key (MoBA, Lu et al., 2025, by blocks of queries);
      s / block_q x s / block_kv products.
    - "max": the product of elementwise maxima.
    - "token": the largest product of a query and a key of the two blocks, as a token-wise indexer
      scores them (DeepSeek-V3.2-Exp, 2025). s^2 products, a slice of queries at a time; gradients
      go to the two tokens.

    Args:
        q: Queries `(b, q_len, h, d)`.
        k: Keys `(b, kv_len, h_kv, d)`; h is a multiple of h_kv.
        block: (block_q, block_kv), in tokens.
        pool: How tokens become one score.
        causal: With "token", leave out products of a query with later keys: the score of a block
            that the diagonal crosses then tells nothing of the future. Pooled scores of such a
            block do: force it (`topk_blocks(..., local=1)`) instead of ranking it.
        kv_lens: Number of valid keys per batch entry, int `(b,)`; others have no influence.

    Returns:
        float32 `(b, h_kv, nq, nk)` (float64 for float64 inputs), scaled by d ** -0.5;
        differentiable. -inf where a block has no key that is allowed.

    Raises:
        TypeError: q or k is not a tensor, dtypes disagree, or block is not a pair.
        ValueError: Shapes disagree, a block size is below 1, or pool is unknown; causal with
            lengths that differ.

    >>> q, k = torch.randn(2, 300, 4, 32), torch.randn(2, 300, 2, 32)
    >>> block_scores(q, k, (64, 128)).shape
    torch.Size([2, 2, 5, 3])
    """
    check_are_tensors(q, k, k)
    check_tensors(q, k, k)
    block_q, block_kv = checked_block(block)
    if pool not in get_args(Pool):
        raise ValueError(f"pool must be one of {', '.join(get_args(Pool))}, got {pool!r}")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal scores need as many queries as keys, got {q.shape[1]} and {k.shape[1]}"
        )
    if kv_lens is not None:
        check_kv_lens(kv_lens, q, k.shape[1])
        kv_lens = kv_lens.to(k.device)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q):
        q, k = q.to(dtype), k.to(dtype)
        if pool == "token":
            scores = _token_scores(q, k, (block_q, block_kv), causal, kv_lens)
        else:
            of_q = pool_blocks(q, block_q, pool).unflatten(2, (k.shape[2], -1))
            of_k = pool_valid(k, block_kv, pool, kv_lens)
            scores = torch.einsum("bqhgd,bkhd->bhqk", of_q, of_k)
        if kv_lens is not None:
            first = torch.arange(scores.shape[3], device=k.device) * block_kv
            beyond = first >= kv_lens[:, None, None, None]
            scores = scores.masked_fill(beyond, -torch.inf)
        return scores * q.shape[3] ** -0.5


def pool_valid(x: Tensor, block: int, pool: Literal["mean", "max"], lens: Tensor | None) -> Tensor:
    """As `pool_blocks`, over the first `lens` (b,) tokens; 0 for blocks without any."""
    if lens is None:
        return pool_blocks(x, block, pool)
    s = x.shape[1]
    valid = (torch.arange(s, device=x.device) < lens[:, None])[..., None, None]
    size = (s - torch.arange(0, s, block, device=x.device)).clamp(max=block)
    count = (lens[:, None] - torch.arange(0, s, block, device=x.device)).clamp(min=0)
    count = torch.minimum(count, size)[..., None, None].to(x.dtype)
    if pool == "mean":
        pooled = pool_blocks(torch.where(valid, x, 0.0), block)
        return pooled * size[:, None, None] / count.clamp(min=1)
    pooled = pool_blocks(torch.where(valid, x, torch.finfo(x.dtype).min), block, "max")
    return torch.where(count > 0, pooled, 0.0)


def _token_scores(
    q: Tensor, k: Tensor, block: tuple[int, int], causal: bool, kv_lens: Tensor | None
) -> Tensor:
    """The largest product of each pair of blocks, summed over the query heads of a group."""
    of_q, (b, q_len, h, _) = q.unflatten(2, (k.shape[2], -1)), q.shape
    rows = -(-q_len // block[0])
    step = max(1, _LOGITS // max(1, b * h * k.shape[1] * block[0]))
    with torch.no_grad():
        found = [
            _best(of_q, k, block, causal, kv_lens, (i, min(i + step, rows)))
            for i in range(0, rows, step)
        ]
        best, i, j = (torch.cat(parts, 3) for parts in zip(*found, strict=True))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        batch, head, group = (
            torch.arange(n, device=q.device).view(-1, *(1,) * (4 - dim))
            for dim, n in enumerate(best.shape[:3])
        )
        products = (of_q[batch, i, head, group] * k[batch, j, head]).sum(-1)
        best = torch.where(best == -torch.inf, best, products)
    return best.sum(2)


def _best(
    q: Tensor,
    k: Tensor,
    block: tuple[int, int],
    causal: bool,
    kv_lens: Tensor | None,
    rows: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """For some block rows: the largest products (b, h_kv, g, rows, nk), and of which query and
    key.
    """
    (block_q, block_kv), (first, last), kv_len = block, rows, k.shape[1]
    some = q[:, first * block_q : last * block_q]
    products = torch.einsum("bqhgd,bkhd->bhgqk", some, k)
    q_idx = torch.arange(first * block_q, first * block_q + some.shape[1], device=q.device)
    kv_idx = torch.arange(kv_len, device=q.device)
    if causal:
        products = products.masked_fill(kv_idx > q_idx[:, None], -torch.inf)
    if kv_lens is not None:
        beyond = kv_idx >= kv_lens.view(-1, 1, 1, 1, 1)
        products = products.masked_fill(beyond, -torch.inf)
    missing = (0, -kv_len % block_kv, 0, (last - first) * block_q - some.shape[1])
    products = pad(products, missing, value=-torch.inf)
    products, j = products.unflatten(4, (-1, block_kv)).max(5)
    products, i = products.unflatten(3, (-1, block_q)).max(4)
    j = j.unflatten(3, (-1, block_q)).gather(4, i.unsqueeze(4)).squeeze(4)
    row = torch.arange(first, last, device=q.device)[:, None]
    column = torch.arange(products.shape[4], device=q.device)
    i, j = row * block_q + i, column * block_kv + j
    return products, i.clamp(max=q.shape[1] - 1), j.clamp(max=kv_len - 1)
