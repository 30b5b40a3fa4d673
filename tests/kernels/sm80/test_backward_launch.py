"""Arguments of the backward kernels for Ampere and later, without a GPU."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from sparse_flash.kernels.sm80 import gradients
from sparse_flash.kernels.sm80.backward_config import backward_config

from sparse_flash import masks
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.sm80.test_plan import A100, RTX4090

LOG2_E = math.log2(math.e)


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the launches, by name."""
    pytest.importorskip("cutlass")
    from sparse_flash.kernels.sm80.backward import BackwardSm80
    from sparse_flash.kernels.sm80.backward_at import BackwardAtSm80

    calls = []

    def load(config):
        kernel = BackwardAtSm80 if config.offsets else BackwardSm80
        names = [n for n in inspect.signature(kernel.__call__).parameters if n != "self"]

        def function(*arguments):
            assert len(arguments) == len(names) - 1  # the stream is torch's current one
            calls.append({"config": config, **dict(zip(names, arguments, strict=False))})

        return function

    monkeypatch.setattr(gradients, "load_function", load)
    monkeypatch.setattr(gradients, "_kernels", {})
    for name, value in (
        ("_cuda_getDevice", None),
        ("_cuda_getCurrentRawStream", 0),
        ("_cuda_isCurrentStreamCapturing", False),
    ):
        monkeypatch.setattr(torch._C, name, lambda *_, value=value: value, raising=False)
    return calls


def problem(s, s_kv, head_dim):
    q, out, dout = (torch.randn(2, s, 4, head_dim).bfloat16() for _ in range(3))
    k, v = (torch.randn(2, s_kv, 2, head_dim).bfloat16() for _ in "kv")
    return q, k, v, out, dout, torch.randn(2, 4, s)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("facts", [A100, RTX4090], ids=lambda f: f.arch)
def test_arguments_are_those_of_the_kernel(launched, monkeypatch, facts, deterministic):
    plan_on_cpu(monkeypatch, facts)
    q, k, v, out, dout, lse = problem(20000, 300, 120)
    plan = gradients.backward_plan(masks.full().layout(20000, 300), q, k, deterministic)
    dq, dk, dv, *_ = gradients.backward(dout, None, q, k, v, out, lse, plan, None, 0.5)
    (given,) = launched
    assert plan.num_splits > 0
    assert given["config"] is plan.config
    assert plan.config.fixed_point == deterministic
    expected = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse}
    for name, tensor in {**expected, "dq": dq, "dk": dk, "dv": dv}.items():
        assert given[name] is tensor
    for name in ("work", "tiles", "bits", "combine", "kv_lens", "counts"):
        assert given[name] is getattr(plan.schedule, name)
    tile_n, tile_m = plan.config.tile
    row_tiles = -(-20000 // tile_m)
    assert given["bits"].shape[1:] == (tile_n // 64, 128, 2)
    assert given["dk_splits"].shape == given["dv_splits"].shape == (plan.num_splits, tile_n, 128)
    assert given["dq_sum"].shape == (2, 4, row_tiles, tile_m * 128)
    assert not given["dq_sum"].any()
    assert given["stats"].shape == (2, 4, 2, row_tiles * tile_m)
    assert given["bounds"].shape == (2 * deterministic, 2, 2)
    assert given["num_ctas"] == plan.num_ctas <= plan.config.ctas_per_sm * facts.num_sms
    assert given["softmax_scale"] == 0.5
    assert given["scale_log2"] == pytest.approx(0.5 * LOG2_E)
    assert not given["has_dlse"]
    for x, like in ((dq, q), (dk, k), (dv, v)):
        assert x.shape == like.shape
        assert x.is_contiguous()


def test_what_is_given_becomes_what_the_kernel_reads(launched, monkeypatch):
    plan_on_cpu(monkeypatch, A100)
    q, k, v, out, dout, lse = problem(100, 70, 64)
    plan = gradients.backward_plan(masks.causal().layout(100, 70), q, k)
    dout = dout.transpose(2, 3).contiguous().transpose(2, 3)  # strides that no load takes
    dlse = torch.ones(()).expand(2, 4, 100)
    lens = torch.tensor([7, 300])
    gradients.backward(dout, dlse, q, k, v, out, lse, plan, lens, -0.5)
    (given,) = launched
    assert torch.equal(given["dout"], dout)
    assert given["dout"].stride(3) == 1
    assert torch.equal(given["dlse"], dlse)
    assert given["dlse"].is_contiguous()
    assert given["has_dlse"] == 1
    assert given["kv_lens"].tolist() == [7, 70]
    assert given["kv_lens"].dtype == torch.int32
    assert given["softmax_scale"] == -0.5
    again = gradients.backward_plan(masks.full().layout(100, 70), q, k)
    gradients.backward(dout, None, q, k, v, out, lse, again, None, 0.5)
    assert again.kernel is plan.kernel  # one for each config


def test_arguments_are_those_of_the_kernel_at_positions(launched, monkeypatch):
    plan_on_cpu(monkeypatch, A100)
    q, k, v, out, dout, lse = problem(100, 9000, 64)
    plan = gradients.backward_plan_at(masks.causal().layout(9000), q, k)
    offset, starts = (torch.tensor(x, dtype=torch.int32) for x in ([40, 8900], [0, 5]))
    given = (None, offset, starts, 0.5)
    dq, dk, dv, *_ = gradients.backward_at(dout, None, q, k, v, out, lse, plan, *given)
    (given,) = launched
    _, tile_m = plan.config.tile
    assert given["config"].offsets
    assert given["q_pad"].tolist() == [40 % tile_m, 8895 % tile_m]
    assert given["kv_starts"] is starts
    assert given["dq_sum"].shape == (2, 4, -(-100 // tile_m) + 1, tile_m * 64)
    assert given["stats"].shape == (2, 4, 2, (-(-100 // tile_m) + 1) * tile_m)
    assert given["bits"] is plan.bits
    assert given["num_ctas"] == plan.config.ctas_per_sm * A100.num_sms
    for name, tensor in {"q": q, "dq": dq, "dk": dk, "dv": dv}.items():
        assert given[name] is tensor
    assert not dk.any()  # keys that no query sees are not written
    assert not dv.any()
    empty = gradients.backward_at(
        dout, None, q, k[:, :0], v[:, :0], out, lse, plan, None, 0, None, 1.0
    )
    assert [x.shape[1] for x in empty[:3]] == [100, 0, 0]
    assert len(launched) == 1


def test_gpus_of_too_little_shared_memory_are_refused():
    with pytest.raises(ValueError, match="shared memory"):
        backward_config("bfloat16", 128, "sm_80", shared_memory=64 << 10)
