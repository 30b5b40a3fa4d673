"""Restrict tiles chosen by data to a mask, element by element, without host synchronization."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from sparse_flash.masks import bits
from sparse_flash.masks.assemble import FULL_TILE
from sparse_flash.masks.memory import require_memory
from sparse_flash.masks.records import CACHE
from sparse_flash.masks.ternary import EMPTY, FULL, Blocks
from torch import Tensor

if TYPE_CHECKING:
    from sparse_flash.masks.io import Lengths
    from sparse_flash.masks.layout import BlockLayout
    from sparse_flash.masks.mask import Mask

_AT_ONCE = 1 << 28  # elements evaluated per step on the device
EMPTY_TILE = -2  # state of a tile without any allowed element


class Uncut:
    """No mask: all tiles are full."""

    def __init__(self, tile: tuple[int, int], device: torch.device) -> None:
        width = -(-tile[1] // 8)
        self.bit_tiles = torch.empty(0, tile[0], width, dtype=torch.uint8, device=device)

    def states(self, column: Tensor) -> Tensor:
        """FULL_TILE everywhere."""
        return torch.full((1, 1, 1), FULL_TILE, dtype=torch.int32, device=column.device)


@dataclass(eq=False)
class TileTable:
    """The tiles of a mask, laid out once; looked up by row and column.

    table: EMPTY_TILE, FULL_TILE or the bit tile, int32 (patterns, rows, cols).
    bit_tiles: uint8 (N, height, ceil(width / 8)).
    patterns: Pattern of each batch entry and head, int64 (P,); None: a single pattern.
    """

    table: Tensor
    bit_tiles: Tensor
    patterns: Tensor | None = None
    # Bit tiles in the kernels' register order; cached with the layout of the mask.
    fragments: dict[Hashable, Tensor] = field(default_factory=dict)
    captured: bool = False  # a CUDA graph reads the arrays

    @property
    def nbytes(self) -> int:
        """Bytes of the table and of the fragments derived from it."""
        return self.table.nbytes + sum(x.nbytes for x in self.fragments.values())

    def follow(self, layout: BlockLayout) -> Callable[[], None]:
        """Layouts of masks are not updated."""
        raise AssertionError("the layout of a mask is not changed in place")

    def for_heads(self, pattern_map: Tensor, heads: tuple[int, int]) -> TileTable:
        """The table expanded to these numbers of batch entries and heads."""
        if len(self.table) == 1:
            return self
        patterns = pattern_map.long().expand(*heads).reshape(-1)
        return replace(self, patterns=patterns)

    def states(self, column: Tensor) -> Tensor:
        """States of tiles in these columns, int32; columns past the end take the last column."""
        patterns, rows, cols = self.table.shape
        if self.patterns is None and patterns == 1:
            first = torch.arange(rows, device=column.device)[:, None] * cols
        else:
            assert self.patterns is not None
            first = self.patterns[:, None] * rows + torch.arange(rows, device=column.device)
            first = first[:, :, None] * cols
        return self.table.flatten()[first + column.clamp(max=cols - 1)]


def tile_table(
    mask: Mask, lengths: Lengths, tile: tuple[int, int], heads: tuple[int, int], device: Any
) -> TileTable:
    """The table of a mask with a rule known on the host; cached by lengths and device."""
    q_len, kv_len, _ = lengths
    key = ("table", q_len, kv_len, tile, device, mask.state())
    layout = CACHE.of(mask).layout(key, lambda: mask.layout(q_len, kv_len, tile, device))
    found = layout.derived.get(TileTable)
    if found is None:
        found = layout.derived[TileTable] = _table_of(layout)
        CACHE.trim(mask)
    table: TileTable = found
    table.captured |= device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return table.for_heads(layout.pattern_map, heads)


def _table_of(layout: BlockLayout) -> TileTable:
    shape = (layout.num_patterns, layout.num_block_rows, layout.num_block_cols)
    size = shape[0] * shape[1] * shape[2]
    require_memory("`within` by tiles", 4 * size, layout.device, "larger blocks, or no `within`")
    states = torch.full((size,), EMPTY_TILE, dtype=torch.int32, device=layout.device)
    states[layout.tile_rows * shape[2] + layout.col_indices] = layout.bit_tile_indices
    return TileTable(states.view(shape), layout.bit_tiles)


class Evaluated:
    """A mask that reads data on the device: classifies tiles and evaluates undecided ones.

    Args:
        masks: Mask of each pattern.
        patterns: Pattern of each batch entry and head, int64 (P,); None: a single pattern.
        lengths: q_len, kv_len, block.
        tile: Size of the tiles.
    """

    def __init__(
        self, masks: list[Mask], patterns: Tensor | None, lengths: Lengths, tile: tuple[int, int]
    ) -> None:
        self.masks, self.patterns = masks, patterns
        self.lengths, self.tile = lengths, tile

    def states(self, column: Tensor) -> Tensor:
        """States of tiles in these columns, int32: EMPTY_TILE, FULL_TILE, or 0 if undecided."""
        (q_len, kv_len, _), (height, width) = self.lengths, self.tile
        rows = -(-q_len // height)
        q = torch.arange(0, rows * height, height, device=column.device)[:, None]
        shape = torch.broadcast_shapes(column.shape, q.shape)
        kv = (column * width).clamp(max=(kv_len - 1) // width * width)
        ends = (q + height).clamp(max=q_len) - 1, (kv + width).clamp(max=kv_len) - 1
        q_lo, q_hi, kv_lo, kv_hi = (x.expand(shape).flatten() for x in (q, ends[0], kv, ends[1]))
        blocks = Blocks(q_lo, q_hi, kv_lo, kv_hi, max(q_len, kv_len))
        found = self._chosen([mask.classify(blocks).view(shape) for mask in self.masks])
        return torch.where(found == EMPTY, EMPTY_TILE, torch.where(found == FULL, FULL_TILE, 0))

    def _chosen(self, by_pattern: list[Tensor]) -> Tensor:
        """Select the values of each batch entry and head, `(1 or P, ...)`, by its pattern."""
        chosen = by_pattern[0]
        for i, values in enumerate(by_pattern[1:], 1):
            assert self.patterns is not None
            here = (self.patterns == i).view(-1, *(1,) * (values.ndim - 1))
            chosen = torch.where(here, values, chosen)
        return chosen

    def bits(self, owner: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Bit tiles, uint8 `(n, height, ceil(width / 8))`, at patterns, rows and columns (n,)."""
        (q_len, kv_len, _), (height, width) = self.lengths, self.tile
        packed = []
        step = max(1, _AT_ONCE // (height * width))
        for at in range(0, len(row), step):
            part = slice(at, at + step)
            q = row[part, None, None] * height + torch.arange(height, device=row.device)[:, None]
            kv = column[part, None, None] * width + torch.arange(width, device=row.device)
            inside = [q.clamp(max=q_len - 1), kv.clamp(max=kv_len - 1)]
            truth = self.masks[0](*inside)
            for i, mask in enumerate(self.masks[1:], 1):
                assert self.patterns is not None
                here = (self.patterns[owner[part]] == i)[:, None, None]
                truth = torch.where(here, mask(*inside), truth)
            if q_len % height:
                truth = truth & (q < q_len)
            if kv_len % width:
                truth = truth & (kv < kv_len)
            packed.append(bits.pack(truth))
        if not packed:  # a capacity of no bit tiles
            return torch.empty(0, height, -(-width // 8), dtype=torch.uint8, device=row.device)
        return torch.cat(packed)


def cut_of(
    mask: Mask | None,
    lengths: Lengths,
    tile: tuple[int, int],
    heads: tuple[int, int],
    device: torch.device,
) -> Uncut | TileTable | Evaluated:
    """The restriction of tiles to a mask, for these numbers of batch entries and heads."""
    if mask is None:
        return Uncut(tile, device)
    if not mask.on_device:
        return tile_table(mask, lengths, tile, heads, device)
    masks, pattern_map = mask.patterns()
    patterns = None
    if len(masks) > 1:  # the map is on the host; copying it would synchronize
        numbers = pattern_map.expand(*heads).flatten().tolist()
        patterns = torch.stack([torch.full((), n, device=device) for n in numbers])
    return Evaluated(masks, patterns, lengths, tile)


def snapshot(mask: Any, device: torch.device, *, in_call: bool = False) -> Any:
    """The mask with copies of the tensors that it reads, on a device.

    in_call: Copies are made at first use, in the call of attention that the mask is given to.
    """
    if not mask.on_device:
        return mask
    if hasattr(mask, "now"):
        return mask.now(device, in_call=in_call)
    if hasattr(mask, "symbol"):  # `replace` costs each call more
        return type(mask)(tuple(snapshot(m, device, in_call=in_call) for m in mask.masks))
    changed = {f.name: _snapshots(getattr(mask, f.name), device) for f in fields(mask)}
    return replace(mask, **changed)


def form_of(mask: Any) -> Hashable | None:
    """All of a mask but the values that it reads on the device; None where that is not known.

    Layouts of masks of one form are checked, planned and launched alike.
    """
    if not mask.on_device:
        return None if mask.changeable else mask
    if getattr(mask, "symbol", "") == "&":
        forms = tuple(map(form_of, mask.masks))
        return None if None in forms else forms
    return getattr(mask, "form", None)


def _snapshots(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_snapshots(x, device) for x in value)
    return snapshot(value, device) if hasattr(value, "on_device") else value


def readers(mask: Mask | None) -> Iterator[Any]:
    """The patterns of a mask that read tensors on the device."""
    if mask is not None and mask.on_device:
        if not mask.operands():
            yield mask
        for operand in mask.operands():
            yield from readers(operand)


def invalid_documents(mask: Mask | None) -> Tensor | None:
    """Whether cu_seqlens of a mask are invalid, bool (); None if it reads none."""
    found: Tensor | None = None
    for reader in readers(mask):
        wrong = reader.invalid()
        found = wrong if found is None else found | wrong
    return found


def numbers_and_rest_exist(mask: Any) -> bool:
    """Whether `numbers_and_rest` knows the form of a mask that reads data on the device."""
    masks = mask.patterns()[0] if mask.by_head else [mask]
    found = [documents_and_rest(one) for one in masks]
    return None not in found and len({one[1] for one in found if one is not None}) == 1


def numbers_of(mask: Any, heads: tuple[int, int]) -> Tensor:
    """Document of each token, int32 (1 or P, length).

    Args:
        mask: A mask for which `numbers_and_rest_exist`.
        heads: Batch entries and heads with rows of their own; P is their product.
    """
    masks, pattern_map = mask.patterns() if mask.by_head else ([mask], None)
    found = [one for one in map(documents_and_rest, masks) if one is not None]
    numbers = [documents.numbers[None] for documents, _ in found]
    if pattern_map is None:
        return numbers[0]
    return torch.cat([numbers[n] for n in pattern_map.expand(*heads).flatten().tolist()])


def rest_of(mask: Any) -> Mask | None:
    """The operands without documents of a mask for which `numbers_and_rest_exist`."""
    found = documents_and_rest(mask.masks[0] if mask.by_head else mask)
    assert found is not None
    return found[1]


def documents_and_rest(mask: Any) -> tuple[Any, Mask | None] | None:
    """The documents of a mask and the other operands of an intersection; None for other forms."""
    operands = mask.masks if getattr(mask, "symbol", "") == "&" else (mask,)
    read = [m for m in operands if m.on_device]
    rest = [m for m in operands if not m.on_device]
    if len(read) != 1 or not hasattr(read[0], "is_numbered"):
        return None
    return read[0], functools.reduce(operator.and_, rest) if rest else None
