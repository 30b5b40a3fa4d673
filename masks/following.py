"""Paths through single elements: exact layer counts from bit rows, one bit per source token.

Bit j of row i is set if token j influences token i. One layer replaces a row by the union of the
rows of the tokens that it attends to. Three exact reductions save time:

- Twins are tokens with equal rows and equal columns. One of them represents all.
- Two windows of 2^k tokens, which may overlap, cover a run of attended tokens. The union of each
  window is computed once (a sparse table: Bender & Farach-Colton, The LCA Problem Revisited, 2000).
- A row with all required bits is complete: further unions cannot change it.
"""

from __future__ import annotations

import functools
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

_AT_ONCE = 1 << 14  # words combined per step: 128 KiB fit the cache of a core
_WIDTH = 64  # words per row of a table of windows
_TOGETHER = 256  # rows per step
_ROWS = 1 << 22  # bits unpacked per step
_SAMPLE = 2048  # sources of the sample that gives a lower bound of the layers
_PORTION = 16  # windows between two checks for complete rows
_KEPT = 1 << 25  # largest cache of windows between layers


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
        if not causal:
            every = np.packbits(np.ones((1, len(sources)), np.bool_), axis=1, bitorder="little")
            return np.broadcast_to(_as_words(every), (len(self), _words(len(sources))))
        goal = np.empty((len(self), _words(len(sources))), np.uint64)
        for part in _slices(len(self), 64 * goal.shape[1]):
            earlier = self.first[sources] < self.last[part, None]
            goal[part] = _as_words(np.packbits(earlier, axis=1, bitorder="little"))
        return goal


@dataclass
class _Batch:
    """Tokens, and the windows that cover the tokens that each attends to.

    rows: Tokens, `(k,)`.
    windows: Rows of `_windows`, long windows first, `(c, k)`; padded by repetition.
    """

    rows: Ints
    windows: NDArray[np.int32]


