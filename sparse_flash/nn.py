"""Modules for models."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from sparse_flash.api import block_sparse_attention
from sparse_flash.masks import BlockLayout, Mask


class SelfAttention(nn.Module):
    """Projections to queries, keys and values, block-sparse attention, projection back.

    Args:
        dim: Width of the model; a multiple of `heads`.
        heads: Query heads.
        mask: What may attend to what: a Mask, for any length, or a BlockLayout for one length,
            which moves with the module from device to device.
        kv_heads: Key and value heads, a divisor of `heads`; default: as many.
        bias: Whether the projections have one.

    Raises:
        ValueError: dim, heads and kv_heads do not divide each other.

    >>> import torch
    >>> from sparse_flash import masks
    >>> layer = SelfAttention(64, 4, mask=masks.local(32) | masks.global_tokens(4))
    >>> layer(torch.randn(2, 100, 64), kv_lens=torch.tensor([100, 60])).shape
    torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mask: Mask | BlockLayout,
        kv_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or dim % heads or kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of heads={heads}, and heads of kv_heads={kv_heads}"
            )
        if not isinstance(mask, Mask | BlockLayout):
            raise TypeError(f"mask must be a Mask or a BlockLayout, got {type(mask).__name__}")
        self.heads, self.kv_heads, self.mask = heads, kv_heads, mask
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_kv = nn.Linear(dim, 2 * dim // heads * kv_heads, bias)
        self.to_out = nn.Linear(dim, dim, bias)

    def forward(self, x: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Attend within `(b, s, dim)`; `kv_lens` (b,) counts the tokens that are no padding."""
        q = rearrange(self.to_q(x), "b s (h d) -> b s h d", h=self.heads)
        k, v = rearrange(self.to_kv(x), "b s (two h d) -> two b s h d", two=2, h=self.kv_heads)
        out = self.attend(q, k, v, kv_lens)
        return self.to_out(rearrange(out, "b s h d -> b s (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """Attention itself, `(b, s, h, d)`: for subclasses to change, to rotate q and k say."""
        return block_sparse_attention(q, k, v, self.mask, kv_lens=kv_lens)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """A layout moves with the module: to(device), cuda(), cpu()."""
        super()._apply(fn, recurse)
        if isinstance(self.mask, BlockLayout):
            self.mask = self.mask.to(self.to_q.weight.device)
        return self

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"heads={self.heads}, kv_heads={self.kv_heads}, mask={self.mask!r}"
