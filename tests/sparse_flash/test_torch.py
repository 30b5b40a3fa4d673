"""The op as a citizen of PyTorch: opcheck, compile, autocast, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
from sparse_flash.masks.traceable import to_operator

from sparse_flash import block_sparse_attention, masks, operators
from sparse_flash.implementations.reference import Reference
from sparse_flash.nn import SelfAttention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MASK = masks.local(20) | masks.global_tokens(3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lens", [True, False])
@pytest.mark.parametrize("what", ["mask", "layout"])
def test_opcheck(device, lens, what):
    torch.manual_seed(0)
    q = torch.randn(2, 50, 4, 8, device=device, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn_like(q[:, :, :2], requires_grad=True) for _ in "kv")
    mask = MASK if what == "mask" else MASK.layout(50, block=(16, 16), device=device)
    lens = torch.tensor([50, 17], device=device) if lens else None
    options = (lens, None, None, to_operator(mask, q), 0.3, True, "auto")
    torch.library.opcheck(operators.attention, (q, k, v, *options))
    out, lse = (x.detach() for x in operators.attention(q, k, v, *options))
    tensors = [x.detach() for x in (q, k, v)]
    for dlse in (torch.randn_like(lse), None):
        torch.library.opcheck(
            operators.attention_backward,
            (out, lse, torch.randn_like(out), dlse, *tensors, *options),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["mask", "layout"])
def test_compile_fullgraph(device, kind):
    torch.manual_seed(0)
    tensors = [torch.randn(2, 50, h, 8, device=device, requires_grad=True) for h in (4, 2, 2)]
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
        if device == "cpu":  # float64 stays as it is, as in PyTorch's autocast
            out = block_sparse_attention(q.double(), k.double(), v.double(), MASK)
            assert out.dtype == torch.float64


def test_activation_checkpointing():
    layer = SelfAttention(16, 4, mask=MASK)
    x = torch.randn(2, 40, 16, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], plain)


def test_deterministic_algorithms_are_honoured(monkeypatch):
    seen = []
    attend = Reference.attend
    monkeypatch.setattr(
        Reference,
        "attend",
        lambda self, call: seen.append(call.deterministic) or attend(self, call),
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


class Adapter(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


def quantized(layer):
    return torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}).to("cpu")


def adapted(layer):
    for name in ("to_q", "to_k", "to_v", "to_out"):
        setattr(layer, name, Adapter(getattr(layer, name)))
    return layer.to("cpu")


@pytest.mark.parametrize("change", [adapted, quantized])
@pytest.mark.filterwarnings("ignore")
def test_projections_may_be_replaced(change):
    layer, x = SelfAttention(32, 4, MASK.layout(50)), torch.randn(2, 50, 32)
    out = layer(x)
    torch.testing.assert_close(change(layer)(x), out, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tensor_parallel(kv_heads):
    """Two ranks, each with the rows of half the heads (to_out: columns), add up to the whole."""
    layer, x = SelfAttention(32, 4, MASK, kv_heads=kv_heads), torch.randn(2, 50, 32)
    total = layer.to_out.bias.expand(2, 50, 32)
    for rank in range(2):
        part = copy.deepcopy(layer)
        for name in ("to_q", "to_k", "to_v"):
            old = getattr(layer, name)
            rows = old.weight.chunk(2)[rank]
            new = torch.nn.Linear(32, len(rows))
            new.weight.data, new.bias.data = rows, old.bias.chunk(2)[rank]
            setattr(part, name, new)
        part.to_out = torch.nn.Linear(16, 32, bias=False)
        part.to_out.weight.data = layer.to_out.weight.chunk(2, dim=1)[rank]
        total = total + part(x)
    torch.testing.assert_close(total, layer(x), rtol=1e-4, atol=1e-5)


def test_weights_of_the_first_version_load():
    """Keys and values came from one projection then."""
    layer = SelfAttention(16, 4, MASK, kv_heads=2)
    state = layer.state_dict()
    for name in ("weight", "bias"):
        parts = (state.pop(f"to_{x}.{name}") for x in "kv")
        state[f"to_kv.{name}"] = torch.cat(list(parts))
    other = torch.nn.Sequential(SelfAttention(16, 4, MASK, kv_heads=2))
    other.load_state_dict({f"0.{name}": value for name, value in state.items()})
    x = torch.randn(2, 40, 16)
    torch.testing.assert_close(other(x), layer(x))


def test_self_attention_refuses():
    with pytest.raises(ValueError, match="multiple of heads=3"):
        SelfAttention(16, 3, mask=MASK)
    with pytest.raises(ValueError, match="kv_heads=3"):
        SelfAttention(16, 4, mask=MASK, kv_heads=3)
    with pytest.raises(TypeError, match="Mask or a BlockLayout"):
        SelfAttention(16, 4, mask="causal")


@pytest.mark.slow
def test_faster_and_smaller_than_dense(one_thread):
    """s = 8192, 4 heads, d 64, density 5 %: at least 4 times faster than SDPA, in less memory.

    CPU time of one thread: other work on the machine has little influence on the ratio.
    """
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
        start = time.process_time()
        f()
        return time.process_time() - start

    sparse(), dense()
    # Interleaved, and the best of each, so that other work on the machine does not decide; rounds
    # go on for a while where it might have.
    ours = theirs = float("inf")
    for rounds in range(20):
        ours, theirs = min(ours, seconds(sparse)), min(theirs, seconds(dense))
        if rounds >= 3 and theirs >= 4 * ours:
            break
    torch.set_num_threads(2)  # as on the machine of the recorded figures: SDPA has buffers of each
    peaks = tensor_peak(sparse), tensor_peak(dense)
    print(f"sparse {ours:.3f} s, dense {theirs:.3f} s; MiB {peaks[0]:.1f}, {peaks[1]:.1f}")
    assert theirs >= 4 * ours
    assert peaks[0] < peaks[1]
