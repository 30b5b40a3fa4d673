"""Kernels for layouts of data, interpreted on the CPU: the schedules are those of PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from sparse_flash.kernels import data_kernels
from sparse_flash.kernels.data_recipes import ScheduleSizes
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.device_schedule import (
    TileList,
    _work_items,
    column_list,
    device_backward_schedule,
    device_schedule,
    row_list,
)
from sparse_flash.kernels.sm90.config import FORWARD_COSTS
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.device_builders import layout_of_call
from sparse_flash.masks.records import CACHE

from sparse_flash import masks
from tests.kernels import interpreter
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.test_device_schedule import (
    CASES,
    CAUSAL,
    LOCAL,
    packed,
    same_as_pytorch,
    some_layout,
)

pytest.importorskip("cutlass.cute")
SMALL = DeviceFacts("sm_90", num_sms=5, shared_memory=227 << 10, l2_bytes=60 << 20)


@pytest.fixture
def interpreted(monkeypatch):
    """Launches run in Python, on tensors of the CPU."""
    from sparse_flash.kernels import data_lists, document_bits, invalid_rows, work_items  # noqa: F401

    plan_on_cpu(monkeypatch, SMALL)
    for name in ("_cuda_getDevice", "_cuda_isCurrentStreamCapturing"):
        monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)
    with pytest.MonkeyPatch.context() as patch:  # the DSL itself comes back at once
        lists, bits, items = (
            interpreter.load(patch, name) for name in ("data_lists", "document_bits", "work_items")
        )
    kernels = data_kernels.Functions(
        from_int64=lists.BlockBits(from_table=False),
        from_int32=lists.BlockBits(from_table=False),
        from_table=lists.BlockBits(from_table=True),
        fit_rows=lists.ListTiles(by_column=False, fit=True),
        list_rows=lists.ListTiles(by_column=False),
        list_columns=lists.ListTiles(by_column=True),
        work_items=items.WorkItems(),
        own_bits=bits.OwnBits(),
        number_int64=bits.NumberDocuments(),
        number_int32=bits.NumberDocuments(),
    )
    functions = data_kernels.Functions(*(functools.partial(interpreter.call, k) for k in kernels))
    monkeypatch.setattr(data_kernels, "_usable", lambda *_: functions)
    CACHE.clear()
    yield
    CACHE.clear()


LENGTHS = (100, 28, 0, 300, 1, 339)
# A schedule takes some seconds.
thorough, by_hand = pytest.mark.thorough, pytest.mark.matrix


@pytest.mark.parametrize(
    "within", [CAUSAL, pytest.param(None, marks=by_hand), pytest.param(LOCAL, marks=by_hand)]
)
def test_documents(monkeypatch, interpreted, within):
    data, _ = packed(LENGTHS, within)
    layout, exact = data.layout(768), within is not LOCAL
    same_as_pytorch(monkeypatch, layout, (2, 1), 0, same_items=exact)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0)
    numbers = torch.bucketize(torch.arange(768), ends, right=True)
    assert torch.equal(layout.derived_bits.numbers[0], numbers.int())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_documents_of_a_call_are_copied_by_the_kernel(interpreted, dtype):
    """Later steps of the call, such as its backward pass, read the copy."""
    ends = torch.tensor((0, *LENGTHS), dtype=dtype).cumsum(0, dtype=dtype)
    values = ends.tolist()
    layout = layout_of_call(masks.documents(ends, length=768) & CAUSAL, 768, 768, ends.device)
    reader = layout.source.within.masks[0]
    assert reader.readable() is ends
    data = data_kernels.block_bits(layout, data_kernels._usable())
    assert not data.space[: data_kernels._COUNTER_SIZE].any()
    ends[2] = 700
    assert reader.readable().tolist() == reader.cu_seqlens.tolist() == values
    assert not data.errors.any()
    layout.check()
    wrong = layout_of_call(masks.documents(ends, length=768) & CAUSAL, 768, 768, ends.device)
    assert (data_kernels.block_bits(wrong, data_kernels._usable()).errors == 8).all()


@thorough
def test_groups_of_heads_and_long_rows(monkeypatch, interpreted):
    data, _ = packed((10, 900, 100, 14), CAUSAL)
    same_as_pytorch(monkeypatch, data.layout(1024), (4, 2), 20 << 20)


@thorough
def test_cu_seqlens_that_do_not_ascend(monkeypatch, interpreted):
    wrong = masks.documents(torch.tensor([0, 500, 400, 768]), length=768)
    same_as_pytorch(monkeypatch, wrong.layout(768), (2, 1), 0)


@by_hand
def test_documents_by_batch_entry_and_chosen_blocks(monkeypatch, interpreted):
    data, _ = packed(LENGTHS, CAUSAL)
    other, _ = packed((400, 368), CAUSAL)
    several = masks.per_batch([data, other])
    same_as_pytorch(monkeypatch, several.layout(768), (2, 1), 0)
    indices = torch.randint(-1, 768 // 64, (2, 2, 768 // 64, 3))
    for mask in (data, several):
        layout = BlockLayout.from_topk(indices, (64, 64), 768, within=mask)
        same_as_pytorch(monkeypatch, layout, (2, 2), 0)


@thorough
@pytest.mark.parametrize(
    ("kind", "within", "block", "heads", "tile", "transposed"), [CASES[1], CASES[4]]
)
def test_chosen_blocks(monkeypatch, interpreted, kind, within, block, heads, tile, transposed):
    layout = some_layout(kind, heads, block, (512, 768), within)
    same_as_pytorch(monkeypatch, layout, (4, 2), 20 << 20, (tile, transposed))


@thorough
@pytest.mark.parametrize("capacity", [(9, 0), (20, 3)])
def test_capacities(monkeypatch, interpreted, capacity):
    ends = torch.tensor([0, 300, 700, 1024])
    layout = masks.documents(ends, length=1024, capacity=capacity).layout(1024, None, (64, 64))
    same_as_pytorch(monkeypatch, layout, (2, 2), 0)


@pytest.mark.parametrize("backward", [False, True])
def test_rows_with_errors_are_nan(backward):
    with pytest.MonkeyPatch.context() as patch:
        module = interpreter.load(patch, "invalid_rows")
    kernel = module.InvalidRows(interpreter.Float32, backward)
    errors = torch.zeros(4, 11, dtype=torch.uint8)  # 2 batch entries, 2 heads with patterns
    errors[1, 2:4], errors[3, 10] = 1, 8
    of_queries = torch.zeros(2, 83, 4, 3)
    others = (
        [torch.zeros(2, 9, 2, 3), torch.ones(2, 9, 2, 3)]
        if backward
        else [torch.zeros(2, 4, 83)] * 2
    )
    interpreter.call(kernel, errors.view(-1), of_queries, *others, 2, 2, 8)
    bad = torch.zeros(2, 83, 4, dtype=torch.bool)
    bad[0, 16:32, 2:], bad[1, 80:, 2:] = True, True
    assert torch.equal(of_queries.isnan(), bad[..., None].expand(-1, -1, -1, 3))
    if not backward:
        assert torch.equal(others[0].isnan(), bad.transpose(1, 2))
        return
    for x in others:
        assert x[:, :, 1].isnan().all()
        assert not x[:, :, 0].isnan().any()


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_of_long_lines_are_found(interpreted, monkeypatch, transposed):
    """Narrow tiles: 64 lines of 512 candidates, in which a warp finds the ends in two steps."""
    listed = []
    functions = data_kernels._usable()._replace(
        work_items=lambda *arrays: listed.extend(arrays[:3]), own_bits=lambda *_: None
    )
    monkeypatch.setattr(data_kernels, "_usable", lambda *_: functions)
    lengths = (70, 0, 1, 3000, 129, 2000, 2992)
    layout = (masks.documents(torch.tensor((0, *lengths)).cumsum(0), length=8192)).layout(8192)
    sizes = (SMALL, FORWARD_COSTS)
    if transposed:
        made, _ = device_backward_schedule(layout, 1, (2, 1), (128, 16), *sizes)
        expected = column_list(layout, (128, 16), (2, 1))
    else:
        made, _ = device_schedule(layout, 1, 1, (128, 16), *sizes)
        expected = row_list(layout, (128, 16))
    begins, counts, partials = listed
    assert torch.equal(counts, expected.starts.diff())
    assert torch.equal(partials, expected.partial)
    for line, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=True)):
        columns = expected.tiles[expected.starts[line] :][:count, 0]
        assert torch.equal(made.tiles[begin : begin + count, 0], columns)


def items_of(tiles, heads, groups, joined=0):
    """`work` and `counts` for 6 CTAs and heads that share a pattern: of the kernel and PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        module = interpreter.load(patch, "work_items")
    rows = len(tiles)
    sizes = ScheduleSizes(
        batch=1, heads=heads, rows=rows, ctas=6, extra=20, groups=groups, joined=joined
    )
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), tiles.cumsum(0, dtype=torch.int32)])
    every, c = torch.zeros(int(starts[-1]) + 1, 2, dtype=torch.int32), FORWARD_COSTS
    listed = TileList(starts, every, tiles // 3, None, (1, 1), rows)
    work, combine, counts = _work_items(listed, sizes, c)
    found = [torch.zeros_like(x) for x in (work, combine, counts, counts[:1])]
    interpreter.call(
        module.WorkItems(),
        *(starts[:-1].clone(), tiles, tiles // 3, *found),
        *(1000, 1, heads, 1, 1, rows, groups, len(every) - 1, 6, sizes.rest, c.fewest_tiles),
        *(joined, c.item, c.partial_tile - 1, c.largest_share, c.split, c.combine, c.long_item),
    )
    assert torch.equal(found[2], counts)
    assert torch.equal(found[0][: counts[0]], work[: counts[0]])
    assert torch.equal(found[1][: counts[1]], combine[: counts[1]])
    return work[: counts[0]], counts


@pytest.mark.slow
def test_items_before_all_groups_come_in_their_order():
    """Two rows of the last head take longer than all later work: they come first."""
    tiles = torch.arange(40, dtype=torch.int32) % 9 + 3
    tiles[5], tiles[30] = 90, 100
    work, _ = items_of(tiles, 3, 3)
    assert [row[:2] for row in work[:2].tolist()] == [[30, 2], [5, 2]]


def test_the_last_groups_are_joined():
    """The longest rows take longer than the last head keeps the CTAs busy."""
    work, _ = items_of(torch.arange(1, 9, dtype=torch.int32), 5, 5)
    heads = [set(some.tolist()) for some in work[:, 1].split(8)]
    assert heads[:3] == [{0}, {1}, {2}]
    assert heads[3] == {3, 4}


def test_the_last_round_of_rows_that_differ_a_little_is_split():
    tiles = 18 + torch.arange(13, dtype=torch.int32) % 5  # 26 rows of 6 CTAs
    _, counts = items_of(tiles, 2, 1)
    assert counts[1] == 2
