"""Attentions of a model by name: ours and the baselines.

Each is a module from q, k, v `(b, s, h, d)` and kv_lens (b,), or None where nothing is padding, to
`(b, s, h, d)`. A new one is a class with the decorator `attention`; an installed package adds one
by an entry point of the group `sparse_flash.attentions`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from sparse_flash.experiments import selected
from sparse_flash.experiments.user_attention import check_user_attention, is_module, user_module
from sparse_flash.experiments.user_code import load, read_mask
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.layout import FULL_TILE
from sparse_flash.masks.mask import PATTERNS
from sparse_flash.masks.operands import references, split_reference
from sparse_flash.masks.records import CACHE
from sparse_flash.masks.registry import Registry, suggestion
from torch import Tensor, nn
from torch.nn.functional import elu, scaled_dot_product_attention

from sparse_flash import masks

_NAMED = re.compile(r"([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?")  # a name, and its size in brackets
_MODULE = "module:"
# Names of the same attention elsewhere.
_ALSO_CALLED = {
    "flash": "sdpa",
    "flashattention": "sdpa",
    "scaleddotproductattention": "sdpa",
    "softmax": "standard",
    "vanilla": "standard",
    "full": "dense",
    "none": "dense",
}


@dataclass(frozen=True)
class AttentionType:
    """Constructor and cost of an attention other than ours.

    make: From (length, heads, head_dim, size) to the module.
    sized: Whether its name has a size, as in performer(256).
    matrix: Whether it computes a matrix of all queries and keys.
    flops: From (length, head_dim, size) to the operations of one head, forward and backward; see
        `flops.attention_flops`. None: those of the attention matrix.
    """

    make: Callable[[int, int, int, int], nn.Module]
    sized: bool = False
    matrix: bool = True
    flops: Callable[[int, int, int], float] | None = None


# An AttentionType of ours; of an installed package a class or function as `user_attention` says.
ATTENTIONS: Registry[Any] = Registry("attention", "sparse_flash.attentions")


def attention(
    name: str,
    make: Callable[[int, int, int, int], nn.Module],
    *,
    sized: bool = False,
    matrix: bool = True,
    flops: Callable[[int, int, int], float] | None = None,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Let a class of attention be chosen by its name; see `AttentionType`."""
    ATTENTIONS[name] = AttentionType(make, sized, matrix, flops)
    return lambda cls: cls


