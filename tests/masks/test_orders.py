"""Token orders of one's own, and who permutes what."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from sparse_flash import block_sparse_attention, masks

GENERATOR = torch.Generator().manual_seed(0)
SHUFFLED = torch.randperm(60, generator=GENERATOR)


@pytest.mark.parametrize(
    "given",
    [SHUFFLED, SHUFFLED.int(), SHUFFLED.to(torch.uint8), SHUFFLED.tolist(),
     SHUFFLED.numpy(), SHUFFLED.numpy().astype(np.uint16), tuple(SHUFFLED.tolist())],
)  # fmt: skip
def test_orders_are_values(given):
    order, twin = masks.order(given, name="mine"), masks.order(SHUFFLED, name="mine")
    assert order == twin
    assert hash(order) == hash(twin)
    assert order != masks.order(SHUFFLED)
    assert order != masks.order(SHUFFLED.flip(0), name="mine")
    assert torch.equal(order.permutation, SHUFFLED)
    assert torch.equal(order.permutation[order.inverse], torch.arange(60))
    for same in (pickle.loads(pickle.dumps(order)), copy.deepcopy(order)):
        assert same == order
        assert torch.equal(same.inverse, order.inverse)
    assert eval(repr(order), vars(masks).copy()) == order
    mask = masks.local(3).through(order) | masks.sinks(2)
    assert masks.parse(repr(mask)) == mask


def test_large_orders_say_that_they_do_not_evaluate():
    order = masks.order(torch.arange(1 << 19))
    assert repr(order).startswith("order(<1 x 524288, sha256 ")
    assert len(repr(order)) < 60


def test_masks_through_an_order():
    order = masks.order(SHUFFLED)
    mask = (masks.causal() & masks.local(9)).through(order)
    i, j = SHUFFLED[:, None], SHUFFLED
    assert torch.equal(mask.layout(60, block=(16, 16)).to_dense(), (j <= i) & (i - j <= 9))
    with pytest.raises(ValueError, match="does not have the 60 tokens"):
        masks.documents((3, 4)).through(order)
    with pytest.raises(ValueError, match="is made for q_len=60, not 61"):
        mask.layout(61)


@pytest.mark.parametrize("order", [masks.order(SHUFFLED), masks.hilbert(6, 10)])
def test_attention_on_permuted_tokens_is_attention_on_tokens(order):
    q, k, v = (torch.randn(2, 60, 2, 4, generator=GENERATOR, requires_grad=True) for _ in "qkv")
    mask = masks.neighborhood(6, 10, 2)
    expected = block_sparse_attention(q, k, v, mask)
    permuted = [order.permute(x) for x in (q, k, v)]
    out = order.restore(block_sparse_attention(*permuted, mask.through(order)))
    assert torch.allclose(out, expected, atol=1e-5)
    (gradient,) = torch.autograd.grad(out.square().sum(), q, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), q)
    assert torch.allclose(gradient, wanted, atol=1e-4)


def test_dimensions_of_permuted_tensors():
    order, x = masks.order([2, 0, 1]), torch.arange(12).view(4, 3)
    assert torch.equal(order.permute(x), x[:, [2, 0, 1]])
    assert torch.equal(order.permute(x, dim=-1), x[:, [2, 0, 1]])
    assert torch.equal(order.permute(x.T, dim=0), x.T[[2, 0, 1]])
    assert torch.equal(order.restore(order.permute(x)), x)
    with pytest.raises(ValueError, match=r"orders 3 tokens, but x of shape \(4, 3\) has 4 along"):
        order.permute(x, dim=0)
    with pytest.raises(ValueError, match="no dimension 1: pass dim="):
        order.permute(torch.arange(3))
    with pytest.raises(TypeError, match="x must be a torch.Tensor, got list"):
        order.permute([1, 2, 3])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([0, 1, 1], ValueError, "1 occurs 2 times and 2 never"),
        ([0, 3, 1], ValueError, r"3 is not in 0..2"),
        (torch.tensor([0, -1]), ValueError, r"-1 is not in 0..1"),
        ([], ValueError, "must not be empty"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "1..2147483647 entries, got 0"),
        (torch.rand(4), TypeError, "one-dimensional integers, got shape .* of float32"),
        (torch.zeros(2, 2).long(), TypeError, "one-dimensional integers"),
        (torch.empty(3, device="meta", dtype=torch.int64), TypeError, "meta device holds no data"),
        ([0.5, 1], TypeError, "must be an int"),
        ("3x", ValueError, "is not a text printed by repr"),
    ],
)
def test_what_is_no_order(given, error, message):
    with pytest.raises(error, match=message):
        masks.order(given)
    with pytest.raises(TypeError, match="name must be a str"):
        masks.order([0, 1], name=3)
