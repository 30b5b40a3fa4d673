"""Layouts from tables of all tiles equal those from lists of rectangles; bounds of their calls."""

from __future__ import annotations

import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.masks import bits, build, diagonal, elements, grid, host, ternary, undecided
from sparse_flash.masks.tables import RangeTable

from sparse_flash import masks
from tests.calls import count_calls
from tests.strategies import settings_


def layout_of(setting):
    """The layout of a setting, as the code is now."""
    return setting.mask.layout(setting.q_len, setting.kv_len, setting.block)


@given(settings_(heads=True))
def test_tables_are_lists_of_rectangles(setting):
    with mock.patch.object(grid, "_FEW", 0):  # rectangles first, in short sequences too
        by_table = layout_of(setting)
    with mock.patch.object(build.grid, "fits", return_value=False):
        assert by_table.equal(layout_of(setting))


@given(settings_())
def test_elements_operand_by_operand_are_those_of_the_whole(setting):
    found = layout_of(setting)
    with mock.patch.object(elements.composed, "few", return_value=False):
        assert found.equal(layout_of(setting))


def test_combinations_of_many_kinds_are_numbered():
    """Their product may exceed 64 bits."""
    codes = [(np.arange(900) % 2**i, 1 << 40) for i in range(1, 9)]
    first, twin = undecided._combinations(codes)
    assert sorted(first.tolist()) == list(range(256))
    assert first[twin].tolist() == [i % 256 for i in range(900)]


@given(st.integers(-80, 80), st.integers(1, 9), st.sampled_from([(8, 8), (16, 16), (24, 24)]))
def test_diagonals_are_tiles(offset, step, block):
    mask = (masks.causal(offset) & masks.strided(step)) | ~masks.local((step, None))
    lengths = 144, 96, block
    assert diagonal.applies(mask, lengths)
    found = mask.layout(*lengths)
    with mock.patch.object(grid.diagonal, "applies", return_value=False):
        assert found.equal(mask.layout(*lengths))


@pytest.mark.parametrize(
    "mask",
    [
        masks.custom(lambda q, kv: q - kv < 5),
        masks.global_tokens(3) | masks.causal(),
        masks.causal().through(masks.morton(8, 12)),
    ],
    ids=repr,
)
def test_other_masks_have_no_diagonals(mask):
    assert not diagonal.applies(mask, (96, 96, (8, 8)))


def test_tiles_that_are_cut_off_have_no_diagonals():
    assert diagonal.applies(masks.causal(), (96, 96, (8, 8)))
    for lengths in ((96, 95, (8, 8)), (97, 96, (8, 8)), (96, 96, (8, 16))):
        assert not diagonal.applies(masks.causal(), lengths)


@given(
    settings_(max_length=90, heads=True), st.sampled_from([(16, 16), (128, 64), (7, 9), (48, 1)])
)
def test_new_tiles_from_tables_are_those_of_cells(setting, block):
    layout = layout_of(setting)
    made = masks.retile(layout, block)
    with mock.patch.object(sys.modules["sparse_flash.masks.retile"], "regrid", return_value=None):
        assert made.equal(masks.retile(layout, block))


@given(settings_(), st.data())
def test_intervals_of_tensors_are_those_of_arrays(setting, data):
    """On a GPU, bounds are tensors."""
    lo_q, lo_kv = (
        data.draw(st.lists(st.integers(0, n - 1), min_size=9, max_size=9))
        for n in (setting.q_len, setting.kv_len)
    )
    hi_q = [data.draw(st.integers(lo, setting.q_len - 1)) for lo in lo_q]
    hi_kv = [data.draw(st.integers(lo, setting.kv_len - 1)) for lo in lo_kv]
    blocks = ternary.Blocks(*map(torch.tensor, (lo_q, hi_q, lo_kv, hi_kv)))
    states, signature = setting.mask.classify(blocks), setting.mask.signature(blocks)
    with mock.patch.object(ternary, "numbers", lambda x: x):
        assert torch.equal(setting.mask.classify(blocks), states)
        again = setting.mask.signature(blocks)
    assert again is signature is None or torch.equal(again, signature)


@given(st.lists(st.integers(-99, 99), min_size=1, max_size=70), st.data())
def test_range_tables(values, data):
    table, n = RangeTable(torch.tensor(values)), len(values)
    lo = data.draw(st.lists(st.integers(0, n - 1), max_size=9))
    hi = [data.draw(st.integers(first, n - 1)) for first in lo]
    least, most = table.bounds(np.array(lo, np.int64), np.array(hi, np.int64))
    parts = [values[a : b + 1] for a, b in zip(lo, hi, strict=True)]
    assert (least.tolist(), most.tolist()) == (list(map(min, parts)), list(map(max, parts)))
    ends = table.bounds(torch.tensor(lo).long(), torch.tensor(hi).long())
    assert [x.tolist() for x in ends] == [least.tolist(), most.tolist()]


CALLS = {  # of Python and of C, in a layout at 65,536 tokens
    "local({})": 700,
    "causal({})": 670,
    "dilated(64, {})": 770,
    "local({}) | global_tokens(64)": 1800,
    "local({}) | global_tokens(64) | butterfly(128)": 2050,
    "block_local(128, 1) | global_tokens({}) | butterfly(128)": 1900,
    "neighborhood(256, 256, {})": 2050,
    "through(patches(256, 256, (8, 16), 1), morton(256, 256)) | sinks({})": 2450,
}


@pytest.mark.parametrize("spec", CALLS)
def test_calls_of_a_layout(spec):
    masks.parse(spec.format(3)).layout(65536)
    mask = masks.parse(spec.format(5))
    calls = count_calls(lambda: mask.layout(65536))
    print(f"{spec}: {calls} calls")
    assert calls <= CALLS[spec]


def test_first_positions_beyond_the_first_step_and_of_absent_numbers():
    index = torch.zeros(40_000, dtype=torch.int64)
    index[[20_000, 39_999]] = torch.tensor([2, 3])
    assert host.firsts(index, 5).tolist() == [0, 40_000, 20_000, 39_999, 40_000]
    first, which = host.kinds(index, 5)
    assert first.tolist() == [0, 20_000, 39_999]
    assert torch.equal(index[first][which], index)


def test_rows_with_equal_hashes_are_distinct():
    a, b = bits._factors(2, 0).tolist()
    rows = torch.tensor([[0, a], [b, 0], [0, a]])  # the hash is a sum of products
    first, which = bits.distinct_rows(rows)
    assert first.tolist() == [0, 1]
    assert which.tolist() == [0, 1, 0]
