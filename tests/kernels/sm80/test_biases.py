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


def sums_of_tile(tile, transposed, fixed):
    """Compiles: adds the elements of a tile (rows, columns) to the sums of an image's values."""
    rows, columns = tile
    config = SimpleNamespace(distance_bias=False, image_bias=True)

    @cute.jit
    def of_tile(
        ds: cute.Tensor,
        sums: cute.Tensor,
        numbers: cute.Tensor,
        head: Int32,
        row: Int32,
        column: Int32,
    ):
        for thread in cutlass.range(2 * rows):
            terms = ScoreTerms(image_sums=sums, image_numbers=numbers)
            found = biases.Biases(config, terms, tile, transposed)
            lane = thread % 32
            own_row, own_column = thread // 32 * 16 + lane // 4, lane % 4 * 2
            corner = biases.TileCorner(head, row, column, own_row, own_column)
            mine = cute.make_rmem_tensor((4, 1, columns // 8), Float32)
            for i in cutlass.range_constexpr(columns // 2):
                mine[i] = ds[own_row + i // 2 % 2 * 8, own_column + i // 4 * 8 + i % 2]
            found.add_image_sums(mine, corner, Float32(256.0) if fixed else None)

    sums = torch.zeros(3, 3, dtype=torch.int64 if fixed else torch.float32)
    tensors = (
        cute.runtime.from_dlpack(x, enable_tvm_ffi=True).mark_layout_dynamic()
        for x in (torch.zeros(tile), sums, torch.zeros(2).int())
    )
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    return cute.compile(of_tile, *tensors, *[Int32(1)] * 3, options=options)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_of_an_image(monkeypatch, transposed, fixed):
    """Of all elements of all tiles; the gradient of the table is that of autograd."""

    def add_to_sum(address, value, factor=None):
        dtype = Float32 if factor is None else cutlass.Int64
        goal = at(address, dtype)
        goal[0] = goal[0] + (value if factor is None else (value * factor).to(dtype))

    on_host(monkeypatch)
    monkeypatch.setattr(biases, "add_to_sum", add_to_sum)
    tile, image = (64, 32), image_bias()
    grid = DistanceGrid.of(LENGTHS[::-1] if transposed else LENGTHS, tile, transposed)
    numbers = image_numbers(image, max(grid.rows, grid.columns))
    run = sums_of_tile(tile, transposed, fixed)
    ds = torch.randint(-9, 10, (HEADS, grid.rows, grid.columns)).float()
    sums = torch.zeros(HEADS, image.length, dtype=torch.int64 if fixed else torch.float32)
    for head in range(HEADS):
        for row in range(0, grid.rows, tile[0]):
            for column in range(0, grid.columns, tile[1]):
                own = ds[head, row : row + tile[0], column : column + tile[1]].contiguous()
                run(own, sums, numbers, head, row, column)
    leaf = image.table.double().requires_grad_()
    places = (torch.arange(grid.rows)[:, None], torch.arange(grid.columns)[None])
    values = expected(None, image._replace(table=leaf), *(places[::-1] if transposed else places))
    (values * ds).sum().backward()
    found = image_gradient(image, sums.double()) / (256 if fixed else 1)
    torch.testing.assert_close(found, leaf.grad)
