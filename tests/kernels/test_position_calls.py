"""What calls at positions hand to the kernels, on the CPU: the launch is a stand-in."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.sm90 import positions
from sparse_flash.kernels.sm90.position_config import DecodeConfig

from sparse_flash import masks

H200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)
pytest.importorskip("cutlass")


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the launches, by name; on a "device" that is the CPU."""
    from sparse_flash.kernels import launch as launching
    from sparse_flash.kernels.launch import Kernel
    from sparse_flash.kernels.sm90.backward_at import BackwardAtSm90, DqAtSm90
    from sparse_flash.kernels.sm90.backward_config import BackwardConfig
    from sparse_flash.kernels.sm90.decode import DecodeSm90
    from sparse_flash.kernels.sm90.forward_at import ForwardAtSm90
    from sparse_flash.kernels.sm90.forward_config import ForwardConfig

    calls = []

    def function_of(config):
        kinds = {DecodeConfig: DecodeSm90, ForwardConfig: ForwardAtSm90}
        kinds[BackwardConfig] = BackwardAtSm90
        class_ = kinds.get(type(config), DqAtSm90)
        names = [n for n in inspect.signature(class_.__call__).parameters if n != "self"]

        def kernel(*arguments):
            assert len(arguments) == len(names) - 1  # the stream is torch's current one
            calls.append(dict(zip(names, arguments, strict=False)))

        return kernel

    def launch(self, inputs, plan, scalars, device, transient=False):
        if isinstance(self, positions.UncountedKernel):
            return self.function(*inputs, *plan.lists, *scalars)
        parts = self._parts(plan.num_splits, device)
        counter = torch.zeros(2, dtype=torch.int32)
        lists = (*plan.lists, counter, *parts, *plan.combine, plan.num_ctas)
        return self.function(*inputs, *lists, *scalars)

    monkeypatch.setattr(positions, "load_position_function", function_of)
    monkeypatch.setattr(positions, "_kernels", {})
    monkeypatch.setattr(Kernel, "launch", launch)
    monkeypatch.setattr(launching, "kept_arguments", tuple)
    monkeypatch.setattr(positions.UncountedKernel, "launch", launch)
    monkeypatch.setattr(DeviceFacts, "of", classmethod(lambda cls, device: H200))
    return calls


def call(s, heads=(4, 2), dim=72, s_kv=20000, **options):
    q = torch.randn(2, s, heads[0], dim).bfloat16()
    k, v = (torch.randn(2, s_kv, heads[1], dim).bfloat16() for _ in "kv")
    layout = masks.causal().layout(30000, 20480)
    plan = positions.forward_plan_at(layout, q, k)
    given = {"kv_lens": None, "q_offset": None, "kv_starts": None, "softmax_scale": 0.5, **options}
    return SimpleNamespace(q=q, k=k, v=v, layout=layout, plan=plan), positions.forward_at(
        q, k, v, plan, **given
    )


@pytest.mark.parametrize("s", [1, 300])
def test_arguments_are_those_of_the_kernel(launched, s):
    offset = torch.tensor([7, 19000])
    given, (out, lse) = call(s, q_offset=offset)
    (told,) = launched
    for name, tensor in {"q": given.q, "k": given.k, "v": given.v, "out": out, "lse": lse}.items():
        assert told[name] is tensor
    for name in ("rows", "pattern_map", "tiles", "bits"):
        assert told[name] is getattr(given.plan, name)
    assert told["kv_lens"] is given.plan.unlimited
    assert told["kv_starts"] is given.plan.zeros
    assert told["q_offset"].dtype == torch.int32
    assert told["q_offset"].tolist() == [7, 19000]
    assert (told["q_base"], told["num_positions"]) == (0, 30000)
    assert (lse.shape, lse.dtype, out.shape) == ((2, 4, s), torch.float32, given.q.shape)
    splits = told["num_splits"]
    assert splits > 1
    assert told["out_splits"].shape == (splits, 2, s, 4, 96)
    assert told["lse_splits"].shape == (splits, 2, 4, s)
    assert told["scale_log2"] == pytest.approx(0.5 * math.log2(math.e))
    if s == 1:
        assert told["pack"] == 2
    else:
        assert told["num_ctas"] == 132
        assert told["counter"].tolist() == [0, 0]


def test_what_a_call_gives(launched):
    lens, starts = torch.tensor([5, 9], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    call(1, q_offset=123, kv_lens=lens, kv_starts=starts, softmax_scale=-0.5)
    assert launched[0]["q_base"] == 123
    assert not launched[0]["q_offset"].any()
    assert launched[0]["kv_lens"] is lens
    assert launched[0]["kv_starts"] is starts
    assert launched[0]["scale_log2"] > 0
    given, _ = call(1, s_kv=10)
    assert launched[1]["num_splits"] == 1
    assert launched[1]["out_splits"].shape[0] == 0
    assert given.plan is positions.forward_plan_at(given.layout, given.q, given.k)
    _, (out, lse) = call(1, s_kv=0)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert len(launched) == 2


@pytest.mark.parametrize(
    ("dim", "deterministic"), [(64, False), (128, True), (96, True), (192, False)]
)
def test_backward_arguments_are_those_of_the_kernel(launched, dim, deterministic):
    q = torch.randn(2, 300, 4, dim).bfloat16()
    k, v = (torch.randn(2, 1000, 2, dim).bfloat16() for _ in "kv")
    layout = masks.causal().layout(2000, 1024)
    plans = positions.backward_plans_at(layout, q, k, deterministic)
    lse, starts = torch.zeros(2, 4, 300), torch.tensor([3, 200], dtype=torch.int32)
    dout = torch.randn(300, 2, dim, 4).bfloat16().permute(1, 0, 3, 2)
    dq, dk, dv = positions.backward_at(
        dout, None, q, k, v, q.clone(), lse, plans, None, 900, starts, 0.5
    )
    told, *others = launched
    for name, tensor in {"q": q, "k": k, "v": v, "dq": dq, "dk": dk, "dv": dv}.items():
        assert told[name] is tensor
    config = plans.dkdv.config
    tiles = -(-300 // config.tile_m) + 1
    assert told["stats"].shape == (2, 4, 2, tiles * config.tile_m)
    assert told["done"].shape == (2, 4, 2 * tiles * config.dq)
    assert told["dq_sum"].shape == (2, 4, 2 * tiles * config.dq, config.dq_chunk)
    assert told["bounds"].shape == (2 * config.fixed_point, 2, 2)
    assert told["q_pad"].tolist() == [897 % config.tile_m, 700 % config.tile_m]
    assert told["dout"].is_contiguous()
    assert told["bits"] is plans.dkdv.bits
    assert (told["softmax_scale"], told["has_dlse"]) == (0.5, 0)
    assert not dk.any()
    assert not dv.any()
    assert len(others) == (dim > 128)
    for queries in others:
        assert queries["stats"] is told["stats"]
        assert queries["q_pad"] is told["q_pad"]
        assert queries["dq"] is dq
        assert queries["q_base"] == 900
        assert queries["rows"] is plans.dq.rows
        assert queries["softmax_scale"] == 0.5
