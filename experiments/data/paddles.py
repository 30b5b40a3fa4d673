"""The geometry of Pathfinder images: two long dashed curves, short ones, and two markers.

After Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent units
(2018), whose images Long Range Arena took over. A curve is a chain of paddles, line segments of
length L with gaps of 2 m between them. Compiled by numba; an image depends on its seed alone.

Two long curves that must both fit are drawn by trial and error: on a canvas of 128 pixels, 14 paddles
of 5 pixels with a margin of 3 take some 4,000 attempts. So an attempt must be cheap: all that depends
on a paddle's direction alone (the pixels it covers, the directions that may follow) is tabulated, and
a failed attempt takes back its own pixels instead of clearing the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

FIELDS = 4  # of a paddle, in pixels: row and column of its pivot, and of its head from there
_TRIES = 3  # for a paddle, before its curve is given up
_ATTEMPTS = 1000  # for a short curve, before its image is begun anew
_RESTARTS = 1_000_000  # of an image, before it is given up: tens of seconds
_COVERED = 1.8  # coverage of two paddles together from which they overlap


@dataclass(frozen=True)
class Drawing:
    """How images are drawn; lengths are in pixels."""

    paddle: int
    margins: tuple[int, ...]  # one is drawn for each image
    thickness: float
    marker: float  # radius
    seed_distance: float  # between the first ends of the two long curves
    padding: int  # that stays free at the border
    continuity: float  # the larger, the straighter
    distractors: int  # four times the number of short curves
    contrast: float  # of paddles; markers have 1


DRAWINGS = {
    32: Drawing(2, (1,), 0.5, 1.5, 7, 1, 1.0, 20, 0.75),
    64: Drawing(5, (1,), 1.0, 2.5, 12, 1, 1.8, 22, 0.8),
    128: Drawing(5, (2, 3), 1.5, 3.0, 20, 1, 1.8, 35, 0.9),
    256: Drawing(5, (3,), 2.0, 5.0, 27, 22, 1.8, 30, 1.0),
}
"""By the size of published images."""

# Seed distance and distractors on canvases that borrow the geometry of another size.
_CANVASES = {32: (7.0, 4), 64: (14.0, 8), 128: (20.0, 20), 256: (27.0, 30), 512: (38.0, 40)}
SIZES = tuple(_CANVASES)

DISTANCES = 46  # that are told apart where markers are placed: 32nds of the width


def drawing(size: int, geometry: int | None = None) -> Drawing:
    """How a canvas of `size` pixels is drawn with the geometry of another size.

    Paddles, margins, thickness, markers, continuity and contrast are those of `geometry`; the seed
    distance and the number of distractors are scaled to the canvas, and only one pixel stays free
    at the border.

    Raises:
        ValueError: The geometry is unknown, or the size has none of its own.

    >>> drawing(256) == drawing(256, 256) == DRAWINGS[256]
    True
    >>> drawing(64, 256).margins, drawing(64, 256).seed_distance, drawing(64, 256).distractors
    ((3,), 14.0, 8)
    """
    own = size if geometry is None else geometry
    if own not in DRAWINGS:
        raise ValueError(
            f"no geometry is known for {own} pixels: choose one of {tuple(DRAWINGS)} with geometry"
        )
    if own == size:
        return DRAWINGS[size]
    if size not in _CANVASES:
        raise ValueError(f"a canvas must have {SIZES} pixels a side, got {size}")
    distance, distractors = _CANVASES[size]
    return replace(DRAWINGS[own], seed_distance=distance, distractors=distractors, padding=1)


def number_of_paddles(size: int, contour: int, geometry: int | None = None) -> int:
    """Of an image: two curves of `contour` paddles, and short ones of a third of it."""
    return 2 * contour + drawing(size, geometry).distractors // 4 * (contour // 3)


def curves(
    size: int, contour: int, seeds: NDArray[np.int64], geometry: int | None = None
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """The curves of the images with these seeds.

    Args:
        size: Pixels a side of the canvas.
        contour: Paddles of a long curve.
        seeds: One an image, (n,).
        geometry: Size of the published images whose paddles are drawn; None: `size`.

    Returns:
        paddles int16 (n, paddles, FIELDS); ends float32 (n, 2, 2, 2): of each of the two long
        curves the first and the last end, row and column.

    Raises:
        ValueError: Such long curves do not fit on the canvas.
    """
    d = drawing(size, geometry)
    paddles = np.zeros((len(seeds), number_of_paddles(size, contour, geometry), FIELDS), np.int16)
    ends = np.zeros((len(seeds), 2, 2, 2), np.float32)
    tables = tuple(_tables(d.paddle, m, d.thickness, d.continuity) for m in d.margins)
    mask = np.zeros(size * size, np.float32)
    most = paddles.shape[1] * max(t.rows.shape[1] for t in tables)
    log = _Log(np.zeros(most, np.int32), np.zeros(most, np.float32))
    steps = np.zeros(paddles.shape[1], np.int64)
    numbers = (size, contour, d.seed_distance, d.padding, d.distractors // 4)
    for i, seed in enumerate(seeds):
        margin = _begin(seed, len(tables))
        if not _image(tables[margin], mask, log, steps, *numbers, paddles[i], ends[i]):
            raise ValueError(
                f"two curves of {contour} paddles do not fit on {size} x {size} pixels with the "
                f"geometry of {geometry or size}-pixel images ({_RESTARTS:,} attempts failed): "
                "choose a smaller contour, a larger size or the geometry of smaller images"
            )
    return paddles, ends


def mark(
    ends: NDArray[np.float32], size: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Which ends to mark: one curve's first, and its own last one or the other curve's.

    Where the ends of one curve lie is not where those of two do: labels drawn at random could be
    guessed, better than by chance, from the places of the markers and from their distance. Here, of
    each pair of places and each distance, there are about as many of both labels.

    Returns:
        markers float32 (n, 2, 2); labels int64 (n,): 1 where one curve joins the markers, -1 where
        either label would make its markers tell something: leave that image out.
    """
    markers = np.zeros((len(ends), 2, 2), np.float32)
    labels = np.zeros(len(ends), np.int64)
    _mark(ends, size, seed, markers, labels)
    return markers, labels


