"""Paths through single elements: exact layer counts from bit rows, one bit per source token.

Bit j of row i is set if token j influences token i. One layer replaces a row by the union of the
rows of the tokens that it attends to. Three exact reductions save time:

- Twins are tokens with equal rows and equal columns. One of them represents all.
- The union of an aligned run of 8, 64, 512, ... attended tokens is computed once.
- A row with all required bits is complete: further unions cannot change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sparse_flash.masks import bits
from sparse_flash.masks.layout import FULL_TILE, BlockLayout

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

_FAN = 8  # rows per union in the next level of `_levels`
_AT_ONCE = 1 << 16  # words of unions per step: half a megabyte fits the cache of a core
_ROWS = 1 << 22  # bits unpacked per step
_SAMPLE = 2048  # sources of the sample that gives a lower bound of the layers
_PORTION = 16  # unions between two checks for complete rows
_KEPT = 1 << 25  # largest cache of union indices between layers


class TooLongError(Exception):
    """The search would take minutes. `layers`: a number of layers known to be too few."""

    def __init__(self, layers: int) -> None:
        super().__init__(f"more than {layers} layers")
        self.layers = layers


@dataclass
class Budget:
    """Number of words that may be combined before a TooLongError."""

    words: float
    layers: int = 0  # known to be too few

    def spend(self, words: float) -> None:
        """Subtract the cost of work that is about to start."""
        self.words -= words
        if self.words < 0:
            raise TooLongError(self.layers)


def bit_rows(layout: BlockLayout) -> Bytes:
    """All elements of a layout of one pattern: `(q_len, bytes)`, whole words of 64 bits per row.

    Blocks must be multiples of 8 tokens wide.
    """
    height, width = layout.block
    rows, cols = layout.tile_rows.numpy(), layout.col_indices.numpy()
    entries = layout.bit_tile_indices.numpy()
    shape = (layout.num_block_rows, height, layout.num_block_cols, width // 8)
    packed = np.zeros(shape, np.uint8)
    full = entries == FULL_TILE
    packed[rows[full], :, cols[full]] = 255
    packed[rows[~full], :, cols[~full]] = layout.bit_tiles.numpy()[entries[~full]]
    packed = packed.reshape(shape[0] * height, -1)[: layout.q_len]
    packed = packed[:, : -(-layout.kv_len // 8)]
    if layout.kv_len % 8:
        packed[:, -1] &= (1 << layout.kv_len % 8) - 1
    return _padded(packed)


@dataclass
class Tokens:
    """One token of each class of twins, as rows and columns of a bit matrix.

    first, last: The first and last token of each class.
    sources: Tokens whose influence may be incomplete after the lower bound of layers.
    """

    rows: Bytes
    first: Ints
    last: Ints
    sources: Ints

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, rows: Bytes, open_: NDArray[np.bool_]) -> Tokens:
        """One token of each class of twins; two if the twins do not attend to each other.

        A walk can use any twin, so one token of a class suffices, except for two ends that are
        distinct twins. A class is open if one of its tokens is.
        """
        n = len(rows)
        each = np.arange(n)
        kinds, representatives = _kinds(rows)
        if 2 * len(representatives) > n:  # too few twins to save time
            return cls(rows, each, each, np.flatnonzero(open_))
        # Columns that agree in one row of each class agree in all rows.
        kinds = kinds * n + _kinds(_transposed(rows[representatives])[:n])[0]
        _, first, twin = np.unique(kinds, return_index=True, return_inverse=True)
        last, any_open = np.zeros_like(first), np.zeros(len(first), np.bool_)
        np.maximum.at(last, twin, each)
        np.logical_or.at(any_open, twin, open_)
        itself = rows[first, first // 8] >> (first % 8).astype(np.uint8) & 1
        second = (last > first) & (itself == 0)
        chosen = np.concatenate([first, last[second]])
        return cls(
            _columns(rows[chosen], chosen),
            np.concatenate([first, first[second]]),
            np.concatenate([last, last[second]]),
            np.flatnonzero(np.concatenate([any_open, any_open[second]])),
        )

    def goal(self, sources: Ints, causal: bool) -> Words:
        """Sources that must influence each token: all, or all earlier ones if causal."""
        goal = np.empty((len(self), _words(len(sources))), np.uint64)
        for part in _slices(len(self), 64 * goal.shape[1]):
            earlier = self.first[sources] < self.last[part, None]
            goal[part] = _as_words(np.packbits(earlier | (not causal), axis=1, bitorder="little"))
        return goal


class Graph:
    """The attention graph, with self loops."""

    def __init__(self, tokens: Tokens, budget: Budget) -> None:
        self.tokens, self.budget = tokens, budget
        n = len(tokens)
        each = np.arange(n)
        self.rows = tokens.rows.copy()
        self.rows[each, each // 8] |= np.uint8(1) << (each % 8).astype(np.uint8)
        self._count = _count_unions(self.rows)
        self._kept: dict[tuple[int, int], list[tuple[Ints, Ints]]] = {}

    def first_layer(self, chosen: Ints) -> Words:
        """Bits of these sources after one layer."""
        if len(chosen) == len(self.tokens):
            return _as_words(self.rows)
        return _as_words(_columns(self.rows, chosen))

    def layer(self, seen: Words) -> Words:
        """Sources that influence each token after one more layer."""
        self.budget.spend(self._count * seen.shape[1] + 32 * len(seen))
        levels, wider = _levels(seen), np.empty_like(seen)
        portion = max(1, _AT_ONCE // seen.shape[1])

        def unite(batch: tuple[Ints, Ints]) -> None:
            rows, unions = batch
            found = _union(levels, unions[:, :portion])
            for start in range(portion, unions.shape[1], portion):
                found |= _union(levels, unions[:, start : start + portion])
            wider[rows] = found

        for batch in self._batches(seen.shape[1]):
            unite(batch)
        return wider

    def missing(self, seen: Words, goal: Words) -> Words:
        """Bits of the goal that one more layer leaves unset, for each source: `(words,)`."""
        self.budget.spend(self._count * seen.shape[1] / 2 + 64 * len(seen))
        levels = _levels(seen)
        missing = np.zeros(seen.shape[1], np.uint64)
        for rows, unions in self._batches(seen.shape[1], _PORTION):
            wanted, left = goal[rows] & ~seen[rows], unions
            for start in range(0, unions.shape[1], _PORTION):
                open_ = wanted.any(1)
                if not open_.all():
                    wanted, left = wanted[open_], left[open_]
                if not len(wanted):
                    break
                wanted &= ~_union(levels, left[:, start : start + _PORTION])
            missing |= np.bitwise_or.reduce(wanted, axis=0)
        return missing

    def _batches(self, words: int, portion: int = 1 << 30) -> Iterable[tuple[Ints, Ints]]:
        """Batches of tokens and of the unions that each attends to, padded by repetition."""
        if self._count > _KEPT:
            return self._made(words, portion)
        if (words, portion) not in self._kept:
            self._kept[words, portion] = list(self._made(words, portion))
        return self._kept[words, portion]

    def _made(self, words: int, portion: int) -> Iterator[tuple[Ints, Ints]]:
        for part in _slices(len(self.tokens), 8 * self.rows.shape[1]):
            ends, unions = _unions(self.rows[part], len(self.tokens))
            starts = np.concatenate([[0], ends[:-1]])
            counts = ends - starts
            order = np.argsort(-counts, kind="stable")
            start = 0
            while start < len(order):
                longest = counts[order[start]]
                step = max(1, _AT_ONCE // (words * min(longest, portion)))
                rows = order[start : start + step]
                places = np.minimum(np.arange(longest), counts[rows, None] - 1)
                yield rows + part.start, unions[starts[rows, None] + places]
                start += step

    def is_connected(self, causal: bool) -> bool:
        """Whether some number of layers suffices.

        In a causal mask only a direct step leads from a token to the next one.
        """
        n = len(self.tokens)
        if causal:
            later = np.arange(1, n)
            steps = self.rows[later, (later - 1) // 8] >> ((later - 1) % 8).astype(np.uint8) & 1
            return bool(steps.all() and (self.tokens.first == self.tokens.last).all())
        return _reaches_all(_as_words(self.rows), n) and _reaches_all(
            _as_words(_transposed(self.rows)[:n]), n
        )


def layers(tokens: Tokens, causal: bool, budget: Budget) -> int | None:
    """Layers until the open sources influence all required tokens; None if they never do.

    Raises:
        TooLongError: The budget is exhausted.
    """
    graph, chosen = Graph(tokens, budget), tokens.sources
    if not graph.is_connected(causal):
        return None
    if len(chosen) <= _SAMPLE:
        return _layers_of(graph, chosen, causal)
    # A sample gives a lower bound of the layers; above it, complete rows are skipped.
    spread = np.linspace(0, len(chosen) - 1, _SAMPLE // 2).astype(np.int64)
    least = _layers_of(graph, chosen[spread], causal)
    seen, done = graph.first_layer(chosen), 1
    goal = tokens.goal(chosen, causal)
    while True:
        while done < least - 1:
            seen, done = graph.layer(seen), done + 1
        missing = graph.missing(seen, goal) if least > 1 else np.bitwise_or.reduce(goal & ~seen)
        late = np.unpackbits(missing.view(np.uint8), count=len(chosen), bitorder="little")
        if not late.any():
            return least
        budget.layers = least
        least = _layers_of(graph, chosen[np.flatnonzero(late)[:_SAMPLE]], causal)


def _layers_of(graph: Graph, chosen: Ints, causal: bool) -> int:
    """Layers of a few sources, computed layer by layer."""
    goal = graph.tokens.goal(chosen, causal)
    seen, count = graph.first_layer(chosen), 1
    while (goal & ~seen).any():
        graph.budget.layers = max(graph.budget.layers, count)
        seen = graph.layer(seen)
        count += 1
    return count


def _reaches_all(rows: Words, n: int) -> bool:
    """Whether walks from the first token reach all tokens."""
    seen = np.zeros(rows.shape[1], np.uint64)
    fresh = rows[0].copy()
    while fresh.any():
        seen |= fresh
        tokens = np.flatnonzero(np.unpackbits(fresh.view(np.uint8), bitorder="little"))
        fresh = np.bitwise_or.reduce(rows[tokens], axis=0) & ~seen
    return int(np.bitwise_count(seen).sum()) == n


def _union(levels: Words, unions: Ints) -> Words:
    """The bitwise or of some rows: `(k, c)` -> `(k, words)`."""
    return np.bitwise_or.reduce(np.take(levels, unions, axis=0, mode="clip"), axis=1)


def _levels(seen: Words) -> Words:
    """Rows, then unions of 8 rows, of 64 rows, and so on."""
    levels = [seen]
    while len(levels[-1]) > 1:
        rows = levels[-1]
        short = -len(rows) % _FAN
        rows = np.concatenate([rows, np.zeros((short, rows.shape[1]), np.uint64)])
        levels.append(np.bitwise_or.reduce(rows.reshape(-1, _FAN, rows.shape[1]), axis=1))
    return np.concatenate(levels)


def _split(rows: Bytes) -> Iterator[Bytes]:
    """Bits of single rows, then of unions of 8, of 64, ...: full bytes move up a level."""
    while True:
        full = rows == 255
        if not full.any():
            yield rows
            return
        yield np.where(full, 0, rows)
        rows = np.packbits(full, axis=1, bitorder="little")


def _count_unions(rows: Bytes) -> int:
    """Total number of unions of all rows."""
    parts = _slices(len(rows), 8 * rows.shape[1])
    return sum(int(np.bitwise_count(x).sum()) for part in parts for x in _split(rows[part]))


def _unions(rows: Bytes, tokens: int) -> tuple[Ints, Ints]:
    """Unions in `_levels` that cover each row, longest first: ends `(rows,)`, indices."""
    found, counts, offset = [], [], 0
    for level in _split(rows):
        each = np.unpackbits(level, axis=1, bitorder="little").view(np.bool_)
        count = np.bitwise_count(level).sum(1, dtype=np.int64)
        row = np.repeat(np.arange(len(rows)), count)
        union = np.flatnonzero(each) - row * each.shape[1]
        found.append((row, union + offset))
        counts.append(count)
        offset, tokens = offset + tokens, -(-tokens // _FAN)
    ends = np.sum(counts, axis=0).cumsum()
    unions = np.empty(ends[-1], np.int32)
    free = ends - np.sum(counts, axis=0)  # next free entry of each row
    for (row, union), count in zip(found[::-1], counts[::-1], strict=True):
        first = count.cumsum() - count
        unions[(free - first)[row] + np.arange(len(row))] = union
        free += count
    return ends, unions


def _kinds(rows: Bytes) -> tuple[Ints, Ints]:
    """The class number of each row, and one row of each class; equal rows share a class."""
    words = torch.from_numpy(_as_words(rows).view(np.int64))
    first, index = bits.distinct_rows(words)
    return index.numpy(), first.numpy()


def _columns(rows: Bytes, chosen: Ints) -> Bytes:
    """Chosen columns of bit rows."""
    columns = np.empty((len(rows), 8 * _words(len(chosen))), np.uint8)
    shifts = (chosen % 8).astype(np.uint8)
    for part in _slices(len(rows), len(chosen)):
        bit = np.take(rows[part], chosen // 8, axis=1) >> shifts & 1
        columns[part] = _padded(np.packbits(bit, axis=1, bitorder="little"))
    return columns


def _transposed(rows: Bytes) -> Bytes:
    """The transposed bit matrix, by squares of 8 x 8 bits (Warren, Hacker's Delight, 7-3)."""
    squares = np.pad(rows, ((0, -len(rows) % _FAN), (0, 0))).reshape(-1, _FAN, rows.shape[1])
    x = np.ascontiguousarray(squares.transpose(0, 2, 1)).view(np.uint64)
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0xCCCC0000CCCC), (28, 0xF0F0F0F0)):
        t = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
        x ^= t ^ (t << np.uint64(shift))
    columns = x.view(np.uint8).transpose(1, 2, 0).reshape(8 * rows.shape[1], -1)
    return _padded(columns)


def _padded(rows: Bytes) -> Bytes:
    """Bit rows padded to whole words."""
    short = -rows.shape[1] % 8
    return np.ascontiguousarray(np.pad(rows, ((0, 0), (0, short))) if short else rows)


def _as_words(rows: Bytes) -> Words:
    return _padded(rows).view(np.uint64)


def _words(count: int) -> int:
    return -(-count // 64)


def _slices(count: int, bits_each: int) -> Iterator[slice]:
    """Slices of a range, sized so that unpacked bits fit the cache."""
    step = max(1, _ROWS // max(1, bits_each))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
