"""Layouts of small blocks: which tiles compute them, and the kernels with tiles of 64 rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from sparse_flash.experiments.bench.cases import SUITES
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.plan import PlanKey, Planner, plan_of
from sparse_flash.kernels.schedule import best_config, cover
from sparse_flash.kernels.sm90 import attention
from sparse_flash.kernels.sm90.config import FORWARD_COSTS, forward_configs

from sparse_flash import masks
from tests.kernels.helpers import DTYPES, H200, tensors, truth, wait
from tests.kernels.test_forward import check
from tests.strategies import settings_

SIZES = (32, 64, 96, 128)
SMALL = ((64, 64), (64, 32))


def config_of(head_dim, tile, dtype=torch.bfloat16):
    name = attention.DTYPES[dtype]
    return next(c for c in forward_configs(name, head_dim) if c.tile == tile)


class TestChoice:
    """The config of a layout, decided by what its tiles cover."""

    @pytest.mark.parametrize("head_dim", SIZES)
    def test_random_blocks_take_tiles_of_their_size(self, head_dim):
        for block, density, tile in ((64, 0.1, 64), (64, 0.25, 64), (32, 0.1, 32), (32, 0.05, 32)):
            layout = masks.random_blocks(density, block).layout(4096, block=(block, block))
            assert best_config(layout, forward_configs("bfloat16", head_dim)).tile == (64, tile)

    def test_cases_of_the_benchmark_keep_their_tiles(self):
        for case in SUITES["standard"]:
            layout = case.pattern.layout(case.length, block=(case.block,) * 2)
            configs = forward_configs(case.dtype, case.head_dim)
            large = [c for c in configs if c.tile_m >= 128]
            assert best_config(layout, configs) == best_config(layout, large), case.label
            assert best_config(layout, configs).tile_m >= 128, case.label

    @pytest.mark.parametrize(
        "spec", ["full()", "causal()", "local(500)", "butterfly(128)", "random_blocks(0.1, 128)"]
    )
    @pytest.mark.parametrize("block", [32, 64])
    def test_patterns_of_larger_blocks_keep_large_tiles(self, spec, block):
        layout = masks.parse(spec).layout(4096, block=(block, block))
        for head_dim in SIZES:
            assert best_config(layout, forward_configs("bfloat16", head_dim)).tile_m >= 128

    @given(setting=settings_(max_length=700))
    def test_what_is_not_counted_cannot_win(self, setting):
        layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
        for head_dim in SIZES:
            configs = forward_configs("bfloat16", head_dim)
            least = min(configs, key=lambda c: cover(layout, c.tile) * c.tile_cost)
            assert best_config(layout, configs) == least

    def test_ctas_that_share_a_multiprocessor(self):
        layout = masks.random_blocks(0.1, 64).layout(16384, block=(64, 64))
        for head_dim in SIZES:
            planner = attention.FORWARD[torch.bfloat16, head_dim]
            plan = plan_of(layout, PlanKey(planner, 1, 16, 16, H200))
            assert plan.config.resident_ctas > 1
            assert plan.num_ctas == 132 * plan.config.resident_ctas


def test_words_of_tiles_side_by_side():
    """As `read_gathered_mask` puts them together: those of one tile of all columns."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(0, 256, (5, 64, 8), dtype=torch.uint8, generator=generator)
    left, right = (fragment_order(half.contiguous()) for half in wide.split(4, dim=2))
    assert torch.equal((left & 0xFF) | (right & 0xFF) << 8, fragment_order(wide))


def attend(layout, q, k, v, tile, lens=None):
    """(out, lse) by the config of this tile, and its plan."""
    (b, _, h, d), scale = q.shape, q.shape[3] ** -0.5
    planner = Planner((config_of(d, tile, q.dtype),), FORWARD_COSTS, 4 * d)
    plan = plan_of(layout, PlanKey(planner, b, h, k.shape[2], DeviceFacts.of(q.device)))
    result = attention.forward(q, k, v, plan, lens, scale)
    wait()
    return result, plan


def compare(mask, block, q, k, v, tile, lens=None):
    """Compare with float64. Returns the plan."""
    layout = mask.layout(q.shape[1], k.shape[1], (block, block), device="cuda")
    (out, lse), plan = attend(layout, q, k, v, tile, lens)
    check(out, lse, q, k, v, truth(mask, q, k, lens))
    return plan


