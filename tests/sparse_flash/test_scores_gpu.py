"""Score terms in the kernels: against float64, with the bars of calls without them."""

from __future__ import annotations

import functools
import importlib
import operator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash import block_sparse_attention, masks, scores
from sparse_flash.scores.arguments import draw_seed
from tests.oracle import dense_scored_attention
from tests.strategies import problems

pytestmark = pytest.mark.gpu
TERMS = ["softcap", "slopes", "table", "sinks", "dropout", "image"]
GRADED = ("sinks", "slopes", "table", "image")  # terms with gradients
CHOSEN = {}  # options of all calls
MISSING = {"sm90": ("image",), "sm80": ()}  # terms that an implementation does not compute


@pytest.fixture(autouse=True, scope="module", params=["sm90", "sm80"])
def implementation(request):
    """All tests run with the kernels of each architecture."""
    CHOSEN["impl"] = request.param
    return request.param


def largest(error):
    return error.double().abs().nan_to_num(posinf=0).max().item() if error.numel() else 0.0


class Dropout(NamedTuple):
    """Rate, and seed of a generator."""

    p: float
    seed: int

    def generator(self):
        return torch.Generator("cuda").manual_seed(self.seed)

    def keep(self, q, k):
        """Factors of the probabilities, from the seed that a call draws."""
        drawn = draw_seed(q, self.generator())
        (b, q_len, h, _), kv_len = q.shape, k.shape[1]
        pair = torch.arange(b * h, device="cuda").view(b, h, 1, 1)
        i, j = (torch.arange(n, device="cuda") for n in (q_len, kv_len))
        dropped = round(256 * self.p)
        kept = scores.keep_mask(drawn, dropped, pair, i[:, None], j)
        return kept.double() * (256 / (256 - dropped))


class Grid(NamedTuple):
    """An image of more tokens than any call has, and the order of its tokens."""

    height: int
    width: int
    order: masks.TokenOrder | None

    def pixels(self):
        """Row and column of each token."""
        pixel = torch.arange(self.height * self.width)
        pixel = (pixel if self.order is None else self.order.permutation).cuda()
        return pixel // self.width, pixel % self.width


GRIDS = [
    Grid(64, 64, masks.morton(64, 64)),
    Grid(50, 82, None),
    Grid(41, 100, masks.hilbert(41, 100)),
]


def draw_terms(heads, names, seed, sharp=1.0):
    torch.manual_seed(seed)
    names, terms = [n for n in names if n not in MISSING[CHOSEN["impl"]]], {}
    if "softcap" in names:
        terms["softcap"] = 5.0
    if "slopes" in names:
        terms["slopes"] = torch.rand(heads, device="cuda") * 0.2
        terms["slopes"][0] *= -0.1
    if "sinks" in names:
        terms["sinks"] = sharp * torch.randn(heads, device="cuda")
    if "table" in names:
        r = (2, 40, 700)[seed % 3]
        terms["table"] = torch.randn(heads, 2 * r + 1, device="cuda")
    if "image" in names:
        r, terms["grid"] = ((2, 3), (63, 90), (7, 30))[seed % 3], GRIDS[seed % 3]
        terms["image"] = torch.randn(heads, 2 * r[0] + 1, 2 * r[1] + 1, device="cuda")
    if "dropout" in names:
        terms["dropout"] = Dropout((0.1, 0.5, 0.9)[seed % 3], seed)
    return terms


def call(q, k, v, mask, terms, **options):
    biases = [scores.alibi(terms["slopes"])] if "slopes" in terms else []
    if "table" in terms:
        biases.append(scores.relative(terms["table"]))
    if "image" in terms:
        biases.append(scores.relative2d(terms["image"], *terms["grid"]))
    bias = functools.reduce(operator.add, biases) if biases else None
    options |= {n: terms[n] for n in ("softcap", "sinks") if n in terms}
    if "dropout" in terms:
        options |= {"dropout_p": terms["dropout"].p, "generator": terms["dropout"].generator()}
    return block_sparse_attention(q, k, v, mask, bias=bias, **CHOSEN, **options)


