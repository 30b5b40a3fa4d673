"""A transformer encoder for classification, whose attention is chosen by name."""

from __future__ import annotations

import torch
from einops import rearrange
from sparse_flash.experiments.clock import AttentionClock
from sparse_flash.experiments.config import ModelConfig, mask_of
from sparse_flash.masks import Mask
from torch import Tensor, nn

from sparse_flash import masks
from sparse_flash.nn import SelfAttention


class EncoderAttention(SelfAttention):
    """Self-attention with rotary positions on request, by SDPA or by a layout, and a clock.

    Args:
        config: Sizes and positions.
        length: Tokens per sequence.
        mask: The mask, or None for torch's scaled_dot_product_attention.
        block: Granularity of the layout.
    """

    angles: Tensor

    def __init__(self, config: ModelConfig, length: int, mask: Mask | None, block: int) -> None:
        layout = (masks.full() if mask is None else mask).layout(length, block=(block, block))
        super().__init__(config.dim, config.heads, mask=layout)
        self.sdpa = mask is None
        self.clock: AttentionClock | None = None
        self.rotary = config.positions == "rotary"
        angles = rotary_angles(length if self.rotary else 0, config.dim // config.heads)
        self.register_buffer("angles", angles, persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """Rotate, and attend; timed where a clock is set."""
        if self.rotary:
            q, k = rotate(q, self.angles), rotate(k, self.angles)
        if self.clock is None:
            return self.core(q, k, v, kv_lens)
        q, k, v = self.clock.enter(q, k, v)
        return self.clock.leave(self.core(q, k, v, kv_lens))

    def core(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        return sdpa(q, k, v, kv_lens) if self.sdpa else super().attend(q, k, v, kv_lens)


def sdpa(q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
    """Dense attention by torch's scaled_dot_product_attention, (b, s, h, d) in and out."""
    mask = None
    if kv_lens is not None:
        mask = (torch.arange(k.shape[1], device=k.device) < kv_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def rotary_angles(length: int, dim: int, base: float = 10_000.0) -> Tensor:
    """(length, dim / 2) angles of rotary positions (Su et al., RoFormer, 2021)."""
    frequencies = base ** -(torch.arange(0, dim, 2).float() / dim)
    return torch.arange(length)[:, None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of the channels of `(b, s, h, d)` by angles `(s, d / 2)`."""
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, length: int, mask: Mask | None, block: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = EncoderAttention(config, length, mask, block)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.dim, config.ffn), nn.GELU(), nn.Linear(config.ffn, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(b, s, dim) to the same."""
        x = x + self.dropout(self.attention(self.norm1(x), kv_lens=lengths))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Encoder(nn.Module):
    """Tokens (b, s) and lengths (b,) to logits (b, classes).

    Args:
        config: Sizes.
        vocabulary: Number of tokens; 0 is padding.
        classes: Number of labels.
        length: s, the padded length.
        attention: 'sdpa', 'dense' or a mask as text.
        block: Granularity of layouts.

    >>> model = Encoder(ModelConfig(), vocabulary=16, classes=10, length=50, attention="local(8)")
    >>> model(torch.randint(1, 16, (2, 50)), torch.tensor([50, 20])).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: int,
        classes: int,
        length: int,
        attention: str = "dense",
        block: int = 128,
    ) -> None:
        super().__init__()
        self.pooling = config.pooling
        length += config.pooling == "cls"
        mask = mask_of(attention)
        self.tokens = nn.Embedding(vocabulary, config.dim)
        self.cls = nn.Parameter(torch.randn(config.dim) * 0.02) if config.pooling == "cls" else None
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.randn(length, config.dim) * 0.02) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        layers = (Layer(config, length, mask, block) for _ in range(config.layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits; what lies beyond a sequence's length has no influence on them."""
        x = self.tokens(tokens)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
            lengths = lengths + 1
        if self.positions is not None:
            x = x + self.positions
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, lengths)
        return self.head(self.pool(self.norm(x), lengths))

    def pool(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(b, s, dim) to (b, dim), over the tokens that are no padding."""
        if self.pooling == "cls":
            return x[:, 0]
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        real = rearrange(real, "b s -> b s 1")
        if self.pooling == "max":
            return x.masked_fill(~real, -torch.inf).amax(1)
        return x.masked_fill(~real, 0).sum(1) / lengths[:, None]

    def set_clock(self, clock: AttentionClock | None) -> None:
        """Time attention with this clock from now on; None: no longer."""
        for layer in self.layers:
            layer.attention.clock = clock  # type: ignore[union-attr]
