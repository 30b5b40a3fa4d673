"""`sparse-flash bench`: measure a suite, and report it as JSON, markdown, plots and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sparse_flash.experiments import markdown
from sparse_flash.experiments.bench.baselines import BASELINES, Baseline
from sparse_flash.experiments.bench.cases import SUITES, Case
from sparse_flash.experiments.bench.measure import Row, measure
from sparse_flash.experiments.bench.turns import FEWEST
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.logger import Logger
from sparse_flash.experiments.machine import describe, matrix_peak
from sparse_flash.masks.files import atomic_write
from tqdm import tqdm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


PASSES = ("forward", "backward")


def bench(
    suite: str | Sequence[Case],
    out: Path,
    rounds: int = FEWEST,
    passes: tuple[str, ...] = PASSES,
    baselines: Sequence[str] = (),
    seconds: float = 0.5,
) -> dict[str, Any]:
    """Time every case of a suite with every installed baseline; write the report into `out`.

    Args:
        suite: Name in `SUITES`, or cases of your own, whose masks may be Mask objects.
        out: Folder of the report.
        rounds: Least number of turns; in a turn each baseline is called once. At least 1.
        passes: "forward", "backward".
        baselines: Names of the baselines to time; default: all that are installed. Ours always
            take part.
        seconds: Duration of the turns of a case, about.

    Raises:
        ValueError: No such suite, pass or baseline, or no Hopper GPU.
        FolderInUseError: Another process writes to the folder.
    """
    if isinstance(suite, str) and suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}; there are {', '.join(map(repr, SUITES))}")
    check_rounds(rounds)
    for which in passes:
        if which not in PASSES:
            raise ValueError(f"unknown pass {which!r}; there are {', '.join(map(repr, PASSES))}")
    chosen = choose_baselines(baselines)
    if not torch.cuda.is_available():
        raise ValueError(
            "the suites need a CUDA GPU: torch sees none here. One case can be timed on a CPU: "
            "sparse-flash bench --mask SPEC"
        )
    name, cases = (suite, SUITES[suite]) if isinstance(suite, str) else ("own", list(suite))
    with exclusive(out):
        return _bench(name, cases, out, rounds, passes, chosen, seconds)


def choose_baselines(names: Sequence[str]) -> tuple[Baseline, ...]:
    """Ours, and the baselines of these names; all where there are none.

    Raises:
        ValueError: There is no baseline of a name.

    >>> [baseline.name for baseline in choose_baselines(["SDPA flash"])]
    ['ours', 'SDPA flash']
    """
    known = [baseline.name for baseline in BASELINES]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown baseline {name!r}; there are {', '.join(map(repr, known))}")
    return tuple(b for b in BASELINES if not names or b.name in names or b.name == "ours")


def check_rounds(rounds: int) -> None:
    """Raise ValueError where there is nothing to take a median of."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")


def _bench(
    suite: str,
    cases: list[Case],
    out: Path,
    rounds: int,
    passes: tuple[str, ...],
    chosen: tuple[Baseline, ...],
    seconds: float,
) -> dict[str, Any]:
    versions = {baseline.name: baseline.version for baseline in chosen}
    for name, version in versions.items():
        if version is None:
            print(
                f"{name} is left out: it is not installed (pip install 'sparse-flash[baselines]')"
            )
    installed = tuple(baseline for baseline in chosen if versions[baseline.name])
    report: dict[str, Any] = {
        "suite": suite,
        "machine": describe("cuda"),
        "versions": versions,
        "matrix_peak_tflops": matrix_peak(),
        "rows": [],
    }
    work = [(which, case) for which in passes for case in cases]
    for which, case in tqdm(work, desc="cases", unit="case"):
        rows = measure(case, which, installed, rounds, seconds=seconds)
        report["rows"] += rows
        for row in rows:
            _derive(row, report)
            tqdm.write(_line(row))
        _write(out / "bench.json", json.dumps(report, indent=1))  # keep the rows measured so far
    _write(out / "bench.md", markdown.benchmark(report))
    figure = plot(report)
    figure.savefig(out / "bench.png", dpi=110)
    _to_tensorboard(report, figure, out)
    return report


def _derive(row: Row, report: dict[str, Any]) -> None:
    """Fractions of a matrix product's speed in the same turns, and of the own dense speed."""
    if "ms" not in row:
        return
    row["of_peak"] = row["tflops"] / row.get("matrix_tflops", report["matrix_peak_tflops"])
    head_dim = row["case"].rpartition(" d")[2]
    for other in report["rows"]:
        same = all(other[key] == row[key] for key in ("pass", "peer"))
        if same and other["case"] == f"16K dense d{head_dim}" and "tflops" in other:
            row["of_own_dense"] = row["tflops"] / other["tflops"]


def _line(row: Row) -> str:
    name = f"{row['pass']:8} {row['case']:38} {row['peer']:17}"
    if "ms" not in row:
        return f"{name} left out: {row['left out']}"
    return (
        f"{name} {row['ms']:8.3f} ms  {row['tflops']:6.1f} TFLOP/s  "
        f"wall {row['wall_ms']:8.3f} ms  {row['peak_mib']:7.0f} MiB{_clock(row)}"
    )


def _clock(row: Row) -> str:
    return f"  {row['sm_mhz']:.0f} MHz {row['watts']:.0f} W" if "sm_mhz" in row else ""


def plot(report: dict[str, Any]) -> Figure:
    """Bars of TFLOP/s, a group for each case; the passes side by side."""
    from matplotlib.figure import Figure

    passes = markdown.passes_of(report)
    most = max(len({r["case"] for r in report["rows"] if r["pass"] == w}) for w in passes)
    figure = Figure(figsize=(11 * len(passes), 1.5 + 0.45 * most), layout="constrained")
    for axes, which in zip(figure.subplots(1, len(passes), squeeze=False)[0], passes, strict=True):
        _bars(axes, report, which)
    return figure


def _bars(axes: Axes, report: dict[str, Any], which: str) -> None:
    rows = [row for row in report["rows"] if row["pass"] == which]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = [name for name, version in report["versions"].items() if version]
    for i, name in enumerate(names):
        speeds = {r["case"]: r.get("tflops", 0) for r in rows if r["peer"] == name}
        centers = [j + (i - len(names) / 2) * 0.13 for j in range(len(cases))]
        axes.barh(centers, [speeds.get(case, 0) for case in cases], height=0.12, label=name)
    axes.axvline(report["matrix_peak_tflops"], color="gray", linestyle=":", label="matrix peak")
    axes.set_yticks(range(len(cases)), cases)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel(f"TFLOP/s of stored elements, {which}")
    axes.legend(fontsize="small")


def _to_tensorboard(report: dict[str, Any], figure: Figure, out: Path) -> None:
    with Logger(out / "tensorboard") as logger:
        logger.text("bench", markdown.benchmark(report))
        logger.figure("bench", figure)
        for row in report["rows"]:
            if "ms" in row:
                tag = f"{row['pass']}/{row['case']}/{row['peer']}".replace(" ", "_")
                logger.scalars({f"tflops/{tag}": row["tflops"], f"ms/{tag}": row["ms"]}, 0)


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
