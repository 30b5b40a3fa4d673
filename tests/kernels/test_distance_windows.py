"""Windows of a bias by distance, as far as a CPU runs their code."""

from __future__ import annotations

import pytest
import torch
from sparse_flash.kernels.distance_table import UNBOUNDED

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from sparse_flash.kernels.distance_bias import DistanceWindows  # noqa: E402

Int32 = cutlass.Int32
SHAPE = (16, 32)


@cute.jit
def constant_tiles(out: cute.Tensor, radius: Int32):
    windows = object.__new__(DistanceWindows)
    windows.radius = radius
    for i in cutlass.range(200):
        constant = windows.is_constant(i - 100, SHAPE)
        out[i] = Int32(1) if constant else Int32(0)


def test_tiles_with_one_value():
    """Whether a tile has no distance within the radius, against all its distances."""
    out = torch.zeros(200, dtype=torch.int32)
    given = cute.runtime.from_dlpack(out, enable_tvm_ffi=True)
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    run = cute.compile(constant_tiles, given, Int32(1), options=options)
    row, column = torch.arange(SHAPE[0])[:, None], torch.arange(SHAPE[1])
    for radius in (0, 5, 33, UNBOUNDED):
        run(out, radius)
        for i in range(200):
            apart = i - 100 + row - column
            expected = bool((apart >= radius).all() or (apart <= -radius).all())
            assert bool(out[i]) == expected, (radius, i)
