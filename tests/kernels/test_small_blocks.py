"""Layouts of small blocks: which tiles compute them, and the kernels with tiles of 64 rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from sparse_flash.experiments.bench.cases import SUITES
from sparse_flash.kernels.choice import _parts_of_partial, best_config, cover
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.fragment import fragment_order
from sparse_flash.kernels.plan import PlanKey, Planner, fitting, plan_of
from sparse_flash.kernels.sm90 import attention
from sparse_flash.kernels.sm90.config import (
    BACKWARD_COSTS,
    FORWARD_COSTS,
    backward_configs,
    forward_configs,
)

from sparse_flash import BlockLayout, block_sparse_attention, masks
from tests.kernels.helpers import DTYPES, H200, tensors, truth, wait
from tests.kernels.test_backward import check as check_gradients
from tests.kernels.test_forward import check
from tests.strategies import settings_

SIZES = (32, 64, 96, 128)
SMALL = ((64, 64), (64, 32))


def config_of(head_dim, tile, dtype=torch.bfloat16):
    name = attention.DTYPES[dtype]
    return next(c for c in forward_configs(name, head_dim) if c.tile == tile)


def backward_config_of(head_dim, tile, dtype=torch.bfloat16):
    name = attention.DTYPES[dtype]
    return next(c for c in backward_configs(name, head_dim) if c.tile == tile)


def cost_of(config, layout):
    """Cost of a layout by the tiles of a config."""
    (height, width), block = config.tile, layout.block
    tiles = cover(layout, config.tile)
    partial = tiles * layout.num_partial / max(1, layout.num_tiles)
    if block != config.tile and not (block[0] % height or block[1] % width):
        made = masks.retile(layout, config.tile)
        tiles, partial = min(tiles, 1.2 * made.num_tiles), made.num_partial
    rows = layout.num_patterns * -(-layout.q_len // height)
    partial *= getattr(config, "partial_cost", 0)
    return config.tile_cost * (tiles + partial) + rows * getattr(config, "row_cost", 0)


class TestChoice:
    """The config of a layout, decided by what its tiles cover."""

    @pytest.mark.parametrize("head_dim", SIZES)
    def test_random_blocks_take_tiles_of_their_size(self, head_dim):
        for block, density, tile in ((64, 0.1, 64), (64, 0.25, 64), (32, 0.1, 32), (32, 0.05, 32)):
            layout = masks.random_blocks(density, block).layout(4096, block=(block, block))
            assert best_config(layout, forward_configs("bfloat16", head_dim)).tile == (64, tile)
            backward = best_config(layout.transpose(), backward_configs("bfloat16", head_dim))
            assert (backward.tile, backward.small) == ((64, tile), True)
            fixed = backward_configs("bfloat16", head_dim, deterministic=True)
            assert not best_config(layout.transpose(), fixed).small

    def test_cases_of_the_benchmark_keep_their_tiles(self):
        for case in SUITES["standard"]:
            if case.block < 128 or "exact" in case.label:
                continue
            layout = case.pattern.layout(case.length, block=(case.block,) * 2)
            configs = forward_configs(case.dtype, case.head_dim)
            large = [c for c in configs if c.tile_m >= 128]
            assert best_config(layout, configs) == best_config(layout, large), case.label
            configs = backward_configs(case.dtype, case.head_dim)
            large, layout = [c for c in configs if not c.small], layout.transpose()
            assert best_config(layout, configs) == best_config(layout, large), case.label

    @pytest.mark.parametrize(
        "spec", ["full()", "causal()", "local(500)", "butterfly(128)", "random_blocks(0.1, 128)"]
    )
    @pytest.mark.parametrize("block", [32, 64])
    def test_patterns_of_larger_blocks_keep_large_tiles(self, spec, block):
        layout = masks.parse(spec).layout(4096, block=(block, block))
        for head_dim in SIZES:
            assert best_config(layout, forward_configs("bfloat16", head_dim)).tile_m >= 128
            configs = backward_configs("bfloat16", head_dim)
            assert not best_config(layout.transpose(), configs).small

    @given(setting=settings_(max_length=700))
    def test_what_is_not_counted_cannot_win(self, setting):
        layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block)
        stored = torch.zeros(layout.num_patterns, layout.num_block_rows, layout.num_block_cols)
        rows = layout.tile_rows
        stored.view(-1, stored.shape[2])[rows, layout.col_indices.long()] = 1
        for configs, transposed, given_ in (
            (forward_configs("bfloat16", 128), False, layout),
            (forward_configs("bfloat16", 64), False, layout),
            (backward_configs("bfloat16", 128), True, layout.transpose()),
            (backward_configs("bfloat16", 192), True, layout.transpose()),
        ):
            all_read = stored.any(1).all() and (not transposed or stored.any(2).all())
            # The others' tiles would reach into blocks that nothing reads.
            safe = [c for c in configs if all_read or {*c.tile} <= {32, 64, 128, 192}]
            costs = {c: cost_of(c, given_) for c in safe}
            # At ragged ends full tiles may count as partial ones.
            ragged = any(given_.lengths[i] % c.tile[i] for c in safe for i in range(2))
            more = 1.35 if ragged else 1 + 1e-9
            assert costs[best_config(layout, configs, transposed)] <= more * min(costs.values())

    def test_ctas_that_share_a_multiprocessor(self):
        layout = masks.random_blocks(0.1, 64).layout(16384, block=(64, 64))
        for head_dim in SIZES:
            planner = attention.FORWARD[torch.bfloat16, head_dim]
            plan = plan_of(layout, PlanKey(planner, 1, 16, 16, H200))
            assert plan.config.resident_ctas > 1
            assert plan.num_ctas == 132 * plan.config.resident_ctas
            planner = attention.BACKWARD[torch.bfloat16, head_dim]
            plan = plan_of(layout, PlanKey(planner, 1, 16, 16, H200))
            assert plan.config.small
            assert plan.num_ctas == 132 * plan.config.resident_ctas


def test_layouts_of_data_keep_large_tiles():
    chosen = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    layout = BlockLayout.from_blocks(chosen, (64, 64), 1024)
    for head_dim in SIZES:
        for planners in (attention.FORWARD, attention.BACKWARD):
            found = fitting(layout, planners[torch.bfloat16, head_dim])
            assert found
            assert all(c.resident_ctas == 1 for c in found)


def test_layouts_of_data_take_no_tiles_whose_bit_tiles_are_padded():
    """Above head_dim 128; 96 keys are a multiple of these blocks."""
    chosen = torch.zeros(1, 1, 16, 32, dtype=torch.bool)
    layout = BlockLayout.from_blocks(chosen, (64, 32), 1024)
    planner = attention.BACKWARD[torch.bfloat16, 192]
    assert [c.tile for c in planner.configs] == [(96, 64), (64, 64)]
    assert [c.tile for c in fitting(layout, planner)] == [(64, 64)]


def test_words_of_tiles_side_by_side():
    """As `read_gathered_mask` puts them together: those of one tile of all columns."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(0, 256, (5, 64, 8), dtype=torch.uint8, generator=generator)
    left, right = (fragment_order(half.contiguous()) for half in wide.split(4, dim=2))
    assert torch.equal((left & 0xFF) | (right & 0xFF) << 8, fragment_order(wide))


