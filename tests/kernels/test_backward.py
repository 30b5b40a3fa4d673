"""The backward kernels on a GPU: the float64 truth, the edges, and what must never happen."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from sparse_flash.kernels.sm90.attention import backward_plans

from sparse_flash import block_sparse_attention, masks
from tests.kernels.helpers import DTYPES, sanitize, tensors, truth, wait
from tests.oracle import dense_attention
from tests.strategies import problems

pytestmark = pytest.mark.gpu
IMPL = "sm90"


@pytest.fixture(params=["sm90", "sm80"], autouse=True)
def impl(request, monkeypatch):
    """Each test runs for each implementation."""
    monkeypatch.setitem(globals(), "IMPL", request.param)


def gradients(q, k, v, mask, dout, dlse=None, **options):
    """(dq, dk, dv) of the implementation."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = block_sparse_attention(*leaves, mask, impl=IMPL, return_lse=True, **options)
    results, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    got = torch.autograd.grad(results, leaves, grads)
    wait()
    return got


def by_dense(q, k, v, allowed, dout, dlse, scale):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*leaves, allowed, scale)
    total = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        seen = allowed.any(-1)
        total = total + (lse.masked_fill(~seen, 0) * dlse.to(lse.dtype)).sum()
    return torch.autograd.grad(total, leaves)


def check(got, q, k, v, allowed, dout, dlse=None, scale=None):
    """At most twice as far from float64 as dense attention in the same precision."""
    exact = by_dense(*(x.double() for x in (q, k, v)), allowed, dout, dlse, scale)
    low = by_dense(q, k, v, allowed, dout, dlse, scale)
    for name, x, y, ref in zip(("dq", "dk", "dv"), got, low, exact, strict=True):
        assert x.isfinite().all(), name
        eps = torch.finfo(q.dtype).eps / 2
        # Sums that cancel, as with one key, leave the rounding of the summands.
        floor = 1e-5 * max(y.abs().max() for y in (dout, q, k, v))
        errors = [(z.double() - ref) for z in (x, y)]
        assert errors[0].abs().max() <= (
            2 * errors[1].abs().max() + eps * ref.abs().max() + floor
        ), name
        norms = [z.norm() for z in (*errors, ref)]
        assert norms[0] <= 2 * norms[1] + eps * norms[2] + floor * ref.numel() ** 0.5, name
        cosine = torch.nn.functional.cosine_similarity(x.double().flatten(), ref.flatten(), 0)
        assert norms[2] <= floor * ref.numel() ** 0.5 or cosine > 1 - 1e-3, name


def run(q, k, v, mask, lens=None, dlse=True, **options):
    """Compute, and compare with the truth."""
    generator = torch.Generator("cuda").manual_seed(1)
    dout = torch.randn(q.shape, generator=generator, device="cuda").to(q.dtype)
    shape = (q.shape[0], q.shape[2], q.shape[1])
    dlse = torch.randn(shape, generator=generator, device="cuda") if dlse else None
    got = gradients(q, k, v, mask, dout, dlse, kv_lens=lens, **options)
    check(got, q, k, v, truth(mask, q, k, lens), dout, dlse)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@given(problem=problems(max_length=600, dims=(16, 24, 32, 64, 72, 96, 120, 128, 136, 192, 256)))
def test_equals_float64(problem, dtype):
    """All masks, lengths, granularities, heads and key lengths that the CPU tests know."""
    (q, k, v), dout, dlse = problem.tensors(dtype, "cuda")
    s = problem.setting
    layout = s.mask.layout(s.q_len, s.kv_len, s.block, device="cuda")
    got = gradients(q, k, v, layout, dout, dlse, kv_lens=problem.kv_lens("cuda"))
    check(got, q, k, v, problem.allowed("cuda"), dout, dlse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", range(16, 257, 8))
def test_every_head_dim(dim, dtype):
    q, k, v = tensors(2, 300, 2, dim, 270, 1, dtype)
    run(q, k, v, masks.causal(30) | masks.local(20), torch.tensor([270, 131], device="cuda"))


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("spec", ["full()", "global_tokens(100)", "star(3) | local(64)"])
def test_long_columns_are_split(dim, spec):
    """Columns in parts, put together again: few keys, so that many CTAs share them."""
    q, k, v = tensors(1, 9000, 2, dim, 256)
    run(q, k, v, masks.parse(spec))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 383, 385])
