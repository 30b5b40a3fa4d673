"""Bit tiles in fragment order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.masks import bits


def decode(words, tile_n):
    """Element by element from the statement in PTX of who holds what (WGMMA m64nNk16, D)."""
    n, groups = words.shape[:2]
    tiles = torch.zeros(n, groups * 64, tile_n, dtype=torch.bool)
    for group in range(groups):
        for thread in range(128):
            for i in range(tile_n // 2):  # a thread's accumulators
                row = group * 64 + 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
                column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
                word = words[:, group, thread, i // 2 % 2]
                tiles[:, row, column] = (word >> (i // 4 * 2 + i % 2)) & 1 == 1
    return tiles


@pytest.mark.parametrize("tile", [(64, 128), (192, 128), (128, 64), (128, 80), (64, 16)])
def test_every_bit_is_where_its_thread_looks(tile):
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(3, *tile, generator=generator) < 0.5
    assert torch.equal(decode(fragment_order(bits.pack(tiles)), tile[1]), tiles)


def test_rows_are_padded():
    """Of tiles whose height is not a multiple of 64."""
    tiles = torch.rand(3, 96, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    found = decode(fragment_order(bits.pack(tiles)), 64)
    assert torch.equal(found[:, :96], tiles)
    assert not found[:, 96:].any()


@given(st.integers(0, 40), st.integers(0, 5))
def test_chunks_make_no_difference(n, seed):
    from sparse_flash.kernels import fragment

    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, 64, 16), generator=generator, dtype=torch.uint8)
    whole = fragment_order(packed)
    chunk, fragment._CHUNK = fragment._CHUNK, 64 * 16 * 7
    try:
        assert torch.equal(fragment_order(packed), whole)
    finally:
        fragment._CHUNK = chunk
    assert whole.shape == (n, 1, 128, 2)
