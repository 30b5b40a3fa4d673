"""Mask: a predicate on (query, key), an immutable value that composes with `|`, `&` and `~`."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, TypeVar, dataclass_transform

import torch
from sparse_flash.masks import blockwise, build, device_builders, notebook, reach, validation
from sparse_flash.masks.arguments import integer
from sparse_flash.masks.extents import (
    Extents,
    check_indices,
    expanded,
    index_tensors,
    merge_extents,
    require_extents,
)
from sparse_flash.masks.kleene import NotUnderstoodError
from sparse_flash.masks.modes import plain_torch, reduce_without_derived
from sparse_flash.masks.records import CACHE, inherit_changeable
from sparse_flash.masks.registry import Registry
from sparse_flash.masks.rule import Rule
from sparse_flash.masks.ternary import Blocks, Index, Truth
from sparse_flash.masks.traceable import Traceable, leave_graph
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from sparse_flash.masks.layout import BlockLayout
    from sparse_flash.masks.orders import TokenOrder
    from sparse_flash.masks.records import Record


class Mask(Traceable, Rule):
    """A predicate on (query index, key index): true where attention is allowed.

    Subclasses define the rule `allowed(q, kv)`, in arithmetic and comparisons that accept index
    tensors and intervals (see `sparse_flash.masks.ternary`). Masks are values: they compare, hash,
    and print as an expression that evaluates to an equal mask.

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

    by_head: ClassVar[bool] = False  # whether it has several masks, by batch entry and head
    _derived = (*Traceable._derived, "_record")
    _record: Record | None = None  # derived objects, see `RecordCache`

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The rule: a bool tensor from index tensors, a Ternary from intervals."""
        raise NotImplementedError(f"{type(self).__name__} defines no rule")

    def extents(self) -> Extents:
        """(q_len, kv_len) for which the mask is defined; None: any length."""
        return None, None

    def state(self) -> Hashable:
        """State of the data that the rule reads; a part of every cache key.

        `()` unless the mask contains a `custom`: then the versions of the tensors and arrays, and
        the values of the numbers, that its function reads. Equal states give equal elements.

        Raises:
            TypeError: A `custom` reads data whose changes cannot be detected.

        >>> from sparse_flash import masks
        >>> numbers = torch.zeros(8)
        >>> mask = masks.custom(lambda q, kv: numbers[q] == numbers[kv]) | masks.local(1)
        >>> before = mask.state()
        >>> numbers[4:] = 1
        >>> mask.state() == before, masks.local(1).state()
        (False, ())
        """
        if not self.changeable:
            return ()
        return tuple(mask.state() for mask in self.operands())

    def __call__(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The truth for index tensors that broadcast with each other, as a bool tensor.

        Raises:
            TypeError: The indices are not integer tensors.
            IndexError: An index exceeds the lengths of the mask (checked on a CPU).
        """
        q, kv = index_tensors(self, q_idx, kv_idx)
        return expanded(self.allowed(q, kv), q, kv)

    def classify(self, blocks: Blocks) -> Tensor:
        """EMPTY, UNKNOWN or FULL for each rectangle of indices, int8.

        EMPTY and FULL are certain; UNKNOWN rectangles must be evaluated.
        """
        states = blockwise.tensor(self.allowed(blocks.q, blocks.kv).value)
        return states if states.shape == blocks.shape else states.expand(blocks.shape)

    def signature(self, blocks: Blocks) -> Tensor | None:
        """A few integers for each rectangle, int64 `(n, k)`; equal ones mean equal elements.

        Only rectangles of equal size are compared, element by element from their first. None if
        the rule has no signature.
        """
        try:
            columns = self.allowed(blocks.q, blocks.kv).columns()
        except NotUnderstoodError:
            return None
        return blockwise.rows_of(columns, blocks.q_lo)

    def __or__(self, other: Mask) -> Mask:
        return _combine(Or, self, other)

    def __and__(self, other: Mask) -> Mask:
        return _combine(And, self, other)

    def __invert__(self) -> Mask:
        leave_graph()
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value of its own: combine masks with |, & and ~")

    def through(self, order: TokenOrder) -> Mask:
        """The same mask, defined on raster positions, for tokens in another order.

        >>> from sparse_flash import masks
        >>> masks.neighborhood(4, 4, 1).through(masks.morton(4, 4))
        through(neighborhood(4, 4, (1, 1)), morton(4, 4))
        """
        return through(self, order)

    def shift(self, q: int = 0, kv: int = 0) -> Mask:
        """The mask seen from other positions: mask.shift(q=a, kv=c)(i, j) == mask(i + a, j + c).

        With fewer queries than keys, `shift(q=kv_len - q_len)` aligns the last query with the last
        key. Shifts add up, and a shift by 0 is the mask itself. A mask for lengths n, m becomes one
        for n - a, m - c; a layout that needs indices outside is refused.

        Raises:
            TypeError: q or kv is not an int.
            ValueError: q or kv is beyond +-(2^31 - 1).

        >>> from sparse_flash import masks
        >>> masks.local((4, 0)).shift(q=100).shift(q=28, kv=3)
        shift(local((4, 0)), 128, 3)
        >>> masks.causal().shift(q=96).layout(32, 128).equal(masks.causal(96).layout(32, 128))
        True
        """
        q, kv = integer("shift", "q", q, None), integer("shift", "kv", kv, None)
        for name, value in (("q", q), ("kv", kv)):
            if abs(value) > (most := validation.MAX_LENGTH):
                raise ValueError(f"shift: {name} must be within +-{most}, got {value}")
        return Shifted(self, q, kv) if q or kv else self

    __reduce_ex__ = reduce_without_derived

    @plain_torch()
    def patterns(self) -> tuple[list[Mask], Tensor]:
        """The distinct masks, and the index of the mask of each (batch entry, head), int32."""
        return [self], torch.zeros(1, 1, dtype=torch.int32, device="cpu")

    def check_lengths(self, q_len: int, kv_len: int, q_start: int = 0, kv_start: int = 0) -> None:
        """Raise ValueError unless the mask can be laid out for these lengths.

        Args:
            q_len: Number of queries.
            kv_len: Number of keys.
            q_start: Index of the first query; not 0 inside a shift.
            kv_start: Index of the first key; not 0 inside a shift.
        """
        for mask in self.operands():
            mask.check_lengths(q_len, kv_len, q_start, kv_start)
        require_extents(self, (q_len, kv_len), (q_start, kv_start))

    @plain_torch()
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
            kv_len: Number of keys; default: q_len.
            block: (block_q, block_kv), the granularity in tokens.
            device: Device that builds and stores the layout.

        Raises:
            TypeError: A length or block is not an int.
            ValueError: A length or block is out of range, or the mask has other lengths.

        >>> from sparse_flash import masks
        >>> masks.butterfly(128).layout(65536)
        BlockLayout(65536 x 65536, block 128 x 128, 5120 tiles, 0 partial, 0 bit tiles, \
density 0.0195, tile density 0.0195, computed 0.0195, cpu)
        """
        kv_len = q_len if kv_len is None else kv_len
        lengths = validation.checked_lengths(q_len, kv_len, block)
        self.check_lengths(*lengths[:2])
        if self.on_device:
            return device_builders.of_mask(self, lengths, validation.checked_device(device))
        return build.build_layout(*self.patterns(), lengths, validation.checked_device(device))

    def density(self, q_len: int, kv_len: int | None = None) -> float:
        """The kept fraction of all (q, kv) elements, 0..1, counted exactly.

        >>> from sparse_flash import masks
        >>> masks.causal().density(1024)
        0.50048828125
        """
        return self.layout(q_len, kv_len).density

    def reach(self, length: int) -> int | None:
        """Number of layers until every token can influence every other; None if never.

        Each layer adds the keys that the mask allows to the tokens seen so far (residual
        connection). If no stored element lies above the diagonal, the mask is causal: every token
        must influence every later one. The result is exact. Tiles decide most pairs of tokens; the
        others are computed element by element.

        Raises:
            ValueError: The exact result would take minutes; the message has the bounds by tiles.

        >>> from sparse_flash import masks
        >>> masks.local(1).reach(64), masks.butterfly(8).reach(64), masks.causal().reach(64)
        (63, 3, 1)
        >>> masks.block_diagonal(8).reach(64)
        """
        return reach.layers_to_reach(reach.union_layout(self.patterns()[0], length, 64))

    def reach_bounds(self, length: int) -> tuple[int | float, int | None]:
        """Bounds of `reach` from tiles alone, in seconds at any length: (least, most).

        least: Minimum number of layers; `math.inf` if no number suffices.
        most: A number of layers that suffices; None if tiles do not prove one.

        >>> from sparse_flash import masks
        >>> masks.butterfly(128).reach_bounds(65536), masks.local(1024).reach_bounds(65536)
        ((9, 9), (64, 64))
        """
        return reach.reach_bounds(self.patterns()[0], length)

    def plot(self, q_len: int, kv_len: int | None = None, title: str | None = None) -> Figure:
        """A picture (matplotlib) at these lengths; see `BlockLayout.plot`."""
        return self.layout(q_len, kv_len).plot(title=title or repr(self))

    _repr_html_, _repr_png_ = notebook.mask_html, notebook.mask_png

    def text(self, q_len: int, kv_len: int | None = None, width: int = 48) -> str:
        """A picture for the terminal at these lengths; see `BlockLayout.text`."""
        return self.layout(q_len, kv_len).text(width)


# All names that the text of a mask may use.
PATTERNS: Registry[Callable[..., object]] = Registry("pattern", "sparse_flash.masks")
T = TypeVar("T", bound=Callable[..., object])


def named(maker: T) -> T:
    """Register a function or class, by its name, for `masks.parse`."""
    PATTERNS[maker.__name__] = maker
    return maker


@dataclass_transform(frozen_default=True)
def pattern(cls: type[Mask]) -> type[Mask]:
    """Make a Mask class a frozen dataclass and register it for `masks.parse`."""
    return named(dataclass(frozen=True, repr=False)(cls))


class Pattern(Mask):
    """A mask with parameters, printed as the call that constructs it."""

    def __repr__(self) -> str:
        values = [getattr(self, field.name) for field in fields(self)]
        defaults = [field.default for field in fields(self)]
        while values and values[-1] == defaults[-1]:
            values.pop()
            defaults.pop()
        return f"{type(self).__name__}({', '.join(map(repr, values))})"


@dataclass(frozen=True, repr=False)
class _Combination(Mask):
    masks: tuple[Mask, ...]
    combines = True
    symbol: ClassVar[str]
    operation: ClassVar[Callable[[Truth, Truth], Truth]]

    def __post_init__(self) -> None:
        inherit_changeable(self)

    def operands(self) -> tuple[Mask, ...]:
        return self.masks

    def combined(self, truths: list[Truth]) -> Truth:
        return functools.reduce(type(self).operation, truths)

    def allowed(self, q: Index, kv: Index) -> Truth:
        return self.combined([m.allowed(q, kv) for m in self.masks])

    def extents(self) -> Extents:
        return merge_extents(self, self.masks)

    def __repr__(self) -> str:
        parts = (f"({m!r})" if isinstance(m, _Combination) else repr(m) for m in self.masks)
        return f" {self.symbol} ".join(parts)


class Or(_Combination):
    """Union: true where any operand is true."""

    symbol, operation = "|", operator.or_


class And(_Combination):
    """Intersection: true where all operands are true."""

    symbol, operation = "&", operator.and_


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Complement: true where the operand is false."""

    mask: Mask
    combines = True

    def __post_init__(self) -> None:
        inherit_changeable(self)

    def operands(self) -> tuple[Mask, ...]:
        """The negated mask."""
        return (self.mask,)

    def combined(self, truths: list[Truth]) -> Truth:
        """The negated truth."""
        return ~truths[0]

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The negated rule."""
        return ~self.mask.allowed(q, kv)

    def extents(self) -> Extents:
        """Lengths of the operand."""
        return self.mask.extents()

    def __invert__(self) -> Mask:
        leave_graph()
        return self.mask

    def __repr__(self) -> str:
        inner = f"({self.mask!r})" if isinstance(self.mask, _Combination) else repr(self.mask)
        return f"~{inner}"


@pattern
class through(Pattern):  # noqa: N801 - used like a function, as the patterns are
    """A mask defined on raster positions, for tokens in another order.

    allowed(p, r) = mask(order[p], order[r]), with order[p] the raster index of the p-th token.
    """

    mask: Mask
    order: TokenOrder
    diagonal = False

    @property
    def for_arrays(self) -> bool:
        """As the mask: the order is a table that accepts arrays."""
        return self.mask.for_arrays

    def __post_init__(self) -> None:
        """Check that mask and order cover the same tokens."""
        if not isinstance(self.mask, Mask) or not hasattr(type(self.order), "table"):
            raise TypeError(
                "through takes a mask and a token order, such as masks.morton(height, width), got "
                f"{self.mask!r} and {self.order!r}"
            )
        n = len(self.order)
        if any(e not in (None, n) for e in self.mask.extents()):
            raise ValueError(f"{self.mask!r} does not have the {n} tokens of {self.order!r}")
        inherit_changeable(self)

    def operands(self) -> tuple[Mask, ...]:
        """The operand."""
        return (self.mask,)

    def check_lengths(self, q_len: int, kv_len: int, q_start: int = 0, kv_start: int = 0) -> None:
        """Check the length of the order, and the mask at all raster positions."""
        self.mask.check_lengths(len(self.order), len(self.order))
        require_extents(self, (q_len, kv_len), (q_start, kv_start))

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The mask's rule on raster positions."""
        return self.mask.allowed(self.order.table(q), self.order.table(kv))

    def extents(self) -> Extents:
        """The number of tokens of the order."""
        return len(self.order), len(self.order)


