"""The forward kernels whose CTAs compute two work tiles at once, each tile in two steps."""

import pytest
import torch
from sparse_flash.kernels.choice import best_config
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.plan import PlanKey, Planner, plan_of
from sparse_flash.kernels.sm90 import attention
from sparse_flash.kernels.sm90.config import FORWARD_COSTS, forward_configs

from sparse_flash import masks
from tests.kernels.helpers import H200, tensors, truth, wait
from tests.kernels.test_forward import check

SIZES = (32, 64)


def config_of(head_dim, dtype=torch.bfloat16):
    configs = forward_configs(attention.DTYPES[dtype], head_dim)
    return next(c for c in configs if c.slots > 1)


def attend(layout, q, k, v, lens=None):
    """(out, lse), and the plan."""
    b, _, h, d = q.shape
    size = min(n for n in SIZES if d <= n)
    planner = Planner((config_of(size, q.dtype),), FORWARD_COSTS, 4 * size)
    plan = plan_of(layout, PlanKey(planner, b, h, k.shape[2], DeviceFacts.of(q.device)))
    result = attention.forward(q, k, v, plan, lens, d**-0.5)
    wait()
    return result, plan


def compare(mask, q, k, v, lens=None):
    """Compare with float64. Returns the plan."""
    layout = mask.layout(q.shape[1], k.shape[1], device="cuda")
    (out, lse), plan = attend(layout, q, k, v, lens)
    check(out, lse, q, k, v, truth(mask, q, k, lens))
    return plan


class TestPlans:
    @pytest.mark.parametrize("head_dim", SIZES)
    def test_short_rows_take_two_slots(self, head_dim):
        configs = forward_configs("bfloat16", head_dim)
        for mask in (masks.block_local(128, 1), masks.butterfly(128)):
            assert best_config(mask.layout(16384), configs) == config_of(head_dim)
        for mask, height in ((masks.full(), 192), (masks.causal(), 192), (masks.local(200), 64)):
            assert best_config(mask.layout(16384), configs).tile_m == height

    @pytest.mark.parametrize(("length", "ctas"), [(128, 1), (8192, 64), (16896, 132), (65536, 132)])
    def test_work_tiles_begin_on_as_many_multiprocessors(self, length, ctas):
        planner = Planner((config_of(64),), FORWARD_COSTS, 256)
        layout = masks.block_local(128, 1).layout(length)
        plan = plan_of(layout, PlanKey(planner, 1, 1, 1, H200))
        assert plan.num_ctas == ctas
        assert plan.schedule.num_ctas == min(264, plan.schedule.num_items)

    def test_more_bit_tiles_than_it_can_index_are_refused(self, monkeypatch):
        assert config_of(64).most_bit_tiles == 1 << 21
        monkeypatch.setattr(type(config_of(64)), "most_bit_tiles", 2)
        planner = Planner((config_of(64),), FORWARD_COSTS, 256)
        key = PlanKey(planner, 1, 1, 1, H200)
        assert plan_of(masks.causal().layout(1024), key)  # one bit tile
        with pytest.raises(ValueError, match=r"3 distinct partial tiles.*index 2: use"):
            plan_of(masks.local(10).layout(1024), key)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", SIZES)
class TestForward:
    """Against float64."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "spec",
        [
            "local((70, 3))",
            "causal()",
            "butterfly(128)",
            "local(40) | global_tokens(37)",
            "full()",
            "block_local(64, 0)",  # one half of each tile is empty
        ],
    )
    def test_masks(self, head_dim, spec, dtype):
        """Ragged lengths, and key heads with several query heads."""
        q, k, v = tensors(2, 1000, 4, head_dim, 1010, 2, dtype)
        compare(masks.parse(spec), q, k, v)

    def test_narrow_heads(self, head_dim):
        q, k, v = tensors(1, 500, 2, head_dim - 24)
        compare(masks.local(100) | masks.global_tokens(20), q, k, v)

    def test_patterns_of_heads(self, head_dim):
        q, k, v = tensors(2, 640, 4, head_dim)
        some = [masks.random_blocks(0.4, 128, seed) for seed in range(3)]
        compare(masks.per_head([*some, masks.local(50)]), q, k, v)

    def test_lengths_of_keys(self, head_dim):
        """In each half of a tile, and at its ends; keys and values beyond them are NaN."""
        ends = [700, 640, 639, 577, 576, 575, 513, 512, 64, 1, 0]
        q, k, v = tensors(len(ends), 700, 2, head_dim)
        lens = torch.tensor(ends, device="cuda", dtype=torch.int32)
        mask = masks.random_blocks(0.5, 128) | masks.local(20)
        layout = mask.layout(700, device="cuda")
        (clean, lse), _ = attend(layout, q, k, v, lens)
        for entry, length in enumerate(ends):
            k[entry, length:] = v[entry, length:] = torch.nan
        (out, poisoned_lse), _ = attend(layout, q, k, v, lens)
        assert torch.equal(out, clean)
        assert torch.equal(poisoned_lse, lse)
        k, v = k.nan_to_num(), v.nan_to_num()
        check(out, lse, q, k, v, truth(mask, q, k, lens))

    def test_rows_without_keys(self, head_dim):
        q, k, v = tensors(1, 700, 2, head_dim)
        mask = masks.block_diagonal(128) & ~masks.sinks(300)
        (out, lse), _ = attend(mask.layout(700, device="cuda"), q, k, v)
        assert not out[:, :256].any()
        assert (lse[..., :256] == -torch.inf).all()
        compare(mask, q, k, v)
        compare(~masks.full(), q, k, v)

    def test_long_rows_are_split(self, head_dim):
        q, k, v = tensors(1, 128, 2, head_dim, 20000)
        assert compare(masks.random_blocks(0.4, 128), q, k, v).num_splits

    def test_more_splits_of_a_row_than_lanes_of_a_warp(self, head_dim):
        q, k, v = tensors(1, 128, 1, head_dim, 65536)
        assert compare(masks.full(), q, k, v).num_splits > 32

    @pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193])
    def test_ragged_ends(self, head_dim, length):
        q, k, v = tensors(2, length, 2, head_dim)
        compare(masks.local((70, 3)), q, k, v)
        q, k, v = tensors(1, 200, 2, head_dim, length)
        compare(masks.full(), q, k, v)

    def test_bitwise_repeatable(self, head_dim):
        q, k, v = tensors(1, 4096, 8, head_dim)
        layout = (masks.block_local(128, 1) | masks.global_tokens(128)).layout(4096, device="cuda")
        first, plan = attend(layout, q, k, v)
        for _ in range(500):
            again = attention.forward(q, k, v, plan, None, head_dim**-0.5)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        wait()
