"""Figures of a comparison: accuracy against training time and step time, speed-up, memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparse_flash.experiments.naming import short_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

MARKERS = "osD^vP*Xdp<>h"
MANY = 5  # attentions; more have smaller labels at the side
_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}  # behind text
Point = tuple[float, float, float]  # seconds, accuracy, standard deviation of the accuracy

Report = Mapping[str, Any]


def figures(report: Report) -> dict[str, Figure]:
    """The four figures, by the names under which TensorBoard sorts them.

    Args:
        report: See `report.summarize`.
    """
    return _draw(_DRAWN, report)


def lra_figures(report: Report) -> dict[str, Figure]:
    """Speed-up and accuracy over all tasks of Long Range Arena, by their names in TensorBoard.

    Args:
        report: See `lra.lra`.
    """
    return _draw({"1 speed-up": speedups, "2 average accuracy": average_accuracy}, report)


def _draw(functions: Mapping[str, Callable[[Any, Report], None]], report: Report) -> Any:
    from matplotlib.figure import Figure

    made = {}
    for name, draw in functions.items():
        made[name] = Figure(figsize=_size(report), dpi=100, layout="constrained")
        draw(made[name], report)
    return made


def overview(report: Report) -> Figure:
    """All four figures as one."""
    from matplotlib.figure import Figure

    width, height = _size(report)
    figure = Figure(figsize=(2 * width, 2 * height), dpi=100, layout="constrained")
    parts: Any = figure.subfigures(2, 2)
    for part, draw in zip(parts.flat, _DRAWN.values(), strict=True):
        draw(part, report)
    return figure


def _size(report: Report) -> tuple[float, float]:
    """Inches. TensorBoard's cards show 353 x 215 pixels or more: a half of these, of 100 dpi."""
    return 7.06, max(4.3, 1.2 + 0.23 * len(report["rows"]))


