"""Attention whose blocks the data choose: topk(...), nsa(...), hybrid(...), foreground(...).

topk(8)                                 MoBA: pooled q and k score the blocks
topk(8, selector=dsa, pool=token)       an indexer that learns from the attention that was paid
nsa(8, causal=True)                     attention to compressed blocks scores and takes part
hybrid(local(128) | sinks(16), performer(128))
exact within the mask, random features for other blocks
foreground(64)                          blocks with nonzero tokens; see `foreground`
"""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from sparse_flash.experiments.hybrid import Hybrid
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.operands import references
from torch import nn

from sparse_flash import densities, masks
from sparse_flash.nn.selected import TopKAttention, make_selector

FORMS = "topk(8), topk(8, selector=dsa), nsa(8), hybrid(local(128), performer(128)), foreground(64)"
_NAME = re.compile(r"(topk|nsa|hybrid)\s*\(")


@dataclass(frozen=True)
class Selected:
    """Base class of the attentions with selection."""

    @property
    def digest(self) -> str:
        """Identifies the settings that affect training."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def make(self, length: int, heads: int, head_dim: int) -> nn.Module:
        """The module of a layer: q, k, v `(b, s, h, d)` and kv_lens to `(b, s, h, d)`."""
        raise NotImplementedError

    def token_layouts(self, length: int, extra: int = 0) -> nn.Module | None:
        """The module that makes the layout of a batch from its tokens; None: none is needed."""
        return None

    def density(self, length: int) -> float | None:
        """Part of all pairs of tokens that are computed exactly, 0..1; None: it is not known."""
        raise NotImplementedError

    def tile_density(self, length: int) -> float | None:
        """Part of all pairs of blocks that are computed exactly, 0..1; None: it is not known."""
        raise NotImplementedError

    def densities(self, length: int, head_dim: int) -> dict[str, float | None]:
        """Element, tile and computed density by name; None: the data decide."""
        return {
            "density": self.density(length),
            "tile_density": self.tile_density(length),
            "computed_density": None,
        }

    def flops(self, length: int, head_dim: int) -> float | None:
        """Operations of one head, forward and backward, those of the exact part."""
        kept = self.tile_density(length)
        return None if kept is None else 12.0 * kept * length**2 * head_dim


@dataclass(frozen=True)
class TopK(Selected):
    """Exact attention to the best blocks; see `sparse_flash.nn.SelectedAttention`."""

    blocks: int
    """Key blocks for each block of queries, forced ones included."""
    block: int | tuple[int, int] = 64
    """Size of the blocks, in tokens: one number, or (queries, keys)."""
    selector: Literal["moba", "dsa", "nsa"] = "moba"
    """The selector of blocks, and its training signal."""
    pool: Literal["mean", "max", "token"] = "mean"
    """How tokens become one score of a block."""
    causal: bool = False
    """Whether queries see earlier keys only."""
    sinks: int = 0
    """First key blocks that are always chosen."""
    local: int = 1
    """Key blocks up to a row's own that are always chosen."""
    kl: float = 1.0
    """Factor of the indexer's loss."""

    def __post_init__(self) -> None:
        """Refuse what no module can be made of."""
        for field, allowed in (
            ("selector", ("moba", "dsa", "nsa")),
            ("pool", ("mean", "max", "token")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}"
                )
        with torch.random.fork_rng(devices=[]):
            self.make(128, 1, 16)

    @property
    def sizes(self) -> tuple[int, int]:
        """(block_q, block_kv)."""
        return (self.block, self.block) if isinstance(self.block, int) else self.block

    def make(self, length: int, heads: int, head_dim: int) -> TopKAttention:
        """The module of a layer."""
        given = (heads, head_dim, heads, self.sizes, self.pool, self.causal)
        return TopKAttention(
            make_selector(self.selector, *given),
            self.blocks,
            self.sizes,
            causal=self.causal,
            sinks=self.sinks,
            local=self.local,
            kl_weight=self.kl,
        )

    def density(self, length: int) -> float | None:
        """Part of all pairs of tokens that are computed; None where the choice decides: in causal
        attention that may leave out a row's own block, and where the last block is shorter.

        >>> TopK(2, block=64).density(256), TopK(2, block=64, causal=True).density(256)
        (0.5, 0.314453125)
        """
        block_q, block_kv = self.sizes
        if length % block_q or length % block_kv:
            return None
        if not self.causal:
            return self.tile_density(length)
        if self.local < 1 or block_kv % block_q:
            return None
        kept = 0
        for start in range(0, length, block_q):
            own, before = divmod(start, block_kv)
            kept += block_q * (block_kv * min(self.blocks - 1, own) + before)
            kept += block_q * (block_q + 1) // 2
        return kept / length**2

    def densities(self, length: int, head_dim: int) -> dict[str, float | None]:
        """As `Selected.densities`. A Hopper GPU computes tiles of 128 x 128, so smaller blocks are
        united: the choice decides which.
        """
        found = super().densities(length, head_dim)
        if all(size % 128 == 0 for size in self.sizes):
            found["computed_density"] = found["tile_density"]
        return found

    def tile_density(self, length: int) -> float:
        """Part of all pairs of blocks that are chosen; the first rows of causal attention have
        less than `blocks` to choose from.

        >>> TopK(2, block=(16, 64), causal=True).tile_density(2048)
        0.0615234375
        """
        block_q, block_kv = self.sizes
        nq, nk = -(-length // block_q), -(-length // block_kv)
        ends = [min((i + 1) * block_q, length) for i in range(nq)]
        there = [-(-end // block_kv) if self.causal else nk for end in ends]
        return sum(min(self.blocks, n) for n in there) / (nq * nk)


@dataclass(frozen=True)
class HybridKind(Selected):
    """Exact attention within a mask, and features for the key blocks that it leaves out."""

    mask: Mask
    """Elements computed exactly."""
    features: int
    """Random features of a Performer; 0: the features of linear attention."""
    block: int = 64
    """Size of the blocks, in tokens."""
    causal: bool = False
    """Whether queries see earlier keys only."""

    def make(self, length: int, heads: int, head_dim: int) -> Hybrid:
        """The module of a layer."""
        return Hybrid(
            self.mask, length, heads, head_dim, self.features, self.block, causal=self.causal
        )

    def density(self, length: int) -> float:
        """The kept fraction of the mask's elements."""
        return self._layout(length).density

    def tile_density(self, length: int) -> float:
        """The stored fraction of the mask's blocks."""
        return densities(self._layout(length), head_dim=64, arch=None).tile_density

    def densities(self, length: int, head_dim: int) -> dict[str, float | None]:
        """As `Selected.densities`, those of the mask."""
        return {**densities(self._layout(length), head_dim, arch="sm_90").record()}

    def _layout(self, length: int) -> BlockLayout:
        mask = self.mask & masks.causal() if self.causal else self.mask
        return mask.layout(length, block=(self.block, self.block))


def is_selected(text: str) -> bool:
    """Whether a text is one of these kinds; patterns of masks have other names."""
    from sparse_flash.experiments.foreground import is_foreground

    return _NAME.match(text) is not None or is_foreground(text)


def read(text: str) -> Selected:
    """The kind of a text.

    Raises:
        ValueError: It cannot be read; the message says what can be.

    >>> read("topk(8, selector=dsa, block=(16, 64))").tile_density(2048)
    0.25
    >>> read("hybrid(local(128) | sinks(16), performer(64))").features
    64
    >>> read("topk(8, pol=mean)")
    Traceback (most recent call last):
    ...
    ValueError: topk(8, pol=mean): topk has no argument 'pol'; it has blocks, block, selector, \
pool, causal, sinks, local, kl
    """
    from sparse_flash.experiments.foreground import is_foreground, read_foreground

    if is_foreground(text):
        return read_foreground(text)
    if operands := references(text):
        raise ValueError(
            f"{text}: {operands[0]} is in a file, which is not read here: write the mask as text "
            "of patterns, or use its file name as a whole attention"
        )
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError(f"it must be a call, as in {FORMS}")
        if call.func.id == "hybrid":
            return _hybrid(text, call)
        given = arguments(call, TopK, call.func.id)
        if call.func.id == "nsa":
            given = {"selector": "nsa"} | given
        return TopK(**given)
    except SyntaxError as error:
        raise ValueError(f"{text}: {error.msg}; write {FORMS}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from None


def arguments(call: ast.Call, cls: type, name: str) -> dict[str, Any]:
    """The values of a call by the fields of a dataclass."""
    names = [field.name for field in fields(cls)]
    if name == "nsa":
        names.remove("selector")
    if len(call.args) > len(names):
        raise ValueError(f"{name} takes {', '.join(names)}")
    given = dict(zip(names, map(_value, call.args), strict=False))
    for keyword in call.keywords:
        if keyword.arg not in names:
            raise ValueError(f"{name} has no argument {keyword.arg!r}; it has {', '.join(names)}")
        if keyword.arg in given:
            raise ValueError(f"{keyword.arg} is given twice")
        given[keyword.arg] = _value(keyword.value)
    return given


def _value(node: ast.expr) -> Any:
    """A number, a pair of numbers, True or False, or a word."""
    if isinstance(node, ast.Name):
        return node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is no number, pair or word") from None


def _hybrid(text: str, call: ast.Call) -> HybridKind:
    """A mask, features, and options."""
    from sparse_flash.experiments.user_code import read_mask

    if len(call.args) != 2:
        raise ValueError("hybrid takes a mask and features: hybrid(local(128), performer(128))")
    mask = read_mask(ast.get_source_segment(text, call.args[0]) or "")
    features = ast.unparse(call.args[1])
    found = re.fullmatch(r"performer\((\d+)\)|linear(?:\(\))?", features)
    if not found or found[1] == "0":
        raise ValueError(f"features must be performer(128) or linear, got {features}")
    options = ast.Call(call.func, [], call.keywords)
    given = arguments(options, HybridKind, "hybrid")
    if {"mask", "features"} & given.keys():
        raise ValueError("mask and features come first, without names")
    return HybridKind(mask, int(found[1] or 0), **given)
