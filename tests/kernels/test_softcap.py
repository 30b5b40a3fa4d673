"""Probabilities of scores with a softcap, as the forward kernel for Hopper computes them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from sparse_flash.kernels import online_softmax as online  # noqa: E402
from sparse_flash.kernels import score_terms  # noqa: E402
from sparse_flash.kernels.sm90 import softcap  # noqa: E402
from sparse_flash.masks.layout import FULL_TILE  # noqa: E402

Float32, Int32 = cutlass.Float32, cutlass.Int32
COLUMNS = 32  # of a tile; a thread has 2 x 8 elements
SIZE = COLUMNS // 2
LOG2_E = math.log2(math.e)


def test_polynomial():
    """Its relative error is less than that of the GPU's tanh, 2^-11."""
    x = np.linspace(-softcap.LIMIT, softcap.LIMIT, 1_000_001)[1::2].astype(np.float32)
    u, p = x * x, np.float32(softcap.TANH_POLYNOMIAL[-1])
    for c in softcap.TANH_POLYNOMIAL[-2::-1]:
        p = p * u + np.float32(c)
    error = x * p / np.tanh(x.astype(np.float64)) - 1
    assert np.abs(error).max() < 2**-12.1


@pytest.fixture
def on_host(monkeypatch):
    """Replaces instructions that only a GPU has; a warp is one thread."""
    same = staticmethod(lambda x: x)
    for name in ("vote_any_sync", "vote_all_sync"):
        monkeypatch.setattr(cute.arch, name, same)
    monkeypatch.setattr(cute.arch, "make_warp_uniform", Int32)  # as the instruction: of integers
    monkeypatch.setattr(cute.arch, "fmax", cutlass.max)
    monkeypatch.setattr(cute.arch, "fmin", cutlass.min)
    monkeypatch.setattr(online, "_quad", lambda value, combine: value)
    monkeypatch.setattr(online, "absolute", lambda x: cutlass.max(x, -x))
    monkeypatch.setattr(online, "exp2", cute.math.exp2)
    monkeypatch.setattr(online, "exp2_polynomial", cute.math.exp2)
    for module in (softcap, score_terms):
        monkeypatch.setattr(module, "tanh", cute.math.tanh)


def compiled(dtype, by_norm):
    """Compiles: P, and maxima and sums of both rows, from S, the scales, and the mask."""

    @cute.jit
    def run(
        s: cute.Tensor,
        stats: cute.Tensor,
        cap_scale: Float32,
        scale_log2: Float32,
        bit_tile: Int32,
        word: Int32,
    ):
        acc = cute.make_rmem_tensor(SIZE, Float32)
        state = cute.make_rmem_tensor((2, 2), Float32)
        for i in cutlass.range_constexpr(SIZE):
            acc[i] = s[i]
        online.reset(state)
        cap = softcap.Softcap(cap_scale, scale_log2, dtype, by_norm)
        masking = (bit_tile, [word, word], Int32(COLUMNS), Int32(0))
        cap.probabilities(acc, state, masking, Float32(8.0) / scale_log2)
        for i in cutlass.range_constexpr(SIZE):
            s[i] = acc[i]
        for i in cutlass.range_constexpr(4):
            stats[i] = state[i % 2, i // 2]

    tensors = (cute.runtime.from_dlpack(torch.zeros(n), enable_tvm_ffi=True) for n in (SIZE, 4))
    numbers = (Float32(1.0), Float32(1.0), Int32(0), Int32(0))
    return cute.compile(run, *tensors, *numbers, options="--enable-tvm-ffi --gpu-arch sm_90a")


ROW = torch.arange(SIZE) // 2 % 2
BIT = torch.arange(SIZE) // 4 * 2 + torch.arange(SIZE) % 2


@pytest.mark.parametrize(
    ("dtype", "by_norm"),
    [(cutlass.BFloat16, False), (cutlass.BFloat16, True), (cutlass.Float16, False)],
)
def test_probabilities(on_host, dtype, by_norm):
    """Of all paths: with and without masked elements, and of scores beyond the polynomial."""
    run = compiled(dtype, by_norm)
    torch.manual_seed(0)
    for size, cap, shift in [
        (0.01, 30, 0), (0.2, 30, -0.5), (0.7, 50, 0), (0.05, 50, -0.6), (3, 20, 0), (0.2, 200, 0)
    ]:  # fmt: skip
        for bit_tile, word in ((FULL_TILE, 0), (0, 0b0110_1101_0100_1011), (0, 1 << 9)):
            scale = 0.125
            s = (torch.rand(SIZE) * 2 - 1) * size * cap / scale + shift * cap / scale
            p, stats = s.clone(), torch.zeros(4)
            run(p, stats, scale / cap, cap * LOG2_E, bit_tile, word)
            kept = (word >> BIT & 1).bool() if bit_tile == 0 else torch.ones(SIZE, dtype=bool)
            score = cap * LOG2_E * torch.tanh(s.double() * scale / cap)
            top = stats[ROW].double() * cap * LOG2_E
            assert p[~kept].eq(0).all()
            error = (p.double().log2() + top - score)[kept].abs()
            assert (error <= 2**-11 * score.abs()[kept] + 1e-3).all()
            sums = torch.zeros(2).index_add_(0, ROW, p)
            assert torch.allclose(sums, stats[2:])
            assert (p < 2**9).all()
            for row in range(2):
                most = max(p[kept & (row == ROW)].tolist(), default=1)
                assert bit_tile == FULL_TILE or abs(most - 1) < 1e-4
                assert most > (2**-8 if dtype is cutlass.Float16 else 2**-softcap.GAP)


def test_masked_elements_of_all_scales():
    """The polynomial of S of masked elements is -inf, which makes P 0."""
    for cap_scale in (softcap.LEAST_SCALE, 1e-4, 0.01, 1.0, 1e4):
        for cap in (1e-3, 1.0, 30.0, 1e3):
            factors = [np.float32(cap * LOG2_E * cap_scale ** (2 * j + 1)) for j in range(3)]
            s = np.float32(softcap.MASKED)
            *rest, p = (
                np.float32(c) * f for c, f in zip(softcap.TANH_POLYNOMIAL, factors, strict=True)
            )
            with np.errstate(over="ignore"):
                for c in reversed(rest):
                    p = p * (s * s) + c
                assert s * p < -1e30
