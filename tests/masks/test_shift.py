"""Shifted masks, relative masks, and lengths that fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.masks import Mask
from sparse_flash.masks.ternary import EMPTY, FULL, Blocks

from sparse_flash import masks
from tests.strategies import any_length_patterns, compositions, square_patterns

shifts = st.integers(-90, 90)


@given(compositions(any_length_patterns()), shifts, shifts)
def test_shift_is_its_definition(mask, a, c):
    shifted = mask.shift(q=a, kv=c)
    i, j = torch.arange(70)[:, None], torch.arange(90)
    truth = mask(i + a, j + c)
    assert torch.equal(shifted(i, j), truth)
    assert torch.equal(shifted.layout(70, 90, (16, 8)).to_dense(), truth)


@given(any_length_patterns(), shifts, shifts, st.data())
def test_shifted_intervals_are_never_wrong(mask, a, c, data):
    shifted, n = mask.shift(a, c), 20
    lo = [data.draw(st.lists(st.integers(0, 60), min_size=n, max_size=n)) for _ in "qk"]
    hi = [[x + data.draw(st.integers(0, 60)) for x in low] for low in lo]
    blocks = Blocks(*map(torch.tensor, (lo[0], hi[0], lo[1], hi[1])))
    truth = shifted(torch.arange(130)[:, None], torch.arange(130))
    for k, state in enumerate(shifted.classify(blocks).tolist()):
        part = truth[lo[0][k] : hi[0][k] + 1, lo[1][k] : hi[1][k] + 1]
        assert state != EMPTY or not part.any()
        assert state != FULL or part.all()


@given(st.integers(0, 20), st.integers(0, 20), st.data())
def test_shift_of_masks_made_for_lengths(a, c, data):
    mask = data.draw(square_patterns(40))
    truth = mask(torch.arange(40)[:, None], torch.arange(40))
    shifted = (mask & masks.documents((40,))).shift(a, c)
    assert shifted.extents() == (40 - a, 40 - c)
    assert torch.equal(shifted.layout(40 - a, 40 - c, (8, 16)).to_dense(), truth[a:, c:])
    if a or c:
        with pytest.raises(ValueError, match="is made for"):
            shifted.layout(40)


def test_shifts_add_up_and_print():
    mask = masks.local(3) | masks.sinks(2)
    assert mask.shift() is mask.shift(0, 0) is mask
    assert mask.shift(5).shift(-5) == mask
    assert mask.shift(q=2).shift(q=3, kv=1) == mask.shift(5, 1)
    assert hash(mask.shift(5, 1)) == hash(mask.shift(5, 1))
    assert mask.shift(5, 1) != mask.shift(1, 5)
    assert repr(mask.shift(5)) == "shift(local((3, 3)) | sinks(2), 5)"
    for shifted in (mask.shift(5), mask.shift(0, -4), ~mask.shift(5) | masks.full().shift(1)):
        assert masks.parse(repr(shifted)) == shifted
    assert masks.parse("shift(causal(), 7, 0)") == masks.causal().shift(q=7)
    assert masks.parse("shift(causal(), q=0, kv=0)") == masks.causal()
    heads = masks.per_head([masks.local(3), masks.causal()])
    assert heads.shift(4) == masks.per_head([masks.local(3).shift(4), masks.causal().shift(4)])
    assert masks.parse("shift(per_head([local(3), causal()]), 4)") == heads.shift(4)
    assert (
        heads.shift(4)
        .layout(8, 12)
        .equal(masks.per_head([masks.local(3).shift(4), masks.causal(4)]).layout(8, 12))
    )


def test_shifts_that_are_refused():
    mask = masks.documents((4, 5))
    for bad in (1.5, True, "3", None, torch.tensor(2.0), torch.tensor([1])):
        with pytest.raises(TypeError, match="must be an int"):
            mask.shift(bad)
    with pytest.raises(ValueError, match=r"within \+-2147483647"):
        mask.shift(1 << 31)
    with pytest.raises(ValueError, match=r"q_len=9, indices 0..8, not for the indices -2..8"):
        mask.shift(-2).layout(11, 9)
    with pytest.raises(ValueError, match="not for the indices 9..9"):
        mask.shift(9).layout(1, 9)
    with pytest.raises(IndexError, match=r"query indices -2..6 are not in 0..8"):
        mask.shift(-2)(torch.arange(9)[:, None], torch.arange(9))
    with pytest.raises(IndexError, match=r"key indices 0..9 are not in 0..8"):
        mask(torch.arange(9)[:, None], torch.arange(10))
    inside = masks.documents((10, 6)).shift(-2, -2) & masks.documents((11, 7))
    with pytest.raises(ValueError, match="-2"):
        inside.through(masks.raster(3, 6)).layout(18)
    with pytest.raises(TypeError, match="shift takes a mask"):
        masks.shift("local(3)", 1)
    # Two values out of range may be in range together.
    assert mask.shift(-2).shift(3) == mask.shift(1)


def test_indices_are_int64_whatever_they_come_as():
    mask = masks.local(3) | masks.causal(-200)
    q, kv = torch.arange(200)[:, None], torch.arange(200)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(mask(q.to(dtype), kv.to(dtype)), mask(q, kv))
    for bad in (q.float(), q.bool(), [1, 2]):
        with pytest.raises(TypeError, match="q_idx must be an integer tensor"):
            mask(bad, kv)


RELATIVE = {
    "full()": False, "sinks(3)": False, "global_tokens(3)": False, "random_blocks(0.5)": False,
    "random_blocks_per_row(64, 1)": False, "from_blocks([[1]], 4)": False,
    "causal()": True, "causal(3)": False, "local(3)": True, "local((None, None))": False,
    "block_local(4, 1)": True,
    "dilated(2, 3)": True, "strided(4)": True, "fixed(4, 1)": True, "butterfly(4)": True,
    "block_diagonal(4)": True, "documents((3, 4))": True, "axial(4, 4)": True,
    "neighborhood(4, 4, 1)": True, "patches(4, 4, (2, 2))": True, "longnet(4, 2)": True,
    "sinks(3) | local(3)": True, "sinks(3) & full()": False, "~causal()": True, "~full()": False,
    "shift(local(3), 5)": False, "shift(local(3), 5, 5)": True, "shift(sinks(3), 5, 5)": False,
    "through(axial(4, 4), morton(4, 4))": True, "per_head([full(), causal()])": True,
    "per_head([full(), sinks(1)])": False, "causal(3) | local(1)": True,
}  # fmt: skip


@pytest.mark.parametrize("text", RELATIVE)
def test_relative(text):
    assert masks.parse(text).relative is RELATIVE[text]


def test_every_pattern_declares_whether_it_is_relative():
    from sparse_flash.masks import patterns

    for name in patterns.__all__:
        pattern = getattr(patterns, name)
        if isinstance(pattern, type):
            assert "relative" in vars(pattern), name
    assert masks.custom(lambda q, kv: q > kv).relative
    assert Mask().relative
