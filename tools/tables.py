"""Texts of README and docs/ that come from recorded results, as Markdown."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

from sparse_flash.experiments import markdown
from sparse_flash.experiments.attention import AttentionKind
from sparse_flash.experiments.bench.scores import OURS, TERMS
from sparse_flash.experiments.selected import HybridKind, TopK

from sparse_flash import masks

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
BENCH = RESULTS / "bench"
BASELINES = ("ours", "FlashAttention-4", "cudnn-frontend")
TASKS = ("listops", "text", "image", "pathfinder")
_TRAINED = ("local", "sdpa", "dense")
TITLES = {"ours": "sparse_flash"}
# The rows of the short table: the name of a case without its head_dim, and a title.
CASES = {
    "16K dense": "16K dense",
    "16K causal": "16K causal",
    "16K random 0.25": "16K random blocks, density 0.25",
    "16K random 0.05": "16K random blocks, density 0.05",
    "64K butterfly": "64K butterfly",
    "64K local+global": "64K local + one global block",
    "64K exact local+global": "64K local(200) | global_tokens(37), exact",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; `experiments.markdown` writes all tables."""
    return markdown.table([head, *rows])


@functools.cache
def read(path: Path) -> Any:
    """A recorded JSON file."""
    return json.loads(path.read_text())


def bench_rows(which: str) -> dict[str, dict[str, dict[str, float]]]:
    """Rows of the recorded benchmark: `[case][baseline]`, for the pass "forward" or "backward"."""
    return _by_case(BENCH / "h200", which)


def _by_case(folder: Path, which: str) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in read(folder / "bench.json")["rows"]:
        if row["pass"] == which and "ms" in row:
            found.setdefault(row["case"], {})[row["peer"]] = row
    return found


def ampere(case: str = "") -> str:
    """TFLOP/s of the kernels for Ampere and later, and of FlashAttention-2 or own dense."""
    rows = read(BENCH / "h200-sm80" / "turns.json")["rows"]
    by = {(row["pass"], row["head_dim"], row["case"]): row for row in rows}
    if case:
        shown = [row for key, row in by.items() if key[0] == "forward" and "flash" not in row]
        lines = []
        for row in shown:
            dense, mask = by["forward", row["head_dim"], "dense 16K"]["ours"], row["case"]
            name = ", ".join(mask.rsplit(" ", 1))
            share = f"{row['ours'] / dense:.2f}"
            lines.append([str(row["head_dim"]), name, str(row["ours"]), share])
        return table(["head_dim", "mask", "TFLOP/s", "of own dense"], lines)
    passes = [(p, f"{c} 16K") for p in ("forward", "backward") for c in ("dense", "causal")]
    dims = sorted({row["head_dim"] for row in rows})
    lines = [[str(d), *(_against(by.get((p, d, c))) for p, c in passes)] for d in dims]
    return table(["head_dim", *(f"{p}, {c}" for p, c in passes)], lines)


def _against(row: dict[str, float] | None) -> str:
    if row is None:
        return ""
    return f"{row['ours']:.0f} / {row['flash']:.0f} ({row['ours'] / row['flash']:.2f}x)"


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
    head = ["pass", "case", *(TITLES.get(baseline, baseline) for baseline in BASELINES)]
    rows = []
    for which in ("forward", "backward"):
        recorded = bench_rows(which)
        for case, title in CASES.items():
            cells = [which, title]
            for baseline in BASELINES:
                pair = [recorded[f"{case} d{d}"].get(baseline) for d in (128, 64)]
                cells.append("" if None in pair else " / ".join(_tflops(row) for row in pair))
            rows.append(cells)
    return table(head, rows)


def all_cases(which: str) -> str:
    """Every case of the recorded benchmark, and the ratio to the fastest baseline."""
    names = [TITLES.get(name, name) for name in BASELINES]
    head = ["case", "density", *names, "speed-up", "of the product", "SM MHz"]
    rows = []
    for case, found in bench_rows(which).items():
        ours = found["ours"]
        cells = [case, f"{ours['density']:.2%}".replace("%", " %")]
        cells += [_tflops(found.get(name)) for name in BASELINES]
        share = f"{ours['tflops'] / ours['matrix_tflops']:.2f}"
        rows.append([*cells, markdown.speed_up_text(found), share, f"{ours['sm_mhz']:.0f}"])
    return table(head, rows)


def prediction_errors() -> str:
    """Errors of predictions on layouts that the constants were not fitted to."""
    from sparse_flash.experiments.bench import calibrate

    head, rows = calibrate.read_times(RESULTS / "costs" / "h200-seed1.jsonl")
    return _errors(head["gpu"], rows)


