"""ALiBi of the forward kernel for Hopper: by the GEMM, and in registers."""

from __future__ import annotations

import pytest
import torch

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from sparse_flash.kernels import score_terms  # noqa: E402
from sparse_flash.kernels.sm90 import alibi  # noqa: E402

Float32, Int32 = cutlass.Float32, cutlass.Int32
TILE = 128
SIZE = TILE // 2  # elements of a thread
OF_TILE = 10 + SIZE  # operand A, what rows add, and what elements add
MOST = 128.0


class OnHost(alibi.Alibi):
    """Without fragments of a GEMM, which only a GPU has."""

    def __init__(self, dtype, thread):
        self.dtype, self.tile_n, self.quad, self.most = dtype, TILE, thread % 4, Float32(MOST)
        self.slopes = cute.make_rmem_tensor(8, dtype)
        self.coefficient = cute.make_rmem_tensor(1, Float32)
        self.terms = cute.make_rmem_tensor(1, Int32)
        self.position = cute.make_rmem_tensor(1, Float32)
        self.of_warp = cute.make_rmem_tensor(1, Int32)
        self.sign = cute.make_rmem_tensor(1, Int32)
        self.row_bias = cute.make_rmem_tensor(2, Float32)


def compiled(dtype):
    """Compiles: OF_TILE numbers of each thread of a quad, for a tile that comes twice."""

    @cute.jit
    def run(out: cute.Tensor, coefficient: Float32, position: Int32, remaining: Int32):
        for thread in cutlass.range(4):
            bias = OnHost(dtype, thread)
            bias.begin(coefficient, position)
            for tile in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(8):
                    out[tile, thread, i] = bias.slopes[i].to(Float32)
                acc = cute.make_rmem_tensor(SIZE, Float32)
                acc.fill(0.0)
                bias.complete(acc, remaining)
                for row in cutlass.range_constexpr(2):
                    out[tile, thread, 8 + row] = bias.row_bias[row]
                for i in cutlass.range_constexpr(SIZE):
                    out[tile, thread, 10 + i] = acc[i]

    out = cute.runtime.from_dlpack(torch.zeros(2, 4, OF_TILE), enable_tvm_ffi=True)
    numbers = (Float32(1.0), Int32(0), Int32(0))
    return cute.compile(run, out, *numbers, options="--enable-tvm-ffi --gpu-arch sm_90a")


@pytest.mark.parametrize("dtype", [cutlass.BFloat16, cutlass.Float16])
def test_bias(dtype, monkeypatch):
    """Of all columns of a quad's two rows, as the GEMM multiplies: against float64."""
    monkeypatch.setattr(cute.arch, "make_warp_uniform", lambda x: x)
    monkeypatch.setattr(cute.arch, "thread_idx", lambda: (Int32(0), 0, 0))
    for module in (alibi, score_terms):
        monkeypatch.setattr(module, "absolute", lambda x: cutlass.max(x, -x))
    run = compiled(dtype)
    for coefficient in (-5.6568542, -0.031250001, 1.7, -127.9, 128.1, -7e4):
        for distance in (5000, TILE, TILE - 1, 60, 0, -15, -16, -3000):  # first row to first column
            out = torch.zeros(2, 4, OF_TILE)
            run(out, coefficient, distance - 40, 40)
            for tile, numbers in enumerate(out):
                check(numbers, coefficient, distance, tile, 1e-5 * (dtype is cutlass.Float16))


def check(numbers, coefficient, distance, tile, rounding):
    """The bias of a tile that comes for the first or the second time, and who adds it."""
    thread, i = torch.arange(4)[:, None], torch.arange(SIZE)
    column, row = i // 4 * 8 + 2 * thread + i % 2, i // 2 % 2
    a, of_rows, added = numbers[:, :8], numbers[:, 8:10].double(), numbers[:, 10:].double()
    assert not a[:, 4:].any()
    assert torch.equal(a[:, :2], a[:, 2:4])  # the rows' numbers are equal
    slope = a[:3, :2].double().flatten()[: alibi.TERMS].sum()
    assert not a[:, :2].flatten()[alibi.TERMS :].any()
    found = slope * column + added + of_rows.gather(1, row.expand(4, -1))
    apart = distance + 8 * row - column
    expected = coefficient * apart.abs()
    tolerance = 1e-6 * abs(coefficient) * TILE + 1e-7 * expected.abs() + rounding
    assert ((found - expected).abs() <= tolerance).all(), (coefficient, distance, tile)
    by_gemm = abs(coefficient) <= MOST
    assert bool(slope != 0) == by_gemm
    # Keys before queries are expected first; then the sign of the tile, if it has one.
    turned = distance <= -alibi.ROWS and tile > 0
    assert bool(added.any()) == (not by_gemm or (bool((apart < 0).any()) and not turned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_are_exact(dtype):
    assert torch.equal(torch.arange(TILE).to(dtype).float(), torch.arange(TILE).float())
