"""Which implementation "auto" takes for score terms, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparse_flash.kernels.device import DeviceFacts
from sparse_flash.kernels.sm80 import attention as sm80
from sparse_flash.kernels.sm90 import attention as sm90

from sparse_flash.implementations.choose import choose
from sparse_flash.implementations.score_features import (
    ALIBI,
    DROPOUT,
    FEATURES,
    RELATIVE,
    RELATIVE_2D,
    SINKS,
    SLOPES,
    SOFTCAP,
    WIDTH,
    ScoreFeature,
)
from tests.kernels.helpers import H200
from tools.score_table import call_of


@pytest.fixture(autouse=True)
def _on_gpu(monkeypatch):
    for module in (sm80, sm90):
        monkeypatch.setattr(module, "unsupported_reason", lambda *_: None)
    monkeypatch.setitem(DeviceFacts._of, torch.device("meta"), H200)


@pytest.mark.parametrize(
    ("feature", "gradients", "offset", "name"),
    [
        (SINKS, True, False, "sm90"),
        (SINKS, False, True, "sm90"),
        (SINKS, True, True, "sm80"),
        (ALIBI, True, False, "sm90"),
        (ALIBI, False, True, "sm90"),
        (SLOPES, True, False, "sm90"),
        (RELATIVE, True, False, "sm90"),
        (RELATIVE, False, True, "sm90"),
        (DROPOUT, True, False, "sm90"),
        (DROPOUT, False, True, "sm90"),
        (WIDTH, False, False, "sm90"),
        (WIDTH, True, False, "sm90"),
        # What only the portable kernels compute.
        (WIDTH, False, True, "sm80"),
        (SLOPES, True, True, "sm80"),
        (RELATIVE, True, True, "sm80"),
        (RELATIVE_2D, False, False, "sm80"),
        (RELATIVE_2D, True, False, "sm80"),
        (RELATIVE_2D, False, True, "sm80"),
        (RELATIVE_2D, True, True, "sm80"),
    ],
)
def test_auto(feature, gradients, offset, name):
    assert choose("auto", call_of(feature, 64, gradients, offset)).name == name


@pytest.mark.parametrize(("head_dim", "width"), [(192, 128), (64, 128), (64, 192)])
@pytest.mark.parametrize("gradients", [False, True])
def test_values_of_another_width(head_dim, width, gradients):
    call = call_of(WIDTH, head_dim, gradients, False)
    call = replace(call, v=call.v.new_empty(*call.v.shape[:3], width))
    assert choose("auto", call).name == "sm90"


def test_by_name():
    assert choose("sm90", call_of(ALIBI, 64, False, True)).name == "sm90"
    with pytest.raises(ValueError, match="relative positions of images"):
        choose("sm90", call_of(RELATIVE_2D, 64, True, False))
    with pytest.raises(ValueError, match="up to head_dim 128, not 256"):
        choose("sm90", call_of(ALIBI, 256, True, False))


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_auto_outside_hopper(monkeypatch, feature, gradients, offset, head_dim):
    """The kernels for Ampere compute them at all head_dims, and at positions."""
    monkeypatch.setattr(sm90, "unsupported_reason", lambda *_: "no Hopper")
    assert choose("auto", call_of(feature, head_dim, gradients, offset)).name == "sm80"


def with_terms(call, **terms):
    return replace(call, terms=call.terms._replace(**terms))


@pytest.mark.parametrize("feature", [SLOPES, RELATIVE, RELATIVE_2D], ids=lambda f: f.name)
def test_gradients_of_biases(feature: ScoreFeature):
    """With a softcap, in a fixed order, with dropout, and of a large head_dim."""
    call = call_of(feature, 64, True, False)
    seed = torch.zeros(1, dtype=torch.int64, device="meta")
    dropout = {"seed": seed, "dropped": 26}
    first = "sm80" if feature is RELATIVE_2D else "sm90"
    for changed, name in (
        (with_terms(call, softcap=3.0), first),
        (replace(call, deterministic=True), first),
        (with_terms(call, softcap=3.0, **dropout), first),
        (with_terms(call_of(feature, 128, True, False), **dropout), first),
        (call_of(feature, 256, True, False), "sm80"),
    ):
        assert choose("auto", changed).name == name


def test_refusals_outside_hopper():
    zero = replace(call_of(SOFTCAP, 64, False, False), softmax_scale=0.0)
    with pytest.raises(ValueError, match="softmax_scale other than 0"):
        choose("sm80", zero)
