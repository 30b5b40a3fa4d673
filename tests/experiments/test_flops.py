"""Operations and density by kind of attention: by hand, and as PyTorch counts what runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.experiments.attention import AttentionKind, core
from sparse_flash.experiments.config import ModelConfig, RunConfig, TrainConfig
from sparse_flash.experiments.flops import attention_flops, density, step_flops
from sparse_flash.experiments.recipes import SMALL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.experiments.conftest import TINY

# Of one head, 100 tokens, head_dim 8, forward and backward.
BY_HAND = {
    "standard": 12 * 100 * 100 * 8,  # 960,000
    "sdpa": 960_000,
    "dense": 960_000,
    "flex: block_local(50, 0)": 480_000,  # half of the matrix
    "local((0, 0))": 9_600,  # the diagonal, a hundredth
    "linear": 3 * (4 * 100 * 8 * 8 + 2 * 100 * 8),  # 81,600
    "performer(16)": 3 * (4 * 100 * 16 * 8 + 2 * 100 * 16) + 8 * 100 * 16 * 8,  # 265,600
    "linformer(5)": 3 * 8 * 100 * 5 * 8,  # 96,000
}


@pytest.mark.parametrize(("attention", "expected"), BY_HAND.items())
def test_operations_of_a_head_by_hand(attention, expected):
    kind = AttentionKind.of(attention)
    assert attention_flops(kind, 100, 8, kind.density(100)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "attention", ["standard", "sdpa", "linear", "performer(16)", "linformer(5)"]
)
def test_operations_are_those_that_run(attention):
    """Three sequences, two heads."""
    kind = AttentionKind.of(attention)
    module = core(kind, None, 100, 2, 8)
    q, k, v = (torch.randn(3, 100, 2, 8, requires_grad=True) for _ in "qkv")
    # In this backend the products of SDPA are matrix products that are counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(q, k, v, None).sum().backward()
    expected = 6 * attention_flops(kind, 100, 8, kind.density(100))
    assert counter.get_total_flops() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("attention", "kept"),
    [("standard", 1), ("sdpa", 1), ("dense", 1), ("block_local(512, 0)", 0.5),
     ("flex: block_local(512, 0)", 0.5), ("linear", None), ("performer(64)", None),
     ("linformer(64)", None)],
)  # fmt: skip
def test_density_is_of_an_attention_matrix(attention, kept):
    run = replace(SMALL["image"](), attention=attention)
    assert density(run) == kept
    assert density(replace(run, block=64)) == kept


def test_operations_of_a_step():
    run = SMALL["image"]()
    tokens, layers, dim, ffn, length = 256 * 1024, 2, 64, 128, 1024
    weights = 2 * (4 * dim**2 + 2 * dim * ffn)

    def of(attention):
        return step_flops(replace(run, attention=attention))

    assert of("dense") == 3 * tokens * layers * (weights + 4 * dim * length)
    assert of("block_local(512, 0)") == 3 * tokens * layers * (weights + 4 * dim * length / 2)
    # Head_dim 32, as many features: of a token and head 4 f d + 2 f.
    assert of("linear") == 3 * tokens * layers * (weights + 2 * (4 * 32 * 32 + 2 * 32))
    assert of("linformer(128)") == 3 * tokens * layers * (weights + 2 * 8 * 128 * 32)
    pairs = replace(SMALL["retrieval"](), attention="dense")
    assert step_flops(pairs) == 3 * 2 * 32 * 4000 * layers * (weights + 4 * dim * 4000)


def test_a_cls_token_attends_too():
    sizes = ModelConfig(dim=16, heads=2, layers=3, ffn=32, pooling="cls")
    run = RunConfig(TINY, 16, sizes, TrainConfig(batch_size=5), "dense")
    n = TINY.length + 1
    assert run.length == n
    assert step_flops(run) == 5 * 3 * (6 * n * (4 * 16**2 + 2 * 16 * 32) + 12 * 16 * n**2)
    made_for = replace(run, attention=f"axial(1, {n})")
    assert density(made_for) == 1
