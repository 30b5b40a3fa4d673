"""One case by every implementation that can compute it: outputs compared, then timed in turns."""

from __future__ import annotations

import contextlib
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
from sparse_flash.experiments.bench.turns import FEWEST, Turns, take_turns
from sparse_flash.experiments.machine import tensor_peak
from sparse_flash.masks import BlockLayout
from torch import Tensor

from sparse_flash.density import densities

Row = dict[str, Any]


class DisagreementError(AssertionError):
    """Two implementations disagree."""


TOLERANCE = {"float32": 1e-3, "float64": 1e-6}  # relative L2 distance between outputs
TOLERANCE_16 = 0.02  # the same in 16 bits
MATRIX_PRODUCT = "matrix product"  # takes turns with all others, so that it meets the same clock
MATRIX_SIZE = 8192


def measure(
    case: Case,
    which: str = "forward",
    baselines: tuple[Baseline, ...] = BASELINES,
    rounds: int = FEWEST,
    device: str = "cuda",
    strict: bool = True,
    seconds: float = 0.5,
) -> list[Row]:
    """A row for each baseline: time, speed and memory, or the reason why it has none.

    Args:
        case: The problem.
        which: The "forward" pass, or the "backward" pass alone, from dout to dq, dk and dv.
        baselines: Implementations, ours first.
        rounds: Least number of turns.
        device: "cuda" or "cpu".
        strict: Raise where outputs disagree; else skip the baseline.
        seconds: Duration of the turns, about.

    Keys of a row that was timed:
        ms: Time on the GPU, median over turns; without host time.
        wall_ms: Wall-clock time per call in a row of calls; with host time.
        tflops: 4 x elements of stored tiles x head_dim / ms, or 2.5 times that backward.
        ratio, ratio_low, ratio_high: Time over that of the first baseline within a turn: the
            median and its 95 % confidence interval. The first has none.
        matrix_tflops: Speed of an 8192^3 matrix product that takes turns with the others; GPU only.
        turns, sm_mhz, watts: See `Turns.record`.
        graph: Whether the call was timed as a CUDA graph.
        peak_mib: Memory that a call takes, its results included.

    Raises:
        DisagreementError: Two implementations disagree.
    """
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        rows, calls, layout = _prepare(case, which, baselines, device, strict)
    if device == "cuda" and calls:
        calls[MATRIX_PRODUCT] = _matrix_product()
    turns = take_turns(calls, device, seconds, rounds, stream)
    for row in rows:
        if row["peer"] in turns.ms:
            _enter(row, turns, _flops(case, layout, which))
    return rows


def _prepare(
    case: Case, which: str, baselines: tuple[Baseline, ...], device: str, strict: bool
) -> tuple[list[Row], dict[str, Call], BlockLayout]:
    """Rows without times, the calls to time, and the layout."""
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
                call = backward_of(call, (q, k, v), dout)
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
    return rows, calls, layout


def _matrix_product() -> Call:
    """A product of two matrices of random numbers, bfloat16."""
    a, b = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda", dtype=torch.bfloat16) for _ in "ab"
    )
    return lambda: a @ b


def _enter(row: Row, turns: Turns, flops: float) -> None:
    """Write the times of a baseline into its row."""
    name, first = row["peer"], next(iter(turns.ms))
    row["ms"], row["wall_ms"] = turns.median(name), turns.wall_ms[name]
    row["tflops"] = flops / row["ms"] / 1e9
    if name != first:
        row["ratio"], row["ratio_low"], row["ratio_high"] = turns.ratio(name, first)
    if MATRIX_PRODUCT in turns.ms:
        row["matrix_tflops"] = 2 * MATRIX_SIZE**3 / turns.median(MATRIX_PRODUCT) / 1e9
        row["graph"] = name in turns.graphs
    row |= turns.record()


def backward_of(call: Call, inputs: tuple[Tensor, ...], dout: Tensor) -> Call:
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
