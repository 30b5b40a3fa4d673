"""Queries at positions on a GPU: decoding, forward and backward against the float64 truth."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_flash.kernels.positions import row_splits
from sparse_flash.kernels.sm80 import gradients as sm80_gradients
from sparse_flash.kernels.sm90 import positions

from sparse_flash import block_sparse_attention, masks
from tests.kernels.helpers import DTYPES, sanitize, tensors, wait
from tests.kernels.position_problems import position_problems, truth_at
from tests.kernels.test_backward import check as check_gradients
from tests.kernels.test_forward import check
from tests.oracle import dense_attention

pytestmark = pytest.mark.gpu
IMPL = "sm90"
BOTH = pytest.mark.parametrize("impl", ["sm90", "sm80"], indirect=True)
DIMS = [16, 32, 40, 64, 72, 96, 128, 192, 200, 256]


@pytest.fixture(autouse=True)
def impl(request, monkeypatch):
    """The implementation under test; those marked BOTH run for two."""
    monkeypatch.setitem(globals(), "IMPL", getattr(request, "param", "sm90"))


def of_impl():
    """The `positions` module of the implementation under test."""
    return importlib.import_module(f"sparse_flash.kernels.{IMPL}.positions")


def attend(q, k, v, layout, kv_lens=None, q_offset=None, kv_starts=None, scale=None):
    plan = of_impl().forward_plan_at(layout, q, k)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    result = of_impl().forward_at(q, k, v, plan, kv_lens, q_offset, kv_starts, scale)
    wait()
    return result


def gradients(q, k, v, layout, out, lse, dout, dlse, *vectors, deterministic=False):
    plans = backward_plans(layout, q, k, deterministic)
    scale = q.shape[3] ** -0.5
    got = backward_at(dout, dlse, q, k, v, out, lse, plans, *vectors, scale)
    wait()
    return got


def backward_plans(layout, q, k, deterministic=False):
    """The plans of the gradients of the implementation under test."""
    if IMPL == "sm80":
        return sm80_gradients.backward_plan_at(layout, q, k, deterministic)
    return positions.backward_plans_at(layout, q, k, deterministic)


def backward_at(*arguments):
    """The gradients, by the implementation under test."""
    module = sm80_gradients if IMPL == "sm80" else positions
    return module.backward_at(*arguments)[:3]


def vectors(*values):
    """kv_lens, q_offset, kv_starts."""
    return [torch.tensor(x, dtype=torch.int32, device="cuda") for x in values]


@BOTH
class TestDecode:
    """One query per sequence."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("dim", DIMS)
    @pytest.mark.parametrize("length", [1, 127, 128, 4097])
    def test_every_head_dim(self, dim, dtype, length):
        q, k, v = tensors(2, 1, 8, dim, length, 2, dtype)
        for mask in (masks.full(), masks.custom(lambda q, kv: (q + kv) % 3 != 1)):
            out, lse = attend(q, k, v, mask.layout(1, length, device="cuda"))
            allowed = mask(torch.zeros(1, 1, dtype=torch.int64), torch.arange(length))
            check(out, lse, q, k, v, allowed.expand(2, 8, 1, length).cuda())

    @pytest.mark.parametrize("batch", [1, 5, 32])
    @pytest.mark.parametrize("dim", [64, 128])
    def test_64k_keys(self, batch, dim):
        heads, kv_heads = (32, 8) if batch == 1 else (4, 1)
        q, k, v = tensors(batch, 1, heads, dim, 65536, kv_heads)
        layout = masks.full().layout(1, 65536, device="cuda")
        lens = torch.randint(1, 65537, (batch,), device="cuda", dtype=torch.int32)
        lens[0] = 65536
        k, v = (x.masked_fill(~_within(lens, 65536), torch.nan) for x in (k, v))
        out, lse = attend(q, k, v, layout, lens)
        clean = [x.nan_to_num() for x in (k, v)]
        allowed = (torch.arange(65536, device="cuda") < lens[:, None])[:, None, None]
        check(out, lse, q, *clean, allowed.expand(batch, heads, 1, -1))

    @pytest.mark.parametrize("dim", [64, 128, 256])
    def test_a_growing_cache(self, dim):
        """One layout for all steps; the window's edges move through its tiles."""
        mask = masks.local((300, 0)) | masks.sinks(4)
        layout = mask.layout(1024, 1024, device="cuda")
        for position in (0, 1, 63, 64, 127, 128, 129, 300, 383, 500, 640, 1023):
            q, k, v = tensors(2, 1, 4, dim, position + 1, 2, seed=position)
            out, lse = attend(q, k, v, layout, None, position)
            given = vectors([position + 1] * 2, [position] * 2, [0, 0])
            check(out, lse, q, k, v, truth_at(mask, 1, position + 1, 4, *given))
        whole = tensors(2, 1, 4, dim, 1024, 2)
        given = vectors([100, 1024], [99, 1023], [0, 0])  # a cache of the full length
        out, lse = attend(*whole, layout, *given)
        check(out, lse, *whole, truth_at(mask, 1, 1024, 4, *given))

    @pytest.mark.parametrize("dtype", DTYPES)
    @settings(max_examples=100)
    @given(problem=position_problems(st.just(1), st.integers(1, 3000)))
    def test_equals_float64(self, dtype, problem):
        q, k, v, *_ = problem.tensors(dtype)
        given_vectors = problem.vectors("cuda")
        out, lse = attend(q, *problem.poison(k, v), problem.layout("cuda"), *given_vectors)
        check(out, lse, q, k, v, problem.allowed("cuda"))

    def test_many_heads_of_one_key_head(self):
        for heads in (64, 65, 96, 128):
            q, k, v = tensors(1, 1, heads, 64, 700, 1)
            out, lse = attend(q, k, v, masks.full().layout(1, 700, device="cuda"))
            allowed = torch.ones(1, heads, 1, 700, dtype=torch.bool, device="cuda")
            check(out, lse, q, k, v, allowed)

    @pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
    def test_scales(self, scale):
        q, k, v = tensors(2, 1, 4, 64, 999, 2)
        out, lse = attend(q, k, v, masks.full().layout(1, 999, device="cuda"), scale=scale)
        allowed = torch.ones(2, 4, 1, 999, dtype=torch.bool, device="cuda")
        check(out, lse, q, k, v, allowed, scale)


