"""A transformer encoder for classification, whose attention is chosen by name."""

from __future__ import annotations

import torch
from einops import rearrange
from sparse_flash.experiments.attention import Attention, AttentionKind, core
from sparse_flash.experiments.clock import AttentionClock
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.data.dataset import Task, coordinates_of, has_pairs
from torch import Tensor, nn

from sparse_flash import masks
from sparse_flash.nn import SelfAttention

# Standard deviation of token and position embeddings, as in BERT. PyTorch's default of 1 for
# tokens would dominate the positions.
EMBEDDING_STD = 0.02


class EncoderAttention(SelfAttention):
    """Self-attention of any kind, with rotary positions on request, and a clock.

    Args:
        config: Sizes.
        length: Tokens per sequence.
        attention: See `attention.AttentionKind`.
        block: Granularity of the layout.
        rope_cos_sin: Cosines and sines of rotary positions (2, length, head_dim / 2), or None.

    Raises:
        ValueError: The attention is unknown, or has patterns for another number of heads.
    """

    rope_cos_sin: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        length: int,
        attention: Attention,
        block: int,
        rope_cos_sin: Tensor | None,
    ) -> None:
        kind = AttentionKind.of(attention)
        ours = kind if kind.mask is not None else AttentionKind("ours", masks.full())
        layout = ours.layout(length, block)
        entries, heads = layout.pattern_map.shape
        if entries > 1 or heads not in (1, config.heads):
            raise ValueError(
                f"the mask has patterns for {entries} batch entries and {heads} heads; the model "
                f"takes one for all batch entries, and for each of its {config.heads} heads or all"
            )
        options = config.score_options()
        if options and kind.name != "ours":
            raise ValueError(
                f"the attention {kind.name!r} has no {', '.join(options)}: give the model a mask, "
                "or leave them out"
            )
        super().__init__(config.dim, config.heads, mask=layout, **options)
        head_dim = config.dim // config.heads
        self.core = (
            None if kind.name == "ours" else core(kind, layout, length, config.heads, head_dim)
        )
        self.clock: AttentionClock | None = None
        widths = (
            config.dim,
            config.dim,
            config.heads * self.v_head_dim,
        )  # of queries, keys, values
        self.short_convs = nn.ModuleList(
            ShortConv(width, config.short_conv) for width in (widths if config.short_conv else ())
        )
        self.register_buffer("rope_cos_sin", rope_cos_sin, persistent=False)
        if rope_cos_sin is not None and config.initial_span:
            self.initialize_span(config)

    @torch.no_grad()
    def initialize_span(self, config: ModelConfig) -> None:
        """Initialize the biases of q and k so that heads attend within `initial_span`.

        Attention that begins like a convolution learns from fewer images (d'Ascoli et al., ConViT,
        2021). All channels of q and k get the same bias. After rotation it contributes

            score(distance) = 2 bias^2 / sqrt(d) sum_i cos(frequency_i distance)

        The bias is such that this score is 1 lower at the span, along an axis, than at distance 0.
        """
        head_dim = config.dim // config.heads
        axes = 2 if config.positions == "rotary2d" else 1
        frequencies = rotary_frequencies(head_dim, axes)
        for head in range(config.heads):
            span = config.initial_span[head % len(config.initial_span)]
            fall = (1 - torch.cos(frequencies * span)).sum()
            channels = slice(head * head_dim, (head + 1) * head_dim)
            for linear in (self.to_q, self.to_k):
                linear.bias[channels] = (head_dim**0.5 / (2 * fall)).sqrt()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        q_offset: int | Tensor | None = None,
    ) -> Tensor:
        """Convolve, rotate, and attend; timed where a clock is set."""
        assert q_offset is None  # an encoder sees all tokens at once
        if self.short_convs:
            q, k, v = (conv(x) for conv, x in zip(self.short_convs, (q, k, v), strict=True))
        if self.rope_cos_sin is not None:
            q, k = rotate(q, self.rope_cos_sin), rotate(k, self.rope_cos_sin)
        attend = super().attend if self.core is None else self.core
        if self.clock is None:
            return attend(q, k, v, kv_lens)
        q, k, v = self.clock.enter(q, k, v)
        return self.clock.leave(attend(q, k, v, kv_lens))


