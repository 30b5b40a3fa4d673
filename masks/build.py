"""From predicates to tiles: classify coarse to fine, evaluate elements only where unknown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from sparse_flash.masks.elements import EMPTY_TILE, Predicate, count_kinds, evaluate
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.memory import require_memory
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.tables import TableLookups
from sparse_flash.masks.ternary import FULL, UNKNOWN, Blocks
from torch import Tensor

_INSTEAD = (  # of a layout with too many tiles, 120 bytes each while it is made
    "larger blocks, as block=(512, 512); where all is allowed, "
    "torch.nn.functional.scaled_dot_product_attention needs no layout"
)
_FAN = 8  # an unknown rectangle of blocks is split into _FAN parts along its longer sides


@plain_torch()
def build_layout(
    patterns: Sequence[Predicate],
    pattern_map: Tensor,
    lengths: Lengths,
    device: torch.device | str,
) -> BlockLayout:
    """The exact layout of `patterns`, element for element.

    Blocks are classified from the whole matrix down, so the work grows with the stored tiles, not
    with s^2. Of the tiles that three-valued logic cannot decide, those of equal signature are
    evaluated once.

    Args:
        patterns: One predicate for each distinct pattern.
        pattern_map: `(1 or batch, 1 or heads)`, indices into `patterns`.
        lengths: q_len, kv_len, (block_q, block_kv).
        device: Where to compute, and where the arrays will live.
    """
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("a layout needs tensors with data, not device='meta': take 'cpu'")
    rows: list[Tensor] = []
    cols: list[Tensor] = []
    entries: list[Tensor] = []
    packed: list[Tensor] = []
    num_bit_tiles, num_block_rows = 0, -(-lengths[0] // lengths[2][0])
    for number, predicate in enumerate(patterns):
        with TableLookups():
            full, unknown = _classify(predicate, lengths, device)
            index, tiles = evaluate(predicate, *unknown, lengths)
        rows.append(full[0] + number * num_block_rows)
        cols.append(full[1])
        entries.append(torch.full_like(full[0], FULL_TILE))
        some = index != EMPTY_TILE
        rows.append(unknown[0][some] + number * num_block_rows)
        cols.append(unknown[1][some])
        entries.append(index[some] + num_bit_tiles)
        packed.append(tiles)
        num_bit_tiles += len(tiles)
    return BlockLayout.from_tiles(
        lengths,
        torch.cat(rows),
        torch.cat(cols),
        torch.cat(packed),
        torch.cat(entries),
        pattern_map.to(device, torch.int32),
    )


Cells = tuple[Tensor, Tensor]  # block rows and block columns


@plain_torch()
def classify_tiles(predicate: Predicate, lengths: Lengths) -> tuple[Cells, Cells, int]:
    """Surely full tiles, tiles that may hold an element, and the number to evaluate."""
    with TableLookups():
        full, unknown = _classify(predicate, lengths, torch.device("cpu"))
        return full, unknown, count_kinds(predicate, *unknown, lengths)


def _classify(predicate: Predicate, lengths: Lengths, device: torch.device) -> tuple[Cells, Cells]:
    """The full tiles, and the unknown ones."""
    grid = (-(-lengths[0] // lengths[2][0]), -(-lengths[1] // lengths[2][1]))
    sides = (_power_of_fan(grid[0]), _power_of_fan(grid[1]))
    unknown = (torch.zeros(1, dtype=torch.int64, device=device),) * 2
    full = []
    while True:
        states = torch.cat([predicate.classify(b) for b in _rectangles(unknown, sides, lengths)])
        whole, rest = states == FULL, states == UNKNOWN
        full.append(_split((unknown[0][whole], unknown[1][whole]), sides, (1, 1), grid))
        unknown = (unknown[0][rest], unknown[1][rest])
        if sides == (1, 1):
            rows, cols = zip(*full, strict=True)
            return (torch.cat(rows), torch.cat(cols)), unknown
        longest = max(sides)
        parts = (
            sides[0] // _FAN if sides[0] == longest else sides[0],
            sides[1] // _FAN if sides[1] == longest else sides[1],
        )
        unknown = _split(unknown, sides, parts, grid)
        sides = parts


def _power_of_fan(n: int) -> int:
    side = 1
    while side < n:
        side *= _FAN
    return side


def _rectangles(
    cells: Cells, sides: tuple[int, int], lengths: Lengths, chunk: int = 1 << 20
) -> Iterator[Blocks]:
    """The index ranges of rectangles of blocks; at least one (maybe empty) batch."""
    q_len, kv_len, (block_q, block_kv) = lengths
    for i in range(0, max(1, len(cells[0])), chunk):
        rows, cols = (axis[i : i + chunk] for axis in cells)
        yield Blocks(
            rows * block_q,
            ((rows + sides[0]) * block_q).clamp(max=q_len) - 1,
            cols * block_kv,
            ((cols + sides[1]) * block_kv).clamp(max=kv_len) - 1,
            max(q_len, kv_len),
        )


def _split(
    cells: Cells, sides: tuple[int, int], parts: tuple[int, int], grid: tuple[int, int]
) -> Cells:
    """Cut rectangles of `sides` blocks into rectangles of `parts` blocks, as far as the grid goes.

    Takes the memory of the result: parts beyond the grid are never made.
    """
    if sides == parts:
        return cells
    down, across = (
        ((n - start).clamp(max=side) + part - 1) // part
        for n, start, side, part in zip(grid, cells, sides, parts, strict=True)
    )
    counts = down * across
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    require_memory(f"a layout of {total:,} tiles", 120 * total, counts.device, _INSTEAD)
    owner = torch.repeat_interleave(counts, output_size=total)
    place = torch.arange(total, dtype=torch.int64, device=counts.device) - (ends - counts)[owner]
    across = across[owner]
    rows = cells[0][owner] + place // across * parts[0]
    return rows, cells[1][owner] + place % across * parts[1]
