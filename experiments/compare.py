"""Dense against block-sparse: the same seeds and budget, one table."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sparse_flash.experiments import markdown, report
from sparse_flash.experiments.attention import Attention, check_trainable
from sparse_flash.experiments.canvases import check_canvases
from sparse_flash.experiments.config import CompareConfig, RunConfig, check_grid
from sparse_flash.experiments.curriculum import Curriculum, patches_and_butterfly
from sparse_flash.experiments.densities import DENSITIES
from sparse_flash.experiments.device import pick_device
from sparse_flash.experiments.foreground import CapacityError
from sparse_flash.experiments.lock import exclusive
from sparse_flash.experiments.model import Encoder
from sparse_flash.experiments.naming import run_folder, slug
from sparse_flash.experiments.report import picture
from sparse_flash.experiments.staged import follow
from sparse_flash.experiments.train import TrainingError, train
from tqdm import tqdm

__all__ = ["check_models", "compare", "compare_stages", "picture", "slug"]
REWRITE_SECONDS = 60.0  # shortest time between two reports while runs are trained
_SPEED = ("step_ms", "tokens_per_second", *DENSITIES, "peak_memory_MiB")  # of a stage


def compare(config: CompareConfig, folder: Path, device: str = "auto") -> dict[str, Any]:
    """Train every variant with every seed, and report; finished runs are not trained again.

    Args:
        config: Common settings, variants, seeds, seconds of training per run.
        folder: Receives one folder per run, comparison.md, comparison.json, and the TensorBoard
            run _report.
        device: As for `train`.

    Returns:
        The content of comparison.json: machine, settings, one row per variant, all runs.

    Raises:
        ValueError: A variant's model cannot be built; nothing has been trained then.
        FolderInUseError: Another process writes to the folder.
        LogError: The folder cannot be written.
        TrainingError: No run has a result: all diverged.
    """
    with exclusive(folder):
        check_models(config.run(kind, config.seeds[0]) for kind in config.kinds)
        for kind in config.kinds:
            check_trainable(kind, pick_device(device))
        return _compare(config, folder, device)


def check_models(runs: Iterable[RunConfig]) -> None:
    """Build the model of each run once, so that impossible settings are refused before training.

    The layouts are cached for the runs.

    Raises:
        ValueError: Attention, sizes and task do not fit each other.
    """
    with torch.random.fork_rng(devices=[]):
        for run in runs:
            try:
                Encoder.for_task(run.model, run.task, run.kind, run.block)
            except ValueError as error:
                raise ValueError(f"attention {run.attention_label!r}: {error}") from error


def _compare(config: CompareConfig, folder: Path, device: str) -> dict[str, Any]:
    load = functools.cache(config.task.load)
    compared = _comparison(config)
    report.begin(compared, folder)
    runs: list[report.Run] = []
    written = time.monotonic()
    for seed in config.seeds:  # seed by seed: something to compare as early as possible
        for kind, label in zip(config.kinds, config.labels, strict=True):
            path, run = run_folder(folder, label, seed), config.run(kind, seed)
            trained = functools.partial(
                train, run, path, device, load, config.budget, in_comparison=True
            )
            runs.append(report.record(path.name, label, seed, _result(trained, path)))
            if time.monotonic() > written + REWRITE_SECONDS:
                report.write(compared, runs, folder)
                written = time.monotonic()
    return _finish(compared, runs, folder)


def _comparison(config: CompareConfig) -> report.Comparison:
    """Settings for the report."""
    trained = f"{config.train.steps} steps of {config.train.batch_size} sequences"
    if not math.isinf(config.budget):
        trained += f", at most {config.budget:g} s a run"
    return report.Comparison(
        config.to_dict(),
        dict(zip(config.labels, config.kinds, strict=True)),
        config.length,
        config.block,
        config.model.dim // config.model.heads,
        {"training": trained},
    )


def _result(run: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The result of a run, or `{"error": message}` if it diverges or exceeds memory or capacity."""
    try:
        return run()
    except (TrainingError, CapacityError, torch.OutOfMemoryError) as error:
        if torch.distributed.is_initialized():  # others may be waiting for this worker
            raise
        tqdm.write(f"{folder.name}: no result: {error}")
        return {"error": str(error)}


