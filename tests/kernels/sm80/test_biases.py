"""Biases that kernels look up: the values that each thread adds to its accumulators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sparse_flash.kernels.distance_table import DistanceBias, DistanceGrid, values_of
from sparse_flash.kernels.image_table import (
    ImageBias,
    image_gradient,
    image_numbers,
    image_values,
)

from sparse_flash import masks, scores

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")
ScoreTerms = pytest.importorskip("sparse_flash.kernels.score_terms").ScoreTerms
biases = pytest.importorskip("sparse_flash.kernels.sm80.biases")

Float32, Int32 = cutlass.Float32, cutlass.Int32
HEADS, LENGTHS = 3, (150, 190)
IMAGE = (10, 19)  # 190 tokens


def image_bias(r=(2, 30), order=masks.hilbert):
    generator = torch.Generator().manual_seed(sum(r))
    table = torch.randn(HEADS, 2 * r[0] + 1, 2 * r[1] + 1, generator=generator)
    order = None if order is None else order(*IMAGE)
    return ImageBias(table, scores.relative2d(table, *IMAGE, order).coordinates())


def distance_bias(r=40):
    generator = torch.Generator().manual_seed(r)
    table = torch.randn(HEADS, 2 * r + 1, generator=generator)
    return DistanceBias(torch.tensor([0.5, -0.25, 0.125]), table)


def expected(distance, image, p_q, p_k):
    """(h, rows, columns) of positions that broadcast."""
    p_q, p_k = torch.broadcast_tensors(p_q, p_k)
    found = torch.zeros(HEADS, *p_q.shape, dtype=torch.float64)
    if distance is not None:
        r = distance.table.shape[1] // 2
        found += distance.table[:, (p_q - p_k).clamp(-r, r) + r].double()
        found -= distance.slopes[:, None, None] * (p_q - p_k).abs()
    if image is not None:
        index = []
        for of_side, size in zip(image.coordinates.flatten(1), image.table.shape[1:], strict=True):
            a, b = (of_side[p.clamp(0, image.num_tokens - 1)] for p in (p_q, p_k))
            index.append((a - b).clamp(-(size // 2), size // 2) + size // 2)
        found += image.table[:, index[0], index[1]].double()
    return found


def at(address, dtype):
    """The numbers from an address on."""
    pointer = cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=4)
    return cute.make_tensor(pointer, cute.make_layout(2))


def on_host(monkeypatch):
    """Loads that a CPU has, too."""

    def load_pair(address, dtype):
        pair = at(address, dtype)
        return [pair[0], pair[1]]

    def load_indexed(address, index, scale):
        return at(address + scale * index.to(cutlass.Int64), Float32)[0]

    monkeypatch.setattr(biases, "load_pair", load_pair)
    monkeypatch.setattr(biases, "load_indexed", load_indexed)


def lookup(config, tile, transposed, add):
    """Compiles: the accumulators of all warps of a tile (rows, columns)."""
    rows, columns = tile

    @cute.jit
    def of_tile(
        out: cute.Tensor,
        bias: cute.Tensor,
        num_rows: Int32,
        image: cute.Tensor,
        numbers: cute.Tensor,
        head: Int32,
        row: Int32,
        column: Int32,
    ):
        for thread in cutlass.range(2 * rows):
            terms = ScoreTerms(bias=bias, bias_rows=num_rows, image=image, image_numbers=numbers)
            found = biases.Biases(config, terms, tile, transposed)
            lane = thread % 32
            own_row, own_column = thread // 32 * 16 + lane // 4, lane % 4 * 2
            corner = biases.TileCorner(head, row, column, own_row, own_column)
            acc = cute.make_rmem_tensor((4, 1, columns // 8), Float32)
            if cutlass.const_expr(add):
                acc.fill(0.0)
                found.add(acc, corner)
            else:
                found.begin(acc, corner)
            for i in cutlass.range_constexpr(columns // 2):
                out[own_row + i // 2 % 2 * 8, own_column + i // 4 * 8 + i % 2] = acc[i]

    shapes = torch.zeros(tile), torch.zeros(3, 2, 16), torch.zeros(3, 3), torch.zeros(2).int()
    out, bias, image, numbers = (
        cute.runtime.from_dlpack(x, enable_tvm_ffi=True).mark_layout_dynamic() for x in shapes
    )
    numbers_ = [Int32(1)] * 3
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    return cute.compile(of_tile, out, bias, Int32(1), image, numbers, *numbers_, options=options)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("names", [("distance",), ("image",), ("distance", "image")])
def test_values_of_accumulators(monkeypatch, names, transposed, add):
    """Of all elements of all tiles; tiles at other positions read what there is."""
    on_host(monkeypatch)
    config = SimpleNamespace(distance_bias="distance" in names, image_bias="image" in names)
    tile, lengths = (64, 32), LENGTHS[::-1] if transposed else LENGTHS
    grid, unit = DistanceGrid.of(lengths, tile, transposed), 0.5
    distance, image = distance_bias(), image_bias()
    values = values_of(distance, grid, unit)
    numbers = image_numbers(image, max(grid.rows, grid.columns))
    arrays = (values, grid.rows, image_values(image, unit), numbers)
    run = lookup(config, tile, transposed, add)
    given = [distance if config.distance_bias else None, image if config.image_bias else None]
    out = torch.zeros(tile)
    for head in range(HEADS):
        for row in range(0, grid.rows, tile[0]):
            for column in range(0, grid.columns, tile[1]):
                run(out, *arrays, head, row, column)
                of_rows = torch.arange(row, row + tile[0])[:, None]
                of_columns = torch.arange(column, column + tile[1])[None]
                places = (of_columns, of_rows) if transposed else (of_rows, of_columns)
                want = expected(*given, *places)[head] / unit
                torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    for row, column in ((-64, 0), (1 << 20, 32), (-(1 << 20), 0)):
        run(out, *arrays, 1, row, column)
        assert out.isfinite().all()


@pytest.mark.parametrize("r", [(0, 0), (2, 30), (9, 18), (30, 4)])
def test_gradients_of_image_tables(r):
    """Of a sum of all values with weights."""
    given = image_bias(r)
    leaf = given.table.double().requires_grad_()
    sums = torch.randn(HEADS, given.length, dtype=torch.float64)
    values = image_values(given._replace(table=leaf), 2.0)
    (values * sums).sum().backward()
    torch.testing.assert_close(image_gradient(given, sums) / 2, leaf.grad)
