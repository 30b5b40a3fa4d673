"""Biases by distance: the values for each distance, and how tiles index them."""

from __future__ import annotations

import pytest
import torch
from sparse_flash.kernels.distance_table import (
    UNBOUNDED,
    DistanceBias,
    DistanceGrid,
    gradients_of,
    values_of,
)

SLOPES = torch.tensor([0.5, -0.25], dtype=torch.float64)


def bias(r, slopes=SLOPES):
    generator = torch.Generator().manual_seed(r)
    table = torch.randn(2, 2 * r + 1, generator=generator, dtype=torch.float64)
    return DistanceBias(slopes, table)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", [(128, 128), (192, 96), (128, 64)])
@pytest.mark.parametrize("r", [0, 40, 1000])
def test_windows_of_tiles(r, tile, transposed):
    """Value rows + column - row of a tile's window, in both copies, for every element."""
    given, lengths = bias(r), (300, 410)
    grid = DistanceGrid.of(lengths, tile, transposed)
    values = values_of(given, grid, unit=2.0)
    rows, size = tile[0], sum(tile)
    row, column = torch.arange(rows)[:, None], torch.arange(tile[1])
    for first_row in range(0, lengths[0], rows):
        for first_column in range(0, lengths[1], tile[1]):
            start = grid.rows + first_column - first_row - rows
            assert start % 16 == 0
            assert 0 <= start <= grid.length - size
            window = values[:, :, start : start + size]
            distance = (first_column + column) - (first_row + row)
            distance = distance if transposed else -distance
            expected = given.table[:, distance.clamp(-r, r) + r]
            expected = (expected - SLOPES[:, None, None] * distance.abs()) / 2
            torch.testing.assert_close(window[:, 0, rows + column - row], expected)
            torch.testing.assert_close(window[:, 1, rows + column - row - 1], expected)


@pytest.mark.parametrize("r", [0, 40, 1000])
@pytest.mark.parametrize("slopes", [None, SLOPES])
def test_gradients(r, slopes):
    """Of a sum of all values with weights."""
    grid = DistanceGrid.of((410, 300), (128, 64), transposed=True)
    given = bias(r, slopes)
    leaves = DistanceBias(*(x if x is None else x.clone().requires_grad_() for x in given))
    sums = torch.randn(2, grid.length, dtype=torch.float64)
    (values_of(leaves, grid, 1.0)[:, 0] * sums).sum().backward()
    found = gradients_of(given, sums, grid)
    torch.testing.assert_close(found.table, leaves.table.grad)
    assert (found.slopes is None) == (slopes is None)
    if slopes is not None:
        torch.testing.assert_close(found.slopes, leaves.slopes.grad)
        only = gradients_of(DistanceBias(slopes, None), sums, grid)
        torch.testing.assert_close(only.slopes, leaves.slopes.grad)
        assert only.table is None


@pytest.mark.parametrize("r", [0, 3, 40])
def test_radius(r):
    """From the radius on, values of a side are equal; with slopes there is none."""
    given = bias(r, None)
    grid = DistanceGrid.of((128, 128), (128, 128), transposed=True)
    values = values_of(given, grid, 1.0)[:, 0]
    distance = grid.distances(torch.device("cpu"))
    for side in (distance >= given.radius, distance <= -given.radius):
        assert (values[:, side] == values[:, side][:, :1]).all()
    assert given.radius == r
    assert bias(r).radius == UNBOUNDED
    assert DistanceBias(SLOPES, None).radius == UNBOUNDED