@numba.njit(cache=True, nogil=True)
def _place(one, two, size):  # type: ignore[no-untyped-def]
    """The number of two places: their cells in an 8 x 8 grid, and their distance.

    The same for what is turned, mirrored or exchanged, which images are as likely.
    """
    r, c = min(7, int(one[0] * 8 / size)), min(7, int(one[1] * 8 / size))
    q, d = min(7, int(two[0] * 8 / size)), min(7, int(two[1] * 8 / size))
    cells = 64 * 64
    for turn in range(8):
        if turn == 4:
            r, c, q, d = c, r, d, q
        if turn % 2:
            r, q = 7 - r, 7 - q
        else:
            c, d = 7 - c, 7 - d
        a, b = 8 * r + c, 8 * q + d
        cells = min(cells, 64 * a + b, 64 * b + a)
    distance = np.sqrt((one[0] - two[0]) ** 2 + (one[1] - two[1]) ** 2)
    return cells * DISTANCES + int(distance * 32 / size)


@numba.njit(cache=True, nogil=True)
def _mark(ends, size, seed, markers, labels):  # type: ignore[no-untyped-def]
    np.random.seed(seed)
    # How many more ones than zeros: by place, and by distance alone, lest small excesses add up.
    excess, together = np.zeros(64 * 64 * DISTANCES, np.int64), np.zeros(DISTANCES, np.int64)
    for i in range(len(ends)):
        labels[i] = -1
        start = np.random.randint(4)
        for option in range(start, start + 4):  # both labels, of both curves
            label, first = option % 2, option // 2 % 2
            last = first if label == 1 else 1 - first
            one, two = ends[i, first, 0], ends[i, last, 1]
            place = _place(one, two, size)
            change = 1 if label == 1 else -1
            distance = place % DISTANCES
            if abs(excess[place] + change) <= 1 and abs(together[distance] + change) <= 4:
                excess[place] += change
                together[distance] += change
                markers[i, 0], markers[i, 1], labels[i] = one, two, label
                break


