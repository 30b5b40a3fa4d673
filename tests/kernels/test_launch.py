"""The host side of a launch, without a GPU: what the kernel is given, and what is refused."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from sparse_flash.kernels.launch import Kernel
from sparse_flash.kernels.schedule import backward_schedule, schedule
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.config import backward_config, forward_configs, queries_config

from sparse_flash import masks

COUNTER = torch.zeros(2, dtype=torch.int32)


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the launches, by name; on a "device" that is the CPU."""
    pytest.importorskip("cutlass")
    from sparse_flash.kernels.sm90.backward import BackwardSm90
    from sparse_flash.kernels.sm90.forward import ForwardSm90
    from sparse_flash.kernels.sm90.queries import QueriesSm90

    calls = []

    def kernel_of(class_):
        names = [n for n in inspect.signature(class_.__call__).parameters if n != "self"]

        def kernel(*arguments):
            assert len(arguments) == len(names) - 1  # the stream is torch's current one
            calls.append(dict(zip(names, arguments, strict=False)))

        return lambda config: kernel

    monkeypatch.setattr(sm90, "forward_kernel", kernel_of(ForwardSm90))
    monkeypatch.setattr(sm90, "backward_kernel", kernel_of(BackwardSm90))
    monkeypatch.setattr(sm90, "queries_kernel", kernel_of(QueriesSm90))
    monkeypatch.setattr(Kernel, "counter", lambda self, index: COUNTER)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of "cpu"
    sm90._forward.cache_clear()
    sm90._backward.cache_clear()
    sm90._queries.cache_clear()
    yield calls
    sm90._forward.cache_clear()
    sm90._backward.cache_clear()
    sm90._queries.cache_clear()


def launch(q, k, v, mask, kv_lens=None, scale=0.5, ctas=132):
    config = forward_configs("bfloat16", q.shape[3])[0]
    layout = mask.layout(q.shape[1], k.shape[1])
    plan = schedule(layout, q.shape[0], q.shape[2], config.tile, ctas)
    sm90._forward("bfloat16", q.shape[3], config.tile_m).num_ctas[None] = ctas
    options = (plan.num_parts, config.tile_m, scale)
    return plan, sm90.launch(q, k, v, plan.arrays(), kv_lens, *options)


