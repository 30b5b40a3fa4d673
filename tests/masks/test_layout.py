"""Layouts equal their masks, element for element."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.ternary import EMPTY, FULL, Blocks

from sparse_flash import masks
from tests.strategies import any_length_patterns, settings_, square_patterns


def dense(mask, q_len, kv_len):
    return mask(torch.arange(q_len)[:, None], torch.arange(kv_len))


@given(settings_())
def test_layout_is_the_mask(setting):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    expected = dense(setting.mask, setting.q_len, setting.kv_len)
    assert torch.equal(layout.to_dense(), expected)
    assert layout.density == pytest.approx(expected.double().mean().item(), abs=1e-12)
    # Arrays that the builder made pass the validation that foreign ones get.
    BlockLayout(*layout.lengths, **layout.arrays())
    stored = layout.tile_counts
    assert bool((stored > 0).all()), "no empty tile is stored"


@given(settings_(max_length=60, heads=True))
def test_layout_of_heads_is_the_masks(setting):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    expected = dense(setting.mask, setting.q_len, setting.kv_len)
    got = layout.to_dense()
    assert torch.equal(got.expand(expected.shape), expected)
    assert layout.num_patterns == len(set(setting.mask.masks))


@given(settings_(), st.data())
def test_classify_is_never_wrong(setting, data):
    n = 40
    lo_q = data.draw(st.lists(st.integers(0, setting.q_len - 1), min_size=n, max_size=n))
    lo_kv = data.draw(st.lists(st.integers(0, setting.kv_len - 1), min_size=n, max_size=n))
    hi_q = [data.draw(st.integers(lo, setting.q_len - 1)) for lo in lo_q]
    hi_kv = [data.draw(st.integers(lo, setting.kv_len - 1)) for lo in lo_kv]
    blocks = Blocks(*map(torch.tensor, (lo_q, hi_q, lo_kv, hi_kv)))
    truth = dense(setting.mask, setting.q_len, setting.kv_len)
    for i, state in enumerate(setting.mask.classify(blocks).tolist()):
        part = truth[lo_q[i] : hi_q[i] + 1, lo_kv[i] : hi_kv[i] + 1]
        if state == EMPTY:
            assert not part.any()
        if state == FULL:
            assert part.all()


@given(settings_(max_length=70, heads=True))
def test_transpose(setting):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    transposed = layout.transpose()
    assert torch.equal(transposed.to_dense(), layout.to_dense().transpose(-1, -2))
    assert transposed.transpose().equal(layout)
    order = layout.transpose_order.long()
    assert torch.equal(layout.tile_rows[order] % layout.num_block_rows, layout.row_indices.long())


@given(
    settings_(max_length=90, heads=True), st.sampled_from([(16, 16), (128, 64), (7, 9), (48, 1)])
)
def test_retile(setting, block):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    again = masks.retile(layout, block)
    assert again.equal(setting.mask.layout(setting.q_len, setting.kv_len, block))
    assert masks.retile(again, setting.block).equal(layout)


def test_retiling_looks_only_where_something_is_stored():
    mask = masks.local(256) | masks.global_tokens(64) | masks.butterfly(128)
    fine = mask.layout(65536, block=(64, 64))
    assert masks.retile(fine, (128, 128)).equal(mask.layout(65536))
    assert masks.retile(fine, (64, 64)) is fine
    with pytest.raises(ValueError, match="block sizes must be positive"):
        masks.retile(fine, (0, 64))


@given(settings_())
def test_save_load_and_scipy(setting):
    import tempfile
    from pathlib import Path

    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layout.npz"
        layout.save(path)
        assert BlockLayout.load(path).equal(layout)
        assert [p.name for p in Path(folder).iterdir()] == ["layout.npz"]
    matrix = layout.to_scipy()  # padded to whole blocks
    exact = matrix.tocsr()[: setting.q_len, : setting.kv_len]
    back = BlockLayout.from_scipy(exact, setting.block)
    assert torch.equal(back.to_dense(), layout.to_dense())
    assert torch.equal(
        torch.from_numpy(matrix.toarray())[: setting.q_len, : setting.kv_len], layout.to_dense()
    )


@given(settings_())
def test_coverage_counts_every_element_once(setting):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    for size in (4, 33, 300):
        grid = layout.coverage(size)
        cell = [
            -(-n // g) for n, g in zip((setting.q_len, setting.kv_len), grid.shape, strict=True)
        ]
        assert bool((grid >= 0).all())
        assert bool((grid <= 1).all())
        truth = layout.to_dense()
        if max(grid.shape) >= max(setting.q_len, setting.kv_len):
            assert torch.equal(grid.bool(), truth)
        assert bool((grid > 0).any()) == bool(truth.any()), cell


@given(any_length_patterns() | square_patterns(48))
def test_repr_makes_the_mask_again(mask):
    if "custom" in repr(mask):
        return
    again = masks.parse(repr(mask))
    assert again == mask
    assert hash(again) == hash(mask)
    assert repr(again) == repr(mask)


def test_distinct_tiles_are_shared():
    mask = masks.local(256) | masks.global_tokens(64) | masks.butterfly(128)
    layout = mask.layout(65536)
    assert layout.num_tiles > 7000
    assert layout.num_bit_tiles <= 24


def test_heads_share_equal_patterns():
    a, b = masks.causal(), masks.local(10)
    layout = masks.per_batch([masks.per_head([a, b]), b]).layout(300)
    assert layout.num_patterns == 2
    assert layout.pattern_map.tolist() == [[0, 1], [1, 1]]
    assert layout.pattern(1).equal(b.layout(300))


@pytest.mark.gpu
@given(settings_())
def test_cuda_layout_equals_cpu_layout(setting):
    arguments = (setting.q_len, setting.kv_len, setting.block)
    on_gpu = setting.mask.layout(*arguments, device="cuda")
    assert on_gpu.device.type == "cuda"
    assert on_gpu.equal(setting.mask.layout(*arguments))
    assert on_gpu.transpose().equal(setting.mask.layout(*arguments).transpose())
    assert masks.retile(on_gpu, (16, 48)).equal(masks.retile(on_gpu.to("cpu"), (16, 48)))


HAND_MADE = {
    "crow_indices": torch.tensor([[0, 2, 3]], dtype=torch.int32),
    "col_indices": torch.tensor([0, 1, 1], dtype=torch.int32),
    "bit_tile_indices": torch.tensor([-1, 0, -1], dtype=torch.int32),
    "bit_tiles": torch.ones(1, 16, 2, dtype=torch.uint8),
    "pattern_map": torch.zeros(1, 1, dtype=torch.int32),
}


def hand_made(**changes):
    return BlockLayout(32, 32, (16, 16), **{**HAND_MADE, **changes})


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_hand_made_layout_is_accepted():
    assert hand_made().num_partial == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"col_indices": ints(0, 2, 1)}, ValueError, r"col_indices\[1\] = 2 is not in 0..1"),
        ({"col_indices": ints(0, -1, 1)}, ValueError, r"col_indices\[1\] = -1"),
        ({"col_indices": ints(1, 0, 1)}, ValueError, "after a larger one"),
        ({"col_indices": ints(1, 1, 1)}, ValueError, "repeats"),
        ({"col_indices": torch.tensor([0, 1, 1])}, TypeError, "int32"),
        ({"col_indices": [0, 1, 1]}, TypeError, "torch.Tensor"),
        ({"crow_indices": ints(0, 2, 3)}, ValueError, "crow_indices must be"),
        ({"crow_indices": ints([0, 2, 4])}, ValueError, "from 0 to 3"),
        ({"crow_indices": ints([0, 4, 3])}, ValueError, "not decrease"),
        ({"bit_tile_indices": ints(-1, 1, -1)}, ValueError, "bit_tile_indices"),
        ({"bit_tile_indices": ints(-2, 0, -1)}, ValueError, "bit_tile_indices"),
        ({"bit_tile_indices": ints(-1, 0)}, ValueError, "one length"),
        ({"bit_tiles": torch.ones(1, 16, 3, dtype=torch.uint8)}, ValueError, "bit_tiles must be"),
        ({"pattern_map": ints([1])}, ValueError, "pattern_map must be in 0..0"),
        ({"pattern_map": ints(0)}, ValueError, "1 or batch"),
    ],
)
def test_bad_arrays(changes, error, words):
    with pytest.raises(error, match=words):
        hand_made(**changes)


def test_bits_beyond_the_lengths_are_refused():
    arrays = {**HAND_MADE, "bit_tiles": torch.full((1, 16, 2), 255, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="ragged kv end"):
        BlockLayout(32, 30, (16, 16), **arrays)
    with pytest.raises(ValueError, match="padding bits"):
        BlockLayout(32, 24, (16, 12), **arrays)


def test_damaged_files(tmp_path):
    path = tmp_path / "layout.npz"
    layout = masks.local(20).layout(300)
    layout.save(path)
    good = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no layout file"):
        BlockLayout.load(tmp_path / "other.npz")
    for bad in (b"", b"nonsense", good[: len(good) // 2], good[:-40]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a readable layout file"):
            BlockLayout.load(path)
    flipped = bytearray(good)
    for at in range(len(good) // 3, len(good) // 3 + 60):
        flipped[at] ^= 0xFF
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="layout"):
        BlockLayout.load(path)
    import numpy as np

    np.savez(path, a=np.arange(3))
    with pytest.raises(ValueError, match="not marked"):
        BlockLayout.load(path)
    np.savez(path, format=np.array({"pickled": 1}, dtype=object))
    with pytest.raises(ValueError, match="not a readable"):
        BlockLayout.load(path)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((0,), ValueError), ((-5, 3), ValueError), ((2.0,), TypeError), ((2**31,), ValueError),
     ((8, 8, (0, 4)), ValueError), ((8, 8, 4), TypeError), ((8, 8, (8192, 8192)), ValueError)],
)  # fmt: skip
def test_bad_lengths(arguments, error):
    with pytest.raises(error):
        masks.causal().layout(*arguments)


def test_mask_of_the_wrong_length():
    with pytest.raises(ValueError, match="made for q_len=64, not 100"):
        masks.neighborhood(8, 8, 1).layout(100)
    with pytest.raises(ValueError, match="different q_len"):
        masks.neighborhood(8, 8, 1) | masks.documents((3, 4))
    with pytest.raises(ValueError, match="does not have the 16 tokens"):
        masks.neighborhood(8, 8, 1).through(masks.morton(4, 4))


def test_update_replaces_everything_that_was_derived():
    layout = masks.causal().layout(300, block=(64, 64))
    assert (layout.num_partial, layout.density > 0.5) == (5, True)
    new = (masks.local(10) & masks.custom(lambda q, kv: (q + kv) % 3 > 0)).layout(
        300, block=(64, 64)
    )
    layout.update_(new)
    assert layout.equal(new)
    assert layout.num_partial == new.num_partial
    assert layout.density == new.density
    assert layout.transpose().equal(new.transpose())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (masks.causal().layout(301, block=(64, 64)), "has lengths"),
        (masks.causal().layout(300, block=(64, 32)), "has lengths"),
        (masks.per_head([masks.causal()] * 2 + [masks.full()]).layout(300, block=(64, 64)), "map"),
    ],
)
def test_update_refuses_what_does_not_fit(other, message):
    layout = masks.causal().layout(300, block=(64, 64))
    before = layout.crow_indices
    with pytest.raises(ValueError, match=message):
        layout.update_(other)
    assert layout.crow_indices is before
