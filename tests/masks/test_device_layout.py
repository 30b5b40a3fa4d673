"""Layouts of data: exact, checked, and read once, when they are made."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sparse_flash.masks import BlockLayout, device_layout

from sparse_flash import masks

CAUSAL = masks.causal()
MASKS = [None, CAUSAL, masks.local((40, 3)) | masks.sinks(2)]


def chosen(indices, columns):
    """A table of the blocks that indices choose."""
    table = torch.zeros(*indices.shape[:3], columns, dtype=torch.bool)
    for j in range(columns):
        table[..., j] = (indices == j).any(3)
    return table


def dense(table, block, q_len, kv_len, within):
    """The elements of a table of blocks, bool (b, h, q_len, kv_len)."""
    elements = table.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
    elements = elements[:, :, :q_len, :kv_len]
    if within is None:
        return elements
    return elements & within(torch.arange(q_len)[:, None], torch.arange(kv_len))


def elements_of(layout):
    """As `dense`, of a layout."""
    found = layout.to_dense()
    return found[None, None] if found.ndim == 2 else found


@pytest.mark.parametrize("within", MASKS)
@pytest.mark.parametrize(
    ("block", "q_len", "kv_len", "heads"),
    [((16, 16), 100, 75, (1, 1)), ((32, 8), 64, 64, (2, 3)), ((5, 24), 61, 100, (1, 2))],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_elements_of_indices_and_tables(within, block, q_len, kv_len, heads, dtype):
    nq, nk = -(-q_len // block[0]), -(-kv_len // block[1])
    indices = torch.randint(-1, nk, (*heads, nq, 3), dtype=dtype)
    indices[:, :, 0] = -1
    table = chosen(indices, nk)
    expected = dense(table, block, q_len, kv_len, within)
    layout = BlockLayout.from_topk(indices, block, q_len, kv_len, within=within)
    layout.check()
    assert torch.equal(elements_of(layout), expected)
    other = BlockLayout.from_blocks(table, block, q_len, kv_len, within=within)
    assert other.fixed().equal(layout.fixed())
    assert layout.density == pytest.approx(expected.double().mean().item())
    again = BlockLayout(*layout.lengths, **layout.arrays())  # arrays are validated
    assert again.equal(layout.fixed())


def test_masks_by_head_cut_groups_of_heads():
    by_head = masks.per_head([CAUSAL, masks.full(), CAUSAL, masks.local(9)])
    indices = torch.randint(-1, 5, (2, 2, 5, 2))
    layout = BlockLayout.from_topk(indices, (16, 16), 75, within=by_head)
    table = chosen(indices, 5).repeat_interleave(2, 1)
    q, kv = torch.arange(75)[:, None], torch.arange(75)
    assert torch.equal(elements_of(layout), dense(table, (16, 16), 75, 75, None) & by_head(q, kv))
    one = BlockLayout.from_topk(indices[:1, :1], (16, 16), 75, within=by_head)
    assert one.pattern_map.shape == (1, 4)
    with pytest.raises(ValueError, match="masks for 4 heads, but the data have 3"):
        BlockLayout.from_topk(torch.zeros(1, 3, 5, 1).long(), (16, 16), 75, within=by_head)


READERS = {
    "check": lambda layout, path: layout.check(),
    "density": lambda layout, path: layout.density,
    "num_tiles": lambda layout, path: layout.num_tiles,
    "crow_indices": lambda layout, path: layout.crow_indices,
    "to_dense": lambda layout, path: layout.to_dense(),
    "text": lambda layout, path: layout.text(4),
    "save": lambda layout, path: layout.save(path / "layout.npz"),
    "pickle": lambda layout, path: pickle.dumps(layout),
    "transpose": lambda layout, path: layout.transpose(),
    "to": lambda layout, path: layout.fixed(),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_does_not_fit_is_an_error_everywhere(reader, tmp_path):
    read = READERS[reader]
    indices = torch.tensor([[[[0, 1], [1, 1], [2, -1]]]])  # 4 tiles, of which 3 partial
    sizes = ((16, 16), 48)
    read(BlockLayout.from_topk(indices, *sizes, capacity=(4, 0)), tmp_path)
    with pytest.raises(ValueError, match=r"block row 2 .* more tiles than the capacity of 3 holds"):
        read(BlockLayout.from_topk(indices, *sizes, capacity=(3, 0)), tmp_path)
    for wrong in (3, -2, 2**40):
        bad = indices.clone()
        bad[0, 0, 1, 0] = wrong
        with pytest.raises(ValueError, match=r"block row 1 .* neither -1 nor a block .*0\.\.2"):
            read(BlockLayout.from_topk(bad, *sizes), tmp_path)
    read(BlockLayout.from_blocks(chosen(indices, 3), *sizes, capacity=(4, 0)), tmp_path)
    with pytest.raises(ValueError, match=r"block row 0 .* \(and 2 more\)"):
        read(BlockLayout.from_blocks(chosen(indices, 3), *sizes, capacity=(1, 0)), tmp_path)


def test_a_repr_names_the_reason_instead_of_raising(monkeypatch):
    indices = torch.tensor([[[[0, 1], [1, 1], [2, -1]]]])
    assert repr(BlockLayout.from_topk(indices, (16, 16), 48)).startswith("BlockLayout(48 x 48, ")
    bad = BlockLayout.from_topk(indices, (16, 16), 48, capacity=(3, 0))
    assert repr(bad) == (
        "DeviceLayout(48 x 48, block 16 x 16, invalid: block row 2 of batch entry 0, head 0 has "
        "more tiles than the capacity of 3 holds: raise capacity[0])"
    )
    monkeypatch.setattr(device_layout, "is_capturing", lambda device: True)
    assert repr(bad).endswith("block 16 x 16, not known while a CUDA graph is captured)")


def test_a_layout_on_the_meta_device_prints():
    layout = BlockLayout.from_topk(torch.zeros(1, 1, 3, 2).long().to("meta"), (16, 16), 48)
    assert repr(layout) == ("DeviceLayout(48 x 48, block 16 x 16, not known on the meta device)")


@pytest.mark.parametrize("cut", [masks.local(20), masks.local(20) & masks.documents((30, 66))])
@pytest.mark.parametrize("tile", [(32, 32), (64, 16), (16, 32), (8, 16)])
def test_tiles_of_another_size_keep_to_the_capacity_of_blocks(cut, tile):
    """Blocks of which the mask leaves nothing do not count, nor do their tiles."""
    indices = torch.tensor([[[[0, 5], [5, 1], [4, 0], [3, 5], [4, 0], [5, 1]]]])
    needed = BlockLayout.from_topk(indices, (16, 16), 96, within=cut).num_tiles
    layout = BlockLayout.from_topk(indices, (16, 16), 96, within=cut, capacity=(needed, 0))
    layout.check()
    assert not layout.tiles_at(tile).errors.any()
    table = torch.zeros(1, 1, 6, 6, dtype=torch.bool).scatter_(3, indices, value=True)
    layout = BlockLayout.from_blocks(table, (16, 16), 96, within=cut, capacity=(needed, 0))
    assert not layout.tiles_at(tile).errors.any()
    less = BlockLayout.from_blocks(table, (16, 16), 96, within=cut, capacity=(needed - 1, 0))
    assert torch.equal(less.tiles_at(tile).errors, less.tiles_at((16, 16)).errors)
    assert less.tiles_at(tile).errors.count_nonzero() == 1


@pytest.mark.parametrize("room", [-1, 0])
def test_bit_tiles_of_documents_just_fit_or_not(room):
    ends = torch.tensor([0, 20, 50, 96, 96])
    needed = masks.documents(ends, length=96).layout(96, block=(16, 16))
    tiles, partial = needed.num_tiles, needed.num_partial
    layout = masks.documents(ends, length=96, capacity=(tiles, partial + room))
    layout = layout.layout(96, block=(16, 16))
    if room:
        with pytest.raises(ValueError, match=r"bit tiles than the capacity of \d+ holds: raise"):
            layout.check()
    else:
        assert layout.fixed().equal(needed.fixed())
    layout = masks.documents(ends, length=96, capacity=(tiles + room, partial))
    layout = layout.layout(96, block=(16, 16))
    if room:
        with pytest.raises(ValueError, match=rf"more tiles than the capacity of {tiles - 1} holds"):
            layout.check()
    else:
        layout.check()


@pytest.mark.parametrize(
    "around",
    [
        lambda mask: mask,
        lambda mask: mask & CAUSAL,
        lambda mask: (mask | masks.sinks(3)) & masks.local((30, 9)),
        lambda mask: ~mask,
        lambda mask: masks.per_head([mask, mask & CAUSAL]),
    ],
)
@pytest.mark.parametrize("block", [(16, 16), (8, 48)])
def test_documents_of_cu_seqlens_are_those_of_lengths(around, block):
    lengths = (10, 0, 33, 1, 52)
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    ends = torch.cat([ends, ends[-1:], ends[-1:]])
    mask = around(masks.documents(ends, length=96))
    fixed = around(masks.documents(lengths))
    layout = mask.layout(96, block=block)
    assert torch.equal(layout.to_dense(), fixed.layout(96, block=block).to_dense())
    q, kv = torch.arange(96)[:, None], torch.arange(96)
    assert torch.equal(mask(q, kv), fixed(q, kv))
    within = BlockLayout.from_blocks(
        torch.ones(1, 1, -(-96 // block[0]), -(-96 // block[1])).bool(), block, 96, within=mask
    )
    assert torch.equal(within.to_dense(), layout.to_dense())


def test_documents_are_read_anew_by_each_layout_and_by_no_other():
    ends = torch.tensor([0, 40, 96])
    mask = masks.documents(ends, length=96) & CAUSAL
    before = mask.layout(96, block=(16, 16))
    ends[1] = 16  # not seen by the layout, although nothing was computed yet
    after = mask.layout(96, block=(16, 16))
    assert before.fixed().equal((masks.documents((40, 56)) & CAUSAL).layout(96, block=(16, 16)))
    assert after.fixed().equal((masks.documents((16, 80)) & CAUSAL).layout(96, block=(16, 16)))
    indices = torch.tensor([[[[0], [1]]]])
    layout = BlockLayout.from_topk(indices, (8, 8), 16)
    indices.zero_()
    assert layout.col_indices.tolist() == [0, 1]


def test_documents_on_the_device_compare_by_their_tensor():
    ends = torch.tensor([0, 40, 96])
    mask = masks.documents(ends, length=96)
    assert mask == masks.documents(ends, length=96)
    assert hash(mask) == hash(masks.documents(ends, length=96))
    assert mask != masks.documents(ends.clone(), length=96)
    assert mask != masks.documents((40, 56))
    assert mask & CAUSAL == masks.documents(ends, length=96) & CAUSAL
    assert repr(mask) == "documents(<torch.int64 (3,) on cpu>, length=96)"
    assert masks.documents((40, 56)) == masks.parse("documents((40, 56))")


@pytest.mark.parametrize("ends", [[0, 40, 90], [1, 40, 96], [0, 50, 40, 96], [0, 97, 96]])
def test_cu_seqlens_that_are_no_lengths(ends):
    layout = masks.documents(torch.tensor(ends), length=96).layout(96)
    with pytest.raises(ValueError, match="cu_seqlens do not ascend from 0 to 96"):
        layout.check()


def test_arguments():
    good = torch.zeros(1, 1, 3, 2).long()
    topk, blocks = BlockLayout.from_topk, BlockLayout.from_blocks
    for error, message, call in [
        (TypeError, "indices must be integers", lambda: topk(good.float(), (16, 16), 48)),
        (TypeError, "tensor of integers .* got list", lambda: topk([[0]], (16, 16), 48)),
        (
            ValueError,
            r"\(1 or batch, 1 or heads, 3, k\)",
            lambda: topk(good[:, :, :2], (16, 16), 48),
        ),
        (ValueError, "k at least 1", lambda: topk(good[..., :0], (16, 16), 48)),
        (ValueError, "must have 4 dimensions", lambda: topk(good[0], (16, 16), 48)),
        (
            TypeError,
            "ordinary tensor, got torch.sparse",
            lambda: topk(good.to_sparse(), (16, 16), 48),
        ),
        (TypeError, "block must be a pair", lambda: topk(good, 16, 48)),
        (TypeError, "within must be a Mask", lambda: topk(good, (16, 16), 48, within="causal()")),
        (TypeError, "capacity must be a pair", lambda: topk(good, (16, 16), 48, capacity=3)),
        (
            ValueError,
            "capacity must be at least 0",
            lambda: topk(good, (16, 16), 48, capacity=(-1, 0)),
        ),
        (TypeError, "table must be bools", lambda: blocks(good, (16, 16), 48)),
        (ValueError, r"1 or heads, 3, 3\)", lambda: blocks(good.bool(), (16, 16), 48)),
        (
            ValueError,
            "made for q_len=9",
            lambda: topk(good, (16, 16), 48, within=masks.documents((9,))),
        ),
        (
            TypeError,
            "cu_seqlens must be an integer tensor",
            lambda: masks.documents([0, 9], length=9),
        ),
        (TypeError, "int32 or int64", lambda: masks.documents(torch.zeros(2), length=9)),
        (ValueError, "n at least 2", lambda: masks.documents(torch.zeros(1).long(), length=9)),
        (ValueError, "length must be at least 1", lambda: masks.documents(good.view(-1), length=0)),
        (
            TypeError,
            "capacity goes with cu_seqlens",
            lambda: masks.documents((9,), capacity=(1, 1)),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_a_layout_is_not_made_within_vmap():
    """Its operations would not be mapped, and its sizes are those of one batch."""
    indices = torch.zeros(4, 1, 1, 3, 2).long()
    for transform in (lambda f: f, torch.func.grad):

        def density(x, of):
            BlockLayout.from_topk(of, (16, 16), 48)
            return x

        with pytest.raises(ValueError, match=r"indices inside torch.vmap.*make it outside"):
            torch.func.vmap(transform(density))(torch.zeros(4), indices)


def test_documents_are_not_made_within_vmap():
    """For several batch entries there is a mask for each."""
    ends = torch.tensor([[0, 20, 48], [0, 30, 48]])

    def number(cu_seqlens):
        masks.documents(cu_seqlens, length=48)
        return cu_seqlens

    with pytest.raises(ValueError, match=r"inside torch.vmap.*masks.per_batch"):
        torch.func.vmap(number)(ends)
    layout = masks.per_batch([masks.documents(x, length=48) for x in ends]).layout(48)
    assert layout.to_dense().float().mean((-1, -2)).flatten().tolist() == pytest.approx(
        [(20**2 + 28**2) / 48**2, (30**2 + 18**2) / 48**2]
    )


def test_indices_of_16_bits_and_more_blocks_than_they_count():
    indices = torch.tensor([[[[0, 5, -1], [7, 7, -1]]]])
    for dtype in (torch.int16, torch.int32):
        layout = BlockLayout.from_topk(indices.to(dtype), (64, 8), 128, 8 * 40_000)
        layout.check()
        assert layout.col_indices.tolist() == [0, 5, 7]


def test_copies_are_fixed_layouts_and_updates_are_refused():
    layout = BlockLayout.from_topk(torch.tensor([[[[0], [1]]]]), (8, 8), 16)
    for other in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert type(other) is BlockLayout
        assert other.equal(layout)
    with pytest.raises(TypeError, match="not updated: make it again"):
        layout.update_(layout.fixed())
    with torch.inference_mode():
        inside = BlockLayout.from_topk(torch.tensor([[[[0], [1]]]]), (8, 8), 16)
    assert not inside.tiles_at((8, 8)).tiles.is_inference()
    fixed = masks.causal().layout(16)
    fixed.check()
    assert not fixed.on_device
    assert layout.on_device
    assert layout.nbytes > 0


def test_data_mapped_by_vmap_are_refused():
    table = torch.ones(3, 1, 1, 2, 2, dtype=torch.bool)
    ends = torch.tensor([[0, 3, 8], [0, 4, 8], [0, 5, 8]])
    for data, make in (
        (table.long(), lambda x: BlockLayout.from_topk(x, (4, 4), 8)),
        (table, lambda x: BlockLayout.from_blocks(x, (4, 4), 8)),
        (ends, lambda x: masks.documents(x, length=8).layout(8)),
    ):
        with pytest.raises(ValueError, match=r"inside torch.vmap.*make it outside vmap"):
            torch.vmap(lambda x, make=make: make(x).num_tiles + x)(data)
