"""Problems with offsets, for the tests on a CPU and on a GPU: strategies and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from sparse_flash.masks import Mask

from sparse_flash import masks
from tests.strategies import any_length_patterns

BLOCKS = [(128, 128), (64, 64), (16, 32), (100, 128)]


@dataclass(frozen=True)
class PositionProblem:
    """One call: sizes, offsets of each batch entry, and a layout of positions."""

    mask: Mask
    block: tuple[int, int]
    batch: int
    q_len: int
    kv_len: int
    heads: tuple[int, int]
    dim: int
    q_offset: tuple[int, ...]
    kv_starts: tuple[int, ...]
    kv_lens: tuple[int, ...]
    seed: int = 0

    def layout(self, device="cpu"):
        """Of all positions that the queries have, and a few more."""
        last = max(
            self.q_len - 1 + offset - start
            for offset, start in zip(self.q_offset, self.kv_starts, strict=True)
        )
        sizes = (max(last, 0) + 1 + self.seed % 7, self.kv_len + self.seed % 5)
        return self.mask.layout(*sizes, block=self.block, device=device)

    def vectors(self, device="cpu"):
        """kv_lens, q_offset, kv_starts: int32 (b,)."""
        numbers = (self.kv_lens, self.q_offset, self.kv_starts)
        return [torch.tensor(x, dtype=torch.int32, device=device) for x in numbers]

    def tensors(self, dtype, device="cuda"):
        """q, k, v, dout and dlse, with NaN in keys that no query may see."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def make(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        sizes = (self.batch, self.q_len, self.heads[0])
        q, dout = (make(*sizes, self.dim).to(dtype) for _ in "qo")
        shape = (self.batch, self.kv_len, self.heads[1], self.dim)
        k, v = (make(*shape).to(dtype) for _ in "kv")
        return q, k, v, dout, make(sizes[0], sizes[2], sizes[1])

    def poison(self, k, v):
        """Copies of k and v with NaN before kv_starts and from kv_lens on."""
        j = torch.arange(self.kv_len, device=k.device)
        lens, _, starts = self.vectors(k.device)
        outside = (j < starts[:, None]) | (j >= lens[:, None])
        return [x.masked_fill(outside[..., None, None], torch.nan) for x in (k, v)]

    def allowed(self, device="cpu"):
        """The truth: bool (b, h, s, s_kv)."""
        return truth_at(self.mask, self.q_len, self.kv_len, self.heads[0], *self.vectors(device))


def truth_at(mask, q_len, kv_len, heads, kv_lens, q_offset, kv_starts):
    """Allowed elements: bool (b, h, s, s_kv), on the device of the offsets."""
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)
    entries = []
    for b, (length, offset, start) in enumerate(
        zip(kv_lens.tolist(), q_offset.tolist(), kv_starts.tolist(), strict=True)
    ):
        p, r = i + offset - start, j - start
        allowed = mask(p.clamp(min=0), r.clamp(min=0))
        if allowed.ndim == 4:
            allowed = allowed[b % len(allowed)]
        allowed = allowed & (p >= 0) & (r >= 0) & (j < length)
        entries.append(allowed.expand(heads, q_len, kv_len))
    return torch.stack(entries).to(q_offset.device)


@st.composite
def position_problems(draw, q_lens, kv_lens, dims=(16, 32, 64, 72, 96, 128, 192, 256)):
    """Any pattern that fits any length, offsets of any size, GQA, ragged lengths."""
    batch = draw(st.integers(1, 3))
    q_len, kv_len = draw(q_lens), draw(kv_lens)
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3]))
    kind = draw(st.sampled_from(["shared", "per head", "per entry"]))
    if kind == "shared":
        mask = draw(any_length_patterns())
    elif kind == "per head":
        mask = masks.per_head([draw(any_length_patterns()) for _ in range(heads)])
    else:
        mask = masks.per_batch([draw(any_length_patterns()) for _ in range(batch)])

    def numbers(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(batch))

    return PositionProblem(
        mask,
        draw(st.sampled_from(BLOCKS)),
        batch,
        q_len,
        kv_len,
        (heads, kv_heads),
        draw(st.sampled_from(dims)),
        numbers(-40, 400),
        numbers(0, min(kv_len, 150)),
        numbers(0, kv_len),
        draw(st.integers(0, 99)),
    )
