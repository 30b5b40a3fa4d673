"""Which config of a kernel computes a layout: the one whose tiles cover it at the least cost."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import TypeVar

import torch
from sparse_flash.kernels.config import KernelConfig
from sparse_flash.kernels.schedule import on_host
from sparse_flash.masks import blockwise, host
from sparse_flash.masks.blockwise import Numbers, int64, minimum, numbers, take, tensor
from sparse_flash.masks.layout import BlockLayout

_GRID = 1 << 24  # tiles of which a table of bools is made
_SAMPLE = 512  # partial blocks
_INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}  # of n bits
_WORTH_CUTTING = 1.2  # to cut a layout into other tiles takes time on the host
_FEW = 1 << 14  # blocks of which such a table takes less time than an operation on each tile

Config = TypeVar("Config", bound=KernelConfig)


def best_config(layout: BlockLayout, configs: Sequence[Config], transposed: bool = False) -> Config:
    """The config whose tiles cover the layout, or its transpose, at the least cost.

    Tiles are counted over the stored blocks, as if all these were full. But where the blocks are
    multiples of the tiles, with widths of `_INTEGERS`, those without elements do not count, and the
    others count `_WORTH_CUTTING` times, if that is less. Partial tiles and rows of tiles have
    costs, too. Tiles that would reach into blocks which nothing reads are not taken: these may hold
    NaN, and 0 times NaN is NaN.
    """
    if len(configs) == 1:
        return configs[0]
    layout = on_host(layout)
    area = _stored_area(layout)
    best, least = configs[0], math.inf
    for config in configs:
        tile = config.tile[::-1] if transposed else config.tile
        length = layout.kv_len if transposed else layout.q_len
        rows = layout.num_patterns * -(-length // config.tile[0])
        # At best its tiles cover nothing but stored blocks, or one part of each partial block.
        fewest = area / math.prod(tile)
        if _divides(tile, layout.block):
            fewest -= layout.num_partial * (math.prod(layout.block) / math.prod(tile) - 1)
        if _cost(config, fewest, 0, rows) < least:
            tiles, partial = _tiles(layout, tile, area)
            cost = _cost(config, tiles, partial, rows)
            if cost < least and suits(config, layout, transposed):
                best, least = config, cost
    return best


def _cost(config: KernelConfig, tiles: float, partial: float, rows: int) -> float:
    """Cost of a layout of so many tiles, some of which are partial, and rows."""
    # Only some configs say what partial tiles and rows cost.
    of_partial = partial * getattr(config, "partial_cost", 0.0)
    cost = config.tile_cost * (tiles + of_partial) + rows * getattr(config, "row_cost", 0.0)
    return cost if partial < getattr(config, "most_bit_tiles", math.inf) else math.inf


def _divides(tile: tuple[int, int], block: tuple[int, int]) -> bool:
    """Whether blocks consist of whole tiles, whose rows of bits are integers."""
    return tile != block and tile[1] in _INTEGERS and not (block[0] % tile[0] or block[1] % tile[1])


def _tiles(layout: BlockLayout, tile: tuple[int, int], area: int) -> tuple[float, float]:
    """How many tiles of this size count, and how many of them are partial."""
    divides = _divides(tile, layout.block)
    ragged = layout.q_len % tile[0] or layout.kv_len % tile[1]
    tiles = area / math.prod(tile) if divides and not ragged else cover(layout, tile)
    if not layout.num_partial:
        return tiles, 0
    if not divides:
        return tiles, tiles * layout.num_partial / layout.num_tiles
    held, full = _parts_of_partial(layout, tile)
    empty = _parts(layout, tile) - held
    return min(tiles, _WORTH_CUTTING * (tiles - empty)), held - full


def _parts_of_partial(layout: BlockLayout, tile: tuple[int, int]) -> tuple[float, float]:
    """How many tiles of this size, which divides the blocks, hold elements of partial blocks, and
    how many are full. With many bit tiles, from a sample of the blocks.
    """
    entries = numbers(layout.bit_tile_indices)
    packed, index = layout.bit_tiles, entries[entries >= 0]
    if len(packed) > _SAMPLE:
        some = index[:: -(-len(index) // _SAMPLE)]
        packed, index = host.take(packed, tensor(int64(some))), blockwise.arange(len(some), some)
    packed = packed.clone(memory_format=torch.contiguous_format)  # may begin at any byte
    lines = numbers(packed.view(_INTEGERS[tile[1]]))
    shape = (len(lines), layout.block[0] // tile[0], tile[0], layout.block[1] // tile[1])
    lines = lines.reshape(shape)
    counts = (lines != 0).any(2).sum((1, 2)), (lines == -1).all(2).sum((1, 2))
    held, full = (layout.num_partial * int(take(x, index).sum()) / len(index) for x in counts)
    return held, full


def _parts(layout: BlockLayout, tile: tuple[int, int]) -> int:
    """Number of tiles of this size, which divides the blocks, in partial blocks."""
    (block_q, block_kv), (q_len, kv_len) = layout.block, layout.lengths[:2]
    if not (q_len % block_q or kv_len % block_kv):
        return layout.num_partial * (block_q // tile[0]) * (block_kv // tile[1])
    which = layout.bit_tile_indices >= 0
    rows = layout.tile_rows[which] % layout.num_block_rows
    heights = (q_len - rows * block_q).clamp(max=block_q)
    widths = (kv_len - layout.col_indices[which].long() * block_kv).clamp(max=block_kv)
    return int(((heights + tile[0] - 1) // tile[0] * ((widths + tile[1] - 1) // tile[1])).sum())


def suits(config: KernelConfig, layout: BlockLayout, transposed: bool) -> bool:
    """Whether no tile of the config reaches into blocks that nothing reads."""
    return _aligned(config, transposed) or _all_read(on_host(layout), transposed)


def _aligned(config: KernelConfig, transposed: bool) -> bool:
    """Whether no tile reaches across a multiple of 128 of the rows that a GEMM sums over.

    These are keys, and in a backward pass queries too. Tiles of more than 128 are rows of O.
    """
    sizes = config.tile if transposed else config.tile[1:]
    return not any(128 % size for size in sizes if size < 128)


def _all_read(layout: BlockLayout, rows_too: bool) -> bool:
    """Whether each pattern has a stored block in each block column, and with `rows_too` in each
    block row.
    """
    starts = numbers(layout.crow_indices)
    if rows_too and not bool((starts[:, 1:] > starts[:, :-1]).all()):
        return False
    rows, columns = numbers(layout.tile_rows), layout.num_block_cols
    read = blockwise.zeros((layout.num_patterns * columns,), rows, "bool")
    read[rows // layout.num_block_rows * columns + numbers(layout.col_indices)] = True
    return bool(read.all())


def _stored_area(layout: BlockLayout) -> int:
    """Elements of all stored blocks."""
    (block_q, block_kv), kv_len = layout.block, layout.kv_len
    if not (layout.q_len % block_q or kv_len % block_kv):
        return layout.num_tiles * block_q * block_kv
    rows = layout.tile_rows % layout.num_block_rows
    heights = (layout.q_len - rows * block_q).clamp(max=block_q)
    widths = (kv_len - layout.col_indices.long() * block_kv).clamp(max=block_kv)
    return int((heights * widths).sum())


def cover(layout: BlockLayout, tile: tuple[int, int]) -> int:
    """How many tiles of this size touch stored blocks of the layout, over all its patterns.

    >>> from sparse_flash import masks
    >>> layout = masks.block_local(128, 1).layout(768)  # 128-blocks: 2, 3, 3, 3, 3, 2 in a row
    >>> cover(layout, (128, 128)), cover(layout, (192, 128)), cover(layout, (128, 64))
    (16, 14, 32)
    """
    if tile == layout.block:
        return layout.num_tiles
    blocks = layout.num_patterns * layout.num_block_rows * layout.num_block_cols
    if blocks <= max(_FEW, 8 * layout.num_tiles):
        return _cover_of_table(layout, tile)
    sizes = [
        (-(-n // t), *_touched(n, block, t, numbers(layout.crow_indices)))
        for n, block, t in zip((layout.q_len, layout.kv_len), layout.block, tile, strict=True)
    ]
    (height, top, bottom, down), (width, left, right, across) = sizes
    starts, cols = numbers(layout.crow_indices), numbers(layout.col_indices)
    counts = (starts[:, 1:] - starts[:, :-1]).reshape(-1)
    before = blockwise.arange(layout.num_patterns, starts)[:, None] * height
    top, bottom = (((x + before) * width).reshape(-1) for x in (top, bottom))
    top = blockwise.spread(top, counts)
    left = cols if tile[1] == layout.block[1] else take(left, cols)
    bottom = blockwise.spread(bottom, counts) if down > 1 else top
    right = take(right, cols) if across > 1 else left
    size = layout.num_patterns * height * width
    touched = [
        (minimum(top + i * width, bottom) if i else top) + (minimum(left + j, right) if j else left)
        for i in range(down)
        for j in range(across)
    ]
    if size > _GRID:
        return len(torch.cat([tensor(x) for x in touched]).unique())
    seen = blockwise.zeros((size,), cols, "bool")
    for tiles in touched:
        seen[tiles] = True
    return host.count(tensor(seen))


def _cover_of_table(layout: BlockLayout, tile: tuple[int, int]) -> int:
    """As `cover`, from a table of all blocks."""
    shape = layout.num_patterns, layout.num_block_rows, layout.num_block_cols
    starts = numbers(layout.crow_indices)
    counts = (starts[:, 1:] - starts[:, :-1]).reshape(-1)
    place = blockwise.spread(shape[2] * blockwise.arange(len(counts), starts), counts)
    place += numbers(layout.col_indices)  # in place: new memory takes as long as arithmetic
    stored = blockwise.zeros((math.prod(shape),), place, "bool")
    stored[place] = True
    stored = stored.reshape(shape)
    lengths = layout.q_len, layout.kv_len
    for axis, (n, block, t) in enumerate(zip(lengths, layout.block, tile, strict=True), 1):
        if t != block:
            first, last, most = _touched(n, t, block, place)
            parts = [minimum(first + i, last) for i in range(most)]
            stored = functools.reduce(operator.or_, [take(stored, x, axis) for x in parts])
    return host.count(tensor(stored))


def _touched(length: int, block: int, tile: int, like: Numbers) -> tuple[Numbers, Numbers, int]:
    """The first and the last tile that each block touches, and the largest number of them."""
    if block == tile:
        first = blockwise.arange(-(-length // block), like)
        return first, first, 1
    first = blockwise.arange(-(-length // block), like) * block
    last = minimum(first + (block - 1), length - 1) // tile
    most = (block - math.gcd(block, tile) + 2 * tile - 1) // tile
    return first // tile, last, most
