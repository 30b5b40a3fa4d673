"""Attention on layouts of data: exact, NaN where they are invalid, in compiled functions."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.kernels import data_bits
from sparse_flash.kernels.sm90 import attention
from sparse_flash.masks import BlockLayout
from sparse_flash.masks.records import CACHE
from torch.utils.checkpoint import checkpoint

from sparse_flash import block_sparse_attention, masks
from sparse_flash.implementations import data_layouts
from tests.kernels import test_backward, test_forward
from tests.oracle import dense_attention

CAUSAL = masks.causal()
S = 75  # blocks of 16: the last one is ragged


def inputs(b=2, h=4, h_kv=2, d=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def make(heads):
        x = torch.randn(b, S, heads, d, generator=generator, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    return make(h), make(h_kv), make(h_kv)


def some_indices(b=2, heads=4, k=2):
    """Indices for 5 blocks, with an empty row, and a block that nobody chooses."""
    indices = torch.randint(-1, 4, (b, heads, 5, k), generator=torch.Generator().manual_seed(1))
    indices[:, :, 2] = -1
    return indices


def results(q, k, v, layout, **options):
    """out, lse, and the gradients of a function of both."""
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, **options)
    loss = out.square().sum() + lse.where(lse.isfinite(), 0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


def expected(q, k, v, allowed):
    out, lse = dense_attention(q, k, v, allowed.expand(len(q), q.shape[2], -1, -1))
    loss = out.square().sum() + lse.where(lse.isfinite(), 0).sin().sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


LAYOUTS = {
    "topk": lambda: BlockLayout.from_topk(some_indices(), (16, 16), S),
    "one head": lambda: BlockLayout.from_topk(some_indices(1, 1), (16, 16), S, within=CAUSAL),
    "key heads": lambda: BlockLayout.from_topk(some_indices(1, 2), (16, 16), S, within=CAUSAL),
    "table": lambda: BlockLayout.from_blocks(
        some_indices(2, 1, 5) > 1, (16, 16), S, within=masks.local(9)
    ),
    "documents": lambda: (
        masks.documents(torch.tensor([0, 20, 20, 60, 75]), length=S) & CAUSAL
    ).layout(S, block=(16, 16)),
}


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("lens", [None, (75, 30)])
def test_reference_is_exact_with_and_without_the_host(monkeypatch, host, name, lens):
    monkeypatch.setattr(data_layouts, "host_has", lambda layout: host)
    layout, (q, k, v) = LAYOUTS[name](), inputs()
    allowed = layout.to_dense()
    allowed = allowed if allowed.ndim == 4 else allowed[None, None]
    allowed = allowed.repeat_interleave(4 // allowed.shape[1], 1)
    kv_lens = None if lens is None else torch.tensor(lens)
    if lens is not None:
        allowed = allowed & (torch.arange(S) < kv_lens[:, None, None, None])
    got = results(q, k, v, layout, kv_lens=kv_lens, impl="reference")
    for mine, other in zip(got, expected(q, k, v, allowed), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-10)
    again = results(q, k, v, layout, kv_lens=kv_lens, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("host", [True, False])
def test_rows_that_are_not_as_asked_for_are_nan(monkeypatch, host):
    monkeypatch.setattr(data_layouts, "host_has", lambda layout: host)
    indices = some_indices()
    indices[1, 2, 3, 0] = 9  # query head 2 uses key head 1
    layout, (q, k, v) = BlockLayout.from_topk(indices, (16, 16), S), inputs()
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True)
    bad = torch.zeros(2, S, 4, dtype=torch.bool)
    bad[1, 48:64, 2] = True
    assert torch.equal(out.isnan().all(3), bad)
    assert torch.equal(lse.isnan(), bad.transpose(1, 2))
    rest = out.where(~bad[..., None], 0).sum()  # a loss that leaves the rows out
    dq, dk, dv = torch.autograd.grad(rest, (q, k, v))
    assert torch.equal(dq.isnan().all(3), bad)
    heads = torch.zeros(2, 1, 2, dtype=torch.bool)
    heads[1, 0, 1] = True
    for grad in (dk, dv):
        assert torch.equal(grad.isnan().all(3), heads.expand(-1, S, -1))
    indices[1, 2, 3, 0] = -1
    good = BlockLayout.from_topk(indices, (16, 16), S)
    same = block_sparse_attention(q, k, v, good)
    torch.testing.assert_close(out[~bad], same[~bad])


def test_calls_that_do_not_fit():
    q, k, v = inputs()
    for heads, batch, message in [
        (3, 1, "rows for 3 heads, but q has 4 heads: give indices or tables for 4, 2 .those of k"),
        (4, 3, "rows for 3 batch entries, but q has 2"),
    ]:
        layout = BlockLayout.from_topk(some_indices(batch, heads), (16, 16), S)
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, layout)
    layout = LAYOUTS["topk"]()
    for positions in ({"q_offset": 3}, {"kv_starts": torch.zeros(2).int()}):
        with pytest.raises(ValueError, match=r"neither q_offset nor kv_starts: pass layout.fixed"):
            block_sparse_attention(q, k, v, layout, **positions)
    block_sparse_attention(q, k, v, layout, q_offset=0)
    with pytest.raises(ValueError, match="the layout is for 75 queries"):
        block_sparse_attention(q[:, :9], k, v, layout)
    with pytest.raises(ValueError, match="it needs a Hopper GPU|computes bfloat16"):
        block_sparse_attention(q, k, v, layout, impl="sm90")


def attend(q, k, v, indices):
    layout = BlockLayout.from_topk(indices, (16, 16), q.shape[1], within=CAUSAL)
    first = block_sparse_attention(q, k, v, layout, q_offset=0)  # as without it
    table = indices[..., :1] < torch.arange(5, device=q.device)
    second = BlockLayout.from_blocks(table, (16, 16), q.shape[1], capacity=(200, 0))
    return block_sparse_attention(first, k, v, second)


def test_layouts_are_made_in_compiled_functions():
    q, k, v = inputs()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        indices = some_indices().roll(seed, 2)
        want, got = attend(q, k, v, indices), compiled(q, k, v, indices)
        assert torch.equal(want, got)
        grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (want, got)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_positions_in_compiled_functions_are_those_of_eager_mode():
    q, k, v = inputs()

    def attend_at(q_offset, indices):
        layout = BlockLayout.from_topk(indices, (16, 16), S)
        return block_sparse_attention(q, k, v, layout, q_offset=q_offset)

    compiled = torch.compile(attend_at, fullgraph=True, backend="eager")
    indices = some_indices()
    assert torch.equal(compiled(0, indices), attend_at(0, indices))
    with pytest.raises(Exception, match=r"outside of the compiled function and pass layout.fixed"):
        compiled(2, indices)


def test_layouts_and_documents_go_into_compiled_functions():
    q, k, v = inputs()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="eager")
    ends = torch.tensor([0, 20, S])
    mask = masks.documents(ends, length=S) & CAUSAL
    for given in (LAYOUTS["topk"](), mask):
        torch.testing.assert_close(compiled(q, k, v, given), block_sparse_attention(q, k, v, given))
    ends[1] = 40
    fixed = masks.documents((40, S - 40)) & CAUSAL
    want = block_sparse_attention(q, k, v, fixed)
    for call in (compiled, block_sparse_attention):
        torch.testing.assert_close(call(q, k, v, mask), want)


def test_activation_checkpointing():
    q, k, v = inputs()
    indices = some_indices()
    plain = attend(q, k, v, indices)
    again = checkpoint(attend, q, k, v, indices, use_reentrant=False)
    grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_functional_transforms():
    q, k, v = inputs()
    layout = LAYOUTS["topk"]()

    def loss(x):
        return block_sparse_attention(x, k.detach(), v.detach(), layout).square().sum()

    want = torch.autograd.grad(loss(q), q)[0]
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), want)


def test_a_layout_of_every_call_is_checked_once(monkeypatch):
    q, k, v = inputs()
    checked = []
    from sparse_flash import prepare

    original = prepare.check_layout
    monkeypatch.setattr(prepare, "check_layout", lambda *a: (checked.append(1), original(*a)))
    prepare.CACHE.calls_of_data.clear()
    for _ in range(3):
        block_sparse_attention(q, k, v, LAYOUTS["topk"]())
    assert len(checked) == 1


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_backward_is_planned_while_the_forward_runs(monkeypatch, needs_grad):
    done, nothing = [], SimpleNamespace(errors=None)

    def record(name, result):
        monkeypatch.setattr(attention, name, lambda *_, **__: done.append(name) or result)

    record("forward_plan", nothing)
    record("forward", (torch.zeros(2, S, 4, 16), torch.zeros(2, 4, S)))
    record("backward_plans", SimpleNamespace(dkdv=nothing))
    record("backward", tuple(torch.zeros(2, S, heads, 16) for heads in (4, 2, 2)))
    for name in ("unsupported_reason", "unsupported_blocks"):
        monkeypatch.setattr(attention, name, lambda *_: None)
    monkeypatch.setattr(CACHE, "calls_of_data", {})
    q, k, v = inputs(d=16, dtype=torch.bfloat16)
    with torch.set_grad_enabled(needs_grad):
        out = block_sparse_attention(q, k, v, LAYOUTS["topk"](), impl="sm90")
    assert done == ["forward_plan", "forward", "backward_plans"][: 3 if needs_grad else 2]
    if needs_grad:
        out.sum().backward()
        assert done[3:] == ["backward_plans", "backward"]


# On a GPU.


def on_gpu(kind, b, h, h_kv, s, block, within=None):
    """Indices or documents on the GPU that make a layout, in place where they change."""
    nq, nk = -(-s // block[0]), -(-s // block[1])
    generator = torch.Generator().manual_seed(0)
    heads = {"topk": h, "key heads": h_kv, "one head": 1}.get(kind)
    if heads is None:
        ends = torch.tensor([0, s // 3, s // 2, s, s], device="cuda")
        mask = masks.documents(ends, length=s)
        mask = mask if within is None else mask & within
        return ends, lambda: mask.layout(s, block=block, device="cuda")
    indices = torch.randint(-1, nk, (b, heads, nq, 3), generator=generator)
    indices[:, :, 1] = -1
    indices = indices.cuda()
    return indices, lambda: BlockLayout.from_topk(indices, block, s, within=within)


GPU_CASES = [
    ("topk", 2, 4, 4, 64, (128, 128), None),
    ("topk", 2, 4, 2, 64, (64, 64), CAUSAL),
    ("key heads", 2, 4, 2, 128, (64, 64), CAUSAL),
    ("one head", 1, 4, 2, 128, (128, 128), masks.local(200) | masks.sinks(5)),
    ("key heads", 2, 4, 2, 64, (16, 64), CAUSAL),
    ("topk", 1, 2, 2, 256, (256, 64), CAUSAL),
    ("documents", 1, 4, 2, 64, (128, 128), CAUSAL),
    ("documents", 1, 2, 2, 128, (64, 64), None),
]


def gpu_inputs(b, h, h_kv, d, s=1300, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)

    def make(heads):
        x = torch.randn(b, s, heads, d, generator=generator, device="cuda")
        return x.to(dtype).requires_grad_()

    return make(h), make(h_kv), make(h_kv)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("kind", "b", "h", "h_kv", "d", "block", "within"), GPU_CASES)
def test_kernels_against_float64(kind, b, h, h_kv, d, block, within, deterministic):
    q, k, v = gpu_inputs(b, h, h_kv, d)
    _, make = on_gpu(kind, b, h, h_kv, 1300, block, within)
    allowed = data_layouts.stored_layout(make(), h).to_dense().expand(b, h, -1, -1)
    generator = torch.Generator("cuda").manual_seed(1)
    dout = torch.randn(q.shape, generator=generator, device="cuda").to(q.dtype)
    dlse = torch.randn(b, h, 1300, generator=generator, device="cuda")

    def step():
        options = {"impl": "sm90", "deterministic": deterministic, "return_lse": True}
        out, lse = block_sparse_attention(q, k, v, make(), **options)
        return out.detach(), lse.detach(), torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))

    out, lse, got = step()
    tensors = [x.detach() for x in (q, k, v)]
    test_forward.check(out, lse, *tensors, allowed)
    test_backward.check(got, *tensors, allowed, dout, dlse)
    if deterministic:
        *_, again = step()
        assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


def captured(step):
    """A CUDA graph of a step, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["sm90", "reference"])
