"""Curves of a run, from the records of its log."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from sparse_flash.experiments.logger import Record

LEARNED = ("train/loss", "train/accuracy")  # training metrics of the batches


def training_curve(history: Sequence[Record], steps: Sequence[float]) -> list[list[float]]:
    """Mean loss and accuracy of the logged batches between consecutive steps of `steps`.

    It covers the batches that the model saw, curriculum examples included; `curve` is of the
    validation set.

    >>> history = [("train/loss", 0.7, 1, 0.0), ("train/loss", 0.5, 2, 0.0)]
    >>> history += [("train/accuracy", 0.4, 1, 0.0), ("train/accuracy", 0.8, 2, 0.0)]
    >>> training_curve(history, [2])
    [[2, 0.6, 0.6]]
    """
    rows: list[list[float]] = []
    for before, end in itertools.pairwise([0, *steps]):
        some = [record for record in history if before < record[2] <= end]
        logged = [[value for tag, value, *_ in some if tag == name] for name in LEARNED]
        if all(logged):
            rows.append([end, *(round(statistics.fmean(values), 6) for values in logged)])
    return rows