class ShortConv(nn.Module):
    """Causal depthwise convolution of each channel of queries, keys or values.

        y_t = x_t + sum_{i < width} w_i x_{t - i},    x before the sequence is 0

    Keys then hold the token before them, which associative recall needs (Fu et al., H3, 2023;
    Arora et al., Zoology, 2023). Weights start as in `nn.Conv1d`.

    Args:
        dim: Number of channels, over all heads.
        width: Number of tokens, the current one included.

    >>> conv = ShortConv(8, 3)
    >>> conv(torch.randn(2, 5, 4, 2)).shape
    torch.Size([2, 5, 4, 2])
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(width, dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(b, s, h, d) to the same."""
        y = x
        for i, weight in enumerate(self.weight):
            shifted = nn.functional.pad(x, (0, 0, 0, 0, i, 0))[:, : x.shape[1]]
            y = y + shifted * weight.view(x.shape[2:]).to(x.dtype)
        return y


def rotary_cos_sin(coordinates: Tensor, dim: int) -> Tensor:
    """Cosines and sines (2, s, dim / 2) of rotary positions (Su et al., RoFormer, 2021).

    coordinates: (s,), or (s, axes) for tokens on a grid. Each axis gets an equal part of the
        channels, with wavelengths of 6 to at most 628 pixels (Heo et al., 2024).
    """
    coordinates = coordinates.reshape(len(coordinates), -1).float()
    angles = (coordinates[:, :, None] * rotary_frequencies(dim, coordinates.shape[1])).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotary_frequencies(dim: int, axes: int) -> Tensor:
    """Frequencies of each axis, (dim / axes / 2,), in radians per token or pixel."""
    base, share = 10_000.0 if axes == 1 else 100.0, dim // axes
    return base ** -(torch.arange(0, share, 2).float() / share)


