"""Benchmark cases: masks, lengths, heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparse_flash.experiments.user_code import read_mask
from sparse_flash.masks import Mask, causal, full
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One problem: self-attention under a mask.

    mask: Mask, or its text.
    length: Number of queries and keys.
    kv_heads: Number of key heads, which divides `heads`; None for as many.
    dtype: Name of a torch dtype.
    """

    name: str
    mask: str | Mask
    length: int
    heads: int
    head_dim: int
    batch: int = 1
    block: int = 128
    kv_heads: int | None = None
    dtype: str = "bfloat16"

    @property
    def pattern(self) -> Mask:
        """The mask itself."""
        return self.mask if isinstance(self.mask, Mask) else read_mask(self.mask)

    @property
    def built_in(self) -> str | None:
        """The argument of dense kernels that means this mask: "full", "causal", or none."""
        return {full(): "full", causal(): "causal"}.get(self.pattern)

    @property
    def label(self) -> str:
        """A name that is unique in a suite."""
        return f"{self.name} d{self.head_dim}"


# The masks that cut tiles, in the form that FlexAttention compiles into its kernel.
PREDICATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal()": lambda q_idx, kv_idx: q_idx >= kv_idx,
    "local(200) | global_tokens(37)": lambda q_idx, kv_idx: (
        ((q_idx - kv_idx).abs() <= 200) | (q_idx < 37) | (kv_idx < 37)
    ),
}


def _paper(head_dim: int) -> list[Case]:
    """16K tokens, 16 heads: dense, causal, and random blocks of falling density."""
    masks = {"dense": "full()", "causal": "causal()"}
    masks |= {f"random {d}": f"random_blocks({d}, 128, 0)" for d in (0.5, 0.25, 0.1, 0.05)}
    return [Case(f"16K {name}", mask, 16384, 16, head_dim) for name, mask in masks.items()]


def _long(head_dim: int) -> list[Case]:
    """64K tokens, 8 heads: the patterns that researchers combine."""
    local, whole = "block_local(128, 1)", "global_tokens(128)"
    masks = {
        "local": local,
        "butterfly": "butterfly(128)",
        "local+global": f"{local} | {whole}",
        "local+global+butterfly": f"{local} | {whole} | butterfly(128)",
        "exact local+global": "local(200) | global_tokens(37)",
    }
    return [Case(f"64K {name}", mask, 65536, 8, head_dim) for name, mask in masks.items()]


def _lra() -> list[Case]:
    """The shapes of Long Range Arena's small models, batch 32."""
    sparse = "block_local(128, 1) | global_tokens(128)"
    return [
        Case(f"LRA {length} h{heads} {name}", mask, length, heads, head_dim, 32)
        for length, heads, head_dim in ((1024, 8, 32), (2048, 2, 32), (4096, 4, 64))
        for name, mask in (("dense", "full()"), ("local+global", sparse))
    ]


def _others() -> list[Case]:
    """Large head_dims, heads that share keys, and blocks smaller than the kernels' tiles."""
    small = [
        Case(f"16K random {n}-blocks 0.1", f"random_blocks(0.1, {n}, 3)", 16384, 16, 128, block=n)
        for n in (64, 32)
    ]
    return [
        Case("8K causal", "causal()", 8192, 8, 192),
        Case("8K dense", "full()", 8192, 8, 192),
        Case("8K causal", "causal()", 8192, 8, 256),
        Case("8K dense", "full()", 8192, 8, 256),
        Case("8K GQA 32:8 causal", "causal()", 8192, 32, 128, batch=2, kv_heads=8),
        *small,
    ]


SUITES: dict[str, list[Case]] = {
    "quick": [_paper(128)[0], _paper(64)[3], _long(64)[2]],
    "standard": [
        *(case for d in (128, 64) for case in (*_paper(d), *_long(d))),
        *(case for d in (32, 96) for case in (_paper(d)[0], _paper(d)[4], _long(d)[2])),
        *_lra(),
        *_others(),
    ],
}
