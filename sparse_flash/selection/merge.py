"""Attention to several sets of keys, merged into attention to their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge outputs over disjoint sets of keys into the output over all of them.

        lse = log sum_i exp(lse_i),    out = sum_i exp(lse_i - lse) out_i

    Exact, and differentiable in outputs and logsumexps. A query without keys in any set gets
    output 0, lse -inf and gradients 0. Adding log(g) to a logsumexp weights its set by a gate g.
    Source: split-KV decoding, FlashDecoding (Dao et al., 2023); Milakov & Gimelshein (2018).

    Args:
        outs: Outputs `(b, s, h, d)`, one per set of keys.
        lses: Their logsumexps `(b, h, s)`, float32 or float64, natural log.

    Returns:
        out `(b, s, h, d)` in the dtype of the first output, and lse `(b, h, s)`.

    Raises:
        TypeError: An entry is not a tensor, or a logsumexp has 16 bits.
        ValueError: There are no entries, outputs and logsumexps differ in number or in shape.

    >>> import torch
    >>> from sparse_flash import block_sparse_attention, masks
    >>> from sparse_flash.selection import merge_attention
    >>> q, k, v = (torch.randn(1, 256, 2, 32) for _ in range(3))
    >>> near = masks.local(40)
    >>> parts = [block_sparse_attention(q, k, v, m, return_lse=True) for m in (near, ~near)]
    >>> out, lse = merge_attention(*zip(*parts))
    >>> torch.allclose(out, block_sparse_attention(q, k, v, masks.full()), atol=1e-5)
    True
    """
    _check(outs, lses)
    dtype = torch.promote_types(outs[0].dtype, lses[0].dtype)
    stacked = torch.stack([x.to(dtype) for x in lses])  # (n, b, h, s)
    # The largest is subtracted before exp. Without keys it is -inf, and -inf - -inf is NaN: 0 then.
    top = stacked.detach().amax(0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (stacked - top).exp()
    total = weights.sum(0)
    empty = total == 0
    shares = weights / torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + top)
    shares = shares.transpose(2, 3)[..., None]
    out = sum(share * x.to(dtype) for share, x in zip(shares, outs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if len(outs) != len(lses) or not len(outs):
        raise ValueError(
            f"merge_attention takes as many outputs as logsumexps, at least one of each, got "
            f"{len(outs)} and {len(lses)}"
        )
    for name, values in (("outs", outs), ("lses", lses)):
        for x in values:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be tensors, got {type(x).__name__}")
    for out, lse in zip(outs, lses, strict=True):
        b, s, h, *_ = out.shape if out.ndim == 4 else (0, 0, 0)
        if out.ndim != 4 or out.shape != outs[0].shape or lse.shape != (b, h, s):
            raise ValueError(
                "outputs must be (b, s, h, d), all of one shape, and logsumexps (b, h, s), got "
                f"{tuple(out.shape)} and {tuple(lse.shape)}: block_sparse_attention returns both "
                "with return_lse=True"
            )
        if lse.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"logsumexps must be float32 or float64, got {lse.dtype}: 16 bits would lose "
                "their differences"
            )
