"""The report of a comparison: rows, table, document, figures, and what TensorBoard shows of it."""

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

from sparse_flash.experiments import figures
from sparse_flash.experiments.attention import Kind
from sparse_flash.experiments.densities import DENSITIES, attention_densities, densities_of
from sparse_flash.experiments.logger import Logger, remove_events
from sparse_flash.experiments.machine import as_list
from sparse_flash.experiments.naming import REPORT_RUN
from sparse_flash.experiments.parallel import is_first_worker
from sparse_flash.masks.files import atomic_write

REPORT = "comparison"
SHOWN = {
    "final/test_accuracy": "test accuracy",
    "final/speedup": "speed-up",
    "final/step_ms": "step ms",
}  # metrics of HPARAMS: tag, and the name that a reader sees
SPREADS = {"test_accuracy": "spread", "step_ms": "step_ms_spread",
           "peak_memory_MiB": "peak_memory_MiB_spread"}  # fmt: skip

Run = dict[str, Any]  # name, attention, seed, and what train returned; or error instead
Report = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        settings: Settings as comparison.json holds them, `seeds` among them.
        kinds: Attention by label; the first is what the others are compared with.
        length: Tokens of the layouts.
        block: Granularity of the layouts.
        head_dim: Width of a head.
        facts: Further text of the report: `training`, how long was trained; `note`, what a reader
            must know.
    """

    settings: dict[str, Any]
    kinds: Mapping[str, Kind]
    length: int
    block: int
    head_dim: int
    facts: Mapping[str, str] = field(default_factory=dict)


def record(name: str, attention: str, seed: int, result: Mapping[str, Any]) -> Run:
    """A run of the report: what training returned, or `{"error": message}`."""
    facts = {"name": name, "attention": attention, "seed": seed}
    return facts | dict(result) | facts


def summarize(comparison: Comparison, runs: Sequence[Run]) -> Report:
    """The report of the runs so far, as comparison.json holds it.

    Args:
        comparison: What is compared.
        runs: Made by `record`. One without metrics, or with a test loss that is not finite, has no
            result: its attention's row counts it, and means leave it out.

    Returns:
        machine, settings, length, rows (one for each attention) and runs. A row has the means over
        seeds of all metrics that its runs have in common; `spread`, `step_ms_spread`,
        `peak_memory_MiB_spread` and `speedup_spread`, standard deviations over seeds; `results`,
        the number of seeds with a result, of `seeds`; `density`, `tile_density`,
        `computed_density` and `speedup`, None where there is none; `hint`, advice where far more is
        computed than allowed.
    """
    rows = [_row(attention, comparison, runs) for attention in comparison.kinds]
    chances = [row["chance"] for row in rows if "chance" in row]
    base = rows[0].get("step_ms")
    for row in rows:
        row.setdefault("chance", chances[0] if chances else None)
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

    A metric that some run lacks is left out; it may be of an older version, or of a machine without
    a GPU.
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
    return [run for run in runs if run["attention"] == attention and failure(run) is None]


def failure(run: Run) -> str | None:
    """Why a run has no result; None where it has one."""
    if "metrics" not in run:
        return str(run.get("error", "no result"))
    for name in ("test_accuracy", "test_loss"):
        value = run["metrics"].get(name)
        if value is not None and not math.isfinite(value):
            return f"{name.replace('_', ' ')} {value}"
    return None


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def begin(comparison: Comparison, folder: Path) -> None:
    """Start the report run with the pictures of the masks, before anything is trained.

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
        comparison: What is compared.
        runs: Made by `record`; the events of run `name` are in `folder / name`.
        folder: Receives comparison.json, comparison.md, comparison.png, and the run `_report`.

    Raises:
        LogError: The folder cannot be written.
    """
    report = summarize(comparison, runs)
    if not is_first_worker():
        return report
    text = markdown(report)
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
        log.text(f"0 report/{REPORT}", markdown(report, brief=True))
        log.hparams_experiment(columns(report), SHOWN)
    for run in runs:
        _annotate(run, report, folder)
    return report


def columns(report: Report) -> dict[str, list[str] | None]:
    """The settings in HPARAMS: the attention, and each setting that differs between the runs.

    Returns:
        Name to all values, where they are text; to None where they are numbers.
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
    failed = failure(run) is not None
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
        metrics: What training returned.
        baseline_ms: Mean step time of the attention that speed-ups are relative to.
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