@dataclass(frozen=True, repr=False)
class Shifted(Mask):
    """allowed(q, kv) = mask(q + by_q, kv + by_kv). Built by `Mask.shift`."""

    mask: Mask
    by_q: int
    by_kv: int

    def __post_init__(self) -> None:
        inherit_changeable(self)

    def operands(self) -> tuple[Mask, ...]:
        """The operand."""
        return (self.mask,)

    @property
    def relative(self) -> bool:
        """False if by_q differs from by_kv, which states the position of the queries."""
        return self.by_q == self.by_kv and self.mask.relative

    def shift(self, q: int = 0, kv: int = 0) -> Mask:
        """Add the shifts."""
        q, kv = integer("shift", "q", q, None), integer("shift", "kv", kv, None)
        return self.mask.shift(self.by_q + q, self.by_kv + kv)

    def allowed(self, q: Index, kv: Index) -> Truth:
        """The mask's rule at the shifted indices."""
        q, kv = q + self.by_q, kv + self.by_kv
        if isinstance(q, Tensor):
            check_indices(self.mask, q, kv)
        return self.mask.allowed(q, kv)

    def extents(self) -> Extents:
        """Lengths of the operand minus the shift."""
        pairs = zip(self.mask.extents(), (self.by_q, self.by_kv), strict=True)
        q_len, kv_len = (None if n is None else n - by for n, by in pairs)
        return q_len, kv_len

    def check_lengths(self, q_len: int, kv_len: int, q_start: int = 0, kv_start: int = 0) -> None:
        """Check the operand at the shifted indices."""
        self.mask.check_lengths(q_len, kv_len, q_start + self.by_q, kv_start + self.by_kv)

    def __repr__(self) -> str:
        kv = f", {self.by_kv}" if self.by_kv else ""
        return f"shift({self.mask!r}, {self.by_q}{kv})"


def _combine(kind: type[_Combination], left: Mask, right: Mask) -> Mask:
    if not isinstance(right, Mask) or right.by_head:
        return NotImplemented  # HeadMasks implements mixed operands: Python tries it next
    parts = [m for side in (left, right) for m in (side.masks if type(side) is kind else [side])]
    unique = tuple(dict.fromkeys(parts))
    if len(unique) == 1:
        return unique[0]
    # No name of torch in this function: torch.compile would trace it.
    result = CACHE.first_equal(kind(unique))
    if result._record is None:
        result.extents()
    return result
