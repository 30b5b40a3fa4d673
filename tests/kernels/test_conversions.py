"""Conversions of dQ's sums: all of them, once, and none that those before it could wait for."""

from __future__ import annotations

import heapq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.kernels.config import CONVERT
from sparse_flash.kernels.conversions import with_conversions
from sparse_flash.kernels.schedule import BACKWARD_COSTS, backward_schedule

from sparse_flash import masks
from tests.strategies import settings_

N_BLOCK, HEAD, BATCH, FIRST, COUNT, PART, TURN = range(7)


@given(
    settings_(max_length=700, heads=True),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(128, 64, 128), (128, 128, 64), (128, 128, 32)]),
    st.sampled_from([1, 3, 132]),
    st.sampled_from([0, 1 << 23, 1 << 30]),
)
def test_every_tile_is_converted_once_after_its_items(setting, batch, group, sizes, ctas, q_bytes):
    *tile, head_dim = sizes
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    heads = (4, 4 // group)
    before = backward_schedule(layout, batch, heads, tuple(tile), ctas, q_bytes)
    attention = before.work.tolist()
    plan = with_conversions(before, heads, setting.q_len, head_dim, ctas, q_bytes)
    assert [x for x in plan.work.tolist() if x[PART] != CONVERT] == attention  # in their order
    assert plan.counts.tolist() == [plan.num_items, len(plan.combine)]
    left, converted = {}, set()
    for pair, number in enumerate(plan.per_head.tolist()):
        left[divmod(pair, heads[1])] = number
    for item in plan.work.tolist():
        if item[PART] != CONVERT:
            left[item[BATCH], item[HEAD]] -= 1
            continue
        assert left[item[BATCH], item[HEAD] // group] == 0
        assert (item[FIRST], item[COUNT]) == (0, 0)
        assert item[TURN] > 0
        for m_block in range(item[N_BLOCK], item[N_BLOCK] + item[TURN]):
            assert (item[BATCH], item[HEAD], m_block) not in converted
            converted.add((item[BATCH], item[HEAD], m_block))
    assert not any(left.values())
    assert len(converted) == batch * 4 * -(-setting.q_len // tile[1])
    assert all(x.dtype == torch.int32 for x in plan.arrays())


def ends(plan, ctas, conversion):
    """When CTAs that take items off the list end: with the last item of attention, and all."""
    free, done, attention = [0.0] * ctas, {}, 0.0
    for item in plan.work.tolist():
        start = heapq.heappop(free)
        if item[PART] == CONVERT:
            heapq.heappush(free, max(start, done[item[HEAD]]) + conversion)
        else:
            end = start + item[COUNT] + BACKWARD_COSTS.item
            done[item[HEAD]] = max(done.get(item[HEAD], 0.0), end)
            attention = max(attention, end)
            heapq.heappush(free, end)
    return attention, max(free)


@pytest.mark.parametrize(
    ("mask", "length", "heads"),
    [
        (masks.random_blocks(0.05, 128, seed=0), 16384, 16),
        (masks.random_blocks(0.25, 128, seed=0), 16384, 16),
        (masks.causal(), 16384, 16),
        (masks.butterfly(128), 65536, 8),
        (masks.block_local(128, 1) | masks.global_tokens(128), 65536, 8),
    ],
    ids=str,
)
def test_conversions_wait_little(mask, length, heads):
    q_bytes = 8 * length * 64
    plan = backward_schedule(mask.layout(length), 1, (heads, heads), (128, 128), 132, q_bytes)
    _, alone = ends(plan, 132, 0.0)
    plan = with_conversions(plan, (heads, heads), length, 64, 132, q_bytes)
    conversion = 1.0  # in units of a tile
    number = (plan.work[:, PART] == CONVERT).sum().item()
    assert number == heads * length // 1024
    attention, end = ends(plan, 132, conversion)
    assert end <= alone + number * conversion / 132 + 0.03 * alone
    assert end <= attention + 2 * conversion
