"""The processor cores that this process may use."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Number of cores, at least 1: those that `taskset` or a container leaves to the process.

    >>> 1 <= available_cores() <= (os.cpu_count() or 1)
    True
    """
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
