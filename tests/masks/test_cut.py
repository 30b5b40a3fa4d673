"""Blocks cut into smaller tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.masks.cut import cut

from sparse_flash import BlockLayout, masks
from tests.strategies import settings_

TILES = [(64, 64), (64, 32), (32, 32), (16, 8), (128, 64), (64, 128), (128, 16)]


def same(mask, lengths, tile):
    """Compare with tiles made of the mask."""
    made = cut(mask.layout(*lengths), tile, BlockLayout)
    made.check()
    assert made.equal(mask.layout(*lengths, tile))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("lengths", [(256, 256), (384, 128), (640, 384)])
def test_the_same_as_from_cells(lengths, tile):
    heads = [masks.local(9), masks.random_blocks(0.2, 16, 3), masks.full(), ~masks.full()]
    for mask in (
        masks.causal(),
        masks.local(3) | masks.global_tokens(20),
        masks.dilated(5, 3),
        ~masks.full(),
        masks.per_head(heads),
    ):
        same(mask, lengths, tile)


@given(setting=settings_(max_length=400), tile=st.sampled_from(TILES))
def test_any_mask(setting, tile):
    lengths = (setting.q_len, setting.kv_len)
    same(setting.mask, [-(-n // t) * t for n, t in zip(lengths, tile, strict=True)], tile)


def test_parts_outside_the_lengths_are_not_stored():
    layout = masks.full().layout(192, 64)  # in two blocks of 128 x 128
    made = cut(layout, (64, 32), BlockLayout)
    assert made.num_tiles == 6
    assert made.equal(masks.full().layout(192, 64, (64, 32)))


def test_what_it_leaves_to_others():
    layout = masks.causal().layout(300)
    assert cut(layout, (64, 64), BlockLayout) is None, "tiles reach beyond the lengths"
    assert cut(masks.causal().layout(384), (192, 128), BlockLayout) is None
    assert cut(masks.causal().layout(384), (64, 4), BlockLayout) is None, "half a byte"
    assert torch.equal(masks.retile(layout, (64, 64)).to_dense(), layout.to_dense())