def prediction_of_benchmark() -> str:
    """Errors of predictions on the recorded benchmark."""
    from sparse_flash.experiments.bench import calibrate

    return _errors(*calibrate.read_record(BENCH / "h200" / "bench.json"))


def _errors(machine: str, rows: list[dict[str, Any]]) -> str:
    from sparse_flash.experiments.bench import calibrate

    from sparse_flash.prediction_devices import constants_of, gpu_of

    gpu = gpu_of(machine)
    found = calibrate.errors(rows, gpu, constants_of(gpu)[1])
    sizes = sorted(abs(error) for _, error in found)
    within = sum(size <= 0.15 for size in sizes)
    return (
        f"{within} of {len(sizes)} times are within 15 %, the median error is "
        f"{100 * sizes[len(sizes) // 2]:.1f} %, the largest {100 * sizes[-1]:.1f} %"
    )


def ratio_range(which: str) -> str:
    """Smallest and largest speed-up over the fastest baseline in each case, by GPU time."""
    ratios = speed_ups(which)
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def speed_ups(which: str) -> list[float]:
    """Speed-up over the fastest baseline in each case: the median of the ratio within a turn."""
    found = (
        [row for name, row in rows.items() if name != "ours"] for rows in bench_rows(which).values()
    )
    return [min(others, key=lambda row: row["ms"])["ratio"] for others in found if others]


def ahead() -> str:
    """In how many passes of all cases no baseline is ahead by more than 1 %."""
    ratios = [ratio for which in ("forward", "backward") for ratio in speed_ups(which)]
    return f"{sum(ratio >= 0.99 for ratio in ratios)} of {len(ratios)}"


def flex_range() -> str:
    """Smallest and largest speed-up over FlexAttention, GPU time, both passes."""
    ratios = [
        found["FlexAttention"]["ms"] / found["ours"]["ms"]
        for which in ("forward", "backward")
        for found in _by_case(BENCH / "h200-flex", which).values()
        if "FlexAttention" in found
    ]
    return f"{min(ratios):.1f}x to {max(ratios):.1f}x"


def score_costs() -> str:
    """Time of calls with a score term over that without, and of baselines over ours."""
    rows = read(BENCH / "h200-scores" / "scores.json")["rows"]
    by = {(r["head_dim"], r["pass"], r["peer"], r["term"]): r for r in rows if "ms" in r}
    peers = ("FlexAttention", "FlashAttention-4")
    head = ["term", "head_dim", "forward", "backward", *(f"{p}, forward / backward" for p in peers)]
    lines = []
    dims = sorted({row["head_dim"] for row in rows})
    for head_dim, term in itertools.product(dims, TERMS[OURS][1:]):
        both = [by[head_dim, which, "ours", term] for which in ("forward", "backward")]
        cells = [term, str(head_dim), *(f"{row['ratio']:.2f}" for row in both)]
        for peer in peers:
            of_peer = [by.get((head_dim, which, peer, term)) for which in ("forward", "backward")]
            texts = [f"{row['over_ours']:.2f}x" for row in of_peer if row is not None]
            cells.append(" / ".join(texts))
        lines.append(cells)
    return table(head, lines)


def documents() -> str:
    """Time of packed documents with new lengths at each call."""
    lines = []
    for run in read(BENCH / "h200-documents.json")["runs"]:
        by: dict[tuple[int, int, str], dict[str, dict[str, Any]]] = {}
        for row in run["rows"]:
            key = row["head_dim"], row["heads"], row["passes"]
            by.setdefault(key, {})[row["name"]] = row
        for (head_dim, heads, passes), rows in by.items():
            if head_dim == 64 and "cudnn-frontend" not in rows:
                continue  # the run with all libraries has it
            names = ("ours", "ours, fixed layout", "FA4 varlen", "cudnn-frontend")
            times = [f"{rows[name]['wall_ms']:.2f}" if name in rows else "" for name in names]
            ratio = f"{rows['FA4 varlen']['ratio']:.2f}x"
            lines.append([f"{passes}, {heads} heads of {head_dim}", *times, ratio])
    head = ["pass", "new lengths", "the same layout", "FlashAttention-4", "cudnn-frontend"]
    return table([*head, "FlashAttention-4 over ours"], lines)


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


def lra_density(task: str) -> str:
    """Density of the block-sparse run."""
    return f"{100 * _lra_run(task, 'local')['metrics']['density']:.0f} %"


def lra_listops_begin(step: int) -> str:
    """Validation accuracy on ListOps at a step: least and largest over the attentions."""
    return _range_of([_accuracy_at(_lra_run("listops", name), step) for name in _TRAINED])


def lra_listops_end() -> str:
    """Validation accuracy on ListOps at the last step."""
    runs = [_lra_run("listops", name) for name in _TRAINED]
    return _range_of([run["curve"][-1][3] for run in runs])


