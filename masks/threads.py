"""Work on numpy arrays in as many threads as torch has: numpy releases the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")
_FEW = 4  # parts, below which threads cost more than they save


def in_threads(work: Callable[[S], T], parts: Sequence[S]) -> list[T]:
    """The results of `work` for all parts, in order; the first part is done before the others.

    Modes of torch belong to a thread: `work` enters the modes that it needs.

    >>> in_threads(lambda n: n * n, range(5))
    [0, 1, 4, 9, 16]
    """
    results, threads = [work(part) for part in parts[:1]], torch.get_num_threads()
    if threads == 1 or len(parts) < _FEW:
        return results + [work(part) for part in parts[1:]]
    with ThreadPoolExecutor(min(threads, len(parts))) as pool:
        return results + list(pool.map(work, parts[1:]))
