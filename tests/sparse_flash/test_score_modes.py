"""Score terms in torch.compile, torch.func, dispatch modes, on meta and fake tensors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from sparse_flash.masks.traceable import HANDLES, to_operator
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_flash import block_sparse_attention, masks, score_operators, scores
from sparse_flash.call import ScoreTerms

MASK = masks.local((7, 2))
ORDER = masks.morton(7, 3)


def make(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    shapes = [(2, 21, 4, 6), (2, 21, 2, 6), (2, 21, 2, 5), (4,), (4, 9), (4, 3, 5), (4,)]
    return [torch.randn(*s, dtype=dtype, device=device).requires_grad_() for s in shapes]


def attend(q, k, v, slopes, table, image, sinks, **options):
    bias = scores.alibi(slopes) + scores.relative(table) + scores.relative2d(image, 7, 3, ORDER)
    return block_sparse_attention(q, k, v, MASK, bias=bias, softcap=2.0, sinks=sinks, **options)


def loss(*tensors, **options):
    out, lse = attend(*tensors, return_lse=True, **options)
    return out.sin().sum() + lse.cos().sum()


def test_compiled():
    torch._dynamo.reset()
    leaves = make()
    eager, compiled = (
        loss(*leaves),
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves),
    )
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(x, leaves) for x in (compiled, eager)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_order", [masks.morton, masks.hilbert])
def test_a_compiled_function_is_the_first_to_use_an_order(make_order):
    torch._dynamo.reset()
    q, k, v, *_, image, _ = make()

    def scored(order):
        bias = scores.relative2d(image, 7, 3, order)
        return order.restore(block_sparse_attention(order.permute(q), k, v, MASK, bias=bias))

    compiled = torch.compile(scored, fullgraph=True, backend="aot_eager")
    for order in (make_order(7, 3), masks.order(torch.arange(20, -1, -1))):
        torch.testing.assert_close(compiled(order), scored(order))


def test_a_bias_from_outside_and_its_values():
    """An attribute, a closure, an argument: another value or object compiles nothing."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    q, k, v, *_ = make()
    compiled = torch.compile(
        lambda bias: block_sparse_attention(q, k, v, MASK, bias=bias),
        fullgraph=True,
        backend=counter,
    )
    for i in range(4):
        bias = scores.alibi(torch.full((4,), float(i)))
        want = block_sparse_attention(q, k, v, MASK, bias=bias)
        torch.testing.assert_close(compiled(bias), want)
    assert counter.frame_count == 1


def test_some_gradients_only():
    *tensors, sinks = make()
    inputs = [x.detach() for x in tensors]
    inputs[4].requires_grad_()
    out = attend(*inputs, sinks.detach())
    (gradient,) = torch.autograd.grad(out.sin().sum(), inputs[4])
    leaves = make()
    everything = torch.autograd.grad(attend(*leaves).sin().sum(), leaves)
    torch.testing.assert_close(gradient, everything[4])


def test_torch_func():
    leaves = make()
    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.func.grad(loss, argnums=tuple(range(7)))(*leaves)
    torch.testing.assert_close(got, want)
    many = [torch.stack([x.detach(), 2 * x.detach()]) for x in leaves]
    got = torch.vmap(torch.func.grad(loss, argnums=(3, 4, 6)))(*many)
    for i in range(2):
        alone = torch.func.grad(loss, argnums=(3, 4, 6))(*(x[i] for x in many))
        torch.testing.assert_close(tuple(x[i] for x in got), alone)


def test_second_derivatives_and_tangents_are_refused():
    leaves = make()
    (gradient,) = torch.autograd.grad(loss(*leaves), leaves[3], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()
    for i in (0, 3, 6):
        tangents = (torch.zeros_like(leaves[i]),)
        one = lambda x, i=i: loss(*leaves[:i], x, *leaves[i + 1 :])  # noqa: E731
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            torch.func.jvp(one, (leaves[i],), tangents)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_numbers(kind):
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        leaves = [torch.empty_like(x).requires_grad_() for x in make(device=None)]
        out, lse = attend(*leaves, return_lse=True, dropout_p=0.1)
        assert out.shape == (2, 21, 4, 5)
        assert lse.shape == (2, 4, 21)
        gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]


def test_empty_batches():
    leaves = make()
    leaves[:3] = [x.detach()[:0].requires_grad_() for x in leaves[:3]]
    out = attend(*leaves)
    assert out.shape == (0, 21, 4, 5)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("wants", [(True,) * 4, (False, True, False, False)])
def test_opcheck(wants):
    q, k, v, slopes, table, image, sinks = make(torch.float64)
    coordinates = scores.relative2d(image, 7, 3).coordinates()
    terms = ScoreTerms(slopes, table, image, sinks, coordinates, torch.tensor([3]), wants, 2.0, 80)
    tensors = [x if w else x.detach() for x, w in zip(terms, wants, strict=False)]
    rest = (*terms[4:6], list(wants), 2.0, 80, to_operator(MASK, q), None, True, "auto")
    inputs = (q, k, v, None, None, None, *tensors, *rest)
    torch.library.opcheck(score_operators.scored_attention, inputs)
    plain = [x.detach() if torch.is_tensor(x) else x for x in inputs]
    out, lse = score_operators.scored_attention(*plain)
    given = (out, lse, torch.randn_like(out), torch.randn_like(lse))
    torch.library.opcheck(score_operators.scored_attention_backward, (*given, *plain))


@pytest.mark.thorough
@pytest.mark.skipif(HANDLES, reason="the test starts this process")
def test_with_handles():
    """The way of torch below 2.13: in a process of its own, for it is chosen at import."""
    files = [__file__, __file__.replace("test_score_modes", "test_dropout")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    command += ["-k", "outside or checkpointing_in_a_compiled"]
    environment = os.environ | {"SPARSE_FLASH_HANDLES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