def _range_of(accuracies: list[float]) -> str:
    low, high = (f"{100 * accuracy:.0f}" for accuracy in (min(accuracies), max(accuracies)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _accuracy_at(result: Any, step: int) -> float:
    return {row[0]: row[3] for row in result["curve"]}[step]


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
    found = [_accuracy_at(result, step) for result in results]
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


RECALL_BLOCK = (16, 64)  # queries and keys of a tile in the recorded comparison


def recall() -> str:
    """Associative recall: the share of the causal tiles, and test accuracy over seeds."""
    record = read(RESULTS / "recall-h200" / "comparison.json")
    length = record["length"]
    causal = _recall_tiles("causal()", length)
    lines = []
    for row in record["rows"]:
        share = _recall_tiles(row["attention"], length) / causal
        accuracy = f"{100 * row['test_accuracy']:.1f}%"
        if row["results"] > 1:
            accuracy += f" ± {100 * row['spread']:.1f}"
        lines.append([row["attention"], f"{100 * share:.1f}%", accuracy, str(row["results"])])
    return table(["attention", "causal tiles", "test accuracy", "seeds"], lines)


def text_by_data() -> str:
    """Text with fixed and chosen blocks: test accuracy over seeds, and the time of a step."""
    rows = read(RESULTS / "text-h200" / "comparison.json")["rows"]
    dense = rows[0]["step_ms"]
    lines = []
    for row in rows:
        accuracy = f"{100 * row['test_accuracy']:.1f} ± {100 * row['spread']:.1f} %"
        tiles = f"{100 * row['tile_density']:.1f} %"
        lines.append([row["attention"], tiles, accuracy, f"{row['step_ms'] / dense:.2f}"])
    return table(["attention", "blocks", "test accuracy", "time of a step"], lines)


def _recall_tiles(attention: str, length: int) -> float:
    """Tiles of `RECALL_BLOCK` that an attention computes exactly."""
    kind = AttentionKind.of(attention)
    rows, columns = (-(-length // size) for size in RECALL_BLOCK)
    if isinstance(kind.user, TopK):
        return kind.user.tile_density(length) * rows * columns
    mask = kind.user.mask if isinstance(kind.user, HybridKind) else kind.mask
    assert mask is not None
    return (mask & masks.causal()).layout(length, block=RECALL_BLOCK).num_tiles


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


def path_majority(name: str) -> str:
    """Accuracy of always giving the more frequent answer."""
    return f"{100 * _path_run(name)['metrics']['chance']:.1f} %"


def path_without_span() -> str:
    """Test accuracy of Path-64 without an initial span."""
    return f"{100 * _path_run('path-64-without-reach')['metrics']['test_accuracy']:.0f} %"


def path_density(name: str) -> str:
    """Density of the attention of a run."""
    return f"{100 * _path_run(name)['metrics']['density']:.1f} %"


def path_256_step() -> str:
    """Milliseconds of a step of Path-256."""
    return f"{_path_run('path-256-seed0')['metrics']['step_ms']:.1f} ms"


def path_256_matrix_peak() -> str:
    """Time of a step's operations at matrix speed, as a fraction of its time."""
    return f"{100 * _path_run('path-256-seed0')['metrics']['of_matrix_peak']:.0f} %"


def _path_run(name: str) -> Any:
    return read(RESULTS / "path-h200" / name / "result.json")


def path_256_curve() -> str:
    """Training accuracy of Path-256 on its shorter curves."""
    result = read(RESULTS / "path-h200" / "path-256-seed0" / "result.json")
    curve = {row[0]: row[2] for row in result["training_curve"]}
    steps_ = (1000, 4000, 5000)
    return ", ".join(f"{100 * curve[step]:.0f} % up to step {step:,}" for step in steps_)


def day_comparison(name: str) -> str:
    """The table of a comparison of "A researcher's day"."""
    return markdown.comparison_table(read(RESULTS / "day" / f"{name}.json"), brief=True)


def day_answers(name: str) -> str:
    """The sentences of such a comparison."""
    return markdown.bullets(markdown.answers(read(RESULTS / "day" / f"{name}.json")))


def day_bench() -> str:
    """Times of an own case."""
    return markdown.own_case_table(read(RESULTS / "day" / "own.json"))


def _kind(attention: str) -> str:
    if attention in ("standard", "sdpa", "dense"):
        return attention
    return "flex" if attention.startswith("flex:") else "mask"


def _tflops(row: dict[str, float] | None) -> str:
    return "" if row is None else f"{row['tflops']:.0f}"


def _tables(text: str) -> list[str]:
    blocks = (block.strip() for block in text.split("\n\n"))
    return [block for block in blocks if block.startswith("|")]


def _first_table(file: Path) -> str:
    return _tables(file.read_text())[0]