def check(q, k, v, dout, dlse, allowed, mask, terms, lens=None, grads=(), **options):
    """Errors at most 1.5 times, gradients twice, those of dense attention in the same precision."""
    dtype = q.dtype
    leaves = [x.detach().requires_grad_(bool(grads)) for x in (q, k, v)]
    terms = {n: x.detach().clone() if torch.is_tensor(x) else x for n, x in terms.items()}
    named = [terms[n].requires_grad_() for n in grads if n in terms]
    out, lse = call(*leaves, mask, terms, kv_lens=lens, return_lse=True, **options)

    dropout, grid = terms.pop("dropout", None), terms.pop("grid", None)
    pixels = None if grid is None else grid.pixels()
    keep = None if dropout is None else dropout.keep(q, k)

    def dense(dtype):
        wide = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        given = {
            n: x.detach().to(dtype).requires_grad_() if torch.is_tensor(x) else x
            for n, x in terms.items()
        }
        factors = None if keep is None else keep.to(dtype)
        ref, ref_lse = dense_scored_attention(*wide, allowed, keep=factors, pixels=pixels, **given)
        finite = torch.where(ref_lse == -torch.inf, 0, ref_lse)
        wanted = [*wide, *(given[n] for n in grads if n in given)]
        found = ()
        if grads:
            found = torch.autograd.grad(
                (ref, finite), wanted, (dout.to(dtype), dlse.to(dtype)), allow_unused=True
            )
        return ref.detach(), ref_lse.detach(), found

    ref, ref_lse, want = dense(torch.float64)
    low, _, low_grads = dense(dtype)
    floor = 2e-3 if dtype == torch.bfloat16 else 3e-4
    bar = 1.5 * largest(low.double() - ref) + floor
    assert largest(out.double() - ref) <= bar, ("out", largest(out.double() - ref), bar)
    finite = ref_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, finite)
    softcap = terms.get("softcap") or 0
    assert largest((lse - ref_lse)[finite]) <= 1e-4 + 2**-11 * softcap
    if grads:
        got = torch.autograd.grad((out, lse), [*leaves, *named], (dout, dlse.float()))
        names = [*"qkv", *(n for n in grads if n in terms)]
        for name, a, b, c in zip(names, got, want, low_grads, strict=True):
            size = largest(b)
            bar = 2 * largest(c.double() - b) + (1e-2 if dtype == torch.bfloat16 else 2e-3) * size
            error = largest(a.double() - b)
            assert error <= bar + floor, (name, error, bar)


@st.composite
def cases(draw, dims):
    problem = draw(problems(max_length=300, dims=dims))
    names = draw(st.sets(st.sampled_from(TERMS), min_size=1))
    return problem, sorted(names), draw(st.sampled_from([torch.bfloat16, torch.float16]))


def of_problem(problem, dtype, width=None):
    """Tensors, allowed elements, layout and lengths; with values of another head_dim on request."""
    (q, k, v), dout, dlse = problem.tensors(dtype, "cuda")
    if width is not None:
        torch.manual_seed(problem.seed)
        v = torch.randn(*v.shape[:3], width, device="cuda").to(dtype)
        dout = torch.randn(*dout.shape[:3], width, device="cuda").to(dtype)
    s = problem.setting
    layout = s.mask.layout(s.q_len, s.kv_len, device="cuda")
    dlse = dlse.float()
    return (q, k, v, dout, dlse, problem.allowed("cuda"), layout), problem.kv_lens("cuda")


@settings(max_examples=20)
@given(case=cases((16, 64, 128, 192)))
def test_forward(case):
    problem, names, dtype = case
    tensors, lens = of_problem(problem, dtype)
    check(*tensors, draw_terms(problem.heads, names, problem.seed), lens)


@settings(max_examples=30)
@given(case=cases((16, 64, 96, 128)), deterministic=st.booleans())
def test_gradients(case, deterministic):
    problem, names, dtype = case
    tensors, lens = of_problem(problem, dtype)
    terms = draw_terms(problem.heads, names, problem.seed)
    check(*tensors, terms, lens, grads=GRADED, deterministic=deterministic)


@settings(max_examples=15)
@given(
    case=cases((16, 64, 128)),
    width=st.sampled_from([16, 40, 64, 128, 192]),
    plain=st.booleans(),
    deterministic=st.booleans(),
)
def test_values_of_another_width(case, width, plain, deterministic):
    problem, names, dtype = case
    if problem.setting.q_len == 1:
        return
    tensors, lens = of_problem(problem, dtype, width)
    names = [] if plain else ["sinks"] if width > 128 else names
    terms = draw_terms(problem.heads, names, problem.seed)
    check(*tensors, terms, lens, grads=("sinks",), deterministic=deterministic)


