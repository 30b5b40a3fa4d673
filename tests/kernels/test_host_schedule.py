"""Schedules for a GPU: made on the CPU where they are small, and the same wherever made."""

from __future__ import annotations

import pytest
import torch
from sparse_flash.kernels import choice
from sparse_flash.kernels import schedule as scheduling
from sparse_flash.kernels.choice import best_config
from sparse_flash.kernels.plan import PlanKey, plan_of
from sparse_flash.kernels.schedule import ARRAYS, backward_schedule, schedule
from sparse_flash.kernels.sm90.attention import BACKWARD, FORWARD
from sparse_flash.kernels.sm90.config import BACKWARD_COSTS, FORWARD_COSTS, forward_configs

from sparse_flash import masks
from tests.calls import count_calls
from tests.kernels.helpers import H200

MASKS = {
    "cut": masks.local(200) | masks.global_tokens(64),
    "heads": masks.per_head([masks.local(5), masks.causal()]),
    "noise": masks.random_blocks(0.2, 32, 0),
}


def schedules(layout):
    """A schedule of each pass."""
    return (
        schedule(layout, 2, 2, (192, 128), H200, FORWARD_COSTS, 1 << 20),
        backward_schedule(layout, 2, (2, 2), (128, 80), H200, BACKWARD_COSTS, 1 << 20),
    )


def test_long_ones_stay_where_they_are():
    layout = masks.causal().layout(1024)
    assert scheduling.on_host(layout) is layout
    assert scheduling.on_host(layout, pairs=1 << 20) is layout


@pytest.mark.parametrize("name", MASKS)
def test_to_moves_every_array(name):
    for made in schedules(MASKS[name].layout(1500)):
        moved = made.to(torch.device("cpu"))
        assert all(torch.equal(getattr(made, x), getattr(moved, x)) for x in ARRAYS)
        assert (moved.num_splits, moved.num_ctas, moved.tile) == (
            *(made.num_splits, made.num_ctas),
            made.tile,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_the_same_on_a_gpu(name, monkeypatch):
    here = MASKS[name].layout(1500)
    there = here.to("cuda")
    configs = forward_configs("bfloat16", 64)
    for most in (1 << 18, 0):  # made on the CPU, and on the GPU
        monkeypatch.setattr(scheduling, "_MOST_ON_HOST", most)
        assert best_config(there, configs) == best_config(here, configs)
        for a, b in zip(schedules(here), schedules(there), strict=True):
            for array in ARRAYS:
                assert getattr(b, array).is_cuda
                assert getattr(b, array).data_ptr() % 16 == 0
                if array != "work":  # of equal costs, any order will do
                    assert torch.equal(getattr(a, array), getattr(b, array).cpu())
            assert sorted(a.work.tolist()) == sorted(b.work.tolist())


@pytest.mark.parametrize("name", MASKS)
def test_tensors_and_arrays_give_the_same(name, monkeypatch):
    """On a GPU, the same code works on tensors."""
    layout = MASKS[name].layout(1500)
    configs = forward_configs("bfloat16", 64)
    expected, config = schedules(layout), best_config(layout, configs)
    for module in (scheduling, choice):
        monkeypatch.setattr(module, "numbers", lambda x: x)
    assert best_config(layout, configs) == config
    for a, b in zip(expected, schedules(layout), strict=True):
        assert all(torch.equal(getattr(a, x), getattr(b, x)) for x in ARRAYS)
        assert (a.num_splits, a.num_ctas) == (b.num_splits, b.num_ctas)


# Calls of Python and of C in the plans of both passes at 65,536 tokens and head_dim 64, of the
# second of two layouts. Bands are computed in small tiles, into which their blocks are cut.
CALLS = [
    ("local({})", (200, 205), 2100),
    ("local({})", (3, 5), 3400),
    ("causal({})", (3, 5), 1900),
    ("local({}) | global_tokens(64) | butterfly(128)", (200, 205), 1850),
]


@pytest.mark.parametrize(("spec", "widths", "most"), CALLS)
def test_calls_of_plans(spec, widths, most):
    keys = [
        PlanKey(planners[torch.bfloat16, 64], 1, 8, 8, H200) for planners in (FORWARD, BACKWARD)
    ]
    first, second = (masks.parse(spec.format(n)).layout(65536) for n in widths)
    for key in keys:
        plan_of(first, key)
    calls = count_calls(lambda: [plan_of(second, key) for key in keys])
    print(f"{spec}: {calls} calls")
    assert calls <= most
