"""The forward kernels on a GPU: the float64 truth, the edges, and what must never happen."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash import block_sparse_attention, clear_cache, masks
from tests.kernels.helpers import DTYPES, sanitize, tensors, truth, wait
from tests.oracle import dense_attention
from tests.strategies import problems

pytestmark = pytest.mark.gpu
IMPL = "sm90"


@pytest.fixture(params=["sm90", "sm80"], autouse=True)
def impl(request, monkeypatch):
    """Each test runs for each implementation."""
    monkeypatch.setitem(globals(), "IMPL", request.param)


def attend(q, k, v, mask, **options):
    result = block_sparse_attention(q, k, v, mask, impl=IMPL, return_lse=True, **options)
    wait()
    return result


def check(out, lse, q, k, v, allowed, scale=None):
    """At most 1.5 times as far from float64 as dense attention in the same precision."""
    ref_out, ref_lse = dense_attention(q.double(), k.double(), v.double(), allowed, scale)
    low_out, _ = dense_attention(q, k, v, allowed, scale)
    rounding = torch.finfo(q.dtype).eps / 2 * ref_out.abs().max()  # of the output alone
    errors = [(x.double() - ref_out) for x in (out, low_out)]
    assert out.isfinite().all()
    assert errors[0].abs().max() <= 1.5 * errors[1].abs().max() + rounding
    norms = [x.norm() for x in (*errors, ref_out)]
    assert norms[0] <= 1.5 * norms[1] + torch.finfo(q.dtype).eps / 2 * norms[2]
    cosine = torch.nn.functional.cosine_similarity(out.double().flatten(), ref_out.flatten(), 0)
    assert norms[2] == 0 or cosine > 1 - 1e-4
    torch.testing.assert_close(lse.double(), ref_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@given(problem=problems(max_length=600, dims=(16, 24, 32, 64, 72, 96, 120, 128, 192, 256)))
def test_equals_float64(problem, dtype):
    """All masks, lengths, granularities, heads and key lengths that the CPU tests know."""
    (q, k, v), _, _ = problem.tensors(dtype, "cuda")
    q, k, v = (x.detach() for x in (q, k, v))
    s = problem.setting
    layout = s.mask.layout(s.q_len, s.kv_len, s.block, device="cuda")
    out, lse = attend(q, k, v, layout, kv_lens=problem.kv_lens("cuda"))
    check(out, lse, q, k, v, problem.allowed("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", range(16, 257, 8))
def test_every_head_dim(dim, dtype):
    q, k, v = tensors(2, 300, 2, dim, 270, 1, dtype)
    mask = masks.causal(30) | masks.local(20)
    lens = torch.tensor([270, 131], device="cuda")
    check(*attend(q, k, v, mask, kv_lens=lens), q, k, v, truth(mask, q, k, lens))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("spec", ["full()", "global_tokens(100)", "star(3) | local(64)"])
def test_long_rows_are_split(dim, spec):
    """Rows in parts, put together again: few rows, so that many CTAs share them."""
    mask = masks.parse(spec)
    q, k, v = tensors(1, 256, 2, dim, 20000)
    check(*attend(q, k, v, mask), q, k, v, truth(mask, q, k))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 383, 385])
def test_ragged_ends(length):
    mask = masks.local((70, 3))
    q, k, v = tensors(2, length, 2, 64)
    check(*attend(q, k, v, mask), q, k, v, truth(mask, q, k))
    q, k, v = tensors(1, 200, 2, 128, length)
    check(*attend(q, k, v, masks.full()), q, k, v, truth(masks.full(), q, k))


def test_rows_without_keys():
    mask = masks.block_diagonal(64) & ~masks.sinks(300)
    q, k, v = tensors(1, 700, 2, 64)
    out, lse = attend(q, k, v, mask)
    assert not out[:, :256].any()
    assert (lse[..., :256] == -torch.inf).all()
    check(out, lse, q, k, v, truth(mask, q, k))
    out, lse = attend(q, k, v, ~masks.full())
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_keys_outside_are_never_read():
    """NaN in keys and values of tiles that are not stored, and beyond kv_lens, changes nothing."""
    mask = masks.block_local(128, 1) & ~masks.sinks(128)
    q, k, v = tensors(2, 1000, 2, 64)
    lens = torch.tensor([1000, 333], device="cuda")
    clean = attend(q, k, v, mask, kv_lens=lens)
    k[:, :128] = v[:, :128] = torch.nan
    k[1, 333:] = v[1, 333:] = torch.nan
    poisoned = attend(q, k, v, mask, kv_lens=lens)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))
    assert poisoned[0].isfinite().all()


def test_masked_keys_of_stored_tiles_do_not_matter():
    mask = masks.local(10)
    q, k, v = tensors(1, 500, 2, 64)
    clean = attend(q, k, v, mask)
    k[:, 100] = torch.inf
    poisoned = attend(q, k, v, mask)
    far = [*range(85), *range(115, 500)]
    assert torch.equal(clean[0][:, far], poisoned[0][:, far])


def test_every_output_is_written():
    """With fresh memory full of NaN, nothing of it is left."""
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        for mask in (masks.local(50), masks.block_diagonal(64) & ~masks.sinks(300), ~masks.full()):
            q, k, v = tensors(2, 777, 3, 96)
            out, lse = attend(q, k, v, mask)
            assert not out.isnan().any()
            assert not lse.isnan().any()
        q, k, v = tensors(1, 100, 2, 64, 30000)
        assert attend(q, k, v, masks.full())[0].isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("spec", ["star(3) | local(100)", "full()"])
def test_bitwise_repeatable(spec):
    """1000 launches, beside a stream that keeps changing what else the GPU does."""
    q, k, v = tensors(2, 1500, 4, 64, 9000)
    layout = masks.parse(spec).layout(1500, 9000, device="cuda")
    first = attend(q, k, v, layout)
    other, noise = torch.cuda.Stream(), torch.randn(2000, 2000, device="cuda")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(1000):
        if i % 3 == 0:
            with torch.cuda.stream(other):
                noise @ noise[:, : 1 + 97 * i % 2000]
        again = block_sparse_attention(q, k, v, layout, impl=IMPL, return_lse=True)
        different += sum((a != b).sum() for a, b in zip(first, again, strict=True))
    wait(120)
    assert different.item() == 0


@settings(max_examples=200)
@given(
    st.floats(0, 1),
    st.sampled_from([16, 64, 100, 128]),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.sampled_from([32, 64, 128]),
    st.integers(0, 99),
)
def test_no_launch_hangs(density, block, q_len, kv_len, dim, seed):
    q, k, v = tensors(2, q_len, 2, dim, kv_len, seed=seed)
    lens = torch.randint(0, kv_len + 1, (2,), device="cuda")
    mask = masks.random_blocks(density, block, seed)
    out, _ = attend(q, k, v, mask, kv_lens=lens)
    assert out.isfinite().all()


def test_strided_views_are_taken_as_they_are():
    packed = torch.randn(2, 4, 3, 500, 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))  # (b, h, s, d) underneath
    mask = masks.local(50)
    check(*attend(q, k, v, mask), q, k, v, truth(mask, q, k))
    whole = torch.randn(3, 400, 2, 3 * 64, device="cuda", dtype=torch.bfloat16)
    q, k, v = whole[1:, 3:].chunk(3, dim=3)
    check(*attend(q, k, v, mask), q, k, v, truth(mask, q, k))
    one = torch.randn(1, 300, 64, device="cuda", dtype=torch.bfloat16).unsqueeze(2)
    check(*attend(one, one, one, mask), one, one, one, truth(mask, one, one))
    shared = k[:, :, :1].expand(-1, -1, 2, -1)  # stride 0
    check(*attend(q, shared, shared, mask), q, shared, shared, truth(mask, q, shared))


def test_what_it_cannot_take_is_refused():
    q, k, v = tensors(1, 100, 2, 64)
    with pytest.raises(ValueError, match="bfloat16 and float16, not torch.float32"):
        attend(q.float(), k.float(), v.float(), masks.full())
    with pytest.raises(ValueError, match="multiple of 8 from 16 to 256, got 60"):
        attend(q[..., :60], k[..., :60], v[..., :60], masks.full())
    odd = torch.randn(1, 100, 2, 68, device="cuda", dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ValueError, match=r"k has strides .* use k.contiguous\(\)"):
        attend(q, odd, v, masks.full())
    with pytest.raises(ValueError, match="address"):
        attend(odd.contiguous().flatten()[4:-124].view(1, 99, 2, 64), k, v, masks.full())
    with pytest.raises(ValueError, match="layout is for 50 queries"):
        attend(q, k, v, masks.full().layout(50, device="cuda"))


def test_auto_takes_the_reference_where_no_kernel_can_run(recwarn):
    """And says so at the first call of its form."""
    clear_cache()
    q, _, v = tensors(1, 100, 2, 64)
    odd = torch.randn(1, 100, 2, 68, device="cuda", dtype=torch.bfloat16)[..., :64]
    with pytest.warns(UserWarning, match=r"'reference', which is slow: k has strides"):
        out = block_sparse_attention(q, odd, v, masks.full())
    recwarn.clear()
    again = block_sparse_attention(q, odd, v, masks.full())
    assert not recwarn
    assert torch.equal(out, again)
    low, _ = dense_attention(q, odd, v, truth(masks.full(), q, odd))
    torch.testing.assert_close(out, low, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-3, 3.0])
def test_scales(scale):
    q, k, v = tensors(2, 300, 2, 64)
    mask = masks.causal()
    out, lse = attend(q, k, v, mask, softmax_scale=scale)
    check(out, lse, q, k, v, truth(mask, q, k), scale)


def test_scores_that_grow_and_shrink():
    """Maxima that rise by a little (kept) and by a lot (taken over) from tile to tile."""
    for growth in (0.01, 0.3, 3.0, -3.0):
        q, k, v = tensors(1, 256, 1, 64, 4096)
        steps = torch.arange(4096, device="cuda") // 128
        k = (k * 0.1 + (growth * steps)[None, :, None, None] * 0.05).to(k.dtype)
        check(*attend(q.abs(), k, v, masks.full()), q.abs(), k, v, truth(masks.full(), q, k))


def test_layouts_per_head_and_batch():
    per_head = masks.per_head([masks.causal(), masks.local(9), masks.causal(), ~masks.full()])
    q, k, v = tensors(2, 500, 4, 64, None, 2)
    check(*attend(q, k, v, per_head), q, k, v, truth(per_head, q, k))
    per_batch = masks.per_batch([masks.causal(), masks.butterfly(32)])
    check(*attend(q, k, v, per_batch), q, k, v, truth(per_batch, q, k))


def test_gradients():
    q, k, v = (x.requires_grad_() for x in tensors(2, 300, 4, 64, None, 2))
    mask = masks.local(40) | masks.global_tokens(3)
    out, lse = attend(q, k, v, mask)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    ref = dense_attention(*exact, truth(mask, q, k))
    expected = torch.autograd.grad(ref, exact, (dout.double(), dlse.double()))
    for a, b in zip(grads, expected, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()


class TestAsPartOfTorch:
    """Streams, graphs, compilation, autocast, devices."""

    mask = masks.local(60) | masks.global_tokens(20)

    @pytest.mark.parametrize("what", ["mask", "layout"])
    def test_opcheck(self, what):
        from sparse_flash.masks.traceable import to_operator

        from sparse_flash.operators import attention

        q, k, v = tensors(2, 300, 2, 64)
        mask = self.mask if what == "mask" else self.mask.layout(300, device="cuda")
        options = (None, None, None, to_operator(mask, q), 0.125, False, IMPL)
        torch.library.opcheck(attention, (q, k, v, *options))

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("kind", ["mask", "layout"])
    def test_compile_fullgraph(self, kind, grad):
        q, k, v = (x.requires_grad_(grad) for x in tensors(2, 300, 2, 64))
        mask = self.mask if kind == "mask" else self.mask.layout(300, device="cuda")
        lens = torch.tensor([300, 150], device="cuda")

        def step(q, k, v, lens):
            out, lse = block_sparse_attention(
                q * 2, k, v, mask, kv_lens=lens, return_lse=True, impl=IMPL
            )
            return out.float().sin().sum() + lse.sum()

        torch._dynamo.reset()
        compiled, eager = torch.compile(step, fullgraph=True)(q, k, v, lens), step(q, k, v, lens)
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-1)
        if grad:
            for a, b in zip(
                torch.autograd.grad(compiled, (q, k, v)),
                torch.autograd.grad(eager, (q, k, v)),
                strict=True,
            ):
                assert (a - b).float().norm() < 0.01 * b.float().norm()

    def test_cuda_graph(self):
        """Replays see new numbers in the tensors, the lengths of the keys included."""
        q, k, v = tensors(2, 500, 2, 64, 4000)
        lens = torch.tensor([4000, 4000], device="cuda")
        mask = masks.full()
        attend(q, k, v, mask, kv_lens=lens)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = block_sparse_attention(
                q, k, v, mask, kv_lens=lens, return_lse=True, impl=IMPL
            )
        for seed, given_lens in enumerate(((4000, 100), (0, 2049), (1, 4000))):
            for x, y in zip((q, k, v), tensors(2, 500, 2, 64, 4000, seed=seed), strict=True):
                x.copy_(y)
            lens.copy_(torch.tensor(given_lens))
            graph.replay()
            wait()
            check(out, lse, q, k, v, truth(mask, q, k, lens))

    @pytest.mark.parametrize("length", [700, 9000])
    def test_cuda_graph_follows_an_updated_layout(self, length):
        q, k, v = tensors(1, 256, 2, 64, length)
        layout = masks.full().layout(256, length, block=(64, 64), device="cuda")
        attend(q, k, v, layout)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, impl=IMPL)
        for mask in (masks.block_local(64, 1), masks.sinks(256), ~masks.full(), masks.full()):
            layout.update_(mask.layout(256, length, block=(64, 64), device="cuda"))
            graph.replay()
            wait()
            check(out, lse, q, k, v, truth(mask, q, k))

    def test_capture_of_a_kernel_that_was_never_run_says_what_to_do(self):
        from sparse_flash.kernels.launch import Kernel

        q, k, v = tensors(1, 100, 1, 64)
        layout = masks.full().layout(100, device="cuda")
        kernels = importlib.import_module(f"sparse_flash.kernels.{IMPL}.attention")
        plan = kernels.forward_plan(layout, q, k)
        attend(q, k, v, layout)
        function = plan.kernel.function
        plan.kernel = Kernel(function, plan.config.split_shapes)  # as before any launch
        with (
            pytest.raises(RuntimeError, match="once before the capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            block_sparse_attention(q, k, v, layout, impl=IMPL)

    @pytest.mark.parametrize("grad", [False, True])
    def test_compile_reduce_overhead(self, grad):
        """CUDA graph trees: a warm-up run keeps nothing in their pool."""
        q, k, v = (x.requires_grad_(grad) for x in tensors(1, 500, 2, 64, 9000))
        mask = masks.full()  # split rows

        def step(q, k, v):
            return block_sparse_attention(q * 2, k * 1, v * 1, mask, impl=IMPL)

        torch._dynamo.reset()
        compiled, expected = torch.compile(step, mode="reduce-overhead"), step(q, k, v)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(q, k, v)
            torch.testing.assert_close(out, expected)
            if grad:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        wait()

    def test_streams(self):
        """Launches that overlap do not take each other's work."""
        q, k, v = tensors(2, 3000, 4, 64)
        layout = self.mask.layout(3000, device="cuda")
        expected = attend(q, k, v, layout)
        streams = [torch.cuda.Stream() for _ in range(4)]
        results = []
        for _ in range(20):
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    results.append(
                        block_sparse_attention(q, k, v, layout, return_lse=True, impl=IMPL)
                    )
        torch.cuda.synchronize()
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
    def test_second_device(self):
        q, k, v = (x.to("cuda:1") for x in tensors(2, 300, 2, 64))
        out = block_sparse_attention(q, k, v, self.mask, impl=IMPL)
        same = block_sparse_attention(*(x.to("cuda:0") for x in (q, k, v)), self.mask, impl=IMPL)
        assert torch.equal(out.cpu(), same.cpu())

    def test_autocast(self):
        q, k, v = (x.float() for x in tensors(2, 300, 2, 64))
        with torch.autocast("cuda", torch.bfloat16):
            out = block_sparse_attention(q, k, v, self.mask, impl=IMPL)
        assert out.dtype == torch.bfloat16

    def test_auto_prefers_it(self):
        from sparse_flash.prepare import Options, prepare

        q, k, v = tensors(1, 100, 1, 64)
        inputs = (q, k, v, None, None, None)
        call, implementation = prepare(
            inputs, self.mask, Options(None, False, "auto"), needs_grad=False
        )
        assert implementation.name == "sm90"  # on Hopper
        assert call.layout.device == q.device


SMALL_CASES = """
import torch
from sparse_flash import block_sparse_attention as f, masks
for d, mask, sizes in (
    (64, masks.local(40) | masks.global_tokens(5), (300, 300)),
    (128, masks.causal(), (200, 260)),
    (256, masks.full(), (70, 300)),
    (64, masks.full(), (64, 5000)),
):
    q = torch.randn(1, sizes[0], 2, d, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, sizes[1], 1, d, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    f(q, k, v, mask, kv_lens=torch.tensor([sizes[1] - 30], device="cuda"), impl="IMPL")
# Items of one, two, three and more tiles follow each other on a CTA; tiles of 128 and of 64 keys.
mask = masks.local(40) | masks.block_diagonal(700)
for d in (32, 64, 128):
    q, k, v = (torch.randn(1, 2200, 24, d, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    for width in (128, 64):
        f(q, k, v, mask.layout(2200, block=(128, width), device="cuda"), impl="IMPL")
    f(q[:, :300], k, v, masks.causal().layout(2200, device="cuda"), q_offset=1800, impl="IMPL")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(tool, SMALL_CASES.replace("IMPL", IMPL))
