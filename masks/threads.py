"""Threads for work on numpy arrays, which releases the GIL; as many as torch uses, up to 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
_FEW = 4  # fewer parts run faster without threads
_MOST = 4  # threads: more would wait for the GIL
_TASKS = 8  # per thread: they end at about the same time


def in_threads(work: Callable[[S], T], parts: Sequence[S]) -> list[T]:
    """The results of `work` for all parts, in order; the first part runs before the others.

    Torch modes are thread-local: `work` must enter the modes that it needs.

    >>> in_threads(lambda n: n * n, range(5))
    [0, 1, 4, 9, 16]
    """
    results, threads = [work(part) for part in parts[:1]], min(_MOST, torch.get_num_threads())
    if threads == 1 or len(parts) < _FEW:
        return results + [work(part) for part in parts[1:]]
    # A task of the pool costs 0.1 ms: tasks are runs of parts, a few for each thread.
    size = -(-len(parts) // (_TASKS * threads))
    tasks = [parts[i : i + size] for i in range(1, len(parts), size)]
    with ThreadPoolExecutor(min(threads, len(tasks))) as pool:
        for done in pool.map(lambda task: [work(part) for part in task], tasks):
            results += done
    return results