@pytest.mark.parametrize("kind", ["topk", "documents"])
def test_nothing_synchronizes_and_graphs_read_data_anew(impl, kind):
    q, k, v = gpu_inputs(1, 4, 2, 64)
    data, make = on_gpu(kind, 1, 4, 2, 1300, (128, 128), CAUSAL)

    def step():
        return results(q, k, v, make(), impl=impl, deterministic=True)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, out = captured(step)
    for change in (lambda: data.copy_(data.roll(1, 0) if kind == "topk" else data), None):
        if change is None:
            data[..., 1] = 5
        else:
            change()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(out, step(), strict=True))


def test_bit_tiles_made_in_a_capture_belong_to_the_graph(monkeypatch):
    kept, sizes, packed = {}, [], torch.full((2, 64, 8), 7, dtype=torch.uint8)
    for capturing in (True, False, True):
        monkeypatch.setattr(data_bits, "is_capturing", lambda device, now=capturing: now)
        made = data_bits.kept_fragments(kept, packed)
        sizes.append(len(kept))
    assert sizes == [0, 1, 1]
    assert made is kept[data_bits.DEFAULT_ORDER]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["topk", "documents"])
def test_graphs_plan_layouts_that_were_made_before(kind):
    q, k, v = gpu_inputs(1, 4, 2, 64)
    _, make = on_gpu(kind, 1, 4, 2, 1300, (128, 128), CAUSAL)
    want = results(q, k, v, make(), impl="sm90", deterministic=True)
    layouts = [make() for _ in range(3)]  # two for the calls before the capture; they stay alive
    following = iter(layouts)
    step = functools.partial(results, q, k, v, impl="sm90", deterministic=True)
    graph, out = captured(lambda: step(layout=next(following)))
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(out, want, strict=True))


