"""Tables and figures of README and docs/, from recorded results.

    python -m tools.report            # write them
    python -m tools.report --check    # exit 1 if a file would change

A page marks the place of a text, on lines of its own or within a sentence:

    <!-- report: NAME -->
    ...
    <!-- end -->

Everything between the markers is generated. `TEXTS` names the generators. Figures carry their
numbers in the PNG field `data`: the check compares these numbers, not pixels, because the pixels
depend on the version of matplotlib.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tools import backward_log, figures, gallery, io_model, path_tables, tables

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
TEXTS: dict[str, Callable[[], str]] = {
    "demo": tables.demo,
    "ampere": tables.ampere,
    "ampere-masks": lambda: tables.ampere("masks"),
    "demo-speed": lambda: tables.demo_speed("listops-short-cpu"),
    "demo-speed-intel": lambda: tables.demo_speed("listops-short-cpu-intel"),
    "speed": tables.speed,
    "speed-forward": lambda: tables.all_cases("forward"),
    "speed-backward": lambda: tables.all_cases("backward"),
    "range-forward": lambda: tables.ratio_range("forward"),
    "range-backward": lambda: tables.ratio_range("backward"),
    "range-flex": tables.flex_range,
    "ahead": tables.ahead,
    "score-costs": tables.score_costs,
    "documents": tables.documents,
    "steps": lambda: tables.steps("h200-steps"),
    "steps-lra": lambda: tables.steps("h200-lra-steps"),
    "lra": tables.lra,
    "lra-ms": tables.lra_milliseconds,
    "lra-seconds": tables.lra_seconds,
    "lra-gain-text": lambda: tables.lra_gain("text"),
    "lra-gain-image": lambda: tables.lra_gain("image"),
    "lra-gain-pathfinder": lambda: tables.lra_gain("pathfinder"),
    "lra-lowest-text": lambda: tables.lra_lowest("text"),
    "lra-lowest-image": lambda: tables.lra_lowest("image"),
    "lra-pathfinder-14000": lambda: tables.lra_pathfinder(14000),
    "lra-pathfinder-16000": lambda: tables.lra_pathfinder(16000),
    "path-64-4500": lambda: tables.path_64(4500),
    "path-64-5000": lambda: tables.path_64(5000),
    "lra-second-seed": tables.lra_second_seed,
    "listops-operators": tables.listops_operators,
    "recall": tables.recall,
    "text-by-data": tables.text_by_data,
    "path": tables.path,
    "path-256-curve": tables.path_256_curve,
    "path-results": path_tables.results,
    "path-256-average": lambda: path_tables.average("path-256"),
    "path-x-average": lambda: path_tables.average("path-x"),
    "path-ablation": path_tables.ablation,
    "path-small-ablation": path_tables.small_ablation,
    "path-step-times": path_tables.step_times,
    "path-stages": path_tables.stages,
    "path-interventions": path_tables.interventions,
    "path-256-unbroken": path_tables.unbroken,
    "path-256-flex": lambda: path_tables.reached("path-256-flex-seed0"),
    "path-x-foreground": lambda: path_tables.reached("path-x-foreground-seed0"),
    "path-x-local": lambda: path_tables.reached("path-x-local-seed0"),
    "path-x-foreground-tiles": lambda: path_tables.foreground_tiles("path-x-foreground-seed0"),
    "path-256-foreground": lambda: path_tables.reached("path-256-foreground-seed0"),
    "path-256-foreground-tiles": lambda: path_tables.foreground_tiles("path-256-foreground-seed0"),
    "path-256-seed0": lambda: path_tables.reached("path-256-seed0"),
    "path-256-dense": path_tables.dense,
    "path-256-finished": lambda: path_tables.reached(path_tables.FINISHED),
    "path-x-pretrained": path_tables.pretrained,
    "path-x-speed": lambda: path_tables.speed("path-x-seed0"),
    "path-majority-64": lambda: tables.path_majority("path-64-seed0"),
    "path-majority-256": lambda: tables.path_majority("path-256-seed0"),
    "path-64-density": lambda: tables.path_density("path-64-seed0"),
    "path-256-density": lambda: tables.path_density("path-256-seed0"),
    "path-64-without-span": tables.path_without_span,
    "path-256-step": tables.path_256_step,
    "path-256-matrix-peak": tables.path_256_matrix_peak,
    "lra-density-image": lambda: tables.lra_density("image"),
    "lra-listops-begin": lambda: tables.lra_listops_begin(1750),
    "lra-listops-end": tables.lra_listops_end,
    "backward-changes": backward_log.changes,
    "backward-dead-ends": backward_log.dead_ends,
    "memory": backward_log.memory,
    "deterministic-cost": backward_log.deterministic_cost,
    "day-needle": lambda: tables.day_comparison("needle"),
    "day-needle-answers": lambda: tables.day_answers("needle"),
    "day-text": lambda: tables.day_comparison("text"),
    "day-bench": tables.day_bench,
    "io": io_model.table,
    "traffic": io_model.traffic,
    "traffic-factor": io_model.factor,
    "prediction-errors": tables.prediction_errors,
    "prediction-of-benchmark": tables.prediction_of_benchmark,
    "gallery": gallery.markdown,
}
_MARKED = re.compile(r"(<!-- report: ([\w-]+) -->)(\n?).*?(\n?<!-- end -->)", re.DOTALL)


def regenerated(page: str) -> str:
    """The page with all marked texts generated again.

    Raises:
        KeyError: A marker names no text.

    >>> regenerated("about <!-- report: demo-speed -->?<!-- end --> times")
    'about <!-- report: demo-speed -->1.08<!-- end --> times'
    """
    return _MARKED.sub(lambda m: f"{m[1]}{m[3]}{TEXTS[m[2]]()}{m[4]}", page)


def main(arguments: list[str]) -> int:
    """Write or check all pages and figures; returns the exit code."""
    check = "--check" in arguments
    changed = []
    for path in PAGES:
        before = path.read_text()
        after = regenerated(before)
        if after != before:
            changed.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after)
    for path, data in figures.FIGURES.items():
        if figures.stored_data(path) != data():
            changed.append(path.relative_to(ROOT))
            if not check:
                figures.write(path)
    for name in gallery.EXAMPLES:
        path = gallery.PICTURES / f"{name}.png"
        if figures.stored_data(path) != gallery.picture_data(name):
            changed.append(path.relative_to(ROOT))
            if not check:
                gallery.write_picture(name)
    for path in changed:
        print(f"{'differs' if check else 'written'}: {path}")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
