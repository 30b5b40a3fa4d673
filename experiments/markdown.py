"""Every report as Markdown: comparison, Long Range Arena, benchmark, own case, training steps.

A function here takes a report as its JSON file holds it, and returns text. So a recorded report of
an earlier version can be written again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_flash.experiments import old_names
from sparse_flash.experiments.densities import DENSITIES

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Run = Mapping[str, Any]
OURS = ("ours", "ours, sm80", "ours, reference")  # names in rows of a benchmark
INTERVALS = (
    "Speed-up: over the fastest baseline, median of the ratio within a turn with its 95 % "
    "confidence interval."
)
ON_CPU = (
    "No GPU: the reference implementation in PyTorch against SDPA, by wall-clock time on the CPU. "
    "This does not tell how fast the kernels are."
)
ON_GPU = (
    "GPU time, median. FlexAttention reads partial tiles from a table of bits; a predicate that is "
    "written for this mask may be faster."
)


def table(lines: Iterable[Sequence[str]]) -> str:
    r"""Cells as a Markdown table with aligned columns; the first line is its head.

    >>> print(table([["a", "b"], ["local(3) | sinks(1)", "1"]]))
    | a                    | b |
    | -------------------- | - |
    | local(3) \| sinks(1) | 1 |
    """
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(cell) for cell in column) for column in zip(*escaped, strict=True)]
    rows = [" | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in escaped]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {row} |" for row in [rows[0], rule, *rows[1:]])


def bullets(lines: Iterable[str]) -> str:
    """A list.

    >>> print(bullets(["a", "b"]))
    - a
    - b
    """
    return "\n".join(f"- {line}" for line in lines)


def document(title: str, *parts: str, machine: Mapping[str, object] | None = None) -> str:
    """A heading, the parts that are not empty, and the machine.

    >>> print(document("Speed", "Fast.", "", machine={"cores": 2}))
    # Speed
    <BLANKLINE>
    Fast.
    <BLANKLINE>
    ## Machine
    <BLANKLINE>
    - cores: 2
    <BLANKLINE>
    """
    facts = [f"{name}: {value}" for name, value in (machine or {}).items()]
    parts = (f"# {title}", *parts, section("Machine", bullets(facts)) if facts else "")
    return "\n\n".join(part for part in parts if part) + "\n"


def section(title: str, text: str) -> str:
    """A part of a document under a heading; empty without text."""
    return f"## {title}\n\n{text}" if text else ""


def number(row: Row, name: str, form: str, missing: str = "") -> str:
    """A value of a row in this format; `missing` where there is none.

    >>> number({"ms": 1.25, "density": None}, "ms", ".1f"), number({}, "density", ".1%", "-")
    ('1.2', '-')
    """
    value = row.get(name)
    return missing if value is None else format(value, form)


# Comparisons.


def comparison(report: Report, brief: bool = False) -> str:
    """A comparison as a document: answer, table, meaning of the columns, machine.

    Args:
        report: What comparison.json holds; see `report.summarize`.
        brief: As for `comparison_table`.
    """
    report = old_names.report(report)
    return document(
        "Dense against block-sparse attention",
        bullets([*answers(report), *_hints(report)]),
        comparison_table(report, brief),
        section("Runs without a result", bullets(failed_runs(report))),
        bullets(_explanations(report, brief)),
        machine=report["machine"],
    )


def comparison_table(report: Report, brief: bool = False) -> str:
    """One line for each attention. A column without any value is left out.

    Args:
        report: See `comparison`.
        brief: Leave out test loss, tokens/s and attention share, so that it fits into TensorBoard.
    """
    several = len(report["settings"]["seeds"]) > 1
    head = ["attention", "density", "tile density", "computed density", "test accuracy",
            "test loss", "step ms", "tokens/s", "attention share", "memory MiB",
            "speed-up"]  # fmt: skip
    lines = [
        [
            row["attention"],
            number(row, "density", ".1%", "-"),
            number(row, "tile_density", ".1%", "-") if "tile_density" in row else "",
            number(row, "computed_density", ".1%", "-") if "computed_density" in row else "",
            _accuracy(row, several),
            number(row, "test_loss", ".3f"),
            number(row, "step_ms", ".1f"),
            number(row, "tokens_per_second", ",.0f"),
            number(row, "attention_share", ".0%"),
            number(row, "peak_memory_MiB", ".0f" if row.get("peak_memory_MiB", 0) >= 10 else ".1f"),
            number(row, "speedup", ".2f") + ("x" if row["speedup"] is not None else ""),
        ]
        for row in report["rows"]
    ]
    omitted = ("test loss", "tokens/s", "attention share") if brief else ()
    known = [any(column) for column in zip(*lines, strict=True)]
    kept = [i for i, name in enumerate(head) if known[i] and name not in omitted]
    return table([[cells[i] for i in kept] for cells in [head, *lines]])


def _accuracy(row: Row, several: bool) -> str:
    """With the deviation over seeds, and the number of seeds where some have no result."""
    results, seeds = row.get("results", 1 + several), row.get("seeds", 1)  # older files lack them
    if not results:
        return "no result" if seeds else ""
    text = f"{row['test_accuracy']:.1%}"
    if several and results > 1:
        text += f" ± {row['spread']:.1%}"
    return text + (f" ({results} of {seeds})" if results < seeds else "")


def answers(report: Report) -> list[str]:
    """The comparison in three sentences: speed, accuracy, memory, each against the first row."""
    base, *others = report["rows"]
    seeds = len(report["settings"]["seeds"])

    def results(row: Row) -> int:
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
        f"{'more' if abs(difference) > deviation else 'not more'} than their deviation over seeds, "
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


def failure(run: Run) -> str | None:
    """The reason why a run has no result; None where it has one."""
    if "metrics" not in run:
        return str(run.get("error", "no result"))
    for name in ("test_accuracy", "test_loss"):
        value = run["metrics"].get(name)
        if value is not None and not math.isfinite(value):
            return f"{name.replace('_', ' ')} {value}"
    if "test_accuracy" not in run["metrics"] and "test_pixel_accuracy" in run["metrics"]:
        return "it ended during pretraining, before any label"
    return None


def failed_runs(report: Report) -> list[str]:
    """A line for each run without a result: attention, seed, reason."""
    return [
        f"`{run['attention']}`, seed {run['seed']}: {reason}"
        for run in report["runs"]
        if (reason := failure(run)) is not None
    ]


def _explanations(report: Report, brief: bool) -> list[str]:
    """The training, and the meaning of the columns."""
    settings, chance = report["settings"], report["rows"][0]["majority_accuracy"]
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
        said.append(f"Majority accuracy, of always giving the most frequent answer: {chance:.1%}.")
    if len(seeds) > 1:
        said.append("±: standard deviation over the seeds.")
    said += [
        "Density: allowed fraction of the attention matrix; - where there is none, or data decide.",
        f"Tile density: stored fraction of its {settings['block']} x {settings['block']} tiles.",
        "Computed density: fraction in the tiles of a Hopper GPU; - where data decide.",
        f"Memory: of forward and backward, above the model, on the {device}.",
        f"Speed-up: of a training step, over {report['rows'][0]['attention']}.",
    ]
    if not brief:
        said += [
            "Attention share: fraction of a step, forward and backward; unknown in CUDA graphs.",
            "Tokens: padding included.",
        ]
    return said


# Long Range Arena.


def lra(report: Report) -> str:
    """Long Range Arena as a document: accuracy, speed and memory, a table each."""
    report = old_names.report(report)
    settings, base = report["settings"], report["rows"][0]["attention"]
    shares: dict[str, float] = {}
    for row in report["rows"]:
        for task, values in row["tasks"].items():
            if "share" in values:
                shares[task] = min(values["share"], shares.get(task, 1.0))
    found = {t: r["tasks"][t]["majority_accuracy"] for r in report["rows"] for t in r["tasks"]}
    budget = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
    guesses = ", ".join(f"{t} {found[t]:.1%}" for t in settings["tasks"] if t in found)
    return document(
        "Long Range Arena: accuracy and speed by attention",
        lra_table(report),
        f"Test accuracy in per cent; speed-up of a training step over {base}, geometric mean over "
        f"the tasks. Seeds: {settings['seeds']}. Smallest fraction of the papers' steps that a run "
        f"was trained for: {budget}. Always the most frequent answer: {guesses}.",
        section("Speed-up of a training step, by task", _by_task(report, "speedup", ".2f")),
        section("Milliseconds a step", _by_task(report, "step_ms", ".2f")),
        section(
            "Memory of forward and backward above the model, MiB",
            _by_task(report, "peak_memory_MiB", ".0f"),
        ),
        *_lra_densities(report),
        "![accuracy against time and operations](lra.png)",
        machine=report["machine"],
    )


def lra_table(report: Report) -> str:
    """Accuracies, laid out as table 3 of FlashAttention (Dao et al., 2022)."""
    tasks, seeds = report["settings"]["tasks"], report["settings"]["seeds"]
    lines = [["attention", *tasks, "average", "speed-up"]]
    for row in report["rows"]:
        cells = []
        for task in tasks:
            values = row["tasks"].get(task)
            text = f"{100 * values['accuracy']:.1f}" if values and "accuracy" in values else ""
            cells.append(text + (f" ± {100 * values['spread']:.1f}" if text and seeds[1:] else ""))
        average = "" if row["average"] is None else f"{100 * row['average']:.1f}"
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        lines.append([row["attention"], *cells, average, speedup])
    return table(lines)


def _lra_densities(report: Report) -> list[str]:
    """A section for each density that some result has: older reports lack two."""
    tasks = [values for row in report["rows"] for values in row["tasks"].values()]
    return [
        section(name.replace("_", " ").capitalize(), _by_task(report, name, ".1%"))
        for name in DENSITIES
        if any(values.get(name) is not None for values in tasks)
    ]


def _by_task(report: Report, name: str, form: str) -> str:
    tasks = report["settings"]["tasks"]
    lines = [["attention", *tasks]]
    for row in report["rows"]:
        found = [row["tasks"].get(task, {}) for task in tasks]
        cells = [number(values, name, form, "-" if name in values else "") for values in found]
        lines.append([row["attention"], *cells])
    return table(lines)


# Benchmarks. A row has the keys `pass`, `case`, `peer` and `ms`, or "left out" with a reason.


def benchmark(report: Report) -> str:
    """A suite: for each pass a line for each case, in TFLOP/s; then all measurements."""
    gpu, peak = report["machine"].get("gpu", ""), report["matrix_peak_tflops"]
    passes = (
        f"### {which.capitalize()}\n\n{_speeds(report, which)}" for which in passes_of(report)
    )
    heading = f"bfloat16, TFLOP/s of stored elements. {gpu}, matrix peak {peak:.0f} TFLOP/s."
    if any("ratio" in row for row in report["rows"]):
        heading += f" {INTERVALS}"
    return "\n\n".join([heading, *passes, _measurements(report)]) + "\n"


def passes_of(report: Report) -> list[str]:
    """The measured passes, in their order."""
    return list(dict.fromkeys(row["pass"] for row in report["rows"]))


def speed_up(rows: Mapping[str, Row], key: str = "ms") -> float | None:
    """Speed of ours over the fastest baseline in a case; None where no baseline was timed.

    Args:
        rows: Rows of the case by baseline.
        key: "ms" for GPU time, "wall_ms" for wall-clock time.
    """
    others = [row[key] for name, row in rows.items() if name not in OURS and key in row]
    return min(others) / rows["ours"][key] if others else None


def speed_up_text(rows: Mapping[str, Row]) -> str:
    """Speed-up of ours over the fastest baseline, by GPU time, with its interval if recorded.

    >>> speed_up_text({"ours": {"ms": 2.0}, "SDPA": {"ms": 3.0}})
    '1.50x'
    >>> low = {"ratio": 1.51, "ratio_low": 1.49, "ratio_high": 1.52}
    >>> speed_up_text({"ours": {"ms": 2.0}, "SDPA": {"ms": 3.0, **low}})
    '1.510x (1.490 to 1.520)'
    """
    ratio = speed_up(rows)
    if ratio is None:
        return ""
    others = (row for name, row in rows.items() if name not in OURS and "ms" in row)
    best = min(others, key=lambda row: row["ms"])
    if "ratio" not in best:
        return f"{ratio:.2f}x"
    return f"{best['ratio']:.3f}x ({best['ratio_low']:.3f} to {best['ratio_high']:.3f})"


def _speeds(report: Report, which: str) -> str:
    names = [name for name, version in report["versions"].items() if version]
    measured = [row for row in report["rows"] if row["pass"] == which]
    known = [name for name in DENSITIES if all(name in row for row in measured)]
    titles = [name.replace("_", " ") for name in known]
    lines = [["case", *titles, *names, "speed-up, GPU", "speed-up, wall-clock"]]
    for case in dict.fromkeys(row["case"] for row in measured):
        rows = {row["peer"]: row for row in measured if row["case"] == case}
        cells = [f"{rows[n]['tflops']:.0f}" if "ms" in rows.get(n, {}) else "" for n in names]
        wall = speed_up(rows, "wall_ms")
        gains = [speed_up_text(rows), "" if wall is None else f"{wall:.2f}x"]
        shares = [f"{rows['ours'][name]:.2%}" for name in known]
        lines.append([case, *shares, *cells, *gains])
    return table(lines)


def _measurements(report: Report) -> str:
    head = [
        "pass",
        "case",
        "by",
        "ms",
        "wall-clock ms",
        "of the matrix peak",
        "of own dense",
        "MiB",
        "SM MHz",
        "W",
    ]
    clocked = any("sm_mhz" in row for row in report["rows"])
    head = head if clocked else head[:-2]
    lines = [head]
    for row in report["rows"]:
        names = [row["pass"], row["case"], row["peer"]]
        if "ms" not in row:
            cells = [f"not timed: {row['left out']}"]
            lines.append([*names, *cells, *[""] * (len(head) - 4)])
            continue
        times = [f"{row[key]:.3f}" for key in ("ms", "wall_ms")]
        shares = [number(row, key, ".0%") for key in ("of_peak", "of_own_dense")]
        clock = [number(row, key, ".0f") for key in ("sm_mhz", "watts")] if clocked else []
        lines.append([*names, *times, *shares, f"{row['peak_mib']:.0f}", *clock])
    return table(lines)


def own_case(report: Report) -> str:
    """One case of the user's as a document."""
    return document(report["case"], own_case_table(report), machine=report["machine"])


