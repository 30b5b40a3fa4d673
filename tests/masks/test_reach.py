"""Reach: layers until every token can influence every other, exactly and by tiles."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_flash import masks

SPECS = [
    "full()", "local(5)", "butterfly(16)", "global_tokens(1)", "block_diagonal(8)", "causal()",
    "sinks(1) | local((0, 4))", "local((6, 0))", "local((6, 0)) | sinks(2)", "~causal()",
    "causal() & strided(8)", "causal() & ~local(0)", "dilated(2, 4)", "causal() & dilated(3, 2)",
    "longnet((16, 64), (1, 4))", "random_blocks(.05, 1)", "causal() & block_local(16, 2)",
    "random_blocks(.02, 1) & causal() | local((1, 0))", "dilated(2, 4) & causal() | sinks(1)",
]  # fmt: skip


def by_powers(mask, n):
    """The definition, densely."""
    one = mask(torch.arange(n)[:, None], torch.arange(n))
    goal = torch.ones(n, n).bool() if one.triu(1).any() else torch.ones(n, n).tril().bool()
    one = one | torch.eye(n).bool()
    power, layers = one, 1
    while not power[goal].all():
        wider = (one.float() @ power.float()) > 0
        if torch.equal(wider, power):
            return None
        power, layers = wider, layers + 1
    return layers


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("n", [1, 60, 257, 300])
def test_reach_and_its_bounds(spec, n):
    mask = masks.parse(spec)
    expected, (least, most) = by_powers(mask, n), mask.reach_bounds(n)
    assert mask.reach(n) == expected
    if expected is None:
        assert most is None
    else:
        assert least <= expected
        assert most is None or expected <= most


def test_bounds_of_long_sequences():
    assert masks.butterfly(128).reach_bounds(65536) == (9, 9)
    assert masks.causal().reach_bounds(65536) == (1, 1)
    assert masks.block_diagonal(4096).reach_bounds(65536) == (math.inf, None)
    least, most = masks.local(1024).reach_bounds(65536)
    assert least <= 64 <= most  # ceil(65535 / 1024)
    with pytest.raises(ValueError, match=r"at least \d+ layers, .*: take reach_bounds\(length\)"):
        masks.local(1024).reach(1 << 20)


def test_heads_are_mixed():
    heads = masks.per_head([masks.dilated((0, 8), 2), masks.local((1, 1))])
    assert heads.reach(64) == (masks.dilated((0, 8), 2) | masks.local(1)).reach(64)
