"""Texts of README and docs/ that come from recorded results, as Markdown."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "experiments" / "bench" / "results"
RESULTS = ROOT / "experiments" / "results"
PEERS = ("ours", "FlashAttention-4", "cudnn-frontend", "FlexAttention")
TASKS = ("listops", "text", "image", "pathfinder")
TITLES = {"ours": "sparse_flash"}
# The rows of the short table: the name of a case without its head_dim, and a title.
CASES = {
    "16K dense": "16K dense",
    "16K causal": "16K causal",
    "16K random 0.25": "16K random blocks, density 0.25",
    "16K random 0.05": "16K random blocks, density 0.05",
    "64K butterfly": "64K butterfly",
    "64K local+global": "64K local + one global block",
    "64K exact local+global": r"64K local(200) \| global_tokens(37), exact",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [head, ["---"] * len(head), *rows]
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    text[1] = text[1].replace(" ", "")
    return "\n".join(text)


@functools.cache
def read(path: Path) -> Any:
    """A recorded JSON file."""
    return json.loads(path.read_text())


def bench_rows(which: str) -> dict[str, dict[str, dict[str, float]]]:
    """Rows of the recorded benchmark: `[case][peer]`, for the pass "forward" or "backward"."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in read(BENCH / "h200" / "bench.json")["rows"]:
        if row["pass"] == which and "ms" in row:
            found.setdefault(row["case"], {})[row["peer"]] = row
    return found


def demo() -> str:
    """What `make demo` printed."""
    return _first_table(RESULTS / "listops-short-cpu" / "comparison.md")


def demo_speed(folder: str) -> str:
    """Speed of a block-sparse training step, as a multiple of that of SDPA."""
    rows = _first_table(RESULTS / folder / "comparison.md").splitlines()
    (ours,) = (row for row in rows if row.startswith("| local"))
    return ours.split("|")[-2].strip().removesuffix("x")


def speed() -> str:
    """TFLOP/s of the most telling cases at head_dims 128 and 64, both passes."""
    head = ["pass", "case", *(TITLES.get(peer, peer) for peer in PEERS)]
    rows = []
    for which in ("forward", "backward"):
        recorded = bench_rows(which)
        for case, title in CASES.items():
            cells = [which, title]
            for peer in PEERS:
                pair = [recorded[f"{case} d{d}"].get(peer) for d in (128, 64)]
                cells.append("" if None in pair else " / ".join(_tflops(row) for row in pair))
            rows.append(cells)
    return table(head, rows)


def all_cases(which: str) -> str:
    """Every case of the recorded benchmark, and the ratio to the fastest baseline."""
    baselines = [*PEERS[1:], "SDPA cuDNN", "SDPA flash"]
    head = ["case", "density", TITLES["ours"], *baselines, "speed-up (GPU / wall-clock)"]
    rows = []
    for case, found in bench_rows(which).items():
        cells = [case, f"{found['ours']['density']:.2%}".replace("%", " %"), _tflops(found["ours"])]
        cells += [_tflops(found[name]) if name in found else "" for name in baselines]
        gpu, wall = (_ratio(found, key) for key in ("ms", "wall_ms"))
        rows.append([*cells, f"{gpu:.2f} / {wall:.2f}"])
    return table(head, rows)


def ratio_range(which: str, wall: bool = False) -> str:
    """Smallest and largest speed-up over the fastest baseline in each case."""
    key = "wall_ms" if wall else "ms"
    ratios = [_ratio(found, key) for found in bench_rows(which).values()]
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def flex_range() -> str:
    """Smallest and largest speed-up over FlexAttention, GPU time, both passes."""
    ratios = [
        found["FlexAttention"]["ms"] / found["ours"]["ms"]
        for which in ("forward", "backward")
        for found in bench_rows(which).values()
        if "FlexAttention" in found
    ]
    return f"{min(ratios):.1f}x to {max(ratios):.1f}x"