def steps_of(plan, shape):
    """How often the steps of a plan compute each element `(rows, columns)` of a head.

    As in the kernels, a step takes the next tiles of an item, puts their words side by side, and
    masks the others.
    """
    config, made = plan.config, plan.schedule
    (height, width), size = config.tile, config.tiles_per_step
    (rows, columns), shift = shape, width // 4
    found = torch.zeros(-(-rows // height) * height, -(-columns // width) * width, dtype=torch.int)
    thread = torch.arange(128)
    for block, head, _, first, count, _, _, _ in made.work.tolist():
        assert head == 0
        for begin in range(0, count, size):
            some = made.tiles[first + begin : first + min(begin + size, count)].tolist()
            words = torch.zeros(128, 2, dtype=torch.int64)
            for i, (_, entry) in enumerate(some):
                of_tile = made.bits[entry, 0].long() if entry >= 0 else torch.full((128, 2), -1)
                words |= (of_tile & ((1 << shift) - 1)) << shift * i
            for bit in range(shift * size):
                column = bit // 2 * 8 + 2 * (thread % 4) + bit % 2  # of the step
                part, within = column // width, column % width
                for r in range(2):
                    row = block * height + thread // 32 * 16 + thread % 32 // 4 + 8 * r
                    for t in (words[:, r] >> bit & 1).nonzero().flatten().tolist():
                        left = some[part[t]][0] * width
                        found[row[t], left + within[t]] += 1
    return found[:rows, :columns]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tile", SMALL)
def test_steps_compute_every_element_once(tile, transposed):
    mask = masks.random_blocks(0.3, 32) & ~masks.local(5) | masks.sinks(3)
    layout = mask.layout(200, 170, block=(32, 32))
    config = (backward_config_of if transposed else config_of)(64, tile)
    costs = BACKWARD_COSTS if transposed else FORWARD_COSTS
    planner = Planner((config,), costs, 256, transposed)
    plan = plan_of(layout, PlanKey(planner, 1, 1, 1, H200))
    allowed = layout.to_dense().squeeze()
    allowed = allowed.T if transposed else allowed
    found = steps_of(plan, allowed.shape)
    assert torch.equal(found, allowed.int())


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


def gradients(layout, q, k, v, tile, lens=None):
    """Gradients by the config of this tile of the transposed layout, (dout, dlse), and the plan."""
    (b, _, h, d), scale = q.shape, q.shape[3] ** -0.5
    generator = torch.Generator("cuda").manual_seed(1)
    dout = torch.randn(q.shape, generator=generator, device="cuda").to(q.dtype)
    dlse = torch.randn(b, h, q.shape[1], generator=generator, device="cuda")
    (out, lse), _ = attend(layout, q, k, v, (64, 64), lens)
    planner = Planner((backward_config_of(d, tile, q.dtype),), BACKWARD_COSTS, 8 * d, True)
    plan = plan_of(layout, PlanKey(planner, b, h, k.shape[2], DeviceFacts.of(q.device)))
    plans = attention.BackwardPlans(plan)
    found = attention.backward(dout, dlse, q, k, v, out, lse, plans, lens, scale)
    wait()
    return found, (dout, dlse), plan


def compare_gradients(mask, block, q, k, v, tile, lens=None):
    """Compare with float64. Returns the plan."""
    layout = mask.layout(q.shape[1], k.shape[1], (block, block), device="cuda")
    found, given_, plan = gradients(layout, q, k, v, tile, lens)
    check_gradients(found, q, k, v, truth(mask, q, k, lens), *given_)
    return plan


@pytest.mark.gpu
@pytest.mark.parametrize("tile", SMALL)
class TestBackward:
    """The kernels with tiles of 64 keys against float64."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", SIZES)
    @pytest.mark.parametrize("block", [32, 64])
    def test_random_blocks(self, tile, block, head_dim, dtype):
        """Ragged lengths, and key heads with several query heads."""
        q, k, v = tensors(2, 1000, 4, head_dim, 1010, 2, dtype)
        compare_gradients(masks.random_blocks(0.1, block), block, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize(
        "spec",
        ["local((70, 3))", "causal()", "butterfly(32)", "local(40) | global_tokens(37)", "full()"],
    )
    def test_exact_masks(self, tile, spec, head_dim):
        q, k, v = tensors(1, 777, 2, head_dim)
        compare_gradients(masks.parse(spec), 64, q, k, v, tile)

    @pytest.mark.parametrize("group", [1, 2, 4])
    def test_patterns_of_heads(self, tile, group):
        q, k, v = tensors(2, 650, 4, 128, kv_heads=4 // group)
        some = [masks.random_blocks(0.1, 32, seed) for seed in range(3)]
        compare_gradients(masks.per_head([*some, masks.local(50)]), 32, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_lengths_of_keys(self, tile, head_dim):
        """Also none; keys and values beyond them are NaN."""
        q, k, v = tensors(5, 700, 2, head_dim)
        lens = torch.tensor([700, 333, 64, 1, 0], device="cuda", dtype=torch.int32)
        mask = masks.random_blocks(0.3, 32) | masks.local(20)
        layout = mask.layout(700, block=(32, 32), device="cuda")
        clean = [x.clone() for x in (k, v)]
        for entry, length in enumerate(lens.tolist()):
            k[entry, length:] = v[entry, length:] = torch.nan
        found, given_, _ = gradients(layout, q, k, v, tile, lens)
        check_gradients(found, q, *clean, truth(mask, q, k, lens), *given_)

    @pytest.mark.parametrize("head_dim", SIZES)
    def test_empty_rows_and_columns(self, tile, head_dim):
        """All results are written, from whatever is in memory."""
        torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
        try:
            for mask in (masks.block_diagonal(64) & ~masks.sinks(300), ~masks.full()):
                q, k, v = tensors(1, 700, 2, head_dim)
                layout = mask.layout(700, block=(32, 32), device="cuda")
                found, *_ = gradients(layout, q, k, v, tile)
                assert not any(x[:, :256].any() for x in found)
        finally:
            torch.use_deterministic_algorithms(False)
        compare_gradients(masks.block_diagonal(64) & ~masks.sinks(300), 32, q, k, v, tile)

    def test_halves_of_tiles_of_queries(self, tile):
        """Only every other block of 32 queries has keys: the rest of dQ is 0."""
        q, k, v = tensors(1, 640, 2, 128)
        mask = masks.custom(lambda q_idx, kv_idx: (q_idx // 32 % 2 == 1) & (kv_idx // 32 % 3 == 0))
        torch.use_deterministic_algorithms(True)
        try:
            layout = mask.layout(640, block=(32, 32), device="cuda")
            (dq, _, _), _, _ = gradients(layout, q, k, v, tile)
        finally:
            torch.use_deterministic_algorithms(False)
        assert not dq.unflatten(1, (-1, 64))[:, :, :32].any()
        compare_gradients(mask, 32, q, k, v, tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_long_columns_are_split(self, tile, head_dim):
        q, k, v = tensors(1, 9000, 2, head_dim, 128)
        plan = compare_gradients(masks.random_blocks(0.4, 32), 32, q, k, v, tile)
        assert plan.num_splits

    @pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 96, 127, 129])
    def test_ragged_ends(self, tile, length):
        compare_gradients(masks.local((70, 3)), 32, *tensors(2, length, 2, 64), tile)
        compare_gradients(masks.full(), 64, *tensors(1, 200, 2, 128, length), tile)
        compare_gradients(masks.full(), 64, *tensors(1, length, 2, 128, 200), tile)

    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_keys_and_values_repeat_to_the_bit(self, tile, head_dim):
        """dK and dV; dQ is added in any order, and stays within rounding."""
        q, k, v = tensors(1, 4096, 8, head_dim)
        layout = masks.random_blocks(0.1, 32).layout(4096, block=(32, 32), device="cuda")
        first, _, _ = gradients(layout, q, k, v, tile)
        for _ in range(50):
            again, _, _ = gradients(layout, q, k, v, tile)
            assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
            torch.testing.assert_close(first[0], again[0], atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("block", [32, 64])
def test_whole_calls(block, deterministic):
    """Through the API, where the plan chooses the small configs."""
    mask = masks.random_blocks(0.1, block)
    q, k, v = (x.requires_grad_() for x in tensors(1, 2048, 4, 128, kv_heads=2))
    layout = mask.layout(2048, block=(block, block), device="cuda")
    assert attention.forward_plan(layout, q, k).config.tile == (64, block)
    plan = attention.backward_plans(layout, q, k, deterministic).dkdv
    assert plan.config.small != deterministic
    out, lse = block_sparse_attention(
        q, k, v, layout, return_lse=True, deterministic=deterministic, impl="sm90"
    )
    check(out.detach(), lse.detach(), q.detach(), k.detach(), v.detach(), truth(mask, q, k))
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), dout)
    wait()
    check_gradients(found, q, k, v, truth(mask, q, k), dout)


def test_bit_tiles_may_begin_at_any_byte():
    made = masks.local(40).layout(1024)
    arrays = made.arrays()
    packed = arrays["bit_tiles"]
    memory = torch.zeros(packed.numel() + 3, dtype=torch.uint8)
    memory[3:] = packed.flatten()
    arrays["bit_tiles"] = memory[3:].view(packed.shape)
    layout = BlockLayout(1024, 1024, (128, 128), **arrays)
    configs = forward_configs("bfloat16", 64)
    assert best_config(layout, configs) == best_config(made, configs)


def test_many_bit_tiles_are_sampled_by_their_use():
    """A corner of distinct tiles does not hide what most blocks are."""
    noise = masks.custom(lambda q, kv: (q * q + 3 * q * kv + 7 * kv * kv) % 1009 < 500)
    corner = noise & masks.custom(lambda q, kv: (q < 4096) & (kv < 4096))
    layout = (masks.local(3) | corner).layout(65536)
    assert layout.num_bit_tiles > 512
    held, full = _parts_of_partial(layout, (64, 64))
    true = masks.retile(layout, (64, 64))
    assert held == pytest.approx(true.num_tiles, rel=0.15)
    assert full == 0
