"""Score terms and dropout of attention in the experiments' model."""

from __future__ import annotations

import pytest
import torch
from sparse_flash.experiments.config import ModelConfig
from sparse_flash.experiments.model import Encoder

LENGTHS = torch.tensor([30, 20])
FIELDS = {
    "attention_dropout": 0.5,
    "score_bias": "relative",
    "softcap": 2.0,
    "sinks": True,
    "v_head_dim": 5,
}


def encoder(attention="local(8)", **fields):
    config = ModelConfig(dim=16, heads=2, layers=1, ffn=16, dropout=0.0, **fields)
    return Encoder(config, vocabulary=16, classes=10, length=30, attention=attention)


def test_all_fields_reach_the_layer_and_learn():
    torch.manual_seed(0)
    model, tokens = encoder(**FIELDS), torch.randint(16, (2, 30))
    first, second = model(tokens, LENGTHS), model(tokens, LENGTHS)
    assert not torch.equal(first, second)  # dropout
    first.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    assert torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))


@pytest.mark.parametrize("field", FIELDS)
def test_other_attention_refuses(field):
    with pytest.raises(ValueError, match=f"the attention 'standard' has no {field}"):
        encoder("standard", **{field: FIELDS[field]})


def test_defaults_change_nothing():
    assert ModelConfig().score_options() == {}
    with pytest.raises(ValueError, match="attention_dropout must be in"):
        ModelConfig(attention_dropout=1.0)
    with pytest.raises(ValueError, match="softcap must be 0 or positive"):
        ModelConfig(softcap=-1.0)
