"""Memory that is available, and refusals before it runs out: Linux kills what takes too much."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as containers see it
_ALWAYS = 1 << 26  # bytes that are not asked about


def available_memory(device: torch.device) -> int | None:
    """Bytes that a process can still allocate on a device; None where that is unknown."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
        cache = int(statistics[statistics.index("inactive_file") + 1])  # is given up when needed
        found.append(max(0, limit - used + cache))
    return min(found) if found else None


def require_memory(what: str, nbytes: int, device: torch.device, instead: str) -> None:
    """Raise ValueError where `nbytes` are more than is available.

    Args:
        what: What would take it, as the subject of a sentence.
        nbytes: Bytes that it takes.
        device: Where.
        instead: What to use instead.

    >>> cpu = torch.device("cpu")
    >>> require_memory("a table", 1 << 60, cpu, "another")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: a table needs 1,073,741,824.0 GiB of memory on cpu, of which ...
    """
    if nbytes <= _ALWAYS:
        return
    available = available_memory(device)
    if available is not None and nbytes > available:
        raise ValueError(
            f"{what} needs {nbytes / 2**30:,.1f} GiB of memory on {device}, of which "
            f"{available / 2**30:,.1f} GiB are available; use {instead}"
        )
