"""Configs and plans by the GPU's limits, and the implementation of each GPU, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.sm80 import attention, gradients, positions
from sparse_flash.kernels.sm80.backward_config import backward_config
from sparse_flash.kernels.sm80.config import (
    DTYPES,
    LIMIT_OF,
    LIMITS,
    all_forward_configs,
    forward_at_config,
    forward_configs,
    shared_memory_of,
    target_of,
)
from sparse_flash.kernels.sm80.costs import COSTS

from sparse_flash import masks
from sparse_flash.call import AttentionCall
from sparse_flash.implementations import choose
from sparse_flash.implementations.sm80 import Sm80
from tests.kernels.helpers import plan_on_cpu

A100 = DeviceFacts("sm_80", num_sms=108, shared_memory=163 << 10, l2_bytes=40 << 20)
RTX4090 = DeviceFacts("sm_89", num_sms=128, shared_memory=99 << 10, l2_bytes=72 << 20)
RTX5090 = DeviceFacts("sm_120", num_sms=170, shared_memory=99 << 10, l2_bytes=96 << 20)
B200 = DeviceFacts("sm_100", num_sms=148, shared_memory=227 << 10, l2_bytes=126 << 20)


@pytest.mark.parametrize("limit", LIMITS)
def test_every_head_dim_has_a_config_that_fits(limit):
    for dtype in DTYPES:
        for head_dim in range(16, 257, 8):
            configs = forward_configs(dtype, head_dim, "sm_80", limit)
            assert len({config.ctas_per_sm for config in configs}) == 1
            for config in configs:
                assert config.head_dim >= head_dim
                assert config.dtype == dtype
                # A multiprocessor has 1 KiB more than a CTA can use, and a CTA takes 1 KiB more.
                assert config.ctas_per_sm * (config.shared_memory + 1024) <= limit + 1024


@pytest.mark.parametrize("block", [32, 64, 128])
def test_narrow_blocks_get_narrow_tiles(monkeypatch, block):
    plan_on_cpu(monkeypatch, A100)
    layout = masks.random_blocks(0.1, block, 0).layout(2048, block=(128, block))
    q = torch.zeros(1, 2048, 2, 32).bfloat16()
    plan = attention.forward_plan(layout, q, q)
    assert plan.config.tile == (128, 128 if block == 128 else 64)
    assert plan.schedule.tile == plan.config.tile


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_86"),
        ("sm_87", "sm_86"),
        ("sm_89", "sm_89"),
        ("sm_90", "sm_90"),
        ("sm_100", "sm_100"),
        ("sm_103", "sm_100"),
        ("sm_110", "sm_110"),
        ("sm_120", "sm_120"),
        ("sm_121", "sm_120"),
    ],
)
def test_targets(arch, target):
    """Code for one minor version runs on the later ones."""
    facts = replace(A100, arch=arch)
    assert target_of(facts) == target
    unmeasured = arch in ("sm_87", "sm_110")
    assert shared_memory_of(facts) == (99 << 10 if unmeasured else 163 << 10)


def test_every_target_has_costs():
    """Measured on Hopper, estimated elsewhere, and used by the plans."""
    assert COSTS.keys() == LIMIT_OF.keys()
    assert [target for target, costs in COSTS.items() if not costs.estimated] == ["sm_90"]
    for target, limit in LIMIT_OF.items():
        forward = attention.forward_planner(torch.bfloat16, 64, target, limit)
        backward = gradients.planner_of(backward_config("bfloat16", 64, target, limit))
        assert forward.costs is COSTS[target].forward
        assert backward.costs is COSTS[target].backward
    # A cache in two halves may hold two copies.
    assert COSTS["sm_89"].forward.l2_share > COSTS["sm_80"].forward.l2_share


def test_too_little_shared_memory_is_refused():
    with pytest.raises(ValueError, match=r"head_dim 128 .* 50000 bytes .* impl='reference'"):
        forward_configs("bfloat16", 128, "sm_80", 50000)


@pytest.mark.parametrize("facts", [A100, RTX4090, RTX5090, B200], ids=lambda f: f.arch)
def test_all_configs_are_what_gpus_get(facts):
    found = all_forward_configs(facts.arch)
    assert len(found) == len(set(found))
    for dtype in DTYPES:
        for dim in (16, 32, 64, 72, 128, 192, 256):
            limits = (dtype, dim, facts.arch, facts.shared_memory)
            assert {*forward_configs(*limits), forward_at_config(*limits)} <= {*found}


@pytest.mark.parametrize("facts", [A100, RTX4090, RTX5090, B200], ids=lambda f: f.arch)
def test_plans_fill_the_gpu(monkeypatch, facts):
    """A CTA of the schedule for each that runs at a time."""
    plan_on_cpu(monkeypatch, facts)
    q = torch.zeros(2, 8192, 8, 1).bfloat16().expand(-1, -1, -1, 128)
    plan = attention.forward_plan(masks.causal().layout(8192), q, q)
    assert plan.config.arch == facts.arch
    assert plan.num_ctas == plan.config.ctas_per_sm * facts.num_sms
    assert plan.schedule.tile == plan.config.tile
    layout = masks.causal().layout(512)
    at = positions.forward_plan_at(layout, q[:, :100], q)
    assert at.config == forward_at_config("bfloat16", 128, facts.arch, facts.shared_memory)
    assert at.config.offsets
    assert at.num_ctas == plan.num_ctas
    assert positions.forward_plan_at(layout, q[:, :100], q) is at


def gpu_call(monkeypatch, facts, dtype=torch.bfloat16, dim=64, needs_grad=False):
    """A call on a GPU that is not there."""
    device = torch.device("cuda", 0)
    monkeypatch.setitem(DeviceFacts._of, device, facts)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some GPU")
    strides = (64 * dim, dim, dim, 1)
    q = SimpleNamespace(
        dtype=dtype,
        is_cuda=True,
        device=device,
        shape=(1, 64, 1, dim),
        stride=lambda: strides,
        storage_offset=lambda: 0,
    )
    none = (None, None, None)
    return AttentionCall(
        q, q, q, *none, None, None, 1.0, deterministic=False, needs_grad=needs_grad
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_87", "sm_89", "sm_100", "sm_110", "sm_121"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_auto_takes_it_outside_hopper(monkeypatch, recwarn, arch, needs_grad):
    call = gpu_call(monkeypatch, replace(A100, arch=arch), needs_grad=needs_grad)
    assert choose("auto", call).name == "sm80"
    assert not recwarn


def test_on_hopper_auto_takes_the_hopper_kernels(monkeypatch):
    call = gpu_call(monkeypatch, replace(B200, arch="sm_90"))
    assert choose("auto", call).name == "sm90"
    assert choose("sm80", call).name == "sm80"


@pytest.mark.parametrize("arch", ["sm_70", "sm_75"])
def test_older_gpus_are_refused(monkeypatch, arch):
    call = gpu_call(monkeypatch, replace(A100, arch=arch))
    words = rf"it needs compute capability 8.0 \(Ampere\) to 12.x, some GPU has 7.{arch[-1]}"
    with pytest.raises(ValueError, match=rf"impl='sm80' cannot run this: {words}"):
        choose("sm80", call)
    with pytest.warns(UserWarning, match=rf"'reference', which is slow: {words}"):
        assert choose("auto", call).name == "reference"


def test_what_it_cannot_take_is_refused(monkeypatch):
    for changes, words in (
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"dim": 60}, "multiple of 8 from 16 to 256, got 60"),
        ({"dim": 264}, "multiple of 8 from 16 to 256, got 264"),
    ):
        reason = Sm80().unsupported_reason(gpu_call(monkeypatch, A100, **changes))
        assert words in reason
    call = gpu_call(monkeypatch, A100)
    call.q.stride = lambda: (64 * 64 + 4, 64, 64, 1)
    call.q.shape = (2, 64, 1, 64)
    assert "use q.contiguous()" in Sm80().unsupported_reason(call)
    call.q.is_cuda, call.q.device = False, torch.device("cpu")
    assert "but q is on cpu" in Sm80().unsupported_reason(call)
