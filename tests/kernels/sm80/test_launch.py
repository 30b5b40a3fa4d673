"""Arguments of the forward kernels for Ampere and later, without a GPU."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from sparse_flash.kernels.sm80 import attention, positions

from sparse_flash import masks
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.sm80.test_plan import A100, RTX4090


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the launches, by name."""
    pytest.importorskip("cutlass")
    from sparse_flash.kernels.sm80.forward import ForwardSm80
    from sparse_flash.kernels.sm80.forward_at import ForwardAtSm80

    calls = []
    for module, name, kernel in (
        (attention, "load_function", ForwardSm80),
        (positions, "load_function", ForwardAtSm80),
    ):

        def load(config, kernel=kernel):
            names = [n for n in inspect.signature(kernel.__call__).parameters if n != "self"]

            def function(*arguments):
                assert len(arguments) == len(names) - 1  # the stream is torch's current one
                calls.append({"config": config, **dict(zip(names, arguments, strict=False))})

            return function

        monkeypatch.setattr(module, name, load)
        monkeypatch.setattr(module, "_kernels", {})
    for name, value in (
        ("_cuda_getDevice", None),
        ("_cuda_getCurrentRawStream", 0),
        ("_cuda_isCurrentStreamCapturing", False),
    ):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    return calls


@pytest.mark.parametrize("facts", [A100, RTX4090], ids=lambda f: f.arch)
def test_arguments_are_those_of_the_kernel(launched, monkeypatch, facts):
    plan_on_cpu(monkeypatch, facts)
    q = torch.randn(2, 300, 4, 120).bfloat16()
    k, v = (torch.randn(2, 20000, 2, 120).bfloat16() for _ in "kv")
    plan = attention.forward_plan(masks.full().layout(300, 20000), q, k)
    out, lse = attention.forward(q, k, v, plan, None, 0.5)
    (given,) = launched
    assert plan.num_splits > 0
    assert given["config"] is plan.config
    for name, tensor in {"q": q, "k": k, "v": v, "out": out, "lse": lse}.items():
        assert given[name] is tensor
    for name in ("work", "tiles", "bits", "combine", "kv_lens", "counts"):
        assert given[name] is getattr(plan.schedule, name)
    tile_m, _ = plan.config.tile
    assert given["bits"].shape[1:] == (tile_m // 64, 128, 2)
    assert given["out_splits"].shape == (plan.num_splits, tile_m, 128)
    assert given["lse_splits"].shape == (plan.num_splits, tile_m)
    assert given["num_ctas"] == plan.num_ctas <= plan.config.ctas_per_sm * facts.num_sms
    assert given["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))
    again = attention.forward_plan(masks.causal().layout(300, 20000), q, k)
    attention.forward(q, k, v, again, torch.tensor([7, 30000]), 0.5)
    assert again.kernel is plan.kernel  # one for each config
    assert launched[1]["kv_lens"].tolist() == [7, 20000]


def test_arguments_are_those_of_the_kernel_at_positions(launched, monkeypatch):
    plan_on_cpu(monkeypatch, A100)
    q = torch.randn(2, 1, 4, 64).bfloat16()
    k, v = (torch.randn(2, 9000, 2, 64).bfloat16() for _ in "kv")
    layout = masks.causal().layout(9000)
    plan = positions.forward_plan_at(layout, q, k)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    out, lse = positions.forward_at(q, k, v, plan, None, 8999, starts, 0.5)
    (given,) = launched
    assert given["config"].offsets
    assert given["num_splits"] > 1
    assert given["out_splits"].shape == (given["num_splits"], 2, 1, 4, 64)
    expected = {"q": q, "out": out, "lse": lse, "kv_starts": starts, "rows": plan.rows}
    for name, tensor in (*expected.items(), ("tiles", plan.tiles), ("bits", plan.bits)):
        assert given[name] is tensor
    assert (given["q_base"], given["num_positions"]) == (8999, 9000)
    assert given["num_ctas"] == plan.config.ctas_per_sm * A100.num_sms
    again = positions.forward_plan_at(masks.full().layout(9000), q, k)
    positions.forward_at(q, k, v, again, None, 8999, None, 0.5)
    assert again.kernel is plan.kernel
