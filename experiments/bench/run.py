"""`sparse-flash bench`: measure a suite, and report it as JSON, markdown, plots and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sparse_flash.experiments.bench.cases import SUITES
from sparse_flash.experiments.bench.measure import Row, matrix_peak, measure
from sparse_flash.experiments.bench.peers import PEERS
from sparse_flash.experiments.logger import Logger
from sparse_flash.experiments.machine import describe
from sparse_flash.masks.files import atomic_write
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bench(suite: str, out: Path, rounds: int = 3) -> dict[str, Any]:
    """Measure every case of a suite with every peer that is installed; write the report into `out`.

    Raises:
        ValueError: No such suite, or no Hopper GPU.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(map(repr, SUITES))}")
    if not torch.cuda.is_available():
        raise ValueError("the benchmark needs a CUDA GPU: torch sees none here")
    versions = {peer.name: peer.version for peer in PEERS}
    for name, version in versions.items():
        if version is None:
            print(f"{name} is left out: it is not installed (pip install 'sparse-flash[peers]')")
    installed = tuple(peer for peer in PEERS if versions[peer.name])
    report: dict[str, Any] = {
        "suite": suite,
        "machine": describe("cuda"),
        "versions": versions,
        "matrix_peak_tflops": matrix_peak(),
        "rows": [],
    }
    for case in tqdm(SUITES[suite], desc="cases", unit="case"):
        rows = measure(case, installed, rounds)
        report["rows"] += rows
        for row in rows:
            _derive(row, report)
            tqdm.write(_line(row))
        _write(out / "bench.json", json.dumps(report, indent=1))  # what is measured is kept
    _write(out / "bench.md", table(report))
    figure = plot(report)
    figure.savefig(out / "bench.png", dpi=110)
    _to_tensorboard(report, figure, out)
    return report


def _derive(row: Row, report: dict[str, Any]) -> None:
    """Shares of the machine's matrix peak, and of the same peer's dense speed."""
    if "ms" not in row:
        return
    row["of_peak"] = row["tflops"] / report["matrix_peak_tflops"]
    head_dim = row["case"].rpartition(" d")[2]
    for other in report["rows"]:
        same = (other["peer"], other["case"]) == (row["peer"], f"16K dense d{head_dim}")
        if same and "tflops" in other:
            row["of_own_dense"] = row["tflops"] / other["tflops"]


def _line(row: Row) -> str:
    if "ms" not in row:
        return f"{row['case']:38} {row['peer']:17} left out: {row['left out']}"
    return (
        f"{row['case']:38} {row['peer']:17} {row['ms']:8.3f} ms  {row['tflops']:6.1f} TFLOP/s  "
        f"wall {row['wall_ms']:8.3f} ms  {row['peak_mib']:7.0f} MiB"
    )


def table(report: dict[str, Any]) -> str:
    """Markdown: a line for each case, a column for each peer, in TFLOP/s; ours against the best."""
    names = [name for name, version in report["versions"].items() if version]
    heading = (
        f"Forward, bfloat16, TFLOP/s of stored elements. {report['machine'].get('gpu', '')}, "
        f"matrix peak {report['matrix_peak_tflops']:.0f} TFLOP/s."
    )
    lines = [
        heading,
        "",
        "| case | density | " + " | ".join(names) + " | ours / best peer | wall |",
        "|" + "---|" * (len(names) + 4),
    ]
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        rows = {row["peer"]: row for row in report["rows"] if row["case"] == case}
        cells = [f"{rows[n]['tflops']:.0f}" if "ms" in rows.get(n, {}) else "" for n in names]
        ratios = [_ratio(rows, key) for key in ("ms", "wall_ms")]
        density = f"{rows['ours']['density']:.2%}"
        lines.append(f"| {case} | {density} | " + " | ".join((*cells, *ratios)) + " |")
    return "\n".join([*lines, "", *_details(report)]) + "\n"


def _details(report: dict[str, Any]) -> list[str]:
    """Markdown: a line for each measurement."""
    lines = [
        "| case | by | ms | wall ms | of the matrix peak | of own dense | MiB |",
        "|" + "---|" * 7,
    ]
    for row in report["rows"]:
        if "ms" not in row:
            lines.append(f"| {row['case']} | {row['peer']} | left out: {row['left out']} |||||")
            continue
        shares = [f"{row[key]:.0%}" if key in row else "" for key in ("of_peak", "of_own_dense")]
        times = [f"{row[key]:.3f}" for key in ("ms", "wall_ms")]
        cells = (row["case"], row["peer"], *times, *shares, f"{row['peak_mib']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratio(rows: dict[str, Row], key: str) -> str:
    others = [row[key] for name, row in rows.items() if name != "ours" and key in row]
    return f"{min(others) / rows['ours'][key]:.2f}" if others else ""


def plot(report: dict[str, Any]) -> Figure:
    """Bars of TFLOP/s, a group for each case."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in report["rows"]))
    names = [name for name, version in report["versions"].items() if version]
    figure = Figure(figsize=(11, 1.5 + 0.45 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        speeds = {r["case"]: r.get("tflops", 0) for r in report["rows"] if r["peer"] == name}
        places = [j + (i - len(names) / 2) * 0.13 for j in range(len(cases))]
        axes.barh(places, [speeds.get(case, 0) for case in cases], height=0.12, label=name)
    axes.axvline(report["matrix_peak_tflops"], color="grey", linestyle=":", label="matrix peak")
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s of stored elements, forward")
    axes.legend(fontsize="small")
    return figure


def _to_tensorboard(report: dict[str, Any], figure: Figure, out: Path) -> None:
    with Logger(out / "tensorboard") as logger:
        logger.text("bench", table(report))
        logger.figure("bench", figure)
        for row in report["rows"]:
            if "ms" in row:
                tag = f"{row['case']}/{row['peer']}".replace(" ", "_")
                logger.scalars({f"tflops/{tag}": row["tflops"], f"ms/{tag}": row["ms"]}, 0)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
