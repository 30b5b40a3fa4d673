"""Schedules: nothing left out, nothing twice, and no CTA left with most of the work."""

from __future__ import annotations

import heapq
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.kernels.choice import cover
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.schedule import (
    ARRAYS,
    backward_schedule,
    schedule,
    stack_heads,
)
from sparse_flash.kernels.sm90.config import BACKWARD_COSTS, FORWARD_COSTS

from sparse_flash import masks
from tests.kernels.helpers import H200
from tests.strategies import settings_

COSTS = FORWARD_COSTS


def gpu(num_sms):
    """An H200 with this many multiprocessors."""
    return replace(H200, num_sms=num_sms)


M_BLOCK, HEAD, BATCH, FIRST, COUNT, PART = range(6)


def rows_of(plan):
    """{(batch, head, m_block): its items (first, count, part) in order of their tiles}."""
    rows = {}
    for item in plan.work.tolist():
        key = (item[BATCH], item[HEAD], item[M_BLOCK])
        rows.setdefault(key, []).append((item[FIRST], item[COUNT], item[PART]))
    return {key: sorted(items) for key, items in rows.items()}


@given(
    settings_(max_length=700, heads=True),
    st.integers(1, 2),
    st.sampled_from([(64, 64), (128, 128), (192, 128)]),
    st.sampled_from([1, 3, 132]),
    st.sampled_from([1, 3]),
)
def test_every_tile_is_computed_once(setting, batch, tile, ctas, fewest):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    costs = replace(COSTS, fewest_tiles=fewest)
    plan = schedule(layout, batch, 4, tile, gpu(ctas), costs, 1 << 20)
    expected = masks.retile(layout, tile)
    rows, parts = rows_of(plan), []
    combined = {(r[2], r[1], r[0]): (r[3], r[4]) for r in plan.combine.tolist()}
    owners = expected.pattern_map.expand(batch, 4)
    for b in range(batch):
        for h in range(4):
            starts = expected.crow_indices[owners[b, h]].tolist()
            for m in range(expected.num_block_rows):
                items = rows.pop((b, h, m), [])
                walked = [t for first, count, _ in items for t in range(first, first + count)]
                assert walked == list(range(starts[m], starts[m + 1]))
                mine = [part for _, _, part in items]
                if starts[m] == starts[m + 1]:
                    assert items == [(expected.num_tiles, 0, -1)]
                elif len(items) == 1:
                    assert mine == [-1]
                    assert (b, h, m) not in combined
                else:  # split: in order, next to each other
                    first, count = combined.pop((b, h, m))
                    assert count == len(items)
                    assert mine == list(range(first, first + count))
                    parts += mine
    assert not rows
    assert not combined
    assert sorted(parts) == list(range(plan.num_splits))
    assert torch.equal(plan.tiles[:-1, 0], expected.col_indices)
    assert torch.equal(plan.tiles[:-1, 1], expected.bit_tile_indices)
    assert plan.tiles[-1].tolist() == [0, 0]
    assert plan.kv_lens.tolist() == [setting.kv_len] * batch
    assert plan.counts.tolist() == [plan.num_items, len(plan.combine)]
    assert all(x.dtype == torch.int32 for x in plan.arrays())


def makespan(plan, ctas, costs=COSTS):
    """How long CTAs take that fetch items in order, and the mean: in full tiles."""
    partial = (plan.tiles[:, 1] >= 0).tolist()
    free = [0.0] * ctas
    for item in plan.work.tolist():
        tiles = partial[item[FIRST] : item[FIRST] + item[COUNT]]
        cost = costs.item + len(tiles) + (costs.partial_tile - 1) * sum(tiles)
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free), sum(free) / ctas


@pytest.mark.parametrize(
    ("spec", "length", "heads"),
    [
        ("local(128) | global_tokens(128)", 65536, 8),
        ("local(200) | global_tokens(37)", 65536, 8),
        ("causal()", 16384, 16),
        ("butterfly(128)", 65536, 8),
        ("random_blocks(0.05, 128, 0)", 16384, 16),
        ("full()", 4096, 8),
        ("star(3)", 32768, 4),
    ],
)
def test_work_is_balanced(spec, length, heads):
    layout = masks.parse(spec).layout(length)
    plan = schedule(layout, 1, heads, (128, 128), H200, COSTS, 4 * length * 64)
    longest, mean = makespan(plan, 132)
    assert longest < 1.07 * mean + 4


