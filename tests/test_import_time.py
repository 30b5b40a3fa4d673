"""Importing the package costs little more than importing PyTorch; the command line is lazy."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys

import pytest

# What only some uses need. torch._dynamo is PyTorch's compiler, as costly as PyTorch itself.
HEAVY = {"cutlass", "datasets", "matplotlib", "numba", "PIL", "scipy", "sympy", "torch._dynamo",
         "torch._inductor", "transformers", "triton"}  # fmt: skip


def cpu_seconds(module):
    """User and system time of a process that imports a module: a busy host hardly changes it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_takes_at_most_1_2_times_pytorchs():
    """Medians, measured in turns: more of them where the clock of the host changes."""
    times = {"sparse_flash": [], "torch": []}
    cpu_seconds("sparse_flash")  # both are in the page cache, and compiled to bytecode
    for rounds in range(1, 13):
        for name, found in times.items():
            found.append(cpu_seconds(name))
        ours, base = map(statistics.median, times.values())
        if rounds >= 2 and ours <= 1.2 * base:
            return
    pytest.fail(f"CPU seconds of imports: {times}")


@pytest.mark.parametrize(
    "module", ["sparse_flash", "sparse_flash.experiments.train", "sparse_flash.cli"]
)
def test_heavy_packages_are_not_imported(module):
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert HEAVY & set(done.stdout.split()) == set()