def own_case_table(report: Report) -> str:
    """Milliseconds, speed-up of ours, and memory; then why others were not timed."""
    passes = passes_of(report)
    names = list(dict.fromkeys(row["peer"] for row in report["rows"]))
    found = {(row["peer"], row["pass"]): row for row in report["rows"]}
    timed = [name for name in names if any("ms" in found.get((name, w), {}) for w in passes)]
    ours = next((name for name in OURS if name in timed), None)
    head = ["by", *(f"{w} {unit}" for w in passes for unit in ("ms", "speed-up of ours", "MiB"))]
    lines = [head]
    for name in timed:
        cells = [name]
        for which in passes:
            row, base = found[name, which], found.get((ours, which), {})
            if "ms" not in row:
                cells += ["", "", ""]
                continue
            ratio = f"{row['ms'] / base['ms']:.2f}x" if "ms" in base else ""
            cells += [f"{row['ms']:.3f}", ratio, f"{row['peak_mib']:.0f}"]
        lines.append(cells)
    reasons = dict.fromkeys(
        f"{row['peer']}: {row['left out']}" for row in report["rows"] if "left out" in row
    )
    method = ON_GPU if report["device"] == "cuda" else ON_CPU
    text = [f"{report['dtype']}, {_densities(report)}. {method}", "", table(lines)]
    if report.get("hint"):
        text += ["", f"Hint: {report['hint']}."]
    return "\n".join([*text, "", "Not timed:", "", bullets(reasons)] if reasons else text)


