"""torch.compile: masks and layouts from anywhere; another one compiles nothing.

`test_with_handles` runs this file again as with a torch below 2.13.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from sparse_flash.masks.traceable import HANDLES

from sparse_flash import block_sparse_attention, masks
from sparse_flash.nn import SelfAttention
from tests.oracle import dense_attention


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(s=60, seed=0, grad=True, b=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, s, 2, 8, generator=generator).requires_grad_(grad) for _ in "qkv"]


def expected(q, k, v, mask):
    layout = mask.layout(q.shape[1], k.shape[1]) if isinstance(mask, masks.Mask) else mask
    allowed = layout.to_dense().expand(q.shape[0], q.shape[2], -1, -1)
    return dense_attention(q, k, v, allowed)[0]


def check(attend, mask, *, s=60, seed=0, grad=True, b=2):
    """Values, and gradients, of a compiled function of q, k, v."""
    q, k, v = make(s, seed, grad, b)
    out, ref = attend(q, k, v), expected(q, k, v, mask)
    torch.testing.assert_close(out, ref, rtol=1e-4, atol=1e-5)
    if grad:
        grads = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, ref))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def with_closure(mask):
    return lambda q, k, v: block_sparse_attention(q, k, v, mask)


def with_default(mask):
    def attend(q, k, v, mask=mask):
        return block_sparse_attention(q, k, v, mask)

    return attend


class Plain:
    def __init__(self, mask):
        self.mask = mask

    def attend(self, q, k, v):
        return block_sparse_attention(q, k, v, self.mask)


class Module(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q, k, v):
        return block_sparse_attention(q, k, v, self.mask)


WAYS = {
    "closure": with_closure,
    "default": with_default,
    "partial": lambda mask: functools.partial(block_sparse_attention, mask=mask),
    "attribute of an object": lambda mask: Plain(mask).attend,
    "attribute of a module": Module,
    "list": lambda mask: with_closure_of_list([mask]),
}


def with_closure_of_list(some):
    return lambda q, k, v: block_sparse_attention(q, k, v, some[0])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("what", ["mask", "layout"])
@pytest.mark.parametrize("way", WAYS)
def test_where_it_comes_from(way, what, dynamic):
    """More masks than torch.compile would compile one function for."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    limit = torch._dynamo.config.recompile_limit
    for i in range(limit + 2):
        mask = masks.local(i + 1)
        given = mask if what == "mask" else mask.layout(60)
        compiled = torch.compile(WAYS[way](given), fullgraph=True, dynamic=dynamic, backend=counter)
        check(compiled, mask, grad=i == limit)
        if i == 1:
            compilations = counter.frame_count
    if way not in ("default", "partial"):  # each of these is a function, and a graph, of its own
        assert counter.frame_count == compilations + 1  # with gradients, in the end


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("what", ["mask", "layout"])
def test_as_an_argument(what, dynamic):
    """Packed documents: a new mask or layout at every step."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(block_sparse_attention, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = 0
    for i in range(1, 12):
        mask = masks.documents((5 * i, 60 - 5 * i))
        given = mask if what == "mask" else mask.layout(60)
        check(lambda q, k, v, given=given: attend(q, k, v, given), mask, seed=i)
        compilations = counter.frame_count if i == 1 else compilations
    assert counter.frame_count == compilations


def test_masks_of_many_classes_as_an_argument():
    some = [masks.causal(), masks.local(3), masks.local(3) | masks.sinks(2), ~masks.local(2)]
    some += [masks.butterfly(8), masks.full(), masks.strided(4), masks.per_head([masks.full()] * 2)]
    attend = torch.compile(block_sparse_attention, fullgraph=True, backend="aot_eager")
    for mask in some:
        check(lambda q, k, v, mask=mask: attend(q, k, v, mask), mask, grad=False)


def test_other_lengths_compile_nothing():
    """Eager calls of other lengths, and other lengths of the compiled function itself."""
    mask = masks.local(7)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    attend = torch.compile(with_closure(mask), fullgraph=True, backend=counter)
    for n in (60, 61, *range(20, 36)):
        check(attend, mask, s=n, grad=False)
        for other in range(40, 45):
            block_sparse_attention(*make(other, grad=False), mask)
    assert counter.frame_count == 2  # the second one with a symbol for the length


def test_many_masks_in_one_graph():
    some = [masks.local(i) for i in range(70)]
    attend = torch.compile(
        lambda q, k, v: sum(block_sparse_attention(q, k, v, mask) for mask in some),
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = make(20)
    ref = sum(expected(q, k, v, mask) for mask in some)
    torch.testing.assert_close(attend(q, k, v), ref, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["mask", "layout"])
def test_layers_compiled_one_by_one(what):
    some = [masks.local(3 + i) for i in range(12)]
    layers = [SelfAttention(16, 2, m if what == "mask" else m.layout(60)) for m in some]
    x = torch.randn(2, 60, 16)
    eager = functools.reduce(lambda y, layer: layer(y), layers, x)
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    compiled = functools.reduce(lambda y, layer: layer(y), layers, x)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make_mask",
    [
        lambda m: masks.local(4),
        lambda m: m | masks.sinks(1),
        lambda m: ~m,
        lambda m: ~~m,
        lambda m: m.shift(q=3),
        lambda m: masks.per_head([m, m]),
    ],
)
def test_masks_made_inside_break_the_graph_and_are_right(make_mask):
    def attend(q, k, v, outer):
        return block_sparse_attention(q, k, v, make_mask(outer))

    compiled = torch.compile(attend, backend="eager")
    for outer in (masks.local(4), masks.local(2)):
        inside = make_mask(outer)
        check(lambda q, k, v, m=outer: compiled(q, k, v, m), inside, grad=False)


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.window[0],
        lambda m: m.density(60),
        lambda m: m.layout(60, block=(8, 8)).num_tiles,
        lambda m: m.layout(60).to_dense().sum(),
    ],
)
@pytest.mark.skipif(HANDLES, reason="torch.compile traces into the building of layouts")
def test_members_of_masks_are_read_inside(read):
    def attend(q, mask):
        return q * read(mask)

    compiled, q = torch.compile(attend, backend="eager"), torch.ones(3)
    for mask in (masks.local(4), masks.local(9)):
        torch.testing.assert_close(compiled(q, mask), attend(q, mask))


def test_a_graph_keeps_its_mask():
    """Nobody else holds it: not even the cache."""
    import sparse_flash

    attend = torch.compile(with_closure(masks.local(3)), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        check(attend, masks.local(3))
        sparse_flash.clear_cache()
        gc.collect()


def test_an_updated_layout_is_followed():
    layout = masks.local(20).layout(60, block=(16, 16))
    attend = torch.compile(with_closure(layout), fullgraph=True, backend="aot_eager")
    check(attend, masks.local(20))
    layout.update_(masks.sinks(16).layout(60, block=(16, 16)))
    check(attend, masks.sinks(16))


def test_inductor_with_gradients_and_lengths():
    mask = masks.local(9) | masks.sinks(2)
    lens = torch.tensor([60, 20])

    def step(q, k, v, lens):
        out, lse = block_sparse_attention(q * 2, k, v, mask, kv_lens=lens, return_lse=True)
        return out.sin().sum() + lse.sum()

    tensors = make()
    eager, compiled = step(*tensors, lens), torch.compile(step, fullgraph=True)(*tensors, lens)
    torch.testing.assert_close(compiled, eager)
    grads = (torch.autograd.grad(x, tensors) for x in (compiled, eager))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_what_a_compiled_call_is_refused():
    """Shapes while it is traced, all else when it runs."""
    q, k, v = make(grad=False)
    attend = torch.compile(
        lambda q, k, v, mask, lens: block_sparse_attention(q, k, v, mask, kv_lens=lens),
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match="60 queries and 61 keys"):
        attend(q, k, v, masks.full().layout(60, 61), None)
    with pytest.raises(ValueError, match=r"in 0\.\.60"):
        attend(q, k, v, masks.full(), torch.tensor([3, 61]))
    with pytest.raises(ValueError, match="made for q_len=18"):
        attend(q, k, v, masks.documents((9, 9)), None)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", ["mask", "layout"])
def test_export(what, strict):
    mask = masks.local(9)
    layer = SelfAttention(16, 2, mask if what == "mask" else mask.layout(60))
    x = torch.randn(2, 60, 16)
    program = torch.export.export(layer, (x,), strict=strict).module()
    torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize("name", ["softmax_scale", "softcap", "dropout_p"])
def test_options_that_change(name):
    """torch.compile has a symbol for the second value."""
    mask, (q, k, v) = masks.local(5), make(20, grad=False)

    def attend(value):
        return block_sparse_attention(q, k, v, mask, **{name: value})

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for value in (0.25, 0.5, 0.75):
        results = []
        for f in (compiled, attend):
            torch.manual_seed(0)
            results.append(f(value))
        torch.testing.assert_close(*results)


def test_vmap_inside():
    mask = masks.local(5)

    def attend(q, k, v):
        return torch.vmap(lambda a, b, c: block_sparse_attention(a, b, c, mask))(q, k, v)

    tensors = [torch.randn(3, 2, 30, 2, 8) for _ in "qkv"]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
    for i in range(3):
        ref = block_sparse_attention(*(x[i] for x in tensors), mask)
        torch.testing.assert_close(compiled[i], ref)


@pytest.mark.thorough
@pytest.mark.skipif(HANDLES, reason="the test starts this process")
def test_with_handles():
    """The way of torch below 2.13: in a process of its own, for it is chosen at import."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"SPARSE_FLASH_HANDLES": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
