"""The Hopper implementation's way through PyTorch, without a GPU: the launch is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from sparse_flash.kernels.schedule import schedule
from sparse_flash.kernels.sm90 import attention as sm90
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.config import (
    FORWARD_COSTS,
    BackwardVariant,
    variant_config,
)
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from torch.nn.functional import scaled_dot_product_attention

from sparse_flash import block_sparse_attention, masks
from sparse_flash.call import AttentionCall
from sparse_flash.implementations import choose
from sparse_flash.implementations.sm90 import Sm90
from tests.kernels.helpers import H200, plan_on_cpu


class Call(NamedTuple):
    shape: torch.Size
    config: ForwardConfig | BackwardConfig
    transient: bool


@pytest.fixture
def calls(monkeypatch):
    """Launches, of dense attention; with "auto" every call comes by the Hopper implementation."""
    seen = []

    def check_are_plain(*tensors):
        """A launch takes addresses: no tensors of torch.func."""
        assert not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))

    def forward(q, k, v, plan, kv_lens, scale, *, transient=False):
        check_are_plain(q, k, v, *plan.lists, *plan.combine, plan.schedule.kv_lens)
        seen.append(Call(q.shape, plan.config, transient))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()
        logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
        return out, logits.logsumexp(-1)

    def backward(dout, dlse, q, k, v, out, lse, plans, kv_lens, scale, *, transient=False):
        seen.append(Call(q.shape, plans.dkdv.config, transient))
        assert (plans.dq is None) == plans.dkdv.config.dq
        check_are_plain(dout, q, k, v, out, lse, *plans.dkdv.lists, *plans.dkdv.combine)
        q_, k_, v_, dout_ = (x.float() for x in (q, k, v, dout))
        p = (torch.einsum("bqhd,bkhd->bhqk", q_, k_) * scale - lse[..., None]).exp()
        delta = (out.float() * dout_).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        ds = p * (torch.einsum("bqhd,bkhd->bhqk", dout_, v_) - delta[..., None]) * scale
        products = (("bhqk,bkhd->bqhd", ds, k_), ("bhqk,bqhd->bkhd", ds, q_))
        products = (*products, ("bhqk,bqhd->bkhd", p, dout_))
        return tuple(torch.einsum(*x).to(q.dtype) for x in products)

    monkeypatch.setattr(sm90, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(sm90, "forward", forward)
    monkeypatch.setattr(sm90, "backward", backward)
    plan_on_cpu(monkeypatch)
    return seen


def backward_config(dim, deterministic=False, dense=False):
    """What computes the gradients of these tests."""
    if dim > 128:
        wide = BackwardVariant.TILE96 if dense and dim <= 192 else BackwardVariant.WIDE
        variant = BackwardVariant.DKDV if deterministic else wide
    else:
        variant = BackwardVariant.DETERMINISTIC if deterministic else BackwardVariant.DQ
    return variant_config(variant, "bfloat16", dim)


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
    assert {call.shape for call in calls} == {q.shape}
    before = len(calls)
    result = compiled(q, k, v)
    assert len(calls) == before + 1  # the compiled graph launches it
    if grad:
        result.backward()
        assert calls[-1] == (q.shape, backward_config(32, deterministic), True)
    assert {call.transient for call in calls[before:]} == {True}


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
        assert calls[-2].shape == calls[-1].shape == shape


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
    assert calls[-1] == (q.shape, backward_config(dim, deterministic, dense=True), False)


def test_only_the_lse_is_used(calls):
    q, k, v = tensors(True)
    _, lse = block_sparse_attention(q, k, v, masks.full(), return_lse=True)
    lse.sum().backward()
    assert q.grad.any()
    assert not v.grad.any()


def test_plans_live_as_long_as_their_layouts(calls):
    import gc
    import weakref

    q, k, _ = tensors(False)
    layout = masks.causal().layout(200)
    plan = sm90.forward_plan(layout, q, k)
    assert sm90.forward_plan(layout, q, k) is plan
    assert sm90.forward_plan(layout, q[:1], k[:1]) is not plan
    assert len(layout.derived) == 2
    alive = weakref.ref(plan)
    del layout, plan
    gc.collect()
    assert alive() is None


def test_a_copy_of_a_layout_has_plans_of_its_own(calls):
    import copy
    import pickle

    q, k, _ = tensors(False)
    layout = masks.causal().layout(200)
    plan = sm90.forward_plan(layout, q, k)
    for twin in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert not twin.derived
        other = sm90.forward_plan(twin, q, k)
        assert other is not plan
        assert torch.equal(other.schedule.work, plan.schedule.work)
    assert len(layout.derived) == 1


@pytest.mark.parametrize("dim", [16, 64, 128, 136, 256])
def test_how_gradients_are_made(calls, dim):
    layout = masks.random_blocks(0.5, 128, 0).layout(1024)
    q = torch.zeros(1, 1024, 2, 1).bfloat16().expand(-1, -1, -1, dim)
    for deterministic in (False, True):
        plans = sm90.backward_plans(layout, q, q, deterministic)
        assert plans.dkdv.config == backward_config(dim, deterministic)
        assert plans.dkdv.config.fixed_point == (deterministic and dim <= 128)
        assert plans.dkdv.config.dq == (dim <= 128 or not deterministic)
        assert (plans.dq is None) == plans.dkdv.config.dq


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [136, 256])
def test_only_deterministic_gradients_above_128_take_two_kernels(calls, dim, deterministic):
    q = torch.zeros(1, 1024, 2, 1).bfloat16().expand(-1, -1, -1, dim)
    for mask in (masks.full(), masks.causal(), masks.per_head([masks.full(), masks.local(100)])):
        plans = sm90.backward_plans(mask.layout(1024), q, q, deterministic)
        assert plans.dkdv.config == backward_config(dim, deterministic, dense=True)
        assert (plans.dq is not None) == deterministic


@pytest.mark.parametrize(
    ("spec", "tile"), [("full()", 80), ("causal()", 80), ("random_blocks(0.5, 128, 0)", 64)]
)
def test_wide_tiles_where_they_cover_little_more(calls, spec, tile):
    layout = masks.parse(spec).layout(4096)
    of = {dim: torch.zeros(1, 4096, 2, 1).bfloat16().expand(-1, -1, -1, dim) for dim in (64, 128)}

    def tile_of(x, deterministic=False):
        plan = sm90.backward_plans(layout, x, x, deterministic).dkdv
        assert plan.schedule.tile == plan.config.tile
        return plan.config.tile

    assert tile_of(of[128]) == (128, tile)
    assert tile_of(of[128], deterministic=True) == (128, 64)
    assert tile_of(of[64]) == (128, 128)
    q = of[128][:, :400].clone().requires_grad_()
    block_sparse_attention(q, q, q, masks.full(), impl="auto").sum().backward()
    assert calls[-1].config == variant_config(BackwardVariant.TILE80, "bfloat16", 128)


def test_tiles_of_96_keys_where_they_cover_little_more(calls):
    x = torch.zeros(1, 4096, 2, 1).bfloat16().expand(-1, -1, -1, 192)
    for spec, tile_n in (("causal()", 96), ("local(500)", 96), ("random_blocks(0.1, 128, 0)", 64)):
        plan = sm90.backward_plans(masks.parse(spec).layout(4096), x, x).dkdv
        assert plan.config.tile == plan.schedule.tile == (tile_n, 64)


@pytest.mark.parametrize("dim", [128, 192])
def test_no_tile_reaches_into_keys_that_nothing_reads(calls, dim):
    """They may hold NaN. Tiles of 80, 96 or 112 keys or queries are not taken then."""
    x = torch.zeros(1, 8192, 2, 1).bfloat16().expand(-1, -1, -1, dim)
    for mask, unread in (
        (masks.full(), False),
        (~masks.sinks(128), True),  # no query reads the first keys
        (masks.per_head([masks.full(), ~masks.sinks(128)]), True),
    ):
        layout = mask.layout(8192)
        tiles = [sm90.forward_plan(layout, x, x).config.tile[1:]]
        tiles.append(sm90.backward_plans(layout, x, x).dkdv.config.tile)
        assert [any(128 % n for n in tile) for tile in tiles] == [not unread] * 2
    layout = masks.causal(-128).layout(8192)  # the first queries read no keys
    assert not any(128 % n for n in sm90.backward_plans(layout, x, x).dkdv.config.tile)


def test_plans_follow_an_updated_layout(calls):
    q, k, _ = tensors(False)
    layout = masks.full().layout(200, block=(64, 64))
    plans = [sm90.forward_plan(layout, q[:n], k[:n]) for n in (1, 2)]
    arrays = [plan.schedule.arrays() for plan in plans]
    new = masks.local(20).layout(200, block=(64, 64))
    layout.update_(new)
    assert layout.equal(new)
    for plan, before in zip(plans, arrays, strict=True):
        now = (*plan.lists, *plan.combine[:1], plan.schedule.kv_lens, plan.combine[1])
        assert all(a is b for a, b in zip(now, before, strict=True))
    expected = schedule(new, 2, 2, plans[1].config.tile, H200, FORWARD_COSTS)
    assert torch.equal(plans[1].schedule.tiles[: len(expected.tiles)], expected.tiles)
    assert plans[1].schedule.counts.tolist() == expected.counts.tolist()


@pytest.mark.parametrize("dim", [128, 192])
def test_an_update_takes_no_tile_that_reaches_into_keys_that_nothing_reads(calls, dim):
    """Plans of other tiles take its place; a CUDA graph cannot."""
    x = torch.zeros(1, 8192, 2, 1).bfloat16().expand(-1, -1, -1, dim)
    layout = masks.full().layout(8192)

    def plans():
        forward = sm90.forward_plan(layout, x, x)
        return forward, sm90.backward_plans(layout, x, x).dkdv

    before = plans()
    block_sparse_attention(*[torch.zeros(1, 8192, 1, dim).bfloat16()] * 3, layout)
    assert layout.calls
    unread = (~masks.sinks(128)).layout(8192)
    for plan in before:  # it has the space
        plan.schedule.check_capacity(plan.reschedule(unread))
    layout.update_(unread)
    assert not layout.calls
    forward, backward = plans()
    assert forward is not before[0]
    assert backward is not before[1]
    assert not any(128 % n for n in (*forward.config.tile[1:], *backward.config.tile))
    for plan in (forward, backward):
        assert torch.equal(plan.schedule.tiles, plan.reschedule(unread).tiles)
    layout = masks.full().layout(8192)
    (captured, _), columns = plans(), layout.col_indices
    captured.captured = True
    with pytest.raises(ValueError, match="reach into blocks that nothing reads"):
        layout.update_(unread)
    assert layout.col_indices is columns


def test_an_update_that_finds_no_room_changes_nothing(calls):
    q, k, _ = tensors(False)
    layout = masks.sinks(64).layout(200, block=(64, 64))
    plans = [sm90.forward_plan(layout, q[:n], k[:n]) for n in (1, 2)]
    plans[1].captured = True

    def arrays():
        return [x for plan in plans for x in plan.schedule.arrays()]

    before, kept = layout.col_indices, [x.clone() for x in arrays()]
    with pytest.raises(ValueError, match="no room"):
        layout.update_(masks.full().layout(200, block=(64, 64)))
    assert layout.col_indices is before
    assert all(torch.equal(a, b) for a, b in zip(arrays(), kept, strict=True))
    plans[1].captured = False  # then other plans take their place
    layout.update_(masks.full().layout(200, block=(64, 64)))
    assert sm90.forward_plan(layout, q, k) is not plans[1]
    assert all(torch.equal(a, b) for a, b in zip(arrays(), kept, strict=True))


def call_of(q):
    none = (None, None, None)
    return AttentionCall(q, q, q, *none, None, None, 1.0, deterministic=False, needs_grad=False)


def test_auto_says_why_it_is_slow_on_a_gpu(recwarn):
    float32 = SimpleNamespace(dtype=torch.float32, is_cuda=True, shape=(1, 8, 1, 16))
    with pytest.warns(UserWarning, match=r"'reference', which is slow: it computes bfloat16"):
        assert choose("auto", call_of(float32)).name == "reference"
    recwarn.clear()
    assert choose("auto", call_of(torch.randn(1, 8, 1, 16))).name == "reference"
    assert not recwarn


def test_asked_for_by_name_it_never_falls_back():
    q = torch.randn(1, 8, 1, 16)
    with pytest.raises(ValueError, match=r"impl='sm90' cannot run this: it computes bfloat16"):
        block_sparse_attention(q, q, q, masks.full(), impl="sm90")
    assert Sm90().unsupported_reason(call_of(q.bfloat16())).startswith("it needs a Hopper GPU")


def test_packed_documents_compile_once(calls):
    """A new layout at every step, by the kernels' host path."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(block_sparse_attention, fullgraph=True, backend=counter)
    for i in range(1, 12):
        layout = masks.documents((10 * i, 200 - 10 * i)).layout(200)
        attend(*tensors(False), layout)
        assert layout.derived  # the plan is found when the graph runs
    assert counter.frame_count == 1
    assert len(calls) == 11


