"""Score terms, sinks, and values of another width: against dense attention in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash import BlockLayout, block_sparse_attention, masks, scores
from sparse_flash.implementations import data_layouts
from tests.oracle import dense_scored_attention
from tests.strategies import problems

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@st.composite
def terms(draw, heads: int, tokens: int, names=("slopes", "table", "image", "softcap", "sinks")):
    """Arguments of the oracle, with gradients, of some terms; and the argument `bias`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def make(*shape):
        x = torch.randn(heads, *shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    chosen = draw(st.sets(st.sampled_from(names), min_size=1))
    given, bias = {}, []
    if "slopes" in chosen:
        given["slopes"] = make()
        bias.append(scores.alibi(given["slopes"]))
    if "table" in chosen:
        given["table"] = make(2 * draw(st.integers(0, 20)) + 1)
        bias.append(scores.relative(given["table"]))
    if "image" in chosen:
        width = draw(st.integers(1, 12))
        height = -(-tokens // width)
        order = draw(st.sampled_from([None, masks.morton(height, width)]))
        given["image"] = make(*(2 * draw(st.integers(0, 4)) + 1 for _ in range(2)))
        bias.append(scores.relative2d(given["image"], height, width, order))
        pixel = torch.arange(height * width) if order is None else order.permutation
        given["pixels"] = (pixel // width, pixel % width)
    if "sinks" in chosen:
        given["sinks"] = make()
    if "softcap" in chosen:
        given["softcap"] = draw(st.sampled_from([0.5, 3.0, 30.0]))
    return given, bias


def on(device, given):
    """Leaves on a device, and whatever else."""
    moved = {}
    for name, x in given.items():
        if isinstance(x, torch.Tensor):
            moved[name] = x.detach().to(device).requires_grad_()
        else:
            moved[name] = tuple(y.to(device) for y in x) if isinstance(x, tuple) else x
    return moved


def arguments(given, bias):
    """Arguments of attention for those of the oracle; terms of the leaves of `given`."""
    made = []
    for term in bias:
        if isinstance(term, scores.bias.Alibi):
            made.append(scores.alibi(given["slopes"]))
        elif isinstance(term, scores.bias.Relative):
            made.append(scores.relative(given["table"]))
        else:
            made.append(scores.relative2d(given["image"], term.height, term.width, term.order))
    total = made[0] if made else None
    for term in made[1:]:
        total = total + term
    return {"bias": total, **{n: given[n] for n in ("sinks", "softcap") if n in given}}


@st.composite
def cases(draw):
    problem = draw(problems(max_length=60))
    tokens = max(problem.setting.q_len, problem.setting.kv_len)
    return problem, *draw(terms(problem.heads, tokens)), draw(st.sampled_from([None, 1, 5, 16]))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15)
@given(case=cases())
def test_equals_dense(case, device):
    problem, given, bias, width = case
    (q, k, v), dout, dlse = problem.tensors(device=device)
    if width is not None:  # of values
        v = torch.randn(*v.shape[:3], width, dtype=v.dtype, device=device, requires_grad=True)
        dout = dout.mean(-1, keepdim=True).expand(*dout.shape[:3], width)
    given = on(device, given)
    setting, lens = problem.setting, problem.kv_lens(device)
    ref, ref_lse = dense_scored_attention(q, k, v, problem.allowed(device), **given)
    layout = setting.mask.layout(setting.q_len, setting.kv_len, setting.block, device=device)
    out, lse = block_sparse_attention(
        q, k, v, layout, kv_lens=lens, return_lse=True, **arguments(given, bias)
    )
    torch.testing.assert_close((out, lse), (ref, ref_lse), rtol=1e-9, atol=1e-9)
    leaves = [q, k, v, *(x for x in given.values() if isinstance(x, torch.Tensor))]
    dlse = dlse.masked_fill(lse == -torch.inf, 0)
    finite = torch.where(ref_lse == -torch.inf, 0, ref_lse)
    got = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    want = torch.autograd.grad((ref, finite), leaves, (dout, dlse))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@settings(max_examples=8)
@given(data=st.data())
def test_positions_count(data):
    """q_offset and kv_starts shift the distances."""
    given, bias = data.draw(terms(2, 40, ("slopes", "table", "softcap", "sinks")))
    b, q_len, kv_len = 2, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    offset = torch.tensor(data.draw(st.lists(st.integers(0, 25), min_size=b, max_size=b)))
    starts = torch.tensor(data.draw(st.lists(st.integers(0, kv_len), min_size=b, max_size=b)))
    mask = masks.local((9, 3))
    make = lambda s: torch.randn(b, s, 2, 4, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, v = make(q_len), make(kv_len), make(kv_len)
    p_q = (torch.arange(q_len) + (offset - starts)[:, None])[..., None]
    p_kv = (torch.arange(kv_len) - starts[:, None])[:, None]
    allowed = (mask(p_q, p_kv) & (p_q >= 0) & (p_kv >= 0))[:, None].expand(-1, 2, -1, -1)
    ref, ref_lse = dense_scored_attention(q, k, v, allowed, positions=(p_q, p_kv), **given)
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        mask.layout(80, 80, (8, 8)),
        q_offset=offset,
        kv_starts=starts,
        return_lse=True,
        **arguments(given, bias),
    )
    torch.testing.assert_close((out, lse), (ref, ref_lse), rtol=1e-9, atol=1e-9)
    leaves = [q, k, v, *(x for x in given.values() if isinstance(x, torch.Tensor))]
    weights = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, weights)
    torch.testing.assert_close(got, torch.autograd.grad(ref, leaves, weights))


def test_gradcheck_with_everything():
    torch.manual_seed(0)
    shapes = ((1, 11, 2, 3), (1, 11, 1, 3), (1, 11, 1, 2), (2,), (2, 5), (2, 3, 3), (2,))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    layout = masks.local((4, 2)).layout(11, block=(4, 4))

    def attend(q, k, v, slopes, table, image, sinks):
        bias = scores.alibi(slopes) + scores.relative(table)
        bias = bias + scores.relative2d(image, 4, 3, masks.raster(4, 3))
        options = {"bias": bias, "softcap": 2.0, "sinks": sinks, "dropout_p": 0.3}
        generator = torch.Generator().manual_seed(3)
        return block_sparse_attention(
            q, k, v, layout, generator=generator, return_lse=True, **options
        )

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


def test_sums_of_equal_terms():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30, 2, 4, dtype=torch.float64) for _ in "qkv")
    near, far = (torch.randn(2, 2 * r + 1, dtype=torch.float64) for r in (3, 8))
    wide = torch.cat([near[:, :1].expand(-1, 5), near, near[:, -1:].expand(-1, 5)], 1)
    slopes = torch.rand(2, dtype=torch.float64)
    total = scores.alibi(slopes) + scores.relative(near) + scores.alibi(slopes)
    got = block_sparse_attention(q, k, v, masks.local(20), bias=total + scores.relative(far))
    want = scores.alibi(2 * slopes) + scores.relative(wide + far)
    torch.testing.assert_close(got, block_sparse_attention(q, k, v, masks.local(20), bias=want))
    a, b = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 7, 3, dtype=torch.float64)
    terms = [scores.relative2d(x, 5, 6) for x in (a, b)]
    got = block_sparse_attention(q, k, v, masks.full(), bias=terms[0] + terms[1])
    alone = block_sparse_attention(q, k, v, masks.full(), bias=terms[0])
    assert not torch.allclose(got, alone)
    other = block_sparse_attention(q, k, v, masks.full(), bias=terms[1] + terms[0])
    torch.testing.assert_close(got, other)


