"""Reach: layers until every token can influence every other, exactly and by tiles."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_flash.masks import following, reach

from sparse_flash import masks
from tests.strategies import any_length_patterns, compositions

SPECS = [
    "full()", "local(5)", "butterfly(16)", "global_tokens(1)", "block_diagonal(8)", "causal()",
    "sinks(1) | local((0, 4))", "local((6, 0))", "local((6, 0)) | sinks(2)", "~causal()",
    "causal() & strided(8)", "causal() & ~local(0)", "dilated(2, 4)", "causal() & dilated(3, 2)",
    "longnet((16, 64), (1, 4))", "random_blocks(.05, 1)", "causal() & block_local(16, 2)",
    "block_local(10, 0)", "strided(9)", "fixed(12, 3)", "star(7)", "longformer(4, 2)",
    "sinks(3) & ~local(0)", "block_diagonal(9) | sinks(1)",
    "random_blocks(.05, 4)", "random_blocks(.3, 20) & ~local(0)", "causal() & fixed(12, 3)",
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
@pytest.mark.parametrize("n", [1, 17, 60, 257, 300])
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
    with pytest.raises(ValueError, match=r"at least \d+ layers, .*: use reach_bounds\(length\)"):
        masks.local(1024).reach(1 << 20)


def test_bounds_without_evaluation(monkeypatch):
    """Where too many tiles are open, they may hold anything."""
    monkeypatch.setattr(reach, "_ELEMENTS", 0)
    for spec in ("random_blocks(.1, 1) & local(20)", "random_blocks(.3, 1) & causal()",
                 "random_blocks(.1, 1) & block_diagonal(64)"):  # fmt: skip
        mask = masks.parse(spec)
        expected, (least, most) = by_powers(mask, 257), mask.reach_bounds(257)
        assert most is None
        assert least <= (math.inf if expected is None else expected)
    assert least == math.inf


def test_heads_are_mixed():
    heads = masks.per_head([masks.dilated((0, 8), 2), masks.local((1, 1))])
    assert heads.reach(64) == (masks.dilated((0, 8), 2) | masks.local(1)).reach(64)


@settings(max_examples=80, deadline=None)
@given(compositions(any_length_patterns()), st.integers(1, 150), st.booleans(), st.integers(2, 70))
def test_reach_of_compositions(mask, n, causal, sample):
    """Few sources in the sample: the others must be found."""
    mask = mask & masks.causal() if causal else mask
    before, following._SAMPLE = following._SAMPLE, sample
    try:
        assert mask.reach(n) == by_powers(mask, n)
    finally:
        following._SAMPLE = before


def test_sources_that_a_sample_misses(monkeypatch):
    """One token is far from all others, and no sample has it."""
    n = 600
    table = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < 0.05
    table[301], table[:, 301] = False, False
    table[301, 302] = table[302, 301] = True
    table[302], table[:, 302] = False, False
    table[302, 301] = table[301, 302] = table[302, 303] = table[303, 302] = True
    mask = masks.from_dense(table)
    monkeypatch.setattr(following, "_SAMPLE", 64)
    assert mask.reach(n) == by_powers(mask, n)
    table[302, 301] = False  # nobody sees token 301, and no sample shows it
    mask = masks.from_dense(table)
    assert mask.reach(n) is by_powers(mask, n) is None


RUNS = [
    "neighborhood(32, 32, (13, 4))",
    "neighborhood(32, 32, (3, 9)) & ~local(2)",
    "causal() & local(70)",
    "local(3) | dilated(90, 7)",
    "random_blocks(.4, 1)",
    "random_blocks(.05, 1) | local(9)",
]


@pytest.mark.parametrize("spec", RUNS)
@pytest.mark.parametrize("kept", [0, 1 << 25])
def test_windows_cover_runs(monkeypatch, spec, kept):
    """With and without a cache of windows, and of pairs that rows share; several word slices."""
    monkeypatch.setattr(following, "_KEPT", kept)
    monkeypatch.setattr(following, "_WIDTH", 3)
    monkeypatch.setattr(following, "_TOGETHER", 50)
    mask, n = masks.parse(spec), 1024
    assert mask.reach(n) == by_powers(mask, n)


def test_pairs_of_windows_are_shared():
    layout = reach.union_layout([masks.neighborhood(32, 32, (13, 4))], 1024, 64)
    tokens = following.Tokens.of(following.bit_rows(layout), np.ones(1024, np.bool_))
    graph = following.Graph(tokens, following.Budget(1e12))
    assert 0 < 4 * len(graph._shared) <= graph._count
    seen = graph.layer(following._as_words(graph.rows))
    dense = np.unpackbits(graph.rows, axis=1, bitorder="little")[:, :1024].astype(float)
    found = np.unpackbits(seen.view(np.uint8), axis=1, bitorder="little")[:, :1024]
    assert np.array_equal(found > 0, dense @ dense > 0)


@pytest.mark.parametrize("spec", ["longnet((64, 256, 2048), (1, 4, 16))", "global_tokens(3)",
                                  "random_blocks(.2, 100)", "sinks(2) & ~local(0)"])  # fmt: skip
def test_twins_stand_for_each_other(spec):
    mask, n = masks.parse(spec), 1024
    layout = reach.union_layout([mask], n, 64)
    tokens = following.Tokens.of(following.bit_rows(layout), torch.ones(n).bool().numpy())
    assert len(tokens) < n // 2
    assert mask.reach(n) == by_powers(mask, n)


def test_work_is_bounded(monkeypatch):
    monkeypatch.setattr(reach, "_WORK", 1e6)
    with pytest.raises(ValueError, match=r"at least [2-9]\d* layers, .*take minutes"):
        masks.parse("random_blocks(.01, 1)").reach(1024)


def test_threads_change_nothing():
    mask, threads = masks.neighborhood(24, 24, (2, 5)), torch.get_num_threads()
    expected = by_powers(mask, 576)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert mask.reach(576) == expected
    finally:
        torch.set_num_threads(threads)


SORTS = """
import json, time
import numpy as np
import torch
torch.set_num_threads(1)
from sparse_flash import masks
numbers = np.random.default_rng(0).integers(0, 1 << 62, 1 << 22)
def taken(run):
    start = time.process_time()
    run()
    return time.process_time() - start
sort = min(taken(lambda: np.sort(numbers)) for _ in range(5))
for spec, n, what in {cases}:
    print(json.dumps([spec, taken(lambda: getattr(masks.parse(spec), what)(n)) / sort]))
"""
LONGNET = "longnet((2048, 4096, 8192, 16384), (1, 2, 4, 6))"
LIMITS = {  # 10 s are 250 sorts of 40 ms
    (LONGNET, 16384, "reach"): 60,
    ("strided(100)", 16384, "reach"): 150,
    ("causal() & strided(128)", 16384, "reach"): 120,
    ("global_tokens(3)", 16384, "reach"): 40,
    ("random_blocks(.1, 100)", 16384, "reach"): 100,
    ("neighborhood(128, 128, (9, 30))", 16384, "reach"): 180,
    ("butterfly(64) | local(100)", 65536, "reach_bounds"): 100,
    (LONGNET, 65536, "reach_bounds"): 100,
    ("strided(100)", 65536, "reach_bounds"): 250,
}


@pytest.mark.slow
def test_reach_in_units_of_a_sort():
    """CPU time, in units of numpy's sort of 4 Mi integers in the same process (about 40 ms)."""
    script = SORTS.format(cases=list(LIMITS))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    print(done.stdout)
    for line, limit in zip(done.stdout.splitlines(), LIMITS.values(), strict=True):
        assert json.loads(line)[1] <= limit, line