def log_mask(log: Logger, tag: str, label: str, kind: Kind, length: int, block: int) -> None:
    """A picture of an attention's mask, where it has one; once, not for each seed."""
    if kind.mask is not None:
        picture_ = _mask_picture(label, kind, length, block)
        log.png(f"1 masks/{tag.replace('/', ':')}", picture_)  # a slash would begin another group


@functools.lru_cache(maxsize=64)
def _mask_picture(label: str, kind: Kind, length: int, block: int) -> bytes:
    """Drawn once, though a report is written after each minute."""
    name = label if len(label) <= 150 else f"{label[:150]} …"
    title = f"{textwrap.fill(name, 60)}\n{length} tokens, {block} x {block} blocks"
    file = io.BytesIO()
    figure = kind.layout(length, block).plot(title=title.replace("$", r"\$"))
    figure.savefig(file, format="png")
    return file.getvalue()


def markdown(report: Report, brief: bool = False) -> str:
    """The report as a document: answer, table, meaning of the columns, machine.

    Args:
        report: See `summarize`.
        brief: See `table`.
    """
    failures = "".join(f"- {line}\n" for line in failed_runs(report))
    return (
        "# Dense against block-sparse attention\n\n"
        + "".join(f"- {line}\n" for line in [*answers(report), *_hints(report)])
        + f"\n{table(report, brief)}\n\n"
        + (f"## Runs without a result\n\n{failures}\n" if failures else "")
        + "".join(f"- {line}\n" for line in _explanations(report, brief))
        + f"\n## Machine\n\n{as_list(report['machine'])}\n"
    )


def _explanations(report: Report, brief: bool) -> list[str]:
    """What was trained, and what the columns mean."""
    settings, chance = report["settings"], report["rows"][0]["chance"]
    seeds, training = settings["seeds"], settings.get("train", {})
    length = f"; {report['training']}" if "training" in report else ""
    if not length and "steps" in training:  # a file of an older version
        length = f"; {training['steps']} steps of {training['batch_size']} sequences"
    model = ", ".join(f"{name} {value}" for name, value in settings.get("model", {}).items())
    device = "GPU" if "gpu" in report["machine"] else "CPU"
    said = [f"Seeds: {seeds}{length}. Model: {model}."]
    if "note" in report:
        said.append(report["note"])
    if chance is not None:
        said.append(f"Always giving the most frequent answer: {chance:.1%}.")
    if len(seeds) > 1:
        said.append("±: standard deviation over the seeds.")
    said += [
        "Density: kept part of the attention matrix; - where there is no such matrix.",
        f"Tile density: stored part of its {settings['block']} x {settings['block']} tiles.",
        "Computed density: part in the tiles that a Hopper GPU computes; predicts its time.",
        f"Memory: of forward and backward, above the model, on the {device}.",
        f"Speed-up: of a training step, over {report['rows'][0]['attention']}.",
    ]
    if not brief:
        said += [
            "Attention share: part of a step, forward and backward; unknown in CUDA graphs.",
            "Tokens: padding included.",
        ]
    return said


def answers(report: Report) -> list[str]:
    """The comparison in three sentences: speed, accuracy, memory, each against the first row."""
    base, *others = report["rows"]
    seeds = len(report["settings"]["seeds"])

    def results(row: Mapping[str, Any]) -> int:
        return row.get("results", seeds)  # files of older versions lack it

    known = [row for row in others if results(row)]
    if not others:
        return [f"Only {base['attention']} was trained: nothing to compare it with."]
    if not results(base) or not known:
        return ["Nothing to compare: too few runs have a result."]
    said = []
    timed = [row for row in known if row["speedup"] is not None]
    if timed:
        best = max(timed, key=lambda row: row["speedup"])
        said.append(
            f"Speed: a step of `{best['attention']}` takes {best['step_ms']:.1f} ms, "
            f"{best['speedup']:.2f}x the speed of `{base['attention']}` ({base['step_ms']:.1f} ms)."
        )
    best = max(known, key=lambda row: row["test_accuracy"])
    difference = 100 * (best["test_accuracy"] - base["test_accuracy"])
    deviation = 100 * math.hypot(best["spread"], base["spread"])
    doubt = (
        f"{'less' if abs(difference) < deviation else 'more'} than their deviation over seeds, "
        f"{deviation:.1f} points"
        if min(results(best), results(base)) > 1
        else "from one seed, without an estimate of the error"
    )
    said.append(
        f"Accuracy: `{best['attention']}` reaches {best['test_accuracy']:.1%}, "
        f"`{base['attention']}` {base['test_accuracy']:.1%}: a difference of "
        f"{difference:+.1f} points, {doubt}."
    )
    measured = [row for row in known if "peak_memory_MiB" in row and "peak_memory_MiB" in base]
    if measured:
        least = min(measured, key=lambda row: row["peak_memory_MiB"])
        said.append(
            f"Memory: `{least['attention']}` takes {least['peak_memory_MiB']:.1f} MiB, "
            f"`{base['attention']}` {base['peak_memory_MiB']:.1f} MiB."
        )
    return said


