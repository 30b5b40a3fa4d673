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
