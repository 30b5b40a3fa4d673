"""The Hopper implementation's way through PyTorch, without a GPU: the launch is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sparse_flash.kernels import plans as plans_
from sparse_flash.kernels.plans import schedule_of
from sparse_flash.kernels.schedule import schedule
from sparse_flash.kernels.sm90 import attention as sm90
from torch.nn.functional import scaled_dot_product_attention

from sparse_flash import block_sparse_attention, dispatch, hopper, masks


@pytest.fixture
def calls(monkeypatch):
    """Launches, of dense attention; with "auto" every call comes by the Hopper implementation."""
    seen = []

    def launch(q, k, v, plan, kv_lens, num_parts, tile_m, scale):
        seen.append((q.shape, len(plan), tile_m))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()
        logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
        return out, logits.logsumexp(-1)

    def launch_backward(
        dout, dlse, q, k, v, out, lse, kind, plan, by_queries, lens, num_parts, scale
    ):
        seen.append((q.shape, len(plan), kind))
        assert len(by_queries) == 6 * (len(num_parts) - 1) == 6 * (kind == "keys")
        q_, k_, v_, dout_ = (x.float() for x in (q, k, v, dout))
        p = (torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale - lse[..., None]).exp()
        delta = (out.float() * dout_).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout_, v_) - delta[..., None]) * scale
        products = (("bhqk,bkhd->bqhd", ds, k_), ("bhqk,bqhd->bkhd", ds, q_))
        products = (*products, ("bhqk,bqhd->bkhd", p, dout_))
        return tuple(torch.einsum(*x).to(q.dtype) for x in products)

    implementation = dispatch.Implementation("sm90", hopper.attend, lambda *_: None)
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", (implementation,))
    monkeypatch.setattr(sm90, "launch", launch)
    monkeypatch.setattr(sm90, "launch_backward", launch_backward)
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return seen


def tensors(grad, dim=32):
    torch.manual_seed(0)
    return [torch.randn(2, 200, 2, dim).bfloat16().requires_grad_(grad) for _ in "qkv"]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["mask", "layout"])
def test_compile_fullgraph(calls, kind, grad, deterministic):
    mask = masks.full() if kind == "mask" else masks.full().layout(200)

    def step(q, k, v):
        options = {"return_lse": True, "deterministic": deterministic}
        out, lse = block_sparse_attention(q * 2, k, v, mask, **options)
        return out.float().sin().sum() + lse.sum()

    torch._dynamo.reset()
    q, k, v = tensors(grad)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    result, eager = compiled(q, k, v), step(q, k, v)
    torch.testing.assert_close(result, eager, rtol=1e-3, atol=1e-1)
    if grad:
        gradients = [torch.autograd.grad(x, (q, k, v)) for x in (result, eager)]
        for a, b in zip(*gradients, strict=True):
            assert (a - b).float().norm() < 0.01 * b.float().norm()
    assert {call[0] for call in calls} == {q.shape}
    before = len(calls)
    result = compiled(q, k, v)
    assert len(calls) == before + 1  # the compiled graph launches it
    if grad:
        result.backward()
        assert calls[-1] == (q.shape, 6, "fixed" if deterministic else "backward")


def test_compile_follows_other_sizes(calls):
    """Batches and lengths that differ become symbols; a layout and a schedule are for numbers."""

    mask = masks.full()

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, mask)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for shape in ((2, 200, 2, 32), (3, 200, 2, 32), (5, 300, 2, 32), (7, 80, 4, 32)):
        q, k, v = (torch.randn(shape).bfloat16() for _ in "qkv")
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))
        assert calls[-2][0] == calls[-1][0] == shape


@pytest.mark.parametrize(
    ("dim", "deterministic"), [(32, False), (32, True), (128, True), (136, False)]
)
def test_gradients_are_those_of_attention(calls, dim, deterministic):
    q, k, v = tensors(True, dim)
    options = {"return_lse": True, "deterministic": deterministic}
    out, lse = block_sparse_attention(q, k, v, masks.full(), **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    logits = torch.einsum("bqhd,bkhd->bhqk", *exact[:2]) * dim**-0.5
    ref = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), exact[2])
    expected = torch.autograd.grad(
        (ref, logits.logsumexp(-1)), exact, (dout.double(), dlse.double())
    )
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()
    assert calls[-1][2] == ("keys" if dim > 128 else "fixed" if deterministic else "backward")


def test_only_the_lse_is_used(calls):
    q, k, v = tensors(True)
    _, lse = block_sparse_attention(q, k, v, masks.full(), return_lse=True)
    lse.sum().backward()
    assert q.grad.any()
    assert not v.grad.any()


def test_schedules_live_as_long_as_their_layouts(calls):
    import gc

    q, k, _ = tensors(False)
    layout = masks.causal().layout(200)
    first = schedule_of("forward", layout, q, k)
    assert schedule_of("forward", layout, q, k) is first
    assert schedule_of("forward", layout, q[:1], k[:1]) is not first
    count = len(plans_._schedules.names)
    del layout
    gc.collect()
    assert len(plans_._schedules.names) == count - 2


def test_a_copy_of_a_layout_has_schedules_of_its_own(calls):
    import copy
    import pickle

    q, k, _ = tensors(False)
    layout = masks.causal().layout(200)
    for twin in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert twin.number != layout.number
        assert torch.equal(
            schedule_of("forward", twin, q, k).work, schedule_of("forward", layout, q, k).work
        )


@pytest.mark.parametrize("dim", [16, 64, 128, 136, 256])
def test_how_gradients_are_made(dim):
    two = ("keys", "queries")
    assert hopper._backward_kinds(dim, deterministic=True) == (("fixed",) if dim <= 128 else two)
    assert hopper._backward_kinds(dim, deterministic=False) == (
        ("backward",) if dim <= 128 else two
    )


@pytest.mark.parametrize(
    ("spec", "tile"), [("full()", 80), ("causal()", 80), ("random_blocks(0.5, 128, 0)", 64)]
)
def test_wide_tiles_where_they_cover_little_more(calls, spec, tile):
    layout = masks.parse(spec).layout(4096)
    of = {dim: torch.zeros(1, 4096, 2, 1).bfloat16().expand(-1, -1, -1, dim) for dim in (64, 128)}
    assert schedule_of("backward", layout, of[128], of[128]).tile == (128, tile)
    assert schedule_of("fixed", layout, of[128], of[128]).tile == (128, 64)
    assert schedule_of("backward", layout, of[64], of[64]).tile == (128, 128)
    q = of[128][:, :400].clone().requires_grad_()
    block_sparse_attention(q, q, q, masks.full(), impl="auto").sum().backward()
    assert calls[-1][2] == "wide"


def test_schedules_follow_an_updated_layout(calls):
    q, k, _ = tensors(False)
    layout = masks.full().layout(200, block=(64, 64))
    plans = [schedule_of("forward", layout, q[:n], k[:n]) for n in (1, 2)]
    arrays = [plan.arrays() for plan in plans]
    new = masks.local(20).layout(200, block=(64, 64))
    layout.update_(new)
    assert layout.equal(new)
    for plan, before in zip(plans, arrays, strict=True):
        assert all(a is b for a, b in zip(plan.arrays(), before, strict=True))
    expected = schedule(new, 2, 2, plans[1].tile, 132)
    assert torch.equal(plans[1].tiles[: len(expected.tiles)], expected.tiles)
    assert plans[1].counts.tolist() == expected.counts.tolist()


def test_an_update_that_finds_no_room_changes_nothing(calls):
    q, k, _ = tensors(False)
    layout = masks.sinks(64).layout(200, block=(64, 64))
    plans = [schedule_of("forward", layout, q[:n], k[:n]) for n in (1, 2)]
    before, kept = layout.col_indices, [x.clone() for plan in plans for x in plan.arrays()]
    with pytest.raises(ValueError, match="no room"):
        layout.update_(masks.full().layout(200, block=(64, 64)))
    assert layout.col_indices is before
    now = [x for plan in plans for x in plan.arrays()]
    assert all(torch.equal(a, b) for a, b in zip(now, kept, strict=True))


def test_auto_says_why_it_is_slow_on_a_gpu(recwarn):
    float32 = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    with pytest.warns(UserWarning, match=r"'reference', which is slow: it computes bfloat16"):
        assert dispatch.choose("auto", float32, float32, float32, None).name == "reference"
    recwarn.clear()
    on_cpu = torch.randn(1, 8, 1, 16)
    assert dispatch.choose("auto", on_cpu, on_cpu, on_cpu, None).name == "reference"
    assert not recwarn
