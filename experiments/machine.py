"""What a measurement was taken on, and how much memory it took."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

MIB = 1 << 20


def describe(device: torch.device | str) -> dict[str, str]:
    """The machine and the versions that matter, for the results of a measurement."""
    facts = {
        "cpu": _cpu_name(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class PeakMemory:
    """The most memory that a block of code takes above what was in use when it began.

    On a GPU, by PyTorch's allocator; on a CPU (Linux), by the resident set of the process, which
    counts pages: what earlier code returned to the allocator and kept mapped is not seen. NaN where
    neither can be read.

    >>> with PeakMemory("cpu") as memory:
    ...     x = torch.ones(1 << 24)
    >>> memory.mebibytes > 30
    True
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.start = 0.0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device) / MIB
        else:
            _forget_peak()
            self.start = _status("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    @property
    def mebibytes(self) -> float:
        """Peak so far, above the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.start
        return _status("VmHWM") - self.start


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not permitted here: the peak is then that of the whole process
        return


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def allocated_peak(function: Callable[[], object]) -> float:
    """The most MiB that PyTorch holds on the CPU at once while `function` runs, above the start.

    Counts each allocation of a tensor, so that two functions can be compared in one process.
    """
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    held = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak / MIB
