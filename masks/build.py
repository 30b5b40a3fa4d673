"""Build layouts from predicates: classify coarse to fine, evaluate elements where unknown."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Sequence

import torch
from sparse_flash.masks import grid, host
from sparse_flash.masks.assemble import EMPTY_TILE
from sparse_flash.masks.elements import (
    Predicate,
    TooLargeError,
    count_kinds,
    evaluate,
)
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.layout import FULL_TILE, BlockLayout
from sparse_flash.masks.memory import require_memory
from sparse_flash.masks.modes import plain_torch
from sparse_flash.masks.tables import TableLookups
from sparse_flash.masks.ternary import FULL, UNKNOWN, Blocks
from torch import Tensor

_INSTEAD = (  # advice for too many tiles; building a layout takes 120 bytes per tile
    "larger blocks, such as block=(4096, 4096); for dense attention, "
    "torch.nn.functional.scaled_dot_product_attention needs no layout"
)
_MOST_ON_HOST = 1 << 14  # rectangles or tiles of a layout for a GPU that the CPU builds sooner
_FEW = 1 << 12  # rectangles, on which an operation takes not much longer than on one
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
    with s^2. Tiles that three-valued logic cannot decide are evaluated element by element, once for
    each distinct signature.

    Args:
        patterns: One predicate for each distinct pattern.
        pattern_map: `(1 or batch, 1 or heads)`, indices into `patterns`.
        lengths: q_len, kv_len, (block_q, block_kv).
        device: Device that builds the arrays and stores them.
    """
    build = _untraced() if "torch._dynamo" in sys.modules else _built
    return build(patterns, pattern_map, lengths, torch.device(device))


@functools.cache
def _untraced() -> Callable[..., BlockLayout]:
    """As `_built`, for processes that compile: a compiled function would trace numpy's functions.

    It is made late, since importing torch._dynamo takes a second.
    """
    untraced: Callable[..., BlockLayout] = torch._dynamo.disable(_built)
    return untraced


def _built(
    patterns: Sequence[Predicate], pattern_map: Tensor, lengths: Lengths, device: torch.device
) -> BlockLayout:
    if device.type == "meta":
        raise ValueError("a layout needs tensors with data, not device='meta': use 'cpu'")
    if device.type == "cuda" and all(getattr(p, "for_host", False) for p in patterns):
        with contextlib.suppress(TooLargeError):
            made = _build(patterns, pattern_map, lengths, torch.device("cpu"), _MOST_ON_HOST)
            return made.to(device)
    return _build(patterns, pattern_map, lengths, device)


