"""Requirements on tasks and their data, checked before training; errors name the task."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from sparse_flash.experiments.config import RunConfig
from sparse_flash.experiments.data import Split, Splits
from sparse_flash.experiments.data.dataset import check_splits, check_task
from sparse_flash.experiments.data.listops import ListOps


def of(tokens, lengths, labels):
    split = Split(torch.as_tensor(tokens), lengths, torch.as_tensor(labels))
    return Splits(split, split, split)


OK = [[1, 2], [3, 0]]


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ((1, 2, 3), "must return Splits.*got tuple"),
        (of([[1, 2, 3]], None, [0]), r"tokens of shape \(1, 2\), got \(1, 3\)"),
        (of([1, 2], None, [0, 0]), r"tokens of shape \(2, 2\), got \(2,\)"),
        (of([[1.0, 2.0]], None, [0]), "tokens of an integer dtype, got torch.float32"),
        (of([[1, 4]], None, [0]), r"tokens in 0..3, got 1..4"),
        (of(OK, None, [0, 2]), "labels in 0..1, got 0..2"),
        (of(OK, None, torch.tensor([0, 1]).int()), "labels of dtype torch.int64, got torch.int32"),
        (of(OK, torch.tensor([2, 3]), [0, 1]), "lengths in 1..2, got 2..3"),
        (of(OK, torch.tensor([2, 0]), [0, 1]), "lengths in 1..2, got 0..2"),
        (of(OK, torch.tensor([2]), [0, 1]), r"lengths of shape \(2,\), got \(1,\)"),
        (Splits(*[Split(torch.zeros(0, 2), None, torch.zeros(0))] * 3), "train has no examples"),
        (Splits(1, 2, 3), "train must be a Split, got int"),
    ],
)
def test_data_that_does_not_fit(splits, words):
    task = SimpleNamespace(length=2, vocabulary=4, classes=2)
    check_splits(task, of(OK, torch.tensor([2, 1]), [0, 1]))
    with pytest.raises(ValueError, match=words):
        check_splits(task, splits)


def test_tasks_that_are_none():
    @dataclass(frozen=True)
    class Bare:
        length: int = 3

    @dataclass(frozen=True)
    class Sized(Bare):
        vocabulary, classes = 3, 0

    @dataclass(frozen=True)
    class Empty(Bare):
        vocabulary, classes = 3, 2

    check_task(ListOps())
    for task, words in {
        3: "a task must be an instance of a dataclass.*got 3",
        ListOps: "instance of a dataclass",
        Bare(): "the task Bare needs an int `vocabulary`",
        Sized(): "the classes of the task Sized must be a positive int, got 0",
        Empty(): r"the task Empty needs a method `load\(\)`",
    }.items():
        with pytest.raises(ValueError, match=words):
            RunConfig(task=task)
