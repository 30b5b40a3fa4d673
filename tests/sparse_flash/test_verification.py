"""`verify`: it passes where attention is right, and names the check that fails where it is not."""

from __future__ import annotations

import pytest
import torch

from sparse_flash import masks, verification, verify

RIGHT = {
    "causal": (masks.causal(), {}),
    "ragged": (masks.local(20) | masks.sinks(3), {"q_len": 200, "kv_len": 190}),
    "empty rows": (masks.block_local(32, 1) & ~masks.sinks(96), {"q_len": 160}),
    "nothing": (~masks.full(), {"q_len": 70}),
    "by head": (masks.per_head([masks.causal(), masks.local(9)]), {"q_len": 96, "batch": 2}),
    "grouped": (masks.strided(16), {"q_len": 130, "heads": 4, "kv_heads": 2}),
    "extents": (masks.patches(8, 8, (2, 2)), {}),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_patterns_pass(name, capsys):
    mask, options = RIGHT[name]
    result = verify(mask, head_dim=16, device="cpu", repeats=2, **options)
    assert result.passed, str(result)
    shown = capsys.readouterr().out
    assert shown.rstrip() == str(result)
    assert "all checks passed" in shown
    assert "reference" in result.subject


def test_a_layout_is_checked_by_its_own_elements():
    layout = masks.local(20).layout(200, block=(32, 64))
    assert verify(layout, head_dim=16, repeats=1, show=False).passed
    with pytest.raises(
        ValueError, match=r"the layout is for lengths \(200, 200\), got \(100, 200\)"
    ):
        verify(layout, 100, show=False)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 8), (torch.bfloat16, 32)])
def test_dtypes(dtype, head_dim):
    mask = masks.causal() & masks.local(33)
    assert verify(
        mask, 150, head_dim=head_dim, dtype=dtype, repeats=1, device="cpu", show=False
    ).passed


def spoiled(change):
    """block_sparse_attention with a fault."""

    def attend(q, k, v, **options):
        out, lse = verification.block_sparse_attention_before(q, k, v, **options)
        return change(q, k, v, out, lse)

    return attend


calls = iter(range(10**6))
FAULTS = {
    "output against float64": lambda q, k, v, out, lse: (out * 1.01, lse),
    "dQ against float64": lambda q, k, v, out, lse: (out + 0.05 * (q - q.detach()), lse),
    "dK against float64": lambda q, k, v, out, lse: (out + 0.05 * (k - k.detach()), lse),
    "dV against float64": lambda q, k, v, out, lse: (out + 0.05 * (v - v.detach()), lse),
    "logsumexp against float64": lambda q, k, v, out, lse: (out, lse + 1e-3),
    "queries without keys": lambda q, k, v, out, lse: (out, lse.clamp(min=-1e9)),
    "NaN in keys beyond kv_lens": lambda q, k, v, out, lse: (out + 0 * v[:, -1:].sum(), lse),
    "NaN in another head": lambda q, k, v, out, lse: (out + 0 * k[:, :, :1].sum(), lse),
    "deterministic=True, repeated": lambda q, k, v, out, lse: (out + 1e-9 * next(calls), lse),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_named(name, monkeypatch):
    before = verification.block_sparse_attention
    monkeypatch.setattr(verification, "block_sparse_attention_before", before, raising=False)
    monkeypatch.setattr(verification, "block_sparse_attention", spoiled(FAULTS[name]))
    mask = masks.block_local(32, 1) & ~masks.sinks(96)
    result = verify(mask, 128, head_dim=16, device="cpu", repeats=3, show=False)
    assert name in [check.name for check in result.checks if not check.passed], str(result)
    assert "FAILED" in str(result)


def test_a_layout_that_is_not_the_masks_fails(monkeypatch):
    wrong = masks.local(5).layout(128)
    monkeypatch.setattr(masks.Mask, "layout", lambda *_, **__: wrong)
    result = verify(masks.local(4), 128, head_dim=16, device="cpu", repeats=1, show=False)
    failed = {check.name for check in result.checks if not check.passed}
    assert "layout against the mask" in failed
    assert "output against float64" in failed


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((masks.causal(), 0), ValueError, "q_len"),
        (("causal()",), TypeError, "mask"),
        ((masks.causal(), 64, 64, {"repeats": 0}), ValueError, "repeats must be at least 1"),
        ((masks.causal(), 64, 64, {"heads": 3, "kv_heads": 2}), ValueError, "multiple"),
        ((masks.causal(), 64, 64, {"impl": "sm90"}), ValueError, "cannot run this"),
    ],
)
def test_refusals(arguments, error, message):
    *positional, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        verify(*positional, device="cpu", show=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RIGHT)
def test_right_patterns_pass_on_a_gpu(name, dtype):
    mask, options = RIGHT[name]
    result = verify(mask, head_dim=64, device="cuda", dtype=dtype, show=False, **options)
    assert result.passed, str(result)
    assert "sm90" in result.subject