@pytest.mark.parametrize(
    ("spec", "length", "batch", "heads", "tile", "bound"),
    [
        ("full()", 16384, 1, 16, (128, 128), 1.03),  # 15.5 rounds of the CTAs, not 16
        ("full()", 16384, 1, 16, (192, 128), 1.03),
        ("full()", 2048, 32, 2, (192, 128), 1.06),  # 5.3
        ("butterfly(128)", 65536, 1, 8, (128, 128), 1.02),  # 31.03
    ],
)
def test_the_last_round_is_shared(spec, length, batch, heads, tile, bound):
    layout = masks.parse(spec).layout(length)
    plan = schedule(layout, batch, heads, tile, H200, COSTS)
    longest, mean = makespan(plan, 132)
    assert longest < bound * mean
    assert 0 < plan.num_splits <= 2 * 132
    whole = schedule(layout, batch, heads, tile, H200, COSTS, split_last_wave=False)
    assert whole.num_splits == 0
    assert longest < 0.99 * makespan(whole, 132)[0]


def test_a_last_round_that_would_not_gain_is_left_alone():
    # Halves would take two rounds, and thirds are more than may be.
    assert COSTS.last_parts(rest=131, tiles=128, row=129.5, num_ctas=132) == 1
    assert COSTS.last_parts(rest=131, tiles=8, row=9.5, num_ctas=132) == 1
    assert COSTS.last_parts(rest=4, tiles=1, row=2.5, num_ctas=132) == 1
    even = schedule(masks.full().layout(128 * 132), 1, 4, (128, 128), H200, COSTS)
    assert even.num_splits == 0


def test_without_splitting_one_row_would_keep_all_waiting():
    layout = masks.parse("local(128) | global_tokens(128)").layout(65536)
    whole = replace(COSTS, fewest_tiles=1 << 20)
    longest, mean = makespan(schedule(layout, 1, 8, (128, 128), H200, whole), 132, whole)
    assert longest > 2.4 * mean


def test_cost_model():
    layout = masks.local(200).layout(1024)  # inner rows: 3 full tiles between 2 partial ones
    costs = replace(COSTS, partial_tile=1.5, item=10)
    counts = layout.crow_indices.diff()[0]
    partial = torch.zeros(8).index_add(0, layout.tile_rows, (layout.bit_tile_indices >= 0).float())
    assert torch.equal(torch.from_numpy(costs.rows(layout))[0], 10 + counts + 0.5 * partial)
    share = torch.tensor(20.0)
    tiles = torch.tensor([0, 5, 40, 400])
    costs = replace(COSTS, largest_share=0.5, fewest_tiles=8)
    parts = costs.parts(tiles, tiles.float(), share)
    assert parts.tolist() == [1, 1, 4, 40]


