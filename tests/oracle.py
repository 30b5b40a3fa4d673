"""Dense attention in the plainest form: what everything is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by masked softmax; `allowed` is bool (b, h, q_len, kv_len)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    logits = logits.masked_fill(~allowed, -torch.inf)
    some = allowed.any(-1)
    # Rows without keys would be 0/0, in the gradients too: give them logits, then blank the result
    lse = logits.masked_fill(~some[..., None], 0).logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out, lse.masked_fill(~some, -torch.inf)


def dense_scored_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    positions: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    slopes: Tensor | None = None,
    table: Tensor | None = None,
    image: Tensor | None = None,
    pixels: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) with all score terms, from their definitions.

    positions: Of queries (b, q_len, 1) and keys (b, 1, kv_len). pixels: Row and column of each
    position. keep: Factors of dropout (b, h, q_len, kv_len).
    """
    (b, s, h, _), s_kv = q.shape, k.shape[1]
    if positions is None:
        ranges = (torch.arange(s)[:, None], torch.arange(s_kv)[None])
        positions = tuple(x.expand(b, -1, -1).to(q.device) for x in ranges)
    p_q, p_kv = positions
    distance = (p_q - p_kv)[:, None]  # (b, 1, q_len, kv_len)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(h // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    heads = torch.arange(h, device=q.device)[:, None, None]
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    if table is not None:
        r = table.shape[1] // 2
        scores = scores + table[heads, distance.clamp(-r, r) + r]
    if image is not None:
        index = [heads]
        for of_side, size in zip(pixels, image.shape[1:], strict=True):
            last = len(of_side) - 1
            apart = of_side[p_q.clamp(0, last)] - of_side[p_kv.clamp(0, last)]
            index.append(apart[:, None].clamp(-(size // 2), size // 2) + size // 2)
        scores = scores + image[tuple(index)]
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(b, -1, s, 1)], -1)
    some = scores.isfinite().any(-1)
    lse = scores.masked_fill(~some[..., None], 0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp()[..., :s_kv]
    weights = weights if keep is None else weights * keep
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse.masked_fill(~some, -torch.inf)
