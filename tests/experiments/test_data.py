"""ListOps is what its specification says; batches are repeatable."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_flash.experiments.data import listops
from sparse_flash.experiments.data.dataset import CurriculumSampler, Sampler, Split
from sparse_flash.experiments.data.listops import CLOSE, ListOps

from tests.experiments.conftest import TINY


@given(st.integers(0, 10_000))
def test_trees_evaluate_to_their_value(seed):
    tokens: list[int] = []
    task = ListOps(max_length=4000)
    value = listops.tree(random.Random(seed), task, tokens)
    if len(tokens) < 4000:
        assert listops.evaluate(tokens) == value


def test_operators():
    assert listops.apply(2, [1, 2, 3, 9]) == 2  # 2.5, truncated
    assert listops.apply(2, [9, 1, 5]) == 5
    assert listops.apply(3, [9, 9, 9]) == 7


def test_distribution_is_long_range_arenas():
    """Three digits in four, depth at most 10, 2 to 10 children, lengths between the limits."""
    task, rng = ListOps(), random.Random(0)
    roots = [listops.tree(rng, task, tokens := []) is not None and len(tokens) for _ in range(4000)]
    assert 0.72 < sum(n == 1 for n in roots) / len(roots) < 0.78
    accepted, tries = [], 0
    while len(accepted) < 60:
        tokens = []
        listops.tree(rng, task, tokens)
        tries += 1
        if task.min_length < len(tokens) < task.max_length:
            accepted.append(tokens)
    assert 0.05 < len(accepted) / tries < 0.12  # the specification: 8.4 %
    assert 900 < statistics.fmean(map(len, accepted)) < 1200  # 1058
    for tokens in accepted:
        depth = deepest = 0
        children: list[int] = []
        for token in tokens:
            if token > 10 and token != CLOSE:
                depth += 1
                children.append(0)
                deepest = max(deepest, depth)
                continue
            if token == CLOSE:
                depth -= 1
                assert 2 <= children.pop() <= 10
            if children:
                children[-1] += 1
        assert depth == 0
        assert deepest <= 9  # at depth 10 everything is a digit


def test_splits(tiny_data):
    splits = (tiny_data.train, tiny_data.val, tiny_data.test)
    assert [len(s) for s in splits] == [300, 40, 60]
    rows = [bytes(row) for s in splits for row in s.tokens.tolist()]
    assert len(set(rows)) == 400, "no sequence appears twice"
    for split in splits:
        for row, length, label in zip(
            split.tokens.tolist(), split.lengths, split.labels, strict=True
        ):
            assert 5 < length < 48
            assert not any(row[length:])
            assert listops.evaluate(row[:length]) == label


def test_generation_is_repeatable_for_any_number_of_workers(tiny_data):
    again = listops.generate(TINY, workers=2)
    assert torch.equal(again.train.tokens, tiny_data.train.tokens)
    assert torch.equal(again.test.labels, tiny_data.test.labels)


def test_training_begins_with_shorter_lists():
    plain = replace(TINY, min_length=15)
    task = replace(plain, curriculum=(8, 16), curriculum_share=0.25)
    splits, plain = task.load(), plain.load()
    assert torch.equal(splits.train.tokens, plain.train.tokens)
    assert torch.equal(splits.test.labels, plain.test.labels)
    assert (plain.first, splits.first_share) == (None, 0.25)
    first = splits.first
    assert len(first) == 2 * 300
    assert first.tokens.shape[1] == task.length
    assert splits.test.lengths.min() > first.lengths.max()  # test lengths are new
    for i, (row, length, label) in enumerate(
        zip(first.tokens.tolist(), first.lengths.tolist(), first.labels, strict=True)
    ):
        assert 1 < length < (8 if i < 300 else 16)
        assert not any(row[length:])
        assert listops.evaluate(row[:length]) == label


def test_impossible_settings():
    with pytest.raises(ValueError, match="min_length"):
        ListOps(min_length=100, max_length=100)
    with pytest.raises(ValueError, match="at least one example"):
        ListOps(val=0)
    with pytest.raises(ValueError, match="min_length . 1 = 501, got"):
        ListOps(curriculum=(40, 502))
    with pytest.raises(ValueError, match="curriculum_share must be in"):
        ListOps(curriculum=(40,), curriculum_share=1.0)
    with pytest.raises(ValueError, match="different sequences of"):
        ListOps(min_length=1, max_length=5, max_depth=2, max_args=2, train=10**6).load()


def test_batches_depend_on_seed_and_step_alone():
    split = Split(torch.arange(10)[:, None], torch.ones(10).long(), torch.arange(10))
    one, two = Sampler(split, 4, seed=3), Sampler(split, 4, seed=3)
    in_order = [one.batch(step).labels for step in range(10)]
    for step in (7, 2, 9, 0):
        assert torch.equal(two.batch(step).labels, in_order[step])
    seen = torch.cat(in_order[:5])  # two epochs
    assert torch.equal(seen[:10].sort().values, torch.arange(10))
    assert torch.equal(seen[10:].sort().values, torch.arange(10))
    assert not torch.equal(seen[:10], seen[10:])
    other = Sampler(split, 4, seed=4)
    assert any(not torch.equal(other.batch(s).labels, in_order[s]) for s in range(3))


def test_stages_follow_each_other():
    easy, hard = (Split(torch.arange(n)[:, None], None, torch.arange(n)) for n in (6, 10))
    first, then = Sampler(easy, 4, seed=3), Sampler(hard, 4, seed=3)
    batches = [CurriculumSampler(first, 3, then).batch(step).labels for step in (2, 3, 7)]
    expected = [first.batch(2), then.batch(0), then.batch(4)]
    assert all(torch.equal(a, b.labels) for a, b in zip(batches, expected, strict=True))
