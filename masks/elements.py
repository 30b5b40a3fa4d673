"""The elements of tiles that three-valued logic cannot decide, each kind of tile once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks import bits
from sparse_flash.masks.arrays import Array
from sparse_flash.masks.io import Lengths
from sparse_flash.masks.tables import TableLookups
from sparse_flash.masks.ternary import EMPTY, UNKNOWN, Blocks
from sparse_flash.masks.threads import in_threads
from torch import Tensor

EMPTY_TILE = -2  # of an evaluated tile: nothing is allowed in it
_CELL = 16  # tokens a side of the parts into which a tile is cut, to decide some of them whole
_AT_ONCE, _AT_ONCE_CUDA = 1 << 17, 1 << 21  # elements: temporaries stay in a core's cache
_BATCH = 8  # evaluations that a thread does in a row
_PATIENCE = 5.0  # seconds of evaluation without a word about them


class Predicate(Protocol):
    """What a layout is made from."""

    def classify(self, blocks: Blocks) -> Tensor:
        """EMPTY, UNKNOWN or FULL for each rectangle, int8."""

    def signature(self, blocks: Blocks) -> Tensor | None:
        """Integers `(n, k)`: rectangles of one size with equal ones have equal elements."""

    def __call__(self, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """The truth for each element."""


def evaluate(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    """The tiles at these blocks, element by element.

    Returns:
        The index of each tile's bit tile, or EMPTY_TILE; bit tiles, uint8, in which repetitions
        are possible.
    """
    first, twin = _kinds(predicate, rows, cols, lengths)
    index, tiles = _evaluate_all(predicate, rows[first], cols[first], lengths)
    return index[twin], tiles


def count_kinds(predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths) -> int:
    """How many of these tiles `evaluate` evaluates: one of each signature."""
    return len(_kinds(predicate, rows, cols, lengths)[0])


def _tiles(rows: Tensor, cols: Tensor, lengths: Lengths) -> Blocks:
    """The index ranges of tiles."""
    q_len, kv_len, (block_q, block_kv) = lengths
    q, kv = rows * block_q, cols * block_kv
    ends = ((q + block_q).clamp(max=q_len) - 1, (kv + block_kv).clamp(max=kv_len) - 1)
    return Blocks(q, ends[0], kv, ends[1], max(q_len, kv_len))


def _kinds(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths, chunk: int = 1 << 18
) -> tuple[Tensor, Tensor]:
    """The first tile of each signature, and for every tile the number of its signature."""
    every = torch.arange(len(rows), device=rows.device)
    firsts: list[Tensor] = []
    twins: list[Tensor] = []
    kept: list[Tensor] = []
    count = 0
    for part in every.split(chunk):
        blocks = _tiles(rows[part], cols[part], lengths)
        signature = predicate.signature(blocks)
        if signature is None:
            return every, every
        size = torch.stack([blocks.q_hi - blocks.q_lo, blocks.kv_hi - blocks.kv_lo], 1)
        signature = torch.cat([signature, size], 1)
        first, twin = bits.distinct_rows(signature)
        if len(first) == len(part) and not count:
            return every, every
        firsts.append(part[first])
        twins.append(twin + count)
        kept.append(signature[first])
        count += len(first)
    if len(firsts) < 2:
        return (firsts[0], twins[0]) if firsts else (every, every)
    first, twin = bits.distinct_rows(torch.cat(kept))
    return torch.cat(firsts)[first], twin[torch.cat(twins)]


def _evaluate_all(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    """As `evaluate`, for every tile; repetitions at most once a chunk.

    What outlives a chunk goes into two long-lived tensors: many small ones between the large
    temporaries would break up the heap, and the process would grow to several times its need.
    """
    block_q, block_kv = lengths[2]
    index = torch.empty_like(rows)
    store = torch.empty(256, block_q, -(-block_kv // 8), dtype=torch.uint8, device=rows.device)
    count = 0
    for part, packed in _with_progress(_chunks(predicate, rows, cols, lengths), predicate, rows):
        distinct, twin = bits.deduplicate(packed)
        while count + len(distinct) > len(store):
            store = torch.cat([store, torch.empty_like(store)])
        store[count : count + len(distinct)] = distinct
        some = bits.count(distinct) > 0
        index[part] = torch.where(some[twin], twin + count, EMPTY_TILE)
        count += len(distinct)
    return index, store[:count]


def _chunks(
    predicate: Predicate, rows: Tensor, cols: Tensor, lengths: Lengths
) -> Iterator[tuple[slice, Tensor]]:
    """Packed tiles, so many at a time that temporaries stay small."""
    block_q, block_kv = lengths[2]
    area = min(block_q, lengths[0]) * min(block_kv, lengths[1])
    whole = max(1, (1 << 24) // area)
    cut = min(lengths[:2]) >= _CELL and block_q % _CELL == block_kv % _CELL == 0 and area >= 4096
    truth, start = Elements(predicate, lengths[:2]), 0
    while start < len(rows):
        part = slice(start, start + (4 * whole if cut else whole))
        packed = None
        if cut:
            packed = _packed_by_cells(predicate, truth, rows[part], cols[part], lengths)
            cut = packed is not None
        if packed is None:
            part = slice(start, start + whole)
            packed = _packed(truth, rows[part], cols[part], lengths)
        yield part, packed
        start = part.stop


def _packed(truth: Elements, rows: Tensor, cols: Tensor, lengths: Lengths) -> Tensor:
    """Whole tiles as bits: uint8 `(n, block_q, ceil(block_kv / 8))`."""
    q_len, kv_len, (block_q, block_kv) = lengths
    height, width = min(block_q, q_len), min(block_kv, kv_len)  # of one query, one row is looked at
    some = truth.packed(rows * block_q, cols * block_kv, (height, width))
    if some.shape[1:] == (block_q, -(-block_kv // 8)):
        return some
    packed = some.new_zeros(len(rows), block_q, -(-block_kv // 8))
    packed[:, :height, : some.shape[2]] = some
    return packed


def _packed_by_cells(
    predicate: Predicate, truth: Elements, rows: Tensor, cols: Tensor, lengths: Lengths
) -> Tensor | None:
    """The same, by cells of _CELL x _CELL elements, of which three-valued logic decides some.

    None where it decides too few of them for this to be worth while.
    """
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
    open_ = (states == UNKNOWN).nonzero().squeeze(1)
    if 10 * len(open_) > 7 * len(states):
        return None
    # A row of a cell is 16 bits, so a cell is 16 words, all of them -1 where it is full.
    words = torch.where(states == EMPTY, 0, -1).to(torch.int16)[:, None].repeat(1, _CELL)
    some = truth.packed(q[open_], kv[open_], (_CELL, _CELL))
    words[open_] = some.view(torch.int16).squeeze(2)
    words = words.view(*shape, _CELL).transpose(2, 3).contiguous()
    return words.view(torch.uint8).view(len(rows), block_q, block_kv // 8)


class Elements:
    """The truth of rectangles of elements, by arrays as long as the predicate lets them.

    Args:
        predicate: Its `allowed`, if it has one, is asked with arrays; where that fails, itself with
            tensors.
        lengths: (q_len, kv_len): the truth is false beyond.
    """

    def __init__(self, predicate: Predicate, lengths: tuple[int, int]) -> None:
        self.predicate, self.lengths = predicate, lengths
        self.rule: Any = getattr(predicate, "allowed", None)
        self.by_arrays = self.rule is not None

    def packed(self, q_lo: Tensor, kv_lo: Tensor, size: tuple[int, int]) -> Tensor:
        """Rectangles of one size as bits: uint8 `(n, height, ceil(width / 8))`."""
        shape = (len(q_lo), size[0], -(-size[1] // 8))
        packed = torch.empty(shape, dtype=torch.uint8, device=q_lo.device)
        piece = max(1, (_AT_ONCE_CUDA if q_lo.is_cuda else _AT_ONCE) // (size[0] * size[1]))
        parts = [slice(start, start + piece) for start in range(0, len(q_lo), piece)]
        if self.by_arrays and not q_lo.is_cuda:
            parts = self._by_arrays(parts, packed.numpy(), q_lo.numpy(), kv_lo.numpy(), size)
        for part in parts:
            packed[part] = bits.pack(self._of_tensors(q_lo[part], kv_lo[part], size))
        return packed

    def _by_arrays(
        self,
        parts: list[slice],
        packed: NDArray[np.uint8],
        q_lo: NDArray[np.int64],
        kv_lo: NDArray[np.int64],
        size: tuple[int, int],
    ) -> list[slice]:
        """Fill parts of the packed rectangles; return the parts that tensors must evaluate."""

        def fill(batch: list[slice]) -> list[slice]:
            left = []
            with torch.no_grad(), TableLookups():  # modes are those of a thread
                for part in batch:
                    found = self._of_arrays(q_lo[part], kv_lo[part], size)
                    if found is None:
                        left.append(part)
                    else:
                        packed[part] = np.packbits(found, axis=2, bitorder="little")
            return left

        batches = [parts[:1], *(parts[i : i + _BATCH] for i in range(1, len(parts), _BATCH))]
        return [part for left in in_threads(fill, batches) for part in left]

    def _of_arrays(
        self, q_lo: NDArray[np.int64], kv_lo: NDArray[np.int64], size: tuple[int, int]
    ) -> NDArray[Any] | None:
        """Bools `(n, height, width)`; None where the predicate does not take arrays."""
        if not self.by_arrays:
            return None
        (q_len, kv_len), shape = self.lengths, (len(q_lo), *size)
        q = (q_lo[:, None] + np.arange(size[0]))[:, :, None]
        kv = (kv_lo[:, None] + np.arange(size[1]))[:, None, :]
        # Predicates see only indices that exist.
        found, seen = None, (np.minimum(q, q_len - 1), np.minimum(kv, kv_len - 1))
        try:
            truth = self.rule(*map(Array.of, seen))
            if truth.dtype == torch.bool:
                values = truth.values if isinstance(truth, Array) else truth.numpy()
                found = np.broadcast_to(values, shape)
        except Exception:  # an error of the predicate's own is raised again by tensors
            self.by_arrays = False
        if found is None:
            self.by_arrays = False  # nor for rectangles that follow
        elif (q >= q_len).any() or (kv >= kv_len).any():
            found = found & (q < q_len) & (kv < kv_len)
        return found

    def _of_tensors(self, q_lo: Tensor, kv_lo: Tensor, size: tuple[int, int]) -> Tensor:
        """Bools `(n, height, width)`."""
        q_len, kv_len = self.lengths
        q = q_lo[:, None, None] + torch.arange(size[0], device=q_lo.device)[:, None]
        kv = kv_lo[:, None, None] + torch.arange(size[1], device=q_lo.device)
        shape = (len(q_lo), *size)
        if q_len % size[0] == kv_len % size[1] == 0:
            return self.predicate(q, kv).expand(shape)
        # Predicates see only indices that exist.
        found = self.predicate(q.clamp(max=q_len - 1), kv.clamp(max=kv_len - 1))
        return (found & (q < q_len) & (kv < kv_len)).expand(shape)


def _with_progress(
    chunks: Iterable[tuple[slice, Tensor]], predicate: Predicate, rows: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """The same chunks; what takes longer than a few seconds shows a bar, and a way to be faster."""
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
    """Tell authors of functions what makes their layouts faster."""
    reasons = list(dict.fromkeys(_reasons(predicate)))
    if reasons:
        warnings.warn(
            f"{predicate!r}: {tiles} tiles are evaluated element by element, in about "
            f"{seconds:.0f} s{''.join(reasons)}; functions of +, -, *, //, %, <<, >>, &, |, ^, ~, "
            "abs, comparisons and table[index] are decided faster, functions of q - kv alone much "
            "faster; layout.save(path) keeps a layout",
            stacklevel=2,
        )


def _reasons(predicate: Any) -> Iterator[str]:
    """Why custom masks in it had to be evaluated."""
    if hasattr(predicate, "not_understood"):
        yield predicate.not_understood
    for operand in getattr(predicate, "operands", tuple)():
        yield from _reasons(operand)


def _bar(total: int) -> Any:
    """A progress bar on standard error, where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="tiles", unit="tile", leave=False, disable=None)
