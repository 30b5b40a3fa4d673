"""Derivatives besides the first backward pass: right, or refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from sparse_flash import block_sparse_attention, masks
from tests.oracle import dense_attention

MASK = masks.local(4) | masks.sinks(1)


def make(*batch, s=12, h=2, d=3):
    torch.manual_seed(0)
    return [torch.randn(*batch, 2, s, h, d, dtype=torch.float64) for _ in "qkv"]


def ours(q, k, v):
    return block_sparse_attention(q, k, v, MASK)


def dense(q, k, v):
    n = q.shape[1]
    return dense_attention(q, k, v, MASK(torch.arange(n)[:, None], torch.arange(n)))[0]


def loss_of(attend):
    return lambda q, k, v: attend(q, k, v).sin().sum()


def test_func_grad_and_vjp():
    q, k, v = make()
    got, want = (torch.func.grad(loss_of(f), argnums=(0, 1, 2))(q, k, v) for f in (ours, dense))
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(q)
    got, want = (torch.func.vjp(f, q, k, v)[1](cotangent) for f in (ours, dense))
    torch.testing.assert_close(got, want)


def test_func_jacrev():
    q, k, v = make(s=4)
    got, want = (torch.func.jacrev(f)(q, k, v) for f in (ours, dense))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (2, None, 1)])
def test_vmap(in_dims):
    single = make()
    many = [
        x if dim is None else torch.stack([x, 2 * x, -x], dim)
        for x, dim in zip(single, in_dims, strict=True)
    ]
    got, want = (torch.vmap(f, in_dims)(*many) for f in (ours, dense))
    torch.testing.assert_close(got, want)


def test_vmap_of_no_entries():
    q, k, v = make()
    assert torch.vmap(ours)(*(x[None][:0] for x in (q, k, v))).shape == (0, *q.shape)
    assert torch.vmap(lambda x: ours(x, k, v), 1, 1)(q[:, None][:, :0]).shape[1] == 0


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad, torch.vmap])
def test_functionalize(transform):
    q, k, v = make()
    f = transform(lambda x: ours(x, k, v).sum())
    x = q[None] if transform is torch.vmap else q
    torch.testing.assert_close(torch.func.functionalize(f)(x), f(x))


def test_per_sample_gradients():
    """vmap of grad."""
    q, k, v = make(3)
    got, want = (torch.vmap(torch.func.grad(loss_of(f)))(q, k, v) for f in (ours, dense))
    torch.testing.assert_close(got, want)


def test_vmap_over_kv_lens_and_masks_by_batch():
    q, k, v = make()
    lens = torch.tensor([[12, 5], [3, 12]])
    mask = masks.per_batch([masks.causal(), masks.local(2)])
    got = torch.vmap(lambda n: block_sparse_attention(q, k, v, mask, kv_lens=n))(lens)
    want = torch.stack([block_sparse_attention(q, k, v, mask, kv_lens=n) for n in lens])
    torch.testing.assert_close(got, want)


SECOND = {
    "create_graph": lambda q, k, v: (
        torch.autograd.grad(ours(q.requires_grad_(), k, v).sin().sum(), q, create_graph=True)[0]
        .square()
        .sum()
        .backward()
    ),
    "hessian": lambda q, k, v: torch.func.hessian(lambda q: ours(q, k, v).sin().sum())(q),
    "grad of grad": lambda q, k, v: torch.func.grad(
        lambda q: torch.func.grad(lambda q: ours(q, k, v).sin().sum())(q).square().sum()
    )(q),
}


@pytest.mark.parametrize("way", SECOND)
def test_second_derivatives_are_refused(way):
    with pytest.raises(NotImplementedError, match=r"(second|forward-mode) derivative.*MATH"):
        SECOND[way](*make())


def test_create_graph_alone_is_right():
    """Only what needs the second derivative is refused."""
    q, k, v = (x.requires_grad_() for x in make())
    (got,) = torch.autograd.grad(ours(q, k, v).sin().sum(), q, create_graph=True)
    (want,) = torch.autograd.grad(dense(q, k, v).sin().sum(), q)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(which, grad):
    tensors = [x.requires_grad_(grad) for x in make()]

    def of_one(x):
        return ours(*tensors[:which], x, *tensors[which + 1 :])

    x, t = tensors[which], torch.ones_like(tensors[which])
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(of_one, (x,), (t,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        of_one(forward_ad.make_dual(x, t))
    with forward_ad.dual_level():  # without a tangent there is nothing to refuse
        torch.testing.assert_close(ours(*tensors), dense(*tensors))


def watched(f):
    """The same function where a dispatch mode sees its operators."""

    def run(*inputs):
        with FlopCounterMode(display=False):
            return f(*inputs)

    return run


# Where the operator runs, and not the function of autograd: f(x) to f(x).
OPERATOR = {
    "mode": watched,
    "make_fx": lambda f: lambda *inputs: make_fx(f)(*inputs)(*inputs),
    "compile": lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
}
FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jvp of grad": lambda f, x: torch.func.jvp(
        torch.func.grad(lambda x: f(x).square().sum()), (x,), (x,)
    ),
    "jvp of vmap": lambda f, x: torch.func.jvp(torch.vmap(f), (x[None],), (x[None],)),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "jvp in a cotangent": lambda f, x: torch.func.jvp(
        lambda t: torch.func.vjp(f, x)[1](t)[0], (x,), (x,)
    ),
}


@pytest.mark.parametrize(
    ("route", "which"), [("mode", 0), ("mode", 1), ("mode", 2), ("make_fx", 0), ("compile", 0)]
)
@pytest.mark.parametrize("way", FORWARD)
def test_forward_mode_of_the_operator_is_refused(route, way, which):
    torch._dynamo.reset()
    tensors = make(s=3)

    def of_one(x):
        return ours(*tensors[:which], x, *tensors[which + 1 :])

    attend = OPERATOR[route](lambda x: FORWARD[way](of_one, x))
    with pytest.raises(Exception, match=r"no (forward-mode|second) derivative"):
        attend(tensors[which])


def test_linearize_is_refused():
    q, k, v = make()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.linearize(lambda q: ours(q, k, v), q)


def test_tangents_of_the_operator_are_refused():
    q, k, v = make()
    with FlopCounterMode(display=False), forward_ad.dual_level():
        torch.testing.assert_close(ours(q, k, v), dense(q, k, v))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            ours(q, forward_ad.make_dual(k, k), v)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.compile(ours, backend="eager")(q, k, forward_ad.make_dual(v, v))


REVERSE = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sin().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x)[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sin().sum()))(x[None]),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.vmap(f)(x).sin().sum())(x[None]),
}


@pytest.mark.parametrize("way", REVERSE)
@pytest.mark.parametrize("route", OPERATOR)
def test_transforms_of_the_operator(route, way):
    """torch.func gives these gradients under dispatch modes and in compiled functions too."""
    torch._dynamo.reset()
    q, k, v = make(s=3)
    attend = OPERATOR[route](lambda q: REVERSE[way](lambda q: ours(q, k, v), q))
    torch.testing.assert_close(attend(q), REVERSE[way](lambda q: dense(q, k, v), q))


def test_inputs_that_change_between_the_passes_are_noticed():
    q, k, v = (x.requires_grad_() for x in make())
    lens = torch.tensor([12, 5])
    out = block_sparse_attention(q, k, v, MASK, kv_lens=lens)
    lens.fill_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _changing(what):
    """A layout or mask, and the change of it."""
    if what == "layout":
        layout = masks.local(4).layout(12, block=(4, 4))
        return layout, lambda: layout.update_(masks.local(1).layout(12, block=(4, 4)))
    width = torch.tensor(4)
    return masks.custom(lambda q, kv: (q - kv).abs() <= width), lambda: width.fill_(1)


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("what", ["layout", "custom"])
def test_patterns_that_change_between_the_passes_are_noticed(what, watched, terms):
    """An eager call of a custom keeps the layout of the forward pass."""
    mask, change = _changing(what)
    q, k, v = (x.requires_grad_() for x in make())
    options = {"sinks": torch.zeros(2, dtype=torch.float64)} if terms else {}
    with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
        out = block_sparse_attention(q, k, v, mask, **options)
    ref = torch.autograd.grad(out.sum(), q, retain_graph=True)
    change()
    if what == "custom" and not watched:
        torch.testing.assert_close(torch.autograd.grad(out.sum(), q), ref)
    else:
        with pytest.raises(RuntimeError, match="between the forward and the backward pass"):
            out.sum().backward()


@pytest.mark.parametrize("what", ["layout", "custom"])
def test_patterns_that_change_between_compiled_passes_are_noticed(what):
    torch._dynamo.reset()
    mask, change = _changing(what)
    q, k, v = (x.requires_grad_() for x in make())
    out = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, mask))(q, k, v)
    change()
    with pytest.raises(RuntimeError, match="between the forward and the backward pass"):
        out.sum().backward()


def test_jit_trace_is_refused():
    q, k, v = make()
    with pytest.raises(RuntimeError, match="use torch.export.export or torch.compile"):
        torch.jit.trace(ours, (q, k, v))


def test_saved_tensors_go_through_hooks():
    """As for offloading them: everything that is needed is saved by autograd, and nowhere else."""
    q, k, v = (x.requires_grad_() for x in make())
    packed = []

    def pack(x):
        packed.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = ours(q, k, v)
    assert len(packed) == 5
    with torch.no_grad():
        q.add_(1)
    torch.autograd.grad(out.sum(), k)


@pytest.mark.parametrize("output", [0, 1])
def test_batches_of_gradients_are_refused_with_a_way_out(output):
    q, k, v = (torch.randn(1, 9, 1, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")

    def attend(q):
        return block_sparse_attention(q, k, v, masks.local(2), return_lse=True)[output]

    result = attend(q)
    given = torch.randn(3, *result.shape, dtype=result.dtype)
    with pytest.raises(NotImplementedError, match="use torch.func.jacrev, or torch.func.vmap over"):
        torch.autograd.grad(result, q, given, is_grads_batched=True, retain_graph=True)
    got = torch.func.vmap(torch.func.vjp(attend, q)[1])(given)[0]
    for i in range(3):
        expected = torch.autograd.grad(result, q, given[i], retain_graph=True)[0]
        torch.testing.assert_close(got[i], expected)