@pytest.mark.parametrize(("dim", "width"), [(192, 128), (64, 128)])
def test_published_widths(dim, width):
    """DeepSeek-V3's 192 and 128, on rows and columns that are split."""
    torch.manual_seed(0)
    s = 2048
    make = lambda d: torch.randn(1, s, 2, d, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v, dout = make(dim), make(dim), make(width), make(width)
    mask = masks.local(64) | masks.global_tokens(64)
    allowed = mask.layout(s, device="cuda").to_dense().expand(1, 2, -1, -1)
    dlse = torch.zeros(1, 2, s, device="cuda")
    check(q, k, v, dout, dlse, allowed, mask, {}, grads=("sinks",))


@pytest.mark.parametrize(
    "names",
    [
        *(["softcap", "slopes", "sinks"], ["dropout"], ["slopes"], ["table"], ["image"]),
        *(TERMS[1:], TERMS),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_gradients_of_long_rows(dim, deterministic, names):
    """Split rows and columns, grouped heads; twice the same where asked."""
    torch.manual_seed(0)
    s = 1536
    q, dout = (torch.randn(1, s, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in "qd")
    k, v = (torch.randn(1, s, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    mask = masks.local(64) | masks.global_tokens(64)
    allowed = mask.layout(s, device="cuda").to_dense().expand(1, 4, -1, -1)
    dlse = torch.randn(1, 4, s, device="cuda")
    terms = draw_terms(4, names, 1)
    if "slopes" in terms:
        terms["slopes"] *= 0.1
    given = (q, k, v, dout, dlse, allowed, mask)
    check(*given, terms, grads=GRADED, deterministic=deterministic)
    if deterministic:
        runs = []
        for _ in range(2):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            named = {n: terms[n].detach().requires_grad_() for n in GRADED if n in terms}
            leaves += named.values()
            out = call(*leaves[:3], mask, terms | named, deterministic=True)
            runs.append(torch.autograd.grad(out, leaves, dout))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "names",
    [["sinks"], ["softcap"], ["slopes"], ["table"], ["image"], ["dropout"], TERMS],
    ids="+".join,
)
@pytest.mark.parametrize("dim", [64, 128])
def test_split_rows(names, dim):
    """A few long rows among short ones: their splits are combined, and have one sink."""
    torch.manual_seed(0)
    s = 4096
    q, k, v = (torch.randn(1, s, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    mask = masks.local(64) | masks.global_tokens(64)
    terms = draw_terms(2, names, 1, sharp=3.0)
    if "slopes" in terms:
        terms["slopes"] *= 0.01
    allowed = mask.layout(s, device="cuda").to_dense().expand(1, 2, -1, -1)
    dlse = torch.zeros(1, 2, s, device="cuda")
    check(q, k, v, q, dlse, allowed, mask, terms)


THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=THOROUGH)], ids=str
)
@pytest.mark.parametrize("dim", [32, pytest.param(192, marks=THOROUGH), 256])
@pytest.mark.parametrize("names", [["table", "image"], TERMS], ids="+".join)
def test_gradients_of_all_head_dims(implementation, names, dim, dtype):
    """Masks of each head, grouped heads, keys of other lengths, rows without keys."""
    if implementation == "sm90":
        pytest.skip("its kernels compute gradients with biases up to head_dim 128")
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 300, 4, dim, device="cuda", dtype=dtype) for _ in "qd")
    k, v = (torch.randn(2, 330, 2, dim, device="cuda", dtype=dtype) for _ in "kv")
    of_heads = [masks.causal(), masks.local(20), masks.butterfly(16), masks.local((0, 9)).shift(40)]
    mask, lens = masks.per_head(of_heads), torch.tensor([330, 111], device="cuda")
    layout = mask.layout(300, 330, device="cuda")
    valid = torch.arange(330, device="cuda") < lens[:, None, None, None]
    allowed = layout.to_dense().expand(2, 4, -1, -1) & valid
    dlse = torch.randn(2, 4, 300, device="cuda")
    for deterministic in (False, True):
        terms = draw_terms(4, names, 1 + deterministic)
        given = (q, k, v, dout, dlse, allowed, layout, terms, lens)
        check(*given, grads=GRADED, deterministic=deterministic)


def test_other_values_compile_nothing(implementation):
    attention = importlib.import_module(f"sparse_flash.kernels.{implementation}.attention")
    q, k, v = (torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    known = None
    for i in range(3):
        terms = draw_terms(2, TERMS, i) | {"softcap": 3.0 + i}
        call(q, k, v, masks.local(20 + i), terms)
        known = len(attention._kernels) if known is None else known
    assert len(attention._kernels) == known


@pytest.mark.parametrize(
    "names",
    [["sinks"], ["softcap", "slopes"], ["slopes", "table"], ["image"], TERMS[:4] + TERMS[5:]],
    ids="+".join,
)
@pytest.mark.parametrize("q_len", [1, 70])
@pytest.mark.parametrize("dim", [64, 128])
def test_positions(names, q_len, dim):
    """Queries at the end of a cache with padding on the left, in splits of a long row too."""
    torch.manual_seed(0)
    kv_len, offsets, starts = 2000, [1700, 900], [300, 0]
    q = torch.randn(2, q_len, 4, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, kv_len, 2, dim, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    offset, start = (torch.tensor(x, device="cuda") for x in (offsets, starts))
    p_q = torch.arange(q_len, device="cuda")[:, None] + (offset - start)[:, None, None]
    p_kv = torch.arange(kv_len, device="cuda")[None] - start[:, None, None]
    mask = masks.causal()
    allowed = ((p_kv <= p_q) & (p_kv >= 0))[:, None].expand(-1, 4, -1, -1)
    terms = draw_terms(4, names, 1, sharp=3.0)
    if "slopes" in terms:
        terms["slopes"] *= 0.02
    with torch.no_grad():
        out, lse = call(q, k, v, mask, terms, q_offset=offset, kv_starts=start, return_lse=True)
    wide = {n: x.double() if torch.is_tensor(x) else x for n, x in terms.items()}
    grid = wide.pop("grid", None)
    wide["pixels"] = None if grid is None else grid.pixels()
    given = (q.double(), k.double(), v.double(), allowed)
    ref, ref_lse = dense_scored_attention(*given, positions=(p_q, p_kv), **wide)
    assert largest(out.double() - ref) < 0.02 * ref.abs().max() + 2e-3
    assert largest(lse - ref_lse) < 1e-3 + 2**-11 * terms.get("softcap", 0)