@dataclass(frozen=True)
class AttentionKind:
    """An attention, by name or from an object of the user.

    name: "ours", "flex", "module" (a user's), "selected", or a name of `ATTENTIONS`.
    mask: None where there is none.
    size: Random features of a Performer, or the rank of a Linformer.
    text: Text as it was given; empty for objects.
    user: Class or function of a user or of an installed package; a `selected.Selected`.

    >>> AttentionKind.of("dense").mask, AttentionKind.of("linformer(64)").size
    (full(), 64)
    >>> AttentionKind.of("flex: local(9)")
    AttentionKind(name='flex', mask=local((9, 9)), size=0)
    >>> AttentionKind.of(masks.local(3) | masks.sinks(1)).label
    'local((3, 3)) | sinks(1)'
    """

    name: str
    mask: Mask | None = None
    size: int = 0
    text: str = field(default="", repr=False)
    user: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, attention: Attention) -> AttentionKind:
        """Read a name, or take a Mask, a class or a function.

        Raises:
            TypeError: It is none of these.
            ValueError: A name that is neither a mask nor another kind; a class or function that
                cannot be used as attention.
        """
        if isinstance(attention, AttentionKind):
            return attention
        if isinstance(attention, Mask):
            return cls("ours", attention)
        if isinstance(attention, str):
            return cls._read(attention.strip())
        if callable(attention):
            check_user_attention(attention, _qualified(attention))
            return cls("module", user=attention)
        raise TypeError(
            "attention must be a name such as 'sdpa' or 'local(256)', a Mask, an nn.Module class "
            f"or a function of q, k, v, kv_lens, got {attention!r}"
        )

    @classmethod
    def _read(cls, text: str) -> AttentionKind:
        if text.startswith(_MODULE):
            reference = text.removeprefix(_MODULE).strip()
            if split_reference(reference) is None:
                raise ValueError(f"{text!r} must be module:path/to/file.py:NAME")
            user = load(reference)
            check_user_attention(user, reference)
            return cls("module", text=text, user=user)
        if selected.is_selected(text):
            return cls("selected", text=text, user=selected.read(text))
        named = _NAMED.fullmatch(text)
        if named and PATTERNS.get(named[1]) is None and named[1] in ATTENTIONS:
            return cls._named(named[1], named[2], text)
        try:
            if text.startswith("flex:"):
                return cls("flex", _mask(text.removeprefix("flex:").strip()), text=text)
            return cls("ours", _mask(text), text=text)
        except ValueError as error:
            if named and (near := _nearest(named[1].lower(), bool(named[2]))):
                raise ValueError(f"unknown attention {text!r}; {near}") from None
            operands = references(text.removeprefix("flex:"))
            if operands == [text] and is_module(load(text)):
                raise ValueError(f"{text} is an nn.Module: write {_MODULE}{text}") from None
            if operands:
                raise
            raise ValueError(f"{error} (attention may also be {_choices()})") from None

    @classmethod
    def _named(cls, name: str, size: str | None, text: str) -> AttentionKind:
        """One of `ATTENTIONS`."""
        found = ATTENTIONS[name]
        if not isinstance(found, AttentionType):
            if size is not None:
                raise ValueError(f"{text}: {name} takes no size, write {name}")
            check_user_attention(found, name)
            return cls("module", text=text, user=found)
        if not found.sized:
            if size:
                raise ValueError(f"{text}: {name} takes no size, write {name}")
            return cls(name, text=text)
        if not size or not size.strip().isdecimal() or int(size) < 1:
            raise ValueError(f"{text} must have a size of at least 1, as in {name}(256)")
        return cls(name, size=int(size), text=text)

    @property
    def label(self) -> str:
        """The given text, or the repr of an object."""
        if self.text:
            return self.text
        if self.name == "module":
            return _MODULE + _qualified(self.user)
        if self.mask is None:
            return f"{self.name}({self.size})" if self.size else self.name
        return f"flex: {self.mask!r}" if self.name == "flex" else repr(self.mask)

    @property
    def type(self) -> AttentionType | None:
        """Its constructor and cost; None for ours, flex and a user's attention."""
        own = ("ours", "flex", "module", "selected")
        return None if self.name in own else ATTENTIONS[self.name]

    def layout(self, length: int, block: int = 128) -> BlockLayout:
        """The layout of its mask on the CPU; built once, for all layers and records.

        Raises:
            ValueError: The kind has no mask, or one that is made for other lengths.
        """
        mask = self.mask
        if mask is None:
            raise ValueError(f"{self.label} has no mask")
        try:
            key = (length, block, mask.state())
        except TypeError:  # reads data whose changes cannot be noticed
            return mask.layout(length, block=(block, block))
        record = CACHE.of(mask)
        return record.layout(key, lambda: mask.layout(length, block=(block, block)))

    def token_layouts(self, length: int, extra: int = 0) -> nn.Module | None:
        """The module that makes the layout of each batch from its tokens; None for most kinds.

        Args:
            length: Tokens that attention sees.
            extra: Number of them before those of the task: the CLS token.
        """
        return self.user.token_layouts(length, extra) if self.name == "selected" else None

    def density(self, length: int, block: int = 128) -> float | None:
        """The kept fraction of the attention matrix at this length, 0..1, counted exactly.

        1 for standard and sdpa; None for linear, performer and linformer, which have no matrix of
        queries and keys, and for attention of a user, of which it is not known.

        block: Granularity of the layout by which it is counted; has no influence on the result.

        >>> AttentionKind.of("flex: causal()").density(4), AttentionKind.of("sdpa").density(4)
        (0.625, 1.0)
        >>> AttentionKind.of("linear").density(4) is None
        True
        """
        if self.mask is not None:
            return self.layout(length, block).density
        if self.name == "selected":
            return self.user.density(length)
        return 1.0 if self.type and self.type.matrix else None


if TYPE_CHECKING:
    Attention = str | Mask | AttentionKind | Callable[..., Any]
else:
    Attention = str  # the text form of the command line


def _mask(text: str) -> Mask:
    return masks.full() if text == "dense" else read_mask(text)


def _nearest(word: str, has_size: bool) -> str:
    """The attention that an unknown name resembles; "" if none, or a pattern more with a size."""
    others = ["dense", *ATTENTIONS.names()]
    word = _ALSO_CALLED.get(word.replace("_", ""), word)
    near = suggestion(word, [*others, *PATTERNS.names()] if has_size else others)
    return near if near.startswith("did") and near.split("'")[1] in others else ""