def steps(folder: str) -> str:
    """Milliseconds of whole training steps, by case and attention."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in read(BENCH / folder / "steps.json")["rows"]:
        found.setdefault((row["case"], row["mode"]), {})[_kind(row["attention"])] = row
    kinds = ["standard", "sdpa", "flex", "dense", "mask"]
    kinds = [kind for kind in kinds if any(kind in row for row in found.values())]
    titles = {
        "standard": "standard attention",
        "sdpa": "SDPA",
        "flex": "FlexAttention, same mask",
        "dense": "sparse_flash, dense",
        "mask": "sparse_flash, mask",
    }
    rows = []
    for (case, mode), row in found.items():
        cells = [f"{row[kind]['step_ms']:.1f}" if kind in row else "" for kind in kinds]
        density = f"{100 * row['mask']['density']:.1f} %"
        gain = row.get("standard", row["sdpa"])["step_ms"] / row["mask"]["step_ms"]
        rows.append([case, mode, density, *cells, f"{gain:.2f}x"])
    return table(["case", "mode", "density", *(titles[k] for k in kinds), "speed-up"], rows)


def lra() -> str:
    """Accuracy and speed on Long Range Arena."""
    return _first_table(RESULTS / "lra-h200" / "lra.md")


def lra_milliseconds() -> str:
    """Milliseconds of a training step on Long Range Arena."""
    text = (RESULTS / "lra-h200" / "lra.md").read_text()
    return _tables(text.partition("## Milliseconds a step")[2])[0]


def _lra_run(task: str, attention: str) -> Any:
    (file,) = (RESULTS / "lra-h200" / task).glob(f"{attention}*-seed0/result.json")
    return read(file)


def lra_seconds() -> str:
    """Training seconds of the block-sparse runs."""
    seconds = [_lra_run(task, "local")["metrics"]["training_seconds"] for task in TASKS]
    return _listed([f"{s:.0f}" for s in seconds]) + " seconds"


def lra_gain(task: str) -> str:
    """Gain in speed of a block-sparse step over dense, in per cent."""
    dense, sparse = (_lra_run(task, name)["metrics"]["step_ms"] for name in ("dense", "local"))
    return f"{100 * (dense / sparse - 1):.0f} %"


def lra_lowest(task: str) -> str:
    """Step of the lowest validation loss with all keys, and the number of steps."""
    curve = _lra_run(task, "dense")["curve"]
    return f"{min(curve, key=lambda row: row[2])[0]:,} of {curve[-1][0]:,}"


def lra_pathfinder(step: int) -> str:
    """Validation accuracy on Pathfinder: block-sparse, SDPA, dense."""
    return _accuracies([_lra_run("pathfinder", name) for name in ("local", "sdpa", "dense")], step)


def path_64(step: int) -> str:
    """Validation accuracy of the three seeds of Path-64."""
    runs = sorted((RESULTS / "path-h200").glob("path-64-seed*/result.json"))
    return _accuracies([read(file) for file in runs], step)


def _accuracies(results: list[Any], step: int) -> str:
    found = [{row[0]: row[3] for row in result["curve"]}[step] for result in results]
    return _listed([f"{100 * accuracy:.0f}" for accuracy in found]) + " %"


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def lra_second_seed() -> str:
    """Test accuracy on Pathfinder with the second seed."""
    runs = RESULTS / "lra-h200" / "pathfinder"
    sdpa, dense = (
        read(runs / f"{name}-seed1" / "result.json")["metrics"]["test_accuracy"]
        for name in ("sdpa", "dense")
    )
    return f"SDPA reaches {100 * sdpa:.1f} % and sparse_flash dense {100 * dense:.1f} %"


def listops_operators() -> str:
    """Accuracy of a rule that only reads the outermost operator of ListOps."""
    record = read(RESULTS / "listops-operators.json")
    names = {"train": "training", "val": "validation", "test": "test"}
    rate = {name: record[name]["right"] / record[name]["examples"] for name in names}
    parts = [f"{100 * rate[split]:.1f} % of the {name} examples" for split, name in names.items()]
    return f"{parts[0]}, {parts[1]} and {parts[2]}"


def path() -> str:
    """Recorded runs of Path-64 and Path-256."""
    rows = []
    for file in sorted((RESULTS / "path-h200").glob("*/result.json")):
        result = read(file)
        found = result["metrics"]
        rows.append(
            [
                file.parent.name,
                f"{result['config']['task']['size'] ** 2:,}",
                f"{found['steps']:,}",
                f"{found['training_seconds']:.0f}",
                f"{found['examples_per_second']:,.0f}",
                f"{100 * found['test_accuracy']:.1f} %",
            ]
        )
    rows.sort(key=lambda row: int(row[1].replace(",", "")))
    return table(["run", "tokens", "steps", "seconds", "images/s", "test accuracy"], rows)


def path_256_curve() -> str:
    """Training accuracy of Path-256 on its shorter curves."""
    result = read(RESULTS / "path-h200" / "path-256-seed0" / "result.json")
    curve = {row[0]: row[2] for row in result["training_curve"]}
    steps_ = (1000, 4000, 5000)
    return ", ".join(f"{100 * curve[step]:.0f} % up to step {step:,}" for step in steps_)


def path_256_curriculum() -> str:
    """The last evaluation of each stage, of the runs by the curriculum `path-256`."""
    rows = []
    for run in read(RESULTS / "path-256-curriculum" / "progress.json")["runs"]:
        last = {point["stage"]: point for point in run["points"]}
        for stage, point in last.items():
            rows.append(
                [
                    f"{run['seed']}",
                    f"{stage}",
                    f"{point['pixels']}",
                    f"{point['contour']}",
                    f"{point['images']:,}",
                    f"{point['gpu_seconds']:,}",
                    f"{100 * point['val_accuracy']:.1f} %",
                ]
            )
    head = ["seed", "stage", "pixels a side", "paddles", "images", "GPU seconds", "validation"]
    return table(head, rows)


def path_256_tests() -> str:
    """Test accuracy of those runs as they are."""
    runs = read(RESULTS / "path-256-curriculum" / "progress.json")["runs"]
    return " and ".join(
        f"{100 * run['test']['test_accuracy']:.1f} % after {run['test']['gpu_seconds']:,.0f} GPU "
        f"seconds (seed {run['seed']})"
        for run in runs
    )


def _kind(attention: str) -> str:
    if attention in ("standard", "sdpa", "dense"):
        return attention
    return "flex" if attention.startswith("flex:") else "mask"


def _ratio(found: dict[str, dict[str, float]], key: str) -> float:
    best = min(row[key] for peer, row in found.items() if peer != "ours")
    return best / found["ours"][key]


def _tflops(row: dict[str, float] | None) -> str:
    return "" if row is None else f"{row['tflops']:.0f}"


def _tables(text: str) -> list[str]:
    blocks = (block.strip() for block in text.split("\n\n"))
    return [block for block in blocks if block.startswith("|")]


def _first_table(file: Path) -> str:
    return _tables(file.read_text())[0]