@pytest.mark.gpu
@pytest.mark.parametrize("tile", SMALL)
class TestForward:
    """The kernels with tiles of 64 rows against float64."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", SIZES)
    @pytest.mark.parametrize("block", [32, 64])
    def test_random_blocks(self, tile, block, head_dim, dtype):
        """Ragged lengths, and key heads with several query heads."""
        q, k, v = tensors(2, 1000, 4, head_dim, 1010, 2, dtype)
        compare(masks.random_blocks(0.1, block), block, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [16, 40, 72, 120])
    def test_narrow_heads(self, tile, head_dim):
        q, k, v = tensors(1, 500, 2, head_dim)
        layout = masks.random_blocks(0.2, 32).layout(500, block=(32, 32), device="cuda")
        size = min(n for n in SIZES if head_dim <= n)
        planner = Planner((config_of(size, tile),), FORWARD_COSTS, 4 * size)
        plan = plan_of(layout, PlanKey(planner, 1, 2, 2, DeviceFacts.of(q.device)))
        out, lse = attention.forward(q, k, v, plan, None, head_dim**-0.5)
        wait()
        check(out, lse, q, k, v, truth(masks.random_blocks(0.2, 32), q, k))

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(
        "spec",
        ["local((70, 3))", "causal()", "butterfly(32)", "local(40) | global_tokens(37)", "full()"],
    )
    def test_exact_masks(self, tile, spec, head_dim):
        q, k, v = tensors(1, 777, 2, head_dim)
        compare(masks.parse(spec), 64, q, k, v, tile)

    def test_patterns_of_heads(self, tile):
        q, k, v = tensors(2, 640, 4, 128)
        some = [masks.random_blocks(0.1, 32, seed) for seed in range(3)]
        compare(masks.per_head([*some, masks.local(50)]), 32, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_lengths_of_keys(self, tile, head_dim):
        """Also none; keys and values beyond them are NaN."""
        q, k, v = tensors(5, 700, 2, head_dim)
        lens = torch.tensor([700, 333, 64, 1, 0], device="cuda", dtype=torch.int32)
        mask = masks.random_blocks(0.3, 32) | masks.local(20)
        (clean, lse), _ = attend(
            mask.layout(700, block=(32, 32), device="cuda"), q, k, v, tile, lens
        )
        for entry, length in enumerate(lens.tolist()):
            k[entry, length:] = v[entry, length:] = torch.nan
        layout = mask.layout(700, block=(32, 32), device="cuda")
        (out, poisoned_lse), _ = attend(layout, q, k, v, tile, lens)
        assert torch.equal(out, clean)
        assert torch.equal(poisoned_lse, lse)
        k, v = k.nan_to_num(), v.nan_to_num()
        check(out, lse, q, k, v, truth(mask, q, k, lens))

    def test_rows_without_keys(self, tile):
        q, k, v = tensors(1, 700, 2, 128)
        mask = masks.block_diagonal(64) & ~masks.sinks(300)
        layout = mask.layout(700, block=(64, 64), device="cuda")
        (out, lse), _ = attend(layout, q, k, v, tile)
        assert not out[:, :256].any()
        assert (lse[..., :256] == -torch.inf).all()
        compare(mask, 64, q, k, v, tile)
        compare(~masks.full(), 64, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_long_rows_are_split(self, tile, head_dim):
        q, k, v = tensors(1, 128, 2, head_dim, 20000)
        plan = compare(masks.random_blocks(0.4, 32), 32, q, k, v, tile)
        assert plan.num_splits

    @pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 96, 127, 129])
    def test_ragged_ends(self, tile, length):
        q, k, v = tensors(2, length, 2, 64)
        compare(masks.local((70, 3)), 32, q, k, v, tile)
        q, k, v = tensors(1, 200, 2, 128, length)
        compare(masks.full(), 64, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_bitwise_repeatable(self, tile, head_dim):
        q, k, v = tensors(1, 4096, 8, head_dim)
        layout = masks.random_blocks(0.1, 32).layout(4096, block=(32, 32), device="cuda")
        first, plan = attend(layout, q, k, v, tile)
        for _ in range(200):
            again = attention.forward(q, k, v, plan, None, head_dim**-0.5)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        wait()

    def test_wide_values(self, tile):
        """Values of another head_dim than queries and keys."""
        q, k, v = tensors(1, 500, 2, 128)
        q, k = q[..., :64], k[..., :64]
        mask = masks.random_blocks(0.2, 32)
        layout = mask.layout(500, block=(32, 32), device="cuda")
        planner = Planner((config_of(128, tile),), FORWARD_COSTS, 512)
        plan = plan_of(layout, PlanKey(planner, 1, 2, 2, DeviceFacts.of(q.device)))
        out, lse = attention.forward(q, k, v, plan, None, 0.125)
        wait()
        check(out, lse, q, k, v, truth(mask, q, k), 0.125)


def test_configs_without_shared_memory_for_the_output_are_those_that_need_it():
    for config in forward_configs("bfloat16", 128):
        if config.direct_store:
            staged = replace(config, direct_store=False, resident_ctas=1)
            assert 2 * (staged.shared_memory + 1024) > 228 * 1024
