"""Plans, their keys, and their way through a custom op; configs as text."""

from __future__ import annotations

import ast
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.kernels import compile as compiling
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.plan import Plan, PlanKey, Planner, plan_of
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.config import (
    DTYPES,
    FORWARD_COSTS,
    all_configs,
    backward_configs,
    dq_config,
    forward_configs,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig

from sparse_flash import kernels, masks
from tests.kernels.helpers import H200, plan_on_cpu

CONFIGS = all_configs()


def key_of(planner, batch=1, heads=2, kv_heads=2, facts=H200):
    return PlanKey(planner, batch, heads, kv_heads, facts)


def test_configs_are_distinct_keys():
    assert len({repr(config) for config in CONFIGS}) == len(CONFIGS)


def test_the_candidates_of_every_call(monkeypatch):
    """By dtype and head_dim; calls with the same candidates share their plans."""
    for dtype, name in sm90.DTYPES.items():
        for d in range(16, 257, 8):
            assert sm90.FORWARD[dtype, d].configs == forward_configs(name, d)
            assert sm90.DQ[dtype, d].configs == (dq_config(name, d),)
            assert sm90.BACKWARD[dtype, d].configs == backward_configs(name, d)
            fixed = sm90.DETERMINISTIC_BACKWARD[dtype, d]
            assert fixed.configs == backward_configs(name, d, deterministic=True)
            assert fixed.transposed
            assert sm90.FORWARD[dtype, d].token_bytes == 4 * forward_configs(name, d)[0].head_dim
    assert set(sm90.DTYPES.values()) == set(DTYPES)
    plan_on_cpu(monkeypatch)
    layout = masks.causal().layout(200)
    q = {d: torch.zeros(2, 200, 2, d).bfloat16() for d in (40, 64, 72)}
    plan = sm90.forward_plan(layout, q[40], q[40])
    assert sm90.forward_plan(layout, q[64], q[64]) is plan
    others = [(q[72], q[72]), (q[40][:1], q[40]), (q[40], q[40][:, :, :1])]
    assert plan not in [sm90.forward_plan(layout, *tensors) for tensors in others]
    assert sm90.forward_plan(layout, q[40].half(), q[40]) is not plan
    assert sm90.backward_plans(layout, q[40], q[40]).dkdv is not plan


def test_plans_of_gpus_differ():
    layout = masks.causal().layout(1000)
    planner = sm90.FORWARD[torch.bfloat16, 64]
    plans = [
        plan_of(layout, key_of(planner, facts=facts))
        for facts in (H200, replace(H200, num_sms=3), replace(H200, num_sms=3))
    ]
    assert [plan.num_ctas for plan in plans] == [16, 3, 3]
    assert plans[1] is plans[2] is not plans[0]


def test_the_config_that_was_chosen_is_the_one_that_is_launched(monkeypatch):
    """Also where candidates differ in the width of their tiles alone."""
    narrow = replace(forward_configs("bfloat16", 64)[0], tile_n=64)
    wide = replace(narrow, tile_n=128)
    loaded = []
    monkeypatch.setattr(sm90, "load_function", lambda config: loaded.append(config) or print)
    monkeypatch.setattr(sm90, "_kernels", {})
    for configs in ((narrow, wide), (wide, narrow)):
        # Both cover a full layout at the same cost: then the first is taken.
        for mask, expected in ((masks.full(), configs[0]), (masks.sinks(64), narrow)):
            layout = mask.layout(4096, block=(128, 64))
            plan = plan_of(layout, key_of(Planner(configs, FORWARD_COSTS, 256)))
            assert plan.config == expected
            assert plan.schedule.tile == plan.config.tile
            assert sm90.bind(plan) is plan.kernel is sm90._kernels[expected]
    assert loaded == [narrow, wide]


def test_configs_that_do_not_fit_the_gpu_are_not_taken():
    layout = masks.full().layout(4096)
    small, _, large, *_ = sm90.FORWARD[torch.bfloat16, 32].configs
    planner = Planner((small, large), FORWARD_COSTS, 256)
    assert plan_of(layout, key_of(planner)).config == large
    facts = replace(H200, shared_memory=small.shared_memory)
    assert small.shared_memory < large.shared_memory
    assert plan_of(layout, key_of(planner, facts=facts)).config == small
    facts = replace(facts, shared_memory=small.shared_memory - 1)
    with pytest.raises(ValueError, match=r"need \d+ bytes of shared memory, but this GPU"):
        plan_of(layout, key_of(planner, facts=facts))


def test_a_transposed_plan_has_the_config_of_the_transposed_layout():
    every_sixth = masks.custom(lambda q, kv: (q // 64 % 6 == 0) & (kv >= 0))
    layout = every_sixth.layout(6144, block=(64, 64))
    small, _, large, *_ = forward_configs("bfloat16", 64)
    planner = Planner((small, large), FORWARD_COSTS, 256)
    assert plan_of(layout, key_of(planner)).config == small  # 64 of 192 rows would be used
    assert plan_of(layout, key_of(replace(planner, transposed=True))).config == large


def test_threads_that_ask_for_a_plan_get_one():
    layout = masks.causal().layout(2000)
    planner, barrier, plans = sm90.FORWARD[torch.bfloat16, 64], threading.Barrier(8), []

    def ask():
        barrier.wait()
        plans.append(plan_of(layout, key_of(planner)))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(plans) == 8
    assert {id(plan) for plan in plans} == {id(layout.derived[key_of(planner)])}


def test_plans_are_compared_as_objects():
    layout = masks.causal().layout(300)
    plan = plan_of(layout, key_of(sm90.FORWARD[torch.bfloat16, 64]))
    twin = Plan(plan.config, plan.schedule)
    assert plan == plan
    assert plan != twin
    assert len({plan, twin}) == 2
    assert plan.nbytes == sum(x.nbytes for x in plan.schedule.arrays())


def test_all_derived_values_follow_or_none():
    layout = masks.full().layout(2100, block=(64, 64))
    planner = sm90.FORWARD[torch.bfloat16, 64]
    plan = plan_of(layout, key_of(planner))
    before = plan.schedule.counts.tolist(), plan.schedule.tiles.clone(), layout.col_indices

    class Refuses:
        def follow(self, layout):
            raise ValueError("no")

    layout.derived["other"] = Refuses()
    other = masks.causal().layout(2100, block=(64, 64))
    with pytest.raises(ValueError, match="no"):
        layout.update_(other)
    assert plan.schedule.counts.tolist() == before[0]
    assert torch.equal(plan.schedule.tiles, before[1])
    assert layout.col_indices is before[2]
    del layout.derived["other"]
    layout.update_(other)
    fresh = plan_of(other, key_of(planner)).schedule
    assert torch.equal(plan.schedule.tiles[: len(fresh.tiles)], fresh.tiles)
    assert plan_of(layout, key_of(planner)) is plan


def test_facts_of_a_device(monkeypatch):
    properties = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=227 << 10,
        L2_cache_size=60 << 20,
    )
    asked = []
    monkeypatch.setattr(DeviceFacts, "_of", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties
    )
    for _ in range(2):
        assert DeviceFacts.of(torch.device("cuda:1")) == H200
        assert DeviceFacts.of(torch.device("cuda")) == H200
    assert asked == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="planned for CUDA devices, got cpu"):
        DeviceFacts.of(torch.device("cpu"))


def test_threads_compile_a_config_once(monkeypatch):
    @dataclass(frozen=True)
    class ExampleConfig:
        head_dim: int = 64
        dtype: str = "bfloat16"
        arch: str = "sm_1"
        tile: tuple[int, int] = (64, 32)

    asked, barrier = [], threading.Barrier(4)

    def load_or_compile(name, key, build):
        asked.append((name, key, build()))
        return print

    monkeypatch.setattr(compiling, "load_or_compile", load_or_compile)

    def build(config):
        return config.head_dim

    def load():
        barrier.wait()
        assert compiling.load(ExampleConfig(), build) is print

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [("example-sm_1-bfloat16-64-64x32", repr(ExampleConfig()), 64)]


def test_what_all_architectures_share_knows_none():
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if "sm90" in n or "sm80" in n], path.name


def test_a_forward_config_of_another_arch_is_another_key():
    config = forward_configs("bfloat16", 64)[0]
    other = replace(config, arch="sm_100a")
    assert isinstance(other, ForwardConfig)
    assert repr(other) != repr(config)
    assert compiling.name_of(other) != compiling.name_of(config)
