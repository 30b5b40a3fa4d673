"""Element, tile and computed density: exact, and shown wherever a layout is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.kernels.choice import best_config
from sparse_flash.kernels.sm90.config import forward_configs
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_flash import BlockLayout, computed_density, densities, masks
from sparse_flash.density import executed_tile
from tests.strategies import settings_

TILES = [(128, 128), (192, 128), (128, 64), (16, 16), (24, 8), (7, 5), (5, 7), (1, 1), (300, 2)]


def by_hand(layout, tile):
    """The fraction of elements that lie in tiles with an allowed element, from the dense table."""
    dense = layout.to_dense().expand(*layout.pattern_map.shape, -1, -1)
    fractions = []
    for table in dense.flatten(0, 1):
        area = 0
        for rows in table.split(tile[0], 0):
            area += sum(part.numel() for part in rows.split(tile[1], 1) if part.any())
        fractions.append(area / table.numel())
    return sum(fractions) / len(fractions)


@given(settings_(max_length=60), st.sampled_from(TILES))
def test_computed_density_is_counted_exactly(setting, tile):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    assert layout.computed_density(tile) == pytest.approx(by_hand(layout, tile), abs=1e-12)
    assert layout.density <= layout.computed_density(tile) + 1e-12
    assert layout.computed_density((1, 1)) == pytest.approx(layout.density, abs=1e-12)


@given(settings_(max_length=60, heads=True), st.sampled_from(TILES[:6]))
def test_means_are_over_heads_not_over_patterns(setting, tile):
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
    assert layout.computed_density(tile) == pytest.approx(by_hand(layout, tile), abs=1e-12)
    apart = [mask.layout(setting.q_len, setting.kv_len, setting.block).tile_density
             for mask in setting.mask.masks]  # fmt: skip
    assert layout.tile_density == pytest.approx(sum(apart) / len(apart), abs=1e-12)


@pytest.mark.parametrize("block", [(32, 32), (128, 128), (64, 96), (100, 24)])
@pytest.mark.parametrize("tile", [(128, 128), (192, 128), (128, 64)])
def test_it_counts_the_tiles_that_a_schedule_executes(block, tile):
    mask = masks.local(70) | masks.custom(lambda q, kv: (q * kv) % 997 == 5)
    layout = mask.layout(768, 1152, block)
    executed = masks.retile(layout, tile).num_tiles
    assert layout.computed_density(tile) == pytest.approx(executed * tile[0] * tile[1] / 768 / 1152)


def test_tile_density_counts_ragged_tiles_whole():
    assert masks.causal().layout(300, block=(128, 128)).tile_density == 6 / 9
    assert masks.full().layout(300, 5, block=(128, 128)).tile_density == 1
    assert masks.full().layout(300, 5).computed_density() == 1
    nothing = masks.causal(-1000).layout(300)
    assert (nothing.density, nothing.tile_density, nothing.computed_density()) == (0, 0, 0)
    # Three of four heads share a pattern.
    heads = masks.per_head([masks.full()] * 3 + [masks.causal()]).layout(256)
    assert heads.tile_density == (1 + 1 + 1 + 0.75) / 4


def test_random_blocks_of_32_execute_tiles_of_64_x_32():
    layout = masks.random_blocks(0.1, block=32).layout(32768, block=(32, 32))
    assert layout.density == pytest.approx(0.1, abs=0.003)
    assert layout.tile_density == layout.density
    assert layout.computed_density((128, 128)) == pytest.approx(1 - 0.9**16, abs=0.005)
    assert layout.computed_density((64, 32)) == pytest.approx(1 - 0.9**2, abs=0.005)
    for head_dim in (64, 128):
        assert computed_density(layout, head_dim) == layout.computed_density((64, 32))
        assert densities(layout, head_dim).hint is None
    hint = densities(layout, head_dim=256).hint
    assert "9.96 % of elements in 56.9 % of tiles" in hint
    assert "5.7 times" in hint
    assert "a pattern of 128 x 64 blocks" in hint


def test_the_tile_is_that_of_the_config_which_a_plan_takes():
    for mask in (masks.full(), masks.butterfly(128), masks.block_local(128, 1)):
        layout = mask.layout(4096)
        for head_dim in (16, 40, 64, 80, 96, 128, 136, 256):
            config = best_config(layout, forward_configs("float16", head_dim))
            assert executed_tile(layout, head_dim, torch.float16, "sm_90") == config.tile
    layout = masks.causal().layout(512, block=(32, 64))
    for given_ in ((64, torch.float32, "sm_90"), (264, torch.float16, "sm_90"),
                   (20, torch.bfloat16, "sm_90"), (64, torch.bfloat16, "sm_80"),
                   (64, torch.bfloat16, None)):  # fmt: skip
        assert executed_tile(layout, *given_) == (32, 64), "the reference computes stored tiles"
        assert computed_density(layout, *given_) == layout.computed_density((32, 64))


def test_hint():
    stripes = masks.custom(lambda q, kv: (q - kv) % 7 == 0).layout(1024)
    assert densities(stripes).hint == (
        "14.3 % of elements in 100 % of tiles: costs as much as dense; "
        "another token order or a pattern of 128 x 128 blocks may help"
    )
    assert "64 blocks may help" in densities(stripes, head_dim=256).hint
    assert densities(stripes, arch=None).hint.endswith("token order or smaller blocks may help")
    for mask in (masks.full(), masks.causal(), masks.butterfly(128), masks.causal(-5000)):
        assert densities(mask.layout(1024)).hint is None
    found = densities(stripes, head_dim=128)
    assert str(found) == (
        "density 14.3 %, tile density 100 %, computed density 100 % (128 x 128 tiles)"
    )
    assert found.record() == {
        "density": stripes.density, "tile_density": 1.0, "computed_density": 1.0,
    }  # fmt: skip


def test_repr_shows_all_three():
    layout = masks.random_blocks(0.3, block=32).layout(1024, block=(32, 32))
    assert (
        f"density {layout.density:.3g}, tile density {layout.tile_density:.3g}, "
        f"computed {layout.computed_density():.3g}, cpu)" in repr(layout)
    )


def test_an_update_is_counted_anew():
    layout = masks.causal().layout(512)
    before = (layout.density, layout.tile_density, layout.computed_density())
    layout.update_(masks.sinks(3).layout(512))
    new = masks.sinks(3).layout(512)
    after = (layout.density, layout.tile_density, layout.computed_density())
    assert before != after == (new.density, new.tile_density, new.computed_density())


def test_empty_stored_tiles_count_as_the_kernel_computes_them():
    arrays = masks.local(3).layout(256).arrays()
    arrays["bit_tiles"] = torch.zeros_like(arrays["bit_tiles"])
    layout = BlockLayout(256, 256, (128, 128), **arrays)
    assert layout.density == 0
    assert layout.computed_density((128, 128)) == layout.tile_density == 1
    assert layout.computed_density((64, 64)) == 0  # `retile` drops empty tiles
    assert densities(layout, head_dim=128).hint is None  # as plans drop them


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((masks.causal(),), TypeError, r"got causal; .*mask.layout\(length\)"),
        (("causal()",), TypeError, "BlockLayout, got str"),
        ((None, 0), ValueError, "head_dim must be at least 1, got 0"),
        ((None, 64.0), TypeError, "head_dim must be an int"),
        ((None, 64, "bfloat16"), TypeError, "torch.bfloat16"),
        ((None, 64, torch.float16, "sm90"), ValueError, "'sm_90'"),
        ((None, 64, torch.float16, "90"), ValueError, "compute capability"),
        ((None, 64, torch.float16, "hopper"), ValueError, "compute capability"),
        ((None, 64, torch.float16, 90), ValueError, "compute capability"),
    ],
)
def test_arguments_that_are_refused(arguments, error, words):
    layout = masks.causal().layout(100) if arguments[0] is None else arguments[0]
    for function in (densities, computed_density):
        with pytest.raises(error, match=words):
            function(layout, *arguments[1:])


@pytest.mark.parametrize("tile", [128, (0, 128), (128,), (128, 64.0), "128", (1 << 13, 1 << 13)])
def test_tiles_that_are_refused(tile):
    with pytest.raises((TypeError, ValueError), match="tile"):
        masks.causal().layout(100).computed_density(tile)


def test_modes_do_not_change_the_numbers():
    expected = densities(masks.local(40).layout(500, block=(32, 32)))
    for mode in (torch.inference_mode(), torch.device("meta"), FakeTensorMode()):
        layout = masks.local(40).layout(500, block=(32, 32))
        with mode:
            assert densities(layout) == expected
            assert f"tile density {expected.tile_density:.3g}" in repr(layout)
            assert layout._repr_html_()
            assert layout._repr_png_() == masks.local(40).layout(500, block=(32, 32))._repr_png_()
