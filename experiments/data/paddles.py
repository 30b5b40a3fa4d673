"""The geometry of Pathfinder images: two long dashed curves, short ones, and two markers.

After Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent units
(2018), whose images Long Range Arena uses. A curve is a chain of paddles: line segments of length L
with gaps of 2 m between them. Compiled by numba; an image depends only on its seed.

Curves are drawn by rejection sampling. On a canvas of 128 pixels, two curves of 14 paddles of 5
pixels with a margin of 3 take some 4,000 attempts, so an attempt must be cheap. Tables by direction
hold the pixels of a paddle and the possible next directions. A failed attempt clears its own
pixels, not the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

FIELDS = 4  # of a paddle, in pixels: row and column of its pivot, and of its head relative to it
_TRIES = 3  # attempts per paddle, before its curve is abandoned
_ATTEMPTS = 1000  # attempts per short curve, before its image restarts
_RESTARTS = 300_000  # restarts of an image, about a second, before an error
_COVERED = 1.8  # sum of two coverages from which paddles overlap


@dataclass(frozen=True)
class Drawing:
    """How images are drawn; lengths are in pixels."""

    paddle: int
    margins: tuple[int, ...]  # one is sampled per image
    thickness: float
    marker: float  # radius
    seed_distance: float  # distance between the first ends of the two long curves
    padding: int  # empty border
    continuity: float  # larger values give straighter curves
    distractors: int  # four times the number of short curves
    contrast: float  # contrast of paddles; markers have 1


DRAWINGS = {
    32: Drawing(2, (1,), 0.5, 1.5, 7, 1, 1.0, 20, 0.75),
    64: Drawing(5, (1,), 1.0, 2.5, 12, 1, 1.8, 22, 0.8),
    128: Drawing(5, (2, 3), 1.5, 3.0, 20, 1, 1.8, 35, 0.9),
    256: Drawing(5, (3,), 2.0, 5.0, 27, 22, 1.8, 30, 1.0),
}
"""By the size of published images."""

# Seed distance and distractors on canvases with the geometry of another size.
_CANVASES = {32: (7.0, 4), 64: (14.0, 8), 128: (20.0, 20), 256: (27.0, 30), 512: (38.0, 40)}
SIZES = tuple(_CANVASES)

DISTANCES = 46  # distance bins for balancing markers: 32nds of the width
SECTORS = 16  # direction bins for balancing markers


def drawing(size: int, geometry: int | None = None) -> Drawing:
    """Drawing parameters of a canvas of `size` pixels with the geometry of another size.

    Paddles, margins, thickness, markers, continuity and contrast come from `geometry`. The seed
    distance and the number of distractors are scaled to the canvas, and the empty border is one
    pixel.

    Raises:
        ValueError: The geometry is unknown, or the size has no published geometry.

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
        raise ValueError(f"a canvas must have {SIZES} pixels per side, got {size}")
    distance, distractors = _CANVASES[size]
    return replace(DRAWINGS[own], seed_distance=distance, distractors=distractors, padding=1)


def number_of_paddles(size: int, contour: int, geometry: int | None = None) -> int:
    """Paddles of an image: two curves of `contour` paddles, and short ones of a third of it."""
    return 2 * contour + drawing(size, geometry).distractors // 4 * (contour // 3)