def test_longest_come_first_in_each_group_of_heads():
    layout = masks.causal().layout(2048)
    plan = schedule(layout, 1, 4, (128, 128), H200, COSTS, 12 << 20)  # two heads fit the cache
    work = plan.work[plan.work[:, COUNT] <= plan.work[:, COUNT].median()]
    for group in (0, 1):
        counts = work[work[:, HEAD] // 2 == group][:, COUNT]
        assert torch.equal(counts, counts.sort(descending=True).values)


@pytest.mark.parametrize(
    "spec", ["random_blocks(0.25, 128, 0)", "random_blocks(0.05, 128, 0)", "causal()"]
)
def test_few_heads_are_at_work_at_a_time(spec):
    layout = masks.parse(spec).layout(16384)
    # A head at a time.
    plan = backward_schedule(layout, 1, (16, 16), (128, 64), H200, BACKWARD_COSTS, 16 << 20)
    assert {len(some.unique()) for some in plan.work[:, HEAD].split(132)} <= {1, 2, 3}
    longest, mean = makespan(plan, 132, BACKWARD_COSTS)
    assert longest < 1.04 * mean


@pytest.mark.parametrize("group_size", [8, 4, 3, 1])
def test_the_last_group_does_not_begin_with_what_ends_last(group_size):
    layout = masks.parse("block_local(128, 1) | global_tokens(128)").layout(65536)
    plan = schedule(layout, 1, 8, (128, 128), H200, COSTS, (24 << 20) // group_size)
    longest, mean = makespan(plan, 132)
    assert longest < 1.03 * mean  # 1.17 where three heads fit the cache, and long rows kept places


# The bounds lie between the makespans with the rule and those without it.
@pytest.mark.parametrize(
    ("spec", "length", "heads", "head_dim", "tile", "bound"),
    [
        ("causal()", 8192, 8, 256, (128, 64), 1.05),  # 1.17: groups of 3, 3 and 2 heads
        ("causal()", 16384, 8, 128, (192, 80), 1.06),  # 1.12
    ],
)
def test_a_group_begins_only_while_work_for_its_items_is_left(
    spec, length, heads, head_dim, tile, bound
):
    layout = masks.parse(spec).layout(length)
    plan = schedule(layout, 1, heads, tile, H200, COSTS, 4 * length * head_dim)
    longest, mean = makespan(plan, 132)
    assert longest < bound * mean
    first = plan.work[: len(plan.work) // 3, HEAD]
    assert first.max() < heads - 1  # heads are in groups, still


@pytest.mark.parametrize(
    ("spec", "length", "heads", "tile", "bound"),
    [
        ("random_blocks(0.5, 128, 0)", 16384, 8, (192, 80), 1.05),  # 5.2 rounds, 1.14 if not split
        ("random_blocks(0.35, 64, 2)", 10000, 6, (192, 128), 1.1),  # 2.4 rounds, 1.24 if not
    ],
)
def test_the_last_round_of_rows_that_differ_a_little_is_shared(spec, length, heads, tile, bound):
    layout = masks.parse(spec).layout(length)
    plan = schedule(layout, 1, heads, tile, H200, COSTS)
    longest, mean = makespan(plan, 132)
    assert longest < bound * mean
    assert 0 < plan.num_splits <= 2 * 132


def test_the_last_round_of_rows_that_differ_much_is_left_alone():
    layout = masks.parse("random_blocks(0.1, 128, 0)").layout(16384)
    assert schedule(layout, 1, 12, (128, 128), H200, COSTS).num_splits == 0


def test_empty_rows_and_empty_layouts():
    mask = masks.block_diagonal(64) & ~masks.sinks(300)
    plan = schedule(mask.layout(700), 2, 3, (128, 128), H200, COSTS)
    empty = plan.work[plan.work[:, COUNT] == 0]
    assert sorted(set(empty[:, M_BLOCK].tolist())) == [0, 1]
    assert len(empty) == 2 * 2 * 3
    assert len(plan.combine) == 0
    nothing = schedule((~masks.full()).layout(700), 1, 1, (128, 128), H200, COSTS)
    assert nothing.work[:, [FIRST, COUNT, PART]].tolist() == [[0, 0, -1]] * 6


@given(settings_(max_length=500), st.sampled_from([(64, 64), (128, 128), (192, 128), (16, 48)]))
def test_cover_counts_tiles_that_touch_stored_blocks(setting, tile):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    blocks = torch.zeros(layout.num_block_rows, layout.num_block_cols)
    blocks[layout.tile_rows.long(), layout.col_indices.long()] = 1
    whole = blocks.repeat_interleave(setting.block[0], 0).repeat_interleave(setting.block[1], 1)
    whole = whole[: setting.q_len, : setting.kv_len]
    pads = (0, -setting.kv_len % tile[1], 0, -setting.q_len % tile[0])
    padded = torch.nn.functional.pad(whole, pads)
    expected = padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).amax((1, 3)).sum()
    assert cover(layout, tile) == expected


def test_update_in_place():
    def plan(mask):
        return schedule(mask.layout(1000), 1, 2, (128, 128), H200, COSTS)

    large, small = plan(masks.causal()), plan(masks.local(50))
    arrays = large.arrays()
    large.update_(small)
    assert all(a is b for a, b in zip(large.arrays(), arrays, strict=True))
    items, rows = large.counts.tolist()
    assert (items, rows) == (small.num_items, len(small.combine))
    assert torch.equal(large.work[:items], small.work)
    assert torch.equal(large.tiles[: len(small.tiles)], small.tiles)
    before = [x.clone() for x in small.arrays()]
    with pytest.raises(ValueError, match=r"no room for .* entries of `tiles`: there were"):
        small.update_(plan(masks.full()))
    costs = replace(COSTS, fewest_tiles=1)
    split = schedule(masks.full().layout(1000), 1, 2, (128, 128), gpu(999), costs)
    with pytest.raises(ValueError, match="splits of rows"):
        small.update_(split)
    with pytest.raises(ValueError, match=r"tiles of \(192, 128\), this one of \(128, 128\)"):
        small.update_(schedule(masks.local(5).layout(1000), 1, 2, (192, 128), H200, COSTS))
    assert all(torch.equal(a, b) for a, b in zip(small.arrays(), before, strict=True))


def table_of(layout):
    """Which tile is where in a layout of one pattern: its bit tile, or -2 for none."""
    table = torch.full((layout.num_block_rows, layout.num_block_cols), -2, dtype=torch.int32)
    entries = layout.bit_tile_indices.clone()
    found = (entries >= 0).nonzero().squeeze(1)  # a single pattern has its own numbers of bit tiles
    for i in found.tolist():
        entries[i] = hash(layout.bit_tiles[entries[i].item()].numpy().tobytes()) % 1000003
    table[layout.tile_rows.long(), layout.col_indices.long()] = entries
    return table


@given(settings_(max_length=500, heads=True), st.sampled_from([1, 2, 4]))
def test_stacked_heads_are_those_of_each_group(setting, size):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    stacked = stack_heads(layout, size)
    width = layout.num_block_cols
    dense = [table_of(layout.pattern(p)) for p in range(layout.num_patterns)]
    owners = layout.pattern_map.expand(-1, 4)
    groups = stacked.pattern_map.expand(-1, 4 // size)
    for b in range(owners.shape[0]):
        for group in range(4 // size):
            got = table_of(stacked.pattern(int(groups[b, group])))
            heads = owners[b, group * size : (group + 1) * size].tolist()
            assert torch.equal(got, torch.cat([dense[p] for p in heads], 1))
    assert stacked.num_block_cols == size * width


@pytest.mark.parametrize("keys", [128, 96])
def test_backward_goes_by_keys_and_kv_heads(keys):
    layout = masks.causal().layout(300, 1000, block=(64, 64))
    plan = backward_schedule(layout, 2, (4, 2), (keys, 64), H200, BACKWARD_COSTS)
    assert plan.kv_lens.tolist() == [1000, 1000]
    assert plan.tile == (keys, 64)
    assert plan.bits.shape[1:] == (2, 128, 2)
    assert sorted(rows_of(plan)) == [
        (b, h, n) for b in range(2) for h in range(2) for n in range(-(-1000 // keys))
    ]
    expected = masks.retile(layout, (64, keys)).transpose()
    assert plan.work[:, COUNT].sum() == 2 * 4 * expected.num_tiles  # each q head's
    assert torch.equal(plan.bits[: plan.num_bit_tiles], fragment_order(expected.bit_tiles))


@given(settings_(max_length=300), st.sampled_from([1, 132, 10_000]))
def test_a_schedule_knows_its_size(setting, sms):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    plan = schedule(layout, 2, 2, (128, 64), gpu(sms), COSTS)
    assert all(a is getattr(plan, name) for a, name in zip(plan.arrays(), ARRAYS, strict=True))
    assert plan.num_ctas == min(plan.num_items, sms)
    assert plan.nbytes == sum(x.nbytes for x in plan.arrays())


def test_heads_are_grouped_by_the_cache_of_the_gpu():
    layout = masks.causal().layout(2048)

    def order(l2_bytes, costs=COSTS):
        facts = replace(H200, l2_bytes=l2_bytes, num_sms=1)
        return schedule(layout, 1, 4, (128, 128), facts, costs, 1 << 20).work[:, HEAD].tolist()

    one_by_one = order(1 << 20)
    assert one_by_one == sorted(one_by_one)
    assert order(5 << 20) == order(2 << 20, replace(COSTS, l2_share=1.0)) != one_by_one
    assert order(100 << 20)[:4] == [0, 1, 2, 3]


def test_schedules_do_not_depend_on_defaults():
    """Those of torch, which users set: device and dtype."""
    layout = (masks.causal() | masks.global_tokens(70)).layout(5000)

    def plans():
        return (
            schedule(layout, 1, 2, (128, 128), gpu(7), COSTS, 1 << 20),
            backward_schedule(layout, 1, (4, 2), (128, 128), gpu(7), BACKWARD_COSTS, 1 << 20),
        )

    expected = plans()
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    try:
        got = plans()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.arrays(), b.arrays(), strict=True))


THREADS = """
import os, sys, torch
from sparse_flash import masks
from sparse_flash.kernels.plan import PlanKey, plan_of
from sparse_flash.kernels.sm90.attention import BACKWARD, DETERMINISTIC_BACKWARD, FORWARD
from tests.kernels.helpers import H200
torch.set_num_threads(8)
before = len(os.listdir("/proc/self/task"))
for rule in sys.argv[1:]:
    layout = masks.parse(rule).layout(65536)
    for planners in (FORWARD, BACKWARD, DETERMINISTIC_BACKWARD):
        for d in (64, 128, 256):
            # With head_dim 256 tiles are small: those of two heads can be more than 32767.
            for kv_heads in (8, 4) if d < 256 else (8,):
                plan_of(layout, PlanKey(planners[torch.bfloat16, d], 1, 8, kv_heads, H200))
                assert len(os.listdir("/proc/self/task")) == before, (rule, d, kv_heads)
torch.ones(1 << 17).add_(1)
assert len(os.listdir("/proc/self/task")) > before  # this is how threads would show
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc lists the threads of a process")
def test_small_layouts_and_their_schedules_start_no_threads():
    """On a machine whose cores are busy, each operation with threads waits for a time slice."""
    rules = [
        "local(3) | global_tokens(64) | butterfly(128)",
        "dilated(64, 4) | local(9)",
        "local(300) & causal()",
        f"documents(({'1024, ' * 64})) & causal()",
    ]
    subprocess.run([sys.executable, "-c", THREADS, *rules], check=True)