def _finish(compared: report.Comparison, runs: list[report.Run], folder: Path) -> dict[str, Any]:
    """Write the report; refuse one in which no run has a result."""
    made = report.write(compared, runs, folder)
    failed = markdown.failed_runs(made)
    if len(failed) == len(runs):
        raise TrainingError("no run has a result: " + "; ".join(failed))
    return made


def compare_stages(
    curriculum: Curriculum,
    folder: Path,
    device: str = "auto",
    attentions: Sequence[Attention] = (),
    seeds: Sequence[int] = (0,),
    budget: float = math.inf,
) -> dict[str, Any]:
    """Train by a curriculum with every attention and seed, and report; the same call resumes.

    Step times, memory and density refer to the last stage that all runs reached, so they are
    comparable. A run that reached its budget is tested on its current stage.

    Args:
        curriculum: The stages, and their common settings.
        folder: As for `compare`.
        device: As for `train`.
        attentions: Variants, in which PIXELS stands for the canvas; the first is the baseline.
            Default: sdpa, dense and the curriculum's own.
        seeds: Each variant is trained once per seed.
        budget: Seconds for each run.

    Returns:
        The content of comparison.json, as `compare`.

    Raises:
        ValueError: A variant's model cannot be built, or a repeated variant or seed; nothing has
            been trained then.
        FolderInUseError: Another process writes to the folder.
        LogError: The folder cannot be written.
        TrainingError: No run has a result: all diverged.
    """
    own = curriculum.attention or patches_and_butterfly("PIXELS", curriculum.order)
    chosen = tuple(attentions) or tuple(dict.fromkeys(("sdpa", "dense", own)))
    variants = [replace(curriculum, attention=attention) for attention in chosen]
    labels = tuple(variant.attention_label for variant in variants)
    check_grid(labels, tuple(seeds), budget)
    with exclusive(folder):
        for variant in variants:
            check_canvases(variant)
            check_trainable(variant.kind(variant.stages[0].size), pick_device(device))

        def compared(size: int, facts: Mapping[str, str]) -> report.Comparison:
            kinds = {label: v.kind(size) for label, v in zip(labels, variants, strict=True)}
            head_dim = curriculum.model.dim // curriculum.model.heads
            return report.Comparison(settings, kinds, size**2, curriculum.block, head_dim, facts)

        settings = curriculum.to_dict() | {"attentions": list(labels), "seeds": list(seeds)}
        settings["budget"] = None if math.isinf(budget) else budget
        report.begin(compared(curriculum.stages[-1].size, {}), folder)
        runs: list[report.Run] = []
        for seed in seeds:
            for variant, label in zip(variants, labels, strict=True):
                path = run_folder(folder, label, seed)
                trained = functools.partial(follow, variant.with_seed(seed), path, device, budget)
                result = _result(trained, path)
                if "config" in result:
                    result["config"]["attention"] = label
                runs.append(report.record(path.name, label, seed, result))
        facts = _common_stage(curriculum, runs)
        return _finish(compared(math.isqrt(facts.pop("length")), facts), runs, folder)


def _common_stage(curriculum: Curriculum, every: list[report.Run]) -> dict[str, Any]:
    """Set the speed of each run to that of the last stage that all runs reached.

    Returns:
        length, training and note of the report.
    """
    runs = [run for run in every if markdown.failure(run) is None]
    if not runs:
        size = curriculum.stages[-1].size
        return {"length": size * size, "training": f"{len(curriculum.stages)} stages"}
    number = min(len(run["stages"]) for run in runs)
    size = curriculum.stages[number - 1].size
    for run in runs:
        run["metrics"] |= {k: v for k, v in run["stages"][number - 1].items() if k in _SPEED}
        run["metrics"] = {k: v for k, v in run["metrics"].items() if v is not None}
    reached = "; ".join(
        f"{run['name']} stage {run['metrics']['stage']}"
        + ("" if run["metrics"]["finished"] else ", not finished")
        + f" ({run['metrics']['pixels']} x {run['metrics']['pixels']} pixels)"
        for run in runs
    )
    return {
        "length": size * size,
        "training": f"{len(curriculum.stages)} stages",
        "note": (
            f"Step times, density and memory are of stage {number}, {size} x {size} pixels, the "
            f"last that all runs reached. Each run is tested on its own last stage: {reached}."
        ),
    }
