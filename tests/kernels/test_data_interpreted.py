"""Kernels for layouts of data, interpreted on the CPU: the schedules are those of PyTorch."""

from __future__ import annotations

import functools

import pytest
import torch
from sparse_flash.kernels import data_kernels
from sparse_flash.kernels.device import DeviceFacts
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
thorough = pytest.mark.thorough  # a schedule takes some seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    "within", [CAUSAL, pytest.param(None, marks=thorough), pytest.param(LOCAL, marks=thorough)]
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


@thorough
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