def rotate(x: Tensor, rope_cos_sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + d/2) of the channels of `(b, s, h, d)`; see `rotary_cos_sin`."""
    cos, sin = rope_cos_sin[:, :, None].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TokenEmbedding(nn.Embedding):
    """An embedding whose gradient is accumulated in several copies of the table, by position.

    Most pixels of an image are black, and on a GPU additions to one row of the table wait for each
    other.
    """

    copies = 64
    few = 1024

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__(vocabulary, dim)
        nn.init.normal_(self.weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, s) to (b, s, dim)."""
        if self.num_embeddings > self.few:  # few tokens of a batch are alike
            return super().forward(tokens)
        copy = torch.arange(tokens.shape[-1], device=tokens.device) % self.copies
        table = self.weight.repeat(self.copies, 1)
        return nn.functional.embedding(tokens + copy * self.num_embeddings, table)


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self,
        config: ModelConfig,
        length: int,
        attention: Attention,
        block: int,
        rope_cos_sin: Tensor | None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = EncoderAttention(config, length, attention, block, rope_cos_sin)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.dim, config.ffn), nn.GELU(), nn.Linear(config.ffn, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(b, s, dim) to the same."""
        x = x + self.dropout(self.attention(self.norm1(x), kv_lens=lengths))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class Encoder(nn.Module):
    """Tokens (b, s) and lengths (b,) to logits (b, classes); or pairs (b, 2, s), (b, 2) of them.

    Both of a pair go through the same layers; the head sees [x, y, x y, x - y].

    Args:
        config: Sizes.
        vocabulary: Number of tokens.
        classes: Number of labels.
        length: s, the padded length.
        attention: See `attention.AttentionKind`: 'dense', a mask as text, 'sdpa', a Mask, ...
        block: Granularity of layouts.
        coordinates: Row and column of each token (s, 2), for positions 'rotary2d'.
        pairs: Whether examples are pairs.
        mask_token: Token of hidden pixels, which are background for layouts decided by tokens.

    Raises:
        ValueError: The attention is unknown; or 'rotary2d' without coordinates.

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
        attention: Attention = "dense",
        block: int = 128,
        coordinates: Tensor | None = None,
        pairs: bool = False,
        mask_token: int | None = None,
    ) -> None:
        super().__init__()
        self.pooling, self.mask_token = config.pooling, mask_token
        coordinates = _coordinates(config, length, coordinates)
        length += config.pooling == "cls"
        rope_cos_sin = (
            None if coordinates is None else rotary_cos_sin(coordinates, config.dim // config.heads)
        )
        self.tokens = TokenEmbedding(vocabulary, config.dim)
        self.cls = _embeddings(config.dim) if config.pooling == "cls" else None
        learned = config.positions == "learned"
        self.positions = _embeddings(length, config.dim) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        layers = (
            Layer(config, length, attention, block, rope_cos_sin) for _ in range(config.layers)
        )
        self.layers = nn.ModuleList(layers)
        self.layouts = AttentionKind.of(attention).token_layouts(
            length, int(config.pooling == "cls")
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head: nn.Module = nn.Linear(config.dim, classes)
        if pairs:
            hidden = nn.Linear(4 * config.dim, config.ffn)
            self.head = nn.Sequential(hidden, nn.ReLU(), nn.Linear(config.ffn, classes))

    @classmethod
    def for_task(cls, config: ModelConfig, task: Task, attention: Attention, block: int) -> Encoder:
        """The model for a task."""
        sizes = (task.vocabulary, task.classes, task.length)
        return cls(config, *sizes, attention, block, coordinates_of(task), has_pairs(task))

    def forward(
        self, tokens: Tensor, lengths: Tensor | None, queries: Tensor | None = None
    ) -> Tensor:
        """Logits; tokens beyond the length of a sequence have no influence.

        queries: Indices (b, n) of tokens whose logits (b, n, classes) are wanted, instead of those
            of the sequence.
        """
        if queries is not None:
            x = self.hidden(tokens, lengths)[:, self.cls is not None :]
            return self.head(x.gather(1, queries[..., None].expand(-1, -1, x.shape[2])))
        if tokens.dim() == 2:
            return self.head(self.encode(tokens, lengths))
        x, y = self.encode(
            rearrange(tokens, "b two s -> (two b) s"),
            None if lengths is None else rearrange(lengths, "b two -> (two b)"),
        ).chunk(2)
        return self.head(torch.cat([x, y, x * y, x - y], -1))

    def encode(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """(b, s) to (b, dim). lengths: None where nothing is padding."""
        if self.cls is not None:
            lengths = None if lengths is None else lengths + 1
        return self.pool(self.hidden(tokens, lengths), lengths)

    def hidden(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """(b, s) to (b, s, dim), with the CLS token where there is one, which lengths count."""
        if self.layouts is not None:
            from sparse_flash.experiments.token_layouts import lay_out

            lay_out(self, tokens)
        x = self.tokens(tokens)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        if self.positions is not None:
            x = x + self.positions
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, lengths)
        return self.norm(x)

    def pool(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """(b, s, dim) to (b, dim), over the tokens without padding."""
        if self.pooling == "cls":
            return x[:, 0]
        if lengths is None:
            return x.amax(1) if self.pooling == "max" else x.mean(1)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        real = rearrange(real, "b s -> b s 1")
        if self.pooling == "max":
            return x.masked_fill(~real, -torch.inf).amax(1)
        return x.masked_fill(~real, 0).sum(1) / lengths[:, None]

    def set_clock(self, clock: AttentionClock | None) -> None:
        """Time attention with this clock from now on; None: no longer."""
        for layer in self.layers:
            layer.attention.clock = clock  # type: ignore[union-attr]


def _embeddings(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * EMBEDDING_STD)


def _coordinates(config: ModelConfig, length: int, coordinates: Tensor | None) -> Tensor | None:
    """Where tokens are, for rotary positions; the CLS token, if there is one, is at the origin."""
    if config.positions in ("learned", "none"):
        return None
    if config.positions == "rotary":
        return torch.arange(length + (config.pooling == "cls"))
    if coordinates is None:
        raise ValueError("positions 'rotary2d' are for tokens on a grid: the task must be an image")
    return (
        torch.cat([coordinates.new_zeros(1, 2), coordinates])
        if config.pooling == "cls"
        else coordinates
    )
