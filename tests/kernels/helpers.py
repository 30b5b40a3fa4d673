"""Functions shared by tests of kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from sparse_flash.kernels import launch
from sparse_flash.kernels.device import DeviceFacts

DTYPES = [torch.bfloat16, torch.float16]
H200 = DeviceFacts("sm_90", num_sms=132, shared_memory=227 << 10, l2_bytes=60 << 20)


def common_first(configs):
    """Indices of configs as parameters: those of `make test`; the rest has the mark `thorough`.

    Of each tile of the common head_dims one dtype: float16 where sums are in fixed point.
    """

    def common(config):
        dtype = "float16" if getattr(config, "fixed_point", False) else "bfloat16"
        return config.dtype == dtype and config.head_dim in (64, 128, 256)

    rest = pytest.mark.thorough
    return [i if common(c) else pytest.param(i, marks=rest) for i, c in enumerate(configs)]


def plan_on_cpu(monkeypatch, facts=H200):
    """Plan for this GPU where the tensors are on the CPU; launches are given torch's tensors."""
    monkeypatch.setitem(DeviceFacts._of, torch.device("cpu"), facts)
    monkeypatch.setattr(launch, "kept_arguments", tuple)


def wait(seconds=30):
    """A watchdog: a launch that does not end would block every later call, so leave at once."""
    event = torch.cuda.Event()
    event.record()
    deadline = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > deadline:
            print("a launch hangs", file=sys.stderr, flush=True)
            os._exit(1)
        time.sleep(1e-4)


def tensors(b, s, h, d, kv_len=None, kv_heads=None, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    return make(b, s, h, d), *(make(b, kv_len or s, kv_heads or h, d) for _ in "kv")


def truth(mask, q, k, lens=None):
    q_idx, kv_idx = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    allowed = mask(q_idx, kv_idx)
    allowed = allowed if allowed.ndim == 4 else allowed[None, None]
    allowed = allowed.expand(q.shape[0], q.shape[2], -1, -1).cuda()
    return allowed if lens is None else allowed & (kv_idx.cuda() < lens[:, None, None, None])


def sanitize(tool, program):
    """Run a program whose kernels compute-sanitizer watches; it must find nothing."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("no compute-sanitizer")
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=cutlass"]
    if tool == "memcheck":  # the compiler asks the driver for things that it may not have
        command += ["--report-api-errors", "no"]
    command += ["--error-exitcode", "7", sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if "Device not supported" in run.stdout:
        pytest.skip("compute-sanitizer does not run on this machine")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