def test_arguments_are_those_of_the_kernel(launched):
    q = torch.randn(2, 300, 4, 72).bfloat16()
    k, v = (torch.randn(2, 20000, 2, 72).bfloat16() for _ in "kv")
    plan, (out, lse) = launch(q, k, v, masks.full())
    (given,) = launched
    assert plan.num_parts > 0
    for name, tensor in {"q": q, "k": k, "v": v, "out": out, "lse": lse}.items():
        assert given[name] is tensor
    for name in ("work", "tiles", "bits", "combine", "kv_lens", "counts"):
        assert given[name] is getattr(plan, name)
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((2, 4, 300), torch.float32)
    assert given["out_parts"].shape == (plan.num_parts, 128, 96)
    assert given["lse_parts"].shape == (plan.num_parts, 128)
    assert given["counter"] is COUNTER
    assert given["num_ctas"] == min(132, plan.num_items)
    assert given["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))


def launch_backward(q, k, v, mask, dout, dlse=None, kind="backward"):
    config = backward_config(kind, "bfloat16", q.shape[3])
    layout, heads = mask.layout(q.shape[1], k.shape[1]), (q.shape[2], k.shape[2])
    plans = [backward_schedule(layout, q.shape[0], heads, config.tile, 132)]
    sm90._backward(config).num_ctas[None] = 132
    if kind == "keys":
        tile = queries_config("bfloat16", q.shape[3]).tile
        plans.append(schedule(layout, q.shape[0], heads[0], tile, 132))
        sm90._queries("bfloat16", q.shape[3]).num_ctas[None] = 132
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    arrays = [plan.arrays() for plan in plans]
    parts = [plan.num_parts for plan in plans]
    queries = arrays[1] if kind == "keys" else []
    rest = (q.clone(), lse, kind, arrays[0], queries, None, parts, 0.5)
    return plans, sm90.launch_backward(dout, dlse, q, k, v, *rest)


@pytest.mark.parametrize(
    ("kind", "dim", "tile_m", "width"),
    [
        *(
            (kind, *sizes)
            for kind in ("backward", "fixed")
            for sizes in ((24, 128, 32), (40, 128, 64), (104, 64, 128))
        ),
        ("backward", 72, 64, 96),
        ("fixed", 72, 64, 128),
        ("wide", 104, 80, 128),
    ],
)
def test_backward_arguments_are_those_of_the_kernel(launched, kind, dim, tile_m, width):
    q = torch.randn(2, 20000, 4, dim).bfloat16()
    k, v = (torch.randn(2, 300, 2, dim).bfloat16() for _ in "kv")
    (plan,), (dq, dk, dv) = launch_backward(q, k, v, masks.full(), torch.randn_like(q), kind=kind)
    (given,) = launched
    assert plan.num_parts > 0
    for name, tensor in {"q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv}.items():
        assert given[name] is tensor
    for name in ("work", "tiles", "bits", "combine", "kv_lens", "counts"):
        assert given[name] is getattr(plan, name)
    assert given["kv_lens"].tolist() == [300, 300]
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
    blocks = -(-20000 // tile_m)
    assert given["stats"].shape == (2, 4, 2, blocks * tile_m)
    chunk = 64 * (80 if kind == "wide" else min(64, width))
    assert given["dq_sum"].shape == (2, 4, 2 * blocks, chunk)
    assert given["done"].shape == (2, 4, 2 * blocks)
    assert given["bounds"].shape == (2 if kind == "fixed" else 0, 2, 2)
    assert not given["bounds"].any()
    assert given["dk_parts"].shape == given["dv_parts"].shape == (plan.num_parts, 128, width)
    assert given["num_ctas"] == min(132, plan.num_items)
    assert given["softmax_scale"] == 0.5
    assert given["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))


@pytest.mark.parametrize("dim", [64, 256])
def test_queries_follow_the_keys(launched, dim):
    q = torch.randn(2, 300, 4, dim).bfloat16()
    k, v = (torch.randn(2, 20000, 2, dim).bfloat16() for _ in "kv")
    plans, (dq, dk, dv) = launch_backward(q, k, v, masks.full(), q.clone(), kind="keys")
    keys, queries = launched
    for given, plan in zip(launched, plans, strict=True):
        for name in ("work", "tiles", "bits", "combine", "counts"):
            assert given[name] is getattr(plan, name)
    assert keys["dq_sum"].numel() == 0
    assert keys["dk"] is dk
    assert keys["dv"] is dv
    assert queries["dq"] is dq
    assert queries["stats"] is keys["stats"]
    assert queries["parts"].shape == (plans[1].num_parts, 128, dim)
    assert queries["num_ctas"] == min(132, plans[1].num_items)


def test_backward_takes_any_gradient(launched):
    q = torch.randn(1, 100, 1, 64).bfloat16()
    dlse = torch.randn(1, 100, 1).transpose(1, 2)
    launch_backward(q, q, q, masks.causal(), torch.ones(()).bfloat16().expand(q.shape), dlse)
    launch_backward(q, q, q, masks.causal(), q)
    assert launched[0]["dout"].is_contiguous()
    assert torch.equal(launched[0]["dlse"], dlse)
    assert launched[0]["dlse"].is_contiguous()
    assert [given["has_dlse"] for given in launched] == [1, 0]


def test_lengths_and_scales(launched):
    q = torch.randn(2, 100, 1, 64).bfloat16()
    launch(q, q, q, masks.causal(), torch.tensor([7, 1000]))
    assert launched[0]["kv_lens"].tolist() == [7, 100]
    assert launched[0]["kv_lens"].dtype == torch.int32
    launch(q, q, q, masks.causal(), scale=-0.5)
    assert torch.equal(launched[1]["q"], -q)
    assert launched[1]["scale_log2"] > 0
    launch(q, q, q, masks.causal(), scale=0.0)
    assert not launched[2]["q"].any()
    assert launched[2]["scale_log2"] > 0
    launch(q, q, q, ~masks.full())
    assert launched[3]["num_ctas"] == 2
    assert len(launched[3]["combine"]) == 0


def test_a_split_row_allocates_and_others_do_not(launched):
    q = torch.randn(1, 128, 1, 64).bfloat16()
    launch(q, q, q, masks.full())
    launch(q, q, q, masks.full())
    assert launched[0]["out_parts"] is launched[1]["out_parts"]
    assert launched[0]["out_parts"].shape[0] == 0


def test_alignment():
    x = torch.randn(2, 30, 4, 64)
    assert sm90._aligned(x)
    assert sm90._aligned(x.transpose(1, 2))
    assert sm90._aligned(x[:, :, :1].expand(-1, -1, 3, -1))
    assert sm90._aligned(x[..., 8:24])
    assert not sm90._aligned(x[..., 4:20])
    assert not sm90._aligned(x.transpose(2, 3))
    assert not sm90._aligned(torch.randn(2, 30, 4, 60))
    assert sm90._aligned(torch.empty_strided((1, 30, 1, 64), (1, 64, 3, 1)))


def test_refusals_that_need_no_gpu():
    q = torch.randn(1, 9, 1, 64)
    assert "bfloat16 and float16, not torch.float32" in sm90.why_not(q, q, q)
    assert "needs a Hopper GPU, but q is on cpu" in sm90.why_not(*(q.bfloat16(),) * 3)
