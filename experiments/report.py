"""The report of a comparison: rows, files, figures, and its TensorBoard run."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_flash.experiments import figures, markdown
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.densities import DENSITIES, attention_densities, densities_of
from sparse_flash.experiments.logger import Logger, remove_events
from sparse_flash.experiments.naming import REPORT_RUN
from sparse_flash.experiments.parallel import is_first_worker
from sparse_flash.masks.files import atomic_write

REPORT = "comparison"
SHOWN = {
    "final/test_accuracy": "test accuracy",
    "final/speedup": "speed-up",
    "final/step_ms": "step ms",
}  # metrics of HPARAMS: tag, and displayed name
SPREADS = {"test_accuracy": "spread", "step_ms": "step_ms_spread",
           "peak_memory_MiB": "peak_memory_MiB_spread"}  # fmt: skip

Run = dict[str, Any]  # name, attention, seed, and the result of train; or an error
Report = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A comparison to report.

    Args:
        settings: Settings as comparison.json holds them, `seeds` among them.
        kinds: Attention by label; the first is the baseline.
        length: Tokens of the layouts.
        block: Granularity of the layouts.
        head_dim: Width of a head.
        facts: Further text of the report: `training`, its length; `note`, a remark for the reader.
    """

    settings: dict[str, Any]
    kinds: Mapping[str, AttentionKind]
    length: int
    block: int
    head_dim: int
    facts: Mapping[str, str] = field(default_factory=dict)


def record(name: str, attention: str, seed: int, result: Mapping[str, Any]) -> Run:
    """A run of the report: the result of training, or `{"error": message}`."""
    facts = {"name": name, "attention": attention, "seed": seed}
    return facts | dict(result) | facts


def summarize(comparison: Comparison, runs: Sequence[Run]) -> Report:
    """The report of the runs so far, as comparison.json holds it.

    Args:
        comparison: The comparison.
        runs: Made by `record`. One without metrics, or with a test loss that is not finite, has no
            result: its attention's row counts it, and means leave it out.

    Returns:
        machine, settings, length, rows (one for each attention) and runs. A row has the means over
        seeds of all metrics that its runs have in common; `spread`, `step_ms_spread`,
        `peak_memory_MiB_spread` and `speedup_spread`, standard deviations over seeds; `results`,
        the number of seeds with a result, of `seeds`; `density`, `tile_density`,
        `computed_density` and `speedup`, None where there is none; `hint`, advice where
        the computed density is much larger than the density.
    """
    rows = [_row(attention, comparison, runs) for attention in comparison.kinds]
    chances = [row["majority_accuracy"] for row in rows if "majority_accuracy" in row]
    base = rows[0].get("step_ms")
    for row in rows:
        row.setdefault("majority_accuracy", chances[0] if chances else None)
        mine = row.get("step_ms")
        row["speedup"] = base / mine if base and mine else None
        finished = _finished(runs, row["attention"]) if row["speedup"] else []
        row["speedup_spread"] = _spread([base / run["metrics"]["step_ms"] for run in finished])
    machines = [run["machine"] for run in runs if "machine" in run]
    return {
        "machine": machines[0] if machines else {},
        "settings": comparison.settings,
        "length": comparison.length,
        **comparison.facts,
        "rows": rows,
        "runs": list(runs),
    }


def _row(attention: str, comparison: Comparison, runs: Sequence[Run]) -> dict[str, Any]:
    """Means and deviations over the seeds with a result.

    Metrics missing in any run are dropped: it may be of an older version, or without a GPU.
    """
    seeds = [run for run in runs if run["attention"] == attention]
    metrics = [run["metrics"] for run in _finished(runs, attention)]
    shape = (comparison.kinds[attention], comparison.length, comparison.block, comparison.head_dim)
    found = densities_of(*shape)
    common = [name for name in metrics[0] if all(name in m for m in metrics)] if metrics else []
    return {
        "attention": attention,
        **attention_densities(*shape),
        **{name: statistics.fmean(m[name] for m in metrics) for name in common},
        **{
            spread: _spread([m[name] for m in metrics])
            for name, spread in SPREADS.items()
            if name in common
        },
        "results": len(metrics),
        "seeds": len(seeds),
        "hint": found.hint if found else None,
    }


def _finished(runs: Sequence[Run], attention: str) -> list[Run]:
    return [run for run in runs if run["attention"] == attention and markdown.failure(run) is None]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def begin(comparison: Comparison, folder: Path) -> None:
    """Start the report run with the pictures of the masks, before training.

    Raises:
        LogError: The folder cannot be written.
    """
    if not is_first_worker():
        return
    discard_old_report(folder)
    with Logger(folder / REPORT_RUN) as log:
        _log_masks(log, comparison)


def discard_old_report(folder: Path) -> None:
    """Remove the report run of older versions, which had another name."""
    remove_events(folder / "report")
    with contextlib.suppress(OSError):  # there is none, or it is not empty
        (folder / "report").rmdir()