@pytest.mark.gpu
def test_kernels_mark_rows_with_nan():
    q, k, v = gpu_inputs(1, 2, 2, 64)
    indices, make = on_gpu("topk", 1, 2, 2, 1300, (128, 128))
    indices[0, 1, 3, 1] = 99
    out, lse, dq, dk, dv = results(q, k, v, make(), impl="sm90")
    bad = torch.zeros(1, 1300, 2, dtype=torch.bool, device="cuda")
    bad[0, 384:512, 1] = True
    assert torch.equal(out.isnan().all(3), bad)
    assert torch.equal(lse.isnan().transpose(1, 2), bad)
    assert torch.equal(dq.isnan().all(3), bad)
    for grad in (dk, dv):
        assert grad[:, :, 1].isnan().all()
        assert grad[:, :, 0].isfinite().all()


@pytest.mark.gpu
def test_layouts_are_made_in_functions_compiled_for_a_gpu():
    q, k, v = (x.detach().requires_grad_() for x in gpu_inputs(1, 2, 2, 64, s=640))

    def step(q, k, v, indices):
        layout = BlockLayout.from_topk(indices, (128, 128), q.shape[1], within=CAUSAL)
        return block_sparse_attention(q * 2, k, v, layout, deterministic=True)

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(2):
        indices = torch.randint(-1, 5, (1, 2, 5, 2), device="cuda")
        want, got = step(q, k, v, indices), compiled(q, k, v, indices)
        assert torch.equal(want, got)
        grads = [torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (want, got)]
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
