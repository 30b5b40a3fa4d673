"""Threads for work on numpy arrays, which releases the GIL; as many as torch uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
_FEW = 4  # fewer parts run faster without threads


def in_threads(work: Callable[[S], T], parts: Sequence[S]) -> list[T]:
    """The results of `work` for all parts, in order; the first part runs before the others.

    Torch modes are thread-local: `work` must enter the modes that it needs.

    >>> in_threads(lambda n: n * n, range(5))
    [0, 1, 4, 9, 16]
    """
    results, threads = [work(part) for part in parts[:1]], torch.get_num_threads()
    if threads == 1 or len(parts) < _FEW:
        return results + [work(part) for part in parts[1:]]
    with ThreadPoolExecutor(min(threads, len(parts))) as pool:
        return results + list(pool.map(work, parts[1:]))
