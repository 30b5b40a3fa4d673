"""Layouts in tiles of another size, made of cells."""

from __future__ import annotations

import pickle

import pytest
import torch
from sparse_flash.masks.cells import cell_of, retile_by_cells

from sparse_flash import masks

MASKS = {
    "partial": masks.local(20) | masks.global_tokens(3),
    "full": masks.full(),
    "empty": ~masks.full(),
    "per head": masks.per_head([masks.local(5), masks.causal(), masks.sinks(70)]),
    "noise": masks.random_blocks(0.3, 16, 1) & masks.local(200),
}
SIZES = [
    ((128, 128), (192, 128)),
    ((16, 32), (128, 80)),
    ((48, 24), (96, 96)),
    ((128, 128), (64, 16)),
    ((100, 128), (50, 128)),
]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("lengths", [(384, 384), (300, 300), (129, 500)], ids=str)
def test_the_same_as_a_layout_that_is_built(name, lengths):
    for old, new in SIZES:
        layout = MASKS[name].layout(*lengths, block=old)
        cell = cell_of(old, new)
        assert cell is not None
        made = retile_by_cells(layout, new, cell)
        assert made.equal(MASKS[name].layout(*lengths, block=new)), (old, new)


def test_cells():
    assert cell_of((128, 128), (128, 80)) == (128, 16)
    assert cell_of((64, 100), (128, 100)) == (64, 100)  # columns stay: no byte is cut
    assert cell_of((100, 100), (128, 128)) is None
    assert cell_of((1, 8), (128, 8)) is None  # too many cells


def test_a_transpose_needs_no_sorting(monkeypatch):
    layout = masks.local(70).layout(300, 500, block=(64, 32))
    expected = layout.transpose()
    arrays = (expected.ccol_indices, expected.row_indices, expected.transpose_order)
    anew = type(layout)(*expected.lengths, **expected.arrays())
    derived = (anew.ccol_indices, anew.row_indices, anew.transpose_order)
    assert all(torch.equal(a, b) for a, b in zip(arrays, derived, strict=True))


def test_bits_beyond_the_lengths_are_zero():
    """A block that does not divide the lengths, cut into cells that do."""
    layout = masks.local(20).layout(384, block=(128, 80))
    last = layout.bit_tiles[layout.bit_tile_indices[layout.col_indices == 4].long()]
    assert not last[:, :, 8:].any()


def test_the_host_copy_of_a_layout():
    layout = masks.local(70).layout(300)
    assert layout.host is layout
    assert "_host" not in layout.__dict__  # no cycle that only the garbage collector ends


@pytest.mark.gpu
def test_the_host_copy_follows_its_own_layout_alone():
    here, other = masks.local(70).layout(300), masks.sinks(3).layout(300)
    there = here.to("cuda")
    here.update_(other)
    assert there.host.equal(masks.local(70).layout(300))
    there.update_(other.to("cuda"))
    assert there.host.equal(other)
    again = pickle.loads(pickle.dumps(there))
    assert again.equal(there)
    assert again.col_indices.untyped_storage().nbytes() < 1024


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_layouts_for_a_gpu(name):
    for block in ((128, 128), (48, 24)):
        there = MASKS[name].layout(900, block=block, device="cuda")
        here = MASKS[name].layout(900, block=block)
        assert there.device.type == "cuda"
        assert there.equal(here)
        for array in ("ccol_indices", "row_indices", "transpose_order"):
            assert torch.equal(getattr(there, array).cpu(), getattr(here, array))
        for again in (there.host, there.to("cpu"), there.to("cpu").to("cuda")):
            assert again.equal(here)