def test_a_row_without_keys_has_its_sink_alone():
    q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in "qkv")
    sinks = torch.tensor([0.5, -torch.inf], requires_grad=True)
    lens = torch.tensor([0])
    out, lse = block_sparse_attention(
        q, k, v, masks.full(), kv_lens=lens, sinks=sinks, return_lse=True
    )
    assert not out.any()
    assert (lse[0, 0] == 0.5).all()
    assert (lse[0, 1] == -torch.inf).all()
    (gradient,) = torch.autograd.grad(lse[:, :1].sum() + out.sum(), sinks)
    assert gradient.tolist() == [8.0, 0.0]


def test_values_are_read_at_every_call():
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in "qkv")
    slopes = torch.zeros(2)
    bias = scores.alibi(slopes)
    plain = block_sparse_attention(q, k, v, masks.full())
    torch.testing.assert_close(block_sparse_attention(q, k, v, masks.full(), bias=bias), plain)
    slopes.fill_(1.0)
    assert not torch.allclose(block_sparse_attention(q, k, v, masks.full(), bias=bias), plain)
    assert bias != scores.alibi(slopes)
    assert bias == bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_terms_of_other_dtypes(dtype):
    q, k, v = (torch.randn(1, 20, 2, 8, dtype=dtype) for _ in "qkv")
    slopes = torch.rand(2, dtype=torch.bfloat16, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    out = block_sparse_attention(q, k, v, masks.full(), bias=scores.alibi(slopes), sinks=sinks)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.float().sum(), (slopes, sinks))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float64]
    assert all(g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("steps", [False, True])
def test_layouts_of_data(monkeypatch, steps):
    """By the layout's copy on the host, or step by step as on a device."""
    torch.manual_seed(0)
    if steps:
        monkeypatch.setattr(data_layouts, "host_has", lambda layout: False)
    q, k, v = (torch.randn(1, 64, 2, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    table = torch.randn(2, 21, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1], [1, 2], [0, 3], [3, 2]])[None, None]
    layout = BlockLayout.from_topk(indices, (16, 16), 64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    bias = scores.relative(table) + scores.alibi(slopes)
    seeded = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    options = {"bias": bias, "softcap": 4.0, "sinks": sinks, "dropout_p": 0.25}
    results = [
        block_sparse_attention(q, k, v, some, generator=seeded(), **options)
        for some in (layout, layout.fixed())
    ]
    torch.testing.assert_close(*results)
    leaves = (q, k, v, table, slopes, sinks)
    gradients = [torch.autograd.grad(x.sin().sum(), leaves) for x in results]
    torch.testing.assert_close(*gradients)


@pytest.mark.gpu
def test_layouts_of_data_on_the_device():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 8, dtype=torch.float64).requires_grad_() for _ in "qkv")
    table, sinks = (torch.randn(2, *s, dtype=torch.float64).requires_grad_() for s in ((21,), ()))
    indices = torch.tensor([[0, 1], [1, 2], [0, 3], [3, 2]])[None, None]
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v, table, sinks)]
        layout = BlockLayout.from_topk(indices.to(device), (16, 16), 64)
        bias = scores.relative(leaves[3])
        out = block_sparse_attention(*leaves[:3], layout, bias=bias, sinks=leaves[4], softcap=4.0)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours)


