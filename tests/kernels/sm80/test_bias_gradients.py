"""Gradients of slopes and tables: all but the device code, whose launches are emulated."""

from __future__ import annotations

import functools
import math
import operator

import pytest
import torch
from sparse_flash.kernels.score_arguments import ScoreArguments
from sparse_flash.kernels.sm80 import attention, bias_gradients, gradients, positions
from sparse_flash.kernels.sm80.bias_config import BiasGradientsConfig
from sparse_flash.kernels.sm80.config import ForwardConfig

from sparse_flash import block_sparse_attention, clear_cache, masks, scores
from sparse_flash.scores.arguments import draw_seed
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.sm80.test_plan import A100
from tests.kernels.sm80.test_scored import launched  # noqa: F401 a fixture
from tests.oracle import dense_scored_attention

ScoreTerms = pytest.importorskip("sparse_flash.kernels.score_terms").ScoreTerms
LOG2_E = math.log2(math.e)
IMAGE, Q_LEN, KV_LEN, HEADS = (12, 25), 200, 300, 4


class Emulated:
    """The results of a kernel, from the arguments of its launch; dense, in float64."""

    def __init__(self, call):
        self.call, self.config, self.terms = call, call["config"], ScoreTerms(*call["terms"])
        self.q, self.k, self.v = (call[n].double() for n in "qkv")
        b, self.transposed = len(self.q), not isinstance(self.config, ForwardConfig)
        zeros = torch.zeros(b, dtype=torch.int64)
        self.shift, starts = zeros, zeros
        if self.config.offsets:
            starts = call["kv_starts"].long()
            if self.transposed:
                self.shift = call["q_pad"].long() + call["q_tops"]
            else:
                self.shift = call["q_offset"] - starts + call["q_base"]
        self.p_q = torch.arange(self.q.shape[1])[:, None] + self.shift[:, None, None]
        self.p_k = torch.arange(self.k.shape[1])[None] - starts[:, None, None]
        lens = call["kv_lens"].clamp(max=self.k.shape[1]) - starts
        self.allowed = (self.p_k >= 0) & (self.p_k < lens[:, None, None]) & (self.p_k <= self.p_q)

    def index(self, length):
        """Of the values by distance."""
        apart = self.p_q - self.p_k if self.transposed else self.p_k - self.p_q
        return (self.terms.bias_rows + apart).clamp(0, length - 1)

    def image_index(self, length):
        numbers = self.terms.image_numbers
        a, b = (numbers[p.clamp(0, len(numbers) - 1)] for p in (self.p_q, self.p_k))
        return a - b + length // 2

    def logits(self):
        """Natural ones, (b, h, q, k)."""
        terms, unit = self.terms, self.call["scale_log2"] / LOG2_E
        k = self.k.repeat_interleave(HEADS // self.k.shape[2], 2)
        s = torch.einsum("bqhd,bkhd->bhqk", self.q, k)
        if terms.cap_scale is not None:
            s = (s * terms.cap_scale).tanh()
        if terms.slopes is not None:
            apart = (self.p_q - self.p_k).abs()[:, None]
            s = s + (terms.slopes * terms.slope_scale)[:, None, None] * apart
        if terms.bias is not None:
            index = self.index(terms.bias.shape[2])
            s = s + terms.bias[:, 0][:, index].transpose(0, 1)
        if terms.image is not None:
            index = self.image_index(terms.image.shape[1])
            s = s + terms.image[:, index].transpose(0, 1)
        return (s * unit).masked_fill(~self.allowed[:, None], -torch.inf)

    def keep(self):
        if self.terms.seed is None:
            return torch.ones(())
        (b, _, h, _), seed = self.q.shape, self.terms.seed.view(torch.int64)
        pair = torch.arange(b * h).view(b, h, 1, 1)
        places = (pair, self.p_q[:, None], self.p_k[:, None])
        return scores.keep_mask(seed, self.terms.dropped, *places) * self.terms.keep_scale

    def forward(self):
        logits = self.logits()
        lse = logits.logsumexp(-1)
        p = (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() * self.keep()
        v = self.v.repeat_interleave(HEADS // self.v.shape[2], 2)
        self.call["out"].copy_(torch.einsum("bhqk,bkhd->bqhd", p, v))
        self.call["lse"].copy_(lse)

    def sums(self):
        """Add dS to the sums of the launch."""
        call, v = self.call, self.v.repeat_interleave(HEADS // self.v.shape[2], 2)
        lse, dout = call["lse"].double(), call["dout"].double()
        delta = (dout * call["out"].double()).sum(-1).transpose(1, 2)
        if call["has_dlse"]:
            delta = delta - call["dlse"]
        p = (self.logits() - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        dp = torch.einsum("bqhd,bkhd->bhqk", dout, v) * self.keep()
        ds = p * (dp - delta[..., None])
        for sums, index in (
            (self.terms.bias_sums, self.index),
            (self.terms.image_sums, self.image_index),
        ):
            if sums is not None:
                where = index(sums.shape[1]).flatten()
                for head in range(HEADS):
                    values = ds[:, head].flatten()
                    if self.config.fixed_sums:
                        values = values * self.terms.sum_factors[head]
                        assert values.abs().sum() < 2**62
                        values = values.round().long()
                    sums[head].index_add_(0, where, values.to(sums.dtype))


@pytest.fixture
def emulated(launched, monkeypatch):  # noqa: F811
    """Emulates each launch. Returns the arguments of all."""
    for module in (attention, positions, gradients, bias_gradients):
        recording = module.load_function

        def load(config, recording=recording):
            record = recording(config)

            def run(*arguments):
                record(*arguments)
                call = Emulated(launched[-1])
                if isinstance(config, ForwardConfig):
                    call.forward()
                elif isinstance(config, BiasGradientsConfig):
                    call.sums()

            return run

        monkeypatch.setattr(module, "load_function", load)
    monkeypatch.setattr(attention, "unsupported_reason", lambda *_: None)
    plan_on_cpu(monkeypatch, A100)
    clear_cache()  # plans keep their kernels
    yield launched
    clear_cache()


TERMS = ("slopes", "table", "image")


@pytest.mark.parametrize("at", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("names", "graded"),
    [
        (("slopes",), ("slopes",)),
        (("table",), ("table",)),
        (("image",), ("image",)),
        (TERMS, TERMS),
        (TERMS, ("table",)),
        (TERMS, ("image",)),
        ((*TERMS, "softcap", "dropout"), TERMS),
    ],
    ids="+".join,
)
def test_gradients(emulated, names, graded, deterministic, at):
    """Of grouped heads, keys of other lengths, a gradient of the logsumexp, rows without keys."""
    problem = Problem(names, graded, at)
    options = problem.options | {"deterministic": deterministic, "return_lse": True}
    out, lse = block_sparse_attention(
        *problem.tensors, masks.causal(), bias=problem.bias, impl="sm80", **options
    )
    ref, ref_lse, wide = problem.reference()
    torch.testing.assert_close(lse.double(), ref_lse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.double(), ref, atol=2e-2, rtol=2e-2)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    leaves = [problem.leaves[n] for n in graded]
    found = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    finite = torch.where(ref_lse == -torch.inf, 0, ref_lse)
    given = [wide[n] for n in graded], (dout.double(), dlse.double())
    want = torch.autograd.grad((ref, finite), *given)
    for name, a, b in zip(graded, found, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < 2e-2 * b.abs().max(), name
    _check(emulated, names, graded, deterministic, at)


class Problem:
    """A call with biases, and its reference in float64."""

    def __init__(self, names, graded, at):
        torch.manual_seed(0)
        self.names, self.graded, self.order = names, graded, masks.hilbert(*IMAGE)
        q = torch.randn(2, Q_LEN, HEADS, 32).bfloat16()
        k, v = (torch.randn(2, KV_LEN, 2, 32).bfloat16() for _ in "kv")
        self.tensors = [x.requires_grad_() for x in (q, k, v)]
        leaves = {
            "slopes": torch.tensor([0.1, -0.01, 0.05, 0.2]),
            "table": torch.randn(HEADS, 2 * 40 + 1),
            "image": torch.randn(HEADS, 7, 59),
        }
        self.leaves = {n: x.requires_grad_(n in graded) for n, x in leaves.items() if n in names}
        made = [self.term(name, x) for name, x in self.leaves.items()]
        self.bias = functools.reduce(operator.add, made)
        self.options = {"kv_lens": torch.tensor([300, 170])}
        shift, starts = torch.zeros(2, 2, 1, 1, dtype=torch.int64)
        if at:
            self.options |= {"q_offset": torch.tensor([90, 33]), "kv_starts": torch.tensor([7, 50])}
            shift, starts = (torch.tensor(x).view(2, 1, 1) for x in ([83, -17], [7, 50]))
        self.p_q, self.p_k = torch.arange(Q_LEN)[:, None] + shift, torch.arange(KV_LEN) - starts
        lens = self.options["kv_lens"][:, None, None] - starts
        allowed = (self.p_k <= self.p_q) & (self.p_k >= 0) & (self.p_k < lens)
        self.allowed, self.keep = allowed[:, None].expand(-1, HEADS, -1, -1), None
        if "softcap" in names:
            self.options["softcap"] = 3.0
        if "dropout" in names:
            self.draw()

    def term(self, name, x):
        if name == "image":
            return scores.relative2d(x, *IMAGE, self.order)
        return scores.alibi(x) if name == "slopes" else scores.relative(x)

    def draw(self):
        """The numbers of dropout."""
        first, second = (torch.Generator().manual_seed(1) for _ in range(2))
        self.options |= {"dropout_p": 0.3, "generator": first}
        pair = torch.arange(2 * HEADS).view(2, HEADS, 1, 1)
        places = (pair, self.p_q[:, None], self.p_k[:, None])
        kept = scores.keep_mask(draw_seed(self.tensors[0], second), 77, *places)
        self.keep = kept * (256 / 179)

    def reference(self):
        """Output, logsumexp, and the leaves."""
        wide = {n: x.detach().double() for n, x in self.leaves.items()}
        wide = {n: x.requires_grad_(n in self.graded) for n, x in wide.items()}
        pixel = self.order.permutation
        ref = dense_scored_attention(
            *(x.detach().double() for x in self.tensors),
            self.allowed,
            positions=(self.p_q, self.p_k),
            pixels=(pixel // IMAGE[1], pixel % IMAGE[1]),
            softcap=self.options.get("softcap"),
            keep=self.keep,
            **wide,
        )
        return *ref, wide


def _check(launches, names, graded, deterministic, at):
    """One launch for each pass, and one for the sums that are asked for."""
    forward, backward, sums = (x["config"] for x in launches)
    assert isinstance(forward, ForwardConfig)
    assert isinstance(sums, BiasGradientsConfig)
    assert forward.offsets == backward.offsets == sums.offsets == at
    by_distance = "table" in names or ("slopes" in names and "image" in names)
    for config in (forward, backward):
        assert config.distance_bias == by_distance
        assert config.alibi == (names == ("slopes",))
        assert config.image_bias == ("image" in names)
    assert sums.distance_grads == ("slopes" in graded or "table" in graded)
    assert sums.image_grads == ("image" in graded)
    assert sums.fixed_sums == deterministic
    assert sums.softcap == ("softcap" in names)
    assert sums.dropout == ("dropout" in names)


def test_no_launch_without_gradients_of_biases(emulated):
    q, k, v = (torch.randn(1, 40, HEADS, 32).bfloat16().requires_grad_() for _ in "qkv")
    bias = scores.alibi(torch.rand(HEADS)) + scores.relative(torch.randn(HEADS, 3))
    out = block_sparse_attention(q, k, v, masks.causal(), bias=bias, impl="sm80")
    torch.autograd.grad(out, [q, k, v], out)
    assert not any(isinstance(x["config"], BiasGradientsConfig) for x in emulated)
    assert len(emulated) == 2


def test_queries_beyond_the_image_are_unknown(emulated):
    """The kernel gets the smaller number of positions, beyond which results are NaN."""
    q, k, v = (torch.randn(1, n, HEADS, 32).bfloat16() for n in (10, 280, 280))
    layout = masks.causal().layout(500, 280)
    bias = scores.relative2d(torch.randn(HEADS, 3, 3), *IMAGE)
    for given, known in ((bias, 300), (scores.relative(torch.randn(HEADS, 3)), 500)):
        block_sparse_attention(q, k, v, layout, bias=given, q_offset=290, impl="sm80")
        assert emulated[-1]["num_positions"] == known


@pytest.mark.parametrize("where", ["dout", "out"])
def test_sums_in_fixed_point_keep_nan(where):
    """Of one head; the others have a factor with which sums fit into 62 bits."""
    dout, out = torch.randn(2, 50, HEADS, 32), torch.randn(2, 50, HEADS, 32)
    v = torch.randn(2, 60, 2, 32)
    v[1, 40:] = torch.nan  # beyond the keys of this entry
    v[0, 3, 0] = torch.inf  # may be masked
    {"dout": dout, "out": out}[where][0, 7, 1, 3] = torch.nan
    inputs = bias_gradients.BackwardInputs(dout, None, out, v, v, out, dout[..., 0])
    keys = torch.zeros(2, dtype=torch.int64), torch.tensor([60, 40])
    terms = ScoreArguments(0.0, None, None)
    factors = bias_gradients.fixed_point_factors(inputs, keys, terms)
    assert factors.isnan().tolist() == [False, True, False, False]
    kept = [0, 2, 3]
    norms = torch.stack(
        [v[0, :, :].norm(dim=-1).nan_to_num(0, 0).amax(0), v[1, :40].norm(dim=-1).amax(0)]
    )
    most = 2 * dout.norm(dim=-1).sum((0, 1)) * norms.amax(0).repeat_interleave(2)
    scaled = (most * factors)[kept]
    assert (scaled < 2.0**62).all()
    assert (scaled >= 2.0**60).all()