def _build(
    patterns: Sequence[Predicate],
    pattern_map: Tensor,
    lengths: Lengths,
    device: torch.device,
    most: int | None = None,
) -> BlockLayout:
    """As `build_layout`. TooLargeError: more than `most` rectangles, or 256 times as many elements,
    are to be looked at.
    """
    if device.type == "cpu" and grid.fits(lengths):
        return _of_tables(patterns, pattern_map, lengths, most)
    rows: list[Tensor] = []
    cols: list[Tensor] = []
    entries: list[Tensor] = []
    packed: list[Tensor] = []
    num_bit_tiles, num_block_rows = 0, -(-lengths[0] // lengths[2][0])
    for number, predicate in enumerate(patterns):
        with _lookups(predicate):
            full, unknown = _classify(predicate, lengths, device, most)
            index, tiles = evaluate(predicate, *unknown, lengths, most and 256 * most)
        rows.append(full[0] + number * num_block_rows if number else full[0])
        cols.append(full[1])
        entries.append(host.full(len(full[0]), FULL_TILE, device))
        some = host.positions(index, EMPTY_TILE + 1)
        index, row, col = (host.take(x, some) for x in (index, *unknown))
        if number:
            index = torch.where(index == FULL_TILE, FULL_TILE, index + num_bit_tiles)
            row = row + number * num_block_rows
        rows.append(row)
        cols.append(col)
        entries.append(index)
        packed.append(tiles)
        num_bit_tiles += len(tiles)
    return BlockLayout.from_tiles(
        lengths,
        host.cat(rows),
        host.cat(cols),
        host.cat(packed),
        host.cat(entries),
        pattern_map.to(device, torch.int32),
        distinct=len(patterns) == 1,
    )


def _of_tables(
    patterns: Sequence[Predicate], pattern_map: Tensor, lengths: Lengths, most: int | None
) -> BlockLayout:
    """As `_build`, from tables of all tiles."""
    tables: list[grid.Table] = []
    packed: list[Tensor] = []
    for predicate in patterns:
        with _lookups(predicate):
            table, bit_tiles = grid.tiles(predicate, lengths, most)
        tables.append(table)
        packed.append(bit_tiles)
    arrays = grid.arrays_of_tables(tables, packed)
    return BlockLayout(*lengths, *arrays, pattern_map.to(torch.int32), validate=False)


def _lookups(predicate: Predicate) -> contextlib.AbstractContextManager[object]:
    """The mode in which rules may look indices up in tensors, where a rule may do so."""
    return TableLookups() if getattr(predicate, "tables", True) else contextlib.nullcontext()


Cells = tuple[Tensor, Tensor]  # block rows and block columns


@plain_torch()
def classify_tiles(predicate: Predicate, lengths: Lengths) -> tuple[Cells, Cells, int]:
    """Full tiles, undecided tiles, and the number of tiles to evaluate by elements."""
    with _lookups(predicate):
        full, unknown = _classify(predicate, lengths, torch.device("cpu"))
        return full, unknown, count_kinds(predicate, *unknown, lengths)


def _classify(
    predicate: Predicate, lengths: Lengths, device: torch.device, most: int | None = None
) -> tuple[Cells, Cells]:
    """The full tiles and the unknown tiles. TooLargeError: more than `most` rectangles."""
    shape = (-(-lengths[0] // lengths[2][0]), -(-lengths[1] // lengths[2][1]))
    whole = sides = (_power_of_fan(shape[0]), _power_of_fan(shape[1]))
    # Large rectangles decide nothing: begin with as many as cost little more than one.
    while sides != (1, 1) and (parts := _parts(sides, _FAN)) != sides:
        if math.prod(-(-n // part) for n, part in zip(shape, parts, strict=True)) > _FEW:
            break
        sides = parts
    unknown = _split((torch.zeros(1, dtype=torch.int64, device=device),) * 2, whole, sides, shape)
    full: list[Cells] = []
    while True:
        decided: list[Cells] = []
        rest: list[Cells] = []
        for part in host.pieces(len(unknown[0]), device):
            cells = (unknown[0][part], unknown[1][part])
            states = predicate.classify(_rectangles(cells, sides, lengths))
            sure, open_ = (host.positions(states, state, state) for state in (FULL, UNKNOWN))
            decided.append(_taken(cells, sure))
            rest.append(_taken(cells, open_))
        full.append(_split(_joined(decided), sides, (1, 1), shape))
        unknown = _joined(rest)
        if sides == (1, 1):
            return _joined(full), unknown
        many = device.type == "cpu" and len(unknown[0]) * _FAN**2 > 4 * _FEW
        parts = _parts(sides, _FAN // 2 if many else _FAN)
        unknown = _split(unknown, sides, parts, shape)
        sides = parts
        if most is not None and len(unknown[0]) + sum(len(rows) for rows, _ in full) > most:
            raise TooLargeError


def _parts(sides: tuple[int, int], fan: int) -> tuple[int, int]:
    """The sides of the next smaller rectangles: the longer sides are cut into `fan` parts."""
    longest = max(sides)
    down, across = (max(1, side // fan) if side == longest else side for side in sides)
    return down, across


def _power_of_fan(n: int) -> int:
    side = 1
    while side < n:
        side *= _FAN
    return side


def _rectangles(cells: Cells, sides: tuple[int, int], lengths: Lengths) -> Blocks:
    """Index ranges of rectangles of blocks."""
    (rows, cols), (q_len, kv_len, (block_q, block_kv)) = cells, lengths
    return Blocks(
        rows * block_q,
        ((rows + sides[0]) * block_q).clamp(max=q_len) - 1,
        cols * block_kv,
        ((cols + sides[1]) * block_kv).clamp(max=kv_len) - 1,
        max(q_len, kv_len),
    )


def _taken(cells: Cells, index: Tensor) -> Cells:
    return host.take(cells[0], index), host.take(cells[1], index)


def _joined(cells: list[Cells]) -> Cells:
    rows, cols = zip(*cells, strict=True)
    return host.cat(rows), host.cat(cols)


def _split(
    cells: Cells, sides: tuple[int, int], parts: tuple[int, int], grid: tuple[int, int]
) -> Cells:
    """Cut rectangles of `sides` blocks into rectangles of `parts` blocks, within the grid.

    Parts outside the grid are never created, so memory is that of the result.
    """
    if sides == parts or not len(cells[0]):
        return cells
    device, each = cells[0].device, math.prod(-(-n // m) for n, m in zip(sides, parts, strict=True))
    slices = host.pieces(len(cells[0]), device, each)
    pieces = [(cells[0][piece], cells[1][piece]) for piece in slices]
    total = 0
    for piece in pieces:
        down, across = _counts(piece, sides, parts, grid)
        total += int((down * across).sum())
    require_memory(f"a layout of {total:,} tiles", 120 * total, device, _INSTEAD)
    return _joined([_split_piece(piece, sides, parts, grid) for piece in pieces])


def _counts(
    cells: Cells, sides: tuple[int, int], parts: tuple[int, int], grid: tuple[int, int]
) -> list[Tensor]:
    """Number of parts of each rectangle down and across, within the grid."""
    return [
        ((n - start).clamp(max=side) + part - 1) // part
        for n, start, side, part in zip(grid, cells, sides, parts, strict=True)
    ]


def _split_piece(
    cells: Cells, sides: tuple[int, int], parts: tuple[int, int], grid: tuple[int, int]
) -> Cells:
    if grid[0] % sides[0] == grid[1] % sides[1] == 0:  # no rectangle reaches beyond the grid
        rows, cols = (
            torch.arange(0, side, part, device=cells[0].device)
            for side, part in zip(sides, parts, strict=True)
        )
        shape = (len(cells[0]), len(rows), len(cols))
        rows = (cells[0][:, None, None] + rows[:, None]).expand(shape)
        return rows.flatten(), (cells[1][:, None, None] + cols).expand(shape).flatten()
    down, across = _counts(cells, sides, parts, grid)
    counts = down * across
    ends = counts.cumsum(0)
    total = int(ends[-1])
    owner = torch.repeat_interleave(counts, output_size=total)
    offset = torch.arange(total, dtype=torch.int64, device=counts.device) - (ends - counts)[owner]
    across = across[owner]
    rows = cells[0][owner] + offset // across * parts[0]
    return rows, cells[1][owner] + offset % across * parts[1]