def _densities(report: Report) -> str:
    """Name and value of each recorded density; older reports have one."""
    known = [name for name in DENSITIES if name in report]
    return ", ".join(f"{name.replace('_', ' ')} {report[name]:.2%}" for name in known)


def training_steps(report: Report) -> str:
    """Training steps as a document: a line for each variant."""
    more = [name for name in DENSITIES[1:] if any(name in row for row in report["rows"])]
    known = ["density", *more]  # older reports have the density alone
    lines = [["case", "mode", "attention", *(name.replace("_", " ") for name in known), "step ms",
              "examples/s", "tokens/s", "memory MiB", "speed-up"]]  # fmt: skip
    slowest: dict[tuple[str, str], float] = {}  # of dense attention, by case and mode
    for row in report["rows"]:
        if row["attention"] in ("standard", "sdpa") and "step_ms" in row:
            key = (row["case"], row["mode"])
            slowest[key] = max(slowest.get(key, 0.0), row["step_ms"])
    for row in report["rows"]:
        names = [row["case"], row["mode"], row["attention"]]
        if "left out" in row:
            lines.append([*names, f"not timed: {row['left out']}", *[""] * (4 + len(known))])
            continue
        base = slowest.get((row["case"], row["mode"]))
        lines.append(
            [
                *names,
                *(number(row, name, ".1%", "-") for name in known),
                f"{row['step_ms']:.2f}",
                f"{row['examples_per_second']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                number(row, "peak_mib", ",.0f"),
                "" if base is None else f"{base / row['step_ms']:.2f}x",
            ]
        )
    note = (
        "bfloat16 autocast, AdamW; batches of random tokens without padding. Memory: of a step, "
        "above model and optimizer. Density: allowed fraction of the attention matrix; - where "
        "there is none. Speed-up: over standard attention, or over SDPA where its matrix does not "
        "fit, in the same mode."
    )
    return document("Training steps by attention", table(lines), note, machine=report["machine"])
