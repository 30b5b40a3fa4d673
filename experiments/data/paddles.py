"""The geometry of Pathfinder images: two long dashed curves, short ones, and two markers.

After Linsley et al., Learning long-range spatial dependencies with horizontal gated recurrent units
(2018), whose images Long Range Arena took over. A curve is a chain of paddles, line segments of
length L with gaps of 2 m between them. Compiled by numba; an image depends on its seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

FIELDS = 4  # of a paddle, in pixels: row and column of its pivot, and of its head from there
_TRIES = 3  # for a paddle, before its curve is given up
_ATTEMPTS = 1000  # for a short curve, before its image is begun anew


@dataclass(frozen=True)
class Drawing:
    """How images of one size are drawn; lengths are in pixels."""

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


DISTANCES = 46  # that are told apart where markers are placed: 32nds of the width


def number_of_paddles(size: int, contour: int) -> int:
    """Of an image: two curves of `contour` paddles, and short ones of a third of it."""
    return 2 * contour + DRAWINGS[size].distractors // 4 * (contour // 3)


def curves(
    size: int, contour: int, seeds: NDArray[np.int64]
) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """The curves of the images with these seeds.

    Returns:
        paddles int16 (n, paddles, FIELDS); ends float32 (n, 2, 2, 2): of each of the two long
        curves the first and the last end, row and column.
    """
    d = DRAWINGS[size]
    paddles = np.zeros((len(seeds), number_of_paddles(size, contour), FIELDS), np.int16)
    ends = np.zeros((len(seeds), 2, 2, 2), np.float32)
    margins = np.array(d.margins)
    numbers = (size, contour, d.paddle, d.thickness, d.seed_distance, d.padding, d.continuity)
    for i, seed in enumerate(seeds):
        _image(seed, *numbers, d.distractors // 4, margins, paddles[i], ends[i])
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


@numba.njit(cache=True, nogil=True)
def _image(  # type: ignore[no-untyped-def]
    seed, size, contour, length, thickness, distance, padding, continuity, shorts, margins,
    paddles, ends,
):  # fmt: skip
    """Fill in paddles and ends."""
    np.random.seed(seed)
    margin = margins[np.random.randint(len(margins))]
    reach = length + margin
    circle = _circle(reach)
    mask = np.zeros((size, size), np.float32)
    half = thickness / 2 + margin  # of a paddle, dilated
    done = False
    while not done:
        mask[:] = 0
        done = _long_curves(
            mask, paddles, contour, circle, length, margin, half, distance, padding, continuity
        )
        used = 2 * contour
        for _ in range(shorts):
            if done:
                done = False
                for _ in range(_ATTEMPTS):
                    part = paddles[used : used + contour // 3]
                    if _short_curve(mask, part, circle, length, margin, half, padding, continuity):
                        done = True
                        break
                used += contour // 3
    for curve in range(2):
        p = paddles[curve * contour]
        for axis in range(2):
            ends[curve, 0, axis] = p[axis] + p[2 + axis] * margin / reach
        p = paddles[curve * contour + contour - 1]
        for axis in range(2):
            ends[curve, 1, axis] = p[axis] + p[2 + axis]


@numba.njit(cache=True, nogil=True)
def _circle(radius):  # type: ignore[no-untyped-def]
    """The integer offsets at this distance, rounded, and their angles."""
    found = []
    for y in range(-radius, radius + 1):
        for x in range(-radius, radius + 1):
            if round(np.sqrt(y * y + x * x)) == radius:
                found.append((float(y), float(x), np.arctan2(float(y), float(x))))
    return np.array(found)


@numba.njit(cache=True, nogil=True)
def _long_curves(  # type: ignore[no-untyped-def]
    mask, paddles, contour, circle, length, margin, half, distance, padding, continuity
):  # fmt: skip
    """Both long curves, a paddle of each in turn; False where there is no way on."""
    size = mask.shape[0]
    border = min(0.4 * size, padding + 2 * distance)
    y, x = (
        np.random.uniform(border, size - 1 - border),
        np.random.uniform(border, size - 1 - border),
    )
    if not _seed(mask, paddles[0], y, x, circle, padding, half, length, margin):
        return False
    turn = np.random.uniform(0, 2 * np.pi)
    y, x = y + distance * np.sin(turn), x + distance * np.cos(turn)
    if not _seed(mask, paddles[contour], y, x, circle, padding, half, length, margin):
        return False
    for i in range(1, contour):
        for snake in range(2):
            chain = paddles[snake * contour : (snake + 1) * contour]
            if not _extend(mask, chain, i, circle, length, margin, half, padding, continuity):
                return False
    for snake in range(2):
        _stamp(mask, paddles[snake * contour + contour - 1], length, margin, half)
    return True


@numba.njit(cache=True, nogil=True)
def _short_curve(mask, chain, circle, length, margin, half, padding, continuity):  # type: ignore[no-untyped-def]
    """A curve anywhere; leaves the mask alone where it fails."""
    size = mask.shape[0]
    y, x = (
        np.random.uniform(padding, size - 1 - padding),
        np.random.uniform(padding, size - 1 - padding),
    )
    if mask[int(y), int(x)] > 0.5:
        return False
    if not _seed(mask, chain[0], y, x, circle, padding, half, length, margin):
        return False
    before, good = mask.copy(), True
    for i in range(1, len(chain)):
        good = good and _extend(mask, chain, i, circle, length, margin, half, padding, continuity)
    if good:
        _stamp(mask, chain[-1], length, margin, half)
    else:
        mask[:] = before
    return good


@numba.njit(cache=True, nogil=True)
def _seed(mask, paddle, y, x, circle, padding, half, length, margin):  # type: ignore[no-untyped-def]
    """A curve's first paddle, in any direction."""
    step = circle[np.random.randint(len(circle))]
    paddle[0], paddle[1], paddle[2], paddle[3] = round(y), round(x), step[0], step[1]
    return _inside(mask, paddle, padding) and not _overlaps(mask, paddle, length, margin, half)


