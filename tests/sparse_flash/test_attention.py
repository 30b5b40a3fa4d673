"""block_sparse_attention against dense attention in float64: values, gradients, edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from sparse_flash import block_sparse_attention, masks
from sparse_flash.call import AttentionCall
from sparse_flash.implementations.reference import Reference
from tests.oracle import dense_attention
from tests.strategies import problems

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(problem, dtype, device, **options):
    """(out, lse) and gradients of ours and of the oracle, on the same numbers."""
    (q, k, v), dout, dlse = problem.tensors(dtype, device)
    s = problem.setting
    layout = s.mask.layout(s.q_len, s.kv_len, s.block, device=device)
    lens = problem.kv_lens(device)
    out, lse = block_sparse_attention(q, k, v, layout, kv_lens=lens, return_lse=True, **options)
    dlse = dlse.masked_fill(lse == -torch.inf, 0)  # of rows whose lse is no number
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse.to(lse.dtype)))

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ref_out, ref_lse = dense_attention(*exact, problem.allowed(device))
    finite = torch.where(ref_lse == -torch.inf, 0, ref_lse)
    ref_grads = torch.autograd.grad((ref_out, finite), exact, (dout.double(), dlse.double()))
    return (out, lse, *grads), (ref_out, ref_lse, *ref_grads)


def check(problem, dtype, device, tolerance, **options):
    for name, a, b in zip(
        ("out", "lse", "dq", "dk", "dv"), *run(problem, dtype, device, **options), strict=True
    ):
        assert a.dtype == (dtype if name != "lse" else torch.promote_types(dtype, torch.float32))
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("device", DEVICES)
@given(problem=problems())
def test_float64_equals_dense(problem, device):
    check(problem, torch.float64, device, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 4e-2), (torch.float16, 6e-3)]
)
@given(problem=problems(max_length=80, dims=(8, 16)))
def test_other_dtypes(problem, dtype, tolerance, device):
    check(problem, dtype, device, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@given(problem=problems(max_length=60, dims=(4,)))
def test_deterministic_mode_is_exact_too(problem, device):
    check(problem, torch.float64, device, 1e-10, deterministic=True)


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_gradients_are_bitwise_repeatable(device):
    """All rows add to the keys of the first block: where atomic adds would come in any order."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2000, 2, 16, device=device, requires_grad=True) for _ in range(3))
    grad = torch.randn_like(q)
    layout = (masks.global_tokens(16) | masks.local(40)).layout(2000, block=(16, 16), device=device)

    def gradients():
        out = block_sparse_attention(q, k, v, layout, deterministic=True)
        return torch.autograd.grad(out, (q, k, v), grad)

    first = gradients()
    for _ in range(100 if device == "cuda" else 5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_long_rows_are_walked_in_slices():
    """More tiles in a row than one chunk holds: the online softmax joins the slices."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, s, 1, 4, dtype=torch.float64, requires_grad=True) for s in (130, 9000, 9000)
    )
    mask = masks.sinks(8500) | masks.local(3)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    ref = dense_attention(q, k, v, mask(torch.arange(130)[:, None], torch.arange(9000))[None, None])
    torch.testing.assert_close((out, lse), ref, rtol=1e-10, atol=1e-10)
    grads, ref_grads = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, ref[0]))
    torch.testing.assert_close(grads, ref_grads, rtol=1e-9, atol=1e-10)


def make(b=1, s=40, h=2, d=4, kv_len=None, kv_heads=None, **options):
    options = {"dtype": torch.float64, **options}
    q = torch.randn(b, s, h, d, requires_grad=True, **options)
    return q, *(
        torch.randn(b, kv_len or s, kv_heads or h, d, requires_grad=True, **options) for _ in "kv"
    )


def test_all_true_equals_sdpa():
    q, k, v = make(2, 70, 3, 8)
    ours = block_sparse_attention(q, k, v, masks.full())
    sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(ours, sdpa.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_gradcheck():
    torch.manual_seed(1)
    q, k, v = make(2, 9, 2, 3, kv_len=11, kv_heads=1)
    layout = (masks.local(3) | masks.sinks(2)).layout(9, 11, (4, 4))
    lens = torch.tensor([11, 6])

    def attend(q, k, v):
        return block_sparse_attention(
            q, k, v, layout, kv_lens=lens, return_lse=True, softmax_scale=0.7
        )

    assert torch.autograd.gradcheck(attend, (q, k, v), fast_mode=False)


def test_empty_rows_give_zeros():
    q, k, v = make(s=64)
    out, lse = block_sparse_attention(q, k, v, ~masks.full(), return_lse=True)
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    (out.sum() + lse.exp().sum()).backward()
    assert not any(x.grad.any() for x in (q, k, v))
    # some rows empty, inside stored tiles
    out, lse = block_sparse_attention(q, k, v, masks.causal(-3), return_lse=True)
    assert bool((lse[:, :, :3] == -torch.inf).all())
    assert not out[:, :3].any()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 3:].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)


def test_poison_outside_the_layout_is_never_seen():
    """NaN in keys that no tile covers, and beyond kv_lens, leaves everything finite."""
    q, k, v = make(2, 64)
    layout = masks.block_diagonal(16).layout(64, block=(16, 16))
    lens = torch.tensor([64, 50])
    with torch.no_grad():
        for x in (k, v):
            x[1, 50:] = torch.nan
    out = block_sparse_attention(q, k, v, layout, kv_lens=lens)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    with torch.no_grad():
        k[:, 16:32] = v[:, 16:32] = torch.nan
    out = block_sparse_attention(q, k, v, layout, kv_lens=lens)
    assert out[:, :16].isfinite().all()
    assert out[:, 32:].isfinite().all()
    assert out[:, 16:32].isnan().all()


def test_strided_inputs_and_gradients():
    base = torch.randn(2, 3, 50, 2, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = (base[:, i] for i in range(3))
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for x in (q, k, v), heads_first:
        out = block_sparse_attention(*x, masks.local(9))
        (grad,) = torch.autograd.grad(out, base, torch.ones(()).double().expand(out.shape))
        torch.testing.assert_close(
            out, block_sparse_attention(*(y.contiguous() for y in x), masks.local(9))
        )
        assert grad.isfinite().all()


def test_used_twice_and_partly():
    q, k, v = make(s=33)
    mask = masks.causal()
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    only_lse = torch.autograd.grad(lse.sum(), (q, k), retain_graph=True)
    assert all(g.isfinite().all() for g in only_lse)
    twice = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    again = torch.autograd.grad(out.sum(), (q, k, v))
    torch.testing.assert_close(twice, again, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(block_sparse_attention(q, k, v, mask), out, rtol=0, atol=0)
    frozen = block_sparse_attention(q.detach(), k, v.detach(), mask)
    assert torch.autograd.grad(frozen.sum(), k)[0].shape == k.shape


def test_kv_lens_beyond_the_keys_are_clamped_where_they_are_not_checked():
    q, k, v = (x.detach() for x in make(2, 40))
    layout = masks.causal().layout(40, block=(16, 16))
    wrong, right = (
        Reference().attend(
            AttentionCall(
                q, k, v, torch.tensor(lens), None, None, layout, None, 0.5, False, needs_grad=False
            )
        )[0]
        for lens in ([99, -3], [40, 0])
    )
    assert torch.equal(wrong, right)


def bad(**changes):
    q, k, v = make(2, 32, 4, 8, dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "mask": masks.causal(), **changes}
    return block_sparse_attention(**arguments)


X = torch.randn(2, 32, 4, 8)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"q": X.tolist()}, TypeError, "q must be a torch.Tensor"),
        ({"k": X[0]}, ValueError, r"k must be \(batch, sequence, heads, head_dim\)"),
        ({"q": X[:, :0]}, ValueError, "all but the batch at least 1"),
        *(
            ({name: X[0, :, 0, 0]}, ValueError, rf"{name} must be \(batch, sequence")
            for name in "qkv"
        ),
        *(({name: X.sum()}, ValueError, rf"{name} must be \(batch, sequence") for name in "qkv"),
        ({"v": X.int()}, TypeError, "v has dtype torch.int32; allowed are float64, float32"),
        ({"k": X.half()}, TypeError, "k has dtype torch.float16, but q has torch.float32"),
        ({"v": X[:, :9]}, ValueError, "must have one batch, sequence and heads"),
        ({"k": X[..., :4], "v": X[..., :4]}, ValueError, "agree in batch .* and head_dim"),
        ({"k": X[:1], "v": X[:1]}, ValueError, "agree in batch"),
        (
            {"k": X[:, :, :3], "v": X[:, :, :3]},
            ValueError,
            "4 query heads must be a multiple of the 3",
        ),
        ({"q": X.to("meta")}, ValueError, "k is on cpu, but q is on meta"),
        ({"q": X[..., :0], "k": X[..., :0], "v": X[..., :0]}, ValueError, "at least 1, got"),
        ({"k": X.to_sparse()}, TypeError, r"k must be an ordinary .*got torch.sparse_coo: use"),
        ({"v": X.to_mkldnn()}, TypeError, r"v must be an ordinary .*got torch._mkldnn"),
        *(
            ({name: torch.nested.nested_tensor([X[0], X[1, :9]], layout=layout)}, TypeError, words)
            for name in "qkv"
            for layout, words in (
                (torch.strided, rf"{name} must be .*a nested tensor.*masks.documents"),
                (torch.jagged, rf"{name} must be .*a nested tensor.*pass kv_lens"),
            )
        ),
        ({"mask": "causal"}, TypeError, "masks.parse makes one from text"),
        ({"mask": masks.causal}, TypeError, r"masks.causal itself: call it, as in masks.causal\("),
        ({"mask": masks.local}, TypeError, r"masks.local itself: call it"),
        ({"mask": print}, TypeError, "masks.custom from a function"),
        *(
            ({name: torch.tensor([3, 4], device="meta")}, ValueError, f"{name} is on meta and has")
            for name in ("kv_lens", "q_offset", "kv_starts")
        ),
        ({"mask": masks.causal().layout(32, 31)}, ValueError, "32 queries and 31 keys"),
        ({"mask": masks.documents((9, 9))}, ValueError, "made for q_len=18"),
        ({"mask": masks.per_head([masks.causal()] * 3)}, ValueError, "patterns for 3 heads"),
        ({"mask": masks.per_batch([masks.causal()] * 3)}, ValueError, "patterns for 3 batch"),
        ({"kv_lens": [3, 4]}, TypeError, "kv_lens must be an int tensor"),
        ({"kv_lens": torch.ones(2)}, TypeError, "float32"),
        ({"kv_lens": torch.tensor([3])}, ValueError, r"shape \(2,\)"),
        ({"kv_lens": torch.tensor([3, 33])}, ValueError, r"in 0..32 .*got 3..33"),
        ({"kv_lens": torch.tensor([-1, 3])}, ValueError, "got -1..3"),
        ({"dropout_p": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0"),
        ({"softmax_scale": float("nan")}, ValueError, "finite"),
        ({"softmax_scale": "0.1"}, TypeError, "must be a number, got '0.1'"),
        ({"softmax_scale": torch.tensor(0.1)}, TypeError, "Multiply q by a learned scale"),
        (
            {"mask": masks.causal().layout(4), **dict.fromkeys("qkv", X)},
            ValueError,
            r"seem to be \(batch, heads, sequence, head_dim\): use x.transpose",
        ),
        (
            {"impl": "sm70"},
            ValueError,
            "unknown impl='sm70'; there are 'auto', 'sm90', 'sm80', 'reference'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_bad_input(changes, error, words):
    with pytest.raises(error, match=words):
        bad(**changes)


@pytest.mark.gpu
def test_layout_on_another_device():
    q, k, v = make(device="cuda")
    with pytest.raises(ValueError, match=r"on cpu, but q is on cuda:0: use layout\.to"):
        block_sparse_attention(q, k, v, masks.causal().layout(40))


def test_layout_on_another_device_without_a_gpu(monkeypatch):
    q, k, v = make(s=32)
    layout = masks.causal().layout(32)
    monkeypatch.setattr(masks.BlockLayout, "device", torch.device("cuda:1"))
    with pytest.raises(ValueError, match=r"on cuda:1, but q is on cpu: use layout\.to"):
        block_sparse_attention(q, k, v, layout)


def test_heads_first_tensors_are_noticed():
    """(b, h, s, d): by a layout's lengths, or by more heads than a model has."""
    q = torch.randn(1, 4, 300, 8)
    with pytest.warns(UserWarning, match=r"4 tokens and 300 heads.*transpose\(1, 2\)") as caught:
        block_sparse_attention(q, q, q, masks.local(3))
    assert caught[0].filename == __file__  # the line of the call


def test_every_property_of_a_call_is_told_apart(monkeypatch):
    """Calls like one before are not checked again: a difference that matters must be noticed."""
    from sparse_flash import prepare

    checked = []
    choose = prepare.choose
    monkeypatch.setattr(prepare, "choose", lambda *a: checked.append(a) or choose(*a))
    q, k, v = (x.detach() for x in make(2, 32, 4, 8))
    layout = masks.local(3).layout(32)
    lens = torch.tensor([32, 5])
    calls = {
        "first": (q, k, v, {}),
        "batch": (q[:1], k[:1], v[:1], {}),
        "kv heads": (q, k[:, :, :2], v[:, :, :2], {}),
        "strides of q": (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, {}),
        "strides of k": (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, {}),
        "strides of v": (q, k, v.transpose(1, 2).contiguous().transpose(1, 2), {}),
        "dtype": (q.float(), k.float(), v.float(), {}),
        "head_dim": (q[..., :4], k[..., :4], v[..., :4], {}),
        "kv_lens": (q, k, v, {"kv_lens": lens}),
        "impl": (q, k, v, {"impl": "reference"}),
        "deterministic": (q, k, v, {"deterministic": True}),
        "gradients": (q.clone().requires_grad_(), k, v, {}),
        "offset of q": (torch.cat([q.flatten(), q.flatten()[:1]])[1:].view_as(q), k, v, {}),
    }
    for number, (name, (*tensors, options)) in enumerate(calls.items(), 1):
        for _ in range(2):
            block_sparse_attention(*tensors, layout, **options)
        assert len(checked) == number, name
    with pytest.raises(TypeError, match="k has dtype"):
        block_sparse_attention(q, k.float(), v, layout)
    with pytest.raises(TypeError, match="v has dtype"):
        block_sparse_attention(q, k, v.float(), layout)
    with pytest.raises(ValueError, match="v is on meta|on meta, but q"):
        block_sparse_attention(q, k, v.to("meta"), layout)
    with pytest.raises(ValueError, match="must have one batch, sequence and heads"):
        block_sparse_attention(q, k, v[:, :, :2], layout)
    with pytest.raises(ValueError, match="32 queries"):
        block_sparse_attention(q[:, :31], k, v, layout)
