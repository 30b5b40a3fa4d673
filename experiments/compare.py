"""Dense against block-sparse: the same seeds and budget, one table."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_flash.experiments.config import CompareConfig
from sparse_flash.experiments.logger import Logger
from sparse_flash.experiments.machine import as_list
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
    """
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
        f"Model: {model}. Attention share: part of a training step that attention takes, forward "
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
            f"{row['density']:.1%}",
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
    """Means over the seeds, and the standard deviation of the accuracy."""
    metrics = [run["metrics"] for run in runs if run["config"]["attention"] == attention]
    accuracies = [m["test_accuracy"] for m in metrics]
    return {
        "attention": attention,
        **{name: statistics.fmean(m[name] for m in metrics) for name in metrics[0]},
        "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
    }


def slug(attention: str) -> str:
    """A folder name: the letters and digits of the mask, and a digest of all of it."""
    if attention.isalnum():
        return attention
    words = re.sub(r"[^A-Za-z0-9]+", "_", attention).strip("_")[:50]
    return f"{words}-{hashlib.sha256(attention.encode()).hexdigest()[:6]}"