def _within(lens, length):
    return (torch.arange(length, device="cuda") < lens[:, None])[..., None, None]


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=150)
@given(problem=position_problems(st.integers(1, 500), st.integers(1, 700)))
def test_forward_equals_float64(dtype, problem):
    q, k, v, *_ = problem.tensors(dtype)
    given_vectors = problem.vectors("cuda")
    out, lse = attend(q, *problem.poison(k, v), problem.layout("cuda"), *given_vectors)
    check(out, lse, q, k, v, problem.allowed("cuda"))


@BOTH
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=100)
@given(problem=position_problems(st.integers(1, 500), st.integers(1, 700)))
def test_gradients_equal_float64(dtype, deterministic, problem):
    q, k, v, dout, dlse = problem.tensors(dtype)
    layout, given_vectors = problem.layout("cuda"), problem.vectors("cuda")
    poisoned = problem.poison(k, v)
    out, lse = attend(q, *poisoned, layout, *given_vectors)
    arguments = (q, *poisoned, layout, out, lse, dout, dlse, *given_vectors)
    got = gradients(*arguments, deterministic=deterministic)
    allowed = problem.allowed("cuda")
    check_gradients(got, q, k, v, allowed, dout, dlse)
    unseen = ~allowed.any((1, 2))  # keys
    for x in got[1:]:
        assert not x[unseen].any()
    blind = ~allowed.any(3).transpose(1, 2)  # queries
    assert not got[0][blind].any()