def test_gradient_penalties_are_refused(calls):
    q, k, v = tensors(True)
    out = block_sparse_attention(q, k, v, masks.full())
    (dq,) = torch.autograd.grad(out.float().square().mean(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        (out.float().mean() + dq.float().square().sum()).backward()


def loss(q, k, v):
    return block_sparse_attention(q, k, v, masks.local(31)).float().sin().sum()


WAYS = ["grad", "vjp", "vmap of grad", "grad without grad mode", "vjp without grad mode"]


@pytest.mark.parametrize("way", WAYS)
def test_launches_see_no_tensors_of_transforms(calls, way):
    """Nor do plans, which outlive the transform that first asks for them."""
    import sparse_flash

    sparse_flash.clear_cache()
    q, k, v = tensors(grad=False)
    gradients = torch.func.grad(loss, argnums=(0, 1, 2))
    if way == "vmap of grad":
        got = torch.func.vmap(gradients)(*(x[:, None] for x in (q, k, v)))
        got = [x[:, 0] for x in got]
    with torch.set_grad_enabled("without" not in way):
        if way.startswith("grad"):
            got = gradients(q, k, v)
        elif way.startswith("vjp"):
            got = torch.func.vjp(loss, q, k, v)[1](torch.tensor(1.0))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, b)
