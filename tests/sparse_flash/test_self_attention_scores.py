"""Score options of SelfAttention."""

from __future__ import annotations

import pytest
import torch

from sparse_flash import block_sparse_attention, masks, scores
from sparse_flash.nn import KVCache, SelfAttention

MASK = masks.local((9, 0))


def test_everything_learns_and_equals_the_function():
    torch.manual_seed(0)
    options = {"score_bias": "relative", "max_distance": 4, "softcap": 3.0, "sinks": True}
    layer = SelfAttention(32, 4, MASK, kv_heads=2, v_head_dim=5, **options)
    assert layer.to_out.weight.shape == (32, 20)
    assert "score_bias='relative', softcap=3.0, sinks=True, v_head_dim=5" in repr(layer)
    torch.nn.init.normal_(layer.relative_table)
    torch.nn.init.normal_(layer.sinks)
    x = torch.randn(2, 30, 32)
    y = layer(x)
    q, k, v = (
        project(x).unflatten(2, (-1, d))
        for project, d in ((layer.to_q, 8), (layer.to_k, 8), (layer.to_v, 5))
    )
    bias = scores.relative(layer.relative_table)
    out = block_sparse_attention(q, k, v, MASK, bias=bias, softcap=3.0, sinks=layer.sinks)
    torch.testing.assert_close(y, layer.to_out(out.flatten(2)))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_alibi_moves_with_the_module_and_is_not_saved():
    layer = SelfAttention(32, 4, MASK, score_bias="alibi")
    assert "alibi_slopes" not in layer.state_dict()
    assert layer.double().alibi_slopes.dtype == torch.float64
    torch.testing.assert_close(layer.alibi_slopes.float(), scores.alibi_slopes(4))
    layer(torch.randn(1, 9, 32, dtype=torch.float64)).sum().backward()


def test_alibi_of_a_module_made_on_meta():
    with torch.device("meta"):
        layer = SelfAttention(32, 4, MASK, score_bias="alibi")
    layer = layer.bfloat16().to_empty(device="cpu")
    assert layer.alibi_slopes.dtype == torch.bfloat16
    torch.testing.assert_close(layer.alibi_slopes.float(), scores.alibi_slopes(4))


def test_dropout_in_training_alone():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4, MASK, attention_dropout=0.5), torch.randn(1, 40, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    plain = SelfAttention(32, 4, MASK)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("score_bias", ["alibi", "relative"])
def test_generation(score_bias):
    torch.manual_seed(0)
    layer = SelfAttention(32, 4, MASK, score_bias=score_bias, sinks=True, v_head_dim=3)
    if score_bias == "relative":
        torch.nn.init.normal_(layer.relative_table)
    x, cache = torch.randn(2, 20, 32), KVCache(2, 20, 4, 8, v_head_dim=3)
    with torch.no_grad():
        steps = [layer(x[:, :12], cache=cache)]
        steps += [layer(x[:, i : i + 1], q_offset=i, cache=cache) for i in range(12, 20)]
        torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"score_bias": "t5"}, ValueError, "'alibi', 'relative' or None, got 't5'"),
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"attention_dropout": 1.5}, ValueError, "dropout_p must be in"),
        ({"bias": "alibi"}, TypeError, "bias must be a bool, got 'alibi' .*score_bias='alibi'"),
        ({"sinks": 4}, TypeError, r"sinks must be a bool, got 4 .*masks.sinks\(n\)"),
        ({"v_head_dim": 0}, ValueError, "v_head_dim must be at least 1"),
        ({"score_bias": "relative", "max_distance": -1}, ValueError, "max_distance"),
    ],
)
def test_refused(options, error, words):
    with pytest.raises(error, match=words):
        SelfAttention(32, 4, MASK, **options)
