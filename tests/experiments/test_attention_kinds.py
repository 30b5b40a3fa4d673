"""Attention by name: each kind against its paper's formula, written out."""

from __future__ import annotations

import pytest
import torch
from sparse_flash.experiments.attention import (
    AttentionKind,
    Flex,
    LinearAttention,
    Linformer,
    Performer,
    Sdpa,
    Standard,
    core,
)
from torch.nn.functional import elu

from sparse_flash import block_sparse_attention, masks

LENS = torch.tensor([50, 31])


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(2, 50, 2, 8) for _ in "qkv"]


def by_kernel(kernel, v, lens):
    """Attention whose weights are any positive kernel (b, h, q, k)."""
    kernel = kernel * (torch.arange(v.shape[1]) < lens[:, None])[:, None, None]
    return torch.einsum("bhqk,bkhd->bqhd", kernel / kernel.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("kind", [Standard, Sdpa])
@pytest.mark.parametrize("lens", [None, LENS])
def test_dense_kinds_equal_ours(qkv, kind, lens):
    expected = block_sparse_attention(*qkv, masks.full(), kv_lens=lens)
    torch.testing.assert_close(kind()(*qkv, lens), expected)


def test_linear_attention_is_its_kernel(qkv):
    q, k, v = qkv
    kernel = torch.einsum("bqhd,bkhd->bhqk", elu(q) + 1, elu(k) + 1)
    torch.testing.assert_close(LinearAttention()(q, k, v, LENS), by_kernel(kernel, v, LENS))


def test_performer_comes_close_to_softmax(qkv):
    q, k, v = (0.5 * x for x in qkv)
    kernel = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5).exp()
    expected = by_kernel(kernel, v, LENS)
    errors = [
        (Performer(2, 8, size)(q, k, v, LENS) - expected).norm() / expected.norm()
        for size in (32, 4096)
    ]
    assert errors[1] < 0.04 < 0.1 < errors[0]


def test_performer_features_are_orthogonal():
    features = Performer(2, 8, 20).features
    assert features.shape == (2, 20, 8)
    products = features[:, :8] @ features[:, :8].transpose(1, 2)
    torch.testing.assert_close(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2)))


def test_linformer_mixes_keys_and_values(qkv):
    q, k, v = qkv
    module = Linformer(50, 6)
    mixtures = module.mixtures.detach()
    k_, v_ = (torch.einsum("ns,bshd->bnhd", mixtures, x) for x in (k, v))
    scores = torch.einsum("bqhd,bnhd->bhqn", q, k_) / 8**0.5
    expected = torch.einsum("bhqn,bnhd->bqhd", scores.softmax(-1), v_)
    torch.testing.assert_close(module(q, k, v, None), expected)


@pytest.mark.parametrize("spec", ["local(200)", "block_local(128, 1) | global_tokens(128)"])
@pytest.mark.parametrize("lens", [None, torch.tensor([500, 130])])
def test_flex_equals_ours(spec, lens):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 500, 2, 16) for _ in "qkv")
    layout = masks.parse(spec).layout(500, block=(128, 128))
    expected = block_sparse_attention(q, k, v, layout, kv_lens=lens)
    with torch.no_grad():
        torch.testing.assert_close(Flex(layout)(q, k, v, lens), expected)


def test_flex_has_one_mask_for_all_heads():
    mask = masks.per_head([masks.local(5), masks.full()])
    with pytest.raises(ValueError, match="all heads share"):
        core(AttentionKind.of("flex: dense"), mask.layout(64), 64, 2, 8)


def test_unknown_names_say_what_there_is():
    for text, words in {
        "linformer": r"linformer must have a size of at least 1, as in linformer\(256\)",
        "linformer()": r"as in linformer\(256\)",
        "linformer(x)": r"linformer\(x\) must have a size of at least 1",
        "performer(-3)": r"performer\(-3\) must have a size of at least 1",
        "linformr(3)": "unknown attention 'linformr\\(3\\)'; did you mean 'linformer'",
        "sdpa(x)": "sdpa takes no size, write sdpa",
        "lokal(3)": "did you mean 'local'",
        "sdpa(3)": "sdpa takes no size, write sdpa",
        "standrd": "unknown attention 'standrd'; did you mean 'standard'",
        "denze": "did you mean 'dense'",
        "spda": "did you mean 'sdpa'",
        "gone(3)": r"unknown pattern .*dense, or one of standard, sdpa, linear, performer\(256\)",
    }.items():
        with pytest.raises(ValueError, match=words):
            AttentionKind.of(text)
    with pytest.raises(TypeError, match="attention must be a name such as 'sdpa'.*got 3"):
        AttentionKind.of(3)
    with pytest.raises(ValueError, match=r"unknown pattern .*flex: MASK"):
        AttentionKind.of("flex: lokal(3)")