@BOTH
@pytest.mark.parametrize("dim", DIMS)
def test_every_head_dim_in_both_passes(dim):
    mask = masks.causal() & ~masks.sinks(3)
    q, k, v = tensors(2, 200, 4, dim, 333, 2)
    dout, dlse = torch.randn_like(q), torch.randn(2, 4, 200, device="cuda")
    given_vectors = vectors([333, 290], [133, 77], [5, 70])
    layout = mask.layout(512, 512, device="cuda")
    allowed = truth_at(mask, 200, 333, 4, *given_vectors)
    out, lse = attend(q, k, v, layout, *given_vectors)
    check(out, lse, q, k, v, allowed)
    got = gradients(q, k, v, layout, out, lse, dout, dlse, *given_vectors)
    check_gradients(got, q, k, v, allowed, dout, dlse)


@BOTH
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("s", [2, 16, 130])
def test_long_rows_are_split(dim, s):
    """A chunk of few queries behind many keys."""
    q, k, v = tensors(1, s, 4, dim, 20000, 2)
    mask = masks.local((9000, 0))
    layout = mask.layout(20480, 20480, device="cuda")
    given_vectors = vectors([20000], [20000 - s - 77], [31])
    plan = of_impl().forward_plan_at(layout, q, k)
    assert row_splits(plan, q, k) > 1
    out, lse = attend(q, k, v, layout, *given_vectors)
    check(out, lse, q, k, v, truth_at(mask, s, 20000, 4, *given_vectors))


@BOTH
@pytest.mark.parametrize("s", [1, 100])
@pytest.mark.parametrize("dim", [64, 256])
def test_positions_that_the_layout_does_not_have(dim, s):
    """NaN, and in no other entry of the batch."""
    q, k, v = tensors(4, s, 2, dim, 300)
    layout = masks.causal().layout(250, 300, device="cuda")
    given_vectors = vectors([300] * 4, [250 - s, 250, 5000, 10], [0, 0, 0, -1])
    out, lse = attend(q, k, v, layout, *given_vectors)
    known = torch.tensor([True, False, False, False], device="cuda")
    assert torch.equal(out.isnan().flatten(1).all(1), ~known)
    assert torch.equal(lse.isnan().flatten(1).all(1), ~known)
    assert out[0].isfinite().all()
    if s > 1:
        dout = torch.randn_like(q)
        given_vectors = vectors([300] * 4, [250 - s, 250 - s + 1, 5000, 10], [0, 0, 0, 0])
        out, lse = attend(q, k, v, layout, *given_vectors)
        dq, *_ = gradients(q, k, v, layout, out, lse, dout, None, *given_vectors)
        assert dq[[0, 3]].isfinite().all()
        assert torch.equal(dq.isnan().all(-1), out.isnan().all(-1))


@BOTH
def test_offsets_are_read_at_each_replay():
    """A CUDA graph of a decoding step, whose offsets grow on the device."""
    mask = masks.local((70, 0))
    layout = mask.layout(512, 512, device="cuda")
    q, k, v = tensors(2, 1, 4, 64, 512, 2)
    given_vectors = vectors([1, 1], [0, 0], [0, 0])
    attend(q, k, v, layout, *given_vectors)
    plan = of_impl().forward_plan_at(layout, q, k)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = of_impl().forward_at(q, k, v, plan, *given_vectors, 0.125)
        for x in given_vectors[:2]:
            x.add_(37)
    for step in range(10):
        at = vectors([1 + 37 * step] * 2, [37 * step] * 2, [0, 0])
        graph.replay()
        wait()
        check(out, lse, q, k, v, truth_at(mask, 1, 512, 4, *at))