def _choices() -> str:
    sized = {name: f"{name}(256)" for name, found in ATTENTIONS.items() if found.sized}
    names = [sized.get(name, name) for name in ATTENTIONS.names()]
    return (
        f"dense, or one of {', '.join(names)}, {selected.FORMS}, flex: MASK, "
        "module:path/to/file.py:NAME"
    )


def _qualified(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def core(
    kind: AttentionKind, layout: BlockLayout | None, length: int, heads: int, head_dim: int
) -> nn.Module:
    """The module of a kind; `layout` is its mask's, where it has one."""
    if kind.name == "flex":
        assert layout is not None
        return Flex(layout)
    if kind.name == "selected":
        return kind.user.make(length, heads, head_dim)
    if kind.type is None:
        return user_module(kind.user, kind.label.removeprefix(_MODULE), length, heads, head_dim)
    return kind.type.make(length, heads, head_dim, kind.size)


def check_trainable(kind: AttentionKind, device: torch.device) -> None:
    """Raise ValueError where the attention cannot be trained on the device."""
    if kind.name == "flex" and device.type == "cpu":
        mask = kind.label.partition(":")[2].strip()
        raise ValueError(
            f"{kind.label} cannot be trained on a CPU: PyTorch's FlexAttention has no "
            f"backward pass there; write {mask} for the same mask by our implementation, or take a "
            "GPU with --device cuda"
        )


def _features_flops(length: int, head_dim: int, features: int) -> int:
    """Forward: K'^T V, Q' of it, and the normalizer."""
    return 4 * length * features * head_dim + 2 * length * features


def key_padding_mask(k: Tensor, kv_lens: Tensor | None) -> Tensor | None:
    """Keys without padding: bool (b, s); None for all."""
    if kv_lens is None:
        return None
    return torch.arange(k.shape[1], device=k.device) < kv_lens[:, None]


@attention("standard", lambda *_: Standard())
class Standard(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with the s x s matrix in memory, as before FlashAttention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        real = key_padding_mask(k, kv_lens)
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v)


@attention("sdpa", lambda *_: Sdpa())
class Sdpa(nn.Module):
    """PyTorch's scaled_dot_product_attention, dense."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        real = key_padding_mask(k, kv_lens)
        mask = None if real is None else real[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Flex(nn.Module):
    """PyTorch's FlexAttention with the tiles of a layout; for all heads alike.

    Raises:
        ValueError: Heads or batch entries have masks of their own.
    """

    counts: Tensor
    columns: Tensor
    full_counts: Tensor
    full_columns: Tensor
    entries: Tensor
    bits: Tensor

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__()
        if layout.num_patterns > 1:
            raise ValueError("flex takes masks that all heads share; ours takes any")
        self.block, self.lengths = layout.block, (layout.q_len, layout.kv_len)
        partial = layout.bit_tile_indices != FULL_TILE
        lists = (*tile_lists(layout, partial), *tile_lists(layout, ~partial))
        entries = torch.zeros(layout.num_block_rows, layout.num_block_cols, dtype=torch.int32)
        entries[layout.tile_rows.long(), layout.col_indices.long()] = layout.bit_tile_indices
        names = ("counts", "columns", "full_counts", "full_columns", "entries", "bits")
        for name, value in zip(names, (*lists, entries, layout.bit_tiles), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        from torch.nn.attention.flex_attention import BlockMask

        (height, width), entries, bits = self.block, self.entries, self.bits

        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            tile = entries[i // height, j // width]
            return (bits[tile, i % height, j % width // 8] >> (j % 8)) & 1 > 0

        def within(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert kv_lens is not None
            return torch.where(j < kv_lens[b], score, -torch.inf)

        blocks = BlockMask.from_kv_blocks(
            *(self.counts, self.columns, self.full_counts, self.full_columns),
            BLOCK_SIZE=self.block,
            mask_mod=allowed if len(bits) else None,
            seq_lengths=self.lengths,
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        score_mod = None if kv_lens is None else within
        return _flex()(q, k, v, score_mod=score_mod, block_mask=blocks).transpose(1, 2)


@functools.cache
def _flex() -> Callable[..., Tensor]:
    """Compiled: uncompiled it would hold the whole matrix."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def tile_lists(layout: BlockLayout, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Padded lists of the kept tiles: counts (1, 1, rows), block columns (1, 1, rows, columns)."""
    rows = layout.tile_rows[keep].long()
    counts = rows.bincount(minlength=layout.num_block_rows)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    shape = (layout.num_block_rows, layout.num_block_cols)
    columns = torch.zeros(shape, dtype=torch.int32, device=rows.device)
    columns[rows, place] = layout.col_indices[keep]
    return counts[None, None].int(), columns[None, None]


def _by_features(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """phi(Q) (phi(K)^T V) / (phi(Q) sum phi(K)), from features (b, s, h, f)."""
    if real is not None:
        k = k * real[..., None, None]
    numerator = torch.einsum("bqhf,bhfd->bqhd", q, torch.einsum("bkhf,bkhd->bhfd", k, v))
    return numerator / torch.einsum("bqhf,bhf->bqh", q, k.sum(1))[..., None]


@attention(
    "linear",
    lambda *_: LinearAttention(),
    matrix=False,
    flops=lambda n, d, _: 3.0 * _features_flops(n, d, d),
)
class LinearAttention(nn.Module):
    """Attention with the features elu(x) + 1 (Katharopoulos et al., 2020)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out; computed in float32."""
        with torch.autocast(q.device.type, enabled=False):
            of_q, of_k = elu(q.float()) + 1, elu(k.float()) + 1
            out = _by_features(of_q, of_k, v.float(), key_padding_mask(k, kv_lens))
        return out.to(v.dtype)


@attention(
    "performer",
    lambda length, heads, head_dim, size: Performer(heads, head_dim, size),
    sized=True,
    matrix=False,
    flops=lambda n, d, size: 3.0 * _features_flops(n, d, size) + 8.0 * n * size * d,
)
class Performer(nn.Module):
    """Attention with positive orthogonal random features, FAVOR+ (Choromanski et al., 2021).

    phi(x) = exp(w_i . x - |x|^2 / 2) for x = q / d^(1/4); its products are softmax kernels on
    average over w.
    """

    features: Tensor

    def __init__(self, heads: int, head_dim: int, size: int) -> None:
        super().__init__()
        blocks = []
        for _ in range(-(-size // head_dim)):  # orthogonal within each block
            directions, _ = torch.linalg.qr(torch.randn(heads, head_dim, head_dim))
            norms = torch.randn(heads, head_dim, head_dim).norm(dim=1, keepdim=True)
            # QR determines the signs; random ones make the distribution symmetric.
            signs = torch.randn(heads, 1, head_dim).sign()
            blocks.append((directions * norms * signs).transpose(1, 2))
        self.register_buffer("features", torch.cat(blocks, 1)[:, :size])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out; computed in float32."""
        real = key_padding_mask(k, kv_lens)
        with torch.autocast(q.device.type, enabled=False):
            of_q, of_k = self.exponents(q), self.exponents(k)
            if real is not None:
                of_k = of_k.masked_fill(~real[..., None, None], -torch.inf)
            # Any offset cancels: the maximum of each query, and the common maximum of the keys.
            of_q = (of_q - of_q.amax(-1, keepdim=True).detach()).exp()
            of_k = (of_k - of_k.amax((1, 3), keepdim=True).detach()).exp()
            out = _by_features(of_q + 1e-6, of_k + 1e-6, v.float(), real)
        return out.to(v.dtype)

    def exponents(self, x: Tensor) -> Tensor:
        """W . x - |x|^2 / 2: (b, s, h, features)."""
        x = x.float() * x.shape[-1] ** -0.25
        return torch.einsum("bshd,hfd->bshf", x, self.features) - x.square().sum(-1)[..., None] / 2


@attention(
    "linformer",
    lambda length, heads, head_dim, size: Linformer(length, size),
    sized=True,
    matrix=False,
    flops=lambda n, d, size: 24.0 * n * size * d,
)
class Linformer(nn.Module):
    """Attention to `size` learned mixtures of keys and of values (Wang et al., 2020).

    softmax(Q (E K)^T / sqrt(d)) (F V), with E = F for all heads, as in its sharing by heads.
    """

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.mixtures = nn.Parameter(torch.randn(size, length) * length**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        real = key_padding_mask(k, kv_lens)
        if real is not None:
            k, v = (x * real[..., None, None] for x in (k, v))
        k, v = (torch.einsum("ns,bshd->bhnd", self.mixtures.to(x.dtype), x) for x in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