def _hints(report: Report) -> list[str]:
    rows = report["rows"]
    return [f"Density: `{row['attention']}`: {row['hint']}." for row in rows if row.get("hint")]


def failed_runs(report: Report) -> list[str]:
    """A line for each run without a result: attention, seed, and why."""
    return [
        f"`{run['attention']}`, seed {run['seed']}: {why}"
        for run in report["runs"]
        if (why := failure(run)) is not None
    ]


def table(report: Report, brief: bool = False) -> str:
    """One line for each attention, in markdown that is also readable in a terminal.

    Args:
        report: See `summarize`.
        brief: Leave out test loss, tokens/s and attention share, so that it fits into TensorBoard.

    A column of which nothing is known is left out as well.
    """
    several = len(report["settings"]["seeds"]) > 1
    head = ["attention", "density", "tile density", "computed density", "test accuracy",
            "test loss", "step ms", "tokens/s", "attention share", "memory MiB",
            "speed-up"]  # fmt: skip
    lines = [
        [
            row["attention"],
            _cell(row, "density", ".1%", "-"),
            _cell(row, "tile_density", ".1%", "-") if "tile_density" in row else "",
            _cell(row, "computed_density", ".1%", "-") if "computed_density" in row else "",
            _accuracy(row, several),
            _cell(row, "test_loss", ".3f"),
            _cell(row, "step_ms", ".1f"),
            _cell(row, "tokens_per_second", ",.0f"),
            _cell(row, "attention_share", ".0%"),
            _cell(row, "peak_memory_MiB", ".0f" if row.get("peak_memory_MiB", 0) >= 10 else ".1f"),
            _cell(row, "speedup", ".2f") + ("x" if row["speedup"] is not None else ""),
        ]
        for row in report["rows"]
    ]
    left_out = ("test loss", "tokens/s", "attention share") if brief else ()
    known = [any(column) for column in zip(*lines, strict=True)]
    kept = [place for place, name in enumerate(head) if known[place] and name not in left_out]
    return as_table([[cells[place] for place in kept] for cells in [head, *lines]])


def _accuracy(row: Mapping[str, Any], several: bool) -> str:
    """With the deviation over seeds, and the number of seeds where some have no result."""
    results, seeds = row.get("results", 1 + several), row.get("seeds", 1)  # older files lack them
    if not results:
        return "no result" if seeds else ""
    text = f"{row['test_accuracy']:.1%}"
    if several and results > 1:
        text += f" ± {row['spread']:.1%}"
    return text + (f" ({results} of {seeds})" if results < seeds else "")


def _cell(row: Mapping[str, Any], name: str, form: str, missing: str = "") -> str:
    value = row.get(name)
    return missing if value is None else format(value, form)


def picture(report: Report, width: int = 32, kinds: Mapping[str, Kind] | None = None) -> str:
    """The sparsest mask at the task's length, for a terminal; empty where nothing is masked.

    Args:
        report: What `compare` returned.
        width: About this many cells, each way.
        kinds: Attention by label, where labels are no text that can be read.
    """
    masked = [row for row in report["rows"] if row["density"] not in (None, 1)]
    if not masked:
        return ""
    attention = min(masked, key=lambda row: row["density"])["attention"]
    length, block = report["length"], report["settings"]["block"]
    found = (kinds or {}).get(attention)
    kind = found or Kind.of(attention.replace("PIXELS", str(math.isqrt(length))))
    shown = kind.layout(length, block).text(width)
    return f"{attention} at {length} tokens:\n{shown}"


def as_table(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a markdown table whose columns are aligned; the first line is its head.

    >>> print(as_table([["a", "b"], ["local(3)", "1"]]))
    | a        | b |
    | -------- | - |
    | local(3) | 1 |
    """
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*escaped, strict=True)]
    rows = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in escaped]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in [rows[0], rule, *rows[1:]])
