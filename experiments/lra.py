"""`sparse-flash compare lra`: a grid of tasks, attentions and seeds, as one table.

The table is laid out as table 3 of FlashAttention (Dao et al., 2022): an accuracy for each task,
their average, and the speed-up of a training step against standard attention.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sparse_flash.experiments import markdown, recipes
from sparse_flash.experiments.attention import Attention, AttentionKind, check_trainable
from sparse_flash.experiments.compare import check_models
from sparse_flash.experiments.config import RunConfig, check_seed, label_of
from sparse_flash.experiments.densities import DENSITIES, attention_densities
from sparse_flash.experiments.device import pick_device
from sparse_flash.experiments.figures import lra_figures
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.logger import Logger, make_writable
from sparse_flash.experiments.naming import REPORT_RUN, run_folder
from sparse_flash.experiments.report import (
    SHOWN,
    discard_old_report,
    log_mask,
    write_session,
)
from sparse_flash.experiments.train import finished, train
from sparse_flash.masks.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TaskName = Literal["listops", "text", "retrieval", "image", "pathfinder"]
_SHORTEST = 1_024  # tokens of the shortest task
TIMED_STEPS = 100  # of a timed attention


@dataclass(frozen=True)
class LraConfig:
    """The grid of runs, and the budget of each."""

    tasks: tuple[TaskName, ...] = ("listops", "text", "image", "pathfinder")
    """Tasks; retrieval needs its data."""
    attentions: tuple[Attention, ...] = (
        "sdpa",
        "dense",
        "local(128) | global_tokens(16) | butterfly(128)",
    )
    """Attentions; see `sparse-flash train listops --help`."""
    timed: tuple[Attention, ...] = ("standard",)
    """Slow attentions that are timed but not trained. Speed-ups are relative to the first of these,
    or of the trained ones."""
    seeds: tuple[int, ...] = (0,)
    """Each task and attention is trained once per seed."""
    share: float = 1.0
    """Fraction of the papers' steps; the learning-rate schedule is scaled."""
    budget: float = math.inf
    """Seconds of training per run; a run that reaches them is evaluated as it is."""
    text: str = "data/aclImdb"
    """Path of the film reviews, aclImdb: a folder or an archive."""
    image: str = "data/cifar-10-python.tar.gz"
    """Path of CIFAR-10."""
    retrieval: str = "data/lra_release/tsv_data"
    """Path of new_aan_pairs.*.tsv."""

    def __post_init__(self) -> None:
        """Refuse empty or repeated entries and unknown attentions."""
        trained = {"tasks": self.tasks, "attentions": self.trained, "seeds": self.seeds}
        for name, values in trained.items():
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} must be different values, at least one, got {values}")
        if not 0 < self.share <= 1 or not self.budget > 0:
            raise ValueError(
                "share must be above 0 and at most 1, and budget positive, got "
                f"{self.share} and {self.budget}"
            )
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(
                f"timed and attentions must be different kinds, got {self.kinds}: name each once, "
                "as one to time or as one to train"
            )
        for seed in self.seeds:
            check_seed(seed)

    @functools.cached_property
    def variants(self) -> tuple[tuple[str, AttentionKind], ...]:
        """Label and kind of each attention, the baseline first; files are read once."""
        kinds = [AttentionKind.of(attention) for attention in (*self.timed, *self.attentions)]
        return tuple((label_of(kind, _SHORTEST), kind) for kind in kinds)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Labels of all attentions, the baseline first."""
        return tuple(label for label, _ in self.variants)

    @property
    def trained(self) -> tuple[str, ...]:
        """Labels of the trained attentions."""
        return self.kinds[len(self.timed) :]

    @property
    def only_timed(self) -> tuple[str, ...]:
        """Labels of the attentions that are only timed."""
        return self.kinds[: len(self.timed)]

    def grid(self) -> Iterator[tuple[int, str]]:
        """Seed and kind of a task's runs; a timed attention needs no second seed."""
        for number, seed in enumerate(self.seeds):
            yield from ((seed, kind) for kind in (self.trained if number else self.kinds))

    def run(self, base: RunConfig, task: str, attention: str, seed: int) -> RunConfig:
        """One run: the recipe's, with this attention, seed and number of steps."""
        source = {"text": self.text, "image": self.image, "retrieval": self.retrieval}.get(task)
        data: Any = base.task
        data = data if source is None else replace(data, source=source)
        steps = max(1, round(self.share * base.train.steps))
        if attention in self.only_timed:
            steps = min(steps, TIMED_STEPS)
        schedule = replace(base.train, steps=steps, warmup=min(base.train.warmup, steps // 5))
        kind = dict(self.variants).get(attention) or AttentionKind.of(attention)
        chosen = replace(kind, text=attention)
        return replace(base, task=data, train=schedule, attention=chosen, seed=seed)


def lra(
    config: LraConfig,
    out: Path,
    device: str = "auto",
    by_task: Mapping[str, Callable[[], RunConfig]] = recipes.SMALL,
    only_report: bool = False,
) -> dict[str, Any]:
    """Train all unfinished runs, and report after each one. The same call resumes.

    Args:
        config: The grid.
        out: Receives a folder per task and run, lra.md, lra.json, lra.png, and the TensorBoard
            run _report.
        device: As for `train`.
        by_task: The settings of each task.
        only_report: Train nothing; report finished runs.

    Returns:
        The content of lra.json: settings, machine, rows of the table, runs.

    Raises:
        ValueError: A model cannot be built, or data is missing; nothing has been trained then. Or
            nothing is finished that could be reported.
        FolderInUseError: Another process writes to the folder.
    """
    if only_report:  # beside a process that trains, too: reports are replaced as a whole
        return _lra(config, out, device, by_task, only_report)
    with exclusive(out):
        _check(config, out, by_task, pick_device(device))
        make_writable(out / REPORT_RUN)
        return _lra(config, out, device, by_task, only_report)


def _check(
    config: LraConfig,
    out: Path,
    by_task: Mapping[str, Callable[[], RunConfig]],
    device: torch.device,
) -> None:
    """Build every model that is to be trained, and read the data that comes from elsewhere."""
    for task in config.tasks:
        base = by_task[task]()
        runs = [config.run(base, task, attention, seed) for seed, attention in config.grid()]
        ahead = [
            r for r in runs if finished(r, _folder(out, task, r.attention_label, r.seed)) is None
        ]
        check_models(ahead)
        for run in ahead:
            check_trainable(run.kind, device)
        if ahead and vars(ahead[0].task).get("source"):
            ahead[0].task.load()


def _folder(out: Path, task: str, attention: str, seed: int) -> Path:
    return run_folder(out / task, attention, seed)


def _lra(
    config: LraConfig,
    out: Path,
    device: str,
    by_task: Mapping[str, Callable[[], RunConfig]],
    only_report: bool,
) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    report: dict[str, Any] = {}
    written = False
    for task in config.tasks:
        base = by_task[task]()
        load = functools.cache(config.run(base, task, config.trained[0], 0).task.load)
        for seed, attention in config.grid():
            run = config.run(base, task, attention, seed)
            folder = _folder(out, task, attention, seed)
            before = result = finished(run, folder)
            if not only_report:
                result = train(run, folder, device, load, config.budget, in_comparison=True)
            if result is None:
                continue
            share = result["metrics"]["steps"] / base.train.steps
            facts = {"task": task, "attention": attention, "seed": seed, "share": share}
            runs.append(facts | result)
            report = _report(config, runs)
            written = result != before
            if written:  # after each new run, so that an interruption loses nothing
                _write(config, out, report, by_task)
    if not report:
        raise ValueError(f"no run of this grid was finished in {out}: leave out --only-report")
    if not written:
        _write(config, out, report, by_task)
    return report


def _report(config: LraConfig, runs: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    settings |= {"attentions": config.trained, "timed": config.only_timed}
    settings["budget"] = None if math.isinf(config.budget) else config.budget
    rows = [_row(attention, runs, config) for attention in config.kinds]
    return {"settings": settings, "machine": runs[0]["machine"], "rows": rows, "runs": runs}


def _row(attention: str, runs: list[dict[str, Any]], config: LraConfig) -> dict[str, Any]:
    """Means over seeds for each task (accuracy, step time, memory), and over tasks."""
    tasks: dict[str, dict[str, Any]] = {}
    for task in map(str, config.tasks):
        mine = [r for r in runs if (r["task"], r["attention"]) == (task, attention)]
        if not mine:
            continue
        metrics = [r["metrics"] for r in mine]
        accuracies = [m["test_accuracy"] for m in metrics]
        names = ("step_ms", "peak_memory_MiB", "majority_accuracy")
        tasks[task] = {name: metrics[0].get(name) for name in DENSITIES}  # the same for each seed
        tasks[task] |= {name: statistics.fmean(m[name] for m in metrics) for name in names}
        if attention not in config.only_timed:
            tasks[task] |= {
                "accuracy": statistics.fmean(accuracies),
                "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
                "share": min(r["share"] for r in mine),
            }
    base = [r for r in runs if r["attention"] == config.kinds[0]]
    for task, values in tasks.items():
        times = [r["metrics"]["step_ms"] for r in base if r["task"] == task]
        if times:
            values["speedup"] = statistics.fmean(times) / values["step_ms"]
    whole = tasks and len(tasks) == len(config.tasks)
    return {
        "attention": attention,
        "tasks": tasks,
        "average": statistics.fmean(t["accuracy"] for t in tasks.values())
        if whole and attention not in config.only_timed
        else None,
        "speedup": statistics.geometric_mean(t["speedup"] for t in tasks.values())
        if whole and all("speedup" in t for t in tasks.values())
        else None,
    }


def plot(report: dict[str, Any]) -> Figure:
    """Accuracy during training against seconds (above) and against operations (below)."""
    from matplotlib.figure import Figure

    settings = report["settings"]
    tasks, attentions = settings["tasks"], settings["attentions"]
    figure = Figure(figsize=(4 * len(tasks), 7), layout="constrained")
    axes = figure.subplots(2, len(tasks), squeeze=False, sharey="col")
    for column, task in enumerate(tasks):
        for run in report["runs"]:
            if run["task"] != task or not run["curve"] or run["attention"] not in attentions:
                continue
            steps, seconds, _, accuracy = zip(*run["curve"], strict=True)
            color = f"C{attentions.index(run['attention'])}"
            first = run["seed"] == settings["seeds"][0]
            label = run["attention"] if first else None
            axes[0, column].plot(seconds, accuracy, color=color, label=label)
            if "step_gflops" in run["metrics"]:  # not of every attention of a user
                operations = [run["metrics"]["step_gflops"] * step / 1e6 for step in steps]
                axes[1, column].plot(operations, accuracy, color=color)
        axes[0, column].set(title=task, xlabel="seconds of training")
        axes[1, column].set(xlabel="PFLOP of training")
    for row in range(2):
        axes[row, 0].set_ylabel("accuracy")
    found = [ax.get_legend_handles_labels() for ax in axes[0]]
    lines = {name: line for pairs in found for line, name in zip(*pairs, strict=True)}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=2)
    return figure


def _write(
    config: LraConfig,
    out: Path,
    report: dict[str, Any],
    by_task: Mapping[str, Callable[[], RunConfig]],
) -> None:
    """The report's files, each of which replaces the one before as a whole, and TensorBoard's."""
    with atomic_write(out / "lra.json") as file:
        file.write(json.dumps(report, indent=1).encode())
    text, figure = markdown.lra(report), plot(report)
    with atomic_write(out / "lra.md") as file:
        file.write(text.encode())
    with atomic_write(out / "lra.png") as file:
        figure.savefig(file, format="png", dpi=110)
    _write_events(config, out, report, by_task, {"lra": figure}, text)


def _write_events(
    config: LraConfig,
    out: Path,
    report: dict[str, Any],
    by_task: Mapping[str, Callable[[], RunConfig]],
    figures: Mapping[str, Figure],
    text: str,
) -> None:
    """TensorBoard's report run, and the lines of all runs in HPARAMS."""
    discard_old_report(out)
    settings: dict[tuple[str, str], dict[str, Any]] = {}  # of each task and attention
    columns: dict[str, list[str] | None] = {"task": [*config.tasks]}
    columns |= {"attention": [*config.trained]}
    columns |= {name.replace("_", " "): None for name in DENSITIES}
    if len(config.seeds) > 1:
        columns["seed"] = [*map(str, config.seeds)]
    with Logger(out / REPORT_RUN) as log:
        for name, figure in (lra_figures(report) | dict(figures)).items():
            log.figure(f"0 report/{name}", figure)
        log.text("0 report/lra", text)
        log.hparams_experiment(columns, SHOWN)
        for task in config.tasks:
            base = by_task[task]()
            for attention in config.kinds:
                run = config.run(base, task, attention, config.seeds[0])
                shape = (run.kind, run.length, run.block)
                log_mask(log, f"{task}: {attention}", attention, *shape)
                kept = attention_densities(*shape, run.model.dim // run.model.heads)
                kept = {name.replace("_", " "): value for name, value in kept.items()}
                settings[task, attention] = {"task": task, "attention": attention} | kept
    baseline = report["rows"][0]["tasks"]
    for result in report["runs"]:
        task, attention, seed = result["task"], result["attention"], result["seed"]
        if attention not in config.trained:
            continue  # its accuracy is that of a model that was hardly trained
        shown = settings[task, attention] | {"seed": str(seed)}
        shown = {name: shown[name] for name in columns}
        step_ms = baseline.get(task, {}).get("step_ms")
        write_session(_folder(out, task, attention, seed), shown, result["metrics"], step_ms)
