"""Exact attention within a mask, and features for the key blocks that the mask leaves out."""

from __future__ import annotations

import torch
from sparse_flash.masks import Mask
from torch import Tensor, nn
from torch.nn.functional import elu, pad

from sparse_flash import block_sparse_attention, masks
from sparse_flash.selection import merge_attention


class Hybrid(nn.Module):
    """Block-sparse attention plus linear attention to the rest.

    With random features phi of a Performer (FAVOR+), the formula is that of Scatterbrain (Chen et
    al., 2021): one softmax over all keys. Those in stored blocks count exactly, the rest by
    phi(q) . phi(k), an unbiased estimate of exp(q . k / sqrt(d)). Scatterbrain subtracts the
    features of each kept element. Here a block is exact or estimated as a whole, and elements that
    the mask excludes from stored blocks are left out. A learned number per head, 0 at first, is
    added to the logarithm of the estimated mass.

    With the features elu(x) + 1, whose products are on no scale of softmax, the formula is that of
    SLA (Zhang et al., 2025): O = O_sparse + O_linear W, with a learned map W per head, 0 at first.

    Args:
        mask: Elements computed exactly, the same for all heads.
        length: Tokens of a sequence.
        heads: Number of heads.
        head_dim: Width of a head.
        features: Random features; 0: elu(x) + 1.
        block: Size of the blocks, in tokens.
        causal: Whether queries see earlier keys only; the rest are then the blocks that end before
            a block of queries begins.
    """

    left_out: Tensor
    directions: Tensor

    def __init__(
        self,
        mask: Mask,
        length: int,
        heads: int,
        head_dim: int,
        features: int,
        block: int = 64,
        *,
        causal: bool = False,
    ) -> None:
        super().__init__()
        from sparse_flash.experiments.attention import Performer

        self.mask = mask & masks.causal() if causal else mask
        self.block, self.causal = block, causal
        layout = self.mask.layout(length, block=(block, block))
        if layout.num_patterns > 1:
            raise ValueError("hybrid takes masks that all heads share")
        stored = torch.zeros(layout.num_block_rows, layout.num_block_cols, dtype=torch.bool)
        stored[layout.tile_rows, layout.col_indices.long()] = True
        left_out = ~stored
        if causal:
            left_out = left_out.tril(-1)
        self.register_buffer("left_out", left_out.float(), persistent=False)
        self.performer = Performer(heads, head_dim, features) if features else None
        shape = (heads,) if features else (heads, head_dim, head_dim)
        self.mix = nn.Parameter(torch.zeros(shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        out, lse = block_sparse_attention(q, k, v, self.mask, kv_lens=kv_lens, return_lse=True)
        with torch.autocast(q.device.type, enabled=False):
            rest, mass = self.rest(q, k, v.float(), kv_lens)
            if self.performer is None:
                return (out.float() + torch.einsum("bshd,hde->bshe", rest, self.mix)).to(out.dtype)
            return merge_attention((out, rest.to(out.dtype)), (lse, mass + self.mix[:, None]))[0]

    def rest(
        self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Linear attention to the blocks that are left out, and the logarithm of its mass.

        Returns:
            float32 `(b, s, h, d)` and `(b, h, s)`; 0 and -inf where nothing is left out.
        """
        of_q, of_k, shift = self.features(q, k)
        if kv_lens is not None:
            real = torch.arange(k.shape[1], device=k.device) < kv_lens[:, None]
            of_k = of_k * real[..., None, None]
            v = torch.where(real[..., None, None], v, 0.0)
        missing = (0, 0, 0, 0, 0, -k.shape[1] % self.block)
        of_k, v = (pad(x, missing).unflatten(1, (-1, self.block)) for x in (of_k, v))
        sums = torch.einsum("bkthf,bkthd->bkhfd", of_k, v)  # of each block of keys
        sums = torch.einsum("qk,bkhfd->bqhfd", self.left_out, sums)
        norms = torch.einsum("qk,bkhf->bqhf", self.left_out, of_k.sum(2))
        rows = pad(of_q, (0, 0, 0, 0, 0, -q.shape[1] % self.block)).unflatten(1, (-1, self.block))
        numerator = torch.einsum("bqthf,bqhfd->bqthd", rows, sums).flatten(1, 2)[:, : q.shape[1]]
        norm = torch.einsum("bqthf,bqhf->bqth", rows, norms).flatten(1, 2)[:, : q.shape[1]]
        empty = norm <= 0
        norm = torch.where(empty, 1.0, norm)
        out = torch.where(empty[..., None], 0.0, numerator / norm[..., None])
        mass = torch.where(empty, -torch.inf, norm.log() + shift)
        return out, mass.transpose(1, 2)

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi(q) and phi(k) `(b, s, h, f)`, and the offset subtracted from the logarithm of their
        product, `(b, s, h)`.
        """
        if self.performer is None:
            return elu(q.float()) + 1, elu(k.float()) + 1, q.new_zeros(1, 1, 1, dtype=torch.float32)
        of_q, of_k = (self.performer.exponents(x) for x in (q, k))
        top_q = of_q.amax(-1, keepdim=True).detach()
        top_k = of_k.amax((1, 3), keepdim=True).detach()
        number = torch.full((), float(of_q.shape[-1]), device=q.device)
        shift = (top_q + top_k).squeeze(-1) - number.log()
        return (of_q - top_q).exp(), (of_k - top_k).exp(), shift
