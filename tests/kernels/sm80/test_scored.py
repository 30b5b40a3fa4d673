"""Kernels with score terms for Ampere and later: their code, and the arguments of launches."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch
from sparse_flash.kernels.score_arguments import ScoreArguments, ScoreFlags
from sparse_flash.kernels.sm80 import attention, bias_gradients, gradients, positions
from sparse_flash.kernels.sm80.backward_config import fits
from sparse_flash.kernels.sm80.bias_config import (
    BiasGradientsConfig,
    all_bias_gradients_configs,
    bias_gradients_config,
)
from sparse_flash.kernels.sm80.config import LIMIT_OF, ForwardConfig
from sparse_flash.kernels.sm80.scored_config import (
    all_scored_configs,
    scored_backward_config,
    scored_forward_at_config,
    scored_forward_configs,
)

from sparse_flash import block_sparse_attention, masks, scores
from sparse_flash.call import terms_of_options
from sparse_flash.implementations.sm80 import Sm80
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.sm80.test_compile import TARGETS
from tests.kernels.sm80.test_plan import A100, RTX4090, gpu_call

pytest.importorskip("cutlass.cute")
score_terms = pytest.importorskip("sparse_flash.kernels.score_terms")
LOG2_E = math.log2(math.e)
ALL = ScoreFlags(softcap=True, alibi=True, sinks=True, dropout=True)
BIASES = ScoreFlags(distance_bias=True, image_bias=True)
GRADED = BIASES._replace(distance_grads=True, image_grads=True, dropout=True)
DROPPED = ScoreFlags(dropout=True, distance_bias=True)
CAPPED = GRADED._replace(softcap=True)
CAPPED_IMAGE = CAPPED._replace(distance_grads=False)
ALIBI, SOFTCAP, IMAGE = (ScoreFlags(**{n: True}) for n in ("alibi", "softcap", "image_bias"))


def limits(target, dim, dtype="bfloat16"):
    return dtype, dim, target, LIMIT_OF[target]


SOME = [
    scored_forward_configs(*limits("sm_80", 128), ALL)[0],
    scored_forward_at_config(*limits("sm_120", 64), ALL),
    scored_backward_config(*limits("sm_90", 64), False, SOFTCAP),
    scored_backward_config(*limits("sm_90", 64), False, BIASES),
    scored_forward_configs(*limits("sm_86", 64, "float16"), BIASES)[0],
    scored_backward_config(*limits("sm_80", 128), True, BIASES),
    scored_backward_config(*limits("sm_86", 256), True, ScoreFlags(image_bias=True)),
    scored_backward_config(*limits("sm_86", 256), False, BIASES._replace(softcap=True)),
    scored_backward_config(*limits("sm_120", 256), True, BIASES._replace(softcap=True), True),
    bias_gradients_config("bfloat16", 64, "sm_120", True, GRADED, offsets=True),
    bias_gradients_config("float16", 256, "sm_80", False, CAPPED),
    scored_forward_configs(*limits("sm_120", 192, "float16"), IMAGE)[0],
    scored_forward_at_config(*limits("sm_120", 192), BIASES),
    scored_forward_configs(*limits("sm_120", 256), DROPPED)[0],
    scored_backward_config(*limits("sm_120", 256), False, IMAGE, True),
    bias_gradients_config("bfloat16", 256, "sm_120", False, CAPPED, offsets=True),
    bias_gradients_config("float16", 256, "sm_120", True, CAPPED_IMAGE, offsets=True),
]


TERMS = ("softcap", "alibi", "sinks", "dropout", "distance_bias", "image_bias")
SUMS = ("distance_grads", "image_grads", "fixed_sums")


def name(config):
    tile = f"{config.tile_m}x{config.tile_n}"
    names = [n for n in (*TERMS, *SUMS, "fixed_point", "offsets") if has(config, n)]
    kernel = type(config).__name__.removesuffix("Config").lower()
    return "-".join((config.arch, kernel, config.dtype, f"d{config.head_dim}", tile, *names))


def has(config, feature):
    return getattr(config, feature, False)


def check(compile_for, config):
    """No spills; tanh is one instruction, and one for each score."""
    compiled = compile_for("sparse_flash.kernels.sm80.compile.compile_config", config)
    forward = isinstance(config, ForwardConfig)
    kernels = 2 if forward else 4 + config.fixed_point - config.offsets
    if isinstance(config, BiasGradientsConfig):
        kernels = 2  # row statistics, and the sums
    compiled.check(kernels, config.threads, config.ctas_per_sm)
    assert (
        compiled.count(r"MUFU\.TANH") == config.softcap * math.prod(config.tile) // config.threads
    )


@pytest.mark.parametrize("config", SOME, ids=name)
def test_some_compile_well(compile_for, config):
    check(compile_for, config)


def is_listed(config):
    """Whether the matrix has it: each feature alone, and all together with each kind of bias.

    It has all where other sets spilled: of the gradients with V in registers at head_dim 256, and
    of the tiles and options for sm_120 alone.
    """
    used = {n for n in (*TERMS, "distance_grads", "image_grads") if has(config, n)}
    if isinstance(config, BiasGradientsConfig):
        if config.recompute:
            return True
        of_both = {"distance_bias", "image_bias", "distance_grads", "image_grads"}
        return len(used) == 2 or used == of_both | {"softcap", "dropout"}
    if config.head_dim == 256 and has(config, "v_in_registers"):
        return True
    if isinstance(config, ForwardConfig) and config.head_dim == 192 and config.tile_n == 32:
        return True
    others = {"softcap", "dropout", *(["sinks"] if isinstance(config, ForwardConfig) else [])}
    return len(used) == 1 or others < used


MATRIX = [
    config
    for target in TARGETS
    for config in (*all_scored_configs(target), *all_bias_gradients_configs(target))
    if is_listed(config)
]


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_shared_memory_of_sums(dim):
    """As much as the config says, and no more than any GPU has."""
    cutlass = pytest.importorskip("cutlass")
    from sparse_flash.kernels.sm80.bias_backward import BiasGradientsSm80

    for flags in (GRADED, ScoreFlags(image_bias=True, image_grads=True)):
        config = bias_gradients_config("bfloat16", dim, "sm_86", False, flags)
        storage = BiasGradientsSm80(config, cutlass.BFloat16)._storage()
        assert storage.__sizeof__() == config.shared_memory
        assert fits(config, LIMIT_OF["sm_86"])


@pytest.mark.matrix
@pytest.mark.parametrize("config", MATRIX, ids=name)
def test_all_compile_well(compile_for, config):
    check(compile_for, config)


@pytest.fixture
def launched(monkeypatch):
    """Arguments of the launches, by name."""
    from sparse_flash.kernels.sm80 import bias_backward, scored
    from sparse_flash.kernels.sm80.backward import BackwardSm80
    from sparse_flash.kernels.sm80.backward_at import BackwardAtSm80

    calls = []

    def load(config):
        if isinstance(config, BiasGradientsConfig):
            at = config.offsets
            kernel = bias_backward.BiasGradientsAtSm80 if at else bias_backward.BiasGradientsSm80
        elif isinstance(config, ForwardConfig):
            kernel = scored.ForwardAtScoredSm80 if config.offsets else scored.ForwardScoredSm80
        elif config.scored:
            kernel = scored.BackwardAtScoredSm80 if config.offsets else scored.BackwardScoredSm80
        else:
            kernel = BackwardAtSm80 if config.offsets else BackwardSm80
        names = [n for n in inspect.signature(kernel.__call__).parameters if n != "self"]

        def function(*arguments):
            assert len(arguments) == len(names) - 1  # the stream is torch's current one
            calls.append({"config": config, **dict(zip(names, arguments, strict=False))})

        return function

    for module in (attention, positions, gradients, bias_gradients):
        monkeypatch.setattr(module, "load_function", load)
        monkeypatch.setattr(module, "_kernels", {})
    for attribute, value in (
        ("_cuda_getDevice", None),
        ("_cuda_getCurrentRawStream", 0),
        ("_cuda_isCurrentStreamCapturing", False),
    ):
        monkeypatch.setattr(torch._C, attribute, lambda *_, value=value: value, raising=False)
    return calls


def problem(width):
    q = torch.randn(2, 200, 4, 64).bfloat16()
    k, v = (torch.randn(2, 300, 2, d).bfloat16() for d in (64, width))
    return (
        q,
        k,
        v,
        *(torch.randn(2, 200, 4, width).bfloat16() for _ in "od"),
        torch.randn(2, 4, 200),
    )


@pytest.mark.parametrize("facts", [A100, RTX4090], ids=lambda f: f.arch)
@pytest.mark.parametrize("flags", [ALL, ALIBI, SOFTCAP, ScoreFlags(sinks=True)])
@pytest.mark.parametrize("width", [64, 40, 128])
def test_arguments_are_those_of_the_kernel(launched, monkeypatch, facts, flags, width):
    plan_on_cpu(monkeypatch, facts)
    q, k, v, out, dout, lse = problem(width)
    wide = q if width <= 64 else torch.zeros(2, 200, 4, width, dtype=q.dtype)
    slopes, sinks = torch.rand(4), torch.randn(4)
    of_dropout = (torch.tensor([1 << 40]), 26) if flags.dropout else (None, 0)
    of_heads = slopes if flags.alibi else None, sinks if flags.sinks else None
    terms = ScoreArguments(3.0 * flags.softcap, *of_heads, *of_dropout)
    assert terms.flags == flags
    layout = masks.causal().layout(200, 300)
    plan = attention.forward_plan(layout, wide, k, flags)
    found, _ = attention.forward(q, k, v, plan, None, 0.5, terms)
    assert found.shape == (2, 200, 4, width)
    plan = gradients.backward_plan(layout, wide, k, False, flags)
    given = (dout, None, q, k, v, out, lse, plan, None, 0.5, terms)
    results = gradients.backward(*given)
    assert [x.shape for x in results[:3]] == [q.shape, k.shape, v.shape]
    assert (results.sinks is None) == (not flags.sinks)
    at = positions.forward_plan_at(layout, wide, k, flags)
    found, _ = positions.forward_at(q, k, v, at, None, 7, None, 0.5, terms)
    assert found.shape == (2, 200, 4, width)
    at = gradients.backward_plan_at(layout, wide, k, False, flags)
    gradients.backward_at(dout, None, q, k, v, out, lse, at, None, 70, None, 0.5, terms)
    if at.config.scored:
        assert launched[-1]["q_pad"].tolist() == [70 % at.config.tile_m] * 2
        assert launched[-1]["q_tops"].tolist() == [70 - 70 % at.config.tile_m] * 2
    unit = 3.0 if flags.softcap else 0.5
    for call in launched:
        assert [has(call["config"], n) for n in ("softcap", "alibi", "dropout")] == [
            *flags[:2],
            flags[3],
        ]
        assert call["config"].head_dim >= max(64, width)
        assert call["scale_log2"] == pytest.approx(unit * LOG2_E)
        if call["config"].scored:
            given = score_terms.ScoreTerms(*call["terms"])
            assert given.slopes is (slopes if flags.alibi else None)
            assert given.slope_scale == (pytest.approx(-1 / unit) if flags.alibi else None)
            assert given.cap_scale == (pytest.approx(0.5 / 3.0) if flags.softcap else None)
            forward = isinstance(call["config"], ForwardConfig)
            assert given.sinks is (sinks if flags.sinks and forward else None)
            assert (given.seed is not None) == flags.dropout
            assert given.dropped == (26 if flags.dropout else None)
            assert given.keep_scale == (pytest.approx(256 / 230) if flags.dropout else None)
    forward = [isinstance(call["config"], ForwardConfig) for call in launched]
    assert forward == [True, False] * 2


def test_dropout_gradients_that_do_not_fit_are_refused(monkeypatch):
    for facts, dim, refused in ((A100, 256, False), (RTX4090, 192, False), (RTX4090, 200, True)):
        call = gpu_call(monkeypatch, facts, dim=dim, needs_grad=True)
        seed = torch.zeros(1, dtype=torch.int64)
        terms = terms_of_options((False,) * 4, 0.0, 26, (None,) * 5 + (seed,))
        reason = Sm80().unsupported_reason(replace(call, terms=terms))
        assert bool(reason) == refused, (facts, dim, reason)
        assert Sm80().unsupported_reason(replace(call, terms=terms, needs_grad=False)) is None
    assert "123904 bytes of shared memory above head_dim 192, but this GPU has 101376" in reason


def test_features_without_use_change_nothing():
    for dim in (64, 128):
        for dtype in ("bfloat16", "float16"):
            given = limits("sm_80", dim, dtype)
            assert scored_forward_configs(*given, ScoreFlags()) == _plain(*given)
            sinks = ScoreFlags(sinks=True)
            assert not scored_backward_config(*given, False, sinks).scored


def _plain(*given):
    from sparse_flash.kernels.sm80.config import forward_configs

    return forward_configs(*given)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("names", ["sinks", "softcap", "alibi", "dropout", "biases", "all"])
def test_gradients_at_positions(names, dim, deterministic):
    """Chunks of a cache with padding on the left: as the reference in float64."""
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 150, 4, dim, device="cuda").bfloat16() for _ in "qd")
    k, v = (torch.randn(2, 700, 2, dim, device="cuda").bfloat16() for _ in "kv")
    offset, starts = (torch.tensor(x, device="cuda") for x in ([500, 333], [70, 0]))
    terms = {
        "sinks": {"sinks": torch.randn(4, device="cuda")},
        "softcap": {"softcap": 5.0},
        "alibi": {"bias": scores.alibi(torch.rand(4, device="cuda") * 0.05)},
        "dropout": {"dropout_p": 0.3},
        "biases": {"bias": None},
    }
    terms["all"] = terms["sinks"] | terms["softcap"] | terms["dropout"] | terms["biases"]
    biases = [torch.rand(4, device="cuda") * 0.05, torch.randn(4, 301, device="cuda")]
    biases.append(torch.randn(4, 15, 41, device="cuda"))
    order = masks.hilbert(30, 25)
    options = {"q_offset": offset, "kv_starts": starts, "deterministic": deterministic}

    def gradients_by(impl, dtype):
        given, leaves = dict(terms[names]), [x.to(dtype).requires_grad_() for x in (q, k, v)]
        if "sinks" in given:
            given["sinks"] = given["sinks"].clone().requires_grad_()
            leaves.append(given["sinks"])
        if "dropout_p" in given:
            given["generator"] = torch.Generator("cuda").manual_seed(1)
        if names in ("biases", "all"):
            slopes, table, image = (x.clone().requires_grad_() for x in biases)
            given["bias"] = scores.alibi(slopes) + scores.relative(table)
            given["bias"] += scores.relative2d(image, 30, 25, order)
            leaves += [slopes, table, image]
        out = block_sparse_attention(*leaves[:3], masks.causal(), impl=impl, **given, **options)
        return torch.autograd.grad(out, leaves, dout.to(dtype))

    wanted = gradients_by("reference", torch.float64)
    for got, want in zip(gradients_by("sm80", torch.bfloat16), wanted, strict=True):
        # dS has sum 0 in each row, so the sums over it for a slope or sink are small beside the
        # errors of tanh.approx (2^-11 of a score) and of the rounded output in their terms.
        bar = 0.012 if want.ndim > 1 else 0.03
        assert (got - want).abs().max() < 0.03 * want.abs().max()
        assert (got - want).norm() < bar * want.norm()
