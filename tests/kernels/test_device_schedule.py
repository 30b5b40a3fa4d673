"""Schedules of layouts of data: as those of the host, tile by tile, and as well balanced."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.kernels import data_kernels
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.device_schedule import device_backward_schedule, device_schedule
from sparse_flash.kernels.schedule import backward_schedule, schedule
from sparse_flash.kernels.sm90 import attention
from sparse_flash.kernels.sm90.config import BACKWARD_COSTS, FORWARD_COSTS
from sparse_flash.masks import BlockLayout

from sparse_flash import masks
from sparse_flash.implementations.data_layouts import stored_layout
from tests.kernels.helpers import H200, sanitize
from tests.kernels.test_schedule import makespan, rows_of

CAUSAL, LOCAL = masks.causal(), masks.local((300, 70)) | masks.sinks(20)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_the_choice_of_kernels_does_not_read_data(head_dim, deterministic, monkeypatch):
    """To read them would synchronize the host, raise early, and fail in CUDA graphs."""
    layout = BlockLayout.from_topk(torch.zeros(1, 2, 4, 4, dtype=torch.int32), (128, 128), 512)

    def read(*_):
        raise AssertionError("the layout's tiles were read")

    for name in ("fixed", "stored", "check"):
        monkeypatch.setattr(type(layout), name, read)
    q = torch.empty(1, 512, 2, head_dim, dtype=torch.bfloat16, device="meta")
    assert attention.unsupported_blocks(layout, q, deterministic) is None


def used(plan):
    """A schedule on the CPU, without its unused memory."""
    items, rows = plan.counts.tolist()
    arrays = {name: getattr(plan, name).cpu() for name in ("tiles", "bits", "kv_lens", "counts")}
    work, combine = plan.work[:items].cpu(), plan.combine[:rows].cpu()
    return replace(plan, work=work, combine=combine, **arrays)


def rows_with_tiles(plan):
    """{(batch, head, m_block): [(n_block, bits)]} without tiles in which nothing is allowed."""
    plan, rows = used(plan), {}
    word = (1 << plan.tile[1] // 4) - 1  # of a row of a full tile, a quarter of its columns
    full = word - (1 << 32) if word >= 1 << 31 else word
    split = {(r[2], r[1], r[0]): (r[3], r[4]) for r in plan.combine.tolist()}
    assert len(split) == len(plan.combine)
    parts = []
    for key, pieces in rows_of(plan).items():
        where = [t for first, count, _ in pieces for t in range(first, first + count)]
        assert where == list(range(where[0], where[0] + len(where))) if where else True
        if len(pieces) > 1:
            first, count = split.pop(key)
            assert [part for *_, part in pieces] == list(range(first, first + count))
            parts += range(first, first + count)
        else:
            assert pieces[0][2] == -1
        found = []
        for column, entry in plan.tiles[where].tolist():
            bits = None if entry < 0 else plan.bits[entry].flatten().tolist()
            if bits is None or any(bits):
                found.append((column, None if bits is None or set(bits) == {full} else bits))
        rows[key] = found
    assert not split
    assert sorted(parts) == list(range(len(parts)))
    assert len(parts) <= plan.num_splits
    return rows


def some_layout(kind, heads, block, lengths, within, device="cpu"):
    """A layout of random blocks, with an empty row and, of a table, an empty column."""
    generator = torch.Generator().manual_seed(0)
    nq, nk = (-(-n // side) for n, side in zip(lengths, block, strict=True))
    if kind == "topk":
        indices = torch.randint(-1, nk, (*heads, nq, 3), generator=generator)
        indices[:, :, 1] = -1
        return BlockLayout.from_topk(indices.to(device), block, *lengths, within=within)
    table = torch.rand(*heads, nq, nk, generator=generator) < 0.3
    table[:, :, 1] = False
    table[..., nk // 2] = False
    return BlockLayout.from_blocks(table.to(device), block, *lengths, within=within)


CASES = [  # kind, mask, block, batch entries and heads, tile of the forward and backward pass
    ("topk", None, (128, 128), (1, 4), (128, 128), (128, 64)),
    ("blocks", CAUSAL, (64, 64), (2, 2), (128, 128), (64, 64)),
    ("topk", LOCAL, (64, 64), (2, 4), (128, 64), (128, 128)),
    ("blocks", None, (32, 64), (1, 1), (128, 64), (128, 64)),
    ("topk", CAUSAL, (16, 64), (2, 4), (128, 128), (128, 64)),
    ("blocks", LOCAL, (256, 64), (1, 2), (128, 128), (128, 64)),
    ("topk", CAUSAL, (32, 256), (2, 1), (128, 64), (64, 128)),
    (
        "topk",
        masks.per_head([CAUSAL, LOCAL, CAUSAL, CAUSAL]),
        (64, 64),
        (2, 2),
        (128, 128),
        (128, 64),
    ),
]


# Lengths are multiples of the tiles: at ragged ends the bits beyond differ, and do not matter.
@pytest.mark.parametrize(("kind", "within", "block", "heads", "tile", "transposed"), CASES)
def test_tiles_are_those_of_the_host(kind, within, block, heads, tile, transposed):
    layout = some_layout(kind, heads, block, (512, 768), within)
    layout.check()
    stored = stored_layout(layout, 4)
    got, errors = device_schedule(layout, 2, 4, tile, H200, FORWARD_COSTS)
    host = schedule(stored, 2, 4, tile, H200, FORWARD_COSTS)
    assert rows_with_tiles(got) == rows_with_tiles(host)
    assert not errors.any()
    got, errors = device_backward_schedule(layout, 2, (4, 2), transposed, H200, BACKWARD_COSTS)
    host = backward_schedule(stored, 2, (4, 2), transposed, H200, BACKWARD_COSTS)
    assert rows_with_tiles(got) == rows_with_tiles(host)
    assert not errors.any()
    assert errors.shape == (layout.num_patterns, layout.num_block_rows)


def packed(lengths, within, device="cpu"):
    """Documents from cu_seqlens, and the same from lengths."""
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    padded = torch.cat([ends, ends[-1:].expand(3)])
    both = masks.documents(padded, length=sum(lengths)), masks.documents(lengths)
    return both if within is None else tuple(mask & within for mask in both)


@pytest.mark.parametrize("within", [None, CAUSAL])
def test_documents_are_those_of_the_host(within):
    data, fixed = packed((100, 28, 0, 300, 340), within)
    layout, host = data.layout(768), fixed.layout(768)
    got, _ = device_schedule(layout, 1, 2, (128, 128), H200, FORWARD_COSTS)
    expected = schedule(host, 1, 2, (128, 128), H200, FORWARD_COSTS)
    assert rows_with_tiles(got) == rows_with_tiles(expected)
    sizes = (1, (2, 1), (128, 64), H200, BACKWARD_COSTS)
    got, _ = device_backward_schedule(layout, *sizes)
    assert rows_with_tiles(got) == rows_with_tiles(backward_schedule(host, *sizes))


BALANCED = [  # patterns as in test_schedule: spec, length, batch, heads, tile
    ("local(128) | global_tokens(128)", 65536, 1, 8, (128, 128)),
    ("local(200) | global_tokens(37)", 65536, 1, 8, (128, 128)),
    ("causal()", 16384, 1, 16, (128, 128)),
    ("butterfly(128)", 65536, 1, 8, (128, 128)),
    ("random_blocks(0.05, 128, 0)", 16384, 1, 16, (128, 128)),
    ("random_blocks(0.5, 128, 0)", 12288, 1, 6, (128, 128)),
    ("full()", 4096, 1, 8, (128, 128)),
    ("full()", 16384, 1, 16, (128, 128)),
    ("full()", 16384, 1, 16, (192, 128)),
    ("full()", 2048, 32, 2, (192, 128)),
    ("star(3)", 32768, 1, 4, (128, 128)),
]


@pytest.mark.parametrize(("spec", "length", "batch", "heads", "tile"), BALANCED)
def test_work_is_balanced_as_on_the_host(spec, length, batch, heads, tile):
    mask = masks.parse(spec)
    block = (64, 128) if tile[0] == 192 else tile  # tiles are of whole blocks
    layout = mask.layout(length, block=block)
    table = torch.zeros(1, 1, layout.num_block_rows, layout.num_block_cols, dtype=torch.bool)
    table[0, 0, layout.tile_rows, layout.col_indices.long()] = True
    data = BlockLayout.from_blocks(table, block, length, within=mask)
    got, _ = device_schedule(data, batch, heads, tile, H200, FORWARD_COSTS, 4 * length * 64)
    host = schedule(layout, batch, heads, tile, H200, FORWARD_COSTS, 4 * length * 64)
    assert makespan(used(got), 132)[0] <= 1.03 * makespan(host, 132)[0]
    sizes = (batch, (heads, heads), (128, 128), H200, BACKWARD_COSTS, 8 * length * 64)
    got, host = device_backward_schedule(data, *sizes)[0], backward_schedule(layout, *sizes)
    longest = makespan(used(got), 132, BACKWARD_COSTS)[0]
    assert longest <= 1.03 * makespan(host, 132, BACKWARD_COSTS)[0]


@pytest.mark.parametrize(
    ("spec", "length", "heads", "tile", "kv_bytes"),
    [
        ("causal()", 8192, 8, (128, 64), 8 << 20),  # the last groups of heads are one
        ("random_blocks(0.5, 64, 0)", 8192, 10, (128, 128), 0),  # the last round is split
    ],
)
def test_ends_are_those_of_the_host(spec, length, heads, tile, kv_bytes):
    mask = masks.parse(spec)
    layout = mask.layout(length, block=tile)
    table = torch.zeros(1, 1, layout.num_block_rows, layout.num_block_cols, dtype=torch.bool)
    table[0, 0, layout.tile_rows, layout.col_indices.long()] = True
    data = BlockLayout.from_blocks(table, tile, length, within=mask)
    got, _ = device_schedule(data, 1, heads, tile, H200, FORWARD_COSTS, kv_bytes)
    host = schedule(layout, 1, heads, tile, H200, FORWARD_COSTS, kv_bytes)
    fields = [0, 1, 2, 4, 5]  # all but first tiles
    assert used(got).work[:, fields].equal(host.work[:, fields])
    assert used(got).combine.equal(host.combine)


def same_as_pytorch(
    monkeypatch, layout, heads, kv_bytes, tiles=((128, 128), (128, 64)), same_items=True
):
    """Whether the kernels make the schedules that PyTorch makes.

    same_items: Item by item. Else tiles in which nothing is allowed may differ: with documents,
        PyTorch classifies a whole mask where kernels look up the exact tiles of its fixed part.
    """
    facts = DeviceFacts.of(layout.device)
    batch = layout.source.heads[0]

    def both():
        forward = device_schedule(layout, batch, heads[0], tiles[0], facts, FORWARD_COSTS, kv_bytes)
        return forward, device_backward_schedule(
            layout, batch, heads, tiles[1], facts, BACKWARD_COSTS, kv_bytes
        )

    by_kernel = both()
    with monkeypatch.context() as patch:
        patch.setattr(data_kernels, "_usable", lambda *_: None)
        by_torch = both()
    for (mine, errors), (other, expected) in zip(by_kernel, by_torch, strict=True):
        a, b = used(mine), used(other)
        assert torch.equal(errors, expected)
        assert rows_with_tiles(mine) == rows_with_tiles(other)
        if not same_items:
            continue
        assert torch.equal(a.counts, b.counts)
        # Costs that differ in their last bit alone make another order, and other numbers of parts.
        assert a.work[:, [0, 1, 2, 4]].unique(dim=0).equal(b.work[:, [0, 1, 2, 4]].unique(dim=0))
        first, second = makespan(a, facts.num_sms), makespan(b, facts.num_sms)
        assert first[0] == pytest.approx(second[0], rel=1e-3)
        assert torch.equal(a.combine, b.combine)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "within", "block", "heads", "tile", "transposed"), CASES)
def test_kernels_do_what_pytorch_does(monkeypatch, kind, within, block, heads, tile, transposed):
    layout = some_layout(kind, heads, block, (512, 768), within, "cuda")
    for kv_bytes in (0, 20 << 20):
        same_as_pytorch(monkeypatch, layout, (4, 2), kv_bytes, (tile, transposed))


@pytest.mark.gpu
def test_kernels_split_long_lines_and_last_rounds(monkeypatch):
    table = torch.rand(1, 1, 128, 128, device="cuda") < 0.05
    table[:, :, 0], table[..., 3] = True, True
    layout = BlockLayout.from_blocks(table, (128, 128), 16384)
    same_as_pytorch(monkeypatch, layout, (8, 8), 16384 * 256)
    every = BlockLayout.from_blocks(torch.ones_like(table), (128, 128), 16384)
    same_as_pytorch(monkeypatch, every, (4, 4), 0, ((128, 128), (128, 128)))


@pytest.mark.gpu
@pytest.mark.parametrize("within", [None, CAUSAL, LOCAL])
def test_kernels_cut_by_documents(monkeypatch, within):
    exact = within is not LOCAL
    data, _ = packed((100, 28, 0, 300, 340), within, "cuda")
    same_as_pytorch(monkeypatch, data.layout(768, device="cuda"), (2, 1), 0, same_items=exact)
    other, _ = packed((400, 368), within, "cuda")
    several = masks.per_batch([data, other, data])
    same_as_pytorch(monkeypatch, several.layout(768, device="cuda"), (2, 1), 0, same_items=exact)
    for block in ((128, 128), (64, 64)):
        indices = torch.randint(-1, 768 // block[1], (3, 2, 768 // block[0], 3), device="cuda")
        for mask in (data, several):
            layout = BlockLayout.from_topk(indices, block, 768, within=mask)
            same_as_pytorch(monkeypatch, layout, (2, 2), 0, same_items=exact)
    wrong = masks.documents(torch.tensor([0, 500, 400, 768], device="cuda"), length=768)
    layout = wrong.layout(768, device="cuda")
    same_as_pytorch(monkeypatch, layout, (2, 1), 0, same_items=exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "length", "batch", "heads", "tile"), BALANCED)
def test_kernels_balance_as_pytorch_does(monkeypatch, spec, length, batch, heads, tile):
    mask = masks.parse(spec)
    layout = mask.layout(length, block=(64, 128), device="cuda")
    table = torch.zeros(batch, 1, length // 64, length // 128, dtype=torch.bool, device="cuda")
    table[:, 0, layout.tile_rows, layout.col_indices.long()] = True
    data = BlockLayout.from_blocks(table, (64, 128), length, within=mask)
    same_as_pytorch(monkeypatch, data, (heads, heads), 4 * length * 64, (tile, (128, 128)))


@pytest.mark.gpu
def test_kernels_mark_rows(monkeypatch):
    indices = torch.zeros(2, 2, 8, 3, dtype=torch.int32, device="cuda")
    indices[1, 0, 3, 1], indices[0, 1, 7, 2] = -2, 8
    layout = BlockLayout.from_topk(indices, (128, 128), 1024)
    same_as_pytorch(monkeypatch, layout, (2, 2), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (256, 128)])
@pytest.mark.parametrize("capacity", [(0, 0), (9, 0), (20, 3), (400, 400)])
def test_kernels_keep_to_capacities(monkeypatch, block, capacity):
    nq, nk = 1024 // block[0], 1024 // block[1]
    indices = torch.randint(-1, nk, (1, 2, nq, 2), device="cuda")
    table = torch.rand(1, 1, nq, nk, device="cuda") < 0.5
    ends = torch.tensor([0, 300, 700, 1024], device="cuda")
    sizes = {"block": block, "q_len": 1024, "capacity": capacity}
    for layout in (
        BlockLayout.from_topk(indices, within=LOCAL, **sizes),
        BlockLayout.from_blocks(table, **sizes),
        masks.documents(ends, length=1024, capacity=capacity).layout(1024, None, block, "cuda"),
    ):
        same_as_pytorch(monkeypatch, layout, (2, 2), 0)


SANITIZED = """
import torch
from sparse_flash import masks
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.device_schedule import device_backward_schedule, device_schedule
from sparse_flash.kernels.sm90.config import BACKWARD_COSTS, FORWARD_COSTS
from sparse_flash.masks import BlockLayout

facts = DeviceFacts.of(torch.device("cuda", 0))
indices = torch.randint(-1, 40, (1, 2, 20, 7), device="cuda")
ends = torch.tensor([0, 700, 2560], device="cuda")
mask = masks.documents(ends, length=2560) & masks.causal()
for layout in (
    BlockLayout.from_topk(indices, (128, 64), 2560, capacity=(250, 0)),
    BlockLayout.from_topk(indices, (128, 64), 2560, within=mask),
    mask.layout(2560, device="cuda"),
):
    for kv_bytes in (0, 20 << 20):
        device_schedule(layout, 1, 2, (128, 128), facts, FORWARD_COSTS, kv_bytes)
        sizes = (1, (2, 2), (128, 64), facts, BACKWARD_COSTS, kv_bytes)
        device_backward_schedule(layout, *sizes)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(tool, SANITIZED)