def accuracy_by_time(figure: FigureBase, report: Report) -> None:
    """Validation accuracy against seconds of training; error bars are standard deviations."""
    axes = _axes(figure, "Accuracy against training time", report)
    for index, (row, label) in enumerate(_labeled(report)):
        runs = [r for r in report["runs"] if r["attention"] == row["attention"] and r.get("curve")]
        style = _style(index, len(report["rows"]))
        found = mean_curves([curve(run) for run in runs])
        if not found:
            axes.errorbar([], [], label=f"{label}: no result", **style)
        for number, points in enumerate(found):
            seconds, accuracy, spread = zip(*points, strict=True)
            every = max(1, len(points) // 10)
            axes.errorbar(
                seconds,
                accuracy,
                yerr=spread if any(spread) else None,
                errorevery=every,
                markevery=every,
                capsize=3,
                label=None if number else label,  # once in the legend
                **style,
            )
    _finish(axes, report, "seconds of training", "validation accuracy")


def accuracy_by_step(figure: FigureBase, report: Report) -> None:
    """Test accuracy against milliseconds per step, one point per attention."""
    axes = _axes(figure, "Accuracy against step time", report)
    times = []
    for index, (row, label) in enumerate(_labeled(report)):
        style = _style(index, len(report["rows"])) | {"linestyle": "none", "markersize": 13}
        x, y = row.get("step_ms"), row.get("test_accuracy")
        if x is None or y is None:
            axes.errorbar([], [], label=f"{label}: no result", **style)
            continue
        times.append(x)
        bars = {"xerr": row["step_ms_spread"], "yerr": row["spread"]} if row["results"] > 1 else {}
        axes.errorbar(x, y, label=label, capsize=3, **bars, **style)
    if times and max(times) > 8 * min(times):
        axes.set_xscale("log")
    _finish(axes, report, "milliseconds per step; up and left is better", "test accuracy")


def speedups(figure: FigureBase, report: Report) -> None:
    """Bars of the speed-up of a training step over the first attention."""
    baseline = short_labels([report["rows"][0]["attention"]], 30)[0]
    axes = _axes(figure, f"Speed-up of a training step over {baseline}", report)
    _bars(axes, report, "speedup", "{:.2f}x")
    axes.axvline(1, color="0.3", linewidth=2, linestyle="--", zorder=0)
    axes.set_xlabel("times the speed", fontsize=14)


def memory(figure: FigureBase, report: Report) -> None:
    """Bars of the memory of forward and backward, above the model."""
    where = "GPU" if "gpu" in report["machine"] else "CPU"
    axes = _axes(figure, "Memory of forward and backward", report)
    _bars(axes, report, "peak_memory_MiB", "{:,.1f} MiB")
    axes.set_xlabel(f"MiB above the model ({where})", fontsize=14)


def average_accuracy(figure: FigureBase, report: Report) -> None:
    """Bars of the mean accuracy over the tasks of Long Range Arena."""
    axes = _axes(figure, "Average test accuracy over the tasks", report)
    _bars(axes, report, "average", "{:.1%}")
    axes.set_xlabel("test accuracy, mean over the tasks", fontsize=14)


_DRAWN = {
    "1 accuracy against training time": accuracy_by_time,
    "2 accuracy against step time": accuracy_by_step,
    "3 speed-up": speedups,
    "4 memory": memory,
}


def curve(run: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """Step (or images seen), seconds of training, validation accuracy of each evaluation.

    Runs with a fixed number of steps record (step, seconds, loss, accuracy); runs in stages (stage,
    step, images, seconds in all, seconds of training, loss, training and validation accuracy).
    """
    return [
        (row[2], row[4], row[7]) if len(row) > 4 else (row[0], row[1], row[3])
        for row in run["curve"]
    ]


def mean_curves(curves: Sequence[Sequence[tuple[float, float, float]]]) -> list[list[Point]]:
    """Means and standard deviations over seeds, where all seeds were evaluated at the same steps.

    Seeds that end at different steps (a budget ended them) have their last points averaged as well.
    Without a step in common, each seed keeps a curve of its own, without deviations.

    >>> mean_curves([[(10, 1.0, 0.5), (20, 2.0, 0.75)], [(10, 3.0, 0.5), (20, 4.0, 0.75)]])
    [[(2.0, 0.5, 0.0), (3.0, 0.75, 0.0)]]
    """
    common = set.intersection(*({p[0] for p in points} for points in curves)) if curves else set()
    if not common:
        return [[(seconds, y, 0.0) for _, seconds, y in points] for points in curves]
    by_step = [{point[0]: point for point in points} for points in curves]
    groups = [[points[step] for points in by_step] for step in sorted(common)]
    last = [points[-1] for points in curves]
    if len({point[0] for point in last}) > 1:
        groups.append(last)
    return [
        [
            (
                statistics.fmean(p[1] for p in group),
                statistics.fmean(p[2] for p in group),
                statistics.stdev(p[2] for p in group) if len(group) > 1 else 0.0,
            )
            for group in groups
        ]
    ]


def _axes(figure: FigureBase, title: str, report: Report) -> Axes:
    axes = figure.subplots()
    seeds = len(report["settings"]["seeds"])
    note = f"mean of {seeds} seeds; error bars: standard deviation" if seeds > 1 else "one seed"
    figure.suptitle(title, fontsize=17, fontweight="bold")
    axes.set_title(note, fontsize=12, color="0.3")
    axes.tick_params(labelsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _finish(axes: Axes, report: Report, x: str, y: str) -> None:
    """Common parts of both accuracy plots: axes, majority accuracy, per cent, legend."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel(x, fontsize=14)
    axes.set_ylabel(y, fontsize=14)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    chance = report["rows"][0].get("majority_accuracy")
    if chance is not None:
        axes.axhline(chance, color="0.5", linewidth=2, linestyle=":")
        axes.text(1, chance, "most frequent answer", transform=axes.get_yaxis_transform(),
                  ha="right", va="bottom", fontsize=11, color="0.4", bbox=_WHITE)  # fmt: skip
    axes.grid(color="0.9", linewidth=1.5)
    axes.set_axisbelow(True)
    if len(report["rows"]) <= MANY:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.08, -0.27), fontsize=13, frameon=False,
                    ncols=1, labelspacing=0.2, borderaxespad=0)  # fmt: skip
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=11, frameon=False)


def _bars(axes: Axes, report: Report, name: str, form: str) -> None:
    """A horizontal bar for each attention, its value at the end; its name above, or at the left."""
    values = [row.get(name) or 0.0 for row in report["rows"]]
    errors = [row.get(f"{name}_spread") or 0.0 for row in report["rows"]]
    ends = [value + error for value, error in zip(values, errors, strict=True)]
    right, few = max(ends) or 1.0, len(values) <= MANY
    labeled = _labeled(report)
    for place, (row, label) in enumerate(labeled):
        timed = row["attention"] in report["settings"].get("timed", ())
        missing = "only timed" if timed else "no result"
        text = form.format(row[name]) if row.get(name) is not None else missing
        color = _style(place, len(values))["color"]
        axes.barh(place, values[place], height=0.46 if few else 0.7, color=color)
        if errors[place]:
            axes.errorbar(
                values[place], place, xerr=errors[place], color="0.2", capsize=4, linewidth=2
            )
        size = 14 if few else 11
        end = ends[place] + 0.015 * right
        axes.text(end, place, text, va="center", fontsize=size, bbox=_WHITE)
        if few:
            axes.text(0, place - 0.27, label, va="bottom", fontsize=size)
    axes.set_xlim(0, 1.25 * right)
    axes.set_ylim(len(values) - 0.6, -0.85 if few else -0.6)
    axes.set_yticks([] if few else range(len(values)), [] if few else [x for _, x in labeled])
    if not few:
        axes.tick_params(axis="y", labelsize=11)
    axes.spines["left"].set_visible(False)


def _labeled(report: Report) -> list[tuple[Mapping[str, Any], str]]:
    """Each row with a label that fits where it is drawn."""
    rows = report["rows"]
    labels = short_labels([r["attention"] for r in rows], 52 if len(rows) <= MANY else 34)
    # A dollar would begin a formula, and matplotlib hides labels that begin with _.
    literal = [label.replace("$", r"\$").lstrip("_") for label in labels]
    return list(zip(rows, literal, strict=True))


def _style(index: int, count: int) -> dict[str, Any]:
    """Color and marker of an attention, the same in all figures."""
    from matplotlib import colormaps

    colors = colormaps["tab10" if count <= 10 else "tab20"]
    return {
        "color": colors(index % colors.N),
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 8,
        "linewidth": 2.5,
    }
