"""Texts and the figure of Path-X and Path-256, from the recorded runs by stages."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

from tools import tables

RUNS = tables.RESULTS / "path-curricula"
SEEDS = (0, 1, 2)
EQUAL = 540  # GPU seconds at which runs are compared
# The runs of the ablation: name, layers, attention. None of them trained on broken curves.
ABLATION = {
    "path-256-unbroken-seed0": (6, "3 x 3 patches and butterfly"),
    "path-256-local-seed0": (6, "3 x 3 patches"),
    "path-256-4-layers-seed0": (4, "3 x 3 patches and butterfly"),
    "path-256-2-layers-seed0": (2, "3 x 3 patches and butterfly"),
}
FINISHED = "path-256-finished-seed1"  # with fewer images in its last stage
PRETRAINED = "path-x-pretrained-seed0"
SMALL_EQUAL = 230  # GPU seconds at which runs of Path-X are compared
# The ablation on 128 pixels: run, what differs from `path-x`.
SMALL_ABLATION = {
    "path-x-seed0": "nothing",
    "path-x-local-seed0": "3 x 3 patches, no butterfly",
    "path-x-no-initial-span-seed0": "no initial span",
    "path-x-raster-seed0": "raster order",
    "path-x-mean-pooling-seed0": "mean pooling",
    "path-x-4-layers-seed0": "4 layers",
    "path-x-2-layers-seed0": "2 layers",
    "path-x-width-128-seed0": "width 128, hidden width 256",
    "path-x-one-stage-seed0": "the last stage alone",
}
# Test accuracy on Path-256 in per cent, as published for the data of Long Range Arena.
PUBLISHED = {"block-sparse FlashAttention": 63.1, "FlashButterfly": 92.2}


def run(name: str) -> Any:
    """The result of a run."""
    return tables.read(RUNS / name / "result.json")


def results() -> str:
    """Test accuracy of all seeds, with the GPU seconds and images of each run."""
    rows = []
    for task in ("path-256", "path-x"):
        found = [run(f"{task}-seed{seed}")["metrics"] for seed in SEEDS]
        for seed, metrics in zip(SEEDS, found, strict=True):
            rows.append(
                [
                    task,
                    f"{metrics['pixels'] ** 2:,}",
                    f"{seed}",
                    f"{100 * metrics['test_accuracy']:.1f} %",
                    f"{metrics['gpu_seconds']:,.0f}",
                    f"{metrics['images']:,}",
                ]
            )
    return tables.table(
        ["recipe", "tokens", "seed", "test accuracy", "GPU seconds", "images seen"], rows
    )


def average(task: str) -> str:
    """Mean and standard deviation of the test accuracy over seeds, and the mean GPU seconds."""
    found = [run(f"{task}-seed{seed}")["metrics"] for seed in SEEDS]
    accuracy = [100 * metrics["test_accuracy"] for metrics in found]
    seconds = mean(metrics["gpu_seconds"] for metrics in found)
    return f"{mean(accuracy):.1f} ± {stdev(accuracy):.1f} % after {seconds / 60:.0f} GPU minutes"


def ablation() -> str:
    """Validation accuracy of the ablation at `EQUAL` GPU seconds, and the last test."""
    rows = []
    for name, (layers, attention) in ABLATION.items():
        result = run(name)
        metrics = result["metrics"]
        at = [row for row in result["curve"] if row[3] <= EQUAL][-1]
        rows.append(
            [
                f"{layers}",
                attention,
                f"{100 * at[7]:.1f} %",
                f"{at[2]:,}",
                f"{100 * metrics['test_accuracy']:.1f} %",
                f"{metrics['gpu_seconds']:,.0f}",
            ]
        )
    head = ["layers", "attention", f"validation at {EQUAL} s", "images", "test", "GPU seconds"]
    return tables.table(head, rows)


def small_ablation() -> str:
    """Runs of Path-X with one change: the evaluation at `SMALL_EQUAL` GPU seconds, and the test."""
    rows = []
    for name, change in SMALL_ABLATION.items():
        result = run(name)
        metrics = result["metrics"]
        at = [row for row in result["curve"] if row[3] <= SMALL_EQUAL][-1]
        rows.append(
            [
                change,
                f"{result['stages'][-1]['step_ms']:.0f}",
                f"{at[2]:,}",
                f"{result['config']['stages'][at[0]]['contours'][-1]}",
                f"{100 * at[7]:.1f} %",
                f"{100 * metrics['test_accuracy']:.1f} % ({metrics['gpu_seconds']:,.0f} s)",
            ]
        )
    head = ["change", "step, ms", "images", "paddles", "validation", "test, 14 paddles"]
    return tables.table(head, rows)


def step_times() -> str:
    """Time of a step of the last stage of `path-256` by attention: mean and range of its runs."""
    records = tables.read(RUNS / "steps-256.json")
    ours = mean(row["step_ms"] for row in records if _implementation(row) == "ours")
    rows = []
    for label, title in {
        "ours": "ours, 3 x 3 patches and butterfly",
        "flex": "FlexAttention, the same mask",
        "sdpa": "dense, SDPA",
    }.items():
        times = [row["step_ms"] for row in records if _implementation(row) == label]
        average = mean(times)
        rows.append(
            [
                title,
                f"{average:,.1f}",
                f"{min(times):,.1f} to {max(times):,.1f}" if len(times) > 1 else "one run",
                f"{16_000 / average:.1f}",
                f"{average / ours:.2f}",
            ]
        )
    return tables.table(["attention", "step, ms", "range", "images/s", "ours is faster by"], rows)


def _implementation(record: dict[str, Any]) -> str:
    return record["attention"].partition(":")[0] or "ours"


def stages() -> str:
    """The last evaluation of each stage, of `path-256` and `path-x`; a cell has all seeds."""
    rows = []
    for task in ("path-256", "path-x"):
        runs = [run(f"{task}-seed{seed}") for seed in SEEDS]
        last = [{row[0]: row for row in result["curve"]} for result in runs]
        for number, stage in enumerate(runs[0]["config"]["stages"]):
            ends = [points[number] for points in last]
            rows.append(
                [
                    task,
                    f"{number + 1}",
                    f"{stage['size']}",
                    f"{stage['contours'][-1]}",
                    _listed(f"{row[2] / 1000:,.0f}" for row in ends),
                    _listed(f"{row[3]:,.0f}" for row in ends),
                    _listed(f"{100 * row[7]:.1f}" for row in ends) + " %",
                ]
            )
    head = ["recipe", "stage", "pixels a side", "paddles", "1,000 images", "GPU seconds"]
    return tables.table([*head, "validation"], rows)


def _listed(words: Iterable[str]) -> str:
    return " / ".join(words)


def interventions() -> str:
    """Share of answers that are 1, by change of the image, run and label."""
    records = tables.read(RUNS / "interventions.json")
    rows = [
        [change]
        + [
            f"{100 * record['share_of_ones'][change][label]:.0f} %"
            for record in records
            for label in ("label 1", "label 0")
        ]
        for change in records[0]["share_of_ones"]
    ]
    head = [
        f"{record['run'].removesuffix('-seed0')}, {label}"
        for record in records
        for label in ("label 1", "label 0")
    ]
    return tables.table(["change", *head], rows)


def reached(name: str) -> str:
    """Test accuracy, GPU seconds and images of a run."""
    metrics = run(name)["metrics"]
    return (
        f"{100 * metrics['test_accuracy']:.1f} % after {metrics['gpu_seconds']:,.0f} GPU seconds "
        f"and {metrics['images']:,} images"
    )


def pretrained() -> str:
    """What pretraining learned, and how many images with labels the stage of 9 paddles then took,
    with and without pretraining.
    """
    result, plain = run(PRETRAINED), run("path-x-seed0")
    last, at = result["pretraining"][-1], result["curve"][-1]
    assert result["config"]["stages"][at[0]]["contours"][-1] == 9
    other = [row for row in plain["curve"] if row[0] == 3][-1]  # the stage of 9 paddles
    return (
        f"After {last[3]:,.0f} GPU seconds and {last[2]:,} images, {100 * last[7]:.1f} % of the "
        f"hidden pixels of held-out images are right. The label stages then reach "
        f"{100 * at[7]:.1f} % on 9 paddles after {at[2] - last[2]:,} images. Without pretraining "
        f"that stage ends with {100 * other[7]:.1f} % after {other[2]:,} images"
    )


def foreground_tiles(name: str) -> str:
    """The computed share of the matrix where images decide the layout, of the last stage."""
    density = 100 * run(name)["stages"][-1]["computed_density"]
    return f"{density:.{0 if density >= 10 else 1}f} %"


def unbroken() -> str:
    """Test accuracy of Path-256 without broken curves in the training images, all seeds."""
    found = [run(f"path-256-unbroken-seed{seed}")["metrics"] for seed in SEEDS]
    accuracy = _listed(f"{100 * metrics['test_accuracy']:.1f}" for metrics in found)
    seconds = _listed(f"{metrics['gpu_seconds']:,.0f}" for metrics in found)
    return f"{accuracy} % after {seconds} GPU seconds"


def dense() -> str:
    """How far the run with dense attention came."""
    result = run("path-256-sdpa-seed0")
    metrics, last = result["metrics"], result["stages"][-1]
    stages = run("path-256-seed0")["stages"]  # in some, steps waited for images
    ours = min(stage["step_ms"] for stage in stages if stage["pixels"] == last["pixels"])
    return (
        f"After {metrics['gpu_seconds']:,.0f} GPU seconds it is in stage {metrics['stage']}, of "
        f"{metrics['pixels']} pixels. It has {100 * metrics['test_accuracy']:.1f} % on images of "
        f"that size. A step there takes {last['step_ms']:,.0f} ms instead of {ours:,.0f}"
    )


def speed(name: str) -> str:
    """Milliseconds of a step of the last stage, and images a second."""
    result = run(name)
    step_ms = result["stages"][-1]["step_ms"]
    images = result["config"]["stages"][-1]["batch_size"] / step_ms * 1000
    return f"{step_ms:.1f} ms, or {images:,.0f} images a second"


def data() -> dict[str, Any]:
    """Accuracy on 256 pixels in per cent by GPU minute, by run; the dense run has 128 pixels."""
    lines = {f"6 layers, seed {seed}": f"path-256-seed{seed}" for seed in SEEDS}
    lines |= {
        "6 layers, seed 1, to the end": FINISHED,
        "6 layers, FlexAttention": "path-256-flex-seed0",
        "6 layers, no broken curves": "path-256-unbroken-seed0",
        "6 layers, 3 x 3 patches alone": "path-256-local-seed0",
        "4 layers": "path-256-4-layers-seed0",
        "2 layers": "path-256-2-layers-seed0",
    }
    found = {label: _points(name) for label, name in lines.items()}
    found["6 layers, dense, on 128 pixels"] = _points("path-256-sdpa-seed0", 128)
    return {"lines": found}


def _points(name: str, pixels: int = 256) -> list[list[float]]:
    """Evaluations in the last stage of these pixels, and the test at the end."""
    result = run(name)
    stages, metrics = result["config"]["stages"], result["metrics"]
    last = max(number for number, stage in enumerate(stages) if stage["size"] == pixels)
    points = [(row[3], row[7]) for row in result["curve"] if row[0] == last]
    points.append((metrics["gpu_seconds"], metrics["test_accuracy"]))
    return [[round(seconds / 60, 2), round(100 * accuracy, 1)] for seconds, accuracy in points]


def draw(data: dict[str, Any], theme: tuple[str, str, str, tuple[str, ...]]) -> Any:
    """Accuracy against GPU time; dotted lines are published accuracies."""
    from matplotlib.figure import Figure

    ink, line, ours, others = theme
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    styles = [(f"{m}-", ours) for m in "o^vd"] + [(f"{m}--", others[0]) for m in "*+sDxP"]
    for (label, points), (style, color) in zip(data["lines"].items(), styles, strict=True):
        minutes, accuracy = zip(*points, strict=True)
        axes.plot(minutes, accuracy, style, color=color, label=label, markersize=4, linewidth=1.2)
    for name, accuracy in PUBLISHED.items():
        axes.axhline(accuracy, color=ink, linestyle=":", linewidth=1)
        axes.annotate(
            f"{name}, {accuracy} %",
            (1, accuracy),
            (-4, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=ink,
            fontsize=8,
        )
    axes.set_xlabel("GPU minutes, all stages (one H200)", color=ink)
    axes.set_ylabel("accuracy on held-out images, %", color=ink)
    axes.tick_params(colors=ink, length=0)
    axes.grid(color=line, linewidth=0.6)
    axes.set_xlim(0)
    axes.set_ylim(40, 97)  # below the curves is room for the legend
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=ink, loc="lower left", ncols=2, fontsize=9)
    return figure