X, W = torch.randn(1, 6, 4, 8), torch.zeros(4)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"bias": W}, TypeError, "bias must be of sparse_flash.scores"),
        ({"bias": scores.alibi(torch.zeros(3))}, ValueError, r"slopes must be \(4,\).*got \(3,\)"),
        ({"bias": scores.alibi(W.to("meta"))}, ValueError, "slopes is on meta, but q is on cpu"),
        ({"bias": scores.relative(torch.zeros(2, 3))}, ValueError, r"table must be \(4, ...\)"),
        (
            {"bias": scores.relative2d(torch.zeros(4, 3, 3), 1, 5)},
            ValueError,
            "image of 1 x 5 has 5 tokens, but there are 6 queries",
        ),
        (
            {
                "bias": scores.relative2d(torch.zeros(4, 3, 3), 2, 3)
                + scores.relative2d(torch.zeros(4, 3, 3), 3, 2)
            },
            ValueError,
            "different grids",
        ),
        ({"softcap": 0.0}, ValueError, "pass None for no cap"),
        ({"softcap": -1.0}, ValueError, "positive, finite number, got -1.0"),
        ({"softcap": float("inf")}, ValueError, "finite"),
        ({"softcap": torch.tensor(3.0)}, TypeError, "softcap.item"),
        ({"softcap": "30"}, TypeError, "positive number or None, got '30'"),
        ({"softcap": True}, TypeError, "got True"),
        ({"sinks": 3.0}, TypeError, "sinks must be a torch.Tensor"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, TypeError, "floating point"),
        ({"sinks": torch.zeros(1, 4)}, ValueError, r"sinks must be \(4,\)"),
        ({"sinks": torch.zeros(2)}, ValueError, "one entry for each query head"),
        ({"dropout_p": -0.1}, ValueError, r"in \[0, 1\), got -0.1"),
        ({"dropout_p": 1}, ValueError, "got 1"),
        ({"dropout_p": float("nan")}, ValueError, "got nan"),
        ({"dropout_p": 0.001}, ValueError, "nearer to 0 than to a multiple of 1/256"),
        ({"dropout_p": 0.999}, ValueError, "nearer to 1 than"),
        ({"dropout_p": 1 / 512}, ValueError, "a rate in 1/256..255/256"),
        ({"dropout_p": None}, TypeError, "number"),
        ({"dropout_p": torch.tensor(0.1)}, TypeError, "tensor"),
        ({"dropout_p": False}, TypeError, "got False"),
        ({"generator": torch.Generator()}, ValueError, "dropout_p is 0: leave it out"),
        ({"generator": 3, "dropout_p": 0.5}, TypeError, "torch.Generator or None, got 3"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        block_sparse_attention(X, X[:, :, :2], X[:, :, :2], masks.full(), **options)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: scores.alibi([1.0]), TypeError, "slopes must be a torch.Tensor"),
        (lambda: scores.alibi(torch.ones(4).long()), TypeError, "floating point"),
        (lambda: scores.alibi(torch.ones(4, 1)), ValueError, r"slopes must be \(h,\)"),
        (lambda: scores.relative(torch.ones(4, 4)), ValueError, "odd sizes"),
        (lambda: scores.relative(torch.ones(4, 3, 3)), ValueError, r"\(h, 2 r \+ 1\)"),
        (lambda: scores.relative2d(torch.ones(4, 3), 2, 2), ValueError, "2 r_y"),
        (lambda: scores.relative2d(torch.ones(4, 3, 2), 2, 2), ValueError, "odd sizes"),
        (lambda: scores.relative2d(torch.ones(4, 3, 3), 0, 2), ValueError, "height"),
        (lambda: scores.relative2d(torch.ones(4, 3, 3), 2, 2, "morton"), TypeError, "token order"),
        (
            lambda: scores.relative2d(torch.ones(4, 3, 3), 2, 2, masks.morton(2, 3)),
            ValueError,
            "orders 6 tokens, but an image of 2 x 2 has 4",
        ),
        (lambda: scores.alibi_slopes(0), ValueError, "at least 1"),
        (lambda: scores.alibi(torch.ones(4)) + 1.0, TypeError, "unsupported operand"),
    ],
)
def test_refused_terms(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_published_slopes():
    assert scores.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert scores.alibi_slopes(6).tolist() == [2.0**-i for i in (2, 4, 6, 8, 1, 3)]


@pytest.mark.parametrize("offset", [3, torch.tensor([0, 3])])
def test_positions_beyond_the_image_are_refused(offset):
    """They have no row and column: those of the last pixel would be wrong."""
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 6, 2, 8)
    bias = scores.relative2d(torch.randn(2, 3, 3), 2, 3)
    block_sparse_attention(q, k, k, masks.full(), bias=bias, q_offset=2)
    with pytest.raises(ValueError, match="has position 6, but the image has 6 tokens"):
        block_sparse_attention(q, k, k, masks.full(), bias=bias, q_offset=offset)
