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


class OnHost(alibi.Alibi):
    """Without fragments of a GEMM, which only a GPU has."""

    def __init__(self, dtype, thread):
        self.dtype, self.tile_n, self.quad = dtype, TILE, thread % 4
        self.slopes = cute.make_rmem_tensor(8, dtype)
        self.coefficient = cute.make_rmem_tensor(1, Float32)
        self.terms = cute.make_rmem_tensor(1, Int32)
        self.position = cute.make_rmem_tensor(1, Float32)
        self.of_warp = cute.make_rmem_tensor(1, Int32)
        self.sign = cute.make_rmem_tensor(1, Int32)
        self.row_bias = cute.make_rmem_tensor(2, Float32)


def compiled(dtype):
    """Compiles: operand A, what rows add, and what elements add, of each thread of a quad."""

    @cute.jit
    def run(out: cute.Tensor, coefficient: Float32, position: Int32, remaining: Int32):
        for thread in cutlass.range(4):
            bias = OnHost(dtype, thread)
            bias.begin(coefficient, position)
            bias.begin_tile(remaining)
            for i in cutlass.range_constexpr(8):
                out[thread, i] = bias.slopes[i].to(Float32)
            for row in cutlass.range_constexpr(2):
                out[thread, 8 + row] = bias.row_bias[row]
            acc = cute.make_rmem_tensor(SIZE, Float32)
            acc.fill(0.0)
            bias.add(acc, remaining)
            for i in cutlass.range_constexpr(SIZE):
                out[thread, 10 + i] = acc[i]

    out = cute.runtime.from_dlpack(torch.zeros(4, 10 + SIZE), enable_tvm_ffi=True)
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
    thread, i = torch.arange(4)[:, None], torch.arange(SIZE)
    column = i // 4 * 8 + 2 * thread + i % 2
    row = i // 2 % 2
    for coefficient in (-5.6568542, -0.031250001, 1.7, -7e4):
        for distance in (5000, TILE, TILE - 1, 60, 0, -15, -16, -3000):  # first row to first column
            out = torch.zeros(4, 10 + SIZE)
            run(out, coefficient, distance - 40, 40)
            a, of_rows, added = out[:, :8], out[:, 8:10].double(), out[:, 10:].double()
            assert not a[:, 4:].any()
            assert torch.equal(a[:, :2], a[:, 2:4])  # the rows' numbers are equal
            slope = a[:3, :2].double().flatten()[: alibi.TERMS].sum()
            assert not a[:, :2].flatten()[alibi.TERMS :].any()
            found = slope * column + added + of_rows.gather(1, row.expand(4, -1))
            expected = coefficient * (distance + 8 * row - column).abs()
            tolerance = 1e-6 * abs(coefficient) * TILE + 1e-7 * expected.abs()
            tolerance += 1e-5 * (dtype is cutlass.Float16)
            assert ((found - expected).abs() <= tolerance).all(), (coefficient, distance)
            by_gemm = abs(coefficient) < alibi.MOST and not -alibi.ROWS < distance < TILE
            assert bool(slope != 0) == by_gemm
            assert bool(added.any()) != by_gemm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_are_exact(dtype):
    assert torch.equal(torch.arange(TILE).to(dtype).float(), torch.arange(TILE).float())
