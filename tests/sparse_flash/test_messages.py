"""Mistakes in calls of attention and of its modules: what to write instead."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparse_flash import block_sparse_attention, masks
from sparse_flash.nn import KVCache, SelfAttention

Q = torch.randn(2, 6, 4, 8)
MASK = masks.causal()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"is_causal": True}, r"no argument is_causal=True: pass the mask masks.causal\(\)"),
        ({"causal": True}, r"masks.causal\(\)"),
        ({"attn_mask": torch.ones(6, 6)}, r"attn_mask=tensor of \(6, 6\): .*masks.from_dense"),
        ({"attn_mask": None}, "masks.from_dense"),
        ({"window_size": (3, 0)}, r"masks.local\(\(left, right\)\)"),
        ({"scale": 0.1}, "write softmax_scale"),
        ({"dropout": 0.1}, "write dropout_p"),
        ({"enable_gqa": True}, "fewer heads"),
        ({"block_mask": 1}, "masks.custom"),
        ({"score_mod": abs}, r"pass bias= a term of sparse_flash.scores.*softcap="),
        ({"alibi_slopes": Q}, r"bias=sparse_flash.scores.alibi\(slopes\)"),
        ({"s_aux": Q}, r"write sinks"),
        ({"logits_soft_cap": 30.0}, r"write softcap"),
        ({"cu_seqlens": 1}, "masks.documents"),
        ({"kv_len": 3}, r"no argument kv_len=3: see help\(block_sparse_attention\)"),
    ],
)
def test_arguments_of_other_functions(arguments, words):
    for mask in ((), (MASK,)):
        with pytest.raises(TypeError, match=words):
            block_sparse_attention(Q, Q, Q, *mask, **arguments)


def test_a_call_without_a_mask():
    with pytest.raises(TypeError, match=r"got None: pass masks.causal\(\), or masks.full\(\)"):
        block_sparse_attention(Q, Q, Q)
    with pytest.raises(TypeError, match="masks.parse makes one from text"):
        block_sparse_attention(Q, Q, Q, "causal()")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"softmax_scale": "0.1"}, TypeError, "got '0.1': write softmax_scale=0.1$"),
        ({"softmax_scale": "auto"}, TypeError, "must be a number, got 'auto'$"),
        ({"softmax_scale": [0.1]}, TypeError, r"must be a number, got \[0.1\]"),
        ({"softmax_scale": True}, TypeError, "must be a number, got True"),
        ({"softmax_scale": 1j}, TypeError, "must be a number, got 1j"),
        ({"softmax_scale": float("nan")}, ValueError, "finite"),
        ({"softmax_scale": 10**400}, ValueError, "finite"),
        ({"dropout_p": "0.1"}, TypeError, r"dropout_p must be a number in \[0, 1\), got '0.1'"),
    ],
)
def test_options(options, error, words):
    with pytest.raises(error, match=words):
        block_sparse_attention(Q, Q, Q, MASK, **options)


def test_scales_of_other_types():
    expected = block_sparse_attention(Q, Q, Q, MASK, softmax_scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(block_sparse_attention(Q, Q, Q, MASK, softmax_scale=scale), expected)
    block_sparse_attention(Q, Q, Q, MASK, softmax_scale=1)


def test_numbers_of_masks():
    three = masks.per_head([MASK, masks.full(), masks.local(2)])
    with pytest.raises(
        ValueError, match=r"for 3 heads, but q has 4 heads: give masks.per_head\(\["
    ):
        block_sparse_attention(Q, Q, Q, three)
    batch = masks.per_batch([MASK, masks.full(), MASK])
    with pytest.raises(ValueError, match=r"3 batch entries, but q has 2 .*masks.per_batch\(\["):
        block_sparse_attention(Q, Q, Q, batch)
    for mask in (three, three.layout(6)):
        with pytest.raises(ValueError, match=r"for 3 heads, but there are 4: give masks.per_head"):
            SelfAttention(32, 4, mask=mask)
    SelfAttention(32, 4, mask=batch)
    # Patterns are those of query heads, also where keys have fewer heads.
    four = masks.per_head([MASK, masks.full()] * 2)
    assert SelfAttention(32, 4, mask=four, kv_heads=2)(torch.randn(1, 6, 32)).shape == (1, 6, 32)


LAYER = SelfAttention(32, 4, mask=MASK)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((6, 32), r"= \(b, s, 32\).* got \(6, 32\): x\[None\] makes a batch of one"),
        ((2, 6, 64), r"got \(2, 6, 64\): the layer was made with dim=32"),
        ((2, 32, 6), r"got \(2, 32, 6\): x.transpose\(1, 2\)"),
        ((2, 6, 4, 8), "block_sparse_attention takes"),
        ((32,), r"got \(32,\)$"),
        ((2, 0, 32), r"s at least 1, got \(2, 0, 32\)$"),
    ],
)
def test_inputs_of_self_attention(shape, words):
    with pytest.raises(ValueError, match=words):
        LAYER(torch.randn(shape))


def test_what_self_attention_refuses():
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor \(b, s, 32\), got ndarray"):
        LAYER(np.zeros((2, 6, 32), np.float32))
    with pytest.raises(TypeError, match="masks.parse makes one from text"):
        SelfAttention(32, 4, mask="causal()")
    with pytest.raises(TypeError, match="dim must be an int, got 32.0"):
        SelfAttention(32.0, 4, mask=MASK)
    with pytest.raises(ValueError, match="dim=30 must be a multiple of heads=4"):
        SelfAttention(30, 4, mask=MASK)
    with pytest.raises(ValueError, match="heads must be at least 1"):
        SelfAttention(32, 0, mask=MASK)
    assert SelfAttention(np.int64(32), 4, mask=MASK).head_dim == 8


def test_a_full_cache_says_what_to_do():
    cache = KVCache(2, 6, 4, 8)
    with torch.no_grad():
        LAYER(torch.randn(2, 6, 32), cache=cache)
        with pytest.raises(
            ValueError, match="space for 6 tokens, not for 7: .*at least 7, or begin"
        ):
            LAYER(torch.randn(2, 1, 32), q_offset=6, cache=cache)