class Graph:
    """The attention graph, with self loops."""

    def __init__(self, tokens: Tokens, budget: Budget) -> None:
        self.tokens, self.budget = tokens, budget
        n = len(tokens)
        each = np.arange(n)
        self.rows = tokens.rows.copy()
        self.rows[each, each // 8] |= np.uint8(1) << (each % 8).astype(np.uint8)
        self._count = _count_windows(self.rows)
        self._found: dict[int, tuple[Ints, Ints, Ints]] = {}

    def first_layer(self, chosen: Ints) -> Words:
        """Bits of these sources after one layer."""
        if len(chosen) == len(self.tokens):
            return _as_words(self.rows)
        return _as_words(_columns(self.rows, chosen))

    def layer(self, seen: Words) -> Words:
        """Sources that influence each token after one more layer."""
        self.budget.spend(self._count * seen.shape[1] + 32 * len(seen))
        wider = np.empty_like(seen)
        for words, table in self._tables(seen):
            for batch in self._batches():
                wider[batch.rows, words] = _union(table, batch.windows)
        return wider

    def missing(self, seen: Words, goal: Words) -> Words:
        """Bits of the goal that one more layer leaves unset, for each source: `(words,)`."""
        self.budget.spend(self._count * seen.shape[1] / 2 + 64 * len(seen))
        missing = np.zeros(seen.shape[1], np.uint64)
        for words, table in self._tables(seen):
            for batch in self._batches():
                wanted = goal[batch.rows, words] & ~seen[batch.rows, words]
                left = batch.windows
                while len(left):
                    open_ = wanted.any(1)
                    if not open_.all():
                        wanted, left = wanted[open_], left[:, open_]
                    if not len(wanted):
                        break
                    wanted &= ~_union(table, left[:_PORTION])
                    left = left[_PORTION:]
                missing[words] |= np.bitwise_or.reduce(wanted, axis=0)
        return missing

    def _tables(self, seen: Words) -> Iterator[tuple[slice, Words]]:
        """Some words of each row at a time, and the table of their windows."""
        step = _WIDTH if self._kept is not None else seen.shape[1]  # making batches takes longer
        for start in range(0, seen.shape[1], step):
            words = slice(start, start + step)
            yield words, _windows(seen[:, words], self._lengths, self._shared)

    @functools.cached_property
    def _lengths(self) -> int:
        """Number of window lengths 1, 2, 4, ... in use, or more."""
        tokens = len(self.tokens)
        if self._kept is None:  # runs without a full word have at most 126 tokens
            full = (_as_words(self.rows) == np.iinfo(np.uint64).max).any()
            return min(tokens.bit_length(), 7 + int(full) * 64)
        largest = max(int(batch.windows.max()) for batch in self._kept) - len(self._shared)
        shared = int(self._shared[-1]) // tokens if len(self._shared) else 0
        return 1 + max(largest, shared) // tokens

    @functools.cached_property
    def _shared(self) -> Ints:
        """Distinct pairs of windows, if most pairs occur in several rows; else none."""
        found, total = np.empty(0, np.int64), 0
        for part in self._parts() if self._count <= _KEPT else ():
            _, first, rest = self._runs(part)
            pairs = (first * len(self.tokens) + rest)[rest > 0]
            total += len(pairs)
            if 4 * len(pairs) < len(first):
                return found[:0]
            found = np.union1d(found, pairs)
        return found if 4 * len(found) <= total else found[:0]

    @functools.cached_property
    def _kept(self) -> list[_Batch] | None:
        """All batches, if they are few."""
        return list(self._made()) if self._count <= _KEPT else None

    def _batches(self) -> Iterable[_Batch]:
        return self._made() if self._kept is None else self._kept

    def _runs(self, part: slice) -> tuple[Ints, Ints, Ints]:
        """`_runs` of these rows, cached if all runs are few."""
        found = self._found.get(part.start)
        if found is None:
            found = _runs(self.rows[part], len(self.tokens))
            if self._count <= _KEPT // 8:
                self._found[part.start] = found
        return found

    def _parts(self) -> Iterator[slice]:
        return _slices(len(self.tokens), 8 * self.rows.shape[1])

    def _made(self) -> Iterator[_Batch]:
        """Batches of rows with similar numbers of windows."""
        for part in self._parts():
            counts, windows = _cover(*self._runs(part), len(self.tokens), self._shared)
            starts = counts.cumsum() - counts
            order = np.argsort(-counts, kind="stable")
            while len(order):
                rows, most = order[:_TOGETHER], counts[order[0]]
                rows = rows[2 * counts[rows] >= most]
                places = np.minimum(np.arange(most)[:, None], counts[rows] - 1)
                yield _Batch(rows + part.start, windows[starts[rows] + places])
                order = order[len(rows) :]

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


def _union(table: Words, windows: NDArray[np.int32]) -> Words:
    """The bitwise or of some rows of a table for each token: `(c, k)` -> `(k, words)`."""
    step = max(1, _AT_ONCE // (windows.shape[1] * table.shape[1]))
    found = np.zeros((windows.shape[1], table.shape[1]), np.uint64)
    for start in range(0, len(windows), step):
        rows = np.take(table, windows[start : start + step], axis=0, mode="clip")
        for row in rows:
            found |= row
    return found


def _windows(seen: Words, lengths: int, shared: Ints) -> Words:
    """Unions of the shared pairs of windows, then those of 2^k rows from each row, k < lengths.

    Windows that end beyond the last row are undefined.
    """
    n, words = seen.shape
    table = np.empty((len(shared) + lengths * n, words), np.uint64)
    levels = table[len(shared) :].reshape(lengths, n, words)
    levels[0] = seen
    for k in range(1, lengths):
        half, count = 1 << (k - 1), max(0, n + 1 - (1 << k))
        np.bitwise_or(levels[k - 1, :count], levels[k - 1, half:][:count], out=levels[k, :count])
    first, rest = np.divmod(shared, n)
    for part in _slices(len(shared), 64 * words):
        pairs = np.take(table, len(shared) + first[part], axis=0)
        pairs |= np.take(table, len(shared) + (first + rest)[part], axis=0)
        table[part] = pairs
    return table


def _ends(rows: Bytes) -> tuple[Words, Words]:
    """The first and the last bit of each run of ones."""
    words = _as_words(rows)
    one, rest = np.uint64(1), np.uint64(63)
    before, after = words << one, words >> one
    before[:, 1:] |= words[:, :-1] >> rest
    after[:, :-1] |= words[:, 1:] << rest
    return words & ~before, words & ~after


def _count_windows(rows: Bytes) -> int:
    """Upper bound of the number of windows that cover all runs: one for a single bit, else two."""
    count = 0
    for part in _slices(len(rows), 8 * rows.shape[1]):
        first, last = _ends(rows[part])
        count += 2 * int(np.bitwise_count(first).sum()) - int(np.bitwise_count(first & last).sum())
    return count


def _cover(
    runs: Ints, first: Ints, rest: Ints, tokens: int, shared: Ints
) -> tuple[Ints, NDArray[np.int32]]:
    """Windows that cover the runs of each row: their numbers `(rows,)`, and rows of `_windows`.

    Windows of a row lie side by side, long ones first. Each row has at least one run.
    """
    windows = first + len(shared)
    if len(shared):
        pair = rest > 0
        windows[pair] = np.searchsorted(shared, (first * tokens + rest)[pair])
        rest = np.where(pair, 0, rest)
    number = 1 + (rest > 0)
    run = np.repeat(np.arange(len(first)), number)
    second = np.diff(run, prepend=-1) == 0
    windows = windows[run] + second * rest[run]
    return np.add.reduceat(number, runs.cumsum() - runs), windows.astype(np.int32)


def _runs(rows: Bytes, tokens: int) -> tuple[Ints, Ints, Ints]:
    """Numbers of runs of ones `(rows,)`; of each run, long ones of a row first, its windows.

    Windows: level x tokens + first token of the longest window of 2^level tokens at its begin, and
    how much later another one begins that covers the rest, or 0.
    """
    first, last = _ends(rows)
    starts, stops = (
        np.flatnonzero(np.unpackbits(x.view(np.uint8), axis=1, bitorder="little").view(np.bool_))
        for x in (first, last)
    )
    runs = np.bitwise_count(first).sum(1, dtype=np.int64)
    row = np.repeat(np.arange(len(rows)), runs)
    lengths = stops - starts + 1
    starts -= row * (64 * first.shape[1])
    levels = np.frexp(lengths.astype(np.float32))[1] - 1  # largest 2^k in each run
    key = 32 * row + 31 - levels  # rows first, then long runs
    order = np.argsort(key.astype(np.min_scalar_type(32 * len(rows))), kind="stable")
    starts, lengths, levels = starts[order], lengths[order], levels[order]
    return runs, levels * tokens + starts, lengths - (1 << levels)


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
    columns = np.zeros((8 * rows.shape[1], 8 * _words(len(rows))), np.uint8)
    for part in _slices(-(-len(rows) // 8), 8 * rows.shape[1]):
        some = rows[8 * part.start : 8 * part.stop]
        squares = np.pad(some, ((0, -len(some) % 8), (0, 0))).reshape(-1, 8, rows.shape[1])
        x = np.ascontiguousarray(squares.transpose(0, 2, 1)).view(np.uint64)
        for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0xCCCC0000CCCC), (28, 0xF0F0F0F0)):
            t = (x ^ (x >> np.uint64(shift))) & np.uint64(mask)
            x ^= t ^ (t << np.uint64(shift))
        columns[:, part] = x.view(np.uint8).transpose(1, 2, 0).reshape(len(columns), -1)
    return columns


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
