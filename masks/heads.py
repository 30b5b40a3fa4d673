"""Masks per head and per batch entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from sparse_flash.masks.extents import Extents, merge_extents
from sparse_flash.masks.mask import Mask, named, through
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.orders import TokenOrder
from sparse_flash.masks.records import inherit_changeable
from sparse_flash.masks.ternary import Blocks, Index
from torch import Tensor


@dataclass(frozen=True, repr=False)
class HeadMasks(Mask):
    """Masks by (batch entry, head): `grid[b][h]`; a size of 1 is shared. Built by `per_head`.

    `|`, `&` and `~` work entry by entry. Called on indices, it returns bools
    `(1 or batch, 1 or heads, ...)`.
    """

    by_head: ClassVar[bool] = True
    grid: tuple[tuple[Mask, ...], ...]

    def __post_init__(self) -> None:
        inherit_changeable(self)

    def operands(self) -> tuple[Mask, ...]:
        """All entries, batch by batch."""
        return self.masks

    @property
    def masks(self) -> tuple[Mask, ...]:
        """All entries, batch by batch."""
        return tuple(mask for row in self.grid for mask in row)

    def allowed(self, q: Index, kv: Index) -> NoReturn:
        """Refused: the rule also depends on batch entry and head."""
        raise TypeError("per-head masks have no single rule: take one of `.masks`")

    def classify(self, blocks: Blocks) -> NoReturn:
        """Refused: the classification also depends on batch entry and head."""
        raise TypeError("per-head masks have no single classification: take one of `.masks`")

    def extents(self) -> Extents:
        """The common lengths of all entries."""
        return merge_extents(self, self.masks)

    def __call__(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The truth for each batch entry and head: bool `(1 or batch, 1 or heads, ...)`."""
        return torch.stack([torch.stack([m(q_idx, kv_idx) for m in row]) for row in self.grid])

    @plain_torch()
    def patterns(self) -> tuple[list[Mask], Tensor]:
        """The distinct masks, and the index of the mask of each (batch entry, head)."""
        distinct = list(dict.fromkeys(self.masks))
        rows = [[distinct.index(mask) for mask in row] for row in self.grid]
        return distinct, torch.tensor(rows, dtype=torch.int32, device="cpu")

    def through(self, order: TokenOrder) -> Mask:
        """Every entry through the order."""
        return self._map(lambda mask: through(mask, order))

    def shift(self, q: int = 0, kv: int = 0) -> Mask:
        """Every entry shifted."""
        return self._map(lambda mask: mask.shift(q, kv))

    def __invert__(self) -> Mask:
        return self._map(lambda mask: ~mask)

    def __or__(self, other: Mask) -> Mask:
        return self._meet(other, lambda a, b: a | b)

    def __and__(self, other: Mask) -> Mask:
        return self._meet(other, lambda a, b: a & b)

    def __ror__(self, other: Mask) -> Mask:
        return self._meet(other, lambda a, b: b | a)

    def __rand__(self, other: Mask) -> Mask:
        return self._meet(other, lambda a, b: b & a)

    def _map(self, change: Callable[[Mask], Mask]) -> Mask:
        return HeadMasks(tuple(tuple(change(mask) for mask in row) for row in self.grid))

    def _meet(self, other: Mask, meet: Callable[[Mask, Mask], Mask]) -> Mask:
        if not isinstance(other, HeadMasks):
            return self._map(lambda mask: meet(mask, other))
        shape = []
        for name, mine, theirs in (
            ("batch entries", len(self.grid), len(other.grid)),
            ("heads", len(self.grid[0]), len(other.grid[0])),
        ):
            if mine != theirs and 1 not in (mine, theirs):
                raise ValueError(
                    f"cannot combine masks for {mine} and for {theirs} {name}: give both the same "
                    "number, or one mask for all"
                )
            shape.append(max(mine, theirs))
        rows = (
            tuple(meet(_entry(self, b, h), _entry(other, b, h)) for h in range(shape[1]))
            for b in range(shape[0])
        )
        return HeadMasks(tuple(rows))

    def __repr__(self) -> str:
        rows = [f"per_head([{', '.join(map(repr, row))}])" for row in self.grid]
        return rows[0] if len(rows) == 1 else f"per_batch([{', '.join(rows)}])"


def _entry(masks: HeadMasks, b: int, h: int) -> Mask:
    row = masks.grid[b % len(masks.grid)]
    return row[h % len(row)]


@named
def per_head(masks: Sequence[Mask]) -> HeadMasks:
    """One mask for each query head; equal masks share their arrays in a layout.

    Raises:
        TypeError: An entry is not a mask, or is itself per head.
        ValueError: There are no entries, or their masks are defined for different lengths.

    >>> from sparse_flash import masks
    >>> a, b = masks.causal(), masks.local(64)
    >>> layout = masks.per_head([a, a, b, b]).layout(1024)
    >>> layout.num_patterns, layout.pattern_map
    (2, tensor([[0, 0, 1, 1]], dtype=torch.int32))
    """
    row = _listed("per_head", masks, "query head")
    for head, mask in enumerate(row):
        if isinstance(mask, HeadMasks):
            raise TypeError(
                f"per_head takes masks without heads of their own, got {mask!r} for head {head}: "
                "per_batch([per_head([...]), ...]) has masks by batch entry and head"
            )
    merge_extents("per_head", row)
    return HeadMasks((row,))


@named
def per_batch(masks: Sequence[Mask]) -> HeadMasks:
    """One mask, or one `per_head`, for each batch entry.

    Raises:
        TypeError: An entry is not a mask.
        ValueError: There are no entries, or they have different numbers of heads.

    >>> from sparse_flash import masks
    >>> masks.per_batch([masks.causal(), masks.local(64)]).layout(1024).pattern_map
    tensor([[0],
            [1]], dtype=torch.int32)
    """
    rows: list[tuple[Mask, ...]] = []
    for mask in _listed("per_batch", masks, "batch entry"):
        if isinstance(mask, HeadMasks) and len(mask.grid) > 1:
            raise TypeError(f"per_batch takes masks or per_head([...]), got {mask!r}")
        rows.append(mask.grid[0] if isinstance(mask, HeadMasks) else (mask,))
    heads = max(len(row) for row in rows)
    if any(len(row) not in (1, heads) for row in rows):
        raise ValueError(
            f"per_batch needs entries of one number of heads, got {[len(r) for r in rows]}: give "
            f"each per_head([...]) {heads} masks, or an entry one mask for all heads"
        )
    merge_extents("per_batch", tuple(m for row in rows for m in row))
    return HeadMasks(tuple(row * (heads // len(row)) for row in rows))


def _listed(name: str, masks: Sequence[Mask], each: str) -> tuple[Mask, ...]:
    """The masks as a tuple; raise unless they form a nonempty list."""
    example = f"{name}([mask_a, mask_b]) with one mask for each {each}"
    if isinstance(masks, Mask | str) or not isinstance(masks, Iterable):
        raise TypeError(f"{name} takes a list of masks, got {masks!r}: write {example}")
    row = tuple(masks)
    if not row:
        raise ValueError(f"{name} needs at least one mask: write {example}")
    for index, mask in enumerate(row):
        if not isinstance(mask, Mask):
            raise TypeError(
                f"{name} takes masks, got {mask!r} for {each} {index}; masks.parse makes a mask "
                "of text"
            )
    return row
