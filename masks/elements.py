"""Elements of tiles that three-valued logic cannot decide; each signature is evaluated once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from sparse_flash.masks import bits, composed, host
from sparse_flash.masks.assemble import extent, numbered
from sparse_flash.masks.blockwise import minimum, numbers, tensor
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.rectangles import Elements
from sparse_flash.masks.ternary import EMPTY, UNKNOWN, Blocks
from torch import Tensor

_CELL = 16  # tokens per side of the cells of a tile, some of which are decided as a whole
_PROBED = 64  # tiles that show whether cells are worth while
_TILES_AT_ONCE, _TILES_AT_ONCE_CUDA = 1 << 15, 1 << 18  # whose signatures are compared
_PATIENCE = 5.0  # seconds of evaluation before a progress bar appears


class Predicate(Protocol):
    """A rule from which a layout is built."""

    def classify(self, blocks: Blocks) -> Tensor:
        """EMPTY, UNKNOWN or FULL for each rectangle, int8."""

    def signature(self, blocks: Blocks) -> Tensor | None:
        """Integers `(n, k)`: rectangles of equal size and signature have equal elements."""

    def __call__(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The truth for each element."""


class TooLargeError(Exception):
    """There is more to look at than was asked for."""


def evaluate(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """The tiles at these blocks, element by element.

    Returns:
        The index of each tile's bit tile, EMPTY_TILE or FULL_TILE; the distinct bit tiles, uint8.

    Raises:
        TooLargeError: More than `most` elements are to be evaluated.
    """
    first, twin = kinds_of(predicate, rows, cols, lengths)
    if most is not None and len(first) * lengths[2][0] * lengths[2][1] > most:
        raise TooLargeError
    rows, cols = host.take(rows, first), host.take(cols, first)
    packed = None
    if rows.device.type == "cpu":
        packed = composed.packed(predicate, composed.Tiles(rows.numpy(), cols.numpy(), lengths))
    if packed is None:
        index, tiles = evaluate_all(predicate, rows, cols, lengths)
    else:
        index, tiles = numbered(torch.from_numpy(packed), _areas(rows, cols, lengths))
    return host.take(index, twin), tiles


def count_kinds(predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths) -> int:
    """Number of these tiles that `evaluate` evaluates: one per signature."""
    return len(kinds_of(predicate, rows, cols, lengths)[0])


def _tiles(rows: Tensor, cols: Tensor, lengths: Lengths) -> Blocks:
    """The index ranges of tiles."""
    q_len, kv_len, (block_q, block_kv) = lengths
    q, kv = numbers(rows) * block_q, numbers(cols) * block_kv
    ends = minimum(q + block_q, q_len) - 1, minimum(kv + block_kv, kv_len) - 1
    return Blocks(q, ends[0], kv, ends[1], max(q_len, kv_len))


def kinds_of(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    """The first tile of each signature, and the signature number of every tile."""
    every = host.arange(len(rows), rows.device)
    firsts: list[Tensor] = []
    twins: list[Tensor] = []
    kept: list[Tensor] = []
    count = 0
    step = _TILES_AT_ONCE_CUDA if every.is_cuda else _TILES_AT_ONCE
    for start in range(0, len(rows), step):
        some_rows, some_cols = rows[start : start + step], cols[start : start + step]
        blocks = _tiles(some_rows, some_cols, lengths)
        signature = predicate.signature(blocks)
        if signature is None:
            return every, every
        if lengths[0] % lengths[2][0] or lengths[1] % lengths[2][1]:  # not all are of one size
            sizes = blocks.q_hi - blocks.q_lo, blocks.kv_hi - blocks.kv_lo
            signature = host.cat([signature, *(tensor(x)[:, None] for x in sizes)], 1)
        first, twin = bits.distinct_rows(signature)
        if len(some_rows) == len(rows):
            return first, twin
        if len(first) == len(some_rows) and not count:
            return every, every
        firsts.append(first + start)
        twins.append(twin + count)
        kept.append(host.take(signature, first))
        count += len(first)
    if not firsts:
        return every, every
    first, twin = bits.distinct_rows(host.cat(kept))
    return host.take(host.cat(firsts), first), host.take(twin, host.cat(twins))


def evaluate_all(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    """Like `evaluate`, without signatures.

    Results of a chunk go into two preallocated tensors. Many small tensors between the large
    temporaries would fragment the heap, and the process would use several times the memory.
    """
    block_q, block_kv = lengths[2]
    order = host.argsort(rows * (lengths[1] // block_kv + 1) + cols)  # neighbors side by side
    rows, cols = host.take(rows, order), host.take(cols, order)
    areas = _areas(rows, cols, lengths)
    index = torch.empty_like(rows)
    distinct = store = torch.empty(
        256, block_q, -(-block_kv // 8), dtype=torch.uint8, device=rows.device
    )
    count = 0
    for part, packed in _with_progress(_chunks(predicate, rows, cols, lengths), predicate, rows):
        found, distinct = numbered(packed, areas[part])
        host.put(index, order[part], torch.where(found < 0, found, found + count))
        if part.start == 0 and part.stop >= len(rows):  # a single chunk
            store, count = distinct, len(distinct)
            continue
        if count + len(distinct) > len(store):  # twice as many, or what this rate will need
            expected = (count + len(distinct)) * len(rows) // min(part.stop, len(rows))
            larger = store.new_empty(max(2 * len(store), expected), *store.shape[1:])
            larger[:count] = store[:count]
            store = larger
        store[count : count + len(distinct)] = distinct
        count += len(distinct)
    if store is distinct:  # at most one chunk
        return index, store[:count]
    distinct, twin = bits.deduplicate(store[:count])
    return torch.where(index < 0, index, twin[index]), distinct


def _areas(rows: Tensor, cols: Tensor, lengths: Lengths) -> Tensor:
    """Number of elements of each tile."""
    return extent(rows, lengths[0], lengths[2][0]) * extent(cols, lengths[1], lengths[2][1])


def _chunks(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> Iterator[tuple[slice, Tensor]]:
    """Packed tiles, in chunks that keep temporaries small."""
    block_q, block_kv = lengths[2]
    area = min(block_q, lengths[0]) * min(block_kv, lengths[1])
    whole = max(1, (1 << 26) // area)
    cut = min(lengths[:2]) >= _CELL and block_q % _CELL == block_kv % _CELL == 0 and area >= 4096
    truth, start = Elements(predicate, lengths[:2]), 0
    if cut and len(rows) > _PROBED:  # a few tiles tell whether cells of others are decided
        some = torch.arange(_PROBED, device=rows.device) * len(rows) // _PROBED
        cut = _cells(predicate, rows[some], cols[some], lengths) is not None
    while start < len(rows):
        part = slice(start, start + whole)
        packed = None
        if cut:
            packed = _packed_by_cells(predicate, truth, rows[part], cols[part], lengths)
            cut = packed is not None
        if packed is None:
            packed = _packed(truth, rows[part], cols[part], lengths)
        yield part, packed
        start = part.stop


def _packed(truth: Elements, rows: Tensor, cols: Tensor, lengths: Lengths) -> Tensor:
    """Whole tiles as bits: uint8 `(n, block_q, ceil(block_kv / 8))`."""
    q_len, kv_len, (block_q, block_kv) = lengths
    height, width = min(block_q, q_len), min(block_kv, kv_len)  # tiles of one query have one row
    some = truth.packed(rows * block_q, cols * block_kv, (height, width))
    if some.shape[1:] == (block_q, -(-block_kv // 8)):
        return some
    packed = some.new_zeros(len(rows), block_q, -(-block_kv // 8))
    packed[:, :height, : some.shape[2]] = some
    return packed


def _packed_by_cells(
    predicate: Predicate, truth: Elements, rows: Tensor, cols: Tensor, lengths: Lengths
) -> Tensor | None:
    """Whole tiles as bits, with cells of _CELL x _CELL elements decided by three-valued logic.

    None if it decides too few cells to save time.
    """
    cells = _cells(predicate, rows, cols, lengths)
    if cells is None:
        return None
    q, kv, states, open_ = cells
    # A row of a cell is 16 bits, so a cell is 16 words; all are -1 if the cell is full.
    words = torch.where(states == EMPTY, 0, -1).to(torch.int16)[:, None].repeat(1, _CELL)
    some = truth.packed(q[open_], kv[open_], (_CELL, _CELL))
    words[open_] = some.view(torch.int16).squeeze(2)
    block_q, block_kv = lengths[2]
    words = words.view(len(rows), block_q // _CELL, block_kv // _CELL, _CELL)
    words = words.transpose(2, 3).contiguous()
    return words.view(torch.uint8).view(len(rows), block_q, block_kv // 8)


def _cells(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """First queries, first keys and truth values of all cells, indices of the undecided cells.

    None if three-valued logic decides too few of them.
    """
    down, across = lengths[2][0] // _CELL, lengths[2][1] // _CELL
    parts = host.pieces(len(rows), rows.device, down * across)
    found = [_classified_cells(predicate, rows[part], cols[part], lengths) for part in parts]
    q, kv, states = (host.cat(x) for x in zip(*found, strict=True))
    open_ = host.positions(states, UNKNOWN, UNKNOWN)
    return None if 10 * len(open_) > 7 * len(states) else (q, kv, states, open_)


def _classified_cells(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor, Tensor]:
    """First queries, first keys and truth values of all cells of tiles."""
    q_len, kv_len, (block_q, block_kv) = lengths
    down, across = block_q // _CELL, block_kv // _CELL
    shape = (len(rows), down, across)
    lines = _CELL * torch.arange(max(down, across), device=rows.device)
    q = (rows[:, None, None] * block_q + lines[:down, None]).expand(shape).flatten()
    kv = (cols[:, None, None] * block_kv + lines[:across]).expand(shape).flatten()
    q_hi, kv_hi = (q + _CELL - 1).clamp(max=q_len - 1), (kv + _CELL - 1).clamp(max=kv_len - 1)
    blocks = Blocks(q.clamp(max=q_len - 1), q_hi, kv.clamp(max=kv_len - 1), kv_hi, max(lengths[:2]))
    states = predicate.classify(blocks)
    ragged = (q + _CELL > q_len) | (kv + _CELL > kv_len)
    states = torch.where(ragged & (states != EMPTY), UNKNOWN, states)
    states = torch.where((q >= q_len) | (kv >= kv_len), EMPTY, states)  # beyond the lengths
    return q, kv, states


def _with_progress(
    chunks: Iterable[tuple[slice, Tensor]], predicate: Predicate, rows: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The same chunks, with a progress bar and advice if they take more than a few seconds."""
    start, bar, done = time.monotonic(), None, 0
    for part, packed in chunks:
        yield part, packed
        done = min(part.stop, len(rows))
        elapsed = time.monotonic() - start
        if bar is None and elapsed > 0.5 and elapsed / done * len(rows) > _PATIENCE:
            _advise(predicate, len(rows), elapsed / done * len(rows))
            bar = _bar(len(rows))
        if bar is not None:
            bar.update(done - bar.n)
    if bar is not None:
        bar.close()


def _advise(predicate: Predicate, tiles: int, seconds: float) -> None:
    """Warn about a slow function and name the operations that are fast."""
    reasons = list(dict.fromkeys(_reasons(predicate)))
    if reasons:
        warnings.warn(
            f"{predicate!r}: {tiles} tiles are evaluated element by element, in about "
            f"{seconds:.0f} s{''.join(reasons)}; functions of +, -, *, //, %, <<, >>, &, |, ^, ~, "
            "abs, comparisons and table[index] are faster, functions of q - kv alone much "
            "faster; layout.save(path) stores a layout",
            stacklevel=2,
        )


def _reasons(predicate: Any) -> Iterator[str]:
    """Reasons why custom masks had to be evaluated."""
    if hasattr(predicate, "not_understood"):
        yield predicate.not_understood
    for operand in getattr(predicate, "operands", tuple)():
        yield from _reasons(operand)


def _bar(total: int) -> Any:
    """A progress bar on standard error, if that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="tiles", unit="tile", leave=False, disable=None)
