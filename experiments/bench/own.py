"""`sparse-flash bench --mask`: one case of the user's, by every baseline that can compute it."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from sparse_flash.experiments import markdown
from sparse_flash.experiments.bench.baselines import (
    BASELINES,
    MATRIX,
    REFERENCE,
    Baseline,
    Call,
    UnsupportedError,
)
from sparse_flash.experiments.bench.cases import Case
from sparse_flash.experiments.bench.measure import Row, measure
from sparse_flash.experiments.bench.run import PASSES, check_rounds
from sparse_flash.experiments.bench.turns import FEWEST
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.machine import describe
from sparse_flash.experiments.user_code import read_mask
from sparse_flash.kernels.sm80.attention import unsupported_reason
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.files import atomic_write
from torch import Tensor

from sparse_flash.density import densities

DType = Literal["bfloat16", "float16", "float32"]
LENGTHS = {"cuda": 16384, "cpu": 2048}  # by default, where the mask fits any
DTYPES: dict[str, DType] = {"cuda": "bfloat16", "cpu": "float32"}

CPU_SECONDS = 60.0  # estimated time of a baseline and pass on a CPU, above which it is not timed
_CALLS = 5  # of a baseline besides the rounds: warm-up, check, memory


def own_case(
    mask: str | Mask,
    length: int | None = None,
    heads: int = 8,
    kv_heads: int | None = None,
    head_dim: int = 64,
    batch: int = 1,
    dtype: DType | None = None,
    device: str = "cuda",
) -> Case:
    """The case of a mask and shapes.

    Args:
        mask: Mask, or its text.
        length: Number of queries and keys; None for that of the mask, or where it fits any 16,384
            on a GPU and 2,048 on a CPU.
        heads: Number of query heads.
        kv_heads: Number of key heads, a divisor of `heads`; None for as many.
        head_dim: Width of a head.
        batch: Batch size.
        dtype: Name of the dtype of q, k and v; None for bfloat16 on a GPU, float32 on a CPU.
        device: "cuda" or "cpu".

    Raises:
        ValueError: A number is below 1, `kv_heads` does not divide `heads`, or the mask is invalid,
            or not for self-attention of this length.

    >>> own_case("local(64)", heads=4, kv_heads=2, device="cpu").label
    'local((64, 64)), 1 x 2048 x 4 heads (2 of keys) d64'
    """
    pattern = mask if isinstance(mask, Mask) else read_mask(mask)
    kv_heads = heads if kv_heads is None else kv_heads
    made_for = {n for n in pattern.extents() if n is not None}
    if len(made_for) > 1:
        raise ValueError(f"{pattern!r} has another number of queries than of keys: {made_for}")
    length = length if length is not None else next(iter(made_for), LENGTHS[device])
    sizes = {"length": length, "heads": heads, "kv-heads": kv_heads, "head-dim": head_dim}
    for name, size in (sizes | {"batch": batch}).items():
        if size < 1:
            raise ValueError(f"--{name} must be at least 1, got {size}")
    if heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads} must divide --heads {heads}")
    keys = "" if kv_heads == heads else f" ({kv_heads} of keys)"
    name = f"{pattern!r}, {batch} x {length} x {heads} heads{keys}"
    dtype = DTYPES[device] if dtype is None else dtype
    return Case(name, pattern, length, heads, head_dim, batch, kv_heads=kv_heads, dtype=dtype)


def bench_case(
    case: Case,
    out: Path,
    rounds: int = FEWEST,
    passes: Sequence[str] = PASSES,
    device: str = "cuda",
) -> dict[str, Any]:
    """Time a case by every baseline that can compute it, and write own.json and own.md.

    Args:
        case: See `own_case`.
        out: Folder of the report.
        rounds: Least number of turns; in a turn each baseline is called once. At least 1.
        passes: "forward", "backward".
        device: "cuda" or "cpu".

    Returns:
        What own.json holds: machine, case, rows; a row that was not timed has its reason in
        "left out".

    Raises:
        ValueError: The mask does not fit the shapes.
        FolderInUseError: Another process writes to the folder.
    """
    check_rounds(rounds)
    layout = case.pattern.layout(case.length, block=(case.block, case.block))
    wanted = layout.pattern_map.shape
    sizes = {"batch": case.batch, "heads": case.heads}
    for (name, size), n in zip(sizes.items(), wanted, strict=True):
        if n not in (1, size):
            words = "batch entries" if name == "batch" else name
            raise ValueError(f"the mask is made for {n} {words}, but --{name} is {size}")
    found = densities(layout, case.head_dim)
    rows: list[Row] = []
    with exclusive(out):
        for which in passes:
            timed, others = _baselines(device)
            timed = tuple(_announced(baseline, which, rounds) for baseline in timed)
            rows += measure(case, which, timed, rounds, device, strict=False)
            rows += [{"pass": which, "peer": name, "left out": why} for name, why in others.items()]
        report = {
            "machine": describe(device),
            "case": case.label,
            "dtype": case.dtype,
            **found.record(),
            "hint": found.hint,
            "device": device,
            "rows": rows,
        }
        for name, text in (
            ("own.json", json.dumps(report, indent=1)),
            ("own.md", markdown.own_case(report)),
        ):
            with atomic_write(out / name) as file:
                file.write(text.encode())
    return report


def _baselines(device: str) -> tuple[tuple[Baseline, ...], dict[str, str]]:
    """Baselines that can run on the device, ours first; and the reasons of the others."""
    if device == "cpu":
        others = {baseline.name: "needs a CUDA GPU" for baseline in BASELINES}
        return (REFERENCE, MATRIX), others
    first, *rest = BASELINES
    kernels = replace(first, prepare=_by_kernels)
    found = (kernels, replace(REFERENCE, prepare=_where_kernels_cannot), *rest, MATRIX)
    missing = "is not installed: pip install 'sparse-flash[baselines]'"
    others = {baseline.name: missing for baseline in found if baseline.version is None}
    return tuple(baseline for baseline in found if baseline.version is not None), others


def _announced(baseline: Baseline, which: str, rounds: int) -> Baseline:
    """The same baseline with a line on standard error, refused if it would take minutes."""

    def prepare(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
        print(f"timing {which}: {baseline.name}", file=sys.stderr, flush=True)
        if q.device.type == "cpu":
            density = 1.0 if baseline is MATRIX else layout.tile_density
            flops = {"forward": 4, "backward": 14}[which] * density * q.shape[1] ** 2
            seconds = flops * q.shape[0] * q.shape[2] * q.shape[3] / _flops_per_second()
            if seconds * (_CALLS + rounds) > CPU_SECONDS:
                raise UnsupportedError(
                    f"about {seconds:.0f} s a call on this CPU: use a GPU, a shorter --length or "
                    "fewer --heads"
                )
        return baseline.prepare(case, layout, q, k, v)

    return replace(baseline, prepare=prepare)


@functools.cache
def _flops_per_second() -> float:
    """Speed of attention on this CPU: about a quarter of that of a matrix product."""
    a = torch.randn(512, 512)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 512**3 / min(seconds) / 4


def _by_kernels(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    reason = unsupported_reason(q, k, v)
    if reason is not None:
        raise UnsupportedError(reason)
    return BASELINES[0].prepare(case, layout, q, k, v)


def _where_kernels_cannot(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The slow reference is timed if the user's call would run it."""
    if unsupported_reason(q, k, v) is None:
        raise UnsupportedError("not needed: the kernels compute this case")
    return REFERENCE.prepare(case, layout, q, k, v)
