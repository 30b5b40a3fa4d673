"""Kernels with score terms: their code, and the arguments that they are launched with."""

import inspect
import re

import pytest
import torch
from sparse_flash.kernels.sm80.bias_config import BiasGradientsConfig
from sparse_flash.kernels.sm90 import attention, positions
from sparse_flash.kernels.sm90.backward_config import BackwardConfig
from sparse_flash.kernels.sm90.forward_config import ForwardConfig
from sparse_flash.kernels.sm90.scored_config import all_scored_configs

from sparse_flash import block_sparse_attention, clear_cache, masks, scores
from tests.kernels.helpers import plan_on_cpu
from tests.kernels.test_compile import compile_well, groups_of_wgmma

pytest.importorskip("cutlass.cute")
from sparse_flash.kernels.score_terms import ScoreTerms
from sparse_flash.kernels.sm90.softcap import caps_alone

CONFIGS = all_scored_configs()
TERMS = ("softcap", "alibi", "sinks", "dropout", "distance_bias", "distance_grads")


def used(config):
    """The features of a config, and whether it is for positions or in fixed point."""
    names = (*TERMS, "offsets", "fixed_point")
    return tuple(name for name in names if getattr(config, name, False))


def name(config):
    kind = "forward" if isinstance(config, ForwardConfig) else "backward"
    tile = f"d{config.head_dim}-{config.tile_m}x{config.tile_n}"
    return f"{kind}-{config.dtype}-{tile}-{'+'.join(used(config))}"


def marks(config):
    """Compiled everywhere: a kernel of each pass. `thorough`: the terms one by one, and most of
    them together; `matrix`: all.
    """
    if config.dtype == "bfloat16" and config.head_dim in (64, 128):
        many = ("softcap", "sinks", "dropout", "distance_bias")
        forward = isinstance(config, ForwardConfig)
        first = many if forward else ("dropout",)
        if config.head_dim == 64 and config.tile_m == 128 and used(config) == first:
            return ()
        graded = ("distance_bias", "distance_grads")
        if len(used(config)) == 1 or used(config) in (many, many[:1] + many[2:], graded):
            return pytest.mark.thorough
    return pytest.mark.matrix


COMPILED = [pytest.param(config, marks=marks(config)) for config in CONFIGS]


@pytest.mark.parametrize("config", COMPILED, ids=name)
def test_compiles_well(compiler, config, tmp_path):
    """Without spills; a tanh for each score in each step, and for each maximum of a row."""
    forward = isinstance(config, ForwardConfig)
    # Attention and the combination; in the backward pass statistics, bounds, and sums of dQ too.
    kernels = 2 if forward else 4 + config.fixed_point
    warpgroups = config.warpgroups if forward else 2
    index = CONFIGS.index(config)
    sass = compile_well(compiler, "scored", index, kernels, tmp_path, warpgroups)
    # Of a thread in each step: first, inner, boundary; or first, inner, last, only.
    elements = 3 * config.tile_n // 2 if forward else 4 * config.tile_m // 2
    if forward and caps_alone(config):
        elements += 3 * 2
    assert sass.count("MUFU.TANH") == (elements if config.softcap else 0)
    if forward:  # S and O in each step, and a bias that the GEMM adds
        hgmma = config.head_dim // 16 + config.tile_n // 16 + config.alibi
        assert len(re.findall(r"\bHGMMA\.", sass)) == 3 * hgmma
        assert groups_of_wgmma(sass) == 3 * 2
    assert ("PRMT" in sass) >= config.dropout


@pytest.fixture
def launches(monkeypatch):
    """Numbers of arguments of launches, and the classes that they are for."""
    from sparse_flash.kernels.sm80 import bias_backward, bias_gradients
    from sparse_flash.kernels.sm90 import dq, scored
    from sparse_flash.kernels.sm90.backward import BackwardSm90

    seen = []

    class Stub:
        def launch(self, inputs, plan, scalars, device, transient):
            config = plan.config
            if isinstance(config, BiasGradientsConfig):
                kernel = bias_backward.BiasGradientsSm80
            elif not getattr(config, "scored", False):
                kernel = BackwardSm90 if isinstance(config, BackwardConfig) else dq.DqSm90
            elif isinstance(config, BackwardConfig):
                kernel = scored.BackwardScoredSm90
            else:
                at = config.offsets
                kernel = scored.ForwardAtScoredSm90 if at else scored.ForwardScoredSm90
            splits = 0 if at_positions(config) else len(config.split_shapes)
            arguments = (*inputs, *plan.lists, None, *[None] * splits, *plan.combine, 1, *scalars)
            names = list(inspect.signature(kernel.__call__).parameters)
            assert names[-1] == "stream"
            assert len(arguments) == len(names) - 2, kernel  # self, stream
            if getattr(config, "scored", False):
                check_terms(config, ScoreTerms(*arguments[names.index("terms") - 1]))
            seen.append(kernel.__name__)

    monkeypatch.setattr(attention, "unsupported_reason", lambda *_: None)
    monkeypatch.setattr(attention, "bind", lambda plan: Stub())
    monkeypatch.setattr(bias_gradients, "bind", lambda plan: Stub())
    monkeypatch.setattr(positions, "_bind", lambda plan: setattr(plan, "kernel", Stub()))
    plan_on_cpu(monkeypatch)
    clear_cache()  # plans keep their kernels
    return seen


