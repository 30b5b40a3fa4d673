"""The kernels as citizens of PyTorch: compilation, modes, default devices, dispatch modes."""

from __future__ import annotations

import functools

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from sparse_flash import block_sparse_attention, masks
from sparse_flash.nn import SelfAttention
from tests.oracle import dense_attention

pytestmark = pytest.mark.gpu
IMPL = "sm90"
BOTH = pytest.mark.parametrize("impl", ["sm90", "sm80"], indirect=True)


@pytest.fixture(autouse=True)
def impl(request, monkeypatch):
    """The implementation under test; those marked BOTH run for two."""
    monkeypatch.setitem(globals(), "IMPL", getattr(request, "param", "sm90"))


def make(b=2, s=300, h=4, d=64, kv_heads=None, grad=True):
    torch.manual_seed(0)
    return [
        torch.randn(b, s, n, d, device="cuda").bfloat16().requires_grad_(grad)
        for n in (h, kv_heads or h, kv_heads or h)
    ]


def near(got, want, most=0.01):
    got, want = got.double(), want.double()
    assert got.isfinite().all()
    assert ((got - want).norm() / want.norm().clamp(min=1e-30)).item() < most


def reference(q, k, v, mask):
    layout = mask.layout(q.shape[1], k.shape[1]) if isinstance(mask, masks.Mask) else mask
    allowed = layout.to_dense().to(q.device).expand(q.shape[0], q.shape[2], -1, -1)
    return dense_attention(q, k, v, allowed)[0]


def check(attend, mask, grad=True, **options):
    q, k, v = make(grad=grad, **options)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, ref = attend(q, k, v), reference(*exact, mask)
    near(out, ref)
    if grad:
        dout = torch.randn_like(ref)
        got = torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))
        for a, b in zip(got, torch.autograd.grad(ref, exact, dout), strict=True):
            near(a, b, 0.02)


