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

    def __init__(self, lane, seed, dropped, transposed):
        self.seed, self.dropped, self.lane, self.transposed = seed, dropped, lane, transposed
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
        other = OnHost(self.lane ^ 4, self.seed, self.dropped, self.transposed)
        pair, row, unit = self.evaluated
        words = dropout.Dropout._evaluate(other, pair, row, unit + other.lane % 8)
        _, others = dropout.Dropout._halves(other, words)
        self.sent -= 1
        return others[1 - self.sent]


def pair_mask(flags, byte):
    first, second = ((x >> (8 * byte + 7)) & Uint32(1) for x in flags)
    return (first * Uint32(0xFFFF) | second * Uint32(0xFFFF0000)).to(Int32)


def decisions(transposed):
    """Compiles: masks of each lane, int32 (32, 4 TILES), from seed, dropped, pair, row, column."""

    @cute.jit
    def all_lanes(
        out: cute.Tensor, seed: cute.Tensor, dropped: Int32, pair: Int32, row: Int32, column: Int32
    ):
        for lane in cutlass.range(32):
            words = OnHost(lane, seed, dropped, transposed).masks(pair, row, column, TILES)
            for i in cutlass.range_constexpr(4 * TILES):
                out[lane, i] = words[i]

    shapes = torch.zeros(32, 4 * TILES, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    tensors = (cute.runtime.from_dlpack(x, enable_tvm_ffi=True) for x in shapes)
    options = "--enable-tvm-ffi --gpu-arch sm_90a"
    return cute.compile(all_lanes, *tensors, *[Int32(1)] * 4, options=options)


@pytest.mark.parametrize("transposed", [False, True])
def test_decisions_are_those_of_the_reference(transposed, monkeypatch):
    """Element by element, in the accumulators of mma.sync and wgmma."""
    monkeypatch.setattr(dropout, "pair_mask", pair_mask)
    run = decisions(transposed)
    lane, i = torch.arange(32)[:, None], torch.arange(8 * TILES)
    of_row = lane // 4 + 8 * (i // 2 % 2)
    of_column = 8 * (i // 4) + 2 * (lane % 4) + i % 2
    cases = [(1, 0, 0, 0), (26, 3, 48, 128), (128, 70_001, 16, 65_536), (255, 5, -32, 1 << 20)]
    for dropped, pair, row, column in cases:
        seed = torch.tensor([-(1 << 62) + 12345 * dropped])
        out = torch.zeros(32, 4 * TILES, dtype=torch.int32)
        run(out, seed.view(torch.int32), dropped, pair, row, column)
        kept = torch.stack((out & 0xFFFF, out >> 16 & 0xFFFF), 2).flatten(1)
        assert set(kept.unique().tolist()) <= {0, 0xFFFF}
        rows, columns = row + of_row, column + of_column
        q, kv = (columns, rows) if transposed else (rows, columns)
        expected = scores.keep_mask(seed, dropped, torch.tensor(pair), q, kv)
        assert torch.equal(kept == 0xFFFF, expected), (dropped, pair, row, column)