def check_terms(config, terms):
    """The kernel gets the fields of its features, and no others."""
    rows = 207 if at_positions(config) else 300
    length = sum(-(-n // size) * size for n, size in zip((rows, 300), config.tile, strict=True))
    for used, fields in (
        (getattr(config, "alibi", False), {"slopes": (4,), "slope_scale": None}),
        (config.softcap, {"cap_scale": None}),
        (getattr(config, "sinks", False), {"sinks": (4,)}),
        (config.dropout, {"seed": (2,), "dropped": None, "keep_scale": None}),
        (config.distance_bias, {"bias": (4, 2, length), "bias_rows": None}),
        (getattr(config, "distance_grads", False), {"bias_sums": (4, length)}),
    ):
        for name, shape in fields.items():
            x = getattr(terms, name)
            assert (x is not None) == used, name
            assert not used or shape is None or (x.shape == shape and x.is_contiguous())
    assert terms.seed is None or terms.seed.dtype == torch.int32


def at_positions(config):
    return getattr(config, "offsets", False)


@pytest.mark.parametrize(("d", "d_v"), [(64, 64), (192, 128), (64, 128)])
@pytest.mark.parametrize(
    "names", ["sinks", "softcap", "alibi", "dropout", "table", "slopes", "all"]
)
def test_arguments(launches, d, d_v, names):
    if names != "sinks" and max(d, d_v) > 128:
        return
    terms = {
        "sinks": {"sinks": torch.zeros(4, requires_grad=True)},
        "softcap": {"softcap": 3.0},
        "alibi": {"bias": scores.alibi(torch.rand(4))},
        "dropout": {"dropout_p": 0.1},
        "table": {"bias": scores.relative(torch.zeros(4, 81, requires_grad=True))},
        "slopes": {"bias": scores.alibi(torch.rand(4, requires_grad=True))},
    }
    terms["all"] = {name: x for some in list(terms.values())[:5] for name, x in some.items()}
    terms["all"]["bias"] = scores.relative(torch.zeros(4, 81))
    q = torch.randn(1, 300, 4, d).bfloat16().requires_grad_()
    k, v = (torch.randn(1, 300, 2, x).bfloat16().requires_grad_() for x in (d, d_v))
    out = block_sparse_attention(q, k, v, masks.causal(), impl="sm90", **terms[names])
    assert out.shape == (1, 300, 4, d_v)
    out.sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    backward = "BackwardSm90" if names == "sinks" else "BackwardScoredSm90"
    assert launches[:2] == ["ForwardScoredSm90", backward]
    if d == d_v:
        with torch.no_grad():
            given = {"q_offset": 200, "impl": "sm90"} | terms[names]
            block_sparse_attention(q[:, :7], k, v, masks.causal(), **given)
        assert launches[-1] == "ForwardAtScoredSm90"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("names", ["softcap", "dropout", "none"])
def test_gradients_of_biases_apart(launches, names, deterministic):
    """In a kernel of their own beside a softcap, dropout at head_dim 128, or in a fixed order."""
    table, slopes = torch.zeros(4, 81, requires_grad=True), torch.rand(4, requires_grad=True)
    options = {"softcap": {"softcap": 3.0}, "dropout": {"dropout_p": 0.1}, "none": {}}[names]
    options |= {"bias": scores.relative(table) + scores.alibi(slopes)}
    q, k, v = (torch.randn(1, 300, h, 128).bfloat16().requires_grad_() for h in (4, 2, 2))
    options |= {"deterministic": deterministic, "impl": "sm90"}
    block_sparse_attention(q, k, v, masks.causal(), **options).sum().backward()
    assert (table.grad.shape, slopes.grad.shape) == (table.shape, slopes.shape)
    apart = deterministic or names != "none"
    expected = ["ForwardScoredSm90", "BackwardScoredSm90", *["BiasGradientsSm80"] * apart]
    assert launches == expected
