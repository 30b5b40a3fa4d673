"""Dropout on the device: its decisions are those of `scores.keep_mask`."""

from __future__ import annotations

import pytest
import torch

from sparse_flash import scores

cutlass = pytest.importorskip("cutlass")
cute = pytest.importorskip("cutlass.cute")

from sparse_flash.kernels import dropout  # noqa: E402

Int32, Uint32 = cutlass.Int32, cutlass.Uint32
ROWS, TILES = 16, 5  # an odd number: the last tile has no neighbor


class OnHost(dropout.Dropout):
    """The device code for a lane of a warp, without instructions that only a GPU has."""

    def __init__(self, lane, seed, dropped, transposed, by_factors=False):
        self.seed, self.dropped, self.lane, self.transposed = seed, dropped, lane, transposed
        self.by_factors, self.numbers = by_factors, dropout.numbers_of(dropped)
        self.keys = dropout.round_keys(seed[0], seed[1])
        self.levels = dropout.levels_of(dropped)

    def _evaluate(self, pair, row, unit):
        self.evaluated = (pair, row, unit - self.lane % 8)
        return super()._evaluate(pair, row, unit)

    def _halves(self, words):
        mine, others = super()._halves(words)
        self.sent = len(others)
        return mine, others

    def _from_partner(self, word):
        """The same word of the thread four lanes away."""
        arguments = self.seed, self.dropped, self.transposed, self.by_factors
        other = OnHost(self.lane ^ 4, *arguments)
        pair, row, unit = self.evaluated
        words = dropout.Dropout._evaluate(other, pair, row, unit + other.lane % 8)
        _, others = dropout.Dropout._halves(other, words)
        self.sent -= 1
        return others[1 - self.sent]


def pair_mask(flags, byte):
    first, second = ((x >> (8 * byte + 7)) & Uint32(1) for x in flags)
    return (first * Uint32(0xFFFF) | second * Uint32(0xFFFF0000)).to(Int32)


def permute(a, b, selector):
    found = Int32(0)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        word = (a if nibble < 4 else b).to(Uint32)
        byte = word >> (8 * (nibble % 4)) & Uint32(255)
        found = found | (byte << (8 * i)).to(Int32)
    return found


def add_saturated(a, b):
    """Of float16 of absolute values in 1024..2047, the second of them negative."""
    found = Int32(0)
    for shift in (0, 16):
        total = (a >> shift & 1023) - (b >> shift & 1023)
        found = found | (-total >> 31 & 0x3C00) << shift
    return found


def decisions(transposed, by_factors=False):
    """Compiles: masks of each lane, int32 (32, 4 TILES), from seed, dropped, pair, row, column."""

    @cute.jit
    def all_lanes(
        out: cute.Tensor, seed: cute.Tensor, dropped: Int32, pair: Int32, row: Int32, column: Int32
    ):
        for lane in cutlass.range(32):
            words = OnHost(lane, seed, dropped, transposed, by_factors).masks(
                pair, row, column, TILES
            )
            for i in cutlass.range_constexpr(4 * TILES):
                out[lane, i] = words[i]

    shapes = torch.zeros(32, 4 * TILES, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    tensors = (cute.runtime.from_dlpack(x, enable_tvm_ffi=True) for x in shapes)
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    return cute.compile(all_lanes, *tensors, *[Int32(1)] * 4, options=options)


@pytest.mark.parametrize("by_factors", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_decisions_are_those_of_the_reference(transposed, by_factors, monkeypatch):
    """Element by element, in the accumulators of mma.sync and wgmma."""
    for function in (pair_mask, permute, add_saturated):
        monkeypatch.setattr(dropout, function.__name__, function)
    run = decisions(transposed, by_factors)
    kept_bits = 0x3C00 if by_factors else 0xFFFF
    lane, i = torch.arange(32)[:, None], torch.arange(8 * TILES)
    of_row = lane // 4 + 8 * (i // 2 % 2)
    of_column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
    cases = [(1, 0, 0, 0), (26, 3, 48, 128), (128, 70_001, 16, 65_536), (255, 5, -32, 1 << 20)]
    for dropped, pair, row, column in cases:
        seed = torch.tensor([-(1 << 62) + 12345 * dropped])
        out = torch.zeros(32, 4 * TILES, dtype=torch.int32)
        run(out, seed.view(torch.int32), dropped, pair, row, column)
        kept = torch.stack((out & 0xFFFF, out >> 16 & 0xFFFF), 2).flatten(1)
        assert set(kept.unique().tolist()) <= {0, kept_bits}
        rows, columns = row + of_row, column + of_column
        q, kv = (columns, rows) if transposed else (rows, columns)
        expected = scores.keep_mask(seed, dropped, torch.tensor(pair), q, kv)
        assert torch.equal(kept == kept_bits, expected), (dropped, pair, row, column)


def test_factors():
    """Multiples of elements of both dtypes; thresholds of all rates are exact in float16."""
    one = torch.tensor([0x3C00], dtype=torch.int16)
    for dtype, cute_dtype in ((torch.bfloat16, cutlass.BFloat16), (torch.float16, cutlass.Float16)):
        assert one.view(dtype).item() == dropout.unit_of_factors(cute_dtype)
    thresholds = -(1023.0 + torch.arange(1, 256))
    assert torch.equal(thresholds.half().float(), thresholds)
