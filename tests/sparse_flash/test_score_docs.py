"""docs/scores.md has the table that the implementations give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_flash import block_sparse_attention, masks, scores
from sparse_flash.implementations import IMPLEMENTATIONS
from sparse_flash.implementations.score_features import FEATURES, RELATIVE
from sparse_flash.implementations.sm80 import Sm80
from tools.score_table import table

PAGE = Path(__file__).parents[2] / "docs" / "scores.md"


def test_the_table_is_that_of_the_implementations():
    _, _, rest = PAGE.read_text().partition("<!-- scores: begin -->\n")
    written, _, _ = rest.partition("<!-- scores: end -->")
    assert written.strip().splitlines() == list(table()), "run python -m tools.score_table"


def test_the_last_implementation_has_all_features():
    assert IMPLEMENTATIONS[-1].features == frozenset(FEATURES)


def test_a_missing_feature_is_named(monkeypatch):
    from sparse_flash.kernels.sm80 import attention

    monkeypatch.setattr(attention, "unsupported_reason", lambda *_: None)
    q = torch.randn(1, 8, 2, 16).bfloat16()
    bias = scores.relative(torch.zeros(2, 3))
    monkeypatch.setattr(Sm80, "features", Sm80.features - {RELATIVE})
    with pytest.raises(ValueError, match=r"sm80.*not compute relative positions \(bias=.*auto"):
        block_sparse_attention(q, q, q, masks.full(), bias=bias, impl="sm80")
    monkeypatch.setattr(Sm80, "features", frozenset())
    with pytest.raises(ValueError, match=r"values of another head_dim \(v \(b, kv_len, h_kv, d_v"):
        block_sparse_attention(q, q, q[..., :8], masks.full(), impl="sm80")
    out = block_sparse_attention(q, q, q, masks.full(), softcap=3.0)  # the reference
    assert out.shape == q.shape