@BOTH
def test_no_step_waits_for_the_gpu():
    layout = masks.causal().layout(2048, 2048, device="cuda")
    for s in (1, 200):
        q, k, v = tensors(2, s, 4, 64, 2048, 2)
        given_vectors = vectors([2048, 900], [1700, 700], [0, 3])
        dout = torch.randn_like(q)
        out, lse = attend(q, k, v, layout, *given_vectors)
        gradients(q, k, v, layout, out, lse, dout, None, *given_vectors)
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan = of_impl().forward_plan_at(layout, q, k)
            of_impl().forward_at(q, k, v, plan, *given_vectors, 0.125)
            plans = backward_plans(layout, q, k)
            backward_at(dout, None, q, k, v, out, lse, plans, *given_vectors, 0.125)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@BOTH
@pytest.mark.parametrize("s", [1, 40])
def test_bitwise_repeatable(s):
    q, k, v = tensors(2, s, 8, 128, 9000, 2)
    layout = masks.full().layout(9000, 9000, device="cuda")
    first = attend(q, k, v, layout, None, 8000)
    plan = of_impl().forward_plan_at(layout, q, k)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = of_impl().forward_at(q, k, v, plan, None, 8000, None, 128**-0.5)
        different += sum((a != b).sum() for a, b in zip(first, again, strict=True))
    wait(120)
    assert different.item() == 0


@BOTH
def test_deterministic_gradients_are_repeatable():
    q, k, v = tensors(2, 700, 4, 64, 900, 2)
    layout = masks.causal().layout(1024, 1024, device="cuda")
    given_vectors = vectors([900, 850], [200, 131], [0, 17])
    dout = torch.randn_like(q)
    out, lse = attend(q, k, v, layout, *given_vectors)
    arguments = (q, k, v, layout, out, lse, dout, None, *given_vectors)
    first = gradients(*arguments, deterministic=True)
    for _ in range(100):
        again = gradients(*arguments, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@BOTH
def test_more_than_65535_sequences():
    """More than a grid's second and third dimension have: in both passes, with and without."""
    q, k, v = tensors(70000, 2, 1, 16, 3)
    dout = torch.randn_like(q)
    layout = masks.full().layout(2, 3, device="cuda")
    zeros = torch.zeros(70000, dtype=torch.int32, device="cuda")
    lens = zeros + 3
    out, lse = attend(q, k, v, layout, lens, zeros, zeros)
    got = gradients(q, k, v, layout, out, lse, dout, None, lens, zeros, zeros)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    allowed = torch.ones(70000, 1, 2, 3, dtype=torch.bool, device="cuda")
    ref, _ = dense_attention(*leaves, allowed)
    torch.testing.assert_close(out.double(), ref, atol=2e-2, rtol=2e-2)
    expected = torch.autograd.grad(ref, leaves, dout.double())
    low = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = block_sparse_attention(*low, masks.full(), impl=IMPL)
    for results in (got, torch.autograd.grad(plain, low, dout)):
        for a, b in zip(results, expected, strict=True):
            assert (a.double() - b).norm() <= 0.02 * b.norm()
            assert (a[69000:].double() - b[69000:]).norm() <= 0.02 * b[69000:].norm()


SMALL_CASES = """
import torch
from sparse_flash import block_sparse_attention as f, masks
for d in (64, 128, 256):
    for s in (1, 70):
        layout = masks.local((90, 0)).layout(400, 400, device="cuda")
        q, do = (torch.randn(2, s, 4, d, device="cuda", dtype=torch.bfloat16) for _ in "qo")
        k, v = (torch.randn(2, 300, 2, d, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        given = [torch.tensor(x, dtype=torch.int32, device="cuda")
                 for x in ([300, 250], [200, 77], [0, 30])]
        kv_lens, q_offset, kv_starts = given
        for x in (q, k, v):
            x.requires_grad_()
        options = {"kv_lens": kv_lens, "q_offset": q_offset, "kv_starts": kv_starts}
        f(q, k, v, layout, impl="IMPL", **options).backward(do)
torch.cuda.synchronize()
"""


@BOTH
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitize(tool, SMALL_CASES.replace("IMPL", IMPL))
