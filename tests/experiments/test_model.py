"""The encoder: variants agree, padding has no influence, pooling and positions."""

from __future__ import annotations

import pytest
import torch
from sparse_flash.experiments.clock import AttentionClock
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.model import (
    Encoder,
    ShortConv,
    TokenEmbedding,
    rotary_cos_sin,
    rotate,
)


def make(attention="dense", coordinates=None, pairs=False, **changes):
    torch.manual_seed(0)
    config = ModelConfig(
        **{"dim": 16, "heads": 2, "layers": 2, "ffn": 32, "dropout": 0.0, **changes}
    )
    return Encoder(config, 16, 10, 40, attention, 16, coordinates, pairs)


TOKENS = torch.randint(1, 16, (3, 40), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([40, 13, 1])


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_dense_variants_agree(pooling, positions):
    variants = [
        make(attention, pooling=pooling, positions=positions)(TOKENS, LENGTHS)
        for attention in ("sdpa", "standard", "dense", "local(100)")
    ]
    for other in variants[1:]:
        torch.testing.assert_close(variants[0], other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(make("local(2)", pooling=pooling)(TOKENS, LENGTHS), variants[0])


@pytest.mark.parametrize("pooling", ["mean", "max", "cls"])
@pytest.mark.parametrize(
    "attention",
    ["sdpa", "standard", "linear", "performer(16)", "linformer(8)", "local(5) | sinks(2)"],
)
def test_padding_has_no_influence(pooling, attention):
    model = make(attention, pooling=pooling)
    other = TOKENS.clone()
    other[1, 13:] = 0
    other[2, 1:] = 7
    torch.testing.assert_close(model(TOKENS, LENGTHS), model(other, LENGTHS))


def test_embeddings_and_their_gradients_are_those_of_one_table():
    table = TokenEmbedding(11, 6).double()
    tokens = torch.randint(0, 11, (3, 200)) * (torch.rand(3, 200) < 0.5)  # most are 0
    weights = torch.randn(3, 200, 6, dtype=torch.float64)
    (table(tokens) * weights).sum().backward()
    other = table.weight.detach().clone().requires_grad_()
    expected = torch.nn.functional.embedding(tokens, other)
    (expected * weights).sum().backward()
    assert torch.equal(table(tokens), expected)
    torch.testing.assert_close(table.weight.grad, other.grad)
    assert 0.01 < TokenEmbedding(256, 64).weight.std() < 0.03


def test_rotary_positions_are_relative():
    q, k = torch.randn(2, 1, 30, 1, 8, dtype=torch.float64)
    rope_cos_sin = rotary_cos_sin(torch.arange(60), 8).double()
    scores = [
        torch.einsum("bqhd,bkhd->qk", rotate(q, a), rotate(k, a))
        for a in (rope_cos_sin[:, :30], rope_cos_sin[:, 17:47])
    ]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [1, 3, 50])
def test_short_convolution_is_causal_and_depthwise(width):
    """Against PyTorch's, also where it is wider than the sequence."""
    conv, x = ShortConv(8, width).double(), torch.randn(2, 40, 4, 2, dtype=torch.float64)
    channels = torch.nn.functional.pad(x.flatten(2).mT, (width - 1, 0))
    kernel = conv.weight.T.flip(1)[:, None]
    expected = x.flatten(2) + torch.nn.functional.conv1d(channels, kernel, groups=8).mT
    torch.testing.assert_close(conv(x).flatten(2), expected)
    torch.testing.assert_close(conv(x[:, :7]), conv(x)[:, :7])


def test_a_short_convolution_of_values_of_another_width():
    model = make("local(5)", short_conv=3, v_head_dim=5)
    model(TOKENS, LENGTHS).sum().backward()
    assert all(conv.weight.grad.any() for conv in model.layers[0].attention.short_convs)


def test_models_with_a_short_convolution():
    """Padding has no influence; without it the weights are as before."""
    model = make("local(5)", short_conv=3, positions="none")
    other = TOKENS.clone()
    other[1, 13:] = 0
    out = model(TOKENS, LENGTHS)
    torch.testing.assert_close(out, model(other, LENGTHS))
    out.sum().backward()
    assert all(conv.weight.grad.any() for conv in model.layers[0].attention.short_convs)
    assert not any("short" in name for name, _ in make().named_parameters())
    with pytest.raises(ValueError, match="short_conv must be 0"):
        make(short_conv=-1)
    with pytest.raises(ValueError, match="needs rotary positions"):
        make(positions="none", initial_span=(1.0,))


def test_without_positions_order_has_no_influence():
    model = make(positions="none")
    shuffled = TOKENS[:, torch.randperm(40)]
    torch.testing.assert_close(model(TOKENS, None), model(shuffled, None))


def test_the_clock_sees_attention_forward_and_backward():
    model = make("local(5)")
    clock = AttentionClock(torch.device("cpu"))
    model.set_clock(clock)
    model(TOKENS, LENGTHS).sum().backward()
    assert len(clock.starts) == len(clock.ends) == 4  # 2 layers, forward and backward
    assert clock.milliseconds() > 0
    grads = [p.grad.clone() for p in model.parameters()]
    model.set_clock(None)
    model.zero_grad()
    model(TOKENS, LENGTHS).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_rotary_positions_on_a_grid_are_relative_too():
    q, k = torch.randn(2, 1, 12, 1, 8, dtype=torch.float64)
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    scores = []
    for shift in ((0, 0), (5, 9)):
        rope_cos_sin = rotary_cos_sin(grid + torch.tensor(shift), 8).double()
        scores.append(
            torch.einsum("bqhd,bkhd->qk", rotate(q, rope_cos_sin), rotate(k, rope_cos_sin))
        )
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)
    model = make(
        positions="rotary2d", coordinates=torch.cartesian_prod(*2 * [torch.arange(40)])[:40]
    )
    assert model(TOKENS, LENGTHS).shape == (3, 10)
    with pytest.raises(ValueError, match="must be an image"):
        make(positions="rotary2d")


