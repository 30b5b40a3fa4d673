"""Modules for models."""

from __future__ import annotations

import torch
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
        self.head_dim, self.heads, self.kv_heads = dim // heads, heads, kv_heads
        self.mask = mask
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.to_v = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.to_out = nn.Linear(dim, dim, bias)
        self.register_load_state_dict_pre_hook(_split_keys_and_values)

    def forward(self, x: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Attend within `(b, s, dim)`; `kv_lens` (b,) counts the tokens that are no padding.

        The number of heads follows from the projections' outputs: under tensor parallelism each
        rank has those of its shard.
        """
        q, k, v = (
            rearrange(project(x), "b s (h d) -> b s h d", d=self.head_dim)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = self.attend(q, k, v, kv_lens)
        return self.to_out(rearrange(out, "b s h d -> b s (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """Attention itself, `(b, s, h, d)`: subclasses may override it, to rotate q and k say."""
        return block_sparse_attention(q, k, v, self.mask, kv_lens=kv_lens)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """A layout moves with the module: to(device), cuda(), cpu(). It stays when that is meta."""
        super()._apply(fn, recurse)
        if isinstance(self.mask, BlockLayout):
            target = fn(torch.empty(0, device=self.mask.device)).device
            if target.type != "meta":
                self.mask = self.mask.to(target)
        return self

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"heads={self.heads}, kv_heads={self.kv_heads}, mask={self.mask!r}"


def _split_keys_and_values(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Weights of version 0.1, whose keys and values came from one projection."""
    for name in ("weight", "bias"):
        both = state.pop(f"{prefix}to_kv.{name}", None)
        if both is not None:
            state[f"{prefix}to_k.{name}"], state[f"{prefix}to_v.{name}"] = both.chunk(2)