def curves(
    size: int, contour: int, seeds: NDArray[np.int64], geometry: int | None = None
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """The curves of the images with these seeds.

    Args:
        size: Pixels per side of the canvas.
        contour: Paddles per long curve.
        seeds: One seed per image, (n,).
        geometry: Size of the published images whose paddles are drawn; None: `size`.

    Returns:
        paddles int16 (n, paddles, FIELDS); ends float32 (n, 2, 2, 2): row and
        column of the first and last end of the two long curves.

    Raises:
        ValueError: Curves of this length do not fit on the canvas.
    """
    d = drawing(size, geometry)
    paddles = np.zeros((len(seeds), number_of_paddles(size, contour, geometry), FIELDS), np.int16)
    ends = np.zeros((len(seeds), 2, 2, 2), np.float32)
    tables = tuple(_tables(d.paddle, m, d.thickness, d.continuity, size) for m in d.margins)
    tips = tuple(m / (d.paddle + m) for m in d.margins)
    numbers = (size, contour, d.seed_distance, d.padding, d.distractors // 4)
    if not _images(seeds, tables, tips, paddles, ends, *numbers):
        raise ValueError(
            f"two curves of {contour} paddles do not fit on {size} x {size} pixels with the "
            f"geometry of {geometry or size}-pixel images ({_RESTARTS:,} attempts failed): "
            "choose a smaller contour, a larger size or the geometry of smaller images"
        )
    return paddles, ends


def mark(
    ends: NDArray[np.float32], size: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Choose the ends to mark: the first end of a curve, and its own or the other curve's last end.

    The ends of one curve have another distribution than the ends of two curves. With random labels,
    the positions, distance and direction of the markers would predict the label better than chance.
    Here each pair of positions, each distance and each direction has both labels about equally
    often.

    Returns:
        markers float32 (n, 2, 2); labels int64 (n,): 1 if one curve joins the markers, 0 if not, -1
        for images to discard, whose markers would predict either label.
    """
    markers = np.zeros((len(ends), 2, 2), np.float32)
    labels = np.zeros(len(ends), np.int64)
    _mark(ends, size, seed, markers, labels)
    return markers, labels


@numba.njit(cache=True, nogil=True)
def _place(one, two, size):  # type: ignore[no-untyped-def]
    """The bin of two positions: their cells in an 8 x 8 grid, and their distance.

    Equal for rotations, reflections and exchanged markers, which are equally likely.
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
    # Excess of ones over zeros: per bin of positions, and per distance and per direction, so that
    # small excesses do not add up. Pivots are rounded up, which shifts short curves to one corner.
    excess, together = np.zeros(64 * 64 * DISTANCES, np.int64), np.zeros(DISTANCES, np.int64)
    directions = np.zeros(SECTORS, np.int64)
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
            turn = np.arctan2(one[0] - two[0], one[1] - two[1]) / (2 * np.pi) + 0.5
            sector = int(turn * SECTORS) % SECTORS
            balanced = abs(excess[place] + change) <= 1 and abs(together[distance] + change) <= 4
            if balanced and abs(directions[sector] + change) <= 4:
                excess[place] += change
                together[distance] += change
                directions[sector] += change
                markers[i, 0], markers[i, 1], labels[i] = one, two, label
                break


class _Tables(NamedTuple):
    """Tables over k paddle directions; lengths in pixels."""

    steps: NDArray[np.int32]
    """(k, 2) head from pivot, the integer offsets at length + margin; row and column."""
    ahead: NDArray[np.float64]
    """(k, 2) offset of the next paddle's pivot, before it is rounded up."""
    follow: NDArray[np.int32]
    """(k, most) possible next directions."""
    weights: NDArray[np.float64]
    """(k, most) probabilities of the next directions."""
    follows: NDArray[np.int64]
    """(k,) how many they are."""
    pixels: NDArray[np.int64]
    """(k, most) covered pixels, as offsets from the pivot in the flat mask."""
    covers: NDArray[np.float64]
    """(k, most) covered fraction of each pixel, 0..1."""
    cores: NDArray[np.int64]
    """(k,) how many they are."""
    spans: NDArray[np.int32]
    """(k, rows, 2) first column covered by the dilated paddle in each row, and the end, as columns
    of `coverage`."""
    coverage: NDArray[np.float32]
    """(k, rows, rows) covered fraction of each pixel, 0..1, centered on the pivot."""


@cache
def _tables(length: int, margin: int, thickness: float, continuity: float, size: int) -> _Tables:
    """The tables of one paddle on one canvas."""
    radius, half = length + margin, thickness / 2 + margin
    around = range(-radius, radius + 1)
    steps = np.array(
        [(y, x) for y in around for x in around if round(np.sqrt(y * y + x * x)) == radius]
    )
    angles = np.arctan2(steps[:, 0].astype(float), steps[:, 1].astype(float))
    turns = abs((angles[None] - angles[:, None] + np.pi) % (2 * np.pi) - np.pi)
    straight = np.maximum(np.cos(np.minimum(continuity * turns, np.pi / 2)), 0.0) ** 2
    follow, follows = _ragged([np.flatnonzero(row > 1e-30) for row in straight])
    reach = np.sqrt(steps[:, 0].astype(float) ** 2 + steps[:, 1].astype(float) ** 2)
    ahead = ((length + 2 * margin) / reach)[:, None] * steps
    extent = radius + int(half) + 1
    wide = np.arange(-extent, extent + 1)
    y, x = np.meshgrid(wide, wide, indexing="ij")
    tip = margin / radius
    shapes = np.stack([_coverage(step, y, x, tip, half) for step in steps])
    inner = [shape >= _COVERED - 1 - 1e-6 for shape in shapes]  # a mask is at most 1
    stride = size + 2 * extent
    pixels, cores = _ragged([stride * y[some] + x[some] for some in inner])
    covers, _ = _ragged([shape[some] for shape, some in zip(shapes, inner, strict=True)])
    covered = shapes > 0
    first, last = covered.argmax(2), len(wide) - covered[:, :, ::-1].argmax(2)
    spans = np.stack([first, np.where(covered.any(2), last, 0)], 2).astype(np.int32)
    return _Tables(
        steps=steps.astype(np.int32),
        ahead=ahead,
        follow=follow.astype(np.int32),
        weights=np.take_along_axis(straight, follow, 1),
        follows=follows,
        pixels=pixels,
        covers=covers,
        cores=cores,
        spans=spans,
        coverage=shapes.astype(np.float32),
    )


def _ragged(rows: list[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows of different lengths as one array, padded with zeros, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    array = np.zeros((len(rows), lengths.max()), rows[0].dtype)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values
    return array, lengths


def _coverage(step, y, x, tip, half):  # type: ignore[no-untyped-def]
    """Covered fraction of each pixel, 0..1, for a dilated paddle from pivot (0, 0)."""
    ay, ax = tip * step[0], tip * step[1]
    dy, dx = (1 - tip) * step[0], (1 - tip) * step[1]
    t = (((y - ay) * dy + (x - ax) * dx) / (dy * dy + dx * dx)).clip(0.0, 1.0)
    distance = np.sqrt((y - ay - t * dy) ** 2 + (x - ax - t * dx) ** 2)
    return (half + 0.5 - distance).clip(0.0, 1.0)


@numba.njit(cache=True, nogil=True)
def _images(seeds, tables, tips, paddles, ends, size, contour, distance, padding, shorts):  # type: ignore[no-untyped-def]
    """Fill in paddles and ends of all images; False if one cannot be drawn.

    tables, tips: One per margin; a tip is the first end, as a fraction of pivot to head.
    """
    directions = np.zeros(paddles.shape[1], np.int32)  # scratch, one entry per paddle
    numbers = (size, contour, distance, padding, shorts)
    for i in range(len(seeds)):
        np.random.seed(seeds[i])
        margin = np.random.randint(len(tables))
        if not _image(tables[margin], directions, paddles[i], ends[i], tips[margin], *numbers):
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _image(  # type: ignore[no-untyped-def]
    tables, directions, paddles, ends, tip, size, contour, distance, padding, shorts
):  # fmt: skip
    """Fill in paddles and ends; False if no attempt succeeds."""
    stride, done, more = size + tables.coverage.shape[1] - 1, False, contour // 3
    mask = np.zeros(stride * stride, np.float32)  # coverage so far, with an empty border
    for _ in range(_RESTARTS):
        done = _long_curves(tables, mask, directions, paddles, size, contour, distance, padding)
        for short in range(shorts if done else 0):
            first, done = 2 * contour + short * more, False
            for _ in range(_ATTEMPTS):
                done = _short_curve(
                    tables, mask, directions, paddles, size, first, first + more, padding
                )
                if done:
                    break
            if not done:
                mask[:] = 0
                break
        if done:
            break
    for curve in range(2):
        first, last = curve * contour, (curve + 1) * contour - 1
        for axis in range(2):
            ends[curve, 0, axis] = paddles[first, axis] + paddles[first, 2 + axis] * tip
            ends[curve, 1, axis] = paddles[last, axis] + paddles[last, 2 + axis]
    return done


@numba.njit(cache=True, nogil=True)
def _long_curves(tables, mask, directions, paddles, size, contour, distance, padding):  # type: ignore[no-untyped-def]
    """Both long curves, one paddle of each in turn; False, and an empty mask, on failure."""
    border = min(0.4 * size, padding + 2 * distance)
    y, x = (
        np.random.uniform(border, size - 1 - border),
        np.random.uniform(border, size - 1 - border),
    )
    if not _seed(tables, mask, directions, paddles, size, 0, padding, y, x):
        return False
    turn = np.random.uniform(0, 2 * np.pi)
    y, x = y + distance * np.sin(turn), x + distance * np.cos(turn)
    if not _seed(tables, mask, directions, paddles, size, contour, padding, y, x):
        return False
    for i in range(1, contour):
        for snake in range(2):
            if not _extend(tables, mask, directions, paddles, size, snake * contour + i, padding):
                for stamped in range(i - 1 + (snake == 1)):
                    _clear(tables, mask, directions, paddles, size, stamped)
                for stamped in range(contour, contour + i - 1):
                    _clear(tables, mask, directions, paddles, size, stamped)
                return False
            _stamp(tables, mask, directions, paddles, size, snake * contour + i - 1)
    for snake in range(2):
        _stamp(tables, mask, directions, paddles, size, (snake + 1) * contour - 1)
    return True


@numba.njit(cache=True, nogil=True)
def _short_curve(tables, mask, directions, paddles, size, first, end, padding):  # type: ignore[no-untyped-def]
    """A curve anywhere; a failure leaves the mask unchanged."""
    y, x = (
        np.random.uniform(padding, size - 1 - padding),
        np.random.uniform(padding, size - 1 - padding),
    )
    if mask[_pixel(tables, size, int(y), int(x))] > 0.5:
        return False
    if not _seed(tables, mask, directions, paddles, size, first, padding, y, x):
        return False
    before = mask.copy()
    for i in range(first + 1, end):
        if not _extend(tables, mask, directions, paddles, size, i, padding):
            mask[:] = before
            return False
        _stamp(tables, mask, directions, paddles, size, i - 1)
    _stamp(tables, mask, directions, paddles, size, end - 1)
    return True


@numba.njit(cache=True, nogil=True, inline="always")
def _pixel(tables, size, y, x):  # type: ignore[no-untyped-def]
    """Index of a pixel in the flat mask, whose border is as wide as the reach of a paddle.

    Unsigned: numba checks signed indices for negative values, which costs time in each loop.
    """
    rows = tables.coverage.shape[1]
    return np.uint64((y + rows // 2) * (size + rows - 1) + x + rows // 2)


@numba.njit(cache=True, nogil=True, inline="always")
def _seed(tables, mask, directions, paddles, size, i, padding, y, x):  # type: ignore[no-untyped-def]
    """A curve's first paddle, in any direction."""
    k, low, high = np.random.randint(len(tables.steps)), padding, size - 1 - padding
    top, left = round(y), round(x)
    down, right = tables.steps[k, 0], tables.steps[k, 1]
    directions[i] = k
    paddles[i, 0], paddles[i, 1], paddles[i, 2], paddles[i, 3] = top, left, down, right
    if not (low <= top <= high and low <= left <= high):
        return False
    if not (low <= top + down <= high and low <= left + right <= high):
        return False
    return not _overlaps(tables, mask, k, _pixel(tables, size, top, left))


@numba.njit(cache=True, nogil=True, inline="always")
def _extend(tables, mask, directions, paddles, size, i, padding):  # type: ignore[no-untyped-def]
    """Paddle i of a curve; its predecessor is not in the mask yet."""
    low, high, before = padding, size - 1 - padding, directions[i - 1]
    y = int(np.ceil(paddles[i - 1, 0] + tables.ahead[before, 0]))
    x = int(np.ceil(paddles[i - 1, 1] + tables.ahead[before, 1]))
    if not (low <= y <= high and low <= x <= high):
        return False
    total, number = 0.0, tables.follows[before]
    sums = np.empty(number)
    for j in range(number):
        k = tables.follow[before, j]
        row, column = y + tables.steps[k, 0], x + tables.steps[k, 1]
        if low <= row <= high and low <= column <= high:
            empty = 1 - mask[_pixel(tables, size, row, column)]
            total += empty * tables.weights[before, j]
        sums[j] = total
    if total < 1e-9:
        return False
    for _ in range(_TRIES):
        goal, j = np.random.random() * total, 0
        while sums[j] <= goal and j < number - 1:
            j += 1
        k = tables.follow[before, j]
        if not _overlaps(tables, mask, k, _pixel(tables, size, y, x)):
            directions[i], paddles[i, 0], paddles[i, 1] = k, y, x
            paddles[i, 2], paddles[i, 3] = tables.steps[k, 0], tables.steps[k, 1]
            return True
    return False


@numba.njit(cache=True, nogil=True, inline="always")
def _overlaps(tables, mask, k, pivot):  # type: ignore[no-untyped-def]
    """Whether the dilated paddle in direction k overlaps the mask; pivot: its index."""
    meets = False
    for j in range(tables.cores[k]):  # an early exit would take more time
        pixel = np.uint64(np.int64(pivot) + tables.pixels[k, j])
        meets |= mask[pixel] + tables.covers[k, j] >= _COVERED
    return meets


@numba.njit(cache=True, nogil=True, inline="always")
def _stamp(tables, mask, directions, paddles, size, i):  # type: ignore[no-untyped-def]
    """Add paddle i, dilated, to the mask."""
    rows, k = tables.coverage.shape[1], directions[i]
    top, left = paddles[i, 0] - rows // 2, paddles[i, 1] - rows // 2
    for row in range(max(0, -top), min(rows, size - top)):
        start, end = tables.spans[k, row, 0], tables.spans[k, row, 1]
        corner = _pixel(tables, size, top + row, left)
        for column in range(max(start, -left), min(end, size - left)):
            pixel, new = corner + np.uint64(column), tables.coverage[k, row, column]
            mask[pixel] = max(mask[pixel], new)


@numba.njit(cache=True, nogil=True, inline="always")
def _clear(tables, mask, directions, paddles, size, i):  # type: ignore[no-untyped-def]
    """Remove paddle i, dilated, from the mask."""
    rows, k = tables.spans.shape[1], directions[i]
    top, left = paddles[i, 0] - rows // 2, paddles[i, 1] - rows // 2
    for row in range(max(0, -top), min(rows, size - top)):
        start, end = tables.spans[k, row, 0], tables.spans[k, row, 1]
        corner = _pixel(tables, size, top + row, left)
        for column in range(max(start, -left), min(end, size - left)):
            mask[corner + np.uint64(column)] = 0
