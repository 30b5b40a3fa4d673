"""The machine of a measurement, and peak memory."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import torch
from sparse_flash.kernels import DSL_VERSION, dsl_unsupported_reason

from sparse_flash.cores import available_cores

MIB = 1 << 20


def describe(device: torch.device | str) -> dict[str, str]:
    """The machine and the versions that matter, for the results of a measurement."""
    facts = {
        "cpu": _cpu_name(),
        "cores": str(available_cores()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    if torch.device(device).type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        facts["cute dsl"] = dsl_unsupported_reason() or DSL_VERSION
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class PeakMemory:
    """Peak memory of a process (Linux) above its memory when a block of code began.

    By the resident set, which counts pages: memory that earlier code returned to the allocator, and
    that is still mapped, is not seen again. NaN where it cannot be read.

    >>> with PeakMemory() as memory:
    ...     x = torch.ones(1 << 25)
    >>> memory.mebibytes > 60
    True
    """

    def __enter__(self) -> Self:
        gc.collect()  # garbage freed inside would hide allocations
        with contextlib.suppress(OSError):  # where not permitted, the peak is the process's own
            Path("/proc/self/clear_refs").write_text("5")
        self.start = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.mebibytes = _status("VmHWM") - self.start


def _status(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def tensor_peak(function: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Peak memory of PyTorch tensors while `function` runs, above the start, MiB.

    Counts each allocation, on a CPU too, so that functions can be compared in one process. On a
    CPU the function runs twice: first to warm up.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    from torch.profiler import ProfilerActivity, profile

    function()
    watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr(), watch as record:  # its native part announces itself there
        function()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / MIB


def matrix_peak(device: torch.device | str = "cuda") -> float:
    """TFLOP/s of an 8192^3 bfloat16 matrix product on a GPU, random numbers."""
    from triton.testing import do_bench

    with torch.cuda.device(device):
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in "ab")
        return 2 * 8192**3 / do_bench(lambda: a @ b, warmup=50, rep=300, return_mode="median") / 1e9


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what native code writes to the standard error of the process."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
