"""Self-attention for models, and its key-value cache."""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from sparse_flash.api import block_sparse_attention
from sparse_flash.checks import check_heads, check_mask
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.arguments import integer
from sparse_flash.positions import end_of
from sparse_flash.scores import ScoreBias, alibi, alibi_slopes, relative
from sparse_flash.scores.arguments import check_softcap, dropped_levels


class KVCache:
    """Keys and values of the tokens so far, for generation token by token.

    Args:
        batch: Number of batch entries.
        capacity: Number of tokens that there is space for.
        kv_heads: Key and value heads of the layer (of this rank, under tensor parallelism).
        head_dim: Width of a head.
        dtype: Of keys and values; default: torch's default dtype.
        device: Where they live; default: torch's default device.
        v_head_dim: Width of a head of the values; default: as of the keys.

    Raises:
        TypeError: A size is not an int.
        ValueError: A size is below 1.

    >>> import torch
    >>> from sparse_flash import masks
    >>> layer, x = SelfAttention(64, 4, mask=masks.local((31, 0))), torch.randn(2, 50, 64)
    >>> cache = KVCache(2, 50, 4, 16)
    >>> with torch.no_grad():
    ...     steps = [layer(x[:, :40], cache=cache)]
    ...     steps += [layer(x[:, i : i + 1], q_offset=i, cache=cache) for i in range(40, 50)]
    ...     torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-5)
    True
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        v_head_dim: int | None = None,
    ) -> None:
        sizes = {"batch": batch, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
        sizes["v_head_dim"] = head_dim if v_head_dim is None else v_head_dim
        *shape, d, d_v = (integer("KVCache", name, n, least=1) for name, n in sizes.items())
        with torch.inference_mode(False):  # for use in other modes, too
            self.keys, self.values = (
                torch.zeros((*shape, width), dtype=dtype, device=device) for width in (d, d_v)
            )

    @property
    def capacity(self) -> int:
        """Number of tokens that there is space for."""
        return self.keys.shape[1]

    def update(
        self, k: Tensor, v: Tensor, q_offset: int | Tensor, kv_lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k `(b, s, h_kv, d)` and v `(b, s, h_kv, d_v)` from a position on.

        Args:
            k: Keys of new tokens.
            v: Their values.
            q_offset: Position of the first, int or int `(b,)`; later tokens are forgotten.
            kv_lens: Number of valid keys, int `(b,)`; default: those up to the last new one.

        Returns:
            All keys, all values, and kv_lens.

        Raises:
            RuntimeError: Gradients would be needed.
            TypeError: q_offset is neither an int nor an int tensor.
            ValueError: There is no space (an error of CUDA where q_offset is on a GPU), q_offset is
                negative, or a shape does not fit. Nothing is stored then.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError(
                "a KVCache does not carry gradients: use it under torch.no_grad() or "
                "torch.inference_mode(), or pass q_offset to block_sparse_attention yourself"
            )
        s = k.shape[1]
        for name, x, stored in (("keys", k, self.keys), ("values", v, self.values)):
            b, _, *width = stored.shape
            if (b, s, *width) != x.shape:
                fits = f"({b}, s, {width[0]}, {width[1]})"
                raise ValueError(f"the cache is for {name} {fits}, got {tuple(x.shape)}")
        end = end_of(k, q_offset)
        if end is not None and end > self.capacity:
            raise ValueError(
                f"the cache has space for {self.capacity} tokens, not for {end}: make a "
                f"KVCache with a capacity of at least {end}, or begin again at q_offset=0"
            )
        if isinstance(q_offset, Tensor):  # on a GPU, indexing refuses positions beyond the capacity
            places = q_offset.to(k.device, torch.int64)[:, None] + torch.arange(s, device=k.device)
            entries = torch.arange(len(k), device=k.device)[:, None]
            self.keys[entries, places], self.values[entries, places] = k, v
            kv_lens = q_offset.long() + s if kv_lens is None else kv_lens
            return self.keys, self.values, kv_lens
        self.keys[:, q_offset:end], self.values[:, q_offset:end] = k, v
        return self.keys[:, :end], self.values[:, :end], kv_lens


class SelfAttention(nn.Module):
    """Projections to queries, keys and values, block-sparse attention, projection back.

    Args:
        dim: Width of the model; a multiple of `heads`.
        heads: Query heads.
        mask: What may attend to what: a Mask, for any length, or a BlockLayout for one length,
            which moves with the module from device to device.
        kv_heads: Key and value heads, a divisor of `heads`; default: as many.
        bias: Whether the projections have one.
        score_bias: "alibi" for the published slopes, which do not learn; "relative" for a learned
            table `relative_table` `(heads, 2 * max_distance + 1)`, zeros at first. Default: none.
        max_distance: Distance from which the table's values are those of the ends.
        softcap: Bound of the scores by tanh; default: none.
        sinks: Whether each head has a learned logit `sinks` `(heads,)` that takes probability but
            has no value, 0 at first.
        attention_dropout: Rate of dropout of probabilities in training, in [0, 1).
        v_head_dim: Width of a head of the values; default: dim / heads.

    Raises:
        TypeError: A size is not an int, or mask is neither a Mask nor a BlockLayout.
        ValueError: dim, heads and kv_heads do not divide each other, the mask has patterns for
            another number of heads, or a score option is out of range.

    >>> import torch
    >>> from sparse_flash import masks
    >>> layer = SelfAttention(64, 4, mask=masks.local(32) | masks.global_tokens(4))
    >>> layer(torch.randn(2, 100, 64), kv_lens=torch.tensor([100, 60])).shape
    torch.Size([2, 100, 64])
    """

    alibi_slopes: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        mask: Mask | BlockLayout,
        kv_heads: int | None = None,
        bias: bool = True,
        *,
        score_bias: Literal["alibi", "relative"] | None = None,
        max_distance: int = 128,
        softcap: float | None = None,
        sinks: bool = False,
        attention_dropout: float = 0.0,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = (("dim", dim), ("heads", heads), ("kv_heads", kv_heads))
        dim, heads, kv_heads = (integer("SelfAttention", *size, least=1) for size in sizes)
        if dim % heads or heads % kv_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of heads={heads}, and heads of kv_heads={kv_heads}"
            )
        check_mask(mask)
        check_heads(mask, heads)
        _check_flag("bias", bias, "whether the projections have one; of scores: score_bias='alibi'")
        _check_flag("sinks", sinks, "logits; sink tokens are a mask, masks.sinks(n)")
        self.head_dim, self.heads, self.kv_heads = dim // heads, heads, kv_heads
        self.mask = mask
        self.to_q = nn.Linear(dim, dim, bias)
        self.to_k = nn.Linear(dim, kv_heads * self.head_dim, bias)
        self.v_head_dim = self.head_dim
        if v_head_dim is not None:
            self.v_head_dim = integer("SelfAttention", "v_head_dim", v_head_dim, least=1)
        self.to_v = nn.Linear(dim, kv_heads * self.v_head_dim, bias)
        self.to_out = nn.Linear(heads * self.v_head_dim, dim, bias)
        check_softcap(softcap)
        dropped_levels(attention_dropout)
        self.softcap, self.attention_dropout = softcap, attention_dropout
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self._make_bias(score_bias, max_distance)
        self.register_load_state_dict_pre_hook(_split_keys_and_values)
        self.register_load_state_dict_post_hook(_after_loading)

    def forward(
        self,
        x: Tensor,
        kv_lens: Tensor | None = None,
        q_offset: int | Tensor = 0,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend within `(b, s, dim)`, and to earlier tokens if there is a cache.

        The number of heads follows from the projections' outputs: under tensor parallelism each
        rank has those of its shard.

        Args:
            x: Tokens `(b, s, dim)`.
            kv_lens: Number of valid keys per batch entry, those in the cache included, int `(b,)`.
            q_offset: Position of the first token of x, int or int `(b,)`. Needs a cache.
            cache: Keys and values of earlier tokens; those of x are stored in it.

        Raises:
            TypeError: x is not a tensor, or cache is not a KVCache.
            ValueError: x is not (b, s, dim), an offset comes without a cache, or there are more
                tokens than the cache has space for.
        """
        self._check_input(x)
        widths = (self.head_dim, self.head_dim, self.v_head_dim)
        q, k, v = (
            rearrange(project(x), "b s (h d) -> b s h d", d=d)
            for project, d in zip((self.to_q, self.to_k, self.to_v), widths, strict=True)
        )
        if cache is None:
            if isinstance(q_offset, Tensor) or q_offset:
                raise ValueError("q_offset is the number of tokens in a cache: pass cache=, too")
            out = self.attend(q, k, v, kv_lens)
        elif not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, got {type(cache).__name__}")
        else:
            out = self.attend(q, *cache.update(k, v, q_offset, kv_lens), q_offset)
        return self.to_out(rearrange(out, "b s h d -> b s (h d)"))

    def _check_input(self, x: Tensor) -> None:
        """Raise unless x is (b, s, dim)."""
        dim = self.heads * self.head_dim
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor (b, s, {dim}), got {type(x).__name__}")
        if x.ndim == 3 and x.shape[2] == dim and x.shape[1]:
            return
        way_out = ""
        if x.ndim == 2 and x.shape[1] == dim:
            way_out = ": x[None] makes a batch of one"
        elif x.ndim == 3 and x.shape[1] == dim:
            way_out = ": x.transpose(1, 2) has the channels last"
        elif x.ndim == 4:
            way_out = ": a layer takes tokens; block_sparse_attention takes (b, s, heads, head_dim)"
        elif x.ndim == 3 and x.shape[2] != dim:
            way_out = f": the layer was made with dim={dim}"
        raise ValueError(
            f"x must be (batch, sequence, dim) = (b, s, {dim}), s at least 1, "
            f"got {tuple(x.shape)}{way_out}"
        )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv_lens: Tensor | None,
        q_offset: int | Tensor | None = None,
    ) -> Tensor:
        """Attention itself, `(b, s, h, d_v)`: subclasses may override it, to rotate q and k say."""
        return block_sparse_attention(
            q, k, v, self.mask, kv_lens=kv_lens, q_offset=q_offset, **self.score_options()
        )

    def score_options(self) -> dict[str, Any]:
        """The arguments of `block_sparse_attention` for scores: bias, softcap, sinks, dropout_p."""
        bias: ScoreBias | None = None
        if self.score_bias == "alibi":
            bias = alibi(self.alibi_slopes)
        elif self.score_bias == "relative":
            bias = relative(self.relative_table)
        options = {"bias": bias, "softcap": self.softcap, "sinks": self.sinks}
        dropout_p = self.attention_dropout if self.training else 0.0
        return {n: x for n, x in (options | {"dropout_p": dropout_p}).items() if x is not None}

    def _make_bias(self, score_bias: str | None, max_distance: int) -> None:
        """Slopes or table, by the name of the bias."""
        if score_bias not in (None, "alibi", "relative"):
            raise ValueError(
                f"score_bias must be 'alibi', 'relative' or None, got {score_bias!r}; for others "
                "override SelfAttention.score_options"
            )
        self.score_bias = score_bias
        if score_bias == "alibi":
            self.register_buffer("alibi_slopes", alibi_slopes(self.heads), persistent=False)
        elif score_bias == "relative":
            size = 2 * integer("SelfAttention", "max_distance", max_distance, least=0) + 1
            self.relative_table = nn.Parameter(torch.zeros(self.heads, size))

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """A layout moves with the module: to(device), cuda(), cpu(). It stays when that is meta."""
        was_meta = self.score_bias == "alibi" and self.alibi_slopes.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            _make_slopes(self, self.alibi_slopes.device)
        if isinstance(self.mask, BlockLayout):
            target = fn(torch.empty(0, device=self.mask.device)).device
            if target.type != "meta":
                self.mask = self.mask.to(target)
        return self

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        options = {
            "score_bias": self.score_bias,
            "softcap": self.softcap,
            "sinks": self.sinks is not None or None,
            "attention_dropout": self.attention_dropout or None,
            "v_head_dim": None if self.v_head_dim == self.head_dim else self.v_head_dim,
        }
        given = "".join(f", {name}={x!r}" for name, x in options.items() if x is not None)
        return f"heads={self.heads}, kv_heads={self.kv_heads}, mask={self.mask!r}{given}"


def _check_flag(name: str, value: Any, meaning: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"SelfAttention: {name} must be a bool, got {value!r} ({meaning})")


def _split_keys_and_values(
    module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """Weights of version 0.1, whose keys and values came from one projection."""
    for name in ("weight", "bias"):
        both = state.pop(f"{prefix}to_kv.{name}", None)
        if both is not None:
            state[f"{prefix}to_k.{name}"], state[f"{prefix}to_v.{name}"] = both.chunk(2)


def _after_loading(module: SelfAttention, *_: object) -> None:
    """Parameters of a module on meta may have been assigned (`assign=True`)."""
    if module.score_bias == "alibi" and module.alibi_slopes.is_meta:
        _make_slopes(module, next(module.parameters()).device)


def _make_slopes(module: SelfAttention, device: torch.device) -> None:
    """The slopes of a module that leaves meta: no checkpoint has them."""
    if device.type != "meta" and len(module.alibi_slopes) == module.heads:
        dtype = module.alibi_slopes.dtype
        module.alibi_slopes = alibi_slopes(module.heads, device).to(dtype)
