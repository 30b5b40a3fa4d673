"""The host side of a launch, without a GPU: what the kernel is given, and what is refused."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from sparse_flash.kernels import sm90
from sparse_flash.kernels.config import forward_configs
from sparse_flash.kernels.schedule import schedule

from sparse_flash import masks

COUNTER = torch.zeros(2, dtype=torch.int32)


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the launches, by name; on a "device" that is the CPU."""
    pytest.importorskip("cutlass")
    from sparse_flash.kernels.forward_sm90 import ForwardSm90

    names = [n for n in inspect.signature(ForwardSm90.__call__).parameters if n != "self"]
    calls = []

    def kernel(*arguments):
        assert len(arguments) == len(names) - 1  # the stream is torch's current one
        calls.append(dict(zip(names, arguments, strict=False)))

    monkeypatch.setattr(sm90, "forward_kernel", lambda config: kernel)
    monkeypatch.setattr(sm90._Kernel, "counter", lambda self, index: COUNTER)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of "cpu"
    sm90._loaded.cache_clear()
    yield calls
    sm90._loaded.cache_clear()


def launch(q, k, v, mask, kv_lens=None, scale=0.5, ctas=132):
    config = forward_configs("bfloat16", q.shape[3])[0]
    layout = mask.layout(q.shape[1], k.shape[1])
    plan = schedule(layout, q.shape[0], q.shape[2], config.tile, ctas)
    sm90._loaded("bfloat16", q.shape[3], config.tile_m).num_ctas[None] = ctas
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
