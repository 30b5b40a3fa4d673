"""`sparse-flash bench --mask`: one case of the user's, by every baseline that can compute it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sparse_flash.experiments.bench.cases import Case
from sparse_flash.experiments.bench.measure import Row, measure
from sparse_flash.experiments.bench.peers import (
    MATRIX,
    PEERS,
    REFERENCE,
    Call,
    Peer,
    UnsupportedError,
)
from sparse_flash.experiments.bench.run import PASSES, check_rounds
from sparse_flash.experiments.compare import as_table
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.machine import as_list, describe
from sparse_flash.experiments.user_code import read_mask
from sparse_flash.kernels.sm90.attention import unsupported_reason
from sparse_flash.masks import BlockLayout, Mask
from sparse_flash.masks.files import atomic_write
from torch import Tensor

DType = Literal["bfloat16", "float16", "float32"]
LENGTHS = {"cuda": 16384, "cpu": 2048}  # by default, where the mask fits any
DTYPES: dict[str, DType] = {"cuda": "bfloat16", "cpu": "float32"}
ON_CPU = (
    "No GPU: the reference implementation in PyTorch against SDPA, by wall-clock time on the CPU. "
    "This does not tell how fast the kernels are."
)
ON_GPU = (
    "GPU time, median. FlexAttention reads partial tiles from a table of bits; a predicate that is "
    "written for this mask may be faster."
)


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
        ValueError: A number is below 1, `kv_heads` does not divide `heads`, or the mask is no mask,
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
    case: Case, out: Path, rounds: int = 3, passes: Sequence[str] = PASSES, device: str = "cuda"
) -> dict[str, Any]:
    """Time a case by every baseline that can compute it, and write own.json and own.md.

    Args:
        case: See `own_case`.
        out: Folder of the report.
        rounds: Number of measurements of each baseline, at least 1.
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
    rows: list[Row] = []
    with exclusive(out):
        for which in passes:
            timed, others = _peers(device)
            rows += measure(case, which, timed, rounds, device, strict=False)
            rows += [{"pass": which, "peer": name, "left out": why} for name, why in others.items()]
        report = {
            "machine": describe(device),
            "case": case.label,
            "dtype": case.dtype,
            "density": layout.density,
            "device": device,
            "rows": rows,
        }
        for name, text in (
            ("own.json", json.dumps(report, indent=1)),
            ("own.md", markdown(report)),
        ):
            with atomic_write(out / name) as file:
                file.write(text.encode())
    return report


def _peers(device: str) -> tuple[tuple[Peer, ...], dict[str, str]]:
    """Those that can run on the device, ours first; and why the others cannot."""
    if device == "cpu":
        others = {peer.name: "needs a CUDA GPU" for peer in PEERS}
        return (REFERENCE, MATRIX), others
    first, *rest = PEERS
    kernels = replace(first, prepare=_by_kernels)
    found = (kernels, replace(REFERENCE, prepare=_where_kernels_cannot), *rest, MATRIX)
    missing = "is not installed: pip install 'sparse-flash[peers]'"
    others = {peer.name: missing for peer in found if peer.version is None}
    return tuple(peer for peer in found if peer.version is not None), others


def _by_kernels(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    reason = unsupported_reason(q, k, v)
    if reason is not None:
        raise UnsupportedError(reason)
    return PEERS[0].prepare(case, layout, q, k, v)


def _where_kernels_cannot(case: Case, layout: BlockLayout, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """The reference, which is slow, is timed where it is what the user gets."""
    if unsupported_reason(q, k, v) is None:
        raise UnsupportedError("not needed: the kernels compute this case")
    return REFERENCE.prepare(case, layout, q, k, v)


def markdown(report: dict[str, Any]) -> str:
    """The report as text: the case, a line for each baseline, why others were left out."""
    return "\n".join(
        [
            f"# {report['case']}",
            "",
            table(report),
            "",
            "## Machine",
            "",
            as_list(report["machine"]),
            "",
        ]
    )


def table(report: dict[str, Any]) -> str:
    """Milliseconds, speed-up of ours, and memory; then what each other baseline cannot do."""
    passes = list(dict.fromkeys(row["pass"] for row in report["rows"]))
    names = list(dict.fromkeys(row["peer"] for row in report["rows"]))
    found = {(row["peer"], row["pass"]): row for row in report["rows"]}
    ours = next((n for n in ("ours", REFERENCE.name) if _timed(found, n, passes)), None)
    head = ["by", *(f"{w} {unit}" for w in passes for unit in ("ms", "speed-up of ours", "MiB"))]
    lines = [head]
    for name in names:
        if not _timed(found, name, passes):
            continue
        cells = [name]
        for which in passes:
            row, base = found[name, which], found.get((ours, which), {})
            if "ms" not in row:
                cells += ["", "", ""]
                continue
            ratio = f"{row['ms'] / base['ms']:.2f}x" if "ms" in base else ""
            cells += [f"{row['ms']:.3f}", ratio, f"{row['peak_mib']:.0f}"]
        lines.append(cells)
    reasons = {
        (row["peer"], row["left out"]): row["pass"] for row in report["rows"] if "left out" in row
    }
    notes = [f"- {name}: {reason}" for name, reason in reasons]
    density = f"{report['dtype']}, density {report['density']:.2%}."
    text = [f"{density} {ON_GPU if report['device'] == 'cuda' else ON_CPU}", "", as_table(lines)]
    return "\n".join([*text, "", "Not timed:", *notes] if notes else text)


def _timed(found: dict[tuple[str, str], Row], name: str, passes: Sequence[str]) -> bool:
    return any("ms" in found.get((name, which), {}) for which in passes)
