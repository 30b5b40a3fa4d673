"""The op as a citizen of PyTorch: opcheck, compile, autocast, checkpointing."""

from __future__ import annotations

import pytest
import torch

from sparse_flash import block_sparse_attention, masks
from sparse_flash.nn import SelfAttention
from sparse_flash.reference import reference_backward, reference_forward

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MASK = masks.local(20) | masks.global_tokens(3)


def arguments(device, s=50, dtype=torch.float32, lens=True):
    torch.manual_seed(0)
    q = torch.randn(2, s, 4, 8, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, s, 2, 8, device=device, dtype=dtype, requires_grad=True) for _ in "kv")
    layout = MASK.layout(s, block=(16, 16), device=device)
    lens = torch.tensor([s, 17], device=device) if lens else None
    options = (*layout.arrays().values(), list(layout.block), lens, 0.3, True)
    return (q, k, v), options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", [True, False])
@pytest.mark.parametrize("s", [50, 64])
def test_opcheck(device, lens, s):
    tensors, options = arguments(device, s, torch.float64, lens)
    torch.library.opcheck(reference_forward, (*tensors, *options))
    out, lse = (x.detach() for x in reference_forward(*tensors, *options))
    tensors = [x.detach() for x in tensors]
    for dlse in (torch.randn_like(lse), None):
        torch.library.opcheck(
            reference_backward, (torch.randn_like(out), dlse, *tensors, out, lse, *options)
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["mask", "layout"])
def test_compile_fullgraph(device, kind):
    tensors, _ = arguments(device)
    mask = MASK if kind == "mask" else MASK.layout(50, device=device)
    lens = torch.tensor([50, 20], device=device)

    def step(q, k, v, lens):
        out, lse = block_sparse_attention(q * 2, k, v, mask, kv_lens=lens, return_lse=True)
        return out.sin().sum() + lse.sum()

    eager = step(*tensors, lens)
    eager_grads = torch.autograd.grad(eager, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)(*tensors, lens)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, tensors), eager_grads)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_module_learns(device):
    torch.manual_seed(0)
    layer = SelfAttention(16, 4, mask=MASK, kv_heads=2).to(device)
    x = torch.randn(2, 40, 16, device=device)
    eager = layer(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-5)
    compiled(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device):
    layer = SelfAttention(16, 4, mask=MASK).to(device)
    x = torch.randn(2, 40, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        q, k, v = (torch.randn(1, 9, 2, 8, device=device) for _ in range(3))
        assert block_sparse_attention(q, k.bfloat16(), v, MASK).dtype == torch.bfloat16


def test_activation_checkpointing():
    layer = SelfAttention(16, 4, mask=MASK)
    x = torch.randn(2, 40, 16, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], plain)


def test_deterministic_algorithms_are_honoured(monkeypatch):
    from sparse_flash import dispatch, reference

    seen = []

    def spy(*args):
        seen.append(args[-1])
        return reference.attend(*args)

    monkeypatch.setattr(
        dispatch, "IMPLEMENTATIONS", (dispatch.Implementation("reference", spy, reference.why_not),)
    )
    q, k, v = (torch.randn(1, 9, 2, 8) for _ in range(3))
    block_sparse_attention(q, k, v, MASK)
    torch.use_deterministic_algorithms(True)
    try:
        block_sparse_attention(q, k, v, MASK)
    finally:
        torch.use_deterministic_algorithms(False)
    block_sparse_attention(q, k, v, MASK, deterministic=True)
    assert seen == [False, True, True]


def test_self_attention_refuses():
    with pytest.raises(ValueError, match="multiple of heads=3"):
        SelfAttention(16, 3, mask=MASK)
    with pytest.raises(ValueError, match="kv_heads=3"):
        SelfAttention(16, 4, mask=MASK, kv_heads=3)
    with pytest.raises(TypeError, match="Mask or a BlockLayout"):
        SelfAttention(16, 4, mask="causal")


@pytest.mark.slow
def test_faster_and_smaller_than_dense(two_threads):
    """s = 8192, 4 heads, d 64, density 5 %: at least 4 times faster than SDPA, in less memory."""
    import time

    from sparse_flash.experiments.machine import tensor_peak

    s = 8192
    q, k, v = (torch.randn(1, s, 4, 64, requires_grad=True) for _ in range(3))
    grad = torch.randn(1, s, 4, 64)
    layout = masks.random_blocks(0.05).layout(s)
    assert 0.045 < layout.density < 0.055

    def sparse():
        return torch.autograd.grad(block_sparse_attention(q, k, v, layout), (q, k, v), grad)

    def dense():
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
        return torch.autograd.grad(out.transpose(1, 2), (q, k, v), grad)

    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    sparse(), dense()
    # Interleaved, and the best of each, so that other work on the machine does not decide; rounds
    # go on for a while where it might have.
    ours = theirs = float("inf")
    for rounds in range(20):
        ours, theirs = min(ours, seconds(sparse)), min(theirs, seconds(dense))
        if rounds >= 3 and theirs >= 4 * ours:
            break
    peaks = tensor_peak(sparse), tensor_peak(dense)
    print(f"sparse {ours:.3f} s, dense {theirs:.3f} s; MiB {peaks[0]:.1f}, {peaks[1]:.1f}")
    assert theirs >= 4 * ours
    assert peaks[0] < peaks[1]