class _Tables(NamedTuple):
    """What depends on a paddle's direction alone; k directions, lengths in pixels.

    - `steps` (k, 2) head from pivot, the integer offsets at length + margin; row and column
    - `ahead` (k, 2) next paddle's pivot from this one's, before it is rounded up
    - `follow` (k, most) directions that may follow, `weights` (k, most) how likely, `follows` (k,)
      how many they are
    - `rows`, `columns`, `coverage` (k, most) pixels of the dilated paddle and how much of each it
      covers, 0..1; the first `cores[k]` can overlap with another paddle, and `sprites[k]` are all
    - `half` half of the dilated paddle's width, `tip` the first end from the pivot, as a part of
      the way to the head
    """

    steps: NDArray[np.int64]
    ahead: NDArray[np.float64]
    follow: NDArray[np.int64]
    weights: NDArray[np.float64]
    follows: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    coverage: NDArray[np.float64]
    cores: NDArray[np.int64]
    sprites: NDArray[np.int64]
    half: float
    tip: float


class _Log(NamedTuple):
    """Which pixels of the mask were changed, and what they were before."""

    pixels: NDArray[np.int32]
    values: NDArray[np.float32]


@cache
def _tables(length: int, margin: int, thickness: float, continuity: float) -> _Tables:
    """The tables of one paddle."""
    radius, half = length + margin, thickness / 2 + margin
    around = range(-radius, radius + 1)
    steps = np.array(
        [(y, x) for y in around for x in around if round(np.sqrt(y * y + x * x)) == radius]
    )
    angles = np.arctan2(steps[:, 0].astype(float), steps[:, 1].astype(float))
    turns = abs((angles[None] - angles[:, None] + np.pi) % (2 * np.pi) - np.pi)
    straight = np.maximum(np.cos(np.minimum(continuity * turns, np.pi / 2)), 0.0) ** 2
    follow, follows = _ragged([np.flatnonzero(row > 1e-30) for row in straight], np.int64)
    weights = np.take_along_axis(straight, follow, 1)
    reach = np.sqrt(steps[:, 0].astype(float) ** 2 + steps[:, 1].astype(float) ** 2)
    ahead = ((length + 2 * margin) / reach)[:, None] * steps
    tip = margin / (length + margin)
    wide = np.arange(-radius - int(half) - 2, radius + int(half) + 3)
    y, x = (grid.ravel() for grid in np.meshgrid(wide, wide, indexing="ij"))
    pixels, cores = [], []
    for step in steps:
        cover = _coverage(step, y, x, tip, half)
        core = cover >= _COVERED - 1 - 1e-6  # the rest meets nothing: a mask is at most 1
        order = np.concatenate([np.flatnonzero(core), np.flatnonzero(~core & (cover > 0))])
        pixels.append((y[order], x[order], cover[order]))
        cores.append(core.sum())
    rows, sprites = _ragged([p[0] for p in pixels], np.int64)
    columns, _ = _ragged([p[1] for p in pixels], np.int64)
    coverage, _ = _ragged([p[2] for p in pixels], np.float64)
    some = (rows, columns, coverage, np.array(cores), sprites)
    return _Tables(steps, ahead, follow, weights, follows, *some, half, tip)


def _ragged(rows, dtype):  # type: ignore[no-untyped-def]
    """Rows of different lengths as one array, filled up with zeros; and their lengths."""
    lengths = np.array([len(row) for row in rows])
    array = np.zeros((len(rows), lengths.max()), dtype)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array, lengths