@numba.njit(cache=True, nogil=True)
def _extend(mask, chain, i, circle, length, margin, half, padding, continuity):  # type: ignore[no-untyped-def]
    """Paddle i of a curve; the mask grows by the one before it."""
    last, new = chain[i - 1], chain[i]
    reach = np.sqrt(float(last[2]) ** 2 + float(last[3]) ** 2)
    angle = np.arctan2(float(last[2]), float(last[3]))
    ahead = (length + 2 * margin) / reach
    new[0], new[1] = np.ceil(last[0] + ahead * last[2]), np.ceil(last[1] + ahead * last[3])
    weights = np.zeros(len(circle))
    for k in range(len(circle)):
        new[2], new[3] = circle[k, 0], circle[k, 1]
        if _inside(mask, new, padding):
            turn = abs((circle[k, 2] - angle + np.pi) % (2 * np.pi) - np.pi)
            straight = max(np.cos(min(continuity * turn, np.pi / 2)), 0.0) ** 2
            weights[k] = (1 - mask[new[0] + new[2], new[1] + new[3]]) * straight
    sums = np.cumsum(weights)
    if sums[-1] < 1e-9:
        return False
    for _ in range(_TRIES):
        k = np.searchsorted(sums, np.random.random() * sums[-1], side="right")
        new[2], new[3] = circle[k, 0], circle[k, 1]
        if not _overlaps(mask, new, length, margin, half):
            _stamp(mask, last, length, margin, half)
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _inside(mask, paddle, padding):  # type: ignore[no-untyped-def]
    """Whether pivot and head keep off the border."""
    low, high = padding, mask.shape[0] - 1 - padding
    y, x = paddle[0] + paddle[2], paddle[1] + paddle[3]
    pivot = low <= paddle[0] <= high and low <= paddle[1] <= high
    return pivot and low <= y <= high and low <= x <= high


@numba.njit(cache=True, nogil=True)
def _coverage(paddle, y, x, length, margin, half):  # type: ignore[no-untyped-def]
    """How much of a pixel the paddle covers, from its distance: 0..1."""
    scale = margin / (length + margin)
    ay, ax = paddle[0] + scale * paddle[2], paddle[1] + scale * paddle[3]
    dy, dx = (1 - scale) * paddle[2], (1 - scale) * paddle[3]
    t = ((y - ay) * dy + (x - ax) * dx) / (dy * dy + dx * dx)
    t = min(max(t, 0.0), 1.0)
    distance = np.sqrt((y - ay - t * dy) ** 2 + (x - ax - t * dx) ** 2)
    return min(max(half + 0.5 - distance, 0.0), 1.0)


@numba.njit(cache=True, nogil=True)
def _box(mask, paddle, half):  # type: ignore[no-untyped-def]
    """The pixels that a paddle may touch."""
    more, size = int(half) + 2, mask.shape[0]
    y, x = paddle[0] + paddle[2], paddle[1] + paddle[3]
    return (
        max(min(paddle[0], y) - more, 0),
        min(max(paddle[0], y) + more + 1, size),
        max(min(paddle[1], x) - more, 0),
        min(max(paddle[1], x) + more + 1, size),
    )


@numba.njit(cache=True, nogil=True)
def _overlaps(mask, paddle, length, margin, half):  # type: ignore[no-untyped-def]
    """Whether the dilated paddle meets what is there."""
    top, bottom, left, right = _box(mask, paddle, half)
    for y in range(top, bottom):
        for x in range(left, right):
            if mask[y, x] > 0.8 - 1e-6:
                if mask[y, x] + _coverage(paddle, y, x, length, margin, half) >= 1.8:
                    return True
    return False


@numba.njit(cache=True, nogil=True)
def _stamp(mask, paddle, length, margin, half):  # type: ignore[no-untyped-def]
    """Add the dilated paddle."""
    top, bottom, left, right = _box(mask, paddle, half)
    for y in range(top, bottom):
        for x in range(left, right):
            mask[y, x] = max(mask[y, x], _coverage(paddle, y, x, length, margin, half))
