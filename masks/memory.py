"""Available memory, and a check before large allocations: Linux kills a process at the limit."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")  # version 2, as mounted in containers
_ALWAYS = 1 << 26  # bytes; smaller requests are not checked


def available_memory(device: torch.device) -> int | None:
    """Bytes that the process can still allocate on a device; None if unknown."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        limit = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
        cache = int(statistics[statistics.index("inactive_file") + 1])  # reclaimed on demand
        found.append(max(0, limit - used + cache))
    return min(found) if found else None


def require_memory(what: str, nbytes: int, device: torch.device, instead: str) -> None:
    """Raise ValueError if `nbytes` exceed the available memory.

    Args:
        what: Subject of the message, such as "a table".
        nbytes: Required bytes.
        device: Device of the memory.
        instead: Alternative that the message recommends.

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
