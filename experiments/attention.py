"""The kinds of attention that a model can be given by name, ours and those it is compared with.

Each is a module from q, k, v `(b, s, h, d)` and kv_lens (b,), or None where nothing is padding, to
`(b, s, h, d)`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.layout import FULL_TILE
from torch import Tensor, nn
from torch.nn.functional import elu, scaled_dot_product_attention

from sparse_flash import masks

OTHERS = "standard, sdpa, linear, performer(256), linformer(256), flex: MASK"
_SHAPED = re.compile(r"(performer|linformer)\((\d+)\)$")


@dataclass(frozen=True)
class Kind:
    """What the name of an attention says.

    name: "ours", or that of a peer.
    mask: None where there is none.
    size: Random features of a Performer, or the rank of a Linformer.

    >>> Kind.of("dense").mask, Kind.of("flex: local(9)"), Kind.of("linformer(64)").size
    (full(), Kind(name='flex', mask=local((9, 9)), size=0), 64)
    """

    name: str
    mask: Mask | None = None
    size: int = 0

    @classmethod
    def of(cls, attention: str) -> Kind:
        """Read a name.

        Raises:
            ValueError: It is neither a mask nor one of the others.
        """
        text = attention.strip()
        if text in ("standard", "sdpa", "linear"):
            return cls(text)
        shaped = _SHAPED.match(text)
        if shaped:
            if int(shaped[2]) < 1:
                raise ValueError(f"{text} must have a size of at least 1, as in {shaped[1]}(256)")
            return cls(shaped[1], size=int(shaped[2]))
        try:
            if text.startswith("flex:"):
                return cls("flex", _mask(text.removeprefix("flex:").strip()))
            return cls("ours", _mask(text))
        except ValueError as error:
            raise ValueError(f"{error} (attention may also be dense, or one of {OTHERS})") from None

    def density(self, length: int, block: int = 128) -> float | None:
        """The kept fraction of the attention matrix at this length, 0..1, counted exactly.

        1 for standard and sdpa; None for linear, performer and linformer, which have no matrix of
        queries and keys.

        block: Granularity of the layout by which it is counted; has no influence on the result.

        >>> Kind.of("flex: causal()").density(4), Kind.of("sdpa").density(4)
        (0.625, 1.0)
        >>> Kind.of("linear").density(4) is None
        True
        """
        if self.mask is not None:
            return self.mask.layout(length, block=(block, block)).density
        return 1.0 if self.name in ("standard", "sdpa") else None


def _mask(text: str) -> Mask:
    return masks.full() if text == "dense" else masks.parse(text)


def core(
    kind: Kind, layout: BlockLayout | None, length: int, heads: int, head_dim: int
) -> nn.Module:
    """The module of a kind; `layout` is its mask's, where it has one."""
    if kind.name == "flex":
        assert layout is not None
        return Flex(layout)
    if kind.name == "performer":
        return Performer(heads, head_dim, kind.size)
    if kind.name == "linformer":
        return Linformer(length, kind.size)
    return {"standard": Standard, "sdpa": Sdpa, "linear": LinearAttention}[kind.name]()


def real_keys(k: Tensor, kv_lens: Tensor | None) -> Tensor | None:
    """Which keys are no padding: bool (b, s); None for all."""
    if kv_lens is None:
        return None
    return torch.arange(k.shape[1], device=k.device) < kv_lens[:, None]


class Standard(nn.Module):
    """softmax(Q K^T / sqrt(d)) V with the s x s matrix in memory, as before FlashAttention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        real = real_keys(k, kv_lens)
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).to(v.dtype), v)


class Sdpa(nn.Module):
    """PyTorch's scaled_dot_product_attention, dense."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        real = real_keys(k, kv_lens)
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


class LinearAttention(nn.Module):
    """Attention with the features elu(x) + 1 (Katharopoulos et al., 2020)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out; computed in float32."""
        with torch.autocast(q.device.type, enabled=False):
            of_q, of_k = elu(q.float()) + 1, elu(k.float()) + 1
            out = _by_features(of_q, of_k, v.float(), real_keys(k, kv_lens))
        return out.to(v.dtype)


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
            # QR chooses signs by the numbers themselves: without new ones it would favour a side.
            signs = torch.randn(heads, 1, head_dim).sign()
            blocks.append((directions * norms * signs).transpose(1, 2))
        self.register_buffer("features", torch.cat(blocks, 1)[:, :size])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out; computed in float32."""
        real = real_keys(k, kv_lens)
        with torch.autocast(q.device.type, enabled=False):
            of_q, of_k = self.exponents(q), self.exponents(k)
            if real is not None:
                of_k = of_k.masked_fill(~real[..., None, None], -torch.inf)
            # Whatever is subtracted cancels: of a query its own maximum, of keys their common one.
            of_q = (of_q - of_q.amax(-1, keepdim=True).detach()).exp()
            of_k = (of_k - of_k.amax((1, 3), keepdim=True).detach()).exp()
            out = _by_features(of_q + 1e-6, of_k + 1e-6, v.float(), real)
        return out.to(v.dtype)

    def exponents(self, x: Tensor) -> Tensor:
        """W . x - |x|^2 / 2: (b, s, h, features)."""
        x = x.float() * x.shape[-1] ** -0.25
        return torch.einsum("bshd,hfd->bshf", x, self.features) - x.square().sum(-1)[..., None] / 2


class Linformer(nn.Module):
    """Attention to `size` learned mixtures of keys and of values (Wang et al., 2020).

    softmax(Q (E K)^T / sqrt(d)) (F V), with E = F for all heads, as in its sharing by heads.
    """

    def __init__(self, length: int, size: int) -> None:
        super().__init__()
        self.mixtures = nn.Parameter(torch.randn(size, length) * length**-0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv_lens: Tensor | None) -> Tensor:
        """(b, s, h, d) in and out."""
        real = real_keys(k, kv_lens)
        if real is not None:
            k, v = (x * real[..., None, None] for x in (k, v))
        k, v = (torch.einsum("ns,bshd->bhnd", self.mixtures.to(x.dtype), x) for x in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), k, v).transpose(1, 2)