@pytest.mark.parametrize("positions", ["rotary", "rotary2d"])
def test_heads_attend_within_their_initial_span(positions):
    grid = torch.cartesian_prod(torch.arange(5), torch.arange(8))
    model = make(positions=positions, coordinates=grid, initial_span=(1.0, 3.0), dim=32)
    for layer in model.layers:
        attention = layer.attention
        q, k = attention.to_q.bias.view(1, 1, 2, 16), attention.to_k.bias.view(1, 1, 2, 16)
        q, k = (rotate(x.expand(1, 40, 2, 16), attention.rope_cos_sin) for x in (q, k))
        scores = torch.einsum("bqhd,bkhd->hqk", q, k) / 16**0.5
        for head, reach in enumerate((1, 3)):  # along a row, and along a column
            expected = scores[head, 0, 0] - 1
            torch.testing.assert_close(scores[head, 0, reach], expected)
            if positions == "rotary2d":
                torch.testing.assert_close(scores[head, 0, 8 * reach], expected)
            assert scores[head, 20].argmax() == 20
    assert model(TOKENS, LENGTHS).shape == (3, 10)
    values = make(positions=positions, coordinates=grid, dim=32).layers[0].attention.to_v.bias
    torch.testing.assert_close(model.layers[0].attention.to_v.bias, values)
    with pytest.raises(ValueError, match="needs rotary positions"):
        make(initial_span=(1.0,))
    with pytest.raises(ValueError, match="must be positive"):
        make(positions=positions, coordinates=grid, initial_span=(0.0,))
    with pytest.raises(ValueError, match="at most one for each of 2 heads"):
        make(positions=positions, coordinates=grid, initial_span=(1.0, 2.0, 3.0))


def test_pairs():
    model = make(pairs=True)
    pairs = torch.stack([TOKENS, TOKENS.flip(0)], 1)
    lengths = torch.stack([LENGTHS, LENGTHS.flip(0)], 1)
    x, y = model.encode(TOKENS, LENGTHS), model.encode(TOKENS.flip(0), LENGTHS.flip(0))
    expected = model.head(torch.cat([x, y, x * y, x - y], -1))
    torch.testing.assert_close(model(pairs, lengths), expected)


def test_no_lengths_means_no_padding():
    model = make("local(5)")
    torch.testing.assert_close(model(TOKENS, None), model(TOKENS, torch.full((3,), 40)))


def test_bad_sizes():
    with pytest.raises(ValueError, match="multiple of heads"):
        ModelConfig(dim=10, heads=4)
    with pytest.raises(ValueError, match="multiple of 2"):
        ModelConfig(dim=9, heads=3, positions="rotary")
    with pytest.raises(ValueError, match="unknown pattern"):
        make("lokal(3)")
