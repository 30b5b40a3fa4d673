"""Which implementation "auto" takes for score terms, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.kernels.sm80 import attention as sm80
from sparse_flash.kernels.sm90 import attention as sm90

from sparse_flash.implementations.choose import choose
from sparse_flash.implementations.score_features import (
    ALIBI,
    DROPOUT,
    RELATIVE,
    RELATIVE_2D,
    SINKS,
    SLOPES,
    WIDTH,
)
from tools.score_table import call_of


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    for module in (sm80, sm90):
        monkeypatch.setattr(module, "unsupported_reason", lambda *_: None)


@pytest.mark.parametrize(
    ("feature", "gradients", "offset", "name"),
    [
        (SINKS, True, False, "sm90"),
        (SINKS, False, True, "sm90"),
        (SINKS, True, True, "reference"),
        (ALIBI, True, False, "sm90"),
        (ALIBI, False, True, "sm90"),
        (SLOPES, True, False, "sm90"),
        (RELATIVE, True, False, "sm90"),
        (RELATIVE, False, True, "sm90"),
        (RELATIVE, True, True, "reference"),
        (RELATIVE_2D, False, False, "reference"),
        (DROPOUT, True, False, "sm90"),
        (DROPOUT, False, True, "sm90"),
        (WIDTH, False, False, "reference"),  # narrower values: not tested on a GPU
    ],
)
def test_auto(feature, gradients, offset, name):
    assert choose("auto", call_of(feature, 64, gradients, offset)).name == name


def test_by_name():
    assert choose("sm90", call_of(ALIBI, 64, False, True)).name == "sm90"
    with pytest.raises(ValueError, match="relative positions of images"):
        choose("sm90", call_of(RELATIVE_2D, 64, True, False))
    call = call_of(SLOPES, 64, True, False)
    with pytest.raises(ValueError, match="no fixed order.*deterministic=True"):
        choose("sm90", replace(call, deterministic=True))
    dropout = {"seed": torch.zeros(1, dtype=torch.int64, device="meta"), "dropped": 26}
    wide = call_of(SLOPES, 128, True, False)
    with pytest.raises(ValueError, match="with dropout up to head_dim 96, not 128"):
        choose("sm90", replace(wide, terms=wide.terms._replace(**dropout)))
    with pytest.raises(ValueError, match="slopes and tables without softcap"):
        choose("sm90", replace(call, terms=call.terms._replace(softcap=3.0)))
    with pytest.raises(ValueError, match="up to head_dim 128, not 256"):
        choose("sm90", call_of(ALIBI, 256, True, False))