def test_ragged_ends(length):
    mask = masks.local((70, 3))
    run(*tensors(2, length, 2, 64), mask)
    run(*tensors(1, 200, 2, 128, length), masks.full(), dlse=False)
    run(*tensors(1, length, 2, 128, 200), masks.full())


@pytest.mark.parametrize("dim", [72, 96, 104, 128])
@pytest.mark.parametrize("length", [65, 80, 155, 400, 1040])
def test_transposed_dq(dim, length):
    """To head_dim 96; and above with tiles of 80 queries, where these cover less than tiles of 64
    by more than they cost.
    """
    q, k, v = tensors(2, length, 4, dim, 400, 2)
    lens = torch.tensor([400, 333], device="cuda")
    for mask in (masks.full(), masks.causal(400 - length)):
        layout = mask.layout(length, 400, device="cuda")
        if IMPL == "sm90":
            tile = backward_plans(layout, q, k).dkdv.config.tile
            # Queries that read nothing may hold NaN: no tile reaches into a block of them.
            all_read = bool((layout.crow_indices.diff() > 0).all())
            assert tile == (128, 80 if dim > 96 and all_read else 64)
        run(q, k, v, mask, lens)


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_empty_rows_and_columns(dim):
    mask = masks.block_diagonal(64) & ~masks.sinks(300)
    q, k, v = tensors(1, 700, 2, dim)
    dq, dk, dv = run(q, k, v, mask)
    assert not dq[:, :256].any()
    assert not dk[:, :256].any()
    assert not dv[:, :256].any()
    for x in run(q, k, v, ~masks.full()):
        assert not x.any()


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 2, 4])
def test_shared_kv_heads_with_patterns_of_their_own(dim, group):
    mask = masks.per_head([masks.causal(), masks.local(40), masks.sinks(10), masks.butterfly(64)])
    q, k, v = tensors(2, 400, 4, dim, 400, 4 // group)
    run(q, k, v, mask, torch.tensor([400, 77], device="cuda"))


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_keys_outside_are_never_read(dim):
    """NaN in keys and values of tiles that are not stored, and beyond kv_lens, changes nothing."""
    mask = masks.block_local(128, 1) & ~masks.sinks(128)
    q, k, v = tensors(2, 1000, 2, dim)
    lens = torch.tensor([1000, 333], device="cuda")
    dout = torch.randn_like(q)
    clean = gradients(q, k, v, mask, dout, kv_lens=lens)
    k[:, :128] = v[:, :128] = torch.nan
    k[1, 333:] = v[1, 333:] = torch.nan
    poisoned = gradients(q, k, v, mask, dout, kv_lens=lens)
    for a, b in zip(clean, poisoned, strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    assert not poisoned[1][:, :128].any()
    assert not poisoned[2][1, 333:].any()
    assert not poisoned[1][1, 333:].any()


@pytest.mark.parametrize("scale", [0.7, -0.3, 0.0])
def test_scales(scale):
    q, k, v = tensors(1, 300, 2, 64)
    mask = masks.causal()
    dout = torch.randn_like(q)
    got = gradients(q, k, v, mask, dout, softmax_scale=scale)
    check(got, q, k, v, truth(mask, q, k), dout, scale=scale)


def test_gradients_of_any_strides():
    q, k, v = tensors(1, 300, 2, 64)
    mask = masks.causal()
    dout = torch.randn(300, 1, 64, 2, device="cuda").bfloat16().permute(1, 0, 3, 2)
    assert not dout.is_contiguous()
    check(gradients(q, k, v, mask, dout), q, k, v, truth(mask, q, k), dout)
    ones = torch.ones((), device="cuda").bfloat16().expand(q.shape)
    check(gradients(q, k, v, mask, ones), q, k, v, truth(mask, q, k), ones)
    whole = torch.cat([q, k, v], 2).detach().requires_grad_()  # views of one tensor
    out = block_sparse_attention(*whole.chunk(3, 2), mask, impl=IMPL)
    (got,) = torch.autograd.grad(out, whole, dout)
    check(got.chunk(3, 2), q, k, v, truth(mask, q, k), dout)


def test_only_the_lse_is_used():
    q, k, v = (x.requires_grad_() for x in tensors(1, 300, 2, 64))
    _, lse = block_sparse_attention(q, k, v, masks.local(50), impl=IMPL, return_lse=True)
    lse.sum().backward()
    wait()
    assert q.grad.any()
    assert not v.grad.any()


@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_dk_and_dv_are_repeatable(dim):
    """Split columns too; only dQ is summed up in no particular order."""
    q, k, v = tensors(1, 4000, 4, dim, 600, 2)
    mask = masks.global_tokens(50) | masks.random_blocks(0.3, 128, 0)
    dout = torch.randn_like(q)
    first = gradients(q, k, v, mask, dout)
    busy = torch.cuda.Stream()
    for _ in range(100):
        with torch.cuda.stream(busy):
            torch.randn(1 << 22, device="cuda").sort()
        dq, *others = gradients(q, k, v, mask, dout)
        assert all(torch.equal(a, b) for a, b in zip(others, first[1:], strict=True))
        assert (dq - first[0]).float().norm() <= 1e-2 * first[0].float().norm()


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_deterministic_on_request(dim):
    """Repeatable to the bit, 1000 times beside a busy stream."""
    q, k, v = tensors(1, 700, 2, dim)
    mask = masks.local(100) | masks.global_tokens(30)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    out = block_sparse_attention(*leaves, mask, impl=IMPL, deterministic=True)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    check(first, q, k, v, truth(mask, q, k), dout)
    busy, different = torch.cuda.Stream(), torch.zeros((), device="cuda")
    for i in range(1000):
        if i % 20 == 0:
            with torch.cuda.stream(busy):
                torch.randn(1 << 22, device="cuda").sort()
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        for a, b in zip(again, first, strict=True):
            different += (a != b).sum()
    wait()
    assert different == 0


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_deterministic_sums_fit_every_row(dim):
    """Rows whose gradients differ by orders of magnitude, and values that no query sees."""
    q, k, v = tensors(1, 512, 2, dim)
    lens = torch.tensor([400], device="cuda")
    for x in (k, v):
        x[:, :128] = x[:, 400:] = 1e30 if x.dtype == torch.bfloat16 else 6e4
    mask = ~masks.sinks(128)  # as a layout: without these tiles
    dout = torch.randn_like(q) * torch.logspace(-5, 0, 512, device="cuda")[:, None, None]
    dout = dout.to(q.dtype)
    got = gradients(q, k, v, mask, dout, kv_lens=lens, deterministic=True)
    k[:, :128] = v[:, :128] = k[:, 400:] = v[:, 400:] = 0
    allowed = truth(mask, q, k, lens)
    exact = by_dense(*(x.double() for x in (q, k, v)), allowed, dout, None, None)
    for x, ref in zip(got, exact, strict=True):
        error = (x.double() - ref).norm(dim=-1)
        assert (error <= 0.03 * ref.norm(dim=-1) + 1e-30).all()


@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_deterministic_under_contention(dim):
    """Many CTAs that add to the same rows."""
    q, k, v = tensors(1, 4096, 8, dim)
    for mask in (masks.random_blocks(0.2, 128, 0), masks.full()):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = block_sparse_attention(*leaves, mask, impl=IMPL, deterministic=True)
        dout = torch.randn_like(q)
        first, *others = (
            torch.autograd.grad(out, leaves, dout, retain_graph=True) for _ in range(10)
        )
        wait()
        for again in others:
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_deterministic_in_every_shape(dim):
    mask = masks.per_head([masks.causal(), masks.local(40), masks.sinks(10), masks.butterfly(64)])
    q, k, v = tensors(2, 400, 4, dim, 300, 2)
    lens = torch.tensor([300, 77], device="cuda")
    run(q, k, v, mask, lens, deterministic=True)
    mask = masks.block_diagonal(64) & ~masks.sinks(300)
    run(*tensors(1, 700, 2, dim), mask, deterministic=True)
    q, k, v = tensors(1, 256, 2, dim, 9000)
    run(q, k, v, masks.full(), deterministic=True)  # split rows


def test_compiled_training_step():
    mask = masks.local(100) | masks.global_tokens(30)
    q, k, v = tensors(1, 500, 2, 64)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def step(q, k, v):
        return block_sparse_attention(q * 2, k, v, mask, impl=IMPL).float().square().sum()

    torch._dynamo.reset()
    results = [
        torch.autograd.grad(function(*leaves), leaves)
        for function in (step, torch.compile(step, fullgraph=True))
    ]
    wait()
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() <= 0.02 * a.float().norm()


def test_cuda_graph_of_forward_and_backward():
    mask = masks.local(100) | masks.global_tokens(30)
    q, k, v = (x.requires_grad_() for x in tensors(1, 500, 2, 64))
    dout = torch.randn_like(q)

    def step():
        out = block_sparse_attention(q, k, v, mask, impl=IMPL)
        return torch.autograd.grad(out, (q, k, v), dout)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(3):
        for x in got:
            x.zero_()
        with torch.no_grad():
            q.normal_()
        graph.replay()
        wait()
        check(got, q, k, v, truth(mask, q, k), dout)


def test_checkpointing_and_autocast():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.float().requires_grad_() for x in tensors(1, 300, 2, 64))

    def attend(q, k, v):
        q, k, v = (x.bfloat16() for x in (q, k, v))
        return block_sparse_attention(q, k, v, masks.causal(), impl=IMPL)

    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = torch.autograd.grad(attend(q, k, v).float().square().sum(), (q, k, v))
        again = checkpoint(attend, q, k, v, use_reentrant=False).float().square().sum()
        recomputed = torch.autograd.grad(again, (q, k, v))
    for a, b in zip(plain, recomputed, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * a.norm()


def test_memory_is_linear():
    """Gradients, statistics and one float32 accumulator of dQ: nothing of size s^2."""
    mask = masks.block_local(128, 1)
    taken = []
    gc.collect()  # else tensors of other tests may be freed while memory is measured
    for length in (4096, 8192):
        q, k, v = (x.requires_grad_() for x in tensors(1, length, 4, 64))
        out = block_sparse_attention(q, k, v, mask, impl=IMPL)
        dout = torch.randn_like(q)
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # schedules are made
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(out, (q, k, v), dout)
        torch.cuda.synchronize()
        taken.append(torch.cuda.max_memory_allocated() - held)
        del grads
    sizes = 3 * 2 + 4 + 2 * 4 / 64  # bytes of each element of q: gradients, sums, statistics
    assert taken[1] <= 1.05 * 8192 * 4 * 64 * sizes
    assert taken[1] <= 2.05 * taken[0]


SMALL_CASES = """
import torch
from sparse_flash import block_sparse_attention as f, masks
for d, mask, sizes, heads in (
    (64, masks.local(40) | masks.global_tokens(5), (300, 300), 1),
    (128, masks.causal(), (200, 260), 1),
    (64, masks.full(), (3000, 64), 1),
    (192, masks.local(40), (1000, 1000), 8),  # as the next, in work tiles that overlap
    (256, masks.causal(), (100, 150), 1),
    (128, masks.local(40), (2200, 2200), 8),  # 144 items: some CTAs have two
    (64, masks.local(40), (2200, 2200), 8),
):
    shape = (1, sizes[0], 2 * heads, d)
    q = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(1, sizes[1], heads, d, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    lens = torch.tensor([sizes[1] - 30], device="cuda")
    f(q, k, v, mask, kv_lens=lens, impl=IMPL).sum().backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(tool, SMALL_CASES.replace("IMPL", repr(IMPL)))
