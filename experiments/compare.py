"""Dense against block-sparse: the same seeds and budget, one table."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments.attention import Kind
from sparse_flash.experiments.config import CompareConfig, RunConfig
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.logger import Logger, make_writable
from sparse_flash.experiments.machine import as_list
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.train import train
from sparse_flash.masks.files import atomic_write

REPORT = "comparison"


def compare(config: CompareConfig, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Train every variant with every seed, and report; finished runs are not trained again.

    Args:
        config: What is common, the variants, the seeds.
        folder: A folder a run inside it; comparison.md and comparison.json beside them, and what
            TensorBoard shows of these in the folder report.
        device: As for `train`.

    Returns:
        What comparison.json holds: machine, settings, one row a variant, all runs.

    Raises:
        ValueError: A variant's model cannot be built; nothing has been trained then.
        FolderInUseError: Another process writes to the folder.
        LogError: The folder cannot be written.
    """
    with exclusive(folder):
        check_models(config.run(attention, config.seeds[0]) for attention in config.attentions)
        make_writable(folder / "report")
        return _compare(config, folder, device)


def check_models(runs: Iterable[RunConfig]) -> None:
    """Build the model of each run once, so that what is impossible is refused before training.

    Layouts that this makes are kept for the runs themselves.

    Raises:
        ValueError: Attention, sizes and task do not fit each other.
    """
    with torch.random.fork_rng(devices=[]):
        for run in runs:
            try:
                Encoder.for_task(run.model, run.task, run.attention, run.block)
            except ValueError as error:
                raise ValueError(f"attention {run.attention!r}: {error}") from error


def _compare(config: CompareConfig, folder: Path, device: str) -> dict[str, Any]:
    load = functools.cache(config.task.load)
    runs = []
    for seed in config.seeds:  # seed by seed: something to compare as early as possible
        for attention in config.attentions:
            name = f"{slug(attention)}-seed{seed}"
            result = train(config.run(attention, seed), folder / name, device, load)
            runs.append({"name": name, **result})
    rows = [_row(attention, runs) for attention in config.attentions]
    for row in rows:
        row["speedup"] = rows[0]["step_ms"] / row["step_ms"]
    report = {
        "machine": runs[0]["machine"],
        "settings": config.to_dict(),
        "length": config.length,
        "rows": rows,
        "runs": runs,
    }
    with atomic_write(folder / f"{REPORT}.json") as file:
        file.write(json.dumps(report, indent=2).encode())
    text = markdown(report)
    with atomic_write(folder / f"{REPORT}.md") as file:
        file.write(text.encode())
    with Logger(folder / "report") as log:
        log.text(REPORT, text)
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a document: the machine, the table, what the columns mean."""
    settings, chance = report["settings"], report["rows"][0]["chance"]
    train_settings, seeds = settings["train"], settings["seeds"]
    model = ", ".join(f"{name} {value}" for name, value in settings["model"].items())
    return (
        "# Dense against block-sparse attention\n\n"
        f"{table(report)}\n\n"
        f"Always giving the most frequent answer: {chance:.1%}. Seeds: {seeds}; "
        f"{train_settings['steps']} steps of {train_settings['batch_size']} sequences. "
        f"Model: {model}. Density: kept part of the attention matrix; - where there is no such "
        "matrix. Attention share: part of a training step that attention takes, forward "
        "and backward; empty where a step is one CUDA graph. Memory: of forward and backward, "
        "above the model. Tokens: padding included. Speed-up: of a training step, against the "
        "first row.\n\n"
        f"## Machine\n\n{as_list(report['machine'])}\n"
    )


def table(report: dict[str, Any]) -> str:
    """One line a variant, in markdown that is also readable in a terminal."""
    head = ["attention", "density", "test accuracy", "test loss", "step ms", "tokens/s",
            "attention share", "memory MiB", "speed-up"]  # fmt: skip
    lines = [
        [
            row["attention"],
            f"{row['density']:.1%}" if row["density"] is not None else "-",
            f"{row['test_accuracy']:.1%}"
            + (f" ± {row['spread']:.1%}" if len(report["settings"]["seeds"]) > 1 else ""),
            f"{row['test_loss']:.3f}",
            f"{row['step_ms']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['attention_share']:.0%}" if "attention_share" in row else "",
            f"{row['peak_memory_MiB']:.0f}",
            f"{row['speedup']:.2f}x",
        ]
        for row in report["rows"]
    ]
    return as_table([head, *lines])


def picture(report: dict[str, Any], width: int = 32) -> str:
    """The sparsest mask at the task's length, for a terminal; empty where nothing is masked.

    Args:
        report: What `compare` returned.
        width: About this many cells, each way.
    """
    masked = [row for row in report["rows"] if row["density"] not in (None, 1)]
    if not masked:
        return ""
    attention = min(masked, key=lambda row: row["density"])["attention"]
    mask, block = Kind.of(attention).mask, report["settings"]["block"]
    assert mask is not None
    length = report["length"]
    shown = mask.layout(length, block=(block, block)).text(width)
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


def _row(attention: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the standard deviation of the accuracy.

    A metric that some run lacks is left out; it may be of an older version, or of a machine without
    a GPU.
    """
    metrics = [run["metrics"] for run in runs if run["config"]["attention"] == attention]
    accuracies = [m["test_accuracy"] for m in metrics]
    names = [name for name in metrics[0] if all(name in m for m in metrics)]
    return {
        "attention": attention,
        "density": None,
        **{name: statistics.fmean(m[name] for m in metrics) for name in names},
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
    }


def slug(attention: str) -> str:
    """A folder name: the letters and digits of the mask, and a digest of all of it."""
    if attention.isalnum():
        return attention
    words = re.sub(r"[^A-Za-z0-9]+", "_", attention).strip("_")[:50]
    return f"{words}-{hashlib.sha256(attention.encode()).hexdigest()[:6]}"