@BOTH
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("what", ["mask", "layout"])
def test_packed_documents_compile_once(what, dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    attend = torch.compile(
        functools.partial(block_sparse_attention, impl=IMPL),
        fullgraph=True,
        dynamic=dynamic,
        backend=counter,
    )
    compilations = 0
    for i in range(12):
        mask = masks.documents((50 + 10 * i, 250 - 10 * i))
        given = mask if what == "mask" else mask.layout(300, device="cuda")
        check(lambda q, k, v, given=given: attend(q, k, v, given), mask)
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


@pytest.mark.parametrize("what", ["mask", "layout"])
def test_layers_compiled_one_by_one(what):
    torch._dynamo.reset()
    some = [masks.local(10 + i) for i in range(12)]
    layers = [
        SelfAttention(256, 4, m if what == "mask" else m.layout(300)).cuda().bfloat16()
        for m in some
    ]
    x = torch.randn(2, 300, 256, device="cuda").bfloat16()
    eager = functools.reduce(lambda y, layer: layer(y), layers, x)
    for layer in layers:
        layer.compile(fullgraph=True)
    near(functools.reduce(lambda y, layer: layer(y), layers, x), eager)


@BOTH
@pytest.mark.parametrize("what", ["mask", "layout"])
def test_reduce_overhead_trains(what):
    """CUDA graph trees, and another mask in the same compiled function."""
    torch._dynamo.reset()

    def step(q, k, v, mask):
        return block_sparse_attention(q * 1, k * 1, v * 1, mask, impl=IMPL)

    attend = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for mask in [masks.local(40)] * 4 + [masks.causal()] * 2:
        given = mask if what == "mask" else mask.layout(300, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        check(lambda q, k, v, given=given: attend(q, k, v, given), mask)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    layer = SelfAttention(256, 4, masks.local(9)).cuda().bfloat16()
    x = torch.randn(2, 300, 256, device="cuda").bfloat16()
    near(torch.export.export(layer, (x,), strict=strict).module()(x), layer(x))


@BOTH
def test_inference_first_then_training():
    mask = masks.local(33) | masks.sinks(3)
    with torch.inference_mode():
        block_sparse_attention(*make(grad=False), mask, impl=IMPL)
    check(lambda q, k, v: block_sparse_attention(q, k, v, mask, impl=IMPL), mask)


MASKS = {
    "local": masks.local(30),
    "full": masks.full(),
    "documents": masks.documents((100, 200)),
    "per_head": masks.per_head([masks.causal(), masks.local(3), masks.full(), masks.sinks(4)]),
    "random": masks.random_blocks(0.5, 32),
    "custom": masks.custom(lambda q, kv: (q - kv) % 3 == 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_default_device(name):
    torch.set_default_device("cuda")
    try:
        assert masks.local(7).layout(300).device.type == "cpu"
        check(lambda q, k, v: block_sparse_attention(q, k, v, MASKS[name]), MASKS[name])
    finally:
        torch.set_default_device(None)


@BOTH
def test_fake_tensors_launch_nothing():
    mask = masks.local(9)
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in "qkv"
        )
        out = block_sparse_attention(q, k, v, mask, impl=IMPL)
        out.sum().backward()
    assert out.shape == q.grad.shape == (2, 300, 4, 64)
    check(lambda q, k, v: block_sparse_attention(q, k, v, mask, impl=IMPL), mask)


@BOTH
def test_flops_equal_those_of_sdpa():
    def flops(attend, *tensors):
        with FlopCounterMode(display=False) as counter:
            attend(*tensors).sum().backward()
        return counter.get_total_flops()

    tensors = make()
    heads_first = [x.transpose(1, 2) for x in tensors]
    ours = flops(lambda *x: block_sparse_attention(*x, masks.full(), impl=IMPL), *tensors)
    assert ours == flops(torch.nn.functional.scaled_dot_product_attention, *heads_first)


def test_selective_checkpointing():
    asked = []

    def policy(ctx, op, *args, **kwargs):
        if "sparse_flash" in str(op):
            asked.append(op)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    layer = SelfAttention(256, 4, masks.local(5)).cuda().bfloat16()
    x = torch.randn(2, 300, 256, device="cuda").bfloat16().requires_grad_()
    (want,) = torch.autograd.grad(layer(x).float().square().sum(), x)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    near(torch.autograd.grad(out.float().square().sum(), x)[0], want)
    assert asked


@BOTH
def test_second_derivatives_and_tangents_are_refused():
    q, k, v = make()
    out = block_sparse_attention(q, k, v, masks.full(), impl=IMPL)
    (dq,) = torch.autograd.grad(out.float().sin().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dq.float().square().sum().backward()
    q, k, v = make(grad=False)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(
            lambda q: block_sparse_attention(q, k, v, masks.full(), impl=IMPL), (q,), (q,)
        )


@BOTH
def test_functional_gradients():
    mask = masks.local(40)
    q, k, v = make(grad=False)

    def loss(q, k, v):
        return block_sparse_attention(q, k, v, mask, impl=IMPL).float().sin().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for a, b in zip(got, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        near(a, b)


@BOTH
def test_a_captured_graph_keeps_its_layout():
    """Though the mask is gone and the cache emptied."""
    import gc

    import sparse_flash

    q, k, v = make(grad=False)
    block_sparse_attention(q, k, v, masks.local(17), impl=IMPL)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(q, k, v, masks.local(17), impl=IMPL)
    sparse_flash.clear_cache()
    gc.collect()
    filler = [torch.full((1 << 20,), 7, device="cuda") for _ in range(50)]
    for x in (q, k, v):
        x.mul_(-1)
    graph.replay()
    near(out, reference(*(x.double() for x in (q, k, v)), masks.local(17)))
    del filler


@BOTH
def test_more_sequences_than_a_grid_has():
    """Over 65,535 batch entries, forward and backward."""
    q, k, v = make(b=66_000, s=16, h=1, d=32)
    out = block_sparse_attention(q, k, v, masks.causal(), impl=IMPL)
    grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    exact = [x.detach()[-300:].double().requires_grad_() for x in (q, k, v)]
    ref = reference(*exact, masks.causal())
    near(out[-300:], ref)
    for a, b in zip(grads, torch.autograd.grad(ref, exact, torch.ones_like(ref)), strict=True):
        near(a[-300:], b, 0.02)
