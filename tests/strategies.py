"""Hypothesis strategies for masks, lengths and problems: one source for CPU and GPU tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from sparse_flash.masks import Mask

from sparse_flash import masks

small = st.integers(1, 40)


def windows():
    side = st.none() | st.integers(0, 60)
    return st.integers(0, 60) | st.tuples(side, side)


def any_length_patterns() -> st.SearchStrategy[Mask]:
    """Every pattern that fits any length."""
    segments = st.lists(st.tuples(small, st.integers(1, 5)), min_size=1, max_size=3)
    return st.one_of(
        st.just(masks.full()),
        st.builds(masks.causal, st.integers(-30, 30)),
        st.builds(masks.local, windows()),
        st.builds(masks.block_local, small, st.integers(0, 3)),
        st.builds(masks.dilated, windows(), st.integers(1, 7)),
        st.builds(masks.strided, small),
        st.integers(1, 40).flatmap(lambda n: st.builds(masks.fixed, st.just(n), st.integers(1, n))),
        st.builds(masks.global_tokens, small),
        st.builds(masks.sinks, small),
        st.builds(masks.butterfly, small, st.none() | st.integers(0, 5)),
        st.builds(masks.block_diagonal, small),
        st.builds(masks.random_blocks, st.floats(0, 1), small, st.integers(0, 9)),
        segments.map(lambda s: masks.longnet(*map(tuple, zip(*s, strict=True)))),
        st.builds(masks.longformer, st.integers(0, 40), small),
        st.builds(masks.star, st.integers(0, 9)),
        st.builds(masks.star_attention, small),
        st.sampled_from([3, 5]).map(lambda n: masks.custom(PREDICATES[n])),
        shifted(),
    )


def shifted() -> st.SearchStrategy[Mask]:
    """Masks seen from other positions, negative ones among them."""
    inner = st.one_of(
        st.builds(masks.local, windows()),
        st.builds(masks.butterfly, small),
        st.builds(masks.longnet, small, st.integers(1, 5)),
        st.builds(masks.random_blocks, st.floats(0, 1), small),
        st.builds(masks.global_tokens, small) | st.just(masks.full()),
    )
    by = st.integers(-60, 60)
    return st.builds(lambda mask, q, kv: mask.shift(q, kv), inner, by, by)


PREDICATES = {3: lambda q, kv: (q - kv) % 3 != 1, 5: lambda q, kv: (q * kv) % 5 == 0}


@st.composite
def square_patterns(draw, length: int) -> Mask:
    """Patterns made for exactly `length` tokens."""
    kind = draw(
        st.sampled_from(["documents", "table", "blocks", "scipy", "rows", "bigbird", "image"])
    )
    seed = draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    if kind == "documents":
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=4))) if length > 1 else []
        edges = [0, *cuts, length, *[length] * draw(st.integers(0, 1))]  # maybe one of no tokens
        return masks.documents(tuple(b - a for a, b in itertools.pairwise(edges)))
    if kind in ("table", "scipy"):
        table = torch.rand(length, length, generator=generator) < draw(st.floats(0, 1))
        if kind == "table":
            return masks.from_dense(table)
        import scipy.sparse

        return masks.from_scipy(scipy.sparse.csr_array(table.numpy()))
    block = draw(st.integers(1, max(1, length // 2)))
    count = -(-length // block)
    if kind == "blocks":
        table = torch.rand(count, count, generator=generator) < 0.5
        return masks.from_blocks(table, block, length, length)
    if kind == "rows":
        return masks.random_blocks_per_row(length, draw(st.integers(0, count)), block, seed)
    if kind == "bigbird":
        return masks.bigbird(length, block, 3, 1, draw(st.integers(0, count)), seed)
    width = draw(st.sampled_from([w for w in range(1, length + 1) if length % w == 0]))
    height = length // width
    patch = tuple(
        draw(st.sampled_from([n for n in range(1, side + 1) if side % n == 0]))
        for side in (height, width)
    )
    image = draw(
        st.sampled_from(
            [
                masks.axial(height, width),
                masks.neighborhood(height, width, draw(st.integers(0, 5))),
                masks.neighborhood(height, width, (1, draw(st.integers(0, 5)))),
                masks.patches(height, width, patch, draw(st.integers(0, 2))),
            ]
        )
    )
    order = draw(st.sampled_from([None, masks.raster, masks.morton, masks.hilbert]))
    return image if order is None else image.through(order(height, width))


@st.composite
def compositions(draw, leaves: st.SearchStrategy[Mask]) -> Mask:
    """Leaves, and up to three of them combined."""
    mask = draw(leaves)
    for _ in range(draw(st.integers(0, 2))):
        other = draw(leaves)
        other = ~other if draw(st.booleans()) else other
        mask = mask | other if draw(st.booleans()) else mask & other
    return mask


@dataclass(frozen=True)
class Setting:
    """A mask with lengths that fit it, and a granularity."""

    mask: Mask
    q_len: int
    kv_len: int
    block: tuple[int, int]


@st.composite
def settings_(draw, max_length: int = 150, heads: bool = False) -> Setting:
    q_len, kv_len = draw(st.integers(1, max_length)), draw(st.integers(1, max_length))
    leaves = any_length_patterns()
    if draw(st.booleans()):
        kv_len = q_len
        leaves = leaves | square_patterns(q_len)
    mask = draw(compositions(leaves))
    if heads:
        others = draw(st.lists(compositions(leaves), min_size=1, max_size=2))
        mask = masks.per_head([mask, others[0], others[-1], mask])
    block = draw(
        st.sampled_from([(16, 16), (32, 16), (8, 24), (5, 7), (64, 64), (128, 128), (1, 3)])
    )
    return Setting(mask, q_len, kv_len, block)


@dataclass(frozen=True)
class Problem:
    """Everything a call of attention needs, and the mask it is to obey, densely."""

    setting: Setting
    batch: int
    heads: int
    kv_heads: int
    dim: int
    lens: tuple[int, ...] | None
    seed: int

    def tensors(self, dtype=torch.float64, device="cpu"):
        """q, k, v (requiring gradients) and the gradients of out and lse."""
        generator = torch.Generator().manual_seed(self.seed)

        def make(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)

        s = self.setting
        q = make(self.batch, s.q_len, self.heads, self.dim).requires_grad_()
        k, v = (make(self.batch, s.kv_len, self.kv_heads, self.dim).requires_grad_() for _ in "kv")
        return (q, k, v), make(*q.shape), make(self.batch, self.heads, s.q_len)

    def kv_lens(self, device="cpu"):
        return None if self.lens is None else torch.tensor(self.lens, device=device)

    def allowed(self, device="cpu"):
        """bool (batch, heads, q_len, kv_len), straight from the mask."""
        s = self.setting
        q, kv = torch.arange(s.q_len)[:, None], torch.arange(s.kv_len)
        truth = s.mask(q, kv)
        truth = truth if truth.ndim == 4 else truth[None, None]
        truth = truth.expand(self.batch, self.heads, -1, -1)
        if self.lens is not None:
            truth = truth & (kv < torch.tensor(self.lens)[:, None, None, None])
        return truth.to(device)


@st.composite
def problems(draw, max_length: int = 150, dims=(1, 4, 8)) -> Problem:
    per_head = draw(st.booleans())
    setting = draw(settings_(max_length, heads=per_head))
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = 4 if per_head else kv_heads * draw(st.sampled_from([1, 2]))
    batch = draw(st.integers(1, 3))
    lens = draw(st.none() | st.tuples(*[st.integers(0, setting.kv_len)] * batch))
    return Problem(
        setting, batch, heads, kv_heads, draw(st.sampled_from(dims)), lens, draw(st.integers(0, 9))
    )
