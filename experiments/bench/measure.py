"""Timing side by side, in turns: a GPU at its power limit slows down whoever comes later."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from sparse_flash.experiments.bench.baselines import (
    BASELINES,
    Baseline,
    Call,
    Result,
    UnsupportedError,
)
from sparse_flash.experiments.bench.cases import Case
from sparse_flash.experiments.machine import tensor_peak
from sparse_flash.masks import BlockLayout
from torch import Tensor

from sparse_flash.density import densities

Row = dict[str, Any]


class DisagreementError(AssertionError):
    """Two implementations disagree."""


TOLERANCE = {"float32": 1e-3, "float64": 1e-6}  # relative L2 distance between outputs
TOLERANCE_16 = 0.02  # the same in 16 bits
CLOCK = 2e9  # cycles a second: no Hopper GPU has more


def measure(
    case: Case,
    which: str = "forward",
    baselines: tuple[Baseline, ...] = BASELINES,
    rounds: int = 3,
    device: str = "cuda",
    strict: bool = True,
) -> list[Row]:
    """A row for each baseline: time, speed and memory, or the reason why it has none.

    strict: Raise where outputs disagree; else skip the baseline.
    which: The "forward" pass, or the "backward" pass alone, from dout to dq, dk and dv.
    ms: Time on the GPU, median over rounds of medians; what the host takes is not in it.
    wall_ms: Time of a call in a row of calls, what the host takes included.
    tflops: 4 x elements of stored tiles x head_dim / ms, or 2.5 times that backward.
    peak_mib: Memory that a call takes, its results included.

    Raises:
        DisagreementError: Two implementations disagree.
    """
    kv_heads = case.kv_heads or case.heads
    layout = case.pattern.layout(case.length, block=(case.block, case.block), device=device)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = (
        torch.randn(
            (case.batch, case.length, heads, case.head_dim), generator=generator, device=device
        ).to(getattr(torch, case.dtype))
        for heads in (case.heads, kv_heads, kv_heads, case.heads)
    )
    if which == "backward":
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    rows, calls, expected = [], {}, None
    for baseline in baselines:
        row: Row = {"pass": which, "case": case.label, "peer": baseline.name}
        row |= densities(layout, case.head_dim).record()
        rows.append(row)
        try:
            call = baseline.prepare(case, layout, q, k, v)
            if which == "backward":
                call = _backward(call, (q, k, v), dout)
            out = call()
            _wait(device)
        except UnsupportedError as reason:
            row["left out"] = str(reason)
            continue
        except Exception as error:
            if baseline.name == "ours" and strict:
                raise
            row["left out"] = (
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
            )
            continue
        expected = out if expected is None else expected
        try:
            _check(case, baseline, out, expected)
        except DisagreementError as reason:
            if strict:
                raise
            row["left out"] = str(reason)
            continue
        del out
        row["peak_mib"] = tensor_peak(call, device)
        calls[baseline.name] = call
    times = _in_turns(calls, rounds, device)
    for row in rows:
        if row["peer"] in times:
            row["ms"], row["wall_ms"] = times[row["peer"]]
            row["tflops"] = _flops(case, layout, which) / row["ms"] / 1e9
    return rows


def _backward(call: Call, inputs: tuple[Tensor, ...], dout: Tensor) -> Call:
    """The backward pass of a call."""
    out = call()
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _flops(case: Case, layout: BlockLayout, which: str) -> float:
    per_pattern = layout.crow_indices[:, -1] - layout.crow_indices[:, 0]
    tiles = per_pattern[layout.pattern_map.long()].double().mean().item()
    flops = {"forward": 4.0, "backward": 10.0}[which]
    return flops * tiles * case.block**2 * case.head_dim * case.heads * case.batch


def _check(case: Case, baseline: Baseline, given: Result, expected: Result) -> None:
    for a, b in zip(_tensors(given), _tensors(expected), strict=True):
        distance = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)
        if not distance < TOLERANCE.get(case.dtype, TOLERANCE_16):
            raise DisagreementError(
                f"{case.label}: the output of {baseline.name} is {distance:.3f} (relative) away "
                "from that of the first"
            )


def _tensors(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _in_turns(calls: dict[str, Call], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """GPU time and wall-clock time of each call in ms; every second round in reverse order.

    On a CPU both are the wall-clock time.
    """
    gpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            # In this order: the row of calls takes the GPU to the clock that such calls leave it.
            wall[name].append(_on_the_wall(calls[name], device))
            gpu[name].append(_on_gpu(calls[name]) if device == "cuda" else wall[name][-1])
    return {name: (statistics.median(gpu[name]), statistics.median(wall[name])) for name in calls}


def _on_the_wall(call: Call, device: str, seconds: float = 0.08) -> float:
    """Milliseconds of a call in a row that takes about so many seconds."""
    number = max(3 if device == "cuda" else 1, int(seconds / _seconds(call, device)[1]))
    start = time.perf_counter()
    for _ in range(number):
        call()
    _wait(device)
    return (time.perf_counter() - start) / number * 1e3


def _on_gpu(call: Call, seconds: float = 0.05) -> float:
    """Median milliseconds of a call on the GPU, other data in its L2 cache before each.

    Like triton.testing.do_bench, but the GPU sleeps until a call is queued as a whole: small ones
    end before the host has launched their last kernel, and its time would be taken for theirs.
    """
    other = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    host, whole = _seconds(call, "cuda")
    number = max(3, min(100, int(seconds / whole)))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    for begin, end in events:
        other.zero_()
        torch.cuda._sleep(int(2 * host * CLOCK))
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def _seconds(call: Call, device: str) -> tuple[float, float]:
    """Of one call, those until the host is free again, and all."""
    _wait(device)
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    _wait(device)
    return host, time.perf_counter() - start
