"""Mask: what may attend to what, as an immutable value that composes with `|`, `&` and `~`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, TypeVar, dataclass_transform

import torch
from sparse_flash.masks import build, check
from sparse_flash.masks.reach import layers_to_reach
from sparse_flash.masks.ternary import Blocks, Index, Truth
from sparse_flash.masks.traceable import Traceable
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sparse_flash.masks.layout import BlockLayout
    from sparse_flash.masks.orders import TokenOrder

Extents = tuple[int | None, int | None]  # the q_len and kv_len that a mask is made for; None: any


class Mask(Traceable):
    """A predicate on (query index, key index): true where attention is allowed.

    Subclasses give `allowed(q, kv)`, the rule, in arithmetic and comparisons that work on index
    tensors and on intervals alike (see `sparse_flash.masks.ternary`). Masks are values: they
    compare, hash, and print as the expression that makes them.

    >>> from sparse_flash import masks
    >>> mask = masks.local(1) | masks.global_tokens(1)
    >>> mask
    local((1, 1)) | global_tokens(1)
    >>> q, kv = torch.arange(4)[:, None], torch.arange(4)
    >>> mask(q, kv).int()
    tensor([[1, 1, 1, 1],
            [1, 1, 1, 0],
            [1, 1, 1, 1],
            [1, 0, 1, 1]], dtype=torch.int32)
    >>> (mask & ~masks.causal())(q, kv).sum()
    tensor(5)
    """

    by_head: ClassVar[bool] = False  # whether it is several masks, by batch entry and head
    _derived = (*Traceable._derived, "_record")

    def state(self) -> Hashable:
        """What the mask depends on besides its fields, such as tensors that a predicate reads."""
        return ()

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The rule: a bool tensor from index tensors, a Ternary from intervals."""
        raise NotImplementedError(f"{type(self).__name__} gives no rule")

    def extents(self) -> Extents:
        """The (q_len, kv_len) that the mask is made for; None where it fits any length."""
        return None, None

    def __call__(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The truth for index tensors that broadcast with each other, as a bool tensor."""
        shape = torch.broadcast_shapes(q_idx.shape, kv_idx.shape)
        return self.allowed(q_idx, kv_idx).expand(shape)

    def classify(self, blocks: Blocks) -> Tensor:
        """EMPTY, UNKNOWN or FULL for each rectangle of indices, int8.

        EMPTY and FULL are certain; UNKNOWN may be anything.
        """
        return self.allowed(blocks.q, blocks.kv).value.expand(blocks.q_lo.shape)

    def __or__(self, other: Mask) -> Mask:
        return _combine(Or, self, other)

    def __and__(self, other: Mask) -> Mask:
        return _combine(And, self, other)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value of its own: combine masks with |, & and ~")

    def through(self, order: TokenOrder) -> Mask:
        """The same mask, written for raster positions, on tokens that come in another order.

        >>> from sparse_flash import masks
        >>> masks.neighbourhood(4, 4, 1).through(masks.morton(4, 4))
        through(neighbourhood(4, 4, (1, 1)), morton(4, 4))
        """
        return through(self, order)

    def patterns(self) -> tuple[list[Mask], Tensor]:
        """The distinct masks, and which one each (batch entry, head) uses: int32 `(1, 1)` here."""
        return [self], torch.zeros(1, 1, dtype=torch.int32)

    def layout(
        self,
        q_len: int,
        kv_len: int | None = None,
        block: tuple[int, int] = (128, 128),
        device: torch.device | str = "cpu",
    ) -> BlockLayout:
        """The tiles of this mask, exactly.

        Args:
            q_len: Number of queries.
            kv_len: Number of keys; default: as many as queries.
            block: (block_q, block_kv), the granularity in tokens.
            device: Where to build it, and where it will live.

        Raises:
            TypeError: A length or block is no int.
            ValueError: A length or block is out of range, or the mask is made for other lengths.

        >>> from sparse_flash import masks
        >>> masks.butterfly(128).layout(65536)
        BlockLayout(65536 x 65536, block 128 x 128, 5120 tiles, 0 partial, 0 bit tiles, \
density 0.0195, cpu)
        """
        kv_len = q_len if kv_len is None else kv_len
        check.check_lengths(q_len, kv_len, block)
        for name, made_for, given in zip(
            ("q_len", "kv_len"), self.extents(), (q_len, kv_len), strict=True
        ):
            if made_for not in (None, given):
                raise ValueError(f"{self!r} is made for {name}={made_for}, not {given}")
        return build.build_layout(*self.patterns(), (q_len, kv_len, block), device)

    def density(self, q_len: int, kv_len: int | None = None) -> float:
        """The kept fraction of all (q, kv) elements, 0..1, counted exactly.

        >>> from sparse_flash import masks
        >>> masks.causal().density(1024)
        0.50048828125
        """
        return self.layout(q_len, kv_len).density

    def reach(self, length: int) -> int | None:
        """Layers until every token can influence every other; None if that never happens.

        Each layer passes on what a token saw (residual connection) and what the mask lets it see.
        Computed on all pairs: `length` x stored elements operations a layer.

        >>> from sparse_flash import masks
        >>> masks.local(1).reach(64), masks.butterfly(8).reach(64), masks.causal().reach(64)
        (63, 3, None)
        """
        one = functools.reduce(operator.or_, self.patterns()[0])  # heads are mixed by a layer
        return layers_to_reach(one.layout(length, block=(64, 64)))

    def plot(self, q_len: int, kv_len: int | None = None, title: str | None = None) -> Figure:
        """A picture (matplotlib) at these lengths; see `BlockLayout.plot`."""
        layout = self.layout(q_len, kv_len)
        return layout.plot(title=title or f"{self!r}\n{layout.density:.3%} kept")

    def text(self, q_len: int, kv_len: int | None = None, width: int = 48) -> str:
        """A picture for the terminal at these lengths; see `BlockLayout.text`."""
        return self.layout(q_len, kv_len).text(width)


PATTERNS: dict[str, Callable[..., object]] = {}  # every name that may stand in a mask's text
T = TypeVar("T", bound=Callable[..., object])


def named(maker: T) -> T:
    """Let a function or class be called by its name in `masks.parse`."""
    PATTERNS[maker.__name__] = maker
    return maker


@dataclass_transform(frozen_default=True)
def pattern(cls: type[Mask]) -> type[Mask]:
    """Make a Mask class a frozen dataclass that `masks.parse` knows by its name."""
    return named(dataclass(frozen=True, repr=False)(cls))


class Pattern(Mask):
    """A mask with parameters, printed as the call that makes it."""

    def __repr__(self) -> str:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        defaults = [field.default for field in fields(self)]  # type: ignore[arg-type]
        while values and values[-1] == defaults[-1]:
            values.pop()
            defaults.pop()
        return f"{type(self).__name__}({', '.join(map(repr, values))})"


@dataclass(frozen=True, repr=False)
class _Combination(Mask):
    masks: tuple[Mask, ...]
    symbol: ClassVar[str]
    operation: ClassVar[Callable[[Truth, Truth], Truth]]

    def allowed(self, q: Index, kv: Index) -> Truth:
        return functools.reduce(type(self).operation, (m.allowed(q, kv) for m in self.masks))

    def extents(self) -> Extents:
        return merge_extents(self, self.masks)

    def __repr__(self) -> str:
        parts = (f"({m!r})" if isinstance(m, _Combination) else repr(m) for m in self.masks)
        return f" {self.symbol} ".join(parts)


class Or(_Combination):
    """True where any of its masks is."""

    symbol, operation = "|", operator.or_


class And(_Combination):
    """True where all of its masks are."""

    symbol, operation = "&", operator.and_


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """True where its mask is not."""

    mask: Mask

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The opposite."""
        return ~self.mask.allowed(q, kv)

    def extents(self) -> Extents:
        """Those of its mask."""
        return self.mask.extents()

    def __invert__(self) -> Mask:
        return self.mask

    def __repr__(self) -> str:
        inner = f"({self.mask!r})" if isinstance(self.mask, _Combination) else repr(self.mask)
        return f"~{inner}"


@pattern
class through(Pattern):  # noqa: N801 - used like a function, as the patterns are
    """A mask written for raster positions, seen by tokens in another order.

    allowed(p, r) = mask(order[p], order[r]), with order[p] the raster index of the p-th token.
    """

    mask: Mask
    order: TokenOrder

    def __post_init__(self) -> None:
        """Both must cover the same tokens."""
        n = len(self.order)
        if any(e not in (None, n) for e in self.mask.extents()):
            raise ValueError(f"{self.mask!r} does not have the {n} tokens of {self.order!r}")

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The mask's rule on raster positions."""
        return self.mask.allowed(self.order.table(q), self.order.table(kv))

    def extents(self) -> Extents:
        """The number of tokens of the order."""
        return len(self.order), len(self.order)


def merge_extents(owner: object, masks: tuple[Mask, ...]) -> Extents:
    """The lengths that all masks agree on; ValueError where they do not."""
    merged = []
    for name, axis in (("q_len", 0), ("kv_len", 1)):
        lengths = {n for n in (m.extents()[axis] for m in masks) if n is not None}
        if len(lengths) > 1:
            raise ValueError(f"masks made for different {name} {sorted(lengths)} in {owner!r}")
        merged.append(lengths.pop() if lengths else None)
    return merged[0], merged[1]


def _combine(kind: type[_Combination], left: Mask, right: Mask) -> Mask:
    if not isinstance(right, Mask) or right.by_head:
        return NotImplemented  # masks by head know how to meet others: Python asks them next
    parts: list[Mask] = []
    for mask in (left, right):
        parts += mask.masks if type(mask) is kind else [mask]
    unique = tuple(dict.fromkeys(parts))
    result = kind(unique) if len(unique) > 1 else unique[0]
    result.extents()
    return result
