"""PyTorch's modes: inference, default devices and dtypes, fake tensors, operators being watched."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from sparse_flash import block_sparse_attention, masks
from sparse_flash.nn import SelfAttention


def make(b=2, s=50, h=4, d=8, kv_heads=2, grad=True, **options):
    torch.manual_seed(0)
    q = torch.randn(b, s, h, d, **options).requires_grad_(grad)
    k, v = (torch.randn(b, s, kv_heads, d, **options).requires_grad_(grad) for _ in "kv")
    return q, k, v


MASKS = {
    "local": lambda: masks.local(30),
    "documents": lambda: masks.documents((20, 30)),
    "image": lambda: masks.neighborhood(5, 10, 2).through(masks.morton(5, 10)),
    "heads": lambda: masks.per_head([masks.causal(), masks.local(3)] * 2),
    "table": lambda: masks.from_dense(torch.ones(50, 50).tril()),
    "custom": lambda: masks.custom(lambda q, kv: (q - kv) % 3 == 0),
}
BEFORE = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("mode", BEFORE)
def test_trains_after_it_was_looked_at_in_a_mode(mode, name):
    mask, fresh = MASKS[name](), MASKS[name]()
    with BEFORE[mode]():
        mask.layout(50, device="cpu")
        if mode in ("inference_mode", "no_grad"):
            block_sparse_attention(*make(), mask)
    q, k, v = make()
    out, ref = block_sparse_attention(q, k, v, mask), block_sparse_attention(q, k, v, fresh)
    torch.testing.assert_close(out, ref, rtol=0, atol=0)
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_a_layout_made_in_inference_mode_trains_and_is_updated():
    with torch.inference_mode():
        layout = masks.local(9).layout(50, block=(16, 16))
        block_sparse_attention(*make(grad=False), layout)
    q, k, v = make()
    block_sparse_attention(q, k, v, layout).sum().backward()
    layout.update_(masks.sinks(16).layout(50, block=(16, 16)))
    ref = block_sparse_attention(q, k, v, masks.sinks(16))
    torch.testing.assert_close(block_sparse_attention(q, k, v, layout), ref)


@pytest.mark.parametrize("name", MASKS)
def test_default_device_and_dtype(name):
    q, k, v = make()
    ref = block_sparse_attention(q, k, v, MASKS[name]())
    with torch.device("meta"):
        out = block_sparse_attention(
            q,
            k,
            v,
            MASKS["table" if name == "table" else name]()
            if name != "table"
            else masks.from_dense(torch.ones(50, 50, device="cpu").tril()),
        )
    torch.testing.assert_close(out, ref, rtol=0, atol=0)
    torch.set_default_dtype(torch.float64)
    try:
        out = block_sparse_attention(q, k, v, MASKS[name]())
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out, ref, rtol=0, atol=0)


@pytest.mark.parametrize("what", ["mask", "layout"])
@pytest.mark.parametrize("kind", ["meta", "fake", "fake outside its mode"])
def test_tensors_without_numbers(kind, what):
    """Shapes, dtypes and a derivative, as for building models that do not fit into memory."""
    mask = masks.local(9) if what == "mask" else masks.local(9).layout(50)
    mode = FakeTensorMode() if kind.startswith("fake") else torch.device("meta")
    with mode:
        q, k, v = (x.bfloat16().detach().requires_grad_() for x in make())
        if kind != "fake outside its mode":
            out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    if kind == "fake outside its mode":
        out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert (lse.shape, lse.dtype) == ((2, 4, 50), torch.float32)
    out.sum().backward()
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)
    block_sparse_attention(*make(), masks.local(9)).sum().backward()  # a real call afterwards


def test_a_module_on_meta():
    layer = SelfAttention(16, 2, masks.local(9).layout(50)).to("meta")
    assert layer(torch.empty(3, 50, 16, device="meta")).shape == (3, 50, 16)
    layer = layer.to_empty(device="cpu")
    assert layer(torch.randn(3, 50, 16)).shape == (3, 50, 16)


@pytest.mark.parametrize("assign", [False, True])
def test_slopes_of_a_module_that_leaves_meta(assign):
    """They are in no checkpoint."""
    ours = SelfAttention(32, 4, masks.causal(), score_bias="alibi")
    with torch.device("meta"):
        other = SelfAttention(32, 4, masks.causal(), score_bias="alibi")
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(ours.state_dict(), assign=assign)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(other(x), ours(x))


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_dispatch_modes_see_an_operator(kind):
    mask, tensors = masks.local(9), make()
    if kind is torch.nn.Parameter:
        tensors = [torch.nn.Parameter(x.detach()) for x in tensors]
    ref = torch.autograd.grad(block_sparse_attention(*tensors, mask).sum(), tensors)
    with Watch() as watch:
        out = block_sparse_attention(*tensors, mask)
        grads = torch.autograd.grad(out.sum(), tensors)
    ours = [name for name in watch.seen if "sparse_flash" in name]
    assert ours == ["sparse_flash.attention.default", "sparse_flash.attention_backward.default"]
    torch.testing.assert_close(grads, ref, rtol=0, atol=0)


def test_flops_are_counted():
    """Of stored elements; of all of them, as PyTorch counts its own attention."""

    def flops(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()

    q, k, v = make(kv_heads=4)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def theirs():
        scaled_dot_product_attention(*heads_first).sum().backward()

    def ours(mask):
        block_sparse_attention(q, k, v, mask).sum().backward()

    forward = flops(lambda: block_sparse_attention(q.detach(), k, v, masks.full()))
    assert forward == 4 * 2 * 4 * 50 * 50 * 8
    # PyTorch counts nothing inside its composed CPU attention: 2 + 5 products by its formula.
    assert flops(lambda: ours(masks.full())) == forward * 7 // 2
    layout = masks.local(9).layout(50)
    kept = int(layout.to_dense().sum())
    for mask in (masks.local(9), layout):
        assert (
            flops(lambda mask=mask: block_sparse_attention(q, k, v, mask)) == 4 * 2 * 4 * kept * 8
        )
    wide = torch.cat([v, v, v], -1)  # products of 8 columns, and of 24
    found = flops(lambda: block_sparse_attention(q.detach(), k.detach(), wide.detach(), layout))
    assert found == 2 * 2 * 4 * kept * (8 + 24)


def test_selective_checkpointing_is_asked():
    asked = []

    def policy(ctx, op, *args, **kwargs):
        asked.append(str(op))
        ours = "sparse_flash" in str(op)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    layer, x = SelfAttention(16, 4, masks.local(5)), torch.randn(2, 40, 16, requires_grad=True)
    (ref,) = torch.autograd.grad(layer(x).square().sum(), x)
    out = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(grad, ref)
    assert any("sparse_flash.attention" in name for name in asked)


@pytest.mark.parametrize("what", ["mask", "layout"])
def test_empty_batches(what):
    mask = masks.local(9) if what == "mask" else masks.local(9).layout(50)
    tensors = make(b=0)
    out, lse = block_sparse_attention(*tensors, mask, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 50, 4, 8), (0, 4, 50))
    grads = torch.autograd.grad(out.sum() + lse.sum(), tensors)
    assert [g.shape for g in grads] == [x.shape for x in tensors]
    with pytest.raises(ValueError, match="unknown impl='sm70'"):
        block_sparse_attention(*tensors, mask, impl="sm70")
