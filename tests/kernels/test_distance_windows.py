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


class Windows(DistanceWindows):
    """Without shared memory."""

    def __init__(self, radius):
        self.radius = radius


@cute.jit
def is_constant(out: cute.Tensor, apart: Int32, radius: Int32):
    out[0] = Int32(1) if Windows(radius).is_constant(apart, SHAPE) else Int32(0)


def test_tiles_with_one_value():
    """Whether a tile has no distance within the radius, against all its distances."""
    out = torch.zeros(1, dtype=torch.int32)
    given = cute.runtime.from_dlpack(out, enable_tvm_ffi=True)
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    run = cute.compile(is_constant, given, Int32(1), Int32(1), options=options)
    row, column = torch.arange(SHAPE[0])[:, None], torch.arange(SHAPE[1])
    for radius in (0, 5, 33, UNBOUNDED):
        for first in range(-100, 100):
            run(out, first, radius)
            apart = first + row - column
            expected = bool((apart >= radius).all() or (apart <= -radius).all())
            assert bool(out) == expected, (radius, first)