def _coverage(step, y, x, tip, half):  # type: ignore[no-untyped-def]
    """How much of each pixel a dilated paddle from pivot (0, 0) covers, by its distance: 0..1."""
    ay, ax = tip * step[0], tip * step[1]
    dy, dx = (1 - tip) * step[0], (1 - tip) * step[1]
    t = (((y - ay) * dy + (x - ax) * dx) / (dy * dy + dx * dx)).clip(0.0, 1.0)
    distance = np.sqrt((y - ay - t * dy) ** 2 + (x - ax - t * dx) ** 2)
    return (half + 0.5 - distance).clip(0.0, 1.0)


@numba.njit(cache=True, nogil=True)
def _begin(seed, margins):  # type: ignore[no-untyped-def]
    """Seed the generator; which margin the image has."""
    np.random.seed(seed)
    return np.random.randint(margins)


@numba.njit(cache=True, nogil=True)
def _image(  # type: ignore[no-untyped-def]
    tables, mask, log, steps, size, contour, distance, padding, shorts, paddles, ends
):  # fmt: skip
    """Fill in paddles and ends; False where no attempt succeeds. The mask is left empty.

    mask: Coverage so far, flat (size^2,). steps: Scratch, the direction of each paddle.
    """
    used, done = 0, False
    for _ in range(_RESTARTS):
        used = _undo(mask, log, used, 0)
        used, done = _long_curves(
            tables, mask, log, used, steps, size, contour, distance, padding, paddles
        )
        first = 2 * contour
        for _ in range(shorts):
            if done:
                done = False
                last = first + contour // 3
                for _ in range(_ATTEMPTS):
                    some = (steps[first:last], size, padding, paddles[first:last])
                    used, done = _short_curve(tables, mask, log, used, *some)
                    if done:
                        break
                first = last
        if done:
            break
    _undo(mask, log, used, 0)
    for curve in range(2):
        p, q = paddles[curve * contour], paddles[curve * contour + contour - 1]
        for axis in range(2):
            ends[curve, 0, axis] = p[axis] + p[2 + axis] * tables.tip
            ends[curve, 1, axis] = q[axis] + q[2 + axis]
    return done


@numba.njit(cache=True, nogil=True)
def _long_curves(  # type: ignore[no-untyped-def]
    tables, mask, log, used, steps, size, contour, distance, padding, paddles
):  # fmt: skip
    """Both long curves, a paddle of each in turn; not done where there is no way on."""
    border = min(0.4 * size, padding + 2 * distance)
    y, x = (
        np.random.uniform(border, size - 1 - border),
        np.random.uniform(border, size - 1 - border),
    )
    if not _seed(tables, mask, steps, 0, size, padding, paddles, y, x):
        return used, False
    turn = np.random.uniform(0, 2 * np.pi)
    y, x = y + distance * np.sin(turn), x + distance * np.cos(turn)
    if not _seed(tables, mask, steps, contour, size, padding, paddles, y, x):
        return used, False
    for i in range(1, contour):
        for snake in range(2):
            new = snake * contour + i
            used, good = _extend(tables, mask, log, used, steps, new, size, padding, paddles)
            if not good:
                return used, False
    for snake in range(2):
        last = snake * contour + contour - 1
        used = _stamp(tables, mask, log, used, steps[last], size, paddles[last])
    return used, True


@numba.njit(cache=True, nogil=True)
def _short_curve(tables, mask, log, used, steps, size, padding, chain):  # type: ignore[no-untyped-def]
    """A curve anywhere; leaves the mask alone where it fails."""
    y, x = (
        np.random.uniform(padding, size - 1 - padding),
        np.random.uniform(padding, size - 1 - padding),
    )
    if mask[int(y) * size + int(x)] > 0.5:
        return used, False
    if not _seed(tables, mask, steps, 0, size, padding, chain, y, x):
        return used, False
    before = used
    for i in range(1, len(chain)):
        used, good = _extend(tables, mask, log, used, steps, i, size, padding, chain)
        if not good:
            return _undo(mask, log, used, before), False
    return _stamp(tables, mask, log, used, steps[len(chain) - 1], size, chain[-1]), True


