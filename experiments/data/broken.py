"""Long curves of Pathfinder images, and images in which one of them is broken."""

from __future__ import annotations

import torch
from sparse_flash.experiments.data.pathfinder import Drawings
from torch import Tensor

_OUTSIDE = -10_000  # pixels: nothing is drawn there
_MARGIN = 3  # paddles at either end of a curve that stay


def marked_curves(images: Drawings, contour: int) -> Tensor:
    """The long curve at whose first end the first marker is: 0 or 1, int64 (n,).

    contour: Paddles per long curve.
    """
    pivots = images.paddles[:, [0, contour], :2].float()  # of the first paddles, (n, 2, 2)
    return (pivots - images.markers[:, None, 0]).norm(dim=-1).argmin(1)


def without_paddles(images: Drawings, first: Tensor, count: int = 2) -> Drawings:
    """The images without paddles `first` to `first + count - 1`, int64 (n,); -1: all stay."""
    paddles, rows = images.paddles.clone(), (first >= 0).nonzero()[:, 0]
    for further in range(count):
        paddles[rows, first[rows] + further, :2] = _OUTSIDE
    return images.changed(paddles=paddles)


def broken(images: Drawings, contour: int, share: float, seed: int) -> Drawings:
    """Break a long curve of some images: two neighboring paddles are missing.

    The curve and the place are random, except that the ends stay. If it is the curve that joins the
    markers, nothing joins them any more, and the label becomes 0.

    Args:
        images: Images whose long curves have `contour` paddles.
        contour: Paddles per long curve.
        share: Fraction of the images, 0..1.
        seed: Seed of the choices.
    """
    generator, count = torch.Generator().manual_seed(seed), len(images)
    chosen, side, place = torch.rand(3, count, generator=generator, dtype=torch.float64)
    margin = min(_MARGIN, (contour - 2) // 2)
    curve = (side < 0.5).long()
    first = curve * contour + margin + (place * (contour - 1 - 2 * margin)).long()
    breaks = (chosen < share) & (contour - 1 > 2 * margin)
    device = images.labels.device
    cut = without_paddles(images, first.where(breaks, torch.tensor(-1)).to(device))
    joined = breaks.to(device) & (curve.to(device) == marked_curves(images, contour))
    return cut.changed(labels=images.labels.masked_fill(joined, 0))


def without_a_marker(images: Drawings) -> Drawings:
    """The images without their second marker: nothing tells the label any more."""
    markers = images.markers.clone()
    markers[:, 1] = _OUTSIDE
    return images.changed(markers=markers)
