"""Timing side by side, in turns: a GPU at its power limit slows down whoever comes later."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from sparse_flash.experiments.bench.cases import Case
from sparse_flash.experiments.bench.peers import PEERS, Call, Peer, Result, UnsupportedError
from sparse_flash.masks import BlockLayout
from torch import Tensor

Row = dict[str, Any]
TOLERANCE = 0.02  # relative L2 distance between outputs in 16 bits
CLOCK = 2e9  # cycles a second: no Hopper GPU has more


def measure(
    case: Case, which: str = "forward", peers: tuple[Peer, ...] = PEERS, rounds: int = 3
) -> list[Row]:
    """A row for each peer that can compute the case: time, speed, memory; or why it cannot.

    which: The "forward" pass, or the "backward" pass alone, from dout to dq, dk and dv.
    ms: Time on the GPU, median over rounds of medians; what the host takes is not in it.
    wall_ms: Time of a call in a row of calls, what the host takes included.
    tflops: 4 x elements of stored tiles x head_dim / ms, or 2.5 times that backward.
    peak_mib: Memory that a call takes, its results included.

    Raises:
        AssertionError: Two implementations disagree.
    """
    layout = case.pattern.layout(case.length, block=(case.block, case.block), device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (case.batch, case.length, case.heads, case.head_dim)
    q, k, v, dout = (
        torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16) for _ in range(4)
    )
    if which == "backward":
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    rows, calls, expected = [], {}, None
    for peer in peers:
        row: Row = {"pass": which, "case": case.label, "peer": peer.name}
        row["density"] = layout.density
        rows.append(row)
        try:
            call = peer.prepare(case, layout, q, k, v)
            if which == "backward":
                call = _backward(call, (q, k, v), dout)
            out = call()
            torch.cuda.synchronize()
        except UnsupportedError as reason:
            row["left out"] = str(reason)
            continue
        except Exception as error:
            if peer.name == "ours":
                raise
            row["left out"] = (
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
            )
            continue
        expected = out if expected is None else expected
        _check(case, peer, out, expected)
        del out
        row["peak_mib"] = _peak(call)
        calls[peer.name] = call
    times = _in_turns(calls, rounds)
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
    elements = layout.num_tiles * case.block**2
    flops = {"forward": 4.0, "backward": 10.0}[which]
    return flops * elements * case.head_dim * case.heads * case.batch


def _check(case: Case, peer: Peer, given: Result, expected: Result) -> None:
    for a, b in zip(_tensors(given), _tensors(expected), strict=True):
        distance = (a.float() - b.float()).norm() / b.float().norm()
        assert distance < TOLERANCE, f"{case.label}: {peer.name} is {distance:.3f} away from ours"


def _tensors(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _peak(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    del out
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def _in_turns(calls: dict[str, Call], rounds: int) -> dict[str, tuple[float, float]]:
    """Of each call (ms on the GPU, ms on the wall); every second round goes the other way round."""
    gpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in list(calls)[:: -1 if i % 2 else 1]:
            # In this order: the row of calls takes the GPU to the clock that such calls leave it.
            wall[name].append(_on_the_wall(calls[name]))
            gpu[name].append(_on_gpu(calls[name]))
    return {name: (statistics.median(gpu[name]), statistics.median(wall[name])) for name in calls}


def _on_the_wall(call: Call, seconds: float = 0.08) -> float:
    """Milliseconds of a call in a row that takes about so many seconds."""
    number = max(3, int(seconds / _seconds(call)[1]))
    start = time.perf_counter()
    for _ in range(number):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / number * 1e3


def _on_gpu(call: Call, seconds: float = 0.05) -> float:
    """Median milliseconds of a call on the GPU, other data in its L2 cache before each.

    Like triton.testing.do_bench, but the GPU sleeps until a call is queued as a whole: small ones
    end before the host has launched their last kernel, and its time would be taken for theirs.
    """
    other = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    host, whole = _seconds(call)
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


def _seconds(call: Call) -> tuple[float, float]:
    """Of one call, those until the host is free again, and all."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host, time.perf_counter() - start