@numba.njit(cache=True, nogil=True)
def _seed(tables, mask, steps, i, size, padding, paddles, y, x):  # type: ignore[no-untyped-def]
    """A curve's first paddle, in any direction."""
    k = np.random.randint(len(tables.steps))
    steps[i], paddle = k, paddles[i]
    paddle[0], paddle[1] = round(y), round(x)
    paddle[2], paddle[3] = tables.steps[k, 0], tables.steps[k, 1]
    low, high = padding, size - 1 - padding
    y, x = paddle[0] + paddle[2], paddle[1] + paddle[3]
    pivot = low <= paddle[0] <= high and low <= paddle[1] <= high
    if not (pivot and low <= y <= high and low <= x <= high):
        return False
    return not _overlaps(tables, mask, k, size, paddle[0], paddle[1])


@numba.njit(cache=True, nogil=True)
def _extend(tables, mask, log, used, steps, i, size, padding, paddles):  # type: ignore[no-untyped-def]
    """Paddle i of a curve; the mask grows by the one before it."""
    last, before = paddles[i - 1], steps[i - 1]
    y = int(np.ceil(last[0] + tables.ahead[before, 0]))
    x = int(np.ceil(last[1] + tables.ahead[before, 1]))
    low, high = padding, size - 1 - padding
    if not (low <= y <= high and low <= x <= high):
        return used, False
    number, total = tables.follows[before], 0.0
    sums = np.empty(64)
    for j in range(number):
        k = tables.follow[before, j]
        head, side = y + tables.steps[k, 0], x + tables.steps[k, 1]
        if low <= head <= high and low <= side <= high:
            total += (1 - mask[head * size + side]) * tables.weights[before, j]
        sums[j] = total
    if total < 1e-9:
        return used, False
    for _ in range(_TRIES):
        goal, j = np.random.random() * total, 0
        while j < number - 1 and sums[j] <= goal:
            j += 1
        k = tables.follow[before, j]
        if not _overlaps(tables, mask, k, size, y, x):
            steps[i], paddle = k, paddles[i]
            paddle[0], paddle[1] = y, x
            paddle[2], paddle[3] = tables.steps[k, 0], tables.steps[k, 1]
            return _stamp(tables, mask, log, used, before, size, last), True
    return used, False


@numba.njit(cache=True, nogil=True)
def _overlaps(tables, mask, k, size, y, x):  # type: ignore[no-untyped-def]
    """Whether the dilated paddle in direction k from (y, x) meets what is there."""
    for j in range(tables.cores[k]):
        row, column = y + tables.rows[k, j], x + tables.columns[k, j]
        if 0 <= row < size and 0 <= column < size:
            if mask[row * size + column] + tables.coverage[k, j] >= _COVERED:
                return True
    return False


@numba.njit(cache=True, nogil=True)
def _stamp(tables, mask, log, used, k, size, paddle):  # type: ignore[no-untyped-def]
    """Add the dilated paddle to the mask; how many entries of the log are used then."""
    for j in range(tables.sprites[k]):
        row, column = paddle[0] + tables.rows[k, j], paddle[1] + tables.columns[k, j]
        if 0 <= row < size and 0 <= column < size:
            pixel = row * size + column
            if tables.coverage[k, j] > mask[pixel]:
                log.pixels[used], log.values[used] = pixel, mask[pixel]
                used += 1
                mask[pixel] = tables.coverage[k, j]
    return used


@numba.njit(cache=True, nogil=True)
def _undo(mask, log, used, before):  # type: ignore[no-untyped-def]
    """Take back what was stamped since `before` entries of the log were used; returns `before`."""
    for i in range(used - 1, before - 1, -1):
        mask[log.pixels[i]] = log.values[i]
    return before