def write(comparison: Comparison, runs: Sequence[Run], folder: Path) -> Report:
    """Summarize the runs, and write files and TensorBoard's report run; replaces earlier ones.

    Args:
        comparison: The comparison.
        runs: Made by `record`; the events of run `name` are in `folder / name`.
        folder: Receives comparison.json, comparison.md, comparison.png, and the run `_report`.

    Raises:
        LogError: The folder cannot be written.
    """
    report = summarize(comparison, runs)
    if not is_first_worker():
        return report
    text = markdown.comparison(report)
    with atomic_write(folder / f"{REPORT}.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    with atomic_write(folder / f"{REPORT}.md") as file:
        file.write(f"{text}\n![accuracy, speed-up and memory]({REPORT}.png)\n".encode())
    with atomic_write(folder / f"{REPORT}.png") as file:
        figures.overview(report).savefig(file, format="png")
    with Logger(folder / REPORT_RUN) as log:
        for name, figure in figures.figures(report).items():
            log.figure(f"0 report/{name}", figure)
        _log_masks(log, comparison)
        log.text(f"0 report/{REPORT}", markdown.comparison(report, brief=True))
        log.hparams_experiment(columns(report), SHOWN)
    for run in runs:
        _annotate(run, report, folder)
    return report


def columns(report: Report) -> dict[str, list[str] | None]:
    """The settings in HPARAMS: the attention, and each setting that differs between the runs.

    Returns:
        Name to all values for text, to None for numbers.
    """
    settings, rows = report["settings"], report["rows"]
    shown: dict[str, list[str] | None] = {"attention": [row["attention"] for row in rows]}
    for name in DENSITIES:
        if len({row.get(name) for row in rows}) > 1:
            shown[name.replace("_", " ")] = None
    if len(settings["seeds"]) > 1:
        shown["seed"] = [str(seed) for seed in settings["seeds"]]
    return shown


def _annotate(run: Run, report: Report, folder: Path) -> None:
    """The run's line in HPARAMS."""
    row = next(row for row in report["rows"] if row["attention"] == run["attention"])
    settings = {"attention": run["attention"], "seed": str(run["seed"])}
    settings |= {name.replace("_", " "): row.get(name) for name in DENSITIES}
    shown = {name: settings[name] for name in columns(report)}
    failed = markdown.failure(run) is not None
    metrics = {} if failed else run["metrics"]
    write_session(folder / run["name"], shown, metrics, report["rows"][0].get("step_ms"), failed)


def write_session(
    folder: Path,
    settings: Mapping[str, float | str | None],
    metrics: Mapping[str, float],
    baseline_ms: float | None,
    failed: bool = False,
) -> None:
    """A run's line in HPARAMS, in an event file beside those of its training.

    Args:
        folder: The run's.
        settings: Values of the columns; None where there is none.
        metrics: Metrics of the result.
        baseline_ms: Mean step time of the baseline.
        failed: Whether the run has no result.
    """
    known = {name: value for name, value in settings.items() if value is not None}
    with Logger(folder, suffix=".comparison") as log:
        log.hparams_session(known, failed=failed)
        if baseline_ms and metrics.get("step_ms"):  # all other metrics were logged by training
            log.scalars({"final/speedup": baseline_ms / metrics["step_ms"]}, 0)


def _log_masks(log: Logger, comparison: Comparison) -> None:
    for label, kind in comparison.kinds.items():
        log_mask(log, label, label, kind, comparison.length, comparison.block)


def log_mask(
    log: Logger, tag: str, label: str, kind: AttentionKind, length: int, block: int
) -> None:
    """Record a picture of an attention's mask, if it has one, once for all seeds."""
    if kind.mask is not None:
        picture_ = _mask_picture(label, kind, length, block)
        log.png(f"1 masks/{tag.replace('/', ':')}", picture_)  # a slash would begin another group


@functools.lru_cache(maxsize=64)
def _mask_picture(label: str, kind: AttentionKind, length: int, block: int) -> bytes:
    """Cached: a report is written every minute."""
    name = label if len(label) <= 150 else f"{label[:150]} …"
    title = f"{textwrap.fill(name, 60)}\n{length} tokens, {block} x {block} blocks"
    file = io.BytesIO()
    figure = kind.layout(length, block).plot(title=title.replace("$", r"\$"))
    figure.savefig(file, format="png")
    return file.getvalue()


def picture(
    report: Report, width: int = 32, kinds: Mapping[str, AttentionKind] | None = None
) -> str:
    """The sparsest mask at the task's length, for a terminal; empty where nothing is masked.

    Args:
        report: The result of `compare`.
        width: About this many cells, each way.
        kinds: Attention by label, for labels that cannot be parsed.
    """
    length, block = report["length"], report["settings"]["block"]
    masked = []
    for row in report["rows"]:
        attention = row["attention"]
        found = (kinds or {}).get(attention)
        kind = found or AttentionKind.of(attention.replace("PIXELS", str(math.isqrt(length))))
        if kind.mask is not None and row["density"] not in (None, 1):
            masked.append((row["density"], attention, kind))
    if not masked:
        return ""
    _, attention, kind = min(masked, key=lambda one: one[0])
    return f"{attention} at {length} tokens:\n{kind.layout(length, block).text(width)}"
